"""What has a digest: intervals, payloads, logits and archives that every machine has to give alike.

A case yields arrays and bytes; its digest is over them, little-endian. A case is never changed: what computes something
else gets another name. Which backend computes it, the caller has chosen; `device` is "cpu" or a CUDA device.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llmcomp import coding
from llmcomp.codec.compress import compress, decompress
from llmcomp.codec.container import MIXING_VERSIONS
from llmcomp.codec.sampling import generate
from llmcomp.codec.segments import OVERLAP_SHARE_DEFAULT, SegmentCodec
from llmcomp.coding.device_arrays import DeviceArray, cuda_module
from llmcomp.conformance import inputs
from llmcomp.errors import Error
from llmcomp.models.engines.exact import ExactModel, Int8Model
from llmcomp.models.load import load_model
from llmcomp.models.registry import list_models

Part = np.ndarray | bytes
Case = Callable[[str], Iterator[Part]]

ENGINES = {ExactModel.engine: ExactModel, Int8Model.engine: Int8Model}
# [streams, tokens] that models read: synthetic ones more than their windows hold, bundled ones what takes seconds.
_SYNTHETIC_SHAPE, _BUNDLED_SHAPE = (3, 24), (2, 12)
_ARCHIVED_BYTES = 1200
_ADAPTED_BYTES = 2000


class Refusal(Error):
    """A CUDA device does not compute this model, and says so."""


def all_cases() -> dict[str, Case]:
    """Every case by its name, in the order in which they are computed."""
    found: dict[str, Case] = {}
    for dtype in ("float32", "float16"):
        found[f"intervals {dtype}"] = functools.partial(_intervals, dtype)
        found[f"payloads {dtype}"] = functools.partial(_payloads, dtype)
    found["payloads of streams"] = _streams
    for engine in ENGINES:
        for name in inputs.MODELS:
            found[f"logits {name} {engine}"] = functools.partial(_synthetic_model, name, engine)
        for entry in list_models():
            if entry.bundled:
                found[f"logits {entry.name} {engine}"] = functools.partial(_bundled_model, entry.name, engine)
        found[f"archive {engine}"] = functools.partial(_archive, engine)
    for dtype in ("float32", "float16"):
        found[f"payloads mixed {dtype}"] = functools.partial(_mixed_payloads, dtype)
    for engine in ENGINES:
        found[f"archive mixed {engine}"] = functools.partial(_mixed_archive, engine)
        found[f"scores adapted {engine}"] = functools.partial(_adapted_scores, engine)
    return found


def digest(case: Case, device: str) -> str:
    """128 bits of the SHA-256 over what `case` yields on `device`, hexadecimal."""
    found = hashlib.sha256()
    for part in case(device):
        data = part if isinstance(part, bytes) else part.astype(part.dtype.newbyteorder("<")).tobytes()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:32]


def _on_device(array: np.ndarray, device: str) -> Any:
    """The array itself, or its copy on a CUDA device."""
    if device == "cpu":
        return array
    number = int(device.partition(":")[2])
    copied = DeviceArray(array.shape, array.dtype.name, number)
    cuda_module().upload(number, 0, copied.pointer, array)
    return copied


def _on_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.numpy()


def _intervals(dtype: str, device: str) -> Iterator[Part]:
    for logits, tokens in inputs.logit_rows(dtype):
        yield from map(_on_host, coding.intervals(_on_device(logits, device), tokens))


def _payloads(dtype: str, device: str) -> Iterator[Part]:
    for logits, tokens in inputs.logit_rows(dtype):
        rows = _on_device(logits, device)
        payload = coding.encode(rows, tokens)
        _demand((_on_host(coding.decode(payload, rows)) == tokens).all(), "a payload decodes to other tokens")
        yield payload


def _streams(device: str) -> Iterator[Part]:
    """Streams side by side, some of which pause and end before others."""
    n_streams, n_steps, vocab_size = 5, 60, 300
    logits = inputs.draw_floats(7, n_steps, n_streams, vocab_size) * np.float32(4)
    tokens = inputs.draw_tokens(8, (n_steps, n_streams), vocab_size)
    active = inputs.draw(9, n_steps * n_streams).reshape(n_steps, n_streams) % np.uint64(4) > 0
    active[40:, 2] = False
    encoder = coding.Encoder(n_streams)
    for step in range(n_steps):
        encoder.push(_on_device(logits[step], device), tokens[step], active[step])
    payloads = encoder.finish()
    decoder = coding.Decoder(payloads)
    for step in range(n_steps):
        found = _on_host(decoder.pull(_on_device(logits[step], device), active[step]))
        _demand((found == tokens[step])[active[step]].all(), "a stream decodes to other tokens")
    yield from payloads


def _synthetic_model(name: str, engine: str, device: str) -> Iterator[Part]:
    arguments = inputs.model_arguments(name)
    if device == "cpu":
        return _model_logits(ENGINES[engine](**arguments), _SYNTHETIC_SHAPE)
    from llmcomp.models.engines import cuda

    classes = {ExactModel.engine: cuda.CudaModel, Int8Model.engine: cuda.CudaInt8Model}
    try:
        model = classes[engine](**arguments, device=device)
    except Error as error:
        raise Refusal(str(error)) from None
    return _model_logits(model, _SYNTHETIC_SHAPE)


def _bundled_model(name: str, engine: str, device: str) -> Iterator[Part]:
    """Of the last step."""
    return _model_logits(load_model(name, None, engine, device=device), _BUNDLED_SHAPE)


def _model_logits(model: Any, shape: tuple[int, int]) -> Iterator[Part]:
    """Logits in one pass; the steps of a session have to give the same."""
    tokens = inputs.draw_tokens(model.n_logits, shape, model.n_logits)
    logits = model.logits(tokens)
    session = model.session(*shape)
    steps = np.stack([session.step(column) for column in tokens.T], axis=1)
    _demand((steps.view(np.uint32) == logits.view(np.uint32)).all(), "step by step the logits have other bits")
    yield logits


def _archive(engine: str, device: str) -> Iterator[Part]:
    """What the smallest model makes of text and of bytes that are none, in format 1, whose writer chooses nothing."""
    words = b"the bits that are counted are the bits that decode, and "
    data = words * (_ARCHIVED_BYTES // len(words)) + inputs.draw(10, 40).astype("<u8").tobytes()
    model = load_model("pico-13k", None, engine, device=device)
    blob = compress(data, model, segment_bytes=512, salt=b"")
    _demand(decompress(blob, model) == data, "an archive decodes to other bytes")
    yield blob


def _mixed_payloads(dtype: str, device: str) -> Iterator[Part]:
    """Streams whose tokens come again in contexts of every order: their intervals, mixed, and payloads."""
    for logits, drawn in inputs.logit_rows(dtype):
        tokens = inputs.phrases(drawn)
        mixed = coding.mix_intervals(tokens, *map(_on_host, coding.intervals(_on_device(logits, device), tokens)))
        payload = coding.encode_intervals(*mixed)
        decoder = coding.Decoder([payload], n_tokens_max=[len(tokens)])
        found = [int(decoder.pull(row[None])[0]) for row in logits]
        _demand(found == tokens.tolist(), "a mixed payload decodes to other tokens")
        yield from mixed
        yield payload


def _mixed_archive(engine: str, device: str) -> Iterator[Part]:
    """Format 2: segments that are mixed, one that is shorter without (the model's own sample), and stored noise."""
    words = b"a segment teaches what comes again; what comes again is cheap, and "
    model = load_model("pico-13k", None, engine, device=device)
    sample = generate(model, 600, seed=11, progress=False)
    data = (words * _ARCHIVED_BYTES)[:_ARCHIVED_BYTES] + sample + _noise(11, 599)
    # Stock codecs are others' programs: their bytes differ with their versions.
    blob = compress(data, model, overlap=32, segment_bytes=600, salt=bytes(range(16)), stock=False)
    _demand(decompress(blob, model) == data, "a mixed archive decodes to other bytes")
    yield blob


def _adapted_scores(engine: str, device: str) -> Iterator[Part]:
    """The payloads that scores with `adapt` count: a stream over several windows, and one that ends at once."""
    words = b"The stream goes on where a window ends; 0123456789.\n"
    chunks = [words * (_ADAPTED_BYTES // len(words)) + _noise(12, 60), words[:7]]
    model = load_model("pico-13k", None, engine, device=device)
    overlap = int(model.context_length * OVERLAP_SHARE_DEFAULT)
    codec = SegmentCodec(model, overlap=overlap, mixing=MIXING_VERSIONS[-1])
    payloads = [coded.payload for coded in codec.encode(chunks)]
    _demand(codec.decode(payloads, [len(chunk) for chunk in chunks]) == chunks, "an adapted chunk decodes to others")
    yield from payloads


def _noise(seed: int, n_bytes: int) -> bytes:
    return inputs.draw(seed, -(-n_bytes // 8)).astype("<u8").tobytes()[:n_bytes]


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise Error(what)

"""Segments of bytes to payloads and back with one model: what archives and scores are both made of.

A segment is cut into tokens by a mapping, the tokens are coded through the windows of windows.py. Where payloads lie
in an archive is container.py's business; files, streams and tables are codec.py's and archive.py's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmcomp import coding
from llmcomp.codec import container
from llmcomp.codec.container import Header, ModelId, Segment
from llmcomp.codec.windows import WindowedModel
from llmcomp.data import mappings
from llmcomp.data.mappings import Encoded
from llmcomp.errors import CorruptArchive, Error, ModelMismatch
from llmcomp.models.adapter import AdaptedModel, ModelTraits
from llmcomp.models.load import load_model, load_registered
from llmcomp.models.memory import MaxMemory
from llmcomp.models.registry import list_models

# Codes of engines in an archive; 0 is any object with logits() and session() that names no engine.
ENGINE_CODES = {"": 0, "exact": 1, "torch": 2, "exact-int8": 3}
MAPPING_DEFAULT = "bytes"
# Chosen by benchmarks/bench_archive.py --overlaps: a quarter of the context saves 1.6 % of enwik8 and takes 1.4 times
# as long to decode, half of it 1.8 % and 1.9 times (benchmarks/results/archive.md).
OVERLAP_SHARE_DEFAULT = 0.25
_REVISION = re.compile(r"(?:step([0-9]{1,9}))?")
# The side byte of mapping bytes with a vocabulary that lacks some.
_BIT_UNSET, _BIT_SET = b"\x00", b"\x80"


def _hash_prefix(fingerprint: str | None, n_bytes: int) -> bytes:
    """The first bytes of a hexadecimal SHA-256; of any other text, the first of its own SHA-256; zeros for None."""
    if not fingerprint:
        return bytes(n_bytes)
    try:
        raw = bytes.fromhex(fingerprint)
    except ValueError:
        raw = b""
    return (raw if len(raw) >= n_bytes else hashlib.sha256(fingerprint.encode()).digest())[:n_bytes]


def _check_identity(wanted: ModelId, traits: ModelTraits) -> None:
    """ModelMismatch unless that model decodes what `wanted` coded; both are named with what differs."""
    found = _identity(traits, wanted.mapping, wanted.context_length, wanted.overlap, wanted.mixing)
    by_name = not any(wanted.weights_hash)
    differing = [
        field
        for field in ("arithmetic_version", "engine", "weights_hash", "tokenizer_hash", "vocab_size", "bos_token")
        if getattr(found, field) != getattr(wanted, field)
    ]
    if by_name and (wanted.name, wanted.revision) != (found.name, found.revision):
        differing.append("name")
    if wanted.context_length > traits.context_length:
        differing.append(f"context of {wanted.context_length} tokens, found {traits.context_length}")
    if differing:
        raise ModelMismatch(
            f"the archive needs {_describe(wanted)}; found {_describe(found)} (different: {', '.join(differing)})"
        )


def _describe(identity: ModelId) -> str:
    engine = _engine_name(identity.engine)
    weights = f"weights {identity.weights_hash.hex()[:12]}" if any(identity.weights_hash) else "weights not recorded"
    parts = [identity.name, identity.revision, f"engine {engine}" if engine else "", weights]
    return ", ".join(part for part in parts if part)


def _engine_name(code: int) -> str:
    return next((name for name, known in ENGINE_CODES.items() if known == code), "")


def _identity(traits: ModelTraits, mapping: int, context_length: int, overlap: int, mixing: int) -> ModelId:
    if traits.engine not in ENGINE_CODES:
        raise Error(
            f"no archive knows engine {traits.engine!r}; expected one of {', '.join(filter(None, ENGINE_CODES))}"
        )
    return ModelId(
        name=traits.name,
        revision=traits.revision,
        weights_hash=_hash_prefix(traits.fingerprint, container.WEIGHTS_HASH_BYTES),
        tokenizer_hash=_hash_prefix(traits.tokenizer.fingerprint, container.TOKENIZER_HASH_BYTES),
        arithmetic_version=traits.arithmetic,
        engine=ENGINE_CODES[traits.engine],
        mapping=mapping,
        context_length=context_length,
        overlap=overlap,
        vocab_size=traits.vocab_size,
        bos_token=traits.bos_token,
        mixing=mixing,
    )


def windowed_model(
    model: Any, overlap: int | None = None, context_length: int | None = None, max_memory: MaxMemory = None
) -> WindowedModel:
    """`model` with the windows that archives are coded with; None: the defaults."""
    adapted = model if isinstance(model, AdaptedModel) else AdaptedModel(model)
    traits = adapted.traits
    context_length = traits.context_length if context_length is None else context_length
    return WindowedModel(
        adapted,
        vocab_size=traits.vocab_size,
        bos_token=traits.bos_token,
        context_length=context_length,
        overlap=int(context_length * OVERLAP_SHARE_DEFAULT) if overlap is None else overlap,
        is_stepwise=traits.engine == "torch",
        max_memory=max_memory,
    )


# Segments.


def as_chunks(chunks: Iterable[Any]) -> list[bytes]:
    """The chunks of a user as bytes; `Error` for one chunk or a name where several are meant, and for other items."""
    if isinstance(chunks, (bytes, bytearray, memoryview, str, os.PathLike)):
        raise Error(
            f"chunks are one {type(chunks).__name__}; expected several bytes objects, as load_dataset gives them"
        )
    found = []
    for number, chunk in enumerate(chunks):
        try:
            found.append(bytes(memoryview(chunk)))
        except TypeError:
            raise Error(f"chunk {number} is a {type(chunk).__name__}; expected bytes") from None
    return found


class Coded(NamedTuple):
    """A coded segment: `side` bytes that the mapping needs, and the coder's `stream`; one after the other the payload.

    A payload is never empty: the decoder reads zeros behind the end of a stream, so one of no bytes is also one zero.
    """

    side: bytes
    stream: bytes
    side_bits: int
    n_tokens: int
    ideal_bits: float

    @property
    def payload(self) -> bytes:
        return self.side + self.stream or b"\0"


class SegmentCodec:
    """Segments of bytes <-> payloads with one model, one mapping and one window plan.

    The payload of a segment depends on nothing else: not on the segments beside it, lanes, threads or backend.
    `mixing`: the version of what is learnt from the segment itself, 0 for nothing (FORMAT.md, "Mixing").
    `is_stepwise` None: step by step with the torch engine, whose one-pass logits are not bit for bit its steps'.
    """

    def __init__(
        self,
        model: Any,
        mapping: str = MAPPING_DEFAULT,
        overlap: int | None = None,
        context_length: int | None = None,
        is_stepwise: bool | None = None,
        *,
        max_memory: MaxMemory = None,
        mixing: int = 0,
    ):
        adapted = AdaptedModel(model)
        self.traits = adapted.traits
        self._mapping = mappings.get_mapping(mapping)
        self._model = windowed_model(adapted, overlap, context_length, max_memory)
        if is_stepwise is not None:
            self._model.is_stepwise = is_stepwise
        context_length, overlap = self._model.context_length, self._model.overlap
        self._model.is_mixed = mixing != 0
        self.identity = _identity(self.traits, mappings.MAPPINGS.index(mapping), context_length, overlap, mixing)
        # One side bit a segment says whether stand-ins are in use, of a vocabulary that has no token for some bytes,
        # or whether the tokens begin with the space that another tokenizer puts before text in training.
        self._prefix = mappings.prefix_of(self.traits.tokenizer) if mapping == "bytes" else b""
        lacks_bytes = mapping == "bytes" and self.traits.tokenizer.needs_stand_ins(bytes(range(256)))
        self._has_stand_ins = lacks_bytes and not self._prefix
        self._has_side_bit = lacks_bytes or bool(self._prefix)
        self._lanes = adapted.lanes(context_length)

    @classmethod
    def for_archive(
        cls, header: Header, model: Any = None, device: str | None = None, download: bool = False
    ) -> SegmentCodec | None:
        """The codec that decodes an archive, or None where it needs no model; ModelMismatch for another model.

        Without `model`, the one that the header names is loaded if it is one of the registry, and bundled or in the
        cache, or with `download` to be had: a name from a file is never taken for a folder or another name of the hub.
        """
        if header.model is None:
            return None
        wanted = header.model
        if wanted.mapping >= len(mappings.MAPPINGS):
            raise CorruptArchive(f"the archive's header has mapping {wanted.mapping}, which this llmcomp does not know")
        model = _model_of_header(wanted, device, download) if model is None else load_model(model, device=device)
        traits = ModelTraits.of(model)
        _check_identity(wanted, traits)
        mapping = mappings.MAPPINGS[wanted.mapping]
        return cls(model, mapping, wanted.overlap, wanted.context_length, mixing=wanted.mixing)

    @property
    def lanes(self) -> int:
        """How many segments are decoded side by side unless the caller says otherwise."""
        return self._lanes

    @property
    def batch_rows(self) -> int | None:
        """How many rows a batch of the model may have; None where streams are stepped through."""
        return self._model.batch_rows

    def encode(self, contents: Sequence[bytes]) -> list[Coded]:
        """The coded form of every segment. Error where the mapping or the model cannot code one."""
        return self.start([self._mapping.encode(content, self.traits.tokenizer) for content in contents])()

    def start(self, encoded: Sequence[Encoded]) -> Callable[[], list[Coded]]:
        """Gives the model the work of `encode` for segments whose tokens are known; what is returned codes them, on any
        thread."""
        wait = self._model.start_intervals([item.tokens for item in encoded])
        return lambda: [self._code(item, parts) for item, parts in zip(encoded, wait(), strict=True)]

    def _code(self, item: Encoded, parts: npt.NDArray[np.uint64]) -> Coded:
        side, side_bits = (item.side or _BIT_UNSET, 1) if self._has_side_bit else (item.side, item.side_bits)
        ideal_bits = -np.log2(parts[1].astype(np.float64) / parts[2].astype(np.float64)).sum()
        return Coded(side, coding.encode_intervals(*parts), side_bits, len(item.tokens), float(ideal_bits))

    def decode(
        self,
        payloads: Sequence[bytes],
        n_bytes: Sequence[int],
        on_step: Callable[[int], Any] | None = None,
    ) -> list[bytes]:
        """The contents of segments of `n_bytes` each, from their payloads; CorruptArchive where they do not fit."""
        sides = [self._side(payload, n) for payload, n in zip(payloads, n_bytes, strict=True)]
        left = sum(n_bytes)

        def report(n_done: int) -> None:
            # The spaces put before segments are no bytes of theirs.
            nonlocal left
            n_done = min(n_done, left)
            left -= n_done
            if on_step is not None:
                on_step(n_done)

        streams = self._model.decode(
            [payload[len(side) :] for payload, side in zip(payloads, sides, strict=True)],
            [n + len(self._prefix) * (side == _BIT_SET) for n, side in zip(n_bytes, sides, strict=True)],
            self._token_bytes,
            [int(self._uses_stand_ins(side)) for side in sides],
            report,
        )
        return [self._join(*parts) for parts in zip(streams, sides, n_bytes, strict=True)]

    def decode_segments(self, segments: Sequence[Segment], on_step: Callable[[int], Any] | None = None) -> list[bytes]:
        """The contents of an archive's segments, stored ones included; CorruptArchive names the first that fails."""
        coded = [segment for segment in segments if not segment.stored]
        for segment in coded:
            self._check_form(segment)
        try:
            contents = self.decode([s.payload for s in coded], [s.n_bytes for s in coded], on_step)
        except CorruptArchive as error:
            first, last = segments[0].number, segments[-1].number
            raise CorruptArchive(
                f"segments {first} to {last} do not decode, though their checksums are right ({error}): the model "
                "computes something else here than where they were coded"
            ) from None
        decoded = iter(contents)
        return [segment.payload if segment.stored else next(decoded) for segment in segments]

    def _side(self, payload: bytes, n_bytes: int) -> bytes:
        """The side bytes of a payload; CorruptArchive where its form is one that no encoder writes."""
        n_bits = {"bytes": int(self._has_side_bit), "latin1": 0}.get(self._mapping.name, n_bytes)
        length = -(-n_bits // 8)
        side, stream = payload[:length], payload[length:]
        if len(side) < length or (side and side[-1] % (1 << 8 * length - n_bits)):
            raise CorruptArchive(
                f"a payload of {len(payload)} bytes does not begin with {n_bits} side bits in whole bytes"
            )
        if stream.endswith(b"\0") and payload != b"\0":
            raise CorruptArchive("a stream ends in a zero byte, which an encoder leaves out")
        return side

    def _check_form(self, segment: Segment) -> None:
        """CorruptArchive names a segment that no encoder writes; another model is not to blame for it."""
        try:
            self._side(segment.payload, segment.n_bytes)
        except CorruptArchive as error:
            raise CorruptArchive(f"segment {segment.number} is malformed: {error}") from None

    def _uses_stand_ins(self, side: bytes) -> bool:
        return self._has_stand_ins and side == _BIT_SET

    @functools.cached_property
    def _token_bytes(self) -> npt.NDArray[np.int64]:
        """How many original bytes each token completes, -1 where it stands for none: int64 [2, vocab_size].

        The second row holds where stand-ins are in use. Under latin1 a byte above 127 is complete with the second of
        its two UTF-8 bytes, which may come with the next token.
        """
        table = np.full((2, self.traits.vocab_size), -1, np.int64)
        is_latin1 = self._mapping.name == "latin1"
        for stand_ins in (False, True)[: 1 + self._has_stand_ins]:
            for token in range(self.traits.vocab_size):
                with contextlib.suppress(Error):
                    raw = self.traits.tokenizer.decode_bytes([token], stand_ins=stand_ins)
                    table[int(stand_ins), token] = sum(byte < 0xC0 for byte in raw) if is_latin1 else len(raw)
        return table

    def _join(self, stream: npt.NDArray[np.int32], side: bytes, n_bytes: int) -> bytes:
        if self._has_stand_ins and not self._uses_stand_ins(side):
            side = b""
        try:
            return self._mapping.decode(stream, side, n_bytes, self.traits.tokenizer)
        except Error as error:
            raise CorruptArchive(str(error)) from None


def _model_of_header(wanted: ModelId, device: str | None, download: bool) -> Any:
    revision = _REVISION.fullmatch(wanted.revision)
    if revision is None or wanted.name not in {entry.name for entry in list_models()}:
        raise Error(
            f"the archive needs {_describe(wanted)}, which is neither bundled nor in the registry: name the model"
        )
    step = int(revision[1]) if revision[1] else None
    engine = _engine_name(wanted.engine) or "exact"
    return load_registered(wanted.name, step, engine, device=device, download=download)

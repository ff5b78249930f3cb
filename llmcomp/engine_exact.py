"""The exact engine: GPT-NeoX checkpoints in Hugging Face's layout for the C core, which computes them bit for bit alike
on every machine, for any batch, padding, number of threads, and in one pass as step by step.

Here files are read and checked; weights stay mapped from the file. No arithmetic, and no tokens' meaning, lives here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmcomp import _core
from llmcomp.errors import Error
from llmcomp.memory import PassMemory, host_memory
from llmcomp.tokens import Tokenized

# Version of the arithmetic of csrc/FORMAT.md: a part of every fingerprint.
ARITHMETIC = 1

# Rows of a batch, at most; more do not make the products faster.
_BATCH_ROWS = 8192
# Buffers of one thread in a pass: a block of logits and the panels of one group.
_THREAD_BYTES = 16 << 20

# Keys and values of streams that are decoded side by side: at most what a third cache of usual size keeps from step to
# step, in lanes that fill a vector, but no fewer than such a vector for every thread (benchmarks/results/archive.md).
_KEPT_BYTES = 16 << 20
_LANES_STEP = 8
_LANES_MAX = 32
_SESSION_BYTES_MAX = 256 << 20

_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DTYPES = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}
# Buffers that old checkpoints store beside the weights.
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq", ".attention.rotary_emb.inv_freq")
_HEAD_NAMES = ("embed_out.weight", "lm_head.weight")


class Tensor(NamedTuple):
    """Weights as they are stored: `data` is float32, float16, or uint16 that holds bfloat16, as `dtype` says."""

    data: np.ndarray
    dtype: str


class NeoxConfig(NamedTuple):
    """What of a config.json the result depends on. `rotary_dims`: how much of each head carries the position."""

    n_layers: int
    n_heads: int
    hidden: int
    intermediate: int
    n_logits: int
    context_length: int
    rotary_dims: int
    rotary_base: float
    layer_norm_epsilon: float
    parallel_residual: bool
    attention_bias: bool
    tied: bool


class ExactModel(Tokenized):
    """A GPT-NeoX model in the C core, made by `load_exact` or from arrays.

    `n_logits` logits a row, of which the first `vocab_size` are tokens; the padded rest gets no probability.
    `n_params` counts tied weights once. `fingerprint` (SHA-256, hex) is over all that the coded bits depend on:
    weights, configuration, tokenizer and version of the arithmetic; `weights_sha256` is over the weights alone.
    """

    engine = "exact"
    device = "cpu"
    _is_int8 = False
    attention = None

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, np.ndarray | Tensor],
        *,
        name: str = "model",
        step: int | None = None,
        vocab_size: int | None = None,
        tokenizer_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """`config`: what config.json says; `weights`: float32 or float16 arrays by their names in the checkpoint."""
        self.name, self.step = name, step
        self.config = _parse_config(config, name)
        self.n_logits, self.context_length = self.config.n_logits, self.config.context_length
        self._tokenizer_path = tokenizer_path
        self._tensors = _canonical_tensors(self.config, weights, name)
        self.dtype = self._tensors["embed_in.weight"].dtype
        self.n_params = sum(tensor.data.size for tensor in self._tensors.values())
        if vocab_size is not None:
            if not 1 <= vocab_size <= self.n_logits:
                raise Error(f"{name}: vocab_size is {vocab_size}, expected 1 to {self.n_logits}")
            self.vocab_size = vocab_size
        self._core = self._make_core()

    def _make_core(self) -> Any:
        return _core.NeoxModel(**core_arguments(self.config, self._tensors), int8=self._is_int8)

    @functools.cached_property
    def weights_sha256(self) -> str:
        return _tensors_sha256(self._tensors)

    @functools.cached_property
    def fingerprint(self) -> str:
        try:
            tokenizer = self.tokenizer.fingerprint
        except Error:
            tokenizer = None
        facts = {
            "arithmetic": ARITHMETIC,
            "config": self.config._asdict(),
            "tokenizer": tokenizer,
            "vocab_size": self.vocab_size,
            "weights": self.weights_sha256,
        }
        if self._is_int8:
            facts["engine"] = self.engine
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def pass_memory(self) -> PassMemory:
        """What a pass takes: for every row residual, query, key and value in float32, the token and its interval."""
        # An `Int8Model` keeps no tensors but its codes, a byte a weight.
        weight_bytes = sum(tensor.data.nbytes for tensor in self._tensors.values()) or self.n_params
        n_threads = _core.context_in_use()[1]
        return PassMemory(
            4 * 4 * self.config.hidden + 64, n_threads * _THREAD_BYTES, weight_bytes, *host_memory(), _BATCH_ROWS
        )

    def logits(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> np.ndarray:
        """int [B, T] -> float32 [B, T, n_logits]. Rows at and beyond `lengths[b]` are padding and come out as zeros."""
        return self._core.logits(tokens, lengths)

    def intervals(
        self,
        tokens: npt.ArrayLike,
        targets: npt.ArrayLike,
        lengths: npt.ArrayLike | None = None,
        vocab_size: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The integer intervals of `targets` after `tokens`, int [B, T] each: (start, freq, total), uint64 [B, T].

        Logits exist a block of rows at a time, never as a whole. Rows from `lengths[b]` on are padding and give 0.
        """
        return self._core.intervals(tokens, targets, lengths, vocab_size or self.vocab_size)

    def log2_probabilities(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None
    ) -> np.ndarray:
        """log2 of the softmax over all `n_logits` at `targets` after `tokens`, int [B, T] each: float64 [B, T], the
        numbers of `coding.log2_softmax`, for scores.

        Logits exist a block of rows at a time, never as a whole. Rows from `lengths[b]` on are padding and give 0.
        """
        return self._core.log2_probabilities(tokens, targets, lengths)

    def session(self, n_streams: int, n_tokens: int | None = None) -> _core.NeoxSession:
        """A session of `n_streams` independent streams of up to `n_tokens` tokens (default: the context length).

        `step(tokens, active=None)`: int [n_streams] -> float32 [n_streams, n_logits], the bits of `logits`; rows of
        streams that are not active are zeros. `prefill(stream, tokens)` reads many tokens of one stream at once and
        returns the logits after the last, float32 [n_logits]. `reset(stream=None)` starts one stream, or all, again.
        `positions`: int64 [n_streams], tokens read.
        """
        return self._core.session(n_streams, self.context_length if n_tokens is None else n_tokens)

    def lanes(self, n_tokens: int) -> int:
        """How many streams of `n_tokens` tokens to decode side by side: what the processor's caches hold of their keys
        and values, or what keeps all threads busy, as far as memory goes."""
        stream_bytes = 2 * 4 * self.config.n_layers * self.config.hidden * n_tokens
        kept = _KEPT_BYTES // stream_bytes // _LANES_STEP * _LANES_STEP
        busy = _LANES_STEP * _core.context_in_use()[1]
        return max(1, min(max(kept, busy), _LANES_MAX, _SESSION_BYTES_MAX // stream_bytes))

    def decoding_chain(self, n_streams: int, n_tokens: int, vocab_size: int) -> Any:
        """A `DecodingChain`, or what a subclass has instead, for `n_streams` payloads and windows of `n_tokens`."""
        return DecodingChain(self, n_streams, n_tokens, vocab_size)


class DecodingChain:
    """Payloads to tokens, side by side: steps of the model and of the decoders in turn, many of them in one call."""

    steps_max = 64

    def __init__(self, model: ExactModel, n_streams: int, n_tokens: int, vocab_size: int) -> None:
        self.n_streams = n_streams
        self._vocab_size = vocab_size
        self._session = model.session(n_streams, n_tokens)

    def begin(self, payloads: Sequence[bytes]) -> None:
        """At most `n_streams` payloads, each at its start."""
        rest = [b""] * (self.n_streams - len(payloads))
        self._decoder = _core.Decoder([*payloads, *rest], self._vocab_size)

    def open_window(self, lanes: npt.NDArray[np.intp], inputs: npt.NDArray[np.int32]) -> None:
        """Only the streams `lanes` go on, each after it has read its row of `inputs`, int32 [n_lanes, k], and no more.

        The last input is read by the first step.
        """
        self._session.reset()
        self._lanes = lanes
        self._inputs = np.zeros(self.n_streams, np.int64)
        self._inputs[lanes] = inputs[:, -1]
        for lane, row in zip(lanes, inputs[:, :-1], strict=True):
            if len(row):
                self._session.prefill(int(lane), row)

    def run(self, n_steps: int, active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """`n_steps` <= `steps_max` tokens of every lane, int32 [n_steps, n_lanes], `active` bool [n_lanes].

        -1 where a lane is not active. A lane that is set inactive stays so until the next window. `Error` names the
        stream whose logits give no distribution.
        """
        going = np.zeros(self.n_streams, np.bool_)
        going[self._lanes] = active
        found = self._session.decode(self._decoder, self._inputs, n_steps, going)
        self._inputs = found[-1]
        return found[:, self._lanes]

    def fault(self) -> str:
        """What a row had that has no token; `run` has raised it."""
        return "no error"


class Int8Model(ExactModel):
    """A GPT-NeoX model whose linear maps and head are computed in 8-bit integers: another arithmetic than `ExactModel`,
    with other logits, but as exact and as much the same everywhere.

    Weights become 8-bit codes with a scale a row while loading, activations with a scale a token: csrc/FORMAT.md, 4.7.
    The codes take a quarter of the memory of float32; of the checkpoint only the embedding is kept. `dtype` is "int8";
    `weights_sha256` is over the checkpoint's weights, as with the other engines. `Error` for more than 2**17 inputs of
    a linear map.
    """

    engine = "exact-int8"
    _is_int8 = True

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, np.ndarray | Tensor], **options: Any) -> None:
        """Arguments as `ExactModel`."""
        super().__init__(config, weights, **options)
        self.weights_sha256 = _tensors_sha256(self._tensors)
        self._tensors = {}
        self.dtype = "int8"


def load_exact(
    folder: str | os.PathLike[str],
    *,
    engine: str = "exact",
    name: str | None = None,
    step: int | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    weights: Mapping[str, np.ndarray | Tensor] | None = None,
) -> ExactModel:
    """Load a GPT-NeoX model from a folder in Hugging Face's layout: config.json and safetensors, sharded or not.

    Weights (float32, float16, bfloat16) stay mapped from the file, so that a new checkpoint may take the file's place
    but must not be written into it while the model lives; `weights` replaces the folder's. `engine` "exact-int8" gives
    an `Int8Model`. Raises `Error`.
    """
    found = read_checkpoint(folder, name=name, step=step, tokenizer_path=tokenizer_path, weights=weights)
    return (Int8Model if engine == Int8Model.engine else ExactModel)(**found)


def read_checkpoint(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    step: int | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    weights: Mapping[str, np.ndarray | Tensor] | None = None,
) -> dict[str, Any]:
    """The arguments of `ExactModel` for the checkpoint in `folder`. Arguments and errors as `load_exact`."""
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    if weights is None:
        weights = _read_weights(folder)
    own = folder / "tokenizer.json"
    tokenizer_path = tokenizer_path or (own if own.is_file() else None)
    found = {"config": config, "weights": weights, "name": name or folder.name, "step": step}
    return {**found, "tokenizer_path": tokenizer_path}


def stored_weights_sha256(
    folder: str | os.PathLike[str], weights: Mapping[str, np.ndarray | Tensor] | None = None
) -> str:
    """`ExactModel.weights_sha256` of the checkpoint in `folder`, for whoever runs it otherwise. Arguments and errors as
    `load_exact`."""
    folder = Path(folder)
    config = _parse_config(_read_json(folder / "config.json"), folder.name)
    return _tensors_sha256(_canonical_tensors(config, weights or _read_weights(folder), folder.name))


def tensor_shapes(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights of a checkpoint with this config.json."""
    return [
        (name if name in _HEAD_NAMES else f"gpt_neox.{name}", shape)
        for name, shape in _expected_shapes(_parse_config(config, "config.json"))
    ]


# Configuration.


def _parse_config(config: Mapping[str, Any], name: str) -> NeoxConfig:
    """Defaults are those of transformers' GPTNeoXConfig, which leaves them out of the file."""
    architecture = config.get("model_type")
    if architecture != "gpt_neox":
        raise Error(f"{name}: model_type is {architecture!r}, the exact engine computes 'gpt_neox' only")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise Error(f"{name}: hidden_act is {activation!r}, the exact engine computes 'gelu' (with erf) only")
    sizes = {
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "vocab_size": 50432,
        "max_position_embeddings": 2048,
    }
    sizes = {key: config.get(key, default) for key, default in sizes.items()}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise Error(f"{name}: {key} is {value!r}, expected a positive integer")
    hidden, n_heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % n_heads:
        raise Error(f"{name}: hidden_size {hidden} is no multiple of num_attention_heads {n_heads}")
    fraction, base = _parse_rotary(config, name)
    rotary_dims = int(hidden // n_heads * fraction)
    if rotary_dims % 2 or not 0 <= fraction <= 1:
        raise Error(
            f"{name}: {fraction} of heads of {hidden // n_heads} are {rotary_dims} rotary dimensions, "
            "expected an even number"
        )
    return NeoxConfig(
        n_layers=sizes["num_hidden_layers"],
        n_heads=n_heads,
        hidden=hidden,
        intermediate=sizes["intermediate_size"],
        n_logits=sizes["vocab_size"],
        context_length=sizes["max_position_embeddings"],
        rotary_dims=rotary_dims,
        rotary_base=base,
        layer_norm_epsilon=_number(config, "layer_norm_eps", 1e-5, name),
        parallel_residual=bool(config.get("use_parallel_residual", True)),
        attention_bias=bool(config.get("attention_bias", True)),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _parse_rotary(config: Mapping[str, Any], name: str) -> tuple[float, float]:
    """(fraction of a head, base) in any of the spellings of transformers 4 and 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise Error(f"{name}: rope_parameters or rope_scaling is {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise Error(f"{name}: rotary positions are of type {kind!r}, the exact engine computes 'default' only")
    merged = {**config, **rope}
    fraction = _number(
        merged, "partial_rotary_factor" if "partial_rotary_factor" in merged else "rotary_pct", 0.25, name
    )
    base = _number(merged, "rope_theta" if "rope_theta" in merged else "rotary_emb_base", 10000.0, name)
    return fraction, base


def _number(config: Mapping[str, Any], key: str, default: float, name: str) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise Error(f"{name}: {key} is {value!r}, expected a number")
    return float(value)


# Tensors.


def _expected_shapes(config: NeoxConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names without the prefix, in the order that the core takes them in; biases that the model lacks are left out."""
    hidden, wide = config.hidden, config.intermediate
    yield "embed_in.weight", (config.n_logits, hidden)
    yield "final_layer_norm.weight", (hidden,)
    yield "final_layer_norm.bias", (hidden,)
    if not config.tied:
        yield "embed_out.weight", (config.n_logits, hidden)
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
            yield f"{layer}.{norm}.bias", (hidden,)
        for linear, shape in (
            ("attention.query_key_value", (3 * hidden, hidden)),
            ("attention.dense", (hidden, hidden)),
            ("mlp.dense_h_to_4h", (wide, hidden)),
            ("mlp.dense_4h_to_h", (hidden, wide)),
        ):
            yield f"{layer}.{linear}.weight", shape
            if config.attention_bias or not linear.startswith("attention"):
                yield f"{layer}.{linear}.bias", shape[:1]


def _canonical_tensors(config: NeoxConfig, weights: Mapping[str, np.ndarray | Tensor], name: str) -> dict[str, Tensor]:
    """Exactly the tensors that the model has, under one set of names, contiguous and aligned."""
    found = {}
    for key, value in weights.items():
        short = key.removeprefix("gpt_neox.")
        if short in _HEAD_NAMES:
            short = _HEAD_NAMES[0]
        if not f".{short}".endswith(_BUFFERS):
            found[short] = value
    result = {}
    for key, shape in _expected_shapes(config):
        if key not in found:
            raise Error(f"{name}: the weights lack {key}, shape {list(shape)}")
        tensor = _as_tensor(found.pop(key), key, name)
        if tensor.data.shape != shape:
            raise Error(f"{name}: {key} has shape {list(tensor.data.shape)}, expected {list(shape)}")
        result[key] = tensor
    if config.tied:
        found.pop(_HEAD_NAMES[0], None)
    if found:
        raise Error(f"{name}: the weights have {len(found)} tensors that the model does not, the first is {min(found)}")
    return result


def _as_tensor(value: np.ndarray | Tensor, key: str, name: str) -> Tensor:
    data, dtype = value if isinstance(value, Tensor) else (np.asarray(value), None)
    if dtype is None:
        dtype = data.dtype.name
        if dtype not in ("float32", "float16"):
            raise Error(f"{name}: {key} has dtype {dtype}, expected float32, float16 or bfloat16")
    return Tensor(np.require(data, data.dtype.newbyteorder("="), ["C", "A"]), dtype)


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.data.shape}\n".encode())
        data = tensor.data if sys.byteorder == "little" else tensor.data.byteswap()
        digest.update(data.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def core_arguments(config: NeoxConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the C core's NeoxModel is made of, here and on a device."""

    def data(key: str) -> np.ndarray | None:
        return tensors[key].data if key in tensors else None

    arrays = [data("embed_in.weight"), data("final_layer_norm.weight"), data("final_layer_norm.bias")]
    arrays.append(data("embed_in.weight" if config.tied else "embed_out.weight"))
    for i in range(config.n_layers):
        for part in (
            "input_layernorm",
            "post_attention_layernorm",
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ):
            arrays += [data(f"layers.{i}.{part}.weight"), data(f"layers.{i}.{part}.bias")]
    return {
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "hidden": config.hidden,
        "intermediate": config.intermediate,
        "n_embeddings": config.n_logits,
        "n_logits": config.n_logits,
        "context_length": config.context_length,
        "rotary_dims": config.rotary_dims,
        "rotary_base": config.rotary_base,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "parallel_residual": config.parallel_residual,
        "tensors": tuple(arrays),
    }


# Files.


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise Error(f"{path}: no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise Error(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return read_safetensors(folder / "model.safetensors")
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise Error(f"{index}: expected a weight_map from names to files")
    shards = {}
    for file_name in sorted(set(places.values())):
        if Path(file_name).name != file_name:
            raise Error(f"{index}: the shard {file_name!r} is not in the folder itself")
        shards[file_name] = read_safetensors(folder / file_name)
    result = {}
    for key, file_name in places.items():
        if key not in shards[file_name]:
            raise Error(f"{folder / file_name}: lacks {key}, which the index places there")
        result[key] = shards[file_name][key]
    return result


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a safetensors file, mapped from it, and copied only where it does not align them.

    Layout: github.com/huggingface/safetensors, "Format". `Error` for a file that is truncated or not one of these.
    """
    path = Path(path)
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if n_bytes < 8 or header_bytes > min(n_bytes - 8, _LARGEST_HEADER_BYTES):
                raise Error(
                    f"{path}: {n_bytes} bytes are too few for a header of {header_bytes}: truncated or no safetensors"
                )
            header = _parse_header(file.read(header_bytes), path)
        content = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from error
    tensors, ranges = {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        begin, end = _check_entry(path, key, entry, n_bytes - 8 - header_bytes)
        ranges.append((begin, end, key))
        if key.endswith(_BUFFERS):
            continue
        if entry["dtype"] not in _DTYPES:
            raise Error(f"{path}: {key} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        dtype, layout = _DTYPES[entry["dtype"]]
        raw = content[8 + header_bytes + begin : 8 + header_bytes + end]
        if raw.ctypes.data % np.dtype(layout).itemsize:
            raw = np.array(raw)
        tensors[key] = Tensor(np.asarray(raw).view(layout).reshape(entry["shape"]), dtype)
    ranges.sort()
    for (_, end, key), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            raise Error(f"{path}: {key} and {other} overlap")
    return tensors


def _parse_header(raw: bytes, path: Path) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    try:
        header = json.loads(raw, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Error(f"{path}: the header is no valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise Error(f"{path}: the header is no JSON object")
    return header


_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


def _check_entry(path: Path, key: str, entry: Any, data_bytes: int) -> tuple[int, int]:
    """(begin, end) in the data part of the file."""

    def are_sizes(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    well_formed = isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and are_sizes(entry.get("shape"))
    if not well_formed or not are_sizes(entry.get("data_offsets")) or len(entry["data_offsets"]) != 2:
        raise Error(f"{path}: the header's entry of {key} lacks a dtype, shape or pair of offsets")
    begin, end = entry["data_offsets"]
    if not begin <= end <= data_bytes:
        raise Error(f"{path}: {key} takes bytes {begin} to {end} of {data_bytes} that the file has: truncated?")
    expected = math.prod(entry["shape"]) * _ITEM_BYTES.get(entry["dtype"], 0)
    if entry["dtype"] not in _ITEM_BYTES or end - begin != expected:
        raise Error(f"{path}: {key}, {entry['dtype']} {entry['shape']}, takes {end - begin} bytes, expected {expected}")
    return begin, end

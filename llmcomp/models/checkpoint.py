"""Reading a checkpoint: config.json, safetensors and shards to checked values and mapped tensors."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmcomp.checked_json import INDEX_BYTES_MAX, Members, is_file_name, parse_object, read_object
from llmcomp.data.tokenizer_files import find_tokenizer_file
from llmcomp.errors import Error, named, shown
from llmcomp.float_state import ieee_state

_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DIMENSIONS_MAX = 8
_LAYERS_MAX = 1 << 12
_CONTEXT_MAX = 1 << 24
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
    config = read_object(folder / "config.json")
    if weights is None:
        weights = _read_weights(folder)
    tokenizer_path = tokenizer_path or find_tokenizer_file(folder)
    found = {"config": config, "weights": weights, "name": name or folder.name, "step": step}
    return {**found, "tokenizer_path": tokenizer_path}


def stored_weights_sha256(
    folder: str | os.PathLike[str], weights: Mapping[str, np.ndarray | Tensor] | None = None
) -> str:
    """`ExactModel.weights_sha256` of the checkpoint in `folder`, for whoever runs it otherwise. Arguments and errors as
    `load_exact`."""
    folder = Path(folder)
    config = _parse_config(read_object(folder / "config.json"), folder.name)
    return _tensors_sha256(_canonical_tensors(config, weights or _read_weights(folder), folder.name))


def tensor_shapes(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights of a checkpoint with this config.json."""
    return [
        (name if name in _HEAD_NAMES else f"gpt_neox.{name}", shape)
        for name, shape in _expected_shapes(_parse_config(config, "config.json"))
    ]


@ieee_state()
def _parse_config(config: Mapping[str, Any], name: str) -> NeoxConfig:
    """Defaults are those of transformers' GPTNeoXConfig, which leaves them out of the file."""
    members = Members(config, name)
    architecture = config.get("model_type")
    if architecture != "gpt_neox":
        raise Error(f"{name}: model_type is {shown(architecture)}, the exact engine computes 'gpt_neox' only")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise Error(f"{name}: hidden_act is {shown(activation)}, the exact engine computes 'gelu' (with erf) only")
    hidden = members.integer("hidden_size", 6144, lowest=1)
    n_heads = members.integer("num_attention_heads", 64, lowest=1)
    if hidden % n_heads:
        raise Error(f"{name}: hidden_size {hidden} is no multiple of num_attention_heads {n_heads}")
    fraction, base = _parse_rotary(config, name)
    if not 0 <= fraction <= 1:
        raise Error(f"{name}: rotary_pct or partial_rotary_factor is {fraction}, expected 0 to 1")
    rotary_dims = int(hidden // n_heads * fraction)
    if rotary_dims % 2:
        raise Error(
            f"{name}: {fraction} of heads of {hidden // n_heads} are {rotary_dims} rotary dimensions, "
            "expected an even number"
        )
    return NeoxConfig(
        n_layers=members.integer("num_hidden_layers", 44, lowest=1, highest=_LAYERS_MAX),
        n_heads=n_heads,
        hidden=hidden,
        intermediate=members.integer("intermediate_size", 24576, lowest=1),
        n_logits=members.integer("vocab_size", 50432, lowest=1),
        context_length=members.integer("max_position_embeddings", 2048, lowest=1, highest=_CONTEXT_MAX),
        rotary_dims=rotary_dims,
        rotary_base=base,
        layer_norm_epsilon=members.number("layer_norm_eps", 1e-5),
        parallel_residual=members.flag("use_parallel_residual", True),
        attention_bias=members.flag("attention_bias", True),
        tied=members.flag("tie_word_embeddings", False),
    )


def _parse_rotary(config: Mapping[str, Any], name: str) -> tuple[float, float]:
    """(fraction of a head, base) in any of the spellings of transformers 4 and 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise Error(f"{name}: rope_parameters or rope_scaling is {shown(rope)}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise Error(f"{name}: rotary positions are of type {shown(kind)}, the exact engine computes 'default' only")
    merged = Members({**config, **rope}, name)
    fraction = merged.number("partial_rotary_factor" if "partial_rotary_factor" in merged else "rotary_pct", 0.25)
    base = merged.number("rope_theta" if "rope_theta" in merged else "rotary_emb_base", 10000.0)
    return fraction, base


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
        raise Error(
            f"{name}: the weights have {len(found)} tensors that the model does not, the first is {named(min(found))}"
        )
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
    """What the C core's TransformerModel is made of, here and on a device."""

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


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return read_safetensors(folder / "model.safetensors")
    places = read_object(index, INDEX_BYTES_MAX).get("weight_map")
    if not isinstance(places, dict):
        raise Error(f"{index}: weight_map is {shown(places)}, expected an object from names to files")
    for key, place in places.items():
        if not is_file_name(place):
            raise Error(f"{index}: the shard {shown(place)} of {named(key)} is not in the folder itself")
    shards = {}
    for file_name in sorted(set(places.values())):
        shards[file_name] = read_safetensors(folder / file_name)
    result = {}
    for key, file_name in places.items():
        if key not in shards[file_name]:
            raise Error(f"{folder / file_name}: lacks {named(key)}, which the index places there")
        result[key] = shards[file_name][key]
    return result


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a safetensors file, mapped from it, and copied only where it does not align them.

    Layout: github.com/huggingface/safetensors, "Format". `Error` for a file that is truncated or not one of these.
    """
    path = Path(path)
    try:
        if not path.is_file() and path.exists():
            raise Error(f"{path}: expected a regular file")
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if n_bytes < 8 or header_bytes > min(n_bytes - 8, _LARGEST_HEADER_BYTES):
                raise Error(
                    f"{path}: {n_bytes} bytes are too few for a header of {header_bytes}: truncated or no safetensors"
                )
            header = parse_object(file.read(header_bytes), str(path), "the header")
        content = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise Error(f"{path}: {error.strerror or error}") from error
    tensors, ranges = {}, []
    for key in header:
        if key == "__metadata__":
            continue
        entry = _check_entry(path, key, Members(header, str(path)).members(key), n_bytes - 8 - header_bytes)
        ranges.append((entry.begin, entry.end, key))
        if key.endswith(_BUFFERS):
            continue
        if entry.dtype not in _DTYPES:
            raise Error(f"{path}: {named(key)} has dtype {entry.dtype}, expected one of {', '.join(_DTYPES)}")
        dtype, layout = _DTYPES[entry.dtype]
        raw = content[8 + header_bytes + entry.begin : 8 + header_bytes + entry.end]
        if raw.ctypes.data % np.dtype(layout).itemsize:
            raw = np.array(raw)
        tensors[key] = Tensor(np.asarray(raw).view(layout).reshape(entry.shape), dtype)
    ranges.sort()
    for (_, end, key), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            raise Error(f"{path}: {named(key)} and {named(other)} overlap")
    return tensors


_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


class _Entry(NamedTuple):
    """A tensor of a header: `begin` and `end` are bytes in the data part of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _check_entry(path: Path, key: str, entry: Members, data_bytes: int) -> _Entry:
    dtype = entry.text("dtype", among=tuple(_ITEM_BYTES))
    shape, offsets = entry.sizes("shape"), entry.sizes("data_offsets")
    if len(shape) > _DIMENSIONS_MAX:
        raise entry.error("shape", f"at most {_DIMENSIONS_MAX} dimensions")
    if len(offsets) != 2:
        raise entry.error("data_offsets", "two offsets")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise Error(f"{path}: {named(key)} takes bytes {begin} to {end} of {data_bytes} that the file has: truncated?")
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != expected:
        raise Error(f"{path}: {named(key)}, {dtype} {shape}, takes {end - begin} bytes, expected {expected}")
    # NumPy counts the bytes of an empty array as if its dimensions of 0 were 1.
    if math.prod(max(size, 1) for size in shape) * _ITEM_BYTES[dtype] >= 1 << 63:
        raise entry.error("shape", "fewer than 2^63 bytes")
    return _Entry(dtype, tuple(shape), begin, end)

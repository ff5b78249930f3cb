"""Reading a checkpoint: config.json, safetensors and shards to checked values and mapped tensors."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmcomp.errors import Error
from llmcomp.float_state import ieee_state

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


@ieee_state()
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


@ieee_state()
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

"""Reading a checkpoint: config.json, safetensors and shards to checked values and mapped tensors."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmcomp.errors import Error
from llmcomp.float_state import ieee_state
from llmcomp.models.families import BUFFERS, parse_graph
from llmcomp.models.graph import Graph, TensorUse

_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DTYPES = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}
_HEAD_NAMES = ("embed_out", "lm_head")


class Tensor(NamedTuple):
    """Weights as they are stored: `data` is float32, float16, or uint16 that holds bfloat16, as `dtype` says."""

    data: np.ndarray
    dtype: str


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
    graph = parse_graph(_read_json(folder / "config.json"), folder.name)
    return tensors_sha256(match_tensors(graph, weights or _read_weights(folder), folder.name))


def tensor_shapes(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights of a checkpoint with this config.json."""
    graph = parse_graph(config, "config.json")
    return [
        (name if name.startswith(_HEAD_NAMES) else f"{graph.prefix}{name}", shape)
        for name, shape in graph.shapes().items()
    ]


def match_tensors(graph: Graph, weights: Mapping[str, np.ndarray | Tensor], name: str) -> dict[str, Tensor]:
    """Exactly the tensors that the model has, under one set of names, contiguous and aligned."""
    head = "embed_out" if graph.family == "gpt_neox" else "lm_head"
    found = {}
    for key, value in weights.items():
        short = key.removeprefix(graph.prefix)
        stem, _, rest = short.partition(".")
        if not f".{short}".endswith(graph.buffers):
            found[f"{head}.{rest}" if stem in _HEAD_NAMES else short] = value
    result = {}
    for use in graph.uses:
        if use.name in result or (use.default is not None and use.name not in found):
            continue
        if use.name not in found:
            raise Error(f"{name}: the weights lack {use.name}, shape {list(use.shape)}")
        tensor = _as_tensor(found.pop(use.name), use.name, name)
        if tensor.data.shape != use.shape and not (use.default is not None and tensor.data.size == 1):
            raise Error(f"{name}: {use.name} has shape {list(tensor.data.shape)}, expected {list(use.shape)}")
        result[use.name] = tensor
    if graph.tied:
        found.pop(f"{head}.weight", None)
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


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.data.shape}\n".encode())
        data = tensor.data if sys.byteorder == "little" else tensor.data.byteswap()
        digest.update(data.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def core_arguments(graph: Graph, tensors: Mapping[str, Tensor], int8: bool) -> dict[str, Any]:
    """What the C core's TransformerModel is made of, here and on a device."""
    model: dict[str, np.ndarray] = {}
    layers: list[dict[str, np.ndarray]] = [{} for _ in range(graph.n_layers)]
    for layer, slot, uses in graph.slots():
        arrays = [_array_of(use, tensors) for use in uses]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate([_widened(array).reshape(-1) for array in arrays])
        (model if layer is None else layers[layer])[slot] = joined
    if graph.tied:
        model["head"] = model["embedding"]
    return {"config": graph.core_config(int8), "tensors": model, "layers": tuple(layers)}


def _array_of(use: TensorUse, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The array as it is stored, which stays mapped, or a copy of what is cut or turned."""
    if use.name not in tensors:
        return np.array([use.default], np.float32)
    data = tensors[use.name].data
    if use.columns is not None:
        data = data[..., slice(*use.columns)]
    return np.ascontiguousarray(data.T if use.transposed else data)


def _widened(array: np.ndarray) -> np.ndarray:
    """float32 of any of the stored forms."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


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
        if key.endswith(BUFFERS):
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

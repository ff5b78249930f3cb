"""Reading a checkpoint: config.json, safetensors and shards to checked values and mapped tensors."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmcomp.checked_json import INDEX_BYTES_MAX, Members, is_file_name, parse_object, read_object
from llmcomp.data.tokenizer_files import find_tokenizer_file
from llmcomp.errors import Error, named, shown
from llmcomp.models.families import BUFFERS, parse_graph
from llmcomp.models.graph import Graph, TensorUse

_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DIMENSIONS_MAX = 8
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
    graph = parse_graph(read_object(folder / "config.json"), folder.name)
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
        if f".{short}".endswith(graph.buffers):
            continue
        own = f"{head}.{rest}" if stem in _HEAD_NAMES else short
        if own in found:
            raise Error(f"{name}: {named(key)} is the second tensor that means {named(own)}")
        found[own] = value
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
    if graph.tied and (other := found.pop(f"{head}.weight", None)) is not None:
        _demand_tied(graph, result, _as_tensor(other, f"{head}.weight", name), name)
    if found:
        raise Error(
            f"{name}: the weights have {len(found)} tensors that the model does not, the first is {named(min(found))}"
        )
    return result


def _demand_tied(graph: Graph, tensors: Mapping[str, Tensor], head: Tensor, name: str) -> None:
    """`Error` where a model that says that its head is its embedding brings another head: libraries differ in which
    of the two they use."""
    key = next(use.name for use in graph.uses if use.layer is None and use.slot == "embedding")
    embedding = tensors[key]
    same = (head.dtype, head.data.shape) == (embedding.dtype, embedding.data.shape)
    if not same or not np.array_equal(head.data.view(np.uint8), embedding.data.view(np.uint8)):
        raise Error(
            f"{name}: the weights have a head that is not {key}, though tie_word_embeddings is true: expected the same "
            "values, or false in config.json where the model has a head of its own"
        )


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
        if key.endswith(BUFFERS):
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

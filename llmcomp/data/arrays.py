"""Arrays in memory -> chunks: NumPy's, torch's and others', of 8- or 16-bit integers. Nothing is rescaled or reordered.

An array of one axis is one long record, cut into chunks of `chunk_bytes` on a grid from its beginning. Of an array with
more axes each item of the first is a chunk of its own: a picture [rows, columns] or [rows, columns, 3], a window of
samples. Bytes are taken as they lie in C order, 16-bit integers little-endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcomp.data import documents
from llmcomp.data.drawing import Chunk, Found, Request
from llmcomp.errors import DatasetError

_KINDS = ("uint8", "int8", "int16", "uint16")


def is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape") and hasattr(value, "dtype")


def as_array(value: Any, name: str) -> np.ndarray:
    """The array with its bytes in the order that they are scored in; `DatasetError` for a type that is no data."""
    on_host = value.detach().cpu() if hasattr(value, "detach") else value
    kind = getattr(value.dtype, "name", str(value.dtype).removeprefix("torch."))
    if kind not in _KINDS:
        raise DatasetError(
            f"{name}: an array of {kind} has no bytes that mean its values; convert it to one of {', '.join(_KINDS)}"
        )
    array = np.asarray(on_host)
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))


def modality_of(array: np.ndarray) -> str:
    """What an array is taken for unless its owner says: pictures, sound, or plain bytes."""
    if array.dtype.itemsize == 2:
        return "audio"
    return "image" if array.dtype == np.uint8 and array.ndim >= 3 else "bytes"


def array_chunks(array: np.ndarray, name: str, request: Request) -> Found:
    """Of one axis chunks of `chunk_bytes`, or the array as a whole document; of more axes items."""
    if array.ndim == 0 or not array.size:
        raise DatasetError(f"{name}: an array of shape {array.shape} holds no chunk")
    if array.ndim > 1:
        numbers = request.numbers(len(array))
        chunks = [Chunk(array[i].tobytes(), f"{name} item {i}", f"{name} item {i}", 0) for i in numbers]
        return request.found(chunks, len(array), array[0].nbytes)
    document = documents.document_of(name, array.tobytes())
    if request.whole:
        return documents.whole([document], name, request)
    if request.chunk_bytes % array.dtype.itemsize:
        raise DatasetError(f"{name}: chunks of {request.chunk_bytes} bytes cut values of {array.dtype.itemsize} bytes")
    return documents.cut([document], name, request)

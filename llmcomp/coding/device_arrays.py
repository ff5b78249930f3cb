"""Arrays on a CUDA device: where one lies, in whose framework and on which stream, and results in that framework.

Knows the array protocols (DLPack, ``__cuda_array_interface__``) and, of torch and CuPy, three calls each; imports
neither. ``llmcomp._cuda`` is loaded when the first such array arrives. Nothing here codes.
"""

import itertools
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from llmcomp.errors import Error

_DLPACK_CUDA, _DLPACK_CUDA_MANAGED = 2, 13
_LEGACY_STREAM = 1  # how DLPack and __cuda_array_interface__ name the default stream
# By DLPack's type code and bits.
_DTYPES = {
    (2, 32): "float32",
    (2, 16): "float16",
    (4, 16): "bfloat16",
    (2, 64): "float64",
    (0, 32): "int32",
    (0, 64): "int64",
    (1, 64): "uint64",
    (1, 8): "uint8",
    (0, 8): "int8",
    (6, 8): "bool",
}
_ITEM_BYTES = {name: bits // 8 for (_, bits), name in _DTYPES.items()}
_OF_INTERFACE = {
    "<f4": "float32",
    "<f2": "float16",
    "<f8": "float64",
    "<i4": "int32",
    "<i8": "int64",
    "<u8": "uint64",
    "|u1": "uint8",
    "|i1": "int8",
    "|b1": "bool",
}
_CORE_DTYPE = {"float32": 0, "float16": 1, "bfloat16": 2}
_ROWS_MAX = (2**31 - 1) // 8


def is_on_device(array: Any) -> bool:
    """Whether an array lives on a CUDA device."""
    if isinstance(array, np.ndarray):
        return False
    device = getattr(array, "__dlpack_device__", None)
    if device is not None:
        return int(device()[0]) in (_DLPACK_CUDA, _DLPACK_CUDA_MANAGED)
    return hasattr(array, "__cuda_array_interface__")


def cuda_module() -> ModuleType:
    """llmcomp._cuda.

    Raises:
        Error: it was not built.
    """
    try:
        from llmcomp import _cuda as module
    except ImportError as error:
        raise Error(
            "an array is on a CUDA device, but this llmcomp was built without its CUDA part (no nvcc was found, or "
            f"LLMCOMP_CUDA=0): move the array to the CPU, or build again with a CUDA toolkit ({error})"
        ) from error
    return module


class DeviceArray:
    """A result for a caller whose framework is neither torch nor CuPy: C-contiguous memory on the device.

    Any array library takes it over ``__dlpack__`` or ``__cuda_array_interface__`` (``jax.dlpack.from_dlpack(x)``).
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, device: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        n_items = int(np.prod(shape, dtype=np.int64))
        self._memory = cuda_module().Buffer(n_items * _ITEM_BYTES[dtype], device)

    @property
    def pointer(self) -> int:
        return int(self._memory.pointer)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        typestr = next(text for text, name in _OF_INTERFACE.items() if name == self.dtype)
        data = (self.pointer, False)
        return {"shape": self.shape, "typestr": typestr, "data": data, "version": 3, "stream": _LEGACY_STREAM}

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"an array on CUDA device {self.device} is not exported to DLPack device {dl_device}")
        if copy:
            copied = DeviceArray(self.shape, self.dtype, self.device)
            n_bytes = self._memory.n_bytes
            pitches = (copied.pointer, n_bytes, self.pointer, n_bytes)
            cuda_module().copy_rows_on_device(self.device, 0, *pitches, n_bytes, 1)
            return copied.__dlpack__()
        if stream != -1:
            cuda_module().download_rows(self.device, 0, self.pointer, 0, 0, 0)  # waits: the work was put on stream 0
        code, bits = next(key for key, name in _DTYPES.items() if name == self.dtype)
        return cuda_module().dlpack_capsule(self._memory, code, bits, self.shape)

    def numpy(self) -> np.ndarray:
        """A copy on the CPU."""
        raw = cuda_module().download_rows(self.device, 0, self.pointer, self._memory.n_bytes, self._memory.n_bytes, 1)
        n_bytes = int(np.prod(self.shape, dtype=np.int64)) * _ITEM_BYTES[self.dtype]
        return np.frombuffer(raw[:n_bytes], dtype=self.dtype).reshape(self.shape)


class View(NamedTuple):
    """Where an array lies: strides in bytes."""

    pointer: int
    device: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _dense_strides(shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    strides = itertools.accumulate(reversed(shape[1:]), lambda a, b: a * max(b, 1), initial=item_bytes)
    return tuple(strides)[::-1] if shape else ()


def _view_of_interface(interface: dict[str, Any], name: str, device: int) -> View:
    dtype = _OF_INTERFACE.get(interface["typestr"])
    if dtype is None:
        raise Error(f"{name} have type {interface['typestr']!r}, which is not a type that llmcomp takes")
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or _dense_strides(shape, _ITEM_BYTES[dtype])
    return View(interface["data"][0] or 0, device, dtype, shape, tuple(strides))


class Caller:
    """The framework, the device and the stream of one array of logits: where a call works and what it returns."""

    def __init__(self, logits: Any) -> None:
        torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
        self.torch = torch if torch is not None and isinstance(logits, torch.Tensor) else None
        self.cupy = cupy if self.torch is None and cupy is not None and isinstance(logits, cupy.ndarray) else None
        self.module = cuda_module()
        self.logits = logits
        if self.torch is not None:
            self.device = int(logits.device.index)
            self.stream = int(self.torch.cuda.current_stream(self.device).cuda_stream)
        elif self.cupy is not None:
            self.device = int(logits.device.id)
            with logits.device:  # CuPy's current stream and new arrays are of its current device
                self.stream = int(self.cupy.cuda.get_current_stream().ptr)
        elif hasattr(logits, "__dlpack_device__"):
            self.device, self.stream = int(logits.__dlpack_device__()[1]), 0
        else:
            interface = logits.__cuda_array_interface__
            self.device = self._device_of(interface["data"][0], "logits")
            self.stream = int(interface.get("stream") or 0)
        self._has_foreign = False

    def _device_of(self, pointer: int | None, name: str) -> int:
        """``__cuda_array_interface__`` does not tell it."""
        device = int(self.module.device_of(pointer)) if pointer else getattr(self, "device", 0)
        if device < 0:
            raise Error(f"{name} have __cuda_array_interface__, but their memory is not that of a CUDA device")
        return device

    def _is_of_caller(self, array: Any) -> bool:
        """Whether torch or CuPy, of whose logits this call is, made the array."""
        kind = self.torch.Tensor if self.torch is not None else self.cupy.ndarray if self.cupy is not None else None
        return kind is not None and isinstance(array, kind)

    def view(self, array: Any, name: str) -> View:
        of_caller = self._is_of_caller(array)
        self._has_foreign |= not of_caller and not isinstance(array, DeviceArray)
        view = self._view_of_dlpack(array, name, of_caller) if hasattr(array, "__dlpack__") else None
        if view is None:
            interface = array.__cuda_array_interface__
            view = _view_of_interface(interface, name, self._device_of(interface["data"][0], name))
            producer = int(interface.get("stream") or 0)
            if not of_caller and producer and producer != (self.stream or _LEGACY_STREAM):
                self.module.download_rows(self.device, producer, 0, 0, 0, 0)  # waits for the work that makes the array
        if view.device != self.device:
            raise Error(f"{name} are on CUDA device {view.device}; expected device {self.device}, where the logits are")
        return view

    def _view_of_dlpack(self, array: Any, name: str, of_caller: bool) -> View:
        if getattr(array, "requires_grad", False):
            array = array.detach()
        # The caller's arrays are used on his own current stream, no waiting; others wait for their own work.
        capsule = array.__dlpack__(stream=-1 if of_caller else self.stream or _LEGACY_STREAM)
        pointer, _, device, code, bits, shape, strides = self.module.dlpack_view(capsule)
        dtype = _DTYPES.get((code, bits))
        if dtype is None:
            raise Error(f"{name} have DLPack type code {code} of {bits} bits, which is not a type that llmcomp takes")
        item_bytes = _ITEM_BYTES[dtype]
        in_bytes = _dense_strides(shape, item_bytes) if strides is None else tuple(s * item_bytes for s in strides)
        return View(pointer, device, dtype, shape, in_bytes)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Of the caller's own framework where that is torch or CuPy, so that its allocator and its graphs know it."""
        if self.torch is not None:
            # torch has hardly any operations for uint64, and all numbers here are below 2**51.
            name = "int64" if dtype == "uint64" else dtype
            return self.torch.empty(shape, dtype=getattr(self.torch, name), device=self.logits.device)
        if self.cupy is not None:
            with self.logits.device:
                return self.cupy.empty(shape, dtype=dtype)
        return DeviceArray(shape, dtype, self.device)

    def pointer(self, array: Any) -> int:
        if self.torch is not None:
            return int(array.data_ptr())
        return int(array.data.ptr) if self.cupy is not None else int(array.pointer)

    def upload(self, array: np.ndarray) -> Any:
        """A copy of a NumPy array on the device."""
        if self.is_capturing():
            raise Error(
                "tokens or active are on the CPU while the CUDA stream is being captured: a graph would read their "
                "memory again at every launch; expected them on the device"
            )
        target = self.empty(array.shape, str(array.dtype))
        self.module.upload(self.device, self.stream, self.pointer(target), np.ascontiguousarray(array))
        return target

    # Arguments.

    def rows(self, vocab_size: int | None) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        """The leading axes of the logits, and the rows as ``_cuda`` takes them."""
        view = self.view(self.logits, "logits")
        if view.dtype not in _CORE_DTYPE:
            raise Error(f"logits have dtype {view.dtype}; expected float32, float16 or bfloat16")
        if not view.shape:
            raise Error("logits have 0 dimensions; expected the vocabulary in the last one")
        item_bytes, n_logits, limit = _ITEM_BYTES[view.dtype], view.shape[-1], self.module.VOCAB_SIZE_MAX
        if vocab_size is not None and not 1 <= vocab_size <= limit:
            raise Error(f"vocab_size is {vocab_size}; expected 1 to {limit}")
        if not max(vocab_size or 1, 1) <= n_logits <= limit:
            raise Error(f"the last axis of logits has length {n_logits}; expected {vocab_size or 1} to {limit}")
        leading = view.shape[:-1]
        outer, inner, n_inner = _two_levels(leading, view.strides[:-1], "logits")
        contiguous = n_logits == 1 or view.strides[-1] == item_bytes
        if not contiguous or (view.pointer | outer | inner) % item_bytes:
            raise Error("each row of logits must be contiguous and aligned to its elements (try .contiguous())")
        n_rows = int(np.prod(leading, dtype=np.int64))
        if n_rows > _ROWS_MAX:
            raise Error(f"logits have {n_rows} rows; expected at most {_ROWS_MAX}")
        size = n_logits if vocab_size is None else vocab_size
        return leading, (view.pointer, outer, inner, n_rows, n_inner, size, _CORE_DTYPE[view.dtype])

    def tokens(self, tokens: Any, leading: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
        """The array to keep alive, and the tokens as ``_cuda`` takes them."""
        if is_on_device(tokens):
            view = self.view(tokens, "tokens")
            if view.dtype not in ("int32", "int64"):
                raise Error(f"tokens have dtype {view.dtype}; expected int64 or int32 on a device")
            kept, shape, strides, item_bytes = tokens, view.shape, view.strides, _ITEM_BYTES[view.dtype]
            pointer = view.pointer
        else:
            host = np.asarray(tokens)
            if host.dtype.kind not in "iu" and host.size:
                raise Error(f"tokens have dtype {host.dtype}; expected integers")
            kept, shape, item_bytes = self.upload(host.astype(np.int64)), host.shape, 8
            strides, pointer = _dense_strides(shape, item_bytes), self.pointer(kept)
        if tuple(shape) != tuple(leading):
            raise Error(f"tokens have shape {tuple(shape)}; expected {tuple(leading)}")
        outer, inner, _ = _two_levels(shape, strides, "tokens")
        return kept, (pointer, outer, inner, item_bytes)

    def mask(self, active: Any, n: int) -> tuple[Any, int]:
        """The array to keep alive, and its address, 0 for none."""
        if active is None:
            return None, 0
        if not is_on_device(active):
            host = np.array(active)  # a copy: what the caller has may be pinned, which is read after the call
            if host.dtype != np.bool_ or host.shape != (n,):
                raise Error(f"active has dtype {host.dtype} and shape {host.shape}; expected bool ({n},)")
            kept = self.upload(host)
            return kept, self.pointer(kept)
        view = self.view(active, "active")
        if view.dtype not in ("bool", "uint8") or view.shape != (n,) or (n > 1 and view.strides != (1,)):
            raise Error(f"active has dtype {view.dtype} and shape {view.shape}; expected contiguous bool ({n},)")
        return active, view.pointer

    def let_go(self) -> None:
        """Called after the last launch that reads the caller's arrays: returns when he may free them.

        torch and CuPy free in the order of their stream, and freeing a `DeviceArray` waits; others do neither.
        """
        if self._has_foreign and not self.is_capturing():
            self.module.download_rows(self.device, self.stream, 0, 0, 0, 0)

    # Errors.

    def new_error(self) -> tuple[Any, int]:
        array = self.empty((1,), "uint64")
        pointer = self.pointer(array)
        self.module.error_clear(self.device, self.stream, pointer)
        return array, pointer

    def is_capturing(self) -> bool:
        return bool(self.module.is_capturing(self.device, self.stream))

    def raise_error(self, error: int, tokens: Any = None, vocab_size: int = 0) -> None:
        """Waits for the stream and raises what a launch has found."""
        found = self.module.error_read(self.device, self.stream, error)
        if found is None:
            return
        row, is_token, phrase = found
        if not is_token:
            raise Error(f"row {row}: {phrase}")
        value = _token_at(tokens, row)
        raise Error(f"row {row}: token {value} is outside the vocabulary; expected 0 to {vocab_size - 1}")


def _token_at(tokens: Any, row: int) -> Any:
    """Token number `row`, counted over all axes, of an array that may be on a device; for a message."""
    if not is_on_device(tokens):
        return np.asarray(tokens).ravel()[row]
    flat = tokens.reshape(-1) if hasattr(tokens, "reshape") else None
    return "?" if flat is None else int(flat[row])


def _two_levels(shape: Sequence[int], strides: Sequence[int], name: str) -> tuple[int, int, int]:
    """(outer stride, inner stride, n_inner): row i lies at i // n_inner * outer + i % n_inner * inner, in bytes."""
    if not shape:
        return 0, 0, 1
    *outer_shape, n_inner = shape
    *outer_strides, inner = strides
    levels = [(n, stride) for n, stride in zip(outer_shape, outer_strides, strict=True) if n != 1]
    for (_, above), (n, below) in itertools.pairwise(levels):
        if above != n * below:
            raise Error(f"{name} have leading axes that are not evenly spaced in memory (try .contiguous())")
    return (levels[-1][1] if levels else 0), inner, max(n_inner, 1)

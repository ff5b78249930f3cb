"""Logits on a CUDA device: which stream, results in the caller's framework, the coder's state on the card.

Thin over ``llmcomp._cuda``, which is loaded when the first such array arrives. Knows the array protocols (DLPack,
``__cuda_array_interface__``) and, of torch and CuPy, three calls each; imports neither. Integers are those of the CPU.
"""

import importlib.util
import itertools
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from llmcomp.errors import Error

__all__ = [
    "DeviceArray",
    "DeviceDecoder",
    "DeviceEncoder",
    "cuda_info",
    "decode",
    "encode",
    "is_built",
    "is_on_device",
    "open_device",
]

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


def _cuda() -> ModuleType:
    try:
        from llmcomp import _cuda as module
    except ImportError as error:
        raise Error(
            "an array is on a CUDA device, but this llmcomp was built without its CUDA part (no nvcc was found, or "
            f"LLMCOMP_CUDA=0): move the array to the CPU, or build again with a CUDA toolkit ({error})"
        ) from error
    return module


def is_built() -> bool:
    """Whether this installation has the CUDA part; says nothing of a card or a driver. Loads nothing."""
    return importlib.util.find_spec("llmcomp._cuda") is not None


def open_device(name: str) -> tuple[ModuleType, int]:
    """The CUDA part and the number of the device that "cuda" or "cuda:1" names.

    Raises:
        Error: no such name; or what is missing: the CUDA part of this installation, a driver, a device, a newer one.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise Error(f"no device is called {name!r}; expected cpu, cuda or cuda:N")
    if not is_built():
        raise Error(
            f"device {name!r}: this llmcomp was built without its CUDA part (no nvcc was found, or LLMCOMP_CUDA=0): "
            "build again with a CUDA toolkit, or use device 'cpu'"
        )
    driver, devices, problem = _cuda().machine()
    if driver == 0:
        raise Error(f"device {name!r}: no NVIDIA driver was found on this machine; device 'cpu' gives the same bits")
    if not devices:
        raise Error(f"device {name!r}: no CUDA device was found ({problem}); device 'cpu' gives the same bits")
    number = int(match[1] or 0)
    if number >= len(devices):
        raise Error(f"device {name!r}: this machine has {len(devices)} CUDA devices, numbered from 0")
    _check_capability(name, devices[number], _cuda().TARGETS)
    return _cuda(), number


def _check_capability(name: str, device: Any, targets: str) -> None:
    if not isinstance(device, dict):
        raise Error(f"device {name!r} cannot be used: {device}")
    oldest = min((int(target[3:]) for target in targets.split() if target.startswith("sm_")), default=0)
    major, minor = device["compute_capability"]
    if 10 * major + minor < oldest:
        raise Error(
            f"device {name!r} is a {device['name']} of compute capability {major}.{minor}; "
            f"this llmcomp was built for {oldest // 10}.{oldest % 10} and later"
        )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_info() -> dict[str, Any]:
    """What was built for CUDA and what this machine has; never raises for want of either.

    Returns:
        ``built`` (bool), ``toolkit`` (str or None), ``targets`` (list of str), ``driver`` (str or None), ``devices`` (a
        list of dicts with name, compute_capability, multiprocessors, memory_bytes), ``problem`` (str or None).
    """
    info: dict[str, Any] = {"built": False, "toolkit": None, "targets": [], "driver": None, "devices": []}
    try:
        module = _cuda()
    except Error:
        return {**info, "problem": "llmcomp was built without CUDA"}
    driver, devices, problem = module.machine()
    if driver == 0:
        problem = "no NVIDIA driver was found"
    return {
        "built": True,
        "toolkit": _version(module.TOOLKIT_VERSION),
        "targets": module.TARGETS.split(),
        "driver": _version(driver) if driver else None,
        "devices": devices,
        "problem": problem,
    }


# Arrays.


class DeviceArray:
    """A result for a caller whose framework is neither torch nor CuPy: C-contiguous memory on the device.

    Any array library takes it over ``__dlpack__`` or ``__cuda_array_interface__`` (``jax.dlpack.from_dlpack(x)``).
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, device: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        n_items = int(np.prod(shape, dtype=np.int64))
        self._memory = _cuda().Buffer(n_items * _ITEM_BYTES[dtype], device)

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

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        if stream != -1:
            _cuda().download_rows(self.device, 0, self.pointer, 0, 0, 0)  # waits: the work was put on stream 0
        code, bits = next(key for key, name in _DTYPES.items() if name == self.dtype)
        return _cuda().dlpack_capsule(self._memory, code, bits, self.shape)

    def numpy(self) -> np.ndarray:
        """A copy on the CPU."""
        raw = _cuda().download_rows(self.device, 0, self.pointer, self._memory.n_bytes, self._memory.n_bytes, 1)
        n_bytes = int(np.prod(self.shape, dtype=np.int64)) * _ITEM_BYTES[self.dtype]
        return np.frombuffer(raw[:n_bytes], dtype=self.dtype).reshape(self.shape)


class _View(NamedTuple):
    """Where an array lies: strides in bytes."""

    pointer: int
    device: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _dense_strides(shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    strides = itertools.accumulate(reversed(shape[1:]), lambda a, b: a * max(b, 1), initial=item_bytes)
    return tuple(strides)[::-1] if shape else ()


def _view_of_interface(interface: dict[str, Any], name: str) -> _View:
    dtype = _OF_INTERFACE.get(interface["typestr"])
    if dtype is None:
        raise Error(f"{name} have type {interface['typestr']!r}, which is not a type that llmcomp takes")
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or _dense_strides(shape, _ITEM_BYTES[dtype])
    return _View(interface["data"][0] or 0, -1, dtype, shape, tuple(strides))


class _Caller:
    """The framework, the device and the stream of one array of logits: where a call works and what it returns."""

    def __init__(self, logits: Any) -> None:
        torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
        self.torch = torch if torch is not None and isinstance(logits, torch.Tensor) else None
        self.cupy = cupy if self.torch is None and cupy is not None and isinstance(logits, cupy.ndarray) else None
        self.module = _cuda()
        self.logits = logits
        if self.torch is not None:
            self.device = int(logits.device.index)
            self.stream = int(self.torch.cuda.current_stream(self.device).cuda_stream)
        elif self.cupy is not None:
            self.device = int(logits.device.id)
            self.stream = int(self.cupy.cuda.get_current_stream().ptr)
        else:
            has_dlpack = hasattr(logits, "__dlpack_device__")
            self.device = int(logits.__dlpack_device__()[1]) if has_dlpack else 0
            told = None if has_dlpack else logits.__cuda_array_interface__.get("stream")
            self.stream = int(told or 0)

    def view(self, array: Any, name: str) -> _View:
        if not hasattr(array, "__dlpack__"):
            view = _view_of_interface(array.__cuda_array_interface__, name)
            return _View(view.pointer, self.device, view.dtype, view.shape, view.strides)
        if self.torch is not None and getattr(array, "requires_grad", False):
            array = array.detach()
        # torch and CuPy: the array is used on its own current stream, no waiting; others wait for their own work.
        of_caller = self.torch is not None or self.cupy is not None
        capsule = array.__dlpack__(stream=-1 if of_caller else self.stream or _LEGACY_STREAM)
        pointer, _, device, code, bits, shape, strides = self.module.dlpack_view(capsule)
        dtype = _DTYPES.get((code, bits))
        if dtype is None:
            raise Error(f"{name} have DLPack type code {code} of {bits} bits, which is not a type that llmcomp takes")
        if device != self.device:
            raise Error(f"{name} are on CUDA device {device}; expected device {self.device}, where the logits are")
        item_bytes = _ITEM_BYTES[dtype]
        in_bytes = _dense_strides(shape, item_bytes) if strides is None else tuple(s * item_bytes for s in strides)
        return _View(pointer, device, dtype, shape, in_bytes)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Of the caller's own framework where that is torch or CuPy, so that its allocator and its graphs know it."""
        if self.torch is not None:
            # torch has hardly any operations for uint64, and all numbers here are below 2**51.
            name = "int64" if dtype == "uint64" else dtype
            return self.torch.empty(shape, dtype=getattr(self.torch, name), device=self.logits.device)
        if self.cupy is not None:
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
        frees_in_order = self.torch is not None or self.cupy is not None or isinstance(self.logits, DeviceArray)
        if not frees_in_order and not self.is_capturing():
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


# Intervals.


def intervals(logits: Any, tokens: Any, vocab_size: int | None = None, *, wait: bool = True) -> tuple[Any, Any, Any]:
    """`llmcomp.intervals` on the device.

    Without `wait`, and while its stream is being captured, nothing waits for the device, and errors are left in the
    zero totals.
    """
    caller = _Caller(logits)
    leading, rows = caller.rows(vocab_size)
    triple = tuple(caller.empty(leading, "uint64") for _ in range(3))
    kept, token_rows = caller.tokens(tokens, leading)
    error_array, error = caller.new_error()
    pointers = [caller.pointer(array) for array in triple]
    caller.module.intervals(caller.device, caller.stream, rows, token_rows, 0, *pointers, error)
    if wait and not caller.is_capturing():
        caller.raise_error(error, tokens, rows[5])
    del kept, error_array
    return triple


def code_length(logits: Any, tokens: Any, vocab_size: int | None = None) -> Any:
    """`llmcomp.code_length` on the device: float64."""
    caller = _Caller(logits)
    _, freq, total = intervals(logits, tokens, vocab_size)
    bits = caller.empty(tuple(freq.shape), "float64")
    n = int(np.prod(tuple(freq.shape), dtype=np.int64))
    pointers = [caller.pointer(array) for array in (freq, total, bits)]
    caller.module.code_length(caller.device, caller.stream, n, *pointers)
    return bits


def encode(logits: Any, tokens: Any, vocab_size: int | None = None) -> bytes:
    """`llmcomp.encode` of logits on the device: only the intervals come to the CPU."""
    from llmcomp import _core

    caller = _Caller(logits)
    triple = intervals(logits, tokens, vocab_size)
    if len(triple[0].shape) != 1:
        raise Error(f"logits have {len(triple[0].shape) + 1} dimensions; expected [T, V]")
    n_bytes = 8 * int(triple[0].shape[0])
    host = [
        np.frombuffer(
            caller.module.download_rows(caller.device, caller.stream, pointer, n_bytes, n_bytes, 1), np.uint64
        )
        for pointer in map(caller.pointer, triple)
    ]
    return _core.encode_intervals(*host)


def decode(payload: bytes, logits: Any, vocab_size: int | None = None) -> Any:
    """`llmcomp.decode` on the device: int32 [T] there."""
    decoder = DeviceDecoder([payload], vocab_size)
    return decoder.pull_rows(logits)


# Streams.


class _Streams:
    """What an encoder and a decoder share: the device of the first logits, and the error of any launch."""

    def __init__(self, n_streams: int, vocab_size: int | None) -> None:
        self.n_streams, self.vocab_size = n_streams, vocab_size
        self._device = -1
        self._error: Any = None

    def _begin(self, logits: Any) -> _Caller:
        """Puts the streams on the device of the first logits; later ones must be there too."""
        caller = _Caller(logits)
        if self._device < 0:
            self._device = caller.device
            self._error = caller.module.Buffer(8, caller.device)
            caller.module.error_clear(caller.device, caller.stream, self._error.pointer)
            self._place(caller)
        if caller.device != self._device:
            raise Error(f"logits are on CUDA device {caller.device}; expected {self._device}, where the streams are")
        self._stream = caller.stream
        return caller

    def _place(self, caller: _Caller) -> None:
        raise NotImplementedError

    def _rows(self, caller: _Caller) -> tuple[Any, ...]:
        leading, rows = caller.rows(self.vocab_size)
        if len(leading) != 1 or leading[0] != self.n_streams:
            found = f"{len(leading) + 1} dimensions and {rows[3]} rows"
            raise Error(f"logits have {found}; expected [{self.n_streams}, vocab_size]")
        return rows

    def check(self) -> None:
        """Waits for the device and raises the first error that a step since the start has found, naming its row."""
        if self._device < 0:
            return
        found = _cuda().error_read(self._device, self._stream, self._error.pointer)
        if found is not None:
            raise Error(f"row {found[0]}: {found[2]} (found by an earlier step)")


class DeviceEncoder(_Streams):
    """`llmcomp.Encoder` for logits on a device: intervals, range coder and payload bytes stay there until finish().

    A step does not wait for the device. A step with an error codes nothing, nor does any later one; check() and
    finish() raise it. The first push must not be captured in a graph; before capturing others, call reserve().
    """

    _FIRST_STEPS = 64

    def __init__(self, n_streams: int, vocab_size: int | None = None) -> None:
        super().__init__(n_streams, vocab_size)
        self._n_steps = self._n_reserved = 0
        self._is_finished = False

    def _place(self, caller: _Caller) -> None:
        module, n = caller.module, self.n_streams
        self._encoders = module.Buffer(n * module.ENCODER_BYTES, caller.device)
        self._triple = module.Buffer(n * 24, caller.device)
        self._n_reserved = max(self._n_reserved, self._FIRST_STEPS)
        self._capacity = (self._n_reserved + 2) * module.STEP_BYTES_MAX
        self._bytes = module.Buffer(n * self._capacity, caller.device)
        place = (self._encoders.pointer, n, self._bytes.pointer, self._capacity)
        module.encoders_begin(caller.device, caller.stream, *place)

    def reserve(self, n_steps: int) -> None:
        """Room for n_steps steps more than those pushed: a captured step cannot make room for its replays."""
        wanted = self._n_steps + n_steps
        if wanted <= self._n_reserved:
            return
        self._n_reserved = wanted
        if self._device < 0:
            return
        module = _cuda()
        capacity = (wanted + 2) * module.STEP_BYTES_MAX
        memory = module.Buffer(self.n_streams * capacity, self._device)
        pitches = (memory.pointer, capacity, self._bytes.pointer, self._capacity)
        module.copy_rows_on_device(self._device, self._stream, *pitches, self._capacity, self.n_streams)
        place = (self._encoders.pointer, self.n_streams, memory.pointer, capacity)
        module.encoders_place(self._device, self._stream, *place)
        self._bytes, self._capacity = memory, capacity  # freeing the old memory waits for the copy

    def push(self, logits: Any, tokens: Any, active: Any = None) -> None:
        caller = self._begin(logits)
        rows = self._rows(caller)
        kept_tokens, token_rows = caller.tokens(tokens, (self.n_streams,))
        kept_active, mask = caller.mask(active, self.n_streams)
        self._make_room()
        triple = [self._triple.pointer + 8 * self.n_streams * i for i in range(3)]
        caller.module.intervals(caller.device, caller.stream, rows, token_rows, mask, *triple, self._error.pointer)
        self._put(caller, triple, mask)
        caller.let_go()
        del kept_tokens, kept_active

    def push_intervals(self, start: Any, freq: Any, total: Any, active: Any = None) -> None:
        caller = self._begin(start)
        views = [caller.view(array, name) for array, name in ((start, "start"), (freq, "freq"), (total, "total"))]
        for view in views:
            if view.dtype not in ("uint64", "int64") or view.shape != (self.n_streams,) or view.strides != (8,):
                raise Error(f"intervals are {view.dtype} {view.shape}; expected contiguous uint64 ({self.n_streams},)")
        kept_active, mask = caller.mask(active, self.n_streams)
        self._make_room()
        self._put(caller, [view.pointer for view in views], mask)
        caller.let_go()
        del kept_active

    def _begin(self, logits: Any) -> _Caller:
        if self._is_finished:
            raise Error("the encoder is finished; expected push only before finish")
        return super()._begin(logits)

    def _make_room(self) -> None:
        if self._n_steps >= self._n_reserved:
            self.reserve(max(self._n_steps, 1))
        self._n_steps += 1

    def _put(self, caller: _Caller, triple: list[int], mask: int) -> None:
        streams = (self._encoders.pointer, self.n_streams)
        caller.module.encoders_put(caller.device, caller.stream, *streams, *triple, mask, self._error.pointer)

    def finish(self) -> list[bytes]:
        if self._is_finished:
            raise Error("the encoder is finished; expected finish only once")
        self._is_finished = True
        if self._device < 0:
            return [b""] * self.n_streams
        self.check()
        module, where = _cuda(), (self._device, self._stream)
        module.encoders_end(*where, self._encoders.pointer, self.n_streams)
        state_bytes = module.ENCODER_BYTES
        raw = module.download_rows(*where, self._encoders.pointer, state_bytes, state_bytes, self.n_streams)
        states = np.frombuffer(raw, np.uint64).reshape(self.n_streams, state_bytes // 8)
        lengths = states[:, module.ENCODER_LENGTH_OFFSET // 8].astype(int)
        width = int(lengths.max(initial=0))
        raw = module.download_rows(*where, self._bytes.pointer, self._capacity, width, self.n_streams)
        return [raw[i * width : i * width + length] for i, length in enumerate(lengths)]


class DeviceDecoder(_Streams):
    """`llmcomp.Decoder` for logits on a device: payloads and state lie there, tokens are returned there.

    A step does not wait for the device; a row with an error gives token -2, its stream stays where it was, and check()
    raises it. The first pull must not be captured in a graph, later ones may be.
    """

    def __init__(self, payloads: Sequence[bytes], vocab_size: int | None = None) -> None:
        super().__init__(len(payloads), vocab_size)
        self._payloads = [bytes(payload) for payload in payloads]

    def _place(self, caller: _Caller) -> None:
        module, n = caller.module, self.n_streams
        where = (caller.device, caller.stream)
        offsets = np.cumsum([0, *map(len, self._payloads)], dtype=np.uint64)
        self._bytes = module.Buffer(int(offsets[-1]), caller.device)
        self._offsets = module.Buffer(offsets.nbytes, caller.device)
        self._decoders = module.Buffer(n * module.DECODER_BYTES, caller.device)
        module.upload(*where, self._bytes.pointer, b"".join(self._payloads))
        module.upload(*where, self._offsets.pointer, offsets)
        module.decoders_begin(*where, self._decoders.pointer, n, self._bytes.pointer, self._offsets.pointer)

    def pull(self, logits: Any, active: Any = None) -> Any:
        caller = self._begin(logits)
        rows = self._rows(caller)
        kept, mask = caller.mask(active, self.n_streams)
        tokens = caller.empty((self.n_streams,), "int32")
        state = (mask, self._decoders.pointer, caller.pointer(tokens), self._error.pointer)
        caller.module.decode_step(caller.device, caller.stream, rows, *state)
        caller.let_go()
        del kept
        return tokens

    def pull_rows(self, logits: Any) -> Any:
        """All rows [T, V] from the only stream; waits, and raises the first row with an error."""
        caller = self._begin(logits)
        leading, rows = caller.rows(self.vocab_size)
        if len(leading) != 1:
            raise Error(f"logits have {len(leading) + 1} dimensions; expected [T, V]")
        tokens = caller.empty((rows[3],), "int32")
        state = (self._decoders.pointer, caller.pointer(tokens), self._error.pointer)
        caller.module.decode_stream(caller.device, caller.stream, rows, *state)
        caller.raise_error(self._error.pointer)
        return tokens

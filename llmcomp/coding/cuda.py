"""The CUDA device: what this machine has, intervals and code lengths there, and the coder's state there.

Thin over ``llmcomp._cuda``, which is loaded when the first such array arrives; what an array is, `device_arrays` says.
Integers are those of the CPU.
"""

import importlib.util
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from llmcomp.coding.device_arrays import Caller, DeviceArray, cuda_module, is_on_device
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
    "log2_softmax",
    "open_device",
]


def is_built() -> bool:
    """Whether this installation has the CUDA part; says nothing of a device or a driver. Loads nothing."""
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
    driver, devices, problem = cuda_module().machine()
    if driver == 0:
        raise Error(f"device {name!r}: no NVIDIA driver was found on this machine; device 'cpu' gives the same bits")
    if not devices:
        raise Error(f"device {name!r}: no CUDA device was found ({problem}); device 'cpu' gives the same bits")
    number = int(match[1] or 0)
    if number >= len(devices):
        raise Error(f"device {name!r}: this machine has {len(devices)} CUDA devices, numbered from 0")
    _check_capability(name, devices[number], cuda_module().TARGETS)
    return cuda_module(), number


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
        module = cuda_module()
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


# Intervals.


def intervals(logits: Any, tokens: Any, vocab_size: int | None = None, *, wait: bool = True) -> tuple[Any, Any, Any]:
    """`llmcomp.intervals` on the device.

    Without `wait`, and while its stream is being captured, nothing waits for the device, and errors are left in the
    zero totals.
    """
    caller = Caller(logits)
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


def log2_softmax(logits: Any, tokens: Any, vocab_size: int | None = None, *, wait: bool = True) -> Any:
    """`coding.log2_softmax` on the device, of logits of any type as they are: float64 there.

    Without `wait`, and while its stream is being captured, nothing waits for the device, and an error is left as NaN.
    """
    caller = Caller(logits)
    leading, rows = caller.rows(vocab_size)
    found = caller.empty(leading, "float64")
    kept, token_rows = caller.tokens(tokens, leading)
    error_array, error = caller.new_error()
    caller.module.log2_softmax(caller.device, caller.stream, rows, token_rows, caller.pointer(found), error)
    if wait and not caller.is_capturing():
        caller.raise_error(error, tokens, rows[5])
    del kept, error_array
    return found


def code_length(logits: Any, tokens: Any, vocab_size: int | None = None) -> Any:
    """`llmcomp.code_length` on the device: float64."""
    caller = Caller(logits)
    _, freq, total = intervals(logits, tokens, vocab_size)
    bits = caller.empty(tuple(freq.shape), "float64")
    n = int(np.prod(tuple(freq.shape), dtype=np.int64))
    pointers = [caller.pointer(array) for array in (freq, total, bits)]
    caller.module.code_length(caller.device, caller.stream, n, *pointers)
    return bits


def encode(logits: Any, tokens: Any, vocab_size: int | None = None) -> bytes:
    """`llmcomp.encode` of logits on the device: only the intervals come to the CPU."""
    from llmcomp import _core

    caller = Caller(logits)
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

    def _begin(self, logits: Any) -> Caller:
        """Puts the streams on the device of the first logits; later ones must be there too."""
        caller = Caller(logits)
        if self._device < 0:
            self._device = caller.device
            self._error = caller.module.Buffer(8, caller.device)
            caller.module.error_clear(caller.device, caller.stream, self._error.pointer)
            self._place(caller)
        if caller.device != self._device:
            raise Error(f"logits are on CUDA device {caller.device}; expected {self._device}, where the streams are")
        self._stream = caller.stream
        return caller

    def _place(self, caller: Caller) -> None:
        raise NotImplementedError

    def _rows(self, caller: Caller) -> tuple[Any, ...]:
        leading, rows = caller.rows(self.vocab_size)
        if len(leading) != 1 or leading[0] != self.n_streams:
            found = f"{len(leading) + 1} dimensions and {rows[3]} rows"
            raise Error(f"logits have {found}; expected [{self.n_streams}, vocab_size]")
        return rows

    def check(self) -> None:
        """Waits for the device and raises the first error that a step since the start has found, naming its row."""
        if self._device < 0:
            return
        found = cuda_module().error_read(self._device, self._stream, self._error.pointer)
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

    def _place(self, caller: Caller) -> None:
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
        module = cuda_module()
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

    def _begin(self, logits: Any) -> Caller:
        if self._is_finished:
            raise Error("the encoder is finished; expected push only before finish")
        return super()._begin(logits)

    def _make_room(self) -> None:
        if self._n_steps >= self._n_reserved:
            self.reserve(max(self._n_steps, 1))
        self._n_steps += 1

    def _put(self, caller: Caller, triple: list[int], mask: int) -> None:
        streams = (self._encoders.pointer, self.n_streams)
        caller.module.encoders_put(caller.device, caller.stream, *streams, *triple, mask, self._error.pointer)

    def finish(self) -> list[bytes]:
        if self._is_finished:
            raise Error("the encoder is finished; expected finish only once")
        self._is_finished = True
        if self._device < 0:
            return [b""] * self.n_streams
        self.check()
        module, where = cuda_module(), (self._device, self._stream)
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

    def _place(self, caller: Caller) -> None:
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

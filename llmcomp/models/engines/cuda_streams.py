"""Streams of the exact engines on a CUDA device: steps of a session, and payloads decoded side by side.

Arguments are checked here; what the device computes is csrc/cuda's. No model is made here: that is `engines.cuda`'s.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmcomp.coding.cuda import DeviceArray
from llmcomp.errors import Error

# Rows of what a session, or a chain, reads at once before its first step.
PREFILL_ROWS = 4096
_LOG_STEPS = 64
# Streams that have ended leave the steps when at most this share of the rows goes on: a step of another number of rows
# is captured anew.
_COMPACT_SHARE = 0.75
# So many streams are decoded in two halves, each on a CUDA stream of its own: while one reads keys and values, the
# other multiplies, and processors that one's tiles leave idle are the other's.
_HALVED_STREAMS = 512
_ALIGNMENT = 256


class DeviceModel(Protocol):
    """What streams ask of a `CudaModel`."""

    config: Any
    context_length: int
    n_logits: int
    _module: Any
    _device: int
    _core: Any


class Scratch:
    """Memory of the device that grows to what the largest call needed, cut anew by every call."""

    def __init__(self, module: Any, device: int) -> None:
        self.module, self.device = module, device
        self._memory: Any = None

    def take(self, *sizes: int) -> list[int]:
        """Addresses of pieces of so many bytes. Those of an earlier call are lost."""
        offsets = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)])
        if self._memory is None or self._memory.n_bytes < offsets[-1]:
            self._memory = None
            self._memory = self.module.Buffer(int(offsets[-1]), self.device)
        return [int(self._memory.pointer + offset) for offset in offsets[:-1]]

    def release(self) -> None:
        self._memory = None


def run_pass(
    session: Any, scratch: Scratch, inputs: npt.NDArray[np.int32], ends: np.ndarray, streams: np.ndarray | None
) -> None:
    """Stretches of `inputs` that end at `ends`, for the streams 0, 1, ... or for those that are named."""
    row_begin = np.concatenate(([0], ends)).astype(np.uint32)
    n_longest = int(np.diff(row_begin.astype(np.int64)).max())
    named = np.zeros(0, np.uint32) if streams is None else streams.astype(np.uint32)
    pointers = scratch.take(inputs.nbytes, row_begin.nbytes, named.nbytes)
    for pointer, array in zip(pointers, (inputs, row_begin, named), strict=True):
        scratch.module.upload(scratch.device, session.stream, pointer, np.ascontiguousarray(array))
    where = 0 if streams is None else pointers[2]
    session.run_pass(pointers[0], pointers[1], where, len(ends), len(inputs), n_longest)


# Sessions.


class CudaSession:
    """`n_streams` independent streams of up to `n_tokens` tokens on a device; one thread at a time."""

    def __init__(self, model: DeviceModel, n_streams: int, n_tokens: int) -> None:
        if not 1 <= n_streams <= 1 << 20:
            raise Error(f"n_streams is {n_streams}; expected 1 or more")
        if not 1 <= n_tokens <= model.context_length:
            raise Error(f"a session of {n_tokens} tokens; the context of the model holds {model.context_length}")
        self.n_streams = n_streams
        self._model, self._n_tokens = model, n_tokens
        self._module, self._device = model._module, model._device
        self._n_rows = max(n_streams, min(n_tokens, PREFILL_ROWS))
        self._core = model._core.session(model.config.n_layers, n_streams, n_tokens, self._n_rows)
        self._scratch = Scratch(self._module, self._device)
        self._positions = np.zeros(n_streams, np.int64)
        self._lock = threading.Lock()

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """int64 [n_streams]: tokens that each stream has seen (a copy)."""
        return self._positions.copy()

    def step(
        self,
        tokens: npt.ArrayLike,
        active: npt.NDArray[np.bool_] | None = None,
        out: npt.NDArray[np.float32] | None = None,
        *,
        on_device: bool = False,
    ) -> Any:
        """One token into every active stream: int [n_streams] -> float32 [n_streams, n_logits], other rows zeros.

        `out` receives the rows of active streams. `on_device`: a `cuda.DeviceArray` instead, whose rows mean nothing
        for streams that are not active.
        """
        given = integers(tokens, "tokens", (self.n_streams,))
        mask = _mask(active, self.n_streams)
        shape = (self.n_streams, self._model.n_logits)
        if out is not None and (out.shape != shape or out.dtype != np.float32):
            raise Error(f"out must be a contiguous float32 array {list(shape)}")
        with self._used():
            self._check_step(given, mask)
            array = DeviceArray(shape, "float32", self._device) if on_device else None
            where, logits = self._scratch.take(4 * self.n_streams, 0 if on_device else 4 * shape[0] * shape[1])
            logits = logits if array is None else array.pointer
            inputs = np.where(mask, given, -1).astype(np.int32)
            self._module.upload(self._device, self._core.stream, where, inputs)
            self._core.step(where, logits)
            self._raise_found()
            self._positions += mask
            if array is not None:
                return array
            found = np.empty(shape, np.float32)
            self._module.download(self._device, self._core.stream, logits, found)
        result = np.zeros(shape, np.float32) if out is None else out
        result[mask] = found[mask]
        return result

    def prefill(self, stream: int, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Tokens int [n] into one stream -> float32 [n_logits], the logits after the last."""
        self._check_stream(stream)
        flat = np.asarray(tokens).reshape(-1)
        inputs = integers(flat, "tokens", flat.shape)
        if not len(inputs):
            raise Error("prefill of 0 tokens; expected at least 1")
        seen = int(self._positions[stream])
        if len(inputs) > self._n_tokens - seen:
            raise Error(
                f"stream {stream} has seen {seen} tokens and cannot take {len(inputs)} more; "
                f"the session holds {self._n_tokens}"
            )
        if (wrong := foreign(inputs, self._model.n_logits)).any():
            raise Error(outside(f"stream {stream}", "token", inputs[wrong.argmax()], self._model.n_logits))
        result = np.empty(self._model.n_logits, np.float32)
        with self._used():
            step = min(self._n_rows, self._core.stretch_max)
            for at in range(0, len(inputs), step):
                part = inputs[at : at + step].astype(np.int32)
                run_pass(self._core, self._scratch, part, np.array([len(part)]), np.array([stream]))
            (logits,) = self._scratch.take(result.nbytes)
            self._core.head(len(part) - 1, 1, logits)
            self._module.download(self._device, self._core.stream, logits, result)
            self._raise_found()
            self._positions[stream] += len(inputs)
        return result

    def reset(self, stream: int | None = None) -> None:
        """One stream, or all of them, start again."""
        if stream is not None:
            self._check_stream(stream)
        first, stop = (0, self.n_streams) if stream is None else (stream, stream + 1)
        with self._used():
            self._positions[first:stop] = 0
            self._core.set_positions(first, np.zeros(stop - first, np.uint32))

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise Error("another thread is using this session")
        try:
            yield
        finally:
            self._lock.release()

    def _check_stream(self, stream: int) -> None:
        if not 0 <= stream < self.n_streams:
            raise Error(f"stream {stream}; the session has streams 0 to {self.n_streams - 1}")

    def _check_step(self, tokens: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> None:
        if (full := mask & (self._positions >= self._n_tokens)).any():
            stream = int(full.argmax())
            seen = self._positions[stream]
            raise Error(f"stream {stream} has seen {seen} tokens; the session holds {self._n_tokens}")
        if (wrong := mask & foreign(tokens, self._model.n_logits)).any():
            stream = int(wrong.argmax())
            raise Error(outside(f"stream {stream}", "token", tokens[stream], self._model.n_logits))

    def _raise_found(self) -> None:
        error = self._core.check()
        if error is not None:
            raise Error(f"stream {error[0]}: {error[1]}")


# Decoding.


class _ChainPart:
    """Some of a chain's lanes, on a CUDA stream of their own: a `DecodingChain` whose steps begin and end apart."""

    def __init__(self, model: DeviceModel, n_streams: int, n_tokens: int, vocab_size: int, prefill_rows: int) -> None:
        self._vocab_size = vocab_size
        self._module, self._device = module, device = model._module, model._device
        self._n_rows = max(n_streams, prefill_rows)
        self._core = model._core.session(model.config.n_layers, n_streams, n_tokens, self._n_rows)
        self._scratch = Scratch(module, device)
        self._decoders = module.Buffer(n_streams * module.DECODER_BYTES, device)
        self._logits = module.Buffer(4 * n_streams * model.n_logits, device)
        self._tokens = module.Buffer(4 * n_streams, device)
        self._streams = module.Buffer(4 * n_streams, device)
        self._log = module.Buffer(4 * n_streams * _LOG_STEPS, device)
        self._n_logged = module.Buffer(4, device)

    def begin(self, payloads: Sequence[bytes]) -> None:
        self._lanes = np.arange(len(payloads))
        self._states = np.zeros((len(payloads), self._module.DECODER_BYTES), np.uint8)
        if not payloads:
            return
        module, stream, n = self._module, self._core.stream, len(payloads)
        offsets = np.cumsum([0, *map(len, payloads)], dtype=np.uint64)
        self._payloads = module.Buffer(int(offsets[-1]), self._device)
        self._offsets = module.Buffer(offsets.nbytes, self._device)
        module.upload(self._device, stream, self._payloads.pointer, b"".join(payloads))
        module.upload(self._device, stream, self._offsets.pointer, offsets)
        place = (self._decoders.pointer, n, self._payloads.pointer, self._offsets.pointer)
        module.decoders_begin(self._device, stream, *place)

    def open_window(self, lanes: npt.NDArray[np.intp], inputs: npt.NDArray[np.int32]) -> None:
        self._n_lanes = len(lanes)
        self._set_rows(np.arange(len(lanes)), lanes, np.ascontiguousarray(inputs[:, -1]))
        self._core.set_positions(0, np.zeros(len(lanes), np.uint32))
        for streams, first, stop in self._stretches(*inputs[:, :-1].shape):
            part = np.ascontiguousarray(inputs[streams, first:stop], np.int32)
            ends = np.arange(1, len(streams) + 1) * (stop - first)
            run_pass(self._core, self._scratch, part.reshape(-1), ends, streams)

    def _stretches(self, n_lanes: int, n_tokens: int) -> Iterator[tuple[np.ndarray, int, int]]:
        """Lanes, first and last token of every pass over [n_lanes, n_tokens]."""
        width = min(n_tokens, self._n_rows, self._core.stretch_max)
        height = self._n_rows // width if width else 1
        for top in range(0, n_lanes, height):
            for first in range(0, n_tokens, width or 1):
                yield np.arange(top, min(top + height, n_lanes)), first, min(first + width, n_tokens)

    def _set_rows(self, rows: npt.NDArray[np.intp], lanes: npt.NDArray[np.intp], inputs: npt.NDArray[np.int32]) -> None:
        """The rows of the next steps: lanes `rows` of the window, which are streams `lanes`, and their inputs. A step
        has no rows for streams that have ended."""
        self._keep(lanes)
        self._rows, self._inputs = rows, inputs
        for place, array in ((self._streams, rows.astype(np.uint32)), (self._tokens, inputs)):
            self._module.upload(self._device, self._core.stream, place.pointer, array)

    def _keep(self, lanes: npt.NDArray[np.intp]) -> None:
        """Moves the decoders of `lanes` to the front."""
        if np.array_equal(lanes, self._lanes):
            return
        where = (self._device, self._core.stream, self._decoders.pointer)
        states = np.empty((len(self._lanes), self._module.DECODER_BYTES), np.uint8)
        self._module.download(*where, states)
        self._states[self._lanes] = states
        self._lanes = lanes
        self._module.upload(*where, self._states[lanes])

    def start(self, n_steps: int, active: npt.NDArray[np.bool_]) -> None:
        """`n_steps` steps of the lanes that are active, which `collect` waits for."""
        self._found = np.full((n_steps, self._n_lanes), -1, np.int32)
        goes_on = active[self._rows] & (self._inputs >= 0)
        self._is_going = bool(goes_on.any())
        if not self._is_going:
            return
        if goes_on.sum() <= _COMPACT_SHARE * len(goes_on):
            self._set_rows(self._rows[goes_on], self._lanes[goes_on], self._inputs[goes_on])
        elif (goes_on != (self._inputs >= 0)).any():
            self._set_rows(self._rows, self._lanes, np.where(goes_on, self._inputs, np.int32(-1)))
        chain = (self._streams, self._decoders, self._tokens, self._log, self._n_logged)
        self._core.decode_steps(
            n_steps,
            *(part.pointer for part in chain),
            *(_LOG_STEPS, len(self._rows), self._vocab_size, self._logits.pointer),
        )

    def collect(self) -> npt.NDArray[np.int32]:
        if self._is_going:
            found = np.empty((len(self._found), len(self._rows)), np.int32)
            self._module.download(self._device, self._core.stream, self._log.pointer, found)
            self._inputs = found[-1]
            self._found[:, self._rows] = found
        return self._found

    def fault(self) -> str | None:
        error = self._core.check()
        return None if error is None else str(error[1])


class DecodingChain:
    """Payloads to tokens, side by side, with model, range decoder and tokens on the device.

    A step is one replay of a captured graph; the host reads the tokens of up to `steps_max` steps at once. Many lanes
    are two parts, every other lane in the second.
    """

    steps_max = _LOG_STEPS

    def __init__(
        self, model: DeviceModel, n_streams: int, n_tokens: int, vocab_size: int, n_parts: int | None = None
    ) -> None:
        """`n_parts`, 1 or 2: not chosen by the number of streams."""
        self.n_streams = n_streams
        n_parts = n_parts or (2 if n_streams >= _HALVED_STREAMS else 1)
        sizes = [len(range(part, n_streams, n_parts)) for part in range(n_parts)]
        self._parts = [_ChainPart(model, n, n_tokens, vocab_size, PREFILL_ROWS // n_parts) for n in sizes]

    def begin(self, payloads: Sequence[bytes]) -> None:
        """At most `n_streams` payloads, each at its start."""
        for number, part in enumerate(self._parts):
            part.begin(payloads[number :: len(self._parts)])

    def open_window(self, lanes: npt.NDArray[np.intp], inputs: npt.NDArray[np.int32]) -> None:
        """Only the streams `lanes` go on, each after it has read its row of `inputs`, int32 [n_lanes, k], and no more.

        The last input is read by the first step.
        """
        n_parts = len(self._parts)
        self._places = [np.flatnonzero(lanes % n_parts == number) for number in range(n_parts)]
        for part, places in zip(self._parts, self._places, strict=True):
            part.open_window(lanes[places] // n_parts, inputs[places])

    def run(self, n_steps: int, active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """`n_steps` <= `steps_max` tokens of every lane, int32 [n_steps, n_lanes], `active` bool [n_lanes].

        -1 where a lane is not active; -2 where a row has an error, which `fault` tells, and -1 after that. A lane that
        is set inactive stays so until the next window.
        """
        for part, places in zip(self._parts, self._places, strict=True):
            part.start(n_steps, active[places])
        result = np.empty((n_steps, len(active)), np.int32)
        for part, places in zip(self._parts, self._places, strict=True):
            result[:, places] = part.collect()
        return result

    def fault(self) -> str:
        """What a row had that has no token."""
        return next(filter(None, (part.fault() for part in self._parts)), "no error")


# Arguments.


def integers(array: npt.ArrayLike, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """A copy, so that what is checked is what the device gets, whatever other threads do to the caller's array."""
    given = np.array(array, order="C")
    if given.dtype.kind not in "iu" and given.size:
        raise Error(f"{name} have dtype {given.dtype}; expected integers")
    if given.shape != shape:
        raise Error(f"{name} have shape {given.shape}; expected {shape}")
    return given.astype(np.int64, copy=False)


def _mask(active: npt.NDArray[np.bool_] | None, n: int) -> npt.NDArray[np.bool_]:
    if active is None:
        return np.ones(n, np.bool_)
    mask = np.array(active)
    if mask.dtype != np.bool_ or mask.shape != (n,):
        raise Error(f"active has dtype {mask.dtype} and {mask.ndim} dimensions; expected bool [{n}]")
    return mask


def foreign(tokens: npt.NDArray[np.int64], n_allowed: int) -> npt.NDArray[np.bool_]:
    return (tokens < 0) | (tokens >= n_allowed)


def outside(where: str, kind: str, token: int, n_allowed: int) -> str:
    return f"{where}: {kind} {token} is outside the vocabulary; expected 0 to {n_allowed - 1}"

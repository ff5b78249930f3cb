"""The exact engines on a CUDA device: the bits of `engines.exact`, computed by the kernels of csrc/cuda.

Arguments are checked here, and calls are cut into what the device's memory holds; weights go there once, as they are
stored. No arithmetic and no file formats. Needs ``llmcomp._cuda``, which is loaded with the first model.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmcomp.coding import cuda
from llmcomp.coding.cuda import DeviceArray
from llmcomp.errors import Error
from llmcomp.models.checkpoint import Tensor, core_arguments, read_checkpoint
from llmcomp.models.engines.exact import ExactModel, Int8Model
from llmcomp.models.memory import PassMemory

# A pass has at most so many rows, fewer where the memory does not hold them.
_PASS_ROWS_MAX = 1 << 15
_LOGITS_BYTES_MAX = 256 << 20
# Rows of what a session reads at once before its first step.
_PREFILL_ROWS = 4096
# What sessions for decoding may take of what is free, and beyond which no device gets faster.
_CHAIN_MEMORY_SHARE = 0.8
_LANES_MAX = 2048
_LOG_STEPS = 64
# Streams that have ended leave the steps when at most this share of the rows goes on: a step of another number of rows
# is captured anew.
_COMPACT_SHARE = 0.75
_ALIGNMENT = 256


class CudaModel(ExactModel):
    """A model whose weights are on a CUDA device, of any family; made by `load_cuda` or from arrays, as `ExactModel`.

    Name, fingerprint, logits and archives are those of `ExactModel`. `device` is "cuda" or "cuda:1"; as an attribute
    it always has its number. Raises `Error` where the CUDA part, a driver, a device or its memory is missing.
    """

    mixes_in_chains = False  # its decoders are on the device, where nothing mixes yet

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, np.ndarray | Tensor],
        *,
        device: str = "cuda",
        **options: Any,
    ) -> None:
        """`options`: the keywords of `ExactModel`."""
        self._module, self._device = cuda.open_device(device)
        self.device = f"cuda:{self._device}"
        self._lock = threading.Lock()
        self._pass_session: Any = None
        self._pass_limits = (0, 0, 0)
        super().__init__(config, weights, **options)
        self._scratch = _Scratch(self._module, self._device)
        self._pass_rows = max(self.pass_memory().rows(), self.context_length)

    def _make_core(self) -> Any:
        arguments = core_arguments(self.config, self._tensors, self._is_int8)
        return self._module.TransformerModel(device=self._device, **arguments)

    def pass_memory(self) -> PassMemory:
        """What a pass takes: for every row what lies between the kernels, key, value, token and interval; beside them
        one block of logits."""
        n = 1024
        row_bytes = -(-(self._core.cache_bytes(1, 1, n) + self._core.work_bytes(n)) // n) + 32
        logits_bytes = 4 * self.n_logits * self._logits_rows()
        free, total = self._module.memory(self._device)
        return PassMemory(row_bytes, logits_bytes, self._core.n_bytes, free, total, _PASS_ROWS_MAX)

    def release_memory(self) -> None:
        """Give back what is kept for the next pass."""
        with self._lock:
            self._pass_session, self._pass_limits = None, (0, 0, 0)
            self._scratch.release()

    # Passes.

    def logits(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None, *, on_device: bool = False) -> Any:
        """int [B, T] -> float32 [B, T, n_logits]. Rows at and beyond `lengths[b]` are padding and come out as zeros.

        `on_device`: a `cuda.DeviceArray`, which `llmcomp.intervals` and its like take as it is, else NumPy's.
        """
        rows, counts = self._sequences(tokens, lengths)
        shape = (*rows.shape, self.n_logits)
        if on_device:
            array = DeviceArray(shape, "float32", self._device)
            for session, found in self._passes(rows, counts):
                self._head_on_device(session, found, array.pointer)
            return array
        result = np.zeros(shape, np.float32)
        for session, found in self._passes(rows, counts):
            self._head_on_host(session, found, result.reshape(-1, self.n_logits))
        return result

    def intervals(
        self,
        tokens: npt.ArrayLike,
        targets: npt.ArrayLike,
        lengths: npt.ArrayLike | None = None,
        vocab_size: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `ExactModel.intervals`: logits exist on the device, a block of rows at a time; NumPy arrays come back."""
        vocab_size = self.vocab_size if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= self.n_logits:
            raise Error(f"vocab_size is {vocab_size}; the model has {self.n_logits} logits")

        def run(session: Any, at: _Place) -> None:
            starts = [at.results + 8 * at.n_rows * i for i in range(3)]
            session.intervals(at.n_rows, at.targets, *starts, vocab_size, at.n_logits_rows, at.logits)

        start, freq, total = self._of_targets((tokens, targets, lengths), vocab_size, np.zeros(3, np.uint64), run)
        return start, freq, total

    def log2_probabilities(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None
    ) -> np.ndarray:
        """As `ExactModel.log2_probabilities`; logits stay on the device, as with `intervals`."""

        def run(session: Any, at: _Place) -> None:
            session.log2_softmax(at.n_rows, at.targets, at.results, at.n_logits_rows, at.logits)

        return self._of_targets((tokens, targets, lengths), self.n_logits, np.zeros(1), run)[0]

    def _of_targets(
        self,
        given: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike | None],
        vocab_size: int,
        padding: np.ndarray,
        run: Callable[[Any, _Place], None],
    ) -> np.ndarray:
        """Tokens, targets and lengths -> what `run` leaves on the device for every target, [len(padding), B, T] of its
        dtype, and `padding` where there is none."""
        rows, counts = self._sequences(given[0], given[2])
        targets = _integers(given[1], "targets", rows.shape)
        _check_tokens(targets, counts, vocab_size, "target")
        result = np.tile(padding[:, None], (1, rows.size))
        for session, found in self._passes(rows, counts):
            n = len(found)
            n_block = min(self._logits_rows(), n)
            part = np.empty((len(padding), n), padding.dtype)
            pointers = self._scratch.take(4 * n, part.nbytes, 4 * n_block * self.n_logits)
            at = _Place(n, n_block, *pointers)
            self._module.upload(self._device, session.stream, at.targets, targets.reshape(-1)[found].astype(np.int32))
            run(session, at)
            self._module.download(self._device, session.stream, at.results, part)
            self._raise_found(session, found, rows.shape[1])
            result[:, found] = part
        return result.reshape(len(padding), *rows.shape)

    def _sequences(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Checked tokens, int64 [B, T], and lengths, int64 [B]."""
        given = np.asarray(tokens)
        if given.ndim != 2:
            raise Error(f"tokens have {given.ndim} dimensions; expected 2, [sequences, positions]")
        n, n_tokens = given.shape
        if n_tokens > self.context_length:
            raise Error(f"{n_tokens} tokens a sequence; the context of the model holds {self.context_length}")
        rows = _integers(given, "tokens", (n, n_tokens))
        counts = np.full(n, n_tokens) if lengths is None else _integers(lengths, "lengths", (n,))
        if (wrong := (counts < 0) | (counts > n_tokens)).any():
            first = int(wrong.argmax())
            raise Error(f"sequence {first} has length {counts[first]}; expected 0 to {n_tokens}")
        _check_tokens(rows, counts, self.n_logits, "token")
        return rows, counts

    def _passes(
        self, rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Any, npt.NDArray[np.intp]]]:
        """After each pass its session, and which of all B * T rows its rows are."""
        n_tokens = rows.shape[1]
        with self._lock:
            for numbers in _waves(counts, self._pass_rows):
                found = np.flatnonzero(
                    np.isin(np.arange(len(rows)), numbers)[:, None] & (np.arange(n_tokens) < counts[:, None])
                )
                ends = np.cumsum(counts[numbers])
                session = self._session_of_pass(len(numbers), int(counts[numbers].max()), len(found))
                inputs = rows.reshape(-1)[found].astype(np.int32)
                # A model of one layer has no other keys and values than these: its streams would go on.
                session.set_positions(0, np.zeros(len(numbers), np.uint32))
                _run_pass(session, self._scratch, inputs, ends, None)
                yield session, found
                self._raise_found(session, found, n_tokens)

    def _session_of_pass(self, n_streams: int, n_tokens: int, n_rows: int) -> Any:
        """One of a single layer's keys and values, kept while it is large enough."""
        limits = (n_streams, n_tokens, n_rows)
        if self._pass_session is None or any(a > b for a, b in zip(limits, self._pass_limits, strict=True)):
            self._pass_session = None
            self._pass_session = self._core.session(1, *limits)
            self._pass_limits = limits
        return self._pass_session

    def _logits_rows(self) -> int:
        return max(1, _LOGITS_BYTES_MAX // (4 * self.n_logits))

    def _head_on_host(self, session: Any, found: npt.NDArray[np.intp], result: np.ndarray) -> None:
        step = min(self._logits_rows(), len(found))
        (pointer,) = self._scratch.take(4 * step * self.n_logits)
        for at in range(0, len(found), step):
            part = found[at : at + step]
            session.head(at, len(part), pointer)
            is_dense = part[-1] - part[0] + 1 == len(part)
            block = result[part[0] : part[-1] + 1] if is_dense else np.empty((len(part), self.n_logits), np.float32)
            self._module.download(self._device, session.stream, pointer, block)
            if not is_dense:
                result[part] = block

    def _head_on_device(self, session: Any, found: npt.NDArray[np.intp], pointer: int) -> None:
        starts = np.flatnonzero(np.diff(found, prepend=-2) != 1)
        for first, stop in zip(starts, [*starts[1:], len(found)], strict=True):
            session.head(int(first), int(stop - first), pointer + 4 * self.n_logits * int(found[first]))

    def _raise_found(self, session: Any, found: npt.NDArray[np.intp], n_tokens: int) -> None:
        error = session.check()
        if error is not None:
            sequence, position = divmod(int(found[error[0]]), n_tokens)
            raise Error(f"sequence {sequence}, position {position}: {error[1]}")

    # Streams.

    def session(self, n_streams: int, n_tokens: int | None = None) -> CudaSession:  # type: ignore[override]
        """A session on the device; `step`, `prefill`, `reset` and `positions` as `ExactModel.session` has them."""
        return CudaSession(self, n_streams, self.context_length if n_tokens is None else n_tokens)

    def lanes(self, n_tokens: int) -> int:
        """How many streams of `n_tokens` tokens can be decoded side by side in the memory that is free now."""
        n = 64
        lane_bytes = self._core.cache_bytes(self.config.n_layers, n, n_tokens) / n + 4 * self.n_logits
        lane_bytes += self._core.work_bytes(n) / n
        free = _CHAIN_MEMORY_SHARE * self._module.memory(self._device)[0] - self._core.work_bytes(_PREFILL_ROWS)
        return max(1, min(_LANES_MAX, int(free / lane_bytes)))

    def decoding_chain(self, n_streams: int, n_tokens: int, vocab_size: int) -> DecodingChain:
        """Decodes up to `n_streams` payloads side by side, in windows of up to `n_tokens` tokens."""
        return DecodingChain(self, n_streams, n_tokens, vocab_size)


class CudaInt8Model(CudaModel, Int8Model):
    """An `Int8Model` whose codes are made and kept on a CUDA device, and multiplied by its integer tensor cores."""


def load_cuda(
    folder: str | os.PathLike[str], *, device: str = "cuda", engine: str = "exact", **options: Any
) -> CudaModel:
    """Load a model of any known family onto a CUDA device; `engine`, `options` and errors as `exact.load_exact`."""
    model = CudaInt8Model if engine == Int8Model.engine else CudaModel
    return model(**read_checkpoint(folder, **options), device=device)


class _Place(NamedTuple):
    """Where on the device a pass's targets, what is found of them, and a block of logits are."""

    n_rows: int
    n_logits_rows: int
    targets: int
    results: int
    logits: int


class _Scratch:
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


def _waves(counts: npt.NDArray[np.int64], rows_max: int) -> Iterator[npt.NDArray[np.intp]]:
    """Numbers of sequences, in order and without empty ones, that as one rectangle have at most `rows_max` rows."""
    numbers: list[int] = []
    longest = 0
    for number in np.flatnonzero(counts):
        grown = max(longest, int(counts[number]))
        if numbers and grown * (len(numbers) + 1) > rows_max:
            yield np.array(numbers)
            numbers, grown = [], int(counts[number])
        numbers.append(int(number))
        longest = grown
    if numbers:
        yield np.array(numbers)


def _run_pass(
    session: Any, scratch: _Scratch, inputs: npt.NDArray[np.int32], ends: np.ndarray, streams: np.ndarray | None
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


# Streams.


class CudaSession:
    """`n_streams` independent streams of up to `n_tokens` tokens on a device; one thread at a time."""

    def __init__(self, model: CudaModel, n_streams: int, n_tokens: int) -> None:
        if not 1 <= n_streams <= 1 << 20:
            raise Error(f"n_streams is {n_streams}; expected 1 or more")
        if not 1 <= n_tokens <= model.context_length:
            raise Error(f"a session of {n_tokens} tokens; the context of the model holds {model.context_length}")
        self.n_streams = n_streams
        self._model, self._n_tokens = model, n_tokens
        self._module, self._device = model._module, model._device
        self._n_rows = max(n_streams, min(n_tokens, _PREFILL_ROWS))
        self._core = model._core.session(model.config.n_layers, n_streams, n_tokens, self._n_rows)
        self._scratch = _Scratch(self._module, self._device)
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
        given = _integers(tokens, "tokens", (self.n_streams,))
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
        inputs = _integers(flat, "tokens", flat.shape)
        if not len(inputs):
            raise Error("prefill of 0 tokens; expected at least 1")
        seen = int(self._positions[stream])
        if len(inputs) > self._n_tokens - seen:
            raise Error(
                f"stream {stream} has seen {seen} tokens and cannot take {len(inputs)} more; "
                f"the session holds {self._n_tokens}"
            )
        if (wrong := _foreign(inputs, self._model.n_logits)).any():
            raise Error(_outside(f"stream {stream}", "token", inputs[wrong.argmax()], self._model.n_logits))
        result = np.empty(self._model.n_logits, np.float32)
        with self._used():
            step = min(self._n_rows, self._core.stretch_max)
            for at in range(0, len(inputs), step):
                part = inputs[at : at + step].astype(np.int32)
                _run_pass(self._core, self._scratch, part, np.array([len(part)]), np.array([stream]))
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
        if (wrong := mask & _foreign(tokens, self._model.n_logits)).any():
            stream = int(wrong.argmax())
            raise Error(_outside(f"stream {stream}", "token", tokens[stream], self._model.n_logits))

    def _raise_found(self) -> None:
        error = self._core.check()
        if error is not None:
            raise Error(f"stream {error[0]}: {error[1]}")


class DecodingChain:
    """Payloads to tokens, side by side, with model, range decoder and tokens on the device.

    A step is one replay of a captured graph; the host reads the tokens of up to `steps_max` steps at once.
    """

    steps_max = _LOG_STEPS

    def __init__(self, model: CudaModel, n_streams: int, n_tokens: int, vocab_size: int) -> None:
        self.n_streams = n_streams
        self._vocab_size = vocab_size
        self._module, self._device = module, device = model._module, model._device
        self._n_rows = max(n_streams, _PREFILL_ROWS)
        self._core = model._core.session(model.config.n_layers, n_streams, n_tokens, self._n_rows)
        self._scratch = _Scratch(module, device)
        self._decoders = module.Buffer(n_streams * module.DECODER_BYTES, device)
        self._logits = module.Buffer(4 * n_streams * model.n_logits, device)
        self._tokens = module.Buffer(4 * n_streams, device)
        self._streams = module.Buffer(4 * n_streams, device)
        self._log = module.Buffer(4 * n_streams * _LOG_STEPS, device)
        self._n_logged = module.Buffer(4, device)

    def begin(self, payloads: Sequence[bytes]) -> None:
        """At most `n_streams` payloads, each at its start."""
        module, stream, n = self._module, self._core.stream, len(payloads)
        offsets = np.cumsum([0, *map(len, payloads)], dtype=np.uint64)
        self._payloads = module.Buffer(int(offsets[-1]), self._device)
        self._offsets = module.Buffer(offsets.nbytes, self._device)
        module.upload(self._device, stream, self._payloads.pointer, b"".join(payloads))
        module.upload(self._device, stream, self._offsets.pointer, offsets)
        place = (self._decoders.pointer, n, self._payloads.pointer, self._offsets.pointer)
        module.decoders_begin(self._device, stream, *place)
        self._lanes = np.arange(n)
        self._states = np.zeros((n, module.DECODER_BYTES), np.uint8)

    def open_window(self, lanes: npt.NDArray[np.intp], inputs: npt.NDArray[np.int32]) -> None:
        """Only the streams `lanes` go on, each after it has read its row of `inputs`, int32 [n_lanes, k], and no more.

        The last input is read by the first step.
        """
        self._n_lanes = len(lanes)
        self._set_rows(np.arange(len(lanes)), lanes, np.ascontiguousarray(inputs[:, -1]))
        self._core.set_positions(0, np.zeros(len(lanes), np.uint32))
        for streams, first, stop in self._stretches(*inputs[:, :-1].shape):
            part = np.ascontiguousarray(inputs[streams, first:stop], np.int32)
            ends = np.arange(1, len(streams) + 1) * (stop - first)
            _run_pass(self._core, self._scratch, part.reshape(-1), ends, streams)

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

    def run(self, n_steps: int, active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """`n_steps` <= `steps_max` tokens of every lane, int32 [n_steps, n_lanes], `active` bool [n_lanes].

        -1 where a lane is not active; -2 where a row has an error, which `fault` tells, and -1 after that. A lane that
        is set inactive stays so until the next window.
        """
        result = np.full((n_steps, self._n_lanes), -1, np.int32)
        goes_on = active[self._rows] & (self._inputs >= 0)
        if not goes_on.any():
            return result
        if goes_on.sum() <= _COMPACT_SHARE * len(goes_on):
            self._set_rows(self._rows[goes_on], self._lanes[goes_on], self._inputs[goes_on])
        elif (goes_on != (self._inputs >= 0)).any():
            self._set_rows(self._rows, self._lanes, np.where(goes_on, self._inputs, np.int32(-1)))
        n = len(self._rows)
        chain = (self._streams, self._decoders, self._tokens, self._log, self._n_logged)
        self._core.decode_steps(
            n_steps, *(part.pointer for part in chain), _LOG_STEPS, n, self._vocab_size, self._logits.pointer
        )
        found = np.empty((n_steps, n), np.int32)
        self._module.download(self._device, self._core.stream, self._log.pointer, found)
        self._inputs = found[-1]
        result[:, self._rows] = found
        return result

    def fault(self) -> str:
        """What a row had that has no token."""
        error = self._core.check()
        return "no error" if error is None else str(error[1])


# Arguments.


def _integers(array: npt.ArrayLike, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
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


def _foreign(tokens: npt.NDArray[np.int64], n_allowed: int) -> npt.NDArray[np.bool_]:
    return (tokens < 0) | (tokens >= n_allowed)


def _outside(where: str, kind: str, token: int, n_allowed: int) -> str:
    return f"{where}: {kind} {token} is outside the vocabulary; expected 0 to {n_allowed - 1}"


def _check_tokens(rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], n_allowed: int, kind: str) -> None:
    wrong = _foreign(rows, n_allowed) & (np.arange(rows.shape[1]) < counts[:, None])
    if wrong.any():
        sequence, position = divmod(int(wrong.argmax()), rows.shape[1])
        where = f"sequence {sequence}, position {position}"
        raise Error(_outside(where, kind, rows[sequence, position], n_allowed))

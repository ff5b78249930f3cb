"""The exact engines on a CUDA device: the bits of `engines.exact`, computed by the kernels of csrc/cuda.

Arguments are checked here, and calls are cut into what the device's memory holds; weights go there once, as they are
stored. No arithmetic and no file formats. Needs ``llmcomp._cuda``, which is loaded with the first model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmcomp.coding import cuda
from llmcomp.coding.cuda import DeviceArray
from llmcomp.errors import Error
from llmcomp.models.checkpoint import Tensor, core_arguments, read_checkpoint
from llmcomp.models.engines.cuda_streams import (
    PREFILL_ROWS,
    CudaSession,
    DecodingChain,
    Scratch,
    foreign,
    integers,
    outside,
    run_pass,
)
from llmcomp.models.engines.exact import ExactModel, Int8Model
from llmcomp.models.memory import PassMemory

# A pass has at most so many rows, fewer where the memory does not hold them.
_PASS_ROWS_MAX = 1 << 15
_LOGITS_BYTES_MAX = 256 << 20
# What sessions for decoding may take of what is free, and beyond which no device gets faster.
_CHAIN_MEMORY_SHARE = 0.8
_LANES_MAX = 2048


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
        self._scratch = Scratch(self._module, self._device)
        self._pass_rows = max(self.pass_memory().rows(), self.context_length)

    def _make_core(self) -> Any:
        arguments = core_arguments(self.config, self._tensors, self._is_int8)
        return self._module.TransformerModel(device=self._device, **arguments)

    def pass_memory(self, n_tokens: int | None = None) -> PassMemory:
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
        targets = integers(given[1], "targets", rows.shape)
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
        rows = integers(given, "tokens", (n, n_tokens))
        counts = np.full(n, n_tokens) if lengths is None else integers(lengths, "lengths", (n,))
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
                run_pass(session, self._scratch, inputs, ends, None)
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

    def session_memory(self, n_streams: int = 1, n_tokens: int | None = None) -> int:
        cache_bytes = self._core.cache_bytes(self.config.n_layers, n_streams, n_tokens or self.context_length)
        return int(cache_bytes + self._core.work_bytes(n_streams) + 4 * n_streams * self.n_logits)

    def session(self, n_streams: int, n_tokens: int | None = None) -> CudaSession:  # type: ignore[override]
        """A session on the device; `step`, `prefill`, `reset` and `positions` as `ExactModel.session` has them."""
        return CudaSession(self, n_streams, self.context_length if n_tokens is None else n_tokens)

    def lanes(self, n_tokens: int) -> int:
        """How many streams of `n_tokens` tokens can be decoded side by side in the memory that is free now."""
        n = 64
        lane_bytes = self._core.cache_bytes(self.config.n_layers, n, n_tokens) / n + 4 * self.n_logits
        lane_bytes += self._core.work_bytes(n) / n
        free = _CHAIN_MEMORY_SHARE * self._module.memory(self._device)[0] - self._core.work_bytes(PREFILL_ROWS)
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


# Arguments.


def _check_tokens(rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], n_allowed: int, kind: str) -> None:
    wrong = foreign(rows, n_allowed) & (np.arange(rows.shape[1]) < counts[:, None])
    if wrong.any():
        sequence, position = divmod(int(wrong.argmax()), rows.shape[1])
        where = f"sequence {sequence}, position {position}"
        raise Error(outside(where, kind, rows[sequence, position], n_allowed))

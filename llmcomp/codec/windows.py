"""Streams of tokens of any length through a model that sees `context_length` inputs: the window plan and how it is run.

Here token ids and logits meet the coder; bytes, mappings and archives are unknown. Encoding scores all windows of all
streams in padded batches, halved where memory does not hold one; decoding walks all streams in lockstep, since their
windows begin at the same positions.

    context_length = 8, overlap = 2 (b: the start token, C: fed as context, x: coded)

    tokens     0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
    window 1   x x x x x x x x                             inputs b 0 1 2 3 4 5 6
    window 2               C C x x x  x  x  x              inputs b 6 7 8 9 10 11 12
    window 3                          C  C  x  x  x        inputs b 12 13 14 15
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmcomp import coding
from llmcomp.errors import CorruptArchive, Error
from llmcomp.models.adapter import AdaptedModel, AdaptedSession
from llmcomp.models.memory import MaxMemory, is_out_of_memory

# Mapping latin1 needs two bytes of UTF-8, thus at most two tokens, for a byte; no other mapping needs more than one.
TOKENS_PER_BYTE_MAX = 2
# Steps of a chain between two looks at which streams of mixed rows have ended: what a stream can run past its end.
CHAIN_STEPS_MAX = 64

Tokens = npt.NDArray[np.int32]


class Window(NamedTuple):
    """Tokens `start` .. `stop` - 1 are coded; those from `context_start` on are fed before, behind the start token."""

    context_start: int
    start: int
    stop: int


def plan_windows(n_tokens: int, context_length: int, overlap: int) -> list[Window]:
    """The windows of a stream; a window has `stop - context_start` <= `context_length` inputs.

    Position by position it is the same for every stream, however long: a decoder needs no length to follow it.
    """
    if not 0 <= overlap < context_length:
        raise Error(
            f"overlap {overlap}: expected 0 .. {context_length - 1}, below the context of {context_length} tokens"
        )
    windows = []
    start = 0
    while start < n_tokens:
        context_start = max(0, start - overlap)
        stop = min(n_tokens, context_start + context_length)
        windows.append(Window(context_start, start, stop))
        start = stop
    return windows


def batch_size(lengths: Sequence[int], rows_max: int) -> int:
    """How many of `lengths`, longest first, make the next batch of at most `rows_max` rows with the padding.

    Batches are about equally large, and one of an eighth of `rows_max` rows ends before a length that would be padded
    by more than an eighth.
    """
    n_batches = -(-len(lengths) // max(1, rows_max // lengths[0]))
    n = -(-len(lengths) // n_batches)
    first = max(1, -(-rows_max // (8 * lengths[0])))
    return next((i for i in range(first, n) if 8 * lengths[i] < 7 * lengths[0]), n)


class BatchRows:
    """How many rows (tokens, padding included) a batch of `model` may have: `n`, found once, for sequences of up to
    `n_tokens` tokens.

    `is_fused`: the model makes its numbers inside the pass; else all logits of a batch exist at once.
    """

    def __init__(self, model: AdaptedModel, is_fused: bool, n_tokens: int | None = None, max_memory: MaxMemory = None):
        self._release = model.release_memory
        self.n = model.pass_memory(is_fused, n_tokens).rows(max_memory)

    def run(self, lengths: Sequence[int], work: Callable[[list[int]], Any]) -> None:
        """Calls `work` with the indices of batch after batch, longest first.

        Where it runs out of memory the batch, and all that follow, are halved; `Error` if one stream is too large.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        ordered = [lengths[i] for i in order]
        at = 0
        while at < len(order):
            n_streams = batch_size(ordered[at:], self.n)
            try:
                work(order[at : at + n_streams])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if n_streams == 1:
                    raise Error(
                        f"{ordered[at]} tokens at once need more memory than there is ({str(error) or 'out of memory'})"
                    ) from error
                self.n = n_streams // 2 * ordered[at]
            else:
                at += n_streams
                continue
            # Only now: what the failed batch held hung on the error.
            self._release()


class WindowedModel:
    """A model, the symbols that are coded with it, its start token and its windows.

    `is_stepwise` is for models whose one-pass logits differ in bits from their step-by-step logits: both sides then
    step through one stream at a time. `max_memory` (bytes, a share of all, or None for what is free) bounds batches.
    """

    def __init__(
        self,
        model: AdaptedModel,
        *,
        vocab_size: int,
        bos_token: int,
        context_length: int,
        overlap: int,
        is_stepwise: bool = False,
        max_memory: MaxMemory = None,
    ):
        plan_windows(0, context_length, overlap)
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.overlap = overlap
        self.is_stepwise = is_stepwise
        # Called with the tokens that each batch of scoring took.
        self.on_tokens: Callable[[int], Any] | None = None
        self._model = model
        self._bos_token = bos_token
        self._session: AdaptedSession | None = None
        self._max_memory = max_memory
        self._rows: BatchRows | None = None
        self._chain: Any = None
        self._chain_lanes: int | None = None

    # Scoring and encoding.

    @property
    def batch_rows(self) -> int | None:
        """How many rows a batch may have; None where streams are stepped through, and before the first batch."""
        return None if self._rows is None else self._rows.n

    def intervals(self, streams: Sequence[Tokens]) -> list[npt.NDArray[np.uint64]]:
        """For every stream of T tokens its intervals, uint64 [3, T]: start, freq and total."""
        return self.start_intervals(streams)()

    def start_intervals(self, streams: Sequence[Tokens]) -> Callable[[], list[npt.NDArray[np.uint64]]]:
        """Gives the model all that `intervals` needs. What is returned waits for it, on any thread, and returns it.

        Errors come from either. On a CPU the model has done its work when this returns.
        """
        results = [np.zeros((3, len(stream)), np.uint64) for stream in streams]
        if self.is_stepwise:
            for stream, result in zip(streams, results, strict=True):
                self._step_through(stream, result)
                self._report(len(stream))
            return lambda: results
        windows = [
            (number, window)
            for number, stream in enumerate(streams)
            for window in plan_windows(len(stream), self.context_length, self.overlap)
        ]
        started: list[Callable[[], None]] = []

        def start(batch: list[int]) -> None:
            chosen = [windows[i] for i in batch]
            started.append(self._start_batch([(streams[n], results[n], window) for n, window in chosen]))
            self._report(sum(window.stop - window.start for _, window in chosen))

        if self._rows is None:
            self._rows = BatchRows(self._model, self._model.has_intervals, self.context_length, self._max_memory)
        self._rows.run([window.stop - window.context_start for _, window in windows], start)

        def finish() -> list[npt.NDArray[np.uint64]]:
            for wait in started:
                wait()
            return results

        return finish

    def _report(self, n_tokens: int) -> None:
        if self.on_tokens is not None:
            self.on_tokens(n_tokens)

    def encode(self, streams: Sequence[Tokens]) -> list[bytes]:
        """The payload of every stream, int [T] each."""
        return [coding.encode_intervals(*parts) for parts in self.intervals(streams)]

    def _start_batch(self, batch: list[tuple[Tokens, np.ndarray, Window]]) -> Callable[[], None]:
        """Starts a batch, longest window first; what is returned fills the results of its windows."""
        n_inputs = batch[0][2].stop - batch[0][2].context_start
        tokens = np.full((len(batch), n_inputs), self._bos_token, np.int32)
        targets = np.zeros((len(batch), n_inputs), np.int32)
        lengths = np.zeros(len(batch), np.int64)
        for row, (stream, _, window) in enumerate(batch):
            lengths[row] = n = window.stop - window.context_start
            targets[row, :n] = stream[window.context_start : window.stop]
            tokens[row, 1:n] = targets[row, : n - 1]
        wait = self._model.start_intervals(tokens, targets, lengths, self.vocab_size)

        def fill() -> None:
            parts = wait()
            for row, (_, result, window) in enumerate(batch):
                first, last = window.start - window.context_start, window.stop - window.context_start
                result[:, window.start : window.stop] = parts[:, row, first:last]

        return fill

    def _step_through(self, stream: Tokens, result: np.ndarray) -> None:
        """Fills the result of one stream by the same calls as `decode` of that stream alone."""
        for window in plan_windows(len(stream), self.context_length, self.overlap):
            session, logits = self.open_window(stream[None, window.context_start : window.start])
            for at in range(window.start, window.stop):
                token = stream[at : at + 1]
                result[:, at : at + 1] = coding.intervals(logits, token, self.vocab_size)
                if at + 1 < window.stop:
                    logits = session.step(token)

    # Decoding.

    def open_window(self, context: np.ndarray) -> tuple[AdaptedSession, Any]:
        """A session that has read the start token and `context`, int [B, k], and nothing else; its logits then."""
        session = self._session
        if session is not None and session.n_streams == len(context) and session.reset is not None:
            session.reset()
        else:
            self._session = None
            self._session = session = self._model.session(len(context), may_prefill=not self.is_stepwise)
        return session, session.read(np.pad(context, ((0, 0), (1, 0)), constant_values=self._bos_token))

    def decode(
        self,
        payloads: Sequence[bytes],
        n_bytes: Sequence[int],
        token_bytes: npt.NDArray[np.int64],
        tables: Sequence[int],
        on_step: Callable[[int], Any] | None = None,
        *,
        is_mixed: bool = False,
    ) -> list[Tokens]:
        """The tokens of streams of which only the number of bytes is known.

        `token_bytes` (int64 [n_tables, vocab_size]): how many bytes a token completes, -1 for one that cannot
        occur; stream i goes by row `tables[i]` and ends when it has its `n_bytes[i]`. `on_step` is called with the
        bytes that each step completed. `is_mixed`: their intervals were mixed with what each stream itself teaches,
        from its first token to its last, whatever the windows. CorruptArchive names the first stream with a token that
        cannot stand there.
        """
        if self.is_stepwise and len(payloads) > 1:
            alone = zip(payloads, n_bytes, tables, strict=True)
            return [self.decode([p], [n], token_bytes, [table], on_step, is_mixed=is_mixed)[0] for p, n, table in alone]
        tokens_max = _n_tokens_max(n_bytes, token_bytes) if is_mixed else None
        if self._model.decodes_in_chains and (self._model.mixes_in_chains or not is_mixed):
            return self._decode_in_chains(payloads, n_bytes, token_bytes, tables, on_step, tokens_max=tokens_max)
        walk = _Walk(n_bytes, token_bytes, tables, on_step)
        decoder = coding.Decoder(payloads, token_bytes.shape[1], tokens_max)
        while walk.active.any():
            context = walk.recent(self.overlap)
            lanes = np.flatnonzero(walk.active)
            session, logits = self.open_window(context[lanes])
            for left in range(self.context_length - context.shape[1] - 1, -1, -1):
                rows = _spread(_on_host(logits) if is_mixed else logits, lanes, len(payloads))
                tokens = decoder.pull(rows, walk.active)
                walk.take(tokens[None])
                if not left or not walk.active.any():
                    break
                logits = session.step(np.maximum(tokens[lanes], 0))
        return walk.streams()

    def _decode_in_chains(
        self,
        payloads: Sequence[bytes],
        n_bytes: Sequence[int],
        token_bytes: npt.NDArray[np.int64],
        tables: Sequence[int],
        on_step: Callable[[int], Any] | None,
        *,
        tokens_max: npt.NDArray[np.int64] | None,
    ) -> list[Tokens]:
        """By a model that has the decoder beside it: as many streams at once as its device holds."""
        if self._chain_lanes is None:
            self._chain_lanes = self._model.lanes(self.context_length)
        n = max(1, min(len(payloads), self._chain_lanes))
        if self._chain is None or self._chain.n_streams < n:
            self._chain = None
            self._chain = self._model.decoding_chain(n, self.context_length, token_bytes.shape[1])
        streams: list[Tokens] = []
        for at in range(0, len(payloads), n):
            part = slice(at, at + n)
            walk = _Walk(n_bytes[part], token_bytes, tables[part], on_step, self._chain.fault)
            if tokens_max is None:
                self._chain.begin(payloads[part])
            else:
                self._chain.begin(payloads[part], tokens_max[part])
            steps_max = self._chain.steps_max if tokens_max is None else min(self._chain.steps_max, CHAIN_STEPS_MAX)
            while walk.active.any():
                self._decode_window(walk, steps_max)
            streams += walk.streams()
        return streams

    def _decode_window(self, walk: _Walk, steps_max: int) -> None:
        lanes = np.flatnonzero(walk.active)
        context = walk.recent(self.overlap)[lanes]
        self._chain.open_window(lanes, np.pad(context, ((0, 0), (1, 0)), constant_values=self._bos_token))
        left = self.context_length - context.shape[1]
        while left and walk.active.any():
            n_steps = min(left, steps_max, walk.n_steps_wanted)
            tokens = np.full((n_steps, len(walk.active)), -1, np.int32)
            tokens[:, lanes] = self._chain.run(n_steps, walk.active[lanes])
            walk.take(tokens)
            left -= n_steps


def _n_tokens_max(n_bytes: Sequence[int], token_bytes: np.ndarray) -> npt.NDArray[np.int64]:
    """The most tokens that each stream can have, with those that a chain decodes behind its end.

    A token that completes no byte stands only before one that does.
    """
    per_byte = TOKENS_PER_BYTE_MAX if (token_bytes == 0).any() else 1
    return per_byte * np.array(n_bytes, np.int64) + CHAIN_STEPS_MAX


def _on_host(logits: Any) -> Any:
    """Logits where mixed rows are searched: those of a device are copied."""
    if not coding.cuda.is_on_device(logits):
        return logits
    return logits.cpu() if hasattr(logits, "cpu") else logits.numpy()


def _spread(logits: Any, lanes: np.ndarray, n_streams: int) -> Any:
    """Rows of some streams as rows of all, [n_streams, V]; those of the others are not read, whatever they hold."""
    if len(lanes) == n_streams:
        return logits
    row_of = np.zeros(n_streams, np.int64)
    row_of[lanes] = np.arange(len(lanes))
    # Tensors stay tensors: NumPy has no bfloat16 and takes none with a gradient.
    return logits[row_of.tolist()]


class _Walk:
    """What is decoded so far of streams in lockstep, and which of them still go on."""

    def __init__(
        self,
        n_bytes: Sequence[int],
        token_bytes: np.ndarray,
        tables: Sequence[int],
        on_step: Callable[[int], Any] | None,
        fault: Callable[[], str] | None = None,
    ):
        """`fault` says what was wrong with a row that was decoded to -2."""
        self._left = np.array(n_bytes, np.int64)
        self._tokens_max = TOKENS_PER_BYTE_MAX * self._left
        self._n_tokens = np.zeros(len(n_bytes), np.int64)
        # The two that stand for no token, -2 and -1, are the indices of what is appended.
        self._token_bytes = np.concatenate([token_bytes, np.tile([[-1, 0]], (len(token_bytes), 1))], 1)
        self._tables = np.array(tables, np.int64)
        # Room for all that can come; what is not written takes no memory.
        self._tokens = np.empty((len(n_bytes), int(self._tokens_max.max(initial=0))), np.int32)
        self._n_steps = 0
        self._on_step, self._fault = on_step, fault
        self.active = self._left > 0

    @property
    def n_steps_wanted(self) -> int:
        """Steps after which the stream with the most bytes left may have ended; hardly more, and 1 at the end."""
        return max(1, int(self._left.max()) // 4)

    def recent(self, n_tokens: int) -> Tokens:
        """The last tokens, at most `n_tokens`, of every stream: int32 [B, k]."""
        return self._tokens[:, max(0, self._n_steps - n_tokens) : self._n_steps]

    def take(self, tokens: Tokens) -> None:
        """The tokens of one or more steps, int32 [n_steps, B]; what follows a stream's last byte is not its own."""
        n_new = self._token_bytes[self._tables, tokens]
        left = self._left - np.cumsum(n_new, 0)
        own = np.logical_and.accumulate(left + n_new > 0)
        n_tokens = self._n_tokens + np.cumsum(own, 0)
        wrong = own & ((n_new < 0) | (left < 0) | (n_tokens > self._tokens_max))
        if wrong.any():
            step, stream = divmod(int(wrong.argmax()), len(self.active))
            self._refuse(stream, int(tokens[step, stream]))
        n_new[~own] = 0
        self._left -= n_new.sum(0)
        self._n_tokens = n_tokens[-1]
        # No stream of its own goes on behind the last column.
        kept = self._tokens[:, self._n_steps : self._n_steps + len(tokens)]
        kept[:] = np.where(own, tokens, np.int32(-1))[: kept.shape[1]].T
        self._n_steps += kept.shape[1]
        self.active = self._left > 0
        if self._on_step is not None:
            self._on_step(int(n_new.sum()))

    def _refuse(self, stream: int, token: int) -> None:
        if token < 0 and self._fault is not None:
            raise Error(f"stream {stream}: {self._fault()}")
        raise CorruptArchive(f"stream {stream} holds token {token} where it cannot stand")

    def streams(self) -> list[Tokens]:
        return [row[:n] for row, n in zip(self._tokens, self._n_tokens, strict=True)]

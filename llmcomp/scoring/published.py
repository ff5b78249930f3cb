"""The published protocol's sum of bits: softmax, clamp, first token free. Bytes, rows and archives are unknown here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from llmcomp import coding
from llmcomp.codec.windows import BatchRows, Tokens
from llmcomp.errors import Error
from llmcomp.models.memory import MaxMemory

PUBLISHED_CLAMP = 1e-10


class PublishedSum:
    """The published sum for streams of tokens: -log2 of the clamped probabilities of all tokens but the first.

    A model with `log2_probabilities` computes them where its logits lie. Streams of like length share a batch.
    """

    def __init__(self, model: Any, n_logits: int, max_memory: MaxMemory = None):
        self._model = model
        self._is_fused = hasattr(model, "log2_probabilities")
        self._rows = BatchRows(model, self._is_fused, n_logits, max_memory)
        self._watch: Callable[[str], AbstractContextManager[Any]] = getattr(model, "watch", nullcontext)

    @property
    def batch_rows(self) -> int:
        """How many rows a batch may have."""
        return self._rows.n

    def bits(self, streams: Sequence[Tokens]) -> list[float]:
        """The sum for every stream, int [T] each; 0 for a stream of one token. `Error` for NaN."""
        return self.start(streams)()

    def start(self, streams: Sequence[Tokens]) -> Callable[[], list[float]]:
        """Gives the model all that `bits` needs; what is returned waits for it, on any thread, and tells it."""
        bits = [0.0] * len(streams)
        long = [i for i, stream in enumerate(streams) if len(stream) > 1]
        started: list[Callable[[], None]] = []
        self._rows.run(
            [len(streams[i]) for i in long],
            lambda batch: started.append(self._start_batch([long[i] for i in batch], streams, bits)),
        )

        def finish() -> list[float]:
            for wait in started:
                wait()
            if not np.isfinite(bits).all():
                raise Error(f"stream {int(np.isfinite(bits).argmin())}: the model's logits hold NaN or +inf")
            return bits

        return finish

    def _start_batch(self, batch: list[int], streams: Sequence[Tokens], bits: list[float]) -> Callable[[], None]:
        inputs = np.zeros((len(batch), len(streams[batch[0]])), np.int32)
        lengths = np.array([len(streams[i]) for i in batch]) - 1
        for row, i in enumerate(batch):
            inputs[row, : len(streams[i])] = streams[i]
        if not self._is_fused:
            given = self._model.logits(inputs)
            logits = given if hasattr(given, "__dlpack__") else np.asarray(given)
            with self._watch("intervals"):
                for row, i in enumerate(batch):
                    bits[i] = _bits_of_logits(logits[row, : lengths[row]], streams[i][1:], i)
            return lambda: None
        if hasattr(self._model, "start_log2_probabilities"):
            wait = self._model.start_log2_probabilities(inputs[:, :-1], inputs[:, 1:], lengths)
        else:
            found = self._model.log2_probabilities(inputs[:, :-1], inputs[:, 1:], lengths)
            wait = lambda: found  # noqa: E731

        def fill() -> None:
            for i, row, length in zip(batch, wait(), lengths, strict=True):
                bits[i] = _clamped_bits(row[:length])

        return fill


def _bits_of_logits(logits: Any, targets: Tokens, stream: int) -> float:
    """The published sum of float32 or 16-bit logits [T, V]; NumPy's others become float32."""
    if isinstance(logits, np.ndarray) and logits.dtype.itemsize > 4:
        logits = logits.astype(np.float32)
    try:
        return _clamped_bits(coding.log2_softmax(logits, targets))
    except Error as error:
        raise Error(f"stream {stream}, {error}") from None


def _clamped_bits(log2_probabilities: np.ndarray) -> float:
    # fsum's order is that of no instruction set. A NaN remains one.
    return -math.fsum(np.maximum(log2_probabilities, np.log2(PUBLISHED_CLAMP)).tolist())

"""The published protocol, all of it: its tokens, its sum of bits, its cuts and its filter of chunks.

The computation behind "Compression Scaling Laws for Transformer Compressors Across Modalities" (R. Bharadwaj, 2025),
repeated so that its numbers can be checked. Nothing is coded by it and nothing could be decoded. Its 75 ratios are in
results/cells.py, its random baseline is in baselines.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmcomp.codec.windows import BatchRows, Tokens
from llmcomp.data.mappings import Encoded
from llmcomp.data.token_cache import TokenCache
from llmcomp.data.tokenizers import AnyTokenizer
from llmcomp.errors import Error
from llmcomp.models.adapter import AdaptedModel, ModelTraits
from llmcomp.models.memory import MaxMemory

# b % 128, as the mapping "ascii", which pays for the top bit that this protocol drops.
BYTES_MAPPING = "ascii"
MAX_TOKENS = 1024
CLAMP = 1e-10
# Chunks with another ratio are dropped.
RATIOS = (0.01, 10.0)


class PublishedTokens:
    """The published tokens of a chunk, as a mapping; `n_bytes` of what it makes are the bytes that they cover."""

    name = "published"

    def encode(self, data: bytes, tokenizer: AnyTokenizer) -> Encoded:
        """At most 1,024 tokens of the text of b % 128, whose top bits are dropped without a trace.

        The text goes through the tokenizer as it is: normaliser, special tokens recognised. Covered are the bytes whose
        tokens were kept.
        """
        text = (np.frombuffer(data, np.uint8) & 127).tobytes().decode("ascii")
        tokens = tokenizer.encode_text(text)
        return _cut(Encoded(tokens, b"", 0, len(data)), MAX_TOKENS, tokenizer)


def _cut(item: Encoded, n_tokens: int, tokenizer: AnyTokenizer) -> Encoded:
    if len(item.tokens) <= n_tokens:
        return item
    kept = item.tokens[:n_tokens]
    return Encoded(kept, b"", 0, min(int(tokenizer.text_lengths(kept).sum()), item.n_bytes))


class PublishedSum:
    """The published sum for streams of tokens: -log2 of the clamped probabilities of all tokens but the first.

    Streams of like length share a batch.
    """

    def __init__(self, model: AdaptedModel, max_memory: MaxMemory = None):
        self._model = model
        self._rows = BatchRows(
            model, model.has_log2_probabilities, min(MAX_TOKENS, model.traits.context_length), max_memory
        )

    @property
    def batch_rows(self) -> int:
        """How many rows a batch may have."""
        return self._rows.n

    def bits(self, streams: Sequence[Tokens]) -> list[float]:
        """The sum for every stream, int [T] each; 0 for a stream of one token. `Error` for NaN."""
        return self.start(streams)()

    def start(self, streams: Sequence[Tokens]) -> Callable[[], list[float]]:
        """Gives the model all that `bits` needs; what is returned waits for it, on any thread, and returns it."""
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
        wait = self._model.start_log2_probabilities(inputs[:, :-1], inputs[:, 1:], lengths, batch)

        def fill() -> None:
            for i, row, length in zip(batch, wait(), lengths, strict=True):
                bits[i] = _clamped_bits(row[:length])

        return fill


def _clamped_bits(log2_probabilities: np.ndarray) -> float:
    # fsum's order is that of no instruction set. A NaN remains one.
    return -math.fsum(np.maximum(log2_probabilities, np.log2(CLAMP)).tolist())


def _warn_of_short_context(traits: ModelTraits) -> None:
    if traits.context_length < MAX_TOKENS:
        warnings.warn(
            f"{traits.label} sees {traits.context_length} tokens: the published protocol is cut there, not at "
            f"{MAX_TOKENS}; bytes_scored is what the bits cover",
            stacklevel=4,
        )


class PublishedScorer:
    """The published computation: tokens as published, and their sum of bits."""

    def __init__(self, model: Any, cache: TokenCache, max_memory: MaxMemory):
        adapted = AdaptedModel(model)
        self._traits, self._cache = adapted.traits, cache
        _warn_of_short_context(self._traits)
        self._sum = PublishedSum(adapted, max_memory)

    @property
    def batch_rows(self) -> int:
        return self._sum.batch_rows

    def start(self, batch: list[bytes]) -> Callable[[], tuple[list[Encoded], list[float]]]:
        limit, tokenizer = self._traits.context_length, self._traits.tokenizer
        kept = [_cut(item, limit, tokenizer) for item in self._cache.encoded(PublishedTokens(), tokenizer, batch)]
        wait = self._sum.start([item.tokens for item in kept])
        return lambda: (kept, wait())

    def rows(self, batch: list[bytes], found: tuple[list[Encoded], list[float]]) -> list[dict]:
        rows = []
        for chunk, kept, ideal_bits in zip(batch, *found, strict=True):
            ratio = ideal_bits / (8 * len(chunk))
            row: dict[str, Any] = {"bytes_in": len(chunk), "bytes_scored": kept.n_bytes}
            row |= {"tokens": max(len(kept.tokens) - 1, 0), "ideal_bits": ideal_bits}
            row |= {"coded_bytes": None, "side_bits": 0, "ratio": ratio}
            rows.append({**row, "kept": RATIOS[0] < ratio < RATIOS[1]})
        return rows

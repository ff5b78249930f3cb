"""What a predictor is asked beside the data, to find numbers that only decode by accident or by knowing the answers.

Future: rows of logits must not change with the tokens that come after them. Position: after a past that is the data's
tokens in another order, a predictor cannot know which token stands at a position of the data better than which stands
at another; one that looks tokens up by index can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcomp.claims.certificate import Refused
from llmcomp.data.mappings import get_mapping
from llmcomp.models.adapter import ModelTraits

# Tokens of a window and windows that are probed; orders that positions are compared with.
TOKENS_MAX, WINDOWS_MAX, ORDERS = 512, 4, 8
# Bits of a token by which a row may differ with the future: rounding where a library's order of sums does.
FUTURE_TOLERANCE_BITS = 1e-2
# What the position alone may tell: bits a token, and standard errors above 0.
POSITION_BITS_MAX, POSITION_SIGMAS = 0.05, 6.0


def run(model: Any, documents: Sequence[bytes], sees_future: bool) -> dict[str, Any]:
    """Figures by name, and under "refused" (kind, why) of what they say. `sees_future`: whether the model is ever
    given tokens that come later, as `logits` is."""
    traits = ModelTraits.of(model)
    streams = _streams(traits, documents)
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"probed_tokens": sum(map(len, streams))}
    refused: list[tuple[str, str]] = []
    if sees_future:
        bits, at = _future(model, traits, streams, rng)
        found["future_bits_max"] = bits
        if not bits <= FUTURE_TOLERANCE_BITS:
            refused.append(
                ("future", f"other tokens after position {at} change the distribution there by {bits:.4g} bits")
            )
    measured = _position(model, traits, streams, rng)
    if measured is not None:
        found["position_bits"], sigmas = measured
        if found["position_bits"] > POSITION_BITS_MAX and sigmas > POSITION_SIGMAS:
            refused.append(
                (
                    "position",
                    f"after tokens in another order it still knows {found['position_bits']:.3g} bits of the token at "
                    f"each position ({sigmas:.1f} standard errors)",
                )
            )
    return {**found, "refused": refused}


def _streams(traits: ModelTraits, documents: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
    """The first tokens of some documents, at least two of each."""
    mapping = get_mapping("bytes")
    chosen = [documents[i] for i in sorted({len(documents) * i // WINDOWS_MAX for i in range(WINDOWS_MAX)})]
    length = min(TOKENS_MAX, traits.context_length)
    # A token has at least one byte in nearly every vocabulary; what is cut off here is only not probed.
    streams = [mapping.encode(document[: 8 * length], traits.tokenizer).tokens[:length] for document in chosen]
    return [np.ascontiguousarray(stream) for stream in streams if len(stream) > 1]


def _log2_rows(model: Any, traits: ModelTraits, tokens: npt.NDArray[np.int32]) -> np.ndarray:
    """log2 of the distribution of each of `tokens`, int [T], given those before it: float64 [T, vocab_size]."""
    inputs = np.concatenate([np.array([traits.bos_token], np.int32), tokens[:-1]])[None]
    given = model.logits(inputs)
    given = given.detach() if hasattr(given, "detach") else given
    given = given.float().cpu().numpy() if hasattr(given, "cpu") else np.asarray(given)
    rows = np.asarray(given[0, :, : traits.vocab_size], np.float64)
    if np.isnan(rows).any() or (rows == np.inf).any() or (rows.max(1) == -np.inf).any():
        at = int(np.flatnonzero(~(np.isfinite(rows.max(1)) & ~np.isnan(rows).any(1)))[0])
        raise Refused("distribution", f"the logits at position {at} hold NaN or +inf, or are all -inf")
    rows = rows - rows.max(1, keepdims=True)
    return (rows - np.log(np.exp(rows).sum(1, keepdims=True))) / np.log(2)


def _future(
    model: Any, traits: ModelTraits, streams: Sequence[npt.NDArray[np.int32]], rng: np.random.Generator
) -> tuple[float, int]:
    """The largest change of any token's bits, where it has a probability worth counting, and where it was."""
    worst = (0.0, 0)
    for stream in streams:
        before = _log2_rows(model, traits, stream)
        for cut in (len(stream) // 4, len(stream) // 2, len(stream) - 2):
            changed = stream.copy()
            changed[cut + 1 :] = (changed[cut + 1 :] + rng.integers(1, traits.vocab_size)) % traits.vocab_size
            after = _log2_rows(model, traits, changed)
            # The row at `cut` is of the token there: rows up to the next one's have seen nothing that changed.
            both = np.maximum(before, after)[: cut + 2] > -20
            change = np.where(both, np.abs(after - before)[: cut + 2], 0).max(1)
            if change.max() > worst[0]:
                worst = (float(change.max()), int(change.argmax()))
    return worst


def _position(
    model: Any, traits: ModelTraits, streams: Sequence[npt.NDArray[np.int32]], rng: np.random.Generator
) -> tuple[float, float] | None:
    """(bits a token, standard errors) of what is known of the token at each position after tokens in another order,
    above the tokens of other positions; None where there is too little to tell."""
    gains = []
    for stream in streams:
        if len(np.unique(stream)) < 2:
            continue
        rows = np.maximum(_log2_rows(model, traits, rng.permutation(stream)), -40)
        at = np.arange(len(stream))
        others = np.mean([rows[at, rng.permutation(stream)] for _ in range(ORDERS)], axis=0)
        gains.append(rows[at, stream] - others)
    gain = np.concatenate(gains) if gains else np.zeros(0)
    if len(gain) < 16:
        return None
    deviation = float(gain.std(ddof=1)) / len(gain) ** 0.5
    mean = float(gain.mean())
    return mean, mean / deviation if deviation > 0 else (np.inf if mean > 0 else 0.0)

"""What a model has to offer, and what it may offer: the one file to read before writing a model of your own."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from llmcomp.errors import Error


@runtime_checkable
class Model(Protocol):
    """What every model has.

    `logits`: int [B, T] -> float32 [B, T, n_logits]. `session(n).step`: int [n] -> float32 [n, n_logits].
    Models that `load_model` made also have name, step, n_params, vocab_size, n_logits, context_length, fingerprint,
    weights_sha256, tokenizer, engine, device, dtype and attention.
    """

    def logits(self, tokens: npt.ArrayLike) -> np.ndarray: ...

    def session(self, n_streams: int) -> Any: ...


def as_model(model: Any) -> Any:
    """`model` itself if it has logits() and session(); anything else is an `Error`."""
    if isinstance(model, type):
        raise Error(f"{model.__name__} is a class, expected a model made of it")
    missing = [method for method in ("logits", "session") if not callable(getattr(model, method, None))]
    if missing:
        raise Error(f"a {type(model).__name__} is no model: it has no {' and no '.join(m + '()' for m in missing)}")
    return model

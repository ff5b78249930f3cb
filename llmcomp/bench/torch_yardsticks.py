"""What the engines are measured against: transformers and torch by themselves, and the loop of the published code."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from llmcomp.models.engines.torch import TorchModel


def published_loop(model: TorchModel, tokens: npt.ArrayLike) -> float:
    """Bits of one chunk, int [T], as the published code finds them: a softmax and an .item() for every position.

    A yardstick for benchmarks; `llmcomp.score` computes the same sum without the loop.
    """
    ids = model.as_tokens(np.asarray(tokens)[None])
    bits = 0.0
    with torch.inference_mode():
        logits = model.module(ids, use_cache=False).logits[0]
        for at in range(1, ids.shape[1]):
            probability = torch.softmax(logits[at - 1], dim=-1)[ids[0, at]].item()
            bits -= math.log2(max(probability, 1e-10))
    return bits


def pass_alone(model: TorchModel, tokens: npt.ArrayLike) -> Callable[[], None]:
    """A call that computes the logits of int [B, T] as transformers does, and nothing else: a yardstick."""
    ids = model.as_tokens(tokens)

    def run() -> None:
        with torch.inference_mode():
            model.module(ids, use_cache=False)

    return run


def step_alone(model: TorchModel, past: npt.ArrayLike, tokens: npt.ArrayLike) -> Callable[[], None]:
    """A call that adds `tokens`, int [B], to transformers' cache, which begins as `past`, int [B, T]; a yardstick."""
    ids = model.as_tokens(np.asarray(tokens)[:, None])
    with torch.inference_mode():
        cache = model.module(model.as_tokens(past), use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        with torch.inference_mode():
            model.module(ids, past_key_values=cache, use_cache=True)

    return run


def set_threads(n_threads: int) -> None:
    """How many threads torch computes with on the CPU, in the whole process."""
    torch.set_num_threads(n_threads)

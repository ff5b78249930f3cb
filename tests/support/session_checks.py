"""What a session of any model has to hold, whatever engine it is of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def assert_steps_with_pauses(
    session: Any, tokens: npt.NDArray[np.int64], expected: npt.NDArray[np.floating], *, share: float, atol: float
) -> None:
    """Streams that step at random, each with probability `share`, give the logits of one pass; paused ones give 0."""
    n_streams, n_tokens = tokens.shape
    at, rng = np.zeros(n_streams, int), np.random.default_rng(1)
    while at.min() < n_tokens:
        active = (at < n_tokens) & (rng.random(n_streams) < share)
        rows = session.step(tokens[np.arange(n_streams), np.minimum(at, n_tokens - 1)], active)
        for stream in range(n_streams):
            if active[stream]:
                np.testing.assert_allclose(rows[stream], expected[stream, at[stream]], atol=atol)
            else:
                assert not rows[stream].any()
        at += active

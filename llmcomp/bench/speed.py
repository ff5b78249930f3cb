"""A small table of speeds on this machine; the thorough benchmarks are in benchmarks/ of the repository."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from llmcomp import coding
from llmcomp.models.load import load_model

VOCAB_SIZE = 50_304  # Pythia's
MODEL = "pico-595k"


def _seconds(work: Callable[[], object], at_least: float = 0.5) -> float:
    """The shortest of several runs that take `at_least` seconds together, three at least."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < at_least:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def run_benchmarks(n_rows: int = 256) -> pd.DataFrame:
    """One row a measurement: what, value, unit, backend, threads. Logits are normal with standard deviation 3."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (n_rows, VOCAB_SIZE)).astype(np.float32)
    tokens = logits.argmax(1)
    found: list[tuple[str, float, str]] = []
    seconds = _seconds(lambda: coding.intervals(logits, tokens))
    found.append(("intervals", logits.nbytes / seconds / 1e9, "GB of logits a second"))
    seconds = _seconds(lambda: coding.encode(logits, tokens))
    found.append(("encode", 1e9 * seconds / n_rows, f"ns a token, {VOCAB_SIZE:,} tokens"))
    payload = coding.encode(logits, tokens)
    seconds = _seconds(lambda: coding.decode(payload, logits))
    found.append(("decode", 1e9 * seconds / n_rows, f"ns a token, {VOCAB_SIZE:,} tokens"))
    model = load_model(MODEL)
    batch = rng.integers(0, model.vocab_size, (8, model.context_length))
    seconds = _seconds(lambda: model.logits(batch))
    found.append((f"{MODEL}, one pass", batch.size / seconds, "tokens a second"))

    def steps() -> None:
        session = model.session(len(batch))
        for column in batch[:, :128].T:
            session.step(column)

    found.append((f"{MODEL}, step by step", batch[:, :128].size / _seconds(steps), "tokens a second"))
    table = pd.DataFrame(found, columns=["what", "value", "unit"])
    return table.assign(backend=coding.backend_in_use(), threads=coding.threads_in_use())

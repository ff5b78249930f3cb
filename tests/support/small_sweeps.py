"""Sweeps that take no time: small data sets, a scorer that runs no model, and what lies in the folder afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmcomp import results
from llmcomp.experiment.sweep import sweep

STEPS = (1, 2)


@dataclass
class Data:
    """What a sweep asks of a data set."""

    name: str
    modality: str
    chunks: list[bytes]


def some_data(n_chunks: int = 3, n_bytes: int = 200) -> list[Data]:
    rng = np.random.default_rng(0)
    text = [(b"the rain in spain falls mainly in the plain; again %d. " % i * 9)[:n_bytes] for i in range(n_chunks)]
    noise = [rng.bytes(n_bytes) for _ in range(n_chunks)]
    return [Data("prose", "text", text), Data("noise", "image", noise)]


def fake_rows(chunks: list[bytes], model: Any, protocol: str, mapping: str | None, ratio: float = 0.5) -> pd.DataFrame:
    """Rows as `score.score` gives them, of coded bytes that are half of the chunk's."""
    n_bytes = np.array([len(chunk) for chunk in chunks])
    coded = (n_bytes * ratio).astype(int)
    rows = pd.DataFrame({"chunk": range(len(chunks)), "bytes_in": n_bytes, "bytes_scored": n_bytes})
    facts = {"model": model.name, "params": model.n_params, "step": model.step, "dataset": "", "modality": ""}
    rest = {"tokens": 1, "side_bits": 0, "seconds": 0.01, "engine": "exact", "backend": "serial", "device": "cpu"}
    labels = {"protocol": protocol, "mapping": mapping, "dtype": "float32", "version": "0"}
    rows = rows.assign(coded_bytes=coded, ideal_bits=8.0 * coded, ratio=coded / n_bytes, **facts, **rest, **labels)
    return results.check_rows(rows.assign(weights_sha256=model.weights_sha256))


class Counting:
    """A scorer that remembers what it was asked for, and fails where it is told to."""

    def __init__(self, fails_at: tuple[int, int] | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fails_at = fails_at

    def __call__(self, chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> pd.DataFrame:
        call = (model.step, len(chunks[0]))
        self.calls.append(call)
        if call == self.fails_at:
            raise RuntimeError("the numbers are wrong today")
        return fake_rows(chunks, model, protocol, mapping)


def run(suite: Path, out: Path, scorer: Any = None, **options: Any) -> pd.DataFrame:
    given = {"datasets": some_data(), "steps": STEPS, "progress": False, **options}
    return sweep(suite, out=out, scorer=scorer or Counting(), **given)


def cell_files(out: Path) -> list[Path]:
    return sorted(out.glob("*.parquet"))


def without_time(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns="seconds").reset_index(drop=True)

"""The demonstration: the pico suite on the bundled samples, coded, decoded, fitted and drawn. Nothing is downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from llmcomp import pico, results
from llmcomp.fit import fit_scaling_law
from llmcomp.plot import plot_all
from llmcomp.sweep import sweep

SAMPLES = ("text", "image", "speech")
N_CHUNKS = 8
# Decoding goes token by token, so the two largest models decode at their last step only; the others at every step.
DECODED_AT_EVERY_STEP = pico.SUITE_NAMES[:3]


@dataclass(frozen=True)
class Demo:
    """What `run_demo` found: one row a cell with `decoded`, the laws, and the files that were written."""

    cells: pd.DataFrame
    laws: Any
    figures: list[Path]
    failed: list[dict[str, Any]]

    @property
    def summary(self) -> str:
        """How much was decoded, and what kind of data this is."""
        decoded = self.cells[self.cells["decoded"]]
        n_payloads, n_decoded = int(self.cells["chunks"].sum()), int(decoded["chunks"].sum())
        return (
            f"{n_payloads} payloads were coded; {n_decoded} of them ({len(decoded)} of {len(self.cells)} cells) were decoded "
            "again, and every one gave its chunk back.\n"
            "Samples are samples: a few small files that come with llmcomp, enough to see the law, not to quote it."
        )


def is_decoded(model: str, step: int | None, _dataset: str) -> bool:
    """Which cells the demonstration decodes again: all but those of the two largest models before their last step."""
    return model in DECODED_AT_EVERY_STEP or step == pico.STEPS[-1]


def run_demo(out: str | os.PathLike[str] = "demo-results", n_chunks: int = N_CHUNKS, progress: bool = True) -> Demo:
    """Sweep the suite over `n_chunks` chunks of every sample into `out`, decode, fit and draw.

    Cells that a former demonstration finished in `out` are read, not computed; they were decoded then.
    """
    out = Path(out)
    rows = sweep("pico", None, SAMPLES, out / "rows", n_chunks=n_chunks, verify=is_decoded, progress=progress)
    cells = results.cells(rows)
    keys = zip(cells["model"], cells["step"], cells["dataset"], strict=True)
    cells = cells.assign(decoded=[is_decoded(*key) for key in keys])
    laws = fit_scaling_law(rows)
    figures = plot_all(rows, out, laws)
    return Demo(cells, laws, figures, rows.attrs["failed"])

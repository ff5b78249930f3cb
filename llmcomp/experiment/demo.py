"""The demonstration: the pico suite on the bundled samples, coded, decoded, fitted and drawn. Nothing is downloaded."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from llmcomp import coding, results
from llmcomp.experiment.sweep import sweep
from llmcomp.law.figures import plot_all
from llmcomp.law.fit import fit_scaling_law

SAMPLES = ("text", "image", "speech")
N_CHUNKS = 5
# Enough for two digits of an interval, and a quarter of the usual time.
_RESAMPLES = 200


@dataclass(frozen=True)
class Demo:
    """What `run_demo` found: one row a cell of the suite, one a baseline, the laws, the figures that were written."""

    cells: pd.DataFrame
    baselines: pd.DataFrame
    laws: Any
    figures: list[Path]
    failed: list[dict[str, Any]]

    @property
    def summary(self) -> str:
        """How much was decoded, and what kind of data this is."""
        n_bytes, coded_bytes = int(self.cells["bytes_in"].sum()), int(self.cells["coded_bytes"].sum())
        return (
            f"{int(self.cells['chunks'].sum())} chunks ({n_bytes:,} bytes) were coded into as many payloads "
            f"({coded_bytes:,} bytes); every payload was decoded again and gave its chunk back.\n"
            "Samples are samples: a few small files that come with llmcomp, enough to see the law, not to quote it."
        )


def run_demo(out: str | os.PathLike[str] = "demo-results", n_chunks: int = N_CHUNKS, progress: bool = True) -> Demo:
    """Sweep the suite and the baselines over `n_chunks` chunks of every sample into `out`, decode, fit and draw.

    Cells that a former demonstration finished in `out` are read, not computed; they were decoded then. A payload that
    does not decode to its chunk fails its cell.
    """
    out = Path(out)
    # Steps of small models are too short to share among threads; whole models are not.
    with ThreadPoolExecutor(coding.threads_in_use()) as executor:
        rows = sweep(
            "pico",
            None,
            SAMPLES,
            out / "rows",
            executor,
            n_chunks=n_chunks,
            verify=True,
            baselines=True,
            progress=progress,
        )
    laws = fit_scaling_law(rows, resamples=_RESAMPLES)
    figures = plot_all(rows, out, laws, formats=("png",))
    cells = results.cells(rows)
    of_suite = cells["params"].notna()
    return Demo(cells[of_suite], cells[~of_suite & (cells["unit"] == "chunk")], laws, figures, rows.attrs["failed"])

"""What results cost as they grow: a million rows read, merged and fitted, and the plan of ten thousand cells.

    python benchmarks/bench_results.py [--cells 500] [--chunks 2048] [--planned 10000]

Rows are made up: --cells files of --chunks rows each, of one data set, with a law in them. Each job runs in a process
of its own, whose processor seconds and largest resident set are given; the first line is the process that does nothing
but import what the others do. `read_rows` holds all rows; `read_cells` and `merge_rows` hold a part at a time.

The plan is of --planned cells of a suite without weights on disk, of which every second one is finished.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from llmcomp import results
from llmcomp.experiment import plan as grid
from llmcomp.law.fit import fit_scaling_law

JOBS = {
    "nothing": "pass",
    "read_rows": "rows = results.read_rows(folder)",
    "read_cells": "cells = results.read_cells(folder)",
    "merge_rows": "results.merge_rows(folder, folder.parent / 'merged.parquet')",
    "read_cells of the merged file": "results.read_cells(folder.parent / 'merged.parquet')",
    "read_cells and fit": "fit_scaling_law(results.read_cells(folder), resamples=200)",
}


def cell_rows(number: int, n_chunks: int) -> pd.DataFrame:
    rng = np.random.default_rng(number)
    params, step = 10 ** (5 + number % 20 / 5), 2.0 ** (7 + number // 20 % 25)
    ratio = 0.2 + 4 * params**-0.35 + 1.1 * step**-0.4 + rng.normal(0, 0.02, n_chunks)
    coded = (2048 * ratio).astype(int).clip(1)
    labels = {"model": f"model-{number % 20}", "params": int(params), "step": int(step) + number // 500}
    labels |= {"dataset": "text", "modality": "text", "protocol": "lossless", "mapping": "bytes"}
    sizes = {"bytes_in": 2048, "bytes_scored": 2048, "tokens": 600, "ideal_bits": 8.0 * coded - 3, "side_bits": 0}
    machine = {"seconds": rng.random(n_chunks), "engine": "exact", "backend": "avx2", "device": "cpu", "version": "0"}
    rest = {"dtype": "float32", "weights_sha256": f"{number:064x}", "coded_bytes": coded, "ratio": coded / 2048}
    return pd.DataFrame({"chunk": range(n_chunks)}).assign(**labels, **sizes, **machine, **rest)


def measure(job: str, folder: Path) -> tuple[float, float]:
    """Processor seconds and MiB of a process that does the job."""
    code = (
        "import sys; from pathlib import Path; from llmcomp import results; "
        f"from llmcomp.law.fit import fit_scaling_law; folder = Path(sys.argv[1]); {job}"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not ru_maxrss, which a process has from its parent.
    tell = "; print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    answer = subprocess.run([sys.executable, "-c", code + tell, folder], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, int(answer.stdout.split()[-1]) / 1024


class Table:
    """A model of that name at that step, which a plan only asks for its identity."""

    n_params = 10**6

    def __init__(self, number: int):
        self.name, self.step, self.weights_sha256 = f"model-{number % 50}", number // 50, f"{number:064x}"

    def logits(self, tokens: object) -> None: ...
    def session(self, n_streams: int) -> None: ...


class Data:
    def __init__(self, name: str):
        self.name, self.modality, self.chunks = name, "text", [b"0123456789" * 20] * 4


def measure_plan(n_cells: int, out: Path) -> tuple[float, float]:
    """Seconds of processor of two plans: of a new folder, and of one in which every second cell is finished."""
    found = [(Table(number), "") for number in range(n_cells // 2)]
    settings = grid.Settings(out, "exact", {}, None, False)
    data = [Data("finished"), Data("to do")]
    seconds = []
    for is_new in (True, False):
        start = time.process_time()
        plan = grid.make_plan(found, data, [("lossless", "bytes")], settings)
        str(plan)
        seconds.append(time.process_time() - start)
        if is_new:
            rows = cell_rows(0, 4)
            out.mkdir()
            for cell in plan.cells:
                if cell.dataset == "finished":
                    content = results.rows_as_parquet(rows, grid.cell_metadata(cell, len(rows)))
                    cell.path.write_bytes(content)
        else:
            assert len(plan.finished) == n_cells // 2
    return seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--chunks", type=int, default=2048)
    parser.add_argument("--planned", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "rows"
        folder.mkdir()
        for number in range(args.cells):
            (folder / f"{number}.parquet").write_bytes(results.rows_as_parquet(cell_rows(number, args.chunks)))
        # Checked before it is timed.
        whole, parts = results.cells(results.read_rows(folder)), results.read_cells(folder)
        pd.testing.assert_frame_equal(whole, parts, rtol=1e-12)
        assert fit_scaling_law(parts, resamples=0).r2 > 0.99
        print(f"{args.cells * args.chunks:,} rows in {args.cells} files, {os.cpu_count()} processors\n")
        print("| | CPU s | MiB at most |\n|---|---|---|")
        for job, code in JOBS.items():
            seconds, mib = measure(code, folder)
            print(f"| {job} | {seconds:.1f} | {mib:.0f} |", flush=True)
        new, half = measure_plan(args.planned, Path(name) / "plan")
        print(f"\nthe plan of {args.planned:,} cells: {new:.1f} CPU s, with every second one finished {half:.1f} CPU s")


if __name__ == "__main__":
    main()

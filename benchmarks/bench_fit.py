"""Seconds of one core for a scaling law of the published text cells: the fit, its intervals, the resamples, every form.

Run: python benchmarks/bench_fit.py [--resamples 1000]. Process time is shown beside wall time, so that a busy machine
is seen. The aim is at most 5 s of one core for 1,000 resamples of 25 cells.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, before NumPy starts its threads

from llmcomp.law.fit import FORMS, compare_forms, fit_scaling_law
from llmcomp.results import published


def timed(name: str, work: Callable[[], object]) -> None:
    wall, process = time.perf_counter(), time.process_time()
    work()
    print(f"{name:44s} {time.process_time() - process:8.3f} s of one core, {time.perf_counter() - wall:8.3f} s wall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--resamples", type=int, default=1000)
    n = parser.parse_args().resamples
    cells = published()
    text = cells[cells["modality"] == "text"]
    fit_scaling_law(text, resamples=0)  # SciPy is imported and warm
    timed("fit, 25 cells", lambda: fit_scaling_law(text, resamples=0))
    timed("fit and profile intervals", lambda: fit_scaling_law(text, resamples=0).ci)  # type: ignore[union-attr]
    for form in FORMS:
        timed(f"{form}, {n} resampled sets of cells", lambda form=form: fit_scaling_law(text, form=form, resamples=n))
    timed("all forms compared, with held-out errors", lambda: compare_forms(text))


if __name__ == "__main__":
    main()

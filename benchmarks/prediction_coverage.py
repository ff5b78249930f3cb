"""How often the predictive intervals of a law hold the cells that they predict, at the published laws and their noise.

Run: python benchmarks/prediction_coverage.py [--grids 1000]. For every published data set: its fitted law is taken as
the truth, normal errors of its residual standard deviation (20 degrees of freedom) are added to the 25 cells, and the
law is fitted again. Counted is how often 95 % intervals hold (1) 25 new cells of the same grid, predicted from all 25,
(2) the 10 cells of the two largest sizes, predicted from the 15 of the three smallest, (3) the 10 cells of the last two
steps, predicted from the 15 of the first three. Half the intervals' mean width is given in standard deviations.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, before NumPy starts its threads

import numpy as np

from llmcomp.law.fit import fit_scaling_law
from llmcomp.results import published


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grids", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--modalities", nargs="+", default=["text", "image", "speech"])
    arguments = parser.parse_args()
    print("| truth and noise | predicted | inside | standard error | half width / sd | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    table = published()
    for modality in arguments.modalities:
        count(table[table["modality"] == modality].reset_index(drop=True), arguments)


def count(cells, arguments):
    truth = fit_scaling_law(cells, resamples=0)
    noise = float(np.sqrt((truth.residuals**2).sum() / (len(cells) - truth.n_free)))
    rng = np.random.default_rng(arguments.seed)
    fitted = truth.cells["fitted"].to_numpy()
    params, steps = (cells[name].to_numpy(float) for name in ("params", "step"))
    everything = np.ones(len(cells), dtype=bool)
    kinds = {
        "new cells of the grid": (everything, everything),
        "1b and 1.4b from the smaller three": (params < 1e9, params >= 1e9),
        "steps 128k and 143k from the first three": (steps < 1e5, steps >= 1e5),
    }
    inside = {kind: [] for kind in kinds}
    width = {kind: [] for kind in kinds}
    start = time.process_time()
    for _ in range(arguments.grids):
        noisy = fitted + noise * rng.standard_normal(len(cells))
        new = fitted + noise * rng.standard_normal(len(cells))
        for kind, (seen, out) in kinds.items():
            law = truth.refit(cells.assign(ratio=noisy)[seen])
            low, high = law.predict_interval(params[out], steps[out])
            inside[kind].append(((low <= new[out]) & (new[out] <= high)).mean())
            width[kind].append((high - low).mean() / 2 / noise)
    seconds = time.process_time() - start
    for kind in kinds:
        error = 100 * np.std(inside[kind], ddof=1) / len(inside[kind]) ** 0.5
        shares = f"{100 * np.mean(inside[kind]):.1f} % | {error:.1f} % | {np.mean(width[kind]):.2f}"
        print(f"| {truth.name}, {noise:.4f} | {kind} | {shares} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

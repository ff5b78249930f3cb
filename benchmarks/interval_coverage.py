"""How often the intervals of a law hold the coefficients that were planted, at the published laws and their noise.

Run: python benchmarks/interval_coverage.py [--repetitions 1000] [--resamples 0]. For every published data set: its
fitted law is taken as the truth, normal errors of its residual standard deviation (20 degrees of freedom) are added to
the 25 cells, the law is fitted again, and it is counted how often its 95 % intervals hold the truth. With --resamples,
also the percentile intervals over resampled cells.
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
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=0)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--modalities", nargs="+", default=["text", "image", "speech"])
    arguments = parser.parse_args()
    tail = 1.96 * (0.95 * 0.05 / arguments.repetitions) ** 0.5
    print(f"{arguments.repetitions} repetitions: a true 95 % is counted as 95 +- {100 * tail:.1f} % (95 % of counts)\n")
    print("| truth and noise | a | interval | a | b | c | alpha | beta | bound at 0 | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    table = published()
    for modality in arguments.modalities:
        cells = table[table["modality"] == modality].reset_index(drop=True)
        truth = fit_scaling_law(cells, resamples=0)
        noise = float(np.sqrt((truth.residuals**2).sum() / (len(cells) - truth.n_free)))
        for a_nonneg in (True, False):
            count(cells, truth, noise, a_nonneg, arguments)


def count(cells, truth, noise, a_nonneg, arguments):
    rng = np.random.default_rng(arguments.seed)
    fitted = truth.cells["fitted"].to_numpy()
    kinds = ("ci", "ci_cells")[: 1 + (arguments.resamples > 0)]
    hits = {kind: dict.fromkeys(truth.values, 0) for kind in kinds}
    at_bound, start = 0, time.process_time()
    for _ in range(arguments.repetitions):
        noisy = cells.assign(ratio=fitted + noise * rng.standard_normal(len(cells)))
        law = fit_scaling_law(noisy, a_nonneg=a_nonneg, resamples=arguments.resamples)
        at_bound += law.a <= 0
        for kind in kinds:
            for name, (low, high) in getattr(law, kind).items():
                hits[kind][name] += low <= truth.values[name] <= high
    seconds = time.process_time() - start
    for kind in kinds:
        shares = " | ".join(f"{100 * hits[kind][name] / arguments.repetitions:.1f}" for name in truth.values)
        bound = f"{100 * at_bound / arguments.repetitions:.1f} %"
        name = f"{truth.name}, {noise:.4f} | {'a >= 0' if a_nonneg else 'any'}"
        print(f"| {name} | {kind} | {shares} | {bound} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

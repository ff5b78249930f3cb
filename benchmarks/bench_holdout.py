"""Tables of held-out errors: the 75 published cells and the pico suite, every modality, form and joint law; seconds.

Run: python benchmarks/bench_holdout.py. Each size (and step) after the third is predicted from all before it; "inside"
counts cells in their 95 % predictive interval. Seconds are process time: one core, whatever else the machine does.
"""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, before NumPy starts its threads

import pandas as pd

from llmcomp import pico
from llmcomp.law.fit import compare_forms, fit_scaling_law
from llmcomp.law.joint import compare_shares
from llmcomp.law.text import markdown_table
from llmcomp.results import published


def show(table: pd.DataFrame) -> None:
    texts = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in table.itertuples(index=False)]
    print(markdown_table([str(name) for name in table.columns], texts), end="\n\n", flush=True)


def main() -> None:
    pico_cells = pd.read_csv(pico.suite_root() / "ratios.csv").assign(protocol="lossless", mapping="bytes")
    for title, cells in (("The 75 published cells", published()), ("The pico suite, held-out chunks", pico_cells)):
        print(f"## {title}\n")
        laws = fit_scaling_law(cells, resamples=0)
        for by in ("params", "step"):
            print(f"Additive law, by {by}:\n")
            show(laws.holdout(by).summary())
        print("From the three smallest sizes, all others:\n")
        show(laws.holdout("params", keep=3).summary())
        print("Forms, least held-out error first:\n")
        columns = ["law", "form", "n_free", "r2", "aicc", "holdout", "coverage"]
        show(compare_forms(cells, order="holdout")[columns])
        print("Joint laws of the three modalities:\n")
        show(compare_shares(cells))
    start = time.process_time()
    text = published().query("modality == 'text'")
    law = fit_scaling_law(text)
    law.ci, law.holdout("params"), law.holdout("step"), law.report()
    print(f"Fit with 1,000 resamples, intervals, both hold-outs and report: {time.process_time() - start:.1f} s")


if __name__ == "__main__":
    main()

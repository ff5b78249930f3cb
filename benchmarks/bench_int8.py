"""The engine exact-int8 against the exact engine: what it costs in code length, and its speed. Needs no torch.

    python benchmarks/bench_int8.py [--chunks N] [--seconds S]

Code length: the bundled samples with pico-595k, chunk by chunk on the same tokens; the error is that of the sum of the
chunks' differences. The shape of Pythia-70m has random weights and random tokens: that shows how far the logits move,
and nothing about trained weights, whose activations have outliers that random ones lack. Speed: processor time on one
thread, rounds of the two engines interleaved, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import llmcomp
from llmcomp.bench.sweep import suite_configs, write_random_checkpoint
from llmcomp.coding import backend_in_use
from llmcomp.models.engines.exact import load_exact

ENGINES = ("exact", "exact-int8")


def compare_bits(n_chunks: int | None) -> None:
    models = [llmcomp.load_model("pico-595k", engine=engine) for engine in ENGINES]
    print(f"{'sample':<8} {'chunks':>6} {'exact bits':>12} {'int8 bits':>12} {'difference %':>13} {'+-':>8}")
    for name in ("text", "image", "speech"):
        data = llmcomp.load_dataset(name, n_chunks, progress=False)
        exact, int8 = (llmcomp.score(data, model, progress=False)["ideal_bits"].to_numpy() for model in models)
        error = (int8 - exact).std(ddof=1) * len(exact) ** 0.5
        share = 100 / exact.sum()
        difference = (int8.sum() - exact.sum()) * share
        sums = f"{exact.sum():>12.0f} {int8.sum():>12.0f}"
        print(f"{name:<8} {len(exact):>6} {sums} {difference:>+13.4f} {error * share:>8.4f}", flush=True)


def compare_random(models: list[Any]) -> None:
    tokens = np.random.default_rng(0).integers(0, models[0].n_logits, (2, 257))
    exact, int8 = (model.logits(tokens[:, :-1]) for model in models)
    moved = float(np.sqrt(np.mean((int8 - exact) ** 2)) / exact.std())
    bits = [float(llmcomp.code_length(logits, tokens[:, 1:]).sum()) for logits in (exact, int8)]
    difference = 100 * (bits[1] / bits[0] - 1)
    print(f"random weights: logits differ by {moved:.2%} of their deviation, bits by {difference:+.4f} %")


def medians(runs: list[Callable[[], object]], seconds: float) -> list[float]:
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    until = time.perf_counter() + seconds * len(runs)
    while len(times[0]) < 3 or (time.perf_counter() < until and len(times[0]) < 50):
        for run, found in zip(runs, times, strict=True):
            begin = time.process_time()
            run()
            found.append(time.process_time() - begin)
    return [statistics.median(found) for found in times]


def compare_speed(models: list[Any], n_tokens: int, seconds: float) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, models[0].n_logits, (2, n_tokens + 1))

    def stepper(model: Any, n_streams: int) -> Callable[[], object]:
        session, out = model.session(n_streams), np.zeros((n_streams, model.n_logits), np.float32)
        ids = rng.integers(0, model.n_logits, n_streams)
        for stream in range(n_streams):
            session.prefill(stream, tokens[0, :64])
        return lambda: session.step(ids, None, out)

    rows = [("pass", 2 * n_tokens, [lambda m=m: m.intervals(tokens[:, :-1], tokens[:, 1:]) for m in models])]
    rows += [(f"step {n}", n, [stepper(model, n) for model in models]) for n in (1, 2, 4, 8, 16, 64)]
    print(f"{models[0].name:<12} {'exact us/token':>15} {'int8 us/token':>15} {'ratio':>6}")
    for label, n, runs in rows:
        own = [1e6 * found / n for found in medians(runs, seconds)]
        print(f"  {label:<10} {own[0]:>15.1f} {own[1]:>15.1f} {own[0] / own[1]:>6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, help="of each sample (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="about so long for each side of a row of speeds")
    args = parser.parse_args()
    print(f"backend {backend_in_use()}, one thread, processor time")
    with llmcomp.use_threads(1):
        compare_bits(args.chunks)
        for name, n_tokens in (("pythia-70m", 550), ("pico-595k", 512)):
            with tempfile.TemporaryDirectory() as folder:
                config = {**suite_configs("pythia"), **suite_configs("pico")}[name]
                write_random_checkpoint(Path(folder), config, np.float32)
                models = [load_exact(folder, name=name, engine=engine) for engine in ENGINES]
                if name == "pythia-70m":
                    compare_random(models)
                compare_speed(models, n_tokens, args.seconds)


if __name__ == "__main__":
    main()

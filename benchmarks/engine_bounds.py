"""`llmcomp bench engine` beside what the machine can do at most, in one run.

    python benchmarks/engine_bounds.py [--threads 1 2] [--shapes 70m pico] [--clock wall|cpu] [--seconds 1]

The machine is measured by the same clock on the same threads: fused multiply-adds that wait for nothing (machine.c),
and a pass that only reads 256 MB (read_pass.c). Columns beside those of `llmcomp bench engine`:

  fma     our share of the multiply-adds
  read    weights and caches of a step, each read once, as a share of the read pass; above 1 where the caches hold them
  limit   the ratio that the multiply-adds would leave if all else cost nothing: an exact engine in binary32 cannot
          be above it

Below, steps with the weights as float32 and as float16, as Pythia's are published: half the bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import llmcomp
from llmcomp.bench import engine as bench_engine
from llmcomp.bench.sweep import suite_configs, write_random_checkpoint
from llmcomp.models.engines.exact import load_exact

STEPS = 40  # timed for each figure below the table


class Machine(NamedTuple):
    """What the threads together do when nothing holds them up."""

    flops: float
    read_bytes: float


def measure_machine(n_threads: int, clock: Callable[[], float]) -> Machine:
    """Best of five rounds."""
    sources = [str(Path(__file__).with_name(name)) for name in ("machine.c", "read_pass.c")]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "machine.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, *sources, "-o", str(library)], check=True)
        code = ctypes.CDLL(str(library))
    code.flops_per_round.restype = ctypes.c_size_t
    code.multiply_add.restype = code.read_float32.restype = ctypes.c_float
    values, n_rounds = np.ones((n_threads, 64_000_000 // n_threads), np.float32), 10_000_000

    def read(row: np.ndarray) -> None:
        code.read_float32(row.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(1), ctypes.c_size_t(row.size))

    def best(work: Callable[[Any], object], arguments: Any) -> float:
        seconds = []
        for _ in range(5):
            begin = clock()
            list(pool.map(work, arguments))  # ctypes lets the interpreter go meanwhile
            seconds.append(clock() - begin)
        return min(seconds)

    with ThreadPoolExecutor(n_threads) as pool:
        rounds = best(lambda n: code.multiply_add(ctypes.c_size_t(n)), [n_rounds] * n_threads)
        return Machine(n_threads * n_rounds * code.flops_per_round() / rounds, values.nbytes / best(read, values))


def demand_of(config: dict[str, Any], n_tokens: int, context: float) -> tuple[float, float]:
    """(operations, bytes read) of `n_tokens` tokens that see `context` keys each; float32, everything read once."""
    hidden, n_layers = config["hidden_size"], config["num_hidden_layers"]
    n_weights = n_layers * hidden * (4 * hidden + 2 * config["intermediate_size"]) + hidden * config["vocab_size"]
    n_keys = n_tokens * context * n_layers * hidden  # values of the keys; there are as many of the values
    return 2 * n_tokens * n_weights + 4 * n_keys, 4 * n_weights + 8 * n_keys


def add_bounds(row: pd.Series, config: dict[str, Any], machine: Machine) -> pd.Series:
    suite, (work, _, n_streams) = row["shape"].partition("-")[0], row["work"].partition(" ")
    if work == "memory":
        return row
    if work == "pass":
        n_tokens = bench_engine.N_SEQUENCES * bench_engine.TOKENS[suite]
        flops, n_bytes = demand_of(config, n_tokens, (bench_engine.TOKENS[suite] + 1) / 2)
        seconds = n_tokens / row["ours"]
    else:  # by the first step: the rounds that follow, whose number depends on the time, see a few keys more
        n_tokens, seconds = int(n_streams), row["ours"] / 1e3
        flops, n_bytes = demand_of(config, n_tokens, bench_engine.PAST[suite])
        row["read"] = n_bytes / seconds / machine.read_bytes
    row["fma"] = flops / seconds / machine.flops
    row["limit"] = row["ratio"] / row["fma"]
    return row


def time_steps(config: dict[str, Any], dtype: type, n_streams: int, clock: Callable[[], float]) -> float:
    """Median milliseconds of one step from an empty cache on."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), config, dtype)
        session, seconds = load_exact(folder).session(n_streams), []
        for _ in range(STEPS):
            begin = clock()
            session.step(np.zeros(n_streams, np.int64))
            seconds.append(clock() - begin)
    return 1e3 * statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["pythia-70m", "pico"], help="or parts of names")
    parser.add_argument("--clock", choices=list(bench_engine.CLOCKS), default="wall")
    parser.add_argument("--seconds", type=float, default=5.0, help="about so long for each side of a row")
    args = parser.parse_args()
    clock: Callable[[], float] = bench_engine.CLOCKS[args.clock]
    configs = {**suite_configs("pythia"), **suite_configs("pico")}
    for n_threads in args.threads:
        machine = measure_machine(n_threads, clock)
        gflops, gbytes = machine.flops / 1e9, machine.read_bytes / 1e9
        print(f"{n_threads} thread(s), {args.clock} clock: {gflops:.0f} GFLOP/s, reads {gbytes:.1f} GB/s")
        found = bench_engine.run_engine_benchmark(args.shapes, [n_threads], seconds=args.seconds, clock=args.clock)
        rows = [add_bounds(row.copy(), configs[row["shape"]], machine) for _, row in found.rows.iterrows()]
        columns = [*found.rows.columns, "fma", "read", "limit"]
        print(pd.DataFrame(rows, columns=columns).to_string(index=False, float_format="%.3g", na_rep=""), flush=True)
        with llmcomp.use_threads(n_threads):
            for name in (name for name in configs if any(part in name for part in args.shapes)):
                for n_streams in (1, 8):
                    times = [time_steps(configs[name], dtype, n_streams, clock) for dtype in (np.float32, np.float16)]
                    print(f"{name}, step {n_streams}: float32 {times[0]:.3g} ms, float16 {times[1]:.3g} ms", flush=True)


if __name__ == "__main__":
    main()

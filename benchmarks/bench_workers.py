"""What several workers bring and cost: one process, --workers, shards and Ray on the same cells of fixed work.

    python benchmarks/bench_workers.py [--seconds 10] [--cells 12] [--workers 2] [--modes one workers shards ray]

A cell multiplies matrices on one thread, as often as took --seconds here when nothing else ran, and then scores a chunk
with pico-13k, so that rows are written. Every mode's table is first compared with that of one process.

  wall s        from the call to its return
  start s       until the first cell begins: processes, imports, Ray
  cells/min     finished cells over the time from the first begin to the last end
  x one         cells/min over those of one process
  cell s        wall clock of a cell, mean; CPU: processor seconds of a cell, mean. They differ where other work runs
  between %     time of a worker between two of its cells (claim, load, write, hand over) over the time of the cells

Other work on the machine moves all but the last two columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import pandas as pd

from llmcomp import results
from llmcomp.experiment.sweep import sweep
from llmcomp.scoring import score

WIDTH = 512
SAMPLES = ("text", "image", "speech")
STEPS = (128, 256, 512, 1024, 2048)


class Work:
    """A scorer of a fixed amount of work that writes down when it began and ended."""

    def __init__(self, n_products: int, log: Path):
        self.n_products, self.log = n_products, log

    def __call__(self, chunks: list[bytes], model: Any, **options: Any) -> pd.DataFrame:
        began, used = time.monotonic(), time.process_time()
        multiply(self.n_products)
        rows = score.score(chunks, model, **options)
        line = {"worker": os.getpid(), "began": began, "ended": time.monotonic(), "cpu": time.process_time() - used}
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        return rows


def multiply(n_products: int) -> None:
    left = np.ones((WIDTH, WIDTH), np.float32)
    for _ in range(n_products):
        left @ left


def products_in(seconds: float) -> int:
    multiply(20)
    used = time.process_time()
    multiply(200)
    return max(1, round(200 * seconds / (time.process_time() - used)))


def grid(n_cells: int) -> dict[str, Any]:
    sizes = ("13k", "28k", "77k", "224k", "595k")[: -(-n_cells // (len(SAMPLES) * 2))]
    steps = STEPS[: max(1, -(-n_cells // (len(SAMPLES) * len(sizes))))]
    return {"models": "pico", "steps": steps, "sizes": ",".join(sizes), "datasets": SAMPLES, "n_chunks": 1}


def shard(number: int, asked: dict[str, Any]) -> None:
    sweep(**asked, shard=number, unit=None)


def run_shards(n_workers: int, asked: dict[str, Any]) -> None:
    context = multiprocessing.get_context("spawn")
    tasks = [context.Process(target=shard, args=(number, asked)) for number in range(n_workers)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0


def run_ray(n_workers: int, asked: dict[str, Any]) -> None:
    import ray

    from llmcomp.experiment.ray_cluster import RayCluster

    where = str(Path(__file__).parent)
    environment = {"PYTHONPATH": os.pathsep.join([where, os.environ.get("PYTHONPATH", "")])}
    options: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "log_to_driver": False}
    ray.init(num_cpus=n_workers, runtime_env={"env_vars": environment}, **options)
    try:
        sweep(**asked, executor=RayCluster(), unit=None)
    finally:
        ray.shutdown()


MODES: dict[str, Callable[[int, dict[str, Any]], Any]] = {
    "one": lambda n, asked: sweep(**asked, unit=None),
    "workers": lambda n, asked: sweep(**asked, workers=n, unit=None),
    "shards": run_shards,
    "ray": run_ray,
}


def facts(log: Path, called: float, returned: float) -> dict[str, float]:
    cells = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda cell: cell["began"])
    by_worker = defaultdict(list)
    for cell in cells:
        by_worker[cell["worker"]].append(cell)
    between = sum(b["began"] - a["ended"] for own in by_worker.values() for a, b in itertools.pairwise(own))
    followed = sum(a["ended"] - a["began"] for own in by_worker.values() for a in own[:-1])
    first, last = cells[0]["began"], max(cell["ended"] for cell in cells)
    return {
        "wall s": returned - called,
        "start s": first - called,
        "cells/min": 60 * len(cells) / (last - first),
        "cell s": float(np.mean([cell["ended"] - cell["began"] for cell in cells])),
        "CPU s": float(np.mean([cell["cpu"] for cell in cells])),
        "between %": 100 * between / followed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    args = parser.parse_args()
    n_products = products_in(args.seconds)
    cores, load = os.cpu_count(), os.getloadavg()[0]
    print(f"{date.today():%d %B %Y}, {cores} processors, load {load:.1f} before it began; {args.workers} workers\n")
    columns = ("wall s", "start s", "cells/min", "x one", "cell s", "CPU s", "between %")
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1), flush=True)
    expected, rate = None, float("nan")
    with tempfile.TemporaryDirectory() as name:
        for mode in args.modes:
            log, out = Path(name) / f"{mode}.log", Path(name) / mode
            asked = {**grid(args.cells), "out": out, "scorer": Work(n_products, log), "progress": False}
            called = time.monotonic()
            MODES[mode](args.workers, asked)
            found = facts(log, called, time.monotonic())
            rows = results.read_rows(out).drop(columns=list(results.MACHINE_COLUMNS))
            assert expected is None or rows.equals(expected), f"{mode}: another table"
            expected, rate = rows, found["cells/min"] if mode == "one" else rate
            found["x one"] = found["cells/min"] / rate
            print(f"| {mode} | " + " | ".join(f"{found[column]:.2f}" for column in columns) + " |", flush=True)


if __name__ == "__main__":
    main()

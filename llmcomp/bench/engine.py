"""The exact engines beside torch + transformers on this machine: random weights in the shapes of Pythia and of the pico
suite, checked first, then timed in one run. Without torch only our column is filled.

Both sides get the same folder and the same number of threads. Rounds of the two are interleaved, and medians over the
rounds are given. What a model computes has no influence on the time.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llmcomp import coding
from llmcomp.bench.sweep import suite_configs, write_random_checkpoint
from llmcomp.errors import Error
from llmcomp.models.engines import exact
from llmcomp.progress import tqdm

SHAPES_DEFAULT = ("pythia-70m", "pythia-160m", "pico")
N_SEQUENCES = 8
TOKENS = {"pythia": 550, "pico": 512}  # of each sequence of a pass
STREAMS = {"pythia": (1, 8, 64), "pico": (64,)}
PAST = {"pythia": 256, "pico": 64}  # tokens in the cache before the first step
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_MAX_ROUNDS = 200

# Anonymous memory: everything but the weights, which are mapped from the file.
# Python looks for modules in the working directory first when it is given a program; here where this package lies.
_MEMORY_PROGRAM = """
import sys
sys.path = [sys.argv.pop(1), *filter(None, sys.path)]
import numpy as np
import llmcomp
from llmcomp.models.engines.exact import load_exact
def anonymous():
    sizes = dict(line.split(":") for line in open("/proc/self/status"))
    return sum(sign * int(sizes[key].split()[0]) for key, sign in (("VmHWM", 1), ("RssFile", -1)))
folder, engine, n_sequences, n_tokens, n_threads = sys.argv[1:]
model = load_exact(folder, engine=engine)
tokens = np.random.default_rng(1).integers(0, model.n_logits, (int(n_sequences), int(n_tokens) + 1))
before = anonymous()
with llmcomp.use_threads(int(n_threads)):
    model.intervals(tokens[:, :-1], tokens[:, 1:])
print(anonymous() - before)
"""


@dataclass(frozen=True)
class EngineBenchmark:
    """What `run_engine_benchmark` found. `rows`: shape, threads, work, ours, torch, unit, ratio; the last is torch's
    time over ours. NaN where torch is not installed or has no such figure.

    work: "pass" (8 sequences in one call; ours gives intervals, LM head included, torch gives logits and codes
    nothing), "step N" (one token of each of N streams, from a cache), "memory" (of our pass, weights left out).
    """

    engine: str
    backend: str
    torch: str | None  # its version
    clock: str
    machine: str
    rows: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("engine", "backend", "torch", "clock", "machine")}
        return {**facts, "rows": json.loads(self.rows.to_json(orient="records"))}

    def __str__(self) -> str:
        peer = f"torch {self.torch}" if self.torch else "torch and transformers are not installed: our column only"
        head = f"engine {self.engine}, backend {self.backend}, {peer}; {self.clock} clock, {self.machine}"
        return f"{head}\n{self.rows.to_string(index=False, float_format='%.4g', na_rep='')}"


def run_engine_benchmark(
    shapes: Sequence[str] = SHAPES_DEFAULT,
    threads: Sequence[int] = (1, 2),
    *,
    engine: str = "exact",
    seconds: float = 5.0,
    clock: str = "wall",
    progress: bool = True,
) -> EngineBenchmark:
    """Time one pass and steps of every shape with every number of threads.

    Args:
        shapes: names of models of the two suites, or parts of names.
        engine: "exact" or "exact-int8".
        seconds: about so long for each side of a row.
        clock: "wall", or "cpu": processor time of all threads, for machines on which other work runs.

    Before a shape is timed, its steps must have the bits of its pass, and the exact engine's logits agree with torch's
    to 1e-4: `Error` otherwise, and for names that no shape has.
    """
    configs = {**suite_configs("pythia"), **suite_configs("pico")}
    chosen = [name for name in configs if any(part in name for part in shapes)]
    if not chosen or clock not in CLOCKS or engine not in ("exact", "exact-int8"):
        raise Error(
            f"shapes {', '.join(shapes)}, clock {clock}, engine {engine}: expected (parts of) names among "
            f"{', '.join(configs)}; clock wall or cpu; engine exact or exact-int8"
        )
    peer, how = _peer(), _Settings(engine, CLOCKS[clock], seconds)
    rows = []
    for name in tqdm(chosen, disable=not progress, delay=2, unit="shape"):
        with tempfile.TemporaryDirectory() as folder:
            write_random_checkpoint(Path(folder), configs[name], np.float32)
            for n_threads in threads:
                with coding.use_threads(n_threads):
                    shape = _Shape(name, Path(folder), how, n_threads, peer)
                    rows += [{"shape": name, "threads": n_threads, **row} for row in shape.rows()]
    version = peer.torch.__version__ if peer else None
    return EngineBenchmark(engine, coding.backend_in_use(), version, clock, platform.machine(), pd.DataFrame(rows))


def _peer() -> Any:
    """The module torch_yardsticks where its packages are installed, else None."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    return importlib.import_module("llmcomp.bench.torch_yardsticks")


class _Settings(NamedTuple):
    engine: str
    clock: Callable[[], float]
    seconds: float


class _Shape:
    """One shape with one number of threads: both engines' models, and the rows of the table."""

    def __init__(self, name: str, folder: Path, how: _Settings, n_threads: int, peer: Any) -> None:
        self._suite = name.partition("-")[0]
        self._folder, self._how, self._n_threads, self._peer = folder, how, n_threads, peer
        self._model = exact.load_exact(folder, name=name, engine=how.engine)
        self._other = None
        if peer is not None:
            from llmcomp.models.engines.torch import load_torch

            peer.set_threads(n_threads)
            self._other = load_torch(folder, attention="sdpa")
        self._check()

    def rows(self) -> Iterator[dict[str, Any]]:
        yield self._pass()
        for n_streams in STREAMS[self._suite]:
            yield self._step(n_streams)
        if sys.platform == "linux":
            yield self._memory()

    def _check(self) -> None:
        tokens = np.random.default_rng(0).integers(0, self._model.n_logits, (2, 40))
        found = self._model.logits(tokens)
        session = self._model.session(2, 40)
        if not np.array_equal(np.stack([session.step(column) for column in tokens.T], 1), found):
            raise Error(f"{self._model.name}: steps and pass differ")
        if self._other is not None and self._how.engine == "exact":
            error = float(np.abs(found - self._other.logits(tokens)).max())
            if not error < 1e-4:
                raise Error(f"{self._model.name}: logits differ from torch's by {error}, expected less than 1e-4")

    def _pass(self) -> dict[str, Any]:
        n_tokens = TOKENS[self._suite]
        tokens = np.random.default_rng(1).integers(0, self._model.n_logits, (N_SEQUENCES, n_tokens + 1))
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), tokens[:, 1:]
        theirs = None if self._other is None else self._peer.pass_alone(self._other, inputs)
        own, other = self._compare(lambda: self._model.intervals(inputs, targets), theirs)
        rates = [inputs.size / own, inputs.size / other]
        return {"work": "pass", "ours": rates[0], "torch": rates[1], "unit": "tokens/s", "ratio": other / own}

    def _step(self, n_streams: int) -> dict[str, Any]:
        rng = np.random.default_rng(2)
        past = rng.integers(0, self._model.n_logits, (n_streams, PAST[self._suite]))
        tokens = rng.integers(0, self._model.n_logits, n_streams)
        session = self._model.session(n_streams)
        out = np.zeros((n_streams, self._model.n_logits), np.float32)
        for stream in range(n_streams):
            session.prefill(stream, past[stream])
        theirs = None if self._other is None else self._peer.step_alone(self._other, past, tokens)
        own, other = self._compare(lambda: session.step(tokens, None, out), theirs)
        times = {"ours": own * 1e3, "torch": other * 1e3}
        return {"work": f"step {n_streams}", **times, "unit": "ms", "ratio": other / own}

    def _memory(self) -> dict[str, Any]:
        counts = [str(n) for n in (N_SEQUENCES, TOKENS[self._suite], self._n_threads)]
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", _MEMORY_PROGRAM, root, str(self._folder), self._how.engine, *counts]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        nothing = {"torch": np.nan, "unit": "MiB", "ratio": np.nan}
        return {"work": "memory", "ours": int(found.stdout) / 1024, **nothing}

    def _compare(self, ours: Callable[[], object], theirs: Callable[[], object] | None) -> tuple[float, float]:
        """Median seconds of both (NaN for none) over interleaved rounds of about `seconds` each, at least three."""
        sides = [ours] if theirs is None else [ours, theirs]
        times: list[list[float]] = [[] for _ in sides]
        for run in sides:
            run()
        until = time.perf_counter() + len(sides) * self._how.seconds
        while len(times[0]) < 3 or (time.perf_counter() < until and len(times[0]) + 1 < _MAX_ROUNDS):
            for run, found in zip(sides, times, strict=True):
                begin = self._how.clock()
                run()
                found.append(self._how.clock() - begin)
        medians = [statistics.median(found) for found in times]
        return medians[0], medians[1] if len(medians) > 1 else float("nan")

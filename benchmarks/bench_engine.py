"""The exact engine beside torch + transformers: checked first, then timed, in one run.

    python benchmarks/bench_engine.py [--threads 1 2] [--shapes 70m 160m pico] [--clock wall|cpu] [--out FILE.json]

Random float32 weights in the shapes of Pythia-70m and -160m and of the pico suite; both engines get the same folder and
the same number of threads. Rounds of the two are interleaved and medians over the rounds are given; `ratio` is torch's
time over ours. What each row is:

  pass          8 chunks of 550 (pico: 512) tokens in one call. Ours gives the intervals: LM head and weights are
                included, and no [T, V] array is held. torch gives the logits (sdpa attention), and nothing is coded.
  step N        one token of each of N streams, from a key-value cache of `--context` (pico: 64) tokens on both sides on
  memory        anonymous memory of our pass: everything but the weights, which are mapped from the file

Before a shape is timed its logits must agree with torch's to 1e-4, and its steps must have the bits of its pass.
`--clock cpu` counts the processor time of all threads of the process: for machines on which other work runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import llmcomp
from llmcomp.coding import backend_in_use
from llmcomp.engine_exact import ExactModel, load_exact

MAX_ROUNDS = 200
PYTHIA = {"vocab_size": 50304, "max_position_embeddings": 2048}
PICO = {"vocab_size": 1024, "max_position_embeddings": 512, "rotary_pct": 1.0, "tie_word_embeddings": True}


def shape_of(hidden: int, n_layers: int, n_heads: int, **rest: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": n_layers, "num_attention_heads": n_heads}
    return {**sizes, "intermediate_size": 4 * hidden, **rest}


SHAPES = {
    "pythia-70m": shape_of(512, 6, 8, **PYTHIA),
    "pythia-160m": shape_of(768, 12, 12, **PYTHIA),
    "pico-13k": shape_of(32, 1, 1, **PICO),
    "pico-28k": shape_of(48, 1, 2, **PICO),
    "pico-77k": shape_of(56, 2, 2, **PICO),
    "pico-224k": shape_of(96, 2, 3, **PICO),
    "pico-595k": shape_of(128, 3, 4, **PICO),
}


def make_folder(shape: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).save_pretrained(folder)


def check(model: ExactModel, module: Any) -> None:
    tokens = np.random.default_rng(0).integers(0, model.n_logits, (2, 40))
    found = model.logits(tokens)
    with torch.inference_mode():
        expected = module(torch.from_numpy(tokens)).logits.numpy()
    error = float(np.abs(found - expected).max())
    if not error < 1e-4:
        raise SystemExit(f"logits differ from torch's by {error}")
    session = model.session(2, 40)
    steps = np.stack([session.step(tokens[:, t]) for t in range(40)], 1)
    if not np.array_equal(steps, found):
        raise SystemExit("steps and pass differ")


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], clock: Callable[[], float], seconds: float
) -> Any:
    """Median seconds of both over interleaved rounds that take about `seconds` each, at least three."""
    times: tuple[list[float], list[float]] = ([], [])
    ours(), theirs()
    until = time.perf_counter() + 2 * seconds
    while len(times[0]) < 3 or (time.perf_counter() < until and len(times[0]) + 1 < MAX_ROUNDS):
        for run, results in zip((ours, theirs), times, strict=True):
            begin = clock()
            run()
            results.append(clock() - begin)
    return [statistics.median(results) for results in times]


def bench_pass(
    model: ExactModel, module: Any, n_tokens: int, clock: Callable[[], float], seconds: float
) -> dict[str, Any]:
    tokens = np.random.default_rng(1).integers(0, model.n_logits, (8, n_tokens + 1))
    inputs = torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))

    def theirs() -> None:
        with torch.inference_mode():
            module(inputs, use_cache=False)

    own, other = compare(lambda: model.intervals(tokens[:, :-1], tokens[:, 1:]), theirs, clock, seconds)
    n = 8 * n_tokens
    return {
        "work": "pass",
        "ours": f"{n / own:.0f} tokens/s",
        "torch": f"{n / other:.0f} tokens/s",
        "ratio": other / own,
    }


def bench_step(
    model: ExactModel, module: Any, n_streams: int, context: int, timing: tuple[Any, float]
) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    past = rng.integers(0, model.n_logits, (n_streams, context))
    tokens = rng.integers(0, model.n_logits, n_streams)
    inputs, room = torch.from_numpy(tokens[:, None]), model.context_length - context - 1
    session, out = model.session(n_streams), np.zeros((n_streams, model.n_logits), np.float32)
    for stream in range(n_streams):
        session.prefill(stream, past[stream])
    with torch.inference_mode():
        cache = module(torch.from_numpy(past), use_cache=True, logits_to_keep=1).past_key_values

    def ours() -> None:
        session.step(tokens, None, out)

    def theirs() -> None:
        with torch.inference_mode():
            module(inputs, past_key_values=cache, use_cache=True)

    if room < MAX_ROUNDS:
        raise SystemExit(f"a context of {context} leaves no room for the steps")
    own, other = compare(ours, theirs, *timing)
    return {
        "work": f"step {n_streams}",
        "ours": f"{own * 1e3:.2f} ms",
        "torch": f"{other * 1e3:.2f} ms",
        "ratio": other / own,
    }


MEMORY = """
import numpy as np, sys
from llmcomp.engine_exact import load_exact
import llmcomp
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) - next(
        int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssFile"))
model = load_exact(sys.argv[1])
tokens = np.random.default_rng(1).integers(0, model.n_logits, (8, int(sys.argv[2]) + 1))
before = anonymous()
with llmcomp.use_threads(int(sys.argv[3])):
    model.intervals(tokens[:, :-1], tokens[:, 1:])
print(anonymous() - before)
"""


def bench_memory(folder: Path, n_tokens: int, n_threads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", MEMORY, str(folder), str(n_tokens), str(n_threads)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"work": "memory", "ours": f"{int(found.stdout) / 1024:.0f} MiB", "torch": "", "ratio": None}


def bench_shape(name: str, n_threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    is_pico = name.startswith("pico")
    n_tokens, context = (512, 64) if is_pico else (550, args.context)
    torch.set_num_threads(n_threads)
    with tempfile.TemporaryDirectory() as folder, llmcomp.use_threads(n_threads):
        make_folder(SHAPES[name], Path(folder))
        model = load_exact(folder, name=name)
        module = transformers.GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        check(model, module)
        rows = [bench_pass(model, module, n_tokens, clock, args.seconds)]
        for n_streams in (64,) if is_pico else (1, 8, 64):
            rows.append(bench_step(model, module, n_streams, context, (clock, args.seconds)))
        if sys.platform == "linux":
            rows.append(bench_memory(Path(folder), n_tokens, n_threads))
    return [{"shape": name, "threads": n_threads, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["pythia-70m", "pythia-160m", "pico"], help="or parts of names")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--seconds", type=float, default=5.0, help="about so long for each side of a row")
    parser.add_argument("--context", type=int, default=256, help="tokens in the caches of the Pythia shapes' steps")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    print(f"backend {backend_in_use()}, torch {torch.__version__}, {args.clock} clock")
    print(f"{'shape':<12} {'threads':>7}  {'work':<8} {'ours':>18} {'torch':>18} {'ratio':>6}")
    for name in (name for name in SHAPES if any(part in name for part in args.shapes)):
        for n_threads in args.threads:
            for row in bench_shape(name, n_threads, args):
                ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
                print(
                    f"{name:<12} {n_threads:>7}  {row['work']:<8} {row['ours']:>18} {row['torch']:>18} {ratio:>6}",
                    flush=True,
                )
                rows.append(row)
    if args.out is not None:
        facts = {"date": date.today().isoformat(), "machine": platform.machine(), "backend": backend_in_use()}
        args.out.write_text(
            json.dumps({**facts, "torch": torch.__version__, "clock": args.clock, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()

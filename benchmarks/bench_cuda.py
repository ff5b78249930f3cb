"""The CUDA coder on the device of this machine, beside torch and beside the device's own copy, all in one run.

    python benchmarks/bench_cuda.py [--rows 64,512,4096,65536] [--vocab-size 50304] [--out FILE.md]

Times are medians over CUDA events around replayed graphs, so that they hold no Python; inputs rotate through more
memory than the cache holds. Bandwidth counts one read of the logits. The copy counts its read and its write. What torch
does for the same numbers is log_softmax and gather, in the dtype of the logits. Before anything is timed, the integers
of every dtype are compared with the CPU's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import llmcomp
from llmcomp.coding.cuda import cuda_info

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROTATION_BYTES = 512 << 20
N_REPEATS = 15
DECODE_STREAMS = 512


def median_ms(work: Callable[[], object], n_repeats: int = N_REPEATS) -> float:
    times = []
    for _ in range(n_repeats + 3):  # the first ones warm up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def graph_of(steps: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def ms_of_one(steps: list[Callable[[], object]]) -> float:
    """Of one of several equal steps on different inputs."""
    steps[0]()
    return median_ms(graph_of(steps).replay) / len(steps)


def copy_bytes_per_second() -> float:
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source)) * 1e-3)


def inputs(n_rows: int, vocab_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """As many different inputs as it takes to exceed the cache."""
    n_bytes = n_rows * vocab_size * dtype.itemsize
    n_sets = max(1, -(-ROTATION_BYTES // n_bytes))
    sets = [torch.empty(n_rows, vocab_size, dtype=dtype, device="cuda") for _ in range(n_sets)]
    for tensor in sets:
        for rows in tensor.split(2048):
            rows.copy_(3 * torch.randn(rows.shape, device="cuda"))
    return sets


def check_integers(vocab_size: int) -> None:
    for dtype in DTYPES.values():
        (logits,) = inputs(64, vocab_size, dtype)[:1]
        tokens = np.arange(64) * (vocab_size // 64)
        found = [part.cpu().numpy().astype(np.uint64) for part in llmcomp.intervals(logits, tokens)]
        np.testing.assert_array_equal(found, llmcomp.intervals(logits.cpu(), tokens))


def intervals_table(all_rows: list[int], vocab_size: int, copied: float) -> list[str]:
    lines = [
        "| dtype | rows | intervals, ms | GB/s | of the copy | log_softmax + gather, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, dtype in DTYPES.items():
        for n_rows in all_rows:
            needed = 2.2 * n_rows * vocab_size * dtype.itemsize + ROTATION_BYTES
            if needed > torch.cuda.mem_get_info()[0]:
                lines.append(f"| {name} | {n_rows:,} | too large for this device | | | | |")
                continue
            sets = inputs(n_rows, vocab_size, dtype)
            tokens = torch.randint(0, vocab_size, (n_rows,), device="cuda")
            ours = ms_of_one([lambda x=x, t=tokens: llmcomp.intervals(x, t) for x in sets])
            wanted = tokens[:, None]
            torchs = ms_of_one([lambda x=x, w=wanted: torch.log_softmax(x, -1).gather(1, w) for x in sets])
            rate = n_rows * vocab_size * dtype.itemsize / (ours * 1e-3)
            lines.append(
                f"| {name} | {n_rows:,} | {ours:.4f} | {rate / 1e9:.0f} | {rate / copied:.1%} | {torchs:.4f} | "
                f"{torchs / ours:.2f} |"
            )
            print(lines[-1], file=sys.stderr)
            del sets
            torch.cuda.empty_cache()
    return lines


def streams_table(vocab_size: int) -> list[str]:
    lines = [
        f"| dtype | intervals of {DECODE_STREAMS} rows, ms | decode step, ms | ratio | encode step, ms |",
        "|---|---|---|---|---|",
    ]
    for name, dtype in DTYPES.items():
        sets = inputs(DECODE_STREAMS, vocab_size, dtype)
        tokens = torch.randint(0, vocab_size, (DECODE_STREAMS,), device="cuda")
        ours = ms_of_one([lambda x=x, t=tokens: llmcomp.intervals(x, t) for x in sets])
        random = np.random.default_rng(0)
        decoder = llmcomp.Decoder([random.bytes(4096) for _ in range(DECODE_STREAMS)])
        pulled = ms_of_one([lambda x=x, d=decoder: d.pull(x) for x in sets])
        encoder = llmcomp.Encoder(DECODE_STREAMS)
        encoder.reserve((N_REPEATS + 5) * len(sets))
        pushed = ms_of_one([lambda x=x, t=tokens, e=encoder: e.push(x, t) for x in sets])
        encoder.finish()
        lines.append(f"| {name} | {ours:.4f} | {pulled:.4f} | {pulled / ours:.2f} | {pushed:.4f} |")
        print(lines[-1], file=sys.stderr)
    return lines


def machine() -> list[str]:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    info = cuda_info()
    return [
        f"- device: {torch.cuda.get_device_name()}; {query}: {told[0] if told else 'nvidia-smi gave nothing'}",
        f"- llmcomp {llmcomp.__version__}, built with CUDA {info['toolkit']} for {', '.join(info['targets'])}; "
        f"torch {torch.__version__}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="64,512,4096,16384,65536")
    parser.add_argument("--vocab-size", type=int, default=50_304)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"bench_cuda: this torch ({torch.__version__}) finds no CUDA device")
    all_rows = [int(n) for n in arguments.rows.split(",")]
    check_integers(arguments.vocab_size)
    before = machine()
    copied = copy_bytes_per_second()
    lines = [
        f"## Speed, V = {arguments.vocab_size:,}",
        *before,
        f"- copy of 2 GiB on the device: {copied / 1e9:.0f} GB/s, read and write counted",
        "",
        *intervals_table(all_rows, arguments.vocab_size, copied),
        "",
        *streams_table(arguments.vocab_size),
        "",
        f"Afterwards: {machine()[0][2:]}",
    ]
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

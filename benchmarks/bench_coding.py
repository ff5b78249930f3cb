"""The coder beside the memory's own speed and beside its peers, on one core, all in one run.

    python benchmarks/bench_coding.py [--rows 1024] [--repeats 7] [--clock wall|cpu] [--out FILE.json]

Every contender goes over the same rows of V = 50,304 logits, far larger in all than the last-level cache; rounds of all
contenders are interleaved, and medians over the rounds are given. The peers that take too long see the first rows only.
What each does:

  read         the largest of all logits by a vectorised loop (read_pass.c): the bandwidth limit
  intervals    (start, freq, total) of one token a row
  pull         Decoder.pull: the token of one row of each of 64 streams
  torch        log_softmax and gather, 16 rows at a time so that its output stays in the cache; it codes nothing
  constriction RangeEncoder.encode with Categorical(perfect=False); the probabilities are given, which favours it
  deepmind     normalised probabilities, their cumulative sum times the width, cut to integers, and a binary coder of
               32 bits, as in google-deepmind/language_modeling_is_compression (arithmetic_coder.py, utils.py), without
               the output of its bits; the probabilities are given

`--clock cpu` counts this thread's processor time: for machines on which other work runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray

import llmcomp
from llmcomp.coding import backend_in_use

VOCAB_SIZE = 50_304
N_STREAMS = 64
ROWS_PER_TORCH_CALL = 16
Contender = tuple[Callable[[], object], int]  # what to time, and the rows that it goes over


def realistic_rows(n_rows: int, vocab_size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Zipf's law under noise, and tokens drawn from it: 4 to 5 bits a token."""
    rng = np.random.default_rng(1)
    slope = np.float32(1.6) * np.log(np.arange(1, vocab_size + 1, dtype=np.float32))
    logits = np.empty((n_rows, vocab_size), np.float32)
    tokens = np.empty(n_rows, np.int64)
    for i in range(n_rows):
        logits[i] = rng.permutation(rng.standard_normal(vocab_size, np.float32) - slope)
        tokens[i] = np.argmax(logits[i] - np.log(rng.standard_exponential(vocab_size)))
    return logits, tokens


def softmax_bits(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log2 of the softmax in binary64."""
    bits = np.empty(len(tokens))
    for i, token in enumerate(tokens):
        row = logits[i].astype(np.float64)
        bits[i] = (np.log(np.exp(row - row.max()).sum()) + row.max() - row[token]) / np.log(2)
    return bits


def read_library() -> ctypes.CDLL:
    source = Path(__file__).with_name("read_pass.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_pass.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def read_pass(function: Any, rows: NDArray[np.generic]) -> Callable[[], object]:
    pointer, shape = rows.ctypes.data_as(ctypes.c_void_p), [ctypes.c_size_t(n) for n in rows.shape]
    function.restype = None  # the number itself is not wanted
    return lambda: function(pointer, *shape)


def read_halves(function: Any, rows: NDArray[np.generic], pool: ThreadPoolExecutor) -> Callable[[], object]:
    """The read pass on two threads: ctypes lets the interpreter go meanwhile."""
    middle = len(rows) // 2
    halves = [read_pass(function, rows[:middle]), read_pass(function, rows[middle:])]
    return lambda: list(pool.map(lambda half: half(), halves))


class DeepMindCoder:
    """The arithmetic of the published coder for base 2 and 32 digits; `spent_bits` is what its intervals cost."""

    def __init__(self) -> None:
        self.low, self.high, self.spent_bits = 0, 2**32 - 1, 0.0

    def encode(self, probabilities: NDArray[np.float32], token: int) -> None:
        epsilon = np.finfo(np.float32).eps
        p = probabilities / np.cumsum(probabilities)[-1]
        p = (1 - 2 * len(p) * epsilon) * p + epsilon
        if (p < 0).any():
            raise ValueError("a probability is negative")
        width = self.high - self.low + 1
        edges = (np.insert(p, 0, 0).cumsum() * width).astype(int)
        if (edges[1:] == edges[:-1]).any():
            raise ValueError("a probability is 0 after quantisation")
        first, end = int(edges[token]), int(edges[token + 1])
        self.spent_bits += float(np.log2(width / (end - first)))
        self.low, self.high = self.low + first, self.low + end - 1
        while self.low >> 31 == self.high >> 31:  # the leading digits are the same: they are written
            self.low, self.high = self.low << 1 & 0xFFFFFFFF, self.high << 1 & 0xFFFFFFFF | 1
        while self.low >> 30 == 1 and self.high >> 30 == 2:  # 01... and 10...: a digit is put off
            self.low, self.high = self.low << 1 & 0x7FFFFFFF, self.high << 1 & 0x7FFFFFFF | 0x80000001


def deepmind_pass(probabilities: NDArray[np.float32], tokens: NDArray[np.int32]) -> float:
    coder = DeepMindCoder()
    for row, token in zip(probabilities, tokens, strict=True):
        coder.encode(row, int(token))
    return coder.spent_bits


def constriction_pass(probabilities: NDArray[np.float32], tokens: NDArray[np.int32]) -> int:
    encoder = constriction.stream.queue.RangeEncoder()
    for row, token in zip(probabilities, tokens, strict=True):
        encoder.encode(int(token), constriction.stream.model.Categorical(row, perfect=False))
    return int(encoder.num_bits())


def torch_pass(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    for i in range(0, len(logits), ROWS_PER_TORCH_CALL):
        rows = slice(i, i + ROWS_PER_TORCH_CALL)
        torch.log_softmax(logits[rows], dim=-1).gather(1, tokens[rows, None])


def pull_pass(payloads: list[bytes], logits: NDArray[np.float32]) -> None:
    decoder = llmcomp.Decoder(payloads)
    for step in logits.reshape(-1, N_STREAMS, logits.shape[1]):
        decoder.pull(step)


def stream_payloads(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> list[bytes]:
    encoder = llmcomp.Encoder(N_STREAMS)
    steps = zip(logits.reshape(-1, N_STREAMS, logits.shape[1]), tokens.reshape(-1, N_STREAMS), strict=True)
    for step_logits, step_tokens in steps:
        encoder.push(step_logits, step_tokens)
    return encoder.finish()


def same_rows_often(rows: NDArray[np.float16], tokens: NDArray[np.int64], n_times: int) -> None:
    for _ in range(n_times):
        llmcomp.intervals(rows, tokens)


def two_threads(work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with llmcomp.use_threads(2):
            work()

    return run


def median_times(contenders: dict[str, Contender], n_repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Microseconds a row, the median over interleaved rounds; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(n_repeats + 1):
        for name, (work, n_rows) in contenders.items():
            begin = clock()
            work()
            times[name].append((clock() - begin) / n_rows * 1e6)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


# Long: a line a contender and a field.
def measure(n_rows: int, n_repeats: int, clock_name: str) -> dict[str, object]:
    clock = time.perf_counter if clock_name == "wall" else time.thread_time
    logits, tokens = realistic_rows(n_rows, VOCAB_SIZE)
    tensor, token_tensor = torch.from_numpy(logits), torch.from_numpy(tokens)
    float16, bfloat16 = (
        logits.astype(np.float16),
        torch.from_numpy(np.empty(logits.shape, np.int16)).view(torch.bfloat16),
    )
    bfloat16.copy_(tensor)  # in memory of NumPy's, like all other rows
    n_slow, n_sized = min(n_rows, 32), min(n_rows, 512)  # rows that the peers are timed on, and sized on
    probabilities, peer_tokens = torch.softmax(tensor[:n_sized], dim=-1).numpy(), tokens[:n_sized].astype(np.int32)
    library = read_library()
    payloads = stream_payloads(logits, tokens)
    start, freq, total = llmcomp.intervals(logits, tokens)
    many = [np.tile(column, 1 + 1_000_000 // n_rows) for column in (start, freq, total)]
    contenders: dict[str, Contender] = {
        "read float32": (read_pass(library.read_float32, logits), n_rows),
        "read 16 bit": (read_pass(library.read_int16, float16.view(np.int16)), n_rows),
        "intervals float32": (lambda: llmcomp.intervals(logits, tokens), n_rows),
        "intervals float16": (lambda: llmcomp.intervals(float16, tokens), n_rows),
        "intervals bfloat16": (lambda: llmcomp.intervals(bfloat16, tokens), n_rows),
        "intervals float16, in cache": (lambda: same_rows_often(float16[:4], tokens[:4], n_rows // 4), n_rows),
        "pull float32": (lambda: pull_pass(payloads, logits), n_rows),
        "torch": (lambda: torch_pass(tensor, token_tensor), n_rows),
        "constriction": (lambda: constriction_pass(probabilities[:n_slow], peer_tokens[:n_slow]), n_slow),
        "deepmind": (lambda: deepmind_pass(probabilities[:n_slow], peer_tokens[:n_slow]), n_slow),
        "range coder": (lambda: llmcomp.encode_intervals(*many), len(many[0])),
    }
    if clock_name == "wall" and (os.cpu_count() or 1) >= 2:
        contenders["read float32, 2 threads"] = (
            read_halves(library.read_float32, logits, ThreadPoolExecutor(2)),
            n_rows,
        )
        contenders["intervals float32, 2 threads"] = (two_threads(contenders["intervals float32"][0]), n_rows)
    times = median_times(contenders, n_repeats, clock)
    return {
        "machine": platform.processor() or platform.machine(),
        "date": date.today().isoformat(),
        "backend": backend_in_use(),
        "clock": clock_name,
        "load_average": os.getloadavg()[0],
        "n_rows": n_rows,
        "n_repeats": n_repeats,
        "bits_per_token": float(softmax_bits(logits, tokens).mean()),
        "microseconds_a_row": times,
        "excess_bits_per_token": measure_excess(logits, tokens, probabilities, peer_tokens),
    }


def measure_excess(
    logits: np.ndarray, tokens: np.ndarray, probabilities: np.ndarray, peer_tokens: np.ndarray
) -> dict[str, float]:
    """Bits a token above what the softmax needs; of the peers on their rows."""
    n_rows, n_sized = len(tokens), len(peer_tokens)
    ideal = softmax_bits(logits, tokens)
    code_bits = llmcomp.code_length(logits, tokens)
    return {
        "code length - softmax": float((code_bits - ideal).mean()),
        "payload - code length": (8 * len(llmcomp.encode(logits, tokens)) - float(code_bits.sum())) / n_rows,
        "constriction - softmax": (constriction_pass(probabilities, peer_tokens) - ideal[:n_sized].sum()) / n_sized,
        "deepmind - softmax": (deepmind_pass(probabilities, peer_tokens) - ideal[:n_sized].sum()) / n_sized,
    }


def targets(result: dict[str, object]) -> list[tuple[str, float, str, float]]:
    """(what, measured, "<=" or ">=", target)"""
    t, excess = result["microseconds_a_row"], result["excess_bits_per_token"]
    assert isinstance(t, dict) and isinstance(excess, dict)
    f32 = t["intervals float32"]
    n_rows, bits_per_token = result["n_rows"], result["bits_per_token"]
    assert isinstance(n_rows, int) and isinstance(bits_per_token, float)
    n_bits = bits_per_token * n_rows
    # The larger of the two bounds is met first.
    half_bound = max(1.5 * t["read 16 bit"], f32 / 2)
    rows = [
        ("intervals float32 / read", f32 / t["read float32"], "<=", 1.5),
        ("intervals float16 / its bound", t["intervals float16"] / half_bound, "<=", 1.0),
        ("intervals bfloat16 / its bound", t["intervals bfloat16"] / half_bound, "<=", 1.0),
        ("torch / intervals", t["torch"] / f32, ">=", 6.0),
        ("constriction / intervals", t["constriction"] / f32, ">=", 10.0),
        ("deepmind / intervals", t["deepmind"] / f32, ">=", 35.0),
        ("pull / intervals", t["pull float32"] / f32, "<=", 1.3),
        ("range coder, ns a token", 1000 * t["range coder"], "<=", 15.0),
        ("|code length - softmax|, bits a token", abs(excess["code length - softmax"]), "<=", 1e-4),
        ("payload - code length, bits a stream", excess["payload - code length"] * n_rows, "<=", 16 + 1e-5 * n_bits),
    ]
    if "intervals float32, 2 threads" in t:
        rows.append(("two threads, speed-up", f32 / t["intervals float32, 2 threads"], ">=", 1.8))
    return rows


def print_result(result: dict[str, object]) -> int:
    times, excess = result["microseconds_a_row"], result["excess_bits_per_token"]
    assert isinstance(times, dict) and isinstance(excess, dict)
    print(
        f"{result['date']}, backend {result['backend']}, V = {VOCAB_SIZE}, {result['n_rows']} rows, "
        f"{result['bits_per_token']:.2f} bits a token, median of {result['n_repeats']} rounds, "
        f"{result['clock']} clock, load average {result['load_average']:.1f}\n"
    )
    print(f"{'':32}{'us a row':>10}{'x read':>9}")
    for name, microseconds in times.items():
        if name != "range coder":
            print(f"{name:32}{microseconds:10.1f}{microseconds / times['read float32']:9.2f}")
    print(f"\n{'bits a token':32}")
    for name, bits in excess.items():
        print(f"{name:32}{bits:19.7f}")
    print(f"\n{'':40}{'measured':>12}{'target':>12}")
    n_missed = 0
    for what, measured, relation, target in targets(result):
        is_met = measured <= target if relation == "<=" else measured >= target
        n_missed += not is_met
        print(f"{what:40}{measured:12.3g}{relation:>5}{target:7.3g}  {'met' if is_met else 'MISSED'}")
    return n_missed


def print_bounds(result: dict[str, object]) -> None:
    """What holds the numbers back, from the numbers themselves."""
    t = result["microseconds_a_row"]
    assert isinstance(t, dict)
    print("\nBounds: a coder as fast as the read pass would reach", end=" ")
    print(", ".join(f"{t[peer] / t['read float32']:.1f} x {peer}" for peer in ("torch", "constriction", "deepmind")))
    resident = t["intervals float16, in cache"]
    print(
        f"16-bit rows: {t['intervals float16']:.1f} us a row from memory, {resident:.1f} us from the cache: "
        + ("the instructions bound them." if resident > 0.8 * t["intervals float16"] else "the memory bounds them.")
    )
    if "read float32, 2 threads" in t:
        print(f"Two threads read {t['read float32'] / t['read float32, 2 threads']:.2f} times as fast as one.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help=f"a multiple of {N_STREAMS}")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.rows < N_STREAMS or arguments.rows % N_STREAMS:
        parser.error(f"--rows is {arguments.rows}; expected a multiple of {N_STREAMS}")
    torch.set_num_threads(1)
    with llmcomp.use_threads(1):
        result = measure(arguments.rows, arguments.repeats, arguments.clock)
    n_missed = print_result(result)
    print_bounds(result)
    print(f"\n{n_missed} targets missed" if n_missed else "\nall targets met")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""A full Pythia-70m-shaped model in both engines beside the published loop, on real text: checked first, then timed.

    python benchmarks/bench_pythia.py [--chunks 4] [--rounds 3] [--threads 1] [--clock wall|cpu] [--out FILE.md]

The weights are random, float32, in a folder that both engines load; the head is widened so that its logits spread
about as far as a trained model's (standard deviation 3). Chunks are the first 2,048-byte chunks of enwik8.head in
LLMCOMP_TEST_DATA or ../shared/data, tokenised with pythia-20B_tokenizer.json from there.

First the engines' code lengths must agree to 1e-4 bits a token on every chunk. Then rounds of these three are
interleaved, and medians over the rounds given:

  exact, torch     `llmcomp.score`, lossless: tokenised, one pass, integer intervals, range coded; all tokens
  published loop   the published computation restated: b % 128, one pass of torch over at most 1,024 tokens of one
                   chunk, then a softmax and an .item() for every position in a Python loop; nothing is coded

`--clock cpu` counts the processor time of the process: for machines on which other work runs.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import llmcomp
from llmcomp.coding import backend_in_use
from llmcomp.data.mappings import published_tokens

CONFIG = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 50304,
    "rotary_pct": 0.25,
    "max_position_embeddings": 2048,
}
LOGIT_DEVIATION = 3.0
BITS_A_TOKEN = 1e-4


def data_folder() -> Path:
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("LLMCOMP_TEST_DATA", root.parent / "shared" / "data"))
    if not (folder / "enwik8.head").is_file():
        raise SystemExit(f"{folder} holds no enwik8.head: set LLMCOMP_TEST_DATA")
    return folder


def make_folder(folder: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    module = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**CONFIG))
    head = module.get_output_embeddings().weight
    # The final layer norm's output has unit variance, so a logit's is the sum of squares of its row.
    with torch.no_grad():
        head.mul_(LOGIT_DEVIATION / math.sqrt(CONFIG["hidden_size"]) / float(head.std()))
    module.save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.json")


def published_loop(chunks: list[bytes], module: Any, tokenizer: Any) -> float:
    """The published sum of bits over all chunks."""
    total = 0.0
    for chunk in chunks:
        tokens, _ = published_tokens(chunk, tokenizer)
        ids = torch.from_numpy(tokens.astype("int64"))[None]
        with torch.no_grad():
            logits = module(ids).logits[0]
            for position in range(1, ids.shape[1]):
                probabilities = torch.softmax(logits[position - 1], dim=-1)
                probability = probabilities[ids[0, position]].item()
                total -= math.log2(max(probability, 1e-10))
    return total


def compare_engines(chunks: list[bytes], exact: Any, other: Any) -> tuple[float, int]:
    """Bits a token between the engines, of the chunk where they differ most; the number of tokens of all chunks."""
    rows = [llmcomp.score(chunks, model, progress=False) for model in (exact, other)]
    if not (rows[0]["tokens"] == rows[1]["tokens"]).all():
        raise SystemExit("the engines were given different tokens")
    differences = ((rows[0]["ideal_bits"] - rows[1]["ideal_bits"]) / rows[0]["tokens"]).abs()
    return float(differences.max()), int(rows[0]["tokens"].sum())


def measure(work: dict[str, Callable[[], object]], n_rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(n_rounds):
        for name, run in work.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    data = data_folder()
    text = (data / "enwik8.head").read_bytes()
    chunks = [text[at : at + 2048] for at in range(0, 2048 * args.chunks, 2048)]
    with tempfile.TemporaryDirectory() as name, llmcomp.use_threads(args.threads):
        make_folder(Path(name), data / "pythia-20B_tokenizer.json")
        exact, other = (llmcomp.load_model(name, engine=engine) for engine in ("exact", "torch"))
        difference, n_tokens = compare_engines(chunks, exact, other)
        if not difference < BITS_A_TOKEN:
            raise SystemExit(f"the engines differ by {difference} bits a token, expected less than {BITS_A_TOKEN}")
        work = {
            "exact": lambda: llmcomp.score(chunks, exact, progress=False),
            "torch": lambda: llmcomp.score(chunks, other, progress=False),
            "published loop": lambda: published_loop(chunks, other.module, other.tokenizer),
        }
        clock = time.perf_counter if args.clock == "wall" else time.process_time
        seconds = measure(work, args.rounds, clock)
        n_published = sum(len(published_tokens(chunk, other.tokenizer)[0]) for chunk in chunks)
    counts = {"exact": n_tokens, "torch": n_tokens, "published loop": n_published}
    lines = report(args, exact.n_params, difference, counts, seconds)
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


def report(
    args: argparse.Namespace, n_params: int, difference: float, counts: dict[str, int], seconds: dict[str, float]
) -> list[str]:
    return [
        "# A Pythia-70m-shaped model on a CPU",
        "",
        f"`python benchmarks/bench_pythia.py --chunks {args.chunks} --rounds {args.rounds} --threads {args.threads} "
        f"--clock {args.clock}`, {date.today().isoformat()}",
        "",
        f"Random weights ({n_params:,} parameters, float32), the first {args.chunks} chunks of enwik8, "
        f"{args.threads} thread(s), backend {backend_in_use()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {args.clock} clock, medians of {args.rounds} interleaved rounds.",
        "",
        f"Engines agree: at most {difference:.1e} bits a token apart on any chunk (allowed {BITS_A_TOKEN:.0e}).",
        "",
        "| | tokens a chunk | chunks a second | times the published loop |",
        "|---|---|---|---|",
        *(
            f"| {name} | {counts[name] / args.chunks:.0f} | {args.chunks / taken:.2f} | "
            f"{seconds['published loop'] / taken:.2f} |"
            for name, taken in seconds.items()
        ),
    ]


if __name__ == "__main__":
    main()

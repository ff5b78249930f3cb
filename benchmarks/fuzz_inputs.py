"""Changes files that llmcomp reads by chance, and says what was found out.

    python benchmarks/fuzz_inputs.py --inputs 100000

Every input must be read or be refused by an `Error` of one line. The kinds and how they are changed are in
tests/support/mutated_inputs.py; an input follows from the seed, its kind and its number. Prints one line a kind; exits
1 where anything else happened, which is printed with the input's number. The processes' memory is bounded, so that an
input that takes all memory is found too.
"""

from __future__ import annotations

import argparse
import faulthandler
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from mutated_inputs import KINDS, outcome

MEMORY_BYTES = 16 << 30
FAULTS_MAX = 20


def fuzz(name: str, first: int, n_inputs: int, seed: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="llmcomp-fuzz-") as folder:
        kind = KINDS[name](Path(folder) / "made")
        counts: Counter[str] = Counter()
        started, slowest = time.perf_counter(), (0.0, 0)
        for number in range(first, first + n_inputs):
            begun = time.perf_counter()
            try:
                counts[outcome(kind, f"{seed} {name} {number}")] += 1
            except KeyboardInterrupt:
                raise
            except BaseException:  # a panic of the tokenizers library is no Exception
                counts["faults"] += 1
                print(f"{name} {number} (seed {seed}):")
                traceback.print_exc(limit=-4, file=sys.stdout, chain=False)
                if counts["faults"] == FAULTS_MAX:
                    break
            slowest = max(slowest, (time.perf_counter() - begun, number))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:18} {sum(counts.values()):>9,} inputs: {counts['refused']:,} refused, {counts['read']:,} read, "
        f"{counts['faults']} faults; {seconds:.0f} s, the slowest {slowest[0] * 1000:.0f} ms (input {slowest[1]}), "
        f"peak memory {peak:.0f} MiB",
        flush=True,
    )
    return not counts["faults"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}; default: all")
    options = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sound = [fuzz(name, options.first, options.inputs, options.seed) for name in options.kinds]
    sys.exit(0 if all(sound) else 1)


if __name__ == "__main__":
    main()

"""Reads archives with right checksums and hostile fields in every way there is: nothing but llmcomp.Error may come.

    python benchmarks/fuzz_archives.py --executions 1000000 [--seed 0]

An execution is one archive read in one of four ways: decompressed; asked for segments and for what it says of itself;
opened, with seeks; salvaged. tests/support/hostile_archives.py makes them and says what must hold. Ends at the first
archive that breaks it, whose bytes are printed.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import hostile_archives

WAYS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    hostile = hostile_archives.Hostile(arguments.seed)
    passed: Counter[str] = Counter()
    slowest = 0.0
    started = time.perf_counter()
    n_archives = -(-arguments.executions // WAYS)
    for number in range(n_archives):
        blob = hostile.blob()
        before = time.process_time()
        try:
            passed += hostile_archives.read_every_way(blob, hostile.rng)
        except Exception as error:
            print(f"archive {number} of seed {arguments.seed}: {type(error).__name__}: {error}: {blob.hex()}")
            raise
        slowest = max(slowest, time.process_time() - before)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{WAYS * n_archives:,} executions on {n_archives:,} archives, seed {arguments.seed}: only llmcomp.Error")
    print(", ".join(f"{way} passed {n:,} times" for way, n in sorted(passed.items())))
    print(f"{seconds:.0f} s, the slowest archive {1000 * slowest:.0f} ms of a processor, peak memory {peak:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

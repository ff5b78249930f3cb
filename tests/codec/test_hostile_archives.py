"""A short run of benchmarks/fuzz_archives.py: right checksums, hostile fields, every way of reading."""

from __future__ import annotations

from collections import Counter

import hostile_archives


def test_nothing_but_errors_and_one_content():
    hostile = hostile_archives.Hostile(12345)
    passed: Counter[str] = Counter()
    for _ in range(600):
        passed += hostile_archives.read_every_way(hostile.blob(), hostile.rng)
    # Far enough into the readers to mean something.
    assert all(passed[way] > 40 for way in ("decompress", "segment", "info", "open", "salvage"))

"""A hundred megabytes through the archive, in memory that does not grow with them; the model costs next to nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import ConstantModel

import llmcomp
from llmcomp.codec.container import ArchiveIndex

SEGMENT_BYTES = 1 << 16
# Small numbers are likely: text of 16 letters takes a little more than half, noise cannot shrink.
WEIGHTS = [32] * 16 + [1] * 240


def write_content(path: Path, n_bytes: int) -> None:
    """Segments of 16 letters, every eighth of all bytes; the last is short."""
    rng = np.random.default_rng(n_bytes)
    with path.open("wb") as file:
        for number, at in enumerate(range(0, n_bytes, SEGMENT_BYTES)):
            n = min(SEGMENT_BYTES, n_bytes - at)
            file.write(rng.integers(0, 256 if number % 8 == 7 else 16, n, np.uint8).tobytes())


PROGRAM = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from tiny_models import ConstantModel
from llmcomp.codec.files import compress_file, decompress_file
_, _, verb, source, target, lanes, weights = sys.argv
model = ConstantModel(json.loads(weights))
options = {"output": target, "lanes": int(lanes), "progress": False}
before = time.process_time()
if verb == "compress":
    report = compress_file(source, model, stock=False, **options)
else:
    report = decompress_file(source, model, **options)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([report.content_bytes, report.n_stored, peak, time.process_time() - before]))
"""


def run(verb: str, source: Path, target: Path, lanes: int) -> tuple[int, int, float, float]:
    """(bytes, stored segments, peak MiB, processor seconds) in a process of its own."""
    arguments = [Path(__file__).parents[1] / "support", verb, source, target, lanes, json.dumps(WEIGHTS)]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    n_bytes, n_stored, peak, seconds = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return n_bytes, n_stored, peak / 1024, seconds


@pytest.mark.slow
def test_a_hundred_megabytes_in_constant_memory(tmp_path):
    peaks = {}
    for n_bytes in (20_000_000, 100_000_000):
        source, archive, back = (tmp_path / f"{n_bytes}{suffix}" for suffix in ("", ".llmc", ".back"))
        write_content(source, n_bytes)
        n_segments = -(-n_bytes // SEGMENT_BYTES)
        for verb, first, second, lanes in (("compress", source, archive, 16), ("decompress", archive, back, 256)):
            found, n_stored, peaks[verb, n_bytes], seconds = run(verb, first, second, lanes)
            assert (found, n_stored) == (n_bytes, n_segments // 8)
            print(f"{verb} {n_bytes:,} bytes: {n_bytes / seconds / 1e6:.2f} MB/s, {peaks[verb, n_bytes]:.0f} MiB")
        assert subprocess.run(["cmp", source, back], check=False).returncode == 0
        # A letter has 32 of 752 parts; the short last segment belongs to either kind.
        expected = n_bytes * (7 * math.log2(752 / 32) / 8 + 1) / 8
        assert archive.stat().st_size == pytest.approx(expected, rel=1e-3, abs=SEGMENT_BYTES)
    for verb in ("compress", "decompress"):
        assert peaks[verb, 100_000_000] < peaks[verb, 20_000_000] + 16
    # Random access: by the index, without what lies before.
    with archive.open("rb") as file:
        assert ArchiveIndex(file).n_segments == n_segments
    with source.open("rb") as file, llmcomp.open(archive, model=ConstantModel(WEIGHTS)) as reader:
        for at in (99_999_000, 7 * SEGMENT_BYTES + 5, 50_000_000, 1000):
            file.seek(at), reader.seek(at)
            assert reader.read(500) == file.read(500)

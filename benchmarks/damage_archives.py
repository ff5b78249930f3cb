"""Damages small archives in every way that is thought of, and says what was found out.

    python benchmarks/damage_archives.py --files 1000000

Every damaged file must be refused, or, in salvage, give nothing but segments of the original. A file counts as refused
if reading it raises CorruptArchive, or if all its segments are whole but the content's hash is another's. No model is
needed for that; every hundredth file goes through `decompress` with a model too. Salvage is tried on every truncation
and flipped bit and on every tenth other file. Prints one line a kind of damage; exits 1 on the first miss, printed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import golden_archives as golden

from llmcomp import decompress
from llmcomp.codec.container import ArchiveIndex, ArchiveReader, Segment
from llmcomp.codec.salvage import salvage_segments
from llmcomp.errors import CorruptArchive

SECONDS_MAX = 2.0


class Original:
    """A golden archive, its segments and their contents."""

    def __init__(self, case: golden.Case):
        self.case = case
        self.blob = golden.path_of(case).read_bytes()
        self.content = golden.CONTENTS[case[3]]
        reader = ArchiveReader(io.BytesIO(self.blob))
        self.header = reader.header
        self.segments = list(reader.segments())
        step = reader.header.segment_bytes
        self.parts = {segment: self.content[segment.number * step :][: segment.n_bytes] for segment in self.segments}


def truncations(original: Original, rng: random.Random, others: list[Original]) -> Iterator[bytes]:
    for n_bytes in range(len(original.blob)):
        yield original.blob[:n_bytes]


def flips(original: Original, rng: random.Random, others: list[Original]) -> Iterator[bytes]:
    for bit in range(8 * len(original.blob)):
        bad = bytearray(original.blob)
        bad[bit // 8] ^= 1 << bit % 8
        yield bytes(bad)


def overwritten(original: Original, rng: random.Random, others: list[Original]) -> Iterator[bytes]:
    """One to eight stretches of up to 64 bytes: random, zeros, ones, or bits flipped at random."""
    while True:
        bad = bytearray(original.blob)
        for _ in range(rng.randint(1, 8)):
            at, n_bytes = rng.randrange(len(bad)), rng.randint(1, 64)
            n_bytes = min(n_bytes, len(bad) - at)
            bad[at : at + n_bytes] = rng.choice((rng.randbytes(n_bytes), bytes(n_bytes), b"\xff" * n_bytes))
        yield bytes(bad)


def moved(original: Original, rng: random.Random, others: list[Original]) -> Iterator[bytes]:
    """Bytes removed, doubled, inserted or swapped."""
    while True:
        blob = original.blob
        a, b, c = sorted(rng.randrange(len(blob) + 1) for _ in range(3))
        yield rng.choice(
            (
                blob[:a] + blob[b:],
                blob[:b] + blob[a:],
                blob[:a] + rng.randbytes(rng.randint(1, 40)) + blob[a:],
                blob[:a] + blob[b:c] + blob[a:b] + blob[c:],
            )
        )


def spliced(original: Original, rng: random.Random, others: list[Original]) -> Iterator[bytes]:
    """The beginning of one archive and the end of another, or a stretch of another in the middle."""
    while True:
        other = rng.choice(others).blob
        a, b = rng.randrange(len(original.blob)), rng.randrange(len(other))
        yield rng.choice((original.blob[:a] + other[b:], original.blob[:a] + other[a:], other + original.blob))


KINDS: dict[str, Callable[[Original, random.Random, list[Original]], Iterator[bytes]]] = {
    kind.__name__: kind for kind in (truncations, flips, overwritten, moved, spliced)
}


def refused(blob: bytes, originals: dict[Segment, bytes]) -> bool:
    """Whether reading finds the damage: by itself, or by the hash of the contents that whole segments stand for."""
    reader = ArchiveReader(io.BytesIO(blob))
    hasher = hashlib.sha256()
    try:
        for segment in reader.segments():
            hasher.update(originals.get(segment, b"not a segment of any archive"))
    except CorruptArchive:
        return True
    assert reader.trailer is not None
    return hasher.digest()[:16] != reader.trailer.content_hash


def survives(blob: bytes, originals: dict[Segment, bytes], with_salvage: bool, model: object | None) -> str:
    """What is wrong with how a damaged file was taken, or nothing."""
    try:
        is_refused = refused(blob, originals)
    except CorruptArchive:
        is_refused = True
    if not is_refused:
        return "read as if whole"
    with contextlib.suppress(CorruptArchive):
        ArchiveIndex(io.BytesIO(blob)).n_stored()
    try:
        if with_salvage and any(segment not in originals for segment in salvage_segments(io.BytesIO(blob))):
            return "salvage gave a segment that never was"
    except CorruptArchive:
        pass
    if model is not None:
        try:
            decompress(blob, model)
        except CorruptArchive:
            return ""
        except ValueError as error:
            return "" if type(error).__name__ == "ModelMismatch" else f"{type(error).__name__}: {error}"
        return "decompressed as if whole"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000, help="how many damaged files in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    originals = [Original(case) for case in golden.cases()]
    contents = {segment: part for original in originals for segment, part in original.parts.items()}
    models = {name: golden.IntegerModel(name) for name in golden.TOKENIZERS}
    n_done, slowest = dict.fromkeys(KINDS, 0), 0.0
    random_each = max(1, arguments.files // (3 * len(originals)))
    started = time.perf_counter()
    for original in originals:
        for name, kind in KINDS.items():
            for number, bad in enumerate(kind(original, rng, originals)):
                if name not in ("truncations", "flips") and number >= random_each:
                    break
                if any(bad == other.blob for other in originals):
                    continue
                before = time.perf_counter()
                with_salvage = name in ("truncations", "flips") or number % 10 == 0
                model = models[original.case[1]] if number % 100 == 0 else None
                wrong = survives(bad, contents, with_salvage, model)
                seconds = time.perf_counter() - before
                slowest = max(slowest, seconds)
                if seconds > SECONDS_MAX:
                    wrong = wrong or f"took {seconds:.1f} s"
                if wrong:
                    print(f"{'-'.join(map(str, original.case))}, {name} {number}: {wrong}: {bad.hex()}")
                    return 1
                n_done[name] += 1
    for name, n_files in n_done.items():
        print(f"{name:12} {n_files:9,} files, all refused")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{'all':12} {sum(n_done.values()):9,} files in {time.perf_counter() - started:.0f} s, "
        f"the slowest {1000 * slowest:.0f} ms, peak memory {peak:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

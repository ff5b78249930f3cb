"""The archive against general compressors: size, ratio, speed both ways, peak memory, and what the format costs.

    python benchmarks/bench_archive.py [FILE] [--bytes 1000000] [--model pico-595k] [--overlaps] [--segments]

The programs zpaq and 7z are measured where they are installed (Debian: apt-get install zpaq p7zip-full); a program's
row has the program's own processor time and memory, with starting it. FILE is by default enwik8.head of
LLMCOMP_TEST_DATA or ../shared/data, else the bundled text sample. A row is made in a process of its own, so that the
memory is that row's (the interpreter and the libraries included); a row's times are wall clock and processor seconds of
compressing and decompressing, without starting and loading. The output is Markdown.
"""

from __future__ import annotations

import argparse
import bz2
import io
import json
import lzma
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def general_coders() -> dict[str, Callable[[], Coder]]:
    """Compressors of the standard library and of the extra [baselines], by name; each is made in its own process."""

    def zstd() -> Coder:
        import zstandard

        return zstandard.ZstdCompressor(level=19).compress, zstandard.ZstdDecompressor().decompress

    def brotli() -> Coder:
        import brotli as library

        return library.compress, library.decompress

    def gzip() -> Coder:
        return lambda data: zlib.compress(data, 9, 31), lambda blob: zlib.decompress(blob, 31)

    return {
        "gzip -9": gzip,
        "bzip2 -9": lambda: (bz2.compress, bz2.decompress),
        "xz -9": lambda: (lambda data: lzma.compress(data, preset=9), lzma.decompress),
        "zstd -19": zstd,
        "brotli -q 11": brotli,
    }


# By name: the program, and its arguments to compress IN to OUT and to give IN's bytes back in the folder BACK.
PROGRAMS = {
    "zpaq -m5": ("zpaq", ["a", "OUT", "IN", "-m5", "-t1"], ["x", "OUT", "-to", "BACK/", "-t1"]),
    "7z -m0=ppmd:o=16": ("7z", ["a", "-m0=ppmd:o=16", "-mmt=1", "OUT", "IN"], ["x", "OUT", "-oBACK", "-mmt=1"]),
}


def program_coder(name: str) -> Coder:
    program, *both = PROGRAMS[name]
    suffix = {"zpaq": ".zpaq", "7z": ".7z"}[program]

    def run(arguments: list[str], folder: str) -> None:
        # Programs store the path that they are given: a bare one, from inside the folder.
        places = {"IN": "in", "OUT": f"out{suffix}", "BACK/": "back/", "-oBACK": "-oback"}
        command = [program, *(places.get(argument, argument) for argument in arguments)]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def compress(data: bytes) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in").write_bytes(data)
            run(both[0], folder)
            return (Path(folder) / f"out{suffix}").read_bytes()

    def decompress(blob: bytes) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"out{suffix}").write_bytes(blob)
            run(both[1], folder)
            (found,) = (path for path in (Path(folder) / "back").rglob("*") if path.is_file())
            return found.read_bytes()

    return compress, decompress


def processor_seconds() -> float:
    """Of this process and of the programs that it has run."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def llmcomp_coder(model_name: str, options: dict[str, Any]) -> tuple[Coder, Any]:
    import llmcomp

    model = llmcomp.load_model(model_name)
    return (lambda data: llmcomp.compress(data, model, **options), lambda blob: llmcomp.decompress(blob, model)), model


def ideal_bits(data: bytes, blob: bytes, model: Any) -> float:
    """Bits of the integer model over all segments of an archive without mixing or stock codecs, without any byte of
    coding or format."""
    from llmcomp.codec.container import ArchiveReader
    from llmcomp.codec.segments import SegmentCodec

    reader = ArchiveReader(io.BytesIO(blob))
    codec = SegmentCodec.for_archive(reader.header, model)
    assert codec is not None
    step = reader.header.segment_bytes
    return sum(coded.ideal_bits for coded in codec.encode([data[at : at + step] for at in range(0, len(data), step)]))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One row; runs in a process of its own."""
    data = Path(job["file"]).read_bytes()[: job["n_bytes"]]
    model = None
    if job["name"] in general_coders():
        encode, decode = general_coders()[job["name"]]()
    elif job["name"] in PROGRAMS:
        encode, decode = program_coder(job["name"])
    else:
        (encode, decode), model = llmcomp_coder(job["model"], job["options"])
    row: dict[str, Any] = {"name": job["name"]}
    work: list[tuple[str, Callable[[bytes], bytes]]] = [("compress", encode)]
    if job["decode"]:
        work.append(("decompress", decode))
    content = data
    for verb, function in work:
        wall, processor = time.perf_counter(), processor_seconds()
        content = function(content)
        row[verb] = (time.perf_counter() - wall, processor_seconds() - processor)
        of = resource.RUSAGE_CHILDREN if job["name"] in PROGRAMS else resource.RUSAGE_SELF
        row[f"{verb}_memory"] = resource.getrusage(of).ru_maxrss * 1024
        if verb == "compress":
            blob = content
    if job["decode"] and content != data:
        raise SystemExit(f"{job['name']}: the round trip gave other bytes")
    row["coded_bytes"] = len(blob)
    if model is not None and job["options"].get("mix") is False:
        row["overhead"] = 8 * len(blob) / ideal_bits(data, blob, model) - 1
    return row


def jobs_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    base = {"file": str(arguments.file), "n_bytes": arguments.bytes, "model": arguments.model, "options": {}}
    base["decode"] = not arguments.no_decode
    jobs = [{**base, "name": name} for name in general_coders()]
    jobs += [{**base, "name": name} for name, (program, *_) in PROGRAMS.items() if shutil.which(program)]
    jobs.append({**base, "name": arguments.model})
    alone = {"mix": False, "stock": False}
    jobs.append({**base, "name": f"{arguments.model} alone", "options": alone})
    if arguments.overlaps:
        jobs += [
            {**base, "name": f"{arguments.model}, overlap {k}", "options": {"overlap": k}}
            for k in (0, 32, 64, 128, 192, 256, 384)
        ]
    if arguments.segments:
        jobs += [
            {**base, "name": f"{arguments.model}, segments of {n >> 10} KiB", "options": {"segment_bytes": n}}
            for n in (1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 17, 1 << 18, 1 << 20)  # the last: --solid
        ]
    return jobs


def default_file() -> Path:
    root = Path(__file__).resolve().parent.parent
    real = Path(os.environ.get("LLMCOMP_TEST_DATA", root.parent / "shared" / "data")) / "enwik8.head"
    return real if real.exists() else root / "llmcomp" / "pico" / "samples" / "text.txt"


def markdown(row: dict[str, Any], n_bytes: int) -> str:
    verbs = [verb for verb in ("compress", "decompress") if verb in row]
    blank = [""] * (2 - len(verbs))
    speeds = [f"{n_bytes / 1e6 / max(row[verb][0], 1e-9):.3g}" for verb in verbs] + blank
    processor = [f"{row[verb][1]:.2f}" for verb in verbs] + blank
    memory = [f"{row[f'{verb}_memory'] / 2**20:.0f}" for verb in verbs] + blank
    overhead = f"{100 * row['overhead']:.3f} %" if "overhead" in row else ""
    cells = [
        row["name"],
        f"{row['coded_bytes']:,}",
        f"{row['coded_bytes'] / n_bytes:.4f}",
        *speeds,
        *processor,
        *memory,
    ]
    return f"| {' | '.join([*cells, overhead])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=default_file())
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--model", default="pico-595k")
    parser.add_argument("--overlaps", action="store_true", help="also the archive with other overlaps")
    parser.add_argument("--segments", action="store_true", help="also the archive with other segment sizes")
    parser.add_argument("--only-archive", action="store_true", help="no general compressors")
    parser.add_argument("--no-decode", action="store_true", help="compress only")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(json.loads(arguments.job))))
        return
    n_bytes = min(arguments.bytes, arguments.file.stat().st_size)
    print(f"First {n_bytes:,} bytes of {arguments.file.name}; {os.cpu_count()} processors.\n")
    print("| | bytes | ratio | MB/s in | MB/s out | CPU s in | CPU s out | MiB in | MiB out | above ideal bits |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for job in jobs_of(arguments):
        if arguments.only_archive and (job["name"] in general_coders() or job["name"] in PROGRAMS):
            continue
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        print(markdown(json.loads(result.stdout), n_bytes), flush=True)


if __name__ == "__main__":
    main()

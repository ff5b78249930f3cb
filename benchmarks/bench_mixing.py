"""What each part of the mixing is worth: the mixer itself, compiled with that part taken out, on the same intervals.

    python benchmarks/bench_mixing.py FILE... [--bytes 1000000] [--model pico-595k] [--segment-bytes 65536 1048576]

The model runs once a file and segment size; each variant is csrc/core/mixing/mixer.c with some of its lines changed,
compiled here. A cell is the sum of ideal bits, in bytes, over the bytes of the file: the archive has some 7 bytes a
segment more. The output is Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

import llmcomp
from llmcomp.codec.segments import windowed_model
from llmcomp.data.mappings import get_mapping
from llmcomp.models.adapter import AdaptedModel

ROOT = Path(__file__).resolve().parent.parent
ORDERS = (1, 2, 3, 4, 6, 12)
Stream = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]
Changes = list[tuple[str, str]]


def without_order(order: int) -> Changes:
    left = [str(kept) for kept in ORDERS if kept != order]
    orders = ", ".join(map(str, ORDERS))
    return [("#define N_ORDERS 6", "#define N_ORDERS 5"), (f"{{{orders}}}", f"{{{', '.join(left)}}}")]


def variants() -> dict[str, Changes]:
    """By name, what to replace in the mixer's source."""
    found: dict[str, Changes] = {"all of it": []}
    found |= {f"without order {order}": without_order(order) for order in ORDERS}
    return found | {
        "every occurrence of a context counts the same": [("#define AGE_KEPT 218", "#define AGE_KEPT 256")],
        "the last occurrence alone": [("#define AGES_MAX 16", "#define AGES_MAX 1")],
        "the last 4 occurrences": [("#define AGES_MAX 16", "#define AGES_MAX 4")],
        "trusts do not learn": [("/ (trust->n_steps + 3)", "/ (1 << 30)")],
        "one trust an order": [("size_class(step->n_ages) * N_FOLLOWERS + followers - 1]", "followers * 0]")],
        "shares do not learn": [("#define SHARE_RATE 20", "#define SHARE_RATE (1 << 30)")],
        "one set of shares": [("mixer->share = mixer->shares[set];", "mixer->share = mixer->shares[set * 0];")],
        "no shares: the highest order with all that is below it": [
            ("? SHARE_ONE / 10 * 4 : SHARE_ONE / 10;", "? SHARE_ONE - SHARE_MIN * N_ORDERS : SHARE_MIN;"),
            ("#define SHARE_RATE 20", "#define SHARE_RATE (1 << 30)"),
        ],
    }


def compiled(changes: Changes, folder: Path) -> ctypes.CDLL:
    source = (ROOT / "csrc/core/mixing/mixer.c").read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in mixer.c"
        source = source.replace(old, new)
    number = len(list(folder.iterdir()))
    path, library = folder / f"mixer{number}.c", folder / f"mixer{number}.so"
    path.write_text(source)
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run(["cc", "-O2", "-std=c11", "-fPIC", "-shared", *include, str(path), "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))
    found.lmc_mixer_bound.restype = ctypes.c_size_t
    found.lmc_mixer_bound.argtypes = [ctypes.c_size_t]
    return found


def mixed_bits(library: ctypes.CDLL, stream: Stream) -> float:
    tokens, parts = stream
    n = len(tokens)
    start, freq, total = (part.copy() for part in parts)
    memory = np.empty(library.lmc_mixer_bound(n) // 8 + 1, np.uint64)
    mixer, error = ctypes.c_void_p(), ctypes.c_size_t()
    begun = library.lmc_mixer_begin(
        memory.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(memory.nbytes), ctypes.c_size_t(n), ctypes.byref(mixer)
    )
    arrays = [array.ctypes.data_as(ctypes.c_void_p) for array in (tokens, start, freq, total)]
    status = library.lmc_mixer_encode(mixer, ctypes.c_size_t(n), *arrays, ctypes.byref(error))
    assert begun == status == 0, (begun, status)
    return ideal_bits(freq, total)


def ideal_bits(freq: npt.NDArray[np.uint64], total: npt.NDArray[np.uint64]) -> float:
    return -float(np.log2(freq.astype(np.float64) / total.astype(np.float64)).sum())


def streams_of(content: bytes, model: AdaptedModel, segment_bytes: int) -> list[Stream]:
    """Tokens and the model's own intervals of every segment."""
    contents = [content[at : at + segment_bytes] for at in range(0, len(content), segment_bytes)]
    mapping = get_mapping("bytes")
    tokens = [mapping.encode(part, model.traits.tokenizer).tokens for part in contents]
    parts = windowed_model(model).intervals(tokens)
    return [(np.asarray(t, np.int64), p) for t, p in zip(tokens, parts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--model", default="pico-595k")
    parser.add_argument("--segment-bytes", type=int, nargs="+", default=[1 << 16, 1 << 20])
    arguments = parser.parse_args()
    model = AdaptedModel(llmcomp.load_model(arguments.model))
    columns: dict[str, tuple[int, list[Stream]]] = {}
    for file in arguments.files:
        content = file.read_bytes()[: arguments.bytes]
        for segment_bytes in arguments.segment_bytes:
            streams = streams_of(content, model, segment_bytes)
            columns[f"{file.name}, {segment_bytes >> 10} KiB"] = len(content), streams
    print(f"| | {' | '.join(columns)} | us a token |\n|---|{'---|' * (len(columns) + 1)}", flush=True)
    alone = [sum(ideal_bits(*parts[1:]) for _, parts in streams) / 8 / n for n, streams in columns.values()]
    print(f"| the model alone | {' | '.join(f'{ratio:.4f}' for ratio in alone)} | |", flush=True)
    n_tokens = sum(len(tokens) for _, streams in columns.values() for tokens, _ in streams)
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in variants().items():
            library = compiled(changes, Path(folder))
            started = time.process_time()
            cells = [sum(mixed_bits(library, stream) for stream in streams) / 8 / n for n, streams in columns.values()]
            seconds = time.process_time() - started
            row = " | ".join(f"{ratio:.4f}" for ratio in cells)
            print(f"| {name} | {row} | {1e6 * seconds / n_tokens:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""What compressors without a language model make of the same chunks, as rows of the results table.

Every output counted here was decoded again and compared. No models, no tokens, no coder of llmcomp's own.
A row's chunk is its number in the data set; `results.STREAM_CHUNK` marks all chunks as one stream: one behind the
other for the byte compressors and FLAC, one above the other as pictures of at most 511 chunks (WebP's limit is 16,383
rows) for PNG and WebP.
"""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import lzma
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from llmcomp.datasets import IMAGE_COLUMNS, SAMPLE_RATE_HZ, Dataset
from llmcomp.errors import Error
from llmcomp.results import ROW_COLUMNS, STREAM_CHUNK, check_rows

_PICTURE_BYTES = 511 * 32 * IMAGE_COLUMNS


@dataclass(frozen=True)
class Baseline:
    """One compressor at one setting; `modality` None: for any bytes. `package` is what must be installed."""

    name: str
    modality: str | None
    package: str | None
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]

    @property
    def is_installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(_MODULES[self.package]) is not None

    @property
    def library(self) -> str:
        """Name and version of the library that does the work."""
        if self.package is not None:
            return f"{self.package} {metadata.version(self.package)}"
        return f"zlib {zlib.ZLIB_RUNTIME_VERSION}" if self.name.startswith("gzip") else "Python's standard library"


_MODULES = {"zstandard": "zstandard", "brotli": "brotli", "pillow": "PIL", "soundfile": "soundfile"}


def _xz_compress(data: bytes) -> bytes:
    # The preset's dictionary of 64 MB would be set up anew for every chunk; one that holds all the data is as good.
    dict_size = min(64 << 20, max(4096, len(data)))
    return lzma.compress(
        data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dict_size}]
    )


def _zstd_compress(data: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdCompressor(level=19).compress(data))


def _zstd_decompress(coded: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdDecompressor().decompress(coded))


def _brotli_compress(data: bytes) -> bytes:
    import brotli

    # The window of 16 MB is the largest that every brotli decoder takes.
    return bytes(brotli.compress(data, quality=11, lgwin=24))


def _brotli_decompress(coded: bytes) -> bytes:
    import brotli

    return bytes(brotli.decompress(coded))


def _save_picture(data: bytes, **how: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("L", (IMAGE_COLUMNS, len(data) // IMAGE_COLUMNS), data).save(file, **how)
    return file.getvalue()


def _load_picture(coded: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(coded)) as picture:
        return picture.convert("L").tobytes()


def _png_compress(data: bytes) -> bytes:
    return _save_picture(data, format="PNG", optimize=True)


def _webp_compress(data: bytes) -> bytes:
    return _save_picture(data, format="WEBP", lossless=True, quality=80, method=6)


def _flac_compress(data: bytes) -> bytes:
    import soundfile

    file = io.BytesIO()
    samples = np.frombuffer(data, "<i2").astype(np.int16)
    soundfile.write(file, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return file.getvalue()


def _flac_decompress(coded: bytes) -> bytes:
    import soundfile

    samples, _ = soundfile.read(io.BytesIO(coded), dtype="int16")
    return bytes(samples.astype("<i2").tobytes())


BASELINES: tuple[Baseline, ...] = (
    Baseline("gzip-9", None, None, lambda data: gzip.compress(data, 9, mtime=0), gzip.decompress),
    Baseline("bzip2-9", None, None, lambda data: bz2.compress(data, 9), bz2.decompress),
    Baseline("xz-9e", None, None, _xz_compress, lzma.decompress),
    Baseline("zstd-19", None, "zstandard", _zstd_compress, _zstd_decompress),
    Baseline("brotli-11", None, "brotli", _brotli_compress, _brotli_decompress),
    Baseline("png", "image", "pillow", _png_compress, _load_picture),
    Baseline("webp", "image", "pillow", _webp_compress, _load_picture),
    Baseline("flac", "speech", "soundfile", _flac_compress, _flac_decompress),
)


def list_baselines(modality: str) -> tuple[str, ...]:
    """Names of the installed baselines for data of this modality."""
    return tuple(b.name for b in BASELINES if b.modality in (None, modality) and b.is_installed)


def baseline_rows(
    dataset: Dataset, names: tuple[str, ...] | None = None, stream: bool = True, progress: bool = True
) -> pd.DataFrame:
    """One row a chunk and baseline and, with `stream`, one row a baseline for all chunks as one stream.

    `names`: None for `list_baselines`. Columns are those of `results.ROW_COLUMNS`; params, step and tokens are null,
    protocol is "lossless": each output was decoded to the bytes it came from. `Error` for an unknown baseline, one for
    another modality, one whose package is not installed, or one that does not give the bytes back.
    """
    chosen = [_find(name, dataset.modality) for name in (names or list_baselines(dataset.modality))]
    rows = []
    with tqdm(total=len(chosen) * len(dataset.chunks), desc="baselines", disable=not progress, delay=2) as bar:
        for baseline in chosen:
            for number, chunk in enumerate(dataset.chunks):
                rows.append(_row(baseline, dataset, number, chunk))
                bar.update()
            if stream:
                rows.append(_row(baseline, dataset, STREAM_CHUNK, b"".join(dataset.chunks)))
    return check_rows(pd.DataFrame(rows, columns=list(ROW_COLUMNS)))


def _find(name: str, modality: str) -> Baseline:
    baseline = next((b for b in BASELINES if b.name == name and b.modality in (None, modality)), None)
    if baseline is None:
        names = ", ".join(b.name for b in BASELINES if b.modality in (None, modality))
        raise Error(f"no baseline for {modality} is called {name!r}; there are {names}")
    if not baseline.is_installed:
        raise Error(f"baseline {name} needs the package {baseline.package}; install llmcomp[baselines]")
    return baseline


def _row(baseline: Baseline, dataset: Dataset, number: int, data: bytes) -> dict[str, Any]:
    start = time.perf_counter()
    pieces = [data]
    if baseline.modality == "image":
        pieces = [data[at : at + _PICTURE_BYTES] for at in range(0, len(data), _PICTURE_BYTES)]
    coded = [baseline.compress(piece) for piece in pieces]
    seconds = time.perf_counter() - start
    if b"".join(map(baseline.decompress, coded)) != data:
        raise Error(f"{baseline.name} does not give back chunk {number} of {dataset.name}")
    coded_bytes = sum(map(len, coded))
    return {
        "model": baseline.name,
        "params": None,
        "step": None,
        "dataset": dataset.name,
        "modality": dataset.modality,
        "protocol": "lossless",
        "mapping": "",
        "chunk": number,
        "bytes_in": len(data),
        "bytes_scored": len(data),
        "tokens": None,
        "ideal_bits": float("nan"),
        "coded_bytes": coded_bytes,
        "side_bits": 0,
        "ratio": coded_bytes / len(data),
        "seconds": seconds,
        "engine": baseline.library,
        "backend": "",
        "device": "cpu",
        "dtype": "",
        "weights_sha256": "",
        "version": metadata.version("llmcomp"),
    }

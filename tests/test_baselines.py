"""Baselines: sizes as the libraries alone give them, rows that fit the results table, figures known beforehand."""

import bz2
import gzip
import importlib.util
import io
import lzma
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from llmcomp.baselines import BASELINES, baseline_rows, list_baselines
from llmcomp.datasets import Dataset, load_dataset
from llmcomp.errors import Error
from llmcomp.results import ROW_COLUMNS, STREAM_CHUNK, cells

DATA = Path(os.environ.get("LLMCOMP_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
needs_data = pytest.mark.skipif(not (DATA / "enwik8.head").exists(), reason=f"real sample files are not in {DATA}")


def dataset_of(modality: str, *chunks: bytes) -> Dataset:
    return Dataset("some", modality, chunks, ("",) * len(chunks), 2048, None, "", "")


RAMP = bytes(range(256)) * 8
NOISE = np.random.default_rng(2).bytes(2048)


def coded_bytes(dataset: Dataset, name: str) -> dict[int, int]:
    rows = baseline_rows(dataset, (name,), progress=False)
    return dict(zip(rows["chunk"], rows["coded_bytes"], strict=True))


def test_byte_compressors_are_the_libraries_own() -> None:
    dataset = dataset_of("text", RAMP, NOISE)
    for name, compress in (
        # Header and trailer of gzip (RFC 1952) are 18 bytes around raw deflate; zlib's are 6.
        ("gzip-9", lambda data: b"0" * 12 + zlib.compress(data, 9)),
        ("bzip2-9", bz2.compress),
        ("xz-9e", lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    ):
        expected = {0: RAMP, 1: NOISE, STREAM_CHUNK: RAMP + NOISE}
        assert coded_bytes(dataset, name) == {chunk: len(compress(data)) for chunk, data in expected.items()}


def test_optional_compressors_are_the_libraries_own() -> None:
    zstandard, brotli = pytest.importorskip("zstandard"), pytest.importorskip("brotli")
    dataset = dataset_of("text", RAMP, NOISE)
    assert coded_bytes(dataset, "zstd-19")[0] == len(zstandard.compress(RAMP, 19))
    assert coded_bytes(dataset, "brotli-11")[1] == len(brotli.compress(NOISE, quality=11, lgwin=24))


def test_pictures_are_64_columns_wide() -> None:
    grey = np.add.outer(np.arange(32), 3 * np.arange(64)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG", optimize=True)
    found = coded_bytes(dataset_of("image", grey.tobytes(), RAMP), "png")
    assert found[0] == len(file.getvalue())
    assert found[0] < len(gzip.compress(grey.tobytes(), 9))
    assert coded_bytes(dataset_of("image", grey.tobytes()), "webp")[0] < 2048


def test_pictures_of_more_rows_than_webp_takes() -> None:
    half = bytes(256 * 32 * 64)
    found = coded_bytes(dataset_of("image", half, half), "webp")
    assert found[STREAM_CHUNK] < len(half) / 100


def test_flac_is_16_bit_speech() -> None:
    tone = (3000 * np.sin(np.arange(1024) / 9)).astype("<i2")
    file = io.BytesIO()
    soundfile.write(file, tone, 16_000, format="FLAC", subtype="PCM_16", compression_level=1.0)
    dataset = dataset_of("speech", tone.tobytes(), NOISE)
    assert coded_bytes(dataset, "flac")[0] == len(file.getvalue())
    assert coded_bytes(dataset, "flac")[1] > 2048


@pytest.mark.parametrize("modality", ["text", "image", "speech"])
def test_rows_of_the_bundled_samples(modality: str) -> None:
    dataset = load_dataset(modality, 6, progress=False)
    rows = baseline_rows(dataset, progress=False)
    assert list(rows.columns) == list(ROW_COLUMNS)
    names = {b.name for b in BASELINES if b.modality in (None, modality) and b.is_installed}
    assert set(rows["model"]) == names == set(list_baselines(modality))
    assert len(rows) == 7 * len(names)
    chunks, streams = rows[rows["chunk"] >= 0], rows[rows["chunk"] == STREAM_CHUNK]
    assert (chunks["bytes_in"] == 2048).all()
    assert (streams["bytes_in"] == 6 * 2048).all()
    assert rows["params"].isna().all()
    assert rows["step"].isna().all()
    assert np.allclose(rows["ratio"], rows["coded_bytes"] / rows["bytes_in"])
    assert set(cells(rows)["unit"]) == {"chunk", "stream"}
    assert (rows["engine"] != "").all()
    assert len(baseline_rows(dataset, ("gzip-9",), stream=False, progress=False)) == 6


def test_unknown_and_missing_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = dataset_of("text", RAMP)
    with pytest.raises(Error, match="no baseline for text is called 'png'; there are gzip-9"):
        baseline_rows(text, ("png",), progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list_baselines("text") == ("gzip-9", "bzip2-9", "xz-9e")
    with pytest.raises(Error, match=r"zstd-19 needs the package zstandard; install llmcomp\[baselines\]"):
        baseline_rows(text, ("zstd-19",), progress=False)


@needs_data
@pytest.mark.parametrize(
    ("spec", "name", "ratio"),
    [
        ("enwik8=enwik8.head", "gzip-9", 0.492),
        ("enwik8=enwik8.head", "xz-9e", 0.534),
        ("image=imagenet-val", "gzip-9", 0.783),
        ("image=imagenet-val", "xz-9e", 0.735),
        ("image=imagenet-val", "png", 0.674),
        ("speech=librispeech", "gzip-9", 0.840),
        ("speech=librispeech", "xz-9e", 0.816),
        ("speech=librispeech", "flac", 0.564),
    ],
)
def test_figures_of_real_files(spec: str, name: str, ratio: float) -> None:
    """As measured before this code was written, a chunk at a time, on other chunks of the same files."""
    dataset = load_dataset(spec.replace("=", f"={DATA}/"), 128, progress=False)
    rows = baseline_rows(dataset, (name,), stream=False, progress=False)
    assert rows["ratio"].mean() == pytest.approx(ratio, abs=0.035)

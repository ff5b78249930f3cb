"""Baselines: sizes as the libraries alone give them, rows that fit the results table, figures known beforehand."""

import bz2
import csv
import gzip
import importlib.util
import io
import lzma
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from real_data import DATA, needs_data
from scipy.special import digamma

from llmcomp import pico
from llmcomp.data.datasets import Dataset, load_dataset
from llmcomp.data.tokenizers import Tokenizer
from llmcomp.errors import Error
from llmcomp.experiment.sweep import sweep
from llmcomp.models.load import load_model
from llmcomp.models.sources import find_model
from llmcomp.results import ROW_COLUMNS, STREAM_CHUNK, cells
from llmcomp.scoring.baselines import (
    BASELINES,
    RandomDirichlet,
    RandomWeights,
    baseline_rows,
    list_baselines,
    random_models,
)
from llmcomp.scoring.score import score


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


@pytest.mark.parametrize(("modality", "name"), [("image", "png"), ("image", "webp"), ("speech", "flac")])
def test_chunks_that_are_no_whole_rows_or_samples(modality: str, name: str) -> None:
    """Filled up with zeros; `baseline_rows` itself compares what comes back."""
    found = coded_bytes(dataset_of(modality, RAMP[:1001], b"x", RAMP), name)
    whole = coded_bytes(dataset_of(modality, RAMP[:1001] + bytes(-1001 % 64 if modality == "image" else 1)), name)
    assert found[0] == whole[0] and set(found) == {0, 1, 2, STREAM_CHUNK}


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
    with pytest.raises(Error, match=r"zstd-19 needs the package zstandard; install llmcomp-exact\[baselines\]"):
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


# Models that know nothing.


# The protocol's clamp at 1e-10 is a millionth above the lowest probabilities, which were scaled after they were raised.
CLAMPED = 1e-7


def published_random_ratios(dataset: str) -> dict[int, float]:
    with (DATA / "published_random_baseline.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == dataset]
    return {int(row["chunk_id"]): float(row["compression_ratio"]) for row in rows}


@pytest.fixture(scope="module")
def pythia_dirichlet(pythia_tokenizer: Tokenizer) -> RandomDirichlet:
    return RandomDirichlet(pythia_tokenizer)


@needs_data
def test_the_published_random_baseline_of_text_chunk_for_chunk(pythia_dirichlet: RandomDirichlet) -> None:
    numbers = range(0, 1536, 64)
    text = (DATA / "enwik8.head").read_bytes()
    chunks = [text[2048 * number :][:2048] for number in numbers]
    rows = score(chunks, pythia_dirichlet, protocol="published", progress=False)
    published = published_random_ratios("enwik8")
    assert rows["ratio"].to_numpy() == pytest.approx([published[number] for number in numbers], rel=CLAMPED)
    assert rows["params"].isna().all() and rows["step"].isna().all()


@needs_data
def test_the_published_random_baseline_of_images_is_of_generated_pictures(pythia_dirichlet: RandomDirichlet) -> None:
    """Its notebook could not load ImageNet and made pictures: waves, noise of RandomState(42), edges in every fifth."""
    rng = np.random.RandomState(42)
    y, x = np.mgrid[:32, :64].astype(float)
    waves = 128 + 40 * np.sin(x / 20) * np.cos(y / 15) + 20 * np.sin(x / 8) * np.sin(y / 6)
    waves += 10 * np.sin(x / 3) * np.cos(y / 4)
    pictures = [np.clip(waves + rng.normal(0, 15, (32, 64)), 0, 255).astype(np.uint8) for _ in range(11)]
    for picture in pictures[::5]:
        picture[:, 30:34] += np.uint8(50)  # wraps, as it did
    rows = score([p.tobytes() for p in pictures], pythia_dirichlet, protocol="published", progress=False)
    published = published_random_ratios("imagenet")
    assert rows["ratio"].to_numpy() == pytest.approx([published[number] for number in range(11)], rel=CLAMPED)


@needs_data
def test_a_token_s_bits_are_those_of_the_distribution(pythia_dirichlet: RandomDirichlet) -> None:
    probabilities = pythia_dirichlet.probabilities[:50254]
    assert probabilities.sum() == pytest.approx(1, rel=1e-12)
    bits, above = -np.log2(probabilities), probabilities > 1.01 * RandomDirichlet.FLOOR
    # A Gamma(0.1) variate below x has probability x^0.1 / Gamma(1.1) for small x; there are 50,254 of sum 5,025.
    assert 1 - above.mean() == pytest.approx((1e-10 * 5025.4) ** 0.1 / 0.9513508, abs=0.006)
    # Without the floor the mean is (psi(0.1 V) - psi(0.1)) / ln 2; below it bits are exponential of mean 10 / ln 2.
    expected = (digamma(5025.4) - digamma(0.1) - 10 * (1 - above.mean())) / np.log(2)
    assert bits.mean() == pytest.approx(expected, abs=0.15)


def test_the_random_distribution_codes_and_decodes() -> None:
    model = RandomDirichlet(Tokenizer.from_file(pico.tokenizer_path()))
    for mapping in ("bytes", "latin1", "shift", "ascii"):
        rows = score([RAMP[:300], NOISE[:300]], model, mapping=mapping, verify=True, progress=False)
        assert (rows["ratio"] > 1).all()


def test_random_weights_are_the_seed_s_and_know_nothing() -> None:
    source = find_model("pico-13k", 128)
    one, two, other = (
        RandomWeights(source),
        pickle.loads(pickle.dumps(RandomWeights(source))),
        RandomWeights(source, seed=1),
    )
    tokens = np.arange(40).reshape(1, 40)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert (one.logits(tokens) == two.logits(tokens)).all()
    assert (
        one.weights_sha256 == two.weights_sha256 != other.weights_sha256 != load_model(source.name, 128).weights_sha256
    )
    rows = score([pico.sample_path("text").read_bytes()[:2048], NOISE], one, verify=True, progress=False)
    assert set(rows["model"]) == {"random-weights"} and rows["params"].isna().all()
    # Of 1,024 entries: ten bits a token, and what logits of deviation 0.02 sqrt(32) add.
    assert (rows["ideal_bits"] / rows["tokens"]).to_numpy() == pytest.approx(10, abs=0.1)


@pytest.mark.filterwarnings("ignore:.*sees 512 tokens")
def test_random_models_in_a_sweep(tmp_path: Path) -> None:
    rows = sweep(
        ["pico-28k", "pico-13k"], [128], "text", tmp_path, n_chunks=2, protocol=["lossless", "published"], verify=True,
        baselines=True, progress=False,
    )  # fmt: skip
    assert rows.attrs["failed"] == []
    random = rows[rows["model"].str.startswith("random-")]
    assert {(row.model, row.protocol, row.mapping) for row in random.itertuples()} == {
        (model, *how)
        for model in ("random-weights", "random-dirichlet")
        for how in (("lossless", "bytes"), ("published", "ascii"))
    }
    assert random["params"].isna().all() and len(random) == 2 * 2 * 2
    smallest = random_models(find_model("pico-13k", 128))[0]
    assert set(random[random["model"] == "random-weights"]["weights_sha256"]) == {smallest.weights_sha256}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    sweep(
        ["pico-28k", "pico-13k"], [128], "text", tmp_path, n_chunks=2, protocol=["lossless", "published"], verify=True,
        baselines=True, progress=False,
    )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")} == before

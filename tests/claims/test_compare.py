"""compare: bits per byte as counted by score, and an interval that holds at its level where chunks resemble others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tiny_models import TRAINING_TEXT, TinyModel

import llmcomp
from llmcomp import Error
from llmcomp.claims.compare import compare_rows
from llmcomp.cli.main import main

CHUNK = 2048


def rows_of(bits: np.ndarray, name: str, n_bytes: np.ndarray | None = None) -> pd.DataFrame:
    n_bytes = np.full(len(bits), CHUNK) if n_bytes is None else n_bytes
    columns = {
        "model": name, "params": 1, "step": pd.NA, "dataset": "simulated", "modality": "text", "protocol": "published",
        "mapping": "ascii", "chunk": range(len(bits)), "bytes_in": n_bytes, "bytes_scored": n_bytes, "tokens": 600,
        "ideal_bits": bits, "coded_bytes": pd.NA, "side_bits": 0, "ratio": bits / (8 * n_bytes), "seconds": 0.0,
        "engine": "", "backend": "", "device": "", "dtype": "", "weights_sha256": "", "version": "",
    }  # fmt: skip
    return pd.DataFrame(columns)


def planted(
    rng: np.random.Generator, n_documents: int, n_chunks: int, effect: float
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Documents that differ from one another, and in how much better a is on them (`effect` bits a byte on average)."""
    documents = np.repeat(np.arange(n_documents), n_chunks)
    hardness = rng.normal(4, 0.5, n_documents)[documents]
    gain = rng.normal(effect, 0.05, n_documents)[documents] + rng.normal(0, 0.02, len(documents))
    base = CHUNK * hardness
    return rows_of(base + CHUNK * gain, "a"), rows_of(base, "b"), [f"d{number}" for number in documents]


@pytest.mark.slow
def test_the_interval_over_documents_holds_at_its_level_and_one_over_chunks_would_not() -> None:
    rng = np.random.default_rng(5)
    held = naive = 0
    n_runs = 400
    for _ in range(n_runs):
        a, b, documents = planted(rng, 12, 20, effect=0.03)
        found = compare_rows(a, b, documents)
        held += found.low <= 0.03 <= found.high
        each = (a["ratio"] - b["ratio"]).to_numpy() * 8
        half = stats.t(len(each) - 1).ppf(0.975) * each.std(ddof=1) / len(each) ** 0.5
        naive += abs(each.mean() - 0.03) <= half
    # 95 % of 400 is 380, with a standard deviation of 4.4.
    assert 365 <= held <= 394
    assert naive < 300


@pytest.mark.slow
def test_no_difference_is_found_where_there_is_none_and_one_where_there_is() -> None:
    rng = np.random.default_rng(6)
    found = [compare_rows(*planted(rng, 20, 5, effect=0.0)).better for _ in range(200)]
    assert found.count(None) >= 180
    large = compare_rows(*planted(rng, 20, 5, effect=-0.2))
    assert large.better == "a" and "means something" in large.verdict and large.p_value < 1e-6
    assert large.wins == 20 and compare_rows(*planted(rng, 20, 5, effect=0.2)).better == "b"


def test_the_difference_weighs_bytes_alike() -> None:
    n_bytes = np.array([100, 900, 300, 400, 500, 600])
    bits_a, bits_b = np.array([90.0, 2000, 800, 900, 1000, 1400]), np.array([100.0, 1900, 700, 950, 1000, 1500])
    found = compare_rows(rows_of(bits_a, "a", n_bytes), rows_of(bits_b, "b", n_bytes))
    d = (bits_a - bits_b).sum() / n_bytes.sum()
    assert found.difference == pytest.approx(d) and found.bits_per_byte_a == pytest.approx(bits_a.sum() / 2800)
    # By the delete-one jackknife, which the linearised error is close to but not made of.
    left_out = [
        (np.delete(bits_a - bits_b, i).sum()) / np.delete(n_bytes, i).sum() for i in range(6)
    ]  # fmt: skip
    jackknife = math.sqrt(5 / 6 * sum((x - np.mean(left_out)) ** 2 for x in left_out))
    assert found.stderr == pytest.approx(jackknife, rel=0.3)
    assert found.unit == "documents" and found.clusters == 6


def test_chunks_of_one_document_are_taken_as_stretches_and_told_so() -> None:
    rng = np.random.default_rng(7)
    # One long document whose gain drifts: neighbours are alike.
    gain = np.convolve(rng.normal(0, 1, 500), np.ones(100) / 100, "valid")[:400]
    bits = np.full(400, 4000.0)
    found = compare_rows(rows_of(bits + CHUNK * gain, "a"), rows_of(bits, "b"), ["book"] * 400)
    assert found.unit == "stretches" and found.clusters == 20 and found.documents == 1
    chunks = compare_rows(rows_of(bits + CHUNK * gain, "a"), rows_of(bits, "b"), [str(i) for i in range(400)])
    assert found.stderr > 2.5 * chunks.stderr
    assert "says little" in found.verdict


def test_too_few_documents_have_no_interval() -> None:
    found = compare_rows(rows_of(np.array([1.0, 2, 3]), "a"), rows_of(np.array([2.0, 3, 3]), "b"))
    assert math.isnan(found.low) and found.better is None and "too few" in found.verdict


def test_a_model_does_not_differ_from_itself() -> None:
    documents = [TRAINING_TEXT[i * 40 : i * 40 + 40] for i in range(8)]
    found = llmcomp.compare(TinyModel(), TinyModel(), documents, progress=False)
    assert found.difference == 0 and found.better is None and "no difference" in found.verdict


def test_bits_are_those_of_score() -> None:
    documents = [TRAINING_TEXT[i * 40 : i * 40 + 40] for i in range(8)]
    good, bad = TinyModel(name="good"), TinyModel(name="bad")
    bad._by_token = bad._by_token * 0.2
    found = llmcomp.compare(good, bad, documents, progress=False)
    for model, bits_per_byte in ((good, found.bits_per_byte_a), (bad, found.bits_per_byte_b)):
        rows = llmcomp.score(documents, model, progress=False)
        assert bits_per_byte == pytest.approx(8 * (rows["coded_bytes"].sum()) / 320)
    assert found.better == "good" and found.documents == 8


def test_documents_are_what_the_data_set_says() -> None:
    text = llmcomp.load_dataset("text", 6, 256)
    assert (found := llmcomp.compare(TinyModel(), TinyModel(), text, progress=False)).documents == 1
    assert found.unit == "chunks" and found.clusters == 6


def test_stretches_are_of_neighbours_in_the_document_however_chunks_were_drawn() -> None:
    rng = np.random.default_rng(8)
    gain = np.convolve(rng.normal(0, 1, 500), np.ones(100) / 100, "valid")[:400]
    drawn = rng.permutation(400)
    a, b = rows_of(4000 + CHUNK * gain[drawn], "a"), rows_of(np.full(400, 4000.0), "b")
    in_order = compare_rows(rows_of(4000 + CHUNK * gain, "a"), b, ["book"] * 400)
    found = compare_rows(a.assign(document="book", offset=drawn * CHUNK), b)
    assert found.unit == "stretches" and found.stderr == pytest.approx(in_order.stderr)


@pytest.mark.parametrize("level", [0, 1, -1, math.nan])
def test_levels(level: float) -> None:
    with pytest.raises(Error, match="level"):
        compare_rows(rows_of(np.ones(6), "a"), rows_of(np.ones(6), "b"), level=level)


def test_rows_of_other_chunks_are_not_compared() -> None:
    with pytest.raises(Error, match="same chunks"):
        compare_rows(rows_of(np.ones(6), "a"), rows_of(np.ones(7), "b"))
    with pytest.raises(Error, match="same chunks"):
        compare_rows(rows_of(np.ones(6), "a"), rows_of(np.ones(6), "b", np.full(6, 100)))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset", "text", "--chunks", "16", "--chunk-bytes", "512", "-q"]
    assert main(["compare", "pico-13k", "pico-13k@128", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["better"] == "pico-13k step2048" and found["b"] == "pico-13k step128"
    assert found["low"] <= found["difference"] <= found["high"] < 0
    assert main(["compare", "pico-13k", "pico-13k@128", *options]) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out and "pico-13k step128" in out and "means something" in out
    assert main(["score", "pico-13k", *options, "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)
    assert cell["bits_per_byte"] == pytest.approx(found["bits_per_byte_a"])
    assert main(["compare", "pico-13k", "pico-13k@7", *options]) == 1

"""Rows of both protocols against their formulas, written here once more: softmaxes one token at a time, summed exactly;
and what cannot be scored."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from real_data import DATA
from tiny_models import TRAINING_TEXT, HashModel, TinyModel, rows_by_hand

from llmcomp import compress, results, score
from llmcomp.codec.segments import SegmentCodec
from llmcomp.data import mappings, tokenizers
from llmcomp.data.datasets import load_dataset
from llmcomp.errors import CorruptArchive, Error
from llmcomp.models.load import load_model

TINY = TinyModel()
TINY_TOKENIZER = tokenizers.ByteTokenizer()
CHUNKS = [TRAINING_TEXT[:200], bytes(100), TRAINING_TEXT[200:300], bytes(range(128, 228)), b"x"]


def log2_softmax(row: np.ndarray, token: int) -> float:
    """By math.fsum, independent of numpy's softmax and of the coder."""
    largest = float(row.max())
    return (float(row[token]) - largest) / math.log(2) - math.log2(math.fsum(math.exp(float(x) - largest) for x in row))


# Lossless.


@pytest.mark.parametrize("mapping", [None, *mappings.MAPPINGS])
def test_lossless_rows(mapping):
    rows = score(CHUNKS, TINY, mapping=mapping, overlap=5, progress=False)
    results.check_rows(rows)
    assert rows["chunk"].tolist() == list(range(len(CHUNKS)))
    assert (rows["protocol"] == "lossless").all() and (rows["mapping"] == (mapping or "bytes")).all()
    segment_codec = SegmentCodec(TINY, mapping or "bytes", 5)
    for row, chunk, coded in zip(rows.itertuples(), CHUNKS, segment_codec.encode(CHUNKS), strict=True):
        encoded = mappings.get_mapping(mapping or "bytes").encode(chunk, TINY_TOKENIZER)
        logits = rows_by_hand(TINY, encoded.tokens, 0, 24, 5)
        ideal = -sum(log2_softmax(line, token) for line, token in zip(logits, encoded.tokens, strict=True))
        assert row.bytes_in == row.bytes_scored == len(chunk)
        assert row.tokens == len(encoded.tokens)
        assert abs(row.ideal_bits - ideal) < 1e-4 * len(encoded.tokens)
        assert row.coded_bytes == len(coded.stream)
        assert row.side_bits == encoded.side_bits
        assert 8 * row.coded_bytes <= row.ideal_bits * (1 + 1e-4) + 16
        assert segment_codec.decode([coded.payload], [len(chunk)]) == [chunk]


@pytest.mark.parametrize("mapping", mappings.MAPPINGS)
def test_every_mapping_s_payloads_of_random_bytes_decode(mapping, pythia_tokenizer):
    """With a bundled model, and with a vocabulary that lacks 13 bytes; `verify` compares every chunk."""
    rng = random.Random(11)
    chunks = [rng.randbytes(n) for n in (1, 2, 300)] + [bytes(range(256)), rng.randbytes(100) + TRAINING_TEXT[:100]]
    for model in (load_model("pico-13k"), HashModel(pythia_tokenizer)):
        rows = score(chunks, model, mapping=mapping, verify=True, progress=False)
        assert rows["bytes_in"].tolist() == [len(chunk) for chunk in chunks]


def test_score_of_a_data_set_and_its_verification(monkeypatch):
    data = SimpleNamespace(name="sample", modality="text", chunks=CHUNKS)
    rows = score(data, TinyModel(name="m", step=7, n_params=12), verify=True, progress=False)
    assert set(rows["dataset"]) == {"sample"} and set(rows["modality"]) == {"text"}
    assert set(rows["model"]) == {"m"} and set(rows["step"]) == {7} and set(rows["params"]) == {12}
    assert len(score([], TINY, progress=False)) == 0
    real = SegmentCodec.decode
    monkeypatch.setattr(SegmentCodec, "decode", lambda *args: [b"?", *real(*args)[1:]])
    with pytest.raises(CorruptArchive, match="1 of 5 chunks"):
        score(data, TINY, verify=True, progress=False)


def test_scores_of_an_engine_that_cannot_repeat_its_steps():
    """One pass unless every payload is to be decoded again; the archive always steps."""

    class OnePass(TinyModel):
        def session(self, n_streams):
            raise AssertionError("stepped")

    model = OnePass(engine="torch")
    expected = score(CHUNKS, TINY, progress=False)["coded_bytes"]
    assert score(CHUNKS, model, progress=False)["coded_bytes"].equals(expected)
    for call in (
        lambda: score(CHUNKS, model, verify=True, progress=False),
        lambda: compress(TRAINING_TEXT, model, stock=False),
    ):
        with pytest.raises(AssertionError, match="stepped"):
            call()


def test_score_batches_do_not_matter(monkeypatch):
    volatile = ["seconds"]
    expected = score(CHUNKS, TINY, progress=False).drop(columns=volatile)
    monkeypatch.setattr("llmcomp.scoring.score._SCORE_BATCH_BYTES", 1)
    assert score(CHUNKS, TINY, progress=False).drop(columns=volatile).equals(expected)


# Published.


def published_ratio(chunk: bytes, model, tokenizer, limit: int) -> float:
    """The published computation, restated: no batches, no clever order, exact sums."""
    text = "".join(chr(byte % 128) for byte in chunk)
    ids = tokenizer.encode_text(text).tolist()[:limit]
    bits = 0.0
    for at in range(1, len(ids)):
        state, row = model.row(0, ids[0])
        for token in ids[1:at]:
            state, row = model.row(state, token)
        bits += -math.log2(max(2.0 ** log2_softmax(row, ids[at]), 1e-10))
    return bits / (8 * len(chunk))


def test_published_rows_equal_a_straight_restatement(pico_tokenizer):
    model = TinyModel(context_length=1500, tokenizer=pico_tokenizer)
    rng = random.Random(3)
    chunks = [TRAINING_TEXT[:300], rng.randbytes(200), "Grüße e\u0301 <|endoftext|>".encode() * 5, b"x" * 90]
    rows = score(chunks, model, protocol="published", progress=False)
    results.check_rows(rows)
    assert rows["chunk"].tolist() == [0, 1, 2, 3]
    for row, chunk in zip(rows.itertuples(), chunks, strict=True):
        assert abs(row.ratio - published_ratio(chunk, model, pico_tokenizer, 1024)) < 1e-6
        assert row.bytes_scored == len(chunk)
    assert rows["coded_bytes"].isna().all() and (rows["side_bits"] == 0).all()
    assert set(rows["mapping"]) == {"ascii"}


def test_published_protocol_is_cut_at_the_model_s_context(pico_tokenizer):
    model = TinyModel(context_length=50, tokenizer=pico_tokenizer)
    chunks = [TRAINING_TEXT[:300], random.Random(3).randbytes(200)]
    with pytest.warns(UserWarning, match="50 tokens"):
        rows = score(chunks, model, protocol="published", progress=False)
    for row, chunk in zip(rows.itertuples(), chunks, strict=True):
        assert abs(row.ratio - published_ratio(chunk, model, pico_tokenizer, 50)) < 1e-6
        kept = pico_tokenizer.encode_text("".join(chr(byte % 128) for byte in chunk))[:50]
        assert row.tokens == 49
        assert row.bytes_scored == sum(len(pico_tokenizer.token_bytes(int(token))) for token in kept) < len(chunk)


def test_published_protocol_clamps_and_drops(pico_tokenizer):
    class Sure(TinyModel):
        """All probability on one token: every other is clamped to 1e-10, which costs 33.2 bits."""

        def logits(self, inputs):
            logits = np.full((*np.shape(inputs), self.n_logits), -1e4, np.float32)
            logits[..., self.sure] = 1e4
            return logits

    byte = {chr(value): int(pico_tokenizer.encode_text(chr(value))[0]) for value in (97, 98)}
    model = Sure(context_length=2000, tokenizer=pico_tokenizer, sure=byte["b"])
    chunk = random.Random(0).randbytes(100)
    row = score([chunk], model, protocol="published", progress=False).iloc[0]
    ids = pico_tokenizer.encode_text("".join(chr(value % 128) for value in chunk)).tolist()
    n_wrong = sum(token != byte["b"] for token in ids[1:])
    assert row["ideal_bits"] == pytest.approx(n_wrong * -math.log2(1e-10), abs=1e-6)
    # A chunk of one token has ratio 0, below the filter's 0.01.
    assert score([b"b"], model, protocol="published", progress=False).empty


# Both.


def test_scores_that_cannot_be_made():
    with pytest.raises(Error, match="protocol"):
        score(CHUNKS, TINY, protocol="lossy", progress=False)
    with pytest.raises(Error, match="mapping"):
        score(CHUNKS, TINY, protocol="published", mapping="bytes", progress=False)
    for chunks in (b"one", "text", Path("file"), ["text"], [3], [[1, 2]]):
        with pytest.raises(Error, match=r"expected (several )?bytes"):
            score(chunks, TINY, progress=False)
    with pytest.raises(Error, match="is a class"):
        score(CHUNKS, TinyModel, progress=False)
    expected = score(CHUNKS, TINY, progress=False)["coded_bytes"]
    for chunks in (iter(CHUNKS), pd.Series(CHUNKS, index=range(7, 7 + len(CHUNKS)))):
        assert score(chunks, TINY, progress=False)["coded_bytes"].equals(expected)
    with pytest.raises(Error, match="chunk 1 is empty"):
        score([b"x", b""], TINY, progress=False)


REAL = {"enwik8": "enwik8.head", "image": "imagenet-val", "speech": "librispeech"}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_chunks_under_both_protocols(name, pythia_tokenizer):
    """Published: the formula restated on the same logits. Lossless: every payload decodes, all bytes are scored."""
    chunks = load_dataset(f"{name}={DATA / REAL[name]}", 2, progress=False).chunks
    model = HashModel(pythia_tokenizer, context_length=1024)
    rows = score(chunks, model, protocol="published", progress=False)
    for row, chunk in zip(rows.itertuples(), chunks, strict=True):
        ids = pythia_tokenizer.encode_text("".join(chr(byte % 128) for byte in chunk))[:1024]
        logits = model.logits(ids[None])[0, :-1].astype(np.float64)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]] - np.logaddexp.reduce(logits, axis=1)
        bits = math.fsum(-math.log2(max(math.exp(x), 1e-10)) for x in chosen)
        assert row.ratio == pytest.approx(bits / (8 * 2048), abs=1e-6)
        assert row.bytes_scored == 2048 if name == "enwik8" else row.bytes_scored < 1800
    rows = score(chunks, model, verify=True, progress=False)
    assert (rows["bytes_scored"] == 2048).all()

"""Bits by position are the model's own and add up to the score; a model's size is counted as Delétang et al. do."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax
from tiny_models import TinyModel

import llmcomp
from llmcomp import plot

CHUNKS = [b"The archive keeps every byte.", b"The model guesses", bytes(range(200, 256))]


def test_bits_of_a_byte_model_are_its_log_softmax() -> None:
    model = TinyModel(context_length=64)
    found = llmcomp.bits_by_position(CHUNKS, model, "token", progress=False)
    assert found.shape == (3, 56)
    for chunk, row in zip(CHUNKS, found, strict=True):
        tokens = np.frombuffer(chunk, np.uint8).astype(np.int64)
        logits = model.logits(np.concatenate([[0], tokens[:-1]])[None])[0].astype(np.float64)
        expected = -log_softmax(logits, axis=1)[np.arange(len(tokens)), tokens] / np.log(2)
        np.testing.assert_allclose(row[: len(tokens)], expected, atol=2e-5)
        assert np.isnan(row[len(tokens) :]).all()


@pytest.mark.parametrize("unit", ["token", "byte"])
def test_rows_add_up_to_the_score(unit: str) -> None:
    data = llmcomp.load_dataset("speech", 2)
    found = llmcomp.bits_by_position(data, "pico-13k", unit, progress=False)
    rows = llmcomp.score(data, "pico-13k", progress=False)
    np.testing.assert_allclose(np.nansum(found, axis=1), rows["ideal_bits"], rtol=1e-12)
    assert found.shape == (2, 2048 if unit == "byte" else rows["tokens"].max())


def test_a_token_is_spread_over_its_bytes() -> None:
    model = llmcomp.load_model("pico-13k")
    text = "The naïve café".encode()
    by_token = llmcomp.bits_by_position([text], model, "token", progress=False)[0]
    by_byte = llmcomp.bits_by_position([text], model, "byte", progress=False)[0]
    at = 0
    for token, bits in zip(model.tokenizer.encode_bytes(text), by_token, strict=True):
        n_bytes = len(model.tokenizer.token_bytes(token))
        np.testing.assert_allclose(by_byte[at : at + n_bytes], bits / n_bytes)
        at += n_bytes
    assert at == len(text) == len(by_byte)


def test_cumulative_is_the_mean_so_far() -> None:
    plain = llmcomp.bits_by_position(CHUNKS, TinyModel(), progress=False)
    mean = llmcomp.bits_by_position(CHUNKS, TinyModel(), cumulative=True, progress=False)
    for chunk, row, means in zip(CHUNKS, plain, mean, strict=True):
        np.testing.assert_allclose(means[: len(chunk)], [row[: i + 1].mean() for i in range(len(chunk))])
        assert np.isnan(means[len(chunk) :]).all()


@pytest.mark.parametrize(
    ("chunks", "options", "message"),
    [
        ([], {}, "0 chunks"),
        ([b"a", b""], {}, "none empty"),
        (b"a", {}, "expected several bytes objects"),
        ([1], {}, "chunk 0 is a int"),
        ([b"a"], {"unit": "bit"}, "expected token, or byte"),
        ([b"a"], {"unit": "byte", "mapping": "shift"}, "with mapping shift"),
        ([b"a"], {"unit": "token", "mapping": "rot13"}, "rot13"),
    ],
)
def test_errors(chunks: list | bytes, options: dict, message: str) -> None:
    with pytest.raises(llmcomp.Error, match=message):
        llmcomp.bits_by_position(chunks, TinyModel(), **options)


def test_the_model_counts_as_deletang_et_al_count_it() -> None:
    """Chinchilla 70B on enwik9: raw 8.3 %, adjusted for its size 14,008.3 % (their table 1; two bytes a parameter)."""
    cells = llmcomp.published()
    cell = cells[cells["dataset"] == "enwik8"].iloc[[0]].assign(params=70_000_000_000, ratio=0.083, mean_ratio=0.083)
    (ax,) = plot.adjusted_ratio(pd.DataFrame(cell))
    data_bytes, adjusted = ax.lines[0].get_data()
    np.testing.assert_allclose(0.083 + (adjusted - 0.083) * data_bytes / 1e9, 140.083)

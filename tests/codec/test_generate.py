"""Sampling by decoding random bits: the bits come back, the shares are the model's, nothing else has a say."""

import hashlib

import numpy as np
import pytest
import scipy.stats
from tiny_models import TinyModel

import llmcomp
from llmcomp import coding
from llmcomp.codec import sampling
from llmcomp.codec.segments import windowed_model

PICO = "pico-13k"


class FixedRow:
    """The same logits after any token."""

    name = "fixed"
    context_length = 64

    def __init__(self, row, tokenizer=None):
        self._row = np.asarray(row, np.float32)
        self.vocab_size = self.n_logits = len(self._row)
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def logits(self, tokens):
        return np.broadcast_to(self._row, (*np.shape(tokens), len(self._row))).copy()

    def session(self, n_streams):
        return self

    def step(self, tokens):
        return self.logits(tokens)


def shared_bytes(a: bytes, b: bytes) -> int:
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


@pytest.mark.parametrize("n_known", [0, 1, 23, 24, 61])
def test_encoding_a_sample_gives_its_bits_back(n_known: int) -> None:
    model = TinyModel(context_length=24)
    known = np.arange(n_known) * 7 % 256
    payloads = [np.random.default_rng(i).bytes(2000) for i in range(3)]
    for payload, drawn in zip(payloads, sampling.sample_tokens(model, payloads, 300, known), strict=True):
        stream = np.concatenate([known, drawn]).astype(np.int32)
        parts = windowed_model(model).intervals([stream])[0][:, n_known:]
        ideal_bits = -np.log2(parts[1] / parts[2]).sum()
        # Two numbers of one interval 2^-ideal_bits wide; the last bytes lie below that width.
        assert shared_bytes(coding.encode_intervals(*parts), payload) >= ideal_bits // 8 - 1 > 100


def test_real_model_gives_its_bits_back_beyond_its_context() -> None:
    model = llmcomp.load_model(PICO)
    bits = sampling.random_bits(3, 0, 700)
    drawn = sampling.sample_tokens(model, [bits], 700)
    payload = windowed_model(model).encode(list(drawn))[0]
    assert model.context_length < 700
    assert shared_bytes(payload, bits) >= len(payload) - 2 > 100


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_shares_are_those_of_the_softmax(temperature: float) -> None:
    row = np.array([0.3, 2.0, -1.0, 0.0, 1.1, -3.0])
    payloads = [sampling.random_bits(0, stream, 1000) for stream in range(20)]
    drawn = sampling.sample_tokens(FixedRow(row), payloads, 1000, temperature=temperature)
    weights = np.exp(row / temperature)
    expected = drawn.size * weights / weights.sum()
    assert scipy.stats.chisquare(np.bincount(drawn.ravel(), minlength=6), expected).pvalue > 0.001
    # Neighbours in a stream are independent where the model says so.
    pairs = np.bincount((drawn[:, :-1:2] * 6 + drawn[:, 1::2]).ravel(), minlength=36)
    both = np.outer(weights, weights).ravel() / weights.sum() ** 2
    assert scipy.stats.chisquare(pairs, pairs.sum() * both).pvalue > 0.001


def test_random_bits_are_shake_256() -> None:
    assert sampling.random_bits(5, 2, 10) == hashlib.shake_256(b"llmcomp 5 2").digest(78)
    assert sampling.random_bits(5, 2, 20).startswith(sampling.random_bits(5, 2, 10))


def test_one_seed_gives_one_text() -> None:
    texts = set()
    for backend in llmcomp.backends():
        for n_threads in (1, 2):
            with llmcomp.use_backend(backend), llmcomp.use_threads(n_threads):
                texts.add(llmcomp.generate(PICO, 60, prefix=b"The ", seed=1))
    assert len(texts) == 1
    assert texts != {llmcomp.generate(PICO, 60, prefix=b"The ", seed=2)}


def test_streams_do_not_depend_on_their_number() -> None:
    model = llmcomp.load_model(PICO)
    many = llmcomp.generate(model, n_tokens=40, n_streams=5, seed=4)
    assert len(set(many)) == 5
    assert many[:2] == llmcomp.generate(model, n_tokens=40, n_streams=2, seed=4)
    assert many[0] == llmcomp.generate(model, n_tokens=40, seed=4)
    assert llmcomp.generate(model, n_tokens=90, seed=4).startswith(many[0])


def test_a_stepwise_model_goes_one_stream_at_a_time() -> None:
    batched, stepwise = TinyModel(context_length=24), TinyModel(context_length=24, engine="torch")
    options = {"n_bytes": 50, "prefix": b"The archive", "n_streams": 3}
    assert llmcomp.generate(batched, **options) == llmcomp.generate(stepwise, **options)


@pytest.mark.parametrize("prefix", [b"", b"In the year ", bytes(range(256)), b"\xff\xfe" * 700])
def test_prefix_is_kept_and_lengths_are_met(prefix: bytes) -> None:
    model = llmcomp.load_model(PICO)
    for n_bytes in (0, 1, 30):
        text = llmcomp.generate(model, n_bytes, prefix=prefix)
        assert text[: len(prefix)] == prefix and len(text) == len(prefix) + n_bytes
    assert llmcomp.generate(model, n_tokens=0, prefix=prefix) == prefix


def test_a_token_of_no_bytes_ends_the_text() -> None:
    tokenizer = llmcomp.load_model(PICO).tokenizer
    row = np.full(tokenizer.vocab_size, -40.0)
    row[[tokenizer.bos_token, tokenizer.encode_bytes(b"a")[0]]] = [0.0, 1.0]
    texts = llmcomp.generate(FixedRow(row, tokenizer), n_tokens=200, n_streams=50, prefix=b"b")
    assert {text.strip(b"a") for text in texts} == {b"b"}
    # The end comes after k letters with probability p^k (1 - p), p = 1 / (1 + 1 / e): e letters in the mean.
    mean = np.mean([len(text) - 1 for text in texts])
    assert abs(mean - np.e) < 4 * np.sqrt(np.e * (np.e + 1) / 50)


def test_low_temperature_takes_the_likeliest() -> None:
    row = np.linspace(0, 3, 256)
    assert llmcomp.generate(FixedRow(row), 40, temperature=1e-4) == b"\xff" * 40
    assert llmcomp.generate(FixedRow(row), 4, temperature=1e-42) == b"\xff" * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of the two"),
        ({"n_bytes": 3, "n_tokens": 3}, "one of the two"),
        ({"n_bytes": -1}, "-1"),
        ({"n_tokens": -2}, "-2"),
        ({"n_bytes": 3, "temperature": 0.0}, "temperature is 0.0"),
        ({"n_bytes": 3, "temperature": float("nan")}, "temperature is nan"),
        ({"n_bytes": 3, "n_streams": 0}, "n_streams is 0"),
        ({"n_bytes": 3, "overlap": 64}, "overlap 64"),
        ({"n_bytes": 3, "prefix": "text"}, "prefix is a str"),
    ],
)
def test_errors_say_what_was_found(options: dict, message: str) -> None:
    with pytest.raises(llmcomp.Error, match=message):
        llmcomp.generate(FixedRow(np.zeros(256)), **options)


def test_nan_is_an_error_at_any_temperature() -> None:
    row = np.zeros(256)
    row[7] = np.nan
    for temperature in (1.0, 2.0):
        with pytest.raises(llmcomp.Error, match="NaN"):
            llmcomp.generate(FixedRow(row), 3, temperature=temperature)

"""Mixed intervals: met by the second mixer, decoded from the same rows, smaller than the model's where text repeats."""

from __future__ import annotations

import mixing_oracle
import numpy as np
import oracle
import pytest

import llmcomp
from llmcomp import coding
from llmcomp.errors import Error


def rows_of(n_rows: int, vocab_size: int, seed: int, scale: float = 3) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n_rows, vocab_size)) * scale).astype(np.float32)


def tokens_of(kind: str, n: int, vocab_size: int) -> np.ndarray:
    """Streams with contexts of all orders, of none, and of one token."""
    random = np.random.default_rng(n)
    if kind == "noise":
        return random.integers(0, vocab_size, n)
    if kind == "zeros":
        return np.zeros(n, np.int64)
    phrases = [random.integers(0, vocab_size, size) for size in (2, 5, 14, 30)]
    return np.concatenate([phrases[i] for i in random.integers(0, 4, n)])[:n]


STREAMS = [
    ("phrases", 700, 40),
    ("phrases", 400, 3000),
    ("noise", 300, 5),
    ("noise", 200, 2500),
    ("zeros", 300, 7),
    ("phrases", 1, 9),
    ("noise", 0, 9),
]


@pytest.mark.parametrize(("kind", "n", "vocab_size"), STREAMS)
def test_intervals_and_payload_are_the_second_mixers(kind, n, vocab_size):
    logits, tokens = rows_of(n, vocab_size, n), tokens_of(kind, n, vocab_size)
    triples = coding.intervals(logits, tokens)
    mixed = coding.mix_intervals(tokens, *triples)
    mixer, expected = mixing_oracle.Mixer(), []
    for token, start, freq, total in zip(tokens.tolist(), *(part.tolist() for part in triples), strict=True):
        added = mixer.added(total)
        below = sum(mass for other, mass in added.items() if other < token)
        expected.append((start + below, freq + added.get(token, 0), total + sum(added.values())))
        mixer.take(token, freq, total)
    assert list(zip(*(part.tolist() for part in mixed), strict=True)) == expected
    assert coding.encode_intervals(*mixed) == oracle.encode(expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("backend", llmcomp.backends())
def test_the_decoder_gives_the_tokens_whatever_the_backend_and_threads(backend, dtype):
    streams = [
        (rows_of(300, 2100, i).astype(dtype), tokens_of(k, 300, 2100)) for i, k in enumerate(("phrases", "noise"))
    ]
    payloads = [coding.encode_intervals(*coding.mix_intervals(t, *coding.intervals(rows, t))) for rows, t in streams]
    with llmcomp.use_backend(backend):
        for n_threads in (1, 2, 8):
            with llmcomp.use_threads(n_threads):
                decoder = coding.Decoder(payloads, n_tokens_max=[300, 300])
                found = [decoder.pull(np.stack([rows[i] for rows, _ in streams])) for i in range(300)]
            assert np.array_equal(np.stack(found, 1), [tokens for _, tokens in streams])


@pytest.mark.parametrize("vocab_size", [1, 2, 64, 65, 1024, 1025, 3000])
def test_the_masses_of_a_row_sum_to_its_total(vocab_size):
    """Every token's mixed interval at one place: they follow one another from 0 to the total."""
    tokens = tokens_of("phrases", 60, vocab_size)
    logits = rows_of(61, vocab_size, 5)
    n_probed = min(vocab_size, 3000)
    end = 0
    for token in range(n_probed):
        stream = np.append(tokens, token)
        start, freq, total = coding.mix_intervals(stream, *coding.intervals(logits, stream))
        assert start[-1] == end and freq[-1] > 0
        end += int(freq[-1])
    assert end == int(total[-1]) <= 2**51


@pytest.mark.parametrize("total", [1 << 29, 1 << 50, (1 << 51) // 8 * 5])
def test_totals_stay_within_the_coders(total):
    n = 400
    start = np.zeros(n, np.uint64)
    mixed = coding.mix_intervals(np.zeros(n, np.int64), start, start + 1, np.full(n, total, np.uint64))
    assert int(mixed[2].max()) <= 2**51 and (mixed[0] + mixed[1] <= mixed[2]).all()
    assert len(coding.encode_intervals(*mixed)) < n * (np.log2(total) / 8) / 2


def test_repeated_text_gets_cheap_and_noise_hardly_dearer():
    logits = rows_of(4000, 256, 1, scale=0.1)
    for kind, least, most in (("phrases", 0.0, 0.35), ("noise", 0.99, 1.01)):
        tokens = tokens_of(kind, 4000, 256)
        triples = coding.intervals(logits, tokens)
        plain, mixed = (len(coding.encode_intervals(*t)) for t in (triples, coding.mix_intervals(tokens, *triples)))
        assert least < mixed / plain < most, kind


def test_what_cannot_be_mixed_is_an_error():
    ones = np.ones(3, np.uint64)
    with pytest.raises(Error):
        coding.mix_intervals([0, -1, 2], ones * 0, ones, ones * 9)
    with pytest.raises(Error):
        coding.mix_intervals([0, 1, 2], ones * 0, ones * 10, ones * 9)
    with pytest.raises(Error):
        coding.mix_intervals([0, 1, 2], ones * 0, ones * 0, ones * 9)
    with pytest.raises(Error):
        coding.mix_intervals([0, 1, 2], ones * 0, ones, ones * (1 << 51))
    with pytest.raises(Error):
        coding.mix_intervals([0, 1], ones, ones, ones * 9)
    with pytest.raises(Error, match="n_tokens_max"):
        coding.Decoder([b"", b""], 5, [3, -1])
    with pytest.raises(Error):
        coding.Decoder([b"", b""], 5, [3])


def test_a_decoder_stops_at_the_length_that_it_was_promised():
    logits = rows_of(3, 20, 0)
    decoder = coding.Decoder([b"abc"], n_tokens_max=[2])
    for i in range(2):
        decoder.pull(logits[i : i + 1])
    with pytest.raises(Error):
        decoder.pull(logits[2:])

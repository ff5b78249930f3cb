"""Code length, payloads and streams of every backend against the oracle, which shares no line with the C core."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from logit_rows import DISTRIBUTIONS, VOCAB_SIZES, as_triples, case, normal, triples_of

import llmcomp

BACKENDS = llmcomp.backends()
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_N_THREADS = pytest.mark.parametrize("n_threads", [1, 2])

# Code length.


def ideal_bits(logits, tokens):
    """-log2 of the softmax in binary64."""
    logits = logits.astype(np.float64)
    log_total = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)
    return (log_total - logits[np.arange(len(tokens)), tokens]) / np.log(2)


def realistic(n_rows, vocab_size, seed=1):
    """Rows like a language model's: Zipf's law under noise, tokens drawn from them; an entropy of a few bits."""
    rng = np.random.default_rng(seed)
    logits = -1.1 * np.log(np.arange(1, vocab_size + 1)) + 1.5 * rng.standard_normal((n_rows, vocab_size))
    logits = rng.permuted(logits, axis=1).astype(np.float32)
    gumbel = rng.gumbel(size=logits.shape)
    return logits, np.argmax(logits + gumbel, axis=1)


def test_code_length_is_close_to_the_softmax():
    logits, tokens = realistic(200, 50_304)
    excess = llmcomp.code_length(logits, tokens) - ideal_bits(logits, tokens)
    assert 3 < ideal_bits(logits, tokens).mean() < 12
    assert abs(excess.mean()) < 1e-4
    assert (excess < 1e-4).all()  # a rare token may cost less than in the softmax: the floor lifts it


def test_coded_bits_are_inside_the_bound_on_realistic_rows():
    logits, tokens = realistic(400, 50_304, seed=2)
    bits = llmcomp.code_length(logits, tokens).sum()
    assert 8 * len(llmcomp.encode(logits, tokens)) <= bits * (1 + 1e-5) + 16


@pytest.mark.parametrize(("vocab_size", "n_tokens"), [(200_000, 2_000), (2**21, 300)])
def test_coded_bits_are_inside_the_bound_on_the_flattest_rows(vocab_size, n_tokens):
    row = np.zeros((1, vocab_size), np.float32)
    tokens = np.random.default_rng(3).integers(0, vocab_size, n_tokens)
    start, freq, total = (np.repeat(a, n_tokens) for a in llmcomp.intervals(row, [0]))
    payload = llmcomp.encode_intervals(tokens.astype(np.uint64) * freq, freq, total)
    bits = n_tokens * np.log2(vocab_size)
    assert 8 * len(payload) <= bits * (1 + 1e-4) + 16
    assert start[0] == 0


def test_many_cheap_tokens_cost_nearly_nothing():
    """10,000 tokens of 1e-9 bits each: the range coder must not add a byte now and then."""
    freq = np.full(10_000, 2**50 - 2**20, np.uint64)
    total = np.full(10_000, 2**50, np.uint64)
    ideal = -10_000 * np.log2(1 - 2.0**-30)
    payload = llmcomp.encode_intervals(np.zeros_like(freq), freq, total)
    assert 8 * len(payload) <= ideal + 16


# Payloads.


def long_case(vocab_size, n_rows, seed):
    rng = np.random.default_rng(seed)
    logits = (4 * rng.standard_normal((n_rows, vocab_size))).astype(np.float32)
    tokens = rng.integers(0, vocab_size, n_rows)
    return logits, tokens, [oracle.weights(row) for row in logits]


@pytest.mark.parametrize("decoding_backend", BACKENDS)
@pytest.mark.parametrize("encoding_backend", [*BACKENDS, "oracle"])
def test_every_encoder_with_every_decoder(encoding_backend, decoding_backend):
    for vocab_size, n_rows in [(1, 20), (2, 300), (17, 200), (300, 150), (1500, 60)]:
        logits, tokens, weights = long_case(vocab_size, n_rows, vocab_size)
        expected = oracle.encode(triples_of(weights, tokens))
        if encoding_backend == "oracle":
            payload = expected
        else:
            with llmcomp.use_backend(encoding_backend):
                payload = llmcomp.encode(logits, tokens)
        assert payload == expected
        with llmcomp.use_backend(decoding_backend):
            assert llmcomp.decode(payload, logits).tolist() == tokens.tolist()
        assert oracle.decode(payload, [w.tolist() for w in weights]) == tokens.tolist()


@EVERY_BACKEND
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_payloads_equal_the_oracle(backend, distribution):
    with llmcomp.use_backend(backend):
        for vocab_size in VOCAB_SIZES:
            logits, tokens, weights = case(distribution, vocab_size)
            payload = llmcomp.encode(logits, tokens)
            assert payload == oracle.encode(triples_of(weights, tokens)), vocab_size
            assert llmcomp.decode(payload, logits).tolist() == tokens.tolist(), vocab_size


def test_arbitrary_payloads_decode_as_the_oracle_does():
    """Payloads that no encoder made, the all-ones bytes among them, whose number is above the first range."""
    rng = np.random.default_rng(5)
    logits, _, weights = long_case(40, 30, 6)
    row_weights = [w.tolist() for w in weights]
    payloads = [b"", b"\0", b"\xff" * 8, b"\xff" * 40, b"\0" * 20 + b"\x01", *(rng.bytes(n) for n in range(1, 60))]
    for payload, backend in itertools.product(payloads, BACKENDS):
        with llmcomp.use_backend(backend):
            assert llmcomp.decode(payload, logits).tolist() == oracle.decode(payload, row_weights)


@pytest.mark.parametrize("n_symbols", [1, 2, 9, 60])
def test_carry_runs_over_many_bytes(n_symbols):
    """Shares that all hold the number 1/2 keep the stream at 0x7F FF FF ...; a last one above it carries through."""
    total = 2**50 - 27
    low, size, half, triples = 0, 2**64 - 1, 2**63, []
    for i in range(n_symbols + 1):
        at_half = (half - low) // (size // total)
        triple = (at_half - 1, 3, total) if i < n_symbols else (at_half + 1, 1, total)
        triples.append(triple)
        below, size = oracle.share(size, *triple)
        low += below
        while size < 2**56:
            low, size, half = low << 8, size << 8, half << 8
    payload = llmcomp.encode_intervals(*(np.array(column, np.uint64) for column in zip(*triples, strict=True)))
    assert payload == oracle.encode(triples)
    without_carry = oracle.encode([*triples[:-1], (triples[-1][0] - 2, 1, total)])
    assert payload[0] == 0x80 and without_carry[: 5 * n_symbols] == b"\x7f" + b"\xff" * (5 * n_symbols - 1)


@pytest.mark.parametrize(
    "tokens", [[], [0], [2], [3, 3, 3], [1, 0, 2, 0, 3], [0] * 9, [2, 2, 1, 1], [3, 0, 3, 0, 3, 0]]
)
def test_no_shorter_payload_decodes(tokens):
    """All byte strings that are shorter than the payload, up to two bytes."""
    row = np.float32([[0.5, -1.0, 0.0, -2.5]])
    payload = llmcomp.encode(np.repeat(row, len(tokens), axis=0), tokens)
    assert len(payload) <= 3
    shorter = [bytes(b) for n in range(len(payload)) for b in itertools.product(range(256), repeat=n)]
    decoder = llmcomp.Decoder([*shorter, payload])
    alive = np.ones(len(shorter) + 1, bool)
    for token in tokens:
        alive &= decoder.pull(np.broadcast_to(row, (len(alive), 4))) == token
    assert alive.tolist() == [False] * len(shorter) + [True]


def test_empty_sequence_is_the_empty_payload():
    assert llmcomp.encode(np.zeros((0, 7), np.float32), []) == b""
    assert llmcomp.decode(b"", np.zeros((0, 7), np.float32)).shape == (0,)
    assert llmcomp.encode_intervals([], [], []) == b""
    assert llmcomp.Encoder(2).finish() == [b"", b""]
    assert llmcomp.Encoder(0).finish() == []


def test_encode_intervals_equals_encode():
    logits, tokens, weights = long_case(50, 80, 9)
    assert llmcomp.encode_intervals(*llmcomp.intervals(logits, tokens)) == llmcomp.encode(logits, tokens)
    start, freq, total = (list(column) for column in zip(*triples_of(weights, tokens), strict=True))
    assert llmcomp.encode_intervals(start, freq, total) == llmcomp.encode(logits, tokens)


BAD_INTERVALS = [(0, 0, 5), (5, 1, 5), (4, 2, 5), (0, 1, 0), (0, 1, 2**51 + 1), (-1, 1, 5), (2**63, 1, 5), (1, -1, 5)]


@pytest.mark.parametrize("bad", BAD_INTERVALS)
def test_bad_intervals_name_their_index(bad):
    dtype = np.uint64 if max(bad) > 2**62 else np.int64
    start, freq, total = (np.array([x, y], dtype) for x, y in zip((0, 1, 5), bad, strict=True))
    with pytest.raises(llmcomp.Error, match="row 1: an interval"):
        llmcomp.encode_intervals(start, freq, total)
    encoder = llmcomp.Encoder(2)
    with pytest.raises(llmcomp.Error, match="row 1: an interval"):
        encoder.push_intervals(start, freq, total)
    assert encoder.finish() == [b"", b""]


# Streams side by side.


@EVERY_BACKEND
@EVERY_N_THREADS
def test_streams_of_different_lengths(backend, n_threads):
    """A batch with active masks gives the payloads of each stream by itself, and the tokens back."""
    rng = np.random.default_rng(11)
    n_streams, vocab_size, n_steps = 9, 1100, 25
    lengths = rng.integers(0, n_steps + 1, n_streams)
    lengths[0], lengths[1] = 0, n_steps
    logits = (3 * rng.standard_normal((n_steps, n_streams, vocab_size))).astype(np.float32)
    tokens = rng.integers(0, vocab_size, (n_steps, n_streams))
    active = np.arange(n_steps)[:, None] < lengths
    logits[~active] = np.nan  # rows of streams that are not active are not read
    with llmcomp.use_backend(backend), llmcomp.use_threads(n_threads):
        encoder, integer_encoder = llmcomp.Encoder(n_streams), llmcomp.Encoder(n_streams)
        for step in range(n_steps):
            encoder.push(logits[step], np.where(active[step], tokens[step], -5), active[step])
            triple = llmcomp.intervals(np.where(active[step][:, None], logits[step], 0), tokens[step])
            integer_encoder.push_intervals(*triple, active=active[step])
        payloads = encoder.finish()
        assert integer_encoder.finish() == payloads
        decoder = llmcomp.Decoder(payloads)
        assert decoder.n_streams == n_streams
        decoded = np.stack([decoder.pull(logits[step], active[step]) for step in range(n_steps)])
    assert decoded.dtype == np.int32
    assert (decoded == np.where(active, tokens, -1)).all()
    for i, n in enumerate(lengths):
        weights = [oracle.weights(row) for row in logits[:n, i]]
        assert payloads[i] == oracle.encode(triples_of(weights, tokens[:n, i]))


def test_push_with_an_error_codes_nothing():
    logits, tokens, _ = case(normal, 65)
    bad = logits.copy()
    bad[3, 64] = np.nan
    encoder = llmcomp.Encoder(6)
    encoder.push(logits, tokens)
    with pytest.raises(llmcomp.Error, match="row 3: a logit is NaN"):
        encoder.push(bad, tokens)
    with pytest.raises(llmcomp.Error, match="row 5: token 65 is outside the vocabulary; expected 0 to 64"):
        encoder.push(logits, [0, 0, 0, 0, 0, 65])
    encoder.push(logits[::-1], tokens)
    expected = [llmcomp.encode(logits[[i, 5 - i]], tokens[[i, i]]) for i in range(6)]
    assert encoder.finish() == expected


@EVERY_BACKEND
@EVERY_N_THREADS
@pytest.mark.parametrize("bad_index", [0, 40, 2_500])
def test_errors_name_the_first_bad_row(backend, n_threads, bad_index):
    logits = np.zeros((12, 2_501), np.float32)
    tokens = [0] * 12
    with llmcomp.use_backend(backend), llmcomp.use_threads(n_threads):
        for value, message in [(np.nan, "a logit is NaN"), (np.inf, r"a logit is \+inf")]:
            logits[[4, 9], bad_index] = value
            with pytest.raises(llmcomp.Error, match=f"row 4: {message}"):
                llmcomp.intervals(logits, tokens)
            with pytest.raises(llmcomp.Error, match=f"row 4: {message}"):
                llmcomp.decode(b"\x80", logits)
            with pytest.raises(llmcomp.Error, match=f"row 4: {message}"):
                llmcomp.Decoder([b"\x80"] * 12).pull(logits)
        logits[[4, 9]] = -np.inf
        with pytest.raises(llmcomp.Error, match="row 4: all logits are -inf"):
            llmcomp.intervals(logits, tokens)
        logits[:] = 0
        for token in (-1, 2_501, 2**62, -(2**63)):
            tokens[7] = token
            with pytest.raises(llmcomp.Error, match=f"row 7: token {token} is outside the vocabulary"):
                llmcomp.intervals(logits, tokens)


def test_nan_wins_over_infinities():
    """Whatever order a vector kernel meets them in."""
    for size, position in itertools.product([3, 16, 64, 130], [0, 1, -1]):
        row = np.full((1, size), np.inf, np.float32)
        row[0, size // 2] = -np.inf
        row[0, position] = np.nan
        for backend in BACKENDS:
            with llmcomp.use_backend(backend), pytest.raises(llmcomp.Error, match="NaN"):
                llmcomp.intervals(row, [0])


# Anything at all.

any_rows = hnp.arrays(
    np.uint32, st.tuples(st.integers(1, 5), st.integers(1, 80)), elements=st.integers(0, 2**32 - 1)
).map(lambda bits: bits.view(np.float32))
some_rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 80)),
    elements=st.sampled_from([0.0, -1.0, -20.5, 3.0, 1e-45, -np.inf, 1e38, -3e38]) | st.floats(-50, 50, width=32),
)


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(rows=any_rows | some_rows, data=st.data(), payload=st.binary(max_size=40))
def test_any_bits_give_the_oracle_s_answer_or_its_error(rows, data, payload):
    tokens = [data.draw(st.integers(-1, rows.shape[1])) for _ in rows]
    try:
        with np.errstate(invalid="ignore"):
            weights = [oracle.weights(row) for row in rows]
        expected = [oracle.interval(row, token) for row, token in zip(rows, tokens, strict=True)]
    except oracle.OracleError:
        expected = None
    for backend in BACKENDS:
        with llmcomp.use_backend(backend):
            if expected is None:
                with pytest.raises(llmcomp.Error, match=r"^row \d+: "):
                    llmcomp.intervals(rows, tokens)
                continue
            assert as_triples(llmcomp.intervals(rows, tokens)) == expected
            coded = llmcomp.encode(rows, tokens)
            assert coded == oracle.encode(expected)
            assert llmcomp.decode(coded, rows).tolist() == tokens
            foreign = llmcomp.decode(payload, rows).tolist()
            assert foreign == oracle.decode(payload, [w.tolist() for w in weights])

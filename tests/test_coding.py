"""Intervals, payloads and streams of every backend against the oracle, which shares no line with the C core."""

import functools
import itertools
from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest

import llmcomp

BACKENDS = llmcomp.backends()
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_N_THREADS = pytest.mark.parametrize("n_threads", [1, 2])

# Rows of logits.

FLOAT32_MAX = np.finfo(np.float32).max
DENORMALS = np.array([1e-45, -1e-45, 1.1754942e-38, -1.1754942e-38, 5e-41, 0.0, -0.0], np.float32)


def normal(rng, shape):
    return 3 * rng.standard_normal(shape)


def peaked(rng, shape):
    logits = rng.standard_normal(shape)
    logits[..., shape[-1] // 2] += 40
    return logits


def flat(rng, shape):
    return np.full(shape, -7.25)


def tied(rng, shape):
    return rng.integers(-3, 1, shape)


def steep(rng, shape):
    """Over the whole range of weights, down to the floor."""
    return rng.uniform(-70, 0, shape)


def between_integers(rng, shape):
    """Where the rounding of d * log2 e to an integer is closest to a tie."""
    return np.float32((rng.integers(-60, 0, shape) + 0.5) * np.log(2))


def huge(rng, shape):
    return rng.choice([1e38, -1e38, 3e38, FLOAT32_MAX, -FLOAT32_MAX, 0.0, 2.9999998e38], shape)


def denormal(rng, shape):
    return rng.choice(DENORMALS, shape)


def near_smallest_normal(rng, shape):
    """Differences of two normal numbers that are denormal."""
    return rng.choice(np.float32([1.2e-38, 1.3e-38, -1.2e-38, 1.1754944e-38, 0.0]), shape)


def masked(rng, shape):
    """-inf nearly everywhere, as constrained decoding has it."""
    logits = np.where(rng.random(shape) < 0.9, -np.inf, rng.standard_normal(shape))
    logits[..., -1] = 0.5
    return logits


def far_from_zero(rng, shape):
    """Maxima on both sides of 8192 and -8192, where the formula of a weight changes."""
    maxima = np.resize(np.float32([8192, 8192.5, -8192, -8193, 1e6, -100]), shape[0])
    logits = np.float32(maxima[:, None] - np.abs(9 * rng.standard_normal(shape)))
    logits[:, shape[1] // 3] = maxima
    return logits


DISTRIBUTIONS = [
    normal, peaked, flat, tied, steep, between_integers, huge, denormal, near_smallest_normal, masked, far_from_zero,
]  # fmt: skip
# Around the widths of the vectors, of the unrolled loops, and of the blocks of a search.
VOCAB_SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 1023, 1024, 1025, 1088, 2049]
LARGE = [(normal, 50_304), (masked, 50_257), (flat, 200_000), (steep, 200_000), (tied, 131_073)]


def some_tokens(rng, n_rows, vocab_size):
    tokens = rng.integers(0, vocab_size, n_rows)
    tokens[0], tokens[-1] = 0, vocab_size - 1
    return tokens


@functools.cache
def case(distribution, vocab_size, n_rows=6, dtype=np.float32):
    """(logits, tokens, weights of every row by the oracle)"""
    rng = np.random.default_rng([DISTRIBUTIONS.index(distribution), vocab_size])
    with np.errstate(over="ignore"):
        logits = np.ascontiguousarray(distribution(rng, (n_rows, vocab_size)), dtype)
    if dtype == np.float16:
        logits = np.clip(logits, -65504, 65504)
    logits.setflags(write=False)
    return logits, some_tokens(rng, n_rows, vocab_size), [oracle.weights(row) for row in logits]


def triples_of(weights, tokens):
    return [(int(w[:t].sum()), int(w[t]), int(w.sum())) for w, t in zip(weights, tokens, strict=True)]


def as_triples(arrays):
    return [tuple(int(x) for x in triple) for triple in zip(*(np.ravel(a) for a in arrays), strict=True)]


# The oracle itself.


def test_array_fma_of_the_oracle_rounds_like_fractions():
    rng = np.random.default_rng(0)
    a = np.concatenate([rng.uniform(-64, 0, 400), rng.uniform(-0.5, 0.5, 400), -(2.0 ** rng.integers(-149, 6, 200))])
    a = a.astype(np.float32).astype(np.float64)
    # The third column makes ties and near-ties: odd multiples of half a unit.
    for b, c in itertools.product([oracle.LOG2_E, 2.0**-24, 1.0, 3.0], [oracle.ROUNDING, -17.0, 2.0**29, 2.0**-130]):
        expected = [float(oracle.fma(Fraction(x), Fraction(b), Fraction(c))) for x in a]
        assert oracle.fma_array(a, b, c).tolist() == expected


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_array_weights_of_the_oracle_equal_its_fractions(distribution):
    logits, _, weights = case(distribution, 65)
    for row, row_weights in zip(logits[:2], weights[:2], strict=True):
        assert row_weights.tolist() == [oracle.weight_exact(x, row.max()) for x in row]


def test_weight_is_the_power_of_two_that_the_text_promises():
    d = np.float32(np.linspace(-30, 0, 20_001))
    for maximum in (0.0, 10.0, -300.0, 8192.0, 9000.0):
        logits = np.float32(d + maximum)
        weights = oracle.weights(logits)
        exact = 2.0**29 * np.exp(logits.astype(np.float64) - maximum)
        common = weights[-1] / (2**29 + 1)  # the rounding of the row's offset scales all weights alike
        assert abs(common - 1) < 3.4e-4
        assert (np.abs(weights - 1 - common * exact) <= 1.01 + 6e-6 * exact).all(), maximum
    assert oracle.weights(d)[-1] == 2**29 + 1


# Intervals.


@EVERY_BACKEND
@EVERY_N_THREADS
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_intervals_equal_the_oracle(backend, n_threads, distribution):
    with llmcomp.use_backend(backend), llmcomp.use_threads(n_threads):
        for vocab_size in VOCAB_SIZES:
            logits, tokens, weights = case(distribution, vocab_size)
            assert as_triples(llmcomp.intervals(logits, tokens)) == triples_of(weights, tokens), vocab_size


@EVERY_BACKEND
@EVERY_N_THREADS
@pytest.mark.parametrize(("distribution", "vocab_size"), LARGE)
def test_intervals_of_large_vocabularies_equal_the_oracle(backend, n_threads, distribution, vocab_size):
    logits, tokens, weights = case(distribution, vocab_size, 5)
    with llmcomp.use_backend(backend), llmcomp.use_threads(n_threads):
        assert as_triples(llmcomp.intervals(logits, tokens)) == triples_of(weights, tokens)


@EVERY_BACKEND
@pytest.mark.parametrize("distribution", [normal, steep, tied, masked])
def test_float16_intervals_equal_the_oracle(backend, distribution):
    with llmcomp.use_backend(backend):
        for vocab_size in VOCAB_SIZES:
            logits, tokens, weights = case(distribution, vocab_size, dtype=np.float16)
            assert as_triples(llmcomp.intervals(logits, tokens)) == triples_of(weights, tokens), vocab_size


@EVERY_BACKEND
def test_largest_vocabulary(backend):
    """2**21 equal logits: the largest total there is, and it stays below 2**51."""
    row = np.zeros((1, 2**21), np.float32)
    with llmcomp.use_backend(backend):
        triple = as_triples(llmcomp.intervals(row, [2**21 - 1]))
    assert triple == [((2**21 - 1) * (2**29 + 1), 2**29 + 1, 2**21 * (2**29 + 1))]
    assert triple[0][2] < 2**51


HALF_BITS = np.arange(65_536, dtype=np.uint16)


def bfloat16_tensor(bits):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


HALVES = {
    "float16": (oracle.float32_of_half, lambda bits: bits.view(np.float16)),
    "bfloat16": (oracle.float32_of_bfloat16, bfloat16_tensor),
}


@EVERY_BACKEND
@pytest.mark.parametrize("maximum", [65504.0, 13.5, 0.0, 6e-8, -5.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_value_widens_exactly(backend, dtype, maximum):
    """Rows of 64 times one value and one maximum, for each of the 65,536 values at or below it."""
    widen, logits_of = HALVES[dtype]
    with np.errstate(invalid="ignore"):
        values = widen(HALF_BITS)
        top = HALF_BITS[np.nanargmin(np.abs(values.astype(np.float64) - maximum))]
        bits = HALF_BITS[values <= widen(np.array([top]))[0]]
    rows = np.repeat(bits[:, None], 65, axis=1)
    rows[:, 64] = top
    with llmcomp.use_backend(backend):
        start, freq, total = llmcomp.intervals(logits_of(rows), np.full(len(rows), 64))
    expected = oracle.weights(widen(np.append(bits, top)))
    assert len(bits) > 14_000
    assert (start == 64 * expected[:-1]).all()
    assert (freq == expected[-1]).all() and (total == start + freq).all()


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_nan_and_infinity_is_an_error(backend, dtype):
    widen, logits_of = HALVES[dtype]
    bad = HALF_BITS[np.isnan(widen(HALF_BITS)) | (widen(HALF_BITS) == np.inf)]
    rows = np.zeros((2, 67), np.uint16)
    with llmcomp.use_backend(backend):
        for i, bits in enumerate(bad):
            rows[1, i % 67] = bits
            with pytest.raises(llmcomp.Error, match=r"row 1: a logit is (NaN|\+inf)"):
                llmcomp.intervals(logits_of(rows), [0, 0])
            rows[1] = 0


def test_ml_dtypes_bfloat16_is_read_in_place():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits = np.linspace(-8, 3, 300).astype(np.float32).astype(ml_dtypes.bfloat16).reshape(3, 100)
    expected = llmcomp.intervals(logits.astype(np.float32), [5, 50, 99])
    assert as_triples(llmcomp.intervals(logits, [5, 50, 99])) == as_triples(expected)


@EVERY_BACKEND
def test_contract(backend):
    """freq >= 1, disjoint, covering, exact sums: all intervals of a row, without the oracle."""
    for distribution, vocab_size in itertools.product(DISTRIBUTIONS, [1, 2, 65, 1088]):
        logits, _, _ = case(distribution, vocab_size)
        every_token = np.arange(vocab_size)
        rows = np.broadcast_to(logits[0], (vocab_size, vocab_size))
        with llmcomp.use_backend(backend):
            start, freq, total = llmcomp.intervals(rows, every_token)
        assert (freq >= 1).all()
        assert start[0] == 0 and (start[1:] == np.cumsum(freq)[:-1]).all()
        assert (total == freq.sum()).all() and total[0] <= 2**51


@EVERY_BACKEND
def test_vocab_size_hides_the_padding(backend):
    logits, _, _ = case(normal, 129)
    padded = np.concatenate([logits, np.full((6, 40), np.nan, np.float32)], axis=1)
    tokens = np.array([0, 5, 77, 100, 127, 128])
    with llmcomp.use_backend(backend):
        assert as_triples(llmcomp.intervals(padded, tokens, 129)) == as_triples(llmcomp.intervals(logits, tokens))
        payload = llmcomp.encode(padded, tokens, 129)
        assert payload == llmcomp.encode(logits, tokens)
        assert llmcomp.decode(payload, padded, 129).tolist() == tokens.tolist()
        encoder = llmcomp.Encoder(6, vocab_size=129)
        encoder.push(padded, tokens)
        decoder = llmcomp.Decoder(encoder.finish(), vocab_size=129)
        assert decoder.pull(padded).tolist() == tokens.tolist()
        with pytest.raises(llmcomp.Error, match="token 129 is outside"):
            llmcomp.intervals(padded, [129] * 6, 129)


@EVERY_BACKEND
@EVERY_N_THREADS
def test_flush_to_zero_of_the_caller_changes_nothing(backend, n_threads):
    torch = pytest.importorskip("torch")
    names = [denormal, near_smallest_normal, steep]
    cases = [case(distribution, vocab_size) for distribution in names for vocab_size in (33, 1088)]
    half = HALF_BITS[1:1024].reshape(1, -1)  # float16 denormals
    expected_half = triples_of([oracle.weights(oracle.float32_of_half(half[0]))], [500])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals to zero")
    try:
        with llmcomp.use_backend(backend), llmcomp.use_threads(n_threads):
            found = [as_triples(llmcomp.intervals(logits, tokens)) for logits, tokens, _ in cases]
            payload = llmcomp.encode(cases[0][0], cases[0][1])
            decoded = llmcomp.decode(payload, cases[0][0]).tolist()
            found_half = as_triples(llmcomp.intervals(half.view(np.float16), [500]))
        still_flushed = (torch.tensor([1e-40]) * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert found == [triples_of(weights, tokens) for _, tokens, weights in cases]
    assert decoded == cases[0][1].tolist()
    assert found_half == expected_half
    assert still_flushed  # the caller's setting is given back


def test_leading_axes_and_single_rows():
    logits, tokens, weights = case(normal, 65)
    expected = triples_of(weights, tokens)
    cube = llmcomp.intervals(logits.reshape(2, 3, 65), tokens.reshape(2, 3))
    assert [a.shape for a in cube] == [(2, 3)] * 3 and [a.dtype for a in cube] == [np.uint64] * 3
    assert as_triples(cube) == expected
    one = llmcomp.intervals(logits[4], tokens[4])
    assert [a.shape for a in one] == [()] * 3 and as_triples(one) == expected[4:5]


STRIDED = {
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "rows backwards": lambda a: a[::-1].copy()[::-1],
    "every other logit": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "logits backwards": lambda a: a[:, ::-1].copy()[:, ::-1],
    "Fortran order": np.asfortranarray,
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "wide rows": lambda a: np.pad(a, ((0, 0), (3, 5)))[:, 3:-5],
}


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layout", STRIDED)
def test_layouts(backend, layout, dtype):
    logits, tokens, weights = case(normal, 129, dtype=dtype)
    with llmcomp.use_backend(backend):
        arranged = STRIDED[layout](logits)
        assert as_triples(llmcomp.intervals(arranged, tokens)) == triples_of(weights, tokens)
        payload = llmcomp.encode(arranged, tokens)
        assert payload == oracle.encode(triples_of(weights, tokens))
        assert llmcomp.decode(payload, arranged).tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors_without_a_copy(dtype):
    torch = pytest.importorskip("torch")
    logits, tokens, _ = case(normal, 129)
    tensor = torch.tensor(logits).to(getattr(torch, dtype))
    exact = tensor.float().numpy()
    expected = triples_of([oracle.weights(row) for row in exact], tokens)
    wide = torch.zeros(6, 300, dtype=tensor.dtype)
    wide[:, 7:136] = tensor
    layouts = {
        "plain": tensor,
        "transposed": tensor.t().contiguous().t(),
        "slice": wide[:, 7:136],
        "every other row": torch.repeat_interleave(tensor, 2, 0)[::2],
        "with a gradient": tensor.clone().requires_grad_(),
    }
    for name, arranged in layouts.items():
        assert as_triples(llmcomp.intervals(arranged, torch.tensor(tokens))) == expected, name
    repeated = tensor[:1].expand(4, 129)  # stride 0
    assert as_triples(llmcomp.intervals(repeated, [tokens[0]] * 4)) == expected[:1] * 4
    payload = llmcomp.encode(tensor, tokens)
    assert payload == oracle.encode(expected)
    assert llmcomp.decode(payload, wide[:, 7:136]).tolist() == tokens.tolist()


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

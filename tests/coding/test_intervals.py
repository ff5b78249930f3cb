"""Intervals of every backend against the oracle, which shares no line with the C core; and the oracle itself."""

import itertools
from fractions import Fraction

import numpy as np
import oracle
import pytest
from logit_rows import (
    DISTRIBUTIONS,
    LARGE,
    VOCAB_SIZES,
    as_triples,
    case,
    denormal,
    masked,
    near_smallest_normal,
    normal,
    steep,
    tied,
    triples_of,
)

import llmcomp

BACKENDS = llmcomp.backends()
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_N_THREADS = pytest.mark.parametrize("n_threads", [1, 2])

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

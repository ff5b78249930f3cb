"""The softmax that scores are made of: right to the bound of FORMAT.md, section 6, and the same bits everywhere."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
from engine_models import draw, make_config, make_weights, serial_logits

import llmcomp
from llmcomp.coding import log2_softmax
from llmcomp.models.engines.exact import ExactModel, Int8Model

BACKENDS = [name for name in llmcomp.backends() if name != "cuda"]
BOUND_BITS = 2e-6


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float64
    np.testing.assert_array_equal(found.view(np.uint64), expected.view(np.uint64))


def exact_log2_softmax(row: np.ndarray, token: int) -> float:
    """By math.fsum in binary64: independent of the engine's and NumPy's exp and sums."""
    largest = float(row.max())
    total = math.fsum(math.exp(float(logit) - largest) for logit in row)
    return ((float(row[token]) - largest) - math.log(total)) / math.log(2)


def rows_of(kind: str, vocab_size: int) -> np.ndarray:
    """float32 [3, vocab_size]."""
    logits = np.random.default_rng(1).standard_normal((3, vocab_size))
    logits *= {"trained": 3, "flat": 0, "wide": 40}.get(kind, 1)
    if kind == "sure":
        logits[:, vocab_size // 2] = 60
    elif kind == "one above the rest":
        # The largest mean distance from the maximum, which the bound is made of.
        logits[:] = -math.log(vocab_size)
        logits[:, 0] = 0
    elif kind == "negative":
        logits -= 1000
    elif kind == "far from 0":
        logits += 70_000
    elif kind == "at the floor":
        logits[:, 1:] = -44.3614 + logits[:, 1:] * 1e-3
        logits[:, 0] = 0
    elif kind == "with -inf":
        logits[:, 1::2] = -np.inf
    elif kind == "largest":
        logits[:, 1::2] = -3.4e38
        logits[:, ::2] = 3.4e38
    return logits.astype(np.float32)


KINDS = ["trained", "flat", "wide", "sure", "one above the rest", "negative", "far from 0", "at the floor", "with -inf"]


@pytest.mark.parametrize("kind", [*KINDS, "largest"])
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 17, 63, 64, 65, 130, 1024, 50_304])
def test_the_bound(backend: str, kind: str, vocab_size: int) -> None:
    logits = rows_of(kind, vocab_size)
    targets = [0, int(logits[1].argmax()), vocab_size - 1]
    found = log2_softmax(logits, targets)
    assert found.shape == (3,) and (found <= 0).all()
    for row, target, bits in zip(logits, targets, found, strict=True):
        expected = exact_log2_softmax(row, target)
        assert bits == expected or abs(bits - expected) < max(BOUND_BITS, 1e-15 * abs(expected))


def test_the_largest_vocabulary(backend: str) -> None:
    """2^21 logits with the largest mean distance; one dtype and one row, for the time that it takes."""
    row = np.full(2**21, -math.log(2**21), np.float32)
    row[7] = 0
    for token in (7, 8):
        expected = float(row[token]) - math.log(1 + (2**21 - 1) * math.exp(float(row[8])))
        assert log2_softmax(row, token) == pytest.approx(expected / math.log(2), abs=BOUND_BITS)
    with pytest.raises(llmcomp.Error, match="2097153"):
        log2_softmax(np.zeros(2**21 + 1, np.float32), 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 16, 64, 67, 200, 1031])
def test_the_bits_are_those_of_the_text(backend: str, dtype: str, kind: str, vocab_size: int) -> None:
    logits = np.clip(rows_of(kind, vocab_size), None, 65_504).astype(dtype)
    targets = np.array([vocab_size // 2, 0, vocab_size - 1])
    rows = logits.astype(np.float32)
    expected = [oracle.log2_softmax(row, target) for row, target in zip(rows, targets, strict=True)]
    for n_threads in (1, 3):
        with llmcomp.use_threads(n_threads):
            assert_same_bits(log2_softmax(logits, targets), np.array(expected))


def test_any_bits_give_the_oracle_s_answer_or_its_error() -> None:
    rng = np.random.default_rng(5)
    for vocab_size in (1, 5, 64, 100):
        for _ in range(30):
            row = rng.integers(0, 2**32, vocab_size, np.uint32).view(np.float32)
            token = int(rng.integers(-1, vocab_size + 1))
            try:
                with np.errstate(invalid="ignore"):
                    expected = oracle.log2_softmax(row, token)
            except oracle.OracleError:
                expected = None
            for name in BACKENDS:
                with llmcomp.use_backend(name):
                    if expected is None:
                        with pytest.raises(llmcomp.Error, match=r"^row 0: "):
                            log2_softmax(row, token)
                    else:
                        assert_same_bits(log2_softmax(row, token), np.array(expected))


def test_arrangements_and_threads_give_the_same_bits(backend: str) -> None:
    rng = np.random.default_rng(2)
    logits, targets = rng.standard_normal((700, 900), np.float32), rng.integers(0, 800, 700)
    expected = log2_softmax(np.ascontiguousarray(logits[:, :800]), targets)
    for n_threads in (1, 2, 5):
        with llmcomp.use_threads(n_threads):
            assert_same_bits(log2_softmax(logits, targets, 800), expected)
    cube = log2_softmax(logits.reshape(7, 100, 900), targets.reshape(7, 100), 800)
    assert_same_bits(cube, expected.reshape(7, 100))
    assert_same_bits(log2_softmax(logits[::-2], targets[::-2], 800), expected[::-2])
    assert_same_bits(log2_softmax(np.asfortranarray(logits), targets, 800), expected)
    assert log2_softmax(np.zeros((0, 5), np.float32), []).shape == (0,)


def test_errors_name_the_first_bad_row(backend: str) -> None:
    targets = [0] * 9
    for n_threads in (1, 2):
        for value, message in ((np.nan, "a logit is NaN"), (np.inf, r"a logit is \+inf"), (-np.inf, "all logits are")):
            logits = np.zeros((9, 20_000), np.float32)
            logits[[4, 7]] = value
            with llmcomp.use_threads(n_threads), pytest.raises(llmcomp.Error, match=f"row 4: {message}"):
                log2_softmax(logits, targets)
    logits = np.zeros((9, 20_000), np.float32)
    for token in (-1, 20_000, -(2**63)):
        with pytest.raises(llmcomp.Error, match=f"row 5: token {token} is outside"):
            log2_softmax(logits, [*targets[:5], token, *targets[6:]])


@pytest.mark.parametrize(
    ("logits", "tokens", "vocab_size"),
    [
        (np.zeros((2, 3)), [0, 0], None),
        (np.zeros((2, 3), np.int32), [0, 0], None),
        (np.float32(1), 0, None),
        (np.zeros((2, 0), np.float32), [0, 0], None),
        (np.zeros((2, 3), np.float32), [0], None),
        (np.zeros((2, 3), np.float32), [0.0, 1.0], None),
        (np.zeros((2, 3), np.float32), [0, 0], 0),
        (np.zeros((2, 3), np.float32), [0, 0], 4),
    ],
)
def test_wrong_arguments(logits: np.ndarray, tokens: list, vocab_size: int | None) -> None:
    with pytest.raises(llmcomp.Error, match=r"expected|length"):
        log2_softmax(logits, tokens, vocab_size)


# In a pass.


def make_model(kind: type[ExactModel] = ExactModel, **changes: object) -> ExactModel:
    config = make_config(**changes)
    return kind(config, make_weights(config))


@pytest.mark.parametrize("kind", [ExactModel, Int8Model])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_pass_gives_those_of_its_logits(backend: str, kind: type[ExactModel], n_threads: int) -> None:
    model = make_model(kind, vocab_size=1100)
    tokens, targets = draw(model, 9, 37), draw(model, 9, 37, seed=6)
    lengths = [37, 5, 0, 16, 17, 37, 1, 30, 32]
    logits = serial_logits(model, tokens)
    with llmcomp.use_backend("serial"):
        expected = log2_softmax(logits, targets)
    with llmcomp.use_threads(n_threads):
        found = model.log2_probabilities(tokens, targets, lengths)
        assert_same_bits(model.log2_probabilities(tokens, targets), expected)
    for row, length in enumerate(lengths):
        assert_same_bits(found[row, :length], expected[row, :length])
        assert not found[row, length:].any()


def test_many_sequences_run_in_waves() -> None:
    """More than one workspace holds: keys and values take 2 MB a sequence."""
    model = make_model(hidden_size=256, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1)
    tokens = np.repeat(draw(model, 1, 48), 60, axis=0)
    found = model.log2_probabilities(tokens, tokens)
    assert_same_bits(found, np.repeat(found[:1], 60, axis=0))
    assert_same_bits(found[0], log2_softmax(serial_logits(model, tokens[:1]), tokens[:1])[0])


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (np.inf, r"NaN|\+inf")])
def test_a_pass_names_the_row_of_what_is_no_number(backend: str, value: float, message: str) -> None:
    config = make_config()
    weights = make_weights(config)
    weights["gpt_neox.embed_in.weight"][5] = value
    model = ExactModel(config, weights)
    tokens = np.array([[1, 2, 3], [1, 5, 2]])
    with pytest.raises(llmcomp.Error, match=rf"sequence 1, position 1: .*({message})"):
        model.log2_probabilities(tokens, tokens)
    # A row of padding is computed by nobody.
    assert np.isfinite(model.log2_probabilities(tokens, tokens, [3, 1])).all()


def test_wrong_arguments_of_a_pass() -> None:
    model = make_model()
    tokens = draw(model, 2, 5)
    bad = tokens.copy()
    bad[1, 3] = 61
    with pytest.raises(llmcomp.Error, match=r"sequence 1, position 3: target 61 .* 0 to 60"):
        model.log2_probabilities(tokens, bad)
    with pytest.raises(llmcomp.Error, match=r"sequence 1, position 3: token 61 .* 0 to 60"):
        model.log2_probabilities(bad, tokens)
    with pytest.raises(llmcomp.Error, match="targets have shape"):
        model.log2_probabilities(tokens, tokens[:1])
    assert model.log2_probabilities(np.zeros((2, 0), int), np.zeros((2, 0), int)).shape == (2, 0)

"""The same bits from the exact engine, in floats and in 8-bit integers, however the work is cut: over backends,
threads, streams, batches, passes and steps. Which bits these are, test_engine.py and test_engine_int8.py say."""

from __future__ import annotations

import numpy as np
import pytest
from engine_models import VARIANTS, assert_same_bits, draw, make_config, make_weights, serial_logits

import llmcomp
from llmcomp import _core
from llmcomp.models.checkpoint import Tensor
from llmcomp.models.engines.exact import ExactModel, Int8Model


@pytest.fixture(params=[ExactModel, Int8Model])
def kind(request: pytest.FixtureRequest) -> type[ExactModel]:
    """The engine's arithmetic."""
    return request.param


def make_model(kind: type[ExactModel], seed: int = 0, scale: float = 1.0, **changes: object) -> ExactModel:
    config = make_config(**changes)
    return kind(config, make_weights(config, seed, scale))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_backends_and_threads_give_the_same_bits(
    backend: str, kind: type[ExactModel], variant: str, n_threads: int
) -> None:
    model = make_model(kind, **VARIANTS[variant])
    tokens = draw(model, 2, 45)
    with llmcomp.use_threads(n_threads):
        assert_same_bits(model.logits(tokens), serial_logits(model, tokens))
        # Made here, so that the codes of 8-bit integers are these threads' work too.
        assert_same_bits(make_model(kind, **VARIANTS[variant]).logits(tokens), serial_logits(model, tokens))


@pytest.mark.parametrize("n_streams", [1, 2, 3, 4, 5, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_steps_of_any_number_of_streams(backend: str, kind: type[ExactModel], n_streams: int, n_threads: int) -> None:
    model = make_model(kind, **VARIANTS["odd sizes"])
    tokens = draw(model, n_streams, 3)
    session = model.session(n_streams, 3)
    with llmcomp.use_threads(n_threads):
        steps = [session.step(tokens[:, t]) for t in range(3)]
    assert_same_bits(np.stack(steps, 1), serial_logits(model, tokens))


@pytest.mark.parametrize("first", [1, 5, 15, 16, 17, 31, 32, 47])
def test_any_split_into_prefill_and_steps(backend: str, kind: type[ExactModel], first: int) -> None:
    model = make_model(kind)
    tokens = draw(model, 1, 48)
    expected = serial_logits(model, tokens)[0]
    session = model.session(3)
    assert_same_bits(session.prefill(1, tokens[0, :first]), expected[first - 1])
    active = np.array([False, True, False])
    for t in range(first, min(first + 3, 48)):
        assert_same_bits(session.step(np.full(3, tokens[0, t]), active)[1], expected[t])
    rest = min(first + 3, 48)
    if rest < 48:
        assert_same_bits(session.prefill(1, tokens[0, rest:]), expected[-1])
    assert session.positions.tolist() == [0, 48, 0]


def test_batch_padding_and_company_do_not_matter(backend: str, kind: type[ExactModel]) -> None:
    model = make_model(kind)
    tokens = draw(model, 7, 40)
    lengths = [40, 1, 0, 17, 16, 33, 39]
    together = model.logits(tokens, lengths)
    alone = serial_logits(model, tokens[3:4, :17])
    assert_same_bits(together[3, :17], alone[0])
    assert not together[3, 17:].any() and not together[2].any()
    changed = tokens.copy()
    changed[0] = 0
    changed[3, 17:] = 5
    assert_same_bits(model.logits(changed, lengths)[3], together[3])


@pytest.mark.parametrize("scale", [30.0, 1e-3, 1e12])
def test_large_and_tiny_weights(backend: str, kind: type[ExactModel], scale: float) -> None:
    """Saturated softmax and GELU, denormal products, and overflow: whatever comes out is the same everywhere."""
    model = make_model(kind, scale=scale)
    tokens = draw(model, 2, 40)
    expected = serial_logits(model, tokens)
    found = model.logits(tokens)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(found, expected)
    session = model.session(2)
    steps = np.stack([session.step(tokens[:, t]) for t in range(40)], 1)
    np.testing.assert_array_equal(steps, expected)


def short_and_wide(kind: type[ExactModel], config: dict, dtype: str) -> tuple[ExactModel, ExactModel]:
    """A model with weights of 16 bits, and one with the same weights in float32."""
    weights = make_weights(config)
    weights["embed_out.weight"][0] = 6e-8  # a denormal of float16
    short, wide = {}, {}
    for name, value in weights.items():
        if dtype == "float16":
            short[name] = value.astype(np.float16)
            wide[name] = short[name].astype(np.float32)
        else:
            upper = (value.view(np.uint32) >> 16).astype(np.uint16)
            short[name] = Tensor(upper, "bfloat16")
            wide[name] = (upper.astype(np.uint32) << 16).view(np.float32)
    return kind(config, short), kind(config, wide)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_weights_equal_their_widened_ones(backend: str, kind: type[ExactModel], dtype: str) -> None:
    model, wide = short_and_wide(kind, make_config(hidden_size=42, rotary_pct=0.3, intermediate_size=1067), dtype)
    tokens = np.random.default_rng(2).integers(0, 61, (2, 30))
    assert model.dtype == (dtype if kind is ExactModel else "int8")
    assert_same_bits(model.logits(tokens), serial_logits(wide, tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("intermediate", [96, 2060])
def test_steps_with_short_weights_for_any_number_of_streams(
    backend: str, kind: type[ExactModel], dtype: str, intermediate: int
) -> None:
    """Rows that come in blocks and rows left over, chains in one piece and cut, few tokens and a panel of them."""
    config = make_config(hidden_size=72, num_attention_heads=2, rotary_pct=0.5, intermediate_size=intermediate)
    model, wide = short_and_wide(kind, config, dtype)
    tokens = np.random.default_rng(3).integers(0, 61, (17, 2))
    expected = serial_logits(wide, tokens)
    for n_streams in (1, 2, 3, 5, 8, 9, 17):
        session = model.session(n_streams)
        for position in range(tokens.shape[1]):
            assert_same_bits(session.step(tokens[:n_streams, position]), expected[:n_streams, position])


def test_intervals_are_those_of_the_logits(backend: str, kind: type[ExactModel]) -> None:
    model = make_model(kind, vocab_size=1100)
    tokens, targets = draw(model, 3, 37), draw(model, 3, 37, seed=6) % 1000
    lengths = [37, 5, 0]
    found = model.intervals(tokens, targets, lengths, vocab_size=1000)
    expected = llmcomp.intervals(serial_logits(model, tokens), targets, vocab_size=1000)
    for part, whole in zip(found, expected, strict=True):
        assert part.dtype == np.uint64
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(part[row, :length], whole[row, :length])
            assert not part[row, length:].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 1056, "vocab_size": 112},
        {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 72, "vocab_size": 61},
    ],
    ids=["all matrices", "some matrices"],
)
def test_chains_with_short_weights_for_any_number_of_streams(
    backend: str, kind: type[ExactModel], dtype: str, sizes: dict[str, int]
) -> None:
    """Chains turn the matrices of small models once, where rows are a multiple of 16 and columns of 32."""
    if backend == "serial" and sizes["hidden_size"] == 64:
        pytest.skip("turns nothing, and takes its time")
    model, wide = short_and_wide(kind, make_config(rotary_pct=0.5, **sizes), dtype)
    tokens = np.random.default_rng(9).integers(0, model.n_logits, (11, 20))
    logits = serial_logits(wide, tokens)
    payloads = [llmcomp.encode(logits[s, :-1], tokens[s, 1:]) for s in range(len(tokens))]
    for n_streams, n_threads in ((1, 1), (2, 1), (3, 1), (8, 1), (9, 1), (11, 2)):
        decoder = _core.Decoder(payloads[:n_streams], model.n_logits)
        session = model.session(n_streams, 20)
        with llmcomp.use_threads(n_threads):
            for first, n_steps in ((0, 13), (13, 2), (15, 4)):
                found = session.decode(decoder, tokens[:n_streams, first], n_steps)
                assert np.array_equal(found.T, tokens[:n_streams, first + 1 : first + 1 + n_steps])

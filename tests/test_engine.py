"""The exact engine: right (against binary64 and transformers) and the same bits however the work is cut."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from engine_models import (
    assert_same_bits,
    draw,
    make_config,
    make_weights,
    reference_logits,
    serial_logits,
    write_folder,
)

import llmcomp
from llmcomp import _core
from llmcomp.engine_exact import ExactModel, Tensor, load_exact
from llmcomp.errors import Error

VARIANTS = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False},
    "full rotary": {"rotary_pct": 1.0, "rotary_emb_base": 5000},
    "no rotary": {"rotary_pct": 0.0},
    "tied": {"tie_word_embeddings": True},
    "no attention bias": {"attention_bias": False},
    "odd sizes": {"hidden_size": 42, "rotary_pct": 0.3, "intermediate_size": 67, "vocab_size": 53},
    "one head of 144": {"hidden_size": 144, "num_attention_heads": 1, "num_hidden_layers": 1},
    "heads of 40": {"hidden_size": 80, "num_attention_heads": 2, "num_hidden_layers": 1},
    "wide": {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 700, "vocab_size": 1031},
}


def make_model(seed: int = 0, scale: float = 1.0, **changes: object) -> ExactModel:
    config = make_config(**changes)
    return ExactModel(config, make_weights(config, seed, scale))


# Right.


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_binary64(variant: str) -> None:
    config = make_config(**VARIANTS[variant])
    weights = make_weights(config)
    tokens = np.random.default_rng(2).integers(0, config["vocab_size"], (3, 48))
    found = ExactModel(config, weights).logits(tokens)
    expected = reference_logits(config, weights, tokens)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(expected).max() > 3
    assert np.abs(found - expected).max() < 2e-5


@pytest.mark.parametrize("variant", ["parallel", "sequential", "full rotary", "tied", "no attention bias"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_agree_with_transformers(variant: str, dtype: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = make_config(**VARIANTS[variant], max_position_embeddings=300)
    config["dtype"] = dtype
    torch.manual_seed(0)
    module = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    module.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    module = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(2).integers(0, config["vocab_size"], (2, 300))
    with torch.inference_mode():
        expected = module(torch.from_numpy(tokens)).logits.numpy()
    model = load_exact(tmp_path)
    assert model.dtype == dtype
    assert model.n_params == sum(parameter.numel() for parameter in module.parameters())
    assert np.abs(model.logits(tokens) - expected).max() < 1e-4


@pytest.mark.parametrize("parallel", [True, False])
def test_error_is_no_larger_than_that_of_torch(parallel: bool, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = make_config(hidden_size=96, num_attention_heads=3, intermediate_size=384, num_hidden_layers=3)
    config["use_parallel_residual"] = parallel
    weights = make_weights(config)
    tokens = np.random.default_rng(3).integers(0, config["vocab_size"], (8, 48))
    module = transformers.GPTNeoXForCausalLM.from_pretrained(write_folder(tmp_path, config, weights)).eval()
    with torch.inference_mode():
        of_torch = module(torch.from_numpy(tokens)).logits.numpy()
    expected = reference_logits(config, weights, tokens)
    own_error = np.sqrt(np.mean((load_exact(tmp_path).logits(tokens) - expected) ** 2))
    assert own_error < 1.2 * np.sqrt(np.mean((of_torch - expected) ** 2))


def test_positions_are_those_of_torch_far_out() -> None:
    """Queries and keys that only the angles tell apart; a wrong last bit of an angle at 2,000 would show."""
    config = make_config(hidden_size=32, num_attention_heads=1, num_hidden_layers=1, max_position_embeddings=2048)
    config["rotary_pct"] = 1.0
    weights = make_weights(config)
    tokens = np.random.default_rng(4).integers(0, config["vocab_size"], (1, 2048))
    found = ExactModel(config, weights).logits(tokens)
    assert np.abs(found - reference_logits(config, weights, tokens)).max() < 2e-5


# The same bits.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_backends_and_threads_give_the_same_bits(backend: str, variant: str, n_threads: int) -> None:
    model = make_model(**VARIANTS[variant])
    tokens = draw(model, 2, 45)
    with llmcomp.use_threads(n_threads):
        assert_same_bits(model.logits(tokens), serial_logits(model, tokens))


def test_steps_give_the_bits_of_the_pass(backend: str) -> None:
    model = make_model()
    tokens = draw(model, 3, 48)
    session = model.session(3)
    steps = [session.step(tokens[:, t]) for t in range(48)]
    assert_same_bits(np.stack(steps, 1), serial_logits(model, tokens))
    assert session.positions.tolist() == [48, 48, 48]


@pytest.mark.parametrize("n_streams", [1, 2, 3, 4, 5, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_steps_of_any_number_of_streams(backend: str, n_streams: int, n_threads: int) -> None:
    model = make_model(**VARIANTS["odd sizes"])
    tokens = draw(model, n_streams, 3)
    session = model.session(n_streams, 3)
    with llmcomp.use_threads(n_threads):
        steps = [session.step(tokens[:, t]) for t in range(3)]
    assert_same_bits(np.stack(steps, 1), serial_logits(model, tokens))


def test_a_large_model_steps_as_it_passes(backend: str) -> None:
    """Large enough that a step spreads the rows of its matrices over the threads."""
    model = make_model(hidden_size=384, num_attention_heads=6, intermediate_size=1536, vocab_size=301)
    tokens = draw(model, 2, 2)
    expected = serial_logits(model, tokens)
    session = model.session(2, 2)
    with llmcomp.use_threads(2):
        steps = [session.step(tokens[:, t]) for t in range(2)]
        assert_same_bits(np.stack(steps, 1), expected)
        assert_same_bits(model.logits(tokens), expected)


@pytest.mark.parametrize("first", [1, 5, 15, 16, 17, 31, 32, 47])
def test_any_split_into_prefill_and_steps(backend: str, first: int) -> None:
    model = make_model()
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


def test_batch_padding_and_company_do_not_matter(backend: str) -> None:
    model = make_model()
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


def test_streams_start_stop_and_restart_on_their_own() -> None:
    model = make_model()
    tokens = draw(model, 4, 30)
    expected = serial_logits(model, tokens)
    session = model.session(4)
    rng = np.random.default_rng(5)
    seen = np.zeros(4, int)
    for _ in range(120):
        active = rng.random(4) < 0.6
        active &= seen < 30
        given = np.where(active, tokens[np.arange(4), np.minimum(seen, 29)], -1)
        logits = session.step(given, active)
        for stream in np.flatnonzero(active):
            assert_same_bits(logits[stream], expected[stream, seen[stream]])
        assert not logits[~active].any()
        seen += active
        if rng.random() < 0.1:
            stream = int(rng.integers(4))
            session.reset(stream)
            seen[stream] = 0
        np.testing.assert_array_equal(session.positions, seen)
    session.reset()
    assert not session.positions.any()


def test_intervals_are_those_of_the_logits(backend: str) -> None:
    model = make_model(vocab_size=1100)
    tokens, targets = draw(model, 3, 37), draw(model, 3, 37, seed=6) % 1000
    lengths = [37, 5, 0]
    found = model.intervals(tokens, targets, lengths, vocab_size=1000)
    expected = llmcomp.intervals(serial_logits(model, tokens), targets, vocab_size=1000)
    for part, whole in zip(found, expected, strict=True):
        assert part.dtype == np.uint64
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(part[row, :length], whole[row, :length])
            assert not part[row, length:].any()


def test_many_sequences_run_in_waves(backend: str) -> None:
    """More than one workspace holds: 48 sequences whose keys and values take 2 MB each."""
    model = make_model(hidden_size=256, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1)
    tokens = np.repeat(draw(model, 1, 48), 120, axis=0)
    if backend == "serial":
        tokens = tokens[:2]
    logits = model.logits(tokens, np.where(np.arange(len(tokens)) % 40 == 0, 48, 1))
    assert_same_bits(logits[0], serial_logits(model, tokens[:1])[0])
    for row in range(1, len(tokens)):
        assert_same_bits(logits[row, 0], logits[0, 0])


@pytest.mark.parametrize("scale", [30.0, 1e-3, 1e12])
def test_large_and_tiny_weights(backend: str, scale: float) -> None:
    """Saturated softmax and GELU, denormal products, and overflow: whatever comes out is the same everywhere."""
    model = make_model(scale=scale)
    tokens = draw(model, 2, 40)
    expected = serial_logits(model, tokens)
    found = model.logits(tokens)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(found, expected)
    session = model.session(2)
    steps = np.stack([session.step(tokens[:, t]) for t in range(40)], 1)
    np.testing.assert_array_equal(steps, expected)


def test_an_overflow_later_in_a_sequence_leaves_earlier_rows_alone(backend: str) -> None:
    config = make_config()
    weights = make_weights(config)
    for i in range(config["num_hidden_layers"]):
        weights[f"gpt_neox.layers.{i}.attention.query_key_value.weight"][16:24] *= np.float32(1e30)  # values of head 0
    weights["gpt_neox.embed_in.weight"][7] = 0
    weights["gpt_neox.embed_in.weight"][7, 0] = np.float32(3e38)
    model = ExactModel(config, weights)
    tokens = draw(model, 1, 20) % 7
    tokens[0, 9] = 7
    found = model.logits(tokens)
    session = model.session(1)
    steps = np.stack([session.step(tokens[:, t]) for t in range(20)], 1)
    np.testing.assert_array_equal(found, steps)
    np.testing.assert_array_equal(found, serial_logits(model, tokens))


def test_flush_to_zero_of_the_caller_changes_nothing(backend: str) -> None:
    torch = pytest.importorskip("torch")
    config = make_config()
    weights = make_weights(config)
    for name, value in weights.items():
        if name.endswith("query_key_value.weight"):
            value *= np.float32(1e-38)
    model = ExactModel(config, weights)
    tokens = draw(model, 2, 20)
    expected = serial_logits(model, tokens)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert float(torch.tensor(1e-38) * 0.1) == 0
        assert_same_bits(model.logits(tokens), expected)
        session = model.session(2)
        steps = np.stack([session.step(tokens[:, t]) for t in range(20)], 1)
        assert float(torch.tensor(1e-38) * 0.1) == 0
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(steps, expected)


def short_and_wide(config: dict, dtype: str) -> tuple[ExactModel, ExactModel]:
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
    return ExactModel(config, short), ExactModel(config, wide)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_weights_equal_their_widened_ones(backend: str, dtype: str) -> None:
    model, wide = short_and_wide(make_config(hidden_size=42, rotary_pct=0.3, intermediate_size=67), dtype)
    tokens = np.random.default_rng(2).integers(0, 61, (2, 30))
    assert model.dtype == dtype
    assert_same_bits(model.logits(tokens), serial_logits(wide, tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("intermediate", [96, 2060])
def test_steps_with_short_weights_for_any_number_of_streams(backend: str, dtype: str, intermediate: int) -> None:
    """Rows that come in blocks and rows left over, chains in one piece and cut, few tokens and a panel of them."""
    config = make_config(hidden_size=72, num_attention_heads=2, rotary_pct=0.5, intermediate_size=intermediate)
    model, wide = short_and_wide(config, dtype)
    tokens = np.random.default_rng(3).integers(0, 61, (17, 2))
    expected = serial_logits(wide, tokens)
    for n_streams in (1, 2, 3, 5, 8, 9, 17):
        session = model.session(n_streams)
        for position in range(tokens.shape[1]):
            assert_same_bits(session.step(tokens[:n_streams, position]), expected[:n_streams, position])


def test_threads_share_a_model_and_a_session_is_one_thread_s() -> None:
    model = make_model()
    tokens = draw(model, 2, 40)
    expected = serial_logits(model, tokens)
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(model.logits(tokens))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert_same_bits(result, expected)


# Arguments.


def test_wrong_arguments_name_what_was_expected() -> None:
    model = make_model()
    tokens = draw(model, 2, 5)
    bad = tokens.copy()
    bad[1, 3] = 61
    session = model.session(2, 4)
    cases = [
        (lambda: model.logits(bad), "sequence 1, position 3: token 61 .* 0 to 60"),
        (lambda: model.logits(tokens[0]), "2, \\[sequences, positions\\]"),
        (lambda: model.logits(tokens.astype(float)), "expected integers"),
        (lambda: model.logits(np.zeros((1, 49), int)), "49 tokens .* 48"),
        (lambda: model.logits(tokens, [6, 1]), "sequence 0 has length 6; expected 0 to 5"),
        (lambda: model.intervals(tokens, bad), "sequence 1, position 3: target 61 .* 0 to 60"),
        (lambda: model.intervals(tokens, tokens[:1]), "targets have shape"),
        (lambda: model.intervals(tokens, tokens, vocab_size=62), "vocab_size is 62"),
        (lambda: model.session(0), "n_streams is 0"),
        (lambda: model.session(1, 49), "49 tokens"),
        (lambda: session.step([0, -1]), "stream 1: token -1"),
        (lambda: session.step([0]), "tokens have shape"),
        (lambda: session.step([0, 1], np.array([1, 0])), "active has dtype"),
        (lambda: session.step([0, 1], None, np.zeros((2, 60), np.float32)), "out must be"),
        (lambda: session.prefill(2, [1]), "stream 2; the session has streams 0 to 1"),
        (lambda: session.prefill(0, []), "0 tokens"),
        (lambda: session.prefill(0, [1, 2, 3, 4, 5]), "cannot take 5 more; the session holds 4"),
        (lambda: session.prefill(0, [1, 99]), "token 99"),
        (lambda: session.reset(-1), "stream -1"),
    ]
    for call, message in cases:
        with pytest.raises(Error, match=message):
            call()
    assert session.positions.tolist() == [0, 0]
    session.prefill(1, [1, 2, 3, 4])
    with pytest.raises(Error, match="stream 1 has seen 4 tokens; the session holds 4"):
        session.step([0, 0])
    assert session.positions.tolist() == [0, 4]


def test_nan_logits_are_an_error_that_names_the_row() -> None:
    config = make_config()
    weights = make_weights(config)
    weights["gpt_neox.embed_in.weight"][5] = np.nan
    model = ExactModel(config, weights)
    tokens = np.array([[1, 2, 3], [1, 5, 2]])
    with pytest.raises(Error, match=r"sequence 1, position 1: .*NaN"):
        model.intervals(tokens, tokens)


def test_empty_batches() -> None:
    model = make_model()
    assert model.logits(np.zeros((0, 5), int)).shape == (0, 5, 61)
    assert model.logits(np.zeros((2, 0), int)).shape == (2, 0, 61)


def test_out_is_filled_and_returned() -> None:
    model = make_model()
    out = np.full((2, 61), 7, np.float32)
    assert model.session(2).step([1, 2], None, out) is out
    assert_same_bits(out, serial_logits(model, np.array([[1], [2]]))[:, 0])


def test_a_cache_of_more_bytes_than_an_address_counts_is_out_of_memory() -> None:
    """Sizes that are allowed one by one: 2^12 layers, 2^6 features, 2^20 streams of 2^24 tokens: 2^64 bytes of keys."""
    d, n_layers = 64, 4096
    vector, matrix = np.ones(d, np.float16), np.ones((d, d), np.float16)
    layer = (*(vector,) * 4, np.ones((3 * d, d), np.float16), None, matrix, None, matrix, None, matrix, None)
    model = _core.NeoxModel(
        n_layers=n_layers,
        n_heads=1,
        hidden=d,
        intermediate=d,
        n_embeddings=d,
        n_logits=d,
        context_length=2**24,
        rotary_dims=0,
        rotary_base=1e4,
        layer_norm_epsilon=1e-5,
        parallel_residual=True,
        tensors=(matrix, vector, vector, matrix, *layer * n_layers),
    )
    with pytest.raises(MemoryError):
        model.session(2**20, 2**24)
    assert model.session(2, 20).n_streams == 2

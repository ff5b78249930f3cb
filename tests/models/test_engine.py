"""The exact engine: right (against binary64 and transformers), and the same bits where floats are special. What is
asked of 8-bit integers too is in test_engine_bits.py."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from engine_models import (
    VARIANTS,
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
from llmcomp.errors import Error
from llmcomp.models.engines.exact import ExactModel, load_exact
from llmcomp.models.families import parse_graph


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


def test_steps_give_the_bits_of_the_pass(backend: str) -> None:
    model = make_model()
    tokens = draw(model, 3, 48)
    session = model.session(3)
    steps = [session.step(tokens[:, t]) for t in range(48)]
    assert_same_bits(np.stack(steps, 1), serial_logits(model, tokens))
    assert session.positions.tolist() == [48, 48, 48]


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


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4, 5, 8])
def test_chain_of_steps_finds_what_steps_and_pulls_find(backend: str, n_threads: int) -> None:
    """Against payloads that the coder made from the logits of one pass."""
    model, rng = make_model(), np.random.default_rng(8)
    vocab_size = model.n_logits - 3
    tokens = rng.integers(0, vocab_size, (5, 30))
    logits = serial_logits(model, tokens)
    payloads = [llmcomp.encode(logits[s, :-1], tokens[s, 1:], vocab_size=vocab_size) for s in range(5)]
    decoder = _core.Decoder(payloads, vocab_size)
    session = model.session(5, 30)
    active = np.array([True, True, False, True, True])
    with llmcomp.use_threads(n_threads):
        session.prefill(3, tokens[3, :7])
        for position in range(7):  # stream 3 is ahead of the others
            decoder.pull(logits[:, position], np.arange(5) == 3)
        inputs = np.where(np.arange(5) == 3, tokens[:, 7], tokens[:, 0])
        found = session.decode(decoder, inputs, 9, active)
        assert session.decode(decoder, found[-1], 0, active).shape == (0, 5)
        found = np.concatenate([found, session.decode(decoder, found[-1], 4, active)])
    assert found.dtype == np.int32 and found.shape == (13, 5)
    for stream in range(5):
        first = 8 if stream == 3 else 1
        expected = tokens[stream, first : first + 13] if active[stream] else np.full(13, -1)
        assert np.array_equal(found[:, stream], expected)
    assert session.positions.tolist() == [13, 13, 0, 20, 13]


def test_chain_refuses_what_does_not_fit() -> None:
    model = make_model()
    session, decoder = model.session(2, 10), _core.Decoder([b"ab", b"cd"], model.n_logits)
    with pytest.raises(llmcomp.Error, match="decoder of 1 streams; the session has 2"):
        session.decode(_core.Decoder([b""], 3), [0, 0], 1)
    for n_steps in (-1, 11):
        with pytest.raises(llmcomp.Error, match="steps; the session holds 10 tokens"):
            session.decode(decoder, [0, 0], n_steps)
    with pytest.raises(llmcomp.Error, match="stream 1: token 999 is outside the vocabulary"):
        session.decode(decoder, [0, 999], 1)
    with pytest.raises(llmcomp.Error, match="symbols; the model has"):
        session.decode(_core.Decoder([b"ab", b"cd"], model.n_logits + 1), [0, 0], 1)
    session.decode(decoder, [0, 0], 6)
    with pytest.raises(llmcomp.Error, match="stream 0 has seen 6 tokens; the session holds 10"):
        session.decode(decoder, [0, 0], 5)
    with pytest.raises(TypeError):
        session.decode(None, [0, 0], 1)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_chain_names_the_first_stream_that_fails_whoever_computes_it(n_threads: int) -> None:
    model = make_model()
    decoder = _core.Decoder([b"ab", b"cd", b"ef", b"gh", b"ij"], model.n_logits)
    with llmcomp.use_threads(n_threads):
        with pytest.raises(llmcomp.Error, match="stream 1: token 998 is outside"):
            model.session(5, 10).decode(decoder, [0, 998, 0, 999, 1000], 3)
        with pytest.raises(llmcomp.Error, match="stream 3: token 999 is outside"):
            model.session(5, 10).decode(decoder, [0, 998, 0, 999, 1000], 3, np.array([1, 0, 1, 1, 1], bool))


def test_lanes_fit_the_caches_and_keep_threads_busy() -> None:
    model = make_model()
    token_bytes = 2 * 4 * model.config.n_layers * model.config.hidden
    with llmcomp.use_threads(1):
        assert model.lanes(64) == 32
        assert model.lanes((8 << 20) // token_bytes // 10) == 8
        assert model.lanes((256 << 20) // token_bytes // 3) == 3
        assert model.lanes(1 << 40) == 1
    with llmcomp.use_threads(3):
        assert model.lanes((16 << 20) // token_bytes // 10) == 24


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


def core_arguments_of(config: dict[str, object], **tensors: np.ndarray) -> dict[str, object]:
    """Of a model whose matrices are square and whose layers are one dict of arrays."""
    graph = parse_graph({"model_type": "gpt_neox", **config}, "model")
    d = graph.hidden
    vector, matrix = np.ones(d, np.float16), np.ones((d, d), np.float16)
    of_model = {"embedding": matrix, "final_norm_gain": vector, "head": matrix}
    layer = {"qkv": np.ones((3 * d, d), np.float16), "out": matrix, "up": matrix, "down": matrix, **tensors}
    return {"config": graph.core_config(False), "tensors": of_model, "layers": (layer,) * graph.n_layers}


SQUARE = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4, "intermediate_size": 4, "vocab_size": 4}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("missing", ["embedding", "head", "qkv", "out", "up", "down"])
def test_a_model_without_one_of_its_matrices_is_refused(missing: str, int8: bool) -> None:
    given = core_arguments_of({**SQUARE, "max_position_embeddings": 8, "rotary_pct": 0.0})
    given["config"]["int8"] = int8
    assert _core.TransformerModel(**given).logits([[1]]).shape == (1, 1, 4)
    for tensors in (given["tensors"], given["layers"][0]):
        tensors.pop(missing, None)
    with pytest.raises(llmcomp.Error, match="the tensors of the model: "):
        _core.TransformerModel(**given)


def test_what_the_core_does_not_know_of_is_refused() -> None:
    def given(**changes: object) -> dict[str, object]:
        arguments = core_arguments_of({**SQUARE, "max_position_embeddings": 8, "rotary_pct": 0.0})
        return {**arguments, "config": {**arguments["config"], **changes}}

    for changes, message in (
        ({"norm": "batch"}, "config: norm is 'batch', which is none of its values"),
        ({"n_heads": -1}, "config: n_heads is -1, expected 0 or more"),
        ({"alibi": True}, "config: 34 keys, expected 33"),
        ({"kinds": ()}, "do not fit together"),
        ({"layer_kinds": b"\1"}, "do not fit together"),
        ({"layer_kinds": b"\0\0"}, "layer_kinds has 2 layers, expected 1"),
        ({"pre_norm": False}, "do not fit together"),
        ({"n_kv_heads": 3}, "do not fit together"),
        ({"norm_epsilon": float("nan")}, "do not fit together"),
        ({"score_cap": -1.0}, "do not fit together"),
    ):
        with pytest.raises(llmcomp.Error, match=message):
            _core.TransformerModel(**given(**changes))
    for place, name in (("tensors", "positions"), ("layers", "q")):
        arguments = given()
        (arguments["tensors"] if place == "tensors" else arguments["layers"][0])[name] = np.ones((4, 4), np.float32)
        with pytest.raises(llmcomp.Error, match=f"tensor {name}: the model has no place for it"):
            _core.TransformerModel(**arguments)
    arguments = given()
    arguments["tensors"]["heads"] = np.ones((4, 4), np.float32)
    with pytest.raises(llmcomp.Error, match="4 names, of which 3 are known"):
        _core.TransformerModel(**arguments)
    arguments = given()
    arguments["layers"][0]["up"] = np.ones((4, 5), np.float32)
    with pytest.raises(llmcomp.Error, match="tensor up has 20 elements; expected 16"):
        _core.TransformerModel(**arguments)


def test_a_cache_of_more_bytes_than_an_address_counts_is_out_of_memory() -> None:
    """Sizes that are allowed one by one: 2^12 layers, 2^6 features, 2^20 streams of 2^24 tokens: 2^64 bytes of keys."""
    sizes = {"num_hidden_layers": 4096, "num_attention_heads": 1, "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 2**24, "rotary_pct": 0.0}
    model = _core.TransformerModel(**core_arguments_of(sizes))
    with pytest.raises(MemoryError):
        model.session(2**20, 2**24)
    assert model.session(2, 20).n_streams == 2

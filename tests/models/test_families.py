"""Every family against transformers in binary64, at odd sizes and with its switches on and off; what its config.json
may say; real configurations; and a small Llama that was really trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import assert_same_bits, serial_logits
from family_models import ALL, CASES, config_of, logits32, logits64, make_module, save
from real_data import FAMILIES_DATA

import llmcomp
from llmcomp.errors import Error
from llmcomp.models.checkpoint import tensor_shapes
from llmcomp.models.engines import torch as engine_torch
from llmcomp.models.engines.exact import ExactModel, load_exact
from llmcomp.models.families import FAMILIES, parse_graph

N_TOKENS = 97


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' model, its folder) of a family and case, made once."""
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def of(family: str, case: str) -> tuple[Any, Path]:
        if (family, case) not in made:
            module = make_module(family, case)
            made[family, case] = module, save(module, tmp_path_factory.mktemp(family))
        return made[family, case]

    return of


def test_every_family_has_cases() -> None:
    assert set(CASES) == set(FAMILIES)
    assert all(len(cases) >= 3 for cases in CASES.values())


@pytest.mark.parametrize(("family", "case"), ALL)
def test_logits_agree_with_transformers_in_binary64(family: str, case: str, module_folder: Any) -> None:
    module, folder = module_folder(family, case)
    tokens = np.random.default_rng(2).integers(0, module.config.vocab_size, (3, N_TOKENS))
    of_torch, expected = logits32(module, tokens), logits64(module, tokens)
    model = load_exact(folder)
    found, largest = model.logits(tokens), np.abs(expected).max()
    assert found.dtype == np.float32 and found.shape == expected.shape
    error, torch_error = (np.abs(logits - expected).max() / largest for logits in (found, of_torch))
    assert error < 2e-5, f"transformers in float32: {torch_error:.1e}"
    assert error < 6 * max(torch_error, 2e-7), "far less exact than transformers in float32"
    assert model.n_params == sum(parameter.numel() for parameter in module.parameters()) + _buffers(family, module)


def _buffers(family: str, module: Any) -> int:
    """xIELU's two numbers a layer that are no parameters but stored."""
    return 2 * module.config.num_hidden_layers if family == "apertus" else 0


@pytest.mark.parametrize("engine", ["exact", "exact-int8"])
@pytest.mark.parametrize(("family", "case"), ALL)
def test_steps_and_backends_give_the_bits_of_the_serial_pass(
    family: str, case: str, engine: str, module_folder: Any
) -> None:
    folder = module_folder(family, case)[1]
    model = load_exact(folder, engine=engine)
    tokens = np.random.default_rng(3).integers(0, model.n_logits, (5, 41))
    expected = serial_logits(model, tokens)
    for backend in llmcomp.backends():
        with llmcomp.use_backend(backend), llmcomp.use_threads(2):
            assert_same_bits(model.logits(tokens), expected)
            session = model.session(5, 41)
            for stream in range(5):  # streams that are ahead of one another
                if stream:
                    assert_same_bits(
                        session.prefill(stream, tokens[stream, : 4 * stream]), expected[stream, 4 * stream - 1]
                    )
            for t in range(24):
                at = t + 4 * np.arange(5)
                logits = session.step(tokens[np.arange(5), at])
                assert_same_bits(logits, expected[np.arange(5), at])


# A sliding window keeps only its window of keys and values.


def windowed_model(**changes: Any) -> ExactModel:
    """Two layers that see 9 and 40 tokens, in a context of 1,000."""
    keys = {
        **{"model_type": "olmo3", "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1000, "sliding_window": 9},
        **{"layer_types": ["sliding_attention", "sliding_attention"], **changes},
    }
    rng = np.random.default_rng(5)
    weights = {}
    for name, shape in tensor_shapes(keys):
        centre, scale = (1.0, 0.3) if len(shape) == 1 else (0.0, 1.5 / shape[-1] ** 0.5)
        weights[name] = (centre + scale * rng.standard_normal(shape)).astype(np.float32)
    return ExactModel(keys, weights)


def test_rings_of_keys_give_the_bits_of_the_pass(backend: str) -> None:
    model = windowed_model(layer_types=["sliding_attention", "full_attention"])
    length = 400 if backend == "serial" else 1000
    tokens = np.random.default_rng(6).integers(0, 31, (2, length))
    expected = serial_logits(model, tokens)
    session = model.session(2, length)
    assert_same_bits(session.prefill(0, tokens[0, : length - 60]), expected[0, length - 61])
    assert_same_bits(session.prefill(1, tokens[1, :35]), expected[1, 34])
    assert_same_bits(session.prefill(1, tokens[1, 35 : length - 99]), expected[1, length - 100])
    session.prefill(1, tokens[1, length - 99 : length - 60])
    for t in range(length - 60, length):
        assert_same_bits(session.step(tokens[:, t]), expected[:, t])
    session.reset(0)  # what the ring still holds is of no stream any more
    for t in range(30):
        assert_same_bits(session.step([tokens[0, t], -1], [True, False])[0], expected[0, t])


def test_a_window_bounds_the_memory_of_a_session() -> None:
    bounded = windowed_model()
    unbounded = windowed_model(layer_types=["full_attention", "full_attention"])
    kept, whole = (model._cache_floats(1000) for model in (bounded, unbounded))
    assert whole == 2 * 2 * 2 * 6 * 1000
    assert kept < 0.28 * whole
    assert bounded.lanes(100_000) >= unbounded.lanes(100_000)


# What a config.json may say.

LLAMA = {
    **{"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2},
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi": True}, "alibi = True, which the exact engine does not know of 'llama' models"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*, expected nothing of the kind"),
        ({"hidden_act": "gelu_10"}, "hidden_act is 'gelu_10', expected one of"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ({"hidden_size": 18}, "hidden_size 18 is no multiple"),
        ({"head_dim": 5}, "5 rotary dimensions, expected an even number"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', expected true or false"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "type 'longrope'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1.0}},
            "'yarn' have a mscale, which is not known",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "a number low_freq_factor"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, which llama models do not"),
        ({"rope_interleaved": True}, "rope_interleaved is True, expected nothing of the kind"),
        ({"model_type": "mistral", "sliding_window": "all"}, "sliding_window is 'all', expected a positive integer"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer_types is .*, expected 2 times"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
            "use_sliding_window is None, expected true",
        ),
        ({"model_type": "olmo3", "rope_theta": 10000.0}, "rope_theta is 10000.0, expected 500000, or rope_parameters"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act is 'silu', expected one of gelu, gelu_new"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0, expected a number that is not 0"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers is .*, expected 2 times 0 or 1"),
        ({"model_type": "apertus", "qk_norm": False}, "qk_norm is False, expected true"),
        ({"model_type": "apertus", "rope_theta": 500.0}, "rope_theta is 500.0, expected 12000000, or rope_scaling"),
        ({"model_type": "apertus", "rope_scaling": None}, "rope_scaling is None, expected an object"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0, expected"),
        ({"model_type": "stablelm", "head_dim": 8}, "head_dim is 8, expected hidden_size / num_attention_heads, 4"),
        (
            {"model_type": "stablelm", "hidden_size": 32, "rope_pct": 0.5},
            "rope_pct is 0.5, expected partial_rotary_factor, 0.25",
        ),
        (
            {"model_type": "stablelm", "hidden_size": 32, "norm_eps": 1e-6},
            "norm_eps is 1e-06, expected layer_norm_eps, 1e-05",
        ),
        ({"model_type": "gemma2", "sliding_window_size": 9}, "sliding_window_size is 9, expected sliding_window, 4096"),
    ],
)
def test_what_is_not_understood_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        parse_graph({**LLAMA, **changes}, "model")


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "llama", "max_sequence_length": 2048},  # Llama 1, Amber
        {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True}},
        {"model_type": "llama", "transformers.js_config": {"dtype": "q4"}},  # SmolLM2
        {"model_type": "smollm3", "max_window_layers": 28, "use_sliding_window": False, "sliding_window": None},
        {"model_type": "gemma2", "sliding_window": 4096, "sliding_window_size": 4096},
        {
            "model_type": "stablelm",
            "hidden_size": 32,
            "norm_eps": 1e-5,
            "num_heads": 4,
            "rope_pct": 0.25,
            "rotary_scaling_factor": 1.0,
        },
        {"model_type": "gpt2", "n_special": 0, "predict_special_tokens": True, "_num_labels": 1, "output_past": True},
    ],
    ids=lambda keys: keys["model_type"],
)
def test_keys_of_published_files_without_effect_are_understood(keys: dict[str, Any]) -> None:
    """What transformers does not read, and is in the files of these families: the graph is the one without."""
    own = {"model_type", "hidden_size", "rope_scaling", "sliding_window", "use_sliding_window"}
    base = {} if keys["model_type"] == "gpt2" else LLAMA
    plain = {**base, **{key: value for key, value in keys.items() if key in own}}
    if keys.get("rope_scaling"):
        plain["rope_scaling"] = {"type": "yarn", "factor": 16.0}
    assert parse_graph({**base, **keys}, "model") == parse_graph(plain, "model")


def test_gpt2_says_what_it_does_not_know() -> None:
    known = (("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True), ("n_ctx", 7), ("n_special", 2))
    for key, value in known:
        with pytest.raises(Error, match=f"{key} is {value}"):
            parse_graph({"model_type": "gpt2", key: value}, "model")


def test_a_family_is_version_2_and_gpt_neox_version_1(module_folder: Any) -> None:
    versions = {case: load_exact(module_folder("gpt_neox", case)[1]).arithmetic for case in CASES["gpt_neox"]}
    assert versions == {"parallel": 1, "sequential, tanh": 2, "scaled": 2}
    assert load_exact(module_folder("llama", "plain")[1]).arithmetic == 2


def test_the_engine_is_chosen_by_the_family(
    module_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = module_folder("llama", "plain")[1]
    assert llmcomp.load_model(folder).engine == "exact"
    (tmp_path / "config.json").write_text(json.dumps({**config_of(folder), "model_type": "opt"}), "utf-8")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(Error, match="'opt' model, the exact engine computes gpt_neox"):
        llmcomp.load_model(tmp_path, engine="exact")
    monkeypatch.setattr(engine_torch, "load_torch", lambda *_, **__: "a model of transformers")
    with pytest.warns(UserWarning, match="'opt' model, which the exact engine does not know: engine='torch' runs it"):
        assert llmcomp.load_model(tmp_path) == "a model of transformers"


# Real files.

REFUSED = {
    "Mixtral-8x7B-v0.1.json": "model_type is 'mixtral'",
    "Qwen2-1.5B-Instruct.json": "mask_value = -10000",
    "gpt-oss-20b.json": "model_type is 'gpt_oss'",
    "phi-3-mini-4k-instruct.json": "model_type is 'phi3'",
}
REAL = sorted(path.name for path in (FAMILIES_DATA / "configs").glob("*.json"))


@pytest.mark.skipif(not REAL, reason="no real configurations here")
@pytest.mark.parametrize("name", REAL or [None])
def test_real_configurations_load_by_shape_or_say_why_not(name: str, tmp_path: Path) -> None:
    """Scaled down: fewer layers, narrower, a smaller vocabulary; heads and their groups as they are."""
    config = json.loads((FAMILIES_DATA / "configs" / name).read_text("utf-8"))
    if name in REFUSED:
        with pytest.raises(Error, match=REFUSED[name]):
            parse_graph(config, name)
        return
    graph = parse_graph(config, name)
    assert graph.n_layers == config.get("num_hidden_layers", config.get("n_layer"))
    small = {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 211, "max_position_embeddings": 128}
    if graph.family == "gpt2":
        small = {"n_layer": 2, "vocab_size": 211, "n_positions": 128, "n_ctx": 128}
    small = {**config, **small}
    if "layer_types" in config:
        small["layer_types"] = config["layer_types"][2:4]
    model = _random_model(small)
    tokens = np.random.default_rng(7).integers(0, 211, (1, 12))
    logits = model.logits(tokens)
    assert np.isfinite(logits).all() and logits.std() > 0
    session = model.session(1, 12)
    assert_same_bits(np.stack([session.step(tokens[:, t]) for t in range(12)], 1), logits)


def _random_model(config: dict[str, Any]) -> ExactModel:
    rng = np.random.default_rng(1)
    weights = {name: (0.05 * rng.standard_normal(shape)).astype(np.float16) for name, shape in tensor_shapes(config)}
    return ExactModel(config, weights)


STORIES = FAMILIES_DATA / "models" / "stories260K-hf"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the trained Llama is not here")
def test_a_trained_llama_writes_what_it_writes_elsewhere() -> None:
    """Greedy tokens by transformers, in the file beside the weights."""
    model = llmcomp.load_model(STORIES)
    expected = json.loads((STORIES / "expected.json").read_text("utf-8"))
    for run in expected["runs"]:
        ids = run["greedy_ids"]
        found = model.logits([ids])[0].argmax(-1)
        n_prompt = len(run["prompt_ids"])
        assert found[n_prompt - 1 : -1].tolist() == ids[n_prompt:]
        # And its story takes as many bits as transformers in binary64 says, in a payload that decodes.
        tokens = np.array(ids)
        bits = llmcomp.code_length(model.logits([ids])[0, :-1], tokens[1:])
        assert abs(bits.mean() - run["nll_nats_of_ids_after_first_float64"] / np.log(2) / (len(ids) - 1)) < 1e-4
        payload = llmcomp.encode(model.logits([ids])[0, :-1], tokens[1:])
        assert 8 * len(payload) < bits.sum() + 16
        decoder, session, token = llmcomp.Decoder([payload]), model.session(1), ids[0]
        for expected_token in ids[1:]:
            token = decoder.pull(session.step([token]))[0]
            assert token == expected_token

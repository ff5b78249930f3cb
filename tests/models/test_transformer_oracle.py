"""The graph with switches, bit for bit, against a second implementation written from csrc/FORMAT.md alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformer_oracle import Oracle

import llmcomp
from llmcomp import _core
from llmcomp.errors import Error

PLAIN = {
    **{"dims": 6, "scaling": "plain", "base": 10000.0, "factor": 1.0, "original_length": 16.0, "low_factor": 1.0},
    **{"high_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.0, "truncate": True, "window": 0},
}
# GPT-NeoX with more key heads than it could have otherwise: three queries share one.
BASE = {
    **{"n_layers": 2, "hidden": 18, "intermediate": 21, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8},
    **{"n_embeddings": 29, "n_logits": 31, "context_length": 40, "learned_positions": False, "head_bias": False},
    **{"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_multiplier": 1.0, "logits_cap": 0.0},
    **{"norm": "layer", "norm_epsilon": 1e-5, "norm_offset": False, "pre_norm": True, "post_norm": False},
    **{"parallel_residual": False, "shared_norm": False, "fused_qkv": False, "qkv_clip": 0.0, "qk_norm": "none"},
    **{"attention_divisor": 8.0, "attention_multiplier": 0.0, "score_cap": 0.0, "activation": "gelu", "gated": False},
    **{"kinds": (PLAIN,), "layer_kinds": b"\0\0", "int8": False},
}
YARN = {"scaling": "yarn", "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "fused, parallel": {"fused_qkv": True, "n_kv_heads": 6, "parallel_residual": True},
    "parallel, shared norm, head bias": {"parallel_residual": True, "shared_norm": True, "head_bias": True},
    "learned positions, no rotary": {"learned_positions": True, "kinds": ({**PLAIN, "dims": 0},)},
    "rms": {"norm": "rms", "norm_epsilon": 1e-6},
    "rms with 1 + w, both norms": {"norm": "rms", "norm_offset": True, "post_norm": True},
    "post norms alone": {"norm": "rms", "pre_norm": False, "post_norm": True},
    "layer norms after": {"post_norm": True},
    "norm of heads": {"norm": "rms", "qk_norm": "head"},
    "layer norm of heads": {"qk_norm": "head"},
    "norm of each head": {"qk_norm": "each_head"},
    "norm of all heads": {"norm": "rms", "qk_norm": "full", "norm_offset": True},
    "clipped": {"qkv_clip": 0.7},
    "multi-query": {"n_kv_heads": 1},
    "one head each": {"n_kv_heads": 6},
    "window": {"kinds": ({**PLAIN, "window": 5},)},
    "window of 16, and none": {"kinds": ({**PLAIN, "window": 16}, PLAIN), "layer_kinds": b"\0\1"},
    "window of 20, no positions": {
        "kinds": ({**PLAIN, "window": 20}, {**PLAIN, "dims": 0, "window": 1}),
        "layer_kinds": b"\1\0",
    },
    "capped": {"score_cap": 2.0, "logits_cap": 3.0},
    "capped, own scale": {"score_cap": 1.5, "attention_multiplier": 0.5},
    "own divisor": {"attention_divisor": 20.0},
    "own scale": {"attention_multiplier": 0.3},
    "multipliers": {"embedding_multiplier": 4.25, "residual_multiplier": 0.3, "logits_multiplier": 0.15},
    "linear": {"kinds": ({**PLAIN, "scaling": "linear", "factor": 3.0},)},
    "llama3": {
        "kinds": ({**PLAIN, "dims": 8, "scaling": "llama3", "factor": 8.0, "original_length": 32.0, "base": 300.0},)
    },
    "yarn": {"kinds": ({**PLAIN, **YARN, "dims": 8, "beta_fast": 2.0, "base": 500.0, "original_length": 64.0},)},
    "yarn, not cut": {"kinds": ({**PLAIN, **YARN, "dims": 8, "truncate": False, "attention_factor": 1.7},)},
    **{name: {"activation": name} for name in ("gelu_tanh", "silu", "relu", "relu_squared", "xielu")},
    **{f"gated {name}": {"activation": name, "gated": True} for name in ("gelu", "gelu_tanh", "silu", "relu")},
}


# Long: every tensor that any graph has.
def make_arrays(config: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    """Every tensor that the config has a place for, by asking the core."""
    rng = np.random.default_rng(seed)
    h, g, e, d = config["n_heads"], config["n_kv_heads"], config["head_dim"], config["hidden"]
    m = config["intermediate"]

    def draw(*shape: int, centre: float = 0.0, scale: float = 1.0) -> np.ndarray:
        values = (centre + scale * rng.standard_normal(shape)).astype(np.float32)
        if dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(dtype)

    def matrix(rows: int, columns: int, scale: float = 1.5) -> np.ndarray:
        return draw(rows, columns, scale=scale / columns**0.5)

    def norm(name: str, n: int) -> dict[str, np.ndarray]:
        bias = {f"{name}_bias": draw(n, scale=0.3)} if config["norm"] == "layer" else {}
        return {f"{name}_gain": draw(n, centre=float(not config["norm_offset"]), scale=0.3), **bias}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, np.ndarray]:
        return {name: matrix(rows, columns), **({f"{name}_bias": draw(rows, scale=0.3)} if bias else {})}

    def layer(i: int) -> dict[str, np.ndarray]:
        found = {**linear("out", d, h * e, i == 0), **linear("up", m, d), **linear("down", d, m)}
        if config["fused_qkv"]:
            found |= linear("qkv", 3 * h * e, d)
        else:
            found |= {**linear("q", h * e, d), **linear("k", g * e, d, i == 1), **linear("v", g * e, d)}
        if config["gated"]:
            found |= linear("gate", m, d, i == 1)
        for place in ("attention", "mlp"):
            if config["pre_norm"] and not (place == "mlp" and config["shared_norm"]):
                found |= norm(f"{place}_norm", d)
            if config["post_norm"]:
                found |= norm(f"{place}_post_norm", d)
        if config["qk_norm"] != "none":
            one = config["qk_norm"] == "head"
            found |= {**norm("q_norm", e if one else h * e), **norm("k_norm", e if one else g * e)}
        if config["activation"] == "xielu":
            found["activation"] = np.array([0.3, -0.4, 0.5, -1e-6], np.float32)
        return found

    tensors = {"embedding": matrix(config["n_embeddings"], d, 4.0), "head": matrix(config["n_logits"], d)}
    tensors |= norm("final_norm", d)
    if config["learned_positions"]:
        tensors["positions"] = draw(config["context_length"], d)
    if config["head_bias"]:
        tensors["head_bias"] = draw(config["n_logits"])
    return {"tensors": tensors, "layers": tuple(layer(i) for i in range(config["n_layers"]))}


def check(config: dict[str, Any], seed: int = 0, dtype: str = "float32", n_tokens: int = 37) -> np.ndarray:
    arrays = make_arrays(config, seed, dtype)
    tokens = np.random.default_rng(seed + 1).integers(0, config["n_embeddings"], n_tokens)
    expected = Oracle(config, arrays["tensors"], list(arrays["layers"])).logits(tokens)
    model = _core.TransformerModel(config, **arrays)
    for backend in llmcomp.backends():
        with llmcomp.use_backend(backend):
            found = model.logits(tokens[None])[0]
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), err_msg=backend)
    return expected


@pytest.mark.parametrize("case", CASES)
def test_every_switch_gives_the_oracles_bits(case: str) -> None:
    config = {**BASE, **CASES[case]}
    changed = check(config)
    assert np.isfinite(changed).all() and np.abs(changed).max() > 0.5
    if case != "base" and changed.shape == (37, 31):
        arrays = make_arrays(config, 0, "float32")
        tokens = np.random.default_rng(1).integers(0, config["n_embeddings"], 37)
        # The switch matters: without it the same weights, as far as they fit, give something else.
        try:
            plain = _core.TransformerModel({**config, **{key: BASE[key] for key in CASES[case]}}, **arrays)
        except Error:
            return
        assert not np.array_equal(plain.logits(tokens[None])[0], changed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["rms with 1 + w, both norms", "gated silu", "norm of each head"])
def test_short_weights_give_the_oracles_bits(case: str, dtype: str) -> None:
    check({**BASE, **CASES[case]}, 3, dtype)


@pytest.mark.parametrize("case", ["base", "gated silu", "post norms alone", "capped", "window", "xielu", "multi-query"])
def test_8_bit_integers_give_the_oracles_bits(case: str) -> None:
    check({**BASE, **CASES[case], "int8": True}, 4, "float32", 21)


def test_all_at_once() -> None:
    """As Gemma 3 has it: sizes that no vector likes, and windows shorter and longer than a panel."""
    config = {
        **{**BASE, "n_layers": 4, "hidden": 22, "n_heads": 7, "n_kv_heads": 1, "head_dim": 10, "intermediate": 33},
        **{"norm": "rms", "norm_offset": True, "post_norm": True, "qk_norm": "head", "activation": "gelu_tanh"},
        **{"gated": True, "embedding_multiplier": 4.5, "score_cap": 4.0, "logits_cap": 6.0, "attention_divisor": 7.0},
        "kinds": (
            {**PLAIN, "window": 3},
            {**PLAIN, "dims": 10, "scaling": "linear", "factor": 8.0},
            {**PLAIN, "window": 19},
        ),
        "layer_kinds": b"\0\1\2\0",
    }
    check(config, 5)

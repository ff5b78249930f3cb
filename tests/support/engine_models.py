"""Tiny GPT-NeoX models for the tests of the exact engine, and a forward pass in binary64 that shares no code with the
engine or transformers: written from the description of the architecture (Black et al., "GPT-NeoX-20B", 2022).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from scipy.special import erf

import llmcomp
from llmcomp.models.engines.exact import ExactModel

DEFAULT = {
    "model_type": "gpt_neox",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "hidden_act": "gelu",
}


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
    "wide": {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 1100, "vocab_size": 1031},
}


def make_config(**changes: Any) -> dict[str, Any]:
    return {**DEFAULT, **changes}


def make_weights(config: dict[str, Any], seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """float32 weights large enough that attention is far from uniform and GELU far from linear."""
    rng = np.random.default_rng(seed)
    hidden, wide = config["hidden_size"], config["intermediate_size"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * scale * 1.5 / np.sqrt(columns)).astype(np.float32)

    def vector(n: int, centre: float = 0.0) -> np.ndarray:
        return (centre + 0.3 * scale * rng.standard_normal(n)).astype(np.float32)

    weights = {"gpt_neox.embed_in.weight": matrix(config["vocab_size"], hidden) * np.float32(3)}
    for i in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{norm}.weight"], weights[f"{layer}{norm}.bias"] = vector(hidden, 1.0), vector(hidden)
        for name, rows, columns in (
            ("attention.query_key_value", 3 * hidden, hidden),
            ("attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", wide, hidden),
            ("mlp.dense_4h_to_h", hidden, wide),
        ):
            weights[f"{layer}{name}.weight"] = matrix(rows, columns)
            if config["attention_bias"] or name.startswith("mlp"):
                weights[f"{layer}{name}.bias"] = vector(rows)
    weights["gpt_neox.final_layer_norm.weight"] = vector(hidden, 1.0)
    weights["gpt_neox.final_layer_norm.bias"] = vector(hidden)
    if not config["tie_word_embeddings"]:
        weights["embed_out.weight"] = matrix(config["vocab_size"], hidden)
    return weights


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def int8_rounded(rows: np.ndarray) -> np.ndarray:
    """Each row (last axis) as whole multiples, at most 127, of 1/127 of its largest magnitude: float64."""
    largest = np.abs(rows).max(-1, keepdims=True)
    return np.rint(rows * (127 / np.where(largest == 0, 1, largest))) * (largest / 127)


# Long: a whole forward pass, one function for each of its parts.
def reference_logits(
    config: dict[str, Any], weights: dict[str, np.ndarray], tokens: np.ndarray, *, int8: bool = False
) -> np.ndarray:
    """float64 [B, T, vocab_size]; only the positions' angles are rounded to binary32, as trained models have them.

    `int8`: weights and inputs of the linear maps and the head are `int8_rounded`.
    """
    w = {name.removeprefix("gpt_neox."): value.astype(np.float64) for name, value in weights.items()}
    n_heads, head_dim = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]
    n_tokens, parallel = tokens.shape[1], config["use_parallel_residual"]
    rotary = int(head_dim * config["rotary_pct"])
    exponents = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    powers = (float(config["rotary_emb_base"]) ** exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(n_tokens, dtype=np.float32)[:, None] * (np.float32(1) / powers)
    cosine, sine = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return int8_rounded(x) @ int8_rounded(weight).T if int8 else x @ weight.T

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return product(x, w[f"{name}.weight"]) + w.get(f"{name}.bias", 0.0)

    def turn(x: np.ndarray) -> np.ndarray:
        low, high = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
        return np.concatenate([low * cosine - high * sine, high * cosine + low * sine, x[..., rotary:]], -1)

    def attention(x: np.ndarray, layer: str) -> np.ndarray:
        qkv = linear(x, f"{layer}attention.query_key_value").reshape(*x.shape[:2], n_heads, 3, head_dim)
        query, key, value = (qkv[..., i, :].transpose(0, 2, 1, 3) for i in range(3))
        scores = turn(query) @ turn(key).transpose(0, 1, 3, 2) / np.sqrt(head_dim)
        scores = np.where(np.tri(n_tokens, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ value
        return linear(mixed.transpose(0, 2, 1, 3).reshape(x.shape), f"{layer}attention.dense")

    def mlp(x: np.ndarray, layer: str) -> np.ndarray:
        wide = linear(x, f"{layer}mlp.dense_h_to_4h")
        return linear(wide * 0.5 * (1 + erf(wide / np.sqrt(2))), f"{layer}mlp.dense_4h_to_h")

    x = w["embed_in.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}."
        mixed = attention(norm(x, f"{layer}input_layernorm"), layer)
        middle = x if parallel else x + mixed
        x = x + mixed + mlp(norm(middle, f"{layer}post_attention_layernorm"), layer)
    head = w["embed_in.weight"] if config["tie_word_embeddings"] else w["embed_out.weight"]
    return product(norm(x, "final_layer_norm"), head)


def draw(model: ExactModel, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.n_logits, shape)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def serial_logits(model: ExactModel, tokens: np.ndarray) -> np.ndarray:
    with llmcomp.use_backend("serial"), llmcomp.use_threads(1):
        return model.logits(tokens)

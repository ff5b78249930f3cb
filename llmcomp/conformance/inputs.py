"""What the conformance digests are computed from: numbers, rows of logits, and a small model of every family.

All of it comes from one generator of integers and a few exact operations on floats, so that it is the same everywhere.
Nothing is compared here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcomp.models.checkpoint import Tensor, tensor_shapes

UInt64Array = npt.NDArray[np.uint64]

_ODD_SIZES = {
    "vocab_size": 89,
    "hidden_size": 40,
    "intermediate_size": 57,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 64,
}
# Two queries share a key; rows that fill vectors.
_EVEN_SIZES = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
_LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Name of a model -> its config.json. Every family twice or more, with its switches on either side.
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox", **_ODD_SIZES, "rotary_pct": 0.5},
    "gpt_neox-sequential": {
        **{"model_type": "gpt_neox", **_EVEN_SIZES, "num_key_value_heads": None, "use_parallel_residual": False},
        "hidden_act": "gelu_fast",
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 89, "n_embd": 40, "n_layer": 3, "n_head": 5, "n_positions": 64},
    "gpt2-untied": {
        **{"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64},
        **{"n_inner": 96, "tie_word_embeddings": False, "activation_function": "relu"},
    },
    "llama": {"model_type": "llama", **_ODD_SIZES},
    "llama-3": {
        **{"model_type": "llama", **_EVEN_SIZES, "rope_scaling": _LLAMA3, "rope_theta": 500000.0},
        **{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    "mistral": {"model_type": "mistral", **_ODD_SIZES, "num_key_value_heads": 1, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", **_EVEN_SIZES, "sliding_window": 13},
    "qwen2": {"model_type": "qwen2", **_ODD_SIZES, "num_key_value_heads": 5, "tie_word_embeddings": True},
    "qwen2-yarn": {"model_type": "qwen2", **_EVEN_SIZES, "rope_scaling": _YARN},
    "qwen3": {"model_type": "qwen3", **_ODD_SIZES, "num_key_value_heads": 1, "head_dim": 12},
    "qwen3-window": {
        **{"model_type": "qwen3", **_EVEN_SIZES, "head_dim": 24, "use_sliding_window": True},
        **{"sliding_window": 9, "max_window_layers": 2},
    },
    "olmo": {"model_type": "olmo", **_ODD_SIZES},
    "olmo-clipped": {"model_type": "olmo", **_EVEN_SIZES, "clip_qkv": 0.75},
    "olmo2": {"model_type": "olmo2", **_ODD_SIZES},
    "olmo2-grouped": {"model_type": "olmo2", **_EVEN_SIZES, "rope_theta": 500000.0},
    "olmo3": {"model_type": "olmo3", **_EVEN_SIZES, "sliding_window": 11},
    "gemma": {"model_type": "gemma", **_ODD_SIZES, "num_key_value_heads": 1, "head_dim": 12},
    "gemma2": {
        **{"model_type": "gemma2", **_EVEN_SIZES, "head_dim": 20, "sliding_window": 9},
        **{"query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0},
    },
    "gemma3_text": {
        **{"model_type": "gemma3_text", **_EVEN_SIZES, "head_dim": 20, "sliding_window": 9},
        **{"sliding_window_pattern": 2, "query_pre_attn_scalar": 20},
    },
    "smollm3": {"model_type": "smollm3", **_EVEN_SIZES, "no_rope_layer_interval": 2},
    "apertus": {"model_type": "apertus", **_EVEN_SIZES, "rope_scaling": _LLAMA3},
    "granite": {
        **{"model_type": "granite", **_EVEN_SIZES, "embedding_multiplier": 6.0, "residual_multiplier": 0.25},
        **{"attention_multiplier": 0.125, "logits_scaling": 3.0},
    },
    "phi": {"model_type": "phi", **_ODD_SIZES, "partial_rotary_factor": 0.5},
    "phi-norms": {"model_type": "phi", **_EVEN_SIZES, "qk_layernorm": True},
    "stablelm": {
        **{"model_type": "stablelm", **_ODD_SIZES, "num_key_value_heads": 5, "partial_rotary_factor": 0.25},
        "use_qkv_bias": True,
    },
    "stablelm-parallel": {
        **{"model_type": "stablelm", **_EVEN_SIZES, "use_parallel_residual": True, "qk_layernorm": True},
        "partial_rotary_factor": 0.5,
    },
}
# How the weights of a model are stored, in turn.
_DTYPES = ("float32", "bfloat16", "float16")


def draw(seed: int, n: int) -> UInt64Array:
    """n integers of 64 bits: SplitMix64 (Steele, Lea, Flood, 2014) from the state `seed` * 2**32 on."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed << 32) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def draw_floats(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    """Multiples of 2**-20 in (-2, 2), the sum of two uniform ones: exact, and denser near 0."""
    found = draw(seed, int(np.prod(shape)))
    low, high = (found & np.uint64(0xFFFFF)).astype(np.int64), (found >> np.uint64(44)).astype(np.int64)
    return ((low + high - 0xFFFFF).astype(np.float32) * np.float32(2.0**-19)).reshape(shape)


def draw_tokens(seed: int, shape: tuple[int, ...], vocab_size: int) -> npt.NDArray[np.int64]:
    found = draw(seed, int(np.prod(shape))) % np.uint64(vocab_size)
    return found.astype(np.int64).reshape(shape)


def phrases(drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """As many tokens that come again: `drawn` up to where a fourth of it ends, that part over and over, with every
    eleventh token as it was drawn."""
    found = np.resize(drawn[: max(1, len(drawn) // 4)], len(drawn))
    found[10::11] = drawn[10::11]
    return found


def logit_rows(dtype: str) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
    """Rows of logits, `dtype` [T, V], and a token of each: flat, peaked, tied and masked rows, few and many symbols."""
    for seed, (n_rows, vocab_size, scale) in enumerate(
        [(7, 1, 1.0), (40, 2, 4.0), (64, 257, 8.0), (33, 1000, 0.0), (24, 4099, 2.0), (6, 50304, 16.0)], start=100
    ):
        logits = draw_floats(seed, n_rows, vocab_size) * np.float32(scale)
        if vocab_size > 200:
            logits[1::5, ::3] = -np.inf
            logits[2::5] = np.trunc(logits[2::5])
            logits[3::5, 17] = 60.0
            logits[4::5] *= np.float32(2.0**-60)
        yield logits.astype(dtype), draw_tokens(seed + 50, (n_rows,), vocab_size)


def synthetic_weights(name: str) -> dict[str, Tensor]:
    """The weights of MODELS[name] by their names in a checkpoint, float32, bfloat16 or float16 by its place."""
    config, place = MODELS[name], list(MODELS).index(name)
    dtype = _DTYPES[place % len(_DTYPES)]
    found = {}
    for i, (key, shape) in enumerate(tensor_shapes(config)):
        values = draw_floats(1000 * (place + 1) + i, *shape) * np.float32(_scale(key, shape))
        if "norm" in key and key.endswith("weight") and not str(config["model_type"]).startswith("gemma"):
            values += np.float32(1)
        found[key] = _stored(values, dtype)
    return found


def _scale(key: str, shape: tuple[int, ...]) -> float:
    """A power of two: what keeps the size of a vector in a matrix, an eighth in a bias or a gain."""
    if len(shape) < 2 or "embed" in key or "wte" in key or "wpe" in key:
        return 0.125 if len(shape) < 2 else 1.0
    n_inputs = shape[0] if ".c_" in key else shape[1]
    return 2.0 ** (1 - n_inputs.bit_length() // 2)


def _stored(values: npt.NDArray[np.float32], dtype: str) -> Tensor:
    if dtype == "bfloat16":
        return Tensor((values.view(np.uint32) >> 16).astype(np.uint16), dtype)
    return Tensor(values.astype(dtype), dtype)


def model_arguments(name: str) -> Mapping[str, Any]:
    """What the exact engines' classes are made of."""
    return {"config": MODELS[name], "weights": synthetic_weights(name), "name": name}

"""Small models of every family as transformers builds them, with random weights, and their logits in binary64.

The reference is transformers; nothing here knows how the engine computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# Keys that every family but GPT-2 spells alike. Three heads of 10: odd counts, and no size a vector likes.
_SIZES = {
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 43,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 97,
}
_GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 36}
_LARGER = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_SLIDING = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}

# family -> name of a case -> the keys of its config.json.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt_neox": {
        "parallel": {**_SIZES, "rotary_pct": 0.4},
        "sequential, tanh": {**_SIZES, "use_parallel_residual": False, "hidden_act": "gelu_fast"},
        "scaled": {**_LARGER, "num_key_value_heads": None, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    },
    "gpt2": {
        "plain": {"vocab_size": 61, "n_embd": 30, "n_layer": 3, "n_head": 3, "n_positions": 97},
        "inner, no scale": {
            **{"vocab_size": 61, "n_embd": 36, "n_layer": 2, "n_head": 4, "n_positions": 97, "n_inner": 50},
            **{"scale_attn_weights": False, "activation_function": "gelu"},
        },
        "untied, relu": {
            **{"vocab_size": 131, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 97},
            **{"tie_word_embeddings": False, "activation_function": "relu"},
        },
    },
    "llama": {
        "plain": {**_SIZES},
        "grouped, llama3, biases": {
            **{**_SIZES, **_GROUPED},
            **{"rope_scaling": _LLAMA3, "rope_theta": 500000.0, "attention_bias": True, "mlp_bias": True},
        },
        "wide heads, yarn, tied": {
            **{**_SIZES, "head_dim": 14, "num_key_value_heads": 1},
            **{"rope_scaling": {**_YARN, "beta_fast": 16, "beta_slow": 2}, "tie_word_embeddings": True},
        },
        "larger, linear": {**_SIZES, **_LARGER, "rope_scaling": {"type": "linear", "factor": 4.0}},
    },
    "mistral": {
        "no window": {**_SIZES, "num_key_value_heads": 3, "sliding_window": None},
        "window": {**_SIZES, **_GROUPED, "sliding_window": 11},
        "window of 16": {**_SIZES, **_LARGER, "sliding_window": 16, "head_dim": 20},
    },
    "qwen2": {
        "plain": {**_SIZES, "num_key_value_heads": 1, "use_sliding_window": False, "sliding_window": 7},
        "grouped, tied": {**_SIZES, **_GROUPED, "tie_word_embeddings": True},
        "windows, yarn": {**_SIZES, **_LARGER, **_SLIDING, "rope_scaling": {**_YARN, "attention_factor": 1.3}},
    },
    "qwen3": {
        "wide heads": {**_SIZES, "head_dim": 18, "num_key_value_heads": 1},
        "grouped, biases, tied": {
            **_SIZES,
            **_GROUPED,
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        "windows": {**_SIZES, **_LARGER, **_SLIDING, "head_dim": 24},
    },
    "olmo": {
        "plain": {**_SIZES},
        "clipped": {**_SIZES, **_GROUPED, "clip_qkv": 0.8},
        "larger, biases, tied": {
            **_SIZES,
            **_LARGER,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "clip_qkv": 2.0,
        },
    },
    "olmo2": {
        "plain": {**_SIZES},
        "grouped": {**_SIZES, **_GROUPED, "rope_theta": 500000},
        "larger, biases": {**_SIZES, **_LARGER, "attention_bias": True, "tie_word_embeddings": True},
    },
    "olmo3": {
        "windows": {**_SIZES, "num_hidden_layers": 5, "sliding_window": 9},
        "yarn": {**_SIZES, **_GROUPED, "sliding_window": 20, "rope_scaling": {**_YARN, "attention_factor": 1.2}},
        "layer types": {
            **{**_SIZES, **_LARGER, "sliding_window": 5},
            "layer_types": ["full_attention", "sliding_attention"],
        },
    },
    "gemma": {
        "plain": {**_SIZES, "head_dim": 12, "num_key_value_heads": 3},
        "multi-query": {**_SIZES, "head_dim": 10, "num_key_value_heads": 1, "hidden_act": "gelu"},
        "larger, biases": {**_SIZES, **_LARGER, "head_dim": 20, "attention_bias": True},
    },
    "gemma2": {
        "plain": {**_SIZES, "head_dim": 12, "num_key_value_heads": 3, "sliding_window": 9, "query_pre_attn_scalar": 20},
        "no caps": {
            **{**_SIZES, **_GROUPED, "head_dim": 10, "sliding_window": 16},
            **{"attn_logit_softcapping": None, "final_logit_softcapping": None},
        },
        "small caps": {
            **{**_SIZES, **_LARGER, "head_dim": 20, "sliding_window": 31, "query_pre_attn_scalar": 16},
            **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
        },
    },
    "gemma3_text": {
        "plain": {**_SIZES, "head_dim": 12, "num_key_value_heads": 3, "sliding_window": 9, "num_hidden_layers": 7},
        "grouped, pattern": {
            **{**_SIZES, **_GROUPED, "head_dim": 10, "sliding_window": 16, "sliding_window_pattern": 2},
            **{"rope_local_base_freq": 5000.0, "rope_theta": 200000.0, "query_pre_attn_scalar": 24},
        },
        "scaled": {
            **{**_SIZES, **_LARGER, "head_dim": 20, "sliding_window": 31, "final_logit_softcapping": 4.0},
            **{"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        },
    },
    "smollm3": {
        "plain": {**_SIZES, "num_hidden_layers": 5, "num_key_value_heads": 1},
        "no positions at all": {
            **_SIZES,
            **_GROUPED,
            "no_rope_layers": [0, 0, 0],
            "mlp_bias": True,
            "attention_bias": True,
        },
        "windows": {
            **{**_SIZES, **_LARGER, "no_rope_layer_interval": 2, "tie_word_embeddings": False},
            **{"use_sliding_window": True, "sliding_window": 13},
        },
    },
    "apertus": {
        "plain": {**_SIZES},
        "grouped": {
            **{**_SIZES, **_GROUPED, "attention_bias": True},
            **{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        },
        "larger, tied": {**_SIZES, **_LARGER, "tie_word_embeddings": True, "rope_scaling": _LLAMA3},
    },
    "granite": {
        "plain": {**_SIZES},
        "multipliers": {
            **{**_SIZES, **_GROUPED, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
            **{"attention_multiplier": 0.25, "logits_scaling": 7.0},
        },
        "larger, biases": {
            **{**_SIZES, **_LARGER, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            **{"attention_multiplier": 0.1, "logits_scaling": 0.5},
        },
    },
    "phi": {
        "plain": {**_SIZES, "partial_rotary_factor": 0.4},
        "norms of queries and keys": {**_SIZES, **_GROUPED, "qk_layernorm": True, "partial_rotary_factor": 1.0},
        "larger": {**_SIZES, **_LARGER, "hidden_act": "relu"},
    },
    "stablelm": {
        "plain": {**_SIZES, "num_key_value_heads": 3, "partial_rotary_factor": 0.4, "use_qkv_bias": True},
        "parallel, grouped": {**_SIZES, **_GROUPED, "use_parallel_residual": True, "partial_rotary_factor": 1.0},
        "norms of queries and keys": {**_SIZES, **_LARGER, "qk_layernorm": True, "tie_word_embeddings": True},
    },
}
ALL = [(family, case) for family, cases in CASES.items() for case in cases]


def make_module(family: str, case: str, seed: int = 0) -> Any:
    """A transformers model in float32 whose every parameter is drawn, large enough for all of it to matter."""
    import torch
    import transformers

    keys = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, **CASES[family][case]}
    config = transformers.AutoConfig.for_model(family, **keys)
    torch.manual_seed(seed)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn_like(parameter)
            if parameter.ndim == 2:
                wide = parameter.shape[0 if "c_" in name and "conv1d" in str(type(module)).lower() else 1]
                parameter.copy_(drawn * (1.0 if "embed" in name or "wte" in name else 1.5) / wide**0.5)
            elif name.endswith("alpha_p") or name.endswith("alpha_n"):
                parameter.copy_(0.3 * drawn)
            else:
                is_gain = name.endswith("weight") and family not in ("gemma", "gemma2", "gemma3_text")
                parameter.copy_(float(is_gain) + 0.3 * drawn)
    return module


def save(module: Any, folder: Path) -> Path:
    module.save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def logits64(module: Any, tokens: np.ndarray) -> np.ndarray:
    """float64 [B, T, n_logits], by transformers in binary64 (but for what it casts to binary32 on its own)."""
    return _logits(module.double(), tokens)


def logits32(module: Any, tokens: np.ndarray) -> np.ndarray:
    return _logits(module.float(), tokens)


def _logits(module: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return module(torch.from_numpy(tokens), use_cache=False).logits.numpy()

"""How many operations a transformer of a known shape takes, and how many of its parameters are no embedding.

A shape has the keys of config.json. Formulas only: nothing here reads files or knows suites.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Families whose feed-forward part has two matrices (up, down) or, gated, three.
_MATRICES_OF_MLP = {
    "gpt_neox": 2,
    "apertus": 2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "hf_olmo", "olmo2", "olmo3", "smollm3"), 3),
}


def forward_flops(family: str, shape: Mapping[str, Any], n_tokens: int) -> float | None:
    """Floating-point operations of one pass over a window of `n_tokens`: those of all products of matrices.

    A product of [m, k] and [k, n] takes 2 m k n. Token t attends to t + 1 tokens, itself among them. The output
    embedding counts, the input embedding (a look-up), norms, rotations and softmax do not. None: unknown family.
    """
    n_matrices = _MATRICES_OF_MLP.get(family)
    if n_matrices is None:
        return None
    width, n_layers, n_heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    head_width = shape.get("head_dim") or width // n_heads
    queries, keys = n_heads * head_width, shape.get("num_key_value_heads", n_heads) * head_width
    layer = width * (2 * queries + 2 * keys) + n_matrices * width * shape["intermediate_size"]
    products = 2.0 * n_tokens * (n_layers * layer + width * shape["vocab_size"])
    # Scores and weighted sums: 2 products of 2 operations for each of n (n + 1) / 2 pairs of tokens.
    attention = 2.0 * n_layers * queries * n_tokens * (n_tokens + 1)
    return products + attention


def training_flops(family: str, shape: Mapping[str, Any], n_tokens: int) -> float | None:
    """Operations of training on `n_tokens`, in windows of the shape's max_position_embeddings: three forward passes.

    The backward pass has two products for each one of the forward pass (Kaplan et al., "Scaling Laws for Neural
    Language Models", 2020, section 2.1). None: unknown family.
    """
    window = shape["max_position_embeddings"]
    one = forward_flops(family, shape, window)
    return None if one is None else 3.0 * one * n_tokens / window


def approximate_training_flops(n_params: int, n_tokens: int) -> float:
    """6 N D (Kaplan et al., 2020): N all parameters, D the tokens seen."""
    return 6.0 * n_params * n_tokens


def count_nonembedding(config: Mapping[str, Any], n_params: int) -> int | None:
    """Parameters without input and output embedding, of a model with `n_params` in all; None if `config` (config.json)
    does not tell how large those are."""
    rows, width = config.get("vocab_size"), config.get("hidden_size")
    if not isinstance(rows, int) or not isinstance(width, int):
        return None
    rest = n_params - rows * width * (1 if config.get("tie_word_embeddings", True) else 2)
    return rest if rest > 0 else None

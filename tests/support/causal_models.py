"""Tiny models of many families as transformers builds them, with random weights and a token for every byte.

Only sizes are chosen here; whatever a family computes is transformers' own.
"""

from __future__ import annotations

from typing import Any

CONTEXT = 40
_SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_HEADS = {"head_dim": 8, "sliding_window": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8}
# (family, what its config has besides). Keys that a family does not know are kept; all but sliding_window, which
# transformers' caches obey whatever the attention does, do nothing.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": CONTEXT},
    "gemma2": _HEADS,
    "bloom": {"n_layer": 2, "n_head": 4},
    "openai-gpt": _OLD,
    "gpt2": _OLD,
    "gpt_neox": {},
    "gptj": {**_OLD, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_bigcode": _OLD,
    "codegen": {**_OLD, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "qwen2": {},
    "qwen3": _HEADS,
    "qwen2_moe": {**_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_next": {
        **{**_EXPERTS, "head_dim": 8, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": _EXPERTS,
    "gemma": {"head_dim": 8},
    "gemma3_text": _HEADS,
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "stablelm": {},
    "starcoder2": {},
    "granite": {},
    "cohere": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "ctrl": {**_OLD, "dff": 48},
    "nemotron": {},
    "nanochat": {},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 2},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "jamba": {
        **{"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        **{"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8},
}
CAUSAL_FAMILIES = tuple(_FAMILIES)


def make_causal(family: str, **more: Any) -> Any:
    """transformers' model in float32; its matrices are larger than it draws them, so that what was read matters."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**_SIZES, **_FAMILIES.get(family, {}), **more})
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                # Gemma's embeddings are scaled by the root of the width: more would leave probabilities below 2^-29.
                parameter.mul_(2 if family == "gemma" else 5)
    return module

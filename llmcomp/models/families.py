"""The families of transformers that the exact engine computes: for each, its config.json's meaning and its tensors.

A key or value that is not understood is an error that names it: a wrong guess gives wrong numbers silently. Names of
switches and slots are those of csrc/include/llmcomp/transformer.h. No files are read here and nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from llmcomp.errors import Error, shown
from llmcomp.float_state import ieee_state
from llmcomp.models.config_keys import (
    NO_ROTARY,
    TANH_NAMES,
    Keys,
    demand_whole_heads,
    layer_kinds,
    parse_flat_rotary,
    parse_layer_types,
    parse_rotary,
    parse_sizes,
    rope_of,
)
from llmcomp.models.graph import BOTH_NORMS, LLAMA_NORMS, POST_NORMS, Graph, TensorPlan, llama_tensors

# Graphs. GPT-NeoX's is the one that others differ from.

_NEOX = {
    "learned_positions": False,
    "head_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_multiplier": 1.0,
    "logits_cap": 0.0,
    "norm": "layer",
    "norm_offset": False,
    "pre_norm": True,
    "post_norm": False,
    "parallel_residual": False,
    "shared_norm": False,
    "fused_qkv": False,
    "qkv_clip": 0.0,
    "qk_norm": "none",
    "attention_multiplier": 0.0,
    "score_cap": 0.0,
    "gated": False,
}
_LLAMA = {**_NEOX, "norm": "rms", "gated": True}


# What a family makes of a config.json: (switches, tensors, tied).
_Found = tuple[dict[str, Any], TensorPlan, bool]


def _gpt_neox(keys: Keys) -> _Found:
    sizes = parse_sizes(keys, hidden=6144, heads=64, layers=44, intermediate=24576, vocab=50432, context=2048)
    demand_whole_heads(keys, sizes)
    hidden, wide = sizes["hidden"], sizes["intermediate"]
    base, fraction = keys.number("rotary_emb_base", 10000.0), keys.share("rotary_pct", 0.25)
    rotary = parse_flat_rotary(keys, sizes, base=base, fraction=fraction)
    bias, tied = keys.flag("attention_bias", True), keys.flag("tie_word_embeddings", False)
    switches = {
        **_NEOX,
        **sizes,
        **layer_kinds([(0, rotary)] * sizes["n_layers"], sizes["context_length"]),
        "activation": keys.activation("hidden_act", "gelu"),
        "norm_epsilon": keys.number("layer_norm_eps", 1e-5),
        "parallel_residual": keys.flag("use_parallel_residual", True),
        "fused_qkv": True,
    }
    tensors = TensorPlan(sizes)
    tensors.add("embed_in.weight", None, "embedding", sizes["n_embeddings"], hidden)
    tensors.norm("final_layer_norm", None, "final_norm", hidden, True)
    if not tied:
        tensors.add("embed_out.weight", None, "head", sizes["n_logits"], hidden)
    for i in range(sizes["n_layers"]):
        layer = f"layers.{i}"
        tensors.norm(f"{layer}.input_layernorm", i, "attention_norm", hidden, True)
        tensors.norm(f"{layer}.post_attention_layernorm", i, "mlp_norm", hidden, True)
        tensors.linear(f"{layer}.attention.query_key_value", i, "qkv", (3 * hidden, hidden), bias)
        tensors.linear(f"{layer}.attention.dense", i, "out", (hidden, hidden), bias)
        tensors.linear(f"{layer}.mlp.dense_h_to_4h", i, "up", (wide, hidden), True)
        tensors.linear(f"{layer}.mlp.dense_4h_to_h", i, "down", (hidden, wide), True)
    return switches, tensors, tied


def _gpt2(keys: Keys) -> _Found:
    keys.off("add_cross_attention", "n_special")
    keys.get("predict_special_tokens")  # of OpenAI's GPT, without effect here
    keys.get("reorder_and_upcast_attn")  # the same numbers in another order
    hidden, n_heads = keys.size("n_embd", 768), keys.size("n_head", 12)
    context, vocab_size = keys.size("n_positions", 1024), keys.size("vocab_size", 50257)
    keys.agree("n_ctx", "n_positions", context)
    if hidden % n_heads:
        raise Error(f"{keys.name}: n_embd {hidden} is no multiple of n_head {n_heads}")
    n_layers, wide = keys.size("n_layer", 12), keys.size("n_inner", 4 * hidden)
    head_dim = hidden // n_heads
    tied = keys.flag("tie_word_embeddings", True)
    switches = {
        **_NEOX,
        "n_layers": n_layers,
        "hidden": hidden,
        "intermediate": wide,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": head_dim,
        "n_embeddings": vocab_size,
        "n_logits": vocab_size,
        "context_length": context,
        "attention_divisor": float(head_dim) if keys.flag("scale_attn_weights", True) else 1.0,
        **layer_kinds([(0, NO_ROTARY)] * n_layers, context),
        "learned_positions": True,
        "activation": keys.activation("activation_function", "gelu_new"),
        "norm_epsilon": keys.number("layer_norm_epsilon", 1e-5),
    }
    return switches, _gpt2_tensors(switches, tied), tied


def _gpt2_tensors(sizes: Mapping[str, Any], tied: bool) -> TensorPlan:
    hidden, wide, vocab_size = sizes["hidden"], sizes["intermediate"], sizes["n_logits"]
    tensors = TensorPlan(sizes)

    def turned(name: str, layer: int, slots: tuple[str, ...], n_in: int, n_out: int) -> None:
        """GPT-2's maps are stored [inputs][outputs]; several slots divide the outputs."""
        share = n_out // len(slots)
        for j, slot in enumerate(slots):
            columns = (j * share, (j + 1) * share) if len(slots) > 1 else None
            tensors.add(f"{name}.weight", layer, slot, n_in, n_out, columns=columns, transposed=True)
            tensors.add(f"{name}.bias", layer, f"{slot}_bias", n_out, columns=columns)

    tensors.add("wte.weight", None, "embedding", vocab_size, hidden)
    tensors.add("wpe.weight", None, "positions", sizes["context_length"], hidden)
    tensors.norm("ln_f", None, "final_norm", hidden, True)
    if not tied:
        tensors.add("lm_head.weight", None, "head", vocab_size, hidden)
    for i in range(sizes["n_layers"]):
        tensors.norm(f"h.{i}.ln_1", i, "attention_norm", hidden, True)
        turned(f"h.{i}.attn.c_attn", i, ("q", "k", "v"), hidden, 3 * hidden)
        turned(f"h.{i}.attn.c_proj", i, ("out",), hidden, hidden)
        tensors.norm(f"h.{i}.ln_2", i, "mlp_norm", hidden, True)
        turned(f"h.{i}.mlp.c_fc", i, ("up",), hidden, wide)
        turned(f"h.{i}.mlp.c_proj", i, ("down",), wide, hidden)
    return tensors


def _llama_like(
    keys: Keys,
    sizes: dict[str, Any],
    layers: list[tuple[int, Mapping[str, Any]]],
    *,
    tied: bool = False,
    attention_bias: bool | None = None,
    tensors: Mapping[str, Any] | None = None,
    **switches: Any,
) -> _Found:
    """`attention_bias` None: the key decides, for all four maps. `tensors`: of `llama_tensors`, `switches`: of the
    graph, what differs."""
    tied = keys.flag("tie_word_embeddings", tied)
    bias = keys.flag("attention_bias", False) if attention_bias is None else attention_bias
    switches = {**_LLAMA, **sizes, **layer_kinds(layers, sizes["context_length"]), **switches}
    switches.setdefault("activation", "silu")
    options = {"qkv_bias": bias, "out_bias": bias, "gated": switches["gated"], **(tensors or {})}
    if switches["qk_norm"] != "none":
        options["qk_norm"] = switches["qk_norm"]
    return switches, llama_tensors(sizes, tied, **options), tied


def _llama(keys: Keys) -> _Found:
    sizes = parse_sizes(keys, hidden=4096, heads=32, layers=32, intermediate=11008, vocab=32000, context=2048)
    rotary = parse_flat_rotary(keys, sizes)
    keys.get("max_sequence_length")  # Llama 1, Amber: the length that it was trained with
    return _llama_like(
        keys,
        sizes,
        [(0, rotary)] * sizes["n_layers"],
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        activation=keys.activation("hidden_act", "silu"),
        tensors={"mlp_bias": keys.flag("mlp_bias", False)},
    )


def _mistral(keys: Keys) -> _Found:
    sizes = parse_sizes(
        keys, hidden=4096, heads=32, kv_heads=8, layers=32, intermediate=14336, vocab=32000, context=131072
    )
    rotary = parse_flat_rotary(keys, sizes)
    # transformers takes a missing window for 4,096, and null for none.
    window = 0 if keys.is_null("sliding_window") else keys.size("sliding_window", 4096)
    return _llama_like(
        keys,
        sizes,
        [(window, rotary)] * sizes["n_layers"],
        attention_bias=False,
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        activation=keys.activation("hidden_act", "silu"),
    )


def _qwen(keys: Keys, *, bias: bool, **defaults: Any) -> _Found:
    sizes = parse_sizes(
        keys, hidden=4096, heads=32, kv_heads=32, layers=32, intermediate=22016, vocab=151936, context=32768, **defaults
    )
    n_layers = sizes["n_layers"]
    rotary = parse_flat_rotary(keys, sizes)
    is_sliding = keys.flag("use_sliding_window", False)
    window = keys.size("sliding_window", 4096)
    first = keys.get("max_window_layers", 28)
    if type(first) is not int:
        raise keys.error("max_window_layers", "an integer")
    has_window = parse_layer_types(keys, n_layers, lambda i: is_sliding and i >= first)
    if any(has_window) and not is_sliding:
        raise keys.error("use_sliding_window", "true, since layer_types has sliding_attention")
    return _llama_like(
        keys,
        sizes,
        [(window if has else 0, rotary) for has in has_window],
        attention_bias=None if not bias else False,
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        activation=keys.activation("hidden_act", "silu"),
        qk_norm="none" if bias else "head",
        tensors={"qkv_bias": True} if bias else {},
    )


def _qwen2(keys: Keys) -> _Found:
    return _qwen(keys, bias=True)


def _qwen3(keys: Keys) -> _Found:
    return _qwen(keys, bias=False, head_dim=128)


def _olmo(keys: Keys) -> _Found:
    sizes = parse_sizes(keys, hidden=4096, heads=32, layers=32, intermediate=11008, vocab=50304, context=2048)
    rotary = parse_flat_rotary(keys, sizes)
    return _llama_like(
        keys,
        sizes,
        [(0, rotary)] * sizes["n_layers"],
        norm="layer",
        norm_epsilon=1e-5,
        qkv_clip=keys.number("clip_qkv", 0.0),
        activation=keys.activation("hidden_act", "silu"),
        tensors={"has_norms": False},
    )


def _olmo2(keys: Keys) -> _Found:
    sizes = parse_sizes(keys, hidden=4096, heads=32, layers=32, intermediate=11008, vocab=50304, context=2048)
    rotary = parse_flat_rotary(keys, sizes)
    return _olmo_with_post_norms(keys, sizes, [(0, rotary)] * sizes["n_layers"])


def _olmo_with_post_norms(keys: Keys, sizes: dict[str, Any], layers: list[tuple[int, Mapping[str, Any]]]) -> _Found:
    return _llama_like(
        keys,
        sizes,
        layers,
        norm_epsilon=keys.number("rms_norm_eps", 1e-5),
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        activation=keys.activation("hidden_act", "silu"),
        tensors={"norms": POST_NORMS},
    )


def _two_rotaries(
    keys: Keys, sizes: Mapping[str, Any], *, local_key: str, bases: tuple[float, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(of layers with a window, of the others). `bases`: of both, where no key has them. A flat scaling is the
    others'."""
    rope = keys.get("rope_parameters")
    is_nested = isinstance(rope, Mapping) and not {"full_attention", "sliding_attention"}.isdisjoint(rope)
    if is_nested and set(rope) - {"full_attention", "sliding_attention"}:
        raise keys.error("rope_parameters", "full_attention and sliding_attention")
    if isinstance(rope, Mapping) and rope and not is_nested:
        raise keys.error("rope_parameters", "an object for full_attention and one for sliding_attention")
    local, other = keys.number(local_key, bases[0]), keys.number("rope_theta", bases[1])
    found = []
    for kind, base in (("sliding_attention", local), ("full_attention", other)):
        of_kind = rope_of(keys, kind) if is_nested else rope_of(keys) if kind == "full_attention" else {}
        found.append(parse_rotary(keys, of_kind, sizes, base=base))
    return found[0], found[1]


def _olmo3(keys: Keys) -> _Found:
    sizes = parse_sizes(keys, hidden=4096, heads=32, layers=32, intermediate=11008, vocab=50304, context=2048)
    # Versions of transformers do not agree which layers a flat rope_theta is for.
    if not keys.has("rope_parameters") and keys.number("rope_theta", 500000.0) != 500000.0:
        raise keys.error("rope_theta", "500000, or rope_parameters for full_attention and sliding_attention")
    local, other = _two_rotaries(keys, sizes, local_key="rope_theta", bases=(500000.0, 500000.0))
    window = keys.size("sliding_window", 4096)
    has_window = parse_layer_types(keys, sizes["n_layers"], lambda i: (i + 1) % 4 != 0)
    return _olmo_with_post_norms(keys, sizes, [(window, local) if has else (0, other) for has in has_window])


def _gemma_activation(keys: Keys, key: str) -> str:
    """ "gelu" is what old files call the approximation by tanh, which the models were trained with."""
    return keys.activation(key, "gelu_pytorch_tanh", {"gelu": "gelu_tanh", **TANH_NAMES})


def _gemma_like(
    keys: Keys, sizes: dict[str, Any], layers: list[tuple[int, Mapping[str, Any]]], **switches: Any
) -> _Found:
    root = float(np.float32(math.sqrt(sizes["hidden"])))
    return _llama_like(
        keys,
        sizes,
        layers,
        tied=True,
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        norm_offset=True,
        embedding_multiplier=root,
        **switches,
    )


def _gemma(keys: Keys) -> _Found:
    sizes = parse_sizes(
        keys,
        hidden=3072,
        heads=16,
        kv_heads=16,
        head_dim=256,
        layers=28,
        intermediate=24576,
        vocab=256000,
        context=8192,
    )
    rotary = parse_flat_rotary(keys, sizes)
    _gemma_activation(keys, "hidden_activation")
    activation = _gemma_activation(keys, "hidden_act")
    return _gemma_like(keys, sizes, [(0, rotary)] * sizes["n_layers"], activation=activation)


def _gemma_with_caps(
    keys: Keys, sizes: dict[str, Any], layers: list[Any], caps: tuple[float, float], **more: Any
) -> _Found:
    """`caps`: of scores and logits, where no key has them."""

    def cap(key: str, default: float) -> float:
        return 0.0 if keys.is_null(key) else keys.number(key, default)

    _gemma_activation(keys, "hidden_act")
    sizes["attention_divisor"] = keys.number("query_pre_attn_scalar", 256.0)
    return _gemma_like(
        keys,
        sizes,
        layers,
        activation=_gemma_activation(keys, "hidden_activation"),
        post_norm=True,
        score_cap=cap("attn_logit_softcapping", caps[0]),
        logits_cap=cap("final_logit_softcapping", caps[1]),
        tensors={"norms": BOTH_NORMS},
        **more,
    )


def _gemma2(keys: Keys) -> _Found:
    sizes = parse_sizes(
        keys, hidden=2304, heads=8, kv_heads=4, head_dim=256, layers=26, intermediate=9216, vocab=256000, context=8192
    )
    rotary = parse_flat_rotary(keys, sizes)
    window = keys.size("sliding_window", 4096)
    keys.agree("sliding_window_size", "sliding_window", window)
    has_window = parse_layer_types(keys, sizes["n_layers"], lambda i: i % 2 == 0)
    return _gemma_with_caps(keys, sizes, [(window if has else 0, rotary) for has in has_window], (50.0, 30.0))


def _gemma3(keys: Keys) -> _Found:
    sizes = parse_sizes(
        keys, hidden=2304, heads=8, kv_heads=4, head_dim=256, layers=26, intermediate=9216, vocab=262208, context=131072
    )
    keys.off("attn_logit_softcapping")  # transformers reads it and does not use it
    local, other = _two_rotaries(keys, sizes, local_key="rope_local_base_freq", bases=(10000.0, 1000000.0))
    window, pattern = keys.size("sliding_window", 4096), keys.size("sliding_window_pattern", 6)
    keys.get("_sliding_window_pattern")
    has_window = parse_layer_types(keys, sizes["n_layers"], lambda i: (i + 1) % pattern != 0)
    layers = [(window, local) if has else (0, other) for has in has_window]
    return _gemma_with_caps(keys, sizes, layers, (0.0, 0.0), qk_norm="head")


def _smollm3(keys: Keys) -> _Found:
    sizes = parse_sizes(
        keys, hidden=2048, heads=16, kv_heads=4, layers=36, intermediate=11008, vocab=128256, context=32768
    )
    n_layers = sizes["n_layers"]
    rotary = parse_flat_rotary(keys, sizes, base=2000000.0)
    interval = keys.size("no_rope_layer_interval", 4)
    has_rope = keys.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(n_layers)])
    if not isinstance(has_rope, list) or len(has_rope) < n_layers or any(x not in (0, 1) for x in has_rope):
        raise keys.error("no_rope_layers", f"{n_layers} times 0 or 1")
    window = keys.size("sliding_window", 1 << 30) if keys.flag("use_sliding_window", False) else 0
    for key in ("sliding_window", "max_window_layers"):  # without effect, unless use_sliding_window for the first
        keys.get(key)
    has_window = parse_layer_types(keys, n_layers, lambda i: bool(window) and not has_rope[i])
    return _llama_like(
        keys,
        sizes,
        [(window if has_window[i] else 0, rotary if has_rope[i] else NO_ROTARY) for i in range(n_layers)],
        tied=True,
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        activation=keys.activation("hidden_act", "silu"),
        tensors={"mlp_bias": keys.flag("mlp_bias", False)},
    )


def _apertus(keys: Keys) -> _Found:
    keys.off("mlp_bias", "post_norm")
    if not keys.flag("qk_norm", True):
        raise keys.error("qk_norm", "true")
    sizes = parse_sizes(keys, hidden=4096, heads=32, layers=32, intermediate=14336, vocab=131072, context=65536)
    rope, base = rope_of(keys), keys.number("rope_theta", 12000000.0)
    if not rope:
        # Where a file has its own base and no scaling, versions of transformers disagree on what it means.
        if base != 12000000.0:
            raise keys.error("rope_theta", "12000000, or rope_scaling beside it")
        if keys.is_null("rope_scaling"):
            raise keys.error("rope_scaling", "an object, or no such key")
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    rotary = parse_rotary(keys, rope, sizes, base=base)
    activation = keys.activation("hidden_act", "xielu")
    switches, tensors, tied = _llama_like(
        keys,
        sizes,
        [(0, rotary)] * sizes["n_layers"],
        norm_epsilon=keys.number("rms_norm_eps", 1e-5),
        activation=activation,
        gated=False,
        qk_norm="head",
        tensors={"norms": {"attention_layernorm": "attention_norm", "feedforward_layernorm": "mlp_norm"}},
    )
    for i in range(sizes["n_layers"]) if activation == "xielu" else ():
        name = f"layers.{i}.mlp.act_fn"
        tensors.add(f"{name}.alpha_p", i, "activation", 1)
        tensors.add(f"{name}.alpha_n", i, "activation", 1)
        tensors.add(f"{name}.beta", i, "activation", default=0.5)
        tensors.add(f"{name}.eps", i, "activation", default=-1e-6)
    return switches, tensors, tied


def _granite(keys: Keys) -> _Found:
    sizes = parse_sizes(keys, hidden=4096, heads=32, layers=32, intermediate=11008, vocab=32000, context=2048)
    rotary = parse_flat_rotary(keys, sizes)
    logits_scaling = keys.number("logits_scaling", 1.0)
    if logits_scaling == 0:
        raise keys.error("logits_scaling", "a number that is not 0")
    return _llama_like(
        keys,
        sizes,
        [(0, rotary)] * sizes["n_layers"],
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        activation=keys.activation("hidden_act", "silu"),
        embedding_multiplier=keys.number("embedding_multiplier", 1.0),
        residual_multiplier=keys.number("residual_multiplier", 1.0),
        attention_multiplier=keys.number("attention_multiplier", 1.0),
        logits_multiplier=1.0 / logits_scaling,
        tensors={"mlp_bias": keys.flag("mlp_bias", False)},
    )


def _phi(keys: Keys) -> _Found:
    sizes = parse_sizes(keys, hidden=2048, heads=32, layers=24, intermediate=8192, vocab=51200, context=2048)
    rotary = parse_flat_rotary(keys, sizes, fraction=0.5)
    tied = keys.flag("tie_word_embeddings", False)
    has_qk_norm = keys.flag("qk_layernorm", False)
    hidden, wide, head_dim = sizes["hidden"], sizes["intermediate"], sizes["head_dim"]
    switches = {
        **_NEOX,
        **sizes,
        **layer_kinds([(0, rotary)] * sizes["n_layers"], sizes["context_length"]),
        "activation": keys.activation("hidden_act", "gelu_new"),
        "norm_epsilon": keys.number("layer_norm_eps", 1e-5),
        "parallel_residual": True,
        "shared_norm": True,
        "head_bias": True,
        "qk_norm": "head" if has_qk_norm else "none",
    }
    tensors = TensorPlan(sizes)
    tensors.add("embed_tokens.weight", None, "embedding", sizes["n_embeddings"], hidden)
    tensors.norm("final_layernorm", None, "final_norm", hidden, True)
    if not tied:
        tensors.add("lm_head.weight", None, "head", sizes["n_logits"], hidden)
    tensors.add("lm_head.bias", None, "head_bias", sizes["n_logits"])
    for i in range(sizes["n_layers"]):
        layer = f"layers.{i}"
        tensors.norm(f"{layer}.input_layernorm", i, "attention_norm", hidden, True)
        tensors.attention(i, f"{layer}.self_attn", bias=True, out="dense", out_bias=True)
        for part in ("q", "k") if has_qk_norm else ():
            tensors.norm(f"{layer}.self_attn.{part}_layernorm", i, f"{part}_norm", head_dim, True)
        tensors.linear(f"{layer}.mlp.fc1", i, "up", (wide, hidden), True)
        tensors.linear(f"{layer}.mlp.fc2", i, "down", (hidden, wide), True)
    return switches, tensors, tied


def _stablelm(keys: Keys) -> _Found:
    sizes = parse_sizes(
        keys, hidden=2560, heads=32, kv_heads=32, layers=32, intermediate=6912, vocab=50304, context=4096
    )
    demand_whole_heads(keys, sizes)
    rotary = parse_flat_rotary(keys, sizes, fraction=0.25)
    is_parallel, has_qk_norm = keys.flag("use_parallel_residual", False), keys.flag("qk_layernorm", False)
    epsilon = keys.number("layer_norm_eps", 1e-5)
    # What files of its first versions have beside these.
    keys.agree("norm_eps", "layer_norm_eps", epsilon)
    keys.agree("num_heads", "num_attention_heads", sizes["n_heads"])
    keys.agree("rope_pct", "partial_rotary_factor", keys.share("partial_rotary_factor", 0.25))
    keys.agree("rotary_scaling_factor", "no scaling", 1.0)
    norms = {"input_layernorm": "attention_norm"} if is_parallel else LLAMA_NORMS
    switches, tensors, tied = _llama_like(
        keys,
        sizes,
        [(0, rotary)] * sizes["n_layers"],
        attention_bias=False,
        norm="layer",
        norm_epsilon=epsilon,
        activation=keys.activation("hidden_act", "silu"),
        parallel_residual=is_parallel,
        shared_norm=is_parallel,
        tensors={"norms": norms, "norm_bias": True, "qkv_bias": keys.flag("use_qkv_bias", False)},
    )
    if has_qk_norm:
        switches["qk_norm"] = "each_head"
        for i in range(sizes["n_layers"]):
            for part, n_heads in (("q", sizes["n_heads"]), ("k", sizes["n_kv_heads"])):
                for j in range(n_heads):
                    name = f"layers.{i}.self_attn.{part}_layernorm.norms.{j}.weight"
                    tensors.add(name, i, f"{part}_norm_gain", sizes["head_dim"])
    return switches, tensors, tied


class _Family(NamedTuple):
    parse: Callable[[Keys], _Found]
    prefix: str = "model."


_FAMILIES = {
    "gpt_neox": _Family(_gpt_neox, "gpt_neox."),
    "gpt2": _Family(_gpt2, "transformer."),
    "llama": _Family(_llama),
    "mistral": _Family(_mistral),
    "qwen2": _Family(_qwen2),
    "qwen3": _Family(_qwen3),
    "olmo": _Family(_olmo),
    "olmo2": _Family(_olmo2),
    "olmo3": _Family(_olmo3),
    "gemma": _Family(_gemma),
    "gemma2": _Family(_gemma2),
    "gemma3_text": _Family(_gemma3),
    "smollm3": _Family(_smollm3),
    "apertus": _Family(_apertus),
    "granite": _Family(_granite),
    "phi": _Family(_phi),
    "stablelm": _Family(_stablelm),
}
FAMILIES = tuple(_FAMILIES)
# Buffers that checkpoints store beside the weights.
BUFFERS = (
    ".attention.bias",
    ".attention.masked_bias",
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
)


@ieee_state()
def parse_graph(config: Mapping[str, Any], name: str) -> Graph:
    """The graph of a model with this config.json; `name` is what errors call it. `Error` for what is not understood."""
    model_type = config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise Error(f"{name}: model_type is {shown(model_type)}, the exact engine computes {', '.join(FAMILIES)} only")
    keys = Keys(config, name)
    switches, tensors, tied = family.parse(keys)
    keys.finish()
    return Graph(str(model_type), switches, tuple(tensors.uses), tied, family.prefix, BUFFERS)

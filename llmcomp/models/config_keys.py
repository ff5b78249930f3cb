"""config.json, key by key: values with the right types, positions in all their spellings, sizes.

A key that nobody has asked for, or a value that is not understood, is an error that names it. Which keys a family has
is `families`' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmcomp.checked_json import SIZE_MAX, finite_number
from llmcomp.errors import Error, named, shown

_LAYERS_MAX = 1 << 12
_CONTEXT_MAX = 1 << 24

# Keys that say nothing of what is computed: names, tokens, training, generation, how transformers runs a model.
_WITHOUT_EFFECT_TEXT = (
    "_name_or_path _attn_implementation architectures auto_map model_type name_or_path transformers_version "
    "torch_dtype dtype bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id "
    "forced_bos_token_id forced_eos_token_id tokenizer_class prefix task_specific_params finetuning_task id2label "
    "label2id num_labels problem_type initializer_range initializer_factor use_cache cache_implementation "
    "output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript "
    "tf_legacy_loss use_bfloat16 gradient_checkpointing attention_dropout hidden_dropout classifier_dropout "
    "attn_pdrop embd_pdrop resid_pdrop hidden_dropout_prob attention_probs_dropout_prob summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout max_length min_length "
    "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens chunk_size_feed_forward pretraining_tp is_decoder tie_encoder_decoder is_llama_config "
    "unsloth_version unsloth_fixed _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled "
    "_num_labels output_past num_logits_to_keep transformers.js_config custom_pipelines model_max_length "
    "tokenizer_model_max_length keys_to_ignore_at_inference"
)
_WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT_TEXT.split())
# Keys of transformers that are understood where they are off.
_OFF_TEXT = (
    "is_encoder_decoder add_cross_attention cross_attention_hidden_size "
    "use_bidirectional_attention rope_interleaved use_mrope pruned_heads quantization_config "
    "scale_attn_by_inverse_layer_idx"
)
_OFF = tuple(_OFF_TEXT.split())
TANH_NAMES = dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"
)
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    **TANH_NAMES,
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
    "xielu": "xielu",
}
# What of a rotary a kind of scaling does not use.
_PLAIN_ROTARY = {
    "scaling": "plain",
    "factor": 1.0,
    "original_length": 1.0,
    "low_factor": 1.0,
    "high_factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 0.0,
    "truncate": True,
}


class Keys:
    """config.json, read key by key; `finish` finds those that nobody has asked for."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self._config, self.name = config, name
        self._asked: set[str] = set()

    @property
    def family(self) -> Any:
        return self._config.get("model_type")

    def error(self, key: str, expected: str) -> Error:
        return Error(f"{self.name}: {key} is {shown(self._config.get(key))}, expected {expected}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is missing or null."""
        self._asked.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        return self._config.get(key) is not None

    def is_null(self, key: str) -> bool:
        """There, but null, which is not the same as missing to all families."""
        self._asked.add(key)
        return key in self._config and self._config[key] is None

    def size(self, key: str, default: int | None = None, highest: int = SIZE_MAX) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= highest:
            raise self.error(key, f"a positive integer up to {highest}")
        return value

    def number(self, key: str, default: float) -> float:
        number = finite_number(self.get(key, default))
        if number is None:
            raise self.error(key, "a number")
        return number

    def share(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if not 0 <= value <= 1:
            raise self.error(key, "a number from 0 to 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def activation(self, key: str, default: str, meanings: Mapping[str, str] = ACTIVATIONS) -> str:
        value = self.get(key, default)
        if not isinstance(value, str) or value not in meanings:
            raise self.error(key, f"one of {', '.join(meanings)}")
        return meanings[value]

    def off(self, *keys: str) -> None:
        """Keys that are understood where they ask for nothing."""
        for key in keys:
            if self.get(key):
                raise self.error(key, "nothing of the kind: the exact engine does not compute it")

    def agree(self, key: str, same_as: str, value: float) -> None:
        """A second name of a number, which transformers does not read: it has to say the same, where it is there."""
        if self.get(key, value) != value:
            raise self.error(key, f"{same_as}, {value}")

    def finish(self) -> None:
        self.off(*_OFF)
        unknown = sorted(set(self._config) - self._asked - _WITHOUT_EFFECT)
        if unknown:
            raise Error(
                f"{self.name}: config.json says {named(unknown[0])} = {shown(self._config[unknown[0]])}, "
                f"which the exact engine does not know of {shown(self._config.get('model_type'))} models"
            )


# Positions.


def rope_of(keys: Keys, layer_type: str | None = None) -> dict[str, Any]:
    """rope_parameters or rope_scaling; `layer_type`: of a file that has one for each type of layers."""
    for key in ("rope_parameters", "rope_scaling"):
        value = keys.get(key, {})
        if not isinstance(value, Mapping):
            raise keys.error(key, "an object")
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if layer_type is not None:
        rope = rope.get(layer_type) or {}
    if not isinstance(rope, Mapping):
        raise keys.error("rope_parameters", "an object")
    return dict(rope)


def parse_rotary(
    keys: Keys, rope: dict[str, Any], sizes: Mapping[str, Any], *, base: float, fraction: float | None = None
) -> dict[str, Any]:
    """`base` and `fraction`: what holds where `rope` has none; `fraction` None: of a family that turns whole heads."""
    head_dim, context = sizes["head_dim"], sizes["context_length"]
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.pop("finetuned", None)  # how the model was trained

    def number(key: str, default: float | None = None) -> float:
        return _pop_number(keys, rope, key, default)

    base, share = number("rope_theta", base), number("partial_rotary_factor", 1.0 if fraction is None else fraction)
    if share != 1 and fraction is None:
        raise Error(f"{keys.name}: partial_rotary_factor is {share}, which {keys.family} models do not have")
    if not 0 <= share <= 1:
        raise Error(f"{keys.name}: partial_rotary_factor is {share}, expected a number from 0 to 1")
    dims = int(head_dim * share)
    if dims % 2:
        raise Error(
            f"{keys.name}: {share} of heads of {head_dim} are {dims} rotary dimensions, expected an even number"
        )
    found = {**_PLAIN_ROTARY, "dims": dims, "base": base, **_parse_scaling(keys, rope, kind, context)}
    if rope:
        raise Error(
            f"{keys.name}: rotary positions of type {shown(kind)} have a {named(min(rope))}, which is not known"
        )
    return found


def _pop_number(keys: Keys, rope: dict[str, Any], key: str, default: float | None = None) -> float:
    number = finite_number(rope.pop(key, default))
    if number is None:
        raise keys.error("rope_parameters" if keys.has("rope_parameters") else "rope_scaling", f"a number {key}")
    return number


def _parse_scaling(keys: Keys, rope: dict[str, Any], kind: Any, context: int) -> dict[str, Any]:
    """What a kind of scaling reads, taken out of `rope`."""

    def number(key: str, default: float | None = None) -> float:
        return _pop_number(keys, rope, key, default)

    if kind == "default":
        rope.pop("original_max_position_embeddings", None)
        return {}
    if kind == "linear":
        return {"scaling": "linear", "factor": number("factor")}
    if kind == "llama3":
        return {
            "scaling": "llama3",
            "factor": number("factor"),
            "original_length": number("original_max_position_embeddings", context),
            "low_factor": number("low_freq_factor"),
            "high_factor": number("high_freq_factor"),
        }
    if kind == "yarn":
        return {
            "scaling": "yarn",
            "factor": number("factor"),
            "original_length": number("original_max_position_embeddings", context),
            "beta_fast": number("beta_fast", 32.0) or 32.0,
            "beta_slow": number("beta_slow", 1.0) or 1.0,
            "attention_factor": number("attention_factor", 0.0),
            "truncate": bool(rope.pop("truncate", True)),
        }
    raise Error(
        f"{keys.name}: rotary positions are of type {shown(kind)}, the exact engine computes 'default', 'linear', "
        "'llama3' and 'yarn' only"
    )


def parse_flat_rotary(
    keys: Keys, sizes: Mapping[str, Any], *, base: float = 10000.0, fraction: float | None = None
) -> dict[str, Any]:
    """Of files with one table of positions for all layers. `fraction`: of a family that turns a part of each head."""
    base = keys.number("rope_theta", base)
    if fraction is not None:
        fraction = keys.share("partial_rotary_factor", fraction)
    return parse_rotary(keys, rope_of(keys), sizes, base=base, fraction=fraction)


NO_ROTARY = {**_PLAIN_ROTARY, "dims": 0, "base": 1.0}


def layer_kinds(layers: list[tuple[int, Mapping[str, Any]]], context: int) -> dict[str, Any]:
    """(window, rotary) of every layer as the core's kinds; a window that no sequence fills is none."""
    kinds: list[dict[str, Any]] = []
    indices = []
    for window, rotary in layers:
        kind = {**rotary, "window": window if window < context else 0}
        if kind not in kinds:
            kinds.append(kind)
        indices.append(kinds.index(kind))
    return {"kinds": tuple(kinds), "layer_kinds": bytes(indices)}


def parse_layer_types(keys: Keys, n_layers: int, default: Callable[[int], bool]) -> list[bool]:
    """Which layers have a window."""
    types = keys.get("layer_types")
    if types is None:
        return [default(i) for i in range(n_layers)]
    known = {"sliding_attention": True, "full_attention": False}
    if not isinstance(types, list) or len(types) != n_layers or any(kind not in tuple(known) for kind in types):
        raise keys.error("layer_types", f"{n_layers} times 'sliding_attention' or 'full_attention'")
    return [known[kind] for kind in types]


def parse_sizes(keys: Keys, **defaults: int | None) -> dict[str, Any]:
    """Sizes under the usual keys; `defaults` are transformers', which leaves them out of the file."""
    hidden = keys.size("hidden_size", defaults["hidden"])
    n_heads = keys.size("num_attention_heads", defaults["heads"])
    head_dim = defaults.get("head_dim")
    if head_dim is None and not keys.has("head_dim"):
        if hidden % n_heads:
            raise Error(f"{keys.name}: hidden_size {hidden} is no multiple of num_attention_heads {n_heads}")
        head_dim = hidden // n_heads
    head_dim = keys.size("head_dim", head_dim)
    n_kv_heads = keys.size("num_key_value_heads", defaults.get("kv_heads") or n_heads)
    if n_heads % n_kv_heads:
        raise Error(f"{keys.name}: {n_heads} attention heads are no multiple of {n_kv_heads} key and value heads")
    vocab_size = keys.size("vocab_size", defaults["vocab"])
    return {
        "n_layers": keys.size("num_hidden_layers", defaults["layers"], _LAYERS_MAX),
        "hidden": hidden,
        "intermediate": keys.size("intermediate_size", defaults["intermediate"]),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "n_embeddings": vocab_size,
        "n_logits": vocab_size,
        "context_length": keys.size("max_position_embeddings", defaults["context"], _CONTEXT_MAX),
        "attention_divisor": float(head_dim),
    }


def demand_whole_heads(keys: Keys, sizes: Mapping[str, Any]) -> None:
    """Of families whose heads divide the hidden size, whatever the file says."""
    if sizes["n_heads"] * sizes["head_dim"] != sizes["hidden"]:
        raise keys.error("head_dim", f"hidden_size / num_attention_heads, {sizes['hidden'] // sizes['n_heads']}")

"""What a family makes of a config.json: the switches of the graph, and which tensor of the checkpoint goes where.

Names of switches and slots are those of csrc/include/llmcomp/transformer.h. No files are read and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class TensorUse(NamedTuple):
    """A tensor of the checkpoint, its shape there, and what of it goes where. `layer` None: a slot of the model.

    Of several uses for one slot the arrays are joined. `columns`: only these; `transposed`: the checkpoint has the
    matrix so (after that cut). `default`: what stands for a single number that is missing.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    slot: str
    columns: tuple[int, int] | None = None
    transposed: bool = False
    default: float | None = None


@dataclass(frozen=True)
class Graph:
    """A model's switches, as the core takes them, but for `int8`; and where its weights are in a checkpoint."""

    family: str
    switches: Mapping[str, Any]
    uses: tuple[TensorUse, ...]
    tied: bool
    prefix: str  # that the names of tensors have in a checkpoint, or have not
    buffers: tuple[str, ...]  # endings of names of tensors that are no weights

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["switches"][name]
        except KeyError:
            raise AttributeError(name) from None

    def core_config(self, int8: bool) -> dict[str, Any]:
        """What the core's TransformerModel takes as its config."""
        return {**self.switches, "int8": int8}

    def slots(self) -> Iterator[tuple[int | None, str, list[TensorUse]]]:
        """Every slot that the checkpoint fills: layer, name and uses."""
        places: dict[tuple[int | None, str], list[TensorUse]] = {}
        for use in self.uses:
            places.setdefault((use.layer, use.slot), []).append(use)
        for (layer, slot), uses in places.items():
            yield layer, slot, uses

    def facts(self, arithmetic: int) -> dict[str, Any]:
        """What the fingerprint of a model is over, but for its weights. Those of version 1 never change."""
        if arithmetic != 1:
            return {**self.switches, "layer_kinds": list(self.switches["layer_kinds"])}
        sizes = ("n_layers", "n_heads", "hidden", "intermediate", "n_logits", "context_length")
        rotary = self.kinds[0]
        return {
            **{name: self.switches[name] for name in sizes},
            "rotary_dims": rotary["dims"],
            "rotary_base": rotary["base"],
            "layer_norm_epsilon": self.norm_epsilon,
            "parallel_residual": self.parallel_residual,
            "attention_bias": any(use.slot == "qkv_bias" for use in self.uses),
            "tied": self.tied,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names (without the prefix) and shapes of all tensors, in the order of the graph; defaults are left out."""
        return {use.name: use.shape for use in self.uses if use.default is None}


class TensorPlan:
    """Collects uses; `norm`, `linear` and `matrix` know how shapes follow from the sizes."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        self.uses: list[TensorUse] = []
        self.sizes = sizes

    def add(self, name: str, layer: int | None, slot: str, *shape: int, **options: Any) -> None:
        self.uses.append(TensorUse(name, shape, layer, slot, **options))

    def norm(self, name: str, layer: int | None, slot: str, n: int, bias: bool) -> None:
        self.add(f"{name}.weight", layer, f"{slot}_gain", n)
        if bias:
            self.add(f"{name}.bias", layer, f"{slot}_bias", n)

    def linear(self, name: str, layer: int | None, slot: str, shape: tuple[int, int], bias: bool) -> None:
        self.add(f"{name}.weight", layer, slot, *shape)
        if bias:
            self.add(f"{name}.bias", layer, f"{slot}_bias", shape[0])

    def attention(self, layer: int, prefix: str, *, bias: bool, out: str = "o_proj", out_bias: bool) -> None:
        """The usual four maps."""
        sizes = self.sizes
        queries, keys = sizes["n_heads"] * sizes["head_dim"], sizes["n_kv_heads"] * sizes["head_dim"]
        for slot, n in (("q", queries), ("k", keys), ("v", keys)):
            self.linear(f"{prefix}.{slot}_proj", layer, slot, (n, sizes["hidden"]), bias)
        self.linear(f"{prefix}.{out}", layer, "out", (sizes["hidden"], queries), out_bias)

    def mlp(self, layer: int, prefix: str, bias: bool, gated: bool = True) -> None:
        hidden, wide = self.sizes["hidden"], self.sizes["intermediate"]
        for slot in ("gate", "up") if gated else ("up",):
            self.linear(f"{prefix}.{slot}_proj", layer, slot, (wide, hidden), bias)
        self.linear(f"{prefix}.down_proj", layer, "down", (hidden, wide), bias)


# Norms of a layer, by the names that Llama and its descendants give them.
LLAMA_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
POST_NORMS = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}
BOTH_NORMS = {"input_layernorm": "attention_norm", "pre_feedforward_layernorm": "mlp_norm", **POST_NORMS}


def llama_tensors(
    sizes: Mapping[str, Any],
    tied: bool,
    *,
    norms: Mapping[str, str] = LLAMA_NORMS,
    norm_bias: bool = False,
    has_norms: bool = True,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    gated: bool = True,
    qk_norm: str | None = None,
) -> TensorPlan:
    """What Llama's descendants have, by Llama's names. `qk_norm`: "head" or "full"."""
    tensors = TensorPlan(sizes)
    hidden = sizes["hidden"]
    tensors.add("embed_tokens.weight", None, "embedding", sizes["n_embeddings"], hidden)
    if has_norms:
        tensors.norm("norm", None, "final_norm", hidden, norm_bias)
    if not tied:
        tensors.add("lm_head.weight", None, "head", sizes["n_logits"], hidden)
    for i in range(sizes["n_layers"]):
        layer = f"layers.{i}"
        for name, slot in norms.items() if has_norms else ():
            tensors.norm(f"{layer}.{name}", i, slot, hidden, norm_bias)
        tensors.attention(i, f"{layer}.self_attn", bias=qkv_bias, out_bias=out_bias)
        if qk_norm is not None:
            for part, n_heads in (("q", sizes["n_heads"]), ("k", sizes["n_kv_heads"])):
                n = sizes["head_dim"] * (n_heads if qk_norm == "full" else 1)
                tensors.add(f"{layer}.self_attn.{part}_norm.weight", i, f"{part}_norm_gain", n)
        tensors.mlp(i, f"{layer}.mlp", mlp_bias, gated)
    return tensors

"""csrc/FORMAT.md, sections 1.1, 4 and 5.6, in Python: a GPT-NeoX checkpoint to its logits and to its fingerprints.

Written from that text alone; nothing of the package is used. One token after the other, vectors only over outputs;
binary32 by NumPy and binary64 by Python, whose + - * / and sqrt are IEEE-754's, and fma by oracle.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import archive_oracle
import numpy as np
from oracle import EXP2_COEFFICIENTS, ROUNDING, fma64, fma_array, ln64

# Section 1.1.

ROUNDING64 = float.fromhex("0x1.8p+52")
LN2, LN2_LOW = float.fromhex("0x1.62e42fefa39efp-1"), float.fromhex("0x1.abc9e3b39803fp-56")
PI_2, PI_2_LOW = float.fromhex("0x1.921fb54442d18p+0"), float.fromhex("0x1.1a62633145c07p-54")
TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")


def exp64(x: float) -> float:
    n = (x / LN2 + ROUNDING64) - ROUNDING64
    r = fma64(-n, LN2_LOW, fma64(-n, LN2, x))
    s = 1.0
    for k in range(16, 0, -1):
        s = fma64(s, r / k, 1.0)
    return s * 2.0 ** int(n)


def sincos64(x: float) -> tuple[float, float]:
    n = (x * TWO_OVER_PI + ROUNDING64) - ROUNDING64
    r = fma64(-n, PI_2_LOW, fma64(-n, PI_2, x))
    s = c = 1.0
    for k in range(19, 2, -2):
        s = fma64(s, -(r * r) / (k * (k - 1)), 1.0)
    s = s * r
    for k in range(18, 1, -2):
        c = fma64(c, -(r * r) / (k * (k - 1)), 1.0)
    return [(s, c), (c, -s), (-s, -c), (-c, s)][int(n) % 4]


# Sections 4.1, 4.2, 4.4, 4.5 and 4.7: float32 in, float32 out.

GELU_COEFFICIENTS = [
    np.float32(float.fromhex(q))
    for q in (
        *("-0x1.26aee2p+0", "-0x1.d63828p-2", "-0x1.ae593ep-5", "0x1.d2ff7cp-8"),
        *("-0x1.9090c8p-13", "-0x1.52ca7ep-13", "0x1.1b686ap-15", "-0x1.39da7cp-19"),
    )
]


def fma(a: Any, b: Any, c: Any) -> Any:
    return fma_array(np.asarray(a, np.float64), np.asarray(b, np.float64), np.asarray(c, np.float64)).astype(np.float32)


def chain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over the last axis of a and the first of b, which is all that b has."""
    s = np.zeros(a.shape[:-1], np.float32)
    for k in range(len(b)):
        s = fma(a[..., k], b[k], s)
    return s


def power(f: np.ndarray) -> np.ndarray:
    """The polynomial P of 4.4."""
    p = np.full_like(f, EXP2_COEFFICIENTS[-1])
    for coefficient in (*reversed(EXP2_COEFFICIENTS[:-1]), 1.0):
        p = fma(p, f, coefficient)
    return p


def norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, epsilon: np.float32) -> np.ndarray:
    d = np.float32(len(x))
    s = np.zeros(4, np.float32)
    for i in range(len(x)):
        s[i % 4] += x[i]
    mean = ((s[0] + s[1]) + (s[2] + s[3])) / d
    s = np.zeros(4, np.float32)
    for i in range(len(x)):
        s[i % 4] = fma(x[i] - mean, x[i] - mean, s[i % 4])
    variance = ((s[0] + s[1]) + (s[2] + s[3])) / d
    factor = np.float32(1) / np.sqrt(variance + epsilon)
    return fma((x - mean) * factor, gain, bias)


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[e], [n + 1, e], [n + 1, e] -> [e]."""
    scale = float.fromhex("0x1.71547652b82fep+0") / math.sqrt(len(query))
    c, floor = np.float32(scale), np.float32(-64 / scale)
    scores = chain(keys, query)
    t = np.maximum(scores - scores.max(), floor)
    k = fma(t, c, ROUNDING) - np.float32(ROUNDING)
    w = np.ldexp(power(fma(t, c, -k)), k.astype(np.int32))
    s = np.float32(0)
    for weight in w:
        s = s + weight
    return chain(values.T, w) / s


def gelu(x: np.ndarray) -> np.ndarray:
    a = np.abs(x)
    q = np.full_like(a, GELU_COEFFICIENTS[-1])
    for coefficient in reversed(GELU_COEFFICIENTS[:-1]):
        q = fma(q, a, coefficient)
    t = np.maximum(q * a, np.float32(-120))
    k = (t + np.float32(ROUNDING)) - np.float32(ROUNDING)
    g = np.ldexp(power(t - k) / np.float32(2), k.astype(np.int32))
    return x * np.where(x < 0, g, np.float32(1) - g)


def codes(row: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """4.7: the integers and the scale of one finite row."""
    largest = np.abs(row).max()
    if largest < np.float32(2) ** -100:
        return np.zeros(len(row), np.int64), np.float32(0)
    return np.rint(row * (np.float32(127) / largest)).astype(np.int64), largest / np.float32(127)


class Linear:
    """y[i] = chain(W[i], x) + bias[i], or 4.7's in integers; `bias` None: there is none to add."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None, is_int8: bool) -> None:
        self.weight, self.bias, self.is_int8 = weight, bias, is_int8
        if is_int8:
            rows = [codes(row) for row in weight]
            self.codes, self.scales = np.array([q for q, _ in rows]), np.array([s for _, s in rows])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.is_int8:
            q, scale = codes(x)
            y = (self.codes @ q).astype(np.float32) * self.scales * scale
        else:
            y = chain(self.weight, x)
        return y if self.bias is None else y + self.bias


class Neox:
    """A checkpoint of 4.8; `tensors` by name without prefix, float32. `step` reads a token and returns its logits."""

    def __init__(self, config: dict, tensors: dict[str, np.ndarray], is_int8: bool = False) -> None:
        self.config, self.tensors, self.is_int8 = config, tensors, is_int8
        self.epsilon = np.float32(config.get("layer_norm_eps", 1e-5))
        self.rotary_dims, self.base = rotary(config)
        self.n_heads = config["num_attention_heads"]
        self.layers = [self.layer(f"layers.{i}.") for i in range(config["num_hidden_layers"])]
        is_tied = config.get("tie_word_embeddings", False)
        self.head = Linear(tensors["embed_in.weight" if is_tied else "embed_out.weight"], None, is_int8)
        self.cache: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in self.layers]

    def layer(self, at: str) -> dict[str, Linear]:
        found = {}
        for symbol, name in (
            ("qkv", "attention.query_key_value"),
            ("dense", "attention.dense"),
            ("in", "mlp.dense_h_to_4h"),
            ("out", "mlp.dense_4h_to_h"),
        ):
            weight = self.tensors[f"{at}{name}.weight"]
            bias = self.tensors.get(f"{at}{name}.bias", np.zeros(len(weight), np.float32))
            found[symbol] = Linear(weight, bias, self.is_int8)
        return found

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return norm(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], self.epsilon)

    def attention(self, i: int, y: np.ndarray) -> np.ndarray:
        e = len(y) // self.n_heads
        rows, position = self.layers[i]["qkv"](y), len(self.cache[i])
        parts = np.array([[rows[(3 * j + c) * e : (3 * j + c + 1) * e] for c in range(3)] for j in range(self.n_heads)])
        for head in parts:
            for c in (0, 1):
                head[c] = turn(head[c], position, self.rotary_dims, self.base)
        self.cache[i].append((parts[:, 1], parts[:, 2]))
        keys, values = (np.array([entry[c] for entry in self.cache[i]]) for c in (0, 1))
        return np.concatenate([attend(parts[j, 0], keys[:, j], values[:, j]) for j in range(self.n_heads)])

    def step(self, token: int) -> np.ndarray:
        x = self.tensors["embed_in.weight"][token]
        for i, layer in enumerate(self.layers):
            at = f"layers.{i}."

            def mlp(x: np.ndarray, at: str = at, layer: dict[str, Linear] = layer) -> np.ndarray:
                return layer["out"](gelu(layer["in"](self.norm(x, f"{at}post_attention_layernorm"))))

            a = layer["dense"](self.attention(i, self.norm(x, f"{at}input_layernorm")))
            if self.config.get("use_parallel_residual", True):
                x = (mlp(x) + a) + x
            else:
                x = x + a
                x = x + mlp(x)
        return self.head(self.norm(x, "final_layer_norm"))


# Section 4.3.


def rotary_frequency(i: int, rotary_dims: int, base: float) -> np.float32:
    """f_i."""
    u = np.float32(2 * i) / np.float32(rotary_dims)
    return np.float32(1) / np.float32(exp64(float(u) * ln64(base)))


def turn(x: np.ndarray, position: int, rotary_dims: int, base: float) -> np.ndarray:
    """A query or key of one head, float32 [e], at its position."""
    turned = x.copy()
    half = rotary_dims // 2
    for i in range(half):
        angle = np.float32(position) * rotary_frequency(i, rotary_dims, base)
        sine, cosine = map(np.float32, sincos64(float(angle)))
        left, right = x[i], x[i + half]
        turned[i] = fma(left, cosine, -(right * sine))
        turned[i + half] = fma(right, cosine, left * sine)
    return turned


# Section 4.8.


def rotary(config: dict) -> tuple[int, float]:
    """(r, base) of a config.json of GPT-NeoX."""
    merged = {**config, **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    fraction = merged.get("partial_rotary_factor", merged.get("rotary_pct", 0.25))
    head = config.get("hidden_size", 6144) // config.get("num_attention_heads", 64)
    return int(head * fraction), float(merged.get("rope_theta", merged.get("rotary_emb_base", 10000)))


# Section 5.6.


def json_text(value: Any, comma: str, colon: str) -> str:
    """By the rules at the section's head."""
    if isinstance(value, dict):
        return (
            "{"
            + comma.join(json_text(k, "", "") + colon + json_text(value[k], comma, colon) for k in sorted(value))
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + comma.join(json_text(item, comma, colon) for item in value) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    return '"' + "".join(map(escaped, value)) + '"'


def escaped(character: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    if character in short:
        return short[character]
    if 0x20 <= ord(character) <= 0x7E:
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(units[::2], units[1::2], strict=True))


def tokenizer_fingerprint(tokenizer: dict) -> str:
    """Of the content of a tokenizer.json."""
    model = tokenizer["model"]
    steps = [dict(step) for step in archive_oracle.steps(tokenizer, "pre_tokenizer", "pretokenizers")]
    for step in steps:
        if step["type"] == "ByteLevel":
            step["add_prefix_space"], step["trim_offsets"] = False, True
            step.setdefault("use_regex", True)
    flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
    added = sorted(tokenizer["added_tokens"], key=lambda token: token["id"])
    facts = {
        "added_tokens": [[t["id"], t["content"], *(t.get(flag, False) for flag in flags)] for t in added],
        "model": {
            "ignore_merges": model.get("ignore_merges", False),
            "merges": [m.split(" ") if isinstance(m, str) else m for m in model["merges"]],
            "vocab": model["vocab"],
        },
        "pre_tokenizer": steps,
    }
    if model.get("byte_fallback"):
        types = [step["type"] for step in archive_oracle.steps(tokenizer, "normalizer", "normalizers")]
        space = archive_oracle.space_character(tokenizer)
        prefix = "unless space" if archive_oracle.has_dummy_space(tokenizer) else None
        prefix = "always" if "Prepend" in types else prefix
        facts["byte_fallback"] = {"prefix": prefix, "space": None if space == " " else space}
        facts["pre_tokenizer"] = [step for step in steps if step["type"] != "Metaspace"]
    return hashlib.sha256(json_text(facts, ",", ":").encode()).hexdigest()


def read_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """{name: (type, shape, elements)} of a safetensors file (huggingface/safetensors, "Format")."""
    raw = path.read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    data = raw[8 + n_header :]
    entries = json.loads(raw[8 : 8 + n_header])
    entries.pop("__metadata__", None)
    return {name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for name, e in entries.items()}


def weights_sha256(tensors: dict[str, tuple[str, list[int], bytes]], is_tied: bool) -> str:
    types = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    named = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("gpt_neox.")
        name = "embed_out.weight" if name == "lm_head.weight" else name
        if name.endswith((".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")):
            continue
        if not (is_tied and name == "embed_out.weight"):
            named[name] = tensor
    digest = hashlib.sha256()
    for name in sorted(named):
        kind, shape, elements = named[name]
        sizes = f"({shape[0]},)" if len(shape) == 1 else f"({shape[0]}, {shape[1]})"
        digest.update(f"{name} {types[kind]} {sizes}\n".encode() + elements)
    return digest.hexdigest()


def model_fingerprint(
    config: dict, tensors: dict[str, tuple[str, list[int], bytes]], tokenizer: dict | None, engine: str = "exact"
) -> str:
    """Of a GPT-NeoX checkpoint: the contents of its config.json, safetensors and tokenizer.json."""
    rotary_dims, base = rotary(config)
    n_rows = config.get("vocab_size", 50432)
    if tokenizer is None:
        tokenizer_sha256, vocab_size = hashlib.sha256(b'{"model":{"type":"bytes"}}').hexdigest(), n_rows
    else:
        ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
        tokenizer_sha256, vocab_size = tokenizer_fingerprint(tokenizer), min(max(ids) + 1, n_rows)
    is_tied = config.get("tie_word_embeddings", False)
    facts: dict[str, Any] = {
        "arithmetic": 1,
        "config": {
            "attention_bias": config.get("attention_bias", True),
            "context_length": config.get("max_position_embeddings", 2048),
            "hidden": config.get("hidden_size", 6144),
            "intermediate": config.get("intermediate_size", 24576),
            "layer_norm_epsilon": float(config.get("layer_norm_eps", 1e-5)),
            "n_heads": config.get("num_attention_heads", 64),
            "n_layers": config.get("num_hidden_layers", 44),
            "n_logits": n_rows,
            "parallel_residual": config.get("use_parallel_residual", True),
            "rotary_base": base,
            "rotary_dims": rotary_dims,
            "tied": is_tied,
        },
        "tokenizer": tokenizer_sha256,
        "vocab_size": vocab_size,
        "weights": weights_sha256(tensors, is_tied),
    }
    if engine == "exact-int8":
        facts["engine"] = engine
    return hashlib.sha256(json_text(facts, ", ", ": ").encode()).hexdigest()

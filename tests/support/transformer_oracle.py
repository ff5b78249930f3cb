"""A second implementation of csrc/FORMAT.md, sections 1.1 and 4.1 to 4.9, in NumPy: one sequence, bit for bit.

Written from that text alone. Binary32 values are held as float64 and rounded after each operation, which is as good as
one rounding for + - * / and the square root (53 >= 2 * 24 + 2 bits); fma rounds once by rounding to odd (`oracle`).
Switches and slots go by the names that FORMAT.md has from llmcomp/transformer.h. Nothing of the package is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from oracle import EXP2_COEFFICIENTS, LOG2_E, ROUNDING, fma64, fma_array

Array = np.ndarray
LN2, LN2_LOW = float.fromhex("0x1.62e42fefa39efp-1"), float.fromhex("0x1.abc9e3b39803fp-56")
PI_2, PI_2_LOW = float.fromhex("0x1.921fb54442d18p+0"), float.fromhex("0x1.1a62633145c07p-54")
TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
MAGIC = float.fromhex("0x1.8p+52")
LOG2_E_64 = float.fromhex("0x1.71547652b82fep+0")
GELU_Q = [
    float.fromhex(q)
    for q in (
        *("-0x1.26aee2p+0", "-0x1.d63828p-2", "-0x1.ae593ep-5", "0x1.d2ff7cp-8"),
        *("-0x1.9090c8p-13", "-0x1.52ca7ep-13", "0x1.1b686ap-15", "-0x1.39da7cp-19"),
    )
]
K1, K2 = float.fromhex("0x1.988454p+0"), float.fromhex("0x1.2444f2p-4")


def f32(x: Any) -> Any:
    """Rounded to binary32, held as float64."""
    return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


# Section 1.1.


def exp64(x: float) -> float:
    n = (x / LN2 + MAGIC) - MAGIC
    r = fma64(-n, LN2_LOW, fma64(-n, LN2, x))
    s = 1.0
    for k in range(16, 0, -1):
        s = fma64(s, r / k, 1.0)
    return math.ldexp(s, int(n))


def ln64(x: float) -> float:
    bits = int(np.float64(x).view(np.int64))
    n = (bits - 0x3FE6A09E667F3BCD) >> 52
    z = float(np.int64(bits - (n << 52)).view(np.float64))
    q, s = (z - 1.0) / (z + 1.0), 0.0
    for k in range(27, 0, -2):
        s = fma64(s, q * q, 1.0 / k)
    return fma64(float(n), LN2, (2.0 * q) * s)


def sincos64(x: float) -> tuple[float, float]:
    n = (x * TWO_OVER_PI + MAGIC) - MAGIC
    r = fma64(-n, PI_2_LOW, fma64(-n, PI_2, x))
    s = c = 1.0
    for k in range(19, 2, -2):
        s = fma64(s, -(r * r) / (k * (k - 1)), 1.0)
    for k in range(18, 1, -2):
        c = fma64(c, -(r * r) / (k * (k - 1)), 1.0)
    s *= r
    return [(s, c), (c, -s), (-s, -c), (-c, s)][int(n) % 4]


def softplus64(a: float) -> float:
    return max(a, 0.0) + ln64(1.0 + (0.0 if abs(a) > 700 else exp64(-abs(a))))


# Sections 4.1 to 4.7.


def chain(weights: Array, x: Array) -> Array:
    """weights [rows, n], x [n, tokens]: a chain of fma over n for each."""
    s = np.zeros((weights.shape[0], x.shape[1]))
    for k in range(weights.shape[1]):
        s = fma_array(weights[:, k, None], x[k], s)
    return s


def int8_codes(rows: Array) -> tuple[Array, Array]:
    """Codes and scales of each row (last axis)."""
    largest = np.abs(rows).max(-1, keepdims=True)
    is_zero = largest < 2.0**-100
    safe = np.where(is_zero, 1.0, largest)
    codes = np.where(is_zero, 0, np.rint(f32(rows * f32(127 / safe)))).astype(np.int64)
    return codes, np.where(is_zero, 0.0, f32(largest / 127))[..., 0]


def int8_product(weights: Array, x: Array) -> Array:
    codes, scales = int8_codes(weights)
    inputs, input_scales = int8_codes(x.T)
    return f32(f32(f32((codes @ inputs.T).astype(np.float64)) * scales[:, None]) * input_scales)


def feature_sum(values: Array, add: Callable[[Array, Array], Array]) -> Array:
    """S of section 4.2 over the first axis."""
    chains = [np.zeros(values.shape[1:]) for _ in range(4)]
    for i, value in enumerate(values):
        chains[i % 4] = add(chains[i % 4], value)
    return f32(f32(chains[0] + chains[1]) + f32(chains[2] + chains[3]))


def norm(config: Mapping[str, Any], x: Array, gain: Array, bias: Array) -> Array:
    """x [features, tokens]."""
    n, mean = float(len(x)), np.zeros(x.shape[1])
    if config["norm"] == "layer":
        mean = f32(feature_sum(x, lambda s, v: f32(s + v)) / n)
    centred = f32(x - mean)
    variance = f32(feature_sum(centred, lambda s, v: fma_array(v, v, s)) / n)
    factor = f32(1 / f32(np.sqrt(f32(variance + f32(config["norm_epsilon"])))))
    return fma_array(f32(centred * factor), gain[:, None], bias[:, None])


def exp2_polynomial(f: Array) -> Array:
    p = np.full_like(f, EXP2_COEFFICIENTS[4])
    for coefficient in (*reversed(EXP2_COEFFICIENTS[:4]), 1.0):
        p = fma_array(p, f, coefficient)
    return p


def gelu(x: Array) -> Array:
    a = np.abs(x)
    q = np.full_like(a, GELU_Q[7])
    for coefficient in reversed(GELU_Q[:7]):
        q = fma_array(q, a, coefficient)
    t = np.maximum(f32(q * a), -120.0)
    k = np.rint(t)
    g = exp2_polynomial(f32(t - k)) / 2 * 2.0**k
    return f32(x * np.where(x < 0, g, f32(1 - g)))


# Section 4.9.6.


def split_exponent(a: Array) -> tuple[Array, Array]:
    """(k, f) of e^-a."""
    z = np.maximum(-a, -80.0)
    k = fma_array(z, LOG2_E, ROUNDING) - ROUNDING
    return k, fma_array(z, LOG2_E, -k)


def exp_of_minus(a: Array) -> Array:
    k, f = split_exponent(a)
    return exp2_polynomial(f) * 2.0**k


def expm1_of_minus(a: Array) -> Array:
    k, f = split_exponent(a)
    q = np.full_like(f, EXP2_COEFFICIENTS[4])
    for coefficient in reversed(EXP2_COEFFICIENTS[:4]):
        q = fma_array(q, f, coefficient)
    return fma_array(f32(q * f), 2.0**k, f32(2.0**k - 1))


def sigmoid(x: Array) -> Array:
    e = exp_of_minus(np.abs(x))
    return f32(np.where(x < 0, e, 1.0) / f32(1 + e))


def tanh(x: Array) -> Array:
    n = expm1_of_minus(2 * np.abs(x))
    return np.copysign(f32(-n / f32(n + 2)), x)


def activate(config: Mapping[str, Any], x: Array, numbers: Array | None) -> Array:
    kind = config["activation"]
    if kind == "gelu":
        return gelu(x)
    if kind == "gelu_tanh":
        return f32(x * sigmoid(f32(x * fma_array(np.full_like(x, K2), f32(x * x), K1))))
    if kind == "silu":
        return f32(x * sigmoid(x))
    r = np.where(x < 0, 0.0, x)
    if kind == "relu":
        return r
    if kind == "relu_squared":
        return f32(r * r)
    assert kind == "xielu" and numbers is not None
    a_p, a_n, beta, eps = (float(number) for number in numbers)
    alpha_p, alpha_n = f32(softplus64(a_p)), f32(beta + softplus64(a_n))
    linear = f32(beta * x)
    negative = fma_array(f32(expm1_of_minus(-np.where(x < eps, x, eps)) - x), alpha_n, linear)
    return np.where(x > 0, fma_array(f32(alpha_p * x), x, linear), negative)


# Sections 4.3 and 4.9.4.


def frequency(rotary: Mapping[str, Any], i: int) -> float:
    r, base, kind = rotary["dims"], float(rotary["base"]), rotary["scaling"]
    b = f32(exp64(float(f32(2 * i / r)) * ln64(base)))
    f = f32(1 / b)
    if kind == "plain":
        return float(f)
    factor, pi = f32(rotary["factor"]), 2 * PI_2
    if kind == "linear":
        return float(f32(f / factor))
    original = float(rotary["original_length"])
    if kind == "llama3":
        low, high = float(rotary["low_factor"]), float(rotary["high_factor"])
        wave = f32(f32(1 / f) * f32(2 * pi))
        is_long, is_short = wave > f32(original / low), wave < f32(original / high)
        scaled = f32(f / factor) if is_long else f
        if is_long or is_short:
            return float(scaled)
        s = f32(f32(f32(f32(1 / wave) * f32(original)) - f32(low)) / f32(high - low))
        return float(f32(f32(f32(f32(1 - s) * scaled) / factor) + f32(s * scaled)))
    assert kind == "yarn"

    def dim(n: float) -> float:
        return (r * ln64(original / ((n * 2) * pi))) / (2 * ln64(base))

    lo, hi = dim(float(rotary["beta_fast"])), dim(float(rotary["beta_slow"]))
    if rotary["truncate"]:
        lo, hi = math.floor(lo), math.ceil(hi)
    lo, hi = max(float(lo), 0.0), min(float(hi), float(r - 1))
    if lo == hi:
        hi += 0.001
    ramp = min(max(float(f32(f32(i - f32(lo)) / f32(hi - lo))), 0.0), 1.0)
    x = f32(1 - ramp)
    return float(f32(f32(f32(1 / f32(factor * b)) * f32(1 - x)) + f32(f * x)))


def angle_table(rotary: Mapping[str, Any], n_tokens: int) -> tuple[Array, Array]:
    """Cosines and sines, [pairs, tokens]."""
    scale = 1.0
    if rotary["scaling"] == "yarn":
        factor = float(rotary["factor"])
        scale = rotary["attention_factor"] or (1.0 if factor <= 1 else 0.1 * ln64(factor) + 1.0)
    table = np.zeros((2, rotary["dims"] // 2, n_tokens))
    for i in range(rotary["dims"] // 2):
        f = frequency(rotary, i)
        for p in range(n_tokens):
            sine, cosine = sincos64(float(f32(p * f)))
            table[:, i, p] = cosine, sine
    return tuple(f32(f32(table) * f32(scale)))  # type: ignore[return-value]


def rotate(x: Array, cosines: Array, sines: Array) -> Array:
    n = len(cosines)
    low, high = x[:n], x[n : 2 * n]
    turned = fma_array(low, cosines, -f32(high * sines)), fma_array(high, cosines, f32(low * sines))
    return np.concatenate([*turned, x[2 * n :]])


# Sections 4.4 and 4.9.5.


def attend(config: Mapping[str, Any], window: int, query: Array, key: Array, value: Array) -> Array:
    """One head: all [features, tokens]."""
    n = query.shape[1]
    scale = config["attention_multiplier"] or 1.0 / math.sqrt(config["attention_divisor"])
    c = LOG2_E_64 * scale if config["attention_multiplier"] else LOG2_E_64 / math.sqrt(config["attention_divisor"])
    scores = chain(key.T, query)  # [keys, queries]
    if config["score_cap"]:
        scores = tanh(f32(scores * f32(scale / config["score_cap"])))
        c = LOG2_E_64 * config["score_cap"]
    keys, queries = np.arange(n)[:, None], np.arange(n)
    seen = (keys <= queries) & ((keys > queries - window) if window else True)
    largest = np.where(seen, scores, -np.inf).max(0)
    t = np.maximum(f32(np.where(seen, scores, largest) - largest), f32(-64 / c))
    k = fma_array(t, f32(c), ROUNDING) - ROUNDING
    weights = exp2_polynomial(fma_array(t, f32(c), -k)) * 2.0**k
    total, out = np.zeros(n), np.zeros(value.shape)
    for j in range(n):
        total = np.where(seen[j], f32(total + weights[j]), total)
        out = np.where(seen[j], fma_array(weights[j], value[:, j, None], out), out)
    return f32(out / total)


# Sections 4.1 and 4.9.1 to 4.9.3.


class Oracle:
    """`config`: switches, with "kinds" and "layer_kinds"; `tensors`, `layers`: arrays by the names of slots."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Array], layers: list[Mapping[str, Array]]):
        self.config = config
        self.tensors = {name: widen(array) for name, array in tensors.items()}
        self.layers = [{name: widen(array) for name, array in layer.items()} for layer in layers]

    def logits(self, tokens: Array) -> Array:
        """int [T] -> float32 [T, n_logits]."""
        config, tensors = self.config, self.tensors
        x = f32(tensors["embedding"][tokens].T * f32(config["embedding_multiplier"]))
        if config["learned_positions"]:
            x = f32(x + tensors["positions"][: len(tokens)].T)
        angles = [angle_table(kind, len(tokens)) for kind in config["kinds"]]
        for i, layer in enumerate(self.layers):
            kind = config["layer_kinds"][i]
            x = self._layer(layer, config["kinds"][kind]["window"], angles[kind], x)
        y = self._product(tensors["head"], self._norm(tensors, "final_norm", x))
        if config["head_bias"]:
            y = f32(y + tensors["head_bias"][:, None])
        y = f32(y * f32(config["logits_multiplier"]))
        if config["logits_cap"]:
            cap = f32(config["logits_cap"])
            y = f32(tanh(f32(y * f32(1 / cap))) * cap)
        return y.T.astype(np.float32)

    def _product(self, weights: Array, x: Array) -> Array:
        return int8_product(weights, x) if self.config["int8"] else chain(weights, x)

    def _linear(self, layer: Mapping[str, Array], name: str, x: Array) -> Array:
        weights = layer[name]
        return f32(self._product(weights, x) + layer.get(f"{name}_bias", np.zeros(len(weights)))[:, None])

    def _norm(self, arrays: Mapping[str, Array], name: str, x: Array, part: slice = slice(None)) -> Array:
        gain, bias = arrays.get(f"{name}_gain"), arrays.get(f"{name}_bias", np.zeros(len(x)))
        if gain is None:
            gain = np.ones(len(x))
        elif self.config["norm_offset"]:
            gain = f32(1 + gain)
        return norm(self.config, x, gain[part], bias[part] if len(bias) != len(x) else bias)

    def _layer(self, layer: Mapping[str, Array], window: int, angles: tuple[Array, Array], x: Array) -> Array:
        config, multiplier = self.config, f32(self.config["residual_multiplier"])

        def before(name: str, of: Array) -> Array:
            return self._norm(layer, name, of) if config["pre_norm"] else of

        def after(name: str, of: Array) -> Array:
            return self._norm(layer, name, of) if config["post_norm"] else of

        a = self._linear(layer, "out", self._attention(layer, window, angles, before("attention_norm", x)))
        a = after("attention_post_norm", a)
        middle = x if config["parallel_residual"] else fma_array(a, multiplier, x)
        b = self._mlp(layer, before("attention_norm" if config["shared_norm"] else "mlp_norm", middle))
        b = after("mlp_post_norm", b)
        return fma_array(f32(b + a) if config["parallel_residual"] else b, multiplier, middle)

    def _mlp(self, layer: Mapping[str, Array], y: Array) -> Array:
        numbers, up = layer.get("activation"), self._linear(layer, "up", y)
        if not self.config["gated"]:
            return self._linear(layer, "down", activate(self.config, up, numbers))
        gate = activate(self.config, self._linear(layer, "gate", y), numbers)
        return self._linear(layer, "down", f32(gate * up))

    def _attention(self, layer: Mapping[str, Array], window: int, angles: tuple[Array, Array], x: Array) -> Array:
        config = self.config
        h, g, e = config["n_heads"], config["n_kv_heads"], config["head_dim"]
        if config["fused_qkv"]:
            rows = self._linear(layer, "qkv", x).reshape(h, 3, e, -1)
            parts = [rows[:, i].reshape(h * e, -1) for i in range(3)]
        else:
            parts = [self._linear(layer, name, x) for name in "qkv"]
        if config["qkv_clip"]:
            limit = f32(config["qkv_clip"])
            parts = [np.clip(part, -limit, limit) for part in parts]
        normed = [self._qk_norm(layer, name, part) for name, part in zip("qk", parts[:2], strict=True)]
        queries, keys = ([rotate(head, *angles) for head in part.reshape(-1, e, x.shape[1])] for part in normed)
        values = parts[2].reshape(g, e, -1)
        return np.concatenate(
            [attend(config, window, queries[j], keys[j // (h // g)], values[j // (h // g)]) for j in range(h)]
        )

    def _qk_norm(self, layer: Mapping[str, Array], name: str, x: Array) -> Array:
        kind, e = self.config["qk_norm"], self.config["head_dim"]
        if kind == "none":
            return x
        if kind == "full":
            return self._norm(layer, f"{name}_norm", x)
        heads = []
        for j in range(len(x) // e):
            part = slice(None) if kind == "head" else slice(j * e, (j + 1) * e)
            heads.append(self._norm(layer, f"{name}_norm", x[j * e : (j + 1) * e], part))
        return np.concatenate(heads)


def widen(array: Array) -> Array:
    """float32, float16, or bfloat16 as uint16, as float64."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)

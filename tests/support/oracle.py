"""A second implementation of csrc/FORMAT.md, sections 1 to 3 and 6, in Python: what the C core is tested against.

Written from that text alone. Slow where it can be plain: numbers are Fractions and integers of any size, nothing wraps.
`weights` is the one function that works on whole arrays; its fma rounds once by rounding to odd in binary64, and
test_intervals.py holds it against the Fractions. Nothing of the package is imported here.
"""

from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

import numpy as np

LOG2_E = float.fromhex("0x1.715476p+0")
ROUNDING = float.fromhex("0x1.8p+23")
COEFFICIENTS = [
    float.fromhex(c) for c in ("0x1p+29", "-0x1.62e12cp+28", "0x1.ec036ep+26", "-0x1.c9fc68p+24", "0x1.3a0518p+22")
]
FLOOR_FROM = 31.5
IN_PLACE = 8192
LARGEST_FLOAT32 = (2**24 - 1) * Fraction(2) ** 104


class OracleError(Exception):
    """The row or the token has no interval."""


# Section 1: floats.


def round_to_float32(exact: Fraction) -> Fraction:
    """To the nearest binary32 number, ties to even, denormals kept; for results that do not overflow."""
    if exact == 0:
        return exact
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(exact / unit) * unit  # Python rounds a Fraction's ties to even
    assert abs(rounded) <= LARGEST_FLOAT32
    return rounded


def fma(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    return round_to_float32(a * b + c)


def float32_of_half(bits: np.ndarray) -> np.ndarray:
    """binary16 given by its bits (uint16), widened by the definition of the format."""
    sign = np.where(bits >> 15, -1.0, 1.0)
    exponent = (bits >> 10 & 31).astype(np.int64)
    fraction = (bits & 1023).astype(np.float64)
    finite = np.where(exponent == 0, fraction * 2.0**-24, (1024 + fraction) * 2.0 ** (exponent - 25.0))
    special = np.where(fraction == 0, np.inf, np.nan)
    return (sign * np.where(exponent == 31, special, finite)).astype(np.float32)


def float32_of_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 given by its bits (uint16): the upper half of a binary32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Section 2: from a row of logits to intervals.


def weight_exact(logit: float, maximum: float) -> int:
    """Section 2.1 for one symbol, in Fractions. `maximum` is finite, `logit` finite or -inf."""
    if logit == -np.inf:
        return 1
    log2_e, magic = Fraction(LOG2_E), Fraction(ROUNDING)
    logit, maximum = Fraction(float(logit)), Fraction(float(maximum))
    if abs(maximum) > IN_PLACE:
        s, c = maximum, Fraction(0)
    else:
        s, c = Fraction(0), round_to_float32(maximum * log2_e)
    if (s - logit) * log2_e + c >= 32:  # rounding is monotonic: t >= 31.5, if it has not overflowed
        return 1
    t = fma(-round_to_float32(logit - s), log2_e, c)
    if t >= FLOOR_FROM:
        return 1
    n = round_to_float32(round_to_float32(t + magic) - magic)
    g = round_to_float32(t - n)
    p = Fraction(COEFFICIENTS[4])
    for coefficient in reversed(COEFFICIENTS[:4]):
        p = fma(p, g, Fraction(coefficient))
    assert n.denominator == 1 and 0 <= n <= 31 and abs(g) <= Fraction(1, 2) and p > 0
    return (int(p) >> int(n)) + 1


def fma_array(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
    """fma in binary32 on binary32 numbers held as float64.

    The product is exact in binary64; the sum is rounded to odd there, so that the second rounding, to binary32, is as
    if it were the only one (S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms
    using rounding to odd", IEEE Transactions on Computers 57, 2008).
    """
    product = np.asarray(a, np.float64) * b
    total = product + c
    of_c = total - product
    error = (product - (total - of_c)) + (c - of_c)
    bits = total.view(np.int64)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0), bits + toward, bits).view(np.float64)
    return odd.astype(np.float32).astype(np.float64)


def weights(row: np.ndarray) -> np.ndarray:
    """Section 2.1 for a whole row, float32 [V] to int64 [V]."""
    row = np.asarray(row)
    if np.isnan(row).any() or (row == np.inf).any() or (row == -np.inf).all():
        raise OracleError("the row has no distribution")
    logits = row.astype(np.float64)
    maximum = float(logits.max())
    shift, offset = (maximum, 0.0) if abs(maximum) > IN_PLACE else (0.0, float(np.float32(maximum * LOG2_E)))
    w = np.ones(len(row), np.int64)
    # What is left out here has t >= 31.5. Rounding a difference to binary64 first does no harm: 53 >= 2 * 24 + 2 bits
    # (S. Figueroa, "When is double rounding innocuous?", SIGNUM Newsletter 30, 1995).
    near = np.flatnonzero(maximum - logits < 30)
    difference = (logits[near] - shift).astype(np.float32).astype(np.float64)
    t = fma_array(-difference, LOG2_E, offset)
    near, t = near[t < FLOOR_FROM], t[t < FLOOR_FROM]
    n = np.rint(t)  # ties to even
    g = t - n
    p = np.full_like(g, COEFFICIENTS[4])
    for coefficient in reversed(COEFFICIENTS[:4]):
        p = fma_array(p, g, coefficient)
    w[near] += p.astype(np.int64) >> n.astype(np.int64)
    return w


def interval(row: np.ndarray, token: int) -> tuple[int, int, int]:
    """Section 2.2: (start, freq, total) of one token, Python integers."""
    if not 0 <= token < len(row):
        raise OracleError("the token is not in the row")
    w = [int(x) for x in weights(row)]
    return sum(w[:token]), w[token], sum(w)


# Section 3: the range coder.

# Here `low` is one big integer: all bytes written and the 64 bits below them, so a carry is nothing special.


def share(size: int, start: int, freq: int, total: int) -> tuple[int, int]:
    """What narrows an interval of `size` numbers: (numbers below the symbol's share, numbers in it)."""
    r = size // total
    below = r * start
    return below, size - below if start + freq == total else r * freq


def encode(triples: list[tuple[int, int, int]]) -> bytes:
    """The payload of a list of (start, freq, total)."""
    low, size, n_bits = 0, 2**64 - 1, 64
    for start, freq, total in triples:
        below, size = share(size, start, freq, total)
        low += below
        while size < 2**56:
            low, size, n_bits = low << 8, size << 8, n_bits + 8
    return shortest_inside(low, size, n_bits)


def shortest_inside(low: int, size: int, n_bits: int) -> bytes:
    """The fewest bytes b with low <= 0.b * 2**n_bits < low + size; of several, the smallest number."""
    for n_bytes in range(n_bits // 8 + 1):
        unit = 1 << (n_bits - 8 * n_bytes)
        number = -(-low // unit)
        if number * unit < low + size:
            return number.to_bytes(n_bytes, "big")
    raise AssertionError("low itself has n_bits")


class Decoder:
    """Section 3.3: one stream. `next` takes the weights of a row and returns its token."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.position = 8
        self.code = int.from_bytes(payload[:8].ljust(8, b"\0"), "big")
        self.size = 2**64 - 1

    def next(self, row_weights: list[int]) -> int:
        ends = list(accumulate(row_weights))
        total = ends[-1]
        value = min(self.code // (self.size // total), total - 1)
        token = bisect_right(ends, value)
        below, self.size = share(self.size, ends[token] - row_weights[token], row_weights[token], total)
        self.code -= below
        while self.size < 2**56:
            byte = self.payload[self.position] if self.position < len(self.payload) else 0
            self.position += 1
            self.code, self.size = (self.code << 8 | byte) % 2**64, self.size << 8
        return token

    def may_end(self) -> bool:
        """Whether an encoder writes this payload for the tokens so far."""
        n, n_moved = len(self.payload), self.position - 8
        last = self.payload[-1] if n else 1
        if last == 0 or self.code >= self.size:
            return False
        return n <= n_moved or (
            n == n_moved + 1 and self.code < 2**56 and self.size - self.code <= 2**64 - last * 2**56
        )


def decode(payload: bytes, all_weights: list[list[int]]) -> list[int]:
    """The tokens, one for each list of weights."""
    decoder = Decoder(payload)
    return [decoder.next(row_weights) for row_weights in all_weights]


# Section 6: the softmax of a row.

EXP2_COEFFICIENTS = [
    float.fromhex(c) for c in ("0x1.62e42ap-1", "0x1.ebf9c2p-3", "0x1.c6b6d8p-5", "0x1.3ce8acp-7", "0x1.5bda4p-10")
]
DIFFERENCE_FLOOR = np.float32(float.fromhex("-0x1.62e43p+5"))
LN_2 = float.fromhex("0x1.62e42fefa39efp-1")
ROOT_OF_HALF_BITS = 0x3FE6A09E667F3BCD


def softmax_sum(row: np.ndarray) -> float:
    """S of a row, float32 [V] without NaN and +inf."""
    padded = np.full(-(-len(row) // 64) * 64, -np.inf, np.float32)
    padded[: len(row)] = row
    with np.errstate(over="ignore"):
        differences = np.maximum(padded - padded.max(), DIFFERENCE_FLOOR).astype(np.float64)
    k = fma_array(differences, LOG2_E, ROUNDING) - ROUNDING
    f = fma_array(differences, LOG2_E, -k)
    p = np.full_like(f, EXP2_COEFFICIENTS[4])
    for coefficient in (*reversed(EXP2_COEFFICIENTS[:4]), 1.0):
        p = fma_array(p, f, coefficient)
    w = (p * 2.0**k).astype(np.float32).reshape(-1, 4, 16)
    lanes = np.zeros(16)
    for block in (w[:, 0] + w[:, 1]) + (w[:, 2] + w[:, 3]):
        lanes = lanes + block.astype(np.float64)
    total = 0.0
    for lane in lanes:
        total += float(lane)
    return total


def fma64(a: float, b: float, c: float) -> float:
    """In binary64; Python rounds a Fraction's float to nearest even."""
    return float(Fraction(a) * Fraction(b) + Fraction(c))


def ln64(x: float) -> float:
    bits = int(np.float64(x).view(np.int64))
    n = (bits - ROOT_OF_HALF_BITS) >> 52
    z = float(np.int64(bits - (n << 52)).view(np.float64))
    q, r = (z - 1.0) / (z + 1.0), 0.0
    for k in range(27, 0, -2):
        r = fma64(r, q * q, 1.0 / k)
    return fma64(float(n), LN_2, (2.0 * q) * r)


def log2_softmax(row: np.ndarray, token: int) -> float:
    if not 0 <= token < len(row):
        raise OracleError("the token is not in the row")
    if np.isnan(row).any() or (row == np.inf).any() or (row == -np.inf).all():
        raise OracleError("the row has no distribution")
    return (float(row[token]) - float(row.max()) - ln64(softmax_sum(row))) / LN_2

"""The golden file of the coder: its layout, and the integer generator that its logits come from.

csrc/check/self_check.c reads the same file and has the same generator in C. Nothing here may change once the file is
frozen. Little-endian throughout:

    8 bytes "LMCGOLD1", u32 number of cases; a case is
    u32 dtype (0 float32, 1 float16, 2 bfloat16), u32 kind, u32 vocab_size, u32 n_rows, u64 seed, u64 hash of logits,
    n_rows x (u32 token, u64 start, u64 freq, u64 total), u32 payload bytes, payload
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PATH = Path(__file__).parents[1] / "golden" / "coding.bin"
MAGIC = b"LMCGOLD1"
KINDS = ("normal", "peaked", "flat", "tied", "steep", "bits", "masked", "offset")
FLOAT32, FLOAT16, BFLOAT16 = range(3)
ROW = np.dtype([("token", "<u4"), ("start", "<u8"), ("freq", "<u8"), ("total", "<u8")])


@dataclass(frozen=True)
class Case:
    dtype: int
    kind: str
    vocab_size: int
    n_rows: int
    seed: int


@dataclass(frozen=True)
class Golden:
    case: Case
    logits_hash: int
    rows: np.ndarray  # ROW [n_rows]
    payload: bytes


def splitmix64(seed: int, n: int) -> np.ndarray:
    """The first n numbers of SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014), uint64 [n]."""
    z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def _levels(case: Case, r: np.ndarray) -> np.ndarray:
    """Logits of all kinds but "bits" as integers, in units of 2**-14 for float32 and 2**-4 for the short formats.

    All are exact in their format: at most 8 significant bits for the short ones. The lowest integer stands for -inf.
    """
    fields = [(r >> np.uint64(16 * i) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4)]
    bell = sum(fields) - 131_070
    is_short = case.dtype != FLOAT32
    unit = 16 if is_short else 16_384
    bell = bell >> 10 if is_short else bell
    last = np.zeros_like(bell, bool)
    last[:, -1] = True
    if case.kind == "peaked":
        bell = np.where(np.arange(case.vocab_size) == case.vocab_size // 2, 12 * unit, bell >> 2)
    if case.kind == "flat":
        bell = np.full_like(bell, -7 * unit - unit // 4)
    if case.kind == "tied":
        bell = -(fields[0] & 3) * unit
    if case.kind == "steep":
        bell = -(fields[0] & 127) * (unit // 2) if is_short else -(fields[0] << 4)
    if case.kind == "masked":
        bell = np.where((fields[0] & 7 != 0) & ~last, np.iinfo(np.int64).min, bell)
    if case.kind == "offset":  # float32 only; above and below the 8192 of FORMAT.md, section 2.1, by turns
        bell = (bell >> 6) * 64 + np.where(np.arange(case.n_rows)[:, None] % 2, -8_190, 8_190) * unit
    return bell


def logits_bits(case: Case) -> np.ndarray:
    """The logits as unsigned integers, [n_rows, vocab_size]: uint32 for float32, else uint16."""
    r = splitmix64(case.seed, case.n_rows * case.vocab_size).reshape(case.n_rows, case.vocab_size)
    if case.kind == "bits":
        bits = (r & np.uint64(0xFFFFFFFF if case.dtype == FLOAT32 else 0xFFFF)).astype(np.uint32)
        exponent = {FLOAT32: 0x7F800000, FLOAT16: 0x7C00, BFLOAT16: 0x7F80}[case.dtype]
        bits = np.where(bits & exponent == exponent, 0, bits)  # neither NaN nor infinity
        return bits.astype(np.uint32 if case.dtype == FLOAT32 else np.uint16)
    levels = _levels(case, r)
    values = np.where(levels == np.iinfo(np.int64).min, -np.inf, levels * 2.0 ** (-14 if case.dtype == FLOAT32 else -4))
    if case.dtype == FLOAT16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return bits if case.dtype == FLOAT32 else (bits >> 16).astype(np.uint16)


def tokens(case: Case) -> np.ndarray:
    """From the numbers that follow those of the logits; the first symbol, and the last one, are among them."""
    n_logits = case.n_rows * case.vocab_size
    drawn = splitmix64(case.seed, n_logits + case.n_rows)[n_logits:] % np.uint64(case.vocab_size)
    drawn[0], drawn[-1] = 0, case.vocab_size - 1
    return drawn.astype(np.int64)


def hash_of(bits: np.ndarray) -> int:
    """Sum of (i + 1) * bits[i] modulo 2**64: says whether a generator makes the logits that are meant."""
    flat = bits.ravel().astype(np.uint64)
    return int((np.arange(1, flat.size + 1, dtype=np.uint64) * flat).sum(dtype=np.uint64))


def to_bytes(goldens: list[Golden]) -> bytes:
    parts = [MAGIC, struct.pack("<I", len(goldens))]
    for golden in goldens:
        c = golden.case
        head = (c.dtype, KINDS.index(c.kind), c.vocab_size, c.n_rows, c.seed, golden.logits_hash)
        parts += [struct.pack("<IIIIQQ", *head), golden.rows.astype(ROW).tobytes()]
        parts += [struct.pack("<I", len(golden.payload)), golden.payload]
    return b"".join(parts)


def read(path: Path = PATH) -> list[Golden]:
    data = path.read_bytes()
    assert data[:8] == MAGIC
    (n_cases,) = struct.unpack_from("<I", data, 8)
    goldens, at = [], 12
    for _ in range(n_cases):
        dtype, kind, vocab_size, n_rows, seed, logits_hash = struct.unpack_from("<IIIIQQ", data, at)
        at += 32
        rows = np.frombuffer(data, ROW, n_rows, at)
        at += rows.nbytes
        (n_bytes,) = struct.unpack_from("<I", data, at)
        payload = data[at + 4 : at + 4 + n_bytes]
        at += 4 + n_bytes
        goldens.append(Golden(Case(dtype, KINDS[kind], vocab_size, n_rows, seed), logits_hash, rows, payload))
    assert at == len(data)
    return goldens

"""Writes coding.bin, once: intervals and payloads by the oracle, never by the C core. It refuses to overwrite.

The file is frozen: it says what every later version must decode. A change of the arithmetic version (csrc/FORMAT.md)
gets a new file beside it.
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import golden_coding as golden
import oracle

SMALL = [(1, 5), (2, 40), (5, 40), (16, 30), (33, 30), (65, 30), (257, 25), (1024, 20), (1091, 20)]
LARGE = [
    (golden.FLOAT32, "normal", 50_304, 16),
    (golden.FLOAT16, "normal", 50_257, 16),
    (golden.BFLOAT16, "steep", 50_304, 16),
    (golden.FLOAT32, "flat", 200_000, 6),
    (golden.FLOAT32, "masked", 131_073, 6),
    (golden.FLOAT32, "tied", 2**21, 2),
    (golden.FLOAT32, "normal", 256, 2_000),
]


def cases() -> list[golden.Case]:
    small = [
        (dtype, kind, vocab_size, n_rows)
        for dtype, kind, (vocab_size, n_rows) in product(range(3), golden.KINDS, SMALL)
        if not (kind == "offset" and dtype != golden.FLOAT32)
    ]
    return [golden.Case(*shape, seed=1_000_003 * i + 17) for i, shape in enumerate(small + LARGE)]


def float32_logits(case: golden.Case, bits: np.ndarray) -> np.ndarray:
    if case.dtype == golden.FLOAT32:
        return bits.view(np.float32)
    return (oracle.float32_of_half if case.dtype == golden.FLOAT16 else oracle.float32_of_bfloat16)(bits)


def solve(case: golden.Case) -> golden.Golden:
    bits, tokens = golden.logits_bits(case), golden.tokens(case)
    logits = float32_logits(case, bits)
    triples = [oracle.interval(row, int(token)) for row, token in zip(logits, tokens, strict=True)]
    rows = np.array([(token, *triple) for token, triple in zip(tokens, triples, strict=True)], golden.ROW)
    return golden.Golden(case, golden.hash_of(bits), rows, oracle.encode(triples))


def main() -> None:
    if golden.PATH.exists():
        sys.exit(f"{golden.PATH} exists and is frozen; nothing was written")
    data = golden.to_bytes([solve(case) for case in cases()])
    with golden.PATH.open("xb") as file:
        file.write(data)
    print(f"{golden.PATH}: {len(data)} bytes")


if __name__ == "__main__":
    main()

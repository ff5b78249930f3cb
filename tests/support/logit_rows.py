"""Rows of logits of every kind, tokens for them, and what the oracle says of both: for the tests of the coder."""

import functools

import numpy as np
import oracle

FLOAT32_MAX = np.finfo(np.float32).max
DENORMALS = np.array([1e-45, -1e-45, 1.1754942e-38, -1.1754942e-38, 5e-41, 0.0, -0.0], np.float32)


def normal(rng, shape):
    return 3 * rng.standard_normal(shape)


def peaked(rng, shape):
    logits = rng.standard_normal(shape)
    logits[..., shape[-1] // 2] += 40
    return logits


def flat(rng, shape):
    return np.full(shape, -7.25)


def tied(rng, shape):
    return rng.integers(-3, 1, shape)


def steep(rng, shape):
    """Over the whole range of weights, down to the floor."""
    return rng.uniform(-70, 0, shape)


def between_integers(rng, shape):
    """Where the rounding of d * log2 e to an integer is closest to a tie."""
    return np.float32((rng.integers(-60, 0, shape) + 0.5) * np.log(2))


def huge(rng, shape):
    return rng.choice([1e38, -1e38, 3e38, FLOAT32_MAX, -FLOAT32_MAX, 0.0, 2.9999998e38], shape)


def denormal(rng, shape):
    return rng.choice(DENORMALS, shape)


def near_smallest_normal(rng, shape):
    """Differences of two normal numbers that are denormal."""
    return rng.choice(np.float32([1.2e-38, 1.3e-38, -1.2e-38, 1.1754944e-38, 0.0]), shape)


def masked(rng, shape):
    """-inf nearly everywhere, as constrained decoding has it."""
    logits = np.where(rng.random(shape) < 0.9, -np.inf, rng.standard_normal(shape))
    logits[..., -1] = 0.5
    return logits


def far_from_zero(rng, shape):
    """Maxima on both sides of 8192 and -8192, where the formula of a weight changes."""
    maxima = np.resize(np.float32([8192, 8192.5, -8192, -8193, 1e6, -100]), shape[0])
    logits = np.float32(maxima[:, None] - np.abs(9 * rng.standard_normal(shape)))
    logits[:, shape[1] // 3] = maxima
    return logits


DISTRIBUTIONS = [
    normal, peaked, flat, tied, steep, between_integers, huge, denormal, near_smallest_normal, masked, far_from_zero,
]  # fmt: skip
# Around the widths of the vectors, of the unrolled loops, and of the blocks of a search.
VOCAB_SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 1023, 1024, 1025, 1088, 2049]
LARGE = [(normal, 50_304), (masked, 50_257), (flat, 200_000), (steep, 200_000), (tied, 131_073)]


def some_tokens(rng, n_rows, vocab_size):
    tokens = rng.integers(0, vocab_size, n_rows)
    tokens[0], tokens[-1] = 0, vocab_size - 1
    return tokens


@functools.cache
def case(distribution, vocab_size, n_rows=6, dtype=np.float32):
    """(logits, tokens, weights of every row by the oracle)"""
    rng = np.random.default_rng([DISTRIBUTIONS.index(distribution), vocab_size])
    with np.errstate(over="ignore"):
        logits = np.ascontiguousarray(distribution(rng, (n_rows, vocab_size)), dtype)
    if dtype == np.float16:
        logits = np.clip(logits, -65504, 65504)
    logits.setflags(write=False)
    return logits, some_tokens(rng, n_rows, vocab_size), [oracle.weights(row) for row in logits]


def triples_of(weights, tokens):
    return [(int(w[:t].sum()), int(w[t]), int(w.sum())) for w, t in zip(weights, tokens, strict=True)]


def as_triples(arrays):
    return [tuple(int(x) for x in triple) for triple in zip(*(np.ravel(a) for a in arrays), strict=True)]

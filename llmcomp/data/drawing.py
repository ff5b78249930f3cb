"""What is drawn at random: every choice follows from a key through SHA-256, so it is the same for everybody."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

# How chunks are chosen among all: at random over the whole of the data, or those at its beginning.
DRAWS = ("spread", "first")


class Request(NamedTuple):
    """What was asked for, whatever the data: at most `n_chunks` chunks, or `whole` documents, chosen by `draw`."""

    n_chunks: int
    chunk_bytes: int
    draw: str = "spread"
    seed: int = 0
    whole: bool = False
    progress: bool = False

    def numbers(self, n_available: int) -> list[int]:
        """Which of `n_available` chunks are taken, in order."""
        if self.draw == "spread":
            return drawn_numbers(self.n_chunks, n_available, self.seed)
        return list(range(min(self.n_chunks, n_available)))

    def found(self, chunks: list[Chunk], n_available: int | None, chunk_bytes: int | None) -> Found:
        """Of chunks that were chosen by `numbers`."""
        return Found(chunks, n_available, self.draw, self.seed if self.draw == "spread" else None, chunk_bytes)


class Chunk(NamedTuple):
    """Bytes, where they are from for a person (`source`), and for statistics: chunks of one `document` (a file, a
    picture, an utterance, a row) resemble one another, and those at near `offset`s, in bytes, still more."""

    content: bytes
    source: str
    document: str
    offset: int | None = None


class Found(NamedTuple):
    """What a reader made of somebody's data; `n_available` chunks there are in all, None: any number may be drawn.

    `draw` and `seed`: how they were in fact chosen. `chunk_bytes`: of each; None where they are whole documents.
    """

    chunks: list[Chunk]
    n_available: int | None
    draw: str
    seed: int | None
    chunk_bytes: int | None


def key_digest(*key: object) -> bytes:
    """SHA-256 of the key's parts as text, joined by single spaces."""
    return hashlib.sha256(" ".join(map(str, key)).encode()).digest()


def draw(bound: int, *key: object) -> int:
    """An integer from 0 to `bound` - 1: floor(h * bound / 2^64), h the first 8 bytes of the key's SHA-256, big-endian.

    The key is its parts as text, joined by single spaces.
    """
    return int.from_bytes(key_digest(*key)[:8], "big") * bound >> 64


def drawn_numbers(n: int, bound: int, seed: int) -> list[int]:
    """The first `n` of a random order of 0 to `bound` - 1: Fisher and Yates's shuffle with `draw`, from the front.

    Step i swaps what stands at i with what stands at i + draw(bound - i, seed, "chunk", i).
    """
    moved: dict[int, int] = {}
    order = []
    for i in range(min(n, bound)):
        j = i + draw(bound - i, seed, "chunk", i)
        order.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return order

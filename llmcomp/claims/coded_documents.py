"""Documents <-> the bytes that a decoding process is given, and all of it: lengths, payloads, nothing beside them.

Layout: the number of documents, then for each its bytes and its payload's bytes, all as LEB128; then the payloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llmcomp.codec.segments import SegmentCodec
from llmcomp.errors import CorruptArchive

# How much is coded between two reports of progress.
_BATCH_BYTES = 1 << 18


class Coding(NamedTuple):
    """`packed`: what decodes. `ideal_bits` are those of the integer intervals, with the mapping's side bits."""

    packed: bytes
    n_tokens: int
    ideal_bits: float


def encode(codec: SegmentCodec, documents: Sequence[bytes], on_bytes: Callable[[int], Any]) -> Coding:
    """The coded form of documents, none of them empty, in their order."""
    lengths, payloads = [], []
    n_tokens, ideal_bits = 0, 0.0
    for batch in _batches(documents):
        for document, coded in zip(batch, codec.encode(batch), strict=True):
            lengths.append((len(document), len(coded.payload)))
            payloads.append(coded.payload)
            n_tokens += coded.n_tokens
            ideal_bits += coded.ideal_bits + coded.side_bits
        on_bytes(sum(map(len, batch)))
    head = _leb128(len(lengths)) + b"".join(_leb128(n) for pair in lengths for n in pair)
    return Coding(head + b"".join(payloads), n_tokens, ideal_bits)


def decode(codec: SegmentCodec, packed: bytes, on_bytes: Callable[[int], Any]) -> list[bytes]:
    """The documents; CorruptArchive where the predictor's numbers are not those that were coded with."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(packed):
                raise CorruptArchive("coded documents: cut short")
            byte, at = packed[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    lengths = [(number(), number()) for _ in range(number())]
    payloads = []
    for _, n in lengths:
        payloads.append(packed[at : at + n])
        at += n
    if at != len(packed):
        raise CorruptArchive(f"coded documents: found {len(packed)} bytes, expected {at}")
    return codec.decode(payloads, [n for n, _ in lengths], on_bytes)


def _batches(documents: Sequence[bytes]) -> list[list[bytes]]:
    batches: list[list[bytes]] = []
    n_bytes = 0
    for document in documents:
        if not batches or n_bytes >= _BATCH_BYTES:
            batches.append([])
            n_bytes = 0
        batches[-1].append(document)
        n_bytes += len(document)
    return batches


def _leb128(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])

"""Segments as deflate and LZMA code them, for what a model cannot shrink as well: FORMAT.md, 5.4, is the contract.

Only decoding is exact: which bytes zlib or liblzma write, and so which segments take this form, is up to their version.
"""

from __future__ import annotations

import lzma
import zlib

from llmcomp.codec.container import SEGMENT_BYTES_MAX, Segment
from llmcomp.errors import CorruptArchive

DEFLATE, LZMA = 1, 2
# What segments.py codes: the model's payload without mixing, in an archive with it.
ALONE = 3
# No stream of section 3 ends in a zero byte, so that one tells such a payload from a model's, which only ends so
# where there is nothing behind its side bytes.
_MARK = b"\0"
_LZMA_DICTIONARY_BYTES_MIN = 1 << 12


def is_marked(payload: bytes, side_bytes: int) -> bool:
    """Whether a payload of an archive of format 2 has a kind, where a model's own begins with so many side bytes."""
    return payload.endswith(_MARK) and len(payload) != max(1, side_bytes)


def marked(stream: bytes, kind: int) -> bytes:
    """The payload of that kind."""
    return stream + bytes([kind]) + _MARK


def cut(payload: bytes) -> tuple[bytes, int]:
    """The stream and the kind of a payload that is marked."""
    return payload[:-2], payload[-2] if len(payload) > 1 else 0


def encode(content: bytes) -> bytes:
    """The shorter of the two payloads of `content`."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1)
    coded = ((DEFLATE, deflate.compress(content) + deflate.flush()), (LZMA, _lzma_of(content)))
    kind, stream = min(coded, key=lambda item: len(item[1]))
    return marked(stream, kind)


def _lzma_of(content: bytes) -> bytes:
    """Distances in a segment are below its size, so that a dictionary of that size does: it takes a tenth of the time
    of a larger one."""
    dictionary_bytes = max(_LZMA_DICTIONARY_BYTES_MIN, len(content))
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary_bytes}]
    return lzma.compress(content, format=lzma.FORMAT_RAW, filters=filters)


def decode(payload: bytes, n_bytes: int) -> bytes:
    """The `n_bytes` bytes of a payload of `encode`; CorruptArchive for any other, and for more or fewer bytes.

    No more than one byte above `n_bytes` is ever decoded.
    """
    if not is_marked(payload, 0):
        raise CorruptArchive("its payload needs a model, but the archive names none")
    stream, kind = cut(payload)
    if kind not in (DEFLATE, LZMA):
        raise CorruptArchive(f"its payload is of kind {kind}; {DEFLATE} and {LZMA} are what it could be here")
    try:
        content, ended = _inflated(stream, n_bytes) if kind == DEFLATE else _lzma_decoded(stream, n_bytes)
    except (zlib.error, lzma.LZMAError) as error:
        raise CorruptArchive(f"its payload is no stream of kind {kind}: {error}") from None
    if not ended or len(content) != n_bytes:
        raise CorruptArchive(f"its payload of kind {kind} does not end with byte {n_bytes} of the segment")
    return content


def _inflated(stream: bytes, n_bytes: int) -> tuple[bytes, bool]:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflate.decompress(stream, n_bytes + 1)
    return content, inflate.eof and not inflate.unused_data


def _lzma_decoded(stream: bytes, n_bytes: int) -> tuple[bytes, bool]:
    # Old versions of liblzma do not look at the first byte.
    if not stream.startswith(b"\0"):
        raise lzma.LZMAError("its first byte is not zero")
    filters = [{"id": lzma.FILTER_LZMA1, "lc": 3, "lp": 0, "pb": 2, "dict_size": SEGMENT_BYTES_MAX}]
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
    content = decoder.decompress(stream, n_bytes + 1)
    return content, decoder.eof and not decoder.unused_data


def content_of(segment: Segment) -> bytes:
    """What a segment holds that needs no model, stored or as `decode`; CorruptArchive names one that fails."""
    if segment.stored:
        return segment.payload
    try:
        return decode(segment.payload, segment.n_bytes)
    except CorruptArchive as error:
        raise CorruptArchive(f"segment {segment.number} is malformed: {error}") from None

"""Archives with right checksums and hostile fields, and what must hold of every way to read one.

Laid out here by hand, from the words of FORMAT.md: the package's own writer refuses most of this.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import random
import struct
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
from archive_oracle import varint_bytes
from tiny_models import ConstantModel

import llmcomp
from llmcomp import compress, decompress
from llmcomp.codec import archive
from llmcomp.codec.compress import salvage_stream
from llmcomp.codec.container import ArchiveIndex, ArchiveReader
from llmcomp.errors import Error

MODEL = ConstantModel([40] * 16 + [1] * 240)
MODEL.context_length = 32
TEXT = bytes(np.random.default_rng(0).integers(0, 16, 4000, np.uint8))
_HASHES = bytes(24)


class Frame(NamedTuple):
    """`n`: the original bytes that the checksum is made for; `stored` only says what to write as the tag."""

    number: int
    n: int
    tag: int
    payload: bytes
    is_last: bool = False


class Hostile:
    """Random archives; `blob()` makes the next one."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self._nested = [b""]
        self._mixing = 0
        self._payloads: dict[tuple[bool, bytes], bytes] = {}
        self._streams: dict[tuple[int, bytes], bytes] = {}
        self._contents: dict[bytes, bytes] = {}

    def blob(self) -> bytes:
        rng = self.rng
        version = rng.choice((1, 2, 2, 2)) if rng.random() < 0.98 else rng.randrange(256)
        segment_bytes = rng.choice((16, 16, 16, 17, 24, 40)) if rng.random() < 0.97 else 65537
        header, check, has_model = self._header(version, segment_bytes)
        frames = self._frames(segment_bytes, has_model)
        blob = self._laid_out(header, check, segment_bytes, frames)
        if rng.random() < 0.2:
            blob = self._damaged(blob)
        if len(blob) < 4000:
            self._nested = [*self._nested[-20:], blob]
        return blob

    def _header(self, version: int, segment_bytes: int) -> tuple[bytes, int, bool]:
        rng = self.rng
        has_model, self._mixing = rng.random() < 0.8, 0
        flags = int(has_model) if rng.random() < 0.98 else rng.randrange(256)
        out = (
            b"\x89LMC" + bytes([version, flags]) + (rng.choice((b"s" * 16, rng.randbytes(16))) if version > 1 else b"")
        )
        size = segment_bytes if rng.random() < 0.98 else rng.choice((0, 1, 15, 1 << 20, (1 << 20) + 1, (1 << 28) - 1))
        out += self._varint(size)
        if flags & 1:
            arithmetic, engine, mapping = (v if rng.random() < 0.97 else rng.randrange(256) for v in (1, 0, 0))
            mapping = rng.choice((0, 0, 0, 1, 2, 3)) if mapping == 0 else mapping
            out += bytes([arithmetic, engine, mapping])
            if version > 1:
                self._mixing = rng.choice((0, 1)) if rng.random() < 0.98 else rng.randrange(256)
                out += bytes([self._mixing])
            context = rng.choice((1, 2, 8, 32))
            overlap = rng.randrange(context)
            for value in (context, overlap, 256, 0):
                hostile = rng.choice((0, 1, 255, 257, 1 << 16, (1 << 28) - 1))
                out += self._varint(value if rng.random() < 0.98 else hostile)
            out += _HASHES[:16] if rng.random() < 0.98 else rng.randbytes(16)
            out += hashlib.sha256(b'{"model":{"type":"bytes"}}').digest()[:8]
            name = (
                b"constant" if rng.random() < 0.97 else rng.choice((b"", b"\xff", b"a\nb", b"../x", rng.randbytes(9)))
            )
            out += bytes([len(name)]) + name + b"\0"
        check = zlib.crc32(out)
        return out + struct.pack("<I", check ^ (rng.random() < 0.005)), check, bool(flags & 1)

    def _varint(self, value: int) -> bytes:
        raw = varint_bytes(value)
        return raw if self.rng.random() < 0.995 else raw[:-1] + bytes([raw[-1] | 128]) + rng_tail(self.rng)

    def _frames(self, segment_bytes: int, has_model: bool) -> list[Frame]:
        rng = self.rng
        n_full = (
            rng.choice((0, 1, 2, 3, 5, 9)) if rng.random() < 0.97 or segment_bytes > 16 else rng.choice((256, 257, 300))
        )
        if segment_bytes > 1000:
            n_full = min(n_full, 1)
        frames = [self._frame(k, segment_bytes, has_model) for k in range(n_full)]
        n_last = rng.choice((0, 0, 1, 2, 5, 15)) if rng.random() < 0.98 else rng.choice((segment_bytes, 200, 1 << 20))
        if n_last:
            frames.append(self._frame(n_full, n_last, has_model)._replace(is_last=True))
        if frames and rng.random() < 0.1:
            rng.choice((frames.reverse, lambda: frames.append(frames[0]), frames.pop))()
        return frames

    def _frame(self, number: int, n: int, has_model: bool) -> Frame:
        rng = self.rng
        if rng.random() < 0.02:
            number = rng.choice((0, 1, 255, 256, (1 << 32) - 1, (1 << 64) - 1))
        kind = rng.random()
        if kind < 0.15 and 4 < n < 1 << 20:
            payload = self._stock(n)
            return Frame(number, n, len(payload), payload)
        # Long ones are never coded: to decode a step at a time takes seconds.
        if has_model and kind < 0.3 and 4 < n < 100:
            payload = self._coded(n)
            return Frame(number, n, len(payload), payload)
        if kind < 0.7 or n > 1000:
            content = rng.choice((TEXT, rng.choice(self._nested), bytes(n), b"\xff" * n, rng.randbytes(n)))
            at = rng.randrange(len(content) + 1)
            payload = (content[at:] + content + bytes(n))[:n]
            return Frame(number, n, 0, payload)
        length = rng.choice((1, 2, 3, max(1, n - 3), max(1, n - 2), max(1, n - 1), n))
        payload = rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length))
        tag = length if rng.random() < 0.9 else rng.choice((0, 1, n, 65534, 65535, 65536, (1 << 24) - 1))
        return Frame(number, n, tag, payload)

    def _coded(self, n: int) -> bytes:
        """What an encoder makes of text, or something near it."""
        rng = self.rng
        at = rng.randrange(40)
        content = TEXT[at : at + min(n, 4000)]
        is_alone = self._mixing == 0 or rng.random() < 0.3
        if (is_alone, content) not in self._payloads:
            options = {"overlap": 2, "segment_bytes": max(16, len(content)), "mix": not is_alone, "stock": False}
            coded = compress(content, MODEL, salt=b"s" * 16, **options)
            segment = next(iter(ArchiveReader(io.BytesIO(coded)).segments()), None)
            self._payloads[is_alone, content] = b"x" if segment is None or segment.stored else segment.payload
        payload = self._payloads[is_alone, content]
        if is_alone and self._mixing:
            payload += bytes([3, 0])
        self._contents[payload] = content
        if rng.random() < 0.3:
            payload = rng.choice((payload[:-1], payload + b"\0", payload + b"\1", payload[::-1], b"\0"))
        return payload or b"\0"

    def _stock(self, n: int) -> bytes:
        """A payload of deflate or LZMA: right, of another length, with another end, or damaged."""
        rng = self.rng
        size = n if rng.random() < 0.7 else rng.choice((0, n - 1, n + 1, 1 << 16, 1 << 22))
        kind, content = rng.choice((1, 2)), rng.choice((bytes(size), TEXT[:8] * (size // 8) + TEXT[: size % 8]))
        if (kind, content) not in self._streams:
            self._streams[kind, content] = _deflated(content) if kind == 1 else _lzma_coded(content)
        stream = self._streams[kind, content]
        payload = stream + bytes([kind, 0])
        self._contents[payload] = content
        if rng.random() < 0.4:
            more, other = rng.randbytes(rng.choice((1, 5))), rng.choice((0, 1, 2, 3, 255))
            at = rng.randrange(len(payload))
            bent = payload[:at] + bytes([payload[at] ^ 1 << rng.randrange(8)]) + payload[at + 1 :]
            wrong = (stream[:-1], stream + more, stream + b"\0", more + stream, stream + stream)
            payload = rng.choice((bent, stream + bytes([other, 0]), rng.choice(wrong) + bytes([kind, 0]), payload[-2:]))
        return payload

    def _laid_out(self, header: bytes, check: int, segment_bytes: int, frames: list[Frame]) -> bytes:
        rng = self.rng
        tag_bytes = 2 if segment_bytes <= 1 << 16 else 3
        out, offsets, n_ended = header, [], False
        for frame in frames:
            offsets.append(len(out))
            if frame.is_last:
                out, n_ended = out + b"\xff" * tag_bytes + self._varint(frame.n), True
            place = zlib.crc32(struct.pack("<IQII", check, frame.number, frame.n, len(frame.payload)))
            crc = zlib.crc32(frame.payload) ^ place ^ (rng.random() < 0.01)
            out += (
                min(frame.tag, 256**tag_bytes - 1).to_bytes(tag_bytes, "little")
                + struct.pack("<I", crc)
                + frame.payload
            )
        if not n_ended:
            out += b"\xff" * tag_bytes + self._varint(0)
        size = sum(frame.n for frame in frames)
        hostile = (0, size + 1, max(0, size - 1), size + segment_bytes, segment_bytes * 257, 2**40, 2**63, 2**64 - 1)
        size = size if rng.random() < 0.93 else rng.choice(hostile)
        entries = [
            offsets[k] if k < len(offsets) else 0 for k in range(256, -(-min(size, 10**6) // segment_bytes), 256)
        ]
        entries = [
            e if rng.random() < 0.7 else rng.choice((0, e + 1, e + 6, len(header), rng.randrange(len(out))))
            for e in entries
        ]
        tail = b"".join(e.to_bytes(6, "little") for e in entries) + struct.pack("<Q", size)
        tail += hashlib.sha256(self._content(frames)).digest()[:16] if rng.random() < 0.97 else bytes(16)
        return out + tail + struct.pack("<I", zlib.crc32(tail, check) ^ (rng.random() < 0.01))

    def _content(self, frames: list[Frame]) -> bytes:
        """Right where all segments are stored or coded text from the start."""
        known = self._contents
        return b"".join(frame.payload if frame.tag == 0 else known.get(frame.payload, b"") for frame in frames)

    def _damaged(self, blob: bytes) -> bytes:
        rng = self.rng
        bad = bytearray(blob)
        at, n = rng.randrange(len(bad)), rng.choice((1, 1, 2, 7, 30))
        kind = rng.randrange(4)
        if kind == 0:
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            bad[at : at + n] = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))
        elif kind == 2:
            del bad[at : at + n]
        else:
            bad[at:at] = rng.choice(self._nested)[:200]
        return bytes(bad)


def _deflated(content: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(content) + deflate.flush()


def _lzma_coded(content: bytes) -> bytes:
    """The stream of a file of the LZMA SDK, behind its header of 13 bytes."""
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 6, "dict_size": 1 << 16}]
    return lzma.compress(content, format=lzma.FORMAT_ALONE, filters=filters)[13:]


def rng_tail(rng: random.Random) -> bytes:
    """More bytes of a varint than it needs, or than there may be."""
    return rng.choice((b"\0", b"\x80\0", b"\xff\xff\xff\xff\x7f"))


def read_every_way(blob: bytes, rng: random.Random) -> Counter[str]:
    """How often each way of reading passed; AssertionError where two give different bytes, and what is no Error."""
    passed: Counter[str] = Counter()
    in_order: dict[int, object] = {}
    content = None
    try:
        for segment in ArchiveReader(io.BytesIO(blob)).segments():
            in_order[segment.number] = segment
        content = decompress(blob, MODEL)
        passed["decompress"] += 1
    except Error:
        pass
    try:
        index = ArchiveIndex(io.BytesIO(blob))
        for number in {0, rng.randrange(max(1, index.n_segments)), min(256, index.n_segments - 1)}:
            segment = index.segment(max(0, number))
            assert in_order.get(number, segment) == segment, "random access gives another segment"
            passed["segment"] += 1
        archive.info(io.BytesIO(blob))
        passed["info"] += 1
    except Error:
        pass
    try:
        with llmcomp.open(io.BytesIO(blob), model=MODEL, lanes=rng.randint(1, 4)) as file:
            for _ in range(2):
                at, n = rng.randrange(1 << 12), rng.randrange(64)
                file.seek(at)
                found = file.read(n)
                assert content is None or found == content[at : at + n], "open gives other bytes"
            passed["open"] += 1
    except Error:
        assert content is None, "decompress reads what open refuses"
    try:
        target = io.BytesIO()
        summary = salvage_stream(io.BytesIO(blob), target, MODEL)
        assert content is None or (target.getvalue(), summary.lost) == (content, []), "salvage gives other bytes"
        passed["salvage"] += 1
    except Error:
        assert content is None, "decompress reads what salvage refuses"
    return passed

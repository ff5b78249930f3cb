"""Finds the intact segments of a damaged or truncated archive; decodes nothing. The frames are FORMAT.md's.

The header must be whole, since it says what the segments mean. After a damaged frame every following byte is tried as
the start of the next one: a checksum is the xor of one over the payload and one over the place, so that the segment's
number is looked up and need not be guessed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from llmcomp.codec.container import ArchiveIndex, ArchiveReader, Segment, segment_key_check, tag_bytes
from llmcomp.errors import CorruptArchive

_CHECK_BYTES = 4
# A segment of another number than the next two counts only when its successor follows: 2^-32 a try would be too often.
_TRUSTED_AHEAD = 2
_NUMBERS_AHEAD = 1 << 8
_NUMBERS_MAX = 1 << 16


class _Frame(NamedTuple):
    """What stands at an offset if a frame begins there. `place` is the checksum that its number must have."""

    n_bytes: int
    tag: int
    payload_at: int
    payload_bytes: int
    place: int
    is_last: bool

    @property
    def end(self) -> int:
        return self.payload_at + self.payload_bytes


class _Window:
    """Bytes of a seekable file, read in blocks that overlap by what one frame may need."""

    def __init__(self, file: BinaryIO, frame_bytes_max: int, limit: int):
        self._file = file
        self._frame_bytes_max = frame_bytes_max
        self._limit = limit
        self._at = 0
        self._block = b""

    def view(self, offset: int) -> memoryview:
        """At least `frame_bytes_max` bytes from `offset`, or all up to the limit."""
        missing = min(offset + self._frame_bytes_max, self._limit) - (self._at + len(self._block))
        if offset < self._at or missing > 0:
            self._file.seek(offset)
            self._block = self._file.read(min(8 * self._frame_bytes_max, self._limit - offset))
            self._at = offset
        return memoryview(self._block)[offset - self._at :]


class _Scan:
    def __init__(self, file: BinaryIO):
        file.seek(0)
        reader = ArchiveReader(file)
        self.first = reader.position
        self._segment_bytes = reader.header.segment_bytes
        self._has_model = reader.header.model is not None
        self._header_check = reader.header_check
        self._tag_bytes = tag_bytes(self._segment_bytes)
        self._frame_bytes_min = self._tag_bytes + _CHECK_BYTES + 1
        self.limit = file.seek(0, 2)
        self._n_segments: int | None = None
        try:
            index = ArchiveIndex(file)
            self.limit, self._n_segments = index.tail_at, index.n_segments
        except CorruptArchive:
            pass  # no trailer to rely on: segments may reach to the end of the file
        self._window = _Window(file, 2 * self._tag_bytes + 3 + _CHECK_BYTES + self._segment_bytes, self.limit)

    def frame(self, offset: int) -> _Frame | None:
        """The frame at that offset, if the bytes there can be one."""
        view = self._window.view(offset)
        tag, at, n_bytes = self._tag(view, 0), self._tag_bytes, self._segment_bytes
        is_last = tag == (1 << 8 * self._tag_bytes) - 1
        if is_last:
            n_bytes, at = _varint(view, at)
            tag, at = self._tag(view, at), at + self._tag_bytes
        if n_bytes == 0 or (is_last and n_bytes >= self._segment_bytes) or (tag and tag + 2 > n_bytes):
            return None
        length = tag or n_bytes
        end = at + _CHECK_BYTES + length
        if offset + end > self.limit or end > len(view) or (tag and not self._has_model):
            return None
        check = int.from_bytes(view[at : at + _CHECK_BYTES], "little")
        place = check ^ zlib.crc32(view[end - length : end])
        return _Frame(n_bytes, tag, offset + end - length, length, place, is_last)

    def _tag(self, view: memoryview, at: int) -> int:
        return int.from_bytes(view[at : at + self._tag_bytes], "little")

    def has_number(self, frame: _Frame, number: int) -> bool:
        return frame.place == segment_key_check(self._header_check, number, frame.n_bytes, frame.payload_bytes)

    def _numbers_from(self, offset: int, expected: int) -> dict[int, int]:
        """Checksum of the place, for lengths of 0 -> the number, for all numbers that may come now."""
        known = self._n_segments
        if known is None:
            known = expected + (self.limit - offset) // self._frame_bytes_min + _NUMBERS_AHEAD
        numbers = range(expected, min(known, expected + _NUMBERS_MAX))
        return {segment_key_check(self._header_check, number, 0, 0): number for number in numbers}

    def segment(self, frame: _Frame, number: int) -> Segment:
        payload = bytes(self._window.view(frame.payload_at)[: frame.payload_bytes])
        return Segment(number, frame.n_bytes, frame.tag == 0, payload)

    def resync(self, offset: int, expected: int) -> tuple[int, int] | None:
        """Offset and number of the first intact frame after the damaged one at `offset`, whose number is `expected`."""
        damaged = self.frame(offset)
        after = None if damaged is None or damaged.is_last else self.frame(damaged.end)
        if damaged is not None and after is not None and self.has_number(after, expected + 1):
            return damaged.end, expected + 1
        numbers = self._numbers_from(offset, expected)
        stop = self.limit - self._frame_bytes_min + 1 if numbers else offset
        for at in range(offset, stop):
            if (frame := self.frame(at)) is None:
                continue
            # CRC-32 is linear: what the two lengths add to the checksum of the place can be taken off again.
            lengths = segment_key_check(0, 0, frame.n_bytes, frame.payload_bytes) ^ segment_key_check(0, 0, 0, 0)
            number = numbers.get(frame.place ^ lengths)
            if number is None:
                continue
            # At the same place a flipped bit may look like another number, since both checksums are CRCs.
            is_trusted = at > offset and number < expected + _TRUSTED_AHEAD
            if is_trusted or self._is_followed(frame, number):
                return at, number
        return None

    def _is_followed(self, frame: _Frame, number: int) -> bool:
        # Behind the last segment lies the trailer, or an end mark of its own that says so.
        if number + 1 == self._n_segments and frame.end in (self.limit, self.limit - self._tag_bytes - 1):
            return True
        after = None if frame.is_last else self.frame(frame.end)
        return after is not None and self.has_number(after, number + 1)


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for n_read in range(min(4, len(view) - at)):
        value |= (view[at + n_read] & 0x7F) << (7 * n_read)
        if view[at + n_read] < 0x80:
            return value, at + n_read + 1
    return 0, at


def salvage_segments(file: BinaryIO) -> Iterator[Segment]:
    """Yields the segments of a seekable file whose checksums are right, in order, whatever lies between them.

    Segment `number` begins at byte `number * header.segment_bytes` of the original. CorruptArchive where the header
    itself is damaged. Searching costs about a second for every 64 KiB of damage; memory is bounded by the segment size.
    """
    scan = _Scan(file)
    offset, expected = scan.first, 0
    while True:
        frame = scan.frame(offset) if offset < scan.limit else None
        if frame is None or not scan.has_number(frame, expected):
            found = scan.resync(offset, expected)
            if found is None:
                return
            offset, expected = found
            continue
        yield scan.segment(frame, expected)
        if frame.is_last:
            return
        offset, expected = frame.end, expected + 1

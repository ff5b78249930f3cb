"""Finds the intact segments of a damaged or truncated archive; decodes nothing. The frames are FORMAT.md's.

The header must be whole, since it says what the segments mean. Where a frame does not verify, its tag is put right if
that makes it verify; else every following byte is tried as the start of the next frame (frame_search.py).

In an archive of format 1 nothing distinguishes a frame from one of another archive, with the same model, that lies
inside a stored segment. A run of frames is taken for the archive's own there only if it is longer than a segment can
be or reaches to the end of the frames, and does not claim the place of the segment that is missing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from llmcomp.codec.container import ArchiveIndex, ArchiveReader, Segment, tag_bytes
from llmcomp.codec.frame_search import CHECK_BYTES, Layout, Stretch, number_of
from llmcomp.errors import CorruptArchive

# A segment of another number than the next two counts only when its successor follows: 2^-32 a try would be too often.
_TRUSTED_AHEAD = 2
_NUMBERS_AHEAD = 1 << 8
_NUMBERS_MAX = 1 << 16
_STRETCH_BYTES_MIN = 1 << 15
# A frame that begins in one stretch ends in the next; a search looks one frame further.
_STRETCHES_KEPT = 3


class _Frame(NamedTuple):
    """What stands at an offset if a frame begins there."""

    n_bytes: int
    tag: int
    payload_at: int
    payload_bytes: int
    check: int
    is_last: bool

    @property
    def end(self) -> int:
        return self.payload_at + self.payload_bytes


class _Scan:
    """Frames of a seekable file by their offsets; reads ahead by what one frame may need."""

    def __init__(self, file: BinaryIO):
        file.seek(0)
        reader = ArchiveReader(file)
        header = reader.header
        self.first = reader.position
        self.layout = Layout(
            header.segment_bytes,
            tag_bytes(header.segment_bytes),
            header.model is not None or bool(header.salt),
            reader.header_check,
        )
        self._file = file
        self._is_salted = bool(header.salt)
        self._frame_bytes_min = self.layout.tag_bytes + CHECK_BYTES + 1
        self.limit = file.seek(0, 2)
        self.n_segments: int | None = None
        try:
            index = ArchiveIndex(file)
            self.limit, self.n_segments = index.tail_at, index.n_segments
        except CorruptArchive:
            pass  # no trailer to rely on: segments may reach to the end of the file
        self._stretch_bytes = max(_STRETCH_BYTES_MIN, self.layout.frame_bytes_max)
        self._stretches: dict[int, Stretch] = {}
        self._block, self._block_at = b"", 0

    # Bytes.

    def _view(self, offset: int, n_bytes: int) -> memoryview:
        """`n_bytes` bytes from `offset`, or all up to the limit."""
        stop = min(offset + n_bytes, self.limit)
        stretch = self._stretches.get(offset // self._stretch_bytes)
        if stretch is not None and stop <= stretch.start + len(stretch.data):
            return memoryview(stretch.data)[offset - stretch.start : stop - stretch.start]
        if not self._block_at <= offset <= stop <= self._block_at + len(self._block):
            self._file.seek(offset)
            n_read = max(n_bytes, 2 * self.layout.frame_bytes_max)
            self._block, self._block_at = self._file.read(min(n_read, self.limit - offset)), offset
        return memoryview(self._block)[offset - self._block_at : stop - self._block_at]

    def _stretch(self, offset: int) -> Stretch:
        """The stretch that has this offset; stretches begin at multiples of their length and are made once."""
        place = offset // self._stretch_bytes
        if place not in self._stretches:
            start = place * self._stretch_bytes
            self._file.seek(start)
            n_bytes = min(self._stretch_bytes + self.layout.frame_bytes_max, self.limit - start)
            for old in sorted(self._stretches)[: 1 - _STRETCHES_KEPT]:
                del self._stretches[old]
            self._stretches[place] = Stretch(self.layout, self._file.read(n_bytes), start, self._stretch_bytes)
        return self._stretches[place]

    # Frames.

    def frame(self, offset: int, tag: int | None = None) -> _Frame | None:
        """What stands at that offset, if it can be a frame; `tag` in place of the one that stands there."""
        layout = self.layout
        raw = bytes(self._view(offset, 2 * layout.tag_bytes + 3 + CHECK_BYTES)) if offset < self.limit else b""
        tag, at, n_bytes = _integer(raw, 0, layout.tag_bytes) if tag is None else tag, layout.tag_bytes, None
        is_last = tag == layout.end_tag
        if is_last:
            n_bytes, at = _varint(raw, at)
            tag, at = _integer(raw, at, layout.tag_bytes), at + layout.tag_bytes
        size = layout.segment_bytes if n_bytes is None else n_bytes
        if size == 0 or (is_last and size >= layout.segment_bytes) or (tag and (tag + 2 > size or not layout.may_code)):
            return None
        frame = _Frame(size, tag, offset + at + CHECK_BYTES, tag or size, _integer(raw, at, CHECK_BYTES), is_last)
        return frame if frame.end <= self.limit else None

    def _has_number(self, frame: _Frame, number: int) -> bool:
        """Whether the frame's checksum is that of the segment of this number; at the cost of reading the frame."""
        payload_check = zlib.crc32(self._view(frame.payload_at, frame.payload_bytes))
        return number == number_of(self.layout, frame.check, payload_check, frame.n_bytes, frame.payload_bytes)

    def intact(self, offset: int, number: int) -> _Frame | None:
        """The frame of the segment of this number, if it stands at this offset."""
        stretch = self._stretches.get(offset // self._stretch_bytes)
        if stretch is not None:
            known = stretch.numbers[offset - stretch.start] if offset < stretch.stop else -1
            return self.frame(offset) if known == number else None
        frame = self.frame(offset)
        return frame if frame is not None and self._has_number(frame, number) else None

    def segment(self, frame: _Frame, number: int) -> Segment:
        payload = bytes(self._view(frame.payload_at, frame.payload_bytes))
        return Segment(number, frame.n_bytes, frame.tag == 0, payload)

    # Behind damage.

    def put_right(self, offset: int, number: int) -> _Frame | None:
        """The frame at this offset if it verifies as stored, or with one bit of its tag changed."""
        layout, stretch = self.layout, self._stretch(offset)
        found = _integer(bytes(self._view(offset, layout.tag_bytes)), 0, layout.tag_bytes)
        for tag in (0, *(found ^ 1 << bit for bit in range(8 * layout.tag_bytes))):
            frame = self.frame(offset, tag)
            if frame is not None:
                payload_check = stretch.check(frame.payload_at, frame.payload_bytes)
                if number == number_of(layout, frame.check, payload_check, frame.n_bytes, frame.payload_bytes):
                    return frame
        return None

    def resync(self, offset: int, expected: int) -> tuple[int, int] | None:
        """Offset and number of the first intact frame after the damaged one at `offset`, whose number is `expected`."""
        damaged = self.frame(offset)
        if damaged is not None and not damaged.is_last and damaged.end < self.limit:
            self._stretch(damaged.end)
            if self.intact(damaged.end, expected + 1) is not None:
                return damaged.end, expected + 1
        passed = offset
        for at, number in self._candidates(offset, expected):
            if at < passed or (number == expected and not self._is_salted):
                continue
            end, n_frames, is_whole = self._run(at, number)
            if self._is_salted:
                # At the same place a flipped bit may look like another number, since both checksums are CRCs.
                is_near = at > offset and number < expected + _TRUSTED_AHEAD
                is_own = is_near or n_frames > 1 or is_whole
            else:
                is_own = end - at > self.layout.segment_bytes or is_whole
            if is_own:
                return at, number
            if n_frames > 1:
                # No chance: these lie inside a segment of another archive, and so does what they cover.
                passed = end
        return None

    def _candidates(self, offset: int, expected: int) -> Iterator[tuple[int, int]]:
        """Offsets behind damage at which a frame verifies, and its number, among those that may come now."""
        known = self.n_segments
        if known is None:
            known = expected + (self.limit - offset) // self._frame_bytes_min + _NUMBERS_AHEAD
        bound, width = min(known, expected + _NUMBERS_MAX), 1 << 8
        while offset < self.limit and expected < bound:
            stretch = self._stretch(offset)
            numbers = stretch.numbers[offset - stretch.start :][:width]
            for hit in np.flatnonzero((numbers >= expected) & (numbers < bound)):
                yield offset + int(hit), int(numbers[hit])
            offset, width = offset + len(numbers), 2 * width
            if len(numbers) == 0:
                return

    def _run(self, at: int, number: int) -> tuple[int, int, bool]:
        """Where the frames end that follow one another from here on, as far as that matters, and how many there are;
        whether they are the last of the archive."""
        end, n_frames, n_wanted = at, 0, 2 if self._is_salted else None
        while end < self.limit and n_frames != n_wanted and end - at <= self.layout.segment_bytes:
            self._stretch(end)
            frame = self.intact(end, number + n_frames)
            if frame is None:
                break
            end, n_frames = frame.end, n_frames + 1
        # Behind the last segment lies the trailer, or an end mark of its own that says so.
        is_at_end = end in (self.limit, self.limit - self.layout.tag_bytes - 1)
        return end, n_frames, is_at_end and number + n_frames == self.n_segments


def _integer(raw: bytes, at: int, n_bytes: int) -> int:
    return int.from_bytes(raw[at : at + n_bytes], "little")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The size of a last segment and where it ends; 0 where it is not written as a writer does."""
    value = 0
    for n_read, byte in enumerate(raw[at : at + 3]):
        value |= (byte & 0x7F) << (7 * n_read)
        if byte < 0x80:
            return value if byte or not n_read else 0, at + n_read + 1
    return 0, at


def salvage_segments(file: BinaryIO) -> Iterator[Segment]:
    """Yields the segments of a seekable file whose checksums are right, in order, whatever lies between them.

    Segment `number` begins at byte `number * header.segment_bytes` of the original. CorruptArchive where the header
    itself is damaged. Time grows with the size of the file, whatever it holds; memory with segment_bytes.
    """
    scan = _Scan(file)
    offset, expected = scan.first, 0
    while offset < scan.limit and expected != scan.n_segments:
        frame = scan.intact(offset, expected) or scan.put_right(offset, expected)
        if frame is None:
            found = scan.resync(offset, expected)
            if found is None:
                return
            offset, expected = found
            continue
        yield scan.segment(frame, expected)
        if frame.is_last:
            return
        offset, expected = frame.end, expected + 1

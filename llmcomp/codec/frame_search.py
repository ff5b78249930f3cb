"""Which frame of an archive would begin at each offset of a stretch of bytes, at a constant cost for an offset.

CRC-32 is linear over the integers modulo 2: that of any stretch follows from those of two prefixes, and the number of
a segment from its frame's checksum. What to make of the frames that are found is salvage.py's business.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmcomp.codec.container import SEGMENT_BYTES_MAX, segment_key_check

CHECK_BYTES = 4
_PIECE_OFFSETS = 1 << 15

Words = npt.NDArray[np.uint32]
# A linear map of 32 bits, by bytes: what value v of byte j adds to the image is table[j, v].
Map = Words


class Layout(NamedTuple):
    """What the header says of frames; `header_check` is its CRC-32. Not `may_code`: all are stored."""

    segment_bytes: int
    tag_bytes: int
    may_code: bool
    header_check: int

    @property
    def end_tag(self) -> int:
        return (1 << 8 * self.tag_bytes) - 1

    @property
    def frame_bytes_max(self) -> int:
        return 2 * self.tag_bytes + 3 + CHECK_BYTES + self.segment_bytes


def _map_of(image: Callable[[int], int]) -> Map:
    """The table of a linear map, from the images of its 32 bits."""
    bits = np.array([image(1 << bit) for bit in range(32)], np.uint32).reshape(4, 8)
    table = np.zeros((4, 256), np.uint32)
    for bit in range(8):
        chosen = np.arange(256) >> bit & 1 == 1
        table[:, chosen] ^= bits[:, bit : bit + 1]
    return table


def _apply(table: Map, values: Words) -> Words:
    """The images of `values`."""
    out = table[0][values & 255] ^ table[1][values >> 8 & 255]
    return out ^ table[2][values >> 16 & 255] ^ table[3][values >> 24]


def _image(table: Map, value: int) -> int:
    return int(table[0, value & 255] ^ table[1, value >> 8 & 255] ^ table[2, value >> 16 & 255] ^ table[3, value >> 24])


def _inverse(image: Callable[[int], int]) -> Map:
    """The inverse of an invertible map, by elimination over its 32 bits."""
    rows = [(image(1 << bit), 1 << bit) for bit in range(32)]
    for bit in range(32):
        pivot = next(i for i in range(bit, 32) if rows[i][0] >> bit & 1)
        rows[bit], rows[pivot] = rows[pivot], rows[bit]
        left, right = rows[bit]
        for i in range(32):
            if i != bit and rows[i][0] >> bit & 1:
                rows[i] = (rows[i][0] ^ left, rows[i][1] ^ right)
    return _map_of(lambda value: rows[value.bit_length() - 1][1])


def _key_part(number: int, n_bytes: int, payload_bytes: int) -> int:
    """What these three add to the checksum of a place whose numbers are all zero."""
    return segment_key_check(0, number, n_bytes, payload_bytes) ^ segment_key_check(0, 0, 0, 0)


@functools.cache
def _tables() -> tuple[Words, list[Map], Map, Map, Map]:
    """A byte's step of CRC-32; the shift of a CRC by 2^k bytes for k = 0, 1, ...; the inverse of a number's part in a
    place's checksum; the parts of the two lengths."""
    one_byte = [~zlib.crc32(b"\0", ~value & 0xFFFFFFFF) & 0xFFFFFFFF for value in range(256)]
    shifts = [_map_of(lambda value: ~zlib.crc32(b"\0", ~value & 0xFFFFFFFF) & 0xFFFFFFFF)]
    for _ in range(SEGMENT_BYTES_MAX.bit_length() - 1):
        before = shifts[-1]
        shifts.append(_map_of(lambda value, before=before: _image(before, _image(before, value))))  # type: ignore[misc]
    number = _inverse(lambda value: _key_part(value, 0, 0))
    lengths = (_map_of(lambda value: _key_part(0, value, 0)), _map_of(lambda value: _key_part(0, 0, value)))
    return np.array(one_byte, np.uint32), shifts, number, *lengths


def number_of(layout: Layout, check: int, payload_check: int, n_bytes: int, payload_bytes: int) -> int:
    """The number that a segment must have whose frame has that checksum; below 2^32."""
    place = check ^ payload_check ^ segment_key_check(layout.header_check, 0, n_bytes, payload_bytes)
    return _image(_tables()[2], place)


def prefix_checks(data: bytes) -> Words:
    """CRC-32 of the first 0, 1, ... len(data) bytes."""
    one_byte = _tables()[0]
    # About as many rows as columns: all rows go on together, by one byte at a time.
    row_bytes = max(8, 1 << (len(data).bit_length() + 1) // 2)
    rows = [data[at : at + row_bytes] for at in range(0, len(data), row_bytes)]
    starts = itertools.accumulate(rows, lambda check, row: zlib.crc32(row, check), initial=0)
    state = ~np.fromiter(itertools.islice(starts, len(rows)), np.uint32, len(rows))
    padded = np.zeros(len(rows) * row_bytes, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    columns = np.ascontiguousarray(padded.reshape(len(rows), row_bytes).T)
    checks = np.empty((row_bytes, len(rows)), np.uint32)
    for column, out in zip(columns, checks, strict=True):
        state = one_byte[(state ^ column) & 255] ^ state >> 8
        out[:] = state
    return np.concatenate([np.zeros(1, np.uint32), ~checks.T.reshape(-1)[: len(data)]])


class Stretch:
    """The bytes from `start` on, and for each of the first `n_offsets` the number of the frame that would begin there.

    `data` goes on behind the last offset as far as its frame may reach, or ends where frames end.
    """

    def __init__(self, layout: Layout, data: bytes, start: int, n_offsets: int):
        self.start, self.data = start, data
        self.stop = start + min(n_offsets, len(data))
        self._layout = layout
        self._checks = prefix_checks(data)
        # Enough zeros behind the data for what stands before a payload.
        self._padded = np.frombuffer(data + bytes(2 * layout.tag_bytes + 3 + CHECK_BYTES), np.uint8)
        # -1: no frame can begin there.
        self.numbers = np.full(self.stop - start, -1, np.int64)
        for at in range(0, len(self.numbers), _PIECE_OFFSETS):
            piece = self.numbers[at : at + _PIECE_OFFSETS]
            piece[:] = self._numbers(np.arange(at, at + len(piece)))

    def check(self, start: int, n_bytes: int) -> int:
        """CRC-32 of `n_bytes` bytes from the offset `start` of the file."""
        value, at = int(self._checks[start - self.start]), start - self.start
        for bit, shift in enumerate(_tables()[1]):
            if n_bytes >> bit & 1:
                value = _image(shift, value)
        return value ^ int(self._checks[at + n_bytes])

    def _integers(self, at: npt.NDArray[np.int64], n_bytes: int) -> npt.NDArray[np.int64]:
        """Little-endian integers from those places of the data; bytes behind it are zero."""
        values = np.zeros(len(at), np.int64)
        for byte in range(n_bytes):
            values |= self._padded[at + byte].astype(np.int64) << 8 * byte
        return values

    def _numbers(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        layout = self._layout
        tags = self._integers(at, layout.tag_bytes)
        n_bytes = np.full(len(at), layout.segment_bytes)
        payload_at = at + layout.tag_bytes + CHECK_BYTES
        (last,) = np.nonzero(tags == layout.end_tag)
        if len(last):
            n_bytes[last], n_size_bytes = self._sizes(at[last] + layout.tag_bytes)
            second = at[last] + layout.tag_bytes + n_size_bytes
            tags[last] = self._integers(second, layout.tag_bytes)
            payload_at[last] = second + layout.tag_bytes + CHECK_BYTES
        payload_bytes = np.where(tags == 0, n_bytes, tags)
        possible = (n_bytes > 0) & (payload_at + payload_bytes <= len(self.data))
        possible &= (tags == 0) | ((tags + 2 <= n_bytes) & layout.may_code)
        (chosen,) = np.nonzero(possible)
        numbers = np.full(len(at), -1, np.int64)
        numbers[chosen] = self._numbers_of(payload_at[chosen], payload_bytes[chosen], n_bytes[chosen])
        return numbers

    def _sizes(self, at: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sizes of last segments and how many bytes each is written with; 0 where it is no size of one."""
        raw = [self._padded[at + byte].astype(np.int64) for byte in range(3)]
        goes_on = [raw[0] > 127, (raw[0] > 127) & (raw[1] > 127)]
        value = (raw[0] & 127) + np.where(goes_on[0], (raw[1] & 127) << 7, 0) + np.where(goes_on[1], raw[2] << 14, 0)
        n_bytes = 1 + goes_on[0] + goes_on[1]
        # No last byte of zero, and a third byte ends it: sizes are below 2^20.
        final = np.where(goes_on[1], raw[2], np.where(goes_on[0], raw[1], raw[0]))
        wrong = (final > 127) | ((final == 0) & goes_on[0]) | (value >= self._layout.segment_bytes)
        return np.where(wrong, 0, value), n_bytes

    def _numbers_of(
        self, payload_at: npt.NDArray[np.int64], payload_bytes: npt.NDArray[np.int64], n_bytes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        _, shifts, number, size, length = _tables()
        place = self._integers(payload_at - CHECK_BYTES, CHECK_BYTES).astype(np.uint32)
        place ^= np.uint32(segment_key_check(self._layout.header_check, 0, 0, 0))
        place ^= _apply(size, n_bytes.astype(np.uint32)) ^ _apply(length, payload_bytes.astype(np.uint32))
        before = self._checks[payload_at]
        for bit, shift in enumerate(shifts):
            (shifted,) = np.nonzero(payload_bytes >> bit & 1)
            if len(shifted):
                before[shifted] = _apply(shift, before[shifted])
        return _apply(number, place ^ before ^ self._checks[payload_at + payload_bytes]).astype(np.int64)

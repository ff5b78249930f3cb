"""Salvage beside archives that lie in archives, and what searching costs whatever a file holds."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TRAINING_TEXT, TinyModel

from llmcomp import compress
from llmcomp.codec import container
from llmcomp.codec.compress import salvage_stream
from llmcomp.codec.container import ArchiveReader, ArchiveWriter, Header, ModelId
from llmcomp.codec.frame_search import Layout, Stretch, prefix_checks
from llmcomp.codec.salvage import salvage_segments

MODEL = ModelId("m", "", bytes(16), bytes(8), 1, 1, 0, 512, 128, 1024, 0)
SALTS = {1: b"", 2: hashlib.sha256(b"outer").digest()[:16]}
SEGMENT_BYTES = 100
TINY = TinyModel()


def archive(content: bytes, salt: bytes, segment_bytes: int = SEGMENT_BYTES, is_coded: bool = False) -> bytes:
    """Stored, or 'coded' to a hash, which nobody decodes here."""
    file = io.BytesIO()
    writer = ArchiveWriter(file, Header(segment_bytes, MODEL, salt))
    for at in range(0, len(content), segment_bytes):
        part = content[at : at + segment_bytes]
        coded = hashlib.sha256(part).digest()[: 5 + part[0] % 8] if is_coded and len(part) > 40 else None
        writer.add(part, coded)
    writer.finish()
    return file.getvalue()


def frames_of(blob: bytes) -> list[int]:
    """Where the frames of full segments begin, walked over by their tags."""
    reader = ArchiveReader(io.BytesIO(blob))
    at, offsets = reader.position, []
    for segment in reader.segments():
        if segment.n_bytes == reader.header.segment_bytes:
            offsets.append(at)
        at += 6 + len(segment.payload)
    return offsets


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("is_coded", [True, False])
def test_an_archive_inside_an_archive_is_not_salvaged_in_its_place(version, is_coded):
    """Compressed again with the same model: in format 1 both headers are equal, and so are their frames' checksums."""
    inner_salt = hashlib.sha256(b"inner").digest()[:16] if version == 2 else b""
    inner = archive(random.Random(0).randbytes(2000), inner_salt, is_coded=is_coded)
    outer = archive(inner, SALTS[version])
    whole = list(ArchiveReader(io.BytesIO(outer)).segments())
    offsets = frames_of(outer)
    assert len(offsets) >= (3 if is_coded else 20)
    for number, offset in enumerate(offsets):
        # One flipped bit of the tag: the frame is put right, and nothing is lost.
        for bit in range(16):
            bad = bytearray(outer)
            bad[offset + bit // 8] ^= 1 << bit % 8
            assert list(salvage_segments(io.BytesIO(bad))) == whole
        # Anything else that strikes one frame loses that one, and nothing else takes its place.
        damages = [(0, b"\x01\x02"), (0, b"\x09\x09"), (0, b"\x57\x13"), (2, b"\0\0\0\0"), (1, b"\7\7"), (50, b"zz")]
        for at, change in damages:
            bad = bytearray(outer)
            bad[offset + at : offset + at + len(change)] = change
            expected = [segment for segment in whole if segment.number != number]
            found = list(salvage_segments(io.BytesIO(bad)))
            if at == 0 and len(found) == len(whole):
                expected = whole  # a tag of which one bit is wrong, after all
            assert found == expected


@pytest.mark.parametrize("version", [1, 2])
def test_frames_made_to_be_taken_for_others(version):
    """A stored payload full of frames of all numbers, which in format 1 verify: none is ever given out."""
    salt = SALTS[version]
    check = struct.unpack("<I", container.header_bytes(Header(SEGMENT_BYTES, MODEL, salt[::-1]))[-4:])[0]
    frames = b""
    for number in range(12):
        place = zlib.crc32(struct.pack("<IQII", check, number, SEGMENT_BYTES, 1))
        frames += struct.pack("<HI", 1, zlib.crc32(b"!") ^ place) + b"!"
    content = b"".join((frames * 2)[7 * k :][:SEGMENT_BYTES] for k in range(12))
    outer = archive(content, salt)
    whole = list(ArchiveReader(io.BytesIO(outer)).segments())
    rng = random.Random(1)
    for offset in frames_of(outer) * 20:
        bad = bytearray(outer)
        bad[offset : offset + 3] = rng.randbytes(3)
        found = list(salvage_segments(io.BytesIO(bad)))
        assert set(found) <= set(whole) and len(found) >= len(whole) - 1


def test_compressed_again_with_one_model_one_flipped_bit():
    """As a user does it, both versions: nothing but bytes of the original, at their places."""
    for options in ({}, {"salt": b""}):
        noise = random.Random(3).randbytes(1000) + TRAINING_TEXT
        inner = compress(noise, TINY, segment_bytes=64, **options)
        outer = compress(inner, TINY, segment_bytes=64, **options)
        target = io.BytesIO()
        for offset in frames_of(outer):
            for bit in (0, 3, 6, 11):
                bad = bytearray(outer)
                bad[offset + bit // 8] ^= 1 << bit % 8
                target = io.BytesIO()
                summary = salvage_stream(io.BytesIO(bad), target, TINY)
                assert (target.getvalue(), summary.lost) == (inner, [])


# The search.


def slow_numbers(layout: Layout, data: bytes, n_offsets: int) -> list[int]:
    """Every number below 300 tried at every offset, from the words of FORMAT.md."""
    found = []
    for offset in range(n_offsets):
        tb, at, n = layout.tag_bytes, offset + layout.tag_bytes, layout.segment_bytes
        tag = int.from_bytes(data[offset:at], "little")
        if tag == 256**tb - 1 and at < len(data):
            n, shift = 0, 0
            while at < len(data):
                n |= (data[at] & 127) << shift
                at, shift = at + 1, shift + 7
                if data[at - 1] < 128:
                    break
            tag = int.from_bytes(data[at : at + tb], "little")
            at += tb
            n = n if n < layout.segment_bytes else 0
        payload = data[at + 4 :][: tag or n]
        number = -1
        if n and (tag == 0 or (tag + 2 <= n and layout.may_code)) and len(payload) == (tag or n):
            check = int.from_bytes(data[at : at + 4], "little") ^ zlib.crc32(payload)
            for k in range(300):
                if check == zlib.crc32(struct.pack("<IQII", layout.header_check, k, n, len(payload))):
                    number = k
        found.append(number)
    return found


@pytest.mark.parametrize("segment_bytes", [16, 200, 65537])
@pytest.mark.parametrize("may_code", [True, False])
def test_the_search_finds_what_trying_every_number_finds(segment_bytes, may_code):
    rng = random.Random(segment_bytes)
    layout = Layout(segment_bytes, container.tag_bytes(segment_bytes), may_code, 0x12345678)
    data = b""
    for number in (0, 1, 7, 255, 256, 299):
        for n in (segment_bytes, min(15, segment_bytes - 1), segment_bytes - 1):
            payload = rng.randbytes(rng.randint(1, 5))
            if n == segment_bytes > 1000:
                payload = rng.randbytes(1 + rng.randrange(300))
            is_stored = n < 20 and rng.random() < 0.5
            payload = rng.randbytes(n) if is_stored else payload
            size = b""
            if n < segment_bytes:
                size = b"\xff" * layout.tag_bytes
                value = n
                while value > 127:
                    size, value = size + bytes([value % 128 + 128]), value // 128
                size += bytes([value])
            place = zlib.crc32(struct.pack("<IQII", layout.header_check, number, n, len(payload)))
            tag = 0 if is_stored else len(payload)
            data += rng.randbytes(rng.randint(0, 9)) + size + tag.to_bytes(layout.tag_bytes, "little")
            data += struct.pack("<I", zlib.crc32(payload) ^ place) + payload
    n_offsets = min(len(data), 4000)
    found = Stretch(layout, data, 1000, n_offsets).numbers
    expected = slow_numbers(layout, data, n_offsets)
    assert np.where(found < 300, found, -1).tolist() == expected
    assert sum(number >= 0 for number in expected) >= (12 if may_code else 1)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.data())
def test_checks_of_any_part(data, draw):
    assert prefix_checks(data).tolist() == [zlib.crc32(data[:n]) for n in range(len(data) + 1)]
    start = draw.draw(st.integers(0, len(data)))
    n_bytes = draw.draw(st.integers(0, len(data) - start))
    stretch = Stretch(Layout(16, 2, True, 0), data, 77, 5)
    assert stretch.check(77 + start, n_bytes) == zlib.crc32(data[start : start + n_bytes])


def tiles(segment_bytes: int, what: str, n_bytes: int) -> bytes:
    """Damage that is slow to search if anything is."""
    tag_bytes = container.tag_bytes(segment_bytes)
    last = b"\xff" * tag_bytes + b"\x7f" + bytes(tag_bytes)
    tile = {"zeros": b"\0", "ones": b"\xff", "ends": last, "stored": b"\0" * (tag_bytes + 1) + b"\1", "noise": b""}[
        what
    ]
    return (tile * n_bytes)[:n_bytes] if tile else random.Random(0).randbytes(n_bytes)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("segment_bytes", [16, 1 << 16, 1 << 20])
@pytest.mark.parametrize("what", ["zeros", "ones", "ends", "stored", "noise"])
def test_searching_takes_a_bounded_time_and_memory(version, segment_bytes, what):
    """Three seconds and a half for half a megabyte at the very most: it is about one here, and was minutes."""
    content = random.Random(1).randbytes(3 * segment_bytes if segment_bytes > 100 else 2000)
    blob = archive(content, SALTS[version], segment_bytes)
    first = len(container.header_bytes(Header(segment_bytes, MODEL, SALTS[version])))
    whole = list(ArchiveReader(io.BytesIO(blob)).segments())
    bad = blob[:first] + tiles(segment_bytes, what, 1 << 19) + blob[first + 10 :]
    started = time.process_time()
    found = list(salvage_segments(io.BytesIO(bad)))
    assert time.process_time() - started < 3.5
    assert found == [segment for segment in whole if segment.number > 0]


@pytest.mark.parametrize("version", [1, 2])
def test_many_damaged_frames_take_a_bounded_time(version):
    """Segments that may have a megabyte, frames of a dozen bytes, every second one damaged."""
    file = io.BytesIO()
    writer = ArchiveWriter(file, Header(1 << 20, MODEL, SALTS[version]))
    offsets = []
    for number in range(300):
        offsets.append(writer.archive_bytes)
        writer.add(bytes(1 << 20), b"coded" + bytes([number % 251]))
    writer.finish()
    bad = bytearray(file.getvalue())
    for offset in offsets[::2]:
        bad[offset + 8] ^= 1
    started = time.process_time()
    tracemalloc.start()
    found = [segment.number for segment in salvage_segments(io.BytesIO(bad))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == list(range(1, 300, 2))
    assert time.process_time() - started < 5 and peak < 32 << 20

"""The archive's bytes without any model: layout, strictness, random access, salvage, damage of every kind."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcomp.codec import container
from llmcomp.codec.container import ArchiveIndex, ArchiveReader, ArchiveWriter, Header, ModelId
from llmcomp.codec.salvage import salvage_segments
from llmcomp.errors import CorruptArchive, Error

MODEL = ModelId(
    name="pico-595k",
    revision="step2048",
    weights_hash=bytes(range(16)),
    tokenizer_hash=bytes(range(100, 108)),
    arithmetic_version=1,
    engine=1,
    mapping=0,
    context_length=512,
    overlap=128,
    vocab_size=1024,
    bos_token=0,
)


SALT = hashlib.sha256(b"any").digest()[:16]


def make_archive(
    content: bytes, segment_bytes: int = 16, model: ModelId | None = MODEL, coded_every: int = 2, salt: bytes = b""
) -> bytes:
    """Segments in turn stored and 'coded' (here: any bytes that are short enough, since nobody decodes them)."""
    file = io.BytesIO()
    writer = ArchiveWriter(file, Header(segment_bytes, model, salt))
    for number, at in enumerate(range(0, len(content), segment_bytes)):
        part = content[at : at + segment_bytes]
        coded = model is not None and coded_every and number % coded_every == 0 and len(part) > 2
        writer.add(part, hashlib.sha256(part).digest()[: max(1, len(part) // 3)] if coded else None)
    writer.finish()
    return file.getvalue()


def read_all(blob: bytes) -> list[container.Segment]:
    reader = ArchiveReader(io.BytesIO(blob))
    segments = list(reader.segments())
    assert reader.trailer is not None
    return segments


def random_bytes(n: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(n)


SHAPES = [
    (n, segment_bytes, model, every)
    for n in (0, 1, 15, 16, 17, 32, 95)
    for segment_bytes in (16, 40)
    for model, every in ((MODEL, 2), (MODEL, 1), (None, 0))
]


@pytest.mark.parametrize("version", [1, 2])
def test_layout_byte_by_byte(version):
    """The layout of FORMAT.md, written out by hand with struct and zlib only."""
    content = b"0123456789abcdef" + b"xyz"
    file = io.BytesIO()
    writer = ArchiveWriter(file, Header(16, MODEL, SALT if version == 2 else b""))
    writer.add(content[:16], b"CODED")
    writer.add(content[16:])
    writer.finish()
    if version == 1:
        header = b"\x89LMC\x01\x01" + b"\x10" + b"\x01\x01\x00"
    else:
        header = b"\x89LMC\x02\x01" + SALT + b"\x10" + b"\x01\x01\x00" + b"\x00"
    header += b"\x80\x04" + b"\x80\x01" + b"\x80\x08" + b"\x00"
    header += bytes(range(16)) + bytes(range(100, 108)) + b"\x09pico-595k" + b"\x08step2048"
    crc = zlib.crc32(header)
    out = header + struct.pack("<I", crc)
    out += struct.pack("<HI", 5, zlib.crc32(b"CODED") ^ zlib.crc32(struct.pack("<IQII", crc, 0, 16, 5))) + b"CODED"
    out += b"\xff\xff" + b"\x03"
    out += struct.pack("<HI", 0, zlib.crc32(b"xyz") ^ zlib.crc32(struct.pack("<IQII", crc, 1, 3, 3))) + b"xyz"
    tail = struct.pack("<Q", 19) + hashlib.sha256(content).digest()[:16]
    out += tail + struct.pack("<I", zlib.crc32(tail, crc))
    assert file.getvalue() == out
    assert ArchiveReader(io.BytesIO(out)).header == Header(16, MODEL, SALT if version == 2 else b"")


@pytest.mark.parametrize("salt", [b"", SALT], ids=["1", "2"])
@pytest.mark.parametrize(("n", "segment_bytes", "model", "every"), SHAPES)
def test_round_trip_and_random_access(n, segment_bytes, model, every, salt):
    content = random_bytes(n)
    blob = make_archive(content, segment_bytes, model, every, salt)
    segments = read_all(blob)
    assert [segment.number for segment in segments] == list(range(-(-n // segment_bytes)))
    assert sum(segment.n_bytes for segment in segments) == n
    index = ArchiveIndex(io.BytesIO(blob))
    assert index.n_segments == len(segments)
    assert index.trailer == container.Trailer(n, hashlib.sha256(content).digest()[:16])
    for number in random.Random(1).sample(range(len(segments)), len(segments)):
        assert index.segment(number) == segments[number]
    assert list(salvage_segments(io.BytesIO(blob))) == segments
    assert index.n_stored() == sum(segment.stored for segment in segments)
    for pad in (blob, blob[-1:] + blob):
        with pytest.raises(CorruptArchive):
            ArchiveIndex(io.BytesIO(blob + pad)).n_stored()


def test_index_entries_lead_to_their_segments():
    content = random_bytes(16 * (2 * container.SEGMENTS_PER_ENTRY + 3) + 5)
    blob = make_archive(content)
    segments = read_all(blob)
    for number in (0, 255, 256, 257, 511, 512, 514, 515):
        assert ArchiveIndex(io.BytesIO(blob)).segment(number) == segments[number]
    with pytest.raises(Error):
        ArchiveIndex(io.BytesIO(blob)).segment(len(segments))


def forged(n_segments: int, aim: int, at: int, salt: bytes) -> bytes:
    """An archive whose index sends segment 256 into a stored payload, to the frame `aim` made of forged bytes.

    Every checksum is right: whoever writes an archive can compute them.
    """
    file = io.BytesIO()
    writer = ArchiveWriter(file, Header(64, MODEL, salt))
    check = struct.unpack("<I", file.getvalue()[-4:])[0]
    payload = b"forged"
    place = zlib.crc32(struct.pack("<IQII", check, aim, 64, len(payload)))
    frame = struct.pack("<HI", len(payload), zlib.crc32(payload) ^ place) + payload
    offsets = []
    for number in range(n_segments):
        offsets.append(writer.archive_bytes)
        content = random_bytes(64, number)
        writer.add(content[:at] + frame + content[at + len(frame) :] if number == 255 else content)
    trailer = writer.finish()
    target = offsets[255] + 6 + at
    assert file.getvalue()[target : target + len(frame)] == frame
    tail = target.to_bytes(6, "little") + struct.pack("<Q", trailer.content_bytes) + trailer.content_hash
    return file.getvalue()[: -len(tail) - 4] + tail + struct.pack("<I", zlib.crc32(tail, check))


@pytest.mark.parametrize("salt", [b"", SALT], ids=["1", "2"])
@pytest.mark.parametrize(("aim", "at"), [(256, 5), (256, 52), (0, 5)])
def test_an_index_that_points_into_a_stored_payload_is_refused(aim, at, salt):
    """Both ways: in order, and by random access, whichever segment is asked for."""
    for n_segments in (257, 260):
        blob = forged(n_segments, aim, at, salt)
        with pytest.raises(CorruptArchive, match="index"):
            read_all(blob)
        for number in range(250, n_segments):
            with pytest.raises(CorruptArchive, match="index"):
                ArchiveIndex(io.BytesIO(blob)).segment(number)


@pytest.mark.parametrize("size", [0, 15, 16, 17, 31, 33, 47, 48])
def test_a_trailer_that_tells_of_another_size_is_refused_both_ways(size):
    """Of 32 bytes, a whole number of segments, and of 40."""
    for n in (32, 40):
        if size == n:
            continue
        blob = make_archive(random_bytes(n), 16)
        check = struct.unpack("<I", container.header_bytes(Header(16, MODEL))[-4:])[0]
        tail = struct.pack("<Q", size) + blob[-20:-4]
        blob = blob[:-28] + tail + struct.pack("<I", zlib.crc32(tail, check))
        with pytest.raises(CorruptArchive):
            read_all(blob)
        with pytest.raises(CorruptArchive):
            ArchiveIndex(io.BytesIO(blob)).n_stored()
        for number in range(-(-size // 16)):
            with pytest.raises(CorruptArchive):
                ArchiveIndex(io.BytesIO(blob)).segment(number)


def test_sizes_that_are_promised():
    """Header at most 80 bytes and the names; six bytes a segment up to 64 KiB; a stored archive at most 80 bytes."""
    largest = MODEL._replace(context_length=1 << 24, overlap=1 << 23, vocab_size=1 << 21, bos_token=(1 << 21) - 1)
    names = len(MODEL.name) + len(MODEL.revision)
    assert len(container.header_bytes(Header(container.SEGMENT_BYTES_MAX, largest, SALT))) <= 80 + names
    part = random_bytes(1 << 16)
    sizes = []
    for n_segments in (1, 2, 2 + container.SEGMENTS_PER_ENTRY):
        writer = ArchiveWriter(io.BytesIO(), Header(1 << 16, MODEL))
        for _ in range(n_segments):
            writer.add(part, b"12345")
        writer.finish()
        sizes.append(writer.archive_bytes)
    assert sizes[1] - sizes[0] == 5 + 6
    assert sizes[2] - sizes[1] == container.SEGMENTS_PER_ENTRY * (5 + 6) + 6
    for n in (0, 1, 1000, 65535, 65536):
        assert len(make_archive(part[:n], 1 << 16, None, 0, SALT)) - n <= 80


@pytest.mark.parametrize("salt", [b"", SALT], ids=["1", "2"])
@pytest.mark.parametrize(("n", "segment_bytes", "model", "every"), SHAPES)
def test_every_truncation_and_every_flipped_bit(n, segment_bytes, model, every, salt):
    content = random_bytes(n, 7)
    blob = make_archive(content, segment_bytes, model, every, salt)
    damaged = [blob[:k] for k in range(len(blob))]
    damaged += [
        blob[: bit // 8] + bytes([blob[bit // 8] ^ 1 << bit % 8]) + blob[bit // 8 + 1 :] for bit in range(8 * len(blob))
    ]
    for bad in damaged:
        with pytest.raises(CorruptArchive):
            read_all(bad)


@pytest.mark.parametrize("salt", [b"", SALT], ids=["1", "2"])
@pytest.mark.parametrize(("n", "segment_bytes"), [(95, 16), (80, 16), (120, 40), (9, 16)])
def test_salvage_yields_exactly_the_intact_segments(n, segment_bytes, salt):
    """Where each segment's frame lies is worked out here, from the lengths; a flip inside it loses it, and only it.

    A flip in the tag that a frame begins with is put right, for then the frame verifies.
    """
    blob = make_archive(random_bytes(n, 3), segment_bytes, salt=salt)
    whole = read_all(blob)
    first = len(container.header_bytes(Header(segment_bytes, MODEL, salt)))
    spans, at = [], first
    for segment in whole:
        head = 6 if segment.n_bytes == segment_bytes else 2 + 1 + 6
        spans.append((at, at + head + len(segment.payload)))
        at = spans[-1][1]
    for cut in range(first, len(blob)):
        expected = [segment for segment, (_, end) in zip(whole, spans, strict=True) if end <= cut]
        assert list(salvage_segments(io.BytesIO(blob[:cut]))) == expected
    for bit in range(8 * first, 8 * len(blob)):
        bad = bytearray(blob)
        bad[bit // 8] ^= 1 << bit % 8
        expected = [s for s, (start, end) in zip(whole, spans, strict=True) if not start + 2 <= bit // 8 < end]
        assert list(salvage_segments(io.BytesIO(bad))) == expected
    for bit in range(8 * first):
        bad = bytearray(blob)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptArchive):
            list(salvage_segments(io.BytesIO(bad)))


@pytest.mark.parametrize("salt", [b"", SALT], ids=["1", "2"])
def test_salvage_across_lost_stretches(salt):
    blob = make_archive(random_bytes(16 * 40, 5), 16, MODEL, 1, salt)
    whole = read_all(blob)
    first = len(container.header_bytes(Header(16, MODEL, salt)))
    frame = 6 + 5
    for n_lost in (1, 2, 3, 7, 15):
        kept = [segment for segment in whole if not 10 <= segment.number < 10 + n_lost]
        start, end = first + 10 * frame, first + (10 + n_lost) * frame
        for middle in (b"", bytes(end - start), random_bytes(end - start), random_bytes(500)):
            assert list(salvage_segments(io.BytesIO(blob[:start] + middle + blob[end:]))) == kept


def test_parts_of_two_archives_do_not_mix():
    one, two = (make_archive(random_bytes(96, seed), 16, MODEL, 1) for seed in (1, 2))
    other_model = make_archive(random_bytes(96, 1), 16, MODEL._replace(revision="step1024"), 1)
    assert len(one) == len(two) == len(other_model)
    first = len(container.header_bytes(Header(16, MODEL)))
    for cut in range(first, len(one)):
        with pytest.raises(CorruptArchive):
            read_all(other_model[:cut] + one[cut:])
        # Under an equal header the other's segments are intact: the content's hash tells, so the trailer keeps its own.
        reader = ArchiveReader(io.BytesIO(one[:cut] + two[cut:]))
        try:
            list(reader.segments())
        except CorruptArchive:
            continue
        assert reader.trailer is not None
        assert reader.trailer.content_hash == hashlib.sha256(random_bytes(96, 2)).digest()[:16]
    for blob in (one + b"\0", one + one, b"\0" + one):
        with pytest.raises(CorruptArchive):
            read_all(blob)


def reseal(header: bytes) -> bytes:
    return header + struct.pack("<I", zlib.crc32(header))


def hostile_archives() -> list[bytes]:
    """Claims that no bytes back, with right checksums wherever one can be computed."""
    big = b"\xff" * 8 + b"\x7f"
    names = b"\x01m\x00"
    hashes = bytes(24)
    base = b"\x89LMC\x01"
    salted = b"\x89LMC\x02"
    fields = b"\x08\x00\x10\x00" + hashes + names
    bad = [
        reseal(b"\x89LMC\x00\x00\x10"),
        reseal(b"\x89LMC\x03\x00" + SALT + b"\x10"),
        reseal(salted + b"\x00" + b"\x10"),
        *(reseal(salted + bytes([flag]) + SALT + b"\x10\x01\x01\x00\x00" + fields) for flag in (2, 3, 128, 255)),
        *(reseal(salted + b"\x01" + SALT + b"\x10\x01\x01\x00" + bytes([mixing]) + fields) for mixing in (2, 255)),
        base + b"\x01" + big,
        reseal(base + b"\x00" + b"\x80\x80\x80\x01"),
        reseal(base + b"\x00" + b"\x0f"),
        reseal(base + b"\x00" + b"\x90\x00"),
        reseal(base + b"\x02" + b"\x10"),
        reseal(base + b"\x01\x10\x01\x01\x00" + big + b"\x00\x10\x00" + hashes + names),
        reseal(base + b"\x01\x10\x01\x01\x00\x08\x08\x10\x00" + hashes + names),
        reseal(base + b"\x01\x10\x01\x01\x00\x08\x00\x00\x00" + hashes + names),
        reseal(base + b"\x01\x10\x01\x01\x00\x08\x00\x10\x00" + hashes + b"\x02\xff\xfe\x00"),
        reseal(base + b"\x01\x10\x01\x01\x00\x08\x00\x10\x00" + hashes + b"\x03a\nb\x00"),
    ]
    header = container.header_bytes(Header(1 << 20, MODEL))
    crc = struct.unpack("<I", header[-4:])[0]
    for size in (2**63, 2**64 - 1, 2**40, 1 << 20):
        tail = struct.pack("<Q16s", size, bytes(16))
        bad.append(header + b"\xff\xff\xff\x00" + tail + struct.pack("<I", zlib.crc32(tail, crc)))
    bad += [header + tag + bytes(4) for tag in (b"\xfe\xff\xff", b"\x00\x00\x00", b"\xff\xff\xff" + b"\xff" * 9)]
    return bad


@pytest.mark.parametrize("number", range(len(hostile_archives())))
def test_hostile_lengths_are_refused_in_bounded_memory(number):
    blob = hostile_archives()[number]
    tracemalloc.start()
    for read in (read_all, lambda b: ArchiveIndex(io.BytesIO(b)).segment(0)):
        with pytest.raises(CorruptArchive):
            read(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_misuse_of_the_writer():
    writer = ArchiveWriter(io.BytesIO(), Header(16, None))
    writer.add(b"short")
    with pytest.raises(Error):
        writer.add(b"0123456789abcdef")
    for segment_bytes in (0, 15, container.SEGMENT_BYTES_MAX + 1):
        with pytest.raises(Error):
            ArchiveWriter(io.BytesIO(), Header(segment_bytes, None))
    for salt in (b"x", bytes(15), bytes(17)):
        with pytest.raises(Error, match="salt"):
            ArchiveWriter(io.BytesIO(), Header(16, None, salt))
    for name in ("x" * 256, "two\nlines"):
        with pytest.raises(Error):
            ArchiveWriter(io.BytesIO(), Header(16, MODEL._replace(name=name)))


class Trickle(io.RawIOBase):
    """A pipe that gives one to three bytes a call and cannot seek."""

    def __init__(self, data: bytes):
        self._data, self._at, self._rng = data, 0, random.Random(0)

    def readable(self) -> bool:
        return True

    def read(self, n: int = -1) -> bytes:
        n = min(n, self._rng.randint(1, 3)) if n >= 0 else n
        part = self._data[self._at : self._at + n]
        self._at += len(part)
        return part


def test_reading_from_a_pipe():
    blob = make_archive(random_bytes(200))
    assert list(ArchiveReader(Trickle(blob)).segments()) == read_all(blob)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_of_many_bytes(data):
    """Any change at all is found by reading, and reading never yields a changed segment before."""
    content = random_bytes(data.draw(st.integers(0, 100)), data.draw(st.integers(0, 3)))
    blob = make_archive(content, 16)
    whole = read_all(blob)
    bad = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 4))):
        at, n_bytes = data.draw(st.integers(0, len(bad))), data.draw(st.integers(0, 12))
        bad[at : at + n_bytes] = data.draw(st.binary(max_size=12))
    if bytes(bad) == blob:
        return
    seen = []
    with pytest.raises(CorruptArchive):
        for segment in ArchiveReader(io.BytesIO(bad)).segments():
            seen.append(segment)
    assert seen == whole[: len(seen)]

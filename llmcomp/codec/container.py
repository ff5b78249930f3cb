"""The archive's bytes: header, segments, index, trailer and their checksums. FORMAT.md, "The archive", is the contract.

No model, no token and no arithmetic coding lives here: a segment is a number, a length and an opaque payload.
Nothing in a file is ever executed or opened as a path, and no length in a file is believed before bytes back it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from llmcomp.errors import CorruptArchive, Error

MAGIC = b"\x89LMC"
# Format 1 is read and, with a header that has no salt, written: it has neither mixing nor payloads of stock codecs.
FORMAT_VERSIONS = (1, 2)
SALT_BYTES = 16
SEGMENT_BYTES_MIN = 16
SEGMENT_BYTES_MAX = 1 << 20
SEGMENT_BYTES_DEFAULT = 1 << 16
# One index entry for so many segments. A reader walks at most that many six-byte frames from an entry.
SEGMENTS_PER_ENTRY = 256
CONTENT_HASH_BYTES = 16
WEIGHTS_HASH_BYTES = 16
TOKENIZER_HASH_BYTES = 8
NAME_BYTES_MAX = 255

# Versions of mixing that format 2 may name; 0 is none.
MIXING_VERSIONS = (0, 1)
_HAS_MODEL = 1
_FIELD_MAX = (1 << 28) - 1
_ENTRY_BYTES = 6
_CHECK = struct.Struct("<I")
_TRAILER = struct.Struct(f"<Q{CONTENT_HASH_BYTES}sI")
_SEGMENT_KEY = struct.Struct("<IQII")


class ModelId(NamedTuple):
    """What the header says of the model and of how its output was used; equality is what decoding needs.

    `mixing`: the version of what is learnt from the segment itself and mixed in, 0 for nothing, as in all of format 1.
    """

    name: str
    revision: str
    weights_hash: bytes
    tokenizer_hash: bytes
    arithmetic_version: int
    engine: int
    mapping: int
    context_length: int
    overlap: int
    vocab_size: int
    bos_token: int
    mixing: int = 0


@dataclass(frozen=True)
class Header:
    """`model` is None in an archive whose segments all decode without one: stored, or in format 2 by a stock codec.

    `salt`: what tells this archive from any other with the same model, so that no frame of one is a frame of the
    other; 16 bytes, or none in an archive of format 1.
    """

    segment_bytes: int
    model: ModelId | None
    salt: bytes = b""


class Segment(NamedTuple):
    """`payload` is the `n_bytes` original bytes where `stored`, else the coded bytes, at least two fewer."""

    number: int
    n_bytes: int
    stored: bool
    payload: bytes


class Trailer(NamedTuple):
    """`content_bytes` is the size of the original, `content_hash` the first 16 bytes of its SHA-256."""

    content_bytes: int
    content_hash: bytes


def content_hasher() -> hashlib._Hash:
    """A hash object for the original bytes; `.digest()[:CONTENT_HASH_BYTES]` goes into the trailer.

    SHA-256, because it is in every standard library and `sha256sum` of the restored file begins with the same digits;
    its 1.5 GB/s are far above any model's speed.
    """
    return hashlib.sha256()


# Integers and checksums.


def _varint(value: int) -> bytes:
    if not 0 <= value <= _FIELD_MAX:
        raise Error(f"archive field: {value} is outside 0 .. {_FIELD_MAX}")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag_bytes(segment_bytes: int) -> int:
    """How many bytes the tag of a segment has."""
    return 2 if segment_bytes <= 1 << 16 else 3


def _check(header_check: int, number: int, n_bytes: int, payload: bytes) -> int:
    """CRC-32 of the payload xor CRC-32 of where it belongs, so that salvage can search for one before the other.

    A CRC finds every burst of up to 32 bits, thus every single flipped bit, not only with high probability.
    """
    return zlib.crc32(payload) ^ segment_key_check(header_check, number, n_bytes, len(payload))


def segment_key_check(header_check: int, number: int, n_bytes: int, payload_bytes: int) -> int:
    """The part of a segment's checksum that says where it belongs."""
    return zlib.crc32(_SEGMENT_KEY.pack(header_check, number, n_bytes, payload_bytes))


def _stored_is_no_longer(n_bytes: int, coded_bytes: int) -> bool:
    """A coded payload must save two bytes: so the tag of all ones is free to mark the end, and 0 to mean stored."""
    return coded_bytes + 2 > n_bytes


class _Source:
    """Reads exactly what is asked for, says where the file ended if it cannot, and keeps a running position."""

    def __init__(self, file: BinaryIO, position: int = 0):
        self.file = file
        self.position = position

    def take(self, n_bytes: int, what: str) -> bytes:
        parts = []
        missing = n_bytes
        while missing:
            part = self.file.read(missing)
            if not part:
                found = n_bytes - missing
                raise CorruptArchive(f"the archive ends inside {what}: {found} of {n_bytes} bytes at {self.position}")
            parts.append(part)
            missing -= len(part)
        self.position += n_bytes
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def varint(self, what: str, largest: int = _FIELD_MAX) -> tuple[int, bytes]:
        """A canonical LEB128 integer and its bytes."""
        raw = b""
        value = 0
        while True:
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << (7 * len(raw))
            raw += bytes([byte])
            if value > largest:
                raise CorruptArchive(f"{what} in the archive is {value} or more; at most {largest} is possible")
            if byte < 0x80:
                if byte == 0 and len(raw) > 1:
                    raise CorruptArchive(f"{what} in the archive is written with more bytes than it needs")
                return value, raw


# Header.


def header_bytes(header: Header) -> bytes:
    """The header as it stands in the file, its checksum included; Error where a field does not fit."""
    _check_segment_bytes(header.segment_bytes)
    if len(header.salt) not in (0, SALT_BYTES):
        raise Error(f"a salt of {len(header.salt)} bytes: expected {SALT_BYTES}, or none for format 1")
    version = 2 if header.salt else 1
    out = MAGIC + bytes([version, 0 if header.model is None else 1]) + header.salt + _varint(header.segment_bytes)
    if header.model is not None:
        out += _model_bytes(header.model, version)
    return out + _CHECK.pack(zlib.crc32(out))


def _check_segment_bytes(segment_bytes: int) -> None:
    if not SEGMENT_BYTES_MIN <= segment_bytes <= SEGMENT_BYTES_MAX:
        raise Error(f"segment_bytes={segment_bytes}: expected {SEGMENT_BYTES_MIN} .. {SEGMENT_BYTES_MAX}")


def _model_bytes(model: ModelId, version: int) -> bytes:
    if len(model.weights_hash) != WEIGHTS_HASH_BYTES or len(model.tokenizer_hash) != TOKENIZER_HASH_BYTES:
        raise Error("archive header: a hash has the wrong length")
    if model.mixing not in MIXING_VERSIONS[: version if version < 2 else None]:
        raise Error(f"mixing version {model.mixing} in an archive of format {version}")
    out = bytes([model.arithmetic_version, model.engine, model.mapping])
    out += bytes([model.mixing]) if version > 1 else b""
    for value in (model.context_length, model.overlap, model.vocab_size, model.bos_token):
        out += _varint(value)
    out += model.weights_hash + model.tokenizer_hash
    for text in (model.name, model.revision):
        raw = text.encode("utf-8")
        if len(raw) > NAME_BYTES_MAX or not text.isprintable():
            raise Error(f"model name or revision {text!r}: expected printable text of at most {NAME_BYTES_MAX} bytes")
        out += bytes([len(raw)]) + raw
    return out


def _read_header(source: _Source) -> tuple[Header, int]:
    """The header and its CRC-32, which also ties the segments to it."""
    raw = source.take(len(MAGIC), "its first bytes")
    if raw != MAGIC:
        raise CorruptArchive(f"not an llmcomp archive: it begins with {raw.hex()}, expected {MAGIC.hex()}")
    raw += source.take(2, "the header")
    version, flags = raw[4], raw[5]
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise CorruptArchive(f"the archive has format version {version}; this llmcomp reads {known}")
    # Before anything else is read: what an unknown flag adds to the header cannot be skipped.
    if flags & ~_HAS_MODEL:
        raise CorruptArchive(f"the archive's header has flags {flags:#04x}, of which this llmcomp knows 0x01")
    salt = source.take(SALT_BYTES, "the header's salt") if version > 1 else b""
    segment_bytes, more = source.varint("the segment size", SEGMENT_BYTES_MAX)
    raw += salt + more
    fields: dict[str, int | bytes] = {}
    if flags & _HAS_MODEL:
        raw, fields = _read_model(source, raw)
    check = _CHECK.unpack(source.take(_CHECK.size, "the header's checksum"))[0]
    if check != zlib.crc32(raw):
        raise CorruptArchive("the archive's header is damaged: its checksum does not match")
    if segment_bytes < SEGMENT_BYTES_MIN:
        raise CorruptArchive(
            f"the archive's header has segments of {segment_bytes} bytes; at least {SEGMENT_BYTES_MIN}"
        )
    return Header(segment_bytes, _checked_model(fields) if fields else None, salt), check


def _read_model(source: _Source, raw: bytes) -> tuple[bytes, dict]:
    fixed = source.take(3, "the header")
    mixing = source.take(1, "the header") if raw[4] > 1 else b""
    if mixing and mixing[0] not in MIXING_VERSIONS:
        raise CorruptArchive(f"the archive needs version {mixing[0]} of mixing; this llmcomp knows {MIXING_VERSIONS}")
    raw += fixed + mixing
    fields: dict = dict(zip(("arithmetic_version", "engine", "mapping", "mixing"), fixed + mixing, strict=False))
    for name in ("context_length", "overlap", "vocab_size", "bos_token"):
        fields[name], more = source.varint(f"the header's {name}")
        raw += more
    hashes = source.take(WEIGHTS_HASH_BYTES + TOKENIZER_HASH_BYTES, "the header")
    raw += hashes
    fields["weights_hash"], fields["tokenizer_hash"] = hashes[:WEIGHTS_HASH_BYTES], hashes[WEIGHTS_HASH_BYTES:]
    for name in ("name", "revision"):
        length = source.take(1, "the header")
        fields[name] = source.take(length[0], f"the model's {name}") if length[0] else b""
        raw += length + fields[name]
    return raw, fields


def _checked_model(fields: dict) -> ModelId:
    """The model of a header whose checksum is right: what is wrong here was written wrong, or by a newer program."""
    try:
        name, revision = (fields[key].decode("utf-8") for key in ("name", "revision"))
    except UnicodeDecodeError:
        raise CorruptArchive("the archive's header has a model name that is not UTF-8") from None
    model = ModelId(**{**fields, "name": name, "revision": revision})
    if not (name.isprintable() and revision.isprintable()):
        raise CorruptArchive("the archive's header has a model name with control characters")
    if not (model.overlap < model.context_length and model.vocab_size > 0):
        raise CorruptArchive(
            f"the archive's header has a context of {model.context_length} with an overlap of {model.overlap} "
            f"and {model.vocab_size} symbols: impossible"
        )
    return model


# Writing.


class ArchiveWriter:
    """Writes an archive from front to back into any file with `write`; the size need not be known before.

    Every segment but the last holds exactly `header.segment_bytes` original bytes. `finish` must be called.
    """

    def __init__(self, file: BinaryIO, header: Header):
        self._file = file
        self._header = header
        self._hasher = content_hasher()
        raw = header_bytes(header)
        self._header_check = _CHECK.unpack(raw[-_CHECK.size :])[0]
        self._tag_bytes = tag_bytes(header.segment_bytes)
        self._entries: list[int] = []
        self.n_segments = 0
        self.content_bytes = 0
        self.archive_bytes = 0
        self._short: tuple[bytes, bytes | None] | None = None
        self._put(raw)

    def _put(self, raw: bytes) -> None:
        self._file.write(raw)
        self.archive_bytes += len(raw)

    def add(self, content: bytes, coded: bytes | None = None) -> bool:
        """Appends a segment: its original bytes, and its payload unless it is to be stored. Returns: is it coded?

        A payload that saves less than two bytes is dropped in favour of the original bytes.
        """
        segment_bytes = self._header.segment_bytes
        if coded == b"":
            raise Error("a coded segment has no bytes, which would mean stored")
        if self._short is not None or not 0 < len(content) <= segment_bytes:
            raise Error(f"a segment of {len(content)} bytes: only the last may be shorter than {segment_bytes}")
        self._hasher.update(content)
        self.content_bytes += len(content)
        if coded is not None and _stored_is_no_longer(len(content), len(coded)):
            coded = None
        if len(content) < segment_bytes:
            self._short = (content, coded)
            return coded is not None
        if self.n_segments and self.n_segments % SEGMENTS_PER_ENTRY == 0:
            self._entries.append(self.archive_bytes)
        self._frame(content, coded)
        return coded is not None

    def _frame(self, content: bytes, coded: bytes | None) -> None:
        payload = content if coded is None else coded
        check = _check(self._header_check, self.n_segments, len(content), payload)
        tag = 0 if coded is None else len(payload)
        self._put(tag.to_bytes(self._tag_bytes, "little") + _CHECK.pack(check) + payload)
        self.n_segments += 1

    def finish(self) -> Trailer:
        """Writes the end mark, the short last segment if there is one, the index and the trailer."""
        content, coded = self._short or (b"", None)
        mark_at = self.archive_bytes
        self._put(b"\xff" * self._tag_bytes + _varint(len(content)))
        if content:
            if self.n_segments and self.n_segments % SEGMENTS_PER_ENTRY == 0:
                self._entries.append(mark_at)
            self._frame(content, coded)
        digest = self._hasher.digest()[:CONTENT_HASH_BYTES]
        self._put(_tail_bytes(self._header_check, self._entries, self.content_bytes, digest))
        return Trailer(self.content_bytes, digest)


def _tail_bytes(header_check: int, entries: list[int], content_bytes: int, content_hash: bytes) -> bytes:
    """Index and trailer; their CRC-32 starts from the header's."""
    index = b"".join(entry.to_bytes(_ENTRY_BYTES, "little") for entry in entries)
    body = index + _TRAILER.pack(content_bytes, content_hash, 0)[: -_CHECK.size]
    return body + _CHECK.pack(zlib.crc32(body, header_check))


# Reading.


class _Frames:
    """Parses frames at the source's position; knows the header."""

    def __init__(self, source: _Source, header: Header, header_check: int):
        self.source = source
        self.header = header
        self.header_check = header_check
        self.tag_bytes = tag_bytes(header.segment_bytes)
        self.end_tag = (1 << 8 * self.tag_bytes) - 1

    def tag(self) -> int:
        return int.from_bytes(self.source.take(self.tag_bytes, "a segment"), "little")

    def payload_bytes(self, number: int, n_bytes: int, tag: int) -> int:
        if tag == 0:
            return n_bytes
        if _stored_is_no_longer(n_bytes, tag):
            raise CorruptArchive(f"segment {number} claims {tag} coded bytes for {n_bytes} original bytes")
        if self.header.model is None and not self.header.salt:
            raise CorruptArchive(f"segment {number} is coded, but the header names no model")
        return tag

    def body(self, number: int, n_bytes: int, tag: int) -> Segment:
        length = self.payload_bytes(number, n_bytes, tag)
        check = _CHECK.unpack(self.source.take(_CHECK.size, f"segment {number}"))[0]
        payload = self.source.take(length, f"segment {number}")
        if check != _check(self.header_check, number, n_bytes, payload):
            raise CorruptArchive(f"segment {number} is damaged: its checksum does not match")
        return Segment(number, n_bytes, tag == 0, payload)

    def last(self, number: int) -> Segment | None:
        """The short last segment after the end mark, or None where the content is a whole number of segments."""
        n_bytes, _ = self.source.varint("the last segment's size", self.header.segment_bytes - 1)
        return self.body(number, n_bytes, self.tag()) if n_bytes else None


class ArchiveReader:
    """Reads an archive from front to back from any file with `read`, in memory bounded by one segment.

    `header` is there at once; `segments()` yields every segment checked, in order, and then sets `trailer`. The
    caller compares `trailer.content_hash` with the hash of what it decoded. Raises CorruptArchive.
    """

    def __init__(self, file: BinaryIO):
        self._source = _Source(file)
        self.header, self.header_check = _read_header(self._source)
        self._frames = _Frames(self._source, self.header, self.header_check)
        self.trailer: Trailer | None = None

    @property
    def position(self) -> int:
        """How many bytes of the archive were read."""
        return self._source.position

    def segments(self) -> Iterator[Segment]:
        entries: list[int] = []
        number = content_bytes = 0
        while True:
            at = self._source.position
            tag = self._frames.tag()
            ended = tag == self._frames.end_tag
            segment = self._frames.last(number) if ended else self._frames.body(number, self.header.segment_bytes, tag)
            if segment is not None:
                if number and number % SEGMENTS_PER_ENTRY == 0:
                    entries.append(at)
                number += 1
                content_bytes += segment.n_bytes
                yield segment
            if ended:
                break
        self._read_tail(entries, content_bytes)

    def _read_tail(self, entries: list[int], content_bytes: int) -> None:
        raw = self._source.take(_ENTRY_BYTES * len(entries) + _TRAILER.size, "the index and trailer")
        digest = raw[-_CHECK.size - CONTENT_HASH_BYTES : -_CHECK.size]
        if raw != _tail_bytes(self.header_check, entries, content_bytes, digest):
            raise CorruptArchive("the archive's index or trailer is damaged or belongs to another archive")
        if self._source.file.read(1):
            raise CorruptArchive(f"bytes follow the end of the archive at {self._source.position}")
        self.trailer = Trailer(content_bytes, digest)


class ArchiveIndex:
    """Random access to the segments of a seekable file, by its trailer and index.

    The first call that needs a segment walks over all frames once, without their payloads, and makes sure that the
    index, the end mark and the trailer name the same segments as reading in order finds.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        file.seek(0)
        source = _Source(file)
        self.header, self._header_check = _read_header(source)
        self._first = source.position
        self._archive_bytes = file.seek(0, 2)
        self.trailer, self.tail_at = _read_trailer(file, self.header, self._header_check, self._archive_bytes)
        full, self.last_bytes = divmod(self.trailer.content_bytes, self.header.segment_bytes)
        self.n_segments = full + (self.last_bytes > 0)
        # Where every 256th segment begins, once that was checked; and the segment that was asked for last.
        self._marks: list[int] = []
        self._recent = (0, self._first)
        self._n_stored = 0

    def segment(self, number: int) -> Segment:
        """The segment of that number (0 .. n_segments - 1), checked."""
        if not 0 <= number < self.n_segments:
            raise Error(f"segment {number}: the archive has {self.n_segments}")
        self._check_frames()
        nearest = number - number % SEGMENTS_PER_ENTRY
        start, at = nearest, self._marks[nearest // SEGMENTS_PER_ENTRY]
        if nearest <= self._recent[0] <= number:
            start, at = self._recent
        source = _Source(self._file, at)
        frames = _Frames(source, self.header, self._header_check)
        for passed in range(start, number):
            self._pass_frame(frames, passed)
        self._recent = (number, source.position)
        self._seek(source)
        tag, n_bytes = frames.tag(), self.header.segment_bytes
        segment = frames.last(number) if tag == frames.end_tag else frames.body(number, n_bytes, tag)
        if segment is None:
            raise CorruptArchive(f"segment {number} is gone: the archive was changed while it was read")
        return segment

    def n_stored(self) -> int:
        """How many segments are not coded."""
        self._check_frames()
        return self._n_stored

    def _check_frames(self) -> None:
        if self._marks:
            return
        source = _Source(self._file, self._first)
        frames = _Frames(source, self.header, self._header_check)
        marks, n_stored = [self._first], 0
        for number in range(self.n_segments):
            if number and number % SEGMENTS_PER_ENTRY == 0:
                marks.append(source.position)
            n_stored += self._pass_frame(frames, number) == 0
        if not self.last_bytes:
            self._seek(source)
            if frames.tag() != frames.end_tag or source.varint("the last segment's size")[0]:
                raise CorruptArchive(
                    f"the archive does not end behind segment {self.n_segments - 1}, as its trailer has it"
                )
        if source.position != self.tail_at:
            raise CorruptArchive(f"the segments end at {source.position}, the index begins at {self.tail_at}")
        self._file.seek(self.tail_at)
        entries = b"".join(mark.to_bytes(_ENTRY_BYTES, "little") for mark in marks[1:])
        if _Source(self._file, self.tail_at).take(len(entries), "the index") != entries:
            raise CorruptArchive("the archive's index points to places where no segment begins")
        self._marks, self._n_stored = marks, n_stored

    def _pass_frame(self, frames: _Frames, number: int) -> int:
        """Passes over a frame; returns its tag. What it is must be what the trailer says."""
        source = frames.source
        self._seek(source)
        n_bytes, tag = self.header.segment_bytes, frames.tag()
        is_last = number == self.n_segments - 1 and self.last_bytes > 0
        if is_last != (tag == frames.end_tag):
            raise CorruptArchive(f"segment {number} and the trailer disagree on where the archive ends")
        if is_last:
            n_bytes, _ = source.varint("the last segment's size", self.header.segment_bytes - 1)
            tag = frames.tag()
        if is_last and n_bytes != self.last_bytes:
            raise CorruptArchive(f"segment {number} has {n_bytes} bytes, the trailer says {self.last_bytes}")
        source.position += _CHECK.size + frames.payload_bytes(number, n_bytes, tag)
        return tag

    def _seek(self, source: _Source) -> None:
        if source.position >= self.tail_at:
            raise CorruptArchive(f"a segment claims to begin at {source.position}, behind the last one")
        self._file.seek(source.position)


def _read_trailer(file: BinaryIO, header: Header, header_check: int, archive_bytes: int) -> tuple[Trailer, int]:
    """The trailer and where the index begins; checked, but not against the segments."""
    source = _Source(file, max(archive_bytes - _TRAILER.size, 0))
    file.seek(source.position)
    content_bytes, content_hash, _ = _TRAILER.unpack(source.take(_TRAILER.size, "the trailer"))
    n_segments = -(-content_bytes // header.segment_bytes)
    n_entries = max(n_segments - 1, 0) // SEGMENTS_PER_ENTRY
    tail_at = archive_bytes - _TRAILER.size - n_entries * _ENTRY_BYTES
    if tail_at < n_segments * (tag_bytes(header.segment_bytes) + _CHECK.size + 1):
        raise CorruptArchive(f"the trailer claims {content_bytes} original bytes, too many for {archive_bytes}")
    source = _Source(file, tail_at)
    file.seek(tail_at)
    check = header_check
    for at in range(tail_at, archive_bytes - _CHECK.size, SEGMENT_BYTES_MAX):
        part = source.take(min(SEGMENT_BYTES_MAX, archive_bytes - _CHECK.size - at), "the index")
        check = zlib.crc32(part, check)
    if check != _CHECK.unpack(source.take(_CHECK.size, "the trailer"))[0]:
        raise CorruptArchive("the archive's index or trailer is damaged: its checksum does not match")
    return Trailer(content_bytes, content_hash), tail_at

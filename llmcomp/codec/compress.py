"""compress and decompress: bytes in, an archive out, and back, in memory or through streams.

Segments and their payloads are segments.py's, an archive's bytes container.py's, files with names files.py's.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from llmcomp.codec import container, stock_codecs
from llmcomp.codec.container import ArchiveReader, ArchiveWriter, Header, Segment
from llmcomp.codec.salvage import salvage_segments
from llmcomp.codec.segments import MAPPING_DEFAULT, SegmentCodec, archive_context
from llmcomp.errors import CorruptArchive, Error
from llmcomp.models.load import load_model

_READ_BYTES = 1 << 20
# What segments that are decoded side by side may have in any case: a token of theirs takes four bytes.
DECODED_BYTES_MIN = 1 << 24
# What they may have at the most where rows are mixed: what a stream has learnt takes up to 80 bytes a byte of its own.
_MIXED_BYTES_MAX = 1 << 22
# A large segment whose byte values are about equally frequent (random, encrypted or compressed already) is tried on
# samples first: a model needs minutes for a megabyte, and to find out that nothing shrinks a thirtieth is enough.
_PROBED_SEGMENT_BYTES_MIN = 1 << 14
_PROBE_PIECES, _PROBE_PIECE_BYTES = 4, 512
# Zeros and the like: where a stock codec leaves less than one byte in so many, the model's time buys next to nothing.
_LEFT_ENOUGH = 256
Item = TypeVar("Item")
OnBytes = Callable[[int], Any]


class StreamSummary(NamedTuple):
    """What went through `compress_stream` or `decompress_stream`; `n_stored` segments are not coded."""

    content_bytes: int
    archive_bytes: int
    n_segments: int
    n_stored: int


class SalvageSummary(NamedTuple):
    """`lost`: the (start, stop) of the original that could not be read; stop None where its size is not known."""

    content_bytes: int
    n_segments: int
    lost: list[tuple[int, int | None]]


def compress(
    data: bytes,
    model: Any,
    *,
    mapping: str = MAPPING_DEFAULT,
    overlap: int | None = None,
    segment_bytes: int = container.SEGMENT_BYTES_DEFAULT,
    device: str | None = None,
    salt: bytes | None = None,
    mix: bool | None = None,
    stock: bool | None = None,
) -> bytes:
    """The archive of `data`, any bytes, coded with `model`: a name, or an object with logits() and session().

    `mapping`: how bytes become tokens (`MAPPINGS`). `overlap`: how many tokens of the window before a window sees as
    context, default a share of the window: a sixteenth where rows are mixed, else a quarter. A window is the model's
    context, or half of it where rows of a small model (below 2^21 weights) are mixed and `overlap` is left out.
    `segment_bytes`: what one segment holds; segments are decoded side by side or alone. `device`: as in `load_model`,
    for a model that is given by its name. `salt`: 16 bytes that tell this archive from any other, default a hash of
    `data`; b"" writes format 1, which has none and which versions before 0.2 read. `mix`: whether the model is mixed
    with what each segment teaches on the way; default: where that makes the segment smaller, but never in format 1.
    `stock`: whether a segment that deflate or LZMA make smaller than the model is coded so; default yes, but not in
    format 1. The same arguments give the same archive whatever the backend, the number of threads and, of the exact
    engine, the device; with stock codecs it takes the same versions of zlib and liblzma, too.

    Raises:
        Error: data that are no bytes, an option out of range, or a model that gives NaN.
    """
    _check_bytes("data", data)
    target = io.BytesIO()
    options: dict[str, Any] = {"mapping": mapping, "overlap": overlap, "segment_bytes": segment_bytes, "device": device}
    options |= {"mix": mix, "stock": stock}
    options["salt"] = salt_of([data]) if salt is None else salt
    compress_stream(io.BytesIO(data), target, model, **options)
    return target.getvalue()


def decompress(blob: bytes, model: Any = None, *, device: str | None = None, download: bool = False) -> bytes:
    """The bytes that `compress` was given. `model` None: the one that the archive names, if it is one of the registry.
    A model that is given by its name is loaded with the engine that the archive was made with.

    `device`: where the model is loaded, as in `load_model`. `download`: whether the model that the archive names may be
    downloaded; without it that model is loaded if it is bundled or in the cache, and nothing is requested.

    Raises:
        CorruptArchive: the archive is damaged or not one.
        Error: the model that the archive names is in no registry, or would have to be downloaded.
        ModelMismatch: `model` is not what the archive was coded with, and what was.
    """
    _check_bytes("an archive", blob)
    target = io.BytesIO()
    decompress_stream(io.BytesIO(blob), target, model, device=device, download=download)
    return target.getvalue()


def _check_bytes(what: str, value: Any) -> None:
    if isinstance(value, str):
        raise Error(
            f"{what} is a str, expected bytes: text.encode() gives those of a text, Path(name).read_bytes() a file's"
        )
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise Error(f"{what} is a {type(value).__name__}, expected bytes")


def compress_stream(
    source: BinaryIO,
    target: BinaryIO,
    model: Any,
    *,
    mapping: str = MAPPING_DEFAULT,
    overlap: int | None = None,
    segment_bytes: int = container.SEGMENT_BYTES_DEFAULT,
    lanes: int | None = None,
    device: str | None = None,
    salt: bytes | None = None,
    mix: bool | None = None,
    stock: bool | None = None,
    on_bytes: OnBytes | None = None,
    on_ahead: OnBytes | None = None,
) -> StreamSummary:
    """Reads `source` to its end and writes the archive to `target`; neither need be seekable.

    Memory does not depend on the size: `lanes` segments (default: the codec's, large ones fewer) with their tokens,
    and one batch of the model. `salt` is as for `compress`, but random unless it is given: the content is not known
    when the archive begins. `on_bytes` is called with every number of original bytes that was coded,
    `on_ahead` with about how many more the model is done with.
    """
    compressor = StreamCompressor(
        target,
        model,
        mapping=mapping,
        overlap=overlap,
        segment_bytes=segment_bytes,
        lanes=lanes,
        device=device,
        salt=salt,
        mix=mix,
        stock=stock,
        on_bytes=on_bytes,
        on_ahead=on_ahead,
    )
    while part := source.read(_READ_BYTES):
        compressor.write(part)
    return compressor.finish()


def salt_of(parts: Iterable[bytes]) -> bytes:
    """The salt of an archive whose content is known before it begins: the same content, the same archive.

    An archive that lies inside another has other content, hence another salt.
    """
    hasher = hashlib.sha256(b"the salt of an llmcomp archive\n")
    for part in parts:
        hasher.update(part)
    return hasher.digest()[: container.SALT_BYTES]


class StreamCompressor:
    """Takes bytes as they come and writes their archive to `target`. Arguments as for `compress_stream`.

    The archive is not whole before `finish` returns. Bytes are coded when more than `lanes` segments have gathered. A
    large segment with a flat histogram whose samples do not shrink is stored without being tried as a whole.
    """

    def __init__(
        self,
        target: BinaryIO,
        model: Any,
        *,
        mapping: str = MAPPING_DEFAULT,
        overlap: int | None = None,
        segment_bytes: int = container.SEGMENT_BYTES_DEFAULT,
        lanes: int | None = None,
        device: str | None = None,
        salt: bytes | None = None,
        mix: bool | None = None,
        stock: bool | None = None,
        on_bytes: OnBytes | None = None,
        on_ahead: OnBytes | None = None,
    ):
        salt = os.urandom(container.SALT_BYTES) if salt is None else salt
        mixing = container.MIXING_VERSIONS[-1] if (mix is None and salt) or mix else 0
        self._may_mix_less = mix is None
        self._has_stock = bool(salt) if stock is None else stock
        if self._has_stock and not salt:
            raise Error("an archive of format 1 has no stock codecs: leave `stock` out, or give a salt")
        model = load_model(model, device=device)
        context_length = archive_context(model, mixing) if overlap is None else None
        self._codec = SegmentCodec(model, mapping, overlap, context_length, mixing=mixing)
        self._header = Header(segment_bytes, self._codec.identity, salt)
        container.header_bytes(self._header)
        self._batch_bytes = segment_bytes * lanes_of(self._codec, lanes, segment_bytes)
        self._target = target
        self._on_bytes, self._on_ahead = on_bytes, on_ahead
        self._pending = bytearray()
        self._writer: ArchiveWriter | None = None
        self._n_stored = 0

    def write(self, data: bytes) -> int:
        """Takes all of `data`; returns its length."""
        for at in range(0, len(data), _READ_BYTES):
            self._pending += data[at : at + _READ_BYTES]
            # More than a batch, so that something is left for `finish`: it alone knows what the last segment is.
            while len(self._pending) > self._batch_bytes:
                self._code(self._batch_bytes)
        return len(data)

    def finish(self) -> StreamSummary:
        """Codes what is left and writes the end of the archive."""
        if self._writer is None and len(self._pending) <= self._header.segment_bytes:
            archive, summary = self._smallest_archive(bytes(self._pending))
            self._target.write(archive)
            self._count(summary.content_bytes)
            return summary
        self._code(len(self._pending))
        assert self._writer is not None
        self._writer.finish()
        return StreamSummary(
            self._writer.content_bytes, self._writer.archive_bytes, self._writer.n_segments, self._n_stored
        )

    def _code(self, n_bytes: int) -> None:
        if self._writer is None:
            self._writer = ArchiveWriter(self._target, self._header)
        step = self._header.segment_bytes
        contents = [bytes(self._pending[at : min(at + step, n_bytes)]) for at in range(0, n_bytes, step)]
        del self._pending[:n_bytes]
        n_bytes = sum(map(len, contents))
        stock = [self._stock_payload(content) for content in contents]
        worth = self._worth_coding(contents, stock)
        to_code = [content for content, is_worth in zip(contents, worth, strict=True) if is_worth]
        coded = iter(self._payloads(to_code, n_bytes))
        for content, is_worth, stock_payload in zip(contents, worth, stock, strict=True):
            payload = _shorter(stock_payload, next(coded) if is_worth else None)
            self._n_stored += not self._writer.add(content, payload)
            self._count(len(content))

    def _payloads(self, contents: list[bytes], n_bytes: int) -> list[bytes]:
        """Those of the model, of segments among `n_bytes` that are on their way."""
        if self._may_mix_less:
            return self._codec.shortest_payloads(contents, self._on_share(n_bytes))
        return [coded.payload for coded in self._codec.encode(contents, self._on_share(n_bytes))]

    def _stock_payload(self, content: bytes) -> bytes | None:
        """None for none, and for one that a reader would take for a model's."""
        payload = stock_codecs.encode(content) if self._has_stock else b""
        return payload if stock_codecs.is_marked(payload, self._codec.side_bytes(len(content))) else None

    def _worth_coding(self, contents: list[bytes], stock: Sequence[bytes | None]) -> list[bool]:
        """False where samples of a segment with a flat histogram do not shrink, and where hardly anything is left of
        it already; the decision is one of integers."""
        worth = [not _is_flat(content) for content in contents]
        flat = [number for number, is_worth in enumerate(worth) if not is_worth]
        samples = [_sample(contents[number]) for number in flat]
        for number, sample, coded in zip(flat, samples, self._codec.encode(samples), strict=True):
            worth[number] = len(coded.payload) < len(sample)
        for number, payload in enumerate(stock):
            worth[number] &= payload is None or _LEFT_ENOUGH * len(payload) > len(contents[number])
        return worth

    def _on_share(self, n_bytes: int) -> Callable[[float], Any] | None:
        on_ahead = self._on_ahead
        return None if on_ahead is None else lambda share: on_ahead(int(share * n_bytes))

    def _smallest_archive(self, content: bytes) -> tuple[bytes, StreamSummary]:
        """An archive of at most one segment: with the model, or without one where that is no longer."""
        bare = replace(self._header, model=None)
        candidates: list[tuple[Header, bytes | None]] = [(bare, None)]
        if content:
            candidates += [(bare, stock_codecs.encode(content))] if self._has_stock else []
            candidates += [(self._header, payload) for payload in self._payloads([content], len(content))]
        archives = []
        for header, payload in candidates:
            file = io.BytesIO()
            writer = ArchiveWriter(file, header)
            is_coded = writer.add(content, payload) if content else False
            writer.finish()
            summary = StreamSummary(len(content), writer.archive_bytes, writer.n_segments, writer.n_segments - is_coded)
            archives.append((file.getvalue(), summary))
        return min(archives, key=lambda archive: len(archive[0]))

    def _count(self, n_bytes: int) -> None:
        if self._on_bytes is not None:
            self._on_bytes(n_bytes)


def _is_flat(content: bytes) -> bool:
    """Whether two bytes drawn from `content` are equal at most a tenth more often than 1 in 256."""
    if len(content) < _PROBED_SEGMENT_BYTES_MIN:
        return False
    counts = np.bincount(np.frombuffer(content, np.uint8), minlength=256).astype(np.int64)
    return 10 * 256 * int((counts**2).sum()) < 11 * len(content) ** 2


def _shorter(stock: bytes | None, coded: bytes | None) -> bytes | None:
    """Of two payloads; a stock codec's where they are equally long, since it is decoded in no time."""
    if stock is None or (coded is not None and len(coded) < len(stock)):
        return coded
    return stock


def _sample(content: bytes) -> bytes:
    step = len(content) // _PROBE_PIECES
    return b"".join(content[at : at + _PROBE_PIECE_BYTES] for at in range(0, _PROBE_PIECES * step, step))


def decompress_stream(
    source: BinaryIO,
    target: BinaryIO,
    model: Any = None,
    *,
    lanes: int | None = None,
    device: str | None = None,
    download: bool = False,
    on_bytes: OnBytes | None = None,
) -> StreamSummary:
    """Reads one archive from `source` and writes the original bytes to `target`; neither need be seekable.

    `lanes` segments are decoded side by side (default: what the memory for sessions allows; large segments fewer, so
    that they take no more memory than others). Segments are checked
    before they are decoded, the whole content at the end: on CorruptArchive, what was written is not to be trusted.
    `model`, `device` and `download` are those of `decompress`.
    """
    reader = ArchiveReader(source)
    codec = SegmentCodec.for_archive(reader.header, model, device, download)
    hasher = container.content_hasher()
    n_segments = n_stored = 0
    for batch in _batches(reader.segments(), lanes_of(codec, lanes, reader.header.segment_bytes, DECODED_BYTES_MIN)):
        for content in _contents(batch, codec, on_bytes):
            hasher.update(content)
            target.write(content)
        n_segments += len(batch)
        n_stored += sum(segment.stored for segment in batch)
    assert reader.trailer is not None
    if hasher.digest()[: container.CONTENT_HASH_BYTES] != reader.trailer.content_hash:
        raise CorruptArchive(
            "the content has not the SHA-256 that the archive states: parts of archives were exchanged"
        )
    return StreamSummary(reader.trailer.content_bytes, reader.position, n_segments, n_stored)


def salvage_stream(
    source: BinaryIO,
    target: BinaryIO,
    model: Any = None,
    *,
    lanes: int | None = None,
    device: str | None = None,
    download: bool = False,
    on_bytes: OnBytes | None = None,
) -> SalvageSummary:
    """Writes the intact segments of a damaged archive in `source`, which must be seekable, one behind the other."""
    source.seek(0)
    header = ArchiveReader(source).header
    codec = SegmentCodec.for_archive(header, model, device, download)
    lost: list[tuple[int, int | None]] = []
    content_bytes = n_segments = expected_at = 0
    for batch in _batches(salvage_segments(source), lanes_of(codec, lanes, header.segment_bytes, DECODED_BYTES_MIN)):
        for segment, content in zip(batch, _contents(batch, codec, on_bytes), strict=True):
            target.write(content)
            at = segment.number * header.segment_bytes
            if at > expected_at:
                lost.append((expected_at, at))
            expected_at = at + segment.n_bytes
            content_bytes += segment.n_bytes
            n_segments += 1
    size = _known_size(source)
    if size is None or expected_at < size:
        lost.append((expected_at, size))
    return SalvageSummary(content_bytes, n_segments, lost)


def _known_size(source: BinaryIO) -> int | None:
    try:
        return container.ArchiveIndex(source).trailer.content_bytes
    except CorruptArchive:
        return None


def _contents(batch: list[Segment], codec: SegmentCodec | None, on_bytes: OnBytes | None) -> list[bytes]:
    n_left = sum(segment.n_bytes for segment in batch)

    def on_step(n_bytes: int) -> None:
        nonlocal n_left
        n_left -= n_bytes
        if on_bytes is not None:
            on_bytes(n_bytes)

    contents = [stock_codecs.content_of(s) for s in batch] if codec is None else codec.decode_segments(batch, on_step)
    on_step(n_left)
    return contents


def _batches(items: Iterable[Item], n_items: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, n_items)):
        yield batch


def lanes_of(codec: SegmentCodec | None, lanes: int | None, segment_bytes: int, bytes_min: int = 0) -> int:
    """How many segments are coded side by side: what the caller says, else what the memory for sessions allows, of
    large segments no more than take the memory of so many of the default size, or of `bytes_min` original bytes; of
    4 MiB where rows are mixed."""
    if lanes is None:
        n_lanes = 1 if codec is None else codec.lanes
        n_bytes = max(bytes_min, n_lanes * container.SEGMENT_BYTES_DEFAULT)
        if codec is not None and codec.identity.mixing:
            n_bytes = min(n_bytes, _MIXED_BYTES_MAX)
        return max(1, min(n_lanes, n_bytes // segment_bytes))
    if lanes < 1:
        raise Error(f"lanes={lanes}: expected 1 or more")
    return lanes

"""compress, decompress and score: bytes in, archives or result rows out, with any model.

Segments and their payloads are segments.py's, an archive's bytes container.py's, files with names archive.py's.
"""

from __future__ import annotations

import io
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from llmcomp import coding, container, tokens
from llmcomp.container import ArchiveReader, ArchiveWriter, Header, Segment
from llmcomp.errors import CorruptArchive, Error
from llmcomp.memory import MaxMemory
from llmcomp.models import load_model
from llmcomp.salvage import salvage_segments
from llmcomp.scoring import PublishedSum, in_background
from llmcomp.segments import MAPPING_DEFAULT, Coded, ModelTraits, SegmentCodec, as_chunks
from llmcomp.token_cache import PUBLISHED, TokenCache
from llmcomp.tokens import Encoded

# Tables are for scores: an archive is coded without pandas and what it draws in.
if TYPE_CHECKING:
    import pandas as pd

PUBLISHED_MAPPING = "ascii"
PUBLISHED_RATIOS = (0.01, 10.0)
# How much is scored between two updates of the progress bar.
_SCORE_BATCH_BYTES = 1 << 18

_READ_BYTES = 1 << 20
# A large segment whose byte values are about equally frequent (random, encrypted or compressed already) is tried on
# samples first: a model needs minutes for a megabyte, and to find out that nothing shrinks a thirtieth is enough.
_PROBED_SEGMENT_BYTES_MIN = 1 << 14
_PROBE_PIECES, _PROBE_PIECE_BYTES = 4, 512

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


# Archives.


def compress(
    data: bytes,
    model: Any,
    *,
    mapping: str = MAPPING_DEFAULT,
    overlap: int | None = None,
    segment_bytes: int = container.SEGMENT_BYTES_DEFAULT,
    device: str | None = None,
) -> bytes:
    """The archive of `data`, any bytes, coded with `model`: a name, or an object with logits() and session().

    `mapping`: how bytes become tokens (tokens.MAPPINGS). `overlap`: how many tokens of the window before a window sees
    as context, default a share of the model's context. `segment_bytes`: what one segment holds; segments are decoded
    side by side or alone. `device`: as in `load_model`, for a model that is given by its name. The same arguments give
    the same archive whatever the backend, the number of threads and, of the exact engine, the device.

    Raises:
        Error: an option out of range, or a model that gives NaN.
    """
    target = io.BytesIO()
    options: dict[str, Any] = {"mapping": mapping, "overlap": overlap, "segment_bytes": segment_bytes, "device": device}
    compress_stream(io.BytesIO(data), target, model, **options)
    return target.getvalue()


def decompress(blob: bytes, model: Any = None, *, device: str | None = None) -> bytes:
    """The bytes that `compress` was given. `model` None: the one that the archive names, if bundled or registered.

    `device`: where the model is loaded, as in `load_model`.

    Raises:
        CorruptArchive: the archive is damaged or not one.
        ModelMismatch: `model` is not what the archive was coded with, and what was.
    """
    target = io.BytesIO()
    decompress_stream(io.BytesIO(blob), target, model, device=device)
    return target.getvalue()


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
    on_bytes: OnBytes | None = None,
) -> StreamSummary:
    """Reads `source` to its end and writes the archive to `target`; neither need be seekable.

    Memory does not depend on the size: `lanes` segments (default: the codec's) with their tokens, and one batch of the
    model. `on_bytes` is called with every number of original bytes that was coded.
    """
    compressor = StreamCompressor(
        target,
        model,
        mapping=mapping,
        overlap=overlap,
        segment_bytes=segment_bytes,
        lanes=lanes,
        device=device,
        on_bytes=on_bytes,
    )
    while part := source.read(_READ_BYTES):
        compressor.write(part)
    return compressor.finish()


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
        on_bytes: OnBytes | None = None,
    ):
        self._codec = SegmentCodec(load_model(model, device=device), mapping, overlap)
        self._header = Header(segment_bytes, self._codec.identity)
        container.header_bytes(self._header)
        self._batch_bytes = segment_bytes * lanes_of(self._codec, lanes)
        self._target = target
        self._on_bytes = on_bytes
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
            archive, summary = _smallest_archive(bytes(self._pending), self._header, self._codec)
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
        worth = self._worth_coding(contents)
        coded = iter(
            self._codec.encode([content for content, is_worth in zip(contents, worth, strict=True) if is_worth])
        )
        for content, is_worth in zip(contents, worth, strict=True):
            self._n_stored += not self._writer.add(content, next(coded).payload if is_worth else None)
            self._count(len(content))

    def _worth_coding(self, contents: list[bytes]) -> list[bool]:
        """False where samples of a segment with a flat histogram do not shrink; the decision is one of integers."""
        worth = [not _is_flat(content) for content in contents]
        flat = [number for number, is_worth in enumerate(worth) if not is_worth]
        samples = [_sample(contents[number]) for number in flat]
        for number, sample, coded in zip(flat, samples, self._codec.encode(samples), strict=True):
            worth[number] = len(coded.payload) < len(sample)
        return worth

    def _count(self, n_bytes: int) -> None:
        if self._on_bytes is not None:
            self._on_bytes(n_bytes)


def _is_flat(content: bytes) -> bool:
    """Whether two bytes drawn from `content` are equal at most a tenth more often than 1 in 256."""
    if len(content) < _PROBED_SEGMENT_BYTES_MIN:
        return False
    counts = np.bincount(np.frombuffer(content, np.uint8), minlength=256).astype(np.int64)
    return 10 * 256 * int((counts**2).sum()) < 11 * len(content) ** 2


def _sample(content: bytes) -> bytes:
    step = len(content) // _PROBE_PIECES
    return b"".join(content[at : at + _PROBE_PIECE_BYTES] for at in range(0, _PROBE_PIECES * step, step))


def _smallest_archive(content: bytes, header: Header, codec: SegmentCodec) -> tuple[bytes, StreamSummary]:
    """An archive of at most one segment: with the model, or without one where that is no longer."""
    candidates: list[tuple[Header, bytes | None]] = [(Header(header.segment_bytes, None), None)]
    candidates += [(header, coded.payload) for coded in codec.encode([content] if content else [])]
    archives = []
    for chosen, payload in candidates:
        file = io.BytesIO()
        writer = ArchiveWriter(file, chosen)
        is_coded = writer.add(content, payload) if content else False
        writer.finish()
        summary = StreamSummary(len(content), writer.archive_bytes, writer.n_segments, writer.n_segments - is_coded)
        archives.append((file.getvalue(), summary))
    return min(archives, key=lambda archive: len(archive[0]))


def decompress_stream(
    source: BinaryIO,
    target: BinaryIO,
    model: Any = None,
    *,
    lanes: int | None = None,
    device: str | None = None,
    on_bytes: OnBytes | None = None,
) -> StreamSummary:
    """Reads one archive from `source` and writes the original bytes to `target`; neither need be seekable.

    `lanes` segments are decoded side by side (default: what the memory for sessions allows). Segments are checked
    before they are decoded, the whole content at the end: on CorruptArchive, what was written is not to be trusted.
    """
    reader = ArchiveReader(source)
    codec = SegmentCodec.for_archive(reader.header, model, device)
    hasher = container.content_hasher()
    n_segments = n_stored = 0
    for batch in _batches(reader.segments(), lanes_of(codec, lanes)):
        for content in _contents(batch, codec, on_bytes):
            hasher.update(content)
            target.write(content)
        n_segments += len(batch)
        n_stored += sum(segment.stored for segment in batch)
    assert reader.trailer is not None
    if hasher.digest()[: container.CONTENT_HASH_BYTES] != reader.trailer.content_hash:
        raise CorruptArchive("the content has not the SHA-256 that the archive tells: parts of archives were exchanged")
    return StreamSummary(reader.trailer.content_bytes, reader.position, n_segments, n_stored)


def salvage_stream(
    source: BinaryIO,
    target: BinaryIO,
    model: Any = None,
    *,
    lanes: int | None = None,
    device: str | None = None,
    on_bytes: OnBytes | None = None,
) -> SalvageSummary:
    """Writes the intact segments of a damaged archive in `source`, which must be seekable, one behind the other."""
    source.seek(0)
    header = ArchiveReader(source).header
    codec = SegmentCodec.for_archive(header, model, device)
    lost: list[tuple[int, int | None]] = []
    content_bytes = n_segments = expected_at = 0
    for batch in _batches(salvage_segments(source), lanes_of(codec, lanes)):
        for segment, content in zip(batch, _contents(batch, codec, on_bytes), strict=True):
            target.write(content)
            at = segment.number * header.segment_bytes
            if at > expected_at:
                lost.append((expected_at, at))
            expected_at = at + segment.n_bytes
            content_bytes += segment.n_bytes
            n_segments += 1
    size = _size_told(source)
    if size is None or expected_at < size:
        lost.append((expected_at, size))
    return SalvageSummary(content_bytes, n_segments, lost)


def _size_told(source: BinaryIO) -> int | None:
    try:
        return container.ArchiveIndex(source).trailer.content_bytes
    except CorruptArchive:
        return None


def _contents(batch: list[Segment], codec: SegmentCodec | None, on_bytes: OnBytes | None) -> list[bytes]:
    contents = [segment.payload for segment in batch] if codec is None else codec.decode_segments(batch, on_bytes)
    if on_bytes is not None:
        on_bytes(sum(segment.n_bytes for segment in batch if segment.stored))
    return contents


def _batches(items: Iterable[Item], n_items: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, n_items)):
        yield batch


def lanes_of(codec: SegmentCodec | None, lanes: int | None) -> int:
    """How many segments are decoded side by side: what the caller says, else what the memory for sessions allows."""
    if lanes is None:
        return 1 if codec is None else codec.lanes
    if lanes < 1:
        raise Error(f"lanes={lanes}: expected 1 or more")
    return lanes


# Scores.


def score(
    chunks: Iterable[bytes],
    model: Any,
    protocol: str = "lossless",
    mapping: str | None = None,
    *,
    overlap: int | None = None,
    verify: bool = False,
    max_memory: MaxMemory = None,
    token_cache: TokenCache | None = None,
    device: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """One row a chunk (results.ROW_COLUMNS) of what `model` makes of `chunks`: bytes, or a data set with `.chunks`.

    protocol "lossless": each chunk is a stream of its own, with the windows and the bits that an archive's segment
    would have: all bytes, all tokens, the first token paid for, real payload bytes. `verify` decodes every one again
    and raises CorruptArchive for the first that is not its chunk. `mapping` None means "bytes". With the torch engine
    scores come from one pass over each window, as no decoder could repeat it, unless `verify` is set. `device`: where a
    model that is given by its name is loaded.

    protocol "published": the published computation on the same model. b % 128, at most 1,024 tokens (or the model's
    context, if smaller), first token free, the softmax over all logits (to 2e-6 bits a token, 1e-5 with the torch
    engine), clamped at 1e-10, bits over all bytes, chunks with a ratio outside (0.01, 10) dropped. Nothing is coded and
    nothing could be decoded.

    The two never share a pass: lossless windows begin with the start token, which pays for the first token; published
    ones begin with the first token itself, so every later token has another context and another probability.

    `max_memory`: what weights and batches may take, in bytes (an integer), as a share of all memory of the model's
    device (a float), or either as text ("8GB", "0.5"); None: what is free. A batch that does not fit is halved.
    `token_cache` keeps tokens for other models with the same tokenizer.

    Raises:
        Error: an unknown protocol or mapping, an empty chunk, a model that gives NaN, or too little memory.
    """
    import pandas as pd

    from llmcomp import results

    model = load_model(model, device=device)
    data, modality = getattr(chunks, "name", ""), getattr(chunks, "modality", "")
    chunks = as_chunks(getattr(chunks, "chunks", chunks))
    if protocol not in results.PROTOCOLS:
        raise Error(f"no protocol is called {protocol!r}; there are {', '.join(results.PROTOCOLS)}")
    if protocol == "published" and mapping not in (None, PUBLISHED_MAPPING):
        raise Error(f"the published protocol has mapping {PUBLISHED_MAPPING!r} only, found {mapping!r}")
    scorer: _LosslessScorer | _PublishedScorer
    if protocol == "lossless":
        mapping = mapping or MAPPING_DEFAULT
        codec = SegmentCodec(model, mapping, overlap, is_stepwise=None if verify else False, max_memory=max_memory)
        scorer = _LosslessScorer(codec, mapping, token_cache or TokenCache(), verify)
    else:
        mapping = PUBLISHED_MAPPING
        scorer = _PublishedScorer(model, token_cache or TokenCache(), max_memory)
    rows = _scored(chunks, scorer, progress)
    facts = {"dataset": data, "modality": modality, "protocol": protocol, "mapping": mapping, **_model_facts(model)}
    if not rows:
        return results.empty_rows()
    return results.check_rows(pd.DataFrame(rows).assign(batch_rows=scorer.batch_rows, **facts))


def _scored(chunks: Sequence[bytes], scorer: _LosslessScorer | _PublishedScorer, progress: bool) -> list[dict]:
    """Rows of all chunks, with their numbers and their shares of the seconds; rows of dropped chunks are missing."""
    from tqdm.auto import tqdm

    rows: list[dict] = []

    def start(numbers: list[int]) -> Callable[[], Any]:
        return scorer.start([chunks[number] for number in numbers])

    with tqdm(total=len(chunks), unit="chunk", disable=not progress, delay=2, leave=False) as bar:
        before = time.perf_counter()
        for numbers, found in in_background(_chunk_batches(chunks), start):
            batch = scorer.rows([chunks[number] for number in numbers], found)
            now = time.perf_counter()
            # Groups overlap; from one end to the next their seconds add up to the whole.
            seconds, before = now - before, now
            n_tokens = sum(row["tokens"] for row in batch)
            for number, row in zip(numbers, batch, strict=True):
                if row.pop("kept", True):
                    rows.append({"chunk": number, "seconds": seconds * row["tokens"] / max(n_tokens, 1), **row})
            bar.update(len(numbers))
    return rows


def _chunk_batches(chunks: Sequence[bytes]) -> Iterator[list[int]]:
    numbers: list[int] = []
    n_bytes = 0
    for number in range(len(chunks)):
        if not len(chunks[number]):
            raise Error(f"chunk {number} is empty: a ratio needs at least one byte")
        numbers.append(number)
        n_bytes += len(chunks[number])
        if n_bytes >= _SCORE_BATCH_BYTES:
            yield numbers
            numbers, n_bytes = [], 0
    if numbers:
        yield numbers


def _model_facts(model: Any) -> dict[str, Any]:
    from llmcomp import __version__

    traits = ModelTraits.of(model)
    return {
        "model": traits.name,
        "params": getattr(model, "n_params", None),
        "step": getattr(model, "step", None),
        "engine": traits.engine,
        "backend": coding.backend_in_use(),
        "device": getattr(model, "device", "cpu"),
        "dtype": getattr(model, "dtype", ""),
        "attention": getattr(model, "attention", None) or "",
        "weights_sha256": getattr(model, "weights_sha256", ""),
        "version": __version__,
    }


class _LosslessScorer:
    """Chunks as an archive would code them."""

    def __init__(self, codec: SegmentCodec, mapping: str, cache: TokenCache, verify: bool):
        self._codec, self._mapping, self._cache, self._verify = codec, mapping, cache, verify

    @property
    def batch_rows(self) -> int | None:
        return self._codec.batch_rows

    def start(self, batch: list[bytes]) -> Callable[[], list[Coded]]:
        return self._codec.start(self._cache.encoded(self._mapping, self._codec.traits.tokenizer, batch))

    def rows(self, batch: list[bytes], coded: list[Coded]) -> list[dict]:
        if self._verify:
            decoded = self._codec.decode([item.payload for item in coded], [len(chunk) for chunk in batch])
            if wrong := sum(chunk != content for chunk, content in zip(batch, decoded, strict=True)):
                raise CorruptArchive(f"{wrong} of {len(batch)} chunks decode to other bytes than were coded")
        return [
            {
                "bytes_in": len(chunk),
                "bytes_scored": len(chunk),
                "tokens": item.n_tokens,
                "ideal_bits": item.ideal_bits,
                "coded_bytes": len(item.stream),
                "side_bits": item.side_bits,
                "ratio": (8 * len(item.stream) + item.side_bits) / (8 * len(chunk)),
            }
            for chunk, item in zip(batch, coded, strict=True)
        ]


# The published computation.


def _warn_of_short_context(traits: ModelTraits) -> None:
    if traits.context_length < tokens.PUBLISHED_MAX_TOKENS:
        warnings.warn(
            f"{traits.label} sees {traits.context_length} tokens: the published protocol is cut there, not at "
            f"{tokens.PUBLISHED_MAX_TOKENS}; bytes_scored tells what the bits cover",
            stacklevel=4,
        )


class _PublishedScorer:
    """The published computation: tokens as published, and their sum of bits."""

    def __init__(self, model: Any, cache: TokenCache, max_memory: MaxMemory):
        self._traits, self._cache = ModelTraits.of(model), cache
        _warn_of_short_context(self._traits)
        self._sum = PublishedSum(model, getattr(model, "n_logits", self._traits.vocab_size), max_memory)

    @property
    def batch_rows(self) -> int:
        return self._sum.batch_rows

    def start(self, batch: list[bytes]) -> Callable[[], tuple[list[Encoded], list[float]]]:
        kept = [self._cut(item) for item in self._cache.encoded(PUBLISHED, self._traits.tokenizer, batch)]
        wait = self._sum.start([item.tokens for item in kept])
        return lambda: (kept, wait())

    def _cut(self, item: Encoded) -> Encoded:
        """What the model sees of a chunk; `n_bytes` are the bytes that it covers."""
        limit = self._traits.context_length
        if len(item.tokens) <= limit:
            return item
        covered = int(self._traits.tokenizer.text_lengths(item.tokens[:limit]).sum())
        return Encoded(item.tokens[:limit], b"", 0, min(covered, item.n_bytes))

    def rows(self, batch: list[bytes], found: tuple[list[Encoded], list[float]]) -> list[dict]:
        rows = []
        for chunk, kept, ideal_bits in zip(batch, *found, strict=True):
            ratio = ideal_bits / (8 * len(chunk))
            row: dict[str, Any] = {"bytes_in": len(chunk), "bytes_scored": kept.n_bytes}
            row |= {"tokens": max(len(kept.tokens) - 1, 0), "ideal_bits": ideal_bits}
            row |= {"coded_bytes": None, "side_bits": 0, "ratio": ratio}
            rows.append({**row, "kept": PUBLISHED_RATIOS[0] < ratio < PUBLISHED_RATIOS[1]})
        return rows

"""Archives as file objects: `open` for reading (seekable) and writing, and what an archive says of itself.

Whole files with their names, modes and times are files.py's; coding is codec.py's.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from llmcomp.atomic_write import written_beside
from llmcomp.codec import container, stock_codecs
from llmcomp.codec.compress import DECODED_BYTES_MIN, StreamCompressor, lanes_of
from llmcomp.codec.container import ArchiveIndex, Header
from llmcomp.codec.segments import ENGINE_CODES, SegmentCodec
from llmcomp.data import mappings
from llmcomp.display import Shown
from llmcomp.errors import CorruptArchive, Error
from llmcomp.models.registry import list_models

_WRITE_OPTIONS = ("mapping", "overlap", "segment_bytes", "lanes", "device", "salt", "mix", "stock")

PathOrFile = str | os.PathLike[str] | BinaryIO


def open(
    file: PathOrFile,
    mode: str = "rb",
    model: Any = None,
    *,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    **options: Any,
) -> IO[Any]:
    """An archive as a file object, as gzip.open's users expect: modes "rb", "wb", "xb" and the same with "t".

    Reading is seekable: only the segments that are asked for are decoded, a growing number of them while reading goes
    on in order. After reading everything in order the content's hash is checked too. `model` None: the one that the
    archive names, and `options` are then lanes and those of `decompress`; to write, a model is needed, and `options`
    are those of `compress_stream`.
    A path that is written appears only when the file is closed; after an exception in a `with` block it does not.

    Raises:
        CorruptArchive, ModelMismatch: when a segment is damaged, when the model is not the archive's.
        Error: a mode or an option that does not exist, a file that cannot be opened or, to read, cannot seek.
    """
    kind = mode.replace("t", "").replace("b", "") or "r"
    if kind not in ("r", "w", "x") or ("t" in mode and "b" in mode) or len(mode) > 2:
        raise Error(f"mode {mode!r}: expected rb, wb, xb, rt, wt or xt")
    raw: io.RawIOBase
    if kind == "r":
        raw = _SegmentReader(file, model, **options)
        binary: IO[Any] = io.BufferedReader(raw)
    else:
        if model is None:
            raise Error("an archive can only be written with a model: open(file, mode, model=...)")
        binary = _SegmentWriter(file, model, kind == "x", options)  # type: ignore[assignment]
    if "t" not in mode:
        return binary
    return _Text(binary, encoding, errors, newline)


class _Text(io.TextIOWrapper):
    """A text layer that leaves it to the layer below what an exception in a `with` block means."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is None:
            self.close()
        else:
            cast(IO[bytes], self.buffer).__exit__(kind, error, traceback)


class _SegmentReader(io.RawIOBase):
    """Positions in the original to segments; keeps the segments that were decoded together last."""

    def __init__(
        self,
        file: PathOrFile,
        model: Any = None,
        lanes: int | None = None,
        device: str | None = None,
        download: bool = False,
    ):
        self._owned = isinstance(file, (str, os.PathLike))
        with error_of_path(file):
            self._file = Path(file).open("rb") if isinstance(file, (str, os.PathLike)) else file  # noqa: SIM115
        try:
            if not self._file.seekable():
                raise Error("an archive that cannot seek is read by llmcomp.codec.decompress_stream, not by open")
            self._index = ArchiveIndex(self._file)
            self._codec = SegmentCodec.for_archive(self._index.header, model, device, download)
        except BaseException:
            self.close()
            raise
        self._lanes = lanes_of(self._codec, lanes, self._index.header.segment_bytes, DECODED_BYTES_MIN)
        self._position = 0
        self._decoded: dict[int, bytes] = {}
        self._n_ahead = 1
        self._hasher = container.content_hasher()
        self._n_hashed = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._index.trailer.content_bytes}
        if whence not in origin or origin[whence] + offset < 0:
            raise Error(f"seek({offset}, {whence}): no such position")
        self._position = origin[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, at = divmod(self._position, self._index.header.segment_bytes)
        if number >= self._index.n_segments:
            return 0
        part = memoryview(self._segment(number))[at : at + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _segment(self, number: int) -> bytes:
        if number not in self._decoded:
            # In order: twice as many as the last time. Anywhere else: that one alone.
            self._n_ahead = min(2 * self._n_ahead, self._lanes) if number - 1 in self._decoded else 1
            stop = min(number + self._n_ahead, self._index.n_segments)
            segments = [self._index.segment(k) for k in range(number, stop)]
            contents = (
                [stock_codecs.content_of(s) for s in segments]
                if self._codec is None
                else self._codec.decode_segments(segments)
            )
            self._decoded = dict(zip(range(number, stop), contents, strict=True))
            self._hash(number, contents)
        return self._decoded[number]

    def _hash(self, number: int, contents: list[bytes]) -> None:
        if number != self._n_hashed:
            return
        for content in contents:
            self._hasher.update(content)
        self._n_hashed += len(contents)
        digest = self._hasher.digest()[: container.CONTENT_HASH_BYTES]
        if self._n_hashed == self._index.n_segments and digest != self._index.trailer.content_hash:
            raise CorruptArchive("the content has not the SHA-256 that the archive states")

    def close(self) -> None:
        if self._owned and hasattr(self, "_file"):
            self._file.close()
        super().close()


class _SegmentWriter(io.RawIOBase):
    """Hands bytes to a compressor; a path is written beside and renamed when closed."""

    def __init__(self, file: PathOrFile, model: Any, is_exclusive: bool, options: dict[str, Any]):
        if unknown := set(options) - set(_WRITE_OPTIONS):
            raise Error(f"no option is called {unknown.pop()!r}; there are {', '.join(_WRITE_OPTIONS)}")
        self._exit = contextlib.ExitStack()
        self._finished = False
        try:
            if isinstance(file, (str, os.PathLike)):
                self._exit.enter_context(error_of_path(file))
                target = self._exit.enter_context(written_beside(file, replace=not is_exclusive))
            else:
                target = file
            self._compressor = StreamCompressor(target, model, **options)
        except BaseException as error:
            self._abandon(error)
            raise

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._compressor.write(bytes(data))
        except BaseException as error:
            self._abandon(error)
            raise

    def _abandon(self, error: BaseException) -> None:
        self._finished = True
        self._exit.__exit__(type(error), error, error.__traceback__)

    def close(self) -> None:
        if not self._finished:
            self._finished = True
            with self._exit:
                self._compressor.finish()
        super().close()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None and not self._finished:
            self._abandon(error)
        self.close()


@contextlib.contextmanager
def error_of_path(path: object) -> Iterator[None]:
    """Turns an OSError into one line that names the path; a pipe that nobody reads any more stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Error(f"{error.filename or path}: {error.strerror or error}") from None


# What an archive says of itself.


@dataclass(frozen=True, repr=False)
class ArchiveInfo(Shown):
    """What `info` finds in an archive without a model; sizes in bytes. Empty strings where no model is needed."""

    archive_bytes: int
    content_bytes: int
    content_sha256_prefix: str
    segment_bytes: int
    n_segments: int
    n_stored: int
    model: str
    revision: str
    weights_hash: str
    tokenizer_hash: str
    engine: str
    mapping: str
    arithmetic_version: int
    context_length: int
    overlap: int
    vocab_size: int

    @property
    def ratio(self) -> float:
        """Archive over original; NaN for an empty original."""
        return self.archive_bytes / self.content_bytes if self.content_bytes else float("nan")

    def _facts(self) -> dict[str, Any]:
        return {
            "": f"{self.model} {self.revision}".strip() or "without a model",
            "original bytes": self.content_bytes,
            "archive bytes": self.archive_bytes,
            "ratio": self.ratio,
            "segments": self.n_segments,
            "stored": self.n_stored,
            "engine": self.engine,
            "mapping": self.mapping,
        }

    @property
    def how_to_get(self) -> str:
        """One line: where the model comes from."""
        if not self.model:
            return "no model needed: every segment is stored as it is, or by deflate or LZMA"
        entry = next((entry for entry in list_models() if entry.name == self.model), None)
        named = f"{self.model} {self.revision}".strip()
        if entry is None:
            return f"{named} is not in the registry: name its folder or its hub name with --model"
        if entry.bundled:
            return f"{named} is bundled with llmcomp"
        return f"{named} is in the registry: from the cache, or from the Hugging Face hub with --download"


def info(file: PathOrFile) -> ArchiveInfo:
    """What the archive says of itself: header, trailer and the frames of its segments. Loads no model, decodes nothing.

    Raises:
        CorruptArchive: header, index, trailer or a frame is damaged. Error: the file cannot be opened or cannot seek.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(file, (str, os.PathLike)):
            with error_of_path(file):
                file = stack.enter_context(Path(file).open("rb"))
        if not file.seekable():
            raise Error("what an archive says of itself lies at its end: a pipe cannot be asked")
        index = ArchiveIndex(file)
        return _info(index.header, index, index.n_stored(), file.seek(0, os.SEEK_END))


def _info(header: Header, index: ArchiveIndex, n_stored: int, archive_bytes: int) -> ArchiveInfo:
    model = header.model
    engines = {code: name for name, code in ENGINE_CODES.items()}
    return ArchiveInfo(
        archive_bytes=archive_bytes,
        content_bytes=index.trailer.content_bytes,
        content_sha256_prefix=index.trailer.content_hash.hex(),
        segment_bytes=header.segment_bytes,
        n_segments=index.n_segments,
        n_stored=n_stored,
        model=model.name if model else "",
        revision=model.revision if model else "",
        weights_hash=model.weights_hash.hex() if model and any(model.weights_hash) else "",
        tokenizer_hash=model.tokenizer_hash.hex() if model else "",
        engine=engines.get(model.engine, f"unknown ({model.engine})") if model else "",
        mapping=_mapping_name(model.mapping) if model else "",
        arithmetic_version=model.arithmetic_version if model else 0,
        context_length=model.context_length if model else 0,
        overlap=model.overlap if model else 0,
        vocab_size=model.vocab_size if model else 0,
    )


def listing(found: Sequence[tuple[str, ArchiveInfo]]) -> str:
    """Archives by their files' names as gzip -l has them, with the model; totals where there are several."""
    lines = [f"{'compressed':>14} {'uncompressed':>14} {'ratio':>6} {'model':20} uncompressed_name"]
    rows = [
        (
            about.archive_bytes,
            about.content_bytes,
            f"{about.model} {about.revision}".strip(),
            file.removesuffix(".llmc"),
        )
        for file, about in found
    ]
    if len(rows) > 1:
        rows.append((sum(row[0] for row in rows), sum(row[1] for row in rows), "", "(totals)"))
    for coded, content, model, name in rows:
        lines.append(f"{coded:14} {content:14} {coded / (content or math.nan):6.3f} {model or '-':20} {name}")
    return "\n".join(lines)


def _mapping_name(code: int) -> str:
    return mappings.MAPPINGS[code] if code < len(mappings.MAPPINGS) else f"unknown ({code})"

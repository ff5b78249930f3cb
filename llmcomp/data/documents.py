"""Text, and bytes of any other kind, -> documents -> chunks. Files, folders, globs, columns of rows, values in memory.

A document is what stays together: a file, or the rows of a column, of one file or data set, joined by newlines. It is
cut into chunks on a grid from its first byte, never across its end; where whole documents are asked for, each file and
each row is one chunk. Which chunks are taken is `drawing`'s to say. Pictures, sound and arrays are read elsewhere.
"""

from __future__ import annotations

import bisect
import contextlib
import glob
import gzip
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmcomp.data.decoding import decoding
from llmcomp.data.drawing import Chunk, Found, Request
from llmcomp.errors import DatasetError, named

# Files whose bytes are not what is in them.
_CONTAINERS = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"%PDF-": "PDF",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"fLaC": "FLAC",
    b"\x93NUMPY": "NumPy",
}
_CONTAINER_MAGIC_BYTES = max(map(len, _CONTAINERS))
_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_PARQUET = (".parquet",)
_COLUMNS_SHOWN = 12


class Document(NamedTuple):
    """`read(first, stop)` gives its bytes."""

    name: str
    n_bytes: int
    read: Callable[[int, int], bytes]


def document_of(name: str, content: bytes) -> Document:
    return Document(name, len(content), lambda first, stop: content[first:stop])


def cut(documents: Sequence[Document], where: str, request: Request) -> Found:
    """Chunks of `chunk_bytes` among those of all documents."""
    chunk_bytes = request.chunk_bytes
    # ends[i]: how many chunks there are in the documents 0 to i.
    ends = list(itertools.accumulate(document.n_bytes // chunk_bytes for document in documents))
    n_available = ends[-1] if ends else 0
    if not n_available:
        largest = max((document.n_bytes for document in documents), default=0)
        raise DatasetError(f"{where}: found {largest:,} bytes, expected at least one chunk of {chunk_bytes:,}")
    chunks: dict[int, Chunk] = {}
    numbers = request.numbers(n_available)
    for number in sorted(numbers):  # files are read from their beginning to their end
        index = bisect.bisect_right(ends, number)
        document = documents[index]
        first = (number - (ends[index - 1] if index else 0)) * chunk_bytes
        content = document.read(first, first + chunk_bytes)
        if len(content) != chunk_bytes:
            raise DatasetError(f"{document.name}: found {len(content)} bytes from {first} on, expected {chunk_bytes}")
        source = f"{document.name} bytes {first}-{first + chunk_bytes - 1}"
        chunks[number] = Chunk(content, source, document.name, first)
    return request.found([chunks[number] for number in numbers], n_available, chunk_bytes)


def whole(documents: Sequence[Document], where: str, request: Request) -> Found:
    """Documents, each a chunk of its own; those of no bytes are none."""
    there = [document for document in documents if document.n_bytes]
    if not there:
        raise DatasetError(f"{where}: found no document that is not empty")
    chosen = [there[number] for number in request.numbers(len(there))]
    chunks = [Chunk(d.read(0, d.n_bytes), f"{d.name} whole", d.name, 0) for d in chosen]
    return request.found(chunks, len(there), None)


# Files.


def split_column(text: str) -> tuple[str, str | None]:
    """PATH[:COLUMN] as (path, column); a path that is there is a path, whatever colons are in its name."""
    path, colon, column = text.rpartition(":")
    if not colon or not column or os.path.lexists(text) or _glob(text):
        return text, None
    return (path, column) if os.path.lexists(path) or _glob(path) else (text, None)


def read_files(path: Path, column: str | None, modality: str, one_a_row: bool) -> list[Document]:
    """The documents in a file, a folder or what a glob matches; with `column` those of its rows.

    `DatasetError` for a file whose bytes are not its text: a container, or, as "text", the syntax of JSON Lines.
    """
    files = _files(path)
    if column is not None:
        tables = [(name, file) for name, file in files if name.lower().endswith((*_JSON_LINES, *_PARQUET))]
        if not tables:
            suffixes = ", ".join((*_JSON_LINES, *_PARQUET))
            raise DatasetError(f"{path}: column {column!r} was asked for, found no file with one of {suffixes}")
        return [
            document
            for name, file in tables
            for document in of_rows(name, _column(file, column), one_a_row, f"column {column}")
        ]
    if not files:
        raise DatasetError(f"{path}: found no file there")
    for name, file in files:
        _refuse_container(name, file, modality)
    return [Document(name, file.stat().st_size, _reader(file)) for name, file in files]


def matches(path: Path) -> bool:
    """Whether the path is a pattern that some file has."""
    return bool(_glob(str(path)))


def _glob(text: str) -> list[str]:
    return sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []  # noqa: PTH207 - takes "**"


def _files(path: Path) -> list[tuple[str, Path]]:
    """(name, path) of every file, in the order of the names, which are relative to the folder; hidden files are not
    read."""
    if path.is_dir():
        below = [file for file in path.rglob("*") if file.is_file()]
        named_files = [(file.relative_to(path).as_posix(), file) for file in below]
        return sorted(pair for pair in named_files if not any(part.startswith(".") for part in pair[0].split("/")))
    if os.path.lexists(path):
        if not path.is_file():
            raise DatasetError(f"{path} is no regular file")
        return [(path.name, path)]
    found = [Path(name) for name in _glob(str(path)) if Path(name).is_file()]
    if not found:
        return []
    above = Path(os.path.commonpath([file.parent for file in found]))
    return [(file.relative_to(above).as_posix(), file) for file in found]


def _reader(file: Path) -> Callable[[int, int], bytes]:
    def read(first: int, stop: int) -> bytes:
        with file.open("rb") as opened:
            opened.seek(first)
            return opened.read(stop - first)

    return read


def _refuse_container(name: str, file: Path, modality: str) -> None:
    with file.open("rb") as opened:
        start = opened.read(_CONTAINER_MAGIC_BYTES)
    kind = next((kind for magic, kind in _CONTAINERS.items() if start.startswith(magic)), None)
    if start.startswith(b"RIFF"):
        kind = "WAV or WebP"
    what = "text" if modality == "text" else "data"
    if kind == "Parquet":
        columns = ""
        with contextlib.suppress(DatasetError):
            columns = f" (it has {_listed(_parquet_columns(file))})"
        raise DatasetError(
            f"{file} is a Parquet file: its container would be scored, not its {what}; name the column, as in "
            f"{modality}={file.name}:COLUMN{columns}"
        )
    if kind is not None:
        raise DatasetError(
            f"{file} is a {kind} file: its container would be scored, not its {what}; extract the {what}"
        )
    if modality == "text" and name.lower().endswith(_JSON_LINES):
        first = next(iter(_json_lines(file)), {})
        raise DatasetError(
            f"{file} is a JSON Lines file: its syntax would be scored, not its text; name the column, as in "
            f"text={file.name}:COLUMN (it has {_listed(first)}); json={file.name} scores the file as it is"
        )


def _listed(columns: Iterable[str]) -> str:
    columns = list(columns)
    more = ", ..." if len(columns) > _COLUMNS_SHOWN else ""
    return ", ".join(named(str(column)) for column in columns[:_COLUMNS_SHOWN]) + more or "none"


# Rows.


def of_rows(name: str, values: Iterable[Any], one_a_row: bool, what: str = "rows") -> list[Document]:
    """The documents of rows that are text or bytes; rows without a value are left out."""
    contents: list[tuple[int, bytes]] = []
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            content = value.encode() if isinstance(value, str) else bytes(memoryview(value))
        except UnicodeEncodeError:
            raise DatasetError(
                f"{name} row {row}: its text holds half of a surrogate pair, which UTF-8 has not"
            ) from None
        except TypeError:
            raise DatasetError(
                f"{name} row {row}: {what} is a {type(value).__name__}, expected text or bytes"
            ) from None
        contents.append((row, content))
    if one_a_row:
        return [document_of(f"{name} row {row}", content) for row, content in contents]
    return [document_of(f"{name} {what}", b"\n".join(content for _, content in contents))]


def _column(file: Path, column: str) -> Iterator[Any]:
    return _parquet_column(file, column) if file.name.lower().endswith(_PARQUET) else _json_column(file, column)


def _json_column(file: Path, column: str) -> Iterator[Any]:
    for number, row in enumerate(_json_lines(file)):
        if column not in row:
            raise DatasetError(f"{file} row {number}: no column {column!r}, found {_listed(row)}")
        yield row[column]


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    open_file: Any = gzip.open if file.name.lower().endswith(".gz") else Path.open
    with decoding(file, "not readable as JSON Lines"), open_file(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DatasetError(f"{file} line {number}: found a {type(row).__name__}, expected an object")
            yield row


def _parquet_columns(file: Path) -> list[str]:
    from pyarrow import parquet

    with decoding(file, "not readable as Parquet"), file.open("rb") as opened:
        return list(parquet.read_schema(opened).names)


def _parquet_column(file: Path, column: str) -> Iterator[Any]:
    from pyarrow import parquet

    if column not in (columns := _parquet_columns(file)):
        raise DatasetError(f"{file}: no column {column!r}, found {_listed(columns)}")
    with (
        decoding(file, "not readable as Parquet"),
        file.open("rb") as opened,
        parquet.ParquetFile(opened) as table,
    ):
        for batch in table.iter_batches(columns=[column]):
            yield from batch[0].to_pylist()

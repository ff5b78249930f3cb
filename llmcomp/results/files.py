"""Rows as Parquet files: written whole or not at all, read with limits, joined from several folders.

What may not live here: what a row means (rows.py).
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llmcomp.atomic_write import write_beside, written_beside
from llmcomp.errors import Error, named, reason
from llmcomp.results.rows import CELL_KEY, MACHINE_COLUMNS, ROW_COLUMNS, TOKEN_BITS, check_doubles, check_rows

_FORMAT_KEY, _FORMAT = b"llmcomp.rows", b"4"
_FORMATS = (b"1", b"2", b"3", _FORMAT)
# Of one file; a cell has a row a chunk. A few bytes of Parquet may stand for any number of rows.
_ROWS_MAX = 1 << 22
# Read at a time where not all rows are held.
_BATCH_ROWS = 1 << 16


def _schema(has_token_bits: bool = False) -> pa.Schema:
    arrow = {"string": pa.string(), "Int64": pa.int64(), "int64": pa.int64(), "float64": pa.float64()}
    fields = [
        pa.field(name, arrow[dtype], metadata={b"unit": unit.encode()}) for name, (dtype, unit) in ROW_COLUMNS.items()
    ]
    if has_token_bits:
        fields.append(pa.field(TOKEN_BITS, pa.list_(pa.float32()), metadata={b"unit": b"bits of every token"}))
    return pa.schema(fields, metadata={_FORMAT_KEY: _FORMAT})


def rows_as_parquet(df: pd.DataFrame, metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of the file that `write_rows` writes."""
    rows = check_rows(df)
    schema = _schema(TOKEN_BITS in rows.columns)
    table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False)
    table = table.replace_schema_metadata(dict(metadata or {}) | {_FORMAT_KEY.decode(): _FORMAT.decode()})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


def write_rows(path: str | os.PathLike[str], df: pd.DataFrame, metadata: Mapping[str, str] | None = None) -> Path:
    """Checks the rows and writes them to a Parquet file that appears whole or not at all; returns its path.

    Only the columns of ROW_COLUMNS and TOKEN_BITS are written, their units and `metadata` in the file's metadata. The
    folder is made where it is missing. Written beside under another name, flushed to disk, then renamed over what was
    there. Error if it fails.
    """
    return write_file(path, rows_as_parquet(df, metadata))


def write_file(path: str | os.PathLike[str], content: bytes) -> Path:
    """What `rows_as_parquet` gave, as `write_rows` writes it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, content)
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read_rows(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The rows of one Parquet file, or of all *.parquet files below a folder (by name; hidden ones are not read).

    Error that names the file if one is damaged or holds something else, if there is none, or if a chunk occurs twice.
    """
    rows = pd.concat([_read_file(file) for file in row_files(path)], ignore_index=True)
    check_doubles(rows)
    return rows


def row_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that `read_rows` reads; Error if there is none."""
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
        if not files:
            raise Error(f"{path}: no *.parquet file in this folder")
        return files
    if os.path.exists(path):  # noqa: PTH110 - as above
        return [path]
    raise Error(f"{path}: no such file or folder")


def count_rows(path: str | os.PathLike[str]) -> int:
    """How many rows `read_rows` would read, by the ends of the files alone; errors as there."""
    return sum(read_footer(file)[1] for file in row_files(path))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The `metadata` that `write_rows` put into a file; Error if it is no readable Parquet file."""
    return read_footer(path)[0]


def read_footer(path: str | os.PathLike[str]) -> tuple[dict[str, str], int]:
    """The `metadata` that `write_rows` put into a file, and the number of its rows, without reading them."""
    with _reading(path), Path(path).open("rb") as file:
        footer = pq.read_metadata(file)
        found = footer.metadata or {}
        own = {key: value for key, value in found.items() if key not in (_FORMAT_KEY, b"ARROW:schema")}
        return {key.decode(): value.decode() for key, value in own.items()}, footer.num_rows


def read_columns(path: str | os.PathLike[str], columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of one Parquet file, unchecked but for their checksums; Error if it cannot be read."""
    with _opened(path) as parquet:
        return parquet.read(columns=list(columns)).replace_schema_metadata(None).to_pandas()


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever pyarrow and pandas run into with a file that is damaged or holds something else, as an `Error`."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 - Path's raise for long names
            raise Error(f"{path}: not a regular file")  # a pipe or a device might never end
        yield
    except Error:
        raise
    except Exception as error:
        raise Error(f"{path}: not a readable Parquet file ({reason(error)})") from error


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    # Opened here, not by name, so that a folder name with "=" is never taken for a partition column.
    check = {"page_checksum_verification": True}
    with _reading(path), Path(path).open("rb") as file, pq.ParquetFile(file, **check) as parquet:
        if parquet.metadata.num_rows > _ROWS_MAX:
            raise Error(f"{path}: {parquet.metadata.num_rows:,} rows, expected at most {_ROWS_MAX:,}")
        yield parquet


def _read_file(path: Path) -> pd.DataFrame:
    """The checked rows of one file."""
    with contextlib.closing(_batches(path, _ROWS_MAX)) as found:
        tables = list(found)
    try:
        with _reading(path):
            return check_rows(_as_frame(tables))
    except Error as error:
        text = str(error)
        raise Error(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None


def _batches(path: Path, n_rows: int, token_bits: bool = True) -> Generator[pa.Table]:
    """The rows of one file as tables of at most `n_rows` rows, unchecked but for their form; at least one table."""
    with _opened(path) as parquet:
        _check_form(parquet.schema_arrow, path)
        columns = [name for name in parquet.schema_arrow.names if token_bits or name != TOKEN_BITS]
        for batch in parquet.iter_batches(n_rows, columns=columns) if parquet.metadata.num_rows else ():
            batch.validate(full=True)  # damaged text is found here, not where it is first used
            yield pa.Table.from_batches([batch])
        if not parquet.metadata.num_rows:
            yield parquet.read(columns)


def _check_form(schema: pa.Schema, path: Path) -> None:
    found = (schema.metadata or {}).get(_FORMAT_KEY)
    if found not in _FORMATS:
        text = "no mark of llmcomp" if found is None else f"format {named(found.decode(errors='replace'))}"
        known = " or ".join(known.decode() for known in _FORMATS)
        raise Error(f"{path}: not a file of llmcomp's rows: found {text}, expected format {known}")
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        if ROW_COLUMNS.get(field.name, ("", ""))[0] == "string" and not is_text:
            raise Error(f"{path}: rows: column {field.name} is {kind}, expected string")


def _as_frame(tables: Sequence[pa.Table]) -> pd.DataFrame:
    # Without what pandas may have written about its own types: columns are what this module says.
    frames = [table.replace_schema_metadata(None).to_pandas() for table in tables]
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def merge_rows(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> tuple[Path, int]:
    """The rows of files and folders as one Parquet file, some ten thousand at a time; its path and how many there are.

    A cell that lies in several folders is taken once, where its rows are the same but for MACHINE_COLUMNS. Errors as of
    `read_rows`, and where `out` lies in one of the folders or cannot be written.
    """
    paths, out = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths), Path(out)
    for path in map(Path, paths):
        if path.resolve() in out.resolve().parents:
            raise Error(f"{out}: lies in {path}, where its rows would be read a second time: choose another place")
    files, seen, n_rows = _without_copies([file for path in paths for file in row_files(path)]), ChunksSeen(), 0
    schema = _schema(any(_has_token_bits(file) for file in files))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            written_beside(out) as file,
            pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
        ):
            for rows in checked_batches(files):
                seen.add(rows)
                n_rows += len(rows)
                if n_rows > _ROWS_MAX:
                    raise Error(f"{out}: more than {_ROWS_MAX:,} rows, which is the most that one file may have")
                if TOKEN_BITS in schema.names and TOKEN_BITS not in rows:
                    rows[TOKEN_BITS] = None
                writer.write_table(pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False))
    except OSError as error:
        raise Error(f"cannot write {out}: {error.strerror or error}") from error
    return out, n_rows


def _has_token_bits(file: Path) -> bool:
    with _opened(file) as parquet:
        return TOKEN_BITS in parquet.schema_arrow.names


def _without_copies(files: Sequence[Path]) -> list[Path]:
    found: dict[str, Path] = {}
    for file in files:
        first = found.setdefault(file.name, file)
        if first is not file:
            one, other = (_read_file(path).drop(columns=list(MACHINE_COLUMNS)) for path in (first, file))
            if not one.equals(other):
                raise Error(f"{first} and {file} are of one name and hold other rows")
    return list(found.values())


def checked_batches(files: Sequence[Path], token_bits: bool = True) -> Iterator[pd.DataFrame]:
    """The rows of the files, in their order, about _BATCH_ROWS at a time, of several files or of a part of one."""
    tables: list[pa.Table] = []
    names: list[Path] = []
    n_rows = 0
    for file in files:
        for table in _batches(file, _BATCH_ROWS, token_bits):
            tables.append(table)
            names.append(file)
            n_rows += table.num_rows
            if n_rows >= _BATCH_ROWS:
                yield _checked(tables, names)
                tables, names, n_rows = [], [], 0
    if tables:
        yield _checked(tables, names)


def _checked(tables: Sequence[pa.Table], names: Sequence[Path]) -> pd.DataFrame:
    try:
        return check_rows(_as_frame(tables))
    except Error:
        # Which of the files it is.
        for name, table in zip(names, tables, strict=True):
            try:
                check_rows(_as_frame([table]))
            except Error as error:
                raise Error(f"{name}: {error}") from None
        raise


class ChunksSeen:
    """The chunks of every cell as runs of numbers, to find one that occurs twice without keeping all of them."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, ...], list[tuple[int, int]]] = {}

    def add(self, rows: pd.DataFrame) -> None:
        groups = rows.groupby(list(CELL_KEY), dropna=False, sort=False)
        cell, chunk = groups.ngroup().to_numpy(), rows["chunk"].to_numpy()
        order = np.lexsort((chunk, cell))
        cell, chunk = cell[order], chunk[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(cell) != 0) | (np.diff(chunk) != 1)])
        ends = np.r_[starts[1:], len(chunk)] - 1
        keys = [tuple(map(str, key)) for key in rows.iloc[order[starts]][list(CELL_KEY)].itertuples(index=False)]
        for key, first, last in zip(keys, chunk[starts].tolist(), chunk[ends].tolist(), strict=True):
            runs = self._runs.setdefault(key, [])
            if any(first <= other_last and other_first <= last for other_first, other_last in runs):
                text = ", ".join(f"{name} {value!r}" for name, value in zip(CELL_KEY, key, strict=True) if value)
                raise Error(f"rows: a chunk of {first} to {last} of {text} occurs more than once")
            runs.append((first, last))

"""The row (one scored chunk), its columns and units; cells made of rows; Parquet files; the published cells.

What may not live here: scoring, fitting, drawing; this module knows tables and files only.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.types import union_categoricals

from llmcomp.atomic_write import write_beside, written_beside
from llmcomp.errors import Error, named, reason

PROTOCOLS = ("lossless", "published")
STREAM_CHUNK = -1  # the chunk number of a row that covers all chunks of a data set as one stream (baselines)

# name: (pandas dtype, unit and meaning). Strings are never null ("" where they do not apply); "Int64" may be null.
ROW_COLUMNS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "model": ("string", "name of the model or of the baseline compressor"),
        "params": ("Int64", "all parameters, embeddings included, tied weights once; null for a baseline"),
        "n_params_nonembedding": ("Int64", "parameters without input and output embedding; null where unknown"),
        "step": ("Int64", "training steps of the model; null where unknown or for a baseline"),
        "tokens_seen": ("Int64", "tokens that the model was trained on by then; null where no suite states them"),
        "flops": ("float64", "operations of training, 6 params tokens_seen; NaN where tokens_seen is null"),
        "flops_exact": ("float64", "operations of training, counted by shape (models/counts.py); NaN where unknown"),
        "seed": ("Int64", "seed of the training run; null where no suite states it"),
        "dataset": ("string", "name of the data set"),
        "modality": ("string", "text, image, speech, or the name that its owner gave it"),
        "data_sha256": ("string", 'of the first chunk, 16 digits: tells data of one name apart; "" if not recorded'),
        "draw": ("string", 'how chunks were chosen: spread (by draw_seed, over all) or first; "" where not recorded'),
        "draw_seed": ("Int64", "seed of what was drawn; null where nothing was, or not recorded"),
        "chunk_bytes": ("Int64", "bytes that chunks were cut to; null for whole documents, or where not recorded"),
        "protocol": ("string", "lossless: real payload bytes that decode; published: the published sum of -log2 p"),
        "mapping": ("string", 'bytes-to-tokens mapping: bytes, latin1, shift or ascii; "" for a baseline'),
        "chunk": ("int64", "number of the chunk in its data set, from 0; -1: all chunks as one stream"),
        "document": ("string", 'file, picture, utterance or row that the chunk is of; "" where not recorded'),
        "offset": ("Int64", "bytes before the chunk in its document; null where it has no place, or not recorded"),
        "bytes_in": ("int64", "bytes of the chunk"),
        "bytes_scored": ("int64", "bytes of the chunk that the bits account for; bytes_in unless chunks are cut"),
        "tokens": ("Int64", "tokens whose bits were counted or coded; null for a baseline"),
        "ideal_bits": ("float64", "bits: sum of -log2 p over the tokens; NaN for a baseline that has no p"),
        "coded_bytes": ("Int64", "bytes of the payload that decodes; null under the published protocol"),
        "side_bits": ("int64", "bits that the mapping stores beside the payload; 0 under the published protocol"),
        "ratio": ("float64", "(8 coded_bytes + side_bits) / (8 bytes_in); published: ideal_bits / (8 bytes_in)"),
        "bits_per_byte": ("float64", "8 ratio: coded bits, or the published sum, over bytes_in"),
        "bits_per_token": ("float64", "the same bits over tokens; NaN where there are none"),
        "seconds": ("float64", "seconds of wall clock spent on the chunk, its share of a batch; NaN if not measured"),
        "engine": ("string", "exact, exact-int8, torch, or the baseline's library and version"),
        "backend": ("string", "backend of the coder: serial, avx2, ..."),
        "device": ("string", "cpu, cuda:0, ..."),
        "dtype": ("string", "type of the weights in use: float32, float16, bfloat16, int8"),
        "attention": ("string", "of the torch engine: sdpa or eager; \"\" where there is no choice"),
        "batch_rows": ("Int64", "rows (tokens, padding included) that a batch had at most; null without batches"),
        "weights_sha256": ("string", "SHA-256 of the weights, hexadecimal"),
        "commit": ("string", 'commit of the model on the hub; "" where it is not from there'),
        "version": ("string", "version of llmcomp that made the row"),
    }
)  # fmt: skip

# What tells one cell from another. Backend and version do not: equal cells from two of them are the same cell twice.
CELL_KEY = (
    "model", "params", "step", "dataset", "modality", "protocol", "mapping",
    "data_sha256", "draw", "draw_seed", "chunk_bytes", "engine", "device", "dtype", "attention", "weights_sha256",
)  # fmt: skip

# Columns that say where a row was made and how fast. With the exact engines all others are the same, to the last bit,
# whichever machines and however many workers made the table; with the torch engine the numbers depend on these.
MACHINE_COLUMNS = ("seconds", "backend", "device", "batch_rows")

# What is known of a cell's model beside: it follows from the key, and older rows do not have it.
CELL_FACTS = ("n_params_nonembedding", "tokens_seen", "flops", "flops_exact", "seed", "commit")

# name: (pandas dtype, unit and meaning), the columns of `cells`.
CELL_COLUMNS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {name: ROW_COLUMNS[name] for name in ROW_COLUMNS if name in (*CELL_KEY, *CELL_FACTS)}
    | {
        "unit": ("string", "chunk: every chunk was compressed alone; stream: all as one stream"),
        "chunks": ("int64", "chunks in the cell; 1 for a stream"),
        "bytes_in": ("int64", "bytes of all chunks"),
        "bytes_scored": ("Int64", "bytes that the bits account for; null where not recorded"),
        "covered": ("float64", "bytes_scored / bytes_in; NaN where not recorded"),
        "tokens": ("Int64", "tokens of all chunks"),
        "ideal_bits": ("float64", "bits, sum"),
        "coded_bytes": ("Int64", "bytes, sum"),
        "side_bits": ("Int64", "bits, sum"),
        "ratio": ("float64", "all coded bits over all bits in"),
        "bits_per_byte": ("float64", "8 ratio"),
        "bits_per_token": ("float64", "all coded bits over all tokens; NaN where tokens are not known"),
        "mean_ratio": ("float64", "mean of the chunks' ratios"),
        "ratio_std": ("float64", "standard deviation of the chunks' ratios; NaN for one chunk"),
        "stderr": ("float64", "standard error of mean_ratio that knows which chunks are neighbours (`clusters`)"),
        "clusters": ("Int64", "parts of the chunks that stderr takes for independent; an interval has one fewer df"),
        "seconds": ("float64", "seconds, sum"),
    }
)

_FORMAT_KEY, _FORMAT = b"llmcomp.rows", b"4"
# Columns that a format added to the one before, and what they are in older tables.
_FORMATS = (b"1", b"2", b"3", _FORMAT)
_ADDED: Mapping[str, Any] = {
    "attention": "", "batch_rows": pd.NA,
    "n_params_nonembedding": pd.NA, "tokens_seen": pd.NA, "flops": math.nan, "flops_exact": math.nan, "seed": pd.NA,
    "commit": "",
    "data_sha256": "", "draw": "", "draw_seed": pd.NA, "chunk_bytes": pd.NA,
    "document": "", "offset": pd.NA, "clusters": pd.NA,
}  # fmt: skip
# Fewer clusters say too little of how they differ.
_CLUSTERS_MIN = 10
# Columns that follow from others: computed, whatever a table says.
_DERIVED = ("bits_per_byte", "bits_per_token")
# A column that rows may have beside: -log2 p of each token, float32, where `score(token_bits=True)` was asked for it.
TOKEN_BITS = "token_bits"
# Of one file; a cell has a row a chunk. A few bytes of Parquet may stand for any number of rows.
_ROWS_MAX = 1 << 22
# Read at a time where not all rows are held.
_BATCH_ROWS = 1 << 16
_NOT_NULL = (*(name for name, (dtype, _) in ROW_COLUMNS.items() if dtype == "int64"), "ratio")


def empty_rows() -> pd.DataFrame:
    """A table of rows with every column of ROW_COLUMNS in its dtype, and no row."""
    return pd.DataFrame({name: pd.Series([], dtype=dtype) for name, (dtype, _) in ROW_COLUMNS.items()})


def check_rows(df: pd.DataFrame) -> pd.DataFrame:
    """The table with its columns in order and in their dtypes, or Error that names the column, the row and the fault.

    Columns that ROW_COLUMNS does not know are kept behind the others; those that older formats lack are
    filled in. Checked: all columns there, dtypes, no missing value where none may be, known protocol,
    bytes_scored <= bytes_in, ratio equal to its bits (to 1e-9), no doubles.
    """
    if not isinstance(df, pd.DataFrame):
        raise Error(f"rows: expected a pandas.DataFrame, found {type(df).__name__}")
    if not df.columns.is_unique:
        raise Error(f"rows: two columns are called {df.columns[df.columns.duplicated()][0]!r}")
    df = _with_added(df)
    missing = [name for name in ROW_COLUMNS if name not in df.columns and name not in _DERIVED]
    if missing:
        raise Error(f"rows: missing column(s) {', '.join(missing)}")
    extra = [name for name in df.columns if name not in ROW_COLUMNS]
    rows = df.drop(columns=list(_DERIVED), errors="ignore").reset_index(drop=True)
    for name, (dtype, _) in ROW_COLUMNS.items():
        if name not in _DERIVED:
            rows[name] = _as_dtype(rows[name], dtype)
    if TOKEN_BITS in extra:
        rows[TOKEN_BITS] = _checked_token_bits(rows[TOKEN_BITS])
    _check_values(rows)
    _check_doubles(rows)
    return _with_bits(rows)[[*ROW_COLUMNS, *extra]]


def _checked_token_bits(column: pd.Series) -> pd.Series:
    """Float32 arrays, None where a row has none."""
    found: list[np.ndarray | None] = []
    for number, value in enumerate(column):
        if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
            found.append(None)
            continue
        try:
            bits = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            bits = np.empty((0, 0), np.float32)
        if bits.ndim != 1:
            raise Error(f"rows: column {TOKEN_BITS} is no array of numbers in row {number}")
        found.append(bits)
    return pd.Series(found, column.index, dtype=object)


def _with_bits(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns that follow from others."""
    bits = 8.0 * table["ratio"] * table["bytes_in"]
    tokens = table["tokens"].astype("Float64").astype("float64")
    return table.assign(bits_per_byte=8.0 * table["ratio"], bits_per_token=bits / tokens.where(tokens > 0))


def _with_added(df: pd.DataFrame, columns: Mapping[str, Any] = ROW_COLUMNS) -> pd.DataFrame:
    added = {name: value for name, value in _ADDED.items() if name in columns and name not in df.columns}
    return df.assign(**{name: pd.Series(value, df.index, columns[name][0]) for name, value in added.items()})


def _as_dtype(column: pd.Series, dtype: Any) -> pd.Series:
    if column.name in _NOT_NULL and column.isna().any():
        raise Error(f"rows: column {column.name} has no value in row {int(column.isna().to_numpy().argmax())}")
    try:
        if dtype == "string":
            return column.astype("string").fillna("")
        if dtype == "int64":  # by way of Int64, which refuses 0.5 where int64 would cut it to 0
            with np.errstate(invalid="ignore"):
                column = column.astype("Int64")
        with np.errstate(invalid="ignore"):
            return column.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise Error(f"rows: column {column.name} is not {dtype}: {reason(error)}") from None


def _check_values(rows: pd.DataFrame) -> None:
    def refuse(bad: pd.Series | np.ndarray, what: str) -> None:
        wrong = np.asarray(bad, dtype=bool)
        if wrong.any():
            row = rows.iloc[int(wrong.argmax())]
            where = f"model {row['model']!r}, step {row['step']}, data set {row['dataset']!r}, chunk {row['chunk']}"
            raise Error(f"rows: {what}: {where}")

    bytes_in, scored, ratio = rows["bytes_in"], rows["bytes_scored"], rows["ratio"]
    refuse(~rows["protocol"].isin(PROTOCOLS), f"protocol is not one of {', '.join(PROTOCOLS)}")
    refuse(bytes_in <= 0, "bytes_in is not above 0")
    refuse((scored < 0) | (scored > bytes_in), "bytes_scored is not in 0 ... bytes_in")
    refuse(rows["chunk"] < STREAM_CHUNK, "chunk is below -1")
    refuse((rows["params"] <= 0).fillna(False), "params is not above 0")
    refuse((rows["step"] < 0).fillna(False), "step is below 0")
    refuse((rows["tokens_seen"] < 0).fillna(False), "tokens_seen is below 0")
    refuse((rows["n_params_nonembedding"] > rows["params"]).fillna(False), "n_params_nonembedding is above params")
    refuse(~np.isfinite(ratio) | (ratio < 0), "ratio is not a number of at least 0")
    lossless = rows["protocol"] == "lossless"
    refuse(lossless & rows["coded_bytes"].isna(), "a lossless row without coded_bytes")
    refuse(~lossless & rows["ideal_bits"].isna(), "a published row without ideal_bits")
    coded_bits = 8.0 * rows["coded_bytes"].astype("float64") + rows["side_bits"]
    expected = coded_bits.where(lossless, rows["ideal_bits"]) / (8.0 * bytes_in)
    refuse(~np.isclose(ratio, expected, rtol=1e-9, atol=1e-12), "ratio differs from its bits over the bits in")


def _check_doubles(rows: pd.DataFrame) -> None:
    doubled = rows.duplicated([*CELL_KEY, "chunk"])
    if doubled.any():
        row = rows[doubled].iloc[0]
        raise Error(
            f"rows: chunk {row['chunk']} of model {row['model']!r}, step {row['step']}, data set {row['dataset']!r}, "
            f"protocol {row['protocol']}, mapping {row['mapping'] or 'none'} occurs more than once"
        )


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
    _check_doubles(rows)
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
        told = str(error)
        raise Error(told if told.startswith(f"{path}: ") else f"{path}: {told}") from None


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
        told = "no mark of llmcomp" if found is None else f"format {named(found.decode(errors='replace'))}"
        known = " or ".join(known.decode() for known in _FORMATS)
        raise Error(f"{path}: not a file of llmcomp's rows: found {told}, expected format {known}")
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        if ROW_COLUMNS.get(field.name, ("", ""))[0] == "string" and not is_text:
            raise Error(f"{path}: rows: column {field.name} is {kind}, expected string")


def _as_frame(tables: Sequence[pa.Table]) -> pd.DataFrame:
    # Without what pandas may have written about its own types: columns are what this module says.
    frames = [table.replace_schema_metadata(None).to_pandas() for table in tables]
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def is_cells(df: pd.DataFrame) -> bool:
    """Whether the table has one row a cell already (as from `cells` and `published`), not one a chunk."""
    return "chunk" not in df.columns and "chunks" in df.columns


def cells(df: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, columns CELL_COLUMNS; rows of chunks and rows of one stream give separate cells.

    `ratio` weighs bytes alike (all coded bits over all bits in); `mean_ratio` and `stderr` weigh chunks alike.
    A table of cells is returned as it is. Sorted by data set, protocol, mapping, params, model, step.
    """
    if is_cells(df):
        return _check_cells(df)
    return _cells_of_sums(_sums(check_rows(df)))


def read_cells(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> pd.DataFrame:
    """`cells(read_rows(path))` of any number of rows, some ten thousand at a time; also of several files or folders.

    Errors as of `read_rows`. Sums of a cell whose rows are read in several parts may differ in the last bit.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    files = [file for one in paths for file in row_files(one)]
    sums, seen = [], _ChunksSeen()
    for rows in _checked_batches(files, token_bits=False):
        part = _sums(rows)
        seen.add(rows)
        sums.append(part)
    return _cells_of_sums(_added_up(sums))


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
    files, seen, n_rows = _without_copies([file for path in paths for file in row_files(path)]), _ChunksSeen(), 0
    schema = _schema(any(_has_token_bits(file) for file in files))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            written_beside(out) as file,
            pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
        ):
            for rows in _checked_batches(files):
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


def _checked_batches(files: Sequence[Path], token_bits: bool = True) -> Iterator[pd.DataFrame]:
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


class _ChunksSeen:
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
                told = ", ".join(f"{name} {value!r}" for name, value in zip(CELL_KEY, key, strict=True) if value)
                raise Error(f"rows: a chunk of {first} to {last} of {told} occurs more than once")
            runs.append((first, last))


_SUMMED = ("bytes_in", "bytes_scored", "side_bits", "coded_bits")
# A sum is known only where every one of its parts is.
_SUMMED_IF_ALL = ("tokens", "ideal_bits", "coded_bytes", "seconds")


def _sums(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a cell of checked rows: what can be added up over parts of the cell."""
    rows["unit"] = pd.Series(
        np.where(rows["chunk"] == STREAM_CHUNK, "stream", "chunk"), dtype="string", index=rows.index
    )
    rows["coded_bits"] = rows["ratio"] * (8.0 * rows["bytes_in"])
    groups = rows.groupby([*CELL_KEY, "unit"], dropna=False, sort=False)
    sums = groups[list(_SUMMED)].sum()
    for name in _SUMMED_IF_ALL:
        sums[name] = groups[name].sum().where(groups[name].count() == groups.size())
    for name in CELL_FACTS:
        sums[name] = groups[name].first()
    sums["chunks"] = groups.size()
    sums["mean_ratio"] = groups["ratio"].mean()
    sums["squares"] = groups["ratio"].var(ddof=0) * sums["chunks"]
    sums["places"] = pd.Series([_places(cell) for _, cell in groups], sums.index, dtype=object)
    return sums.reset_index()


def _places(rows: pd.DataFrame) -> pd.DataFrame | None:
    """What clusters are made of; None where a document is not recorded, so that every chunk is a cluster."""
    if (rows["document"] == "").any():
        return None
    offset = rows["offset"].fillna(0).astype("int64")
    document = rows["document"].astype("category")
    return pd.DataFrame({"ratio": rows["ratio"], "chunk": rows["chunk"], "offset": offset, "document": document})


def _joined(places: Sequence[pd.DataFrame | None]) -> pd.DataFrame | None:
    """The places of a cell, of those of its parts."""
    found = [part for part in places if part is not None]
    if len(found) < len(places):
        return None
    document = union_categoricals([part["document"] for part in found])
    return pd.concat([part.drop(columns="document") for part in found], ignore_index=True).assign(document=document)


def _added_up(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Sums of parts of cells to sums of cells; means and squared deviations as by Chan, Golub and LeVeque (1979)."""
    table = pd.concat(parts, ignore_index=True)
    key = [*CELL_KEY, "unit"]
    if not table.duplicated(key).any():
        return table
    table["ratios"] = table["mean_ratio"] * table["chunks"]
    groups = table.groupby(key, dropna=False, sort=False)
    sums = groups[[*_SUMMED, "chunks", "ratios"]].sum()
    for name in _SUMMED_IF_ALL:
        sums[name] = groups[name].sum().where(groups[name].count() == groups.size())
    for name in CELL_FACTS:
        sums[name] = groups[name].first()
    sums["mean_ratio"] = sums.pop("ratios") / sums["chunks"]
    mean = groups["ratios"].transform("sum") / groups["chunks"].transform("sum")
    table["squares"] += table["chunks"] * (table["mean_ratio"] - mean) ** 2
    sums["squares"] = table.groupby(key, dropna=False, sort=False)["squares"].sum()
    sums["places"] = pd.Series([_joined(list(parts)) for _, parts in groups["places"]], sums.index, dtype=object)
    return sums.reset_index()


def _cells_of_sums(sums: pd.DataFrame) -> pd.DataFrame:
    n_chunks = sums["chunks"]
    sums["ratio"] = sums["coded_bits"] / (8.0 * sums["bytes_in"])
    sums["ratio_std"] = np.sqrt(sums["squares"] / (n_chunks - 1).where(n_chunks > 1))
    sums["stderr"], sums["clusters"] = sums["ratio_std"] / np.sqrt(n_chunks), n_chunks
    for cell, places in sums["places"].items():
        if places is not None:
            sums.loc[cell, ["stderr", "clusters"]] = _standard_error(places)
    sums["covered"] = sums["bytes_scored"] / sums["bytes_in"]
    return _as_cells(sums)


def cluster_of(rows: pd.DataFrame) -> np.ndarray:
    """For every row of one cell the number of its cluster: chunks of one resemble one another, those of two do not.

    A cluster is a document where there are ten or more (pictures, utterances, files, rows). Of fewer, long ones the
    chunks are put in order, and about sqrt(n) stretches of neighbours, ten or more, are a cluster each. Where documents
    are not recorded, or of fewer than 20 chunks, every chunk is one.
    """
    n = len(rows)
    documents = rows["document"].to_numpy(str)
    _, numbers = np.unique(documents, return_inverse=True)
    if (documents == "").any() or (n_documents := numbers.max(initial=0) + 1) < _CLUSTERS_MIN > n // 2:
        return np.arange(n)
    if n_documents >= _CLUSTERS_MIN:
        return numbers
    order = np.lexsort((rows["chunk"], rows["offset"].fillna(0).to_numpy(np.int64), numbers))
    clusters = np.empty(n, np.int64)
    clusters[order] = np.arange(n) * max(_CLUSTERS_MIN, math.isqrt(n)) // n
    return clusters


def _standard_error(rows: pd.DataFrame) -> tuple[float, int]:
    """Of the mean of the chunks' ratios, and the number of clusters: sqrt(G / (G - 1) sum of (cluster's sum of
    deviations)^2) / n, which is ratio_std / sqrt(n) where every chunk is a cluster (Liang and Zeger 1986)."""
    ratio = rows["ratio"].to_numpy(float)
    clusters = cluster_of(rows)
    sums = np.bincount(clusters, ratio - ratio.mean())
    n_clusters = len(sums)
    if n_clusters < 2:
        return math.nan, n_clusters
    return math.sqrt(n_clusters / (n_clusters - 1) * float(sums @ sums)) / len(ratio), n_clusters


def _as_cells(table: pd.DataFrame) -> pd.DataFrame:
    table = _with_bits(table)[list(CELL_COLUMNS)].astype({name: dtype for name, (dtype, _) in CELL_COLUMNS.items()})
    order = ["dataset", "protocol", "mapping", "params", "model", "step", "unit"]
    return table.sort_values(order, na_position="last", kind="stable", ignore_index=True)


def _check_cells(df: pd.DataFrame) -> pd.DataFrame:
    df = _with_added(df, CELL_COLUMNS)
    missing = [name for name in CELL_COLUMNS if name not in df.columns and name not in _DERIVED]
    if missing:
        raise Error(f"cells: missing column(s) {', '.join(missing)}")
    return _with_bits(df)


def published(baseline: bool = False) -> pd.DataFrame:
    """The 75 published cells as a table of cells (CELL_COLUMNS): 5 Pythia sizes x 5 checkpoints x 3 data sets.

    Source: R. Bharadwaj, "Compression Scaling Laws for Transformer Compressors Across Modalities" (2025), the result
    files of its code. `params` are the nominal sizes (70e6 ... 1.4e9), `step` is training steps, protocol "published",
    2,048 bytes a chunk. What was not published (tokens, covered bytes) is null; ideal_bits follow from the ratio.
    With `baseline`, one more cell a data set where it was published: the mean over chunks of its random (Dirichlet)
    model, `params` and `step` null (`baselines.RandomDirichlet` has it for any chunks). The one called ImageNet's is of
    pictures that the baseline's program generated, not of ImageNet.
    """
    with resources.files(__package__).joinpath("published.csv").open("r", encoding="utf-8") as file:
        raw = pd.read_csv(file, dtype={"params": "Int64", "step": "Int64"}, comment="#")
    table = raw if baseline else raw[raw["params"].notna()]
    absent: Any = pd.NA
    table = table.assign(
        protocol="published",
        mapping="ascii",
        engine="",
        device="",
        dtype="",
        attention="",
        weights_sha256="",
        **{name: _ADDED[name] for name in ("data_sha256", "draw", "draw_seed", "clusters")},
        chunk_bytes=2048,
        **{name: _ADDED[name] for name in CELL_FACTS},
        unit="chunk",
        bytes_in=2048 * table["chunks"],
        bytes_scored=absent,
        covered=math.nan,
        tokens=absent,
        ideal_bits=8.0 * 2048 * table["chunks"] * table["ratio"],
        coded_bytes=absent,
        side_bits=0,
        mean_ratio=table["ratio"],
        stderr=table["ratio_std"] / np.sqrt(table["chunks"]),
        seconds=60.0 * table["minutes"],
    )
    return _as_cells(table)

"""The row (one scored chunk), its columns and units; cells made of rows; Parquet files; the published cells.

What may not live here: scoring, fitting, drawing; this module knows tables and files only.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llmcomp.atomic_write import written_beside
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
        "modality": ("string", "text, image or speech"),
        "protocol": ("string", "lossless: real payload bytes that decode; published: the published sum of -log2 p"),
        "mapping": ("string", 'bytes-to-tokens mapping: bytes, latin1, shift or ascii; "" for a baseline'),
        "chunk": ("int64", "number of the chunk in its data set, from 0; -1: all chunks as one stream"),
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
    "engine", "device", "dtype", "attention", "weights_sha256",
)  # fmt: skip

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
        "stderr": ("float64", "standard error of mean_ratio: ratio_std / sqrt(chunks)"),
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
}  # fmt: skip
# Columns that follow from others: computed, whatever a table says.
_DERIVED = ("bits_per_byte", "bits_per_token")
# A column that rows may have beside: -log2 p of each token, float32, where `score(token_bits=True)` was asked for it.
TOKEN_BITS = "token_bits"
# Of one file; a cell has a row a chunk. A few bytes of Parquet may stand for any number of rows.
_ROWS_MAX = 1 << 22
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
    return df.assign(**{name: pd.Series(value, df.index, ROW_COLUMNS[name][0]) for name, value in added.items()})


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


def write_rows(path: str | os.PathLike[str], df: pd.DataFrame, metadata: Mapping[str, str] | None = None) -> Path:
    """Checks the rows and writes them to a Parquet file that appears whole or not at all; returns its path.

    Only the columns of ROW_COLUMNS and TOKEN_BITS are written, their units and `metadata` in the file's metadata. The
    folder is made where it is missing. Written beside under another name, flushed to disk, then renamed over what was
    there. Error if it fails.
    """
    path = Path(path)
    rows = check_rows(df)
    schema = _schema(TOKEN_BITS in rows.columns)
    table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False)
    table = table.replace_schema_metadata(dict(metadata or {}) | {_FORMAT_KEY.decode(): _FORMAT.decode()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read_rows(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The rows of one Parquet file, or of all *.parquet files below a folder (by name; hidden ones are not read).

    Error that names the file if one is damaged or holds something else, if there is none, or if a chunk occurs twice.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
        if not files:
            raise Error(f"{path}: no *.parquet file in this folder")
    elif os.path.exists(path):  # noqa: PTH110 - as above
        files = [path]
    else:
        raise Error(f"{path}: no such file or folder")
    rows = pd.concat([_read_file(file) for file in files], ignore_index=True)
    _check_doubles(rows)
    return rows


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The `metadata` that `write_rows` put into a file; Error if it is no readable Parquet file."""
    with _reading(path), Path(path).open("rb") as file:
        found = pq.read_schema(file).metadata or {}
        return {key.decode(): value.decode() for key, value in found.items() if key != _FORMAT_KEY}


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


def _read_file(path: Path) -> pd.DataFrame:
    # Opened here, not by name, so that a folder name with "=" is never taken for a partition column.
    with _reading(path), path.open("rb") as file:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            if parquet.metadata.num_rows > _ROWS_MAX:
                raise Error(f"{path}: {parquet.metadata.num_rows:,} rows, expected at most {_ROWS_MAX:,}")
            table = parquet.read()
        table.validate(full=True)  # damaged text is found here, not where it is first used
        # Without what pandas may have written about its own types: columns are what this module says.
        rows = table.replace_schema_metadata(None).to_pandas()
    found = (table.schema.metadata or {}).get(_FORMAT_KEY)
    if found not in _FORMATS:
        told = "no mark of llmcomp" if found is None else f"format {named(found.decode(errors='replace'))}"
        known = " or ".join(known.decode() for known in _FORMATS)
        raise Error(f"{path}: not a file of llmcomp's rows: found {told}, expected format {known}")
    for field in table.schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        if ROW_COLUMNS.get(field.name, ("", ""))[0] == "string" and not is_text:
            raise Error(f"{path}: rows: column {field.name} is {kind}, expected string")
    try:
        with _reading(path):
            return check_rows(rows)
    except Error as error:
        told = str(error)
        raise Error(told if told.startswith(f"{path}: ") else f"{path}: {told}") from None


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
    rows = check_rows(df)
    rows["unit"] = pd.Series(
        np.where(rows["chunk"] == STREAM_CHUNK, "stream", "chunk"), dtype="string", index=rows.index
    )
    rows["coded_bits"] = rows["ratio"] * (8.0 * rows["bytes_in"])
    groups = rows.groupby([*CELL_KEY, "unit"], dropna=False, sort=False)
    sums = groups[["bytes_in", "bytes_scored", "side_bits", "coded_bits"]].sum()
    # A sum is known only where every one of its parts is.
    for name in ("tokens", "ideal_bits", "coded_bytes", "seconds"):
        sums[name] = groups[name].sum().where(groups[name].count() == groups.size())
    for name in CELL_FACTS:
        sums[name] = groups[name].first()
    sums["chunks"] = groups.size()
    sums["ratio"] = sums["coded_bits"] / (8.0 * sums["bytes_in"])
    sums["mean_ratio"] = groups["ratio"].mean()
    sums["ratio_std"] = groups["ratio"].std(ddof=1)
    sums["stderr"] = sums["ratio_std"] / np.sqrt(sums["chunks"])
    sums["covered"] = sums["bytes_scored"] / sums["bytes_in"]
    return _as_cells(sums.reset_index())


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

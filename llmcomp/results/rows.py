"""The row (one scored chunk): its columns, their units and meaning, and what a table of rows has to be.

What may not live here: files (files.py), cells made of rows (cells.py), scoring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from llmcomp.errors import Error, reason

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

# Columns that a format of files added to the one before, and what they are in older tables.
ADDED: Mapping[str, Any] = {
    "attention": "", "batch_rows": pd.NA,
    "n_params_nonembedding": pd.NA, "tokens_seen": pd.NA, "flops": math.nan, "flops_exact": math.nan, "seed": pd.NA,
    "commit": "",
    "data_sha256": "", "draw": "", "draw_seed": pd.NA, "chunk_bytes": pd.NA,
    "document": "", "offset": pd.NA, "clusters": pd.NA,
}  # fmt: skip
# Columns that follow from others: computed, whatever a table says.
DERIVED = ("bits_per_byte", "bits_per_token")
# A column that rows may have beside: -log2 p of each token, float32, where `score(token_bits=True)` was asked for it.
TOKEN_BITS = "token_bits"
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
    df = with_added(df)
    missing = [name for name in ROW_COLUMNS if name not in df.columns and name not in DERIVED]
    if missing:
        raise Error(f"rows: missing column(s) {', '.join(missing)}")
    extra = [name for name in df.columns if name not in ROW_COLUMNS]
    rows = df.drop(columns=list(DERIVED), errors="ignore").reset_index(drop=True)
    for name, (dtype, _) in ROW_COLUMNS.items():
        if name not in DERIVED:
            rows[name] = _as_dtype(rows[name], dtype)
    if TOKEN_BITS in extra:
        rows[TOKEN_BITS] = _checked_token_bits(rows[TOKEN_BITS])
    _check_values(rows)
    check_doubles(rows)
    return with_bits(rows)[[*ROW_COLUMNS, *extra]]


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


def with_bits(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns that follow from others."""
    bits = 8.0 * table["ratio"] * table["bytes_in"]
    tokens = table["tokens"].astype("Float64").astype("float64")
    return table.assign(bits_per_byte=8.0 * table["ratio"], bits_per_token=bits / tokens.where(tokens > 0))


def with_added(df: pd.DataFrame, columns: Mapping[str, Any] = ROW_COLUMNS) -> pd.DataFrame:
    added = {name: value for name, value in ADDED.items() if name in columns and name not in df.columns}
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


def check_doubles(rows: pd.DataFrame) -> None:
    doubled = rows.duplicated([*CELL_KEY, "chunk"])
    if doubled.any():
        row = rows[doubled].iloc[0]
        raise Error(
            f"rows: chunk {row['chunk']} of model {row['model']!r}, step {row['step']}, data set {row['dataset']!r}, "
            f"protocol {row['protocol']}, mapping {row['mapping'] or 'none'} occurs more than once"
        )

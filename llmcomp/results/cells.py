"""Cells made of rows: sums, means, and standard errors that know which chunks are neighbours; the published cells.

What may not live here: fitting, drawing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from llmcomp.errors import Error
from llmcomp.results.files import ChunksSeen, checked_batches, row_files
from llmcomp.results.rows import (
    ADDED,
    CELL_FACTS,
    CELL_KEY,
    DERIVED,
    ROW_COLUMNS,
    STREAM_CHUNK,
    check_rows,
    with_added,
    with_bits,
)

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

# Fewer clusters say too little of how they differ.
_CLUSTERS_MIN = 10


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
    sums, seen = [], ChunksSeen()
    for rows in checked_batches(files, token_bits=False):
        part = _sums(rows)
        seen.add(rows)
        sums.append(part)
    return _cells_of_sums(_added_up(sums))


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
    table = with_bits(table)[list(CELL_COLUMNS)].astype({name: dtype for name, (dtype, _) in CELL_COLUMNS.items()})
    order = ["dataset", "protocol", "mapping", "params", "model", "step", "unit"]
    return table.sort_values(order, na_position="last", kind="stable", ignore_index=True)


def _check_cells(df: pd.DataFrame) -> pd.DataFrame:
    df = with_added(df, CELL_COLUMNS)
    missing = [name for name in CELL_COLUMNS if name not in df.columns and name not in DERIVED]
    if missing:
        raise Error(f"cells: missing column(s) {', '.join(missing)}")
    return with_bits(df)


def published(baseline: bool = False) -> pd.DataFrame:
    """The 75 published cells as a table of cells (CELL_COLUMNS): 5 Pythia sizes x 5 checkpoints x 3 data sets.

    Source: R. Bharadwaj, "Compression Scaling Laws for Transformer Compressors Across Modalities" (2025), the result
    files of its code. `params` are the nominal sizes (70e6 ... 1.4e9), `step` is training steps, protocol "published",
    2,048 bytes a chunk. What was not published (tokens, covered bytes) is null; ideal_bits follow from the ratio.
    With `baseline`, one more cell a data set where it was published: the mean over chunks of its random (Dirichlet)
    model, `params` and `step` null (`baselines.RandomDirichlet` has it for any chunks). The one called ImageNet's is of
    pictures that the baseline's program generated, not of ImageNet.
    """
    with resources.files("llmcomp").joinpath("published.csv").open("r", encoding="utf-8") as file:
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
        **{name: ADDED[name] for name in ("data_sha256", "draw", "draw_seed", "clusters")},
        chunk_bytes=2048,
        **{name: ADDED[name] for name in CELL_FACTS},
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

"""Rows of scored chunks, their Parquet files, and cells made of rows; this room knows tables and files only."""

from llmcomp.results.cells import CELL_COLUMNS, cells, cluster_of, is_cells, published, read_cells
from llmcomp.results.files import (
    count_rows,
    merge_rows,
    read_columns,
    read_footer,
    read_metadata,
    read_rows,
    row_files,
    rows_as_parquet,
    write_file,
    write_rows,
)
from llmcomp.results.rows import (
    CELL_FACTS,
    CELL_KEY,
    MACHINE_COLUMNS,
    PROTOCOLS,
    ROW_COLUMNS,
    STREAM_CHUNK,
    TOKEN_BITS,
    check_rows,
    empty_rows,
)

__all__ = [
    "CELL_COLUMNS",
    "CELL_FACTS",
    "CELL_KEY",
    "MACHINE_COLUMNS",
    "PROTOCOLS",
    "ROW_COLUMNS",
    "STREAM_CHUNK",
    "TOKEN_BITS",
    "cells",
    "check_rows",
    "cluster_of",
    "count_rows",
    "empty_rows",
    "is_cells",
    "merge_rows",
    "published",
    "read_cells",
    "read_columns",
    "read_footer",
    "read_metadata",
    "read_rows",
    "row_files",
    "rows_as_parquet",
    "write_file",
    "write_rows",
]

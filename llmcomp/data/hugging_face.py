"""Data sets of Hugging Face's library `datasets`, an optional extra: by name, or the library's objects. Columns only.

`hf:NAME[,config=CONFIG][,split=SPLIT]:COLUMN`, NAME as in `datasets.load_dataset`: a name of the hub or a folder. The
library downloads what is named and runs no code of the data set's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llmcomp.errors import DatasetError, reason

PREFIX = "hf:"


class Column(NamedTuple):
    """The rows of one column: values of text or bytes, or, of pictures, {bytes, path}."""

    name: str
    rows: Any
    has_pictures: bool


def is_dataset(value: Any) -> bool:
    """Whether `value` is a table of the library's, without importing it."""
    return type(value).__module__.partition(".")[0] == "datasets" and hasattr(value, "column_names")


def load_column(spec: str) -> Column:
    """What `hf:...` names."""
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(
            f"{spec}: needs Hugging Face's datasets ({error}): pip install llmcomp-exact[datasets]"
        ) from None
    path, _, column = spec.removeprefix(PREFIX).rpartition(":")
    name, *options = path.split(",")
    settings = dict(option.partition("=")[::2] for option in options)
    if not name or not column or not settings.keys() <= {"config", "split"} or "" in settings.values():
        raise DatasetError(f"{spec!r}: expected hf:NAME[,config=CONFIG][,split=SPLIT]:COLUMN")
    try:
        found = datasets.load_dataset(name, settings.get("config"), split=settings.get("split"))
    except Exception as error:  # the library raises its own kinds, and those of every format and of the network
        raise DatasetError(f"{spec}: datasets cannot load it: {reason(error)}") from error
    return column_of(found, column, name)


def column_of(data: Any, column: str | None, name: str) -> Column:
    """The column of an object of the library; of one with a single split that one."""
    if isinstance(data, dict):
        if len(data) != 1:
            raise DatasetError(f"{name}: has the splits {', '.join(data)}; choose one, as split={next(iter(data), '')}")
        data = next(iter(data.values()))
    if not hasattr(data, "__len__"):
        raise DatasetError(f"{name}: a {type(data).__name__} has no length; load it without streaming")
    columns = list(data.column_names)
    if column is None and len(columns) == 1:
        column = columns[0]
    if column is None or column not in columns:
        asked = "which column" if column is None else f"no column {column!r}"
        raise DatasetError(f"{name}: {asked}? It has {', '.join(columns)}")
    feature = data.features[column]
    if type(feature).__name__ == "Image":
        return Column(f"{name} {column}", _Values(data.cast_column(column, type(feature)(decode=False)), column), True)
    if type(feature).__name__ in ("Audio", "Video"):
        raise DatasetError(f"{name}: column {column!r} holds {type(feature).__name__}; give its samples as an array")
    return Column(f"{name} {column}", data[column], False)


class _Values:
    """One column as a sequence, read a row at a time."""

    def __init__(self, data: Any, column: str):
        self._data, self._column = data.select_columns([column]), column

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> Any:
        return self._data[row][self._column]

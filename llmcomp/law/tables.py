"""Tables of rows or cells -> the cells of each law: axes by name, groups, what is left out, what a law cannot be of.

What may not live here: fitting, drawing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.law.forms import Array, Form

GROUP_KEY = ("dataset", "modality", "protocol", "mapping")


@dataclass(frozen=True)
class Axis:
    """What a law is a function of: its name, the column that holds it, its letter in the formula, what it counts."""

    name: str
    column: str
    letter: str
    label: str
    one: str  # one value of it, in sentences
    hint: str = ""  # where the column may come from

    @property
    def is_size(self) -> bool:
        return self.name.startswith("params")


_TOKENS_HINT = '; where it is known, table.assign(tokens_seen=table["step"] * tokens_of_a_step) adds it'
AXES: Mapping[str, Axis] = MappingProxyType(
    {
        axis.name: axis
        for axis in (
            Axis("params", "params", "P", "parameters", "size"),
            Axis("params_nonembedding", "n_params_nonembedding", "N", "parameters without embeddings", "size"),
            Axis("step", "step", "S", "training steps", "step"),
            Axis("tokens", "tokens_seen", "D", "training tokens", "number of tokens", _TOKENS_HINT),
            Axis("flops", "flops", "C", "training FLOPs", "number of FLOPs"),
        )
    }
)


def axes_named(x: str | Sequence[str]) -> tuple[Axis, ...]:
    """("params", "step") -> their axes; a name that AXES does not know is the table's own column of that name."""
    names = (x,) if isinstance(x, str) else tuple(x)
    if len(names) not in (1, 2) or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise Error(f"x is {x!r}, expected the names of one axis or of two different ones, such as ('params', 'step')")
    free = iter("XY")
    return tuple(AXES.get(name) or Axis(name, name, next(free), name, f"value of {name}") for name in names)


@dataclass(frozen=True)
class Group:
    """What one law is fitted to: its name, cells, their rows (with the cell's number) or None, and notes."""

    name: str
    cells: pd.DataFrame
    rows: pd.DataFrame | None
    notes: tuple[str, ...]


def groups(table: pd.DataFrame, axes: tuple[Axis, ...]) -> Iterator[Group]:
    """The cells to fit of every data set, protocol and mapping in the table."""
    cells, rows = _as_cells(table, axes)
    usable = cells["unit"] == "chunk"
    for axis in axes:
        usable &= cells[axis.column].notna() & (axis.is_size | (cells[axis.column].fillna(0) > 0))
    if not usable.any():
        said = " and ".join(axis.name if axis.is_size else f"a {axis.one} above 0" for axis in axes)
        empty = [f"; {axis.column} is empty{axis.hint}" for axis in axes if cells[axis.column].isna().all()]
        raise Error(f"nothing to fit: no cell has {'both ' * (len(axes) == 2)}{said}{''.join(empty[-1:])}")
    columns = [axis.column for axis in axes]
    found = {tuple(map(str, key)): group for key, group in cells[usable].groupby(list(GROUP_KEY), sort=False)}
    for (key, group), name in zip(found.items(), _names(list(found)), strict=True):
        same = np.logical_and.reduce([cells[column] == value for column, value in zip(GROUP_KEY, key, strict=True)])
        left_out, repeated = int((same & ~usable).sum()), int(group.duplicated(columns).sum())
        counted = (
            (left_out, f"without {' or '.join(axis.name for axis in axes)}, or of one stream, left out"),
            (repeated, f"with the {' and '.join(axis.one for axis in axes)} of another: {_TAKEN_FOR}"),
        )
        notes = tuple(f"{n_cells} cell(s) {what}" for n_cells, what in counted if n_cells)
        part = None
        if rows is not None:
            key_columns = list(results.CELL_KEY)
            part = rows.merge(group[key_columns].assign(cell=range(len(group))), on=key_columns)
            part = part[part["chunk"] != results.STREAM_CHUNK]
        yield Group(name, group.reset_index(drop=True), part, notes)


_TAKEN_FOR = "intervals take them for independent"


def _as_cells(table: pd.DataFrame, axes: tuple[Axis, ...]) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    if not isinstance(table, pd.DataFrame):
        raise Error(f"expected a pandas.DataFrame of rows or cells, found {type(table).__name__}")
    if not table.columns.is_unique:
        raise Error(f"the table has two columns {table.columns[table.columns.duplicated()][0]!r}")
    if "chunk" in table.columns:
        rows = results.check_rows(table)
        _check_columns(rows, axes)
        return _with_axes(results.cells(rows), rows, axes), rows
    _check_columns(table, axes, "ratio")
    types = {axis.column: "Float64" for axis in axes} | {"ratio": "float64"}
    try:
        cells = table.astype(types).reset_index(drop=True)
    except (TypeError, ValueError) as error:
        raise Error(f"{', '.join(list(types)[:-1])} and ratio must be numbers: {error}") from None
    for name in (*GROUP_KEY, "unit"):
        if name not in cells.columns:
            cells[name] = pd.Series("chunk" if name == "unit" else "", index=cells.index, dtype="string")
        cells[name] = cells[name].astype("string").fillna("")
    return cells, None


def _check_columns(table: pd.DataFrame, axes: tuple[Axis, ...], *more: str) -> None:
    wanted = [axis.column for axis in axes] + list(more)
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        hint = next((axis.hint for axis in axes if axis.column == missing[0]), "")
        expected = f"rows, cells, or {', '.join(wanted[:-1])} and {wanted[-1]}" if more else f"rows with {missing[0]}"
        raise Error(f"the table has no column {', '.join(missing)}; expected {expected}{hint}")


def _with_axes(cells: pd.DataFrame, rows: pd.DataFrame, axes: tuple[Axis, ...]) -> pd.DataFrame:
    """Cells with what their rows say of the axes, and of the seed, beside what every cell has."""
    key = list(results.CELL_KEY)
    columns = [axis.column for axis in axes if axis.column not in key] + ["seed"] * ("seed" in rows.columns)
    if not columns:
        return cells
    of_cells = rows.groupby(key, dropna=False, sort=False)[columns]
    several = of_cells.nunique().gt(1).any()
    if several.any():
        raise Error(f"rows: column {several.idxmax()} has more than one value in a cell")
    absent = [name for name in columns if name not in cells.columns]
    return cells.merge(of_cells.first().reset_index()[[*key, *absent]], on=key, how="left") if absent else cells


def _names(keys: Sequence[tuple[str, ...]]) -> list[str]:
    """Short names: the data set, with protocol and mapping only where they tell two laws apart."""
    datasets = [key[0] or key[1] or "table" for key in keys]
    names = []
    for key, name in zip(keys, datasets, strict=True):
        alike = [other for other, other_name in zip(keys, datasets, strict=True) if other_name == name]
        parts = [key[i] for i in (1, 2, 3) if len({other[i] for other in alike}) > 1]
        names.append(", ".join([name, *(part or "none" for part in parts)]))
    return names


def check_design(name: str, cells: pd.DataFrame, axes: tuple[Axis, ...], form: Form) -> None:
    """Error, in one line, where these cells cannot give a law of this form."""
    where = "" if name == "table" else f"{name}: "
    ratio = cells["ratio"].to_numpy(float)
    bad = ~np.isfinite(ratio) | (ratio <= 0)
    if bad.any():
        row = cells[bad].iloc[0]
        at = ", ".join(f"{axis.letter} = {row[axis.column]:g}" for axis in axes)
        raise Error(f"{where}ratio of {at} is {row['ratio']}, expected a number above 0")
    for axis in axes:
        values = cells[axis.column].to_numpy(float)
        if not (np.isfinite(values) & (values > 0)).all():
            raise Error(f"{where}{axis.name} must be above 0")
    n_values = [cells[axis.column].nunique() for axis in axes]
    counts = " and ".join(f"{n} {axis.one}(s)" for n, axis in zip(n_values, axes, strict=True))
    found = f"found {len(cells)} cells of {counts}"
    if min(n_values) < 2:
        letters = " and ".join(axis.letter for axis in axes)
        least = " and two ".join(f"{axis.one}s" for axis in axes).replace("sizes", "model sizes", 1)
        raise Error(f"{where}a law in {letters} needs at least two {least}; {found}")
    if len(cells) <= form.n_free:
        raise Error(f"{where}{form.n_free} free parameters need at least {form.n_free + 1} cells; {found}")
    if np.ptp(ratio) <= 1e-12 * ratio.max():
        raise Error(f"{where}all {len(cells)} ratios are equal to {ratio[0]:g}; there is no law to fit")


def weights_of(name: str, cells: pd.DataFrame, kind: str) -> Array:
    """One weight a cell, 1 on average: "equal", or "stderr" for 1 / stderr^2."""
    if kind == "equal":
        return np.ones(len(cells))
    if kind != "stderr":
        raise Error(f"weights {kind!r} is not one of equal, stderr")
    if "stderr" not in cells.columns or not (cells["stderr"].to_numpy(float) > 0).all():
        raise Error(f'{name}: weights="stderr" needs a standard error above 0 in every cell (two chunks or more)')
    weights = 1.0 / cells["stderr"].to_numpy(float) ** 2
    return np.asarray(weights / weights.mean())


def runs_of(name: str, cells: pd.DataFrame, axes: tuple[Axis, ...]) -> Any:
    """The number of every cell's training run [n]: cells of one model (and seed, where there is one) share a run."""
    keys = [key for key in ("model", "seed") if key in cells.columns]
    keys = keys or [axis.column for axis in axes if axis.is_size]
    if not keys:
        raise Error(f'{name}: random="run" needs a column model or seed to tell training runs apart')
    runs = cells.groupby(keys, dropna=False, sort=False).ngroup().to_numpy()
    n_runs = len(set(runs))
    if n_runs < 5 or n_runs == len(cells):
        found = f"found {len(cells)} cells of {n_runs} run(s)"
        raise Error(f'{name}: random="run" needs at least five runs and more cells than runs; {found}')
    return runs

"""Laws judged by what they did not see: fitted on the smaller values of an axis, they predict the next ones.

What may not live here: fitting itself; a law here is anything with axes, cells, refit, predict and predict_interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llmcomp.errors import Error
from llmcomp.law.text import align, html_table, latex_table, short_number, tex_text

_FITTED = ["fitted", "residual", "weight"]
_LEAST_KEPT = 3  # an intercept, a coefficient and an exponent of the axis


@dataclass(frozen=True, eq=False, repr=False)
class HoldOut:
    """Cells that laws did not see, and what those laws predicted.

    table: one row a held-out cell: law, the axes' columns, kept (the greatest value of the axis that the law saw),
      ratio, predicted, low, high (predictive interval at `level`), error (ratio - predicted), inside.
    by: name of the axis along which cells were held out, column and label of it. laws: {name of a law: {kept: law}}.
    """

    table: pd.DataFrame
    by: str
    column: str
    level: float
    laws: dict[str, dict[float, Any]]

    @property
    def rmse(self) -> float:
        """Root of the mean squared error of the ratio over all held-out cells."""
        return float(np.sqrt((self.table["error"] ** 2).mean()))

    @property
    def mean_absolute_error(self) -> float:
        return float(self.table["error"].abs().mean())

    @property
    def coverage(self) -> float:
        """Share of the held-out cells that lie inside their predictive interval."""
        return float(self.table["inside"].mean())

    def summary(self) -> pd.DataFrame:
        """One row a law and held-out value of the axis, and one a law for all: cells, errors, mean width, coverage."""
        rows = []
        for name, of_law in self.table.groupby("law", sort=False):
            for (kept, value), part in of_law.groupby(["kept", self.column], sort=True):
                rows.append(
                    {
                        "law": name,
                        "fitted up to": short_number(float(str(kept))),
                        "predicted": short_number(float(str(value))),
                    }
                    | _scores(part)
                )
            rows.append({"law": name, "fitted up to": "", "predicted": "all"} | _scores(of_law))
        return pd.DataFrame(rows)

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the summary as text."""
        level = f"inside {100 * self.level:g} %"
        head = ["law", "fitted up to", f"predicted {self.by}", "cells", "rms error", "mean error", "interval", level]
        body = [
            [
                str(row["law"]), row["fitted up to"], row["predicted"], str(row["cells"]), f"{row['rmse']:.4f}",
                f"{row['mean_error']:+.4f}", f"+- {row['half_width']:.4f}", f"{row['inside']} of {row['cells']}",
            ]
            for _, row in self.summary().iterrows()
        ]  # fmt: skip
        return head, body

    def __str__(self) -> str:
        head, body = self.texts()
        return "\n".join(align([head, *body]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self.texts())

    def to_latex(self) -> str:
        """A LaTeX tabular of the summary; needs no package."""
        head, body = self.texts()
        return latex_table([tex_text(text) for text in head], [[tex_text(text) for text in row] for row in body])

    def to_dict(self) -> dict[str, Any]:
        """Scores and every held-out cell, ready for JSON."""
        columns = ["law", self.column, "kept", "ratio", "predicted", "low", "high", "inside"]
        others = [name for name in self.table.columns if name not in columns and name != "error"]
        cells = self.table[[*columns[:2], *others, *columns[2:]]]
        return {
            "by": self.by,
            "level": self.level,
            "rmse": self.rmse,
            "coverage": self.coverage,
            "cells": [{key: _plain(value) for key, value in row.items()} for row in cells.to_dict("records")],
        }

    def plot(self, axes: Any = None) -> Any:
        """Held-out cells over what was predicted of them; one matplotlib Axes a law, returned."""
        from llmcomp.law import plot  # the only way from here to matplotlib

        return plot.holdout(self, axes)


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return float(value) if isinstance(value, (int, float, np.number)) else str(value)


def _scores(part: pd.DataFrame) -> dict[str, Any]:
    return {
        "cells": len(part),
        "rmse": float(np.sqrt((part["error"] ** 2).mean())),
        "mean_error": float(part["error"].mean()),
        "half_width": float((part["high"] - part["low"]).mean() / 2),
        "inside": int(part["inside"].sum()),
    }


def roll_forward(
    laws: Sequence[Any], by: str | None, keep: int | None, refit: Callable[[list[pd.DataFrame]], Sequence[Any]]
) -> HoldOut:
    """See ScalingLaw.holdout. refit: cells of every law -> their laws. Error, in one line, where the axis has too few
    values or a part allows no law."""
    axis, names = _axis_of(laws[0], by), " and ".join(law.name for law in laws)
    at = [law.cells[axis.column].to_numpy(float) for law in laws]
    values = np.unique(np.concatenate(at))
    if keep is not None and not (isinstance(keep, (int, np.integer)) and 2 <= keep < len(values)):
        raise Error(f"{names}: keep is {keep}, expected from 2 to {len(values) - 1} of the {len(values)} {axis.one}s")
    if keep is None and len(values) <= _LEAST_KEPT:
        least = f"{_LEAST_KEPT + 1} {axis.one}s are needed to hold one out"
        raise Error(f"{names}: {least}, found {len(values)}; keep=2 fits on two")
    # (values seen, values predicted): the next one, or with keep all that are left.
    splits = [(values[:keep], values[keep:])]
    if keep is None:
        enough = [n for n in range(_LEAST_KEPT, len(values)) if _has_enough(laws, at, values[:n])]
        splits = [(values[:n], values[n : n + 1]) for n in enough or [len(values) - 1]]
    parts: list[pd.DataFrame] = []
    found: dict[str, dict[float, Any]] = {law.name: {} for law in laws}
    for seen, out in splits:
        cells = [law.cells.drop(columns=_FITTED) for law in laws]
        again = refit([one[np.isin(x, seen)] for one, x in zip(cells, at, strict=True)])
        for law, one, x in zip(again, cells, at, strict=True):
            found[law.name][float(seen[-1])] = law
            parts.append(_predicted(law, one[np.isin(x, out)], float(seen[-1])))
    table = pd.concat(parts, ignore_index=True)
    return HoldOut(table, axis.name, axis.column, laws[0].level, found)


def _has_enough(laws: Sequence[Any], at: Sequence[Any], seen: Any) -> bool:
    """Whether every law has more cells at the values seen than free parameters."""
    return all(np.isin(x, seen).sum() > law.form.n_free for law, x in zip(laws, at, strict=True))


def joined(found: Sequence[HoldOut]) -> HoldOut:
    """The hold-outs of several laws as one."""
    table = pd.concat([one.table for one in found], ignore_index=True)
    laws = {name: of_law for one in found for name, of_law in one.laws.items()}
    return HoldOut(table, found[0].by, found[0].column, found[0].level, laws)


def _axis_of(law: Any, by: str | None) -> Any:
    if by is None:
        return law.axes[0]
    for axis in law.axes:
        if by in (axis.name, axis.column):
            return axis
    raise Error(f"by is {by!r}, expected an axis of the law: {', '.join(axis.name for axis in law.axes)}")


def _predicted(law: Any, cells: pd.DataFrame, kept: float) -> pd.DataFrame:
    x = {axis.name: cells[axis.column].to_numpy(float) for axis in law.axes}
    ratio, predicted = cells["ratio"].to_numpy(float), law.predict(**x)
    low, high = law.predict_interval(**x)
    columns = {axis.column: x[axis.name] for axis in law.axes}
    return pd.DataFrame(
        {"law": law.name, **columns, "kept": kept, "ratio": ratio, "predicted": predicted, "low": low, "high": high}
    ).assign(error=ratio - predicted, inside=(low <= ratio) & (ratio <= high))

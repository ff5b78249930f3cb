"""Several laws by the name of their data set: looked up, printed and drawn together.

What may not live here: fitting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from llmcomp.law.holdout import HoldOut, joined
from llmcomp.law.projection import Array
from llmcomp.law.scaling_law import ScalingLaw
from llmcomp.law.tables import GROUP_KEY
from llmcomp.law.text import Interval, latex_table, tex_name, tex_number, tex_span, tex_text


class ScalingLaws(Mapping[str, ScalingLaw]):
    """Laws by name of the data set. laws["enwik8"], also laws["text"] where one law is of that modality.

    a, b, c, alpha, beta, r2 are pandas Series over the names; predict gives one column a law.
    """

    def __init__(self, laws: Mapping[str, ScalingLaw]):
        self._laws = dict(laws)

    def __getitem__(self, name: str) -> ScalingLaw:
        if name in self._laws:
            return self._laws[name]
        alike = [law for law in self._laws.values() if name in [str(law.cells[key].iloc[0]) for key in GROUP_KEY]]
        if len(alike) == 1:
            return alike[0]
        raise KeyError(f"{name!r}: {len(alike)} laws of that name, expected one of {', '.join(map(repr, self._laws))}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._laws)

    def __len__(self) -> int:
        return len(self._laws)

    def _series(self, attribute: str) -> pd.Series:
        return pd.Series({name: getattr(law, attribute) for name, law in self.items()}, name=attribute)

    @property
    def a(self) -> pd.Series:
        return self._series("a")

    @property
    def b(self) -> pd.Series:
        return self._series("b")

    @property
    def c(self) -> pd.Series:
        return self._series("c")

    @property
    def alpha(self) -> pd.Series:
        return self._series("alpha")

    @property
    def beta(self) -> pd.Series:
        return self._series("beta")

    @property
    def r2(self) -> pd.Series:
        return self._series("r2")

    @property
    def residuals(self) -> dict[str, Array]:
        return {name: law.residuals for name, law in self.items()}

    @property
    def ci(self) -> dict[str, Mapping[str, Interval]]:
        return {name: law.ci for name, law in self.items()}

    @property
    def warnings(self) -> list[str]:
        return [f"{name}: {sentence}" for name, law in self.items() for sentence in law.warnings]

    def predict(self, *at: ArrayLike, **named: ArrayLike) -> pd.DataFrame:
        """One column a law, one row a point (the axes' values broadcast and flattened)."""
        return pd.DataFrame({name: np.ravel(law.predict(*at, **named)) for name, law in self.items()})

    def holdout(self, by: str | None = None, keep: int | None = None) -> HoldOut:
        """Every law's hold-out in one table; see ScalingLaw.holdout."""
        return joined([law.holdout(by, keep) for law in self.values()])

    def report(self, format: Literal["markdown", "latex"] = "markdown") -> str:
        """The reports of all laws, one below the other; see ScalingLaw.report."""
        return "\n\n".join(law.report(format) for law in self.values())

    def to_frame(self) -> pd.DataFrame:
        """One row a law: coefficients, R^2, rms error, whether the exponents are identified."""
        rows = {
            name: dict(law.values)
            | {"r2": law.r2, "rmse": law.rmse}
            | {f"{k} identified": v for k, v in law.identified.items()}
            for name, law in self.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def __str__(self) -> str:
        return "\n\n".join(str(law) for law in self.values())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "<hr>".join(law._repr_html_() for law in self.values())

    def to_latex(self) -> str:
        """A LaTeX tabular, two rows a law: the values, and below them their intervals; needs no package."""
        keys = list(next(iter(self.values())).values)
        head = ["", *(tex_name(key) for key in keys), "$R^2$"]
        body = []
        for name, law in self.items():
            body.append([tex_text(name), *(tex_number(law.values[key]) for key in keys), f"{law.r2:.3f}"])
            level = f"{100 * law.level:g}\\,\\% interval"
            body.append([level, *(tex_span(law.ci[key]) for key in keys), ""])
        return latex_table(head, body)

    def to_dict(self) -> dict[str, Any]:
        return {name: law.to_dict() for name, law in self.items()}

    def plot(self, axes: Any = None) -> Any:
        """For every law, ratio against P and against S with its band; returns an array of Axes [2, laws]."""
        from llmcomp.law import plot

        return plot.law(self, axes)

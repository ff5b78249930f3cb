"""A fitted law and several of them: what they predict, their intervals, and how they are printed.

What may not live here: tables, fitting (fit.py), drawing (only the `plot` methods hand over to plot.py).
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from llmcomp.errors import Error
from llmcomp.law.projection import EXPONENT_RANGE, Array, Form, Loss, Optimum, Problem, Region

GROUP_KEY = ("dataset", "modality", "protocol", "mapping")


UNITS = "P: parameters, S: training steps, CR: compressed over original size"


# An interval of an exponent that is wider than this factor is called "not identified".
_IDENTIFIED_FACTOR = 4.0


Interval = tuple[float, float]


@dataclass(frozen=True)
class Method:
    form: Form
    loss: Loss
    weights: str
    a_nonneg: bool

    def describe(self) -> str:
        how = "Huber's loss" if self.loss.huber else "least squares"
        on = "log ratio" if self.loss.log else "ratio"
        weighted = ", weights 1/stderr^2" if self.weights == "stderr" else ""
        any_sign = ", a of any sign" if self.form.intercept and not self.a_nonneg else ""
        return f"{how} on the {on}{weighted}{any_sign}"


def _points(params: ArrayLike, step: ArrayLike) -> tuple[Array, Array]:
    p, s = np.broadcast_arrays(np.asarray(params, dtype=float), np.asarray(step, dtype=float))
    if not ((p > 0).all() and (s > 0).all()):
        raise Error("params and step must be above 0")
    return p, s


def _open_ends(frame: pd.DataFrame, a_nonneg: bool) -> pd.DataFrame:
    """Resamples whose exponent lies at an end of its range, written as the limits that they stand for."""
    opened = frame.copy()
    for exponent, coefficient in (("alpha", "b"), ("beta", "c")):
        low, high = (np.isclose(frame[exponent], end, rtol=0.05) for end in EXPONENT_RANGE)
        used = frame[coefficient] > 0
        opened.loc[low, exponent], opened.loc[high, exponent] = 0.0, math.inf
        opened.loc[(low | high) & used, coefficient] = math.inf
        if "a" in frame.columns and not a_nonneg:
            opened.loc[low & used, "a"] = -math.inf
    return opened


def r_squared(observed: ArrayLike, predicted: ArrayLike) -> float:
    """1 - residual sum of squares / sum of squares about the mean; of any prediction, so it may be below 0."""
    y, f = np.asarray(observed, dtype=float), np.asarray(predicted, dtype=float)
    return float(1.0 - ((y - f) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _log_likelihood(y: Array, fitted: Array, weights: Array, loss: Loss) -> float:
    """Of independent normal errors with variances s^2 / weight, of the ratio or of its logarithm, as density of y."""
    if loss.log and not (fitted > 0).all():
        return -math.inf
    residual = np.log(y / fitted) if loss.log else y - fitted
    variance = max(float((weights * residual**2).mean()), 1e-300)
    jacobian = float(np.log(y).sum()) if loss.log else 0.0
    return -0.5 * len(y) * (math.log(2 * math.pi * variance) + 1) + 0.5 * float(np.log(weights).sum()) - jacobian


@dataclass(frozen=True, eq=False, repr=False)
class ScalingLaw:
    """A fitted law of one data set. P is in parameters, S in training steps, CR compressed over original size.

    a, b, c, d, alpha, beta: coefficients in these units (a is 0 for Kaplan's form, d is 0 where the form has none).
    ci: {name: (low, high)} profile-likelihood intervals at `level`; infinite where the data set no bound.
    over_cells, over_chunks: the coefficients of every resample (ci_cells, ci_chunks: their percentiles).
    cells: the fitted cells with columns fitted, residual (observed - fitted) and weight.
    """

    name: str
    method: Method
    level: float
    cells: pd.DataFrame
    problem: Problem
    optimum: Optimum
    over_cells: pd.DataFrame
    over_chunks: pd.DataFrame | None
    notes: tuple[str, ...]

    @property
    def form(self) -> Form:
        return self.problem.form

    @property
    def n_free(self) -> int:
        """Free parameters: coefficients and exponents."""
        return self.form.n_free

    @cached_property
    def values(self) -> dict[str, float]:
        """Every fitted parameter by name."""
        found = self.optimum.solution
        linear = dict(zip(self.form.coefficients, map(float, found.coefficients[0]), strict=True))
        return linear | {"alpha": float(found.alpha[0]), "beta": float(found.beta[0])}

    @cached_property
    def region(self) -> Region:
        """Confidence region of the exponents at `level` for one parameter at a time."""
        y, fitted, weights = (self.cells[key].to_numpy(float) for key in ("ratio", "fitted", "weight"))
        dof = len(y) - self.n_free
        noise = self.method.loss.noise(y, weights, fitted, dof)
        # The floor keeps the region of an exact fit wider than rounding errors.
        floor = 1e-14 * float((weights * (y - y.mean()) ** 2).sum())
        growth = max(noise, floor) * float(stats.f.ppf(self.level, 1, dof))
        return Region(self.problem, self.optimum, self.optimum.squares + growth)

    @cached_property
    def ci(self) -> dict[str, Interval]:
        """Profile-likelihood intervals: the values at which the best law of the other parameters still fits, with the
        F quantile of 1 and (cells - free parameters) degrees of freedom (Bates and Watts 1988, ch. 6)."""
        found = {key: self.region.coefficient_interval(i) for i, key in enumerate(self.form.coefficients)}
        return found | {"alpha": self.region.exponent_interval(0), "beta": self.region.exponent_interval(1)}

    @property
    def log_likelihood(self) -> float:
        y, fitted, weights = (self.cells[key].to_numpy(float) for key in ("ratio", "fitted", "weight"))
        return _log_likelihood(y, fitted, weights, self.method.loss)

    @property
    def a(self) -> float:
        return self.values.get("a", 0.0)

    @property
    def b(self) -> float:
        return self.values["b"]

    @property
    def c(self) -> float:
        return self.values["c"]

    @property
    def d(self) -> float:
        return self.values.get("d", 0.0)

    @property
    def alpha(self) -> float:
        return self.values["alpha"]

    @property
    def beta(self) -> float:
        return self.values["beta"]

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Coefficients of the law of bits per byte (8 CR); its a is the irreducible term of the Chinchilla form."""
        return {key: value if key in ("alpha", "beta") else 8.0 * value for key, value in self.values.items()}

    @property
    def residuals(self) -> Array:
        """Observed - fitted ratio of every cell, in the order of `cells`."""
        return self.cells["residual"].to_numpy(float)

    @property
    def r2(self) -> float:
        """1 - sum of squared residuals of the ratio / sum of squares about its mean, unweighted."""
        return r_squared(self.cells["ratio"], self.cells["fitted"])

    @property
    def rmse(self) -> float:
        return float(np.sqrt((self.residuals**2).mean()))

    @property
    def aic(self) -> float:
        """Akaike's criterion, the error's variance counted as a parameter; comparable between forms and responses."""
        return 2.0 * (self.n_free + 1) - 2.0 * self.log_likelihood

    @property
    def aicc(self) -> float:
        """AIC with the correction for few cells (Hurvich and Tsai 1989); inf where there are too few."""
        k, n = self.n_free + 1, len(self.cells)
        return self.aic + 2.0 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf

    @property
    def bic(self) -> float:
        return math.log(len(self.cells)) * (self.n_free + 1) - 2.0 * self.log_likelihood

    @property
    def ci_cells(self) -> dict[str, Interval]:
        """Percentile intervals over resampled cells (narrower than `ci` with few cells: they undercover)."""
        return self._percentiles(self.over_cells)

    @property
    def ci_chunks(self) -> dict[str, Interval] | None:
        """Percentile intervals over resampled chunks; None if the law was fitted to cells."""
        return None if self.over_chunks is None else self._percentiles(self.over_chunks)

    def _percentiles(self, frame: pd.DataFrame) -> dict[str, Interval]:
        if frame.empty:
            return dict.fromkeys(self.values, (math.nan, math.nan))
        tail, opened = 0.5 * (1.0 - self.level), _open_ends(frame, self.method.a_nonneg)
        ends = {key: np.quantile(opened[key], [tail, 1.0 - tail], method="nearest") for key in self.values}
        return {key: (float(low), float(high)) for key, (low, high) in ends.items()}

    @property
    def identified(self) -> dict[str, bool]:
        """For alpha and beta: whether the interval is bounded on both sides, spans less than a factor of 4, and the
        coefficient of the term is above 0 within its interval."""
        return {name: not self._complaint(name) for name in ("alpha", "beta")}

    def _complaint(self, exponent: str) -> str:
        low, high = self.ci[exponent]
        coefficient, variable = ("b", "P") if exponent == "alpha" else ("c", "S")
        told = f"(these {len(self.cells)} cells, {100 * self.level:g} % profile interval)"
        if self.ci[coefficient][0] <= 0:
            without = f"a law in which the ratio does not depend on {variable} fits about as well"
            return f"{exponent} is not identified: {without} {told}."
        if low > 0 and math.isfinite(high) and high / low < _IDENTIFIED_FACTOR:
            return ""
        if low <= 0 and math.isinf(high):
            return f"{exponent} is not identified: every value above 0 fits about as well {told}."
        span = f"from {low:.3g} to {high:.3g}" if math.isfinite(high) else f"from {low:.3g} upwards"
        return f"{exponent} is not identified: values {span} fit about as well {told}."

    @property
    def warnings(self) -> list[str]:
        """Plain sentences on what these data do not support; empty where both exponents are identified."""
        return [sentence for sentence in map(self._complaint, ("alpha", "beta")) if sentence]

    @property
    def bounds(self) -> list[str]:
        """Plain sentences on where a coefficient, or the lower end of a's interval, is held at its bound of 0."""
        held = [key for i, key in enumerate(self.form.coefficients) if self.problem.nonneg[i] and self.values[key] <= 0]
        told = [f"{key} is at its bound of 0." for key in held]
        if self.form.intercept and self.method.a_nonneg and "a" not in held and self.ci["a"][0] <= 0:
            told.append("The interval of a ends at its bound of 0: the data alone do not keep a above it.")
        return told

    def predict(self, params: ArrayLike, step: ArrayLike) -> Any:
        """Ratio at P = params, S = step (broadcast against each other): float64 array, or float for numbers."""
        p, s = _points(params, step)
        by_params, by_steps = p**-self.alpha, s**-self.beta
        ratio = self.a + self.b * by_params + self.c * by_steps
        if self.form.fourth == "interaction":
            ratio = ratio + self.d * by_params * by_steps
        elif self.form.fourth == "upturn":
            ratio = ratio + self.d * s / p
        return ratio if ratio.shape else float(ratio)

    def band(self, params: ArrayLike, step: ArrayLike) -> tuple[Array, Array]:
        """(low, high) of the law itself at `level` (not of a new cell), point by point, by profile likelihood."""
        p, s = _points(params, step)
        low, high = self.region.band(p.ravel(), s.ravel())
        return low.reshape(p.shape), high.reshape(p.shape)

    @property
    def coefficients(self) -> pd.DataFrame:
        """One row a coefficient: value, low, high (profile), and the same of resampled cells and chunks."""
        frame = pd.DataFrame({"value": pd.Series(dict(self.values))})
        for suffix, ci in (("", self.ci), ("_cells", self.ci_cells), ("_chunks", self.ci_chunks)):
            if ci is not None:
                frame[f"low{suffix}"] = [ci[key][0] for key in frame.index]
                frame[f"high{suffix}"] = [ci[key][1] for key in frame.index]
        return frame.rename_axis("coefficient")

    def _headline(self) -> list[str]:
        sizes, steps = self.cells["params"].nunique(), self.cells["step"].nunique()
        origin = [str(self.cells[key].iloc[0]) for key in ("modality", "protocol", "mapping")]
        parts = [*origin[:1], f"protocol {origin[1]}" * bool(origin[1]), f"mapping {origin[2]}" * bool(origin[2])]
        where = ", ".join(part for part in parts if part and part != self.name)
        largest = float(np.abs(self.residuals).max())
        title = f"{self.name} ({where})" if where else self.name
        errors = f"rms error {self.rmse:.4f}, largest {largest:.4f}"
        return [
            f"{self.form.formula}    ({UNITS})",
            f"{title}: {len(self.cells)} cells, {sizes} sizes x {steps} steps; {self.method.describe()}",
            f"R^2 {self.r2:.3f}, {errors}, AIC {self.aic:.1f}, BIC {self.bic:.1f}",
        ]

    def _table(self) -> list[list[str]]:
        level = f"{100 * self.level:g} %"
        columns = [
            (f"{level} profile", self.ci),
            (f"{level} cells", self.ci_cells),
            (f"{level} chunks", self.ci_chunks),
        ]
        shown = [(title, ci) for title, ci in columns if ci is not None]
        head = ["", "value", *(title for title, _ in shown)]
        unused = {exponent for exponent, term in (("alpha", self.b), ("beta", self.c)) if term == 0}
        texts = {key: "none" if key in unused else _number(value) for key, value in self.values.items()}
        return [head, *([key, text, *(_span(ci[key]) for _, ci in shown)] for key, text in texts.items())]

    def _sentences(self) -> list[str]:
        return [*self.warnings, *self.bounds, *self.notes]

    def __str__(self) -> str:
        return "\n".join([*self._headline(), "", *_align(self._table()), *self._sentences()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = self._table()
        lines = [html.escape(line) for line in (*self._headline(), *self._sentences())]
        return "<br>".join(lines) + _html_table(head, body)

    def to_latex(self) -> str:
        """A LaTeX tabular of the coefficients with their intervals; needs no package."""
        head = ["", "value", f"{100 * self.level:g}\\,\\% interval"]
        return _latex(head, [[_TEX[key], _tex_number(v), _tex_span(self.ci[key])] for key, v in self.values.items()])

    def to_dict(self) -> dict[str, Any]:
        """Everything a program may want, ready for JSON: an open end of an interval is None."""
        return {
            "name": self.name,
            "form": self.form.name,
            "formula": self.form.formula,
            "units": UNITS,
            "method": self.method.describe(),
            **{key: str(self.cells[key].iloc[0]) for key in GROUP_KEY},
            "coefficients": dict(self.values),
            "level": self.level,
            "ci": _closed(self.ci),
            "ci_cells": _closed(self.ci_cells),
            "ci_chunks": None if self.ci_chunks is None else _closed(self.ci_chunks),
            "identified": self.identified,
            "r2": self.r2,
            "rmse": self.rmse,
            "aic": self.aic,
            "aicc": self.aicc if math.isfinite(self.aicc) else None,
            "bic": self.bic,
            "n_cells": len(self.cells),
            "warnings": self.warnings,
            "bounds": self.bounds,
            "notes": list(self.notes),
        }

    def plot(self, axes: Any = None) -> Any:
        """Ratio against P for every S and against S for every P with the law's band; two matplotlib Axes, returned."""
        from llmcomp.law import plot  # the only way from here to matplotlib

        return plot.law(self, axes)


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

    def predict(self, params: ArrayLike, step: ArrayLike) -> pd.DataFrame:
        """One column a law, one row a point (params and step broadcast and flattened)."""
        return pd.DataFrame({name: np.ravel(law.predict(params, step)) for name, law in self.items()})

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
        """A LaTeX tabular, one row a law; needs no package."""
        keys = list(next(iter(self.values())).values)
        head = ["", *(_TEX[key] for key in keys), "$R^2$"]
        return _latex(
            head,
            [[_tex_text(n), *(_tex_number(law.values[k]) for k in keys), f"{law.r2:.3f}"] for n, law in self.items()],
        )

    def to_dict(self) -> dict[str, Any]:
        return {name: law.to_dict() for name, law in self.items()}

    def plot(self, axes: Any = None) -> Any:
        """For every law, ratio against P and against S with its band; returns an array of Axes [2, laws]."""
        from llmcomp.law import plot

        return plot.law(self, axes)


_TEX = {"a": "$a$", "b": "$b$", "c": "$c$", "d": "$d$", "alpha": r"$\alpha$", "beta": r"$\beta$"}


def _number(value: float) -> str:
    return f"{value:.4g}"


def _span(interval: Interval) -> str:
    low, high = interval
    if math.isinf(low) or math.isinf(high):
        if math.isinf(low) and math.isinf(high):
            return "any"
        return f"below {high:.4g}" if math.isinf(low) else f"above {low:.4g}"
    return f"{low:.4g} to {high:.4g}"


def _align(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        "<table><thead>"
        + row(head, "th")
        + "</thead><tbody>"
        + "".join(row(r, "td") for r in body)
        + "</tbody></table>"
    )


def _tex_number(value: float) -> str:
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"${mantissa} \\times 10^{{{int(exponent)}}}$" if exponent else f"${mantissa}$"


def _tex_span(interval: Interval) -> str:
    low, high = interval
    if math.isinf(low) or math.isinf(high):
        if math.isinf(low) and math.isinf(high):
            return "any"
        return f"$<$ {_tex_number(high)}" if math.isinf(low) else f"$>$ {_tex_number(low)}"
    return f"{_tex_number(low)} to {_tex_number(high)}"


def _tex_text(text: str) -> str:
    return "".join("\\" + char if char in "_%&#$" else char for char in text)


def _latex(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(row) + r" \\" for row in (head, *body)]
    spec = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{spec}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"]
    )


def _closed(ci: Mapping[str, Interval]) -> dict[str, list[float | None]]:
    return {key: [value if math.isfinite(value) else None for value in interval] for key, interval in ci.items()}

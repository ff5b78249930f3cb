"""A fitted law: what it predicts, its intervals, what it says of itself.

What may not live here: tables of rows (tables.py), options of a fit (fit.py), drawing (only `plot` hands over to
plot.py).
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from llmcomp.errors import Error
from llmcomp.law.forms import Form
from llmcomp.law.holdout import HoldOut, roll_forward
from llmcomp.law.plan import Plan, plan_cells
from llmcomp.law.projection import Array, Loss, Optimum, Problem, Solution, solve
from llmcomp.law.random_effect import inverse_root, variance_ratio
from llmcomp.law.region import Region
from llmcomp.law.report import report_of
from llmcomp.law.tables import AXES, GROUP_KEY, Axis, check_design, runs_of, weights_of
from llmcomp.law.text import Interval, align, html_table, latex_table, number, span, tex_name, tex_number, tex_span

# An interval of an exponent that is wider than this factor is called "not identified".
IDENTIFIED_FACTOR = 4.0


@dataclass(frozen=True)
class Method:
    """How a law is fitted: its form, what is minimised, over which weights, and whether runs have an effect."""

    form: Form
    loss: Loss
    weights: str
    a_nonneg: bool
    random: str | None = None

    def describe(self) -> str:
        how = "Huber's loss" if self.loss.huber else "least squares"
        on = "log ratio" if self.loss.log else "ratio"
        weighted = ", weights 1/stderr^2" if self.weights == "stderr" else ""
        any_sign = ", a of any sign" if self.form.intercept and not self.a_nonneg else ""
        return f"{how} on the {on}{weighted}{any_sign}{', a random effect of each run' * (self.random is not None)}"


class Other(Protocol):
    """Squares [...] of another data set at theta [..., q], its own parameters at their best."""

    at_optimum: float

    def __call__(self, theta: Array) -> Array: ...


@dataclass(frozen=True)
class Elsewhere:
    """The other data sets of a joint fit: what the shared parameters cost there, in units of this one's squares."""

    others: Sequence[Other]
    dof: int
    noise: float

    def squares(self, theta: Array) -> Array:
        return np.asarray(sum(other(theta) for other in self.others))

    @property
    def at_optimum(self) -> float:
        return sum(other.at_optimum for other in self.others)


def _open_ends(frame: pd.DataFrame, problem: Problem) -> pd.DataFrame:
    """Resamples whose exponent lies at an end of its range, written as the limits that they stand for."""
    opened = frame.copy()
    units = problem.plain(np.ones(len(problem.ranges)))
    for one, ends, unit in zip(problem.form.nonlinear, problem.ranges, units, strict=True):
        low, high = (np.isclose(frame[one.name], unit * end, rtol=0.05) for end in np.exp(ends))
        coefficient = problem.form.term_of(one.name)
        used = frame[coefficient] > 0
        opened.loc[low, one.name], opened.loc[high, one.name] = 0.0, math.inf
        opened.loc[(low | high) & used, coefficient] = math.inf
        if "a" in frame.columns and not problem.a_nonneg:
            opened.loc[low & used, "a"] = -math.inf
    return opened


def r_squared(observed: ArrayLike, predicted: ArrayLike) -> float:
    """1 - residual sum of squares / sum of squares about the mean; of any prediction, so it may be below 0."""
    y, f = np.asarray(observed, dtype=float), np.asarray(predicted, dtype=float)
    return float(1.0 - ((y - f) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _log_likelihood(y: Array, fitted: Array, weights: Array, loss: Loss, whiten: Array | None) -> float:
    """Of normal errors with variances s^2 / weight, of the ratio or of its logarithm, as density of y."""
    if loss.log and not (fitted > 0).all():
        return -math.inf
    residual = np.log(y / fitted) if loss.log else y - fitted
    if whiten is not None:
        residual = whiten @ residual
    determinant = 0.0 if whiten is None else float(np.linalg.slogdet(whiten)[1])
    variance = max(float((weights * residual**2).mean()), 1e-300)
    jacobian = float(np.log(y).sum()) if loss.log else 0.0
    return (
        -0.5 * len(y) * (math.log(2 * math.pi * variance) + 1)
        + 0.5 * float(np.log(weights).sum())
        - jacobian
        + determinant
    )


@dataclass(frozen=True, eq=False, repr=False)
class ScalingLaw:
    """A fitted law of one data set; its axes are `axes`, P in parameters and S in training steps unless said otherwise.

    values: every parameter by name. a, b, c, d, alpha, beta: the same; 0 for a coefficient that the form lacks.
    ci: {name: (low, high)} profile-likelihood intervals at `level`; infinite where the data set no bound.
    over_cells, over_chunks: the coefficients of every resample (ci_cells, ci_chunks: their percentiles).
    cells: the fitted cells with columns fitted, residual (observed - fitted) and weight.
    run_variance: variance of the runs' effect over that of the cells' errors; 0 without random="run".
    """

    name: str
    method: Method
    level: float
    cells: pd.DataFrame
    problem: Problem
    optimum: Optimum
    axes: tuple[Axis, ...] = (AXES["params"], AXES["step"])
    over_cells: pd.DataFrame = field(default_factory=pd.DataFrame)
    over_chunks: pd.DataFrame | None = None
    notes: tuple[str, ...] = ()
    run_variance: float = 0.0
    elsewhere: Elsewhere | None = None

    @property
    def form(self) -> Form:
        return self.problem.form

    @property
    def n_free(self) -> int:
        """Free parameters: coefficients and exponents, and the variance of the runs' effect where there is one."""
        return self.form.n_free + (self.method.random is not None)

    @property
    def dof(self) -> int:
        """Degrees of freedom behind the intervals: cells, or with random="run" runs, less their free parameters."""
        if self.elsewhere is not None:
            return self.elsewhere.dof
        if self.method.random is None:
            return len(self.cells) - self.form.n_free
        # What the sizes decide (a, b, alpha) is measured by the runs, of which there are fewer than cells.
        n_runs = len(set(runs_of(self.name, self.cells, self.axes)))
        return max(1, min(n_runs - 3, len(self.cells) - self.n_free))

    @property
    def x(self) -> tuple[str, ...]:
        """Names of the axes."""
        return tuple(axis.name for axis in self.axes)

    @property
    def formula(self) -> str:
        return self.form.formula_of(tuple(axis.letter for axis in self.axes))

    @property
    def units(self) -> str:
        axes = ", ".join(f"{axis.letter}: {axis.label}" for axis in self.axes)
        return f"{axes}, CR: compressed over original size"

    @cached_property
    def values(self) -> dict[str, float]:
        """Every fitted parameter by name."""
        found = self.optimum.solution
        linear = dict(zip(self.form.coefficients, map(float, found.coefficients[0]), strict=True))
        plain = self.problem.plain(found.theta[0])
        return linear | {one.name: float(value) for one, value in zip(self.form.nonlinear, plain, strict=True)}

    @cached_property
    def _noise(self) -> float:
        y, fitted, weights = (self.cells[key].to_numpy(float) for key in ("ratio", "fitted", "weight"))
        if self.elsewhere is not None:
            return self.elsewhere.noise
        if self.problem.whiten is not None:
            return self.optimum.squares / (len(y) - self.n_free)
        return self.method.loss.noise(y, weights, fitted, len(y) - self.form.n_free)

    @cached_property
    def region(self) -> Region:
        """Confidence region of the exponents at `level` for one parameter at a time."""
        y, weights = (self.cells[key].to_numpy(float) for key in ("ratio", "weight"))
        # The floor keeps the region of an exact fit wider than rounding errors.
        floor = 1e-14 * float((weights * (y - y.mean()) ** 2).sum())
        growth = max(self._noise, floor) * float(stats.f.ppf(self.level, 1, self.dof))
        extra, already = (None, 0.0) if self.elsewhere is None else (self.elsewhere.squares, self.elsewhere.at_optimum)
        return Region(self.problem, self.optimum, self.optimum.squares + already + growth, extra)

    @cached_property
    def ci(self) -> dict[str, Interval]:
        """Profile-likelihood intervals: the values at which the best law of the other parameters still fits, with the
        F quantile of 1 and (cells - free parameters) degrees of freedom (Bates and Watts 1988, ch. 6)."""
        found = {key: self.region.coefficient_interval(i) for i, key in enumerate(self.form.coefficients)}
        return found | {one.name: self.region.nonlinear_interval(i) for i, one in enumerate(self.form.nonlinear)}

    @property
    def log_likelihood(self) -> float:
        y, fitted, weights = (self.cells[key].to_numpy(float) for key in ("ratio", "fitted", "weight"))
        return _log_likelihood(y, fitted, weights, self.method.loss, self.problem.whiten)

    @property
    def a(self) -> float:
        return self.values.get("a", 0.0)

    @property
    def b(self) -> float:
        return self.values["b"]

    @property
    def c(self) -> float:
        return self.values.get("c", 0.0)

    @property
    def d(self) -> float:
        return self.values.get("d", 0.0)

    @property
    def alpha(self) -> float:
        return self.values.get("alpha", math.nan)

    @property
    def beta(self) -> float:
        return self.values.get("beta", math.nan)

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Coefficients of the law of bits per byte (8 CR); its a is the irreducible term of the Chinchilla form."""
        return {key: 8.0 * value if key in self.form.coefficients else value for key, value in self.values.items()}

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
        tail, opened = 0.5 * (1.0 - self.level), _open_ends(frame, self.problem)
        ends = {key: np.quantile(opened[key], [tail, 1.0 - tail], method="nearest") for key in self.values}
        return {key: (float(low), float(high)) for key, (low, high) in ends.items()}

    @property
    def identified(self) -> dict[str, bool]:
        """For alpha and beta: whether the interval is bounded on both sides, spans less than a factor of 4, and the
        coefficient of the term is above 0 within its interval."""
        return {name: not self._complaint(name) for name in self._exponents}

    @property
    def _exponents(self) -> list[str]:
        return [one.name for one in self.form.nonlinear if one.name in ("alpha", "beta")]

    def _complaint(self, exponent: str) -> str:
        low, high = self.ci[exponent]
        coefficient, variable = self.form.term_of(exponent), self.axes[exponent == "beta"].letter
        context = f"(these {len(self.cells)} cells, {100 * self.level:g} % profile interval)"
        if self.ci[coefficient][0] <= 0:
            without = f"a law in which the ratio does not depend on {variable} fits about as well"
            return f"{exponent} is not identified: {without} {context}."
        if low > 0 and math.isfinite(high) and high / low < IDENTIFIED_FACTOR:
            return ""
        if low <= 0 and math.isinf(high):
            return f"{exponent} is not identified: every value above 0 fits about as well {context}."
        span = f"from {low:.3g} to {high:.3g}" if math.isfinite(high) else f"from {low:.3g} upwards"
        return f"{exponent} is not identified: values {span} fit about as well {context}."

    @property
    def warnings(self) -> list[str]:
        """Plain sentences on what these data do not support; empty where both exponents are identified."""
        return [sentence for sentence in map(self._complaint, self._exponents) if sentence]

    @property
    def bounds(self) -> list[str]:
        """Plain sentences on where a coefficient, or the lower end of a's interval, is held at its bound of 0."""
        held = [key for i, key in enumerate(self.form.coefficients) if self.problem.nonneg[i] and self.values[key] <= 0]
        notes = [f"{key} is at its bound of 0." for key in held]
        if self.form.intercept and self.method.a_nonneg and "a" not in held and self.ci["a"][0] <= 0:
            notes.append("The interval of a ends at its bound of 0: the data alone do not keep a above it.")
        return notes

    def _points(self, at: tuple[ArrayLike, ...], named: Mapping[str, ArrayLike]) -> tuple[Array, ...]:
        given = dict(zip(self.x, at, strict=False)) | dict(named)
        if set(given) != set(self.x) or len(at) + len(named) != len(self.x):
            raise Error(
                f"expected {' and '.join(self.x)}, found {len(at)} value(s) and {', '.join(named) or 'no name'}"
            )
        points = np.broadcast_arrays(*(np.asarray(given[name], dtype=float) for name in self.x))
        if not all((one > 0).all() for one in points):
            raise Error(f"{' and '.join(self.x)} must be above 0")
        return tuple(points)

    def predict(self, *at: ArrayLike, **named: ArrayLike) -> Any:
        """Ratio at the axes' values, in their order or by name (params, step), broadcast against each other.

        float64 array, or float for numbers.
        """
        points = self._points(at, named)
        theta = np.array([self.values[one.name] for one in self.form.nonlinear])
        columns = self.form.columns(theta, tuple(np.log(np.atleast_1d(one)) for one in points))
        ratio = self.a + sum(self.values[term] * column for term, column in zip(self.form.terms, columns, strict=True))
        return ratio if points[0].shape else float(np.ravel(ratio)[0])

    def band(self, *at: ArrayLike, **named: ArrayLike) -> tuple[Array, Array]:
        """(low, high) of the law itself at `level` (not of a new cell), point by point, by profile likelihood."""
        points = self._points(at, named)
        low, high = self.region.band(tuple(one.ravel() for one in points))
        return low.reshape(points[0].shape), high.reshape(points[0].shape)

    def predict_interval(
        self, *at: ArrayLike, chunks: Literal["same", "new"] = "same", **named: ArrayLike
    ) -> tuple[Array, Array]:
        """(low, high) of the ratio of a new cell at `level`, point by point: the law's uncertainty and a cell's error.

        By profile predictive likelihood (Bjornstad 1990), which for a linear law is Student's interval; bounds of
        coefficients are kept. With random="run" the cell is one of a new run. chunks: "same" as the fitted cells', or
        "new" chunks of the same data: the spread over resampled chunks is added in quadrature (only from rows of
        chunks, with resamples above 0).
        """
        points = self._points(at, named)
        flat = tuple(one.ravel() for one in points)
        middle = np.ravel(self.predict(*flat))
        low, high = self.region.predictive(flat, self._noise_of_a_cell(middle))
        if chunks == "new":
            if self.over_chunks is None or self.over_chunks.empty:
                raise Error(f'{self.name}: chunks="new" needs a law fitted to rows of chunks, with resamples above 0')
            ends = np.quantile(self._over_chunks_at(flat), [0.5 - 0.5 * self.level, 0.5 + 0.5 * self.level], axis=0)
            low = middle - np.hypot(middle - low, np.maximum(middle - ends[0], 0.0))
            high = middle + np.hypot(high - middle, np.maximum(ends[1] - middle, 0.0))
        elif chunks != "same":
            raise Error(f"chunks {chunks!r} is not one of same, new")
        return low.reshape(points[0].shape), high.reshape(points[0].shape)

    def _noise_of_a_cell(self, predicted: Array) -> Array:
        """Variance of a new cell's error in the units in which the fit's limit grows, one value a point."""
        y, fitted, weights = (self.cells[key].to_numpy(float) for key in ("ratio", "fitted", "weight"))
        residual = np.log(y / np.maximum(fitted, 1e-3 * y)) if self.method.loss.log else y - fitted
        plain = 1.0
        if self.method.loss.huber:  # the limit grows by an estimate's variance; a cell has the errors' own
            plain = float((weights * residual**2).sum() / (len(y) - self.form.n_free)) / max(self._noise, 1e-300)
        unit = np.maximum(predicted, 1e-3 * y.min()) ** 2 if self.method.loss.log else np.ones_like(predicted)
        return np.asarray(plain * (1.0 + self.run_variance) * unit)

    def _over_chunks_at(self, points: tuple[Array, ...]) -> Array:
        """The law of every resample of chunks at the points: [resamples, points]."""
        assert self.over_chunks is not None
        theta = self.over_chunks[[one.name for one in self.form.nonlinear]].to_numpy(float)
        columns = self.form.columns(theta, tuple(np.log(one) for one in points))
        ratio = self.over_chunks[["a"]].to_numpy(float) if self.form.intercept else np.zeros((len(theta), 1))
        for term, column in zip(self.form.terms, columns, strict=True):
            ratio = ratio + self.over_chunks[[term]].to_numpy(float) * column
        return np.asarray(ratio)

    def refit(self, cells: pd.DataFrame) -> ScalingLaw:
        """The law of other cells of the same data set, fitted in the same way, without resamples."""
        if self.elsewhere is not None:
            raise Error(f"{self.name}: a law of a joint fit is not fitted alone; the joint laws have a hold-out")
        return fit_cells(self.name, cells, self.axes, self.method, self.level)

    def holdout(self, by: str | None = None, keep: int | None = None) -> HoldOut:
        """Fits on the smaller values of one axis, predicts the next: errors and the intervals' coverage.

        by: name of an axis (default: the first). keep: fit on the smallest `keep` values and predict all others;
        default: roll forward, from three values on (more where three have too few cells) to the last but one, each
        time predicting the next.
        """
        return roll_forward([self], by, keep, lambda cells: [self.refit(cells[0])])

    def plan(self, budget: float, **options: Any) -> Plan:
        """Which runs to measure next so that alpha becomes identified; see llmcomp.law.plan.plan_cells."""
        return plan_cells(self, budget, **options)

    def report(self, format: Literal["markdown", "latex"] = "markdown") -> str:
        """What a reader needs to judge or repeat the fit, after the checklist of (Mis)Fitting (arXiv 2502.18969)."""
        return report_of(self, format)

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
        plural = [f"{self.cells[axis.column].nunique()} {axis.one}s" for axis in self.axes]
        origin = [str(self.cells[key].iloc[0]) for key in ("modality", "protocol", "mapping")]
        parts = [*origin[:1], f"protocol {origin[1]}" * bool(origin[1]), f"mapping {origin[2]}" * bool(origin[2])]
        where = ", ".join(part for part in parts if part and part != self.name)
        largest = float(np.abs(self.residuals).max())
        title = f"{self.name} ({where})" if where else self.name
        errors = f"rms error {self.rmse:.4f}, largest {largest:.4f}"
        return [
            f"{self.formula}    ({self.units})",
            f"{title}: {len(self.cells)} cells, {' x '.join(plural)}; {self.method.describe()}",
            f"R^2 {self.r2:.3f}, {errors}, AIC {self.aic:.1f}, BIC {self.bic:.1f}",
        ]

    def _table(self) -> list[list[str]]:
        level = f"{100 * self.level:g} %"
        columns = [
            (f"{level} profile", self.ci),
            (f"{level} cells", self.ci_cells),
            (f"{level} chunks", self.ci_chunks),
        ]
        shown = [(title, ci) for title, ci in columns if ci is not None and not np.isnan(ci[self.form.names[0]]).any()]
        head = ["", "value", *(title for title, _ in shown)]
        places = {one.name for one in self.form.nonlinear}
        unused = {name for name in places if self.values[self.form.term_of(name)] == 0}
        texts = {key: "none" if key in unused else number(value) for key, value in self.values.items()}
        return [head, *([key, text, *(span(ci[key]) for _, ci in shown)] for key, text in texts.items())]

    def _sentences(self) -> list[str]:
        return [*self.warnings, *self.bounds, *self.notes]

    def __str__(self) -> str:
        return "\n".join([*self._headline(), "", *align(self._table()), *self._sentences()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = self._table()
        lines = [html.escape(line) for line in (*self._headline(), *self._sentences())]
        return "<br>".join(lines) + html_table(head, body)

    def to_latex(self) -> str:
        """A LaTeX tabular of the coefficients with their intervals; needs no package."""
        head = ["", "value", f"{100 * self.level:g}\\,\\% interval"]
        return latex_table(
            head, [[tex_name(key), tex_number(v), tex_span(self.ci[key])] for key, v in self.values.items()]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything a program may want, ready for JSON: an open end of an interval is None."""
        return {
            "name": self.name,
            "form": self.form.name,
            "formula": self.formula,
            "units": self.units,
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
        """Ratio against each axis for every value of the other, with the law's band; matplotlib Axes, returned."""
        from llmcomp.law import plot  # the only way from here to matplotlib

        return plot.law(self, axes)


def _closed(ci: Mapping[str, Interval]) -> dict[str, list[float | None]]:
    return {key: [value if math.isfinite(value) else None for value in interval] for key, interval in ci.items()}


def frame_of(problem: Problem, solution: Solution) -> pd.DataFrame:
    """One row a fit, one column a parameter in plain units."""
    columns = {key: solution.coefficients[:, i] for i, key in enumerate(problem.form.coefficients)}
    plain = problem.plain(solution.theta)
    return pd.DataFrame(columns | {one.name: plain[:, i] for i, one in enumerate(problem.form.nonlinear)})


def fit_cells(name: str, cells: pd.DataFrame, axes: tuple[Axis, ...], method: Method, level: float) -> ScalingLaw:
    """The law of these cells, without resamples. Error in one line where they cannot give one."""
    check_design(name, cells, axes, method.form)
    x = tuple(cells[axis.column].to_numpy(float) for axis in axes)
    y, weights = cells["ratio"].to_numpy(float), weights_of(name, cells, method.weights)
    problem, ratio = Problem(x, method.form, method.a_nonneg), 0.0
    if method.random is not None:
        runs = runs_of(name, cells, axes)
        ratio = variance_ratio(problem, y, runs)
        problem = Problem(x, method.form, method.a_nonneg, inverse_root(runs, ratio))
    optimum = solve(problem, y, weights, method.loss)
    fitted = optimum.solution.fitted[0]
    cells = cells.assign(fitted=fitted, residual=y - fitted, weight=weights)
    return ScalingLaw(name, method, level, cells, problem, optimum, axes, run_variance=ratio)

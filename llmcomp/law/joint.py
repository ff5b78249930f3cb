"""One law of several data sets: exponents, or everything but a shift and a factor, are shared where the data allow it.

The data sets have errors of their own size, weighed by iteration. Which sharing is supported is decided by AICc and by
hold-out, side by side. What may not live here: drawing, single laws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize

from llmcomp.errors import Error
from llmcomp.law.forms import FORMS, SCALED, Array, Form
from llmcomp.law.holdout import HoldOut, roll_forward
from llmcomp.law.laws import ScalingLaws
from llmcomp.law.projection import Loss, Optimum, Problem, evaluate, grid_squares, project
from llmcomp.law.scaling_law import Elsewhere, Method, ScalingLaw
from llmcomp.law.tables import Axis, axes_named, check_design, groups

# What data sets may share, least first: names of nonlinear parameters, or None for all of the form's.
SHARES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "beta": ("beta",),
    "alpha": ("alpha",),
    "exponents": ("alpha", "beta"),
    "scale": ("alpha", "beta", "balance"),
}
_N_GRID, _N_BALANCE = 26, 15


class JointLaws(ScalingLaws):
    """Laws that share parameters, by name of the data set; every one predicts and has intervals as a law of its own.

    share: what they share (a key of SHARES). n_free: free parameters of all laws together, without the variances.
    """

    def __init__(self, laws: Mapping[str, ScalingLaw], share: str, n_free: int):
        super().__init__(laws)
        self.share, self.n_free = share, n_free

    def __str__(self) -> str:
        what = f"{len(self)} data sets, {self.n_cells} cells, {self.n_free} free parameters"
        return f"Joint law, shared: {self.share}; {what}, AICc {self.aicc:.1f}\n\n{super().__str__()}"

    __repr__ = __str__

    @property
    def n_cells(self) -> int:
        return sum(len(law.cells) for law in self.values())

    @property
    def log_likelihood(self) -> float:
        """Of independent normal errors with a variance for each data set."""
        return sum(law.log_likelihood for law in self.values())

    @property
    def aic(self) -> float:
        return 2.0 * (self.n_free + len(self)) - 2.0 * self.log_likelihood

    @property
    def aicc(self) -> float:
        """AIC with the correction for few cells (Hurvich and Tsai 1989); inf where there are too few."""
        k, n = self.n_free + len(self), self.n_cells
        return self.aic + 2.0 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf

    @property
    def bic(self) -> float:
        return math.log(self.n_cells) * (self.n_free + len(self)) - 2.0 * self.log_likelihood

    def refit(self, cells: Sequence[pd.DataFrame]) -> list[ScalingLaw]:
        """The joint law of other cells of the same data sets, in their order."""
        first = next(iter(self.values()))
        named = dict(zip(self, cells, strict=True))
        return list(_fit(named, first.axes, first.method, share=self.share, level=first.level).values())

    def holdout(self, by: str | None = None, keep: int | None = None) -> HoldOut:
        """As ScalingLaw.holdout, with the joint law of all data sets fitted again for every step forward."""
        return roll_forward(list(self.values()), by, keep, self.refit)


def fit_joint(
    table: pd.DataFrame,
    *,
    share: str = "auto",
    x: str | Sequence[str] = ("params", "step"),
    a_nonneg: bool = True,
    level: float = 0.95,
) -> JointLaws:
    """One additive law over all data sets of the table, least squares of the ratio, a variance for each data set.

    share: "none", "beta", "alpha", "exponents" (both), "scale" (both, and the balance of the two terms: data sets
      differ by a shift a and a factor b only), or "auto": the one with the least AICc. What is not shared is each data
      set's own.
    x, a_nonneg, level: as fit_scaling_law; two axes. Error if the table has one data set only.
    """
    if share not in ("auto", *SHARES):
        raise Error(f"share {share!r} is not one of auto, {', '.join(SHARES)}")
    axes = axes_named(x)
    if len(axes) != 2:
        raise Error("a joint law needs two axes")
    cells = {group.name: group.cells for group in groups(table, axes)}
    if len(cells) < 2:
        raise Error(f"a joint law needs at least two data sets, found {', '.join(cells)}")
    method = Method(FORMS["additive"], Loss(), "equal", a_nonneg)
    found = [_fit(cells, axes, method, share=one, level=level) for one in (SHARES if share == "auto" else (share,))]
    return min(found, key=lambda laws: laws.aicc)


def compare_shares(table: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """One row a way to share, least AICc first: free parameters, AIC, AICc, BIC, rms error, and over both axes the rms
    error and coverage of what ScalingLaws.holdout predicts. options: as fit_joint."""
    rows = []
    for share in SHARES:
        laws = fit_joint(table, share=share, **options)
        squares = np.concatenate([law.residuals**2 for law in laws.values()])
        scores = {key: getattr(laws, key) for key in ("n_free", "aic", "aicc", "bic")}
        parts = pd.concat([laws.holdout(axis.name).table for axis in next(iter(laws.values())).axes])
        out = {"holdout": float(np.sqrt((parts["error"] ** 2).mean())), "coverage": float(parts["inside"].mean())}
        rows.append({"share": share} | scores | {"rmse": float(np.sqrt(squares.mean()))} | out)
    return pd.DataFrame(rows).sort_values("aicc", kind="stable", ignore_index=True)


@dataclass
class _Stack:
    """Problems side by side, some of whose nonlinear parameters are one and the same."""

    problems: list[Problem]
    y: list[Array]
    shared: list[int]  # positions among the nonlinear parameters, the same in every problem

    @property
    def n_nonlinear(self) -> int:
        return len(self.problems[0].ranges)

    @property
    def own(self) -> list[int]:
        return [i for i in range(self.n_nonlinear) if i not in self.shared]

    def split(self, at: Array) -> Array:
        """[shared, own of the first, own of the second, ...] -> [problems, q]."""
        n_shared = len(self.shared)
        full = np.empty((len(self.problems), self.n_nonlinear))
        full[:, self.shared] = at[:n_shared]
        full[:, self.own] = at[n_shared:].reshape(len(self.problems), -1)
        return full

    def join(self, full: Array) -> Array:
        return np.concatenate([full[0, self.shared], full[:, self.own].ravel()])

    def start(self, variances: Array) -> Array:
        """Best point of the full grid: the own parameters' least squares for every shared point, summed."""
        sizes = [_N_BALANCE if i == 2 else _N_GRID for i in range(self.n_nonlinear)]
        ranges = self.problems[0].ranges
        axes = [np.linspace(low, high, n) for (low, high), n in zip(ranges, sizes, strict=True)]
        grid = np.stack([one.ravel() for one in np.meshgrid(*axes, indexing="ij")], axis=-1)
        order = self.shared + self.own
        n_shared = math.prod(sizes[i] for i in self.shared)
        tables = []
        for problem, y in zip(self.problems, self.y, strict=True):
            squares = next(grid_squares(problem, grid, y[None], np.ones((1, len(y)))))[1]
            tables.append(squares.reshape(sizes).transpose(order).reshape(n_shared, -1))
        best = int(sum(table.min(1) / v for table, v in zip(tables, variances, strict=True)).argmin())
        full = np.empty((len(self.problems), self.n_nonlinear))
        for i, table in enumerate(tables):
            index = np.unravel_index(best * table.shape[1] + int(table[best].argmin()), [sizes[j] for j in order])
            for j, k in zip(order, index, strict=True):
                full[i, j] = axes[j][k]
        return self.join(full)

    def residuals(self, at: Array, variances: Array) -> Array:
        parts = [
            (y - evaluate(problem, one[None], y[None], np.ones((1, len(y)))).fitted[0]) / math.sqrt(variance)
            for problem, y, one, variance in zip(self.problems, self.y, self.split(at), variances, strict=True)
        ]
        return np.concatenate(parts)

    def solve(self) -> tuple[Array, Array]:
        """Logarithms of the nonlinear parameters [problems, q] and the variances of the errors, by iteration."""
        variances = np.array([y.var() for y in self.y])
        low = self.join(np.stack([problem.ranges for problem in self.problems])[..., 0])
        high = self.join(np.stack([problem.ranges for problem in self.problems])[..., 1])
        at = self.start(variances)
        for i in range(8):
            tried = np.clip(at, low + 1e-9, high - 1e-9)
            found = optimize.least_squares(
                self.residuals, tried, args=(variances,), bounds=(low, high), xtol=1e-10, ftol=1e-12, gtol=None
            )
            at = found.x
            parts = np.split(found.fun, np.cumsum([len(y) for y in self.y])[:-1])
            new = np.array([max(v * (r**2).mean(), 1e-300) for v, r in zip(variances, parts, strict=True)])
            settled = np.allclose(new, variances, rtol=1e-6)
            variances = new
            if settled:
                break
            if i == 0:
                at = self.start(variances)  # with the errors' true sizes another valley may be the deepest
        return self.split(at), variances


def _fit(
    cells: Mapping[str, pd.DataFrame], axes: tuple[Axis, ...], method: Method, *, share: str, level: float
) -> JointLaws:
    form: Form = SCALED if share == "scale" else FORMS["additive"]
    method = replace(method, form=form)
    for name, one in cells.items():
        check_design(name, one, axes, form)
    x = [tuple(one[axis.column].to_numpy(float) for axis in axes) for one in cells.values()]
    y = [one["ratio"].to_numpy(float) for one in cells.values()]
    centre = tuple(float(np.log(np.concatenate([one[i] for one in x])).mean()) for i in range(2))
    problems = [Problem(one, form, method.a_nonneg, centre=centre) for one in x]
    shared = [i for i, one in enumerate(form.nonlinear) if one.name in SHARES[share]]
    stack = _Stack(problems, y, shared)
    at, variances = stack.solve()
    n_free = len(cells) * (len(form.coefficients) + len(stack.own)) + len(shared)
    n_cells = sum(map(len, y))
    if n_cells <= n_free + len(cells):
        raise Error(f"{n_free} free parameters need more than {n_free + len(cells)} cells, found {n_cells}")
    laws = {}
    for i, (name, one) in enumerate(cells.items()):
        ones = np.ones(len(y[i]))
        solution = evaluate(problems[i], at[i][None], y[i][None], ones[None])
        squares = float(((y[i] - solution.fitted[0]) ** 2).sum())
        others = [
            _Other(problems[j], y[j], shared, at=at[j], weight=variances[i] / variances[j])
            for j in range(len(y))
            if j != i
        ]
        # Its share of the degrees of freedom: its errors are known from its own cells only.
        dof = max(1, round(len(y[i]) * (n_cells - n_free) / n_cells))
        elsewhere = Elsewhere(others, dof, squares / dof)
        fitted = solution.fitted[0]
        laws[name] = ScalingLaw(
            name, method, level, one.assign(fitted=fitted, residual=y[i] - fitted, weight=ones), problems[i],
            Optimum(solution, y[i], ones, squares), axes, elsewhere=elsewhere,
            notes=(f"{_SAID[share]} (joint fit of {len(cells)} data sets).",),
        )  # fmt: skip
    return JointLaws(laws, share, n_free)


_SAID = {
    "none": "Nothing is shared with the other data sets",
    "beta": "beta is shared with the other data sets",
    "alpha": "alpha is shared with the other data sets",
    "exponents": "alpha and beta are shared with the other data sets",
    "scale": "alpha, beta and the balance of the terms are shared with the other data sets",
}


class _Other:
    """What the shared parameters cost in one other data set, its own parameters at their best."""

    def __init__(self, problem: Problem, y: Array, shared: list[int], *, at: Array, weight: float):
        self._problem, self._y, self._shared, self._weight = problem, y, shared, weight
        self._ones = np.ones(len(y))
        self._own = [i for i in range(len(at)) if i not in shared]
        self.at_optimum = weight * float(self._squares(np.exp(at)))
        if self._own and shared:
            self._profile = self._tabulate()

    def _squares(self, theta: Array) -> Array:
        return project(self._problem, theta, self._y, self._ones)[0]

    def _tabulate(self) -> tuple[Array, Array]:
        """Least squares over the own exponent for a fine grid of the shared one."""
        (s,), (o,) = self._shared, self._own
        low, high = self._problem.ranges.T
        held, free = (np.linspace(low[i], high[i], 161) for i in (s, o))
        at = np.empty((len(held), len(free), 2))
        at[..., s], at[..., o] = held[:, None], free
        squares = self._squares(np.exp(at))
        best = np.clip(squares.argmin(1), 1, len(free) - 2)
        left, middle, right = (squares[np.arange(len(held)), best + k] for k in (-1, 0, 1))
        curvature = left - 2 * middle + right
        bent = np.where(curvature > 0, (left - right) ** 2 / np.where(curvature > 0, 8 * curvature, 1.0), 0.0)
        return held, np.minimum(squares.min(1), np.maximum(middle - bent, 0.0))

    def __call__(self, theta: Array) -> Array:
        """[...] for theta [..., q] of the data set that is looked at."""
        if not self._shared:
            return np.full(theta.shape[:-1], self.at_optimum)
        if not self._own:
            return self._weight * self._squares(theta)
        held, squares = self._profile
        return np.asarray(self._weight * np.interp(np.log(theta[..., self._shared[0]]), held, squares))

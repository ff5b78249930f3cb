"""Least squares for sums of two power laws by variable projection: arrays in, arrays out.

For fixed exponents (alpha, beta) the law is linear in its coefficients, so the search runs over the two exponents only
and the rest is solved exactly (Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973). What may not live here: tables, names
of data sets, text. `fit` gives the results a meaning.

Shapes: n cells, B problems solved side by side, [...] any grid of exponents. Linear coefficients are ordered
(a, b, c, d) as far as the form has them; inside this file they belong to columns scaled by the geometric means of P, S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Array = NDArray[np.float64]

# Below 0.01 a power law over any range of sizes met in practice is a logarithm; above 10 it is a step after the
# smallest size. Both limits fit as well as their neighbours, so an interval that reaches one is open there.
EXPONENT_RANGE = (0.01, 10.0)


@dataclass(frozen=True)
class Form:
    """What is summed: an intercept a or none, b P^-alpha, c S^-beta, and perhaps one more column with coefficient d."""

    name: str
    formula: str
    intercept: bool = True
    fourth: str | None = None  # "interaction": P^-alpha S^-beta; "upturn": S / P
    fourth_nonneg: bool = False

    @property
    def coefficients(self) -> tuple[str, ...]:
        return ("a",) * self.intercept + ("b", "c") + ("d",) * (self.fourth is not None)

    @property
    def n_free(self) -> int:
        return len(self.coefficients) + 2


@dataclass(frozen=True)
class Problem:
    """One design (the P and S of n cells), a form, and whether a is held at or above 0. b and c always are."""

    params: Array  # [n], parameters
    steps: Array  # [n], steps
    form: Form
    a_nonneg: bool = False

    @cached_property
    def log_params_mean(self) -> float:
        return float(np.log(self.params).mean())

    @cached_property
    def log_steps_mean(self) -> float:
        return float(np.log(self.steps).mean())

    @cached_property
    def nonneg(self) -> tuple[bool, ...]:
        fourth = (self.form.fourth_nonneg,) * (self.form.fourth is not None)
        return (self.a_nonneg,) * self.form.intercept + (True, True) + fourth

    def columns(
        self, alpha: Array, beta: Array, params: Array | None = None, steps: Array | None = None
    ) -> list[Array]:
        """The columns at the cells (or at given P, S), each [..., n] for exponents [...], scaled to 1 at the means."""
        p = np.log(self.params if params is None else params) - self.log_params_mean
        s = np.log(self.steps if steps is None else steps) - self.log_steps_mean
        by_params = np.exp(-alpha[..., None] * p)
        by_steps = np.exp(-beta[..., None] * s)
        columns = [np.ones_like(by_params)] if self.form.intercept else []
        columns += [by_params, by_steps]
        if self.form.fourth == "interaction":
            columns.append(by_params * by_steps)
        elif self.form.fourth == "upturn":
            columns.append(np.broadcast_to(np.exp(s - p), by_params.shape))
        return columns

    def unscale(self, alpha: Array, beta: Array) -> Array:
        """Factors [..., k] that turn coefficients of scaled columns into those of P and S in plain units."""
        p, s = alpha * self.log_params_mean, beta * self.log_steps_mean
        logs = [np.zeros_like(p)] if self.form.intercept else []
        logs += [p, s]
        if self.form.fourth == "interaction":
            logs.append(p + s)
        elif self.form.fourth == "upturn":
            logs.append(np.full_like(p, self.log_params_mean - self.log_steps_mean))
        return np.exp(np.stack(logs, axis=-1))


def _subsets(items: list[int]) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(items, size) for size in range(len(items) + 1))


def _solve(gram: list[list[Array]], rhs: list[Array], free: list[int]) -> tuple[dict[int, Array], Array]:
    """Solves the normal equations of the free columns elementwise; returns coefficients and the drop in the squares.

    Gaussian elimination without pivoting (the matrix is positive semidefinite). A column that depends on the earlier
    ones gets coefficient 0, so that a degenerate resample stays finite and silent.
    """
    g = {(i, j): gram[i][j] for i in free for j in free if j >= i}
    h = {i: rhs[i] for i in free}
    pivots = {}
    for at, i in enumerate(free):
        pivots[i] = np.where(g[i, i] > 1e-12 * gram[i][i], g[i, i], np.inf)
        for j in free[at + 1 :]:
            factor = g[i, j] / pivots[i]
            h[j] = h[j] - factor * h[i]
            for m in free[at + 1 :]:
                if m >= j:
                    g[j, m] = g[j, m] - factor * g[i, m]
    theta: dict[int, Array] = {}
    for i in reversed(free):
        rest = h[i]
        for j, value in theta.items():
            rest = rest - g[i, j] * value
        theta[i] = rest / pivots[i]
    zero = np.zeros_like(rhs[0])
    drop = sum((theta[i] * rhs[i] for i in free), start=zero)
    return theta, drop


def _project(problem: Problem, gram: list[list[Array]], rhs: list[Array], yy: Array) -> tuple[Array, Array]:
    """The least weighted sum of squares [...] and its coefficients [..., k], bounded as the problem says.

    The optimum under bounds is the best of the feasible optima in which some bounded columns are left out.
    """
    k = len(rhs)
    bounded = [i for i in range(k) if problem.nonneg[i]]
    best = np.full_like(rhs[0], np.inf)
    coefficients = np.zeros((*rhs[0].shape, k))
    for dropped in _subsets(bounded):
        free = [i for i in range(k) if i not in dropped]
        theta, drop = _solve(gram, rhs, free)
        better = yy - drop < best
        for i in free:
            if i in bounded:
                better &= theta[i] >= 0
        best = np.where(better, yy - drop, best)
        for i in range(k):
            coefficients[..., i] = np.where(better, theta.get(i, 0.0), coefficients[..., i])
    return np.maximum(best, 0.0), coefficients


def project(problem: Problem, alpha: Array, beta: Array, y: Array, w: Array) -> tuple[Array, Array]:
    """Least sum of w (y - law)^2 for exponents [...], y and w broadcasting to [..., n]: squares [...], coefficients."""
    columns = problem.columns(alpha, beta)
    # Centring y on its mean keeps the digits of small residuals; the intercept takes the mean back.
    mean = (w * y).sum(-1) / w.sum(-1) if problem.form.intercept and not problem.a_nonneg else np.zeros(())
    y = y - mean[..., None]
    gram = [[(w * u * v).sum(-1) for v in columns] for u in columns]
    rhs = [(w * y * u).sum(-1) for u in columns]
    squares, coefficients = _project(problem, gram, rhs, np.broadcast_to((w * y * y).sum(-1), rhs[0].shape))
    if mean.shape or mean:
        coefficients[..., 0] += mean
    return squares, coefficients


def _grid_start(problem: Problem, y: Array, w: Array, n_grid: int = 26) -> tuple[Array, Array]:
    """Best exponents of a coarse grid for each of B problems: log alpha [B], log beta [B]."""
    low, high = np.log(EXPONENT_RANGE)
    axis = np.linspace(low, high, n_grid)
    log_alpha, log_beta = (axis_.ravel() for axis_ in np.meshgrid(axis, axis, indexing="ij"))
    columns = problem.columns(np.exp(log_alpha), np.exp(log_beta))
    y = y - ((w * y).sum(-1) / w.sum(-1))[:, None] * (problem.form.intercept and not problem.a_nonneg)
    best = np.empty(len(y), dtype=np.intp)
    for start in range(0, len(y), 64):  # blocks that stay in the cache
        block = slice(start, start + 64)
        wt, wyt = w[block].T, (w[block] * y[block]).T
        gram = [[(u * v) @ wt for v in columns] for u in columns]
        rhs = [u @ wyt for u in columns]
        squares, _ = _project(problem, gram, rhs, np.broadcast_to((wyt * y[block].T).sum(0), rhs[0].shape))
        best[block] = squares.argmin(0)
    return log_alpha[best], log_beta[best]


def _pattern_search(
    problem: Problem, y: Array, w: Array, start: tuple[Array, Array], *, spacing: float, n_rounds: int
) -> tuple[Array, Array]:
    """Refines exponents of B problems at once: a 3 x 3 stencil in (log alpha, log beta) moves, or shrinks by 2."""
    low, high = np.log(EXPONENT_RANGE)
    u, v = (axis.copy() for axis in start)
    h = np.full_like(u, spacing)
    du, dv = (axis.ravel()[:, None] for axis in np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]))
    rows = np.arange(len(u))
    for _ in range(n_rounds):
        us, vs = np.clip(u + h * du, low, high), np.clip(v + h * dv, low, high)
        squares, _ = project(problem, np.exp(us), np.exp(vs), y, w)
        best = squares.argmin(0)
        best = np.where(squares[4] <= squares[best, rows], 4, best)
        u, v, h = us[best, rows], vs[best, rows], np.where(best == 4, h / 2, h)
    return u, v


@dataclass(frozen=True)
class Loss:
    """What is minimised: squares of the ratio or of its logarithm, plain or Huber's with threshold delta."""

    log: bool = False
    huber: bool = False
    delta: float | None = None  # in units of the residual; None: 1.345 robust standard deviations (95 % efficiency)

    def working(self, y: Array, w: Array, fitted: Array) -> tuple[Array, Array]:
        """Response and weights whose weighted squares have the loss's gradient at `fitted` (Gauss-Newton and IRLS)."""
        residual = y - fitted
        if self.log:
            fitted = np.maximum(fitted, 1e-3 * y)
            residual = np.log(y / fitted)
            y, w = fitted * (1.0 + residual), w / fitted**2
        if self.huber:
            size = np.abs(residual)
            w = w * np.minimum(1.0, self._threshold(size) / np.maximum(size, 1e-300))
        return y, w

    def _threshold(self, size: Array) -> Array:
        if self.delta is not None:
            return np.asarray(self.delta)
        return 1.345 * np.maximum(np.median(size, axis=-1, keepdims=True) / 0.6745, 1e-12)

    def noise(self, y: Array, w: Array, fitted: Array, dof: int) -> float:
        """Growth of the working squares that one unit of F stands for: the variance of the errors for plain squares.

        For Huber's loss the variance of an M-estimate, mean psi^2 / (mean psi')^2 (Huber 1964), times the mean working
        weight; psi' is smoothed with a normal kernel, since few residuals may lie inside the threshold.
        """
        residual = np.log(y / np.maximum(fitted, 1e-3 * y)) if self.log else y - fitted
        if not self.huber:
            return float((w * residual**2).sum() / dof)
        size = np.abs(residual)
        delta = self._threshold(size)
        shrink = np.minimum(1.0, delta / np.maximum(size, 1e-300))
        kernel = max(1.06 * float(np.median(size)) / 0.6745 * len(y) ** -0.2, 1e-12)
        slope = float((special.ndtr((delta - residual) / kernel) - special.ndtr((-delta - residual) / kernel)).mean())
        return float(shrink.mean() * (w * (shrink * residual) ** 2).sum() / dof / slope**2)


@dataclass(frozen=True)
class Solution:
    """Exponents [B], linear coefficients [B, k] in plain units of P and S, fitted values [B, n]."""

    alpha: Array
    beta: Array
    coefficients: Array
    fitted: Array


def solve_batch(problem: Problem, y: Array, w: Array, loss: Loss | None = None) -> Solution:
    """B fits at once, y and w [B, n]: coarse global grid over the exponents, then refinement to about 1e-5."""
    loss = loss or Loss()
    response, weights = loss.working(y, w, y) if loss.log else (y, w)
    u, v = _grid_start(problem, response, weights)
    u, v = _pattern_search(problem, response, weights, (u, v), spacing=0.14, n_rounds=36)
    if loss.log or loss.huber:
        for _ in range(20 if loss.huber else 6):
            response, weights = loss.working(y, w, _evaluate(problem, u, v, response, weights).fitted)
            u, v = _pattern_search(problem, response, weights, (u, v), spacing=0.03, n_rounds=6)
    return _evaluate(problem, u, v, response, weights)


def _evaluate(problem: Problem, u: Array, v: Array, y: Array, w: Array) -> Solution:
    alpha, beta = np.exp(u), np.exp(v)
    _, theta = project(problem, alpha, beta, y, w)
    columns = np.stack(problem.columns(alpha, beta), axis=-1)
    return Solution(alpha, beta, theta * problem.unscale(alpha, beta), np.einsum("bnk,bk->bn", columns, theta))


@dataclass(frozen=True)
class Optimum:
    """One fit to full precision, with the working response and weights [n] at which it is the weighted optimum."""

    solution: Solution
    response: Array
    weights: Array
    squares: float


def solve(problem: Problem, y: Array, w: Array, loss: Loss | None = None) -> Optimum:
    """One fit, y and w [n]: as solve_batch, then polished by SciPy's trust-region least squares."""
    loss = loss or Loss()
    found = solve_batch(problem, y[None], w[None], loss)
    x = np.log([found.alpha[0], found.beta[0]])
    response, weights = y, w
    for _ in range(40 if loss.huber else 8 if loss.log else 1):
        if loss.log or loss.huber:
            response, weights = loss.working(y, w, found.fitted[0])
        before, x = x, _polish(problem, response, weights, x)
        found = _evaluate(problem, x[:1], x[1:], response[None], weights[None])
        if np.abs(x - before).max() < 1e-10:
            break
    squares = float((weights * (response - found.fitted[0]) ** 2).sum())
    return Optimum(found, response, weights, squares)


def _polish(problem: Problem, y: Array, w: Array, x: Array) -> Array:
    root = np.sqrt(w / w.max())

    def residuals(at: Array) -> Array:
        alpha, beta = np.exp(at[:1]), np.exp(at[1:])
        _, theta = project(problem, alpha, beta, y, w)
        fitted = np.stack(problem.columns(alpha, beta), axis=-1)[0] @ theta[0]
        return np.asarray(root * (y - fitted))

    low, high = np.log(EXPONENT_RANGE)
    inside = np.clip(x, low + 1e-9, high - 1e-9)
    # Where no exponent matters (b = c = 0) the Jacobian is 0 and SciPy divides by it; the point is then kept.
    with np.errstate(divide="ignore", invalid="ignore"):
        found = optimize.least_squares(
            residuals, inside, jac="3-point", bounds=(low, high), xtol=1e-13, ftol=1e-14, gtol=None
        )
    return np.asarray(found.x if found.cost <= 0.5 * (residuals(x) ** 2).sum() else x)


class Region:
    """All (alpha, beta) at which the best law has at most `limit` squares: the confidence region of the exponents.

    From it follow profile intervals: for an exponent its extent; for a function linear in the coefficients its
    extremes, which at fixed exponents lie on an ellipsoid and have a closed form. Bounds on coefficients are kept.
    """

    def __init__(self, problem: Problem, optimum: Optimum, limit: float, n_grid: int = 25):
        self._problem, self._y, self._w, self._limit = problem, optimum.response, optimum.weights, limit
        self._best = np.log([optimum.solution.alpha[0], optimum.solution.beta[0]])
        self._n_grid = n_grid
        self._low, self._high = np.log(EXPONENT_RANGE)
        self._box = self._find_box()

    def _grid(self, box: Array, n_grid: int) -> tuple[Array, Array]:
        axes = [np.linspace(box[i, 0], box[i, 1], n_grid) for i in range(2)]
        u, v = np.meshgrid(*axes, indexing="ij")
        return u.ravel(), v.ravel()

    def _inside(self, u: Array, v: Array) -> NDArray[np.bool_]:
        squares, _ = project(self._problem, np.exp(u), np.exp(v), self._y, self._w)
        return squares <= self._limit

    def _find_box(self) -> Array:
        """Shrinks from the whole range to the region's bounding box plus one cell on each side."""
        box = np.array([[self._low, self._high]] * 2)
        for _ in range(30):
            u, v = self._grid(box, self._n_grid)
            inside = self._inside(u, v)
            points = np.column_stack([np.append(u[inside], self._best[0]), np.append(v[inside], self._best[1])])
            cell = (box[:, 1] - box[:, 0]) / (self._n_grid - 1)
            low, high = points.min(0) - cell, points.max(0) + cell
            new = np.clip(np.column_stack([low, high]), self._low, self._high)
            if ((new[:, 1] - new[:, 0]) > 0.6 * (box[:, 1] - box[:, 0])).all():
                return new
            box = new
        return box

    def _extreme(self, value: Callable[[Array, Array], Array]) -> tuple[float, bool]:
        """The largest `value` inside the region and whether it lies at the end of the exponents' range."""
        box, best, at = self._box, -np.inf, self._best
        for n_grid in (self._n_grid, *[9] * 7):
            u, v = self._grid(box, n_grid)
            values = value(u, v)
            top = int(values.argmax())
            if values[top] > best:
                best, at = float(values[top]), np.array([u[top], v[top]])
            cell = (box[:, 1] - box[:, 0]) / (n_grid - 1)
            box = np.clip(np.column_stack([at - cell, at + cell]), self._low, self._high)
        edge = 1e-3
        return best, bool((at < self._low + edge).any() or (at > self._high - edge).any())

    def exponent_interval(self, index: int) -> tuple[float, float]:
        """Extent of alpha (index 0) or beta (1); 0 or inf where the range of exponents ends before the region does."""
        low, high = (self._exponent_end(index, outer) for outer in self._box[index])
        return (
            0.0 if low < self._low + 1e-3 else float(np.exp(low)),
            np.inf if high > self._high - 1e-3 else float(np.exp(high)),
        )

    def _exponent_end(self, index: int, outer: float) -> float:
        """Where the profile crosses the limit between the optimum and `outer`: the outermost crossing of a grid."""
        axis = np.linspace(self._best[index], outer, self._n_grid)
        low, high = self._box[1 - index]
        others = np.append(np.linspace(low, high, self._n_grid), self._best[1 - index])
        held, free = (grid.ravel() for grid in np.meshgrid(axis, others, indexing="ij"))
        inside = self._inside(*((held, free) if index == 0 else (free, held))).reshape(len(axis), -1).any(1)
        last = int(np.flatnonzero(inside).max(initial=0))
        # The grid finds the crossing to a cell or two; the exact profile, which is never above the grid's, decides.
        while last < len(axis) - 1 and self._profile(index, axis[last + 1]) <= self._limit:
            last += 1
        if last == len(axis) - 1:
            return outer

        def excess(at: float) -> float:
            return self._profile(index, at) - self._limit

        return (
            float(optimize.brentq(excess, axis[last], axis[last + 1], xtol=1e-6))
            if excess(axis[last]) < 0
            else axis[last]
        )

    def _profile(self, index: int, at: float) -> float:
        """Least squares over the other exponent with one held at exp(at): a grid, then two zooms and a parabola."""
        low, high = self._box[1 - index]
        best = np.inf
        for n_points in (25, 9, 9):
            others = np.linspace(low, high, n_points)
            held = np.full_like(others, at)
            u, v = (held, others) if index == 0 else (others, held)
            squares, _ = project(self._problem, np.exp(u), np.exp(v), self._y, self._w)
            best = min(best, float(squares.min()))
            top, cell = others[squares.argmin()], others[1] - others[0]
            low, high = max(top - cell, self._low), min(top + cell, self._high)
        if 0 < squares.argmin() < len(squares) - 1:
            left, middle, right = squares[squares.argmin() - 1 : squares.argmin() + 2]
            curvature = left - 2 * middle + right
            best = min(best, float(middle - (left - right) ** 2 / (8 * curvature))) if curvature > 0 else best
        return best

    def coefficient_interval(self, index: int) -> tuple[float, float]:
        """Extremes of a linear coefficient in plain units; infinite where it still grows at the end of the range."""

        def value(sign: float) -> Callable[[Array, Array], Array]:
            def at(u: Array, v: Array) -> Array:
                alpha, beta = np.exp(u), np.exp(v)
                return (
                    self._coefficient_extreme(alpha, beta, index, sign) * self._problem.unscale(alpha, beta)[:, index]
                )

            return at

        (low, low_open), (high, high_open) = self._extreme(value(-1.0)), self._extreme(value(1.0))
        bounded = self._problem.nonneg[index]
        is_intercept = self._problem.form.intercept and index == 0
        # At the ends of the range a falls and b, c rise without limit; their other extremes are proper limits.
        # 0.0 - low, not -low: no negative zero.
        return (
            -np.inf if low_open and not bounded else 0.0 - low,
            np.inf if high_open and not is_intercept else high,
        )

    def _coefficient_extreme(self, alpha: Array, beta: Array, index: int, sign: float) -> Array:
        """max of sign * coefficient over {squares <= limit, bounds kept} at each (alpha, beta); -inf where empty."""
        columns = np.stack(self._problem.columns(alpha, beta), axis=-1)  # [G, n, k]
        weighted = columns * self._w[:, None]
        gram = np.einsum("gnj,gnk->gjk", weighted, columns)
        rhs = np.einsum("gnk,n->gk", weighted, self._y)
        yy = float((self._w * self._y**2).sum())
        k = columns.shape[-1]
        bounded = [i for i in range(k) if self._problem.nonneg[i]]
        best = np.full(len(alpha), -np.inf)
        for dropped in _subsets(bounded):
            free = [i for i in range(k) if i not in dropped]
            inverse = np.linalg.inv(gram[:, free][:, :, free])
            theta = np.einsum("gjk,gk->gj", inverse, rhs[:, free])
            slack = self._limit - (yy - (theta * rhs[:, free]).sum(-1))
            if index in free:
                j = free.index(index)
                stretch = np.sqrt(np.maximum(slack, 0.0) / inverse[:, j, j])
                theta = theta + sign * stretch[:, None] * inverse[:, :, j]
                value = sign * theta[:, j]
            else:
                value = np.zeros(len(alpha))
            feasible = slack >= 0
            for j, i in enumerate(free):
                if i in bounded:
                    feasible &= theta[:, j] >= 0
            best = np.where(feasible, np.maximum(best, value), best)
        return best

    def band(self, params: Array, steps: Array) -> tuple[Array, Array]:
        """Lowest and highest value of the law at given P and S [m] over the region (bounds on coefficients ignored)."""
        u, v = self._grid(self._box, self._n_grid)
        inside = self._inside(u, v)
        u, v = np.append(u[inside], self._best[0]), np.append(v[inside], self._best[1])
        alpha, beta = np.exp(u), np.exp(v)
        columns = np.stack(self._problem.columns(alpha, beta), axis=-1)
        weighted = columns * self._w[:, None]
        inverse = np.linalg.inv(np.einsum("gnj,gnk->gjk", weighted, columns))
        theta = np.einsum("gjk,gnk,n->gj", inverse, weighted, self._y)
        squares = (self._w * (self._y - np.einsum("gnk,gk->gn", columns, theta)) ** 2).sum(-1)
        slack = np.maximum(self._limit - squares, 0.0)
        at = np.stack(self._problem.columns(alpha, beta, params, steps), axis=-1)  # [G, m, k]
        middle = np.einsum("gmk,gk->gm", at, theta)
        half = np.sqrt(slack[:, None] * np.maximum(np.einsum("gmj,gjk,gmk->gm", at, inverse, at), 0.0))
        return (middle - half).min(0), (middle + half).max(0)

"""Least squares for laws that are linear but for their exponents, by variable projection: arrays in, arrays out.

With the exponents held the law is linear in its coefficients, so the search runs over the exponents only and the rest
is solved exactly (Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973; for scaling laws arXiv 2603.22339). Every search
starts from a full grid of exponents. What may not live here: tables, names of data sets, text. `fit` gives the results
a meaning.

Shapes: n cells, B problems solved side by side, q nonlinear parameters, [...] any grid of them. Linear coefficients are
ordered (a, b, c, d) as far as the form has them; inside this file they belong to columns scaled by the geometric means
of the axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations

import numpy as np
from scipy import optimize, special

from llmcomp.law.forms import Array, Form

# Grid points an axis of the nonlinear parameters, by how many there are: the whole grid is tried.
N_GRID = {1: 101, 2: 26, 3: 15, 4: 9}
# Where a surface may have several valleys: so many of the grid's local minima are polished, and the best is kept.
N_STARTS = 8


@dataclass(frozen=True)
class Problem:
    """One design (n cells on one axis or two), a form, and whether a is held at or above 0. Most others always are.

    whiten: [n, n], a square root of the inverse of the errors' correlation where they are correlated.
    centre: logarithms to centre the axes at, where several problems share parameters.
    """

    x: tuple[Array, ...]  # one array [n] an axis
    form: Form
    a_nonneg: bool = False
    whiten: Array | None = None
    centre: tuple[float, ...] | None = None

    @cached_property
    def means(self) -> tuple[float, ...]:
        """Mean logarithm of every axis, unless another centre was given."""
        return self.centre or tuple(float(np.log(x).mean()) for x in self.x)

    @cached_property
    def ranges(self) -> Array:
        """Logarithms of the least and the greatest value of every nonlinear parameter, [q, 2]."""
        return np.log([one.range for one in self.form.nonlinear])

    @cached_property
    def nonneg(self) -> tuple[bool, ...]:
        bounded = tuple(term not in self.form.any_sign for term in self.form.terms)
        return (self.a_nonneg,) * self.form.intercept + bounded

    def columns(self, theta: Array, x: tuple[Array, ...] | None = None) -> list[Array]:
        """The columns at the cells (whitened), or at given points; each [..., n] for theta [..., q], 1 at the means."""
        logs = tuple(np.log(one) - mean for one, mean in zip(self.x if x is None else x, self.means, strict=True))
        columns = self.form.columns(theta, logs)
        columns = [np.ones_like(columns[0])] * self.form.intercept + columns
        if x is None and self.whiten is not None:
            columns = [column @ self.whiten.T for column in columns]
        return columns

    def unscale(self, theta: Array) -> Array:
        """Factors [..., k] that turn coefficients of scaled columns into those of the axes in plain units."""
        logs = self.form.units(theta, self.means)
        return np.exp(np.stack([np.zeros_like(logs[0])] * self.form.intercept + logs, axis=-1))

    def plain(self, theta: Array) -> Array:
        """Nonlinear parameters [..., q] in plain units."""
        return np.asarray(theta * np.exp(self.form.nonlinear_units(theta, self.means)))

    def whitened(self, y: Array) -> Array:
        return y if self.whiten is None else np.asarray(y @ self.whiten.T)


def subsets(items: list[int]) -> Iterator[tuple[int, ...]]:
    """All subsets: which bounded coefficients are held at 0."""
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
    for dropped in subsets(bounded):
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


def project(problem: Problem, theta: Array, y: Array, w: Array) -> tuple[Array, Array]:
    """Least sum of w (y - law)^2 for theta [..., q], y and w broadcasting to [..., n]: squares [...], coefficients."""
    columns = problem.columns(theta)
    # Centring y on its mean keeps the digits of small residuals; the intercept takes the mean back.
    is_centred = problem.form.intercept and not problem.a_nonneg and problem.whiten is None
    mean = (w * y).sum(-1) / w.sum(-1) if is_centred else np.zeros(())
    y = problem.whitened(y - mean[..., None])
    gram = [[(w * u * v).sum(-1) for v in columns] for u in columns]
    rhs = [(w * y * u).sum(-1) for u in columns]
    squares, coefficients = _project(problem, gram, rhs, np.broadcast_to((w * y * y).sum(-1), rhs[0].shape))
    if mean.shape or mean:
        coefficients[..., 0] += mean
    return squares, coefficients


def grid_of(box: Array, n_grid: int) -> Array:
    """All points [n_grid ** q, q] of a grid over a box [q, 2]; one point of no axis where q is 0."""
    if not len(box):
        return np.empty((1, 0))
    axes = np.meshgrid(*(np.linspace(low, high, n_grid) for low, high in box), indexing="ij")
    return np.stack([axis.ravel() for axis in axes], axis=-1)


def grid_squares(problem: Problem, grid: Array, y: Array, w: Array) -> Iterator[tuple[slice, Array]]:
    """Least squares [G, B'] at every point of a grid [G, q] of logarithms, for blocks of the B problems."""
    columns = problem.columns(np.exp(grid))
    is_centred = problem.form.intercept and not problem.a_nonneg and problem.whiten is None
    y = problem.whitened(y - ((w * y).sum(-1) / w.sum(-1))[:, None] * is_centred)
    for start in range(0, len(y), 64):  # blocks that stay in the cache
        block = slice(start, start + 64)
        wt, wyt = w[block].T, (w[block] * y[block]).T
        gram = [[(u * v) @ wt for v in columns] for u in columns]
        rhs = [u @ wyt for u in columns]
        squares, _ = _project(problem, gram, rhs, np.broadcast_to((wyt * y[block].T).sum(0), rhs[0].shape))
        yield block, squares


def _grid_start(problem: Problem, y: Array, w: Array) -> Array:
    """Best point of the coarse grid for each of B problems: logarithms [B, q]."""
    grid = grid_of(problem.ranges, N_GRID[len(problem.ranges)])
    best = np.empty(len(y), dtype=np.intp)
    for block, squares in grid_squares(problem, grid, y, w):
        best[block] = squares.argmin(0)
    return grid[best]


def _local_minima(problem: Problem, y: Array, w: Array) -> Array:
    """The lowest local minima of the coarse grid for one problem, y and w [n]: logarithms [m, q], best first."""
    n_grid, q = N_GRID[len(problem.ranges)], len(problem.ranges)
    grid = grid_of(problem.ranges, n_grid)
    squares = next(grid_squares(problem, grid, y[None], w[None]))[1].reshape((n_grid,) * q)
    padded = np.pad(squares, 1, constant_values=np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3,) * q)
    lowest = np.flatnonzero((squares <= windows.min(tuple(range(-q, 0)))).ravel())
    order = np.argsort(squares.ravel()[lowest], kind="stable")[:N_STARTS]
    return grid[lowest[order]]


def _stencil(q: int) -> Array:
    """Moves of the pattern search [m, q], none of them in the middle: all neighbours, for many axes one axis a time."""
    if q <= 2:
        return grid_of(np.tile([-1.0, 1.0], (q, 1)), 3)
    return np.vstack([-np.eye(q), np.zeros((1, q)), np.eye(q)])


def _pattern_search(problem: Problem, y: Array, w: Array, start: Array, *, spacing: float, n_rounds: int) -> Array:
    """Refines the logarithms [B, q] of B problems at once: a stencil moves to its best point, or shrinks by 2."""
    low, high = problem.ranges.T
    at, h = start.copy(), np.full(len(start), spacing)
    moves = _stencil(start.shape[1])
    middle, rows = len(moves) // 2, np.arange(len(at))
    for _ in range(n_rounds):
        tried = np.clip(at + h[:, None] * moves[:, None, :], low, high)
        squares, _ = project(problem, np.exp(tried), y, w)
        best = squares.argmin(0)
        best = np.where(squares[middle] <= squares[best, rows], middle, best)
        at, h = tried[best, rows], np.where(best == middle, h / 2, h)
    return at


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

    def total(self, y: Array, w: Array, fitted: Array) -> float:
        """What is minimised, summed over the cells; of Huber's loss with a given threshold, else of squares."""
        size = np.abs(np.log(y / np.maximum(fitted, 1e-3 * y)) if self.log else y - fitted)
        if not self.huber:
            return float((w * size**2).sum())
        delta = self._threshold(size)
        return float((w * np.where(size <= delta, size**2, 2 * delta * size - delta**2)).sum())

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
    """Nonlinear parameters [B, q] (places scaled), coefficients [B, k] in plain units, fitted values [B, n]."""

    theta: Array
    coefficients: Array
    fitted: Array


def solve_batch(
    problem: Problem, y: Array, w: Array, loss: Loss | None = None, n_rounds: int | None = None
) -> Solution:
    """B fits at once, y and w [B, n]: full grid over the exponents, then refinement, by default to about 1e-5."""
    loss = loss or Loss()
    response, weights = loss.working(y, w, y) if loss.log else (y, w)
    at = _grid_start(problem, response, weights)
    n_rounds = n_rounds or (36 if at.shape[1] <= 2 else 80)
    at = _pattern_search(problem, response, weights, at, spacing=0.14, n_rounds=n_rounds)
    if loss.log or loss.huber:
        for _ in range(20 if loss.huber else 6):
            response, weights = loss.working(y, w, evaluate(problem, at, response, weights).fitted)
            at = _pattern_search(problem, response, weights, at, spacing=0.03, n_rounds=6)
    return evaluate(problem, at, response, weights)


def evaluate(problem: Problem, at: Array, y: Array, w: Array) -> Solution:
    """The best laws with the logarithms `at` [B, q] of the nonlinear parameters held, y and w [B, n]."""
    theta = np.exp(at)
    _, scaled = project(problem, theta, y, w)
    columns = np.stack(problem.columns(theta, problem.x), axis=-1)
    return Solution(theta, scaled * problem.unscale(theta), np.einsum("bnk,bk->bn", columns, scaled))


@dataclass(frozen=True)
class Optimum:
    """One fit to full precision, with the working response and weights [n] at which it is the weighted optimum."""

    solution: Solution
    response: Array
    weights: Array
    squares: float


def solve(problem: Problem, y: Array, w: Array, loss: Loss | None = None) -> Optimum:
    """One fit, y and w [n]: as solve_batch, then polished by SciPy's trust-region least squares.

    With more than two nonlinear parameters, or Huber's loss of a given threshold, whose *sum* may have several valleys
    (a mean would only change when a search gives up: arXiv 2404.10102), also from the grid's other local minima.
    """
    loss = loss or Loss()
    found = solve_batch(problem, y[None], w[None], loss, n_rounds=10)
    best = _refine(problem, y, w, loss, at=np.log(found.theta[0]), found=found)
    is_robust = loss.huber and loss.delta is not None
    if is_robust or len(problem.ranges) > 2:
        working = loss.working(y, w, y) if loss.log else (y, w)
        least = loss.total(y, w, best.solution.fitted[0]) if is_robust else best.squares
        for start in _lowest_valleys(problem, *working, n_polished=N_STARTS if is_robust else 3):
            found = evaluate(problem, start[None], y[None], w[None])
            other = _refine(problem, y, w, loss, at=start, found=found)
            reached = loss.total(y, w, other.solution.fitted[0]) if is_robust else other.squares
            if reached < least * (1.0 - 1e-9):
                best, least = other, reached
    return best


def _lowest_valleys(problem: Problem, y: Array, w: Array, n_polished: int) -> Array:
    """The grid's local minima, followed downwards side by side; logarithms [at most n_polished, q], best first."""
    starts = _local_minima(problem, y, w)
    ys, ws = (np.broadcast_to(one, (len(starts), len(y))) for one in (y, w))
    ends = _pattern_search(problem, ys, ws, starts, spacing=0.14, n_rounds=60)
    squares, _ = project(problem, np.exp(ends), ys, ws)
    if n_polished < len(ends):
        return ends[np.argsort(squares, kind="stable")[:n_polished]]
    return starts


def _refine(problem: Problem, y: Array, w: Array, loss: Loss, *, at: Array, found: Solution) -> Optimum:
    """Polishes from the logarithms `at` [q], whose law is `found`; reweights where the loss asks for it."""
    response, weights = y, w
    for _ in range(40 if loss.huber else 8 if loss.log else 1):
        if loss.log or loss.huber:
            response, weights = loss.working(y, w, found.fitted[0])
        before, at = at, _polish(problem, response, weights, at)
        found = evaluate(problem, at[None], response[None], weights[None])
        if np.abs(at - before).max() < 1e-10:
            break
    squares = float((weights * problem.whitened(response - found.fitted[0]) ** 2).sum())
    return Optimum(found, response, weights, squares)


def _polish(problem: Problem, y: Array, w: Array, at: Array) -> Array:
    root = np.sqrt(w / w.max())

    def residuals(here: Array) -> Array:
        theta = np.exp(here[None])
        _, scaled = project(problem, theta, y, w)
        fitted = np.stack(problem.columns(theta, problem.x), axis=-1)[0] @ scaled[0]
        return np.asarray(root * problem.whitened(y - fitted))

    low, high = problem.ranges.T
    # With more parameters a valley may be flat to its end, where digits beyond these mean nothing.
    n_most = None if len(at) <= 2 else 60
    inside = np.clip(at, low + 1e-9, high - 1e-9)
    # Where no exponent matters (b = c = 0) the Jacobian is 0 and SciPy divides by it; the point is then kept.
    with np.errstate(divide="ignore", invalid="ignore"):
        found = optimize.least_squares(
            residuals, inside, jac="3-point", bounds=(low, high), xtol=1e-13, ftol=1e-14, gtol=None, max_nfev=n_most
        )
    return np.asarray(found.x if found.cost <= 0.5 * (residuals(at) ** 2).sum() else at)

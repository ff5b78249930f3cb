"""The confidence region of a law's exponents, and what follows from it: intervals of parameters, of the law, of new
cells.

All (nonlinear parameters) at which the best law has at most `limit` squares. For a nonlinear parameter the interval is
the region's extent; for what is linear in the coefficients its extremes, which with the exponents held lie on an
ellipsoid and have a closed form. Profile likelihood: Bates and Watts 1988, ch. 6. What may not live here: tables, text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from llmcomp.law.forms import Array
from llmcomp.law.projection import Optimum, Problem, grid_of, project, subsets

# Grid points an axis: of the region's box, of a zoom into it, and of the box for predictive intervals.
_N_GRID = {1: 101, 2: 25, 3: 11, 4: 7}
_N_ZOOM = {1: 25, 2: 9, 3: 5, 4: 5}
_N_PREDICTIVE = {1: 201, 2: 31, 3: 13, 4: 7}


class Region:
    """See the head of the file. extra: squares [...] that theta [..., q] costs elsewhere, in a joint fit."""

    def __init__(
        self,
        problem: Problem,
        optimum: Optimum,
        limit: float,
        extra: Callable[[Array], Array] | None = None,
    ):
        self._problem, self._y, self._w, self._limit = problem, optimum.response, optimum.weights, limit
        self._extra = extra
        self._best = np.log(optimum.solution.theta[0])
        self._n_grid = _N_GRID[len(self._best)]
        self._low, self._high = problem.ranges.T
        self._box = self._find_box()

    def _elsewhere(self, at: Array) -> Array:
        return np.zeros(at.shape[:-1]) if self._extra is None else self._extra(np.exp(at))

    def _squares(self, at: Array) -> Array:
        return project(self._problem, np.exp(at), self._y, self._w)[0] + self._elsewhere(at)

    def _inside(self, at: Array) -> NDArray[np.bool_]:
        return np.asarray(self._squares(at) <= self._limit)

    def _find_box(self) -> Array:
        """Shrinks from the whole range to the region's bounding box plus one cell on each side."""
        box = self._problem.ranges
        for _ in range(30):
            at = grid_of(box, self._n_grid)
            points = np.vstack([at[self._inside(at)], self._best])
            cell = (box[:, 1] - box[:, 0]) / (self._n_grid - 1)
            low, high = points.min(0) - cell, points.max(0) + cell
            new = np.clip(np.column_stack([low, high]), self._low[:, None], self._high[:, None])
            if ((new[:, 1] - new[:, 0]) > 0.6 * (box[:, 1] - box[:, 0])).all():
                return new
            box = new
        return box

    def _extreme(self, value: Callable[[Array], Array]) -> tuple[float, bool]:
        """The largest `value` inside the region and whether it lies at the end of the exponents' range."""
        box, best, at = self._box, -np.inf, self._best
        for n_grid in (self._n_grid, *[_N_ZOOM[len(self._best)]] * 7):
            points = grid_of(box, n_grid)
            values = value(points)
            top = int(values.argmax())
            if values[top] > best:
                best, at = float(values[top]), points[top]
            cell = (box[:, 1] - box[:, 0]) / (n_grid - 1)
            box = np.clip(np.column_stack([at - cell, at + cell]), self._low[:, None], self._high[:, None])
        edge = 1e-3
        return best, bool((at < self._low + edge).any() or (at > self._high - edge).any())

    def nonlinear_interval(self, index: int) -> tuple[float, float]:
        """Extent of a nonlinear parameter in plain units; 0 or inf where its range ends before the region does."""
        if self._problem.form.nonlinear[index].kind == "balance":
            return self._balance_interval(index)
        low, high = (self._end(index, outer) for outer in self._box[index])
        unit = float(self._problem.plain(np.ones(len(self._best)))[index])
        return (
            0.0 if low < self._low[index] + 1e-3 else unit * float(np.exp(low)),
            np.inf if high > self._high[index] - 1e-3 else unit * float(np.exp(high)),
        )

    def _balance_interval(self, index: int) -> tuple[float, float]:
        """Extent in plain units, which depend on the exponents."""

        def value(sign: float) -> Callable[[Array], Array]:
            def of(at: Array) -> Array:
                plain = np.log(self._problem.plain(np.exp(at))[..., index])
                return np.where(self._inside(at), sign * plain, -np.inf)

            return of

        (low, low_open), (high, high_open) = self._extreme(value(-1.0)), self._extreme(value(1.0))
        return 0.0 if low_open else float(np.exp(-low)), np.inf if high_open else float(np.exp(high))

    def _held(self, index: int, held: Array, others: Array) -> Array:
        """Points [held, others, q] with one parameter held and the others [others, q - 1] free."""
        shape = (len(held), len(others))
        free = np.broadcast_to(others, (*shape, others.shape[-1]))
        return np.insert(free, index, np.broadcast_to(held[:, None], shape), axis=-1)

    def _end(self, index: int, outer: float) -> float:
        """Where the profile crosses the limit between the optimum and `outer`: the outermost crossing of a grid."""
        axis = np.linspace(self._best[index], outer, self._n_grid)
        rest = np.delete(self._best, index)
        others = np.vstack([grid_of(np.delete(self._box, index, axis=0), self._n_grid), rest])
        inside = self._inside(self._held(index, axis, others)).any(1)
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
        """Least squares over the others with one held at exp(at): a grid, then zooms, and for one other a parabola."""
        box, best = np.delete(self._box, index, axis=0), np.inf
        low_end, high_end = np.delete(self._low, index)[:, None], np.delete(self._high, index)[:, None]
        for n_points in (25, 9, 9) if len(box) <= 1 else (11, 5, 5, 5, 5):
            others = grid_of(box, n_points)
            squares = self._squares(self._held(index, np.array([at]), others))[0]
            best = min(best, float(squares.min()))
            top, cell = others[squares.argmin()], (box[:, 1] - box[:, 0]) / (n_points - 1)
            box = np.clip(np.column_stack([top - cell, top + cell]), low_end, high_end)
        if len(box) == 1 and 0 < squares.argmin() < len(squares) - 1:
            left, middle, right = squares[squares.argmin() - 1 : squares.argmin() + 2]
            curvature = left - 2 * middle + right
            best = min(best, float(middle - (left - right) ** 2 / (8 * curvature))) if curvature > 0 else best
        return best

    def coefficient_interval(self, index: int) -> tuple[float, float]:
        """Extremes of a linear coefficient in plain units; infinite where it still grows at the end of the range."""
        unit = np.eye(len(self._problem.nonneg))[index]

        def value(sign: float) -> Callable[[Array], Array]:
            def of(at: Array) -> Array:
                target = np.broadcast_to(sign * unit, (len(at), 1, len(unit)))
                return self._largest(at, target)[:, 0] * self._problem.unscale(np.exp(at))[:, index]

            return of

        (low, low_open), (high, high_open) = self._extreme(value(-1.0)), self._extreme(value(1.0))
        bounded = self._problem.nonneg[index]
        is_intercept = self._problem.form.intercept and index == 0
        # At the ends of the range a falls and b, c rise without limit; their other extremes are proper limits.
        # 0.0 - low, not -low: no negative zero.
        return (
            -np.inf if low_open and not bounded else 0.0 - low,
            np.inf if high_open and not is_intercept else high,
        )

    def _largest(self, at: Array, target: Array, noise: Array | float = 0.0) -> Array:
        """max of target . coefficients + e over {squares + e^2 / noise <= limit, bounds kept}: [G, m].

        at [G, q]: logarithms of the nonlinear parameters; target [G, m, k]; noise: variance of a new cell's error e
        over that of a fitted one (0: no e). -inf where the set is empty. Each face of the bounds is an ellipsoid.
        """
        theta = np.exp(at)
        columns = np.stack(self._problem.columns(theta), axis=-1)  # [G, n, k]
        y = self._problem.whitened(self._y)
        weighted = columns * self._w[:, None]
        gram = np.einsum("gnj,gnk->gjk", weighted, columns)
        rhs = np.einsum("gnk,n->gk", weighted, y)
        limit = self._limit - self._elsewhere(at) - float((self._w * y**2).sum())
        k = columns.shape[-1]
        bounded = [i for i in range(k) if self._problem.nonneg[i]]
        best = np.full(target.shape[:2], -np.inf)
        for dropped in subsets(bounded):
            free = [i for i in range(k) if i not in dropped]
            inverse = np.linalg.inv(gram[:, free][:, :, free])
            middle = np.einsum("gjk,gk->gj", inverse, rhs[:, free])
            slack = (limit + (middle * rhs[:, free]).sum(-1))[:, None]
            towards = target[:, :, free] @ inverse  # symmetric
            spread = noise + np.maximum((towards * target[:, :, free]).sum(-1), 0.0)
            with np.errstate(divide="ignore", invalid="ignore"):
                stretch = np.where(spread > 0, np.sqrt(np.maximum(slack, 0.0) / spread), 0.0)
            extreme = middle[:, None] + stretch[..., None] * towards
            value = (extreme * target[:, :, free]).sum(-1) + stretch * noise
            feasible = np.broadcast_to(slack >= 0, value.shape).copy()
            for j, i in enumerate(free):
                if i in bounded:
                    feasible &= extreme[..., j] >= 0
            best = np.where(feasible, np.maximum(best, value), best)
        return best

    def band(self, x: tuple[Array, ...]) -> tuple[Array, Array]:
        """Lowest and highest value of the law at points x, [m] an axis, over the region (bounds of coefficients
        ignored)."""
        at = grid_of(self._box, self._n_grid)
        theta = np.exp(np.vstack([at[self._inside(at)], self._best]))
        columns = np.stack(self._problem.columns(theta), axis=-1)
        y = self._problem.whitened(self._y)
        weighted = columns * self._w[:, None]
        inverse = np.linalg.inv(np.einsum("gnj,gnk->gjk", weighted, columns))
        scaled = np.einsum("gjk,gnk,n->gj", inverse, weighted, y)
        squares = (self._w * (y - np.einsum("gnk,gk->gn", columns, scaled)) ** 2).sum(-1)
        slack = np.maximum(self._limit - self._elsewhere(np.log(theta)) - squares, 0.0)
        there = np.stack(self._problem.columns(theta, x), axis=-1)  # [G, m, k]
        middle = np.einsum("gmk,gk->gm", there, scaled)
        half = np.sqrt(slack[:, None] * np.maximum(np.einsum("gmj,gjk,gmk->gm", there, inverse, there), 0.0))
        return (middle - half).min(0), (middle + half).max(0)

    def predictive(self, x: tuple[Array, ...], noise: Array) -> tuple[Array, Array]:
        """Lowest and highest ratio of a new cell at points x, [m] an axis: the values that, added to the data, raise
        the least squares by no more than the limit allows; bounds of coefficients kept.

        noise: variance [m] of the new cell's error over that of a fitted one of weight 1. Exact for a law that is
        linear (the interval of Student's t); profile predictive likelihood (Bjornstad 1990) for the others.
        """
        at = grid_of(self._box, _N_PREDICTIVE[len(self._best)])
        at = np.vstack([at[self._inside(at)], self._best])
        low, high = np.full((2, len(x[0])), np.nan)
        for start in range(0, len(x[0]), 64):
            part = slice(start, start + 64)
            there = np.stack(self._problem.columns(np.exp(at), tuple(one[part] for one in x)), axis=-1)
            low[part] = -self._largest(at, -there, noise[part]).max(0)
            high[part] = self._largest(at, there, noise[part]).max(0)
        return low, high

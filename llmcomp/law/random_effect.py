"""Training runs as a random effect: cells of one run (one model, one seed) share a part of their error.

y = law(x) + u_run + e, u ~ N(0, r s^2), e ~ N(0, s^2). With the ratio r held, whitened cells are independent again and
everything else stays as it is; r itself is chosen by restricted maximum likelihood (Patterson and Thompson 1971). What
may not live here: tables, text.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import optimize

from llmcomp.law.forms import Array
from llmcomp.law.projection import Optimum, Problem, solve


def inverse_root(runs: Array, ratio: float) -> Array:
    """[n, n]: the symmetric root of the inverse of V = I + ratio * (1 where two cells share a run)."""
    same = (runs[:, None] == runs[None, :]).astype(float)
    n_of_run = same.sum(1)
    shrink = (1.0 - 1.0 / np.sqrt(1.0 + ratio * n_of_run)) / n_of_run
    return np.asarray(np.eye(len(runs)) - same * shrink)


def variance_ratio(problem: Problem, y: Array, runs: Array) -> float:
    """Variance of the runs' effect over that of the cells' errors that is likeliest, from 0 to 100.

    problem: without whitening; y [n]; runs [n], a number a cell.
    """
    weights = np.ones(len(y))

    def criterion(share: float) -> float:
        whiten = inverse_root(runs, share / (1.0 - share))
        held = replace(problem, whiten=whiten)
        return _restricted(held, solve(held, y, weights), len(y))

    found = optimize.minimize_scalar(criterion, bounds=(0.0, 0.99), method="bounded", options={"xatol": 2e-3})
    share = float(found.x) if found.fun < criterion(0.0) else 0.0
    return share / (1.0 - share)


def _restricted(problem: Problem, optimum: Optimum, n: int) -> float:
    """-2 log restricted likelihood but for a constant, linear in the parameters about the optimum."""
    jacobian = jacobian_at(problem, optimum)
    p = jacobian.shape[1]
    squares = max(optimum.squares, 1e-300)
    assert problem.whiten is not None
    of_v = -2.0 * np.linalg.slogdet(problem.whiten)[1]
    # A direction in which the law is flat (a coefficient at 0) has no information at any ratio and is left out.
    spectrum = np.linalg.svd(jacobian, compute_uv=False)
    kept = spectrum[spectrum > 1e-8 * spectrum[0]]
    return float((n - p) * np.log(squares) + of_v + 2.0 * np.log(kept).sum())


def jacobian_at(problem: Problem, optimum: Optimum, x: tuple[Array, ...] | None = None) -> Array:
    """Derivatives [n, coefficients + nonlinear] of the (whitened) law by its scaled coefficients and by the logarithms
    of its nonlinear parameters, at the optimum; at the cells, or at given points x."""
    theta = optimum.solution.theta[0]
    scaled = optimum.solution.coefficients[0] / problem.unscale(theta[None])[0]

    def columns(at: Array) -> Array:
        return np.stack(problem.columns(np.exp(at)[None], x), axis=-1)[0]

    centre, step = np.log(theta), 1e-5
    by_theta = [
        (columns(centre + step * unit) - columns(centre - step * unit)) @ scaled / (2 * step)
        for unit in np.eye(len(theta))
    ]
    return np.column_stack([columns(centre), *by_theta])

"""What to measure next: the runs that narrow alpha most for a budget, by optimal design on the fitted law.

What may not live here: fitting itself; a law here is anything with axes, cells, problem, optimum, refit and predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from llmcomp.errors import Error
from llmcomp.law.forms import Array
from llmcomp.law.random_effect import jacobian_at
from llmcomp.law.text import align, html_table, latex_table, short_number, tex_text

Cost = Literal["train", "score"] | Callable[[float, float, int], float]
_N_SIZES = 13  # candidates from a quarter of the smallest size to four times the largest
_MOST_RUNS = 30
_LEAST_GAIN = 0.02  # of the logarithm of the variance: a run that gains less is not proposed


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Runs to measure next, and what they are expected to do for alpha.

    table: one row a run: its size, last step, cells, cost, and factor: the expected width of alpha's interval (its high
      end over its low one) once this run and those above are measured. factor_now: the same today. identified: share of
      simulated measurements after which alpha was identified. present_cost: what the fitted cells cost.
    """

    table: pd.DataFrame
    budget: float
    present_cost: float
    factor_now: float
    identified: float
    simulations: int
    law: str

    @property
    def spent(self) -> float:
        return float(self.table["cost"].sum())

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        size, last = self.table.columns[:2]
        head = [str(size), f"up to {last}", "cells", "cost", "alpha's interval: high / low"]
        body = [
            [
                short_number(row[size]),
                short_number(row[last]),
                f"{row['cells']:.0f}",
                f"{row['cost']:.3g}",
                _text(row["factor"]),
            ]
            for _, row in self.table.iterrows()
        ]
        return head, body

    def _sentence(self) -> str:
        return (
            f"{self.law}: {len(self.table)} run(s) for {self.spent:.3g} of a budget of {self.budget:.3g} (the fitted "
            f"cells: {self.present_cost:.3g}). alpha's interval spans a factor of {_text(self.factor_now)} by the "
            f"linearised law now; after these runs alpha was identified in {round(self.identified * self.simulations)} "
            f"of {self.simulations} simulated measurements."
        )

    def __str__(self) -> str:
        head, body = self._texts()
        return "\n".join([*align([head, *body]), self._sentence()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._texts()) + self._sentence()

    def to_latex(self) -> str:
        """A LaTeX tabular of the runs; needs no package."""
        head, body = self._texts()
        return latex_table([tex_text(text) for text in head], body)


def _text(factor: float) -> str:
    return f"{factor:.3g}" if factor < 1e6 else "more than 1e6"


def plan_cells(
    law: Any,
    budget: float,
    *,
    cost: Cost = "train",
    sizes: Sequence[float] | None = None,
    steps: Sequence[float] | None = None,
    simulations: int = 20,
    seed: int = 0,
) -> Plan:
    """Runs that make the interval of alpha as narrow as the budget allows, chosen one after another.

    budget: in the unit of `cost`. cost: "train": size x last step, since a run brings its earlier steps along (with
      parameters and steps, 6 x tokens of a step x this is FLOPs); "score": size x cells, where checkpoints exist
      already; or a function of (size, last step, cells).
    sizes, steps: what may be measured; by default 13 sizes from a quarter of the smallest to four times the largest,
      and the steps of the fitted cells. A size may be chosen again: another seed of it.
    The criterion is the variance of log alpha in the law linearised about the fit (c-optimal design: Pukelsheim 1993),
    greedily, by gain and by gain a cost, whichever ends better. Since that law may be far from linear, `simulations`
    measurements of the plan are drawn from the fitted law, fitted with the present cells, and alpha's profile interval
    is looked at. Error without a term of the size, or where not one run fits the budget.
    """
    if len(law.axes) != 2 or "alpha" not in law.values:
        raise Error("a plan needs a law of a size and of steps, with an exponent alpha of the size")
    if law.b <= 0:
        raise Error(f"{law.name}: b is 0, the fitted law does not depend on the size: there is no alpha to plan for")
    if not 0 < budget < math.inf:
        raise Error(f"budget is {budget}, expected a number above 0")
    sizes_, steps_ = (law.cells[axis.column].to_numpy(float) for axis in law.axes)
    default = np.geomspace(sizes_.min() / 4, 4 * sizes_.max(), _N_SIZES)
    all_sizes = default if sizes is None else np.asarray(sizes, float)
    all_steps = np.unique(steps_ if steps is None else np.asarray(steps, float))
    price = _price(cost)
    runs: list[tuple[float, Array]] = [(p, all_steps[: i + 1]) for p in all_sizes for i in range(len(all_steps))]
    costs = np.array([price(float(p), float(s[-1]), len(s)) for p, s in runs])
    if not (costs <= budget).any():
        raise Error(f"{law.name}: the cheapest run costs {costs.min():.4g}, more than the budget of {budget:.4g}")
    informations = np.stack([_information(law, np.full(len(s), p), s) for p, s in runs])
    now, at = _information(law), _place_of_alpha(law)
    chosen = min(
        (_greedy(now, informations, costs, budget, at=at, per_cost=per_cost) for per_cost in (False, True)),
        key=lambda order: float(_variance(now + informations[order].sum(0), at)),
    )
    present = sum(
        price(float(p), float(steps_[sizes_ == p].max()), int((sizes_ == p).sum())) for p in np.unique(sizes_)
    )
    chosen_runs = [runs[i] for i in chosen]
    rows = _rows_of(law, chosen_runs, [float(costs[i]) for i in chosen], now, informations[chosen])
    identified = _simulate(law, chosen_runs, simulations, seed)
    return Plan(rows, budget, present, _interval_factor(law, now, 0), identified, simulations, law.name)


def _rows_of(
    law: Any, runs: Sequence[tuple[float, Array]], costs: Sequence[float], now: Array, informations: Array
) -> pd.DataFrame:
    """A row a run, with the factor of alpha's interval once it and all before it are measured."""
    rows: list[tuple[float, float, int, float, float]] = []
    information = now
    for (p, s), cost, gained in zip(runs, costs, informations, strict=True):
        information = information + gained
        factor = _interval_factor(law, information, sum(row[2] for row in rows) + len(s))
        rows.append((p, s[-1], len(s), cost, factor))
    return pd.DataFrame(rows, columns=[law.axes[0].name, law.axes[1].name, "cells", "cost", "factor"])


def _price(cost: Cost) -> Callable[[float, float, int], float]:
    if callable(cost):
        return cost
    if cost == "train":
        return lambda size, last, n_cells: size * last
    if cost == "score":
        return lambda size, last, n_cells: size * n_cells
    raise Error(f"cost {cost!r} is not one of train, score, or a function")


def _information(law: Any, size: Array | None = None, steps: Array | None = None) -> Array:
    """Information of cells about (scaled coefficients, logarithms of nonlinear parameters) in units of the errors."""
    x = None if size is None or steps is None else (size, steps)
    jacobian = jacobian_at(law.problem, law.optimum, x)
    return np.asarray(jacobian.T @ jacobian)


def _variance(information: Array, at: int) -> Array:
    """Of the parameter at this position, [...] for [..., k, k]; a ridge keeps what is not identified finite."""
    scale = np.sqrt(np.maximum(np.diagonal(information, axis1=-2, axis2=-1), 1e-300))
    normal = information / (scale[..., :, None] * scale[..., None, :]) + 1e-12 * np.eye(scale.shape[-1])
    return np.asarray(np.linalg.inv(normal)[..., at, at] / scale[..., at] ** 2)


def _place_of_alpha(law: Any) -> int:
    return len(law.form.coefficients) + [one.name for one in law.form.nonlinear].index("alpha")


def _interval_factor(law: Any, information: Array, n_new: int) -> float:
    noise = float((law.residuals**2).sum() / law.dof)
    t = float(stats.t.ppf(0.5 + 0.5 * law.level, law.dof + n_new))
    return math.exp(min(2.0 * t * math.sqrt(noise * float(_variance(information, _place_of_alpha(law)))), 700.0))


def _greedy(now: Array, informations: Array, costs: Array, budget: float, *, at: int, per_cost: bool) -> list[int]:
    """Numbers of the runs in the order in which they are chosen."""
    chosen: list[int] = []
    left, information = budget, now
    while len(chosen) < _MOST_RUNS:
        allowed = np.flatnonzero(costs <= left)
        if not len(allowed):
            break
        gains = np.log(_variance(information, at) / _variance(information + informations[allowed], at))
        if gains.max() < _LEAST_GAIN:
            break
        best = int(allowed[(gains / costs[allowed] if per_cost else gains).argmax()])
        chosen.append(best)
        left -= costs[best]
        information = information + informations[best]
    return chosen


def _simulate(law: Any, runs: Sequence[tuple[float, Array]], simulations: int, seed: int) -> float:
    """Share of drawn measurements of the runs after which alpha is identified."""
    if simulations < 1:
        return math.nan
    rng = np.random.default_rng(seed)
    noise = math.sqrt(float((law.residuals**2).sum() / law.dof))
    size, last = (axis.column for axis in law.axes)
    at = pd.DataFrame(
        {size: np.concatenate([np.full(len(s), p) for p, s in runs]), last: np.concatenate([s for _, s in runs])}
    )
    truth = law.predict(at[size].to_numpy(float), at[last].to_numpy(float))
    cells = law.cells.drop(columns=["fitted", "residual", "weight"])
    plain = cells[[size, last, "ratio"]].astype(float)
    hits = 0
    for _ in range(simulations):
        drawn = np.maximum(truth + noise * rng.standard_normal(len(at)), 1e-6)
        hits += law.refit(pd.concat([plain, at.assign(ratio=drawn)], ignore_index=True)).identified["alpha"]
    return hits / simulations

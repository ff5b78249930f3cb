"""Rows or cells -> a scaling law with its uncertainty, and other forms of law beside it.

What may not live here: models, coding, drawing. Tables are read by tables.py, the law itself is in scaling_law.py, the
numerics in projection.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmcomp.errors import Error
from llmcomp.law.forms import FORMS, FORMS_OF_ONE_AXIS, Array
from llmcomp.law.laws import ScalingLaws
from llmcomp.law.projection import Loss, Problem, solve_batch
from llmcomp.law.scaling_law import Method, ScalingLaw, fit_cells, frame_of
from llmcomp.law.tables import Axis, Group, axes_named, groups

__all__ = ["FORMS", "compare_forms", "fit_scaling_law", "held_out"]


def fit_scaling_law(
    table: pd.DataFrame,
    *,
    x: str | Sequence[str] = ("params", "step"),
    form: str = "additive",
    response: Literal["ratio", "log"] = "ratio",
    loss: Literal["squares", "huber"] = "squares",
    huber_delta: float | None = None,
    weights: Literal["equal", "stderr"] = "equal",
    random: Literal["run"] | None = None,
    a_nonneg: bool = True,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> ScalingLaw | ScalingLaws:
    """Fits CR(P, S) = a + b P^-alpha + c S^-beta, P in parameters, S in steps, CR compressed over original size.

    table: rows (one a chunk), cells (one a model and step), or any table with the axes' columns and ratio. One law for
      every data set, protocol and mapping in it: a ScalingLaw if there is one, else ScalingLaws. Baselines (no params
      or step), step 0 and single-stream rows are left out and noted, cells of one size and step are noted.
    x: the axes by name, one or two: "params", "params_nonembedding" (column n_params_nonembedding), "step", "tokens"
      (column tokens_seen: tokens of training), "flops", or any numeric column of the table.
    form: "additive"; "kaplan" (a = 0); "interaction" (with a product term), "multiplicative" (only the product);
      "saturating" (exponential in the steps); "broken" (a second exponent from some step on); "upturn"; "chinchilla"
      (additive, Huber's loss with threshold 1e-3 of the logarithm). llmcomp.law.forms has the formulas and sources.
    response, loss, huber_delta: squares or Huber's loss of the ratio or its logarithm, summed over the cells; the
      threshold is in units of the residual, by default 1.345 robust standard deviations.
    weights: "equal", or "stderr": 1 / stderr^2 of the cells, from the chunks' spread.
    random: "run" gives every training run (model, and seed where the table has one) an effect of its own, normal with a
      variance by restricted maximum likelihood: cells of one run are not independent. Needs five runs, equal weights.
    a_nonneg: hold a >= 0 as b and c always are, since no ratio is below 0. Where the bound decides a value or an
      interval, the law says so. False lets a fall below 0, where alpha near 0 turns the law into a logarithm of P.
    level: of the intervals. `ci` are profile-likelihood intervals with F quantiles (n cells - free parameters degrees
      of freedom), calibrated for independent errors of the cells; `ci_cells` and `ci_chunks` are percentiles over
      `resamples` resampled sets of cells, and of chunks (the same chunks for every model; only from rows).
    Error if fewer cells than free parameters + 1, one size or one step only, ratios not finite or all equal.
    """
    axes = axes_named(x)
    forms = FORMS if len(axes) == 2 else FORMS_OF_ONE_AXIS
    allowed = {"form": (form, forms), "response": (response, ("ratio", "log")), "loss": (loss, ("squares", "huber"))}
    for option, (value, values) in allowed.items():
        if value not in values:
            raise Error(f"{option} {value!r} is not one of {', '.join(values)}")
    if not 0 < level < 1:
        raise Error(f"level is {level}, expected a number between 0 and 1")
    if huber_delta is not None and not 0 < huber_delta < math.inf:
        raise Error(f"huber_delta is {huber_delta}, expected a number above 0")
    if not isinstance(resamples, (int, np.integer)) or resamples < 0:
        raise Error(f"resamples is {resamples}, expected an integer of at least 0")
    if form == "chinchilla":
        response, loss, huber_delta = "log", "huber", huber_delta or 1e-3
    if random not in (None, "run"):
        raise Error(f"random {random!r} is not one of None, run")
    if random is not None and (weights != "equal" or loss != "squares" or response != "ratio" or form == "chinchilla"):
        raise Error('random="run" goes with equal weights and least squares on the ratio')
    chosen = Method(forms[form], Loss(response == "log", loss == "huber", huber_delta), weights, a_nonneg, random)
    laws = {
        group.name: _fit_group(group, axes, chosen, level=level, resamples=resamples, seed=seed)
        for group in groups(table, axes)
    }
    return next(iter(laws.values())) if len(laws) == 1 else ScalingLaws(laws)


def _fit_group(
    group: Group, axes: tuple[Axis, ...], method: Method, *, level: float, resamples: int, seed: int
) -> ScalingLaw:
    law = fit_cells(group.name, group.cells, axes, method, level)
    y, weights = law.cells["ratio"].to_numpy(float), law.cells["weight"].to_numpy(float)
    rng = np.random.default_rng(seed)
    over_cells = _resample_cells(law.problem, y, weights, method, resamples=resamples, rng=rng)
    over_chunks = None
    if group.rows is not None:
        over_chunks = _resample_chunks(law.problem, group.rows, weights, method, resamples=resamples, rng=rng)
    return replace(law, over_cells=over_cells, over_chunks=over_chunks, notes=group.notes)


def _resample_cells(
    problem: Problem, y: Array, weights: Array, method: Method, *, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Laws of cells drawn with replacement; draws that hold one size or one step only are left out."""
    n_cells = len(y)
    counts = rng.multinomial(n_cells, np.full(n_cells, 1.0 / n_cells), size=resamples).astype(float)
    drawn = counts > 0

    def distinct(values: Array) -> NDArray[np.int64]:
        return np.sum([(drawn[:, values == value]).any(1) for value in np.unique(values)], axis=0)

    usable = np.logical_and.reduce([distinct(x) > 1 for x in problem.x])
    counts = counts[usable]
    plain = replace(problem, whiten=None)  # a drawn cell twice is no second cell of its run
    return frame_of(plain, solve_batch(plain, np.broadcast_to(y, counts.shape), counts * weights, method.loss))


def _resample_chunks(
    problem: Problem, rows: pd.DataFrame, weights: Array, method: Method, *, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Laws of chunks drawn with replacement, one draw for all cells: what another sample of the data would give."""
    chunks, at = np.unique(rows["chunk"].to_numpy(), return_inverse=True)
    bits, bits_in = np.zeros((2, len(problem.x[0]), len(chunks)))
    cell = rows["cell"].to_numpy()
    bits_in[cell, at] = 8.0 * rows["bytes_in"].to_numpy(float)
    bits[cell, at] = rows["ratio"].to_numpy(float) * bits_in[cell, at]
    counts = rng.multinomial(len(chunks), np.full(len(chunks), 1.0 / len(chunks)), size=resamples).astype(float)
    total = counts @ bits_in.T
    usable = (total > 0).all(1)
    ratios = (counts[usable] @ bits.T) / total[usable]
    return frame_of(problem, solve_batch(problem, ratios, np.broadcast_to(weights, ratios.shape), method.loss))


def compare_forms(
    table: pd.DataFrame,
    forms: Sequence[str] | None = None,
    *,
    order: Literal["aicc", "holdout"] = "aicc",
    **options: Any,
) -> pd.DataFrame:
    """One row a data set and form, best first by `order`: fit, criteria, and errors on what was left out.

    Columns: law, form, n_free, r2, rmse, aic, aicc, bic; `largest_out`: rms error of the largest value of the first
    axis (the largest model) by the law of the others; `last_out`: of the last value of the second axis (the last
    step); `holdout`: rms error of all cells that ScalingLaw.holdout predicts along each axis; `coverage`: share of
    those inside their predictive interval. NaN where too little is left to fit. AIC and BIC take every form's own
    errors (of the ratio or its logarithm) as normal; "chinchilla" does not maximise that likelihood, so its values are
    upper bounds.
    forms: default all of as many axes. options: as fit_scaling_law.
    """
    if order not in ("aicc", "holdout"):
        raise Error(f"order {order!r} is not one of aicc, holdout")
    axes = axes_named(options.get("x", ("params", "step")))
    found = []
    for form in forms or (FORMS if len(axes) == 2 else FORMS_OF_ONE_AXIS):
        fitted = fit_scaling_law(table, form=form, resamples=0, **options)
        for law in fitted.values() if isinstance(fitted, ScalingLaws) else [fitted]:
            scores = {key: getattr(law, key) for key in ("n_free", "r2", "rmse", "aic", "aicc", "bic")}
            found.append({"law": law.name, "form": form} | scores | _held_out_scores(law))
    return pd.DataFrame(found).sort_values(["law", order], kind="stable", ignore_index=True)


def _held_out_scores(law: ScalingLaw) -> dict[str, float]:
    scores: dict[str, float] = {}
    parts = []
    for name, axis in zip(("largest_out", "last_out"), law.axes, strict=False):
        scores[name] = math.nan
        last = law.cells[axis.column].max()
        with contextlib.suppress(Error):
            found = law.holdout(axis.name)
            parts.append(found)
            errors = found.table.loc[found.table[axis.column] == last, "error"]
            scores[name] = float(np.sqrt((errors**2).mean()))
        if math.isnan(scores[name]):  # too few values to roll forward
            with contextlib.suppress(Error):
                scores[name] = law.holdout(axis.name, keep=law.cells[axis.column].nunique() - 1).rmse
    both = pd.concat([part.table for part in parts]) if parts else None
    return scores | {
        "holdout": math.nan if both is None else float(np.sqrt((both["error"] ** 2).mean())),
        "coverage": math.nan if both is None else float(both["inside"].mean()),
    }


def held_out(cells: pd.DataFrame, what: Literal["largest", "last"], **options: Any) -> float:
    """Rms error of the ratio on the largest model (or the last step) of one data set by the law of the other cells."""
    column = {"largest": "params", "last": "step"}[what]
    out = cells[column] == cells[column].max()
    try:
        law = fit_scaling_law(cells[~out], resamples=0, **options)
    except Error:
        return math.nan
    if not isinstance(law, ScalingLaw):
        raise Error("held_out takes the cells of one data set, protocol and mapping")
    predicted = law.predict(cells.loc[out, "params"].to_numpy(float), cells.loc[out, "step"].to_numpy(float))
    return float(np.sqrt(((cells.loc[out, "ratio"].to_numpy(float) - predicted) ** 2).mean()))

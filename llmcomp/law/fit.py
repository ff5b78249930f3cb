"""Rows or cells -> a scaling law with its uncertainty, and other forms of law beside it.

What may not live here: models, coding, drawing. The law itself is in scaling_law.py, the numerics in projection.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.law.projection import Array, Form, Loss, Problem, Solution, solve, solve_batch
from llmcomp.law.scaling_law import GROUP_KEY, Method, ScalingLaw, ScalingLaws

FORMS: Mapping[str, Form] = {
    # Hoffmann et al. 2022 (arXiv 2203.15556), eq. 2, with steps for tokens; the published law of the ratio.
    "additive": Form("additive", "CR(P, S) = a + b P^-alpha + c S^-beta"),
    # Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.6: no irreducible term.
    "kaplan": Form("kaplan", "CR(P, S) = b P^-alpha + c S^-beta", intercept=False),
    "interaction": Form(
        "interaction", "CR(P, S) = a + b P^-alpha + c S^-beta + d P^-alpha S^-beta", fourth="interaction"
    ),
    # Small models get worse late: a term that grows with the steps and shrinks with the size.
    "upturn": Form("upturn", "CR(P, S) = a + b P^-alpha + c S^-beta + d S / P", fourth="upturn", fourth_nonneg=True),
    # The additive law as Hoffmann et al. fitted theirs: Huber's loss, threshold 1e-3, on the logarithm.
    "chinchilla": Form("chinchilla", "CR(P, S) = a + b P^-alpha + c S^-beta"),
}


def fit_scaling_law(
    table: pd.DataFrame,
    *,
    form: str = "additive",
    response: Literal["ratio", "log"] = "ratio",
    loss: Literal["squares", "huber"] = "squares",
    huber_delta: float | None = None,
    weights: Literal["equal", "stderr"] = "equal",
    a_nonneg: bool = True,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> ScalingLaw | ScalingLaws:
    """Fits CR(P, S) = a + b P^-alpha + c S^-beta, P in parameters, S in steps, CR compressed over original size.

    table: rows (one a chunk), cells (one a model and step), or any table with columns params, step and ratio. One law
      for every data set, protocol and mapping in it: a ScalingLaw if there is one, else ScalingLaws. Baselines (no
      params or step), step 0 and single-stream rows are left out and noted, cells of one size and step are noted.
    form: "additive", "kaplan" (a = 0), "interaction", "upturn", or "chinchilla" (additive, Huber 1e-3 on the log).
    response, loss, huber_delta: squares or Huber's loss of the ratio or its logarithm; the threshold is in units of the
      residual, by default 1.345 robust standard deviations.
    weights: "equal", or "stderr": 1 / stderr^2 of the cells, from the chunks' spread.
    a_nonneg: hold a >= 0 as b and c always are, since no ratio is below 0. Where the bound decides a value or an
      interval, the law says so. False lets a fall below 0, where alpha near 0 turns the law into a logarithm of P.
    level: of the intervals. `ci` are profile-likelihood intervals with F quantiles (n cells - free parameters degrees
      of freedom), calibrated for independent errors of the cells; `ci_cells` and `ci_chunks` are percentiles over
      `resamples` resampled sets of cells, and of chunks (the same chunks for every model; only from rows).
    Error if fewer cells than free parameters + 1, one size or one step only, ratios not finite or all equal.
    """
    allowed = {"form": (form, FORMS), "response": (response, ("ratio", "log")), "loss": (loss, ("squares", "huber"))}
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
    chosen = Method(FORMS[form], Loss(response == "log", loss == "huber", huber_delta), weights, a_nonneg)
    laws = {
        name: _fit_group(name, cells, rows, notes=notes, method=chosen, level=level, resamples=resamples, seed=seed)
        for name, cells, rows, notes in _groups(table)
    }
    return next(iter(laws.values())) if len(laws) == 1 else ScalingLaws(laws)


def _groups(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame | None, tuple[str, ...]]]:
    """(name, cells to fit, their rows or None, notes) of every data set, protocol and mapping in the table."""
    cells, rows = _as_cells(table)
    usable = (
        cells["params"].notna() & cells["step"].notna() & (cells["step"].fillna(0) > 0) & (cells["unit"] == "chunk")
    )
    if not usable.any():
        raise Error("nothing to fit: no cell has both params and a step above 0")
    groups = {tuple(map(str, key)): group for key, group in cells[usable].groupby(list(GROUP_KEY), sort=False)}
    names = _names(list(groups))
    for (key, group), name in zip(groups.items(), names, strict=True):
        same = np.logical_and.reduce([cells[column] == value for column, value in zip(GROUP_KEY, key, strict=True)])
        left_out, repeated = int((same & ~usable).sum()), int(group.duplicated(["params", "step"]).sum())
        told = (
            (left_out, "without params or step, or of one stream, left out"),
            (repeated, "with the size and step of another: intervals take them for independent"),
        )
        notes = tuple(f"{n_cells} cell(s) {what}" for n_cells, what in told if n_cells)
        part = None
        if rows is not None:
            part = rows.merge(group[list(results.CELL_KEY)].assign(cell=range(len(group))), on=list(results.CELL_KEY))
            part = part[part["chunk"] != results.STREAM_CHUNK]
        yield name, group.reset_index(drop=True), part, notes


def _as_cells(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    if not isinstance(table, pd.DataFrame):
        raise Error(f"expected a pandas.DataFrame of rows or cells, found {type(table).__name__}")
    if not table.columns.is_unique:
        raise Error(f"the table has two columns {table.columns[table.columns.duplicated()][0]!r}")
    if "chunk" in table.columns:
        rows = results.check_rows(table)
        return results.cells(rows), rows
    missing = [name for name in ("params", "step", "ratio") if name not in table.columns]
    if missing:
        raise Error(f"the table has no column {', '.join(missing)}; expected rows, cells, or params, step and ratio")
    try:
        cells = table.astype({"params": "Float64", "step": "Float64", "ratio": "float64"}).reset_index(drop=True)
    except (TypeError, ValueError) as error:
        raise Error(f"params, step and ratio must be numbers: {error}") from None
    for name in (*GROUP_KEY, "unit"):
        if name not in cells.columns:
            cells[name] = pd.Series("chunk" if name == "unit" else "", index=cells.index, dtype="string")
        cells[name] = cells[name].astype("string").fillna("")
    return cells, None


def _names(keys: Sequence[tuple[str, ...]]) -> list[str]:
    """Short names: the data set, with protocol and mapping only where they tell two laws apart."""
    datasets = [key[0] or key[1] or "table" for key in keys]
    names = []
    for key, name in zip(keys, datasets, strict=True):
        alike = [other for other, other_name in zip(keys, datasets, strict=True) if other_name == name]
        parts = [key[i] for i in (1, 2, 3) if len({other[i] for other in alike}) > 1]
        names.append(", ".join([name, *(part or "none" for part in parts)]))
    return names


def _check_design(name: str, cells: pd.DataFrame, form: Form) -> None:
    where = "" if name == "table" else f"{name}: "
    ratio = cells["ratio"].to_numpy(float)
    bad = ~np.isfinite(ratio) | (ratio <= 0)
    if bad.any():
        row = cells[bad].iloc[0]
        raise Error(
            f"{where}ratio of P = {row['params']:g}, S = {row['step']:g} is {row['ratio']}, expected a number above 0"
        )
    if not (cells["params"] > 0).all():
        raise Error(f"{where}params must be above 0")
    n_sizes, n_steps = cells["params"].nunique(), cells["step"].nunique()
    found = f"found {len(cells)} cells of {n_sizes} size(s) and {n_steps} step(s)"
    if n_sizes < 2 or n_steps < 2:
        raise Error(f"{where}a law in P and S needs at least two model sizes and two steps; {found}")
    if len(cells) <= form.n_free:
        raise Error(f"{where}{form.n_free} free parameters need at least {form.n_free + 1} cells; {found}")
    if np.ptp(ratio) <= 1e-12 * ratio.max():
        raise Error(f"{where}all {len(cells)} ratios are equal to {ratio[0]:g}; there is no law to fit")


def _weights(name: str, cells: pd.DataFrame, kind: str) -> Array:
    if kind == "equal":
        return np.ones(len(cells))
    if kind != "stderr":
        raise Error(f"weights {kind!r} is not one of equal, stderr")
    if "stderr" not in cells.columns or not (cells["stderr"].to_numpy(float) > 0).all():
        raise Error(f'{name}: weights="stderr" needs a standard error above 0 in every cell (two chunks or more)')
    weights = 1.0 / cells["stderr"].to_numpy(float) ** 2
    return np.asarray(weights / weights.mean())


def _fit_group(
    name: str,
    cells: pd.DataFrame,
    rows: pd.DataFrame | None,
    *,
    notes: tuple[str, ...],
    method: Method,
    level: float,
    resamples: int,
    seed: int,
) -> ScalingLaw:
    _check_design(name, cells, method.form)
    problem = Problem(cells["params"].to_numpy(float), cells["step"].to_numpy(float), method.form, method.a_nonneg)
    y, weights = cells["ratio"].to_numpy(float), _weights(name, cells, method.weights)
    optimum = solve(problem, y, weights, method.loss)
    fitted = optimum.solution.fitted[0]
    rng = np.random.default_rng(seed)
    return ScalingLaw(
        name=name,
        method=method,
        level=level,
        cells=cells.assign(fitted=fitted, residual=y - fitted, weight=weights),
        problem=problem,
        optimum=optimum,
        over_cells=_resample_cells(problem, y, weights, method, resamples=resamples, rng=rng),
        over_chunks=None
        if rows is None
        else _resample_chunks(problem, rows, weights, method, resamples=resamples, rng=rng),
        notes=notes,
    )


def _frame(form: Form, solution: Solution) -> pd.DataFrame:
    columns = {key: solution.coefficients[:, i] for i, key in enumerate(form.coefficients)}
    return pd.DataFrame(columns | {"alpha": solution.alpha, "beta": solution.beta})


def _resample_cells(
    problem: Problem, y: Array, weights: Array, method: Method, *, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Laws of cells drawn with replacement; draws that hold one size or one step only are left out."""
    n_cells = len(y)
    counts = rng.multinomial(n_cells, np.full(n_cells, 1.0 / n_cells), size=resamples).astype(float)
    drawn = counts > 0

    def distinct(values: Array) -> NDArray[np.int64]:
        return np.sum([(drawn[:, values == value]).any(1) for value in np.unique(values)], axis=0)

    usable = (distinct(problem.params) > 1) & (distinct(problem.steps) > 1)
    counts = counts[usable]
    return _frame(method.form, solve_batch(problem, np.broadcast_to(y, counts.shape), counts * weights, method.loss))


def _resample_chunks(
    problem: Problem, rows: pd.DataFrame, weights: Array, method: Method, *, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Laws of chunks drawn with replacement, one draw for all cells: what another sample of the data would give."""
    chunks, at = np.unique(rows["chunk"].to_numpy(), return_inverse=True)
    bits, bits_in = np.zeros((2, len(problem.params), len(chunks)))
    cell = rows["cell"].to_numpy()
    bits_in[cell, at] = 8.0 * rows["bytes_in"].to_numpy(float)
    bits[cell, at] = rows["ratio"].to_numpy(float) * bits_in[cell, at]
    counts = rng.multinomial(len(chunks), np.full(len(chunks), 1.0 / len(chunks)), size=resamples).astype(float)
    total = counts @ bits_in.T
    usable = (total > 0).all(1)
    ratios = (counts[usable] @ bits.T) / total[usable]
    return _frame(method.form, solve_batch(problem, ratios, np.broadcast_to(weights, ratios.shape), method.loss))


def compare_forms(table: pd.DataFrame, forms: Sequence[str] = tuple(FORMS), **options: Any) -> pd.DataFrame:
    """One row a data set and form: free parameters, R^2, rms error, AIC, AICc, BIC, and errors on what was left out.

    `largest_out`: fitted without the largest model, error on it; `last_out`: without the last step, error on it (NaN
    where too little is left to fit). AIC and BIC take every form's own errors (of the ratio or its logarithm) as
    normal; "chinchilla" does not maximise that likelihood, so its values are upper bounds. options: as fit_scaling_law.
    """
    found = []
    for form in forms:
        fitted = fit_scaling_law(table, form=form, resamples=0, **options)
        for law in fitted.values() if isinstance(fitted, ScalingLaws) else [fitted]:
            out = {f"{what}_out": held_out(law.cells, what, form=form, **options) for what in ("largest", "last")}
            scores = {key: getattr(law, key) for key in ("n_free", "r2", "rmse", "aic", "aicc", "bic")}
            found.append({"law": law.name, "form": form} | scores | out)
    return pd.DataFrame(found).sort_values(["law", "aicc"], kind="stable", ignore_index=True)


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

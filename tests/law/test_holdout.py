"""Predictions of what a law has not seen: intervals against brute force and by simulation, hold-out, runs, chunks.

Expectations come from planted laws, from SciPy searches written here and from closed forms.
"""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.law.fit import fit_scaling_law

pytestmark = pytest.mark.filterwarnings("error")

SIZES, STEPS = [70e6, 160e6, 410e6, 1e9, 1.4e9], [1e3, 8e3, 32e3, 128e3, 143e3]
P, S = np.repeat(SIZES, 5), np.tile(STEPS, 5)
TEXT = 0.098 + 60.8 * P**-0.38 + 14.2 * S**-0.75
NOISE = 0.0072


def table_of(ratio, params=P, steps=S):
    return pd.DataFrame({"params": params, "step": steps, "ratio": ratio})


def published(modality):
    table = results.published()
    return table[table["modality"] == modality]


# Predictive intervals.


def least_squares(p, s, y):
    """Least sum of squares of the additive law with a, b, c >= 0, from several starts."""

    def residuals(at):
        columns = np.column_stack([np.ones_like(p), (p / 4e8) ** -np.exp(at[0]), (s / 2e4) ** -np.exp(at[1])])
        return columns @ optimize.nnls(columns, y)[0] - y

    bounds = (np.log(0.01), np.log(10))
    found = [
        optimize.least_squares(residuals, np.log(start), bounds=bounds, xtol=1e-12, ftol=1e-12).cost
        for start in ((0.05, 0.7), (0.4, 0.8), (1.5, 0.9), (5.0, 1.0))
    ]
    return 2 * min(found)


@pytest.mark.parametrize("end", [0, 1])
def test_an_interval_ends_where_the_new_cell_stops_to_fit(end):
    cells = published("text")
    law = fit_scaling_law(cells, resamples=0)
    y, at = cells["ratio"].to_numpy(float), (5e9, 2.5e5)
    value = float(law.predict_interval(*at)[end])
    before = least_squares(P, S, y)
    after = least_squares(np.append(P, at[0]), np.append(S, at[1]), np.append(y, value))
    # One more cell there raises the least squares by one unit of F times the errors' variance, no more, no less.
    assert after - before == pytest.approx(before / 20 * stats.f.ppf(0.95, 1, 20), rel=0.03)


def test_an_interval_of_a_law_that_is_all_but_linear_is_students():
    # Two values of the axis: every exponent fits the two means, so a new cell there has the interval of a group mean.
    rng = np.random.default_rng(0)
    x = np.repeat([1e18, 1e20], 10)
    y = np.where(x < 1e19, 0.6, 0.3) + 0.01 * rng.standard_normal(20)
    law = fit_scaling_law(pd.DataFrame({"flops": x, "ratio": y}), x="flops", resamples=0)
    low, high = law.predict_interval(1e20)
    group = y[10:]
    squares = ((y[:10] - y[:10].mean()) ** 2).sum() + ((group - group.mean()) ** 2).sum()
    half = stats.t.ppf(0.975, 17) * np.sqrt(squares / 17 * (1 + 1 / 10))
    assert (float(low), float(high)) == pytest.approx((group.mean() - half, group.mean() + half), rel=2e-3)


def covered(n_grids, seed):
    """Share of the cells of the two largest sizes inside the intervals of the law of the three smallest."""
    rng, small = np.random.default_rng(seed), P < 1e9
    law = fit_scaling_law(table_of(TEXT), resamples=0)
    inside = []
    for _ in range(n_grids):
        y = TEXT + NOISE * rng.standard_normal(25)
        low, high = law.refit(table_of(y)[small]).predict_interval(P[~small], S[~small])
        inside.append(((low <= y[~small]) & (y[~small] <= high)).mean())
    return np.mean(inside)


def test_intervals_cover():
    assert 0.90 <= covered(30, 5) <= 1.0


@pytest.mark.slow
def test_intervals_cover_what_they_claim():
    assert abs(covered(400, 6) - 0.95) <= 0.025  # benchmarks/prediction_coverage.py counts 1,000 grids of each modality


def test_an_interval_is_wider_than_the_band_and_widens_outwards():
    law = fit_scaling_law(published("text"), resamples=0)
    band, interval = law.band(1e9, 1e5), law.predict_interval(1e9, 1e5)
    assert interval[0] < band[0] < law.predict(1e9, 1e5) < band[1] < interval[1]
    low, high = law.predict_interval([1e9, 1e10, 1e12], 1e5)
    assert (np.diff(high - low) > 0).all()
    log = fit_scaling_law(published("text"), response="log", resamples=0).predict_interval([7e7, 1.4e9], [1e3, 1.4e5])
    widths = log[1] - log[0]
    assert widths[0] > 1.2 * widths[1]  # errors of the logarithm are in proportion to the ratio


def test_new_chunks_widen_an_interval():
    rng = np.random.default_rng(1)
    of_chunk = 0.04 * rng.standard_normal(40)  # the same chunks for every model: their mean moves all cells alike
    rows = []
    for params, step, ratio in zip(P, S, TEXT, strict=True):
        coded = np.round((ratio + of_chunk + 0.002 * rng.standard_normal(40)) * 2048).astype(int)
        rows.append(
            pd.DataFrame(
                {"model": f"m{params:g}", "params": int(params), "step": int(step), "dataset": "d", "modality": "text",
                 "protocol": "lossless", "mapping": "bytes", "chunk": range(40), "bytes_in": 2048,
                 "bytes_scored": 2048, "tokens": 500, "ideal_bits": 8.0 * coded, "coded_bytes": coded, "side_bits": 0,
                 "ratio": coded / 2048, "seconds": 1.0, "engine": "exact", "backend": "serial", "device": "cpu",
                 "dtype": "float16", "attention": "", "batch_rows": 1, "weights_sha256": "", "version": "0"}
            )
        )  # fmt: skip
    law = fit_scaling_law(pd.concat(rows), resamples=400)
    same, new = (law.predict_interval(1e9, 1e5, chunks=kind) for kind in ("same", "new"))
    added = np.sqrt((new[1] - new[0]) ** 2 - (same[1] - same[0]) ** 2) / 2
    assert float(added) == pytest.approx(1.96 * 0.04 / np.sqrt(40), rel=0.25)
    for wrong, message in (("all", "not one of same, new"), ("new", "needs a law fitted to rows")):
        with pytest.raises(Error, match=message):
            fit_scaling_law(published("text"), resamples=0).predict_interval(1e9, 1e5, chunks=wrong)


# Hold-out.


def test_what_was_held_out_is_predicted_from_the_rest():
    ratio = TEXT + np.where(P == 1.4e9, 0.03, 0.0) + 1e-5 * np.random.default_rng(0).standard_normal(25)
    law = fit_scaling_law(table_of(ratio), resamples=0)
    found = law.holdout("params")
    assert sorted(found.table["params"].unique()) == [1e9, 1.4e9]
    first, last = (found.table[found.table["params"] == size] for size in (1e9, 1.4e9))
    assert set(first["kept"]) == {4.1e8}
    assert first["error"].abs().max() < 2e-3
    assert last["error"].to_numpy() == pytest.approx(np.full(5, 0.03), abs=1e-3)
    assert not last["inside"].any()
    assert found.rmse == pytest.approx(np.sqrt((found.table["error"] ** 2).mean()))
    kept = law.holdout(keep=3)
    assert set(kept.table["kept"]) == {4.1e8}
    assert len(kept.table) == 10
    assert len(law.holdout("step").table) == 10


def test_a_held_out_size_is_predicted_without_being_seen():
    law = fit_scaling_law(published("text"), resamples=0)
    cells = published("text")
    alone = fit_scaling_law(cells[cells["params"] < 1e9], resamples=0)
    table = law.holdout(keep=3).table
    assert table["predicted"].to_numpy() == pytest.approx(
        alone.predict(table["params"].to_numpy(), table["step"].to_numpy()), rel=1e-9
    )


def test_a_hold_out_is_printed():
    found = fit_scaling_law(results.published(), resamples=0).holdout()
    text = str(found)
    assert text.count("5 of 5") == 6
    assert "10 of 10" in text
    assert "410M" in text
    assert found._repr_html_().count("<tr>") == 10
    assert found.to_latex().count(r"\\") == 10
    assert len(json.loads(json.dumps(found.to_dict(), allow_nan=False))["cells"]) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "tokens"}, "by is 'tokens', expected an axis of the law: params, step"),
        ({"keep": 5}, "keep is 5, expected from 2 to 4 of the 5 sizes"),
        ({"keep": 1.5}, "keep is 1.5, expected"),
    ],
)
def test_what_cannot_be_held_out(options, message):
    with pytest.raises(Error, match=message):
        fit_scaling_law(published("text"), resamples=0).holdout(**options)


def test_three_sizes_are_too_few_to_roll_forward():
    cells = published("text")
    law = fit_scaling_law(cells[cells["params"] < 1e9], resamples=0)
    with pytest.raises(Error, match="4 sizes are needed to hold one out, found 3; keep=2 fits on two"):
        law.holdout()
    assert len(law.holdout(keep=2).table) == 5


# Training runs as a random effect.


def runs_of(rng, of_run, of_cell, n_seeds=3):
    """(cells of 6 sizes x seeds x 6 steps, the same of new runs): every run is off by a number of its own."""
    sizes, steps = np.geomspace(3e7, 3e9, 6), np.geomspace(1e3, 1e5, 6)
    tables = []
    for _ in range(2):
        p, seed, s = (grid.ravel() for grid in np.meshgrid(sizes, range(n_seeds), steps, indexing="ij"))
        off = np.repeat(of_run * rng.standard_normal(len(sizes) * n_seeds), len(steps))
        ratio = 0.1 + 60 * p**-0.38 + 14 * s**-0.75 + off + of_cell * rng.standard_normal(len(p))
        names = [f"m{params:.0f}" for params in p]
        tables.append(pd.DataFrame({"model": names, "seed": seed, "params": p, "step": s, "ratio": ratio}))
    return tables


def test_seeds_that_differ_are_a_random_effect():
    rng = np.random.default_rng(8)
    shares = {None: [], "run": []}
    ratios = []
    for _ in range(4):
        seen, new = runs_of(rng, of_run=0.006, of_cell=0.002)
        for random, share in shares.items():
            law = fit_scaling_law(seen, random=random, resamples=0)
            low, high = law.predict_interval(new["params"].to_numpy(), new["step"].to_numpy())
            share.append(((low <= new["ratio"]) & (new["ratio"] <= high)).mean())
            if random:
                ratios.append(law.run_variance)
                alpha, wide = law.ci["alpha"], fit_scaling_law(seen, resamples=0).ci["alpha"]
                assert np.log(alpha[1] / alpha[0]) > np.log(wide[1] / wide[0])
    assert 0.9 < np.mean(shares["run"]) <= 1.0
    assert 4 < np.median(ratios) < 20  # planted: 9
    assert "a random effect of each run" in str(law)


def test_seeds_that_do_not_differ_have_no_effect():
    seen, _ = runs_of(np.random.default_rng(9), of_run=0.0, of_cell=0.002)
    law = fit_scaling_law(seen, random="run", resamples=0)
    assert law.run_variance < 0.3
    assert law.alpha == pytest.approx(fit_scaling_law(seen, resamples=0).alpha, rel=0.1)


def test_what_has_no_runs():
    with pytest.raises(Error, match="needs at least five runs and more cells than runs; found 15 cells of 3 run"):
        cells = published("text")
        fit_scaling_law(cells[cells["params"] < 1e9], random="run")
    with pytest.raises(Error, match="random 'seed' is not one of"):
        fit_scaling_law(published("text"), random="seed")
    with pytest.raises(Error, match="goes with equal weights"):
        fit_scaling_law(published("text"), random="run", loss="huber")
    with pytest.raises(Error, match="needs a column model or seed"):
        x = np.geomspace(1e17, 1e20, 12)
        fit_scaling_law(pd.DataFrame({"flops": x, "ratio": x**-0.01}), x="flops", random="run")

"""Forms and axes: planted laws come back, axes are taken by name, sums are minimised to the bottom.

Expectations come from planted coefficients and from plain SciPy searches written here.
"""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.law.fit import compare_forms, fit_scaling_law

pytestmark = pytest.mark.filterwarnings("error")

SIZES = np.geomspace(2e7, 3e9, 7)
STEPS = np.geomspace(500, 2e5, 9)
P, S = (grid.ravel() for grid in np.meshgrid(SIZES, STEPS, indexing="ij"))
FLOPS = np.geomspace(1e17, 1e22, 14)


def broken(x, before, after, place):
    return x**-before * (1 + (x / place) ** 4) ** ((before - after) / 4)


# form: (ratio at P and S, the parameters planted in it), written out independently of the package.
PLANTED = {
    "additive": (0.1 + 60 * P**-0.4 + 10 * S**-0.7, {"a": 0.1, "b": 60, "alpha": 0.4, "c": 10, "beta": 0.7}),
    "kaplan": (5 * P**-0.15 + 10 * S**-0.6, {"b": 5, "alpha": 0.15, "c": 10, "beta": 0.6}),
    "interaction": (
        0.1 + 60 * P**-0.4 + 10 * S**-0.7 + 900 * P**-0.4 * S**-0.7,
        {"a": 0.1, "b": 60, "c": 10, "d": 900, "alpha": 0.4, "beta": 0.7},
    ),
    "multiplicative": (0.1 + 40 * P**-0.1 * S**-0.4, {"a": 0.1, "b": 40, "alpha": 0.1, "beta": 0.4}),
    "upturn": (
        0.1 + 60 * P**-0.4 + 10 * S**-0.7 + 3 * S / P,
        {"a": 0.1, "b": 60, "c": 10, "d": 3, "alpha": 0.4, "beta": 0.7},
    ),
    "saturating": (
        0.1 + 60 * P**-0.4 + 0.2 * np.exp(-S / 9000),
        {"a": 0.1, "b": 60, "alpha": 0.4, "c": 0.2, "tau": 9000},
    ),
    "broken": (
        0.1 + 60 * P**-0.4 + 2 * broken(S, 0.3, 0.9, 2e4),
        {"a": 0.1, "b": 60, "alpha": 0.4, "c": 2, "beta": 0.3, "gamma": 0.9, "break": 2e4},
    ),
    "chinchilla": (0.1 + 60 * P**-0.4 + 10 * S**-0.7, {"a": 0.1, "b": 60, "alpha": 0.4, "c": 10, "beta": 0.7}),
}
OF_ONE_AXIS = {
    "additive": (0.1 + 3e4 * FLOPS**-0.3, {"a": 0.1, "b": 3e4, "alpha": 0.3}),
    "kaplan": (40 * FLOPS**-0.1, {"b": 40, "alpha": 0.1}),
    "saturating": (0.1 + 0.4 * np.exp(-FLOPS / 1e20), {"a": 0.1, "b": 0.4, "tau": 1e20}),
    "broken": (
        0.1 + 300 * broken(FLOPS, 0.15, 0.6, 1e20),
        {"a": 0.1, "b": 300, "alpha": 0.15, "gamma": 0.6, "break": 1e20},
    ),
    "chinchilla": (0.1 + 3e4 * FLOPS**-0.3, {"a": 0.1, "b": 3e4, "alpha": 0.3}),
}


def table_of(ratio):
    return pd.DataFrame({"params": P, "step": S, "ratio": ratio})


@pytest.mark.parametrize("form", PLANTED)
def test_a_planted_law_of_every_form_comes_back(form):
    ratio, planted = PLANTED[form]
    law = fit_scaling_law(table_of(ratio), form=form, resamples=0)
    assert law.values == pytest.approx(planted, rel=2e-3)
    assert law.predict(P, S) == pytest.approx(ratio, rel=1e-5)
    low, high = law.predict_interval(P, S)
    assert (low <= ratio + 1e-6).all()
    assert (high >= ratio - 1e-6).all()


@pytest.mark.parametrize("form", OF_ONE_AXIS)
def test_a_planted_law_of_one_axis_comes_back(form):
    ratio, planted = OF_ONE_AXIS[form]
    law = fit_scaling_law(pd.DataFrame({"flops": FLOPS, "ratio": ratio}), x="flops", form=form, resamples=5)
    assert law.values == pytest.approx(planted, rel=5e-3)
    assert law.predict(flops=FLOPS) == pytest.approx(ratio, rel=1e-5)
    assert "CR(C) = " in str(law)
    assert "C: training FLOPs" in str(law)
    for name, value in planted.items():
        assert law.ci[name][0] <= value * 1.001
        assert law.ci[name][1] >= value * 0.999


@pytest.mark.slow
def test_noise_does_not_hide_a_break():
    rng = np.random.default_rng(3)
    table = table_of(PLANTED["broken"][0] + 0.001 * rng.standard_normal(len(P)))
    by_aicc = compare_forms(table, forms=("additive", "broken"))
    assert list(by_aicc["form"]) == ["broken", "additive"]
    of_sizes = {form: fit_scaling_law(table, form=form, resamples=0).holdout("params") for form in by_aicc["form"]}
    assert of_sizes["broken"].rmse < 0.0015 < 2 * 0.0015 < of_sizes["additive"].rmse
    assert of_sizes["broken"].coverage > 0.85


def test_forms_are_ordered_by_what_they_predict_when_asked():
    table = results.published()
    found = compare_forms(table[table["modality"] == "text"], forms=("kaplan", "additive"), order="holdout")
    assert found["holdout"].is_monotonic_increasing
    assert set(found["form"]) == {"kaplan", "additive"}
    law = fit_scaling_law(table[table["modality"] == "text"], resamples=0)
    errors = [law.holdout(axis).table["error"] for axis in ("params", "step")]
    expected = np.sqrt((np.concatenate(errors) ** 2).mean())
    assert found.set_index("form").loc["additive", "holdout"] == pytest.approx(expected)
    with pytest.raises(Error, match="order 'bic' is not one of"):
        compare_forms(table, order="bic")


def test_the_sum_of_hubers_loss_is_at_its_lowest():
    # The image cells have several valleys under Huber's loss with threshold 1e-3 on the logarithm.
    table = results.published()
    cells = table[table["modality"] == "image"]
    p, s, y = (cells[name].to_numpy(float) for name in ("params", "step", "ratio"))

    def total(fitted):
        size = np.abs(np.log(y / fitted))
        return np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()

    def of(at):
        a, b, c, alpha, beta = np.exp(at)
        return total(a + b * (p / 4e8) ** -alpha + c * (s / 2e4) ** -beta)

    law = fit_scaling_law(cells, form="chinchilla", resamples=0)
    reached = total(law.predict(p, s))
    starts = [
        np.log([0.42, 0.03, 0.02, alpha, beta]) for alpha in (0.1, 0.3, 0.6, 1.0) for beta in (0.4, 0.6, 0.9, 1.5)
    ]
    options = {"maxiter": 4000, "maxfev": 6000, "xatol": 1e-7, "fatol": 1e-13}
    found = min(optimize.minimize(of, start, method="Nelder-Mead", options=options).fun for start in starts)
    assert reached <= found * (1 + 1e-3)


# Axes.


def test_tokens_for_steps_change_the_unit_only():
    ratio, planted = PLANTED["additive"]
    table = table_of(ratio).assign(tokens_seen=S * 2_097_152)
    law = fit_scaling_law(table, x=("params", "tokens"), resamples=0)
    assert (law.a, law.b, law.alpha, law.beta) == pytest.approx((0.1, 60, 0.4, 0.7), rel=1e-3)
    assert law.c == pytest.approx(planted["c"] * 2_097_152**0.7, rel=2e-3)
    assert law.predict(params=P, tokens=S * 2_097_152) == pytest.approx(ratio, rel=1e-6)
    assert "CR(P, D) = a + b P^-alpha + c D^-beta" in str(law)


def test_rows_hand_over_columns_that_cells_do_not_have():
    rows = []
    cells = results.published()
    for _, cell in cells[cells["modality"] == "text"].iterrows():
        for chunk in range(2):
            bits = round(cell["ratio"] * 8 * 2048)
            rows.append(
                {"model": cell["model"], "params": cell["params"], "step": cell["step"], "dataset": "enwik8",
                 "modality": "text", "protocol": "published", "mapping": "ascii", "chunk": chunk, "bytes_in": 2048,
                 "bytes_scored": 2048, "tokens": 500, "ideal_bits": bits, "coded_bytes": pd.NA, "side_bits": 0,
                 "ratio": bits / 8 / 2048, "seconds": 1.0, "engine": "torch", "backend": "", "device": "cpu",
                 "dtype": "float32", "attention": "", "batch_rows": 1, "weights_sha256": "", "version": "0",
                 "n_params_nonembedding": cell["params"] // 2, "tokens_seen": cell["step"] * 1000}
            )  # fmt: skip
    rows = pd.DataFrame(rows)
    law = fit_scaling_law(rows, x=("params_nonembedding", "tokens"), resamples=20)
    plain = fit_scaling_law(rows, resamples=0)
    assert len(law.cells) == 25
    assert (law.alpha, law.beta) == pytest.approx((plain.alpha, plain.beta), rel=1e-4)
    assert law.b == pytest.approx(plain.b / 2**plain.alpha, rel=1e-3)
    with pytest.raises(Error, match="column tokens_seen has more than one value in a cell"):
        fit_scaling_law(rows.assign(tokens_seen=range(50)), x=("params", "tokens"))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (("params", "tokens"), r"no column tokens_seen; .* table\.assign\(tokens_seen="),
        ("flops", "no column flops"),
        (("params", "params"), "expected the names of one axis or of two different ones"),
        (("params", "step", "flops"), "expected the names of one axis or of two different ones"),
        ((), "expected the names of one axis or of two different ones"),
    ],
)
def test_axes_that_are_not_there(x, message):
    with pytest.raises(Error, match=message):
        fit_scaling_law(table_of(PLANTED["additive"][0]), x=x)


def test_predictions_name_what_they_expect():
    law = fit_scaling_law(table_of(PLANTED["additive"][0]), resamples=0)
    for at, named in (((1e8,), {}), ((1e8, 1e4, 1), {}), ((1e8,), {"tokens": 5}), ((1e8, 1e4), {"step": 1})):
        with pytest.raises(Error, match="expected params and step"):
            law.predict(*at, **named)
    assert law.predict(1e8, step=1e4) == law.predict(step=1e4, params=1e8)
    assert math.isnan(fit_scaling_law(table_of(PLANTED["saturating"][0]), form="saturating", resamples=0).beta)


def test_forms_of_two_axes_are_refused_for_one():
    with pytest.raises(Error, match="form 'interaction' is not one of"):
        fit_scaling_law(
            pd.DataFrame({"flops": FLOPS, "ratio": OF_ONE_AXIS["kaplan"][0]}), x="flops", form="interaction"
        )

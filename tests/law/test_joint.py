"""Joint laws: what is planted as shared is found shared and predicts better, what is not is left alone."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.law.fit import fit_scaling_law
from llmcomp.law.joint import SHARES, compare_shares, fit_joint

pytestmark = pytest.mark.filterwarnings("error")

SIZES, STEPS = np.geomspace(5e7, 2e9, 5), np.geomspace(1e3, 1.4e5, 5)
P, S = (grid.ravel() for grid in np.meshgrid(SIZES, STEPS, indexing="ij"))
# (a, size of the term of P at 4e8, of S at 1e4, alpha, beta, noise) of each data set.
SHARED = {
    "x": (0.1, 0.05, 0.03, 0.4, 0.8, 0.003),
    "y": (0.4, 0.06, 0.05, 0.4, 0.8, 0.006),
    "z": (0.3, 0.04, 0.06, 0.4, 0.8, 0.009),
}
SEPARATE = {
    "x": (0.1, 0.10, 0.08, 0.25, 0.5, 0.001),
    "y": (0.4, 0.10, 0.08, 0.6, 0.9, 0.002),
    "z": (0.3, 0.10, 0.08, 1.0, 1.4, 0.003),
}


def table_of(planted, seed):
    rng = np.random.default_rng(seed)
    tables = []
    for name, (a, b, c, alpha, beta, noise) in planted.items():
        ratio = a + b * (P / 4e8) ** -alpha + c * (S / 1e4) ** -beta + noise * rng.standard_normal(25)
        tables.append(pd.DataFrame({"dataset": name, "params": P, "step": S, "ratio": ratio}))
    return pd.concat(tables, ignore_index=True)


def test_shared_exponents_are_found_and_predict_better():
    picked, joint, separate = [], [], []
    for seed in range(4):
        table = table_of(SHARED, seed)
        picked.append(fit_joint(table).share)
        joint.append(fit_joint(table, share="exponents").holdout().rmse)
        separate.append(fit_joint(table, share="none").holdout().rmse)
    assert picked.count("exponents") >= 3
    assert np.mean(joint) < np.mean(separate)


@pytest.mark.slow
def test_separate_exponents_are_not_shared():
    for seed in range(3):
        table = table_of(SEPARATE, seed)
        assert fit_joint(table).share == "none"
        shared, separate = (fit_joint(table, share=one).holdout().rmse for one in ("exponents", "none"))
        assert separate < shared


def test_a_shift_and_a_factor_are_found():
    planted = {"x": (0.1, 0.05, 0.03, 0.4, 0.8, 1e-4), "y": (0.4, 0.15, 0.09, 0.4, 0.8, 2e-4)}
    laws = fit_joint(table_of(planted, 0), share="scale")
    assert fit_joint(table_of(planted, 0)).share == "scale"
    assert laws["y"].b / laws["x"].b == pytest.approx(3, rel=0.02)
    balance = (0.03 * 1e4**0.8) / (0.05 * 4e8**0.4)
    assert np.log(laws["x"].values["balance"]) == pytest.approx(np.log(balance), rel=0.05)
    low, high = laws["x"].ci["balance"]
    assert low < balance < high


def test_nothing_shared_is_the_separate_laws():
    table = results.published()
    alone, laws = fit_scaling_law(table, resamples=0), fit_joint(table, share="none")
    for name, law in laws.items():
        assert law.predict(P, S) == pytest.approx(alone[name].predict(P, S), rel=1e-5)
        assert law.ci["beta"] == pytest.approx(alone[name].ci["beta"], rel=1e-3)
        interval = np.array(alone[name].predict_interval(1e9, 1e5))
        assert np.array(law.predict_interval(1e9, 1e5)) == pytest.approx(interval, rel=1e-3)


def test_the_joint_likelihood_is_at_its_highest():
    table = table_of(SHARED, 7)
    laws = fit_joint(table, share="exponents", a_nonneg=False)
    groups = [table[table["dataset"] == name]["ratio"].to_numpy() for name in SHARED]

    def criterion(at):  # -2 log likelihood with the variances at their best, but for a constant
        columns = np.column_stack([np.ones(25), (P / 4e8) ** -np.exp(at[0]), (S / 1e4) ** -np.exp(at[1])])
        return sum(25 * np.log(np.linalg.lstsq(columns, y)[1][0]) for y in groups)

    starts = [np.log([alpha, beta]) for alpha in (0.1, 0.4, 1.0) for beta in (0.4, 0.8, 1.5)]
    best = min((optimize.minimize(criterion, start, method="Nelder-Mead") for start in starts), key=lambda one: one.fun)
    assert (laws["x"].alpha, laws["x"].beta) == pytest.approx(np.exp(best.x), rel=2e-3)
    assert len({law.alpha for law in laws.values()}) == 1
    assert laws.n_free == 11


def test_sharing_narrows_the_interval_of_an_exponent():
    table = table_of(SHARED, 1)
    for share, exponent in (("exponents", "alpha"), ("alpha", "alpha"), ("beta", "beta")):
        joint, alone = (fit_joint(table, share=one)["z"].ci[exponent] for one in (share, "none"))
        assert np.log(joint[1] / joint[0]) < 0.8 * np.log(alone[1] / alone[0])


@pytest.mark.slow
def test_ways_to_share_are_compared():
    found = compare_shares(results.published())
    assert set(found["share"]) == set(SHARES)
    assert found["aicc"].is_monotonic_increasing
    assert found.set_index("share")["n_free"].to_dict() == {
        "none": 15, "alpha": 13, "beta": 13, "exponents": 11, "scale": 9,
    }  # fmt: skip
    assert found["share"].iloc[0] == "exponents"
    assert found["holdout"].idxmin() == 0


def test_joint_laws_are_printed():
    laws = fit_joint(results.published(), share="exponents")
    assert str(laws).startswith("Joint law, shared: exponents; 3 data sets, 75 cells, 11 free parameters")
    assert str(laws).count("alpha and beta are shared with the other data sets") == 3
    assert "nan" not in str(laws)
    with pytest.raises(Error, match="a law of a joint fit is not fitted alone"):
        laws["text"].holdout()
    assert laws.report().count("Not possible: enwik8: a law of a joint fit") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": "all"}, "share 'all' is not one of auto, none"), ({"x": "params"}, "a joint law needs two axes")],
)
def test_what_cannot_be_joined(options, message):
    with pytest.raises(Error, match=message):
        fit_joint(results.published(), **options)
    with pytest.raises(Error, match="at least two data sets, found enwik8"):
        table = results.published()
        fit_joint(table[table["modality"] == "text"])

"""What a law proposes to measure next, and what it tells a reader about itself."""

import json
import re
import time

import numpy as np
import pandas as pd
import pytest

from llmcomp import results
from llmcomp.cli.main import main
from llmcomp.errors import Error
from llmcomp.law.fit import fit_scaling_law

pytestmark = pytest.mark.filterwarnings("error")


def text_law(**options):
    table = results.published()
    return fit_scaling_law(table[table["modality"] == "text"], **({"resamples": 0} | options))


def test_a_plan_makes_alpha_identified_for_its_budget():
    law = text_law()
    plan = law.plan(1e14, simulations=4)
    assert not law.identified["alpha"]
    assert 0 < plan.spent <= 1e14
    assert plan.table["cost"].to_numpy() == pytest.approx((plan.table["params"] * plan.table["step"]).to_numpy())
    assert plan.factor_now > 4 > plan.table["factor"].iloc[-1]
    assert (np.diff(plan.table["factor"]) < 0).all()
    assert plan.identified >= 0.75
    text = str(plan)
    assert "a budget of 1e+14" in text
    assert "of 4 simulated measurements" in text
    assert plan._repr_html_().count("<tr>") == len(plan.table) + 1
    assert plan.to_latex().count(r"\\") == len(plan.table) + 1


def test_a_plan_beats_measuring_the_same_again():
    law, budget = text_law(), 4.4e14
    best = law.plan(budget, simulations=0).table["factor"].iloc[-1]
    same = law.plan(budget, sizes=[4.1e8], simulations=0).table["factor"].iloc[-1]
    assert best < same


def test_costs_of_scoring_and_of_the_users_own():
    law = text_law()
    scored = law.plan(3e9, cost="score", sizes=[7e7, 1.4e9], simulations=0)
    assert scored.table["cost"].to_numpy() == pytest.approx((scored.table["params"] * scored.table["cells"]).to_numpy())
    own = law.plan(3, cost=lambda size, last, cells: 1.0, simulations=0)
    assert len(own.table) <= 3
    assert own.present_cost == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.0}, "the cheapest run costs 1.75e.10, more than the budget of 1"),
        ({"budget": -1.0}, "budget is -1.0, expected a number above 0"),
        ({"budget": 1e15, "cost": "money"}, "cost 'money' is not one of train, score"),
    ],
)
def test_what_cannot_be_planned(options, message):
    with pytest.raises(Error, match=message):
        text_law().plan(**options)
    one_axis = fit_scaling_law(
        pd.DataFrame({"flops": [1e18, 1e19, 1e20, 1e21], "ratio": [0.5, 0.4, 0.35, 0.33]}), x="flops"
    )
    with pytest.raises(Error, match="a plan needs a law of a size and of steps"):
        one_axis.plan(1e20)


def test_a_report_answers_the_checklist():
    law = text_law(resamples=50)
    report = law.report()
    for heading in ("Hypothesis", "Data", "Training", "Fit", "Result", "Hold-out by params", "Hold-out by step"):
        assert f"\n## {heading}\n" in report
    for fact in (
        "CR(P, S) = a + b P^-alpha + c S^-beta", "a, b, c at or above 0", "Cells: 25", "70M, 160M, 410M, 1B, 1.4B",
        "Protocol: published", "the sum over the cells", "grid of 26 x 26", "least_squares", "R^2 0.965",
        "alpha is not identified", "10 of 10 inside", "not recorded in the rows", "all parameters, embeddings included",
    ):  # fmt: skip
        assert fact in report, fact
    assert report.count("\n|---") == 3


def test_a_report_in_latex_has_no_character_that_latex_would_take_for_its_own():
    latex = text_law(form="chinchilla").report("latex")
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\begin{itemize}") == latex.count(r"\end{itemize}") == 8
    plain = re.sub(r"\\[_%&#$^{}]", "", latex)
    assert not re.search(r"(?<!\\)[_#%]", plain)
    assert "threshold 0.001" in latex
    with pytest.raises(Error, match="format 'word' is not one of"):
        text_law().report("word")


def test_a_report_says_why_there_is_no_hold_out():
    table = results.published()
    law = fit_scaling_law(table[(table["modality"] == "text") & (table["params"] < 1e9)], resamples=0)
    assert "Not possible: enwik8: 4 sizes are needed to hold one out, found 3" in law.report()
    assert fit_scaling_law(results.published(), resamples=0).report().count("# Scaling law: ") == 3


def test_a_fit_with_intervals_hold_out_and_report_takes_less_than_ten_seconds_of_a_core():
    start = time.process_time()
    law = text_law(resamples=1000)
    assert law.holdout().coverage > 0
    assert law.report()
    assert time.process_time() - start < 10


def test_the_command_line_holds_out_and_reports(capsys):
    assert main(["fit", "--published", "--holdout"]) == 0
    printed = capsys.readouterr().out
    assert "predicted params" in printed
    assert "predicted step" in printed
    assert main(["fit", "--published", "--holdout", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["by"] for one in found["holdout"]] == ["params", "step"]
    assert len(found["holdout"][0]["cells"]) == 30
    assert set(found["laws"]) == {"enwik8", "imagenet", "librispeech"}
    assert main(["fit", "--published", "--report"]) == 0
    assert capsys.readouterr().out.count("# Scaling law: ") == 3
    assert main(["fit", "--published", "--x", "params,tokens"]) == 1
    assert "no column tokens_seen" in capsys.readouterr().err

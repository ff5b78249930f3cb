"""Files changed by chance end in an Error or an answer: a few of each kind; benchmarks/fuzz_inputs.py makes many."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from mutated_inputs import KINDS, outcome

N_INPUTS = {
    **{"config": 150, "header": 150, "index": 100, "tokenizer": 150, "suite": 100, "lock": 100},
    **{"rows": 60, "pickle": 150, "data": 150},
}


@pytest.mark.parametrize("name", list(N_INPUTS))
def test_changed_inputs_are_read_or_refused(tmp_path: Path, name: str) -> None:
    if name == "pickle":
        pytest.importorskip("torch", reason="the torch engine is an extra")
    kind = KINDS[name](tmp_path / "made")
    counts = Counter(outcome(kind, f"test {name} {number}") for number in range(N_INPUTS[name]))
    # Most changes do harm, and some do none; else nothing was tested.
    assert counts["refused"] > N_INPUTS[name] / 4
    assert counts["read"] > 0

"""The benchmark of the exact engines, scaled down: which rows, beside torch and without it, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llmcomp.bench import engine as bench_engine
from llmcomp.bench.engine import run_engine_benchmark
from llmcomp.cli.main import main
from llmcomp.errors import Error

WORK = ["pass", "step 3", "memory"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_engine, "N_SEQUENCES", 2)
    monkeypatch.setitem(bench_engine.TOKENS, "pico", 20)
    monkeypatch.setitem(bench_engine.STREAMS, "pico", (3,))
    monkeypatch.setitem(bench_engine.PAST, "pico", 8)
    monkeypatch.setattr(bench_engine.sys, "platform", "linux")


def test_beside_torch() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    before = torch.get_num_threads()
    found = run_engine_benchmark(["pico-13k"], [1, 2], seconds=0.0, progress=False)
    torch.set_num_threads(before)
    assert found.torch == torch.__version__
    assert found.rows["work"].tolist() == WORK * 2
    assert found.rows["threads"].tolist() == [1] * 3 + [2] * 3
    passes, steps = found.rows[found.rows["work"] == "pass"], found.rows[found.rows["work"] == "step 3"]
    assert (passes["ratio"] - passes["ours"] / passes["torch"]).abs().max() < 1e-9  # rates: ours over theirs
    assert (steps["ratio"] - steps["torch"] / steps["ours"]).abs().max() < 1e-9  # times: theirs over ours
    assert (found.rows["ours"] > 0).all()


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_engine.importlib.util, "find_spec", lambda name: None)
    command = ["bench", "engine", "--shapes", "pico-13k", "--threads", "1", "--seconds", "0", "--engine", "exact-int8"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == "exact-int8" and found["torch"] is None
    assert [row["work"] for row in found["rows"]] == WORK
    assert all(row["torch"] is None and row["ratio"] is None and row["ours"] > 0 for row in found["rows"])
    assert main(command) == 0
    assert "torch and transformers are not installed: our column only" in capsys.readouterr().out


def test_a_difference_from_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    peer = bench_engine._peer()
    monkeypatch.setattr(peer.TorchModel, "logits", lambda self, tokens: math.pi)
    with pytest.raises(Error, match="pico-13k: logits differ from torch's by 3"):
        run_engine_benchmark(["pico-13k"], [1], progress=False)


def test_unknown_shapes_are_an_error() -> None:
    with pytest.raises(Error, match=r"shapes gpt2, .*pythia-70m"):
        run_engine_benchmark(["gpt2"], progress=False)


def test_modules_of_the_working_directory_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "numpy.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_engine.importlib.util, "find_spec", lambda name: None)  # without torch
    table = run_engine_benchmark(["pico-13k"], [1], seconds=0.0, progress=False)
    assert "memory" in set(table.rows["work"])
    assert not marker.exists()

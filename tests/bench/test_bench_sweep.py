"""The benchmark of a whole sweep, scaled down: the shapes, what is counted, and the command. Never the speed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmcomp.bench import sweep as bench_sweep
from llmcomp.bench.sweep import PARTS, PYTHIA_TOKENS, run_sweep_benchmark, suite_configs, write_random_checkpoint
from llmcomp.cli.main import main
from llmcomp.errors import Error
from llmcomp.models.checkpoint import tensor_shapes
from llmcomp.models.load import load_model


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_sweep._PEAK_WIDTH, "cpu", 128)
    counts = {"published": {"text": 40, "image": 70}, "lossless": {"text": 50, "image": 600}}
    monkeypatch.setattr(bench_sweep, "pico_tokens", lambda: counts)


def test_shapes_have_the_parameters_of_the_suites() -> None:
    """Pythia: the total parameters of table 1 of Biderman et al., 2023; pico: the card of the suite."""
    expected = {
        "pythia-70m": 70_426_624,
        "pythia-160m": 162_322_944,
        "pythia-410m": 405_334_016,
        "pythia-1b": 1_011_781_632,
        "pythia-1.4b": 1_414_647_808,
        "pico-13k": 45_536,
        "pico-595k": 726_144,
    }
    configs = {**suite_configs("pythia"), **suite_configs("pico")}
    found = {name: sum(int(np.prod(shape)) for _, shape in tensor_shapes(configs[name])) for name in expected}
    assert found == expected
    with pytest.raises(Error, match="no suite is called 'none'"):
        suite_configs("none")


def test_the_grid_is_the_published_work() -> None:
    """5.3 and 7.6 million tokens a checkpoint, 146 and 209 PFLOP for the 25 of them: the estimate made beforehand."""
    n_tokens = {protocol: 2048 * sum(counts.values()) for protocol, counts in PYTHIA_TOKENS.items()}
    assert [round(n / 1e6, 1) for n in n_tokens.values()] == [5.3, 7.6]
    multiplied = sum(
        np.prod(shape)
        for config in suite_configs("pythia").values()
        for name, shape in tensor_shapes(config)
        if "embed_in" not in name
    )
    assert [round(5 * 2 * multiplied * n / 1e15) for n in n_tokens.values()] == [146, 209]


def test_a_random_checkpoint_loads(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, suite_configs("pico")["pico-28k"])
    model = load_model(tmp_path)
    assert (model.n_params, model.dtype) == (77_520, "float16")
    logits = model.logits(np.arange(20)[None])
    assert np.isfinite(logits).all() and logits.std() > 0.01


def test_two_sizes_with_the_exact_engine() -> None:
    found = run_sweep_benchmark("pico", n_chunks=3, n_sizes=2, n_checkpoints=2, progress=False)
    rows = found.rows.set_index(["model", "protocol"])
    assert list(rows.index) == [(m, p) for m in ("pico-13k", "pico-28k") for p in ("published", "lossless")]
    assert (rows["cells"] == 4).all()
    # Two checkpoints, three chunks.
    assert rows["tokens"].tolist() == [6 * 110, 6 * 650] * 2
    np.testing.assert_allclose(rows[list(PARTS)].sum(axis=1), rows["seconds"])
    assert (rows[["loading", "tokenising", "forward", "tokens_per_s"]] > 0).all(axis=None) and (
        rows[list(PARTS)] >= 0
    ).all(axis=None)
    assert (rows["coding"].xs("lossless", level=1) > 0).all() and (rows["coding"].xs("published", level=1) == 0).all()
    # All weights of the tied model are multiplied: 2 x 45,536 operations a token.
    row = rows.loc[("pico-13k", "lossless")]
    busy = row["seconds"] - row["loading"] - row["tokenising"]
    rate = rows.loc[("pico-13k", "lossless"), "flop_utilisation"] * found.peak_flops
    assert rate == pytest.approx(6 * 650 * 2 * 45_536 / busy)
    assert (rows["peak_bytes"] > 1e6).all() and (rows["batch_rows"] >= 8192).all()
    text = str(found)
    for words in (
        "published: 8 cells in",
        "minutes",
        "part of forward",
        "tokens_s",
        "mfu",
        "peak_gb",
        "published_s",
        *PARTS,
    ):
        assert words in text


def test_batches_are_bounded() -> None:
    free = run_sweep_benchmark("pico", n_chunks=2, progress=False).rows
    held = load_model("pico-13k").pass_memory()
    bound = held.held_bytes + held.fixed_bytes + 900 * held.row_bytes
    bounded = run_sweep_benchmark("pico", n_chunks=2, max_memory=bound, progress=False).rows
    assert (free["batch_rows"] > 900).all()
    assert bounded.set_index("protocol").loc["lossless", "batch_rows"] <= 900
    assert (bounded["tokens"] == free["tokens"]).all()


def test_tokenising_is_timed_once_for_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sweep, "tokenising_seconds", lambda protocol, n_chunks, clock: 6.0 * n_chunks)
    rows = run_sweep_benchmark("pico", n_chunks=1, n_sizes=2, progress=False).rows
    assert (rows.groupby("protocol")["tokenising"].sum() == 6.0).all()


def test_tokenising_goes_by_the_samples() -> None:
    one, ten = (bench_sweep.tokenising_seconds("lossless", n) for n in (1, 1000))
    assert 0 < one < ten


def test_the_torch_engine_is_watched_inside() -> None:
    pytest.importorskip("torch", reason="the torch engine is an extra")
    found = run_sweep_benchmark("pico", "torch", n_chunks=2, dtype="bfloat16", progress=False)
    assert (found.engine, found.dtype, found.attention) == ("torch", "bfloat16", "sdpa")
    assert (found.rows[["forward", "intervals"]] > 0).all(axis=None)
    assert (found.rows[["loop_seconds_per_chunk", "seconds_per_chunk"]] > 0).all(axis=None)
    np.testing.assert_allclose(found.rows[list(PARTS)].sum(axis=1), found.rows["seconds"])


def test_published_seconds_are_those_of_the_same_cells() -> None:
    """Three data sets at step 1000 of pythia-70m: 1.1985, 1.8547 and 1.8729 minutes for 2,048 chunks."""
    minutes = 1.1985026081403096 + 1.854698610305786 + 1.8728578488032024
    assert bench_sweep._published_seconds("pythia-70m", 1, 1024) == pytest.approx(30 * minutes)
    assert bench_sweep._published_seconds("pico-13k", 1, 1024) is None


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sweep", "--suite", "pico", "--random-weights", "--chunks", "1", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["suite"], found["n_chunks"], found["device"]) == ("pico", 1, "cpu")
    assert [row["protocol"] for row in found["rows"]] == ["published", "lossless"]
    assert main(["bench", "sweep", "--suite", "pico", "--clock", "cpu", "-q"]) == 0
    text = capsys.readouterr().out
    assert "tokens_s" in text and "cpu clock" in text
    with pytest.raises(Error, match="wall for a device"):
        run_sweep_benchmark("pico", device="cuda", clock="cpu")

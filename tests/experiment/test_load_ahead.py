"""The next model loads while one is at work: seen by events, never by a clock; failures, interrupts, limits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_sweeps import Counting, fake_rows, run, some_data

from llmcomp.errors import Error
from llmcomp.experiment import load_ahead as loading
from llmcomp.experiment.load_ahead import LoadAhead
from llmcomp.experiment.sweep import sweep
from llmcomp.models import load, sources
from llmcomp.models.load import load_source, stage_source
from llmcomp.models.sources import find_model

PATIENCE = 20.0
STEPS = (1, 2, 3)


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llmcomp-loading"]


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> dict[int, threading.Event]:
    """An event for every step whose model has been read into memory; `staged` alone says which have begun."""
    events = {step: threading.Event() for step in (*STEPS, 4)}
    real = load.stage_source

    def stage(source: sources.ModelSource, *args: Any, **options: Any) -> Callable[[], Any]:
        make = real(source, *args, **options)
        assert source.step is not None
        events[source.step].set()
        return make

    monkeypatch.setattr(load, "stage_source", stage)
    return events


def test_the_next_model_loads_while_one_is_scored(
    suite: Path, tmp_path: Path, staged: dict[int, threading.Event]
) -> None:
    """The score of step 1 waits until step 2 is in memory: without a thread beside it this would never end."""

    def scorer(chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> pd.DataFrame:
        assert staged[model.step + 1].wait(PATIENCE if model.step < 3 else 0) == (model.step < 3)
        # At most one is ahead.
        assert not any(staged[step].is_set() for step in staged if step > model.step + 1)
        return fake_rows(chunks, model, protocol, mapping)

    rows = run(suite, tmp_path, scorer, steps=STEPS)
    assert rows.attrs["failed"] == []
    assert not loading_threads()


def test_what_fails_ahead_fails_at_its_own_cells(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = load.stage_source

    def stage(source: sources.ModelSource, *args: Any, **options: Any) -> Callable[[], Any]:
        if source.step == 2:
            raise Error("step 2 cannot be downloaded")
        return real(source, *args, **options)

    monkeypatch.setattr(load, "stage_source", stage)
    scorer = Counting()
    rows = run(suite, tmp_path, scorer, steps=STEPS)
    failed = rows.attrs["failed"]
    assert [(failure["step"], failure["reason"]) for failure in failed] == [(2, "step 2 cannot be downloaded")] * 2
    assert [step for step, _ in scorer.calls] == [1, 1, 3, 3]


def test_an_interrupt_leaves_nothing_behind(suite: Path, tmp_path: Path, staged: dict[int, threading.Event]) -> None:
    def scorer(chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> pd.DataFrame:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(suite, tmp_path, scorer, steps=STEPS)
    assert not loading_threads()
    assert not staged[3].is_set()
    assert not list(tmp_path.glob("*.parquet")) and not list(tmp_path.glob(".*.part"))
    # The folder's lock is free, and everything is still to do.
    assert run(suite, tmp_path, steps=STEPS).attrs["failed"] == []


def test_what_is_under_way_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PATIENCE_SECONDS", 0.01)
    begun, gate, made = threading.Event(), threading.Event(), []

    def slow() -> Callable[[], Any]:
        begun.set()
        gate.wait(PATIENCE)
        return lambda: made.append("a model that nobody wants")

    with LoadAhead([lambda: lambda: "first", slow]) as ahead:
        assert ahead.take(0) == "first"
        assert begun.wait(PATIENCE)
        (thread,) = loading_threads()
    gate.set()
    thread.join(PATIENCE)
    assert not thread.is_alive() and made == []


def test_models_in_their_order() -> None:
    names = "abcd"
    with LoadAhead([lambda name=name: lambda: name for name in names]) as ahead:  # type: ignore[misc]
        assert [ahead.take(number) for number in range(4)] == list(names)
    assert not loading_threads()


@pytest.mark.parametrize("engine", ["exact", "exact-int8", "torch"])
def test_a_staged_model_is_the_model(suite: Path, engine: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch", reason="the torch engine is an extra")
    source = find_model(suite, 2)
    options = {"dtype": "bfloat16"} if engine == "torch" else {}
    staged, loaded = stage_source(source, engine, **options)(), load_source(source, engine, **options)
    tokens = np.arange(20)[None]
    assert (staged.logits(tokens) == loaded.logits(tokens)).all()
    facts = ("name", "step", "weights_sha256", "dtype", "attention", "n_params")
    assert [getattr(staged, name) for name in facts] == [getattr(loaded, name) for name in facts]
    assert staged.tokenizer is loaded.tokenizer


def test_torch_weights_of_every_form_are_read_ahead(suite: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the torch engine is an extra")
    from safetensors.torch import load_file, save_file

    from llmcomp.models.engines.torch_weights import read_host_weights

    whole = load_file(suite / "step1" / "model.safetensors")
    names = sorted(whole)
    shards, pickled, damaged = (tmp_path / name for name in ("shards", "pickled", "damaged"))
    for folder in (shards, pickled, damaged):
        folder.mkdir()
    for i, part in enumerate((names[:4], names[4:]), 1):
        save_file({name: whole[name] for name in part}, shards / f"model-{i:05}-of-00002.safetensors")
    torch.save(whole, pickled / "pytorch_model.bin")
    for folder in (suite / "step1", shards, pickled):
        found = read_host_weights(folder)
        assert sorted(found) == names and all(torch.equal(found[name], whole[name]) for name in names)
    (damaged / "model.safetensors").write_bytes((suite / "step1" / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(Error, match=r"model\.safetensors: cannot read these weights"):
        read_host_weights(damaged)
    with pytest.raises(Error, match=r"found neither model\.safetensors"):
        read_host_weights(tmp_path)


def test_too_little_memory_for_two(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit beside the model at work is downloaded ahead, and read when it is its turn."""
    monkeypatch.setattr(load, "host_memory", lambda: (1000, 10**9))
    monkeypatch.setattr(load, "load_source", lambda source, engine: f"{source.label}, {engine}, read now")
    assert stage_source(find_model(suite, 2))() == "tiny step 2, exact, read now"


def test_an_exact_model_for_a_device_is_read_ahead_and_made_there_later(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(load, "check_options", lambda *_: None)  # there is no such device here
    monkeypatch.setattr(load, "_stored_digest", lambda source: calls.append(f"{source.label} is read"))
    monkeypatch.setattr(load, "load_source", lambda source, engine, device: calls.append(f"{engine} on {device}"))
    make = stage_source(find_model(suite, 2), "exact", device="cuda:1")
    assert calls == ["tiny step 2 is read"]
    make()
    assert calls[1:] == ["exact on cuda:1"]


def test_the_plan_tells_the_memory_of_two(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(suite, STEPS, some_data(), tmp_path / "out", dry_run=True)
    weight_bytes = find_model(suite, 1).weight_bytes
    config = find_model(suite, 1).read_config()
    item_bytes = 2 if config.get("dtype", config.get("torch_dtype")) in ("float16", "bfloat16") else 4
    alone = 4 * weight_bytes // item_bytes
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  memory"))
    assert f"{alone / 1000:.1f} kB for the largest model, {(alone + weight_bytes) / 1000:.1f} kB with the next" in line

"""Sweeps: the grid, kills, failures, executors, warnings, wrong requests. Finished cells: test_finished_cells.py."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hub_server import Hub, neox_files, write_checkpoint
from small_sweeps import STEPS, Counting, Data, cell_files, fake_rows, run, some_data, without_time

from llmcomp import load_model, pico, results
from llmcomp.data.datasets import load_dataset
from llmcomp.errors import Error
from llmcomp.experiment.sweep import EqualWeightsWarning, TrainingDataWarning, sweep
from llmcomp.scoring import score


def test_every_cell_is_scored_and_every_payload_decodes(suite: Path, tmp_path: Path) -> None:
    data = some_data()
    with pytest.warns(UserWarning, match="sees 128 tokens"):
        rows = sweep(suite, STEPS, data, tmp_path, protocol=("lossless", "published"), verify=True, progress=False)
    assert rows.attrs["failed"] == []
    cells = rows.groupby(["model", "step", "dataset", "protocol", "mapping"]).size()
    assert len(cells) == len(cell_files(tmp_path)) == 2 * 2 * 2
    lossless = rows[rows["protocol"] == "lossless"]
    assert len(lossless) == 2 * 2 * 3
    assert set(lossless["mapping"]) == {"bytes"}
    assert lossless["bytes_in"].sum() == 2 * sum(len(chunk) for part in data for chunk in part.chunks)
    assert dict(zip(rows["dataset"], rows["modality"], strict=True)) == {"prose": "text", "noise": "image"}
    # Independent of the sweep: the scores themselves.
    alone = score.score(data[1].chunks, str(suite / "step2"), progress=False)
    same = lossless[(lossless["step"] == 2) & (lossless["dataset"] == "noise")]
    assert same["coded_bytes"].tolist() == alone["coded_bytes"].tolist()
    assert results.read_rows(tmp_path)["ratio"].sum() == pytest.approx(rows["ratio"].sum())


def test_a_payload_that_does_not_decode_fails_its_cell(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcomp.codec.segments.SegmentCodec.decode", lambda *_, **__: [b"other bytes"] * 3)
    rows = sweep(suite, STEPS, some_data(), tmp_path, verify=True, progress=False)
    assert len(rows.attrs["failed"]) == 4
    assert "decode to other bytes" in rows.attrs["failed"][0]["reason"]
    assert not cell_files(tmp_path)


def test_baselines_on_the_same_chunks(suite: Path, tmp_path: Path) -> None:
    text = some_data()[:1]
    rows = run(suite, tmp_path, datasets=text, baselines=True)
    gzip = rows[(rows["chunk"] >= 0) & rows["model"].str.startswith("gzip")]
    assert gzip["bytes_in"].tolist() == [200] * 3
    again = run(suite, tmp_path, datasets=text, baselines=True)
    pd.testing.assert_frame_equal(rows, again)
    # Two models, the compressors, random weights and the random distribution.
    assert len(cell_files(tmp_path)) == 2 + 1 + 2


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(suite: Path, tmp_path: Path, capsys: Any) -> None:
    data = [*some_data()[:1], Data("short", "text", [b"x" * 50])]
    rows = run(suite, tmp_path, Counting(fails_at=(1, 50)), datasets=data)
    assert len(cell_files(tmp_path)) == 3
    (failure,) = rows.attrs["failed"]
    assert (failure["step"], failure["dataset"]) == (1, "short")
    assert failure["reason"] == "RuntimeError: the numbers are wrong today"
    (recorded,) = json.loads((tmp_path / "failed.json").read_text())["failed"]
    assert recorded["reason"] == failure["reason"]
    assert "tiny step 1, short" in capsys.readouterr().err
    scorer = Counting()
    assert run(suite, tmp_path, scorer, datasets=data).attrs["failed"] == []
    assert scorer.calls == [(1, 50)]
    assert not (tmp_path / "failed.json").exists()


def test_a_model_that_cannot_be_loaded_fails_alone(suite: Path, tmp_path: Path) -> None:
    broken = write_checkpoint(tmp_path / "broken", 1)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-100])
    out = tmp_path / "out"
    rows = sweep([suite, broken], None, some_data(), out, scorer=Counting(), progress=False)
    assert {failure["model"] for failure in rows.attrs["failed"]} == {"broken"}
    assert "model.safetensors" in rows.attrs["failed"][0]["reason"]
    assert set(rows["model"]) == {"tiny"}


SUPPORT = [str(Path(__file__).parents[1] / "support")]
KILLED = """
import sys, time
sys.path[:0] = {support!r}
from pathlib import Path
from small_sweeps import fake_rows, run

def slow(chunks, model, protocol, mapping, **_):
    with open({log!r}, "a") as log:
        log.write(f"{{model.step}} {{chunks[0][:4].hex()}}\\n")
    time.sleep(0.05)
    return fake_rows(chunks, model, protocol, mapping)

rows = run(Path({suite!r}), Path({out!r}), slow, steps={steps!r})
assert rows.attrs["failed"] == []
print(len(rows))
"""


def test_killed_at_any_time_and_started_again(tmp_path: Path) -> None:
    """SIGKILL at random moments: no cell is lost, doubled or torn, and what was finished is not computed again."""
    steps = (1, 2, 3, 4, 5)
    for step in steps:
        write_checkpoint(tmp_path / "tiny" / f"step{step}", seed=step)
    out, log = tmp_path / "out", tmp_path / "log"
    names = {
        "support": SUPPORT,
        "log": str(log),
        "suite": str(tmp_path / "tiny"),
        "out": str(out),
    }
    code = textwrap.dedent(KILLED).format(**names, steps=steps)
    delays, n_killed = random.Random(0), 0
    for target in (1, 3, 6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(cell_files(out)) < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delays.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
        assert process.stderr is not None
        process.stderr.close()
    assert n_killed == 3
    finished = {path: path.read_bytes() for path in cell_files(out)}
    assert len(finished) >= 6
    n_scored_before = len(log.read_text().splitlines())
    last = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert int(last.stdout) == len(steps) * 2 * 3
    assert len(log.read_text().splitlines()) - n_scored_before == len(steps) * 2 - len(finished)
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert not list(out.glob(".*.part"))
    uninterrupted = run(tmp_path / "tiny", tmp_path / "other", steps=steps)
    order = ["step", "dataset", "chunk"]
    both = [rows.sort_values(order, ignore_index=True) for rows in (results.read_rows(out), uninterrupted)]
    pd.testing.assert_frame_equal(without_time(both[0]), without_time(both[1]))


def test_two_sweeps_do_not_share_a_folder(suite: Path, tmp_path: Path) -> None:
    def second(chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> pd.DataFrame:
        with pytest.raises(Error, match="another sweep of this process"):
            run(suite, tmp_path)
        code = f"""
            import sys
            sys.path[:0] = {SUPPORT!r}
            from pathlib import Path
            from small_sweeps import run
            run(Path({str(suite)!r}), Path({str(tmp_path)!r}))
        """
        answer = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
        )
        assert f"another sweep is at work here (process {os.getpid()})" in answer.stderr
        return fake_rows(chunks, model, protocol, mapping)

    assert run(suite, tmp_path, second, datasets=some_data()[:1], steps=(1,)).attrs["failed"] == []
    assert run(suite, tmp_path).attrs["failed"] == []


def test_executors_give_the_same_rows(suite: Path, tmp_path: Path) -> None:
    data = some_data()
    expected = sweep(suite, STEPS, data, tmp_path / "here", progress=False)
    spawn = multiprocessing.get_context("spawn")
    executors = {
        "threads": concurrent.futures.ThreadPoolExecutor(2),
        "processes": concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn),
    }
    for name, executor in executors.items():
        with executor:
            rows = sweep(suite, STEPS, data, tmp_path / name, executor, progress=False)
        pd.testing.assert_frame_equal(without_time(rows), without_time(expected))
        assert len(cell_files(tmp_path / name)) == 4


def die(*_: Any, **__: Any) -> pd.DataFrame:
    os._exit(1)


def test_a_worker_that_dies_is_a_failure(suite: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
        rows = run(suite, tmp_path, die, executor=executor)
    assert len(rows) == 0
    assert len(rows.attrs["failed"]) == 4
    assert "BrokenProcessPool" in rows.attrs["failed"][0]["reason"]


def test_ray_is_an_extra(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Error, match=r"pip install llmcomp-exact\[ray\]"):
        run(suite, tmp_path, executor="ray")


def test_dry_run_changes_nothing(suite: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    table = run(suite, out, dry_run=True)
    assert not out.exists()
    assert table["status"].tolist() == ["to do"] * 4
    run(suite, out, steps=(1,))
    capsys.readouterr()
    table = run(suite, out, dry_run=True)
    assert table["status"].value_counts().to_dict() == {"finished": 2, "to do": 2}
    plan = capsys.readouterr().out
    assert "4 cells, 2 finished, 2 to do" in plan
    assert "prose: 3 chunks, 600 bytes of text" in plan


def test_equal_weights_are_named(tmp_path: Path) -> None:
    for step, seed in ((1, 1), (2, 1), (3, 3)):
        write_checkpoint(tmp_path / "tiny" / f"step{step}", seed)
    with pytest.warns(EqualWeightsWarning, match="tiny step 1 and tiny step 2 have equal weights") as caught:
        run(tmp_path / "tiny", tmp_path / "out", steps=(1, 2, 3))
    assert len(caught) == 1
    with pytest.warns(EqualWeightsWarning, match="tiny step 1 and tiny step 2"):
        run(tmp_path / "tiny", tmp_path / "out", steps=(1, 2, 3))


def test_training_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data("mixed", "text", [b"seen" * 512, b"new!" * 512])
    monkeypatch.setattr(pico, "training_source", lambda chunk: "enwik8[1001472:]" if chunk[:4] == b"seen" else None)
    with pytest.warns(TrainingDataWarning, match=r"1 of the 2 chunks of mixed .*1 of enwik8\[1001472:\]"):
        sweep("pico-13k", (128,), data, tmp_path, dry_run=True)


class TableModel:
    """Any object with logits() and session() is a model."""

    name, step, n_params = "table", 7, 10
    weights_sha256 = "ab" * 32

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.zeros((*np.shape(tokens), 256), np.float32)

    def session(self, n_streams: int) -> TableSession:
        return TableSession(n_streams)


class TableSession:
    def __init__(self, n_streams: int) -> None:
        self.n_streams = n_streams

    def step(self, tokens: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
        return np.zeros((self.n_streams, 256), np.float32)


def test_models_that_are_objects(tmp_path: Path) -> None:
    rows = sweep([TableModel()], None, some_data(), tmp_path, progress=False)
    assert rows.attrs["failed"] == []
    assert set(rows["model"]) == {"table"}
    # A flat model of 256 tokens costs 8 bits a byte, and the end of the stream.
    assert (rows["coded_bytes"] - rows["bytes_in"]).between(0, 2).all()
    scorer = Counting()
    sweep([TableModel()], None, some_data(), tmp_path, scorer=scorer, progress=False)
    assert scorer.calls == []

    class Nameless(TableModel):
        weights_sha256 = None

    with pytest.raises(Error, match="neither fingerprint nor weights_sha256"):
        sweep([Nameless()], None, some_data(), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "lossy"}, "no protocol is called 'lossy'"),
        ({"datasets": some_data() * 2}, "2 data sets are called 'prose'"),
        ({"steps": (1, 1)}, "asked for twice"),
        ({"steps": (1, 9)}, "no step 9"),
    ],
)
def test_wrong_requests(suite: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Error, match=words):
        run(suite, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Error, match="cannot write results there"):
        run(suite, tmp_path / "file")
    with pytest.raises(Error, match="cannot write results there"):
        run(suite, tmp_path / "file" / "below")


def test_a_grid_from_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two models, three revisions, one of them mislabelled: planned, run, resumed offline, one revision missing."""
    for repo, seeds in (("org/a", {1: 1, 2: 2, 3: 2}), ("org/b", {1: 11, 2: 12, 3: 13})):
        for step, seed in seeds.items():
            hub.add(repo, f"step{step}", neox_files(seed))
    asked = {"steps": (1, 2, 3), "datasets": some_data(), "out": tmp_path / "out", "progress": False}
    table = sweep(["org/a", "org/b"], **asked, dry_run=True)
    assert len(table) == 12
    assert hub.downloads("model.safetensors") == 0
    n_bytes = len(neox_files(1)["model.safetensors"]) + len(neox_files(1)["tokenizer.json"])
    assert f"{6 * n_bytes / 1000:.1f} kB of 6 checkpoints" in capsys.readouterr().out
    with pytest.warns(EqualWeightsWarning, match="org/a step 2 and org/a step 3"):
        rows = sweep(["org/a", "org/b"], **asked)
    assert rows.attrs["failed"] == []
    assert hub.downloads("model.safetensors") == 5
    hub.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked |= {"steps": (1, 2, 3, 4), "scorer": Counting()}
    with pytest.warns(EqualWeightsWarning):
        again = sweep(["org/a", "org/b"], **asked)
    assert len(again) == len(rows)
    assert asked["scorer"].calls == []
    assert {failure["step"] for failure in again.attrs["failed"]} == {4}
    assert "HF_HUB_OFFLINE" in again.attrs["failed"][0]["reason"]
    assert len(cell_files(tmp_path / "out")) == 12


def test_steps_and_models_in_any_form(suite: Path, tmp_path: Path) -> None:
    expected = without_time(run(suite, tmp_path / "0", steps=(2,)))
    for number, steps in enumerate(
        (2, np.int64(2), np.array([2]), pd.Series([2], dtype="Int64").unique(), range(2, 3)), 1
    ):
        assert without_time(run(suite, tmp_path / str(number), steps=steps)).equals(expected)
    for steps in ("2", ["2"], [2.0]):
        with pytest.raises(Error, match="expected an integer"):
            run(suite, tmp_path / "none", steps=steps)
    loaded = load_model(suite, 2)
    assert set(sweep(loaded, None, some_data(), tmp_path / "one", progress=False)["step"]) == {2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "Torch"}, "'Torch'"),
        ({"dtype": "float16"}, "no choice of dtype"),
        ({"mapping": "utf16"}, "'utf16'"),
        ({"mapping": ["bytes", "utf16"]}, "'utf16'"),
        ({"max_memory": "much"}, "'much'"),
        ({"executor": "threads"}, "'threads'"),
        ({"datasets": [[b"chunk"]]}, "list is no data set"),
    ],
)
def test_what_no_cell_can_be_computed_with(suite: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Error, match=words):
        run(suite, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    """A folder of results from elsewhere may hold links in place of the files that a sweep writes."""
    precious, out = tmp_path / "precious", tmp_path / "results"
    precious.write_text("not the sweep's")
    out.mkdir()
    run_sweep = functools.partial(sweep, "pico-13k", 128, some_data()[:1], out, progress=False)
    for plant in ("symlink_to", "hardlink_to"):
        getattr(out / ".sweep.lock", plant)(precious)
        with pytest.raises(Error, match=r"cannot write|a file of its own"):
            run_sweep()
        assert precious.read_text() == "not the sweep's"
        (out / ".sweep.lock").unlink()
    os.mkfifo(out / ".sweep.lock")
    with pytest.raises(Error, match="a file of its own"):
        run_sweep()
    (out / ".sweep.lock").unlink()
    (out / "failed.json").symlink_to(precious)
    assert len(run_sweep()) == 3
    assert precious.read_text() == "not the sweep's"


def test_a_mapping_from_names_to_files_scores_those_files(suite: Path, tmp_path: Path) -> None:
    """Once the paths were ignored and the bundled samples scored."""
    file = tmp_path / "own.txt"
    file.write_bytes(b"the user's own text, " * 200)
    rows = sweep(suite, 1, {"text": file}, tmp_path / "out", n_chunks=1, progress=False)
    assert rows["dataset"].tolist() == ["text"] and rows.attrs["failed"] == []
    sample = sweep(suite, 1, ["text"], tmp_path / "sample", n_chunks=1, progress=False)
    assert sample["dataset"].tolist() == ["text-sample"]
    assert rows["coded_bytes"].tolist() != sample["coded_bytes"].tolist()
    with pytest.raises(Error, match="expected a name and the path of its files"):
        sweep(suite, 1, {"text": 7}, tmp_path / "third", progress=False)


def test_rows_say_how_their_chunks_were_drawn(suite: Path, tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(5000)
    (tmp_path / "own.bin").write_bytes(content)
    data = {"dna": tmp_path / "own.bin", "waves": np.arange(2000, dtype=np.int16)}
    how: dict[str, Any] = {"chunk_bytes": 500, "n_chunks": 2, "progress": False}
    sweep(suite, 1, data, tmp_path / "out", seed=5, baselines=True, **how)
    sweep(suite, 1, data, tmp_path / "first", draw="first", **how)
    sweep(suite, 1, {"pair": ["one row", "another"]}, tmp_path / "rows", whole=True, draw="first", progress=False)
    drawn, first, whole = (results.read_rows(tmp_path / name) for name in ("out", "first", "rows"))
    assert set(drawn["modality"]) == {"dna", "audio"}
    assert set(drawn["draw"]) == {"spread"} and set(drawn["draw_seed"]) == {5} and set(drawn["chunk_bytes"]) == {500}
    assert set(first["draw"]) == {"first"} and first["draw_seed"].isna().all()
    assert first["offset"].tolist() == [0, 500] * 2
    assert whole["bytes_in"].tolist() == [7, 7] and whole["chunk_bytes"].isna().all()
    # What a row is of can be found again by what it says.
    for row in drawn[(drawn["dataset"] == "dna") & (drawn["model"] == "gzip-9") & (drawn["chunk"] >= 0)].itertuples():
        assert row.document == "own.bin"
        chunk = content[row.offset : row.offset + 500]
        assert chunk == load_dataset(f"dna={tmp_path / 'own.bin'}", 2, 500, 5, progress=False).chunks[row.chunk]

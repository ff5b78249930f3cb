"""Sweeps: the grid, what is finished and what is not, kills, torn files, failures, executors, warnings."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hub_server import Hub, neox_files, write_checkpoint

from llmcomp import load_model, pico, results
from llmcomp.data.datasets import load_dataset
from llmcomp.errors import Error
from llmcomp.experiment import plan as grid
from llmcomp.experiment.sweep import EqualWeightsWarning, TrainingDataWarning, sweep
from llmcomp.scoring import score

STEPS = (1, 2)


@dataclass
class Data:
    """What a sweep asks of a data set."""

    name: str
    modality: str
    chunks: list[bytes]


def some_data(n_chunks: int = 3, n_bytes: int = 200) -> list[Data]:
    rng = np.random.default_rng(0)
    text = [(b"the rain in spain falls mainly in the plain; again %d. " % i * 9)[:n_bytes] for i in range(n_chunks)]
    noise = [rng.bytes(n_bytes) for _ in range(n_chunks)]
    return [Data("prose", "text", text), Data("noise", "image", noise)]


def fake_rows(chunks: list[bytes], model: Any, protocol: str, mapping: str | None, ratio: float = 0.5) -> pd.DataFrame:
    """Rows as `score.score` gives them, of coded bytes that are half of the chunk's."""
    n_bytes = np.array([len(chunk) for chunk in chunks])
    coded = (n_bytes * ratio).astype(int)
    rows = pd.DataFrame({"chunk": range(len(chunks)), "bytes_in": n_bytes, "bytes_scored": n_bytes})
    facts = {"model": model.name, "params": model.n_params, "step": model.step, "dataset": "", "modality": ""}
    rest = {"tokens": 1, "side_bits": 0, "seconds": 0.01, "engine": "exact", "backend": "serial", "device": "cpu"}
    labels = {"protocol": protocol, "mapping": mapping, "dtype": "float32", "version": "0"}
    rows = rows.assign(coded_bytes=coded, ideal_bits=8.0 * coded, ratio=coded / n_bytes, **facts, **rest, **labels)
    return results.check_rows(rows.assign(weights_sha256=model.weights_sha256))


class Counting:
    """A scorer that remembers what it was asked for, and fails where it is told to."""

    def __init__(self, fails_at: tuple[int, int] | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fails_at = fails_at

    def __call__(self, chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> pd.DataFrame:
        call = (model.step, len(chunks[0]))
        self.calls.append(call)
        if call == self.fails_at:
            raise RuntimeError("the numbers are wrong today")
        return fake_rows(chunks, model, protocol, mapping)


def run(suite: Path, out: Path, scorer: Any = None, **options: Any) -> pd.DataFrame:
    given = {"datasets": some_data(), "steps": STEPS, "progress": False, **options}
    return sweep(suite, out=out, scorer=scorer or Counting(), **given)


def cell_files(out: Path) -> list[Path]:
    return sorted(out.glob("*.parquet"))


def without_time(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns="seconds").reset_index(drop=True)


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


def test_a_finished_cell_is_never_computed_again(suite: Path, tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    rows = run(suite, tmp_path, first)
    assert len(first.calls) == 4
    again = run(suite, tmp_path, second)
    assert second.calls == []
    pd.testing.assert_frame_equal(rows, again)


@pytest.mark.parametrize("fault", ["truncated", "empty", "another cell", "not Parquet", "no key"])
def test_files_that_are_torn_or_foreign_are_recomputed(suite: Path, tmp_path: Path, fault: str) -> None:
    rows = run(suite, tmp_path)
    victim, other = cell_files(tmp_path)[:2]
    whole = victim.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "another cell": other.read_bytes(),
        "not Parquet": b"ratio,0.1\n",
        "no key": b"",
    }
    victim.write_bytes(damaged[fault])
    if fault == "no key":
        results.write_rows(victim, rows[rows["step"] == 1].iloc[:3].assign(ratio=0.1, coded_bytes=20))
    scorer = Counting()
    again = run(suite, tmp_path, scorer)
    assert len(scorer.calls) == 1
    pd.testing.assert_frame_equal(without_time(rows), without_time(again))
    assert len(results.read_rows(tmp_path)) == len(rows)


def test_no_flipped_bit_changes_a_trusted_row(suite: Path, tmp_path: Path) -> None:
    rows = run(suite, tmp_path, steps=(1,), datasets=some_data()[:1])
    (path,) = cell_files(tmp_path)
    key = results.read_metadata(path)[grid.KEY]
    cell = grid.Cell("tiny", 1, "prose", "lossless", "bytes", key, path, 600)
    whole, n_refused = path.read_bytes(), 0
    for at in range(5, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        found = grid.finished_rows(cell)
        n_refused += found is None
        assert found is None or found.equals(rows)
    assert n_refused >= 10


class Chunks(Counting):
    """What each call was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[list[bytes]] = []

    def __call__(self, chunks: list[bytes], *rest: Any, **options: Any) -> pd.DataFrame:
        self.given.append(list(chunks))
        return super().__call__(chunks, *rest, **options)


def of_rows(rows: pd.DataFrame) -> list[list[Any]]:
    key = ["model", "step", "dataset", "chunk", "bytes_in", "coded_bytes", "data_sha256"]
    return rows.sort_values(key)[key].to_numpy().tolist()


def test_more_chunks_keep_those_that_are_there(suite: Path, tmp_path: Path) -> None:
    def asked(n: int, out: str = "out") -> tuple[pd.DataFrame, list[list[bytes]]]:
        scorer = Chunks()
        data = [Data(d.name, d.modality, d.chunks[:n]) for d in some_data(n_chunks=9)]
        return run(suite, tmp_path / out, scorer, datasets=data), scorer.given

    all_chunks = {data.name: data.chunks for data in some_data(n_chunks=9)}
    for n_before, n in ((0, 3), (3, 7), (7, 9)):
        rows, given = asked(n)
        assert sorted(given) == sorted(2 * [chunks[n_before:n] for chunks in all_chunks.values()])
        assert of_rows(rows) == of_rows(asked(n, f"alone-{n}")[0])
        assert of_rows(results.read_rows(tmp_path / "out")) == of_rows(rows)
    # Fewer are some of those; neither the files nor their sums are touched.
    for n in (2, 3, 5, 8):
        rows, given = asked(n)
        assert given == [] and of_rows(rows) == of_rows(asked(n, f"alone-{n}")[0])
    cells = sweep(suite, STEPS, [Data(d.name, d.modality, d.chunks[:5]) for d in some_data(n_chunks=9)],
                  tmp_path / "out", unit="cell", progress=False)  # fmt: skip
    assert cells["chunks"].tolist() == [5] * 4
    assert len(cell_files(tmp_path / "out")) == 4 * 3
    assert not list((tmp_path / "out").glob("*.superseded"))


def test_chunks_are_kept_only_where_they_are_the_same(suite: Path, tmp_path: Path) -> None:
    """And verified, where that is asked for."""
    before = some_data(n_chunks=3)[0]
    run(suite, tmp_path, steps=(1,), datasets=[before])
    other = Data(before.name, before.modality, [before.chunks[0], b"another chunk", *before.chunks[2:], b"and more"])
    scorer = Chunks()
    run(suite, tmp_path, scorer, steps=(1,), datasets=[other])
    assert scorer.given == [other.chunks]
    # They begin alike, so rows could not be told apart: the older are set aside.
    assert len(list(tmp_path.glob("*.superseded"))) == 1
    scorer = Chunks()
    run(suite, tmp_path, scorer, steps=(1,), datasets=[other], verify=True)
    assert scorer.given == [other.chunks]
    assert len(results.read_rows(tmp_path)) == 4


def test_other_data_and_settings_lie_beside_each_other(suite: Path, tmp_path: Path) -> None:
    content = np.random.default_rng(3).bytes(4000)
    (tmp_path / "own.bin").write_bytes(content)
    out, tables = tmp_path / "out", []
    for options in ({}, {"seed": 1}, {"draw": "first"}, {"chunk_bytes": 200}, {"engine": "exact-int8"}):
        how: dict[str, Any] = {"n_chunks": 4, "chunk_bytes": 100, **options}
        tables.append(sweep(suite, 1, {"own": tmp_path / "own.bin"}, out, progress=False, **how))
    (tmp_path / "own.bin").write_bytes(content[::-1])
    tables.append(sweep(suite, 1, {"own": tmp_path / "own.bin"}, out, n_chunks=4, chunk_bytes=100, progress=False))
    assert [len(table) for table in tables] == [4] * 6
    assert len(results.read_rows(out)) == 24
    assert len(results.cells(results.read_rows(out))) == 6
    assert not list(out.glob("*.superseded"))


@pytest.mark.parametrize("names", [("run_1", "run-1"), ("a/tiny", "b/tiny"), ("run 1/step5", "run:1/step5")])
def test_a_model_whose_name_looks_alike_keeps_its_finished_cells(tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = (write_checkpoint(tmp_path / name, seed=i) for i, name in enumerate(names))
    out, text = tmp_path / "out", some_data()[:1]
    for folder in (first, second):
        assert sweep(folder, datasets=text, out=out, scorer=Counting(), progress=False).attrs["failed"] == []
    assert not list(out.glob("*.superseded"))
    assert len(cell_files(out)) == 2
    scorer = Counting()
    sweep([first, second], datasets=text, out=out, scorer=scorer, progress=False)
    assert scorer.calls == []
    # Trained again in its place it is another model, and the cells of the older one stay as well.
    write_checkpoint(second, seed=9)
    sweep(second, datasets=text, out=out, scorer=scorer, progress=False)
    assert len(scorer.calls) == 1 and not list(out.glob("*.superseded"))
    assert len(cell_files(out)) == 3


def older_names(out: Path) -> None:
    """Files as version 0.1 called them: model, step, dataset, protocol, mapping, engine, chunks, digest of the key."""
    for path in cell_files(out):
        path.rename(re.sub(r"_[0-9a-f]{10}(?=_\d+chunks_[0-9a-f]{12}\.parquet$)", "", str(path)))


def test_finished_cells_under_older_names_are_known_again(suite: Path, tmp_path: Path) -> None:
    rows = run(suite, tmp_path)
    older_names(tmp_path)
    names = [path.name for path in cell_files(tmp_path)]
    assert re.fullmatch(r"tiny_step1_noise_lossless_bytes_exact_3chunks_[0-9a-f]{12}\.parquet", names[0])
    scorer = Counting()
    again = run(suite, tmp_path, scorer)
    assert scorer.calls == []
    pd.testing.assert_frame_equal(rows, again)
    assert [path.name for path in cell_files(tmp_path)] == names
    # Other settings set them aside, and so does a wish to have them verified.
    run(suite, tmp_path, scorer, datasets=some_data(n_chunks=2))
    assert len(results.read_rows(tmp_path)) == 4 * 2
    older_names(tmp_path)
    run(suite, tmp_path, scorer, datasets=some_data(n_chunks=2), verify=True)
    assert len(results.read_rows(tmp_path)) == 4 * 2
    assert len(list(tmp_path.glob("*.superseded"))) == 8


def test_another_models_cells_under_older_names_stay(tmp_path: Path) -> None:
    first, second = (write_checkpoint(tmp_path / name, seed=i) for i, name in enumerate(("run_1", "run-1")))
    out, text = tmp_path / "out", some_data()[:1]
    sweep(first, datasets=text, out=out, scorer=Counting(), progress=False)
    older_names(out)
    torn = out / cell_files(out)[0].name.replace("_3chunks_", "_4chunks_")
    torn.write_bytes(b"PAR1")
    sweep(second, datasets=text, out=out, scorer=Counting(), progress=False)
    assert [path.name for path in out.glob("*.superseded")] == [f"{torn.name}.superseded"]
    scorer = Counting()
    sweep([first, second], datasets=text, out=out, scorer=scorer, progress=False)
    assert scorer.calls == []


def test_copies_of_one_checkpoint_are_one_cell(suite: Path, tmp_path: Path) -> None:
    shutil.copytree(suite / "step1", tmp_path / "copy" / "tiny" / "step1")
    text, out = some_data()[:1], tmp_path / "out"
    scorer = Counting()
    run(suite, out, steps=(1,), datasets=text)
    run(tmp_path / "copy" / "tiny", out, scorer, steps=(1,), datasets=text)
    assert scorer.calls == []
    sweep([suite, tmp_path / "copy" / "tiny"], 1, text, tmp_path / "two", scorer=scorer, progress=False)
    assert len(cell_files(tmp_path / "two")) == 1
    assert len(results.read_rows(tmp_path / "two")) == 3


@pytest.mark.parametrize("name", ["\u6587" * 80, "x" * 250, "é" * 127])
def test_folders_with_names_as_long_as_file_systems_allow(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / name, seed=1)
    text = [Data("d" * 200, "text", some_data()[0].chunks)]
    rows = sweep(folder, datasets=text, out=tmp_path / "out", scorer=Counting(), progress=False)
    assert rows.attrs["failed"] == []
    assert set(rows["model"]) == {name}
    scorer = Counting()
    text = [Data("d" * 200, "text", some_data(n_chunks=4)[0].chunks)]
    sweep(folder, datasets=text, out=tmp_path / "out", scorer=scorer, progress=False)
    assert len(scorer.calls) == 1 and len(results.read_rows(tmp_path / "out")) == 4
    cell_files(tmp_path / "out")[0].write_bytes(b"PAR1")
    sweep(folder, datasets=text, out=tmp_path / "out", scorer=scorer, progress=False)
    assert len(list((tmp_path / "out").glob("*.superseded"))) == 1


def test_what_was_not_verified_is_computed_again_if_it_is_to_be(suite: Path, tmp_path: Path) -> None:
    run(suite, tmp_path)
    scorer = Counting()
    run(suite, tmp_path, scorer, verify=True)
    assert len(scorer.calls) == 4
    for verify in (True, False):
        run(suite, tmp_path, scorer, verify=verify)
    assert len(scorer.calls) == 4


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


def test_another_grid_in_the_same_folder_leaves_the_first_alone(suite: Path, tmp_path: Path) -> None:
    first, second = some_data()
    run(suite, tmp_path, datasets=[first])
    run(suite, tmp_path, datasets=[second])
    assert len(cell_files(tmp_path)) == 4
    assert not list(tmp_path.glob("*.superseded"))


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


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from test_sweep import Counting, fake_rows, run, some_data
from pathlib import Path

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
        "paths": [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")],
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
            sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]!r}
            from test_sweep import Path, run
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

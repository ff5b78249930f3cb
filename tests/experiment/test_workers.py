"""Several workers on one folder of results: the table of one process, whoever is killed, stopped or out of disk."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hub_server import write_checkpoint
from small_sweeps import Counting, fake_rows, some_data

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.experiment import processes
from llmcomp.experiment.leases import DEATHS_MAX
from llmcomp.experiment.sweep import sweep
from llmcomp.scoring import score

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
STEPS = (1, 2, 3)
# With two data sets and three steps 12 cells, of which 6 have payloads, which are decoded.
GRID: dict[str, Any] = {"protocol": ("lossless", "published"), "verify": True, "progress": False}
N_CELLS = 12


def table_bytes(rows: pd.DataFrame) -> bytes:
    """A table as one file, without the columns that may differ; of rows in one order."""
    order = ["model", "step", "dataset", "protocol", "mapping", "chunk"]
    rows = rows.drop(columns=list(results.MACHINE_COLUMNS)).sort_values(order, ignore_index=True)
    rows.attrs = {}
    file = io.BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


class Logged:
    """A scorer that scores, and tells a file before and after which cell it was; slow enough to be killed at."""

    def __init__(self, log: Path, seconds: float = 0.0, kills: int | None = None) -> None:
        self.log, self.seconds, self.kills = log, seconds, kills

    def __call__(self, chunks: list[bytes], model: Any, **options: Any) -> pd.DataFrame:
        cell = f"{model.name} {model.step} {chunks[0][:3].hex()} {options['protocol']}"
        self._write(f"begin {cell}")
        if model.step == self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = score.score(chunks, model, **options)
        time.sleep(self.seconds)
        self._write(f"end {cell}")
        return rows

    def _write(self, line: str) -> None:
        with self.log.open("a") as log:
            log.write(f"{line}\n")


def begun(log: Path) -> Counter[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.removeprefix("begin ") for line in lines if line.startswith("begin "))


# Processes that are forked from one that has imported everything: eight of them start in a moment.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_workers", "llmcomp.experiment.sweep", "llmcomp.scoring.score"])


def work_on_shard(suite: Path, folder: Path, seconds: float, lease: float, number: int) -> None:
    """What `llmcomp sweep --shard NUMBER` does; what goes wrong is written to a file."""
    processes.end_on_sigterm()
    try:
        scorer = Logged(folder / "log", seconds)
        how: dict[str, Any] = {"scorer": scorer, "shard": number, "unit": None, "lease": lease, **GRID}
        rows = sweep(suite, STEPS, some_data(), folder / "out", **how)
        assert rows.attrs["failed"] == [], rows.attrs["failed"]
    except Exception:
        (folder / f"error-{number}").write_text(traceback.format_exc())
        raise


class Shards:
    """Shard processes on one folder, as an array job starts them."""

    def __init__(self, suite: Path, folder: Path, seconds: float, lease: float = 30.0):
        self.out, self.log, self.folder = folder / "out", folder / "log", folder
        self.processes: list[Any] = []
        self.arguments = (suite, folder, seconds, lease)
        self.n_killed = 0

    def start(self, number: int) -> Any:
        process = FORKS.Process(target=work_on_shard, args=(*self.arguments, number))
        process.start()
        self.processes.append(process)
        return process

    def kill(self, process: Any) -> None:
        process.kill()
        process.join()
        self.n_killed += process.exitcode == -signal.SIGKILL

    def join(self) -> list[str]:
        """What those say that did not end well, but for the ones that were killed."""
        for process in self.processes:
            process.join(timeout=240)
            assert process.exitcode is not None
        wrong = [process.exitcode for process in self.processes if process.exitcode not in (0, -signal.SIGKILL)]
        return [path.read_text() for path in self.folder.glob("error-*")] or wrong


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def expected(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of one process, scored without the scorer that the workers have here."""
    out = tmp_path_factory.mktemp("one")
    return table_bytes(sweep(suite, STEPS, some_data(), out, **GRID))


def check_folder(shards: Shards, expected: bytes) -> None:
    """Nothing torn, doubled, lost or left over; nothing computed more often than the kills explain."""
    assert table_bytes(results.read_rows(shards.out)) == expected
    left = sorted(path.name for path in shards.out.iterdir() if not path.name.endswith(".parquet"))
    assert left == [".sweep.lock"]
    assert len(begun(shards.log)) == N_CELLS
    assert sum(begun(shards.log).values()) - N_CELLS <= shards.n_killed


def test_shards_make_the_table_of_one_process(suite: Path, tmp_path: Path, expected: bytes) -> None:
    shards = Shards(suite, tmp_path, seconds=0.02)
    for number in range(3):
        shards.start(number)
    assert shards.join() == []
    check_folder(shards, expected)
    assert set(begun(shards.log).values()) == {1}


def test_killed_shards_are_replaced_by_those_that_live(suite: Path, tmp_path: Path, expected: bytes) -> None:
    shards = Shards(suite, tmp_path, seconds=0.3)
    first, _, third = [shards.start(number) for number in range(3)]
    wait_for(lambda: len(begun(shards.log)) >= 2)
    shards.kill(first)
    shards.kill(third)
    assert shards.join() == []
    check_folder(shards, expected)


@pytest.mark.slow
def test_a_stopped_shard_is_replaced_and_may_go_on(suite: Path, tmp_path: Path, expected: bytes) -> None:
    """SIGSTOP stops the heart too: after the lease another takes the cell; woken up, the first one does no harm."""
    shards = Shards(suite, tmp_path, seconds=0.3, lease=1.5)
    first = shards.start(0)
    wait_for(lambda: len(begun(shards.log)) >= 1)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        shards.start(1).join(timeout=120)
        assert table_bytes(results.read_rows(shards.out)) == expected
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert shards.join() == []
    shards.n_killed = 1
    check_folder(shards, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_eight_shards_half_of_them_killed(suite: Path, tmp_path: Path, expected: bytes, seed: int) -> None:
    chance = random.Random(seed)
    shards = Shards(suite, tmp_path, seconds=0.2)
    started = [shards.start(number) for number in range(8)]
    wait_for(lambda: len(begun(shards.log)) >= 1)
    for process in chance.sample(started, 4):
        time.sleep(chance.uniform(0, 0.25))
        shards.kill(process)
    assert shards.join() == []
    check_folder(shards, expected)
    print(f"{shards.n_killed} killed, {sum(begun(shards.log).values()) - N_CELLS} cells begun again")


def test_processes_make_the_table_of_one(suite: Path, tmp_path: Path, expected: bytes) -> None:
    scorer = Logged(tmp_path / "log")
    rows = sweep(suite, STEPS, some_data(), tmp_path / "out", workers=2, scorer=scorer, **GRID)
    assert rows.attrs["failed"] == []
    assert table_bytes(rows) == expected
    assert set(begun(tmp_path / "log").values()) == {1}
    assert len(begun(tmp_path / "log")) == N_CELLS


def test_baselines_in_processes(suite: Path, tmp_path: Path) -> None:
    """Once the job of all baselines, sent to a process, was taken for a model of that name."""
    options: dict[str, Any] = {"baselines": True, "progress": False}
    alone = sweep(suite, 1, some_data()[:1], tmp_path / "alone", **options)
    rows = sweep(suite, 1, some_data()[:1], tmp_path / "out", workers=2, **options)
    assert rows.attrs["failed"] == []
    assert table_bytes(rows) == table_bytes(alone)


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_fails_and_the_others_do_not(suite: Path, tmp_path: Path, capfd: Any) -> None:
    out, text = tmp_path / "out", some_data()[:1]
    scorer = Logged(tmp_path / "log", kills=2)
    rows = sweep(suite, STEPS, text, out, workers=2, scorer=scorer, progress=False)
    (failed,) = rows.attrs["failed"]
    assert (failed["step"], failed["reason"]) == (2, f"{DEATHS_MAX} workers died while they computed it")
    assert set(rows["step"]) == {1, 3}
    assert [entry["step"] for entry in json.loads((out / "failed.json").read_text())["failed"]] == [2]
    assert "another takes its place" in capfd.readouterr().err
    # The next run tries again.
    again = sweep(suite, STEPS, text, out, workers=1, scorer=Logged(tmp_path / "log"), progress=False)
    assert again.attrs["failed"] == []
    assert not (out / "failed.json").exists()
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".parquet") == [".sweep.lock"]


def fails_at_two(chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> pd.DataFrame:
    if model.step == 2:
        raise RuntimeError("the numbers are wrong today")
    return fake_rows(chunks, model, protocol, mapping)


def test_a_failing_cell_is_tried_once_a_run(suite: Path, tmp_path: Path) -> None:
    rows = sweep(suite, STEPS, some_data(), tmp_path, workers=2, scorer=fails_at_two, progress=False)
    assert [entry["reason"] for entry in rows.attrs["failed"]] == ["RuntimeError: the numbers are wrong today"] * 2
    alone = sweep(suite, STEPS, some_data(), tmp_path, scorer=Counting(), progress=False)
    assert alone.attrs["failed"] == []


def test_a_model_that_cannot_be_loaded_fails_alone(suite: Path, tmp_path: Path) -> None:
    broken = write_checkpoint(tmp_path / "broken", 1)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-100])
    rows = sweep([suite, broken], None, some_data(), tmp_path / "out", shard=0, scorer=Counting(), progress=False)
    assert {failure["model"] for failure in rows.attrs["failed"]} == {"broken"}
    assert "model.safetensors" in rows.attrs["failed"][0]["reason"]
    assert set(rows["model"]) == {"tiny"}


def test_torn_files_are_replaced_by_workers(suite: Path, tmp_path: Path, expected: bytes) -> None:
    sweep(suite, STEPS, some_data(), tmp_path, shard=0, **GRID)
    torn, flipped = sorted(tmp_path.glob("*.parquet"))[:2]
    torn.write_bytes(torn.read_bytes()[:1000])
    data = bytearray(flipped.read_bytes())
    at = data.index(b"\x15\x00\x15") + 40  # in the first page, whose checksum tells
    data[at : at + 40] = bytes(40)
    flipped.write_bytes(data)
    rows = sweep(suite, STEPS, some_data(), tmp_path, shard=1, **GRID)
    assert table_bytes(rows) == expected
    assert table_bytes(results.read_rows(tmp_path)) == expected
    assert len(list(tmp_path.glob("*.superseded"))) == 2


FULL = """
import resource, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from small_sweeps import Counting, some_data
from llmcomp.experiment.sweep import sweep
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sweep(Path({suite!r}), (1, 2), some_data(), Path({out!r}), scorer=Counting(), progress=False, shard=0)
"""


def test_a_disk_that_takes_no_more_is_named_and_the_sweep_goes_on_when_it_does(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = textwrap.dedent(FULL).format(paths=PATHS, suite=str(suite), out=str(out))
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "llmcomp.errors.Error: cannot write" in answer.stderr
    assert "File too large" in answer.stderr
    assert not list(out.glob("*.parquet"))
    rows = sweep(suite, (1, 2), some_data(), out, scorer=Counting(), progress=False, shard=1)
    assert rows.attrs["failed"] == []
    assert len(list(out.glob("*.parquet"))) == 4
    assert not (out / ".claims").exists()


def test_processes_say_why_none_of_them_can_go_on(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".claims").symlink_to(tmp_path)
    with pytest.raises(Error, match="expected a folder of its own, found a link"):
        sweep(suite, 1, some_data(), tmp_path / "out", workers=2, progress=False)
    with pytest.raises(Error, match="can be pickled"):
        unpicklable = lambda *_, **__: None  # noqa: E731
        sweep(suite, 1, some_data(), tmp_path / "other", workers=1, scorer=unpicklable, progress=False)


def test_workers_and_a_sweep_alone_do_not_share_a_folder(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcomp.experiment.folder_lock._PATIENCE_SECONDS", 0.1)
    code = f"""
        import sys
        sys.path[:0] = {PATHS!r}
        from pathlib import Path
        from small_sweeps import run
        run(Path({str(suite)!r}), Path({str(tmp_path)!r}))
    """

    def meanwhile(chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> pd.DataFrame:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "another sweep is at work here (of several workers)" in answer.stderr
        return fake_rows(chunks, model, protocol, mapping)

    rows = sweep(suite, 1, some_data()[:1], tmp_path, shard=0, scorer=meanwhile, progress=False)
    assert rows.attrs["failed"] == []


def test_workers_with_other_settings_are_refused_while_others_work(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, a worker sets files of another arithmetic aside as every sweep does; beside others it would undo work."""
    sweep(suite, 1, some_data(), tmp_path, shard=0, scorer=Counting(), progress=False)
    code = f"""
        import sys
        sys.path[:0] = {PATHS!r}
        from pathlib import Path
        from small_sweeps import Counting, some_data
        from llmcomp.experiment import sweep as module
        module._PATIENCE_SECONDS = 0.1
        module.grid.ROWS_VERSION = 99
        module.sweep(Path({str(suite)!r}), 1, some_data(), Path({str(tmp_path)!r}), shard=1, progress=False)
    """

    def meanwhile(chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> pd.DataFrame:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "other workers are at work here, and 2 files have other settings" in answer.stderr
        return fake_rows(chunks, model, protocol, mapping)

    sweep(suite, (1, 2), some_data(), tmp_path, shard=0, scorer=meanwhile, progress=False)
    assert len(list(tmp_path.glob("*.parquet"))) == 4
    monkeypatch.setattr("llmcomp.experiment.plan.ROWS_VERSION", 99)
    sweep(suite, 1, some_data(), tmp_path, shard=0, scorer=Counting(), progress=False)
    assert len(list(tmp_path.glob("*.superseded"))) == 2


def test_a_terminated_worker_gives_its_cells_back(suite: Path, tmp_path: Path) -> None:
    """SIGTERM is how a scheduler asks for the machine; the next worker need not wait, nor is it a death."""
    shards = Shards(suite, tmp_path, seconds=5.0, lease=3600)
    process = shards.start(0)
    wait_for(lambda: len(begun(shards.log)) >= 1)
    process.terminate()
    process.join(timeout=60)
    assert process.exitcode == 128 + signal.SIGTERM
    contents = {path.read_text() for path in (shards.out / ".claims").glob("*.claim")}
    assert contents == {"released"}
    assert not list((shards.out / ".claims").glob("*.worker"))


def test_which_gpus_and_how_much_memory_each_process_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert processes._gpus() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(processes, "_CARDS", tmp_path)
    assert processes._gpus() == ["0", "1", "2"]
    monkeypatch.setattr(processes, "_CARDS", tmp_path / "none")
    assert processes._gpus() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"shard": -1}, "shard is -1"),
        ({"shard": 0, "workers": 2}, "give one of them"),
        ({"shard": 0, "disk": "1GB"}, "disk bounds the downloads of a sweep in this process"),
    ],
)
def test_wrong_requests(suite: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Error, match=words):
        sweep(suite, 1, some_data(), tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()

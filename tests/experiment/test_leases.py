"""Claims in a folder: one holder a cell, dead holders replaced by one taker, no clock of the day, full disks named."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmcomp.errors import Error
from llmcomp.experiment import leases as module
from llmcomp.experiment.leases import DEATHS_MAX, Claims

LEASE = 0.6
# Where a living worker must not be taken for dead, on a machine with much other work.
LONG_LEASE = 2.5


def open_cell() -> bool:
    return False


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows who is on the same machine: locks say nothing, only the lease does."""
    monkeypatch.setattr(module, "_boot_id", lambda: "-")


def stop_heart(claims: Claims) -> None:
    """As SIGSTOP would: no more signs of life, and nothing is cleared away."""
    claims._sign._is_over.set()
    claims._sign._thread.join()


def test_one_holder_and_the_next_when_it_is_done(tmp_path: Path) -> None:
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("cell", open_cell)
        assert not second.take("cell", open_cell)
        assert second.claimed() == {"cell"}
        first.settle("cell")
        assert second.claimed() == set()
        assert not second.take("cell", lambda: True)
        assert second.claimed() == set()
    assert not (tmp_path / ".claims").exists()


def test_what_is_given_back_is_free_at_once_and_no_death(tmp_path: Path) -> None:
    with Claims(tmp_path) as second:
        for _ in range(DEATHS_MAX + 1):
            with Claims(tmp_path) as first:
                assert first.take("cell", open_cell)
                assert not second.take("cell", open_cell)
        assert second.take("cell", open_cell)
        assert second.deaths("cell") == 0


def test_many_threads_take_each_cell_once(tmp_path: Path) -> None:
    """Every cell is taken by one of 8 workers, however they meet; the loser of a race knows it."""
    names = [f"cell-{i}" for i in range(40)]
    done: list[str] = []
    lock = threading.Lock()

    def work(claims: Claims) -> None:
        while len(done) < len(names):
            for name in names:
                if claims.take(name, lambda name=name: name in done):
                    with lock:
                        done.append(name)
                    claims.settle(name)

    workers = [Claims(tmp_path) for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for claims in workers:
            claims.__enter__()
        for future in [pool.submit(work, claims) for claims in workers]:
            future.result(timeout=60)
        for claims in workers:
            claims.__exit__(None, None, None)
    assert sorted(done) == sorted(names)


KILLED = """
import sys, time
from pathlib import Path
from llmcomp.experiment.leases import Claims
with Claims(Path({out!r})) as claims:
    assert claims.take("cell", lambda: False)
    print("taken", flush=True)
    time.sleep(60)
"""


def test_a_killed_worker_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    code = textwrap.dedent(KILLED).format(out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"taken\n"
    (tmp_path / ".claims" / f"cell.{next((tmp_path / '.claims').glob('*.worker')).stem}.part").write_bytes(b"half")
    with Claims(tmp_path, lease=3600) as claims:
        assert not claims.take("cell", open_cell)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert claims.take("cell", open_cell)
        assert claims.deaths("cell") == 1
        assert len(list((tmp_path / ".claims").glob("*.worker"))) == 1
        assert not list((tmp_path / ".claims").glob("*.part"))


def test_a_stale_lease_has_one_taker(tmp_path: Path, elsewhere: None) -> None:
    """Eight workers wait for the cell of one that stopped; one of them gets it, no sooner than the lease allows."""
    with Claims(tmp_path, LONG_LEASE) as stopped:
        assert stopped.take("cell", open_cell)
        began = time.monotonic()
        stop_heart(stopped)
        takers: list[float] = []

        until = began + 2 * LONG_LEASE
        all_waited = threading.Barrier(8)

        def wait() -> None:
            with Claims(tmp_path, LONG_LEASE) as claims:
                while time.monotonic() < until:
                    if claims.take("cell", open_cell):
                        takers.append(time.monotonic() - began)
                        break
                    time.sleep(0.01)
                all_waited.wait(60)  # whoever has it is alive until nobody waits for it any more
                claims._held.clear()  # not given back, which would be for the others to take

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(wait) for _ in range(8)]:
                future.result(timeout=60)
        assert len(takers) == 1
        assert takers[0] >= LONG_LEASE * 0.9


def test_a_worker_that_beats_keeps_its_cell(tmp_path: Path, elsewhere: None) -> None:
    taken: list[bool] = []

    def other() -> None:
        with Claims(tmp_path, LONG_LEASE) as claims:
            until = time.monotonic() + 1.5 * LONG_LEASE
            while time.monotonic() < until:
                taken.append(claims.take("cell", open_cell))
                time.sleep(0.02)

    with Claims(tmp_path, LONG_LEASE) as holder:
        assert holder.take("cell", open_cell)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert taken and not any(taken)


@pytest.mark.parametrize("clock", ["stands still", "jumps back"])
def test_the_clock_of_the_day_is_not_asked(
    tmp_path: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", (lambda: 0.0) if clock == "stands still" else (lambda: float(next(times))))
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    with Claims(tmp_path, LEASE) as holder:
        assert holder.take("cell", open_cell)
        stop_heart(holder)
        for path in (tmp_path / ".claims").iterdir():
            os.utime(path, (4e9, 4e9))  # of a file server whose clock is years ahead
        found: list[bool] = []

        def other() -> None:
            with Claims(tmp_path, LEASE) as claims:
                assert not claims.take("cell", open_cell)
                time.sleep(1.2 * LEASE)
                found.append(claims.take("cell", open_cell))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [True]


def test_a_worker_that_was_taken_for_dead_lives_on(tmp_path: Path) -> None:
    with Claims(tmp_path, LEASE) as claims:
        sign = next((tmp_path / ".claims").glob("*.worker"))
        sign.unlink()
        until = time.monotonic() + 5
        while not sign.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert sign.exists()
        assert claims.take("cell", open_cell)
        with Claims(tmp_path, LEASE) as other:
            assert not other.take("cell", open_cell)


def test_who_was_replaced_knows_it(tmp_path: Path, elsewhere: None) -> None:
    with Claims(tmp_path, LEASE) as stopped, Claims(tmp_path, LEASE) as other:
        assert stopped.take("cell", open_cell) and stopped.take("later", open_cell)
        stop_heart(stopped)
        assert not other.take("cell", open_cell)
        time.sleep(1.2 * LEASE)
        assert other.take("cell", open_cell)
        assert not stopped.holds("cell")
        assert stopped.holds("later")
        assert other.holds("cell")


def test_a_claim_whose_writer_died_before_it_wrote_its_name(tmp_path: Path) -> None:
    with Claims(tmp_path, LEASE) as claims:
        (tmp_path / ".claims" / "cell.0.claim").touch()
        assert not claims.take("cell", open_cell)
        time.sleep(1.2 * LEASE)
        assert claims.take("cell", open_cell)


def test_failures_are_of_a_run(tmp_path: Path) -> None:
    with Claims(tmp_path, run="a") as first, Claims(tmp_path, run="a") as second, Claims(tmp_path, run="b") as third:
        assert first.take("cell", open_cell)
        first.fail("cell", "no such weights")
        first.settle("cell")
        assert second.failure("cell") == "no such weights"
        assert third.failure("cell") is None
        assert third.failed() == {"cell"}
        third.fail("cell", "none here either")
        # It does not go round in circles: who failed at a cell itself is done with it.
        assert first.failure("cell") == "none here either"
        third.forget_failure("cell")
        assert first.failure("cell") is None


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Claims(tmp_path) as claims:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(Error, match=r"cannot write .*rows\.parquet: No space left on device"):
            claims.publish(tmp_path / "rows.parquet", b"rows")
        assert not list(tmp_path.glob("*.parquet"))
        assert not list((tmp_path / ".claims").glob("*.part"))


def test_links_and_pipes_of_a_stranger(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "out" / ".claims"
    precious.write_text("not the sweep's")
    folder.mkdir(parents=True)
    (folder / "cell.0.claim").symlink_to(precious)
    os.mkfifo(folder / "other.0.claim")
    (folder / "third.0.claim").write_text("../../precious")
    with Claims(tmp_path / "out", LEASE) as claims:
        names = ("cell", "other", "third")
        assert not any(claims.take(name, open_cell) for name in names)
        time.sleep(1.2 * LEASE)
        assert all(claims.take(name, open_cell) for name in names)
        for name in names:
            claims.settle(name)
    assert precious.read_text() == "not the sweep's"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".claims").symlink_to(tmp_path)
    with pytest.raises(Error, match="expected a folder of its own"), Claims(tmp_path / "linked"):
        pass

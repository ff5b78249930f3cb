"""Workers as processes of this machine: started, watched, started again when one is killed.

What each of them does is work_through's business; they share the folder of results and nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from llmcomp import coding
from llmcomp.data.token_cache import TokenCache
from llmcomp.errors import Error
from llmcomp.experiment.compute import one_line
from llmcomp.experiment.leases import DEATHS_MAX, Claims
from llmcomp.experiment.plan import Cell, Job, is_finished
from llmcomp.experiment.workers import claim_name, work_through
from llmcomp.models.memory import MaxMemory

# What several workers of one machine may take of its memory together.
_MEMORY_SHARE = 0.8
_WATCH_SECONDS = 0.2
_PATIENCE_SECONDS = 5.0
_CARDS = Path("/proc/driver/nvidia/gpus")


def work_in_processes(jobs: Sequence[Job], out: Path, n_workers: int, claims: Claims) -> Iterator[Cell]:
    """The cells of `jobs` in `n_workers` processes; yields those that are settled as they come to be.

    A process that is killed is started again, a few times; `Error` if no worker can go on.
    """
    waiting = {claim_name(cell): cell for job in jobs for cell in job.cells}
    with tempfile.TemporaryDirectory(prefix="llmcomp-tokens-") as tokens:
        jobs = [replace(job, max_memory=_memory_share(job, n_workers)) for job in jobs]
        slots = [
            _Slot(_Task(jobs, out, number, n_workers, claims.run, claims.lease, tokens)) for number in range(n_workers)
        ]
        try:
            while at_work := [slot for slot in slots if slot.is_at_work()]:
                connection.wait([slot.process.sentinel for slot in at_work], timeout=_WATCH_SECONDS)
                yield from _newly_settled(waiting, out, claims)
        finally:
            for slot in slots:
                slot.stop()
    yield from _newly_settled(waiting, out, claims)
    if waiting:
        raise Error(next((slot.problem for slot in slots if slot.problem), "all workers died"))


def _newly_settled(waiting: dict[str, Cell], out: Path, claims: Claims) -> list[Cell]:
    there = {name.removesuffix(".parquet") for name in os.listdir(out)}  # noqa: PTH208 - names alone
    failed = {name for name in claims.failed() & waiting.keys() if claims.failure(name) is not None}
    return [
        waiting.pop(name) for name in list(waiting) if name in failed or (name in there and is_finished(waiting[name]))
    ]


def _memory_share(job: Job, n_workers: int) -> MaxMemory:
    """What is free is not every worker's: those of one device share it."""
    if job.max_memory is not None:
        return job.max_memory
    n_gpus = len(_gpus()) if _is_cuda(job) else 1
    n_sharing = -(-n_workers // max(n_gpus, 1))
    return None if n_sharing == 1 else _MEMORY_SHARE / n_sharing


class _Task(NamedTuple):
    jobs: list[Job]
    out: Path
    number: int
    n_workers: int
    run: str
    lease: float
    tokens: str


class _Slot:
    """One of the processes, and those that take its place when it is killed."""

    def __init__(self, task: _Task):
        self.problem = ""
        self._task = task
        self._n_starts_left = DEATHS_MAX + 1
        self.process: Any = None
        self._start()

    def _start(self) -> None:
        self._n_starts_left -= 1
        context = multiprocessing.get_context("spawn")
        self._words, words = context.Pipe(duplex=False)
        # A daemon: none outlives the parent's end, if that is an orderly one.
        self.process = context.Process(target=_process, args=(self._task, words), daemon=True)
        try:
            self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise Error(f"workers need models and scorers that can be pickled: {one_line(error)}") from None
        words.close()

    def is_at_work(self) -> bool:
        if self.process is None:
            return False
        if self.process.is_alive():
            return True
        status = self.process.exitcode
        with contextlib.suppress(EOFError, OSError):
            self.problem = self._words.recv() if self._words.poll() else self.problem
        self.stop()
        if status == 0 or self.problem:
            return False
        self.problem = f"worker {self._task.number} died (status {status})"
        if self._n_starts_left:
            print(f"llmcomp: {self.problem}; another takes its place", file=sys.stderr)
            self.problem = ""
            self._start()
        return self.process is not None

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.join(_PATIENCE_SECONDS)
            self.process.kill()
            self.process.join()
            self._words.close()
            self.process = None


def _process(task: _Task, words: Any) -> None:
    """What a worker's process does."""
    gpus = _gpus()
    if _is_cuda(task.jobs[0]) and len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[task.number % len(gpus)]
    n_threads = max(1, coding.threads_in_use() // task.n_workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    # Ctrl-C reaches the whole group; the parent says what is to be done then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_on_sigterm()
    threading.Thread(target=_end_with_parent, name="llmcomp-parent", daemon=True).start()
    claims = Claims(task.out, task.lease, task.run)
    try:
        with coding.use_threads(n_threads):
            for _ in work_through(task.jobs, task.out, claims, task.number, TokenCache(task.tokens)):
                pass
    except Error as error:
        words.send(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_SECONDS)
    os._exit(1)


def end_on_sigterm() -> None:
    """Whoever ends this process (a scheduler that wants the machine back) has its claims given back."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _is_cuda(job: Job) -> bool:
    return str(job.options.get("device") or "").startswith("cuda")


def _gpus() -> list[str]:
    """The CUDA devices that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(_CARDS.iterdir())] if _CARDS.is_dir() else []

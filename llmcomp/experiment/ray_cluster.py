"""A sweep on a Ray cluster: actors that keep a model and go through its cells, and the driver that hands cells out.

Only the driver sees the folder of results. An actor that dies, with its process or its machine, loses the cell that it
was at, which another gets. What is in flight is bounded: an actor has one cell at work and one waiting, so that rows
never pile up before the driver has written them. Needs the extra `ray`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from llmcomp import coding, results
from llmcomp.data.token_cache import TokenCache
from llmcomp.errors import Error
from llmcomp.experiment import estimate
from llmcomp.experiment.compute import compute_cell, one_line, stage
from llmcomp.experiment.leases import DEATHS_MAX
from llmcomp.experiment.load_ahead import Loading
from llmcomp.experiment.plan import ROWS_VERSION, Cell, Job, Outcome, cell_metadata, is_baselines, job_work
from llmcomp.models.engines import exact
from llmcomp.models.sources import ModelSource
from llmcomp.progress import tqdm

# Actors that are asked for and have no place yet; Ray starts them where and when there is one.
_WANTED_MAX = 8
# Cells that an actor has: one at work, one that waits.
_CELLS_AT_ONCE = 2
_WATCH_SECONDS = 5.0
_STATUS_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
# How long an actor waits for tokens that another one makes, before it makes them itself.
_TOKENS_SECONDS = 60.0
# Beside weights: the interpreter, chunks, tokens, a batch.
_BASE_BYTES = 1 << 29


class RayCluster:
    """How a sweep uses a Ray cluster: `sweep(..., executor=RayCluster(...))`; "ray" is `RayCluster()`.

    `address`: of the cluster ("auto", "HOST:PORT"); None: RAY_ADDRESS, else a cluster of this machine alone. `cpus`,
    `gpus`: of one actor; a share of a GPU such as 0.25 lets several actors have it; None: a whole one where the device
    is a GPU. Its memory is what the plan says of its model, and of the next one that is read meanwhile.
    """

    def __init__(self, address: str | None = None, *, cpus: int = 1, gpus: float | None = None):
        if not isinstance(cpus, int) or cpus < 1:
            raise Error(f"cpus is {cpus!r}, expected an integer of at least 1")
        if gpus is not None and not gpus >= 0:
            raise Error(f"gpus is {gpus!r}, expected a number of at least 0")
        try:
            import ray
        except ImportError:
            raise Error("the executor 'ray' needs Ray: pip install llmcomp-exact[ray]") from None
        self._ray, self._address, self._cpus, self._gpus = ray, address, cpus, gpus

    def outcomes(self, jobs: Sequence[Job], progress: bool) -> Iterator[Outcome]:
        """What becomes of every cell, with the content of its file, as it comes to be."""
        was_connected = self._ray.is_initialized()
        if not was_connected:
            self._connect()
        try:
            driver = _Driver(self._ray, jobs, self._need, progress)
            try:
                yield from driver.run()
            finally:
                driver.stop()
        finally:
            if not was_connected:
                self._ray.shutdown()

    def _connect(self) -> None:
        host, _, port = (self._address or os.environ.get("RAY_ADDRESS") or "").rpartition(":")
        try:
            if host and port.isdecimal() and "/" not in host:  # Ray itself would wait for minutes
                socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
            self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            where = self._address or os.environ.get("RAY_ADDRESS", "")
            raise Error(f"cannot reach the Ray cluster {where}: {one_line(error)}") from error

    def _need(self, job: Job) -> Need:
        """What an actor for the job has to have; memory in powers of two, so that models of about one size share it."""
        is_cuda = str(job.options.get("device") or "").startswith("cuda")
        gpus = self._gpus if self._gpus is not None else float(is_cuda)
        n_bytes = _BASE_BYTES
        if not is_baselines(job.model):
            stored = job.model.weight_bytes if isinstance(job.model, ModelSource) else 0
            n_bytes += 4 * estimate.count_params(job.model) + stored
        return Need(self._cpus, gpus, 1 << (n_bytes - 1).bit_length())


class Need(NamedTuple):
    """Of an actor: processors, GPUs (or a share of one), bytes of memory."""

    cpus: int
    gpus: float
    memory: int

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus} CPU{gpus}, {estimate.in_bytes(self.memory)} of memory"

    def suffices(self, other: Need) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


@dataclass(eq=False)
class _Task:
    """A job with its cells that are still to be handed out."""

    number: int
    job: Job
    need: Need
    open: deque[Cell]
    reference: Any = None
    is_assigned: bool = False


@dataclass(eq=False)
class _Member:
    """An actor, the jobs that it has, and its cells in the order in which it will compute them."""

    actor: Any
    need: Need
    node: str = ""
    task: _Task | None = None
    ahead: _Task | None = None
    cells: deque[tuple[Any, _Task, Cell]] = field(default_factory=deque)


class _Driver:
    """Hands out cells, takes rows, replaces what dies."""

    def __init__(self, ray: Any, jobs: Sequence[Job], need: Callable[[Job], Need], progress: bool):
        self._ray, self._progress = ray, progress
        order = sorted(jobs, key=job_work, reverse=True)
        data = {name: item for job in jobs for name, item in job.datasets.items()}
        # Each data set lies once in every node's object store.
        self._data = {name: ray.put(item) for name, item in data.items()}
        self._tasks = [
            _Task(number, replace(job, datasets={}), need(job), deque(job.cells)) for number, job in enumerate(order)
        ]
        self._directory = ray.remote(_TokenDirectory).options(num_cpus=0).remote()
        self._wanted: dict[Any, _Member] = {}
        self._members: list[_Member] = []
        self._deaths: Counter[Cell] = Counter()
        self._n_dead = self._n_again = self._n_unborn = 0
        self._nodes: set[str] = set()

    def run(self) -> Iterator[Outcome]:
        since = time.monotonic()
        while self._is_work_left():
            self._want_more()
            at_work = {member.cells[0][0]: member for member in self._members if member.cells}
            ready, _ = self._ray.wait([*self._wanted, *at_work], timeout=_WATCH_SECONDS)
            for reference in ready:
                if reference in self._wanted:
                    self._begin(self._wanted.pop(reference), reference)
                else:
                    yield from self._take(at_work[reference])
            for member in list(self._members):
                self._hand_out(member)
                if self._wanted and not member.cells and self._next_task(member) is None:
                    # Nothing is left that it has the memory for, and another one wants its place.
                    self._members.remove(member)
                    self._ray.kill(member.actor)
            if time.monotonic() - since > _STATUS_SECONDS:
                since = time.monotonic()
                self._tell(self._status())
        self._tell(f"{self._n_dead} workers died, {self._n_again} cells were begun again; nodes: {len(self._nodes)}")

    def stop(self) -> None:
        for member in [*self._members, *self._wanted.values()]:
            self._ray.kill(member.actor)
        self._ray.kill(self._directory)

    def _is_work_left(self) -> bool:
        return any(task.open for task in self._tasks) or any(member.cells for member in self._members)

    def _tell(self, text: str) -> None:
        if self._progress:
            tqdm.write(f"ray: {text}", file=sys.stderr)

    def _status(self) -> str:
        n_cells = sum(len(task.open) for task in self._tasks)
        text = f"{len(self._members)} workers, {n_cells} cells to hand out"
        if self._wanted and not self._members:
            total = {name: amount for name, amount in self._ray.cluster_resources().items() if ":" not in name}
            wanted = next(iter(self._wanted.values())).need
            text += f"; waiting for a place with {wanted}; the cluster has {total}"
        return text

    def _want_more(self) -> None:
        """Ask for actors for jobs that nobody has, the largest first."""
        waiting = [member.need for member in self._wanted.values()]
        for task in self._tasks:
            if task.is_assigned or not task.open:
                continue
            if task.need in waiting:
                waiting.remove(task.need)
            elif len(self._wanted) < _WANTED_MAX:
                self._want(task.need)
        # Every job has its actor; more may help with those that have many cells.
        left = max(self._tasks, key=lambda task: len(task.open))
        if not self._wanted and sum(len(task.open) for task in self._tasks) > len(self._members):
            self._want(left.need)

    def _want(self, need: Need) -> None:
        options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "memory": need.memory, "max_restarts": 0}
        actor = self._ray.remote(_Worker).options(**options).remote(self._data, self._directory, need.cpus, need.gpus)
        self._wanted[actor.begin.remote()] = _Member(actor, need)

    def _begin(self, member: _Member, reference: Any) -> None:
        try:
            member.node, version = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._n_unborn += 1
            if self._n_unborn >= DEATHS_MAX and not self._members:
                raise Error(f"no worker can be started on the Ray cluster: {one_line(error)}") from error
            return
        if version != _version():
            raise Error(f"Ray node {member.node[:12]} has {version}, the driver {_version()}: install the same llmcomp")
        self._n_unborn = 0
        self._nodes.add(member.node)
        self._members.append(member)

    def _hand_out(self, member: _Member) -> None:
        while len(member.cells) < _CELLS_AT_ONCE and (task := self._next_task(member)) is not None:
            # At the end a cell that waits for one actor would be missed by another.
            if member.cells and sum(len(task.open) for task in self._tasks) < len(self._members):
                return
            cell = task.open.popleft()
            if task is not member.task:
                member.task, task.is_assigned = task, True
                member.ahead = self._reserve(member)
            ahead = member.ahead and (self._reference(member.ahead), member.ahead.number)
            reference = member.actor.score.remote(task.number, self._reference(task), cell, ahead and [ahead])
            member.cells.append((reference, task, cell))

    def _next_task(self, member: _Member) -> _Task | None:
        """The job that it has, the one that it reads, one that nobody has, the one with most cells left."""
        fits = [task for task in self._tasks if task.open and member.need.suffices(task.need)]
        for task in (member.task, member.ahead):
            if task is not None and task.open:
                return task
        free = next((task for task in fits if not task.is_assigned), None)
        return free or max(fits, key=lambda task: len(task.open), default=None)

    def _reserve(self, member: _Member) -> _Task | None:
        """A job to be read ahead, unless there are fewer than actors."""
        free = [task for task in self._tasks if task.open and not task.is_assigned]
        mine = next((task for task in free if member.need.suffices(task.need)), None)
        if (
            mine is None
            or len(free) <= len(self._members) + len(self._wanted)
            or not isinstance(mine.job.model, ModelSource)
        ):
            return None
        mine.is_assigned = True
        return mine

    def _reference(self, task: _Task) -> Any:
        if task.reference is None:
            task.reference = self._ray.put(task.job)
        return task.reference

    def _take(self, member: _Member) -> Iterator[Outcome]:
        reference, _, cell = member.cells[0]
        try:
            content, reason = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # it lives, but cannot do this
            content, reason = None, one_line(error.cause if isinstance(error.cause, Exception) else error)
        except self._ray.exceptions.RayError as error:
            yield from self._bury(member, error)
            return
        member.cells.popleft()
        yield Outcome(cell, None, reason, content)

    def _bury(self, member: _Member, error: BaseException) -> Iterator[Outcome]:
        """Its cells go back; the first one was at work, and fails if that has happened too often."""
        self._members.remove(member)
        self._ray.kill(member.actor)
        self._n_dead += 1
        self._tell(f"a worker on node {member.node[:12]} died ({type(error).__name__}); its cells go to others")
        at_work = member.cells[0][2]
        for task in (member.task, member.ahead):
            if task is not None:
                task.is_assigned = any(task in (other.task, other.ahead) for other in self._members)
        self._deaths[at_work] += 1
        for _, task, cell in reversed(member.cells):
            if self._deaths[cell] >= DEATHS_MAX:
                yield Outcome(cell, None, f"{self._deaths[cell]} workers died while they computed it")
            else:
                self._n_again += cell is at_work
                task.open.appendleft(cell)


class _Worker:
    """The actor: keeps a model, scores its cells, reads the next model meanwhile."""

    def __init__(self, data: Mapping[str, Any], directory: Any, n_threads: int, gpus: float):
        self._references, self._data = data, dict[str, Any]()
        self._cache = _SharedTokens(directory)
        self._n_threads, self._gpus = n_threads, gpus
        self._number: int | None = None
        self._model: Any = None
        self._ahead: tuple[int, Loading] | None = None

    def begin(self) -> tuple[str, str]:
        import ray

        return ray.get_runtime_context().get_node_id(), _version()

    def score(
        self, number: int, job: Job, cell: Cell, ahead: Sequence[tuple[Any, int]] | None
    ) -> tuple[bytes | None, str]:
        """The content of the cell's file, or None and why. `ahead`: the next job's reference and number."""
        with coding.use_threads(self._n_threads):
            try:
                self._load(number, job)
            except Exception as error:
                return None, one_line(error)
            self._read_ahead(ahead)
            job = replace(job, datasets={cell.dataset: self._dataset(cell.dataset)}, max_memory=self._memory(job))
            outcome = compute_cell(job, cell, self._model, self._cache)
        if outcome.rows is None:
            return None, outcome.reason
        return results.rows_as_parquet(outcome.rows, cell_metadata(cell, len(outcome.rows))), ""

    def _load(self, number: int, job: Job) -> None:
        if number == self._number:
            return
        self._number = self._model = None
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] != number:
            ahead[1].drop()
            ahead = None
        loading = ahead[1] if ahead is not None else Loading(lambda: stage(job))
        self._model = loading.result()()
        self._number = number

    def _read_ahead(self, ahead: Sequence[tuple[Any, int]] | None) -> None:
        import ray

        if ahead and self._ahead is None:
            ((reference, number),) = ahead
            self._ahead = number, Loading(lambda: stage(ray.get(reference)))

    def _dataset(self, name: str) -> Any:
        import ray

        if name not in self._data:
            self._data[name] = ray.get(self._references[name])
        return self._data[name]

    def _memory(self, job: Job) -> Any:
        """Of a shared GPU its share; what is free there is the others' too."""
        is_shared = job.max_memory is None and 0 < self._gpus < 1
        return 0.8 * self._gpus if is_shared else job.max_memory


class _TokenDirectory:
    """An actor that knows where the tokens of a group of chunks lie in the object store, and who is making them."""

    def __init__(self) -> None:
        self._references: dict[str, Any] = {}
        self._made: dict[str, asyncio.Event] = {}

    async def find(self, key: str) -> Any:
        """A list with their reference; None: the caller is to make them."""
        event = self._made.get(key)
        if event is None:
            self._made[key] = asyncio.Event()
            return None
        try:
            await asyncio.wait_for(event.wait(), _TOKENS_SECONDS)
        except asyncio.TimeoutError:
            return None
        return self._references[key]

    async def put(self, key: str, references: list[Any]) -> None:
        self._references[key] = references
        self._made.setdefault(key, asyncio.Event()).set()


class _SharedTokens(TokenCache):
    """Tokens through the object store: made by the first actor that needs them, and then once on every node."""

    def __init__(self, directory: Any):
        super().__init__()
        self._directory = directory

    def find_or_make(self, key: str, make: Callable[[], Any]) -> Any:
        import ray

        try:
            found = ray.get(self._directory.find.remote(key))
            if found is not None:
                return ray.get(found[0])
        except ray.exceptions.RayError:  # gone with the actor that made them
            return make()
        group = make()
        ray.get(self._directory.put.remote(key, [ray.put(group)]))
        return group


def _version() -> str:
    """Of what decides the bits."""
    return f"rows version {ROWS_VERSION} and arithmetic {exact.ARITHMETIC}"

"""Workers that share nothing but the folder of results: each claims a cell, computes it and writes its file, until
every cell is finished or has failed. Tasks of an array job, processes of one machine, any mix that comes and goes.

What a claim is, is leases.py's business; what a cell is worth, compute.py's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmcomp import results
from llmcomp.data.token_cache import TokenCache
from llmcomp.experiment.compute import compute_cell, one_line, stage
from llmcomp.experiment.leases import DEATHS_MAX, Claims
from llmcomp.experiment.load_ahead import Loading
from llmcomp.experiment.plan import Cell, Job, Outcome, cell_metadata, is_finished, job_work
from llmcomp.models.sources import ModelSource

_POLL_SECONDS = 0.05
_POLL_SECONDS_MAX = 2.0


@dataclass
class Work:
    """The cells of `jobs` that are left, and the one who does them next. Cells that are settled are dropped."""

    jobs: list[Job]
    claims: Claims
    out: Path
    cells: list[list[Cell]]
    # Cells whose file stood there before and was no finished one: a name in the folder says nothing of them.
    torn: set[Cell]

    @classmethod
    def of(cls, jobs: Sequence[Job], out: Path, claims: Claims, number: int) -> Work:
        """The largest job first, so that the last ones to end are small; each worker begins at another."""
        order = sorted(jobs, key=job_work, reverse=True)
        first = number % max(len(order), 1)
        order = order[first:] + order[:first]
        cells = [list(job.cells) for job in order]
        torn = {cell for job in order for cell in job.cells if cell.path.exists()}
        return cls(order, claims, out, cells, torn)

    def drop_settled(self) -> bool:
        """Whether any cell is left."""
        there = set(os.listdir(self.out))  # noqa: PTH208 - names alone
        failed = self.claims.failed()
        for cells in self.cells:
            cells[:] = [cell for cell in cells if not self._is_settled(cell, there, failed)]
        return any(self.cells)

    def _is_settled(self, cell: Cell, there: set[str], failed: set[str]) -> bool:
        if cell.path.name in there and (cell not in self.torn or is_finished(cell)):
            return True
        return claim_name(cell) in failed and self.claims.failure(claim_name(cell)) is not None

    def take_cell(self, number: int) -> Cell | None:
        """The next cell of a job that nobody else holds, claimed."""
        for cell in self.cells[number]:
            if self.claims.take(claim_name(cell), functools.partial(self._is_done, cell)):
                self.cells[number].remove(cell)
                return cell
        return None

    def _is_done(self, cell: Cell) -> bool:
        return is_finished(cell) or self.claims.failure(claim_name(cell)) is not None

    def take_fresh(self) -> tuple[int, Cell] | None:
        """A cell of a job that no other worker is at."""
        claimed = self.claims.claimed()
        for number, cells in enumerate(self.cells):
            if cells and not any(claim_name(cell) in claimed for cell in self.jobs[number].cells):
                cell = self.take_cell(number)
                if cell is not None:
                    return number, cell
        return None

    def take_any(self) -> tuple[int, Cell] | None:
        """A cell of whichever job, those with most left first: to help, or in place of a worker that died."""
        for number in sorted(range(len(self.jobs)), key=lambda number: -len(self.cells[number])):
            cell = self.take_cell(number)
            if cell is not None:
                return number, cell
        return None


def claim_name(cell: Cell) -> str:
    return cell.path.stem


def work_through(jobs: Sequence[Job], out: Path, claims: Claims, number: int, cache: TokenCache) -> Iterator[Outcome]:
    """Compute what nobody else does until all cells of `jobs` are settled; yields what this worker settled itself,
    without the rows.

    `Error` where results cannot be written; claims are given back then, as after any other end.
    """
    with claims:
        work = Work.of(jobs, out, claims, number)
        yield from _work(work, cache)
        claims.tidy({claim_name(cell) for job in jobs for cell in job.cells})


def _work(work: Work, cache: TokenCache) -> Iterator[Outcome]:
    ahead: tuple[int, Cell, Loading] | None = None
    pause = _POLL_SECONDS
    try:
        while ahead is not None or work.drop_settled():
            if ahead is None:
                found = work.take_fresh() or work.take_any()
                if found is None:
                    # Others are at the last cells; this worker stays in case they die.
                    time.sleep(pause)
                    pause = min(2 * pause, _POLL_SECONDS_MAX, work.claims.lease / 4)
                    continue
                ahead = _begin(work, *found)
            (number, cell, loading), ahead = ahead, None
            pause = _POLL_SECONDS
            job = work.jobs[number]
            model = _loaded(loading)
            if isinstance(job.model, ModelSource) and (found := work.take_fresh()):
                ahead = _begin(work, *found)
            mine: Cell | None = cell
            while mine is not None:
                # It may have been reserved for long, and this worker stopped meanwhile.
                if work.claims.holds(claim_name(mine)):
                    yield _settle(work, job, mine, model, cache)
                mine = work.take_cell(number)
            del model
    finally:
        if ahead is not None:
            ahead[2].drop()


def _begin(work: Work, number: int, cell: Cell) -> tuple[int, Cell, Loading]:
    return number, cell, Loading(functools.partial(stage, work.jobs[number]))


def _loaded(loading: Loading) -> Any:
    """The model; whatever is wrong with it is the reason why its cells fail."""
    try:
        return loading.result()()
    except Exception as error:
        return _Unloadable(one_line(error))


class _Unloadable(NamedTuple):
    reason: str


def _settle(work: Work, job: Job, cell: Cell, model: Any, cache: TokenCache) -> Outcome:
    claims, name = work.claims, claim_name(cell)
    n_deaths = claims.deaths(name)
    if n_deaths >= DEATHS_MAX:
        outcome = Outcome(cell, None, f"{n_deaths} workers died while they computed it")
    elif isinstance(model, _Unloadable):
        outcome = Outcome(cell, None, model.reason)
    else:
        outcome = compute_cell(job, cell, model, cache)
    if outcome.rows is None:
        claims.fail(name, outcome.reason)
    else:
        _keep(work, cell, outcome)
        claims.forget_failure(name)
    claims.settle(name)
    return outcome._replace(rows=None)


def _keep(work: Work, cell: Cell, outcome: Outcome) -> None:
    if cell in work.torn and cell.path.exists() and not is_finished(cell):
        with contextlib.suppress(FileNotFoundError):
            cell.path.replace(cell.path.with_name(f"{cell.path.name}.superseded"))
    assert outcome.rows is not None
    work.claims.publish(cell.path, results.rows_as_parquet(outcome.rows, cell_metadata(cell, len(outcome.rows))))

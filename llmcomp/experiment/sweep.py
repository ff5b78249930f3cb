"""A grid of models, steps and data sets to rows, one Parquet file a cell; resumable after any kind of end.

A cell is finished when its file stands under its name: it is written beside and renamed, and holds the key of
everything that decides its rows. Nothing is computed here (compute.py): this is who computes, in this process or in
others, and what becomes of the rows.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import secrets
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from llmcomp import pico, results
from llmcomp.atomic_write import remove_stale_parts, write_beside
from llmcomp.data.token_cache import TokenCache
from llmcomp.errors import Error
from llmcomp.experiment import choices, folder_lock
from llmcomp.experiment import plan as grid
from llmcomp.experiment.compute import compute, compute_all, one_line, stage
from llmcomp.experiment.disk import DiskLimit
from llmcomp.experiment.leases import LEASE_SECONDS, Claims
from llmcomp.experiment.load_ahead import LoadAhead
from llmcomp.experiment.plan import Cell, Job, Outcome, Plan, Scorer
from llmcomp.experiment.processes import work_in_processes
from llmcomp.experiment.workers import claim_name, work_through
from llmcomp.models.lock import NAME as LOCK_NAME
from llmcomp.models.lock import Lock, read_lock, write_lock
from llmcomp.models.memory import MaxMemory, parse_memory
from llmcomp.models.sources import ModelSource
from llmcomp.progress import tqdm
from llmcomp.scoring.baselines import random_models

_FAILED_NAME = "failed.json"
# Of checkpoints with equal weights.
_NAMES_SHOWN = 8
# How often a file that proves damaged when it is read is computed again.
_DAMAGED_MAX = 3
# How long a worker waits until the first of them has set files of other settings aside.
_PATIENCE_SECONDS = 20.0


class EqualWeightsWarning(UserWarning):
    """Two checkpoints that should differ have the same weights."""


class TrainingDataWarning(UserWarning):
    """A chunk is part of what a bundled model was trained on."""


# Long, because every argument is checked here and handed on once.
def sweep(
    models: str | Sequence[Any],
    steps: int | Sequence[int | None] | None = None,
    datasets: str | Sequence[Any] | None = None,
    out: str | os.PathLike[str] = "results",
    executor: Any = None,
    *,
    protocol: str | Sequence[str] | None = None,
    mapping: str | Sequence[str] | None = None,
    n_chunks: int | None = None,
    chunk_bytes: int = 2048,
    seed: int = 0,
    draw: str = "spread",
    whole: bool = False,
    engine: str = "exact",
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    verify: bool = False,
    max_memory: MaxMemory = None,
    baselines: bool = False,
    progress: bool = True,
    dry_run: bool = False,
    scorer: Scorer | None = None,
    sizes: Any = None,
    seeds: Any = None,
    tokens: Any = None,
    lock: str | os.PathLike[str] | None = None,
    disk: int | str | None = None,
    workers: int | None = None,
    shard: int | None = None,
    lease: float = LEASE_SECONDS,
    unit: Literal["chunk", "cell"] | None = "chunk",
) -> pd.DataFrame:
    """Score every model at every step on every data set; one row a chunk (`results.ROW_COLUMNS`).

    Args:
        models: a suite ("pico", "pythia", ..., or a file of your own: models/suites/README.md), or names, folders and
            objects for `load_model`; one or several.
        steps: training steps, one or several; None: the suite's, or the last of each model. Of a suite also words:
            "log:12", "1000..8000", "last", "all" (`selection.select`).
        sizes, seeds, tokens: of a suite: which models ("70m,410m", "70m..1b"), which seeds, and instead of steps how
            many tokens seen ("2e9,2e10", "log:8"), in the words of `selection.select`.
        datasets: names and specifications for `load_dataset`, `Dataset`s, or a mapping from names to files, arrays and
            whatever else `load_dataset` takes; None: those of the suite's usual grid
            ("pythia": the published ones), else the bundled samples.
        out: the folder of results. Every finished cell is a file there and is never computed again; with more chunks
            only those that are new are. Other settings lie beside each other; a file that is torn, or of an older
            version's arithmetic, is set aside (".superseded"), never trusted. One sweep a folder at a time,
            or any number of workers with the same settings.
        executor: None: in this process; "ray" or a `RayCluster`; or any object with `submit(function, argument)` that
            returns a future with `add_done_callback` and `result`: its task is one model at one step. Only this process
            writes files.
        workers: in so many processes of this machine, which claim cells in `out` one by one.
        shard: as one of many workers that claim cells in `out`, a folder that all of them see; its number says only
            where it begins. It ends when every cell is settled, by whomever: a worker that dies is replaced by those
            that wait. Start them with the same arguments, at any time, on any machine.
        lease: of workers: seconds without a sign of life after which one on another machine is taken for dead.
        unit: of the table that is returned: "cell" is made file by file, without holding all chunks; None: no rows.
        protocol, mapping: one or several of each; protocol None: those of the suite's usual grid ("pythia": both), else
            "lossless"; mapping None: "bytes" (lossless), "ascii" (published).
        lock: a file that pins revisions of the hub to commits and digests (`llmcomp models check --lock`); None:
            models.lock in `out`, which every sweep writes, if it is there.
        disk: at most so many bytes ("50GB") of weights lie on the disk at once: they are downloaded into a folder of
            the sweep's own and deleted when their cells are done. In this process only.
        n_chunks, chunk_bytes, seed, draw, whole: passed to `load_dataset` for names and for what is no `Dataset` yet.
        engine, device, dtype, attention, cache_dir: as in `load_model`.
        verify: decode every lossless payload again and fail the cell if one is not its chunk. A cell that was finished
            without is computed again.
        max_memory: what weights and batches of one model may take, as in `score.score`; of the rows only the last bits
            of the torch engine depend on it.
        baselines: add rows of the installed baselines (`baselines.list_baselines`) on the same chunks, and of models
            that know nothing: random weights in the shape of the smallest model, the published random distribution.
        dry_run: print the plan, change nothing, return it as a table of cells.
        scorer: what scores a cell instead of `score.score`; same signature, without max_memory and token_cache.

    In this process the next model is downloaded and read while one is at work. Chunks are tokenised once for each data
    set, mapping and tokenizer, also where several processes of one machine are at work.

    Returns the rows of all finished cells of the grid; with the exact engines only `results.MACHINE_COLUMNS` depend on
    who computed them. A cell that fails is listed with its reason in `failed.json`
    and in the table's `attrs["failed"]`; the rest goes on. Warns by name of checkpoints with equal weights
    (EqualWeightsWarning) and of chunks that the pico suite was trained on (TrainingDataWarning).
    Raises `Error` for an unknown name, a data set that cannot be read, or a folder that cannot be written.
    """
    grid.check_settings(engine, {"dtype": dtype, "attention": attention}, max_memory)
    executor = _check_executor(executor, workers, shard)
    if unit not in ("chunk", "cell", None):
        raise Error(f"unit is {unit!r}, expected 'chunk', 'cell' or None")
    usual_datasets, usual_protocols = choices.usual(models)
    wanted = usual_datasets if datasets is None else datasets
    how = {"chunk_bytes": chunk_bytes, "seed": seed, "draw": draw, "whole": whole, "progress": progress}
    chosen = choices.find_datasets(wanted, n_chunks, **how)
    pairs = choices.find_protocols(protocol or usual_protocols, mapping)
    given = {"device": device, "dtype": dtype, "attention": attention}
    options = {key: value for key, value in given.items() if value is not None}
    has_others = (executor, workers, shard) != (None, None, None)
    settings = grid.Settings(Path(out), engine, options, scorer, verify, max_memory, _disk_bytes(disk, has_others))
    pinned = _read_lock(lock, settings.out)
    found = list(choices.find_models(models, choices.Choice(sizes, steps, seeds, tokens), cache_dir, pinned, progress))
    limit = None if settings.disk_bytes is None else DiskLimit(settings.out, settings.disk_bytes)
    if limit is not None:
        found = [(limit.place(item) if isinstance(item, ModelSource) else item, reason) for item, reason in found]
    if baselines:
        known = [item for item, reason in found if isinstance(item, ModelSource) and not reason]
        found.append((grid.BASELINES, ""))
        if known:
            smallest = min(known, key=lambda source: source.weight_bytes)
            found += [(model, "") for model in random_models(smallest, engine, options)]
    _warn_of_training_data([item for item, _ in found if isinstance(item, ModelSource)], chosen)
    if dry_run:
        plan = grid.make_plan(found, chosen, pairs, settings)
        if limit is not None:
            limit.check(plan.sources)
        print(plan)
        table = plan.table()
        table.attrs |= {"costs": plan.costs()._asdict(), "lock": pinned}
        return table
    is_shared = workers is not None or shard is not None
    with folder_lock.shared(settings.out) if is_shared else folder_lock.alone(settings.out) as is_first:
        for n_left in reversed(range(_DAMAGED_MAX)):
            plan = grid.make_plan(found, chosen, pairs, settings)
            if progress:
                print(plan, file=sys.stderr)
            if pinned.revisions:
                write_lock(settings.out / LOCK_NAME, pinned)
            if limit is not None:
                limit.expect(plan.sources)
            if is_shared:
                _set_aside_among_workers(plan, bool(is_first))
                _run_among_workers(plan, workers, shard, lease, progress)
            else:
                _set_aside(plan)
                _run(plan, executor, progress, limit)
            if limit is not None and not plan.failed:
                limit.remove_folder()
            try:
                return _table(plan, unit)
            except _Damaged as error:
                if not n_left:
                    raise
                for path in error.paths:
                    _supersede(path)
    raise AssertionError  # the loop returns or raises


def _check_executor(executor: Any, workers: int | None, shard: int | None) -> Any:
    if sum(choice is not None for choice in (executor, workers, shard)) > 1:
        raise Error("executor, workers and shard each say who computes: give one of them")
    for name, number, least in (("workers", workers, 1), ("shard", shard, 0)):
        if number is not None and (not isinstance(number, int) or number < least):
            raise Error(f"{name} is {number!r}, expected an integer of at least {least}")
    if executor == "ray":
        from llmcomp.experiment.ray_cluster import RayCluster

        return RayCluster()
    if executor is not None and not hasattr(executor, "submit") and not hasattr(executor, "outcomes"):
        raise Error(f'executor is {executor!r}, expected None, "ray" or an object with submit()')
    return executor


class _Damaged(Error):
    """Files of finished cells that cannot be read after all."""

    def __init__(self, paths: list[Path]):
        super().__init__(f"{paths[0]}: damaged when it was read, though it was finished")
        self.paths = paths


def _disk_bytes(disk: int | str | None, has_others: bool) -> int | None:
    if disk is None:
        return None
    if has_others:
        raise Error("disk bounds the downloads of a sweep in this process; here others compute")
    n_bytes = parse_memory(disk) if isinstance(disk, str) else disk
    if not isinstance(n_bytes, int) or n_bytes < 1:
        raise Error(f"disk is {disk!r}, expected bytes (50000000000) or a size (50GB)")
    return n_bytes


def _read_lock(path: str | os.PathLike[str] | None, out: Path) -> Lock:
    if path is not None:
        return read_lock(path)
    return read_lock(out / LOCK_NAME) if (out / LOCK_NAME).is_file() else Lock()


def _set_aside(plan: Plan) -> None:
    for path in plan.set_aside:
        _supersede(path)
    remove_stale_parts(plan.out)


def _supersede(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another worker was first
        path.replace(path.with_name(f"{path.name}.superseded"))


def _set_aside_among_workers(plan: Plan, is_first: bool) -> None:
    """Files of other settings; a worker replaces a torn file when it holds the claim on its cell. The first worker does
    it: where another one is there already, and files of other settings stay, it works on these."""
    own = {cell.path for cell in plan.cells}
    others = [path for path in plan.set_aside if path not in own]
    if is_first:
        for path in others:
            _supersede(path)
    until = time.monotonic() + _PATIENCE_SECONDS
    while there := [path.name for path in others if path.exists()]:
        if time.monotonic() > until:
            raise Error(
                f"{plan.out}: other workers are at work here, and {len(there)} files have other settings than this "
                f"worker's, such as {there[0]}: start all workers with the same arguments, or choose another folder"
            )
        time.sleep(0.1)


@contextlib.contextmanager
def _progress_bar(plan: Plan, progress: bool) -> Iterator[Callable[[Cell], None]]:
    """Called with every cell that is done. The bar counts parameters times bytes, so that the time left is right for
    models of very different sizes."""
    work = {cell: grid.cell_work(job, cell) for job in plan.jobs for cell in job.cells}
    layout = "{desc} {percentage:3.0f}% |{bar}| [{elapsed}<{remaining}]"
    n_done = 0
    with tqdm(total=sum(work.values()), disable=not progress, delay=2, bar_format=layout) as bar:

        def advance(cell: Cell) -> None:
            nonlocal n_done
            n_done += 1
            bar.set_description_str(f"{n_done}/{len(work)} cells, {cell.label}", refresh=False)
            bar.update(work[cell])

        yield advance


def _run(plan: Plan, executor: Any, progress: bool, limit: DiskLimit | None = None) -> None:
    """Compute what is missing; write every cell as soon as it is there."""
    _warn_of_equal_files(plan)
    _write_failed(plan)
    with (
        _progress_bar(plan, progress) as advance,
        contextlib.closing(_outcomes(plan.jobs, executor, progress, limit)) as outcomes,
    ):
        for outcome in outcomes:
            if outcome.content is not None:
                results.write_file(outcome.cell.path, outcome.content)
            elif outcome.rows is not None:
                metadata = grid.cell_metadata(outcome.cell, len(outcome.rows))
                results.write_rows(outcome.cell.path, outcome.rows, metadata)
            else:
                _fail(plan, outcome)
                advance(outcome.cell)
                continue
            plan.finished.add(outcome.cell)
            advance(outcome.cell)


def _fail(plan: Plan, outcome: Outcome) -> None:
    plan.failed.append(outcome)
    _write_failed(plan)
    tqdm.write(f"failed: {outcome.cell.label}: {outcome.reason}", file=sys.stderr)


def _run_among_workers(plan: Plan, workers: int | None, shard: int | None, lease: float, progress: bool) -> None:
    """Compute with others what is missing. They write the cells' files; here it is only looked at them."""
    _warn_of_equal_files(plan)
    claims = Claims(plan.out, lease, _run_of_workers(workers))
    to_do = [cell for job in plan.jobs for cell in job.cells]
    with _progress_bar(plan, progress) as advance:
        if not to_do:
            pass
        elif workers is not None:
            for cell in work_in_processes(plan.jobs, plan.out, workers, claims):
                advance(cell)
        else:
            for outcome in work_through(plan.jobs, plan.out, claims, shard or 0, TokenCache()):
                advance(outcome.cell)
    for cell in to_do:
        why = claims.failure(claim_name(cell))
        if grid.is_finished(cell):
            plan.finished.add(cell)
        else:
            plan.failed.append(Outcome(cell, None, why or "its file was removed by another"))
            tqdm.write(f"failed: {cell.label}: {plan.failed[-1].reason}", file=sys.stderr)
    _write_failed(plan)


def _run_of_workers(workers: int | None) -> str | None:
    """What the workers of one array job, or of one parent, have in common."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    return secrets.token_hex(8) if workers is not None else f"slurm-{job}" if job else None


def _outcomes(jobs: list[Job], executor: Any, progress: bool, limit: DiskLimit | None) -> Generator[Outcome]:
    if executor is None:
        cache = TokenCache()
        with contextlib.ExitStack() as stack:
            models_ahead = stack.enter_context(LoadAhead([functools.partial(stage, job, limit) for job in jobs]))
            if limit is not None:
                stack.callback(limit.close)
            for number, job in enumerate(jobs):
                yield from compute(job, functools.partial(models_ahead.take, number), cache, progress)
                if limit is not None and isinstance(job.model, ModelSource):
                    limit.release(job.model)
        return
    if hasattr(executor, "outcomes"):
        yield from executor.outcomes(jobs, progress)
        return
    with tempfile.TemporaryDirectory(prefix="llmcomp-tokens-") as folder:
        yield from _executed([replace(job, tokens_folder=folder) for job in jobs], executor)


def _executed(jobs: list[Job], executor: Any) -> Generator[Outcome]:
    done: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
    futures = []
    for job in jobs:
        future = executor.submit(compute_all, job)
        future.add_done_callback(lambda finished, job=job: done.put((job, finished)))
        futures.append(future)
    try:
        for _ in jobs:
            job, future = done.get()
            try:
                yield from future.result()
            # Whatever a worker died of, the other workers go on.
            except Exception as error:
                yield from (Outcome(cell, None, one_line(error)) for cell in job.cells)
    finally:
        for future in futures:
            future.cancel()


def _table(plan: Plan, unit: str | None) -> pd.DataFrame:
    """`_Damaged` names files that are not what their ends said."""
    finished = [cell for cell in plan.cells if cell in plan.finished]
    if unit is None or not finished:
        table = results.empty_rows()
    elif unit == "cell" and all(cell.stop is None for cell in finished):
        try:
            table = results.read_cells([cell.path for cell in finished])
        except Error:
            raise _Damaged([cell.path for cell in finished if grid.finished_rows(cell) is None] or [plan.out]) from None
    else:
        rows = {cell: grid.finished_rows(cell, plan.models[cell]) for cell in finished}
        if damaged := [cell.path for cell in finished if rows[cell] is None]:
            raise _Damaged(damaged)
        table = pd.concat(rows.values(), ignore_index=True)
        table = results.cells(table) if unit == "cell" else table
    _warn_of_equal_weights(plan, table)
    columns = ("model", "step", "dataset", "protocol", "mapping")
    table.attrs["failed"] = [
        {**{name: getattr(outcome.cell, name) for name in columns}, "reason": outcome.reason} for outcome in plan.failed
    ]
    return table


def _write_failed(plan: Plan) -> None:
    """failed.json lists what failed in the last sweep of this folder; no file, no failures."""
    path = plan.out / _FAILED_NAME
    if not plan.failed:
        path.unlink(missing_ok=True)
        return
    entries = [{**json.loads(outcome.cell.key), "reason": outcome.reason} for outcome in plan.failed]
    write_beside(path, (json.dumps({"failed": entries}, indent=1) + "\n").encode())


def _warn_of_equal_files(plan: Plan) -> None:
    """Before anything is downloaded or computed: the hub states the digests of its files."""
    by_weights: dict[str, list[str]] = {}
    for source in plan.sources:
        by_weights.setdefault(source.weights_digest, []).append(source.label)
    _warn_of_equals(plan, by_weights)


def _warn_of_equal_weights(plan: Plan, table: pd.DataFrame) -> None:
    """Afterwards: the same weights may be stored in two forms, and other cells may have been finished before."""
    by_weights: dict[str, list[str]] = {}
    known = table[table["weights_sha256"] != ""].drop_duplicates(["model", "step", "weights_sha256"])
    for model, step, digest in known[["model", "step", "weights_sha256"]].itertuples(index=False):
        by_weights.setdefault(digest, []).append(model if pd.isna(step) else f"{model} step {step}")
    _warn_of_equals(plan, by_weights)


def _warn_of_equals(plan: Plan, by_weights: Mapping[str, list[str]]) -> None:
    for digest, labels in by_weights.items():
        names = frozenset(labels)
        if len(names) > 1 and names not in plan.warned:
            plan.warned.add(names)
            first = sorted(names)[:_NAMES_SHOWN]
            more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
            warnings.warn(
                f"{' and '.join(first)}{more} have equal weights (SHA-256 {digest[:12]}...): at least one of them is "
                "not what its name says",
                EqualWeightsWarning,
                stacklevel=2,
            )


def _warn_of_training_data(sources: list[ModelSource], chosen: list[Any]) -> None:
    if not any(source.name in pico.MODEL_STEPS for source in sources):
        return
    for data in chosen:
        hits = Counter(source for chunk in data.chunks if (source := pico.training_source(chunk)) is not None)
        if hits:
            named = ", ".join(f"{n} of {name}" for name, n in hits.most_common(3))
            warnings.warn(
                f"{hits.total()} of the {len(data.chunks)} chunks of {data.name} are in the training data of the pico "
                f"suite ({named}): its ratios on them are no measurement",
                TrainingDataWarning,
                stacklevel=3,
            )

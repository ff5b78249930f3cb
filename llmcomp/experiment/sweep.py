"""A grid of models, steps and data sets to rows, one Parquet file a cell; resumable after any kind of end.

A cell is finished when its file stands under its name: it is written beside and renamed, and holds the key of
everything that decides its rows. Nothing is computed here; `score.score` is called and its rows are kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import queue
import stat
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pandas as pd
from tqdm.auto import tqdm

from llmcomp import coding, pico, results
from llmcomp.atomic_write import remove_stale_parts, write_beside
from llmcomp.data.token_cache import TokenCache
from llmcomp.errors import Error
from llmcomp.experiment import plan as grid
from llmcomp.experiment.disk import DiskLimit
from llmcomp.experiment.load_ahead import LoadAhead
from llmcomp.experiment.plan import Cell, Job, Outcome, Plan, Scorer
from llmcomp.experiment.provenance import add_facts
from llmcomp.models import load
from llmcomp.models.lock import NAME as LOCK_NAME
from llmcomp.models.lock import Lock, read_lock, write_lock
from llmcomp.models.memory import MaxMemory, parse_memory
from llmcomp.models.sources import ModelSource
from llmcomp.scoring import score
from llmcomp.scoring.baselines import baseline_rows, random_models

_LOCK_NAME = ".sweep.lock"
_FAILED_NAME = "failed.json"
# Of checkpoints with equal weights.
_NAMES_SHOWN = 8


class EqualWeightsWarning(UserWarning):
    """Two checkpoints that should differ have the same weights."""


class TrainingDataWarning(UserWarning):
    """A chunk is part of what a bundled model was trained on."""


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
) -> pd.DataFrame:
    """Score every model at every step on every data set; one row a chunk (`results.ROW_COLUMNS`).

    Args:
        models: a suite ("pico", "pythia", ..., or a file of your own: models/suites/README.md), or names, folders and
            objects for `load_model`; one or several.
        steps: training steps, one or several; None: the suite's, or the last of each model. Of a suite also words:
            "log:12", "1000..8000", "last", "all" (`selection.select`).
        sizes, seeds, tokens: of a suite: which models ("70m,410m", "70m..1b"), which seeds, and instead of steps how
            many tokens seen ("2e9,2e10", "log:8"), in the words of `selection.select`.
        datasets: names and specifications for `load_dataset`, or `Dataset`s; None: those of the suite's usual grid
            ("pythia": the published ones), else the bundled samples.
        out: the folder of results. Every finished cell is a file there and is never computed again; a file that is
            torn or belongs to other settings is set aside (".superseded"), never trusted. One sweep a folder at a time.
        executor: None: in this process; "ray"; or any object with `submit(function, argument)` that returns a future
            with `add_done_callback` and `result`. A task is one model at one step; only this process writes files.
        protocol, mapping: one or several of each; protocol None: those of the suite's usual grid ("pythia": both), else
            "lossless"; mapping None: "bytes" (lossless), "ascii" (published).
        lock: a file that pins revisions of the hub to commits and digests (`llmcomp models check --lock`); None:
            models.lock in `out`, which every sweep writes, if it is there.
        disk: at most so many bytes ("50GB") of weights lie on the disk at once: they are downloaded into a folder of
            the sweep's own and deleted when their cells are done. In this process only.
        n_chunks, chunk_bytes, seed: passed to `load_dataset` for names.
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

    Returns the rows of all finished cells of the grid. A cell that fails is listed with its reason in `failed.json`
    and in the table's `attrs["failed"]`; the rest goes on. Warns by name of checkpoints with equal weights
    (EqualWeightsWarning) and of chunks that the pico suite was trained on (TrainingDataWarning).
    Raises `Error` for an unknown name, a data set that cannot be read, or a folder that cannot be written.
    """
    grid.check_settings(engine, {"dtype": dtype, "attention": attention}, max_memory)
    if executor not in (None, "ray") and not hasattr(executor, "submit"):
        raise Error(f'executor is {executor!r}, expected None, "ray" or an object with submit()')
    usual_datasets, usual_protocols = grid.usual(models)
    chosen = grid.find_datasets(datasets or usual_datasets, n_chunks, chunk_bytes, seed, progress)
    pairs = grid.find_protocols(protocol or usual_protocols, mapping)
    given = {"device": device, "dtype": dtype, "attention": attention}
    options = {key: value for key, value in given.items() if value is not None}
    settings = grid.Settings(Path(out), engine, options, scorer, verify, max_memory, _disk_bytes(disk, executor))
    pinned = _read_lock(lock, settings.out)
    found = list(grid.find_models(models, grid.Choice(sizes, steps, seeds, tokens), cache_dir, pinned, progress))
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
        print(plan, file=sys.stderr)
        table = plan.table()
        table.attrs["costs"] = plan.costs()._asdict()
        return table
    with _locked(settings.out):
        plan = grid.make_plan(found, chosen, pairs, settings)
        if progress:
            print(plan, file=sys.stderr)
        if pinned.revisions:
            write_lock(settings.out / LOCK_NAME, pinned)
        if limit is not None:
            limit.expect(plan.sources)
        _set_aside(plan)
        _run(plan, executor, progress, limit)
        if limit is not None and not plan.failed:
            limit.remove_folder()
    return _table(plan)


def _disk_bytes(disk: int | str | None, executor: Any) -> int | None:
    if disk is None:
        return None
    if executor is not None:
        raise Error("disk bounds the downloads of a sweep in this process; there is an executor")
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
        path.replace(path.with_name(f"{path.name}.superseded"))
    remove_stale_parts(plan.out)


def _run(plan: Plan, executor: Any, progress: bool, limit: DiskLimit | None = None) -> None:
    """Compute what is missing; write every cell as soon as it is there."""
    _warn_of_equal_files(plan)
    n_cells = sum(len(job.cells) for job in plan.jobs)
    work = {cell: grid.cell_work(job, cell) for job in plan.jobs for cell in job.cells}
    _write_failed(plan)
    # The bar counts parameters times bytes, so that the time left is right for models of very different sizes.
    layout = "{desc} {percentage:3.0f}% |{bar}| [{elapsed}<{remaining}]"
    with (
        tqdm(total=sum(work.values()), disable=not progress, delay=2, bar_format=layout) as bar,
        contextlib.closing(_outcomes(plan.jobs, executor, progress, limit)) as outcomes,
    ):
        for n_done, outcome in enumerate(outcomes, 1):
            if outcome.rows is None:
                plan.failed.append(outcome)
                _write_failed(plan)
                tqdm.write(f"failed: {outcome.cell.label}: {outcome.reason}", file=sys.stderr)
            else:
                plan.finished[outcome.cell] = _keep(outcome)
            bar.set_description_str(f"{n_done}/{n_cells} cells, {outcome.cell.label}", refresh=False)
            bar.update(work[outcome.cell])


def _keep(outcome: Outcome) -> pd.DataFrame:
    assert outcome.rows is not None
    metadata = {grid.KEY: outcome.cell.key, grid.N_ROWS: str(len(outcome.rows))}
    if outcome.cell.verify:
        metadata[grid.VERIFIED] = "true"
    results.write_rows(outcome.cell.path, outcome.rows, metadata)
    return results.read_rows(outcome.cell.path)


def _outcomes(jobs: list[Job], executor: Any, progress: bool, limit: DiskLimit | None) -> Generator[Outcome]:
    if executor is None:
        cache = TokenCache()
        with contextlib.ExitStack() as stack:
            models_ahead = stack.enter_context(LoadAhead([functools.partial(_stage, job, limit) for job in jobs]))
            if limit is not None:
                stack.callback(limit.close)
            for number, job in enumerate(jobs):
                yield from _compute(job, functools.partial(models_ahead.take, number), cache, progress)
                if limit is not None and isinstance(job.model, ModelSource):
                    limit.release(job.model)
        return
    with tempfile.TemporaryDirectory(prefix="llmcomp-tokens-") as folder:
        yield from _executed([replace(job, tokens_folder=folder) for job in jobs], executor)


def _executed(jobs: list[Job], executor: Any) -> Generator[Outcome]:
    if executor == "ray":
        executor = RayExecutor()
    done: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
    futures = []
    for job in jobs:
        future = executor.submit(_compute_all, job)
        future.add_done_callback(lambda finished, job=job: done.put((job, finished)))
        futures.append(future)
    try:
        for _ in jobs:
            job, future = done.get()
            try:
                yield from future.result()
            # Whatever a worker died of, the other workers go on.
            except Exception as error:
                yield from (Outcome(cell, None, _reason(error)) for cell in job.cells)
    finally:
        for future in futures:
            future.cancel()


def _compute_all(job: Job) -> list[Outcome]:
    """A job of an executor, on one thread: the executor's workers are what keeps the processors busy."""
    with coding.use_threads(1):
        return list(_compute(job, functools.partial(_load, job), _shared_cache(job.tokens_folder), progress=False))


@functools.lru_cache(maxsize=1)
def _shared_cache(folder: str | None) -> TokenCache:
    """One for all jobs of a sweep that a process gets."""
    return TokenCache(folder)


def _stage(job: Job, limit: DiskLimit | None = None) -> Callable[[], Any]:
    if isinstance(job.model, ModelSource):
        if limit is not None:
            limit.reserve(job.model)
        return load.stage_source(job.model, job.engine, **job.options)
    return lambda: job.model


def _load(job: Job) -> Any:
    return _stage(job)()


def _compute(job: Job, load: Callable[[], Any], cache: TokenCache, progress: bool) -> Iterator[Outcome]:
    """All cells of one job. A failure is an outcome, whatever its kind: one cell must not end a night's sweep."""
    try:
        model = load()
    except Exception as error:
        yield from (Outcome(cell, None, _reason(error)) for cell in job.cells)
        return
    for cell in job.cells:
        try:
            yield Outcome(cell, _score(job, cell, model, cache, progress))
        except Exception as error:
            yield Outcome(cell, None, _reason(error))


def _score(job: Job, cell: Cell, model: Any, cache: TokenCache, progress: bool) -> pd.DataFrame:
    data = job.datasets[cell.dataset]
    if model is grid.BASELINES:
        return baseline_rows(data, progress=progress)
    options: dict[str, Any] = {"protocol": cell.protocol, "mapping": cell.mapping, "progress": progress}
    if cell.protocol == "lossless":
        options["verify"] = cell.verify
    if job.scorer is None:
        options |= {"max_memory": job.max_memory, "token_cache": cache}
    rows = (job.scorer or score.score)(list(data.chunks), model, **options)
    if cell.protocol == "lossless" and len(rows) != len(data.chunks):
        raise Error(f"the score has {len(rows)} rows, expected one for each of {len(data.chunks)} chunks")
    rows = rows.assign(model=cell.model, step=cell.step, dataset=cell.dataset, modality=data.modality)
    return add_facts(rows, job.model) if isinstance(job.model, ModelSource) else rows


def _reason(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, Error) else f"{type(error).__name__}: {text}"


def _table(plan: Plan) -> pd.DataFrame:
    order = [plan.finished[cell] for cell in plan.cells if cell in plan.finished]
    table = pd.concat(order, ignore_index=True) if order else results.empty_rows()
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


_locked_here: set[Path] = set()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One sweep a folder. The system frees the lock with the process, however that ends; children do not inherit it."""
    path = folder.absolute() / _LOCK_NAME
    if path in _locked_here:
        raise Error(f"{folder}: another sweep of this process is at work here")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_lock(path)
    except OSError as error:
        raise Error(f"{folder}: cannot write results there: {error.strerror or error}") from error
    with file:
        _take(file, folder)
        _locked_here.add(path)
        try:
            yield
        finally:
            _locked_here.discard(path)


def _open_lock(path: Path) -> IO[str]:
    """The lock is written to, and in a folder from elsewhere it may be a link to what is not the sweep's, or a pipe."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise Error(f"{path}: expected a file of its own, found a link or something else: remove it")
    return os.fdopen(handle, "a+")


def _take(file: Any, folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise Error(f"{folder}: cannot lock {_LOCK_NAME} there: {error.strerror or error}") from error
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise Error(f"{folder}: another sweep is at work here (process {holder})") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()


class RayExecutor:
    """Tasks on a Ray cluster; `options` are those of `ray.remote`, such as num_gpus=1. In the extra `ray`."""

    def __init__(self, **options: Any) -> None:
        try:
            import ray
        except ImportError:
            raise Error("the executor 'ray' needs Ray: pip install llmcomp-exact[ray]") from None
        if not ray.is_initialized():
            ray.init()
        self._ray, self._options = ray, options

    def submit(self, function: Callable[[Job], list[Outcome]], job: Job) -> Any:
        remote = self._ray.remote(**self._options)(function) if self._options else self._ray.remote(function)
        return remote.remote(job).future()

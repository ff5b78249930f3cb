"""One model's cells to rows, in whichever process: load, score, keep going when one fails.

Nothing here writes a file or knows where results lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from llmcomp import coding
from llmcomp.data.token_cache import TokenCache
from llmcomp.errors import Error
from llmcomp.experiment.disk import DiskLimit
from llmcomp.experiment.plan import Cell, Job, Outcome, is_baselines
from llmcomp.experiment.provenance import add_facts
from llmcomp.models import load
from llmcomp.models.sources import ModelSource
from llmcomp.scoring import score
from llmcomp.scoring.baselines import baseline_rows


def stage(job: Job, limit: DiskLimit | None = None) -> Callable[[], Any]:
    """Brings the job's model into memory, on any thread; what it returns makes the model of that."""
    if isinstance(job.model, ModelSource):
        if limit is not None:
            limit.reserve(job.model)
        return load.stage_source(job.model, job.engine, **job.options)
    return lambda: job.model


def compute(job: Job, load: Callable[[], Any], cache: TokenCache, progress: bool) -> Iterator[Outcome]:
    """All cells of one job. A failure is an outcome, whatever its kind: one cell must not end a night's sweep."""
    try:
        model = load()
    except Exception as error:
        yield from (Outcome(cell, None, one_line(error)) for cell in job.cells)
        return
    for cell in job.cells:
        yield compute_cell(job, cell, model, cache, progress)


def compute_cell(job: Job, cell: Cell, model: Any, cache: TokenCache, progress: bool = False) -> Outcome:
    """The rows of one cell by its loaded model, or why there are none."""
    try:
        return Outcome(cell, _score(job, cell, model, cache, progress))
    except Exception as error:
        return Outcome(cell, None, one_line(error))


def compute_all(job: Job) -> list[Outcome]:
    """A job of an executor, on one thread: the executor's workers are what keeps the processors busy."""
    with coding.use_threads(1):
        return list(compute(job, functools.partial(_load, job), _shared_cache(job.tokens_folder), progress=False))


def _load(job: Job) -> Any:
    return stage(job)()


@functools.lru_cache(maxsize=1)
def _shared_cache(folder: str | None) -> TokenCache:
    """One for all jobs of a sweep that a process gets."""
    return TokenCache(folder)


def _score(job: Job, cell: Cell, model: Any, cache: TokenCache, progress: bool) -> pd.DataFrame:
    data = job.datasets[cell.dataset]
    if is_baselines(model):
        return score.add_places(baseline_rows(data, progress=progress), data)
    options: dict[str, Any] = {"protocol": cell.protocol, "mapping": cell.mapping, "progress": progress}
    if cell.protocol == "lossless":
        options["verify"] = cell.verify
    if job.scorer is None:
        options |= {"max_memory": job.max_memory, "token_cache": cache}
    chunks = list(data.chunks)[cell.first :]
    rows = (job.scorer or score.score)(chunks, model, **options)
    if cell.protocol == "lossless" and len(rows) != len(chunks):
        raise Error(f"the score has {len(rows)} rows, expected one for each of {len(chunks)} chunks")
    rows = rows.assign(chunk=rows["chunk"] + cell.first)
    rows = rows.assign(model=cell.model, step=cell.step, dataset=cell.dataset, modality=data.modality)
    rows = score.add_places(rows, data)
    return add_facts(rows, job.model) if isinstance(job.model, ModelSource) else rows


def one_line(error: BaseException) -> str:
    """The first line of an exception, with its kind where it is none of llmcomp's."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, Error) else f"{type(error).__name__}: {text}"

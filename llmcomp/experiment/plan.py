"""What a sweep is going to do: cells and their identity, which of them are finished, and what the rest will cost.

Nothing is computed and no file is changed here; `sweep` does that.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llmcomp import results
from llmcomp.data import datasets
from llmcomp.data.mappings import get_mapping
from llmcomp.errors import Error
from llmcomp.models import hub, load, registry, sources
from llmcomp.models.adapter import ModelTraits, is_model, weights_sha256
from llmcomp.models.engines import exact
from llmcomp.models.memory import MaxMemory, allowed_bytes, host_memory
from llmcomp.models.protocol import as_model
from llmcomp.models.sources import ModelSource
from llmcomp.scoring import baselines

# Raised whenever the rows of the same model and chunk change for another reason than the engine's arithmetic: a
# mapping, the windows, the coder.
ROWS_VERSION = 1

DEFAULT_MAPPINGS = {"lossless": "bytes", "published": "ascii"}

KEY = "llmcomp.cell"
N_ROWS = "llmcomp.n_rows"
VERIFIED = "llmcomp.verified"
# What stands for a model in the cell of all baselines on one data set.
BASELINES = "baselines"

Scorer = Callable[..., pd.DataFrame]


@dataclass(frozen=True)
class Cell:
    """One model at one step, one data set, one protocol and mapping.

    `key` is the canonical JSON of everything that decides the rows; `path` is the file that holds key and rows.
    """

    model: str
    step: int | None
    dataset: str
    protocol: str
    mapping: str
    key: str
    path: Path
    n_bytes: int
    verify: bool = False

    @property
    def stem(self) -> str:
        """The part of the file's name that all settings of one cell share."""
        return _stem(self.path)

    @property
    def label(self) -> str:
        step = "" if self.step is None else f" step {self.step}"
        return f"{self.model}{step}, {self.dataset}, {self.protocol} ({self.mapping})"


class Outcome(NamedTuple):
    """What became of a cell: rows, or the reason why there are none."""

    cell: Cell
    rows: pd.DataFrame | None
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """One model at one step with all cells that it is still needed for, so that it is loaded once.

    `model` is a source, a loaded model, or BASELINES.
    """

    model: ModelSource | Any
    cells: tuple[Cell, ...]
    datasets: Mapping[str, Any]
    engine: str
    options: Mapping[str, Any]
    scorer: Scorer | None
    max_memory: MaxMemory = None
    # Of the tokens that the processes of one machine share; None: they are kept in memory alone.
    tokens_folder: str | None = None


@dataclass
class Plan:
    """What a sweep is going to do. `finished` holds the rows of cells that are there already."""

    out: Path
    cells: list[Cell]
    finished: dict[Cell, pd.DataFrame]
    jobs: list[Job]
    failed: list[Outcome] = field(default_factory=list)
    set_aside: list[Path] = field(default_factory=list)
    datasets: list[Any] = field(default_factory=list)
    warned: set[frozenset[str]] = field(default_factory=set)

    @property
    def sources(self) -> list[ModelSource]:
        return [job.model for job in self.jobs if isinstance(job.model, ModelSource)]

    def table(self) -> pd.DataFrame:
        """One row a cell: model, step, dataset, protocol, mapping, status, file."""
        failed = {outcome.cell for outcome in self.failed}
        status = ["finished" if c in self.finished else "failed" if c in failed else "to do" for c in self.cells]
        columns = ("model", "step", "dataset", "protocol", "mapping")
        table = pd.DataFrame({name: [getattr(cell, name) for cell in self.cells] for name in columns})
        return table.assign(status=status, file=[cell.path.name for cell in self.cells])

    def __str__(self) -> str:
        n_to_do = sum(len(job.cells) for job in self.jobs)
        lines = [f"{len(self.cells)} cells, {len(self.finished)} finished, {n_to_do} to do, into {self.out}"]
        for data in self.datasets:
            n_bytes = sum(map(len, data.chunks))
            lines.append(f"  data      {data.name}: {len(data.chunks)} chunks, {n_bytes:,} bytes of {data.modality}")
        if self.set_aside:
            names = ", ".join(path.name for path in self.set_aside[:3])
            lines.append(f"  set aside {len(self.set_aside)} files that are damaged or of other settings: {names}")
        n_bytes = sum(source.bytes_to_download for source in self.sources)
        n_checkpoints = sum(source.bytes_to_download > 0 for source in self.sources)
        if n_bytes:
            lines.append(f"  download  {_in_bytes(n_bytes)} of {n_checkpoints} checkpoints")
        if self.sources:
            lines.append(f"  memory    about {self._memory()}")
        if self.jobs:
            lines.append(f"  time      {self._time()}")
        return "\n".join([*lines, *(f"  failed    {o.cell.label}: {o.reason}" for o in self.failed)])

    def _memory(self) -> str:
        """Of models in float32; while one is at work, the next one is read as it is stored."""
        alone = [4 * _params(source) for source in self.sources]
        text = f"{_in_bytes(max(alone))} for the largest model"
        pairs = [now + after.weight_bytes for now, after in zip(alone, self.sources[1:], strict=False)]
        return f"{text}, {_in_bytes(max(pairs))} with the next one loading" if pairs else text

    def _time(self) -> str:
        """Work is parameters times bytes; its speed is that of the finished cells, else of a matrix product here."""
        work = sum(map(job_work, self.jobs))
        rows = pd.concat(self.finished.values()) if self.finished else results.empty_rows()
        known = rows[rows["params"].notna() & rows["seconds"].notna()]
        if seconds := float(known["seconds"].sum()):
            done = float((known["params"].astype("float64") * known["bytes_in"]).sum())
            return f"about {_in_time(work * seconds / done)}, going by the finished cells"
        rate = _operations_per_second(self.jobs[0])
        # A token costs two operations a parameter, and a byte is at most one token.
        return f"about {_in_time(2 * work / rate)}, going by a matrix product here ({rate / 1e9:.0f} GFLOP/s)"


class Settings(NamedTuple):
    out: Path
    engine: str
    options: Mapping[str, Any]
    scorer: Scorer | None
    verify: bool
    max_memory: MaxMemory = None


def check_settings(engine: str, options: Mapping[str, Any], max_memory: MaxMemory) -> None:
    """`Error` for what no cell could be computed with. Devices are the workers' and looked for there."""
    load.check_options(engine, options)
    allowed_bytes(max_memory, host_memory()[1])


def usual(wanted: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Data sets and protocols where none are named: of Pythia's suite those of the published grid, else the samples."""
    if wanted == "pythia":
        return ("enwik8", "imagenet", "librispeech"), ("lossless", "published")
    return ("text", "image", "speech"), ("lossless",)


def find_models(
    wanted: str | Sequence[Any], steps: int | Sequence[int | None] | None, cache_dir: Any
) -> Iterator[tuple[ModelSource | Any, str]]:
    """(source or model, reason why it cannot be had or "") for every model and step."""
    if steps is not None:
        one_or_several = steps if np.iterable(steps) and not isinstance(steps, str) else [steps]
        steps = [None if step is None else sources.as_step(step) for step in one_or_several]
    if isinstance(wanted, str) and wanted in registry.SUITES:
        suite = registry.SUITES[wanted]
        wanted, steps = suite.models, steps or suite.steps
    seen = set()
    for name in [wanted] if isinstance(wanted, (str, os.PathLike)) or is_model(wanted) else wanted:
        if not isinstance(name, (str, os.PathLike)):
            yield as_model(name), ""
            continue
        for step in steps or (None,):
            if (os.fspath(name), step) in seen:
                raise Error(f"{name} at step {step} is asked for twice")
            seen.add((os.fspath(name), step))
            try:
                yield sources.find_model(name, step, cache_dir=cache_dir), ""
            except hub.HubUnreachable as error:
                yield ModelSource(os.fspath(name), step, ()), str(error)


def find_datasets(
    wanted: str | Sequence[Any], n_chunks: int | None, chunk_bytes: int, seed: int, progress: bool
) -> list[Any]:
    specs = [wanted] if isinstance(wanted, str) or hasattr(wanted, "chunks") else list(wanted)
    found: list[Any] = [
        datasets.load_dataset(str(spec), n_chunks=n_chunks, chunk_bytes=chunk_bytes, seed=seed, progress=progress)
        if isinstance(spec, (str, os.PathLike))
        else spec
        for spec in specs
    ]
    for data in found:
        if not (hasattr(data, "name") and hasattr(data, "chunks")):
            raise Error(f"a {type(data).__name__} is no data set: expected a name for load_dataset, or what it returns")
    for name, n_times in Counter(data.name for data in found).items():
        if n_times > 1:
            raise Error(f"{n_times} data sets are called {name!r}; cells are told apart by it")
    return found


def find_protocols(protocol: str | Sequence[str], mapping: str | Sequence[str] | None) -> list[tuple[str, str]]:
    protocols = [protocol] if isinstance(protocol, str) else list(protocol)
    for name in protocols:
        if name not in DEFAULT_MAPPINGS:
            raise Error(f"no protocol is called {name!r}, expected one of {', '.join(DEFAULT_MAPPINGS)}")
    mappings = [mapping] if isinstance(mapping, str) or mapping is None else list(mapping)
    for chosen in mappings:
        if chosen is not None:
            get_mapping(chosen)
    pairs = []
    for name in protocols:
        # The published protocol has one mapping only.
        for chosen in mappings if name == "lossless" else (None,):
            pairs.append((name, chosen or DEFAULT_MAPPINGS[name]))
    return list(dict.fromkeys(pairs))


def make_plan(
    found: Iterable[tuple[ModelSource | Any, str]], chosen: list[Any], pairs: list[tuple[str, str]], settings: Settings
) -> Plan:
    plan = Plan(settings.out, [], {}, [], datasets=chosen)
    by_name = {data.name: data for data in chosen}
    digests = {name: _chunks_sha256(data.chunks) for name, data in by_name.items()}
    for model, reason in found:
        to_do = []
        labels = [("lossless", "")] if model is BASELINES else pairs
        for (name, data), (protocol, mapping) in itertools.product(by_name.items(), labels):
            key = {
                **(_baselines_key() if model is BASELINES else _model_key(model, reason, settings)),
                **{"dataset": name, "dataset_sha256": digests[name], "n_chunks": len(data.chunks)},
                **{"protocol": protocol, "mapping": mapping},
            }
            # Baselines are always decoded again, the published protocol never can be.
            verify = settings.verify and protocol == "lossless" and model is not BASELINES
            cell = _cell(settings.out, key, sum(map(len, data.chunks)), verify)
            plan.cells.append(cell)
            if reason:
                plan.failed.append(Outcome(cell, None, reason))
            elif (rows := finished_rows(cell)) is not None:
                plan.finished[cell] = rows
            else:
                to_do.append(cell)
        if to_do:
            needed = {cell.dataset: by_name[cell.dataset] for cell in to_do}
            how = (settings.engine, settings.options, settings.scorer, settings.max_memory)
            plan.jobs.append(Job(model, tuple(to_do), needed, *how))
    plan.jobs.sort(key=job_work)
    plan.set_aside = _others(plan)
    return plan


def _baselines_key() -> dict[str, Any]:
    """The rows depend on which packages are installed, and hardly on their versions."""
    return {"model": BASELINES, "step": None, "engine": "", "source": list(baselines.list_baselines("image"))}


def _model_key(model: ModelSource | Any, reason: str, settings: Settings) -> dict[str, Any]:
    # The exact engines' rows are the same on every device.
    options = {k: v for k, v in settings.options.items() if settings.engine == "torch" or k != "device"}
    engine = {
        "engine": settings.engine,
        "options": options,
        "arithmetic": [ROWS_VERSION, exact.ARITHMETIC],
    }
    if isinstance(model, ModelSource):
        return {"model": model.name, "step": model.step, "source": reason or model.identity, **engine}
    traits = ModelTraits.of(model)
    identity = traits.fingerprint or weights_sha256(model) or None
    if identity is None:
        raise Error(
            f"a {type(model).__name__} has neither fingerprint nor weights_sha256: give it one, a string that tells it "
            "from every other model, so that its finished cells can be known again"
        )
    return {"model": traits.name, "step": traits.step, "source": str(identity), **engine}


def _cell(out: Path, key: dict[str, Any], n_bytes: int, verify: bool) -> Cell:
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    step = "" if key["step"] is None else f"step{key['step']}"
    parts = (key["model"].replace("/", "--"), step, key["dataset"], key["protocol"], key["mapping"], key["engine"])
    stem = "_".join("".join(c if c.isalnum() or c in "-." else "-" for c in part) for part in parts if part)
    name = f"{stem}_{key['n_chunks']}chunks_{hashlib.sha256(text.encode()).hexdigest()[:12]}.parquet"
    labels = {label: key[label] for label in ("model", "step", "dataset", "protocol", "mapping")}
    return Cell(**labels, key=text, path=out / name, n_bytes=n_bytes, verify=verify)


def _stem(path: Path) -> str:
    return path.name.rsplit("_", 2)[0]


def _chunks_sha256(chunks: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little") + chunk)
    return digest.hexdigest()


def finished_rows(cell: Cell) -> pd.DataFrame | None:
    """The rows of a cell whose file is whole, holds its key and was verified if that is asked for, else None."""
    if not cell.path.is_file():
        return None
    try:
        metadata = results.read_metadata(cell.path)
        rows = results.read_rows(cell.path)
    except Error:
        return None
    own = metadata.get(KEY) == cell.key and metadata.get(N_ROWS) == str(len(rows))
    verified = metadata.get(VERIFIED) == "true" or not cell.verify
    return rows if own and verified else None


def _others(plan: Plan) -> list[Path]:
    """Files of these cells with other settings, and files under their names that are torn or foreign."""
    finished = {cell.path for cell in plan.finished}
    # A checkpoint that cannot be looked up now may well be what an older file was made with.
    stems = {cell.stem for cell in plan.cells} - {outcome.cell.stem for outcome in plan.failed}
    return [path for path in sorted(plan.out.glob("*.parquet")) if path not in finished and _stem(path) in stems]


def cell_work(job: Job, cell: Cell) -> float:
    """Parameters times bytes."""
    params = _params(job.model) if isinstance(job.model, ModelSource) else ModelTraits.of(job.model).n_params or 1_000
    return float(params) * cell.n_bytes


def job_work(job: Job) -> float:
    return sum(cell_work(job, cell) for cell in job.cells)


def _params(source: ModelSource) -> int:
    """Going by the size of the files, which hold little beside the weights."""
    config = source.read_config()
    stored = config.get("dtype", config.get("torch_dtype"))
    return source.weight_bytes // (2 if stored in ("float16", "bfloat16") else 4)


def _operations_per_second(job: Job) -> float:
    """What a square product of the size of a small layer reaches here."""
    device = job.options.get("device")
    if job.engine == "torch" and device not in (None, "cpu"):
        from llmcomp.models.engines.torch import product_rate

        return product_rate(device, job.options.get("dtype"))
    width = 512
    left, right = np.ones((2, width, width), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def _in_bytes(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"


def _in_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

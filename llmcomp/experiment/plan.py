"""What a sweep is going to do: cells and their identity, which of them are finished, and what the rest will cost.

Nothing is computed and no file is changed here; `sweep` does that.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from llmcomp import pico, results
from llmcomp.checked_json import parse_object
from llmcomp.errors import Error
from llmcomp.experiment import estimate, parts
from llmcomp.experiment.provenance import add_facts
from llmcomp.models import load
from llmcomp.models.adapter import ModelTraits, weights_sha256
from llmcomp.models.engines import exact
from llmcomp.models.memory import MaxMemory, allowed_bytes, host_memory
from llmcomp.models.sources import ModelSource
from llmcomp.scoring import baselines

# Raised whenever the rows of the same model and chunk change for another reason than the engine's arithmetic: a
# mapping, the windows, the coder.
ROWS_VERSION = 1

KEY = "llmcomp.cell"
N_ROWS = "llmcomp.n_rows"
VERIFIED = "llmcomp.verified"
# Finished cells whose seconds say how long the rest takes.
_CELLS_TIMED = 100
# What the stem of a file's name is made of, and how much of it a name shows. With two digests, ".superseded" and what
# is put around the name while the file is written, fewer than the 255 bytes that a name may have.
_STEM_KEYS = ("model", "step", "dataset", "protocol", "mapping", "engine")
_READABLE_BYTES = 120
_STEM_DIGITS = 10
_KEY_DIGITS = 12
# What stands for a model in the cell of all baselines on one data set.
BASELINES = "baselines"


def is_baselines(model: Any) -> bool:
    """Also of a job that came from another process; no model is a string here."""
    return isinstance(model, str)


Scorer = Callable[..., pd.DataFrame]


@dataclass(frozen=True)
class Cell:
    """One model at one step, one data set, one protocol and mapping.

    `key` is the canonical JSON of everything that decides the rows; `path` is the file that holds key and rows. Chunks
    that were scored with another number of them make cells of their own (`parts`).
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
    # Chunks `first` to `stop` - 1 are taken of the file, which may hold more; None: all of them.
    first: int = 0
    stop: int | None = None
    digests: tuple[bytes, ...] = field(default=(), compare=False, repr=False)
    data: str = ""

    @property
    def stem(self) -> str:
        """The part of the file's name that all settings of one cell share, and no other cell has."""
        return _stem(self.path)

    @property
    def label(self) -> str:
        step = "" if self.step is None else f" step {self.step}"
        return f"{self.model}{step}, {self.dataset}, {self.protocol} ({self.mapping})"


class Outcome(NamedTuple):
    """What became of a cell: rows (or `content`, what their file holds), or the reason why there are none."""

    cell: Cell
    rows: pd.DataFrame | None
    reason: str = ""
    content: bytes | None = None


def cell_metadata(cell: Cell, n_rows: int) -> dict[str, str]:
    """What a cell's file says of itself beside the rows."""
    of_cell = {KEY: cell.key, N_ROWS: str(n_rows)} | ({VERIFIED: "true"} if cell.verify else {})
    return of_cell | (parts.metadata(cell.digests, cell.data) if cell.digests else {})


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
    """What a sweep is going to do. `finished` are the cells whose files are there; `models` says whose they are."""

    out: Path
    cells: list[Cell]
    jobs: list[Job]
    finished: set[Cell] = field(default_factory=set)
    models: dict[Cell, Any] = field(default_factory=dict)
    failed: list[Outcome] = field(default_factory=list)
    set_aside: list[Path] = field(default_factory=list)
    datasets: list[Any] = field(default_factory=list)
    warned: set[frozenset[str]] = field(default_factory=set)
    # Of the weights that may lie on the disk at once; None: all of them.
    disk_bytes: int | None = None

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

    def costs(self) -> Costs:
        """What is left to do takes; operations are counted at one token a byte, at most."""
        lengths = {data.name: estimate.chunk_lengths(data.chunks) for data in self.datasets}
        flops, by_model = 0.0, {}
        for job in self.jobs:
            for cell in job.cells if not is_baselines(job.model) else ():
                # All steps of a model in a suite cost the same.
                model = getattr(getattr(job.model, "checkpoint", None), "model", job.model)
                one = (id(model), cell.dataset, cell.protocol)
                if one not in by_model:
                    by_model[one] = estimate.scoring_flops(job.model, cell.protocol, lengths[cell.dataset])
                flops += by_model[one]
        large = [source.bytes_to_download for source in self.sources if source.bytes_to_download]
        return Costs(
            n_cells=sum(len(job.cells) for job in self.jobs),
            n_checkpoints=len(self.sources),
            n_downloads=len(large),
            download_bytes=sum(large),
            flops=flops,
            h200_seconds=estimate.H200.seconds(flops),
            memory_bytes=max(self._memory_bytes(), default=0),
        )

    def __str__(self) -> str:
        n_to_do = sum(len(job.cells) for job in self.jobs)
        lines = [f"{len(self.cells)} cells, {len(self.finished)} finished, {n_to_do} to do, into {self.out}"]
        for data in self.datasets:
            n_bytes = sum(map(len, data.chunks))
            lines.append(f"  data      {data.name}: {len(data.chunks)} chunks, {n_bytes:,} bytes of {data.modality}")
        if self.set_aside:
            names = ", ".join(path.name for path in self.set_aside[:3])
            lines.append(f"  set aside {len(self.set_aside)} files that are damaged or superseded: {names}")
        costs = self.costs()
        if costs.download_bytes:
            lines.append(f"  download  {estimate.in_bytes(costs.download_bytes)} of {costs.n_downloads} checkpoints")
            lines.append(f"  disk      {self._disk(costs)}")
        if self.sources:
            lines.append(f"  memory    about {self._memory()}")
        if costs.flops:
            device = estimate.H200
            share = f"{device.share:.0%} of the {device.peak / 1e12:.0f} TFLOP/s of one {device.name}"
            hours = f"{estimate.in_time(costs.h200_seconds)} at {share}"
            lines.append(f"  work      at most {costs.flops:.3g} FLOP (a token a byte): {hours}")
        if self.jobs:
            lines.append(f"  time      {self._time()}")
        return "\n".join([*lines, *(f"  failed    {o.cell.label}: {o.reason}" for o in self.failed)])

    def _disk(self, costs: Costs) -> str:
        if self.disk_bytes is None:
            return f"{estimate.in_bytes(costs.download_bytes)}, as nothing is deleted"
        limit = estimate.in_bytes(min(self.disk_bytes, costs.download_bytes))
        return f"at most {limit} of weights at once: a revision is deleted when its cells are done"

    def _memory(self) -> str:
        alone = max(4 * estimate.count_params(source) for source in self.sources)
        text = f"{estimate.in_bytes(alone)} for the largest model"
        most = max(self._memory_bytes())
        return f"{text}, {estimate.in_bytes(most)} with the next one loading" if len(self.sources) > 1 else text

    def _memory_bytes(self) -> list[int]:
        """Of each model in float32; while it is at work, the next one is read as it is stored."""
        after = [source.weight_bytes for source in self.sources[1:]] + [0]
        return [4 * estimate.count_params(one) + next_ for one, next_ in zip(self.sources, after, strict=False)]

    def _time(self) -> str:
        """Work is parameters times bytes; its speed is that of the finished cells, else of a matrix product here."""
        work = sum(map(job_work, self.jobs))
        seconds, done = self._speed()
        if seconds:
            return f"about {estimate.in_time(work * seconds / done)}, going by the finished cells"
        job = self.jobs[0]
        device = job.options.get("device")
        try:
            rate = estimate.operations_per_second(job.engine, device, job.options.get("dtype"))
        except (Error, RuntimeError):  # of a device that only the workers have
            return f"not known: there is no {device} here whose speed could be measured"
        # A token costs two operations a parameter, and a byte is at most one token.
        return f"about {estimate.in_time(2 * work / rate)}, going by a matrix product here ({rate / 1e9:.0f} GFLOP/s)"

    def _speed(self) -> tuple[float, float]:
        """Seconds of some finished cells, and their parameters times bytes."""
        known = [cell for cell in self.cells if cell in self.finished and not is_baselines(self.models[cell])]
        seconds = done = 0.0
        for cell in known[:: max(1, len(known) // _CELLS_TIMED)]:
            with contextlib.suppress(Error):  # a damaged file is reported where its rows are wanted
                rows = results.read_columns(cell.path, ("params", "bytes_in", "seconds"))
                rows = rows[rows["params"].notna() & rows["seconds"].notna()]
                seconds += float(rows["seconds"].sum())
                done += float((rows["params"].astype("float64") * rows["bytes_in"]).sum())
        return seconds, done


class Costs(NamedTuple):
    """Of what a plan has left to do. `h200_seconds`: on one `estimate.H200`. `memory_bytes`: of the largest model in
    float32 with the next one loading."""

    n_cells: int
    n_checkpoints: int
    n_downloads: int
    download_bytes: int
    flops: float
    h200_seconds: float
    memory_bytes: int


class Settings(NamedTuple):
    out: Path
    engine: str
    options: Mapping[str, Any]
    scorer: Scorer | None
    verify: bool
    max_memory: MaxMemory = None
    disk_bytes: int | None = None


def check_settings(engine: str, options: Mapping[str, Any], max_memory: MaxMemory) -> None:
    """`Error` for what no cell could be computed with. Devices are the workers' and looked for there."""
    load.check_options(engine, options)
    allowed_bytes(max_memory, host_memory()[1])


def make_plan(
    found: Iterable[tuple[ModelSource | Any, str]], chosen: list[Any], pairs: list[tuple[str, str]], settings: Settings
) -> Plan:
    plan = Plan(settings.out, [], [], datasets=chosen)
    by_name = {data.name: data for data in chosen}
    sizes = {data.name: sum(map(len, data.chunks)) for data in chosen}
    digests = {name: _chunks_sha256(data.chunks) for name, data in by_name.items()}
    chunks = {name: parts.chunk_digests(data.chunks) for name, data in by_name.items()}
    there, paths, files = _files_by_key_digest(settings.out), dict[str, Path](), _files_by_stem(settings.out)
    for model, reason in found:
        to_do: list[Cell] = []
        labels = [("lossless", "")] if is_baselines(model) else pairs
        for (name, data), (protocol, mapping) in itertools.product(by_name.items(), labels):
            key = {
                **(_baselines_key() if is_baselines(model) else _model_key(model, reason, settings)),
                **{"dataset": name, "dataset_sha256": digests[name], "n_chunks": len(data.chunks)},
                **{"protocol": protocol, "mapping": mapping},
            }
            # Baselines are always decoded again, the published protocol never can be.
            verify = settings.verify and protocol == "lossless" and not is_baselines(model)
            cell = _cell(settings.out, key, sizes[name], verify, _place(model, key))
            # Copies of one checkpoint in two folders are the same cell.
            cell = replace(cell, digests=chunks[name], data=chunks[name][0].hex())
            cell = _as_it_lies_there(replace(cell, path=paths.setdefault(cell.key, cell.path)), there)
            whole = bool(reason) or is_baselines(model) or is_finished(cell)
            to_do += _take_in(plan, [cell] if whole else _in_parts(cell, key, data.chunks, files), model, reason)
        if to_do:
            needed = {cell.dataset: by_name[cell.dataset] for cell in to_do}
            how = (settings.engine, settings.options, settings.scorer, settings.max_memory)
            plan.jobs.append(Job(model, tuple(to_do), needed, *how))
    plan.jobs = _in_order(plan.jobs)
    plan.disk_bytes = settings.disk_bytes
    plan.set_aside = _others(plan)
    return plan


def _take_in(plan: Plan, cells: list[Cell], model: ModelSource | Any, reason: str) -> list[Cell]:
    """Cells become part of the plan; given are those that are neither finished nor, for `reason`, failed."""
    to_do = []
    for cell in cells:
        plan.cells.append(cell)
        plan.models[cell] = model
        if reason:
            plan.failed.append(Outcome(cell, None, reason))
        elif is_finished(cell):
            plan.finished.add(cell)
        else:
            to_do.append(cell)
    return to_do


def _in_order(jobs: list[Job]) -> list[Job]:
    """The least work first, checkpoints with equal weights one after the other: so these are downloaded once."""
    by_weights: dict[str, int] = {}
    order = {}
    for number, job in enumerate(sorted(jobs, key=job_work)):
        weights = job.model.weights_digest if isinstance(job.model, ModelSource) and job.model.repo else ""
        first = by_weights.setdefault(weights, number) if weights else number
        order[id(job)] = (first, number)
    return sorted(jobs, key=lambda job: order[id(job)])


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


def _place(model: ModelSource | Any, key: Mapping[str, Any]) -> str:
    """What tells a model from others of its name: its folder; of an object its fingerprint. "" where the name does."""
    if isinstance(model, ModelSource):
        folder = None if model.folder is None else model.folder.resolve()
        return "" if folder is None or folder.is_relative_to(pico.suite_root()) else str(folder)
    return "" if is_baselines(model) else str(key["source"])


def _cell(out: Path, key: dict[str, Any], n_bytes: int, verify: bool, place: str) -> Cell:
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    whose = json.dumps([*(key[name] for name in _STEM_KEYS), place])
    stem = f"{_shortened(_older_stem(key))}_{_sha256(whose)[:_STEM_DIGITS]}"
    name = f"{stem}_{key['n_chunks']}chunks_{_sha256(text)[:_KEY_DIGITS]}.parquet"
    labels = {label: key[label] for label in ("model", "step", "dataset", "protocol", "mapping")}
    return Cell(**labels, key=text, path=out / name, n_bytes=n_bytes, verify=verify)


def _older_stem(key: Mapping[str, Any]) -> str:
    """What a person reads in the name of a cell's file, and the whole stem in the names of version 0.1.

    Names that differ in other characters than letters, digits, "-" and "." have it in common.
    """
    step = "" if key["step"] is None else f"step{key['step']}"
    parts = (key["model"].replace("/", "--"), step, key["dataset"], key["protocol"], key["mapping"], key["engine"])
    return "_".join("".join(c if c.isalnum() or c in "-." else "-" for c in part) for part in parts if part)


def _shortened(stem: str) -> str:
    """File systems count bytes; a character that is cut in two goes as a whole."""
    return stem.encode()[:_READABLE_BYTES].decode("utf-8", "ignore")


def _stem(path: Path) -> str:
    return path.name.rsplit("_", 2)[0]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key_digest(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def _files_by_key_digest(out: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(out.glob("*.parquet")):
        found.setdefault(_key_digest(path), []).append(path)
    return found


def _as_it_lies_there(cell: Cell, there: Mapping[str, list[Path]]) -> Cell:
    """The cell, with the path of its finished file where that has another name: an older version's, or from when the
    model lay in another folder."""
    if not cell.path.is_file():
        for path in there.get(_key_digest(cell.path), ()):
            if is_finished(renamed := replace(cell, path=path)):
                return renamed
    return cell


def _files_by_stem(out: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(out.glob("*.parquet")):
        found.setdefault(_stem(path), []).append(path)
    return found


def _in_parts(
    cell: Cell, key: Mapping[str, Any], chunks: Sequence[bytes], files: Mapping[str, Sequence[Path]]
) -> list[Cell]:
    """The cell as the files that hold its first chunks, and a cell of those that are left."""
    there = [part for path in files.get(cell.stem, ()) if (part := _read_part(path)) is not None]
    found, at = [], 0
    for part, stop in parts.cover(there, parts.settings_of(dict(key)), cell.digests, cell.verify):
        is_cut = stop < part.first + len(part.digests)
        n_bytes = sum(map(len, chunks[at:stop]))
        found.append(
            replace(cell, key=part.key, path=part.path, n_bytes=n_bytes, first=at, stop=stop if is_cut else None)
        )
        at = stop
    if not found:
        return [cell]
    if at < len(chunks):
        left = {**key, "first_chunk": at, "n_chunks": len(chunks) - at, "dataset_sha256": _chunks_sha256(chunks[at:])}
        text = json.dumps(left, sort_keys=True, separators=(",", ":"))
        name = f"{cell.stem}_{len(chunks) - at}chunks_{_sha256(text)[:_KEY_DIGITS]}.parquet"
        path, n_bytes = cell.path.with_name(name), sum(map(len, chunks[at:]))
        found.append(replace(cell, key=text, path=path, n_bytes=n_bytes, first=at, digests=cell.digests[at:]))
    return found


def _read_part(path: Path) -> parts.Part | None:
    return parts.read_part(path, KEY, N_ROWS, VERIFIED)


def _chunks_sha256(chunks: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little") + chunk)
    return digest.hexdigest()


def is_finished(cell: Cell) -> bool:
    """Whether the cell's file is as long as it says, holds its key and was verified if that is asked for.

    Only the end of the file is read; what its pages hold is checked where the rows are wanted (`finished_rows`).
    """
    if not cell.path.is_file():
        return False
    try:
        metadata, n_rows = results.read_footer(cell.path)
    except Error:
        return False
    own = metadata.get(KEY) == cell.key and metadata.get(N_ROWS) == str(n_rows)
    return own and (metadata.get(VERIFIED) == "true" or not cell.verify)


def finished_rows(cell: Cell, model: Any = None) -> pd.DataFrame | None:
    """The rows of a finished cell, with the facts of its model where they lack them; None if the file is damaged."""
    try:
        rows = results.read_rows(cell.path) if is_finished(cell) else None
    except Error:
        return None
    if rows is not None and cell.stop is not None:
        rows = rows[rows["chunk"] < cell.stop].reset_index(drop=True)
    return add_facts(rows, model) if rows is not None and isinstance(model, ModelSource) else rows


def _others(plan: Plan) -> list[Path]:
    """Files under the names of these cells that are torn or foreign, or whose rows could not be told from theirs: of
    another version's arithmetic, or not verified. Files of other settings stay."""
    finished = {cell.path for cell in plan.finished}
    # A checkpoint that cannot be looked up now may well be what an older file was made with.
    failed = {outcome.cell for outcome in plan.failed}
    cells = [cell for cell in plan.cells if cell not in failed]
    digests = {_key_digest(cell.path) for cell in cells}
    stems: dict[str, list[Cell]] = {}
    for cell in cells:
        stems.setdefault(cell.stem, []).append(cell)
    older: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        older.setdefault(_older_stem(key := json.loads(cell.key)), []).append(key)
    return [
        path
        for path in sorted(plan.out.glob("*.parquet"))
        if path not in finished
        and (
            _key_digest(path) in digests
            or any(_is_in_the_way(path, cell, cell in plan.finished) for cell in stems.get(_stem(path), ()))
            or _is_superseded(path, older.get(_stem(path), ()))
        )
    ]


def _is_in_the_way(path: Path, cell: Cell, is_done: bool) -> bool:
    ignored = ("arithmetic", "source") if cell.model == BASELINES else ("arithmetic",)
    to_do = None if is_done else range(cell.first, cell.first + len(cell.digests))
    return parts.is_in_the_way(_read_part(path), json.loads(cell.key), cell.data, to_do, ignored)


def _is_superseded(path: Path, keys: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a file of version 0.1, whose name several models may share, holds a cell of one of `keys` with other
    settings, or nothing that can be told."""
    if not keys:
        return False
    try:
        found = parse_object(results.read_metadata(path).get(KEY, "").encode(), str(path))
    except Error:
        return True
    return any(all(found.get(name) == key[name] for name in (*_STEM_KEYS, "source")) for key in keys)


def cell_work(job: Job, cell: Cell) -> float:
    """Parameters times bytes."""
    return float(estimate.count_params(job.model)) * cell.n_bytes


def job_work(job: Job) -> float:
    return sum(cell_work(job, cell) for cell in job.cells)

"""The work of a whole sweep without its downloads: models of the suite's shapes with random weights, random tokens.

What is timed is what `score` and `sweep` do from tokens on: loading (the next checkpoint while one is at work),
windows, batches, the model, intervals, range coding behind it, and the published sum. Tokenising, which a sweep does
once for all models, is timed on the bundled samples with the bundled tokenizer. What a model computes has no influence
on the time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from safetensors.numpy import save_file

from llmcomp import coding, pico, results
from llmcomp.codec.segments import MAPPING_DEFAULT, OVERLAP_SHARE_DEFAULT
from llmcomp.codec.windows import WindowedModel
from llmcomp.data import mappings, tokenizers
from llmcomp.data.datasets import load_dataset
from llmcomp.data.mappings import ByteEncoder
from llmcomp.data.token_cache import TokenCache
from llmcomp.errors import Error
from llmcomp.experiment.load_ahead import LoadAhead
from llmcomp.models import checkpoint, load, sources
from llmcomp.models.adapter import AdaptedModel
from llmcomp.models.graph import Graph
from llmcomp.models.memory import MaxMemory
from llmcomp.models.selection import select
from llmcomp.models.suite import load_suite
from llmcomp.progress import tqdm
from llmcomp.scoring.background import in_background
from llmcomp.scoring.published import MAX_TOKENS, PublishedSum, PublishedTokens

CHUNK_BYTES = 2048
N_CHUNKS = 2048
PROTOCOLS = ("published", "lossless")
# Tokens a chunk of the published data sets, measured with Pythia's tokenizer on samples of the three. Published:
# b % 128 and at most 1,024; lossless: mapping bytes.
PYTHIA_TOKENS = {
    "published": {"text": 553, "image": 1024, "speech": 1024},
    "lossless": {"text": 536, "image": 1693, "speech": 1496},
}
SUITES = ("pico", "pythia")
# As many chunks as `score` hands on at once.
_GROUP_CHUNKS = 128
# Chunks of the published loop that are timed, and on a processor of both protocols here.
_LOOP_CHUNKS, _OWN_CHUNKS = 2, 8
_PEAK_WIDTH = {"cpu": 1024, "cuda": 8192}
_RANDOM_VALUES = 1_000_003
# cpu: the processor time of all threads, for a processor on which other work runs; of a device it says nothing.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Parts whose sum is the seconds; coding has a thread of its own.
PARTS = ("loading", "tokenising", "forward", "intervals", "other")
_TABLE = ["model", "protocol", "tokens", "seconds", *PARTS, "coding"]
# Chunks of each data set that tokenising is timed on.
_TOKENISED_CHUNKS = 32


@dataclass(frozen=True)
class SweepBenchmark:
    """What `run_sweep_benchmark` found. Seconds of one row: all checkpoints of a model under one protocol.

    `rows`: model, protocol, cells, tokens, seconds, of which loading (what the model waited for it), tokenising (a
    share of that of all models), forward, intervals and other; coding, on a thread beside them; tokens_per_s and
    flop_utilisation (loading and tokenising left out), published_seconds (of as many chunks; None where none are
    published), loop_seconds_per_chunk and seconds_per_chunk (of the loop's chunks), peak_bytes, batch_rows.
    """

    suite: str
    engine: str
    device: str
    dtype: str
    attention: str | None
    coder: str
    clock: str
    n_chunks: int
    n_checkpoints: int
    peak_flops: float
    peak_how: str
    rows: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """All of it, with rows as a list, for JSON."""
        return {**{**asdict(self), "rows": None}, "rows": json.loads(self.rows.to_json(orient="records"))}

    def __str__(self) -> str:
        rows = self.rows
        lines = [
            f"{self.suite}, random weights: {rows['model'].nunique()} sizes x {self.n_checkpoints} checkpoints x 3 "
            f"data sets, {self.n_chunks:,} chunks each",
            f"engine {self.engine} on {self.device}, {self.dtype}, attention {self.attention}, coder {self.coder}, "
            f"{self.clock} clock",
            f"peak {self.peak_flops / 1e12:.3g} TFLOP/s: {self.peak_how}",
            "",
        ]
        table = rows[_TABLE].assign(
            tokens_s=rows["tokens_per_s"], mfu=rows["flop_utilisation"], peak_gb=rows["peak_bytes"] / 1e9,
            batch_rows=rows["batch_rows"], published_s=rows["published_seconds"],
        )  # fmt: skip
        lines += [table.to_string(index=False, float_format="%.4g"), ""]
        for protocol, part in rows.groupby("protocol", sort=False):
            line = f"{protocol}: {part['cells'].sum()} cells in {part['seconds'].sum() / 60:.3g} minutes"
            parts = part[[*PARTS, "coding"]].sum() / part["seconds"].sum()
            line += " (" + ", ".join(f"{name} {share:.1%}" for name, share in parts.items()) + " beside)"
            if protocol == "published" and part["published_seconds"].notna().all():
                line += f"; the published run took {part['published_seconds'].sum() / 60:.3g} for as many chunks"
            lines.append(line)
        lines += self._loop_lines()
        if self.engine != "torch":
            lines.append("the exact engine makes intervals and softmax inside its pass: they are part of forward")
        return "\n".join(lines)

    def _loop_lines(self) -> Iterator[str]:
        timed = self.rows[self.rows["loop_seconds_per_chunk"].notna()]
        columns = (timed[name] for name in ("model", "protocol", "loop_seconds_per_chunk", "seconds_per_chunk"))
        for name, protocol, loop, own in zip(*columns, strict=True):
            yield f"{name}: the published loop {loop:.3g} s a chunk, {protocol} {own:.3g} s: {loop / own:.3g} times"


class _Stopwatch:
    """Seconds by part of the work: by the device's own clock for what torch gives to one, else by the host's.

    Only `total` waits for the device, so that what overlaps still does.
    """

    def __init__(self, device: str, engine: str, clock: str) -> None:
        self._now = CLOCKS[clock]
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device if engine == "torch" else "cpu"
        self._on_device: Any = None
        if self._device.startswith("cuda"):
            from llmcomp.models.engines.torch_device import DeviceStopwatch

            self._on_device = DeviceStopwatch(self._device)

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.host_part(name) if self._on_device is None else self._on_device.part(name)

    @contextlib.contextmanager
    def host_part(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    @contextlib.contextmanager
    def total(self) -> Iterator[None]:
        """From an idle device to an idle device: the part "all"."""
        self._wait()
        with self.host_part("all"):
            yield
            self._wait()

    def _wait(self) -> None:
        if self._on_device is not None:
            from llmcomp.models.engines.torch_device import wait_for

            wait_for(self._device)

    @property
    def seconds(self) -> dict[str, float]:
        if self._on_device is not None:
            for name, seconds in self._on_device.seconds().items():
                self._seconds[name] += seconds
        return {name: self._seconds[name] for name in ("all", "forward", "intervals", "coding")}


class _WatchedExact:
    """An exact model whose passes are watched; everything else is the model's own."""

    def __init__(self, model: Any, watch: _Stopwatch) -> None:
        self._model, self._watch = model, watch
        self.watch = watch.part

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in ("logits", "intervals", "log2_probabilities"):
            return found

        def watched(*args: Any, **options: Any) -> Any:
            with self._watch.part("forward"):
                return found(*args, **options)

        return watched


# Long: the defaults of every argument, then what was measured field by field.
def run_sweep_benchmark(
    suite: str = "pythia",
    engine: str = "exact",
    *,
    n_chunks: int | None = None,
    n_sizes: int | None = None,
    n_checkpoints: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    max_memory: MaxMemory = None,
    clock: str = "wall",
    progress: bool = True,
) -> SweepBenchmark:
    """Run the shapes of `suite` ("pythia", "pico") under both protocols with random weights and tokens, and time it.

    `n_sizes` smallest models, `n_checkpoints` of each, `n_chunks` chunks of each of three data sets: by default all,
    5 and 2,048 on a device, 1 of each on a CPU. Engine options as in `load_model`, `max_memory` as in `score`. `clock`:
    "wall", or "cpu" (CLOCKS). Raises `Error` as those, and for a clock that is none or measures nothing there.
    """
    on_device = (device or "cpu").startswith("cuda")
    if clock not in CLOCKS or (on_device and clock != "wall"):
        raise Error(f"clock is {clock!r}; expected one of {', '.join(CLOCKS)}, and wall for a device")
    configs = suite_configs(suite)
    n_chunks = n_chunks or (N_CHUNKS if on_device else 1)
    n_checkpoints = n_checkpoints or (len({at.step for at in select(load_suite(suite))}) if on_device else 1)
    names = list(configs)[: n_sizes or (None if on_device else 1)]
    counts = PYTHIA_TOKENS if suite == "pythia" else pico_tokens()
    options = {"device": device, "dtype": dtype, "attention": attention}
    if engine == "torch" and dtype is None and on_device:
        options["dtype"] = "bfloat16"
    given = {key: value for key, value in options.items() if value is not None}
    load.check_options(engine, given)
    if engine == "torch":
        # Else its import would be part of the first loading.
        importlib.import_module("llmcomp.models.engines.torch")
    peak_flops, peak_how = _peak(device or "cpu", options["dtype"], CLOCKS[clock])
    tokenising = {protocol: tokenising_seconds(protocol, n_chunks, clock) / len(names) for protocol in PROTOCOLS}
    sizes: dict[str, Any] = {"counts": counts, "n_chunks": n_chunks, "max_memory": max_memory, "clock": clock}
    with tempfile.TemporaryDirectory(prefix="llmcomp-bench-") as folder:
        for name in names:
            write_random_checkpoint(Path(folder, name), configs[name])
        runs = [_Run(Path(folder, name), engine, given, **sizes) for name in names]

        def rows_of(run: _Run) -> Iterator[dict[str, Any]]:
            return run.rows(n_checkpoints, peak_flops, tokenising)

        _run_all(runs, n_checkpoints, rows_of, progress)
    table = pd.DataFrame([row for run in runs for row in rows_of(run)])
    table["published_seconds"] = [
        _published_seconds(model, n_checkpoints, n_chunks) if protocol == "published" else None
        for model, protocol in zip(table["model"], table["protocol"], strict=True)
    ]
    facts = {"device": _device_label(device or "cpu"), "dtype": runs[0].dtype, "attention": runs[0].attention}
    return SweepBenchmark(
        suite, engine, **facts, coder=_coder(device or "cpu"), clock=clock, n_chunks=n_chunks,
        n_checkpoints=n_checkpoints, peak_flops=peak_flops, peak_how=peak_how, rows=table,
    )  # fmt: skip


def _run_all(
    runs: list[_Run], n_checkpoints: int, rows_of: Callable[[_Run], Iterator[dict[str, Any]]], progress: bool
) -> None:
    """Every checkpoint of every size, the next one loaded meanwhile; rows are printed as a size is done."""
    loads = [run.stage for run in runs for _ in range(n_checkpoints)]
    with (
        LoadAhead(loads) as checkpoints,
        tqdm(total=len(loads), unit="checkpoint", disable=not progress, delay=2) as bar,
    ):
        for number in range(len(loads)):
            run = runs[number // n_checkpoints]
            run.run_checkpoint(functools.partial(checkpoints.take, number))
            bar.update()
            if progress and (number + 1) % n_checkpoints == 0:
                for row in rows_of(run):
                    tqdm.write(_line_of(row), file=sys.stderr)


class _Run:
    """All checkpoints of one size: the same folder is loaded anew for each."""

    def __init__(
        self,
        folder: Path,
        engine: str,
        options: dict[str, Any],
        *,
        counts: dict[str, dict[str, int]],
        n_chunks: int,
        max_memory: MaxMemory,
        clock: str,
    ) -> None:
        self._clock, self._now = clock, CLOCKS[clock]
        self._folder, self._engine, self._options = folder, engine, options
        self._device = options.get("device") or "cpu"
        self._counts, self._n_chunks, self._max_memory = counts, n_chunks, max_memory
        self._watches = {protocol: _Stopwatch(self._device, engine, clock) for protocol in PROTOCOLS}
        self._totals: Counter[str] = Counter()
        self._peak_bytes: dict[str, int] = {}
        self._batch_rows: dict[str, int | None] = {}
        self._loop: float | None = None
        self._own: dict[str, float] = {}
        self._loading = self._flops_per_token = 0.0
        self.dtype = self.attention = ""

    def stage(self) -> Callable[[], Any]:
        return load.stage_source(
            sources.find_model(self._folder).with_tokenizer("bytes"), self._engine, **self._options
        )

    def run_checkpoint(self, take: Callable[[], Any]) -> None:
        start = self._now()
        model = take()
        self._loading += self._now() - start
        self.dtype, self.attention = model.dtype, model.attention
        self._flops_per_token = _flops_per_token(model)
        if self._loop is None:
            self._time_loop(model)
        for protocol in PROTOCOLS:
            self._run_protocol(model, protocol)

    def _run_protocol(self, model: Any, protocol: str) -> None:
        watch, rng = self._watches[protocol], np.random.default_rng(0)
        watched = _watched(model, watch)
        _peak_bytes(self._device)
        groups = []
        for n_tokens in self._counts[protocol].values():
            for at in range(0, self._n_chunks, _GROUP_CHUNKS):
                n_streams = min(_GROUP_CHUNKS, self._n_chunks - at)
                groups.append(list(rng.integers(0, model.n_logits, (n_streams, n_tokens), np.int32)))
                self._totals[protocol] += n_streams * n_tokens
        with watch.total():
            self._batch_rows[protocol] = _score(watched, protocol, groups, watch, self._max_memory)
        self._peak_bytes[protocol] = max(self._peak_bytes.get(protocol, 0), _peak_bytes(self._device))

    def _time_loop(self, model: Any) -> None:
        """Seconds a chunk of the published loop, on torch, and of both protocols here on the same tokens."""
        try:
            from llmcomp.bench.torch_yardsticks import published_loop
        except Error:
            self._loop = math.nan
            return
        other = model if self._engine == "torch" else load.load_model(self._folder, engine="torch", tokenizer="bytes")
        n_tokens = min(self._counts["published"]["text"], other.context_length)
        chunks = np.random.default_rng(1).integers(0, other.n_logits, (_LOOP_CHUNKS, n_tokens), np.int32)
        published_loop(other, chunks[0][:16])
        start = self._now()
        for chunk in chunks:
            published_loop(other, chunk)
        self._loop = (self._now() - start) / len(chunks)
        n_streams = min(self._n_chunks, _GROUP_CHUNKS) if self._device.startswith("cuda") else _OWN_CHUNKS
        streams = [chunks[i % len(chunks)] for i in range(n_streams)]
        for protocol in PROTOCOLS:
            watch = _Stopwatch(self._device, self._engine, self._clock)
            _score(model, protocol, [streams[:1]], watch, self._max_memory)
            with watch.total():
                _score(model, protocol, [streams], watch, self._max_memory)
            self._own[protocol] = watch.seconds["all"] / len(streams)

    def rows(self, n_checkpoints: int, peak_flops: float, tokenising: dict[str, float]) -> Iterator[dict[str, Any]]:
        """One row a protocol; each bears half of the loading."""
        for protocol in PROTOCOLS:
            seconds = self._watches[protocol].seconds
            busy, n_tokens = seconds["all"], self._totals[protocol]
            loading = self._loading / len(PROTOCOLS)
            yield {
                "model": self._folder.name,
                "protocol": protocol,
                "cells": n_checkpoints * len(self._counts[protocol]),
                "tokens": n_tokens,
                "seconds": busy + loading + tokenising[protocol],
                "loading": loading,
                "tokenising": tokenising[protocol],
                "forward": seconds["forward"],
                "intervals": seconds["intervals"],
                "other": busy - seconds["forward"] - seconds["intervals"],
                "coding": seconds["coding"],
                "tokens_per_s": n_tokens / busy,
                "flop_utilisation": n_tokens * self._flops_per_token / busy / peak_flops,
                "peak_bytes": self._peak_bytes[protocol],
                "batch_rows": self._batch_rows[protocol],
                "loop_seconds_per_chunk": self._loop,
                "seconds_per_chunk": self._own.get(protocol, math.nan),
            }


def _line_of(row: dict[str, Any]) -> str:
    """What is known of one size and protocol before the others are done."""
    parts = ", ".join(f"{name} {row[name]:.4g}" for name in ("loading", "forward", "intervals", "other", "coding"))
    return f"{row['model']}, {row['protocol']}: {row['cells']} cells in {row['seconds']:.4g} s ({parts})"


def _watched(model: Any, watch: _Stopwatch) -> Any:
    if model.engine != "torch":
        return _WatchedExact(model, watch)
    model.watch = watch.part
    return model


def _score(
    model: Any, protocol: str, groups: list[list[np.ndarray]], watch: _Stopwatch, max_memory: MaxMemory
) -> int | None:
    """As `score` does, but that all logits are symbols: there is no tokenizer to say otherwise. Returns batch_rows."""
    scorer: PublishedSum | WindowedModel
    if protocol == "published":
        limit = min(MAX_TOKENS, model.context_length)
        scorer = published = PublishedSum(AdaptedModel(model), max_memory)
        for _ in in_background(groups, lambda streams: published.start([stream[:limit] for stream in streams])):
            pass
        return scorer.batch_rows
    scorer = windowed = WindowedModel(
        AdaptedModel(model),
        vocab_size=model.n_logits,
        bos_token=0,
        context_length=model.context_length,
        overlap=int(model.context_length * OVERLAP_SHARE_DEFAULT),
        max_memory=max_memory,
    )

    def start(streams: list[np.ndarray]) -> Callable[[], None]:
        wait = windowed.start_intervals(streams)

        def code() -> None:
            parts = wait()
            with watch.host_part("coding"):
                for part in parts:
                    coding.encode_intervals(*part)

        return code

    for _ in in_background(groups, start):
        pass
    return scorer.batch_rows


# Shapes.


def suite_configs(suite: str) -> dict[str, dict[str, Any]]:
    """The config.json of every size of a suite, smallest first."""
    if suite == "pico":
        folders = {name: pico.suite_folder(name, pico.STEPS[-1]) for name in pico.SUITE_NAMES}
        return {name: json.loads((folder / "config.json").read_text("utf-8")) for name, folder in folders.items()}
    if suite != "pythia":
        raise Error(f"no suite is called {suite!r}, expected one of {', '.join(SUITES)}")
    return {
        at.model.short_name: {
            **(at.model.shape or {}),
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": at.model.family,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        for at in select(load_suite(suite), steps="last")
    }


def pico_tokens() -> dict[str, dict[str, int]]:
    """Mean tokens a chunk of the bundled samples with the pico suite's tokenizer, by protocol and modality."""
    tokenizer = tokenizers.Tokenizer.from_file(pico.tokenizer_path())
    limit = min(config["max_position_embeddings"] for config in suite_configs("pico").values())
    counts: dict[str, dict[str, int]] = {protocol: {} for protocol in PROTOCOLS}
    for modality in ("text", "image", "speech"):
        chunks = load_dataset(modality, progress=False).chunks
        published = [min(len(PublishedTokens().encode(chunk, tokenizer).tokens), limit) for chunk in chunks]
        lossless = [len(mappings.get_mapping("bytes").encode(chunk, tokenizer).tokens) for chunk in chunks]
        counts["published"][modality] = round(sum(published) / len(chunks))
        counts["lossless"][modality] = round(sum(lossless) / len(chunks))
    return counts


def tokenising_seconds(protocol: str, n_chunks: int, clock: str = "wall") -> float:
    """What the tokens of `n_chunks` chunks of three data sets take, going by the bundled samples and tokenizer."""
    tokenizer = tokenizers.Tokenizer.from_file(pico.tokenizer_path())
    mapping: ByteEncoder = PublishedTokens() if protocol == "published" else mappings.get_mapping(MAPPING_DEFAULT)
    seconds = 0.0
    for modality in ("text", "image", "speech"):
        chunks = list(load_dataset(modality, progress=False).chunks)[:_TOKENISED_CHUNKS]
        TokenCache().encoded(mapping, tokenizer, chunks[:1])
        start = CLOCKS[clock]()
        TokenCache().encoded(mapping, tokenizer, chunks)
        seconds += (CLOCKS[clock]() - start) * n_chunks / len(chunks)
    return seconds


def write_random_checkpoint(folder: Path, config: dict[str, Any], dtype: npt.DTypeLike = np.float16) -> None:
    """A GPT-NeoX checkpoint of `config`'s shape: normal values of deviation 0.02; float16, as Pythia's, or float32."""
    folder.mkdir(exist_ok=True)
    block = (np.random.default_rng(0).standard_normal(_RANDOM_VALUES) * 0.02).astype(dtype)
    weights = {}
    for name, shape in checkpoint.tensor_shapes(config):
        is_scale = "norm" in name and name.endswith("weight")
        weights[name] = np.ones(shape, dtype) if is_scale else np.resize(block, shape)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _flops_per_token(model: Any) -> float:
    """Two operations a weight that is multiplied; the look-up of a token is none, and attention's own are left out."""
    config = getattr(model, "config", None) or model.module.config
    hidden, is_tied = (
        (config.hidden, config.tied) if isinstance(config, Graph) else (config.hidden_size, config.tie_word_embeddings)
    )
    return 2.0 * (model.n_params - (0 if is_tied else model.n_logits * hidden))


# The machine.


def _peak(device: str, dtype: str | None, now: Callable[[], float]) -> tuple[float, str]:
    """Operations a second of one matrix product here, and which."""
    if device.startswith("cuda"):
        from llmcomp.models.engines.torch_device import product_rate

        width = _PEAK_WIDTH["cuda"]
        rate = product_rate(device, dtype, width)
        return rate, f"the best of three {dtype or 'float32'} products of {width} x {width} in this run"
    width = _PEAK_WIDTH["cpu"]
    left, right = np.random.default_rng(0).random((2, width, width), np.float32)
    seconds = []
    for _ in range(3):
        start = now()
        left @ right
        seconds.append(now() - start)
    how = f"the best of three float32 products of {width} x {width} by NumPy in this run, with its own threads"
    return 2 * width**3 / min(seconds), how


def _peak_bytes(device: str) -> int:
    """On a device the most that tensors took since the last call; on a CPU the most of the whole process so far."""
    if device.startswith("cuda"):
        from llmcomp.models.engines.torch_device import device_peak_bytes

        return device_peak_bytes(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_label(device: str) -> str:
    if not device.startswith("cuda"):
        return "cpu"
    from llmcomp.models.engines.torch_device import device_name

    return f"{device} ({device_name(device)})"


def _coder(device: str) -> str:
    if device.startswith("cuda"):
        from llmcomp.coding.cuda import is_built

        return "cuda" if is_built() else f"{coding.backend_in_use()} (built without CUDA)"
    return f"{coding.backend_in_use()}, {coding.threads_in_use()} threads"


def _published_seconds(model: str, n_checkpoints: int, n_chunks: int) -> float | None:
    """What the published run took for so many chunks of the first checkpoints of a model."""
    cells: pd.DataFrame = results.published()
    steps: Sequence[int] = sorted(cells["step"].unique())[:n_checkpoints]
    chosen = cells[(cells["model"].str.endswith(model)) & cells["step"].isin(steps)]
    return float(chosen["seconds"].sum()) * n_chunks / N_CHUNKS if len(chosen) else None

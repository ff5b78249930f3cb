"""What is to be known of a model before it is used: engine and why, sizes, memory, speed here, tokenizer."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmcomp.data import tokenizer_report
from llmcomp.data.tokenizers import BYTES, ByteTokenizer, Tokenizer
from llmcomp.errors import Error
from llmcomp.models import counts
from llmcomp.models.families import FAMILIES, parse_graph
from llmcomp.models.load import load_source
from llmcomp.models.sources import ModelSource, find_model

# How long a speed is measured, and the tokens of a pass; a model that is slower is measured by one call.
_SECONDS, _PASS_TOKENS = 0.3, 256
_GIB = 1 << 30


@dataclass
class ModelReport:
    """`facts` by name, in order; `to_dict` for programs, `lines` for people. None where a thing is not known."""

    facts: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    tokenizer_lines: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts, "tokenizer": self.tokenizer}

    def lines(self) -> list[str]:
        shown = [
            (name.replace("_", " "), _as_text(name, value)) for name, value in self.facts.items() if value is not None
        ]
        return [*(f"{name:28} {text}" for name, text in shown), *self.tokenizer_lines]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def about(name: Any, step: int | None = None, *, engine: str | None = None, measure: bool = True) -> ModelReport:
    """The report of what `load_model` would load. Of a model that has to be downloaded only its small files are.

    measure: whether the speed of passes and steps is measured, where the model is here; less than a second.
    """
    source = find_model(name, step)
    config = source.read_config()
    family = str(config.get("model_type"))
    chosen, why = _engine(source, config, engine)
    report = ModelReport(
        {"model": source.label, "family": family, "from": _origin(source), "engine": chosen, "why": why}
    )
    n_params, n_nonembedding = _sizes(source, config, chosen)
    report.facts |= {"params": n_params, "n_params_nonembedding": n_nonembedding}
    report.facts["weight_bytes"] = source.weight_bytes or None
    is_here = source.folder is not None or source.bytes_to_download == 0
    if is_here:
        _add_loaded(report, source, chosen, measure)
    else:
        report.facts["to_download_bytes"] = source.bytes_to_download
        _add_tokenizer(report, lambda: _tokenizer_of(source))
    return report


def _engine(source: ModelSource, config: Mapping[str, Any], wanted: str | None) -> tuple[str, str]:
    family = config.get("model_type")
    if wanted == "torch":
        return "torch", "asked for: what it codes decodes with the same machine, library and batch alone"
    if family not in FAMILIES:
        return "torch", (
            f"no exact engine knows the family {family!r}: what torch codes decodes with the same machine, library and "
            "batch alone"
        )
    try:
        parse_graph(config, source.label)
    except Error as error:
        return "none", f"{error}; engine='torch' runs it"
    return wanted or "exact", f"the family {family!r} is known: the same bits on every machine"


def _origin(source: ModelSource) -> str:
    if source.checkpoint is not None and source.checkpoint.model.is_bundled:
        return "bundled with llmcomp"
    if source.folder is not None:
        return str(source.folder)
    return f"{source.repo} on the hub, commit {source.commit}"


def _sizes(source: ModelSource, config: Mapping[str, Any], engine: str) -> tuple[int | None, int | None]:
    """All parameters, tied weights once, and those without input and output embedding."""
    if engine.startswith("exact"):
        shapes = parse_graph(config, source.label).shapes()
        n_params = sum(math.prod(shape) for shape in shapes.values())
    else:
        n_params = source.n_params or 0
    return (n_params, counts.count_nonembedding(config, n_params)) if n_params else (None, None)


def _add_loaded(report: ModelReport, source: ModelSource, engine: str, measure: bool) -> None:
    if engine == "none":
        return _add_tokenizer(report, lambda: _tokenizer_of(source))
    try:
        model = load_source(source, engine)
    except (Error, ImportError) as error:
        report.facts["loads"] = f"no: {error}"
        return _add_tokenizer(report, lambda: _tokenizer_of(source))
    report.facts |= {"context_tokens": model.context_length, "dtype": model.dtype, "params": model.n_params}
    memory = model.pass_memory(model.context_length)
    n_rows = max(memory.rows(), model.context_length)
    report.facts |= {
        "held_memory_bytes": memory.held_bytes,
        "pass_memory_bytes": memory.fixed_bytes + n_rows * memory.row_bytes,
        "pass_rows": n_rows,
        "stream_memory_bytes": model.session_memory() if hasattr(model, "session_memory") else None,
        "free_memory_bytes": memory.free_bytes,
    }
    if measure:
        report.facts |= _speed(model)
    _add_tokenizer(report, lambda: model.tokenizer)


def _speed(model: Any) -> dict[str, float]:
    """Tokens a second of one pass and of steps of one stream, on this machine and its threads now."""
    n = min(_PASS_TOKENS, model.context_length)
    tokens = np.arange(n, dtype=np.int32)[None] % model.vocab_size
    session = model.session(1)
    steps = iter(range(model.context_length - 1))
    rates = {"pass_tokens_per_second": n * _calls_a_second(lambda: model.logits(tokens))}
    rates["step_tokens_per_second"] = _calls_a_second(
        lambda: session.step(tokens[0, next(steps) % n][None]), len(tokens[0])
    )
    return {name: float(f"{rate:.3g}") for name, rate in rates.items()}


def _calls_a_second(call: Callable[[], Any], n_max: int = 1000) -> float:
    started = time.perf_counter()
    n = 0
    while n < max(1, n_max - 1):
        call()
        n += 1
        if time.perf_counter() - started > _SECONDS:
            break
    return n / (time.perf_counter() - started)


def _tokenizer_of(source: ModelSource) -> Tokenizer | ByteTokenizer:
    path = source.find_tokenizer()
    if source.has_byte_tokens or path is None:
        if source.has_byte_tokens or source.tokenizer_option == BYTES:
            return ByteTokenizer()
        raise Error("no tokenizer among its files")
    return Tokenizer.from_file(path)


def _add_tokenizer(report: ModelReport, find: Callable[[], Any]) -> None:
    try:
        found = tokenizer_report.report(find())
    except Error as error:
        report.tokenizer_lines = [f"tokenizer: cannot be used: {error}"]
        report.tokenizer = {"error": str(error)}
        return
    report.tokenizer_lines = found.lines()
    report.tokenizer = {
        **found._asdict(),
        "left_out": list(found.left_out),
        "stand_ins": found.stand_ins.hex(),
        "prefix": found.prefix.decode("latin-1"),
    }


def _as_text(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value:,} bytes" + (f" ({value / _GIB:.1f} GiB)" if value >= _GIB // 10 else "")
    if isinstance(value, float):
        with contextlib.suppress(ValueError, OverflowError):
            return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)

"""What low precision costs: the code length of the torch engine in every dtype, and of the engine exact-int8, against
the exact engine's, on the same tokens of the same chunks. What is measured is bits, never speed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from llmcomp.data.datasets import load_dataset
from llmcomp.data.token_cache import TokenCache
from llmcomp.errors import Error
from llmcomp.models.load import load_model
from llmcomp.models.memory import MaxMemory
from llmcomp.progress import tqdm
from llmcomp.scoring.score import score

# Of the torch engine; int8 is the engine exact-int8.
DTYPES = ("float32", "bfloat16", "float16", "int8")
# Of the code length, in percent: more and the dtype is not what it is said to be.
TARGET_PERCENT = 0.1
N_CHUNKS = 16

# name: unit and meaning.
COLUMNS = {
    "model": "its name",
    "step": "training steps; null where unknown",
    "dataset": "name of the data set",
    "engine": "torch or exact-int8",
    "dtype": "of that engine",
    "device": "of that engine",
    "attention": 'of that engine; "" where there is no choice',
    "chunks": "how many",
    "tokens": "of all chunks, mapping bytes",
    "exact_bits": "code length of the exact engine, in bits",
    "bits": "that of the other engine; NaN where it has none",
    "difference_percent": "bits over exact_bits, less 1, in percent",
    "largest_chunk_percent": "the same of the chunk where it is farthest from 0, without its sign",
    "within_target": "whether difference_percent is within 0.1 either way",
    "reason": 'why there is no code length, else ""',
}


def run_precision_benchmark(
    models: str | os.PathLike[str] | Sequence[Any],
    step: int | None = None,
    datasets: str | Sequence[Any] = ("text", "image", "speech"),
    *,
    dtypes: Sequence[str] = DTYPES,
    n_chunks: int = N_CHUNKS,
    device: str | None = None,
    attention: str | None = None,
    max_memory: MaxMemory = None,
    progress: bool = True,
) -> pd.DataFrame:
    """One row a model, data set and dtype (COLUMNS), and in the end of each model one over all its data sets ("all").

    `models`: names or folders for `load_model`, of GPT-NeoX, as the exact engine computes no other; `datasets` as for
    `load_dataset`, or `Dataset`s, of which the first `n_chunks` chunks count. A dtype in which the model gives NaN has
    its reason in the row. Raises `Error` for what cannot be loaded.
    """
    names = [models] if isinstance(models, (str, os.PathLike)) else list(models)
    specs = [datasets] if isinstance(datasets, str) or hasattr(datasets, "chunks") else list(datasets)
    chosen = [_load(spec, n_chunks, progress) for spec in specs]
    cache = TokenCache()
    how: dict[str, Any] = {"max_memory": max_memory, "token_cache": cache, "progress": False}
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(names) * (1 + len(dtypes)), unit="pass", disable=not progress, delay=2) as bar:
        for name in names:
            exact = load_model(name, step)
            expected = {data.name: score(_first(data, n_chunks), exact, **how) for data in chosen}
            facts = {"model": exact.name, "step": exact.step}
            del exact
            bar.update()
            for dtype in dtypes:
                if dtype == "int8":
                    model = load_model(name, step, "exact-int8")
                else:
                    model = load_model(name, step, "torch", device=device, dtype=dtype, attention=attention)
                facts |= {"engine": model.engine, "dtype": model.dtype, "device": model.device}
                facts["attention"] = model.attention or ""
                found = {data.name: _score(_first(data, n_chunks), model, how) for data in chosen}
                rows += [{**facts, **row} for row in _compare(expected, found)]
                del model
                bar.update()
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"step": "Int64"})


def _load(spec: Any, n_chunks: int, progress: bool) -> Any:
    return spec if hasattr(spec, "chunks") else load_dataset(str(spec), n_chunks, progress=progress)


def _first(data: Any, n_chunks: int) -> list[bytes]:
    return [bytes(data.chunks[number]) for number in range(min(n_chunks, len(data.chunks)))]


def _score(chunks: list[bytes], model: Any, how: dict[str, Any]) -> pd.DataFrame | str:
    try:
        return score(chunks, model, **how)
    except Error as error:
        return str(error)


def _compare(expected: dict[str, pd.DataFrame], found: dict[str, pd.DataFrame | str]) -> list[dict[str, Any]]:
    """A row for every data set, and one for all of them."""
    rows = [_difference(name, expected[name], found[name]) for name in expected]
    failed = next((other for other in found.values() if isinstance(other, str)), None)
    together = failed or pd.concat([other for other in found.values() if not isinstance(other, str)])
    return [*rows, _difference("all", pd.concat(expected.values()), together)]


def _difference(name: str, exact: pd.DataFrame, other: pd.DataFrame | str) -> dict[str, Any]:
    exact_bits = exact["ideal_bits"].to_numpy(float)
    row = {"dataset": name, "chunks": len(exact), "tokens": int(exact["tokens"].sum()), "exact_bits": exact_bits.sum()}
    if isinstance(other, str):
        missing = dict.fromkeys(("bits", "difference_percent", "largest_chunk_percent"), math.nan)
        return {**row, **missing, "within_target": False, "reason": other}
    if other["tokens"].tolist() != exact["tokens"].tolist():
        raise Error(f"{name}: the engines were given other tokens")
    bits = other["ideal_bits"].to_numpy(float)
    difference = 100 * (bits.sum() / exact_bits.sum() - 1)
    row |= {"bits": bits.sum(), "difference_percent": difference}
    row |= {"largest_chunk_percent": 100 * np.abs(bits / exact_bits - 1).max()}
    return {**row, "within_target": bool(abs(difference) <= TARGET_PERCENT), "reason": ""}

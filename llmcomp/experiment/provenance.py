"""What rows say of the checkpoint that they are of: seed, commit, tokens seen, operations of its training."""

from __future__ import annotations

import contextlib
from typing import Any

import pandas as pd

from llmcomp.errors import Error
from llmcomp.models import counts
from llmcomp.models.sources import ModelSource
from llmcomp.results import CELL_FACTS, ROW_COLUMNS


def add_facts(rows: pd.DataFrame, source: ModelSource) -> pd.DataFrame:
    """The rows of one checkpoint with the columns CELL_FACTS; what they say already stays."""
    known = rows["params"].dropna()
    facts = checkpoint_facts(source, int(known.iloc[0]) if len(known) else None)
    dtypes = {name: ROW_COLUMNS[name][0] for name in CELL_FACTS if _is_empty(rows, name)}
    return rows.assign(**{name: pd.Series(facts[name], rows.index, dtype) for name, dtype in dtypes.items()})


def _is_empty(rows: pd.DataFrame, name: str) -> bool:
    return name not in rows or bool((rows[name].isna() | (rows[name] == "")).all())


def checkpoint_facts(source: ModelSource, n_params: int | None) -> dict[str, Any]:
    """The values of CELL_FACTS; `n_params`: all parameters of the model as it was loaded."""
    checkpoint = source.checkpoint
    model = checkpoint.model if checkpoint else None
    tokens = checkpoint.tokens if checkpoint else None
    exact = counts.training_flops(model.family, model.shape, tokens) if model and model.shape and tokens else None
    if tokens == 0:
        exact = 0.0
    is_counted = tokens is not None and n_params is not None
    return {
        "n_params_nonembedding": _nonembedding(source, n_params),
        "tokens_seen": pd.NA if tokens is None else tokens,
        "flops": counts.approximate_training_flops(n_params or 0, tokens or 0) if is_counted else float("nan"),
        "flops_exact": float("nan") if exact is None else exact,
        "seed": pd.NA if checkpoint is None or checkpoint.seed is None else checkpoint.seed,
        "commit": source.commit or "",
    }


def _nonembedding(source: ModelSource, n_params: int | None) -> Any:
    """What the suite states, if it counts the parameters as they were found; else by the sizes in config.json."""
    if n_params is None:
        return pd.NA
    model = source.checkpoint.model if source.checkpoint else None
    if model is not None and model.n_params == n_params and model.n_params_nonembedding is not None:
        return model.n_params_nonembedding
    counted = None
    with contextlib.suppress(Error):  # the rows may be older than the cache that has the file
        counted = counts.count_nonembedding(source.read_config(), n_params)
    return pd.NA if counted is None else counted

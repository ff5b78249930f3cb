"""What the words of a sweep mean: which checkpoints, data sets, protocols and mappings are asked for.

Nothing is planned or computed here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmcomp.data import datasets
from llmcomp.data.mappings import get_mapping
from llmcomp.errors import Error
from llmcomp.models import hub, load, sources
from llmcomp.models.lock import Lock
from llmcomp.models.selection import select
from llmcomp.models.sources import ModelSource
from llmcomp.models.suite import Checkpoint, is_suite, load_suite
from llmcomp.progress import tqdm

DEFAULT_MAPPINGS = {"lossless": "bytes", "published": "ascii"}


class Choice(NamedTuple):
    """Which checkpoints of a suite are meant, in the words of `selection.select`."""

    sizes: Any = None
    steps: Any = None
    seeds: Any = None
    tokens: Any = None


def usual(wanted: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Data sets and protocols where none are named: those of the suite's usual grid, else the bundled samples."""
    default = load_suite(wanted).grids.get("default", {}) if is_suite(wanted) else {}
    named = (default.get("datasets", ("text", "image", "speech")), default.get("protocols", ("lossless",)))
    return tuple(named[0]), tuple(named[1])


def find_models(
    wanted: str | Sequence[Any], choice: Choice, cache_dir: Any, lock: Lock, progress: bool = False
) -> Iterator[tuple[ModelSource | Any, str]]:
    """(source or model, reason why it cannot be had or "") for every model and step. What `lock` has is pinned; what is
    found on the hub is put into it."""
    steps = choice.steps
    if is_suite(wanted):
        yield from _find_in_suite(str(wanted), choice, cache_dir, lock, progress)
        return
    if choice._replace(steps=None) != Choice():
        raise Error("sizes, seeds and tokens choose from a suite; give the name of one, or of its file")
    if isinstance(steps, str):
        raise Error(f"steps is {steps!r}, expected an integer or several; words choose from a suite only")
    if steps is not None:
        one_or_several = steps if np.iterable(steps) and not isinstance(steps, str) else [steps]
        steps = [None if step is None else sources.as_step(step) for step in one_or_several]
    seen = set()
    for name in [wanted] if isinstance(wanted, (str, os.PathLike)) or load.is_in_memory(wanted) else wanted:
        if not isinstance(name, (str, os.PathLike)):
            yield load.load_model(name), ""
            continue
        for step in steps or (None,):
            if (os.fspath(name), step) in seen:
                raise Error(f"{name} at step {step} is asked for twice")
            seen.add((os.fspath(name), step))
            try:
                yield sources.find_model(name, step, cache_dir=cache_dir, lock=lock), ""
            except hub.HubUnreachable as error:
                yield ModelSource(os.fspath(name), step, ()), str(error)


def _find_in_suite(
    name: str, choice: Choice, cache_dir: Any, lock: Lock, progress: bool
) -> Iterator[tuple[ModelSource, str]]:
    """A checkpoint that is not what it should be fails with its reason; the others go on."""

    def find(checkpoint: Checkpoint) -> tuple[ModelSource, str]:
        try:
            return sources.find_checkpoint(checkpoint, cache_dir=cache_dir, lock=lock), ""
        except Error as error:
            return _lost(checkpoint), str(error)

    words = {"models": choice.sizes, "steps": choice.steps, "seeds": choice.seeds, "tokens": choice.tokens}
    chosen = select(load_suite(name), **words, branches=lambda model: sources.branches_of(model, lock))
    with ThreadPoolExecutor(hub.REQUESTS_AT_ONCE) as pool:
        found = pool.map(find, chosen)
        yield from tqdm(found, "asking the hub", len(chosen), unit="revision", disable=not progress, delay=2)


def _lost(checkpoint: Checkpoint) -> ModelSource:
    name = Path(checkpoint.name).name if checkpoint.model.is_folder else checkpoint.name
    return ModelSource(name, checkpoint.step, (), checkpoint=checkpoint)


def find_datasets(wanted: Any, n_chunks: int | None, **how: Any) -> list[Any]:
    """Data sets of names, of data sets, or of a mapping from names to the user's files and objects: {"text": FILE}.

    `how`: as `load_dataset`.
    """
    if isinstance(wanted, Mapping):
        found: list[Any] = [_load_named(name, data, n_chunks, how) for name, data in wanted.items()]
    else:
        specs = [wanted] if isinstance(wanted, str) or hasattr(wanted, "chunks") else list(wanted)
        found = [
            datasets.load_dataset(os.fspath(spec), n_chunks, **how) if isinstance(spec, (str, os.PathLike)) else spec
            for spec in specs
        ]
    for data in found:
        if not (hasattr(data, "name") and hasattr(data, "chunks")):
            raise Error(
                f"a {type(data).__name__} is no data set: expected a name for load_dataset, what it returns, or a "
                "mapping from names to data"
            )
    for name, n_times in Counter(data.name for data in found).items():
        if n_times > 1:
            raise Error(f"{n_times} data sets are called {name!r}; it is what distinguishes their cells")
    return found


def _load_named(name: Any, data: Any, n_chunks: int | None, how: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or data is None or isinstance(data, (int, float)):
        raise Error(f"data sets: found {name!r}: {data!r}, expected a name and the path of its files, or its data")
    if hasattr(data, "chunks"):
        return data
    if isinstance(data, (str, os.PathLike)):
        return datasets.load_dataset(f"{name}={os.fspath(data)}", n_chunks, **how)
    return datasets.load_dataset(data, n_chunks, name=name, **how)


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

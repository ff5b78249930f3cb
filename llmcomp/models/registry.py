"""Names that `load_model` knows: the models of the bundled suites. Nothing is downloaded; `suite` reads the files."""

from __future__ import annotations

import difflib
import functools
from typing import NamedTuple

from llmcomp.errors import Error
from llmcomp.models.suite import SuiteModel, bundled_suites, load_suite


class ModelEntry(NamedTuple):
    """One name that `load_model` knows.

    `params`: all parameters, tied weights once, and `n_params_nonembedding`: without input and output embedding, as in
    rows; None where the suite does not state them. `nominal`: what its authors call it by. `steps` is empty where the
    revisions are looked up on the hub or have no step.
    """

    name: str
    suite: str
    params: int | None
    n_params_nonembedding: int | None
    nominal: int | None
    family: str
    steps: tuple[int, ...]
    bundled: bool


@functools.cache
def suite_models() -> dict[str, SuiteModel]:
    """The models of all bundled suites by name, those that come with llmcomp first."""
    models = [model for name in bundled_suites() for model in load_suite(name).models]
    return {model.name: model for model in sorted(models, key=lambda model: not model.is_bundled)}


@functools.cache
def list_models() -> tuple[ModelEntry, ...]:
    """Every name that `load_model` knows beside folders and other names of the hub."""
    return tuple(
        ModelEntry(
            name=model.name,
            suite=model.suite,
            params=model.n_params,
            n_params_nonembedding=model.n_params_nonembedding,
            nominal=model.params,
            family=model.family,
            steps=known_steps(model),
            bundled=model.is_bundled,
        )
        for model in suite_models().values()
    )


def find_entry(text: str) -> SuiteModel | None:
    """The model of a suite by its name, with or without its owner."""
    return suite_models().get(text) or _by_short_name().get(text)


@functools.cache
def _by_short_name() -> dict[str, SuiteModel]:
    return {model.short_name: model for model in reversed(suite_models().values())}


def known_steps(model: SuiteModel) -> tuple[int, ...]:
    """The steps that a suite lists for a model, in order."""
    return tuple(sorted({step for rule in model.rules for step in rule.steps or () if step is not None}))


def check_step(name: str, step: int, steps: tuple[int, ...]) -> None:
    if step not in steps:
        near = sorted(sorted(steps, key=lambda known: abs(known - step))[:5])
        raise Error(f"{name} has no step {step}; the nearest are {', '.join(map(str, near)) or 'none'}")


def near_names(text: str) -> str:
    """ "; near names: ..." or nothing."""
    by_key = {model.short_name.lower(): model.name for model in suite_models().values()}
    near = difflib.get_close_matches(text.rpartition("/")[2].lower(), by_key, n=4, cutoff=0.5)
    return f"; near names: {', '.join(by_key[key] for key in near)}" if near else ""

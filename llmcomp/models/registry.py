"""Names that `load_model` knows: the bundled models and the suites of the hub. Nothing is read or downloaded here."""

from __future__ import annotations

import difflib
import functools
from typing import NamedTuple

from llmcomp import pico
from llmcomp.errors import Error

# Steps and names: Biderman et al., "Pythia: A Suite for Analyzing Large Language Models", 2023, section 2.
PYTHIA_STEPS = (0, *(2**k for k in range(10)), *range(1000, 143001, 1000))
_PYTHIA_PARAMS = {
    "14m": 14_000_000,
    "31m": 31_000_000,
    "70m": 70_000_000,
    "160m": 160_000_000,
    "410m": 410_000_000,
    "1b": 1_000_000_000,
    "1.4b": 1_400_000_000,
    "2.8b": 2_800_000_000,
    "6.9b": 6_900_000_000,
    "12b": 12_000_000_000,
}


class ModelEntry(NamedTuple):
    """One name that `load_model` knows; `params` is what the suite's authors call it by, not a count of weights."""

    name: str
    suite: str
    params: int
    steps: tuple[int, ...]
    bundled: bool


class Suite(NamedTuple):
    """The models and steps of one grid of experiments."""

    models: tuple[str, ...]
    steps: tuple[int, ...]


SUITES = {
    "pico": Suite(pico.SUITE_NAMES, pico.STEPS),
    # The grid of the published experiment.
    "pythia": Suite(
        tuple(f"EleutherAI/pythia-{size}" for size in ("70m", "160m", "410m", "1b", "1.4b")),
        (1000, 8000, 32000, 128000, 143000),
    ),
}


@functools.cache
def list_models() -> tuple[ModelEntry, ...]:
    """Every name that `load_model` knows beside folders and other names of the hub: the pico and the Pythia suite."""
    bundled = [
        ModelEntry(
            name,
            "pico" if name in pico.SUITE_NAMES else "pico-vocabularies",
            int(name.removeprefix("pico-").partition("k")[0]) * 1000,
            steps,
            True,
        )
        for name, steps in pico.MODEL_STEPS.items()
    ]
    hub = [
        ModelEntry(f"EleutherAI/pythia-{size}{variant}", "pythia", params, PYTHIA_STEPS, False)
        for variant in ("", "-deduped")
        for size, params in _PYTHIA_PARAMS.items()
        if not (variant and size in ("14m", "31m"))
    ]
    return (*bundled, *hub)


def check_step(name: str, step: int, steps: tuple[int, ...]) -> None:
    if step not in steps:
        near = sorted(sorted(steps, key=lambda known: abs(known - step))[:5])
        raise Error(f"{name} has no step {step}; the nearest are {', '.join(map(str, near))}")


def near_names(text: str) -> str:
    """ "; near names: ..." or nothing."""
    by_key = {entry.name.rpartition("/")[2].lower(): entry.name for entry in list_models()}
    near = difflib.get_close_matches(text.rpartition("/")[2].lower(), by_key, n=4, cutoff=0.5)
    return f"; near names: {', '.join(by_key[key] for key in near)}" if near else ""

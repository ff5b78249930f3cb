"""Suites of checkpoints: files of facts to models and to revisions with their steps, tokens and seeds.

`suites/README.md` says what stands in a file. Nothing here knows any one suite, the hub, or how a model is loaded.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from llmcomp.checked_json import read_object
from llmcomp.errors import Error, reason, shown

_BUNDLED = Path(__file__).resolve().parent / "suites"
_FIELD = re.compile(r"\{(\w+)(?::0([0-9]{1,2}))?\}")
_ROUNDED = {"nearest": lambda billions: math.floor(billions + 0.5), "up": math.ceil, "down": math.floor}

# What every key of a file must be. A model's own keys replace those of the suite.
_MODEL_KEYS: Mapping[str, Any] = MappingProxyType(
    {
        "family": str, "licence": str, "data": str, "repository": str, "folder": str, "variants": list,
        "seeds": (list, dict), "seed": int, "tokens_per_step": int, "revisions": list,
    }
)  # fmt: skip
_SUITE_KEYS = {
    **_MODEL_KEYS,
    **{"suite": str, "title": str, "bundled": bool, "models": list, "grids": dict, "sources": list, "uncertain": list},
}
_OWN_KEYS = {
    **_MODEL_KEYS,
    **{"size": str, "params": int, "n_params": int, "n_params_nonembedding": int, "shape": dict},
}
_RULE_KEYS: Mapping[str, Any] = MappingProxyType(
    {
        "name": str, "steps": (list, str), "tokens": int, "tokens_per_step": int, "first_step": int,
        "first_tokens": int, "round_tokens": str, "seeds": list,
    }
)  # fmt: skip
# What stands in a list, where it is not text.
_ELEMENTS: Mapping[str, Any] = MappingProxyType(
    {
        "models": (dict, str), "steps": (int, dict, str, type(None)), "seeds": (int, str), "revisions": dict,
        "variants": (dict, str),
    }
)  # fmt: skip
_ELEMENTS_TOLD = {"models": "objects or text", "steps": "numbers, ranges or null", "seeds": "numbers or text"}
# Far above the steps of any suite.
_STEPS_MAX = 1 << 20


@dataclass(frozen=True)
class Rule:
    """How some revisions of a model are called; `steps` None: they are looked up on the hub."""

    name: str
    steps: tuple[int | None, ...] | None
    seeds: tuple[str, ...] = ()
    tokens: int | None = None
    tokens_per_step: int | None = None
    first_step: int = 0
    first_tokens: int = 0
    round_tokens: str = "nearest"

    def tokens_seen(self, step: int | None) -> int | None:
        if self.tokens is not None or step is None or self.tokens_per_step is None:
            return self.tokens
        return self.first_tokens + (step - self.first_step) * self.tokens_per_step


@dataclass(frozen=True)
class SuiteModel:
    """One repository or folder of checkpoints. `name` is what `find_model` takes; counts are None where not stated."""

    name: str
    suite: str
    size: str
    variant: str
    family: str
    rules: tuple[Rule, ...]
    params: int | None = None
    n_params: int | None = None
    n_params_nonembedding: int | None = None
    shape: Mapping[str, Any] | None = field(default=None, hash=False)
    seed: int | None = None
    seed_label: str = ""
    seed_numbers: Mapping[str, int] = field(default_factory=dict, hash=False)
    licence: str = ""
    data: str = ""
    is_bundled: bool = False
    is_folder: bool = False

    @property
    def short_name(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def is_listed(self) -> bool:
        """Whether all its revisions are in the file; else some are found on the hub only."""
        return all(rule.steps is not None for rule in self.rules)


class Checkpoint(NamedTuple):
    """One revision of a model; `tag` tells it from others of the model that have the same step."""

    model: SuiteModel
    step: int | None
    revision: str
    tokens: int | None
    seed: int | None
    tag: str = ""

    @property
    def name(self) -> str:
        return f"{self.model.name}@{self.tag}" if self.tag else self.model.name

    @property
    def label(self) -> str:
        return f"{self.name} {self.revision}"


@dataclass(frozen=True)
class Suite:
    """The models of one file, smallest first as they stand there, and its named grids."""

    name: str
    models: tuple[SuiteModel, ...]
    grids: Mapping[str, Mapping[str, Any]]
    title: str = ""
    sources: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()


@functools.cache
def bundled_suites() -> tuple[str, ...]:
    """The names of the suites that come with llmcomp."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.json")))


@functools.lru_cache(maxsize=256)
def load_suite(name: str) -> Suite:
    """A bundled suite by its name, or a suite of your own by the path of its file (*.json); `Error` for any fault."""
    if name in bundled_suites():
        return read_suite(_BUNDLED / f"{name}.json")
    if name.endswith(".json"):
        return read_suite(name)
    raise Error(f"no suite is called {name!r}; there are {', '.join(bundled_suites())}, or give a file name.json")


def is_suite(name: Any) -> bool:
    """Whether `load_suite` is meant by this word: a bundled suite, or a file *.json that is there."""
    return isinstance(name, str) and (name in bundled_suites() or (name.endswith(".json") and Path(name).is_file()))


def read_suite(path: str | os.PathLike[str]) -> Suite:
    """The suite of one file. `Error` names the file, the place in it, what was found and what was expected."""
    path = Path(path)
    content = read_object(path)
    try:
        return _Reader(path).suite(content)
    except Error as error:
        raise Error(f"{path}: {reason(error)}") from None


def checkpoints(model: SuiteModel, branches: Iterable[str] = ()) -> tuple[Checkpoint, ...]:
    """The checkpoints of a model by step, then seed; where a rule asks the hub, those of `branches` that fit it."""
    found = [checkpoint for rule in model.rules for checkpoint in _of_rule(model, rule, branches)]
    order = sorted(found, key=lambda c: (c.step is None, c.step or 0))
    return tuple({checkpoint.revision: checkpoint for checkpoint in order}.values())


class _Reader:
    """Turns the content of a file into a `Suite`; messages say where in the file something is wrong."""

    def __init__(self, path: Path):
        self._path = path

    def suite(self, content: Any) -> Suite:
        _check(content, _SUITE_KEYS, "the file")
        for key in ("suite", "models"):
            if key not in content:
                raise Error(f"the file has no {key!r}")
        models = [model for entry in content["models"] for model in self._models(content, entry)]
        names = [model.name for model in models]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise Error(f"two models are called {sorted(doubled)[0]}")
        grids = content.get("grids", {})
        for name, grid in grids.items():
            words: Any = dict.fromkeys(("models", "steps", "seeds"), (list, str))
            _check(grid, words | dict.fromkeys(("datasets", "protocols"), list), f"the grid {name}")
        facts = {key: tuple(content.get(key, ())) for key in ("sources", "uncertain")}
        return Suite(content["suite"], tuple(models), grids, content.get("title", ""), **facts)

    def _models(self, content: dict[str, Any], entry: Any) -> Iterator[SuiteModel]:
        own = _check(entry, _OWN_KEYS, "a model")
        size = own.get("size")
        if not size:
            raise Error("a model has no 'size'")
        facts = {**{key: content[key] for key in _MODEL_KEYS if key in content}, **own}
        where = facts.get("folder" if "folder" in own or "repository" not in facts else "repository")
        if not where:
            raise Error(f"the model {size} has neither 'repository' nor 'folder'")
        is_folder = where == facts.get("folder")
        numbers = _seed_numbers({**content, **own}, content.get("seeds", {}))
        stated = {key: own.get(key) for key in ("params", "n_params", "n_params_nonembedding", "shape")}
        seeds = list(numbers) if "{seed}" in where else [""]
        for variant, seed in itertools.product(_variants(content, own), seeds):
            fields = {"size": size, "variant": variant["variant"], "seed": seed}
            name = _fill(where, fields)
            yield SuiteModel(
                name=str(self._path.parent / name) if is_folder else name,
                suite=content["suite"],
                variant=variant["variant"],
                family=facts.get("family", ""),
                licence=facts.get("licence", ""),
                data=variant.get("data", facts.get("data", "")),
                rules=tuple(_rule(rule, facts, fields, numbers) for rule in facts.get("revisions", ())),
                seed=numbers[seed] if seed else facts.get("seed"),
                seed_label=seed,
                seed_numbers=numbers,
                is_bundled=bool(content.get("bundled")),
                is_folder=is_folder,
                size=size,
                **stated,
            )


def _check(entry: Any, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise Error(f"{where} is a {type(entry).__name__}, expected an object")
    for key, value in entry.items():
        if key not in keys:
            raise Error(f"{where} has the unknown key {key!r}; known are {', '.join(keys)}")
        kinds = keys[key] if isinstance(keys[key], tuple) else (keys[key],)
        if value is None or (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise Error(f"{where}: {key} is {shown(value)}, expected {expected}")
        if isinstance(value, list) and (strange := [v for v in value if not isinstance(v, _ELEMENTS.get(key, str))]):
            raise Error(f"{where}: {key} has {shown(strange[0])}, expected {_ELEMENTS_TOLD.get(key, 'text')}")
        if int in kinds and value < 0:
            raise Error(f"{where}: {key} is {value}, expected a number of at least 0")
    return entry


def _variants(content: dict[str, Any], own: dict[str, Any]) -> list[dict[str, str]]:
    """The variants of a model as objects; a model names those of the suite that it has."""
    all_variants = [_check(v, {"variant": str, "data": str}, "a variant") for v in content.get("variants", [])]
    if "variants" not in own:
        return all_variants or [{"variant": ""}]
    known = {variant["variant"]: variant for variant in all_variants}
    if unknown := [name for name in own["variants"] if name not in known]:
        raise Error(f"the model {own['size']} has the unknown variant {unknown[0]!r}")
    return [known[name] for name in own["variants"]]


def _seed_numbers(facts: dict[str, Any], of_suite: Any) -> dict[str, int]:
    """The numbers of the seeds by what stands for them in names."""
    seeds = facts.get("seeds", [])
    if isinstance(seeds, dict):
        numbers = seeds
    else:
        labels = of_suite if isinstance(of_suite, dict) else {}
        numbers = {str(seed): labels.get(seed, seed) for seed in seeds}
    for label, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise Error(f"the seed {label!r} has no number")
    return numbers


def _rule(entry: Any, facts: dict[str, Any], fields: dict[str, str], numbers: dict[str, int]) -> Rule:
    rule = _check(entry, _RULE_KEYS, "a rule of revisions")
    if "name" not in rule:
        raise Error("a rule of revisions has no 'name'")
    if (rounding := rule.get("round_tokens", "nearest")) not in _ROUNDED:
        raise Error(f"round_tokens is {rounding!r}, expected one of {', '.join(_ROUNDED)}")
    name = _fill(rule["name"], {key: value for key, value in fields.items() if value or key != "seed"}, partly=True)
    seeds = tuple(map(str, rule.get("seeds", numbers)))
    if unknown := [seed for seed in seeds if seed not in numbers]:
        raise Error(f"the rule {name} has the unknown seed {unknown[0]!r}")
    steps = rule.get("steps", [None])
    if isinstance(steps, str) and steps != "hub":
        raise Error(f"the rule {name}: steps is {steps!r}, expected a list or 'hub'")
    return Rule(
        name=name,
        steps=None if steps == "hub" else tuple(_steps(steps)),
        seeds=seeds if "{seed}" in name else (),
        tokens=rule.get("tokens"),
        tokens_per_step=rule.get("tokens_per_step", facts.get("tokens_per_step")),
        first_step=rule.get("first_step", 0),
        first_tokens=rule.get("first_tokens", 0),
        round_tokens=rounding,
    )


def _steps(entries: Iterable[Any]) -> Iterator[int | None]:
    for entry in entries:
        if entry is None or (isinstance(entry, int) and not isinstance(entry, bool)):
            yield entry
            continue
        span = _check(entry, {"from": int, "to": int, "by": int, "times": int}, "a range of steps")
        if "from" not in span or "to" not in span or ("by" in span) == ("times" in span):
            raise Error(f"{shown(span)} is no range of steps: expected from, to, and either by or times")
        step, factor, by = span["from"], span.get("times", 1), span.get("by", 0)
        if (factor < 2 or step < 1) if "times" in span else by < 1:
            raise Error(f"{shown(span)} is no range of steps: it never ends")
        for n_steps in itertools.count():
            if step > span["to"]:
                break
            if n_steps == _STEPS_MAX:
                raise Error(f"{shown(span)} has more than {_STEPS_MAX:,} steps")
            yield step
            step = step * factor + by


def _fill(template: str, fields: Mapping[str, Any], partly: bool = False) -> str:
    """`template` with its fields replaced; "{step:08}" is padded with zeros. `partly` leaves unknown fields."""

    def replace(match: re.Match[str]) -> str:
        if match[1] in fields:
            return str(fields[match[1]]).zfill(int(match[2] or 0))
        if partly:
            return match[0]
        raise Error(f"{template!r} has the unknown field {match[0]}")

    return _FIELD.sub(replace, template)


def _of_rule(model: SuiteModel, rule: Rule, branches: Iterable[str]) -> Iterator[Checkpoint]:
    if rule.steps is None:
        yield from _on_hub(model, rule, branches)
        return
    for step, seed in itertools.product(rule.steps, rule.seeds or ("",)):
        tokens = rule.tokens_seen(step)
        fields: dict[str, Any] = {} if step is None else {"step": step}
        if tokens is not None:
            fields["tokens"] = _ROUNDED[rule.round_tokens](tokens / 1e9)
        revision = _fill(rule.name, fields | ({"seed": seed} if seed else {}))
        yield _checkpoint(model, revision, step, tokens, seed)


def _on_hub(model: SuiteModel, rule: Rule, branches: Iterable[str]) -> Iterator[Checkpoint]:
    pattern = _pattern(rule)
    for branch in branches:
        if match := pattern.fullmatch(branch):
            named = match.groupdict()
            step = int(named["step"]) if named.get("step") else None
            tokens = rule.tokens_seen(step)
            if tokens is None and named.get("tokens"):
                tokens = int(named["tokens"]) * 10**9
            yield _checkpoint(model, branch, step, tokens, named.get("seed") or "")


def _pattern(rule: Rule) -> re.Pattern[str]:
    parts, end = [], 0
    for match in _FIELD.finditer(rule.name):
        values = "|".join(map(re.escape, rule.seeds)) if match[1] == "seed" else r"\d+"
        parts += [re.escape(rule.name[end : match.start()]), f"(?P<{match[1]}>{values})"]
        end = match.end()
    try:
        return re.compile("".join(parts) + re.escape(rule.name[end:]))
    except re.error as error:  # a field that is no name, or stands twice
        raise Error(f"the rule {shown(rule.name)}: {error}") from None


def _checkpoint(model: SuiteModel, revision: str, step: int | None, tokens: int | None, seed: str) -> Checkpoint:
    tag = seed if seed else revision if step is None else ""
    return Checkpoint(model, step, revision, tokens, model.seed_numbers[seed] if seed else model.seed, tag)

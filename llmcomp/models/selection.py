"""Which checkpoints of a suite are meant by words such as "70m,410m", "log:12", "1000..143000", "2e9", "all".

Words to checkpoints only; the revisions of a repository, where a suite does not list them, come from the caller.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmcomp.errors import Error
from llmcomp.models.suite import Checkpoint, Suite, SuiteModel, checkpoints

# One word, several with commas between them, or a sequence of words and numbers.
Wanted = int | float | str | Sequence[Any] | None
Branches = Callable[[SuiteModel], Iterable[str]]

# Tokens asked for in numbers are met by the nearest checkpoint, if it is no further than by this factor.
_NEAR = 1.5


def select(
    suite: Suite,
    *,
    models: Wanted = None,
    steps: Wanted = None,
    seeds: Wanted = None,
    tokens: Wanted = None,
    branches: Branches = lambda _: (),
) -> list[Checkpoint]:
    """The checkpoints that are meant, model by model in the order of the file, by step.

    Args:
        models: sizes ("70m", "70m-deduped" with its variant), names, patterns ("*-deduped"), ranges of sizes
            ("70m..1b") or "all"; None: those of the suite's grid "default", or all.
        steps: numbers, ranges ("1000..8000"), "log:N" (N steps evenly spread over the logarithm), "last", "all";
            None: those of the grid, or all.
        seeds: numbers, ranges, labels, or "all"; None: those of the grid, or all.
        tokens: instead of steps, by tokens seen: numbers ("2e9", the nearest checkpoint), ranges, "log:N".
        branches: the names of all revisions of a model on the hub, asked for where the suite does not list them.

    `Error` for a word that means nothing in this suite, with what there is.
    """
    if tokens is not None and steps is not None:
        raise Error("give either steps or tokens")
    grid: Mapping[str, Any] = suite.grids.get("default", {})
    chosen = _select_models(suite, models if models is not None else grid.get("models"))
    numbers = _seeds(suite, seeds if seeds is not None else grid.get("seeds"))
    found = []
    for model in chosen:
        if numbers is not None and model.seed_label and model.seed not in numbers:
            continue
        there = checkpoints(model, () if model.is_listed else branches(model))
        there = tuple(c for c in there if numbers is None or not c.tag or c.seed is None or c.seed in numbers)
        if not there:
            raise Error(f"{model.name}: no revision is known that fits the names of the suite {suite.name}")
        if tokens is not None:
            found += _by_tokens(model, there, tokens)
        else:
            found += _by_step(model, there, steps if steps is not None else grid.get("steps"))
    if not found:
        raise Error(f"the suite {suite.name} has no such seed: {_shown(seeds)}")
    return found


def _words(wanted: Any) -> list[Any]:
    if isinstance(wanted, str):
        return [word.strip() for word in wanted.split(",") if word.strip()]
    if isinstance(wanted, Iterable):
        return [word for entry in wanted for word in _words(entry)]
    return [wanted]


def _shown(wanted: Any) -> str:
    return ", ".join(map(str, _words(wanted)))


def _select_models(suite: Suite, wanted: Any) -> list[SuiteModel]:
    if wanted is None or "all" in _words(wanted):
        return list(suite.models)
    chosen: dict[str, SuiteModel] = {}
    for word in _words(wanted):
        matches = _matching(suite, str(word))
        if not matches:
            sizes = list(dict.fromkeys(model.size for model in suite.models))
            raise Error(f"the suite {suite.name} has no model {word!r}; its sizes are {', '.join(sizes)}")
        chosen |= {model.name: model for model in matches}
    return [model for model in suite.models if model.name in chosen]


def _matching(suite: Suite, word: str) -> list[SuiteModel]:
    first, dots, last = word.partition("..")
    if dots:
        ends = [_of_size(suite, end) for end in (first, last)]
        if not all(ends) or any(model.params is None for end in ends for model in end):
            raise Error(f"the suite {suite.name} has no sizes {word!r}: expected two sizes with their parameters")
        low, high = (end[0].params or 0 for end in ends)
        variant = ends[0][0].variant
        return [m for m in suite.models if m.variant == variant and m.params and low <= m.params <= high]
    if matches := _of_size(suite, word):
        return matches
    return [m for m in suite.models if any(fnmatch.fnmatchcase(name, word) for name in (m.name, m.short_name))]


def _of_size(suite: Suite, word: str) -> list[SuiteModel]:
    """The models of one size in one variant: "70m" in its first, "70m-deduped" and "4M-c4" in the one that is named."""
    same = [model for model in suite.models if model.size == word]
    if same:
        return [model for model in same if model.variant == same[0].variant]
    return [m for m in suite.models if m.variant and word in (m.size + m.variant, f"{m.size}-{m.variant}")]


def _seeds(suite: Suite, wanted: Any) -> set[int] | None:
    """The numbers of the seeds that are meant; None: all."""
    if wanted is None or "all" in _words(wanted):
        return None
    labels = {label: number for model in suite.models for label, number in model.seed_numbers.items()}
    chosen: set[int] = set()
    for word in _words(wanted):
        if word in labels:
            chosen.add(labels[word])
            continue
        low, high = _range(word, "seed")
        found = {number for number in labels.values() if low <= number <= high}
        if not found:
            there = ", ".join(labels) or "none to choose from"
            raise Error(f"the suite {suite.name} has no seed {word!r}; its seeds are {there}")
        chosen |= found
    return chosen


def _by_step(model: SuiteModel, there: Sequence[Checkpoint], wanted: Any) -> list[Checkpoint]:
    if wanted is None or "all" in _words(wanted):
        return list(there)
    known = sorted({c.step for c in there if c.step is not None})
    if not known:
        raise Error(f"{model.name} has no steps, only {_shown(c.revision for c in there)}; choose 'all', or by tokens")
    chosen: set[int] = set()
    for word in _words(wanted):
        if word == "last":
            chosen.add(known[-1])
        elif isinstance(word, str) and word.startswith("log:"):
            chosen |= set(_spread(known, _count(word)))
        else:
            low, high = _range(word, "step")
            inside = [step for step in known if low <= step <= high]
            if not inside:
                near = sorted(sorted(known, key=lambda step: abs(step - low))[:5])
                raise Error(f"{model.name} has no step {word}; the nearest are {', '.join(map(str, near))}")
            chosen |= set(inside)
    return [c for c in there if c.step in chosen]


def _by_tokens(model: SuiteModel, there: Sequence[Checkpoint], wanted: Any) -> list[Checkpoint]:
    known = sorted({c.tokens for c in there if c.tokens})
    if not known:
        raise Error(f"{model.name}: the suite does not say how many tokens its checkpoints have seen; choose by steps")
    chosen: set[int] = set()
    for word in _words(wanted):
        if word == "all":
            return list(there)
        if isinstance(word, str) and word.startswith("log:"):
            chosen |= set(_spread(known, _count(word)))
            continue
        low, high = _range(word, "number of tokens")
        if low < high:
            inside = [n for n in known if low <= n <= high]
        else:
            nearest = min(known, key=lambda n: abs(math.log(n / low))) if low > 0 else 0
            inside = [nearest] if nearest and 1 / _NEAR <= nearest / low <= _NEAR else []
        if not inside:
            raise Error(f"{model.name} has no checkpoint at {word} tokens; it has {known[0]:.3g} to {known[-1]:.3g}")
        chosen |= set(inside)
    return [c for c in there if c.tokens in chosen]


def _range(word: Any, what: str) -> tuple[float, float]:
    """ "a..b" or one number, as two ends."""
    first, _, last = word.partition("..") if isinstance(word, str) else (word, "", "")
    try:
        low, high = float(first), float(last or first)
    except (TypeError, ValueError):
        raise Error(f"{word!r} is no {what}: expected a number, a range such as 1..9, or 'all'") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise Error(f"{word!r} is no {what}: expected a range from small to large")
    return low, high


def _count(word: str) -> int:
    try:
        count = int(word.removeprefix("log:"))
    except ValueError:
        count = 0
    if count < 1:
        raise Error(f"{word!r}: expected log:N with a number N of at least 1")
    return count


def _spread(known: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers above 0, nearest to even steps of the logarithm, the last among them."""
    left = [n for n in known if n > 0]
    if count >= len(left):
        return left
    low, high = math.log(left[0]), math.log(left[-1])
    chosen = []
    for k in reversed(range(count)):
        at = low + (high - low) * (k / (count - 1) if count > 1 else 1)
        nearest = min(left, key=lambda n: abs(math.log(n) - at))
        chosen.append(nearest)
        left.remove(nearest)
    return sorted(chosen)

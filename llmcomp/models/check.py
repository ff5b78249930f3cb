"""Are checkpoints what their names say? Answered by the hub's lists of files, before anything large is downloaded.

Equal weights under different names, revisions and files that are missing, changes since a lock, models that are gated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmcomp.errors import Error
from llmcomp.models import hub
from llmcomp.models.lock import Lock, LockedRevision
from llmcomp.models.registry import find_entry
from llmcomp.models.selection import Branches, select
from llmcomp.models.sources import ask_revision, branches_of, is_weight_file
from llmcomp.models.suite import Checkpoint, Rule, Suite, SuiteModel, is_suite, load_suite
from llmcomp.progress import tqdm

_LABELS_SHOWN = 6
# Bytes a parameter; old files of small models have masks beside the weights that take about as much.
_FEWEST_BYTES, _MOST_BYTES = 1.95, 10.0
_STEP_IN_NAME = re.compile(r"(?:^|[^a-z])step[_-]?(\d+)|^checkpoint-(\d+)|^ckpt_(\d+)")


class Fault(NamedTuple):
    """Something that is not as it should be, of the revisions `labels`.

    `kind`: "equal weights", "shared file", "missing revision", "missing files", "other size", "changed", "gated" or
    "unreachable".
    """

    kind: str
    labels: tuple[str, ...]
    detail: str

    def __str__(self) -> str:
        shown = ", ".join(self.labels[:_LABELS_SHOWN])
        more = f" and {len(self.labels) - _LABELS_SHOWN} more" if len(self.labels) > _LABELS_SHOWN else ""
        return f"{self.kind}: {shown}{more}: {self.detail}"


@dataclass
class Report:
    """What `check_revisions` found; `lock` has the state of all revisions that are whole."""

    n_revisions: int
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def __str__(self) -> str:
        n_faults = len(self.faults)
        found = "no fault" if n_faults == 0 else f"{n_faults} fault{'s' if n_faults > 1 else ''}"
        lines = [f"{self.n_revisions} revisions, {found}", *(f"  {fault}" for fault in self.faults)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        faults = [{**fault._asdict(), "labels": list(fault.labels)} for fault in self.faults]
        return {"revisions": self.n_revisions, "faults": faults, "notes": self.notes}


def find_checkpoints(name: str, **words: Any) -> list[Checkpoint]:
    """The checkpoints of a suite, of one model of a suite, or of any model on the hub by its revisions.

    `words`: models, steps, seeds, tokens, as in `selection.select`; of one model all steps where none are named.
    """
    if is_suite(name):
        return select(load_suite(name), **words, branches=branches_of)
    entry = find_entry(name)
    if entry is None and "/" not in name:
        raise Error(f"{name!r} is no suite, no file of one and no model on the hub (owner/name)")
    model = entry or SuiteModel(name, "", name, "", "", (Rule("{step}", None),))
    words = {**words, "models": model.name}
    if words.get("steps") is None and words.get("tokens") is None:
        words["steps"] = "all"
    if entry is not None:
        return select(Suite(entry.suite, (model,), {}), **words, branches=branches_of)
    return _of_any_model(model, words, branches_of)


def _of_any_model(model: SuiteModel, words: dict[str, Any], branches: Branches) -> list[Checkpoint]:
    """Every branch with a step in its name, or all branches where none has; others are not of the training."""
    names = list(branches(model))
    steps = {name: int(next(filter(None, match.groups()))) for name in names if (match := _STEP_IN_NAME.search(name))}
    rules = tuple(Rule(name, (step,)) for name, step in steps.items()) or tuple(Rule(name, (None,)) for name in names)
    named = SuiteModel(model.name, "", model.name, "", "", rules)
    return select(Suite(model.name, (named,), {}), **words)


def check_revisions(chosen: Sequence[Checkpoint], old: Lock | None = None, progress: bool = True) -> Report:
    """Ask the hub for the files of every checkpoint and compare their digests with each other and with `old`.

    One request a model, and one a revision that `old` does not have at the same commit; of a gated model config.json
    is fetched. Nothing else is downloaded. Whatever is wrong is a fault of the report, nothing raises.
    """
    report = Report(len(chosen))
    old = old or Lock()
    asked: list[tuple[Checkpoint, str]] = []
    for repo, of_model in _by_model(chosen).items():
        asked += _branches_there(repo, of_model, report)
    with (
        ThreadPoolExecutor(hub.REQUESTS_AT_ONCE) as pool,
        tqdm(total=len(asked), unit="revision", disable=not progress, delay=2) as bar,
    ):
        for (checkpoint, commit), answer in zip(
            asked, pool.map(lambda one: _ask(one[0], one[1], old), asked), strict=True
        ):
            bar.update()
            if isinstance(answer, Fault):
                report.faults.append(answer)
                continue
            before = old.get(checkpoint.model.name, checkpoint.revision)
            report.lock.put(checkpoint.model.name, checkpoint.revision, answer)
            _compare(checkpoint, before, answer, commit, report)
            report.faults += _other_size(checkpoint, answer)
    report.faults += _equal_weights(report.lock)
    return report


def _by_model(chosen: Iterable[Checkpoint]) -> dict[str, list[Checkpoint]]:
    by_model: dict[str, list[Checkpoint]] = {}
    for checkpoint in chosen:
        model = checkpoint.model
        if model.is_bundled or model.is_folder:
            raise Error(f"{model.name} is not on the hub: there is nothing to ask")
        by_model.setdefault(model.name, []).append(checkpoint)
    return by_model


def _branches_there(repo: str, chosen: list[Checkpoint], report: Report) -> list[tuple[Checkpoint, str]]:
    """The checkpoints whose revisions exist, with their commits; a fault where they do not."""
    labels = tuple(checkpoint.label for checkpoint in chosen)
    try:
        commits = hub.list_branches(repo)
        if gate := _gate(repo, chosen, commits):
            report.faults.append(Fault("gated", labels, gate))
            return []
    except hub.GatedModel as error:
        report.faults.append(Fault("gated", labels, str(error)))
        return []
    except Error as error:
        report.faults.append(Fault("unreachable", labels, str(error)))
        return []
    missing = tuple(c.label for c in chosen if c.revision not in commits)
    if missing:
        detail = f"the hub has no such revision; {repo} has {len(commits)}"
        report.faults.append(Fault("missing revision", missing, detail))
    return [(c, commits[c.revision]) for c in chosen if c.revision in commits]


def _gate(repo: str, chosen: list[Checkpoint], commits: dict[str, str]) -> str:
    """Why the files of a gated model cannot be had, or "": the list alone can be seen by everybody."""
    first = next((commits[c.revision] for c in chosen if c.revision in commits), None)
    if first is None or not hub.list_revision(repo, first).is_gated:
        return ""
    try:
        hub.hub_download(repo, "config.json", first, None)
    except hub.GatedModel as error:
        return str(error)
    except Error:
        pass  # what else is wrong is reported under its own name
    return ""


def _ask(checkpoint: Checkpoint, commit: str, old: Lock) -> LockedRevision | Fault:
    before = old.get(checkpoint.model.name, checkpoint.revision)
    if before is not None and before.commit == commit:
        return before
    try:
        return ask_revision(checkpoint.model.name, commit, checkpoint.label)
    except hub.HubUnreachable as error:
        return Fault("unreachable", (checkpoint.label,), str(error))
    except Error as error:
        return Fault("missing files", (checkpoint.label,), str(error).removeprefix(f"{checkpoint.label} "))


def _compare(
    checkpoint: Checkpoint, before: LockedRevision | None, now: LockedRevision, commit: str, report: Report
) -> None:
    if before is None or before.commit == now.commit:
        return
    names = sorted({*before.files, *now.files})
    changed = [name for name in names if before.files.get(name) != now.files.get(name)]
    moved = f"commit {before.commit[:12]} is now {commit[:12]}"
    if changed:
        report.faults.append(Fault("changed", (checkpoint.label,), f"{moved}: {', '.join(changed)}"))
    else:
        report.notes.append(f"{checkpoint.label}: {moved} with the same files")


def _other_size(checkpoint: Checkpoint, now: LockedRevision) -> list[Fault]:
    """Weights are stored in two or four bytes, in old files with masks beside them: another model is far from that."""
    n_params = checkpoint.model.n_params
    n_bytes = sum(file.n_bytes for name, file in now.files.items() if is_weight_file(name))
    if not n_params or _FEWEST_BYTES <= n_bytes / n_params <= _MOST_BYTES:
        return []
    detail = f"the weights take {n_bytes:,} bytes, {n_params:,} parameters take two or four each"
    return [Fault("other size", (checkpoint.label,), detail)]


def _equal_weights(lock: Lock) -> list[Fault]:
    """Revisions all of whose weights are equal, and single files that otherwise different revisions share."""
    weights: dict[tuple[str, ...], list[str]] = {}
    files: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for repo, revisions in lock.revisions.items():
        for revision, locked in revisions.items():
            digests = {name: file.digest for name, file in sorted(locked.files.items()) if is_weight_file(name)}
            whole = tuple(digests.values())
            if not all(whole):
                continue
            label = f"{repo} {revision}"
            weights.setdefault(whole, []).append(label)
            for name, digest in digests.items() if len(digests) > 1 else ():
                files.setdefault(digest, []).append((f"{label} {name}", whole))
    faults = [
        Fault("equal weights", tuple(labels), f"SHA-256 {whole[0][:12]}...: at most one of them is what its name says")
        for whole, labels in weights.items()
        if len(labels) > 1
    ]
    for digest, places in files.items():
        # One of each group of equal weights: the group itself is reported above.
        distinct = {whole: label for label, whole in reversed(places)}
        if len(distinct) > 1:
            labels = tuple(reversed(distinct.values()))
            faults.append(Fault("shared file", labels, f"SHA-256 {digest[:12]}..., though the other files differ"))
    return faults

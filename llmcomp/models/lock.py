"""models.lock: the commit and the digests of every file of every revision that a sweep uses, written down once.

A file of JSON, one revision a line. Nothing here asks the hub.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmcomp.errors import Error

NAME = "models.lock"
_FORMAT = 1


class LockedFile(NamedTuple):
    """`digest`: SHA-256 of the content of large files, the blob's SHA-1 of git for small ones; "" if not stated."""

    n_bytes: int
    digest: str


class LockedRevision(NamedTuple):
    """A revision as the hub had it: its commit and its files by name."""

    commit: str
    files: Mapping[str, LockedFile]


@dataclass
class Lock:
    """Revisions by repository and name."""

    revisions: dict[str, dict[str, LockedRevision]] = field(default_factory=dict)

    def get(self, repo: str, revision: str) -> LockedRevision | None:
        return self.revisions.get(repo, {}).get(revision)

    def put(self, repo: str, revision: str, locked: LockedRevision) -> None:
        self.revisions.setdefault(repo, {})[revision] = locked

    def merged(self, newer: Lock) -> Lock:
        """Both; of a revision that both have, the newer."""
        repos = {**self.revisions, **newer.revisions}
        return Lock({repo: {**self.revisions.get(repo, {}), **newer.revisions.get(repo, {})} for repo in repos})


def read_lock(path: str | os.PathLike[str]) -> Lock:
    """The lock in a file; `Error` that names the file for anything else."""
    path = Path(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Error(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise Error(f"{path}: not a lock of models: {error}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise Error(f"{path}: not a lock of models: found format {found!r}, expected {_FORMAT}")
    lock = Lock()
    try:
        for repo, revisions in content["models"].items():
            for revision, (commit, files) in revisions.items():
                lock.put(repo, revision, LockedRevision(_text(commit), _files(files)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Error(f"{path}: not a lock of models: {error}") from None
    return lock


def _files(entries: Mapping[str, Any]) -> dict[str, LockedFile]:
    files = {}
    for name, (n_bytes, digest) in entries.items():
        if not isinstance(n_bytes, int) or n_bytes < 0 or "/" in name or name.startswith("."):
            raise ValueError(f"the file {name!r} of {n_bytes!r} bytes")
        files[name] = LockedFile(n_bytes, _text(digest))
    return files


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a text was expected")
    return value


def _by_number(name: str) -> list[Any]:
    """So that step2 stands before step10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write_lock(path: str | os.PathLike[str], lock: Lock) -> None:
    """Write the lock beside, then rename it over what was there."""
    path = Path(path)
    models = []
    for repo, revisions in sorted(lock.revisions.items()):
        lines = [
            f"  {json.dumps(name)}: {json.dumps([locked.commit, {n: list(f) for n, f in locked.files.items()}])}"
            for name, locked in sorted(revisions.items(), key=lambda item: _by_number(item[0]))
        ]
        models.append(f" {json.dumps(repo)}: {{\n" + ",\n".join(lines) + "\n }")
    text = f'{{"format": {_FORMAT}, "models": {{\n' + ",\n".join(models) + "\n}}\n"
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, "utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Error(f"cannot write {path}: {error.strerror or error}") from error

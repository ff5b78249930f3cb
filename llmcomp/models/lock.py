"""models.lock: the commit and the digests of every file of every revision that a sweep uses, written down once.

A file of JSON, one revision a line. Nothing here asks the hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmcomp.atomic_write import write_beside
from llmcomp.checked_json import INDEX_BYTES_MAX, Members, is_file_name, read_object
from llmcomp.errors import Error, named

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
    content = Members(read_object(path, INDEX_BYTES_MAX), f"{path}: not a lock of models")
    content.integer("format", lowest=_FORMAT, highest=_FORMAT)
    lock = Lock()
    models = content.members("models")
    for repo in content.object("models"):
        revisions = models.members(repo)
        for revision in models.object(repo):
            lock.put(repo, revision, _revision(revisions, revision))
    return lock


def _revision(revisions: Members, name: str) -> LockedRevision:
    parts = revisions.array(name)
    if len(parts) != 2 or not isinstance(parts[0], str) or not isinstance(parts[1], dict):
        raise revisions.error(name, "a commit and its files")
    files = {}
    for file, facts in parts[1].items():
        if not is_file_name(file) or file.startswith(".") or not isinstance(facts, list) or len(facts) != 2:
            raise revisions.error(name, f"files by their names, found {named(file)}")
        n_bytes, digest = facts
        if type(n_bytes) is not int or n_bytes < 0 or not isinstance(digest, str):
            raise revisions.error(name, f"bytes and digest of {named(file)}")
        files[file] = LockedFile(n_bytes, digest)
    return LockedRevision(parts[0], files)


def _by_number(name: str) -> list[Any]:
    """So that step2 stands before step10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, text.encode())
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror or error}") from error

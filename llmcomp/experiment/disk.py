"""A bound on the disk that a sweep's downloads take: room is waited for, weights go when nothing needs them any more.

The downloads lie in a cache of the sweep's own, so that nothing is deleted that was there before.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from llmcomp.errors import Error
from llmcomp.models import hub
from llmcomp.models.sources import ModelSource, is_weight_file, remove_from_cache

_FOLDER = ".models"


class DiskLimit:
    """Room for the weights of `sources`, in the order in which they will be needed, in `out`/.models.

    `place` says where a source is to be downloaded. `reserve` waits until it fits, `release` says that it is no longer
    needed. Weights that several sources share lie there once. Safe for the two threads of a sweep.
    """

    def __init__(self, out: Path, limit_bytes: int):
        self._folder = out / _FOLDER
        self._limit = limit_bytes
        self._room = threading.Condition()
        self._held: dict[str, int] = {}
        self._in_use: Counter[str] = Counter()
        self._needed: Counter[str] = Counter()
        self._blobs: dict[str, Path] = {}
        self._reserved: set[int] = set()
        self._is_closed = False

    def place(self, source: ModelSource) -> ModelSource:
        """The source as it is to be fetched: from where it lies, else into the sweep's own cache."""
        if source.repo is None or source.bytes_to_download == 0:
            return source
        assert source.commit is not None
        there = [hub.hub_cached(source.repo, file.name, source.commit, self._folder) for file in source.files]
        files = [
            file._replace(cached=path is not None and path.stat().st_size == file.n_bytes)
            for file, path in zip(source.files, there, strict=True)
        ]
        return replace(source, cache_dir=self._folder, files=tuple(files))

    def check(self, sources: Sequence[ModelSource]) -> None:
        """`Error` for a source that never fits."""
        for source in sources:
            total = sum(n_bytes for _, n_bytes in self._weights(source))
            if total > self._limit:
                raise Error(f"disk is {self._limit:,} bytes; the weights of {source.label} alone take {total:,}")

    def expect(self, sources: Sequence[ModelSource]) -> None:
        """The sources that will be reserved; errors as `check`. Weights of others are removed."""
        self.check(sources)
        for source in sources:
            self._needed.update(digest for digest, _ in self._weights(source))
        for blob in self._folder.glob("models--*/blobs/*"):
            digest = blob.name.partition(".")[0]
            if len(digest) == 64 and digest not in self._needed:
                remove_from_cache(blob)
            elif len(digest) == 64 and blob.name == digest:
                self._held[digest] = blob.stat().st_size
                self._blobs[digest] = blob
        for link in self._folder.glob("models--*/snapshots/*/*"):
            if link.is_symlink() and not link.exists():
                link.unlink()

    def _weights(self, source: ModelSource) -> list[tuple[str, int]]:
        if source.cache_dir != self._folder:
            return []
        return [(file.digest or "", file.n_bytes) for file in source.files if is_weight_file(file.name)]

    def reserve(self, source: ModelSource) -> None:
        """Wait for room for the weights of the source; others that are needed only later may have to go for it."""
        weights = dict(self._weights(source))
        with self._room:
            while True:
                missing = {digest: n_bytes for digest, n_bytes in weights.items() if digest not in self._held}
                self._make_room(sum(missing.values()), keep=weights)
                if sum(self._held.values()) + sum(missing.values()) <= self._limit:
                    break
                if self._is_closed:
                    raise Error("the sweep has ended")
                self._room.wait()
            self._held |= missing
            self._in_use.update(weights.keys())
            self._reserved.add(id(source))

    def _make_room(self, n_bytes: int, keep: Iterable[str]) -> None:
        idle = [digest for digest in self._held if not self._in_use[digest] and digest not in set(keep)]
        for digest in idle:
            if sum(self._held.values()) + n_bytes <= self._limit:
                return
            self._remove(digest)

    def release(self, source: ModelSource) -> None:
        """The cells of the source are done: what no other source needs is deleted."""
        if source.cache_dir != self._folder or source.repo is None or source.commit is None:
            return
        with self._room:
            was_reserved = id(source) in self._reserved
            self._reserved.discard(id(source))
            for file in source.files:
                if not is_weight_file(file.name):
                    continue
                digest = file.digest or ""
                self._needed[digest] -= 1
                if was_reserved:
                    self._in_use[digest] -= 1
                path = hub.hub_cached(source.repo, file.name, source.commit, self._folder)
                if path is not None and path.is_symlink():
                    self._blobs[digest] = path.parent / path.readlink()
                    path.unlink()
                elif path is not None:
                    self._blobs[digest] = path
                if self._needed[digest] <= 0 and self._in_use[digest] <= 0:
                    self._remove(digest)
            self._room.notify_all()

    def _remove(self, digest: str) -> None:
        self._held.pop(digest, None)
        if blob := self._blobs.pop(digest, None):
            remove_from_cache(blob)

    def close(self) -> None:
        """Nobody waits any longer."""
        with self._room:
            self._is_closed = True
            self._room.notify_all()

    def remove_folder(self) -> None:
        """All cells are done: the small files go, too. Else they stay, with parts of what was being fetched."""
        shutil.rmtree(self._folder, ignore_errors=True)

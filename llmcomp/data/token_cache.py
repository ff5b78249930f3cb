"""Tokens of chunks, made once for all models that share a tokenizer: in memory, and in a folder for many processes.

What the tokens mean is the mapping's business; nothing here knows models or rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmcomp.atomic_write import written_beside
from llmcomp.data.mappings import ByteEncoder, Encoded

_MAX_BYTES = 1 << 28
# What a chunk takes beside its tokens and side bits.
_CHUNK_BYTES = 400


class TokenCache:
    """Groups of chunks -> their tokens; every group is tokenised once for each tokenizer and mapping.

    `folder`, if given and there, is shared by all processes of this machine that name it: the first that needs a group
    makes it, the others wait and read. At most `max_bytes` are kept in memory, the oldest groups are dropped first.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, max_bytes: int = _MAX_BYTES):
        self._folder = None if folder is None else Path(folder)
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, list[Encoded]] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def encoded(self, mapping: ByteEncoder, tokenizer: Any, chunks: Sequence[bytes]) -> list[Encoded]:
        """The tokens of every chunk under a mapping, as the mapping itself makes them.

        Raises what that raises; nothing is kept then.
        """
        key = _key(mapping.name, tokenizer, chunks)
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                found = self.find_or_make(key, lambda: [mapping.encode(chunk, tokenizer) for chunk in chunks])
                self._keep(key, found)
            return found

    def _keep(self, key: str, group: list[Encoded]) -> None:
        self._kept[key] = group
        self._n_bytes += _size(group)
        while self._n_bytes > self._max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._n_bytes -= _size(dropped)

    def find_or_make(self, key: str, make: Callable[[], list[Encoded]]) -> list[Encoded]:
        """A group that is not in memory: from what processes share. A cache that shares otherwise has its own."""
        if self._folder is None or not self._folder.is_dir():
            return make()
        path = self._folder / f"{key}.npz"
        with _held(self._folder / f"{key}.lock"):
            if path.exists():
                return _read(path)
            group = make()
            _write(path, group)
            return group


def _key(mapping: str, tokenizer: Any, chunks: Sequence[bytes]) -> str:
    # The published tokens depend on all of the file, not only on what the fingerprint is of.
    identity = getattr(tokenizer, "file_sha256", None) or tokenizer.fingerprint
    digest = hashlib.sha256(f"{mapping} {identity}\n".encode())
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little") + chunk)
    return digest.hexdigest()


def _size(group: list[Encoded]) -> int:
    return sum(item.tokens.nbytes + len(item.side) + _CHUNK_BYTES for item in group)


def _write(path: Path, group: list[Encoded]) -> None:
    """Written beside and renamed: another process reads it whole or not at all."""
    facts = [(len(item.tokens), len(item.side), item.side_bits, item.n_bytes) for item in group]
    with written_beside(path) as file:
        np.savez(
            file,
            facts=np.array(facts, np.int64).reshape(-1, 4),
            tokens=np.concatenate([np.empty(0, np.int32), *(item.tokens for item in group)]),
            side=np.frombuffer(b"".join(item.side for item in group), np.uint8),
        )


def _read(path: Path) -> list[Encoded]:
    with np.load(path, allow_pickle=False) as file:
        facts, tokens, side = file["facts"], file["tokens"], file["side"].tobytes()
    group = []
    token_at = side_at = 0
    for n_tokens, n_side, side_bits, n_bytes in facts.tolist():
        kept = tokens[token_at : token_at + n_tokens]
        group.append(Encoded(kept, side[side_at : side_at + n_side], side_bits, n_bytes))
        token_at, side_at = token_at + n_tokens, side_at + n_side
    return group


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock with the process, however that ends."""
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield

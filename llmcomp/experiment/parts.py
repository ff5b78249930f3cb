"""Which chunks of a cell are there already, in files of sweeps with fewer or more chunks of the same data.

A cell's file holds the digests of its chunks, so that what it holds is known again whatever number was asked for. Files
are only looked at here; `plan` says which they are, and what is left to compute.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmcomp import results
from llmcomp.checked_json import parse_object
from llmcomp.errors import Error

# In the metadata of a file: the first 8 bytes of the SHA-256 of each chunk, in base 64; and what rows say of the data.
CHUNKS, DATA = "llmcomp.chunks", "llmcomp.data"
_DIGEST_BYTES = 8
# What a key says of the chunks; all else has to be the same in files that make up one cell.
_OF_CHUNKS = ("n_chunks", "dataset_sha256", "first_chunk")


class Part(NamedTuple):
    """A file with rows of a cell: chunks from `first` on, by their `digests`. `settings`: its key without them."""

    path: Path
    key: str
    settings: str
    is_verified: bool
    data: str
    first: int
    digests: tuple[bytes, ...]


def chunk_digests(chunks: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(chunk).digest()[:_DIGEST_BYTES] for chunk in chunks)


def metadata(digests: Sequence[bytes], data: str) -> dict[str, str]:
    """What a file says of its chunks."""
    return {CHUNKS: base64.b64encode(b"".join(digests)).decode(), DATA: data}


def settings_of(key: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in key.items() if name not in _OF_CHUNKS}, sort_keys=True)


def read_part(path: Path, key_name: str, n_rows_name: str, verified_name: str) -> Part | None:
    """What a file says of itself; None where it is damaged, or not one of a cell that names its chunks."""
    try:
        found, n_rows = results.read_footer(path)
        key = parse_object(found.get(key_name, "").encode(), str(path))
        raw = base64.b64decode(found.get(CHUNKS, ""), validate=True)
    except (Error, ValueError):
        return None
    first = key.get("first_chunk", 0)
    if found.get(n_rows_name) != str(n_rows) or not raw or not isinstance(first, int):
        return None
    digests = tuple(raw[at : at + _DIGEST_BYTES] for at in range(0, len(raw), _DIGEST_BYTES))
    verified = found.get(verified_name) == "true"
    return Part(path, found[key_name], settings_of(key), verified, found.get(DATA, ""), first, digests)


def cover(parts: Iterable[Part], settings: str, wanted: Sequence[bytes], verify: bool) -> list[tuple[Part, int]]:
    """The parts that hold the wanted chunks from the first on, in order, and up to which chunk each is taken."""
    fitting = [part for part in parts if part.settings == settings and (part.is_verified or not verify)]
    found: list[tuple[Part, int]] = []
    at = 0
    while at < len(wanted):
        stops = [(_stop(part, wanted), part.path.name, part) for part in fitting if part.first == at]
        stop, _, best = max(stops, default=(at, "", None), key=lambda entry: entry[:2])
        if best is None or stop <= at:
            break
        found.append((best, stop))
        at = stop
    return found


def _stop(part: Part, wanted: Sequence[bytes]) -> int:
    """One behind the last chunk that the part has in common with the wanted ones; its first where one differs."""
    n = min(len(part.digests), len(wanted) - part.first)
    same = tuple(wanted[part.first : part.first + n]) == part.digests[:n]
    return part.first + (n if same else 0)


def is_in_the_way(
    part: Part | None, key: dict[str, Any], data: str, to_do: range | None, ignored: Sequence[str]
) -> bool:
    """Whether rows of a file could not be told from those of a cell with `key`: it is damaged or of an older version,
    or has the same data, model and options. `ignored`: what of the key rows do not tell.

    Of the very same settings, chunks other than those that are `to_do` (None: the cell is finished) stay.
    """
    if part is None:
        return True
    if part.data != data:
        return False
    if part.settings == settings_of(key):
        own_chunks = range(part.first, part.first + len(part.digests))
        return to_do is not None and own_chunks.start < to_do.stop and to_do.start < own_chunks.stop
    own = json.loads(part.settings)
    compared = [name for name in own.keys() | key.keys() if name not in (*_OF_CHUNKS, *ignored)]
    return all(own.get(name) == key.get(name) for name in compared)

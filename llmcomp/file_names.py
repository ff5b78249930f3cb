"""Names of files within what file systems take: they count bytes (255), not characters. Nothing here opens a file."""

from __future__ import annotations

import os

PART_NAME_BYTES = 200


def shortened(name: str, bytes_max: int) -> str:
    """The first characters of `name` that take at most `bytes_max` bytes in a file's name."""
    raw = os.fsencode(name)
    if len(raw) <= bytes_max:
        return name
    # A character that is cut in two goes as a whole.
    return raw[:bytes_max].decode("utf-8", "ignore")


def part_name(name: str, unique: str) -> str:
    """The name under which the file `name` is written until it is whole: hidden, beside it, and not too long."""
    return f".{shortened(name, PART_NAME_BYTES)}.{unique}.part"

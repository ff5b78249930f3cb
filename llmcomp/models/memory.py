"""How much memory there is, what the user allows of it, and how an engine says that it was too little.

What a batch of a model takes is windows.py's business; nothing here knows models or arrays.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from llmcomp.errors import Error

# Bytes, or a share of all memory of the device; None: what is free.
MaxMemory = int | float | str | None

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Z]*?)B?", re.IGNORECASE)
_CGROUP = Path("/sys/fs/cgroup")
# Of the memory that is free; the rest is for gaps between allocations, and for what else is at work.
_SHARE_OF_FREE = 0.8


def parse_memory(text: str) -> int | float:
    """ "8GB", "500 MiB", "123456789" -> bytes (int); "0.5", "50%" -> a share of all memory (float, above 0, at most 1).

    Raises `Error` for anything else.
    """
    stripped = text.strip()
    if stripped.endswith("%"):
        stripped = f"{_number(stripped[:-1], text) / 100:.12f}"
    match = _AMOUNT.fullmatch(stripped)
    if match is None or match[2].upper() not in _UNITS:
        raise Error(f"memory {text!r}: expected bytes (8000000000), a size (8GB, 500MiB) or a share (0.5, 50%)")
    amount = float(match[1])
    if not match[2] and "." in match[1]:
        if not 0 < amount <= 1:
            raise Error(f"memory {text!r}: a share is above 0 and at most 1")
        return amount
    n_bytes = int(amount * _UNITS[match[2].upper()])
    if n_bytes < 1:
        raise Error(f"memory {text!r}: expected at least one byte")
    return n_bytes


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Error(f"memory {whole!r}: expected a number before %") from None


def allowed_bytes(max_memory: MaxMemory, total_bytes: int) -> int | None:
    """What `max_memory` comes to on a device of `total_bytes`; None where there is no bound."""
    if isinstance(max_memory, str):
        max_memory = parse_memory(max_memory)
    if max_memory is None:
        return None
    if not max_memory > 0 or (isinstance(max_memory, float) and max_memory > 1):
        raise Error(f"max_memory is {max_memory}; expected bytes (an integer above 0) or a share (above 0, at most 1)")
    return int(max_memory * total_bytes) if isinstance(max_memory, float) else max_memory


def host_memory() -> tuple[int, int]:
    """(free, all) bytes of this machine, or of the control group that this process is confined to."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page_bytes
    # macOS reports no free pages; half of all is a guess that its compression makes safe.
    free = total // 2
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    limit, used = _group_bytes("memory.max"), _group_bytes("memory.current")
    if limit is not None and used is not None:
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return free, total


def _group_bytes(name: str) -> int | None:
    """A number of control groups version 2, whose files in a container are those of its own group."""
    try:
        return int((_CGROUP / name).read_text("ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's and NumPy's MemoryError, OutOfMemoryError of torch and CuPy, and the plain
    RuntimeError of torch's allocator on a CPU."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


class PassMemory(NamedTuple):
    """What one pass of a model over a batch takes, as its engine states: bytes, and rows of tokens with their padding.

    `row_bytes` for every row, `fixed_bytes` whatever the rows (blocks of logits), `held_bytes` since the model was
    loaded (weights). `free_bytes`, `total_bytes` of the device; `rows_max`: more make nothing faster.
    """

    row_bytes: int
    fixed_bytes: int
    held_bytes: int
    free_bytes: int
    total_bytes: int
    rows_max: int

    def rows(self, max_memory: MaxMemory = None) -> int:
        """The rows that a batch may have, at least 1; `Error` if not one row fits into `max_memory`."""
        room = int(_SHARE_OF_FREE * self.free_bytes)
        allowed = allowed_bytes(max_memory, self.total_bytes)
        if allowed is not None:
            room = min(room, allowed - self.held_bytes)
            least = self.held_bytes + self.fixed_bytes + self.row_bytes
            if allowed < least:
                raise Error(f"max_memory is {allowed:,} bytes; the weights and the smallest batch take {least:,}")
        return max(1, min(self.rows_max, (room - self.fixed_bytes) // max(self.row_bytes, 1)))

"""make, for the programs of csrc/check: no two tests build the same file at once, whichever process they run in."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make(*words: str, folder: str = "build/check") -> subprocess.CompletedProcess[str]:
    """`make *words` in the project's root, alone among those that build into `folder`."""
    lock = ROOT / f"{folder}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800)

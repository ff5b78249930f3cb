"""The core's own check programs (csrc/check), built and run by their make targets, with no Python in between. What a
target needs beside a C compiler is tested for, and its absence is a skip that names it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from check_programs import make

SIMDE = Path("/usr/include/simde/x86/avx512.h")

slow = pytest.mark.slow
TARGETS = [
    pytest.param("check-core", ("cc",), id="check-core", marks=slow),
    pytest.param("fuzz-short", ("clang",), id="fuzz-short", marks=slow),
    pytest.param("check-sanitize", ("cc", "clang"), id="check-sanitize", marks=slow),
    pytest.param("check-valgrind", ("cc", "valgrind"), id="check-valgrind", marks=slow),
    pytest.param("check-pool-model", ("cc", "spin"), id="check-pool-model", marks=slow),
    pytest.param("check-binding", ("cc",), id="check-binding", marks=slow),
    pytest.param("check-avx512", ("cc", SIMDE), id="check-avx512", marks=slow),
    pytest.param(
        "check-cross",
        ("aarch64-linux-gnu-gcc", "s390x-linux-gnu-gcc", "qemu-aarch64", "qemu-s390x"),
        id="check-cross",
        marks=slow,
    ),
]


@pytest.mark.parametrize(("target", "needs"), TARGETS)
def test_the_target_passes(target: str, needs: tuple[str | Path, ...]) -> None:
    for need in ("make", *needs):
        found = need.exists() if isinstance(need, Path) else shutil.which(need)
        if not found:
            pytest.skip(f"{target} needs {need}")
    result = make(target, f"BIN={Path(sys.executable).parent}")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]

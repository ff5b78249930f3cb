"""`selftest`: the digest of every case on each backend and CUDA device of this machine, beside those in the package."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmcomp import _core, coding
from llmcomp.checked_json import read_object
from llmcomp.coding import cuda
from llmcomp.conformance.cases import Refusal, all_cases, digest
from llmcomp.errors import Error
from llmcomp.version import __version__

DIGESTS = Path(__file__).with_name("digests.json")
COLUMNS = ("processor", "backend", "compiler", "versions", "cases", "digest")


class Place(NamedTuple):
    """What computed a row: a backend of the processor, or a CUDA device."""

    name: str
    backend: str
    device: str


class Outcome(NamedTuple):
    """All cases in one place: how many were computed, `failures` and what was `refused`, a line each.

    `digest` is over the digests of the cases that were computed, in their order: 16 hexadecimal digits.
    """

    place: Place
    n_cases: int
    digest: str
    seconds: float
    failures: tuple[str, ...]
    refused: tuple[str, ...]

    def row(self) -> dict[str, str]:
        """The columns of CONFORMANCE.md."""
        return {
            "processor": processor() if self.place.device == "cpu" else device_name(self.place.device),
            "backend": self.place.name,
            "compiler": _core.COMPILER,
            "versions": f"llmcomp {__version__}, Python {platform.python_version()}, NumPy {np.__version__}",
            "cases": str(self.n_cases),
            "digest": self.digest,
        }


def places() -> tuple[Place, ...]:
    """The backends of this machine, slowest first, then its CUDA devices where the CUDA part is built."""
    found = [Place(name, name, "cpu") for name in coding.backends()]
    devices = cuda.cuda_info()["devices"]
    return (*found, *(Place(f"cuda:{i}", coding.backends()[-1], f"cuda:{i}") for i in range(len(devices))))


def selftest(where: Place, on_case: Callable[[str], None] = lambda name: None) -> Outcome:
    """Compute every case in one place and compare. `on_case` is called with the name of each case before it.

    A model that a CUDA device refuses, since its kernels do not compute it, is no failure.
    """
    expected = expected_digests()
    begun = time.perf_counter()
    digests, failures, refused = [], [], []
    with coding.use_backend(where.backend):
        for name, case in all_cases().items():
            on_case(name)
            try:
                found = digest(case, where.device)
            except Refusal as error:
                refused.append(f"{name}: {error}")
                continue
            except Error as error:
                failures.append(f"{name}: {error}")
                continue
            digests.append(found)
            if found != expected.get(name):
                failures.append(f"{name}: digest {found}, expected {expected.get(name)}")
    total = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]
    return Outcome(where, len(digests), total, time.perf_counter() - begun, tuple(failures), tuple(refused))


@functools.cache
def expected_digests() -> dict[str, str]:
    return {str(name): str(value) for name, value in read_object(DIGESTS).items()}


def markdown_row(row: dict[str, str]) -> str:
    return "| " + " | ".join(row[name].replace("|", "/") for name in COLUMNS) + " |"


def processor() -> str:
    """What the processor calls itself, and its architecture."""
    name = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Processor", "cpu model"):
                name = value.strip()
                break
    machine = platform.machine()
    return f"{name} ({machine})" if name and name != machine else machine


def device_name(device: str) -> str:
    found = cuda.cuda_info()["devices"][int(device.partition(":")[2])]
    return str(found["name"]) if isinstance(found, dict) else str(found)

"""What the environment says about the C core: LLMCOMP_BACKEND and LLMCOMP_THREADS.

The module `_core` asks here when it is loaded, so that whoever comes to it, by whatever import, has the same settings.
What may not live here: settings of anything else, and anything that imports the core.
"""

from __future__ import annotations

import os

from llmcomp.errors import Error

__all__ = ["THREADS_MAX", "check_threads", "core_defaults"]

# Far above any machine; the pool itself starts at most 255 threads beside the caller's.
THREADS_MAX = 65536


def core_defaults(backends: tuple[str, ...]) -> tuple[str, int]:
    """The backend and the number of threads of calls that ask for none: the environment's, else the fastest backend and
    a thread for each processor that this process may use.

    Args:
        backends: what this machine can run, slowest first.

    Raises:
        Error: LLMCOMP_BACKEND or LLMCOMP_THREADS is set to what cannot be used.
    """
    name = os.environ.get("LLMCOMP_BACKEND") or backends[-1]
    if name not in backends:
        raise Error(f"LLMCOMP_BACKEND is {name!r}; expected one of {', '.join(backends)}")
    threads = os.environ.get("LLMCOMP_THREADS")
    if not threads:
        return name, min(_usable_cpus(), THREADS_MAX)
    # The length first: Python refuses to read numbers of thousands of digits.
    is_number = threads.isascii() and threads.isdecimal() and len(threads) <= len(str(THREADS_MAX))
    return name, check_threads("LLMCOMP_THREADS", int(threads) if is_number else threads)


def check_threads(name: str, threads: object) -> int:
    """`threads` if it is a number of threads, else an Error that names it."""
    if not isinstance(threads, int) or not 1 <= threads <= THREADS_MAX:
        raise Error(f"{name} is {_shortened(threads)}; expected a number of 1 to {THREADS_MAX}")
    return threads


def _shortened(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

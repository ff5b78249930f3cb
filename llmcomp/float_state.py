"""The float state of the core, for Python code that makes floats on which bits or fingerprints depend.

Reading a number from text, writing one and rounding one depend on the rounding mode that the caller's libraries have
left in the processor; with another one a model would get another fingerprint. What may not live here: arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llmcomp import _core

__all__ = ["ieee_state"]


@contextlib.contextmanager
def ieee_state() -> Iterator[None]:
    """Within ``with ieee_state():``, or in a function decorated with it, this thread rounds to nearest, keeps denormals
    and has no traps, as the core; afterwards all is as it was. Not for generators: their callers run in between."""
    before = _core.float_state_enter()
    try:
        yield
    finally:
        _core.float_state_leave(before)

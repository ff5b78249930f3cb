"""Models one after the other: while one is at work, the next is downloaded and read into memory.

What a model is, and how it is read, is models.py's business; nothing here knows files or engines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

# How long an end waits for a thread that is inside a read or a download and cannot be stopped there.
_PATIENCE_SECONDS = 10.0

# Brings a model into host memory, on any thread; what it returns makes the model of that, on the caller's.
Stage = Callable[[], Callable[[], Any]]


class LoadAhead:
    """The models of `stages`, to be taken in their order; at most one is ahead. A context manager.

    Leaving it, for whatever reason, drops what was loaded ahead. A download that is under way then ends with its
    thread, which nothing waits for at the end of the process; the hub's cache resumes it.
    """

    def __init__(self, stages: Sequence[Stage]):
        self._stages = stages
        self._ahead: Loading | None = None

    def __enter__(self) -> LoadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead = None

    def take(self, number: int) -> Any:
        """Model `number`; raises what its loading raised. Either way the next one then begins to load.

        The caller lets go of the model before, so that a device never holds two.
        """
        ahead, self._ahead = self._ahead, None
        try:
            make = self._stages[number]() if ahead is None else ahead.result()
            model = make()
        except Exception:
            self._begin(number + 1)
            raise
        self._begin(number + 1)
        return model

    def _begin(self, number: int) -> None:
        if number < len(self._stages):
            self._ahead = Loading(self._stages[number])


class Loading:
    """One stage on a thread of its own: `result` waits for it and raises what it raised, `drop` wants it no more."""

    def __init__(self, stage: Stage):
        self._make: Callable[[], Any] | None = None
        self._error: BaseException | None = None
        self._is_dropped = False
        self._lock = threading.Lock()
        # A daemon: a download must not keep a process alive that was interrupted.
        self._thread = threading.Thread(target=self._run, args=(stage,), name="llmcomp-loading", daemon=True)
        self._thread.start()

    def _run(self, stage: Stage) -> None:
        try:
            make = stage()
        # It is raised where the model is asked for.
        except BaseException as error:
            with self._lock:
                self._error = None if self._is_dropped else error
            return
        with self._lock:
            self._make = None if self._is_dropped else make

    def result(self) -> Callable[[], Any]:
        try:
            self._thread.join()
        except BaseException:
            self.drop()
            raise
        make, error = self._make, self._error
        self._make = self._error = None
        if error is not None:
            raise error
        assert make is not None
        return make

    def drop(self) -> None:
        with self._lock:
            self._is_dropped = True
            self._make = self._error = None
        self._thread.join(_PATIENCE_SECONDS)

"""The lock of a folder of results: one sweep alone, or any number of workers that claim their cells.

It keeps two sweeps of different settings from setting each other's files aside. Where a file system has no locks that
other machines see, workers go on without; what keeps them apart is their claims.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmcomp.errors import Error

NAME = ".sweep.lock"
# How long a worker waits for another one that has the folder for itself while it begins.
_PATIENCE_SECONDS = 20.0

_locked_here: set[Path] = set()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One sweep a folder. The system frees the lock with the process, however that ends; children do not inherit it."""
    with _opened(folder) as file:
        _take(file, folder)
        _name_holder(file)
        yield


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[bool]:
    """A worker among others. The value: whether it came when there was no other, as far as locks tell."""
    with _opened(folder) as file:
        try:
            is_first = _is_taken(file, fcntl.LOCK_EX)
        except OSError:
            yield True
            return
        if is_first:
            file.truncate(0)  # the name of an earlier holder
        until = time.monotonic() + _PATIENCE_SECONDS
        while not _is_taken(file, fcntl.LOCK_SH):
            if time.monotonic() > until:
                raise Error(f"{_held_by_another(file, folder)}; workers share a folder with workers only")
            time.sleep(0.05)
        yield is_first


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[IO[str]]:
    path = folder.absolute() / NAME
    if path in _locked_here:
        raise Error(f"{folder}: another sweep of this process is at work here")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open(path)
    except OSError as error:
        raise Error(f"{folder}: cannot write results there: {error.strerror or error}") from error
    with file:
        _locked_here.add(path)
        try:
            yield file
        finally:
            _locked_here.discard(path)


def _open(path: Path) -> IO[str]:
    """The lock is written to, and in a folder from elsewhere it may be a link to what is not the sweep's, or a pipe."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise Error(f"{path}: expected a file of its own, found a link or something else: remove it")
    return os.fdopen(handle, "a+")


def _take(file: IO[str], folder: Path) -> None:
    try:
        is_taken = _is_taken(file, fcntl.LOCK_EX)
    except OSError as error:
        raise Error(f"{folder}: cannot lock {NAME} there: {error.strerror or error}") from error
    if not is_taken:
        raise Error(_held_by_another(file, folder))


def _is_taken(file: IO[str], kind: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _held_by_another(file: IO[str], folder: Path) -> str:
    file.seek(0)
    holder = file.read().strip()
    return f"{folder}: another sweep is at work here ({f'process {holder}' if holder else 'of several workers'})"


def _name_holder(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()

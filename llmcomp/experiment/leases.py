"""Who computes which cell: claims of workers that share nothing but a folder, on a local disk or a network file system.

Only what NFS does atomically is relied on: O_EXCL. Claims save work; what keeps the rows right is that a cell's file is
written beside and renamed, so that a cell that two workers computed is one whole file all the same.

  <cell>.<n>.claim   names the worker that holds the cell; the highest n counts. A file is added, never taken over:
                     of all that find the holder of n dead, one can make n + 1.
  <worker>.worker    of a living worker: which start of which machine it is on, and a count that goes up (the heartbeat)
  <cell>.failed      why a cell failed, and in which run
  <cell>.<worker>.part   rows that are being written

A worker is dead when its file is gone, or is locked by nobody (only looked at on the same machine, where locks are
sure), or has not changed for the length of the lease, by the clock of the one that waits: clocks need not agree, and
the time of day is never asked for. Whoever finds it dead removes its file. A worker that was only stopped writes its
file anew and goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from llmcomp.checked_json import parse_object
from llmcomp.errors import Error

FOLDER = ".claims"
LEASE_SECONDS = 60.0
# Workers that die at one cell, before it is taken for the cell's fault.
DEATHS_MAX = 3

_BEATS_A_LEASE = 6
_RELEASED = "released"
_READ_BYTES_MAX = 1 << 12
_WORKER = re.compile(r"[\w.-]{1,100}")
_CLAIM = re.compile(r"(.+)\.(\d{1,9})\.claim", re.DOTALL)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Claims:
    """The claims of one worker in `out`; a context manager, at whose end the worker is gone and holds nothing.

    `run`: what workers have in common that were started together; a cell that failed in one run is tried again in the
    next. None: this worker is a run of its own. `lease`: seconds after which a worker that shows no sign of life is
    taken for dead; the same for all workers.
    """

    def __init__(self, out: Path, lease: float = LEASE_SECONDS, run: str | None = None):
        host = re.sub(r"[^\w-]", "-", socket.gethostname())[:40] or "host"
        self.worker = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.run = run or self.worker
        self.lease = lease
        self._out, self._folder = out, out / FOLDER
        self._held: dict[str, int] = {}
        self._failed_here: set[str] = set()
        # Of every claim of another worker: what was last seen of it, and since when.
        self._seen: dict[Path, tuple[Any, float]] = {}
        self._sign = _SignOfLife(self._folder / f"{self.worker}.worker", lease / _BEATS_A_LEASE)

    def __enter__(self) -> Claims:
        with _naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._folder.is_symlink():
                raise Error(f"{self._folder}: expected a folder of its own, found a link: remove it")
            self._sign.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in list(self._held):
            self.release(name)
        self._sign.end()
        with contextlib.suppress(OSError):
            self._folder.rmdir()  # the last one

    def claimed(self) -> set[str]:
        """The cells that have a claim, of whoever, dead or alive."""
        return {name for name, _ in self._claims()}

    def take(self, name: str, is_settled: Callable[[], bool]) -> bool:
        """Whether this worker holds the cell now. Not if another does that lives, or if nothing is left to do."""
        if name in self._held:
            return True
        held = self._numbers(name)
        number = max(held) + 1 if held else 0
        if held and not self._is_free(self._claim(name, number - 1)):
            return False
        claim = self._claim(name, number)
        if not self._write_new(claim, self.worker):
            return False
        # What was seen before may be old: the cell was finished meanwhile, or given back and taken by another.
        held = self._numbers(name)
        if is_settled() or max(held, default=0) != number or (number and number - 1 not in held):
            _remove(claim)
            return False
        self._held[name] = number
        return True

    def holds(self, name: str) -> bool:
        """Whether the cell is still this worker's; not if it was taken for dead meanwhile. What is not is let go."""
        if max(self._numbers(name), default=-1) != self._held[name]:
            _remove(self._claim(name, self._held.pop(name)))
        return name in self._held

    def deaths(self, name: str) -> int:
        """How many workers died that held this cell before this worker."""
        earlier = [self._claim(name, number) for number in self._numbers(name) if number < self._held[name]]
        return sum(_read(claim) != _RELEASED for claim in earlier)

    def settle(self, name: str) -> None:
        """The cell is finished or has failed, and its file says so: claims on it have no use any more."""
        last = self._held.pop(name)
        for number in self._numbers(name):
            if number <= last:
                _remove(self._claim(name, number))

    def release(self, name: str) -> None:
        """Give back what was not computed, for another to take at once."""
        claim = self._claim(name, self._held.pop(name))
        with contextlib.suppress(OSError):
            claim.write_text(_RELEASED)

    def fail(self, name: str, why: str) -> None:
        """Tell all workers of this run that the cell cannot be had."""
        self._failed_here.add(name)
        text = json.dumps({"run": self.run, "reason": why})
        self.publish(self._folder / f"{name}.failed", text.encode())

    def failure(self, name: str) -> str | None:
        """Why the cell failed in this run; None if it has not."""
        try:
            found = parse_object((_read(self._folder / f"{name}.failed") or "{}").encode(), f"{name}.failed")
        except Error:
            return None
        is_of_run = found.get("run") == self.run or name in self._failed_here
        return str(found["reason"]) if is_of_run and "reason" in found else None

    def forget_failure(self, name: str) -> None:
        """The cell is finished now."""
        _remove(self._folder / f"{name}.failed")

    def failed(self) -> set[str]:
        """The cells that have failed, in whichever run."""
        return {name.removesuffix(".failed") for name in self._names() if name.endswith(".failed")}

    def publish(self, path: Path, data: bytes) -> None:
        """`data` as the file `path`, whole or not at all; what is there already is replaced. `Error` names the file.

        Parts have the worker's name and lie among the claims: they need no lock to be known for a dead worker's.
        """
        part = self._folder / f"{path.stem}.{self.worker}.part"
        with _naming(path):
            try:
                _write_and_rename(part, path, data)
            except FileNotFoundError:  # taken for dead meanwhile, and tidied up after
                self._folder.mkdir(parents=True, exist_ok=True)
                _write_and_rename(part, path, data)

    def tidy(self, names: Collection[str]) -> None:
        """All of these cells are settled: remove what workers that died have left of them."""
        for name, number in self._claims():
            if name in names:
                _remove(self._claim(name, number))
        for entry in self._names():
            worker = entry.removesuffix(".worker")
            if worker not in (entry, self.worker):
                self._is_dead(worker)

    def _claim(self, name: str, number: int) -> Path:
        return self._folder / f"{name}.{number}.claim"

    def _names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError), _naming(self._folder):
            return os.listdir(self._folder)  # noqa: PTH208 - names alone
        return []

    def _claims(self) -> Iterator[tuple[str, int]]:
        for entry in self._names():
            if found := _CLAIM.fullmatch(entry):
                yield found[1], int(found[2])

    def _numbers(self, name: str) -> list[int]:
        return [number for other, number in self._claims() if other == name]

    def _write_new(self, path: Path, text: str) -> bool:
        """False if it is there. The folder may have gone with the last of the other workers."""
        with _naming(path):
            for _ in range(2):
                try:
                    with path.open("x") as file:
                        file.write(text)
                except FileExistsError:
                    return False
                except FileNotFoundError:
                    self._folder.mkdir(parents=True, exist_ok=True)
                except OSError:
                    _remove(path)
                    raise
                else:
                    return True
        return False

    def _is_free(self, claim: Path) -> bool:
        """Whether nobody that lives holds the claim. One without a name is being written, or its writer died."""
        holder = _read(claim)
        if holder == _RELEASED:
            return True
        if holder is None:
            return False
        is_name = _WORKER.fullmatch(holder) is not None
        if is_name and self._is_dead(holder):
            return True
        state = (holder, _read(self._folder / f"{holder}.worker") if is_name else None)
        last, since = self._seen.get(claim, (None, 0.0))
        if last != state:
            self._seen[claim] = (state, time.monotonic())
            return False
        if time.monotonic() - since < self.lease:
            return False
        if is_name:
            self._bury(holder)
        return True

    def _is_dead(self, worker: str) -> bool:
        """What can be said at once: its file is gone, or it is of this machine and nobody locks it."""
        path = self._folder / f"{worker}.worker"
        text = _read(path)
        if text is not None and text.partition(" ")[0] == _boot_id() and _is_unlocked(path):
            self._bury(worker)
            text = None
        return text is None

    def _bury(self, worker: str) -> None:
        _remove(self._folder / f"{worker}.worker")
        for entry in self._names():
            if entry.endswith(f".{worker}.part"):
                _remove(self._folder / entry)


class _SignOfLife:
    """A locked file that says another number every `pause` seconds, from a thread of its own."""

    def __init__(self, path: Path, pause: float):
        self._path, self._pause = path, pause
        self._handle = -1
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmcomp-heartbeat", daemon=True)

    def begin(self) -> None:
        self._write(0)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()
        _remove(self._path)
        if self._handle >= 0:
            os.close(self._handle)

    def _run(self) -> None:
        beat = 0
        while not self._is_over.wait(self._pause):
            beat += 1
            # A disk that is full or away for a while: the next beat may do.
            with contextlib.suppress(OSError):
                self._write(beat)

    def _write(self, beat: int) -> None:
        if not self._is_there():
            self._open()
        os.pwrite(self._handle, b"%s %012d\n" % (_boot_id().encode(), beat), 0)
        os.fsync(self._handle)

    def _is_there(self) -> bool:
        """False before the first beat, and after another worker took this one for dead."""
        with contextlib.suppress(OSError):
            return self._handle >= 0 and os.fstat(self._handle).st_nlink > 0
        return False

    def _open(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _boot_id() -> str:
    """Tells one start of one machine from all others; "-" where the system does not say."""
    try:
        return _BOOT_ID.read_text().strip() or "-"
    except OSError:
        return "-"


def _is_unlocked(path: Path) -> bool:
    """Only sure on the machine that would hold the lock."""
    if _boot_id() == "-":
        return False
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def _read(path: Path) -> str | None:
    """None if the file is not there, "" if it cannot be read. Links are not followed and pipes not waited for, whoever
    put them there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        return ""
    try:
        return os.read(handle, _READ_BYTES_MAX).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(handle)


def _write_and_rename(part: Path, path: Path, data: bytes) -> None:
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        _remove(part)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror or error}") from error

"""Files that appear whole or not at all: written under a hidden name beside their own, then renamed.

A part file is locked as long as its process lives; one that nobody locks is stale, and the next file that is written
into its folder removes it. What is written is the caller's business, and so is what an OSError is turned into.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PART = re.compile(r"\..*\.[0-9a-f]{16}\.llmcomp\.part", re.DOTALL)
# A name may have 255 bytes on all usual file systems; what a part's name adds has 32.
_STEM_BYTES_MAX = 200


@contextlib.contextmanager
def written_beside(path: str | os.PathLike[str], *, replace: bool = True, private: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends, on the disk by then; on an exception it vanishes.

    `private`: nobody else may read it (mode 0600) unless the caller gives it another mode before the block ends.
    Without `replace`, FileExistsError where a file of that name exists or appears meanwhile. Any other failure is an
    OSError.
    """
    path = Path(path)
    if not replace and os.path.lexists(path):
        raise _exists(path)
    remove_stale_parts(path.parent)
    stem = os.fsdecode(os.fsencode(path.name)[:_STEM_BYTES_MAX])
    part = path.parent / f".{stem}.{secrets.token_hex(8)}.llmcomp.part"
    # From before there is a part: a signal may end this at any moment.
    try:
        # The lock goes with the file, so the file is closed last: until then nobody takes the part for a stale one.
        with _open_part(part, path, 0o600 if private else 0o666) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if replace:
                part.replace(path)
            else:
                _rename_to_new(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _sync_folder(path.parent)


def write_beside(path: str | os.PathLike[str], data: bytes) -> None:
    """All of `data` as the file `path`, or nothing of it."""
    with written_beside(path) as file:
        file.write(data)


def remove_stale_parts(folder: str | os.PathLike[str]) -> None:
    """Removes the part files in `folder` that no living process holds; silent where that is not allowed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                _remove_if_stale(entry.path)


def _remove_if_stale(part: str) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Path(part).unlink()
        finally:
            os.close(handle)


def _open_part(part: Path, path: Path, mode: int) -> BinaryIO:
    """The part file of `path`, new and locked."""
    while True:
        try:
            file = open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        # Some network file systems have no locks; then nobody can take this one for stale either.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_still_there(part, file.fileno()):
            return file
        file.close()


def _is_still_there(part: Path, handle: int) -> bool:
    """False where another process found the part before it was locked, and removed it."""
    try:
        return os.path.samestat(part.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _rename_to_new(part: Path, path: Path) -> None:
    """A hard link fails where the name is taken, a rename would not; some file systems have no links."""
    try:
        path.hardlink_to(part)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:
        part.replace(path)
    else:
        part.unlink()


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "exists already", os.fspath(path))


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk too, where the system allows to ask for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

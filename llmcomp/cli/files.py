"""Which files a command works on and what it says of each: folders, threads, the line of --verbose."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcomp.codec.files import STANDARD_STREAM, SUFFIX, FileReport


def found_in(files: Sequence[str], recursive: bool, is_archive: bool) -> list[str]:
    """The files, and with `recursive` instead of each folder the regular files below it, by name: the archives where
    archives are read, all others where they are written. Links are not followed."""
    found: list[str] = []
    for file in files:
        path = Path(file)
        if not recursive or file == STANDARD_STREAM or path.is_symlink() or not path.is_dir():
            found.append(file)
            continue
        below = (each for each in path.rglob("*") if each.is_file() and not each.is_symlink())
        found += sorted(str(each) for each in below if each.name.endswith(SUFFIX) == is_archive)
    return found


def threads(n_threads: int | None) -> contextlib.AbstractContextManager[Any]:
    """So many threads within it, of the exact engines and the coder; None: as set up."""
    from llmcomp import coding

    return contextlib.nullcontext() if n_threads is None else coding.use_threads(n_threads)


def tell(report: FileReport) -> None:
    """gzip's line of -v, on standard error."""
    speed = report.content_bytes / max(report.seconds, 1e-9) / 1000
    done = f" -> {report.target}" if report.target else ": OK"
    print(
        f"{report.source}: {report.content_bytes:,} bytes, {report.archive_bytes:,} in the archive, ratio "
        f"{report.ratio:.4f}, {report.seconds:.1f} s ({speed:.1f} kB/s){done}",
        file=sys.stderr,
    )

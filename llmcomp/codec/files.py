"""Whole files through the codec as gzip's users expect it: names, modes, times, renaming, progress.

Command line options are cli.py's; what an archive holds is codec.py's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from llmcomp.atomic_write import written_beside
from llmcomp.codec.archive import error_of_path
from llmcomp.codec.compress import (
    SalvageSummary,
    StreamSummary,
    compress_stream,
    decompress_stream,
    salt_of,
    salvage_stream,
)
from llmcomp.codec.container import ArchiveIndex
from llmcomp.errors import CorruptArchive, Error

SUFFIX = ".llmc"
STANDARD_STREAM = "-"
_BLOCK_BYTES = 1 << 20
# Of a file's beginning gzip makes a sample to compare with, of files that are worth it. A gzip file has 18 bytes around
# the deflate stream, where zlib's format has 6.
_SAMPLED_BYTES, _SAMPLED_BYTES_MIN, _GZIP_FRAME_BYTES = 1 << 20, 1 << 14, 12


class Skipped(Error):
    """A file that is left as it is: what gzip warns of with exit status 2."""


class FileReport(NamedTuple):
    """One file that was compressed, decompressed or tested. `target` is "-" for standard output, "" for a test."""

    source: str
    target: str
    content_bytes: int
    archive_bytes: int
    n_segments: int
    n_stored: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Archive over original; NaN for an empty original."""
        return self.archive_bytes / self.content_bytes if self.content_bytes else float("nan")


def compress_file(
    source: str | os.PathLike[str],
    model: Any,
    *,
    output: str | os.PathLike[str] | None = None,
    keep: bool = True,
    force: bool = False,
    progress: bool = True,
    **options: Any,
) -> FileReport:
    """Compress a file to `output`, by default its name and ".llmc". "-" is standard input or output.

    The archive gets the file's mode and time, is written beside its name and renamed when it is whole and on the disk;
    only then, and only unless `keep`, the file is removed. `force` overwrites, follows links and accepts any kind of
    file. `options` are those of `codec.compress`; without a salt the same file gives the same archive, and a pipe
    another one each time. To standard output the file is always kept.

    Raises:
        Skipped: gzip's reasons to leave a file alone: a folder, a link, a name that ends in ".llmc" already, an output
            that exists. Error: everything else, in one line.
    """
    path = os.fspath(source)
    if output is None:
        output = _archive_name(path, force)

    def work(file: BinaryIO, target: BinaryIO, progress: _Progress) -> StreamSummary:
        salt = options.pop("salt", None)
        if salt is None and path != STANDARD_STREAM and file.seekable():
            # Read twice, so that the same file gives the same archive.
            salt = salt_of(iter(lambda: file.read(_BLOCK_BYTES), b""))
            file.seek(0)
        sampled = _GzipSample(path, file)
        reports: dict[str, Any] = {"on_bytes": progress.on_bytes, "on_ahead": progress.on_ahead}
        progress.on_written = sampled.compare
        summary = compress_stream(cast(BinaryIO, sampled), target, model, salt=salt, **reports, **options)
        sampled.compare(summary.content_bytes, summary.archive_bytes, is_all=True)
        return summary

    return _convert(path, os.fspath(output), work, _Options(keep, force, progress, "compress"))


def decompress_file(
    source: str | os.PathLike[str],
    model: Any = None,
    *,
    output: str | os.PathLike[str] | None = None,
    keep: bool = True,
    force: bool = False,
    progress: bool = True,
    lanes: int | None = None,
    device: str | None = None,
    download: bool = False,
) -> FileReport:
    """Decompress an archive to `output`, by default its name without ".llmc"; otherwise as `compress_file`.

    `device` and `download`: as in `codec.decompress`.

    Raises:
        CorruptArchive, ModelMismatch, Skipped, Error: and then nothing was written, except to standard output.
    """
    path = os.fspath(source)
    output = _content_name(path) if output is None else os.fspath(output)

    def work(file: BinaryIO, target: BinaryIO, progress: _Progress) -> StreamSummary:
        options: dict[str, Any] = {"lanes": lanes, "device": device, "download": download}
        return decompress_stream(file, target, model, on_bytes=progress.on_bytes, **options)

    return _convert(path, output, work, _Options(keep, force, progress, "decompress"))


def test_file(
    source: str | os.PathLike[str],
    model: Any = None,
    *,
    progress: bool = True,
    device: str | None = None,
    download: bool = False,
) -> FileReport:
    """Decode the whole archive and keep nothing. CorruptArchive or ModelMismatch where `decompress_file` would fail."""
    path = os.fspath(source)

    def work(file: BinaryIO, target: BinaryIO, progress: _Progress) -> StreamSummary:
        return decompress_stream(file, target, model, device=device, download=download, on_bytes=progress.on_bytes)

    with Path(os.devnull).open("wb") as nowhere:
        return _run(path, "", nowhere, work, _Options(True, True, progress, "test"))


def salvage_file(
    source: str | os.PathLike[str],
    model: Any = None,
    *,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool = True,
    device: str | None = None,
    download: bool = False,
) -> tuple[FileReport, SalvageSummary]:
    """Write the intact segments of a damaged archive, one behind the other; the archive is always kept.

    The summary's `lost` has the ranges of bytes of the original that are missing. CorruptArchive where all of them are.
    """
    path = os.fspath(source)
    output = _content_name(path) if output is None else os.fspath(output)
    found: list[SalvageSummary] = []

    def work(file: BinaryIO, target: BinaryIO, progress: _Progress) -> StreamSummary:
        if not file.seekable():
            raise Error(f"{path}: a damaged archive is searched, which a pipe does not allow")
        found.append(salvage_stream(file, target, model, device=device, download=download, on_bytes=progress.on_bytes))
        if found[0].lost and not found[0].n_segments:
            raise CorruptArchive("no segment of the archive is intact: nothing is written")
        return StreamSummary(found[0].content_bytes, file.seek(0, os.SEEK_END), found[0].n_segments, 0)

    report = _convert(path, output, work, _Options(True, force, progress, "salvage"))
    return report, found[0]


# Names.


def _archive_name(path: str, force: bool) -> str:
    if path == STANDARD_STREAM:
        return STANDARD_STREAM
    if path.endswith(SUFFIX) and not force:
        raise Skipped(f"{path} already has the suffix {SUFFIX}: unchanged")
    return path + SUFFIX


def _content_name(path: str) -> str:
    if path == STANDARD_STREAM:
        return STANDARD_STREAM
    if not path.endswith(SUFFIX) or Path(path).name == SUFFIX:
        raise Skipped(f"{path} has not the suffix {SUFFIX}: unchanged (name the output with -o)")
    return path.removesuffix(SUFFIX)


# One file.


class _Options(NamedTuple):
    keep: bool
    force: bool
    progress: bool
    verb: str


Work = Callable[[BinaryIO, BinaryIO, "_Progress"], StreamSummary]


def _convert(path: str, output: str, work: Work, options: _Options) -> FileReport:
    if output == STANDARD_STREAM:
        return _to_standard_output(path, work, options)
    target_path = Path(output)
    with error_of_path(output), contextlib.suppress(FileNotFoundError):
        target_path.lstat()  # fails for a name that is too long
    if target_path.is_dir():
        raise Error(f"{output} is a folder; expected the name of a file to write")
    if os.path.lexists(output) and not options.force:
        raise Skipped(f"{output} exists already: not overwritten (-f overwrites)")
    if path != STANDARD_STREAM and target_path.exists() and target_path.samefile(path):
        raise Error(f"{path} would be overwritten by its own output")
    is_special = target_path.exists() and not target_path.is_file()
    # What is read from a file gets that file's mode at the end; until then it is nobody else's.
    has_mode = path != STANDARD_STREAM and not is_special
    beside = written_beside(target_path, replace=options.force, private=has_mode)
    with _signals_raise(), error_of_path(output), _written_to(target_path) if is_special else beside as target:
        report = _run(path, output, target, work, options)
        if has_mode:
            _copy_attributes(path, target)
    if path != STANDARD_STREAM and not options.keep:
        with error_of_path(path):
            Path(path).unlink()
    return report


@contextlib.contextmanager
def _written_to(path: Path) -> Iterator[BinaryIO]:
    """A device or a pipe, which takes what it is given: to rename a file over it would put an end to it."""
    with path.open("wb") as file:
        yield file


def _to_standard_output(path: str, work: Work, options: _Options) -> FileReport:
    if sys.stdout is None:
        raise Error("standard output is closed: name a file with -o")
    if options.verb == "compress" and sys.stdout.isatty() and not options.force:
        raise Error("compressed bytes are not written to a terminal: redirect them, or name a file with -o")
    try:
        report = _run(path, STANDARD_STREAM, sys.stdout.buffer, work, options._replace(keep=True))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # What is still buffered must not fail a second time when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Error("standard output was closed by its reader") from None
    return report


def _run(path: str, output: str, target: BinaryIO, work: Work, options: _Options) -> FileReport:
    started = time.perf_counter()
    with _opened(path, options) as file:
        counted = _Counted(target)
        with (
            _Progress(path, file, counted, options) as progress,
            error_of_path(path if options.verb == "test" else output),
        ):
            summary = work(file, cast(BinaryIO, counted), progress)
    return FileReport(path, output, *summary, seconds=time.perf_counter() - started)


class _Progress:
    """The bar of one file: bytes of the original, and the ratio of what is known of it by now.

    While an archive is written that is what stands there over what it stands for; one that is read tells both at its
    end, and a pipe tells nothing. `on_written` is called with bytes of the original and of their archive.
    """

    def __init__(self, path: str, file: BinaryIO, target: _Counted, options: _Options):
        from llmcomp.progress import tqdm

        self._target, self._is_compressing = target, options.verb == "compress"
        total = _content_size(file, options.verb)
        # From the first moment on: a model may take seconds for its first bytes.
        self._bar = tqdm(
            total=total,
            desc=Path(path).name,
            unit="B",
            unit_scale=True,
            disable=not options.progress,
            leave=False,
            mininterval=0.2,
        )
        self._n_bytes = 0
        self.on_written: Callable[[int, int], Any] | None = None
        if not self._is_compressing and total:
            self._bar.set_postfix_str(f"ratio {_file_size(file) / total:.3f}")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_bytes(self, n_bytes: int) -> None:
        """So many more bytes of the original are done."""
        self._n_bytes += n_bytes
        if self._is_compressing and self._n_bytes:
            self._bar.set_postfix_str(f"ratio {self._target.n_bytes / self._n_bytes:.3f}", refresh=False)
        self._move_to(self._n_bytes)
        if self.on_written is not None:
            self.on_written(self._n_bytes, self._target.n_bytes)

    def on_ahead(self, n_bytes: int) -> None:
        """So many more than those that are done are nearly done."""
        self._move_to(self._n_bytes + n_bytes)

    def _move_to(self, n_bytes: int) -> None:
        self._bar.update(max(0, n_bytes - self._bar.n))


class _GzipSample:
    """A file that is read, and what gzip makes of its beginning: of prose a model makes less, of much else more."""

    def __init__(self, path: str, file: BinaryIO):
        self._path, self._file = path, file
        self._start = bytearray()
        self._is_compared = False

    def read(self, n_bytes: int = -1) -> bytes:
        data = self._file.read(n_bytes)
        self._start += data[: max(0, _SAMPLED_BYTES - len(self._start))]
        return data

    def compare(self, content_bytes: int, archive_bytes: int, is_all: bool = False) -> None:
        """Warns once if gzip is smaller, as soon as a megabyte is coded, or all there is."""
        if self._is_compared or not (is_all or content_bytes >= _SAMPLED_BYTES) or content_bytes < _SAMPLED_BYTES_MIN:
            return
        self._is_compared = True
        sample = bytes(self._start)
        gzip_bytes = len(zlib.compress(sample, 9)) + _GZIP_FRAME_BYTES
        ours = archive_bytes * len(sample) // content_bytes
        if gzip_bytes < ours:
            warnings.warn(
                f"{self._path}: gzip -9 makes {gzip_bytes:,} bytes of the first {len(sample):,}, this model {ours:,}; "
                "the bundled models are for prose",
                stacklevel=2,
            )


@contextlib.contextmanager
def _opened(path: str, options: _Options) -> Iterator[BinaryIO]:
    if path == STANDARD_STREAM:
        if sys.stdin is None:
            raise Error("standard input is closed: name a file to read")
        yield sys.stdin.buffer
        return
    with error_of_path(path):
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise Skipped(f"{path} is a folder: ignored")
        # What would be removed must be the file itself, and the only name of it.
        is_sole = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and not Path(path).is_symlink()
        if not (options.keep or options.force or is_sole):
            raise Skipped(f"{path} is a link, has other links or is no regular file: ignored (-k or -f takes it)")
        file = Path(path).open("rb")  # noqa: SIM115
    with file:
        yield file


class _Counted:
    """A binary file that counts the bytes written to it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.n_bytes = 0

    def write(self, data: bytes) -> int:
        self.n_bytes += len(data)
        return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def seekable(self) -> bool:
        return self._file.seekable()


def _file_size(file: BinaryIO) -> int:
    at = file.tell()
    try:
        return file.seek(0, os.SEEK_END) - at
    finally:
        file.seek(at)


def _content_size(file: BinaryIO, verb: str) -> int | None:
    """How many original bytes will pass, if that can be known before."""
    if not file.seekable():
        return None
    at = file.tell()
    try:
        return file.seek(0, os.SEEK_END) - at if verb == "compress" else ArchiveIndex(file).trailer.content_bytes
    except CorruptArchive:
        return None
    finally:
        file.seek(at)


def _copy_attributes(path: str, target: BinaryIO) -> None:
    """Owner (where allowed), mode and times, as far as the file system takes them."""
    status = Path(path).stat()
    target.flush()
    with contextlib.suppress(OSError):
        os.fchown(target.fileno(), status.st_uid, status.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(target.fileno(), stat.S_IMODE(status.st_mode))
    with contextlib.suppress(OSError):
        os.utime(target.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Termination and hang-up end the program by way of its clean-up, as an interrupt does; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signals = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in signals:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)

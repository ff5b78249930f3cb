"""Fetches published data sets into the cache folder: resumable, checked, and never half there.

Only downloading and unpacking; cutting into chunks is `llmcomp.datasets`'s work. A data set's final name appears in
the cache by one rename, after its checksum was found right; whatever is unfinished ends in `.part`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import platformdirs
import requests

from llmcomp.atomic_write import written_beside
from llmcomp.errors import DatasetError, named
from llmcomp.progress import tqdm

_BLOCK_BYTES = 1 << 20
_RECEIVED_BLOCK_BYTES = 1 << 14  # a lost connection throws away less than this
_TIMEOUT_S = (10, 60)  # to connect, between two blocks


@dataclass(frozen=True)
class Remote:
    """Where a data set's archive lies, and how to know that it is whole.

    `checksum` ("md5:..." or "sha256:...") is the archive's, `content_checksum` that of the one file inside.
    """

    url: str
    archive_bytes: int
    unpacked_bytes: int
    folder: str
    checksum: str | None = None
    content_checksum: str | None = None


IMAGENET_REPOSITORY = "ILSVRC/imagenet-1k"
# Two layouts of that repository are known: one tar of JPEG files, and Parquet files with the JPEG files in a column.
IMAGENET_FILES = ("data/val_images.tar.gz", "data/validation-*.parquet")

REMOTES: dict[str, Remote] = {
    # http://mattmahoney.net/dc/textdata.html states size and MD5 of the file inside (a1fa5ffd...b36a).
    "enwik8": Remote(
        url="https://mattmahoney.net/dc/enwik8.zip",
        archive_bytes=36_445_475,
        unpacked_bytes=100_000_000,
        folder="enwik8",
        content_checksum="sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    ),
    # https://www.openslr.org/resources/12/md5sum.txt
    "librispeech": Remote(
        url="https://www.openslr.org/resources/12/dev-clean.tar.gz",
        archive_bytes=337_926_286,
        unpacked_bytes=340_000_000,
        folder="librispeech-dev-clean",
        checksum="md5:42e2234ba48799c1f50f24a7926300a1",
    ),
    # Size of ILSVRC2012_img_val.tar, as an estimate of what the repository's files take.
    "imagenet": Remote(
        url="https://huggingface.co",
        archive_bytes=6_744_924_160,
        unpacked_bytes=0,
        folder="imagenet-val",
    ),
}


def cache_folder() -> Path:
    """Where fetched data sets lie: `LLMCOMP_CACHE`, or the platform's cache folder. It may be moved as a whole."""
    return Path(os.environ.get("LLMCOMP_CACHE") or platformdirs.user_cache_dir("llmcomp"))


def fetched_path(name: str) -> Path | None:
    """The file or folder of a data set that was fetched whole, else None."""
    path = cache_folder() / REMOTES[name].folder
    return path if path.exists() else None


def fetch(name: str, base_url: str | None = None, progress: bool = True) -> Path:
    """Download and check the data set "enwik8", "librispeech" (dev-clean) or "imagenet" (validation); its path.

    What is there already is not fetched again; an interrupted download goes on where it stopped. `base_url`, or the
    variable `LLMCOMP_DATA_URL`, names a mirror: a folder with the same archives, for "imagenet" a server with the
    layout of huggingface.co (else `HF_ENDPOINT`; the set is gated: `HF_TOKEN` or `hf auth login` is needed).
    `DatasetError` says what went wrong and what to do.
    """
    if name not in REMOTES:
        raise DatasetError(f"no data set {name!r} can be fetched; there are {', '.join(REMOTES)}")
    found = fetched_path(name)
    if found is not None:
        return found
    base_url = base_url or os.environ.get("LLMCOMP_DATA_URL") or None
    remote, target = REMOTES[name], cache_folder() / REMOTES[name].folder
    with _errors_name(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "imagenet":
            return _fetch_imagenet(target, base_url, progress)
        archive_name = remote.url.rsplit("/", 1)[1]
        url = remote.url if base_url is None else f"{base_url.rstrip('/')}/{archive_name}"
        archive = target.with_name(archive_name)
        download(url, archive, remote.archive_bytes, remote.checksum, progress=progress)
        _check_space(target.parent, remote.unpacked_bytes)
        unpack = _unpack_zip if archive.suffix == ".zip" else _unpack_speech
        try:
            unpack(archive, target, remote, progress)
        # Also of compressions that Python lacks, and of zips that ask for a password.
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            if isinstance(error, DatasetError):
                raise
            archive.unlink()
            raise DatasetError(f"{url}: the archive is damaged ({error}); fetch it again") from error
        archive.unlink()
    return target


def download(
    url: str,
    path: Path,
    n_bytes: int,
    checksum: str | None = None,
    *,
    progress: bool = True,
    attempts: int = 5,
    wait_s: float = 1.0,
) -> Path:
    """Download `url` to `path`, which appears when all `n_bytes` are there and `checksum` is right, and not before.

    What came so far is kept in `path`.part and is not asked for again (HTTP ranges). A lost connection is tried
    again until `attempts` in a row bring nothing, after `wait_s`, 2 `wait_s`, 4 `wait_s` ... seconds.
    """
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    with _locked(part) as file:
        resumed = part.stat().st_size > 0
        _complete(url, file, part, n_bytes, progress=progress, attempts=attempts, wait_s=wait_s)
        if resumed and checksum and _checksum(part, checksum) != checksum:
            # The server's file may have changed since the part was fetched.
            file.truncate(0)
            _complete(url, file, part, n_bytes, progress=progress, attempts=attempts, wait_s=wait_s)
        if checksum and (found := _checksum(part, checksum)) != checksum:
            part.unlink()
            raise DatasetError(f"{url}: wrong checksum: found {found}, expected {checksum}; nothing was kept")
        os.fsync(file.fileno())
        part.replace(path)
    return path


def _complete(
    url: str, file: BinaryIO, part: Path, n_bytes: int, *, progress: bool, attempts: int, wait_s: float
) -> None:
    failures = 0
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc=part.stem, disable=not progress, delay=2) as bar:
        while (before := part.stat().st_size) < n_bytes:
            _check_space(part.parent, n_bytes - before)
            bar.update(before - bar.n)
            try:
                _append(url, file, before, n_bytes, bar)
                reason = "the connection ended early"
            except requests.RequestException as error:
                reason = str(error)
            now = part.stat().st_size
            failures = 0 if now > before else failures + 1
            if failures == attempts:
                raise DatasetError(
                    f"{url}: got {now:,} of {n_bytes:,} bytes, then: {reason}; they are kept in {part}, "
                    "and the same command goes on from there"
                )
            if now < n_bytes:
                time.sleep(wait_s * 2**failures)


def _append(url: str, file: BinaryIO, start: int, n_bytes: int, bar: tqdm) -> None:
    """One request for the bytes from `start` on, written behind the `start` bytes that `file` holds."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        if 400 <= response.status_code < 500:
            raise DatasetError(f"{url}: the server answers {response.status_code} {response.reason}")
        response.raise_for_status()
        if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # a server without ranges sends everything again
            file.truncate(0)
            bar.update(-bar.n)
        offered = response.headers.get("Content-Length", str(n_bytes - start)).strip()
        if not (offered.isascii() and offered.isdigit() and len(offered) < 20):
            raise DatasetError(f"{url}: the server offers {named(offered)} bytes, expected {n_bytes - start:,}")
        if start + int(offered) != n_bytes:
            raise DatasetError(f"{url}: the server offers {start + int(offered):,} bytes, expected {n_bytes:,}")
        for block in response.iter_content(_RECEIVED_BLOCK_BYTES):
            _write(file, block)
            bar.update(len(block))


def _write(file: BinaryIO, block: bytes) -> None:
    rest = memoryview(block)
    while rest:  # a file without a buffer may take less than it is given
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """`part`, open to append without a buffer; one process at a time."""
    with _errors_name(part), part.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(f"{part}: another process is downloading it") from None
        yield file


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Failures of the file system as a DatasetError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DatasetError(f"{path.parent}: the disk is full; make room and run the same command again") from error
        raise DatasetError(f"{path}: cannot be written: {error.strerror or error}") from error


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DatasetError(
            f"{folder}: the disk is too full: {free_bytes:,} bytes free, {needed_bytes:,} needed; "
            "make room, or set LLMCOMP_CACHE to another folder"
        )


def _checksum(path: Path, like: str) -> str:
    """The file's checksum, written as `like` is: "algorithm:hex"."""
    algorithm = like.partition(":")[0]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


def _unpack_zip(archive: Path, target: Path, remote: Remote, progress: bool) -> None:
    algorithm, _, expected = (remote.content_checksum or "").partition(":")
    digest = hashlib.new(algorithm or "sha256", usedforsecurity=False)
    with (
        zipfile.ZipFile(archive) as file,
        tqdm(total=remote.unpacked_bytes, unit="B", unit_scale=True, disable=not progress, delay=2) as bar,
    ):
        if target.name not in file.namelist():
            raise zipfile.BadZipFile(f"no file {target.name} in it")
        with file.open(target.name) as packed, written_beside(target) as unpacked:
            while block := packed.read(_BLOCK_BYTES):
                _write(unpacked, block)
                digest.update(block)
                bar.update(len(block))
                if unpacked.tell() > remote.unpacked_bytes:
                    raise zipfile.BadZipFile(f"{target.name} has more than {remote.unpacked_bytes:,} bytes")
            if expected and digest.hexdigest() != expected:
                found = f"found {algorithm}:{digest.hexdigest()}, expected {remote.content_checksum}"
                raise zipfile.BadZipFile(f"wrong checksum of {target.name}: {found}")


def _unpack_speech(archive: Path, target: Path, remote: Remote, progress: bool) -> None:
    """The FLAC files of a LibriSpeech archive, all in one folder: their names have speaker and chapter."""
    part = target.with_name(target.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    with (
        tarfile.open(archive, "r:gz") as tar,
        tqdm(desc=target.name, unit="file", disable=not progress, delay=2) as bar,
    ):
        for member in tar:
            packed = tar.extractfile(member) if member.isfile() and member.name.endswith(".flac") else None
            if packed is not None:
                with (part / Path(member.name).name).open("wb") as unpacked:
                    while block := packed.read(_BLOCK_BYTES):
                        _write(unpacked, block)
                bar.update()
    if not any(part.iterdir()):
        raise tarfile.TarError("no FLAC file in it")
    part.replace(target)


def _fetch_imagenet(target: Path, endpoint: str | None, progress: bool) -> Path:
    """The validation images as the gated Hugging Face set has them; resumed and checked by huggingface_hub."""
    import huggingface_hub
    from huggingface_hub import errors as hub_errors
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    part = target.with_name(target.name + ".part")
    part.mkdir(exist_ok=True)
    _check_space(
        part, REMOTES["imagenet"].archive_bytes - sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
    )
    try:
        huggingface_hub.snapshot_download(
            IMAGENET_REPOSITORY,
            repo_type="dataset",
            allow_patterns=list(IMAGENET_FILES),
            local_dir=part,
            endpoint=endpoint,
        )
    except hub_errors.LocalEntryNotFoundError as error:
        raise DatasetError(f"{IMAGENET_REPOSITORY}: the server cannot be reached ({_first_line(error)})") from error
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise DatasetError(
                f"{IMAGENET_REPOSITORY}: access refused; accept its terms at "
                f"https://huggingface.co/datasets/{IMAGENET_REPOSITORY} and set HF_TOKEN"
            ) from error
        raise DatasetError(f"{IMAGENET_REPOSITORY}: {_first_line(error)}") from error
    except Exception as error:  # errors of its HTTP library, which differs between versions, pass through it
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's
        raise DatasetError(
            f"{IMAGENET_REPOSITORY}: {_first_line(error)}; the same command goes on from what is in {part}"
        ) from error
    if not any((part / "data").glob("*")):
        raise DatasetError(f"{IMAGENET_REPOSITORY}: has none of the files {', '.join(IMAGENET_FILES)}")
    shutil.rmtree(part / ".cache", ignore_errors=True)
    part.replace(target)
    return target


def _first_line(error: Exception) -> str:
    return str(error.__cause__ or error).strip().partition("\n")[0]

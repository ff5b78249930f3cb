"""The Hugging Face hub: listings and downloads of models, with its errors in one line. Nothing else asks the hub."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llmcomp.errors import Error
from llmcomp.models.registry import near_names

_Answer = TypeVar("_Answer")

# A hub that is busy or limits requests is asked again: so often, and after at most so many seconds each time.
_ATTEMPTS = 6
# Lists of files that are asked for side by side.
REQUESTS_AT_ONCE = 4
_LONGEST_WAIT_S = 300.0
_BUSY = (408, 429, 500, 502, 503, 504)
# What requests and httpx call a connection that ends within a file; huggingface_hub keeps what came and goes on there.
_BROKEN_OFF = ("ChunkedEncodingError", "RemoteProtocolError", "ReadError", "ReadTimeout")


class HubUnreachable(Error):
    """The hub did not answer, and what was asked for is not in the cache."""


class GatedModel(Error):
    """The hub shows the model only to those who accepted its terms."""


class NoSuchRevision(Error):
    """The hub has the model, but no such branch, tag or commit."""


class DownloadNeeded(Error):
    """A model that a file names is not in the cache: it is downloaded only if the user says so."""


class SourceFile(NamedTuple):
    """One file of a checkpoint. `digest` is None until somebody needs it (local files are hashed then)."""

    name: str
    n_bytes: int
    digest: str | None
    cached: bool


class Revision(NamedTuple):
    """A revision as the hub has it now; `is_gated`: its files need more than a look at the list."""

    commit: str
    files: dict[str, SourceFile]
    is_gated: bool = False


def list_revision(repo: str, revision: str) -> Revision:
    """Commit, names, sizes and digests of a revision's files, in one request."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().model_info(repo, revision=revision, files_metadata=True)

    info = _patiently(ask, repo, f"{repo} {revision}")
    files = {
        file.rfilename: SourceFile(
            file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs is not None else file.blob_id, False
        )
        for file in info.siblings or ()
    }
    return Revision(info.sha or revision, files, bool(getattr(info, "gated", False)))


def hub_listing(repo: str, commit: str) -> dict[str, SourceFile] | None:
    """The files of `list_revision`, or None where the hub cannot be reached."""
    try:
        return list_revision(repo, commit).files
    except HubUnreachable:
        return None


def list_branches(repo: str) -> dict[str, str]:
    """The commits of all branches of a model, by name, in one request."""
    from huggingface_hub import HfApi

    refs = _patiently(lambda: HfApi().list_repo_refs(repo), repo, repo)
    return {branch.name: branch.target_commit for branch in refs.branches}


def hub_cached(repo: str, filename: str, revision: str, cache_dir: Path | None = None) -> Path | None:
    """Where the cache has a file, or None; the hub is not asked."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repo, filename, cache_dir or constants.HF_HUB_CACHE, revision)
    return Path(found) if isinstance(found, str) else None


def hub_download(repo: str, filename: str, revision: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    def fetch() -> Path:
        return Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir))

    return _patiently(fetch, repo, f"{repo} {revision}", filename)


def _patiently(ask: Callable[[], _Answer], repo: str, label: str, filename: str = "files") -> _Answer:
    """What `ask` answers; asked again where the hub is busy or limits requests, after the time that it says, and where
    a connection broke off."""
    for attempt in range(_ATTEMPTS):
        try:
            with _hub_errors(repo, label, filename):
                return ask()
        except _Busy as busy:
            if attempt == _ATTEMPTS - 1:
                raise HubUnreachable(f"{label}: {busy}; the same command goes on from what is there") from None
            wait = 2.0**attempt if busy.wait_s is None else busy.wait_s
            time.sleep(min(wait, _LONGEST_WAIT_S))
    raise AssertionError("the loop returns or raises")


class _Busy(Error):
    """Worth to ask again. `wait_s`: what the hub says to wait, None if nothing."""

    def __init__(self, message: str, wait_s: float | None):
        super().__init__(message)
        self.wait_s = wait_s


def _as_busy(error: BaseException) -> _Busy | None:
    """A connection that broke off, or the status of a hub that is busy, wherever in the chain of causes it is."""
    if type(error).__name__ in _BROKEN_OFF:
        return _Busy(f"the connection broke off ({_first_line(error)})", None)
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        status = getattr(response, "status_code", None)
        if status in _BUSY:
            said = response.headers.get("Retry-After", "") if response is not None else ""
            what = "limits requests (429)" if status == 429 else f"is busy ({status})"
            return _Busy(f"the hub {what}", float(said) if said.isdigit() else None)
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def _hub_errors(repo: str, label: str, filename: str = "files") -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import constants, errors

    # Below huggingface_hub is requests, httpx or httpx2, depending on its version.
    bases = {"requests": "RequestException", "httpx": "HTTPError", "httpx2": "HTTPError"}
    transports = tuple(getattr(sys.modules[name], base) for name, base in bases.items() if name in sys.modules)
    try:
        yield
    except errors.GatedRepoError:
        raise GatedModel(f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo} and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise Error(
            f"{constants.ENDPOINT} has no model {repo}, or it is private (HF_TOKEN){near_names(repo)}"
        ) from None
    except errors.RevisionNotFoundError:
        raise NoSuchRevision(f"{label}: the hub has no such revision") from None
    except errors.HFValidationError as error:
        raise Error(f"{repo!r} is no name of a model on the hub: {error}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if busy := _as_busy(error):
            raise busy from None
        why = f"{constants.ENDPOINT} cannot be reached ({_first_line(error.__cause__ or error)})"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why
        raise HubUnreachable(f"{label}: {filename} is not in the cache {constants.HF_HUB_CACHE} and {why}") from None
    except errors.EntryNotFoundError:
        raise Error(f"{label} holds no {filename}: not a model in Hugging Face's layout") from None
    except transports as error:
        if busy := _as_busy(error):
            raise busy from None
        raise HubUnreachable(f"{label}: the download failed and can be started again: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

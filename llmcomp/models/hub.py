"""The Hugging Face hub: listings and downloads of models, with its errors in one line. Nothing else asks the hub."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llmcomp.errors import Error
from llmcomp.models.registry import near_names


class HubUnreachable(Error):
    """The hub did not answer, and what was asked for is not in the cache."""


class DownloadNeeded(Error):
    """A model that a file names is not in the cache: it is downloaded only if the user says so."""


class SourceFile(NamedTuple):
    """One file of a checkpoint. `digest` is None until somebody needs it (local files are hashed then)."""

    name: str
    n_bytes: int
    digest: str | None
    cached: bool


def hub_listing(repo: str, commit: str, label: str) -> dict[str, SourceFile] | None:
    """Names, sizes and digests of a revision's files, or None where the hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        with _hub_errors(repo, label):
            info = HfApi().model_info(repo, revision=commit, files_metadata=True)
    except HubUnreachable:
        return None
    return {
        file.rfilename: SourceFile(
            file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs is not None else file.blob_id, False
        )
        for file in info.siblings or ()
    }


def hub_cached(repo: str, filename: str, revision: str) -> Path | None:
    """Where the cache has a file, or None; the hub is not asked."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repo, filename, constants.HF_HUB_CACHE, revision)
    return Path(found) if isinstance(found, str) else None


def hub_download(repo: str, filename: str, revision: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo, f"{repo} {revision}", filename):
        return Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir))


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
        raise Error(f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo} and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise Error(
            f"{constants.ENDPOINT} has no model {repo}, or it is private (HF_TOKEN){near_names(repo)}"
        ) from None
    except errors.RevisionNotFoundError:
        raise Error(f"{label}: the hub has no such revision") from None
    except errors.HFValidationError as error:
        raise Error(f"{repo!r} is no name of a model on the hub: {error}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = f"{constants.ENDPOINT} cannot be reached ({_first_line(error.__cause__ or error)})"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why
        raise HubUnreachable(f"{label}: {filename} is not in the cache {constants.HF_HUB_CACHE} and {why}") from None
    except errors.EntryNotFoundError:
        raise Error(f"{label} holds no {filename}: not a model in Hugging Face's layout") from None
    except transports as error:
        raise HubUnreachable(f"{label}: the download failed and can be started again: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

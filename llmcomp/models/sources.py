"""Where a checkpoint is and what it weighs: bundled, in a folder, or at a revision of the hub.

A `ModelSource` says what would be loaded (files, sizes, digests) before anything large is read or downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import operator
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcomp import pico
from llmcomp.errors import Error
from llmcomp.float_state import ieee_state
from llmcomp.models.hub import SourceFile, hub_download, hub_listing
from llmcomp.models.registry import check_step, list_models, near_names

_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_STEP_FOLDER = re.compile(r"(?:step|checkpoint-)(\d+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HASH_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class ModelSource:
    """One checkpoint, found but not loaded: in `folder`, or in `repo` of the hub at `commit`."""

    name: str
    step: int | None
    files: tuple[SourceFile, ...]
    folder: Path | None = None
    repo: str | None = None
    commit: str | None = None
    cache_dir: Path | None = None
    tokenizer_path: Path | None = None

    @property
    def label(self) -> str:
        return self.name if self.step is None else f"{self.name} step {self.step}"

    @property
    def bytes_to_download(self) -> int:
        return sum(file.n_bytes for file in self.files if not file.cached)

    @property
    def weight_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files if _is_weight_file(file.name))

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 over names and digests of all files: equal exactly where the same checkpoint would be loaded."""
        lines = [f"{file.name} {self._digest(file)}" for file in sorted(self.files)]
        if self.tokenizer_path is not None:
            lines.append(f"tokenizer.json {_file_digest(self.tokenizer_path)}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @functools.cached_property
    def weights_digest(self) -> str:
        """SHA-256 over the digests of the weight files alone: equal weights stored in one form have equal digests."""
        digests = [self._digest(file) for file in sorted(self.files) if _is_weight_file(file.name)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def _digest(self, file: SourceFile) -> str:
        if file.digest is not None:
            return file.digest
        if self.folder is None:
            raise Error(f"{self.label}: the hub states no digest of {file.name}")
        return _file_digest(self.folder / file.name)

    @ieee_state()
    def read_config(self) -> dict[str, Any]:
        """The checkpoint's config.json; of a hub checkpoint only that file is downloaded."""
        path = self.folder / "config.json" if self.folder else self._download("config.json")
        try:
            config = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Error(f"{self.label}: {path} cannot be read as JSON: {error}") from None
        if not isinstance(config, dict):
            raise Error(f"{self.label}: {path} holds a {type(config).__name__}, expected an object")
        return config

    def find_tokenizer(self) -> Path | None:
        """The checkpoint's tokenizer.json; of a hub checkpoint only that file is downloaded. None: it has none."""
        if self.tokenizer_path is not None or not any(file.name == "tokenizer.json" for file in self.files):
            return self.tokenizer_path
        return self.folder / "tokenizer.json" if self.folder else self._download("tokenizer.json")

    def fetch(self) -> Path:
        """The folder with all files of the checkpoint; downloads what is not in the cache."""
        if self.folder is not None:
            return self.folder
        # Small files first: an interrupted download then never leaves weights without their tokenizer.
        for file in sorted(self.files, key=lambda file: file.n_bytes):
            path = self._download(file.name)
        return path.parent

    def _download(self, filename: str) -> Path:
        assert self.repo is not None and self.commit is not None
        return hub_download(self.repo, filename, self.commit, self.cache_dir)


def find_model(
    name: str | os.PathLike[str],
    step: int | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ModelSource:
    """Where a checkpoint is and what it weighs; of a hub checkpoint only config.json is downloaded.

    `name` is a bundled model, a folder, a name of the registry with or without its owner, or "owner/model" on the hub
    (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are respected). `step` chooses the revision "step<step>"
    there; `revision` names any other branch, tag or commit. Raises `Error` for whatever cannot be found.
    """
    text = os.fspath(name)
    step = None if step is None else as_step(step)
    if text in pico.MODEL_STEPS:
        return _bundled_source(text, step)
    path = Path(text).expanduser()
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return _folder_source(path, step, revision)
    if isinstance(name, os.PathLike) or path.is_absolute() or text.startswith((".", "~")):
        found = "a file, not a folder" if os.path.lexists(path) else "nothing"
        raise Error(f"no model folder at {text}: found {found}, expected config.json and model.safetensors in a folder")
    entry = next((entry for entry in list_models() if text in (entry.name, entry.name.rpartition("/")[2])), None)
    if entry is None and not _HUB_NAME.fullmatch(text):
        raise Error(f"no model is called {text!r}{near_names(text)}; see `llmcomp models`")
    if entry is not None and revision is None:
        step = entry.steps[-1] if step is None else step
        check_step(entry.name, step, entry.steps)
    return _hub_source(entry.name if entry else text, step, revision, Path(cache_dir) if cache_dir else None)


def as_step(step: Any) -> int:
    """A training step as an int, of whatever type the integer is; anything else is an `Error`."""
    try:
        return operator.index(step)
    except TypeError:
        raise Error(f"step is {step!r}, expected an integer") from None


def _bundled_source(name: str, step: int | None) -> ModelSource:
    step = pico.STEPS[-1] if step is None else step
    check_step(name, step, pico.MODEL_STEPS[name])
    folder = pico.suite_folder(name, step)
    files = _folder_files(folder, f"{name} step {step}")
    return ModelSource(name, step, files, folder=folder, tokenizer_path=pico.tokenizer_path_of(name))


def _folder_source(path: Path, step: int | None, revision: str | None) -> ModelSource:
    """A checkpoint in `path`: the hub's cache layout, a folder of steps (step1000, checkpoint-1000), or the files."""
    path = path if path.is_absolute() else Path.cwd() / path
    if (path / "snapshots").is_dir():
        wanted = revision or ("main" if step is None else f"step{step}")
        return _source_in(_cached_repo(path), step, _cached_snapshot(path, wanted))
    if revision is not None:
        raise Error(f"{path} is a plain folder and has no revision {revision!r}; a step's folder is chosen with step=")
    steps = {
        int(match[1]): path / match[0] for child in path.iterdir() if (match := _STEP_FOLDER.fullmatch(child.name))
    }
    if steps and (step is not None or not (path / "config.json").is_file()):
        chosen = max(steps) if step is None else step
        check_step(str(path), chosen, tuple(sorted(steps)))
        return _source_in(path.name, chosen, steps[chosen])
    if own := _STEP_FOLDER.fullmatch(path.name):
        chosen = int(own[1]) if step is None else step
        check_step(str(path), chosen, (int(own[1]),))
        return _source_in(path.parent.name, chosen, path)
    name = _cached_repo(path.parent.parent) if path.parent.name == "snapshots" else path.name
    return _source_in(name, step, path)


def _cached_repo(path: Path) -> str:
    return path.name.removeprefix("models--").replace("--", "/")


def _source_in(name: str, step: int | None, folder: Path) -> ModelSource:
    name = os.fsencode(name).decode("utf-8", "replace")  # rows and archives hold text, a folder's name need not be it
    return ModelSource(name, step, _folder_files(folder, str(folder)), folder=folder)


def _cached_snapshot(path: Path, revision: str) -> Path:
    ref = path / "refs" / revision
    commit = ref.read_text("utf-8").strip() if ref.is_file() else revision
    snapshot = path / "snapshots" / commit
    if not snapshot.is_dir():
        known = sorted(str(found.relative_to(path / "refs")) for found in (path / "refs").rglob("*") if found.is_file())
        raise Error(f"{path} holds no revision {revision!r}; it holds {', '.join(known) or 'none'}")
    return snapshot


def _folder_files(folder: Path, label: str) -> tuple[SourceFile, ...]:
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return tuple(
        SourceFile(name, (folder / name).stat().st_size, None, True) for name in _checkpoint_files(names, label)
    )


def _checkpoint_files(names: Iterable[str], label: str) -> list[str]:
    """Which of a repository's or folder's files make the checkpoint; safetensors where both forms are there."""
    present = set(names)
    if "config.json" not in present:
        raise Error(f"{label} holds no config.json: not a model in Hugging Face's layout")
    chosen = ["config.json", *(["tokenizer.json"] if "tokenizer.json" in present else [])]
    for whole, index in zip(_WEIGHT_NAMES, _INDEX_NAMES, strict=True):
        if whole in present:
            return [*chosen, whole]
        stem, suffix = whole.split(".")
        shards = sorted(n for n in present if (m := _SHARD.fullmatch(n)) and m[1] == stem and m[4] == suffix)
        if index in present and shards:
            n_expected = int(_SHARD.fullmatch(shards[0])[3])  # type: ignore[index]
            if len(shards) != n_expected:
                raise Error(f"{label} holds {len(shards)} of {n_expected} shards of {whole}")
            return [*chosen, index, *shards]
    raise Error(f"{label} holds no weights: expected one of {', '.join((*_WEIGHT_NAMES, *_INDEX_NAMES))}")


def _is_weight_file(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _file_digest(path: Path) -> str:
    # In the hub's cache a file is a link to a blob that is named by its digest.
    if path.is_symlink() and path.readlink().parent.name == "blobs":
        return path.readlink().name
    status = path.stat()
    return _content_digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _content_digest(path: Path, n_bytes: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _hub_source(name: str, step: int | None, revision: str | None, cache_dir: Path | None) -> ModelSource:
    wanted = revision or ("main" if step is None else f"step{step}")
    snapshot = hub_download(name, "config.json", wanted, cache_dir).parent
    commit = snapshot.name
    label = f"{name} {wanted}"
    cached = {path.name for path in snapshot.iterdir()}
    with contextlib.suppress(Error):
        files = _checkpoint_files(cached, label)
        if "tokenizer.json" in files:
            return _hub_model(name, step, commit, cache_dir, _snapshot_files(snapshot, files))
    listed = hub_listing(name, commit, label)
    if listed is None:
        files = _checkpoint_files(cached, f"the cached part of {label} (the hub cannot be reached)")
        return _hub_model(name, step, commit, cache_dir, _snapshot_files(snapshot, files))
    chosen = _checkpoint_files(listed, label)
    files_there = tuple(listed[file]._replace(cached=file in cached) for file in chosen)
    return _hub_model(name, step, commit, cache_dir, files_there)


def _hub_model(
    name: str, step: int | None, commit: str, cache_dir: Path | None, files: tuple[SourceFile, ...]
) -> ModelSource:
    return ModelSource(name, step, files, repo=name, commit=commit, cache_dir=cache_dir)


def _snapshot_files(snapshot: Path, names: list[str]) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(name, (snapshot / name).stat().st_size, _file_digest(snapshot / name), True) for name in names
    )

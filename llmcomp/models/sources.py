"""Where a checkpoint is and what it weighs: bundled, in a folder, or at a revision of the hub.

A `ModelSource` says what would be loaded (files, sizes, digests) before anything large is read or downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmcomp import pico
from llmcomp.checked_json import is_file_name, read_bytes, read_object
from llmcomp.data.tokenizer_files import OTHER_FORMS, SETTINGS, find_tokenizer_file
from llmcomp.data.tokenizers import BYTES
from llmcomp.errors import Error, shown
from llmcomp.models import hub
from llmcomp.models.hub import DownloadNeeded, SourceFile, hub_cached, hub_download, hub_listing
from llmcomp.models.lock import Lock, LockedFile, LockedRevision
from llmcomp.models.registry import check_step, find_entry, known_steps, near_names, suite_models
from llmcomp.models.suite import Checkpoint, SuiteModel, checkpoints

_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_STEP_FOLDER = re.compile(r"(?:step|checkpoint-)(\d+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_REF_BYTES_MAX = 1 << 12
_HASH_BLOCK_BYTES = 1 << 22
# Of a weight as the suites store it (float16), for the size of what is not there yet.
_WEIGHT_BYTES = 2


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
    # What a suite says of it, if it is of one.
    checkpoint: Checkpoint | None = None
    has_byte_tokens: bool = False  # asked for, or of a bundled model

    @property
    def n_params(self) -> int | None:
        """All parameters, as the suite counts them; None if no suite does."""
        return self.checkpoint.model.n_params if self.checkpoint else None

    @property
    def label(self) -> str:
        return self.name if self.step is None else f"{self.name} step {self.step}"

    @property
    def bytes_to_download(self) -> int:
        return sum(file.n_bytes for file in self.files if not file.cached)

    @property
    def weight_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files if is_weight_file(file.name))

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 over names and digests of all files: equal exactly where the same checkpoint would be loaded."""
        lines = [f"{file.name} {self._digest(file)}" for file in sorted(self.files)]
        if self.tokenizer_path is not None:
            lines.append(f"tokenizer.json {self._path_digest(self.tokenizer_path)}")
        elif self.has_byte_tokens and any(file.name == "tokenizer.json" for file in self.files):
            lines.append("tokenizer.json is not used: tokens are bytes")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @functools.cached_property
    def weights_digest(self) -> str:
        """SHA-256 over the digests of the weight files alone: equal weights stored in one form have equal digests."""
        digests = [self._digest(file) for file in sorted(self.files) if is_weight_file(file.name)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def _digest(self, file: SourceFile) -> str:
        if file.digest is not None:
            return file.digest
        if self.folder is None:
            raise Error(f"{self.label}: the hub states no digest of {file.name}")
        return self._path_digest(self.folder / file.name)

    def _path_digest(self, path: Path) -> str:
        return _file_digest(path) if self.repo is None else _cached_digest(path)

    def read_config(self) -> dict[str, Any]:
        """The checkpoint's config.json; of a hub checkpoint only that file is downloaded."""
        path = self.folder / "config.json" if self.folder else self._fetch_named("config.json")
        try:
            return read_object(path)
        except Error as error:
            raise Error(f"{self.label}: {error}") from None

    @property
    def tokenizer_option(self) -> Path | str | None:
        """What an engine gets for the tokenizer: a file, "bytes", or None for that of the checkpoint's folder."""
        return BYTES if self.has_byte_tokens else self.tokenizer_path

    def find_tokenizer(self) -> Path | None:
        """The file that the tokenizer is read from; of a hub checkpoint only such files are downloaded. None: it has
        none."""
        names = {file.name for file in self.files}
        if self.has_byte_tokens or self.tokenizer_path is not None or not names & {"tokenizer.json", *OTHER_FORMS}:
            return self.tokenizer_path
        if self.folder is not None:
            return find_tokenizer_file(self.folder)
        beside = [self._fetch_named(name) for name in sorted(names & {"tokenizer.json", *OTHER_FORMS, SETTINGS})]
        return find_tokenizer_file(beside[0].parent)

    def with_tokenizer(self, tokenizer: str | os.PathLike[str] | None) -> ModelSource:
        """The same checkpoint with the tokenizer in a file, or with "bytes" as tokens; None changes nothing."""
        if tokenizer is None:
            return self
        if tokenizer == BYTES:
            return replace(self, tokenizer_path=None, has_byte_tokens=True)
        path = Path(tokenizer)
        if path.is_dir():
            path = find_tokenizer_file(path)
        if not path.is_file():
            raise Error(f'{path}: no tokenizer there; expected a file, its folder or "{BYTES}"')
        return replace(self, tokenizer_path=path, has_byte_tokens=False)

    def fetch(self) -> Path:
        """The folder with all files of the checkpoint; downloads what is not in the cache."""
        if self.folder is not None:
            return self.folder
        # Small files first: an interrupted download then never leaves weights without their tokenizer.
        for file in sorted(self.files, key=lambda file: file.n_bytes):
            path = self._fetch_file(file)
        return path.parent

    def _fetch_named(self, name: str) -> Path:
        file = next((file for file in self.files if file.name == name), None)
        return self._download(name) if file is None else self._fetch_file(file)

    def _fetch_file(self, file: SourceFile) -> Path:
        """One file, with the size and, where it is downloaded now, the digest that was stated; else not at all."""
        assert self.repo is not None and self.commit is not None
        there = hub_cached(self.repo, file.name, self.commit, self.cache_dir)
        if there is not None and there.stat().st_size == file.n_bytes:
            return there
        if there is not None:
            # Cut off by a crash of the system, or by a hand.
            remove_from_cache(there)
        path = self._download(file.name)
        if file.digest and (found := _stated_digest(path, file.digest)) != file.digest:
            remove_from_cache(path)
            raise Error(
                f"{self.label}: {file.name} arrived with the digest {found}, expected {file.digest}; nothing of it "
                "was kept, and the same command fetches it again"
            )
        return path

    def _download(self, filename: str) -> Path:
        assert self.repo is not None and self.commit is not None
        return hub_download(self.repo, filename, self.commit, self.cache_dir)


def find_model(
    name: str | os.PathLike[str],
    step: int | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    lock: Lock | None = None,
) -> ModelSource:
    """Where a checkpoint is and what it weighs; of a hub checkpoint only config.json is downloaded.

    `name` is a folder where it says so: an `os.PathLike`, or text that is absolute or begins with "." or "~". Any other
    text is a bundled model, a name of the registry with or without its owner, or "owner/model" on the hub
    (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are respected), whatever lies in the working directory;
    only what has the form of none of these may be a folder there. Where such a name is also that of a folder, a
    warning says how to name the folder. `step` chooses the revision "step<step>" on the hub, of a suite the one that
    its file says; `revision` names any other branch, tag or commit. A revision that `lock` has is not asked of the hub,
    one that it lacks is put into it. Raises `Error` for whatever cannot be found.
    """
    text = os.fspath(name)
    step = None if step is None else as_step(step)
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - Path's raises for an unknown user
    # Path.is_dir raises for a name that is too long.
    is_folder = os.path.isdir(path)  # noqa: PTH112
    if isinstance(name, os.PathLike) or path.is_absolute() or text.startswith((".", "~")):
        if is_folder:
            return _folder_source(path, step, revision)
        found = "a file, not a folder" if os.path.lexists(path) else "nothing"
        raise Error(f"no model folder at {text}: found {found}, expected config.json and model.safetensors in a folder")
    model = find_entry(text)
    if model is None and not _HUB_NAME.fullmatch(text):
        if is_folder:
            return _folder_source(path, step, revision)
        raise Error(f"no model is called {text!r}{near_names(text)}; see `llmcomp models`")
    if is_folder:
        where = "of the Hugging Face hub" if model is None else "of the registry"
        warnings.warn(f"{text} is taken for the model {where}; the folder is called ./{text}", stacklevel=2)
    cache = Path(cache_dir) if cache_dir else None
    if model is None or (revision is not None and not model.is_bundled):
        wanted = revision or ("main" if step is None else f"step{step}")
        return _hub_source(model.name if model else text, step, wanted, cache, lock)
    return _entry_source(model, step, cache, lock)


def find_registered(name: str, step: int | None = None, *, download: bool = False) -> ModelSource:
    """Where a model is that a file names: bundled or in the hub's cache, and nowhere else.

    A name from a file is a whole name of the registry, never a folder and no other name of the hub. What the cache
    lacks is looked up on the hub, and downloaded when it is loaded, only with `download`; without it nothing is
    requested and `DownloadNeeded` names the model and about how large it is.
    """
    model = suite_models().get(name)
    if model is None:
        raise Error(f"no model of the registry is called {name!r}")
    if download or model.is_bundled:
        return _entry_source(model, step, None, None)
    checkpoint = _checkpoint_at(model, step) if model.is_listed else None
    revision = checkpoint.revision if checkpoint else "main"
    step = checkpoint.step if checkpoint else step
    config = hub_cached(model.name, "config.json", revision) if checkpoint or step is None else None
    with contextlib.suppress(Error):
        files = _folder_files(config.parent, model.name) if config is not None else ()
        if config is not None and any(file.name == "tokenizer.json" for file in files):
            return ModelSource(model.name, step, files, folder=config.parent, checkpoint=checkpoint)
    size = f"{_WEIGHT_BYTES * (model.n_params or model.params or 0) / 1e9:.2g} GB"
    at_step = "" if step is None else f" step {step}"
    raise DownloadNeeded(
        f"the model {model.name}{at_step} is not on this machine, and its download (about {size}) needs your word: "
        "--download, or its name with --model (in Python download=True)"
    )


def find_checkpoint(
    checkpoint: Checkpoint,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    lock: Lock | None = None,
) -> ModelSource:
    """Where a checkpoint of a suite is. What `lock` has is not asked of the hub; what it lacks is put into it.

    Nothing is downloaded: sizes and digests are those that the hub states. Raises `Error` as `find_model`.
    """
    model = checkpoint.model
    if model.is_bundled:
        return replace(_bundled_source(model.name, checkpoint.step), checkpoint=checkpoint)
    if model.is_folder:
        folder = Path(model.name) / checkpoint.revision
        name = Path(model.name).name + (f"@{checkpoint.tag}" if checkpoint.tag else "")
        return replace(_source_in(name, checkpoint.step, folder), checkpoint=checkpoint)
    cache = Path(cache_dir) if cache_dir else None
    lock = Lock() if lock is None else lock
    if lock.get(model.name, checkpoint.revision) is None:
        with contextlib.suppress(hub.HubUnreachable):
            lock.put(model.name, checkpoint.revision, ask_revision(model.name, checkpoint.revision, checkpoint.label))
    found = _hub_source(model.name, checkpoint.step, checkpoint.revision, cache, lock)
    return replace(found, name=checkpoint.name, checkpoint=checkpoint)


def ask_revision(repo: str, revision: str, label: str) -> LockedRevision:
    """The commit and the files of a checkpoint as the hub states them now; `Error` for what is no whole checkpoint."""
    listed = hub.list_revision(repo, revision)
    chosen = checkpoint_files(listed.files, label)
    return LockedRevision(listed.commit, {name: _as_locked(listed.files[name]) for name in chosen})


def _as_locked(file: SourceFile) -> LockedFile:
    return LockedFile(file.n_bytes, file.digest or "")


def _locked_files(repo: str, locked: LockedRevision, cache: Path | None) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(name, file.n_bytes, file.digest or None, _is_cached(repo, name, file, locked.commit, cache))
        for name, file in locked.files.items()
    )


def _is_cached(repo: str, name: str, file: LockedFile, commit: str, cache: Path | None) -> bool:
    there = hub_cached(repo, name, commit, cache)
    return there is not None and there.stat().st_size == file.n_bytes


def branches_of(model: SuiteModel, lock: Lock | None = None) -> list[str]:
    """The names of a model's revisions: on the hub, or in the lock where the hub cannot be reached."""
    try:
        return list(hub.list_branches(model.name))
    except hub.HubUnreachable:
        if lock is not None and model.name in lock.revisions:
            return list(lock.revisions[model.name])
        raise


def _checkpoint_at(model: SuiteModel, step: int | None) -> Checkpoint | None:
    """The checkpoint of a step; the last where none is asked for; None: the suite lists none."""
    if model.is_listed or step is None:
        there = checkpoints(model)
        steps = known_steps(model)
    else:
        there = checkpoints(model, hub.list_branches(model.name))
        steps = tuple(sorted({c.step for c in there if c.step is not None}))
    if step is None and (not model.is_listed or not steps):
        return None
    wanted = steps[-1] if step is None else step
    check_step(model.name, wanted, steps)
    return next(c for c in there if c.step == wanted)


def as_step(step: Any) -> int:
    """A training step as an int, of whatever type the integer is; anything else is an `Error`."""
    try:
        return operator.index(step)
    except TypeError:
        raise Error(f"step is {step!r}, expected an integer") from None


def _entry_source(model: SuiteModel, step: int | None, cache: Path | None, lock: Lock | None) -> ModelSource:
    if model.is_bundled:
        return _bundled_source(model.name, step)
    checkpoint = _checkpoint_at(model, step)
    if checkpoint is None:
        return _hub_source(model.name, None, "main", cache, lock)
    source = _hub_source(model.name, checkpoint.step, checkpoint.revision, cache, lock)
    return replace(source, checkpoint=checkpoint)


def _bundled_source(name: str, step: int | None) -> ModelSource:
    step = pico.STEPS[-1] if step is None else step
    check_step(name, step, pico.MODEL_STEPS[name])
    folder = pico.suite_folder(name, step)
    files = _folder_files(folder, f"{name} step {step}")
    model, path = find_entry(name), pico.tokenizer_path_of(name)
    return ModelSource(
        name,
        step,
        files,
        folder=folder,
        tokenizer_path=path,
        checkpoint=_checkpoint_at(model, step) if model else None,
        has_byte_tokens=path is None,
    )


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
    commit = revision
    if ref.is_file():
        commit = read_bytes(ref, _REF_BYTES_MAX).decode("utf-8", "replace").strip()
        if not is_file_name(commit):
            raise Error(f"{ref}: found {shown(commit)}, expected the name of a commit")
    snapshot = path / "snapshots" / commit
    if not snapshot.is_dir():
        known = sorted(str(found.relative_to(path / "refs")) for found in (path / "refs").rglob("*") if found.is_file())
        raise Error(f"{path} holds no revision {revision!r}; it holds {', '.join(known) or 'none'}")
    return snapshot


def _folder_files(folder: Path, label: str) -> tuple[SourceFile, ...]:
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return tuple(
        SourceFile(name, (folder / name).stat().st_size, None, True) for name in checkpoint_files(names, label)
    )


def checkpoint_files(names: Iterable[str], label: str) -> list[str]:
    """Which of a repository's or folder's files make the checkpoint; safetensors where both forms are there."""
    present = set(names)
    if "config.json" not in present:
        raise Error(f"{label} holds no config.json: not a model in Hugging Face's layout")
    tokenizer = ("tokenizer.json",) if "tokenizer.json" in present else OTHER_FORMS
    chosen = ["config.json", *(file for file in (*tokenizer, SETTINGS) if file in present)]
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


def is_weight_file(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _stated_digest(path: Path, like: str) -> str:
    """The digest of a file in the form in which the hub states it: SHA-256, of small files the SHA-1 of git's blob."""
    if len(like) != 40:
        return _sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def remove_from_cache(path: Path) -> None:
    """Remove a file of the hub's cache: the link of a snapshot and whatever it points to inside the cache."""
    for _ in range(4):
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target


def _cached_digest(path: Path) -> str:
    """Of a file in the hub's cache, which is a link to a blob that is named by its digest."""
    return path.readlink().name if _is_blob(path) else _file_digest(path)


def _is_blob(path: Path) -> bool:
    return path.is_symlink() and path.readlink().parent.name == "blobs"


def _file_digest(path: Path) -> str:
    """Of the content, whatever a link in a folder of anybody's is called; in the form in which the hub states it, so
    that its cache as a folder is the same model."""
    status = path.stat()
    like = path.readlink().name if _is_blob(path) else ""
    return _content_digest(path, status.st_size, status.st_mtime_ns, like)


@functools.lru_cache(maxsize=4096)
def _content_digest(path: Path, n_bytes: int, mtime_ns: int, like: str) -> str:
    del n_bytes, mtime_ns  # they are what the digest is remembered by
    return _stated_digest(path, like)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _hub_source(
    name: str, step: int | None, wanted: str, cache_dir: Path | None, lock: Lock | None = None
) -> ModelSource:
    if lock is not None and (locked := lock.get(name, wanted)):
        return _hub_model(name, step, locked.commit, cache_dir, _locked_files(name, locked, cache_dir))
    found = _ask_hub(name, step, wanted, cache_dir)
    if lock is not None and found.commit is not None:
        files = {file.name: _as_locked(file) for file in found.files}
        lock.put(name, wanted, LockedRevision(found.commit, files))
    return found


def _ask_hub(name: str, step: int | None, wanted: str, cache_dir: Path | None) -> ModelSource:
    snapshot = hub_download(name, "config.json", wanted, cache_dir).parent
    commit = snapshot.name
    label = f"{name} {wanted}"
    cached = {path.name for path in snapshot.iterdir()}
    with contextlib.suppress(Error):
        files = checkpoint_files(cached, label)
        if "tokenizer.json" in files:
            return _hub_model(name, step, commit, cache_dir, _snapshot_files(snapshot, files))
    listed = hub_listing(name, commit)
    if listed is None:
        files = checkpoint_files(cached, f"the cached part of {label} (the hub cannot be reached)")
        return _hub_model(name, step, commit, cache_dir, _snapshot_files(snapshot, files))
    chosen = checkpoint_files(listed, label)
    files_there = tuple(listed[file]._replace(cached=file in cached) for file in chosen)
    return _hub_model(name, step, commit, cache_dir, files_there)


def _hub_model(
    name: str, step: int | None, commit: str, cache_dir: Path | None, files: tuple[SourceFile, ...]
) -> ModelSource:
    return ModelSource(name, step, files, repo=name, commit=commit, cache_dir=cache_dir)


def _snapshot_files(snapshot: Path, names: list[str]) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(name, (snapshot / name).stat().st_size, _cached_digest(snapshot / name), True) for name in names
    )

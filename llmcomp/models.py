"""Names, folders and hub revisions to models: the registry, the look-up, the download and `load_model`.

What a model computes is the engines' business (`engine_exact`, `engine_torch`); bytes and coding are unknown here.
A `ModelSource` says what would be loaded (files, sizes, digests) before anything large is read or downloaded.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from llmcomp import pico
from llmcomp.errors import Error
from llmcomp.memory import host_memory

ENGINES = ("exact", "exact-int8", "torch")

# Steps and names: Biderman et al., "Pythia: A Suite for Analyzing Large Language Models", 2023, section 2.
PYTHIA_STEPS = (0, *(2**k for k in range(10)), *range(1000, 143001, 1000))
_PYTHIA_PARAMS = {
    "14m": 14_000_000,
    "31m": 31_000_000,
    "70m": 70_000_000,
    "160m": 160_000_000,
    "410m": 410_000_000,
    "1b": 1_000_000_000,
    "1.4b": 1_400_000_000,
    "2.8b": 2_800_000_000,
    "6.9b": 6_900_000_000,
    "12b": 12_000_000_000,
}

_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_STEP_FOLDER = re.compile(r"(?:step|checkpoint-)(\d+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HASH_BLOCK_BYTES = 1 << 22


class HubUnreachable(Error):
    """The hub did not answer, and what was asked for is not in the cache."""


@runtime_checkable
class Model(Protocol):
    """What every model has.

    `logits`: int [B, T] -> float32 [B, T, n_logits]. `session(n).step`: int [n] -> float32 [n, n_logits].
    Models that `load_model` made also have name, step, n_params, vocab_size, n_logits, context_length, fingerprint,
    weights_sha256, tokenizer, engine, device, dtype and attention.
    """

    def logits(self, tokens: npt.ArrayLike) -> np.ndarray: ...

    def session(self, n_streams: int) -> Any: ...


class ModelEntry(NamedTuple):
    """One name that `load_model` knows; `params` is what the suite's authors call it by, not a count of weights."""

    name: str
    suite: str
    params: int
    steps: tuple[int, ...]
    bundled: bool


class Suite(NamedTuple):
    """The models and steps of one grid of experiments."""

    models: tuple[str, ...]
    steps: tuple[int, ...]


SUITES = {
    "pico": Suite(pico.SUITE_NAMES, pico.STEPS),
    # The grid of the published experiment.
    "pythia": Suite(
        tuple(f"EleutherAI/pythia-{size}" for size in ("70m", "160m", "410m", "1b", "1.4b")),
        (1000, 8000, 32000, 128000, 143000),
    ),
}


@functools.cache
def list_models() -> tuple[ModelEntry, ...]:
    """Every name that `load_model` knows beside folders and other names of the hub: the pico and the Pythia suite."""
    bundled = [
        ModelEntry(
            name,
            "pico" if name in pico.SUITE_NAMES else "pico-vocabularies",
            int(name.removeprefix("pico-").partition("k")[0]) * 1000,
            steps,
            True,
        )
        for name, steps in pico.MODEL_STEPS.items()
    ]
    hub = [
        ModelEntry(f"EleutherAI/pythia-{size}{variant}", "pythia", params, PYTHIA_STEPS, False)
        for variant in ("", "-deduped")
        for size, params in _PYTHIA_PARAMS.items()
        if not (variant and size in ("14m", "31m"))
    ]
    return (*bundled, *hub)


class SourceFile(NamedTuple):
    """One file of a checkpoint. `digest` is None until somebody needs it (local files are hashed then)."""

    name: str
    n_bytes: int
    digest: str | None
    cached: bool


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
        return _hub_download(self.repo, filename, self.commit, self.cache_dir)


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
        raise Error(f"no model is called {text!r}{_near_names(text)}; see `llmcomp models`")
    if entry is not None and revision is None:
        step = entry.steps[-1] if step is None else step
        _check_step(entry.name, step, entry.steps)
    return _hub_source(entry.name if entry else text, step, revision, Path(cache_dir) if cache_dir else None)


def load_model(
    name: Any,
    step: int | None = None,
    engine: str = "exact",
    *,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Load a model: a bundled pico model, a Hugging Face folder or hub name, or any object with logits() and session().

    `engine="exact"` computes GPT-NeoX models bit for bit alike on every machine: in the C core, or with `device="cuda"`
    ("cuda:1", ...) by kernels for a CUDA device (`engine_cuda`). So does "exact-int8", with linear maps in 8-bit
    integers: other logits, its own archives (`engine_exact.Int8Model`). `engine="torch"` runs any causal model of
    transformers on `device` ("cpu", "cuda", ...) in `dtype` ("float32", "bfloat16", "float16") with `attention`
    ("sdpa", "eager"); what it promises is written in `engine_torch`. `step` None means the last step of a
    known suite. An object that is a model already is returned unchanged. Raises `Error`, also for want of a device.
    """
    if not isinstance(name, (str, os.PathLike)):
        return _on_device(as_model(name), device)
    options = {"device": device, "dtype": dtype, "attention": attention}
    check_options(engine, options)
    source = find_model(name, step, revision=revision, cache_dir=cache_dir)
    return load_source(source, engine, **options)


def load_source(source: ModelSource, engine: str = "exact", **options: Any) -> Any:
    """Load what `find_model` found; `options` as in `load_model`."""
    architecture = source.read_config().get("model_type")
    if engine == "torch":
        from llmcomp import engine_torch

        folder = source.fetch()
        if architecture == "gpt_neox":
            options["digest"] = functools.partial(_stored_digest, source)
        return engine_torch.load_torch(
            folder, name=source.name, step=source.step, tokenizer_path=source.tokenizer_path, **options
        )
    if architecture != "gpt_neox":
        raise Error(
            f"{source.label} is a {architecture!r} model, the {engine} engine computes 'gpt_neox' only; "
            "engine='torch' runs any causal model of transformers"
        )
    check_options(engine, options)
    return _load_exact(source, engine, options.get("device") or "cpu")


def check_options(engine: str, options: Mapping[str, Any]) -> None:
    """`Error` if no engine has that name or it has no such option, or where the device of an exact engine cannot be
    had."""
    if engine not in ENGINES:
        raise Error(f"no engine is called {engine!r}, expected one of {', '.join(ENGINES)}")
    if engine == "torch":
        return
    given = [option for option, value in options.items() if value is not None and option != "device"]
    if given:
        arithmetic = "8-bit integers" if engine == "exact-int8" else "float32"
        raise Error(f"the {engine} engine has no choice of {', '.join(given)}: it computes in {arithmetic}")
    device = options.get("device") or "cpu"
    if device == "cpu":
        return
    from llmcomp import cuda

    cuda.open_device(device)


def _on_device(model: Any, device: str | None) -> Any:
    """A model that is loaded stays where it is."""
    found = str(getattr(model, "device", "cpu"))
    if device is not None and device not in (found, found.partition(":")[0]):
        raise Error(f"the model is loaded on device {found!r} already, expected {device!r}: load it there by its name")
    return model


def stage_source(source: ModelSource, engine: str = "exact", **options: Any) -> Callable[[], Any]:
    """Download and read what `load_source` would load, on any thread; what is returned makes the model of it.

    The weights' digest is computed on the way. Weights that free memory does not hold twice are only downloaded.
    """
    check_options(engine, options)
    folder = source.fetch()
    fits = host_memory()[0] > 2 * source.weight_bytes
    if not fits:
        return functools.partial(load_source, source, engine, **options)
    if engine != "torch" and options.get("device") not in (None, "cpu"):
        # For the reading alone: the files are then in the system's memory, and the device takes them when it is free.
        _stored_digest(source)
        return functools.partial(load_source, source, engine, **options)
    if engine != "torch":
        model = load_source(source, engine, **options)
        # Reads all that is mapped.
        _ = model.weights_sha256
        return lambda: model
    from llmcomp import engine_torch

    if source.read_config().get("model_type") == "gpt_neox":
        stored_digest = _stored_digest(source)
        options["digest"] = lambda: stored_digest
    weights = engine_torch.read_host_weights(folder)
    return functools.partial(
        engine_torch.load_torch,
        folder,
        name=source.name,
        step=source.step,
        tokenizer_path=source.tokenizer_path,
        weights=weights,
        **options,
    )


def as_step(step: Any) -> int:
    """A training step as an int, of whatever type the integer is; anything else is an `Error`."""
    try:
        return operator.index(step)
    except TypeError:
        raise Error(f"step is {step!r}, expected an integer") from None


def as_model(model: Any) -> Any:
    """`model` itself if it has logits() and session(); anything else is an `Error`."""
    if isinstance(model, type):
        raise Error(f"{model.__name__} is a class, expected a model made of it")
    missing = [method for method in ("logits", "session") if not callable(getattr(model, method, None))]
    if missing:
        raise Error(f"a {type(model).__name__} is no model: it has no {' and no '.join(m + '()' for m in missing)}")
    return model


def _load_exact(source: ModelSource, engine: str, device: str) -> Any:
    if device == "cpu":
        from llmcomp import engine_exact

        load: Any = engine_exact.load_exact
    else:
        from llmcomp import engine_cuda

        load = functools.partial(engine_cuda.load_cuda, device=device)
    folder = source.fetch()
    return load(
        folder,
        engine=engine,
        name=source.name,
        step=source.step,
        tokenizer_path=source.tokenizer_path,
        weights=_pickled_weights(source, folder),
    )


def _pickled_weights(source: ModelSource, folder: Path) -> dict[str, np.ndarray] | None:
    """The weights of a checkpoint that has them in no other form, else None."""
    if any(file.name.endswith(".safetensors") for file in source.files):
        return None
    from llmcomp import engine_torch

    return engine_torch.read_pickled_weights(folder)


def _stored_digest(source: ModelSource) -> str:
    """One digest for one checkpoint, whichever engine runs it in whatever dtype."""
    from llmcomp import engine_exact

    folder = source.fetch()
    return engine_exact.stored_weights_sha256(folder, _pickled_weights(source, folder))


def _bundled_source(name: str, step: int | None) -> ModelSource:
    step = pico.STEPS[-1] if step is None else step
    _check_step(name, step, pico.MODEL_STEPS[name])
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
        _check_step(str(path), chosen, tuple(sorted(steps)))
        return _source_in(path.name, chosen, steps[chosen])
    if own := _STEP_FOLDER.fullmatch(path.name):
        chosen = int(own[1]) if step is None else step
        _check_step(str(path), chosen, (int(own[1]),))
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
    snapshot = _hub_download(name, "config.json", wanted, cache_dir).parent
    commit = snapshot.name
    label = f"{name} {wanted}"
    cached = {path.name for path in snapshot.iterdir()}
    with contextlib.suppress(Error):
        files = _checkpoint_files(cached, label)
        if "tokenizer.json" in files:
            return _hub_model(name, step, commit, cache_dir, _snapshot_files(snapshot, files))
    listed = _hub_listing(name, commit, label)
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


def _hub_listing(repo: str, commit: str, label: str) -> dict[str, SourceFile] | None:
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


def _hub_download(repo: str, filename: str, revision: str, cache_dir: Path | None) -> Path:
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
            f"{constants.ENDPOINT} has no model {repo}, or it is private (HF_TOKEN){_near_names(repo)}"
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


def _check_step(name: str, step: int, steps: tuple[int, ...]) -> None:
    if step not in steps:
        near = sorted(sorted(steps, key=lambda known: abs(known - step))[:5])
        raise Error(f"{name} has no step {step}; the nearest are {', '.join(map(str, near))}")


def _near_names(text: str) -> str:
    """ "; near names: ..." or nothing."""
    by_key = {entry.name.rpartition("/")[2].lower(): entry.name for entry in list_models()}
    near = difflib.get_close_matches(text.rpartition("/")[2].lower(), by_key, n=4, cutoff=0.5)
    return f"; near names: {', '.join(by_key[key] for key in near)}" if near else ""

"""load_model: from a name, a folder or an object to a model of one of the engines."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmcomp.data.tokenizers import from_object
from llmcomp.errors import Error, shown
from llmcomp.models.adapter import is_model
from llmcomp.models.families import FAMILIES
from llmcomp.models.memory import host_memory
from llmcomp.models.protocol import as_model
from llmcomp.models.sources import ModelSource, find_model, find_registered

ENGINES = ("exact", "exact-int8", "torch")


def load_model(
    name: Any,
    step: int | None = None,
    engine: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model: a bundled pico model, a Hugging Face folder or hub name, or an object: one with logits() and
    session(), or a causal model of transformers that is in memory, as in a training run.

    A folder is what `name` calls one: an `os.PathLike`, text that is absolute or begins with "." or "~" ("./pythia"),
    or the name of a folder that has not the form of a name. "pico-13k", "pythia-70m" and "owner/model" are names of
    the registry and of the hub, whatever lies in the working directory; a warning names a folder so called.

    `engine="exact"` computes the families of `families.FAMILIES` bit for bit alike on every machine: in the C core,
    or with `device="cuda"` ("cuda:1", ...) by kernels for a CUDA device (`engines.cuda`). So does
    "exact-int8", with linear maps in 8-bit integers: other logits, its own archives (`exact.Int8Model`).
    `engine="torch"` runs any causal model of transformers on `device` ("cpu", "cuda", ...) in `dtype` ("float32",
    "bfloat16", "float16") with `attention` ("sdpa", "eager"); what it promises is written in `engines.torch`. `engine`
    None is "exact" for a family that this engine knows, else "torch", with a warning that says so. `step` None means
    the last step of a known suite. `tokenizer`: a file or folder to read it from
    instead of the model's own, or "bytes": tokens 0 to 255 are then bytes, whatever the folder holds. An object that is
    a model already is returned unchanged.

    A module of transformers comes with its `tokenizer`, an object of that library or what else is said above; the pair
    (module, tokenizer) is taken wherever a model is. It stays where it is and as it is, in training too; its weights
    are those of the moment, so load it again after the next step of training.

    No code that a model brings along is run, and nobody is asked about it, unless `trust_remote_code=True`: then, with
    the torch engine, transformers runs the Python files of the folder. From the hub no Python file is downloaded.
    Raises `Error`, also for want of a device.
    """
    if isinstance(name, tuple) and len(name) == 2 and tokenizer is None:
        name, tokenizer = name
    if is_module(name):
        return _on_device(_view_module(name, tokenizer, step, engine, dtype or attention), device)
    if not isinstance(name, (str, os.PathLike)):
        return _on_device(as_model(name), device)
    if not isinstance(trust_remote_code, bool):
        raise Error(f"trust_remote_code is {trust_remote_code!r}, expected True or False")
    options: dict[str, Any] = {"device": device, "dtype": dtype, "attention": attention}
    if trust_remote_code:
        options["trust_remote_code"] = True
    if engine is not None:
        check_options(engine, options)
    source = find_model(name, step, revision=revision, cache_dir=cache_dir).with_tokenizer(tokenizer)
    if engine is None:
        engine = _choose_engine(source)
        check_options(engine, options)
    return load_source(source, engine, **options)


def is_module(value: Any) -> bool:
    """Whether `value` is a model of transformers in memory."""
    methods = ("forward", "parameters", "get_output_embeddings")
    return hasattr(value, "config") and all(callable(getattr(value, name, None)) for name in methods)


def is_in_memory(value: Any) -> bool:
    """Whether `value` is one model, rather than the name of one or several: an object, a module, or a module with its
    tokenizer."""
    return is_model(value) or is_module(value) or (isinstance(value, tuple) and len(value) == 2 and is_module(value[0]))


def _view_module(module: Any, tokenizer: Any, step: int | None, engine: str | None, option: str | None) -> Any:
    from llmcomp.models.engines.torch import TorchModel

    if engine not in (None, "torch") or option is not None:
        raise Error(f"a module in memory is computed by torch as it is: {option or f'engine {engine}'} is for folders")
    name = Path(str(getattr(module.config, "_name_or_path", "") or type(module).__name__)).name
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        path = None if tokenizer is None else ModelSource(name, step, ()).with_tokenizer(tokenizer).tokenizer_option
        # Of a module without one, unless its tokens are bytes by their number, whoever asks is told.
        path = Path(name, "tokenizer.json") if path is None else path
        return TorchModel(module, name=name, step=step, tokenizer_path=path)
    return TorchModel(module, name=name, step=step, tokenizer=from_object(tokenizer))


def _choose_engine(source: ModelSource) -> str:
    architecture = source.read_config().get("model_type")
    if architecture in FAMILIES:
        return "exact"
    warnings.warn(
        f"{source.label} is a {architecture!r} model, which the exact engine does not know: engine='torch' runs it; "
        "what it codes decodes only with the same machine, library and batch",
        stacklevel=3,
    )
    return "torch"


@dataclass(frozen=True)
class NamedModel:
    """A model that a user named for archives, which say with which engine it is loaded.

    `options` are those of `load_model`, without what is None; `engine` overrules the archive's.
    """

    name: str | os.PathLike[str]
    step: int | None = None
    engine: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    _loaded: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def load(self, engine: str, name: str, step: int | None, is_wanted: Callable[[Any], bool]) -> Any:
        """The model for an archive of `engine`, made with the model `name` at `step`.

        The torch engine's bits depend on dtype and attention, which an archive does not name: unless the user did,
        each is tried until `is_wanted`; the first is returned where none is.
        """
        engine = self.engine or engine
        step = step if self.step is None and str(self.name) == name else self.step
        first = None
        for options in self._candidates(engine):
            key = (engine, step, *options.items())
            if key not in self._loaded:
                self._loaded.clear()  # one at a time
                self._loaded[key] = load_model(self.name, step, engine, **options)
            if is_wanted(self._loaded[key]):
                return self._loaded[key]
            first = options if first is None else first
        return load_model(self.name, step, engine, **(first or {}))

    def _candidates(self, engine: str) -> Iterator[dict[str, Any]]:
        if engine != "torch":
            yield dict(self.options)
            return
        attentions = [self.options["attention"]] if "attention" in self.options else [None, "eager"]
        dtypes = [self.options["dtype"]] if "dtype" in self.options else ["float32", "bfloat16", "float16"]
        for attention, dtype in itertools.product(attentions, dtypes):
            chosen = {"dtype": dtype} if attention is None else {"dtype": dtype, "attention": attention}
            yield {**self.options, **chosen}


def load_registered(
    name: str, step: int | None = None, engine: str = "exact", *, device: str | None = None, download: bool = False
) -> Any:
    """Load the model that a file names: one of the registry, and no other. `download`: as `find_registered`."""
    check_options(engine, {"device": device})
    return load_source(find_registered(name, step, download=download), engine, device=device)


def load_source(source: ModelSource, engine: str = "exact", **options: Any) -> Any:
    """Load what `find_model` found; `options` as in `load_model`."""
    architecture = source.read_config().get("model_type")
    if engine == "torch":
        from llmcomp.models.engines import torch as engine_torch

        folder = source.fetch()
        if architecture == "gpt_neox":
            options["digest"] = functools.partial(_stored_digest, source)
        return engine_torch.load_torch(
            folder, name=source.name, step=source.step, tokenizer_path=source.tokenizer_option, **options
        )
    if architecture not in FAMILIES:
        raise Error(
            f"{source.label} is a {shown(architecture)} model, the {engine} engine computes {', '.join(FAMILIES)}; "
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
    if "trust_remote_code" in given:
        raise Error(f"the {engine} engine runs no code of a model: trust_remote_code=True is for engine='torch'")
    if given:
        arithmetic = "8-bit integers" if engine == "exact-int8" else "float32"
        raise Error(f"the {engine} engine has no choice of {', '.join(given)}: it computes in {arithmetic}")
    device = options.get("device") or "cpu"
    if device == "cpu":
        return
    from llmcomp.coding import cuda

    cuda.open_device(device)


def _on_device(model: Any, device: str | None) -> Any:
    """A model that is loaded stays where it is."""
    found = str(getattr(model, "device", None) or "cpu")
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
    from llmcomp.models.engines import torch as engine_torch
    from llmcomp.models.engines.torch_weights import read_host_weights

    if source.read_config().get("model_type") == "gpt_neox":
        stored_digest = _stored_digest(source)
        options["digest"] = lambda: stored_digest
    weights = read_host_weights(folder)
    return functools.partial(
        engine_torch.load_torch,
        folder,
        name=source.name,
        step=source.step,
        tokenizer_path=source.tokenizer_option,
        weights=weights,
        **options,
    )


def _load_exact(source: ModelSource, engine: str, device: str) -> Any:
    if device == "cpu":
        from llmcomp.models.engines import exact

        load: Any = exact.load_exact
    else:
        from llmcomp.models.engines import cuda as engine_cuda

        load = functools.partial(engine_cuda.load_cuda, device=device)
    folder = source.fetch()
    return load(
        folder,
        engine=engine,
        name=source.name,
        step=source.step,
        tokenizer_path=source.tokenizer_option,
        weights=_pickled_weights(source, folder),
    )


def _pickled_weights(source: ModelSource, folder: Path) -> dict[str, np.ndarray] | None:
    """The weights of a checkpoint that has them in no other form, else None."""
    if any(file.name.endswith(".safetensors") for file in source.files):
        return None
    from llmcomp.models.engines.torch_weights import read_pickled_weights

    return read_pickled_weights(folder)


def _stored_digest(source: ModelSource) -> str:
    """One digest for one checkpoint, whichever engine runs it in whatever dtype."""
    from llmcomp.models import checkpoint

    folder = source.fetch()
    return checkpoint.stored_weights_sha256(folder, _pickled_weights(source, folder))

"""What can be verified, and how it is made anew in another process: models, callables, and commands that speak lines.

A callable is `predict(past)`: int32 [t], the tokens so far, read-only -> the probabilities of the next token, float
[vocab_size]. It becomes a model here, so that everything is coded by one codec.

The line protocol of a command. It reads requests from standard input and answers each with one line of JSON on standard
output, at once (flush it); what it writes to standard error is shown. Tokens are the integers below `vocab_size`; with
the default tokenizer they are the bytes of the data.

    request   {"llmcomp": "verify", "version": 1, "vocab_size": 256}      once, first
    answer    {"name": "my model"}
    request   {"start": true}                                              a new document: nothing is known of it
    answer    {"probabilities": [p0, p1, ...]}                             of its first token
    request   {"token": 104}                                               this token came
    answer    {"probabilities": [p0, p1, ...]}                             of the next one

{"error": "text"} in place of any answer ends the work. The command ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llmcomp.checked_json import Members, parse_object
from llmcomp.claims.certificate import Refused
from llmcomp.data.tokenizer_files import find_tokenizer_file
from llmcomp.data.tokenizers import BYTES, AnyTokenizer, ByteTokenizer, Tokenizer
from llmcomp.errors import Error, reason, shown
from llmcomp.models.adapter import ModelTraits, weights_sha256
from llmcomp.models.load import load_model

SUM_TOLERANCE = 1e-4
SECONDS_MAX = 300.0
PROTOCOL_VERSION = 1
# More than any document has: a callable sees all of its past.
_CONTEXT_TOKENS = 1 << 30
_DIGEST_BYTES = 1 << 20


def as_tokenizer(tokenizer: Any) -> AnyTokenizer:
    """A tokenizer, the file or folder of one, or None and "bytes" for bytes as tokens."""
    if tokenizer is None or tokenizer == BYTES:
        return ByteTokenizer()
    if isinstance(tokenizer, (str, os.PathLike)):
        path = Path(tokenizer)
        return Tokenizer.from_file(find_tokenizer_file(path) if path.is_dir() else path)
    return tokenizer


# How a predictor is made: each has make() -> a model or a callable, and facts() for the certificate.


@dataclass(frozen=True)
class NamedModel:
    """A model by what `load_model` takes."""

    name: str | os.PathLike[str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        return load_model(self.name, **self.options)

    def facts(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class ImportedPredictor:
    """ "module:name" or "file.py:name": a model or a callable that a module of the user's defines."""

    target: str

    def make(self) -> Any:
        module_name, colon, name = self.target.rpartition(":")
        if not colon or not name or not module_name:
            raise Error(f"{shown(self.target)} names no predictor: expected MODULE:NAME or FILE.py:NAME")
        try:
            module = _module_of_file(module_name) if module_name.endswith(".py") else _module(module_name)
        except Exception as error:  # whatever the user's code raises
            raise Error(f"{module_name} cannot be imported: {type(error).__name__}: {reason(error)}") from error
        if not hasattr(module, name):
            raise Error(f"{module_name} has no {name}")
        return getattr(module, name)

    def facts(self) -> dict[str, Any]:
        module_name = self.target.rpartition(":")[0]
        path = module_name if module_name.endswith(".py") else getattr(_module(module_name), "__file__", None)
        return {"name": self.target, **({"files": [_file_facts(path)]} if path else {})}


@dataclass(frozen=True)
class CommandPredictor:
    """A command that speaks the line protocol above; started once a process."""

    argv: tuple[str, ...]
    seconds_max: float = SECONDS_MAX

    def make(self) -> LineClient:
        return LineClient(self.argv, self.seconds_max)

    def facts(self) -> dict[str, Any]:
        """The command and the digests of the files that it names; what these read in turn is not known."""
        program = shutil.which(self.argv[0]) or self.argv[0]
        files = [_file_facts(word) for word in (program, *self.argv[1:]) if os.path.isfile(word)]  # noqa: PTH113
        return {"command": shlex.join(self.argv), "files": files}


@dataclass(frozen=True)
class GivenPredictor:
    """An object that is there already."""

    predictor: Any

    def make(self) -> Any:
        return self.predictor

    def facts(self) -> dict[str, Any]:
        return {}


Recipe = NamedModel | ImportedPredictor | CommandPredictor | GivenPredictor


def as_recipe(predictor: Any) -> Recipe:
    """How to make what the user gave: a name or path of a model, a command as a list, a model, or a callable."""
    if isinstance(predictor, (NamedModel, ImportedPredictor, CommandPredictor, GivenPredictor)):
        return predictor
    if isinstance(predictor, (str, os.PathLike)):
        return NamedModel(predictor)
    if isinstance(predictor, (list, tuple)):
        if not predictor or not all(isinstance(word, (str, os.PathLike)) for word in predictor):
            raise Error("a command is a list of words, the first of them a program")
        return CommandPredictor(tuple(os.fspath(word) for word in predictor))
    is_model = callable(getattr(predictor, "logits", None)) and callable(getattr(predictor, "session", None))
    if isinstance(predictor, type) or not (is_model or callable(predictor)):
        raise Error(
            f"a {type(predictor).__name__} predicts nothing: expected a model, a callable, a name, or a command "
            "(a list of words)"
        )
    return GivenPredictor(predictor)


def as_predictor_model(made: Any, tokenizer: AnyTokenizer | None) -> Any:
    """A model as it is; a callable, or a command's client, as a model."""
    if callable(getattr(made, "logits", None)) and callable(getattr(made, "session", None)):
        if tokenizer is not None:
            raise Error("a model brings its own tokenizer: tokenizer= is for callables and commands")
        return made
    if isinstance(made, LineClient):
        tokenizer = tokenizer or ByteTokenizer()
        made.open(int(tokenizer.vocab_size))
        return PredictorModel(made.name, tokenizer, lambda: made)
    if isinstance(made, type) or not callable(made):
        raise Error(f"a {type(made).__name__} predicts nothing: expected a model or a callable")
    name = getattr(made, "name", None) or getattr(made, "__qualname__", None) or type(made).__name__
    return PredictorModel(str(name), tokenizer or ByteTokenizer(), lambda: _Calls(made))


def facts_of(model: Any) -> dict[str, Any]:
    """What a certificate says of a model or of a callable that was made one."""
    traits = ModelTraits.of(model)
    if isinstance(model, PredictorModel):
        return {"name": traits.name, "vocab_size": traits.vocab_size, "tokenizer_sha256": traits.tokenizer.fingerprint}
    facts = {
        "name": traits.label,
        "engine": traits.engine or None,
        "device": traits.device,
        "dtype": traits.dtype or None,
        "n_params": traits.n_params,
        "sha256": weights_sha256(model) or None,
        "fingerprint": traits.fingerprint,
        "vocab_size": traits.vocab_size,
        "context_length": traits.context_length,
        "tokenizer_sha256": traits.tokenizer.fingerprint,
    }
    return {name: value for name, value in facts.items() if value is not None}


# A callable as a model.


class _Calls:
    """A callable, asked with all of the past each time. The past is the callable's own copy of what was decoded."""

    def __init__(self, predict: Callable[[Any], Any]):
        self._predict = predict

    def start(self) -> Any:
        self._past, self._n = np.empty(64, np.int32), 0
        return self._asked()

    def step(self, token: int) -> Any:
        if self._n == len(self._past):
            self._past = np.concatenate([self._past, np.empty_like(self._past)])
        self._past[self._n] = token
        self._n += 1
        return self._asked()

    def _asked(self) -> Any:
        past = self._past[: self._n]
        past.flags.writeable = False
        return self._predict(past)


class PredictorModel:
    """What gives probabilities step by step, as a model: `source()` has start() and step(token) -> float [V]."""

    engine = ""
    context_length = _CONTEXT_TOKENS
    bos_token = 0

    def __init__(self, name: str, tokenizer: AnyTokenizer, source: Callable[[], Any]):
        self.name, self.tokenizer, self._source = name, tokenizer, source
        self.vocab_size = self.n_logits = int(tokenizer.vocab_size)
        self.sum_error_max = 0.0

    def session(self, n_streams: int) -> _PredictorSession:
        if n_streams != 1:
            raise Error(f"{n_streams} streams side by side: a callable takes one")
        return _PredictorSession(self, self._source())

    def logits(self, tokens: npt.ArrayLike) -> np.ndarray:
        """int [B, T], each row begun by a start token -> float32 [B, T, V], by T steps of each row."""
        rows = np.asarray(tokens)
        found = np.empty((*rows.shape, self.n_logits), np.float32)
        for b, row in enumerate(rows):
            session = self.session(1)
            for t, token in enumerate(row):
                found[b, t] = session.step([token])[0]
        return found

    def row(self, answer: Any) -> np.ndarray:
        """The logits of probabilities, float32 [1, V]: their logarithm. `Refused` unless they are a distribution."""
        try:
            p = np.asarray(answer, np.float64)
        except (TypeError, ValueError) as error:
            raise Refused("distribution", f"the answer is no array of numbers: {reason(error)}") from None
        if p.shape != (self.n_logits,):
            raise Refused("distribution", f"the answer has shape {list(p.shape)}, expected [{self.n_logits}]")
        if not np.isfinite(p).all():
            at = int(np.flatnonzero(~np.isfinite(p))[0])
            raise Refused("distribution", f"the probability of token {at} is {p[at]}")
        if p.min() < 0:
            raise Refused("distribution", f"the probability of token {int(p.argmin())} is {p.min():.6g}, below 0")
        error_of_sum = abs(float(p.sum()) - 1)
        if error_of_sum > SUM_TOLERANCE:
            raise Refused("distribution", f"the probabilities sum to {p.sum():.6g}, expected 1 to {SUM_TOLERANCE:g}")
        self.sum_error_max = max(self.sum_error_max, error_of_sum)
        with np.errstate(divide="ignore"):
            return np.log(p).astype(np.float32)[None]


class _PredictorSession:
    """One stream; its first step, the start token, begins a document."""

    def __init__(self, model: PredictorModel, source: Any):
        self._model, self._source = model, source
        self.reset()

    def reset(self, stream: int | None = None) -> None:
        self._is_new = True

    def step(self, tokens: npt.ArrayLike) -> np.ndarray:
        token = int(np.asarray(tokens)[0])
        is_new, self._is_new = self._is_new, False
        try:
            answer = self._source.start() if is_new else self._source.step(token)
        except Error:
            raise
        except Exception as error:  # whatever the user's code raises
            raise Error(f"the predictor failed: {type(error).__name__}: {reason(error)}") from error
        return self._model.row(answer)


# A command.


class LineClient:
    """A running command that speaks the line protocol; one document at a time."""

    def __init__(self, argv: Sequence[str], seconds_max: float = SECONDS_MAX):
        self._argv, self._seconds_max = list(argv), seconds_max
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self.name = Path(argv[0]).name
        self._line_bytes_max = 0

    def open(self, vocab_size: int) -> None:
        """Starts the command and greets it."""
        self._line_bytes_max = 64 * vocab_size + (1 << 16)
        try:
            self._process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise Error(f"{self._argv[0]}: cannot be started: {error.strerror or error}") from error
        hello = self._ask({"llmcomp": "verify", "version": PROTOCOL_VERSION, "vocab_size": vocab_size})
        self.name = hello.text("name")

    def start(self) -> Sequence[Any]:
        return self._ask({"start": True}).array("probabilities")

    def step(self, token: int) -> Sequence[Any]:
        return self._ask({"token": token}).array("probabilities")

    def close(self) -> None:
        """Ends the command by the end of its input, by force after a second."""
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _ask(self, request: Mapping[str, Any]) -> Members:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Error(f"{self._argv[0]} ended before it was asked {json.dumps(request)}") from None
        answer = parse_object(self._line(self._process.stdout), self._argv[0], "the answer")
        if "error" in answer:
            raise Error(f"{self._argv[0]} says: {shown(answer['error'])}")
        return Members(answer, f"{self._argv[0]}: the answer to {json.dumps(request)}")

    def _line(self, pipe: IO[bytes]) -> bytes:
        deadline = time.monotonic() + self._seconds_max
        while b"\n" not in self._read:
            if len(self._read) > self._line_bytes_max:
                raise Error(
                    f"{self._argv[0]}: an answer of more than {self._line_bytes_max:,} bytes without a new line"
                )
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Error(f"{self._argv[0]}: no answer within {self._seconds_max:g} s")
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                raise Error(f"{self._argv[0]} ended without an answer")
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line


# Files and modules.


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _module_of_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise Error(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _file_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    digest, n_bytes = hashlib.sha256(), 0
    try:
        with Path(path).open("rb") as file:
            while part := file.read(_DIGEST_BYTES):
                digest.update(part)
                n_bytes += len(part)
    except OSError as error:
        raise Error(f"{path}: {error.strerror or error}") from error
    return {"file": Path(path).name, "bytes": n_bytes, "sha256": digest.hexdigest()}


def source_sha256(predictor: Any) -> str | None:
    """The digest of the Python file that defines a callable's or an object's class, where there is one."""
    target = predictor if inspect.isroutine(predictor) else type(predictor)
    try:
        path = inspect.getsourcefile(target)
        return None if path is None else str(_file_facts(path)["sha256"])
    except (TypeError, Error):
        return None

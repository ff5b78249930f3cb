"""The process in which a predictor codes, decodes or is probed: one verb a process, so that it keeps nothing from one
to the next. Started afresh (`main`), or as a copy of the caller's process by fork.

A fresh process gets the predictor as a pickle of the caller's own; what this module reads comes from its parent alone.
Messages, both ways: eight bytes, little-endian, that tell a length, and a pickle of so many bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any

from llmcomp.claims import coded_documents, probes
from llmcomp.claims.certificate import Refused
from llmcomp.claims.predictors import LineClient, PredictorModel, Recipe, as_predictor_model, facts_of
from llmcomp.codec.segments import SegmentCodec
from llmcomp.errors import CorruptArchive, Error, reason

_LENGTH_BYTES = 8
# How the core tells of a row that is no distribution.
_BAD_ROWS = ("is NaN", "is +inf", "all logits are -inf")

OnBytes = Callable[[int], Any]


class CannotStart(Error):
    """A fresh process cannot make the predictor; a copy of this process may."""


# What a worker does.


def serve(recipe: Recipe, tokenizer: Any, source: IO[bytes], target: IO[bytes]) -> None:
    """Makes the predictor, answers one request, and returns."""
    try:
        verb, given = _receive(source)
        made = recipe.make()
        try:
            answer = (
                "done",
                _WORK[verb](as_predictor_model(made, tokenizer), given, lambda n: _send(target, ("at", n))),
            )
        finally:
            if isinstance(made, LineClient):
                made.close()
    except Refused as error:
        answer = ("refused", (error.what, str(error)))
    except Error as error:
        answer = ("failed", str(error))
    except Exception as error:  # whatever the user's code raises
        answer = ("failed", f"the predictor failed: {type(error).__name__}: {reason(error)}")
    _send(target, answer)


def _codec(model: Any) -> SegmentCodec:
    return SegmentCodec(model, is_stepwise=True if isinstance(model, PredictorModel) else None)


def _encode(model: Any, documents: list[bytes], on_bytes: OnBytes) -> dict[str, Any]:
    try:
        found = coded_documents.encode(_codec(model), documents, on_bytes)
    except Refused:
        raise
    except Error as error:
        if any(words in str(error) for words in _BAD_ROWS):
            raise Refused("distribution", str(error)) from None
        raise
    checks = {"sum_error_max": model.sum_error_max} if isinstance(model, PredictorModel) else {}
    return {**found._asdict(), "facts": facts_of(model), "checks": checks}


def _decode(model: Any, packed: bytes, on_bytes: OnBytes) -> list[bytes]:
    try:
        return coded_documents.decode(_codec(model), packed, on_bytes)
    except CorruptArchive as error:
        raise Refused("decoding", str(error)) from None


def _probe(model: Any, documents: list[bytes], on_bytes: OnBytes) -> dict[str, Any]:
    # What is stepped through is given its past and nothing else.
    sees_future = not isinstance(model, PredictorModel) and getattr(model, "engine", "") != "torch"
    return probes.run(model, documents, sees_future)


_WORK: dict[str, Callable[[Any, Any, OnBytes], Any]] = {"encode": _encode, "decode": _decode, "probe": _probe}


# The caller's side.


def run_fresh(pickled: bytes, verb: str, given: Any, on_bytes: OnBytes) -> Any:
    """The result of `verb` in a new Python process; `pickled` is (recipe, tokenizer). CannotStart if that cannot be
    loaded there."""
    # Isolated, then with this process's own path: the working directory is searched only where it is here.
    program = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from llmcomp.claims import worker; worker.main()"
    )
    command = [sys.executable, "-I", "-c", program, json.dumps(sys.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # then what it had to say is in its answer
                _send(process.stdin, pickled)
                _send(process.stdin, (verb, given))
            return _answer(process.stdout, on_bytes)
        except BaseException:
            process.kill()
            raise


def run_forked(recipe: Recipe, tokenizer: Any, verb: str, given: Any, on_bytes: OnBytes) -> Any:
    """The result of `verb` in a copy of this process, for what no other process can load."""
    down, up = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of the copy's parent; see _forked
        child = os.fork()
    if child == 0:
        _forked(recipe, tokenizer, down, up)
    os.close(down[0])
    os.close(up[1])
    try:
        with os.fdopen(up[0], "rb") as from_child:
            with contextlib.suppress(BrokenPipeError), os.fdopen(down[1], "wb") as to_child:
                _send(to_child, (verb, given))
            return _answer(from_child, on_bytes)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.waitpid(child, 0)


def _forked(recipe: Recipe, tokenizer: Any, down: tuple[int, int], up: tuple[int, int]) -> None:
    """The child's whole life. Threads of other libraries did not survive the fork: they are told to do without."""
    status = 1
    try:
        os.close(down[1])
        os.close(up[0])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)
        with os.fdopen(down[0], "rb") as source, os.fdopen(up[1], "wb") as target:
            serve(recipe, tokenizer, source, target)
        status = 0
    finally:
        os._exit(status)


def _answer(source: IO[bytes], on_bytes: OnBytes) -> Any:
    while True:
        try:
            kind, value = _receive(source)
        except EOFError:
            raise Error("the process that codes was killed, or ended without a word") from None
        if kind == "at":
            on_bytes(value)
        elif kind == "refused":
            raise Refused(*value)
        elif kind == "cannot start":
            raise CannotStart(value)
        elif kind == "failed":
            raise Error(value)
        else:
            return value


# Messages.


def _send(target: IO[bytes], message: Any) -> None:
    content = pickle.dumps(message)
    target.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
    target.flush()


def _receive(source: IO[bytes]) -> Any:
    length = int.from_bytes(_read(source, _LENGTH_BYTES), "little")
    return pickle.loads(_read(source, length))


def _read(source: IO[bytes], n_bytes: int) -> bytes:
    content = source.read(n_bytes)
    if len(content) < n_bytes:
        raise EOFError
    return content


@contextlib.contextmanager
def _own_output() -> Iterator[IO[bytes]]:
    """Standard output for messages alone: what a predictor prints goes to standard error."""
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(2), "wb"), write_through=True)
    with target:
        yield target


def main() -> None:
    """A fresh process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    with _own_output() as target:
        source = sys.stdin.buffer
        pickled = _receive(source)
        try:
            recipe, tokenizer = pickle.loads(pickled)
        except Exception as error:  # whatever unpickling runs into: a class of a script or a notebook, for one
            _send(target, ("cannot start", f"{type(error).__name__}: {reason(error)}"))
            return
        serve(recipe, tokenizer, source, target)

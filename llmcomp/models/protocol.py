"""What a model has to offer and what it may offer: the one file to read before writing a model of your own.

A model must have `logits` and `session` (`Model`). Everything else here is optional and makes it faster or better
described. `models/adapter.py` asks once which abilities a model has; nobody else does.

Shapes: B streams side by side, T tokens, V logits a row (`n_logits`; the first `vocab_size` of them are tokens, the
rest is padding). Row t holds the logits of the token that follows token t. Where an argument is `lengths`, int64 [B],
row b has that many tokens and what comes after them is padding: nothing is computed from it, and what the result holds
there is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from llmcomp.errors import Error
from llmcomp.models.memory import PassMemory

# start, freq and total, each uint64 [B, T]: llmcomp.intervals says what they mean.
Intervals = tuple[np.ndarray, np.ndarray, np.ndarray]


class Session(Protocol):
    """Streams side by side, each with what it has seen so far."""

    def step(self, tokens: npt.ArrayLike) -> Any:
        """int [B], one more token for every stream -> float [B, V]: the logits of what follows it.

        Called once a token in decoding, so bits have to be those of `Model.logits`, or a decoder reads other numbers
        than the encoder wrote. A model whose bits differ says so by `engine = "torch"`: then both sides step.
        """
        ...


@runtime_checkable
class Model(Protocol):
    """What every model has."""

    def logits(self, tokens: npt.ArrayLike) -> Any:
        """int [B, T] -> float32, float16 or bfloat16 [B, T, V]: an array, or anything with `__dlpack__`.

        Called once a batch in scoring and compressing. Rows of one stream depend on nothing in the others.
        """
        ...

    def session(self, n_streams: int) -> Session:
        """A session of `n_streams` streams that have seen nothing; called in decoding, and again for every window
        unless the session has `reset`."""
        ...


class Described(Protocol):
    """Attributes that name and bound a model; `adapter.ModelTraits` has the default of each that is missing."""

    name: str  # in rows and archives
    step: int | None  # training step
    n_params: int  # all, tied weights once
    n_params_nonembedding: int  # without input and output embedding
    n_logits: int  # V
    vocab_size: int  # tokens among the logits
    context_length: int  # tokens that a window may hold
    tokenizer: Any  # data.tokenizers.AnyTokenizer
    bos_token: int  # what stands before the first token where the tokenizer names none
    fingerprint: str  # differs where any bit of any logit may; tells models apart in archives and sweeps
    weights_sha256: str  # of the weights alone
    engine: str  # "exact", "exact-int8", "torch", or "" for any other
    device: str
    dtype: str
    attention: str | None


# Abilities of a session.


class Resets(Protocol):
    def reset(self, stream: int | None = None) -> None:
        """Makes one stream (None: every stream) one that has seen nothing; saves a new session for every window."""
        ...


class Prefills(Protocol):
    def prefill(self, stream: int, tokens: npt.ArrayLike) -> Any:
        """int [T] into one stream, with the bits of T steps -> float [V], the logits after the last."""
        ...


# Abilities of a model: numbers made inside the pass, so that no logits leave it.


class IntervalsInPass(Protocol):
    def intervals(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None, *, vocab_size: int
    ) -> Intervals:
        """int [B, T] and what follows each, int [B, T] -> the intervals of the targets. Raises `Error`."""
        ...


class StartsIntervals(Protocol):
    def start_intervals(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None, *, vocab_size: int
    ) -> Callable[[], Intervals]:
        """As `intervals`, but returns when the device has its work; what is returned waits, on any thread."""
        ...


class Log2ProbabilitiesInPass(Protocol):
    def log2_probabilities(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None
    ) -> np.ndarray:
        """log2 of the softmax over all V logits at the targets, float64 [B, T]; for the published protocol."""
        ...


class StartsLog2Probabilities(Protocol):
    def start_log2_probabilities(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None
    ) -> Callable[[], np.ndarray]:
        """As `log2_probabilities`, but returns when the device has its work; what is returned waits."""
        ...


# Abilities of a model: memory, decoding beside the decoder, being watched.


class TellsMemory(Protocol):
    def pass_memory(self, n_tokens: int | None = None) -> PassMemory:
        """What a row of a pass costs and what is free, asked before the first batch of sequences of up to `n_tokens`
        tokens (None: as many as the context has). A method without an argument will do where that changes nothing."""
        ...


class ReleasesMemory(Protocol):
    def release_memory(self) -> None:
        """Gives back what the model keeps between passes; called after a batch that did not fit."""
        ...


class DecodingChain(Protocol):
    """A session with the range decoder beside it: many steps a call, without a word from Python for each token."""

    n_streams: int
    steps_max: int  # steps that one `run` may take

    def begin(self, payloads: Sequence[bytes]) -> None:
        """New streams, at most `n_streams`.

        The chain of a model with `mixes_in_chains = True` takes a second argument, `n_tokens_max`, int64 [n]: the most
        tokens that each stream can have, for payloads of mixed intervals.
        """
        ...

    def open_window(self, lanes: npt.NDArray[np.intp], inputs: npt.NDArray[np.int32]) -> None:
        """Streams `lanes` forget what they saw and read `inputs`, int32 [len(lanes), k]."""
        ...

    def run(self, n_steps: int, active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Decodes `n_steps` tokens of each opened stream that is active -> int32 [n_steps, len(active)].

        -2 stands where a row had no distribution; `fault` then says why.
        """
        ...

    def fault(self) -> str: ...


class DecodesInChains(Protocol):
    def lanes(self, n_tokens: int) -> int:
        """How many streams of `n_tokens` are best decoded side by side."""
        ...

    def decoding_chain(self, n_streams: int, n_tokens: int, vocab_size: int) -> DecodingChain: ...


class IsWatched(Protocol):
    def watch(self, part: str) -> AbstractContextManager[Any]:
        """Entered around a part of the work ("intervals"); the benchmarks' stopwatch."""
        ...


def as_model(model: Any) -> Any:
    """`model` itself if it has logits() and session(); anything else is an `Error`."""
    if isinstance(model, type):
        raise Error(f"{model.__name__} is a class, expected a model made of it")
    missing = [method for method in ("logits", "session") if not callable(getattr(model, method, None))]
    if missing:
        raise Error(f"a {type(model).__name__} is no model: it has no {' and no '.join(m + '()' for m in missing)}")
    return model

"""Any model behind one interface: which abilities of protocol.py it has is asked here, once, and nowhere else.

What a model cannot do itself is done for it from its logits. So whoever scores, compresses or decodes needs no second
way for models that lack something.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmcomp import coding
from llmcomp.data import tokenizers
from llmcomp.errors import Error
from llmcomp.models.memory import PassMemory, host_memory
from llmcomp.models.protocol import DecodingChain, as_model

CONTEXT_LENGTH_DEFAULT = 2048
# Streams that are decoded side by side by a model that does not say.
LANES_DEFAULT = 32
# A batch holds at most so many bytes of logits where the model has no fused `intervals`, else so many rows.
BATCH_LOGITS_BYTES = 64 << 20
BATCH_ROWS = 8192

Tokens = npt.NDArray[np.int32]


class ModelTraits(NamedTuple):
    """What is known of a model; attributes that it does not have get the defaults named here."""

    name: str  # its class's name
    step: int | None  # None
    fingerprint: str | None  # None: models are then told apart by name, and that is the caller's promise
    tokenizer: Any  # ByteTokenizer()
    engine: str  # ""
    arithmetic: int  # 1: the version of csrc/FORMAT.md that the model needs
    device: str  # "cpu"
    dtype: str  # ""
    attention: str  # ""
    n_params: int | None  # None
    n_params_nonembedding: int | None  # None
    context_length: int  # 2,048
    vocab_size: int  # the tokenizer's, where that is not larger
    n_logits: int  # vocab_size
    bos_token: int  # the tokenizer's, else 0

    @classmethod
    def of(cls, model: Any) -> ModelTraits:
        def has(name: str, default: Any) -> Any:
            return getattr(model, name, None) or default

        tokenizer = has("tokenizer", None) or tokenizers.ByteTokenizer()
        bos_token = getattr(tokenizer, "bos_token", None)
        vocab_size = min(int(tokenizer.vocab_size), int(getattr(model, "vocab_size", tokenizer.vocab_size)))
        return cls(
            name=str(has("name", type(model).__name__)),
            step=getattr(model, "step", None),
            fingerprint=has("fingerprint", None),
            tokenizer=tokenizer,
            engine=str(has("engine", "")),
            arithmetic=int(has("arithmetic", 1)),
            device=str(has("device", "cpu")),
            dtype=str(has("dtype", "")),
            attention=str(has("attention", "")),
            n_params=getattr(model, "n_params", None),
            n_params_nonembedding=getattr(model, "n_params_nonembedding", None),
            context_length=int(has("context_length", CONTEXT_LENGTH_DEFAULT)),
            vocab_size=vocab_size,
            n_logits=int(has("n_logits", vocab_size)),
            bos_token=int(bos_token if bos_token is not None else has("bos_token", 0)),
        )

    @property
    def revision(self) -> str:
        """ "step<step>", or nothing."""
        return "" if self.step is None else f"step{self.step}"

    @property
    def label(self) -> str:
        return f"{self.name} {self.revision}".strip()


class AdaptedSession:
    """A session with `prefill`, whether its model's has it or not."""

    def __init__(self, session: Any, n_streams: int, may_prefill: bool):
        self.step: Callable[[npt.ArrayLike], Any] = session.step
        self.n_streams = n_streams
        self.reset: Callable[[], None] | None = _ability(session, "reset")
        self._prefill = _ability(session, "prefill") if may_prefill else None

    def read(self, inputs: npt.NDArray[np.int32]) -> Any:
        """int32 [B, k], k >= 1, into all streams -> float [B, V], the logits after the last."""
        if self._prefill is not None:
            return np.stack([self._prefill(stream, row) for stream, row in enumerate(inputs)])
        for column in np.ascontiguousarray(inputs.T):
            logits = self.step(column)
        return logits


class AdaptedModel:
    """A model, what is known of it, and all it could be asked for."""

    def __init__(self, model: Any):
        self.model = as_model(model)
        self.traits = ModelTraits.of(model)
        self._start_intervals = _ability(model, "start_intervals")
        self._intervals = _ability(model, "intervals")
        self._start_log2_probabilities = _ability(model, "start_log2_probabilities")
        self._log2_probabilities = _ability(model, "log2_probabilities")
        self._pass_memory = _ability(model, "pass_memory")
        self.release_memory: Callable[[], Any] = _ability(model, "release_memory") or (lambda: None)
        self._watch: Callable[[str], AbstractContextManager[Any]] = _ability(model, "watch") or nullcontext
        self._lanes = _ability(model, "lanes")
        self._decoding_chain = _ability(model, "decoding_chain")
        self._mixes_in_chains = bool(getattr(model, "mixes_in_chains", False))

    # Passes.

    @property
    def has_intervals(self) -> bool:
        """Whether intervals are made inside the pass, so that no logits exist outside it."""
        return self._intervals is not None or self._start_intervals is not None

    @property
    def has_log2_probabilities(self) -> bool:
        return self._log2_probabilities is not None or self._start_log2_probabilities is not None

    def pass_memory(self, is_fused: bool, n_tokens: int | None = None) -> PassMemory:
        """What a pass over sequences of up to `n_tokens` tokens costs; not `is_fused`: all logits of a batch exist at
        once. Of a model that does not say, only the logits are known."""
        logits_bytes = 4 * self.traits.n_logits
        rows_max = BATCH_ROWS if is_fused else max(1, BATCH_LOGITS_BYTES // logits_bytes)
        memory = self._ask_pass_memory(n_tokens) if self._pass_memory else PassMemory(0, 0, 0, *host_memory(), rows_max)
        if is_fused:
            return memory
        return memory._replace(row_bytes=memory.row_bytes + logits_bytes, rows_max=rows_max)

    def _ask_pass_memory(self, n_tokens: int | None) -> PassMemory:
        assert self._pass_memory is not None
        takes_tokens = bool(inspect.signature(self._pass_memory).parameters)
        memory: PassMemory = self._pass_memory(n_tokens) if takes_tokens else self._pass_memory()
        return memory

    def start_intervals(
        self, tokens: Tokens, targets: Tokens, lengths: npt.NDArray[np.int64], vocab_size: int
    ) -> Callable[[], np.ndarray]:
        """int32 [B, T] and what follows each -> what waits for uint64 [3, B, T]: start, freq, total."""
        if self._start_intervals is not None:
            wait = self._start_intervals(tokens, targets, lengths, vocab_size=vocab_size)
            return lambda: np.stack(wait())
        if self._intervals is not None:
            parts = np.stack(self._intervals(tokens, targets, lengths, vocab_size=vocab_size))
        else:
            logits = self.model.logits(tokens)
            parts = np.zeros((3, *targets.shape), np.uint64)
            for row, n in enumerate(lengths):
                parts[:, row, :n] = coding.intervals(logits[row, :n], targets[row, :n], vocab_size)
        return lambda: parts

    def start_log2_probabilities(
        self, tokens: Tokens, targets: Tokens, lengths: npt.NDArray[np.int64], streams: Sequence[int]
    ) -> Callable[[], np.ndarray]:
        """As `start_intervals`, for log2 of the softmax over all logits: float64 [B, T].

        `Error` for logits that make no distribution, by the caller's own number of the stream, int [B].
        """
        if self._start_log2_probabilities is not None:
            return self._start_log2_probabilities(tokens, targets, lengths)
        if self._log2_probabilities is not None:
            found = self._log2_probabilities(tokens, targets, lengths)
        else:
            found = self._log2_of_logits(tokens, targets, lengths, streams)
        return lambda: found

    def _log2_of_logits(
        self, tokens: Tokens, targets: Tokens, lengths: npt.NDArray[np.int64], streams: Sequence[int]
    ) -> np.ndarray:
        given = self.model.logits(tokens)
        logits = given if hasattr(given, "__dlpack__") else np.asarray(given)
        found = np.zeros(targets.shape)
        with self._watch("intervals"):
            for row, n in enumerate(lengths):
                part = logits[row, :n]
                if isinstance(part, np.ndarray) and part.dtype.itemsize > 4:
                    part = part.astype(np.float32)
                try:
                    found[row, :n] = coding.log2_softmax(part, targets[row, :n])
                except Error as error:
                    raise Error(f"stream {streams[row]}, {error}") from None
        return found

    # Decoding.

    def session(self, n_streams: int, may_prefill: bool = True) -> AdaptedSession:
        return AdaptedSession(self.model.session(n_streams), n_streams, may_prefill)

    def lanes(self, n_tokens: int) -> int:
        """How many streams of `n_tokens` are decoded side by side unless the caller says otherwise."""
        return int(self._lanes(n_tokens)) if self._lanes is not None else LANES_DEFAULT

    @property
    def decodes_in_chains(self) -> bool:
        return self._decoding_chain is not None

    @property
    def mixes_in_chains(self) -> bool:
        """Whether the chain's `begin` takes `n_tokens_max`, for payloads of mixed intervals."""
        return self._mixes_in_chains

    def decoding_chain(self, n_streams: int, n_tokens: int, vocab_size: int) -> DecodingChain:
        assert self._decoding_chain is not None
        return self._decoding_chain(n_streams, n_tokens, vocab_size)


def is_model(value: Any) -> bool:
    """Whether `value` is meant as a model rather than as the name of one or a sequence of them."""
    return hasattr(value, "logits")


def weights_sha256(model: Any) -> str:
    """The digest of its weights, "" for a model that has none. Not among the traits: it may read all weights."""
    return str(getattr(model, "weights_sha256", None) or "")


def _ability(target: Any, name: str) -> Any:
    """The method, or None. Not isinstance: a Protocol's check does not see what `__getattr__` of a proxy gives."""
    found = getattr(target, name, None)
    return found if callable(found) else None

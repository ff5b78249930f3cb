"""The compressor run backwards: random bits in, samples of the model out. No arithmetic of its own.

Why decoding random bits samples from the model. The coder gives every sequence of tokens an interval of [0, 1) whose
width is the product of its integer probabilities freq / total. A stream of fair random bits is a uniform number u of
[0, 1), and decoding it finds the sequence whose interval holds u: each comes with exactly its interval's width as its
probability. (Widths are the products up to the coder's own rounding, relatively less than total / 2^56 a token, below
2^-20 for a vocabulary of 50,304: csrc/FORMAT.md, section 3.1.) So the samples are those of the compressor's model, not
of one near it, and n tokens use up as many random bits as they would cost to compress. Encoding a sample gives back
the bits that it came from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from llmcomp import coding
from llmcomp.codec.segments import windowed_model
from llmcomp.codec.windows import WindowedModel, plan_windows
from llmcomp.data.mappings import get_mapping
from llmcomp.data.tokenizers import AnyTokenizer
from llmcomp.data.vocabulary import Tokens
from llmcomp.errors import Error
from llmcomp.float_state import ieee_state
from llmcomp.models.adapter import ModelTraits
from llmcomp.models.load import load_model
from llmcomp.progress import tqdm

# range >= 32 behind every token (FORMAT.md 3.1), so that a step reads at most 7 bytes; 8 are read at the start.
_BYTES_PER_TOKEN_MAX, _FIRST_BYTES = 7, 8


@overload
def generate(
    model: Any,
    n_bytes: int | None = None,
    *,
    n_tokens: int | None = None,
    prefix: bytes = b"",
    seed: int = 0,
    temperature: float = 1.0,
    n_streams: None = None,
    overlap: int | None = None,
    progress: bool = True,
) -> bytes: ...
@overload
def generate(
    model: Any,
    n_bytes: int | None = None,
    *,
    n_tokens: int | None = None,
    prefix: bytes = b"",
    seed: int = 0,
    temperature: float = 1.0,
    n_streams: int,
    overlap: int | None = None,
    progress: bool = True,
) -> list[bytes]: ...
def generate(
    model: Any,
    n_bytes: int | None = None,
    *,
    n_tokens: int | None = None,
    prefix: bytes = b"",
    seed: int = 0,
    temperature: float = 1.0,
    n_streams: int | None = None,
    overlap: int | None = None,
    progress: bool = True,
) -> bytes | list[bytes]:
    """`prefix` and a continuation that `model` finds likely, decoded from random bits.

    Args:
        model: as in `compress`.
        n_bytes, n_tokens: how much to add to the prefix, one of the two. A continuation is shorter where the model ends
            it: at the first token that stands for no bytes (<|endoftext|>).
        prefix: any bytes to continue: text, rows of a grey picture, 16-bit samples. They become tokens by mapping
            "bytes", and the continuation begins with a token of its own.
        seed: chooses the random bits, see `random_bits`. With the exact engine the same seed gives the same bytes on
            every machine, backend and number of threads.
        temperature: 1 samples from the model itself; logits are divided by it, so below 1 likely tokens gain.
        n_streams: None for one continuation, a number for a list of as many, sampled side by side. The first is the one
            that None gives, and none depends on how many there are.
        overlap: of the windows beyond the model's context, as in `compress`.

    Raises:
        Error: a length, temperature or number of streams out of range, a prefix that is not bytes, or a model that
            gives NaN.
    """
    if (n_bytes is None) == (n_tokens is None):
        raise Error(f"n_bytes is {n_bytes} and n_tokens {n_tokens}: expected a number for one of the two")
    if n_streams is not None and n_streams < 1:
        raise Error(f"n_streams is {n_streams}: expected 1 or more")
    if not isinstance(prefix, (bytes, bytearray, memoryview)):
        raise Error(f"prefix is a {type(prefix).__name__}; expected bytes")
    model, prefix = load_model(model), bytes(prefix)
    tokenizer = ModelTraits.of(model).tokenizer
    stand_ins = tokenizer.needs_stand_ins(prefix)
    context = get_mapping("bytes").encode(prefix, tokenizer).tokens
    # A continuation goes on with tokens of at least one byte each, so n_bytes of them are always enough.
    n_steps = n_tokens if n_bytes is None else n_bytes
    assert n_steps is not None
    _check(n_steps, temperature)
    windowed = windowed_model(model, overlap)
    payloads = [random_bits(seed, stream, n_steps) for stream in range(n_streams or 1)]
    found = []
    with tqdm(total=n_steps * len(payloads), disable=not progress, delay=2, leave=False, unit="token") as bar:
        for batch in _side_by_side(payloads, windowed):
            texts = [_Text(tokenizer, stand_ins, n_bytes) for _ in batch]
            for column in _columns(windowed, batch, context, n_steps, temperature):
                for text, token in zip(texts, column.tolist(), strict=True):
                    text.add(token)
                bar.update(len(texts))
                if all(text.is_complete for text in texts):
                    break
            found += [prefix + bytes(text.content) for text in texts]
    return found[0] if n_streams is None else found


def sample_tokens(
    model: Any,
    payloads: Sequence[bytes],
    n_tokens: int,
    context: npt.ArrayLike = (),
    *,
    temperature: float = 1.0,
    overlap: int | None = None,
) -> Tokens:
    """The first `n_tokens` tokens of streams of bits, one stream a payload, each behind the tokens `context`, int [k].

    int32 [n_streams, n_tokens]. Bits behind the end of a payload are zeros, as the coder has it. Without context and at
    temperature 1 this is the inverse of the coding of `compress`: encoding the tokens gives the bits back.
    """
    _check(n_tokens, temperature)
    windowed = windowed_model(load_model(model), overlap)
    known = np.asarray(context, np.int32).reshape(-1)
    found = []
    for batch in _side_by_side(payloads, windowed):
        columns = list(_columns(windowed, batch, known, n_tokens, temperature))
        found.append(np.stack(columns, 1) if columns else np.zeros((len(batch), 0), np.int32))
    return np.concatenate(found) if found else np.zeros((0, n_tokens), np.int32)


def random_bits(seed: int, stream: int, n_tokens: int) -> bytes:
    """Random bytes of one stream, more than `n_tokens` tokens can use up: SHAKE-256 of "llmcomp SEED STREAM".

    SHAKE-256 (FIPS 202) is the same everywhere, and a longer output begins with the shorter one.
    """
    return hashlib.shake_256(f"llmcomp {seed} {stream}".encode()).digest(_FIRST_BYTES + _BYTES_PER_TOKEN_MAX * n_tokens)


def _check(n_new: int, temperature: float) -> None:
    if n_new < 0:
        raise Error(f"{n_new} bytes or tokens to generate: expected 0 or more")
    if not 0 < temperature < math.inf:
        raise Error(f"temperature is {temperature}: expected a number above 0")


class _Text:
    """The bytes of one continuation; complete with `n_bytes` of them (None: never) or when the model ends it."""

    def __init__(self, tokenizer: AnyTokenizer, stand_ins: bool, n_bytes: int | None):
        self.content = bytearray()
        self.is_complete = n_bytes == 0
        self._tokenizer = tokenizer
        self._stand_ins = stand_ins
        self._n_bytes = n_bytes

    def add(self, token: int) -> None:
        if self.is_complete:
            return
        try:
            self.content += self._tokenizer.decode_bytes([token], stand_ins=self._stand_ins)
        except Error:  # it stands for no bytes
            self.is_complete = True
        if self._n_bytes is not None and len(self.content) >= self._n_bytes:
            del self.content[self._n_bytes :]
            self.is_complete = True


def _side_by_side(payloads: Sequence[bytes], windowed: WindowedModel) -> list[Sequence[bytes]]:
    """The batches in which streams are sampled: one by one where a model's logits depend on the batch."""
    if windowed.is_stepwise:
        return [[payload] for payload in payloads]
    return [payloads] if payloads else []


def _columns(
    windowed: WindowedModel, payloads: Sequence[bytes], context: Tokens, n_tokens: int, temperature: float
) -> Iterator[Tokens]:
    """The next token of every stream behind `context`, int32 [n_streams], `n_tokens` times."""
    decoder = coding.Decoder(payloads, windowed.vocab_size)
    n_known = len(context)
    tokens = np.empty((len(payloads), n_known + n_tokens), np.int32)
    tokens[:, :n_known] = context
    for window in plan_windows(n_known + n_tokens, windowed.context_length, windowed.overlap):
        if window.stop <= n_known:
            continue
        first = max(window.start, n_known)
        session, logits = windowed.open_window(tokens[:, window.context_start : first])
        for at in range(first, window.stop):
            tokens[:, at] = decoder.pull(_at_temperature(logits, temperature))
            yield tokens[:, at]
            if at + 1 < window.stop:
                logits = session.step(tokens[:, at])


@ieee_state()
def _at_temperature(logits: Any, temperature: float) -> Any:
    if temperature == 1:
        return logits
    # Below their maximum, so that no quotient is +inf, which the coder refuses; -inf is its floor.
    rows = np.asarray(logits, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return (rows - rows.max(1, keepdims=True)) / np.float32(temperature)

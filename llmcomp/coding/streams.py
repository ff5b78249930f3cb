"""Arrays to integer intervals to payload bytes, and back. Knows nothing of models, tokenizers or files.

The arithmetic is csrc/FORMAT.md's: the weight of a symbol is 1 + floor(2**29 * 2**t) with t = (logit - max) / ln 2,
by IEEE operations in a fixed order, so that every backend, thread count and machine gets the same integers.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmcomp import _core
from llmcomp.coding import cuda
from llmcomp.display import Shown
from llmcomp.errors import Error
from llmcomp.float_state import ieee_state
from llmcomp.settings import check_threads

__all__ = [
    "Decoder",
    "Encoder",
    "backend_in_use",
    "backends",
    "code_length",
    "decode",
    "encode",
    "encode_intervals",
    "intervals",
    "log2_softmax",
    "mix_intervals",
    "threads_in_use",
    "use_backend",
    "use_threads",
]

UInt64Array = NDArray[np.uint64]


def intervals(
    logits: Any, tokens: ArrayLike, vocab_size: int | None = None
) -> tuple[UInt64Array, UInt64Array, UInt64Array]:
    """The integer interval of each token in the distribution that its row of logits stands for.

    Args:
        logits: float32, float16 or bfloat16 [..., V]: NumPy, or anything with ``__dlpack__``. On the CPU read in place
            where rows are contiguous and evenly spaced, else from one copy. On a CUDA device (also by
            ``__cuda_array_interface__``) never copied: rows must be contiguous. -inf gets the floor weight.
        tokens: integers [...], each in [0, vocab_size).
        vocab_size: how many of the V logits of a row are symbols; the rest gets no probability. Default V, at most
            2**21.

    Returns:
        ``(start, freq, total)``, uint64 [...] each: the token owns [start, start + freq) of [0, total);
        freq >= 1 and total <= 2**51. For logits on a CUDA device: arrays there of the caller's own kind, computed on
        its current stream (torch: int64; other than torch and CuPy: `llmcomp.coding.cuda.DeviceArray`).

    Raises:
        Error: NaN, +inf, a row of nothing but -inf, or a token out of range, naming the row (counted over all leading
            axes); a wrong dtype, shape or device.
    """
    if cuda.is_on_device(logits):
        return cuda.intervals(logits, tokens, vocab_size)
    return _core.intervals(logits, tokens, vocab_size)


@ieee_state()
def code_length(logits: Any, tokens: ArrayLike, vocab_size: int | None = None) -> NDArray[np.float64]:
    """Bits that each token costs: ``-log2(freq / total)``, float64 [...]. Arguments and errors as `intervals`."""
    if cuda.is_on_device(logits):
        return cuda.code_length(logits, tokens, vocab_size)
    _, freq, total = _core.intervals(logits, tokens, vocab_size)
    return -np.log2(freq.astype(np.float64) / total.astype(np.float64))


def log2_softmax(logits: Any, tokens: ArrayLike, vocab_size: int | None = None) -> NDArray[np.float64]:
    """log2 of the softmax at each token, float64 [...], -inf for a logit of -inf: for scores, nothing is coded by it.

    The same bits by every backend, thread count and machine, and less than 2e-6 from the softmax in exact numbers.
    Arguments and errors as `intervals`.
    """
    if cuda.is_on_device(logits):
        return cuda.log2_softmax(logits, tokens, vocab_size)
    return _core.log2_softmax(logits, tokens, vocab_size)


def encode(logits: Any, tokens: ArrayLike, vocab_size: int | None = None) -> bytes:
    """The payload of one stream: logits [T, V] and tokens [T], otherwise as `intervals`.

    The payload has the fewest bytes that decode; it does not hold T. At most 16 bits above the sum of `code_length`,
    and 1e-4 of it.
    """
    if cuda.is_on_device(logits):
        return cuda.encode(logits, tokens, vocab_size)
    return _core.encode(logits, tokens, vocab_size)


def decode(payload: bytes, logits: Any, vocab_size: int | None = None) -> NDArray[np.int32]:
    """The tokens, int32 [T], of a payload of `encode`, where all logits [T, V] are known.

    A payload that is not of these logits, or that is truncated, gives other tokens, never an error. An archive has a
    length and a checksum beside each payload; who keeps payloads by themselves has to keep these, and T, too.
    """
    if cuda.is_on_device(logits):
        return cuda.decode(payload, logits, vocab_size)
    return _core.decode(payload, logits, vocab_size)


def encode_intervals(start: ArrayLike, freq: ArrayLike, total: ArrayLike) -> bytes:
    """The payload of one stream from its intervals, integers [T] each, as `intervals` gives them.

    Raises:
        Error: an interval that is empty, or not inside a total of at most 2**51, naming its index.
    """
    return _core.encode_intervals(start, freq, total)


def mix_intervals(
    tokens: ArrayLike, start: ArrayLike, freq: ArrayLike, total: ArrayLike
) -> tuple[UInt64Array, UInt64Array, UInt64Array]:
    """The intervals of one stream, integers [T] each, mixed with what its own tokens, integers [T], teach on the way.

    Where a context of 1, 2, 3, 4, 6 or 12 tokens has occurred in the stream before, the tokens that followed it get
    more of the row: csrc/FORMAT.md, "Mixing". Returns arrays as `intervals` does; a `Decoder` that was given
    `n_tokens_max` decodes them from the same logits.

    Raises:
        Error: an interval that is empty or not one of `intervals`, or a token below 0, naming its index.
    """
    return _core.mix_intervals(tokens, start, freq, total)


class _Streams(Shown):
    """Streams that live where their first logits are: in the C core, or on a CUDA device."""

    _on_host: Any
    _on_device: Any = None
    _is_on_host = False

    @property
    def n_streams(self) -> int:
        """Number of streams."""
        return int(self._on_host.n_streams)

    def _facts(self) -> dict[str, Any]:
        place = "CUDA device" if self._on_device is not None else "processor" if self._is_on_host else "not begun"
        return {"streams": self.n_streams, "on": place}

    def _at(self, logits: Any) -> Any:
        if self._on_device is None and not cuda.is_on_device(logits):
            self._is_on_host = True
            return self._on_host
        if self._is_on_host or not cuda.is_on_device(logits):
            raise Error("logits are on another device than those of the steps before; expected them all on one")
        if self._on_device is None:
            self._on_device = self._new_on_device()
        return self._on_device

    def _new_on_device(self) -> Any:
        raise NotImplementedError

    def check(self) -> None:
        """Raises the first error that a step has found. On the CPU every step does so itself; on a CUDA device steps do
        not wait, and this does."""
        if self._on_device is not None:
            self._on_device.check()


class Encoder(_Streams):
    """Codes n_streams independent streams of tokens side by side, one token of each at a step.

    With logits on a CUDA device everything stays there until finish(), and no step waits for the device: see
    `llmcomp.coding.cuda.DeviceEncoder` for errors and for steps captured in a CUDA graph.
    """

    def __init__(self, n_streams: int, vocab_size: int | None = None) -> None:
        self._on_host = _core.Encoder(n_streams, vocab_size)
        self._vocab_size = vocab_size
        self._n_reserved = 0

    def _new_on_device(self) -> cuda.DeviceEncoder:
        encoder = cuda.DeviceEncoder(self.n_streams, self._vocab_size)
        encoder.reserve(self._n_reserved)
        return encoder

    def push(self, logits: Any, tokens: ArrayLike, active: NDArray[np.bool_] | None = None) -> None:
        """One token into every active stream: logits [n_streams, V], tokens int [n_streams], active bool [n_streams].

        On an error nothing is coded. The rows of streams that are not active are not read.
        """
        self._at(logits).push(logits, tokens, active)

    def push_intervals(
        self, start: ArrayLike, freq: ArrayLike, total: ArrayLike, active: NDArray[np.bool_] | None = None
    ) -> None:
        """As push, with the integers that intervals() gave: uint64 [n_streams] each."""
        self._at(start).push_intervals(start, freq, total, active)

    def reserve(self, n_steps: int) -> None:
        """Room for n_steps more steps on a CUDA device, before a step is captured in a graph; no effect elsewhere."""
        self._n_reserved = n_steps
        if self._on_device is not None:
            self._on_device.reserve(n_steps)

    def finish(self) -> list[bytes]:
        """Ends all streams and returns their payloads, a list of n_streams bytes objects."""
        return list((self._on_host if self._on_device is None else self._on_device).finish())


class Decoder(_Streams):
    """Decodes the payloads of an Encoder side by side, one token of each stream at a step.

    With logits on a CUDA device payloads, state and tokens are there, and no step waits for the device: see
    `llmcomp.coding.cuda.DeviceDecoder` for errors and for steps captured in a CUDA graph.
    """

    def __init__(
        self, payloads: Sequence[bytes], vocab_size: int | None = None, n_tokens_max: ArrayLike | None = None
    ) -> None:
        """`n_tokens_max`, int [n_streams], for payloads of `mix_intervals`: the most tokens that a stream can have.

        Such streams are decoded on the CPU: `Error` for logits on a device.
        """
        self._on_host = _core.Decoder(payloads, vocab_size, n_tokens_max)
        self._payloads, self._vocab_size = payloads, vocab_size
        self._is_mixed = n_tokens_max is not None

    def _new_on_device(self) -> cuda.DeviceDecoder:
        if self._is_mixed:
            raise Error("mixed streams are decoded on the CPU; expected logits there")
        return cuda.DeviceDecoder(self._payloads, self._vocab_size)

    def pull(self, logits: Any, active: NDArray[np.bool_] | None = None) -> NDArray[np.int32]:
        """The next token of every active stream, int32 [n_streams], -1 where not active.

        logits [n_streams, V] as they were pushed, active bool [n_streams]. A stream does not know its length: past its
        end come tokens that mean nothing. On an error streams without one may have moved on: start again from the
        payloads.
        """
        tokens: NDArray[np.int32] = self._at(logits).pull(logits, active)
        return tokens


def backends() -> tuple[str, ...]:
    """The backends that this machine can run, slowest first; the first is always "serial", the specification."""
    return _core.backend_names()


def backend_in_use() -> str:
    """The backend that a call from this thread uses."""
    return _core.context_in_use()[0]


def threads_in_use() -> int:
    """The number of threads that a call from this thread uses."""
    return _core.context_in_use()[1]


@contextlib.contextmanager
def _override(backend: str | None, n_threads: int) -> Iterator[None]:
    before = _core.override_in_use()
    _core.set_override(backend or before[0], n_threads or before[1])
    try:
        yield
    finally:
        _core.set_override(*before)


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Within ``with use_backend(name):`` this thread computes with that backend. Results are the same with every one.

    Raises:
        Error: the backend is unknown or not available on this machine.
    """
    if name not in backends():
        raise Error(f"backend {name!r} is not available; this machine has {', '.join(backends())}")
    return _override(name, 0)


def use_threads(n_threads: int) -> contextlib.AbstractContextManager[None]:
    """Within ``with use_threads(n):`` calls of this thread are spread over n threads. Results do not depend on n.

    Raises:
        Error: n is not a number of 1 to 65536.
    """
    return _override(None, check_threads("n_threads", operator.index(n_threads)))

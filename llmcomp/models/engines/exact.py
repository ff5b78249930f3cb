"""The exact engine: checkpoints of known families in Hugging Face's layout for the C core, which computes them bit for
bit alike on every machine, for any batch, padding, number of threads, and in one pass as step by step.

Here files are read and checked; weights stay mapped from the file. No arithmetic, and no tokens' meaning, lives here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcomp import _core
from llmcomp.data.tokenizers import Tokenized
from llmcomp.errors import Error
from llmcomp.float_state import ieee_state
from llmcomp.models.checkpoint import Tensor, core_arguments, match_tensors, read_checkpoint, tensors_sha256
from llmcomp.models.families import parse_graph
from llmcomp.models.memory import PassMemory, host_memory

# Version of the arithmetic of csrc/FORMAT.md for GPT-NeoX; a model has its own, a part of its fingerprint.
ARITHMETIC = 1
# Rows of a batch, at most; more do not make the products faster.
_BATCH_ROWS = 8192
# Of each token's and result's arrays.
_ROW_BYTES = 64
# Keys and values of streams that are decoded side by side: at most what a third cache of usual size keeps from step to
# step, in lanes that fill a vector, but no fewer than such a vector for every thread (benchmarks/results/archive.md).
_KEPT_BYTES = 8 << 20
_LANES_STEP = 8
_LANES_MAX = 32
_SESSION_BYTES_MAX = 256 << 20


class ExactModel(Tokenized):
    """A transformer in the C core, made by `load_exact` or from arrays.

    `n_logits` logits a row, of which the first `vocab_size` are tokens; the padded rest gets no probability.
    `n_params` counts tied weights once. `fingerprint` (SHA-256, hex) is over all that the coded bits depend on:
    weights, configuration, tokenizer and version of the arithmetic; `weights_sha256` is over the weights alone.
    """

    engine = "exact"
    mixes_in_chains = True
    device = "cpu"
    _is_int8 = False
    attention = None

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, np.ndarray | Tensor],
        *,
        name: str = "model",
        step: int | None = None,
        vocab_size: int | None = None,
        tokenizer_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """`config`: what config.json says; `weights`: float32 or float16 arrays by their names in the checkpoint."""
        self.name, self.step = name, step
        self.config = parse_graph(config, name)
        self.arithmetic = _core.transformer_arithmetic(self.config.core_config(self._is_int8))
        self.n_logits, self.context_length = self.config.n_logits, self.config.context_length
        self._tokenizer_path = tokenizer_path
        self._tensors = match_tensors(self.config, weights, name)
        self.dtype = self._tensors[self.config.uses[0].name].dtype
        self.n_params = sum(tensor.data.size for tensor in self._tensors.values())
        embeddings = {use.name: math.prod(use.shape) for use in self.config.uses if use.slot in ("embedding", "head")}
        self.n_params_nonembedding = self.n_params - sum(embeddings.values())
        if vocab_size is not None:
            if not 1 <= vocab_size <= self.n_logits:
                raise Error(f"{name}: vocab_size is {vocab_size}, expected 1 to {self.n_logits}")
            self.vocab_size = vocab_size
        self._core = self._make_core()

    def _make_core(self) -> Any:
        return _core.TransformerModel(**core_arguments(self.config, self._tensors, self._is_int8))

    @functools.cached_property
    def weights_sha256(self) -> str:
        return tensors_sha256(self._tensors)

    @functools.cached_property
    @ieee_state()
    def fingerprint(self) -> str:
        facts = {
            "arithmetic": self.arithmetic,
            "config": self.config.facts(self.arithmetic),
            "tokenizer": self.tokenizer_fingerprint,
            "vocab_size": self.vocab_size,
            "weights": self.weights_sha256,
        }
        if self._is_int8:
            facts["engine"] = self.engine
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def pass_memory(self, n_tokens: int | None = None) -> PassMemory:
        """What a pass takes: for every row the token and its interval; beside them the core's workspace, by the threads
        in use now."""
        # An `Int8Model` keeps no tensors but its codes, a byte a weight.
        weight_bytes = sum(tensor.data.nbytes for tensor in self._tensors.values()) or self.n_params
        longest = n_tokens or self.context_length
        # Sequences run in waves; many short ones fill a wave where the longest may not.
        fixed_bytes = max(
            self._core.pass_bytes(max(1, _BATCH_ROWS // longest), longest), self._core.pass_bytes(_BATCH_ROWS, 1)
        )
        return PassMemory(_ROW_BYTES, fixed_bytes, weight_bytes, *host_memory(), _BATCH_ROWS)

    def session_memory(self, n_streams: int = 1, n_tokens: int | None = None) -> int:
        """Bytes that a session of so many streams takes when each has read `n_tokens` tokens (default: the context's
        length) step by step, logits included."""
        return self._core.session_bytes(n_streams, n_tokens or self.context_length)

    def logits(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> np.ndarray:
        """int [B, T] -> float32 [B, T, n_logits]. Rows at and beyond `lengths[b]` are padding and come out as zeros."""
        return self._core.logits(tokens, lengths)

    def intervals(
        self,
        tokens: npt.ArrayLike,
        targets: npt.ArrayLike,
        lengths: npt.ArrayLike | None = None,
        vocab_size: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The integer intervals of `targets` after `tokens`, int [B, T] each: (start, freq, total), uint64 [B, T].

        Logits exist a block of rows at a time, never as a whole. Rows from `lengths[b]` on are padding and give 0.
        """
        return self._core.intervals(tokens, targets, lengths, vocab_size or self.vocab_size)

    def log2_probabilities(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None
    ) -> np.ndarray:
        """log2 of the softmax over all `n_logits` at `targets` after `tokens`, int [B, T] each: float64 [B, T], the
        numbers of `coding.log2_softmax`, for scores.

        Logits exist a block of rows at a time, never as a whole. Rows from `lengths[b]` on are padding and give 0.
        """
        return self._core.log2_probabilities(tokens, targets, lengths)

    def session(self, n_streams: int, n_tokens: int | None = None) -> _core.TransformerSession:
        """A session of `n_streams` independent streams of up to `n_tokens` tokens (default: the context length).

        `step(tokens, active=None)`: int [n_streams] -> float32 [n_streams, n_logits], the bits of `logits`; rows of
        streams that are not active are zeros. `prefill(stream, tokens)` reads many tokens of one stream at once and
        returns the logits after the last, float32 [n_logits]. `reset(stream=None)` starts one stream, or all, again.
        `positions`: int64 [n_streams], tokens read.
        """
        return self._core.session(n_streams, self.context_length if n_tokens is None else n_tokens)

    def lanes(self, n_tokens: int) -> int:
        """How many streams of `n_tokens` tokens to decode side by side: what the processor's caches hold of their keys
        and values, or what keeps all threads busy, as far as memory goes."""
        stream_bytes = 4 * self._cache_floats(n_tokens)
        kept = _KEPT_BYTES // stream_bytes // _LANES_STEP * _LANES_STEP
        busy = _LANES_STEP * _core.context_in_use()[1]
        return max(1, min(max(kept, busy), _LANES_MAX, _SESSION_BYTES_MAX // stream_bytes))

    def _cache_floats(self, n_tokens: int) -> int:
        """Keys and values of one stream of `n_tokens` tokens; a layer with a window keeps little more than that."""
        config = self.config
        windows = [config.kinds[kind]["window"] for kind in config.layer_kinds]
        kept = sum(min(n_tokens, window + 256) if window else n_tokens for window in windows)
        return 2 * config.n_kv_heads * config.head_dim * kept

    def decoding_chain(self, n_streams: int, n_tokens: int, vocab_size: int) -> Any:
        """A `DecodingChain`, or what a subclass has instead, for `n_streams` payloads and windows of `n_tokens`."""
        return DecodingChain(self, n_streams, n_tokens, vocab_size)


class DecodingChain:
    """Payloads to tokens, side by side: steps of the model and of the decoders in turn, many of them in one call."""

    steps_max = 64

    def __init__(self, model: ExactModel, n_streams: int, n_tokens: int, vocab_size: int) -> None:
        self.n_streams = n_streams
        self._vocab_size = vocab_size
        self._session = model.session(n_streams, n_tokens)

    def begin(self, payloads: Sequence[bytes], n_tokens_max: npt.NDArray[np.int64] | None = None) -> None:
        """At most `n_streams` payloads, each at its start; `n_tokens_max`, one each, where intervals are mixed."""
        n_more = self.n_streams - len(payloads)
        bounds = None if n_tokens_max is None else np.pad(n_tokens_max, (0, n_more))
        self._decoder = _core.Decoder([*payloads, *[b""] * n_more], self._vocab_size, bounds)

    def open_window(self, lanes: npt.NDArray[np.intp], inputs: npt.NDArray[np.int32]) -> None:
        """Only the streams `lanes` go on, each after it has read its row of `inputs`, int32 [n_lanes, k], and no more.

        The last input is read by the first step.
        """
        self._session.reset()
        self._lanes = lanes
        self._inputs = np.zeros(self.n_streams, np.int64)
        self._inputs[lanes] = inputs[:, -1]
        for lane, row in zip(lanes, inputs[:, :-1], strict=True):
            if len(row):
                self._session.prefill(int(lane), row)

    def run(self, n_steps: int, active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """`n_steps` <= `steps_max` tokens of every lane, int32 [n_steps, n_lanes], `active` bool [n_lanes].

        -1 where a lane is not active. A lane that is set inactive stays so until the next window. `Error` names the
        stream whose logits give no distribution.
        """
        going = np.zeros(self.n_streams, np.bool_)
        going[self._lanes] = active
        found = self._session.decode(self._decoder, self._inputs, n_steps, going)
        self._inputs = found[-1]
        return found[:, self._lanes]

    def fault(self) -> str:
        """What a row had that has no token; `run` has raised it."""
        return "no error"


class Int8Model(ExactModel):
    """A model whose linear maps and head are computed in 8-bit integers: another arithmetic than `ExactModel`,
    with other logits, but as exact and as much the same everywhere.

    Weights become 8-bit codes with a scale a row while loading, activations with a scale a token: csrc/FORMAT.md, 4.7.
    The codes take a quarter of the memory of float32; of the checkpoint only the embedding is kept. `dtype` is "int8";
    `weights_sha256` is over the checkpoint's weights, as with the other engines. `Error` for more than 2**17 inputs of
    a linear map.
    """

    engine = "exact-int8"
    _is_int8 = True

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, np.ndarray | Tensor], **options: Any) -> None:
        """Arguments as `ExactModel`."""
        super().__init__(config, weights, **options)
        self.weights_sha256 = tensors_sha256(self._tensors)
        self._tensors = {}
        self.dtype = "int8"


def load_exact(
    folder: str | os.PathLike[str],
    *,
    engine: str = "exact",
    name: str | None = None,
    step: int | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    weights: Mapping[str, np.ndarray | Tensor] | None = None,
) -> ExactModel:
    """Load a model of a known family (`families`) from a folder in Hugging Face's layout: config.json and
    safetensors, sharded or not.

    Weights (float32, float16, bfloat16) stay mapped from the file, so that a new checkpoint may take the file's place
    but must not be written into it while the model lives; `weights` replaces the folder's. `engine` "exact-int8" gives
    an `Int8Model`. Raises `Error`.
    """
    found = read_checkpoint(folder, name=name, step=step, tokenizer_path=tokenizer_path, weights=weights)
    try:
        return (Int8Model if engine == Int8Model.engine else ExactModel)(**found)
    except MemoryError:
        raise Error(f"{folder}: the model takes more memory than there is") from None

"""Sessions of the torch engine: one token a step through whatever a model remembers by. Which way, the model is asked.

Three ways, the first that gives what one pass over the same tokens gives (`way_of`):

- "shared": all streams share the slots of one key-value cache behind an attention mask.
- "own": every stream has a cache or state of its own, whatever the model calls it (Mamba's `cache_params`, RWKV's
  `state`, caches of sliding windows and of hybrids).
- "window": no cache; a step reads all that its stream has seen again.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmcomp.errors import Error

try:
    import torch
except ImportError as error:
    raise Error(
        f"the torch engine needs PyTorch and transformers ({error}): pip install llmcomp-exact[torch]"
    ) from None

# What a model returns to be given back in the next step.
_MEMORIES = ("past_key_values", "cache_params", "state", "mems")
# Steps and one pass round otherwise: what may lie between them, as a share of the largest logit, in most rows.
_NEAR = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
_PROBE_STEPS = 7


class SteppedModel(Protocol):
    """What sessions ask of `torch.TorchModel`."""

    name: str
    device: str
    dtype: str
    n_logits: int
    context_length: int

    def forward(self, tokens: npt.ArrayLike, **options: Any) -> Any: ...


class TorchSession:
    """Streams that are read one token at a time. `step`: int [B] -> float32 [B, n_logits].

    A stream that pauses (`active` False) goes on where it stopped; `reset` makes it forget.
    """

    def __init__(self, model: SteppedModel, n_streams: int) -> None:
        if n_streams < 1:
            raise Error(f"a session of {n_streams} streams, expected at least 1")
        self._model, self.n_streams = model, n_streams
        self.positions = np.zeros(n_streams, np.int64)

    def step(self, tokens: npt.ArrayLike, active: npt.ArrayLike | None = None) -> np.ndarray:
        """Read one token of every active stream; rows of the others are zeros."""
        model = self._model
        chosen = np.ones(self.n_streams, bool) if active is None else np.asarray(active, bool)
        inputs = np.where(chosen, np.asarray(tokens), 0)
        if inputs.shape != (self.n_streams,) or chosen.shape != inputs.shape:
            raise Error(f"tokens have shape {np.shape(tokens)}, expected ({self.n_streams},)")
        if (self.positions[chosen] >= model.context_length).any():
            raise Error(f"a stream has read {model.context_length} tokens, all that {model.name} can read; reset it")
        logits = self._advance(inputs, chosen)
        self.positions += chosen
        logits[~chosen] = 0
        return logits

    def reset(self, stream: int | None = None) -> None:
        """Make `stream` (None: every stream) forget all that it read."""
        self.positions[slice(None) if stream is None else stream] = 0
        self._forget(range(self.n_streams) if stream is None else [stream])

    def _advance(self, inputs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """float32 [B, n_logits]; rows of streams that are not chosen may hold anything."""
        raise NotImplementedError

    def _forget(self, streams: Any) -> None:
        raise NotImplementedError


class SharedCache(TorchSession):
    """A stream that pauses leaves a masked slot behind and its positions go on; `reset` masks all its slots."""

    def __init__(self, model: SteppedModel, n_streams: int) -> None:
        super().__init__(model, n_streams)
        self._cache: Any = None
        self._seen = torch.zeros((n_streams, 0), dtype=torch.int64)

    def _advance(self, inputs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        place = self._model.device
        # A paused stream sees its own slot in this step: a softmax over nothing would leave NaN in the cache.
        mask = torch.cat([self._seen, torch.ones((self.n_streams, 1), dtype=torch.int64)], dim=1)
        output = self._model.forward(
            inputs[:, None],
            use_cache=True,
            attention_mask=mask.to(place),
            position_ids=torch.from_numpy(self.positions[:, None].copy()).to(place),
            past_key_values=self._cache,
        )
        self._cache = output.past_key_values
        mask[:, -1] = torch.from_numpy(chosen)
        self._seen = mask
        return as_numpy(output.logits[:, -1])

    def _forget(self, streams: Any) -> None:
        self._seen[list(streams)] = 0
        if not self.positions.any():
            self._cache, self._seen = None, self._seen[:, :0]

    @property
    def has_plain_layers(self) -> bool:
        """Whether every layer keeps every slot: a window that slides would count masked slots."""
        return not any(getattr(layer, "is_sliding", False) for layer in getattr(self._cache, "layers", ()))


class OwnCaches(TorchSession):
    """What the model returned for a stream is given back to it with that stream's next token."""

    def __init__(self, model: SteppedModel, n_streams: int) -> None:
        super().__init__(model, n_streams)
        self._memories: list[dict[str, Any]] = [{} for _ in range(n_streams)]

    def _advance(self, inputs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        logits = np.zeros((self.n_streams, self._model.n_logits), np.float32)
        for stream in np.flatnonzero(chosen):
            output = self._model.forward(
                inputs[stream : stream + 1, None],
                use_cache=True,
                position_ids=torch.tensor([[self.positions[stream]]], device=self._model.device),
                **self._memories[stream],
            )
            found = {name: getattr(output, name, None) for name in _MEMORIES}
            self._memories[stream] = {name: memory for name, memory in found.items() if memory is not None}
            logits[stream] = as_numpy(output.logits[0, -1])
        return logits

    def _forget(self, streams: Any) -> None:
        for stream in streams:
            self._memories[stream] = {}


class Windows(TorchSession):
    """Every step reads what its stream has seen in one pass."""

    def __init__(self, model: SteppedModel, n_streams: int) -> None:
        super().__init__(model, n_streams)
        self._tokens: list[list[int]] = [[] for _ in range(n_streams)]

    def _advance(self, inputs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        logits = np.zeros((self.n_streams, self._model.n_logits), np.float32)
        for stream in np.flatnonzero(chosen):
            self._tokens[stream].append(int(inputs[stream]))
            output = self._model.forward(np.array([self._tokens[stream]]), use_cache=False)
            logits[stream] = as_numpy(output.logits[0, -1])
        return logits

    def _forget(self, streams: Any) -> None:
        for stream in streams:
            self._tokens[stream] = []


WAYS: dict[str, type[TorchSession]] = {"shared": SharedCache, "own": OwnCaches, "window": Windows}


def way_of(model: SteppedModel) -> str:
    """The first of `WAYS` whose steps, with a pause, give what one pass gives; a warning says what the last costs."""
    tokens = np.random.default_rng(0).integers(0, model.n_logits, (2, min(_PROBE_STEPS, model.context_length)))
    expected = as_numpy(model.forward(tokens, use_cache=False).logits)
    for way in ("shared", "own"):
        # A model without that kind of memory fails in a way of its own.
        try:
            session = WAYS[way](model, 2)
            is_right = _agrees(session, tokens, expected, _NEAR[model.dtype])
        except Exception:
            continue
        if is_right and getattr(session, "has_plain_layers", True):
            return way
    n = model.context_length
    warnings.warn(
        f"{model.name} has no cache that gives what one pass gives, so decoding (and compressing, which takes the same "
        f"steps) reads a window again for every token: {(n + 1) / 2:,.0f} times the work in a window of {n:,} tokens",
        stacklevel=2,
    )
    return "window"


def _agrees(session: TorchSession, tokens: np.ndarray, expected: np.ndarray, near: float) -> bool:
    """Whether most rows of each stream are near those of one pass: of the first, which never pauses, but for its first
    row, of the second those that follow its pause of two steps."""
    n_steps, at = tokens.shape[1], np.zeros(2, int)
    errors: tuple[list[float], list[float]] = ([], [])
    for number in range(n_steps + 2):
        active = (at < n_steps) & np.array([number < n_steps, not 2 <= number < 4])
        rows = session.step(tokens[np.arange(2), np.minimum(at, n_steps - 1)], active)
        for i in np.flatnonzero(active):
            if at[i] > i:
                errors[i].append(float(np.abs(rows[i] - expected[i, at[i]]).max()))
        at += active
    return all(not found or np.median(found) <= near * np.abs(expected).max() for found in errors)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()

"""The engine on PyTorch: any causal language model of transformers. Nothing else imports torch but `llmcomp.pico`.

What holds here: the same machine, the same library versions and the same calls (batch shape, order of steps) give the
same logits. What does not: one pass and step by step differ in the last bits, and so do other batch shapes, thread
counts, devices and versions. An archive that this engine made is therefore decoded by the same calls on the same
machine, and its fingerprint says which; the exact engine promises more, for GPT-NeoX models.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcomp.errors import Error
from llmcomp.tokens import ByteTokenizer, Tokenizer

try:
    import torch
    import transformers
except ImportError as error:
    raise Error(f"the torch engine needs PyTorch and transformers ({error}): pip install llmcomp[torch]") from None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "eager")

# Rows of logits held at once by `intervals`: a block of 50,304 float32 logits takes 26 MB, near the caches.
_BLOCK_ROWS = 128
# Buffers that old checkpoints store beside the weights.
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


class TorchModel:
    """A causal language model of transformers, made by `load_torch` or from a module that is loaded already.

    `n_logits` logits a row, of which the first `vocab_size` are tokens; the padded rest gets no probability.
    `n_params` counts tied weights once. `weights_sha256` is over names, types, shapes and values as they are in use.
    """

    engine = "torch"

    def __init__(
        self,
        module: Any,
        *,
        name: str,
        step: int | None = None,
        tokenizer_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.module = module.eval()
        self.name, self.step = name, step
        weight = next(module.parameters())
        self.device, self.dtype = str(weight.device), str(weight.dtype).removeprefix("torch.")
        self.attention = getattr(module.config, "_attn_implementation", None)
        self.n_params = sum(parameter.numel() for parameter in module.parameters())
        self.n_logits = int(module.get_output_embeddings().weight.shape[0])
        self.context_length = int(getattr(module.config, "max_position_embeddings", 0) or 2048)
        self._tokenizer_path = tokenizer_path
        self._accepts = set(inspect.signature(module.forward).parameters)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | ByteTokenizer:
        """The model's tokenizer; `Error` where it is of a kind that cannot carry any bytes."""
        return ByteTokenizer() if self._tokenizer_path is None else Tokenizer.from_file(Path(self._tokenizer_path))

    @functools.cached_property
    def vocab_size(self) -> int:
        if self._tokenizer_path is None:
            return self.n_logits
        try:
            return min(self.tokenizer.vocab_size, self.n_logits)
        except Error:
            return self.n_logits

    @functools.cached_property
    def weights_sha256(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of whatever this model's bits depend on: weights, tokenizer, libraries, machine and settings."""
        on_cuda = self.device.startswith("cuda")
        facts = {
            "weights": self.weights_sha256,
            "tokenizer": self.tokenizer.fingerprint,
            "config": self.module.config.to_json_string(),
            "device": torch.cuda.get_device_name(self.device)
            if on_cuda
            else platform.processor() or platform.machine(),
            "dtype": self.dtype,
            "attention": self.attention,
            "threads": None if on_cuda else torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def logits(self, tokens: npt.ArrayLike, as_tensor: bool = False) -> Any:
        """int [B, T] -> float32 [B, T, n_logits]: NumPy, or on request a tensor in the model's dtype and place."""
        with torch.inference_mode():
            logits = self.module(self._as_tokens(tokens), use_cache=False).logits
        return logits if as_tensor else _as_numpy(logits)

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
        from llmcomp import coding

        inputs = self._as_tokens(tokens)
        wanted = np.ascontiguousarray(targets, np.int64)
        if wanted.shape != tuple(inputs.shape):
            raise Error(f"targets have shape {wanted.shape}, expected that of the tokens, {tuple(inputs.shape)}")
        limits = np.full(len(wanted), wanted.shape[1]) if lengths is None else np.asarray(lengths)
        rows = np.flatnonzero(np.arange(wanted.shape[1]) < limits[:, None])
        result = np.zeros((3, wanted.size), np.uint64)
        cuda_coder = "cuda" in coding.backends()
        for block, logits in self._blocks(inputs, rows):
            block_logits = logits if logits.device.type == "cpu" or cuda_coder else logits.cpu()
            found = coding.intervals(block_logits, wanted.reshape(-1)[block], vocab_size or self.vocab_size)
            result[:, block] = np.stack([np.asarray(part) for part in found])
        start, freq, total = result.reshape(3, *wanted.shape)
        return start, freq, total

    def session(self, n_streams: int) -> TorchSession:
        """A session of `n_streams` streams that advance together, one token a call."""
        return TorchSession(self, n_streams)

    @torch.inference_mode()
    def _blocks(self, tokens: torch.Tensor, rows: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(row numbers, logits [n, n_logits]) of the wanted rows of [B * T]."""
        if self._head_is_linear:
            states = self.module.base_model(tokens, use_cache=False).last_hidden_state
        else:
            states = self.module(tokens, use_cache=False).logits
        states = states.reshape(-1, states.shape[-1])
        for at in range(0, len(rows), _BLOCK_ROWS):
            block = rows[at : at + _BLOCK_ROWS]
            chosen = states[torch.from_numpy(block).to(states.device)]
            yield block, self.module.get_output_embeddings()(chosen) if self._head_is_linear else chosen

    @functools.cached_property
    def _head_is_linear(self) -> bool:
        """Whether the logits are the head's product with the last states (some models scale or cap them after it)."""
        tokens = self._as_tokens(np.arange(min(8, self.n_logits))[None])
        with torch.inference_mode():
            output = self.module.base_model(tokens, use_cache=False)
            if getattr(output, "last_hidden_state", None) is None:
                return False
            found = self.module.get_output_embeddings()(output.last_hidden_state).float()
            expected = self.module(tokens, use_cache=False).logits.float()
        return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=1e-2, atol=1e-2))

    def _as_tokens(self, tokens: npt.ArrayLike) -> torch.Tensor:
        array = np.asarray(tokens)
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise Error(f"tokens have shape {array.shape} and type {array.dtype}, expected integers [B, T]")
        if array.shape[1] > self.context_length:
            raise Error(
                f"{array.shape[1]} tokens a row are more than the {self.context_length} that {self.name} can read"
            )
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.n_logits:
            raise Error(f"tokens reach from {array.min()} to {array.max()}, expected 0 to {self.n_logits - 1}")
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device)


class TorchSession:
    """Streams that are read one token at a time with a key-value cache. `step`: int [B] -> float32 [B, n_logits].

    All streams share the slots of one cache. A stream that pauses (`active` False) leaves a masked slot behind and its
    positions go on where they stopped; `reset` masks all its slots.
    """

    def __init__(self, model: TorchModel, n_streams: int) -> None:
        if n_streams < 1:
            raise Error(f"a session of {n_streams} streams, expected at least 1")
        self._model, self.n_streams = model, n_streams
        self._cache: Any = None
        self._seen = torch.zeros((n_streams, 0), dtype=torch.int64)
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
        # A paused stream sees its own slot in this step: a softmax over nothing would leave NaN in the cache.
        mask = torch.cat([self._seen, torch.ones((self.n_streams, 1), dtype=torch.int64)], dim=1)
        options = {
            "attention_mask": mask.to(model.device),
            "position_ids": torch.from_numpy(self.positions[:, None].copy()).to(model.device),
            "past_key_values": self._cache,
        }
        with torch.inference_mode():
            output = model.module(
                model._as_tokens(inputs[:, None]),
                use_cache=True,
                **{key: value for key, value in options.items() if key in model._accepts},
            )
        self._cache = output.past_key_values
        mask[:, -1] = torch.from_numpy(chosen)
        self._seen = mask
        self.positions += chosen
        logits = _as_numpy(output.logits[:, -1])
        logits[~chosen] = 0
        return logits

    def reset(self, stream: int) -> None:
        """Make `stream` forget all that it read."""
        self._seen[stream] = 0
        self.positions[stream] = 0
        if not self.positions.any():
            self._cache, self._seen = None, self._seen[:, :0]


def load_torch(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    step: int | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
) -> TorchModel:
    """Load a causal language model from a folder in Hugging Face's layout.

    `device`: "cpu" (default), "cuda", "cuda:1", ...; `dtype`: "float32" (default), "bfloat16", "float16";
    `attention`: "sdpa" (default) or "eager". `Error` for weights that are missing, truncated or of other shapes.
    """
    folder = Path(folder)
    device, dtype, attention = device or "cpu", dtype or "float32", attention or "sdpa"
    if dtype not in DTYPES:
        raise Error(f"no dtype is called {dtype!r}, expected one of {', '.join(DTYPES)}")
    if attention not in ATTENTIONS:
        raise Error(f"no attention is called {attention!r}, expected one of {', '.join(ATTENTIONS)}")
    progress = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation=attention, local_files_only=True, output_loading_info=True
        )
        module, loaded = found
        module = module.to(device)
    # transformers, safetensors and torch raise their own kinds for files that are missing, torn or of another shape.
    except Exception as error:
        raise Error(f"{folder}: transformers cannot load this model on {device}: {_first_line(error)}") from error
    finally:
        if progress:
            transformers.utils.logging.enable_progress_bar()
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise Error(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    own = folder / "tokenizer.json"
    tokenizer_path = tokenizer_path or (own if own.is_file() else None)
    return TorchModel(module, name=name or folder.name, step=step, tokenizer_path=tokenizer_path)


def product_rate(device: str, dtype: str | None = None) -> float:
    """Operations a second that a product of two 4,096 x 4,096 matrices reaches on `device`."""
    width = 4096
    matrix = torch.ones((width, width), dtype=DTYPES[dtype or "float32"], device=device)
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def read_pickled_weights(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of pytorch_model.bin or of its shards as arrays; bfloat16 is widened to float32.

    Read by torch's weights_only loader, which runs no code from the file. Buffers that are not weights are left out.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise Error(f"{folder}: found no pytorch_model.bin")
    weights: dict[str, np.ndarray] = {}
    for path in paths:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # A torn or foreign file ends in errors of zipfile, pickle or torch.
        except Exception as error:
            raise Error(f"{path}: torch cannot read these weights: {_first_line(error)}") from error
        for name, tensor in tensors.items():
            if not name.endswith(_BUFFERS):
                weights[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return weights


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

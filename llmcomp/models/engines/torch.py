"""The engine on PyTorch: any causal language model of transformers. Nothing else imports torch but `llmcomp.pico`.

What holds here: the same machine, the same library versions and the same calls (batch shape, order of steps) give the
same logits. What does not: one pass and step by step differ in the last bits, and so do other batch shapes, thread
counts, devices and versions. An archive that this engine made is therefore decoded by the same calls on the same
machine, and its fingerprint says which; the exact engine promises more, for GPT-NeoX models.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcomp import coding
from llmcomp.checked_json import read_object
from llmcomp.coding import cuda
from llmcomp.data.tokenizer_files import find_tokenizer_file
from llmcomp.data.tokenizers import Tokenized
from llmcomp.errors import Error, named, reason, shown
from llmcomp.models.memory import PassMemory, host_memory

try:
    import torch
    import transformers
    from safetensors.torch import load_file
except ImportError as error:
    raise Error(
        f"the torch engine needs PyTorch and transformers ({error}): pip install llmcomp-exact[torch]"
    ) from None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "eager")

# Rows of logits held at once by `intervals`: a block of 50,304 float32 logits takes 103 MB. With fewer rows the head's
# product is slower by a tenth: its weights are repacked for every block.
_BLOCK_ROWS = 512
# The same on a device, where a block ends with a wait for the device: 824 MB of bfloat16.
_DEVICE_BLOCK_ROWS = 8192
# Rows of a batch, at most, on a processor and on a device; more do not make the products faster.
_BATCH_ROWS = 8192
_DEVICE_BATCH_ROWS = 1 << 16
# What a row holds while it goes through a layer, in values of the model's width: the residual, queries, keys and
# values, and the two wide arrays of the MLP are 15; twice that for copies and the allocator's gaps.
_ROW_WIDTHS = 30
# Buffers that old checkpoints store beside the weights.
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


class TorchModel(Tokenized):
    """A causal language model of transformers, made by `load_torch` or from a module that is loaded already.

    `n_logits` logits a row, of which the first `vocab_size` are tokens; the padded rest gets no probability.
    `n_params` counts tied weights once. `weights_sha256` is what `digest` gives, else (also where that raises `Error`)
    over names, types, shapes and values as they are in use. `watch(part)` is entered around "forward" and "intervals",
    for profiles.
    """

    engine = "torch"
    watch: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def __init__(
        self,
        module: Any,
        *,
        name: str,
        step: int | None = None,
        tokenizer_path: str | os.PathLike[str] | None = None,
        digest: Callable[[], str] | None = None,
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
        self._digest = digest
        self._accepts = set(inspect.signature(module.forward).parameters)

    @functools.cached_property
    def weights_sha256(self) -> str:
        if self._digest is not None:
            with contextlib.suppress(Error):
                return self._digest()
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
            "tokenizer": self.tokenizer_fingerprint,
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

    def pass_memory(self) -> PassMemory:
        """What a pass takes on this model's device: for every row the values that go through a layer, and beside them
        one block of logits with the two of float32 that `log2_probabilities` makes of it without the CUDA part."""
        on_device, item_bytes = self.device.startswith("cuda"), DTYPES[self.dtype].itemsize
        row_bytes = _ROW_WIDTHS * int(getattr(self.module.config, "hidden_size", 4096)) * item_bytes
        if self.attention == "eager":
            n_heads = int(getattr(self.module.config, "num_attention_heads", 32))
            row_bytes += 2 * 4 * n_heads * self.context_length
        block_rows, rows_max = (_DEVICE_BLOCK_ROWS, _DEVICE_BATCH_ROWS) if on_device else (_BLOCK_ROWS, _BATCH_ROWS)
        n_float_copies = 0 if on_device and cuda.is_built() else 2
        return PassMemory(
            row_bytes,
            block_rows * self.n_logits * (item_bytes + 4 * n_float_copies),
            sum(parameter.nbytes for parameter in self.module.parameters()),
            *(_device_memory(self.device) if on_device else host_memory()),
            rows_max,
        )

    def release_memory(self) -> None:
        """Give back what torch keeps of a device's memory for later use."""
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

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
        return self.start_intervals(tokens, targets, lengths, vocab_size)()

    def start_intervals(
        self,
        tokens: npt.ArrayLike,
        targets: npt.ArrayLike,
        lengths: npt.ArrayLike | None = None,
        vocab_size: int | None = None,
    ) -> Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Gives the device the work of `intervals`; what is returned waits for it, on any thread, and returns them.

        On a device the three numbers of all rows come back in one copy behind the work; nothing waits before. Errors
        of rows are raised by what is returned.
        """
        size = vocab_size or self.vocab_size

        def of_block(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            if logits.device.type == "cuda" and cuda.is_built():
                return torch.stack(cuda.intervals(logits, chosen, size, wait=False))
            found = coding.intervals(logits.cpu(), chosen.cpu(), size)
            return torch.from_numpy(np.stack(found).view(np.int64))

        wait = self._start(tokens, targets, lengths, n_symbols=size, n_numbers=3, dtype=torch.int64, of_block=of_block)

        def finish() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            found, rows, shape = wait()
            numbers = found.numpy().view(np.uint64)
            # A total is at least the size of the vocabulary: the device leaves 0 where a row has no distribution.
            if not numbers[2, rows].all():
                b, t = divmod(int(rows[numbers[2, rows].argmin()]), shape[1])
                raise Error(f"sequence {b}, position {t}: the model's logits hold NaN, +inf, or nothing but -inf")
            start, freq, total = numbers.reshape(3, *shape)
            return start, freq, total

        return finish

    def log2_probabilities(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None
    ) -> np.ndarray:
        """log2 of the softmax over all `n_logits`, float64 [B, T], of `targets` after `tokens`; 0 where padding.

        Computed where the logits lie, a block of rows at a time, in float32: within 1e-5 of the float64 softmax. On a
        device with llmcomp's CUDA part one kernel reads the logits as they are: within 2e-6.
        """
        return self.start_log2_probabilities(tokens, targets, lengths)()

    def start_log2_probabilities(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike | None = None
    ) -> Callable[[], np.ndarray]:
        """Gives the device the work of `log2_probabilities`; what is returned waits for it and returns them."""

        def of_block(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            if logits.device.type == "cuda" and cuda.is_built():
                return cuda.log2_softmax(logits, chosen, wait=False)[None]
            rows = logits.float()
            return (rows.gather(1, chosen[:, None])[:, 0] - rows.logsumexp(1)).double()[None] / math.log(2)

        wait = self._start(
            tokens, targets, lengths, n_symbols=self.n_logits, n_numbers=1, dtype=torch.float64, of_block=of_block
        )

        def finish() -> np.ndarray:
            found, _, shape = wait()
            return found.numpy().reshape(shape)

        return finish

    def session(self, n_streams: int) -> TorchSession:
        """A session of `n_streams` streams that advance together, one token a call."""
        return TorchSession(self, n_streams)

    @torch.inference_mode()
    def _start(
        self,
        tokens: npt.ArrayLike,
        targets: npt.ArrayLike,
        lengths: npt.ArrayLike | None,
        *,
        n_symbols: int,
        n_numbers: int,
        dtype: torch.dtype,
        of_block: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Callable[[], tuple[torch.Tensor, np.ndarray, tuple[int, ...]]]:
        """`n_numbers` numbers of every row that is not padding: `of_block` makes them, [n_numbers, n], of the logits
        [n, n_logits] and targets [n], below `n_symbols`, of a block of rows.

        What is returned waits for ([n_numbers, B * T] on the CPU, row numbers that are not padding, (B, T)).
        """
        inputs, wanted = self._as_tokens(tokens), np.ascontiguousarray(targets, np.int64)
        if wanted.shape != tuple(inputs.shape):
            raise Error(f"targets have shape {wanted.shape}, expected that of the tokens, {tuple(inputs.shape)}")
        limits = np.full(len(wanted), wanted.shape[1]) if lengths is None else np.asarray(lengths)
        rows = np.flatnonzero(np.arange(wanted.shape[1]) < limits[:, None])
        asked = wanted.reshape(-1)[rows]
        if asked.size and not 0 <= int(asked.min()) <= int(asked.max()) < n_symbols:
            raise Error(f"targets reach from {asked.min()} to {asked.max()}, expected 0 to {n_symbols - 1}")
        place = inputs.device
        rows_there, wanted_there = _copy_ahead(rows, place), _copy_ahead(wanted.reshape(-1), place)
        head_is_linear = self._head_is_linear
        with self.watch("forward"):
            if head_is_linear:
                states = self.module.base_model(inputs, use_cache=False).last_hidden_state
            else:
                states = self.module(inputs, use_cache=False).logits
        states = states.reshape(-1, states.shape[-1])
        result: torch.Tensor | None = None
        n_rows = _DEVICE_BLOCK_ROWS if place.type == "cuda" else _BLOCK_ROWS
        for block in rows_there.split(n_rows):
            with self.watch("forward"):
                logits = self.module.get_output_embeddings()(states[block]) if head_is_linear else states[block]
            with self.watch("intervals"):
                found = of_block(logits, wanted_there[block])
                if result is None:
                    result = torch.zeros((n_numbers, wanted.size), dtype=dtype, device=found.device)
                result[:, block.to(found.device)] = found
        if result is None:
            result = torch.zeros((n_numbers, wanted.size), dtype=dtype)
        wait = _copy_behind(result)
        return lambda: (wait(), rows, wanted.shape)

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
        return _copy_ahead(np.ascontiguousarray(array, np.int64), torch.device(self.device))


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

    def reset(self, stream: int | None = None) -> None:
        """Make `stream` (None: every stream) forget all that it read."""
        chosen = slice(None) if stream is None else stream
        self._seen[chosen] = 0
        self.positions[chosen] = 0
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
    digest: Callable[[], str] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    trust_remote_code: bool = False,
) -> TorchModel:
    """Load a causal language model from a folder in Hugging Face's layout.

    No code that the folder brings or names is run unless `trust_remote_code`; transformers is always told so, since
    without a word from its caller it would ask on standard input.

    `device`: "cpu" (default), "cuda", "cuda:1", ...; `dtype`: "float32" (default), "bfloat16", "float16";
    `attention`: "sdpa" (default) or "eager"; `digest` gives the model's `weights_sha256` where it is not to be that of
    the weights as they are in use; `weights`: what `read_host_weights` read of the folder before. `Error` for weights
    that are missing, truncated or of other shapes.
    """
    folder = Path(folder)
    device, dtype, attention = device or "cpu", dtype or "float32", attention or "sdpa"
    if dtype not in DTYPES:
        raise Error(f"no dtype is called {dtype!r}, expected one of {', '.join(DTYPES)}")
    if attention not in ATTENTIONS:
        raise Error(f"no attention is called {attention!r}, expected one of {', '.join(ATTENTIONS)}")
    if not trust_remote_code:
        _refuse_code(folder)
    progress = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {"dtype": DTYPES[dtype], "attn_implementation": attention, "weights_only": True}
        options["output_loading_info"] = True
        trusted: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        found: Any
        if weights is None:
            found = transformers.AutoModelForCausalLM.from_pretrained(folder, **trusted, **options)
        else:
            config = transformers.AutoConfig.from_pretrained(folder, **trusted)
            kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            found = kind.from_pretrained(None, config=config, state_dict=weights, **trusted, **options)
        module, loaded = found
        module = module.to(device)
    # transformers, safetensors and torch raise their own kinds for files that are missing, torn or of another shape.
    except Exception as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise Error(f"{folder}: the model needs code of its own, which is not run; {_TRUST}") from None
        raise Error(f"{folder}: transformers cannot load this model on {device}: {reason(error)}") from error
    finally:
        if progress:
            transformers.utils.logging.enable_progress_bar()
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise Error(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    tokenizer_path = tokenizer_path or find_tokenizer_file(folder)
    if device.startswith("cuda") and not cuda.is_built():
        warnings.warn(
            "this llmcomp was built without its CUDA part: logits are copied to the processor to be coded, which is "
            "correct and slow",
            stacklevel=2,
        )
    return TorchModel(module, name=name or folder.name, step=step, tokenizer_path=tokenizer_path, digest=digest)


_TRUST = "load_model(..., engine='torch', trust_remote_code=True) says that whoever made the model is trusted"


def _refuse_code(folder: Path) -> None:
    """`Error` where transformers would fetch code or another model because the folder says so: kernels, quantizers, the
    base of an adapter. Python files that config.json names ("auto_map") it refuses itself, where it has none of its own
    for that kind of model."""
    if (folder / "adapter_config.json").exists():
        raise Error(f"{folder}: adapter_config.json names another model to load; {_TRUST}")
    pending: list[Any] = [read_object(folder / "config.json")]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if not isinstance(value, dict):
            continue
        pending += value.values()
        for key, setting in value.items():
            # A kernel of the hub is named "owner/kernel" where an implementation is chosen.
            is_kernel = key.endswith("_implementation") and "/" in str(setting)
            if is_kernel or (key == "quantization_config" and setting):
                raise Error(f"{folder}: config.json has {key}, which may fetch code to run; {_TRUST}")


def published_loop(model: TorchModel, tokens: npt.ArrayLike) -> float:
    """Bits of one chunk, int [T], as the published code finds them: a softmax and an .item() for every position.

    A yardstick for benchmarks; `codec.score` computes the same sum without the loop.
    """
    ids = model._as_tokens(np.asarray(tokens)[None])
    bits = 0.0
    with torch.inference_mode():
        logits = model.module(ids, use_cache=False).logits[0]
        for at in range(1, ids.shape[1]):
            probability = torch.softmax(logits[at - 1], dim=-1)[ids[0, at]].item()
            bits -= math.log2(max(probability, 1e-10))
    return bits


def pass_alone(model: TorchModel, tokens: npt.ArrayLike) -> Callable[[], None]:
    """A call that computes the logits of int [B, T] as transformers does, and nothing else: a yardstick."""
    ids = model._as_tokens(tokens)

    def run() -> None:
        with torch.inference_mode():
            model.module(ids, use_cache=False)

    return run


def step_alone(model: TorchModel, past: npt.ArrayLike, tokens: npt.ArrayLike) -> Callable[[], None]:
    """A call that adds `tokens`, int [B], to transformers' cache, which begins as `past`, int [B, T]; a yardstick."""
    ids = model._as_tokens(np.asarray(tokens)[:, None])
    with torch.inference_mode():
        cache = model.module(model._as_tokens(past), use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        with torch.inference_mode():
            model.module(ids, past_key_values=cache, use_cache=True)

    return run


def set_threads(n_threads: int) -> None:
    """How many threads torch computes with on the CPU, in the whole process."""
    torch.set_num_threads(n_threads)


# What a device does.


def product_rate(device: str, dtype: str | None = None, width: int = 4096) -> float:
    """Operations a second that a product of two `width` x `width` matrices of random numbers reaches on `device`."""
    matrix = torch.rand((width, width), device=device).to(DTYPES[dtype or "float32"])
    seconds = []
    for _ in range(3):
        wait_for(device)
        start = time.perf_counter()
        matrix @ matrix
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def wait_for(device: str) -> None:
    """Return when `device` has done all that it was given; at once on the CPU, which never runs behind."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class DeviceStopwatch:
    """Seconds that a device spends on the parts of its work, by its own clock; nothing waits before `seconds`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._parts: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is given to the device inside belongs to part `name`."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        first.record(stream)
        try:
            yield
        finally:
            last.record(stream)
            self._parts.append((name, first, last))

    def seconds(self) -> dict[str, float]:
        """By part, of all since the last call."""
        wait_for(self._device)
        total: dict[str, float] = {}
        for name, first, last in self._parts:
            total[name] = total.get(name, 0.0) + first.elapsed_time(last) / 1000
        self._parts.clear()
        return total


def device_name(device: str) -> str:
    """What a device calls itself; of a CPU its architecture."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


def device_peak_bytes(device: str) -> int:
    """The most that tensors have taken on a device since this was last asked."""
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(found)


def read_host_weights(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in host memory, as they are stored; may run on any thread beside a model at work.

    `load_torch` itself may not: while transformers makes a module, it changes torch's default dtype for all threads.
    """
    folder = Path(folder)
    paths = [folder / "model.safetensors"]
    if not paths[0].is_file():
        paths = sorted(folder.glob("model-*-of-*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise Error(f"{folder}: found neither model.safetensors nor pytorch_model.bin")
    weights: dict[str, torch.Tensor] = {}
    for path in paths:
        if path.suffix == ".bin":
            weights |= _read_pickle(path)
            continue
        try:
            # Mapped tensors are read when they are first used; a copy is read now.
            weights |= {name: tensor.clone() for name, tensor in load_file(path).items()}
        # As in `load_torch`.
        except Exception as error:
            raise Error(f"{path}: cannot read these weights: {reason(error)}") from error
    return weights


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
        for name, tensor in _read_pickle(path, mapped=True).items():
            if name.endswith(_BUFFERS):
                continue
            if tensor.dtype not in DTYPES.values():
                found = str(tensor.dtype).removeprefix("torch.")
                raise Error(f"{path}: {named(name)} has dtype {found}, expected one of {', '.join(DTYPES)}")
            weights[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return weights


def _read_pickle(path: Path, mapped: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of one pickled state, by name, parameters as plain tensors. No code of the file is run.

    `Error` for a file that is torn or foreign, or holds anything but dense tensors that have all their bytes there.
    """
    # Files of torch before 1.6 are no zip archives, and cannot be mapped.
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    # A torn or foreign file ends in errors of zipfile, pickle or torch.
    except Exception as error:
        if "weights_only" in str(error):  # torch's message tells how to run the file's code all the same
            asked = re.search(r"GLOBAL (\S+)", str(error))
            found = f"asks for {named(asked[1])}" if asked else "is torn or no pickle"
            raise Error(f"{path}: it {found}; expected a pickle of nothing but tensors") from None
        raise Error(f"{path}: torch cannot read these weights: {reason(error)}") from error
    if not isinstance(state, dict):
        raise Error(f"{path}: found a pickled {type(state).__name__}, expected tensors by their names")
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise Error(f"{path}: {shown(name)} is a {type(value).__name__}, expected tensors by their names")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise Error(f"{path}: {named(name)} is {kind}; expected a dense tensor of numbers")
        # A stride of 0 lets a few bytes stand for any number of them.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise Error(f"{path}: {named(name)}, shape {list(value.shape)}, has fewer bytes than values")
        tensors[name] = value.detach()
    return tensors


def _copy_ahead(array: np.ndarray, place: torch.device) -> torch.Tensor:
    """An array on the device, behind the work that it has been given, which nothing waits for: from pinned memory,
    which torch's allocator keeps until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(place, non_blocking=True) if place.type == "cuda" else tensor.to(place)


def _copy_behind(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A copy on the CPU, made behind the work that the device has been given; what is returned waits for it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    on_host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return on_host

    return wait


def _device_memory(device: str) -> tuple[int, int]:
    """(free, all) bytes of a device; what torch keeps for later use is free."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    kept_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_bytes + kept_bytes, total_bytes


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()

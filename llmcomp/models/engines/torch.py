"""The engine on PyTorch: any causal language model of transformers. tests/test_layers.py lists what imports torch.

What holds here: the same machine, the same library versions and the same calls (batch shape, order of steps) give the
same logits. What does not: one pass and step by step differ in the last bits, and so do other batch shapes, thread
counts, devices and versions. An archive that this engine made is therefore decoded by the same calls on the same
machine, and its fingerprint says which; the exact engine promises more, for the families that it knows.
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
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcomp import coding
from llmcomp.checked_json import read_object
from llmcomp.coding import cuda
from llmcomp.data.tokenizer_files import find_tokenizer_file
from llmcomp.data.tokenizers import Tokenized
from llmcomp.errors import Error, reason
from llmcomp.models.engines import torch_steps
from llmcomp.models.engines.torch_device import DTYPES, copy_ahead, copy_behind, device_memory
from llmcomp.models.memory import PassMemory, host_memory

try:
    import torch
    import transformers
except ImportError as error:
    raise Error(
        f"the torch engine needs PyTorch and transformers ({error}): pip install llmcomp-exact[torch]"
    ) from None

ATTENTIONS = ("sdpa", "eager")

# Rows of logits held at once by `intervals`: a block of 50,304 float32 logits takes 103 MB. With fewer rows the head's
# product is slower by a tenth: its weights are repacked for every block.
_BLOCK_ROWS = 512
# The same on a device, where a block ends with a wait for the device: 824 MB of bfloat16.
_DEVICE_BLOCK_ROWS = 8192
# Rows of a batch, at most, on a processor and on a device; more do not make the products faster.
_BATCH_ROWS = 8192
_DEVICE_BATCH_ROWS = 1 << 16
# Of a thread in a step or a pass: a millisecond or so.
_FLOP_PER_THREAD = 10**8
# What a row holds while it goes through a layer, in values of the model's width: the residual, queries, keys and
# values, and the two wide arrays of the MLP are 15; twice that for copies and the allocator's gaps.
_ROW_WIDTHS = 30


class TorchModel(Tokenized):
    """A causal language model of transformers, made by `load_torch` or from a module that is loaded already, with its
    `tokenizer`, or the path to read it from.

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
        tokenizer: Any = None,
        digest: Callable[[], str] | None = None,
    ) -> None:
        self.module = module
        self.name, self.step = name, step
        weight = next(module.parameters())
        self.device, self.dtype = str(weight.device), str(weight.dtype).removeprefix("torch.")
        self.attention = getattr(module.config, "_attn_implementation", None)
        self.n_params = sum(parameter.numel() for parameter in module.parameters())
        embeddings = [module.get_input_embeddings(), module.get_output_embeddings()]
        weights = {id(parameter): parameter.numel() for one in embeddings if one for parameter in one.parameters()}
        self.n_params_nonembedding = self.n_params - sum(weights.values())
        self._text_config = module.config.get_text_config()
        head = module.get_output_embeddings()
        self.n_logits = int(self._text_config.vocab_size if head is None else head.weight.shape[0])
        self.context_length = _context_length(self._text_config)
        self._tokenizer_path = tokenizer_path
        if tokenizer is not None:  # instead of one that is read when it is first asked for
            self.tokenizer, self.tokenizer_fingerprint = tokenizer, tokenizer.fingerprint
            self.vocab_size = min(int(tokenizer.vocab_size), self.n_logits)
        self._digest = digest
        self._is_causal = False

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
            "threads": None if on_cuda else self._n_threads(1),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if self._way_of_steps != "shared":
            facts["steps"] = self._way_of_steps
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def pass_memory(self, n_tokens: int | None = None) -> PassMemory:
        """What a pass takes on this model's device: for every row the values that go through a layer, and beside them
        one block of logits with the two of float32 that `log2_probabilities` makes of it without the CUDA part."""
        on_device, item_bytes = self.device.startswith("cuda"), DTYPES[self.dtype].itemsize
        row_bytes = _ROW_WIDTHS * int(getattr(self._text_config, "hidden_size", 4096)) * item_bytes
        if self.attention == "eager":
            n_heads = int(getattr(self._text_config, "num_attention_heads", 32))
            row_bytes += 2 * 4 * n_heads * (n_tokens or self.context_length)
        block_rows, rows_max = (_DEVICE_BLOCK_ROWS, _DEVICE_BATCH_ROWS) if on_device else (_BLOCK_ROWS, _BATCH_ROWS)
        n_float_copies = 0 if on_device and cuda.is_built() else 2
        return PassMemory(
            row_bytes,
            block_rows * self.n_logits * (item_bytes + 4 * n_float_copies),
            sum(parameter.nbytes for parameter in self.module.parameters()),
            *(device_memory(self.device) if on_device else host_memory()),
            rows_max,
        )

    def release_memory(self) -> None:
        """Give back what torch keeps of a device's memory for later use."""
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def logits(self, tokens: npt.ArrayLike, as_tensor: bool = False) -> Any:
        """int [B, T] -> float32 [B, T, n_logits]: NumPy, or on request a tensor in the model's dtype and place."""
        self._check_causal()
        logits = self.forward(tokens, use_cache=False).logits
        return logits if as_tensor else torch_steps.as_numpy(logits)

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

    def session(self, n_streams: int) -> torch_steps.TorchSession:
        """A session of `n_streams` streams that advance together, one token a call, by the cache that the model has
        (`torch_steps`); one that has none warns of what its steps cost."""
        return torch_steps.WAYS[self._way_of_steps](self, n_streams)

    # Long: one batch from its checks to what waits for it, in the order in which the device gets the work.
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
        self._check_causal()
        inputs, wanted = self.as_tokens(tokens), np.ascontiguousarray(targets, np.int64)
        if wanted.shape != tuple(inputs.shape):
            raise Error(f"targets have shape {wanted.shape}, expected that of the tokens, {tuple(inputs.shape)}")
        limits = np.full(len(wanted), wanted.shape[1]) if lengths is None else np.asarray(lengths)
        rows = np.flatnonzero(np.arange(wanted.shape[1]) < limits[:, None])
        asked = wanted.reshape(-1)[rows]
        if asked.size and not 0 <= int(asked.min()) <= int(asked.max()) < n_symbols:
            raise Error(f"targets reach from {asked.min()} to {asked.max()}, expected 0 to {n_symbols - 1}")
        place = inputs.device
        rows_there, wanted_there = copy_ahead(rows, place), copy_ahead(wanted.reshape(-1), place)
        head_is_linear = self._head_is_linear
        with self.watch("forward"):
            module = self.module.base_model if head_is_linear else self.module
            output = self._run(module, inputs, use_cache=False)
            states = output.last_hidden_state if head_is_linear else output.logits
        states = states.reshape(-1, states.shape[-1])
        result: torch.Tensor | None = None
        n_rows = _DEVICE_BLOCK_ROWS if place.type == "cuda" else _BLOCK_ROWS
        for block in rows_there.split(n_rows):
            with self.watch("forward"), self._at_work(len(block)):
                logits = self.module.get_output_embeddings()(states[block]) if head_is_linear else states[block]
            with self.watch("intervals"), torch.no_grad():
                found = of_block(logits, wanted_there[block])
                if result is None:
                    result = torch.zeros((n_numbers, wanted.size), dtype=dtype, device=found.device)
                result[:, block.to(found.device)] = found
        if result is None:
            result = torch.zeros((n_numbers, wanted.size), dtype=dtype)
        wait = copy_behind(result)
        return lambda: (wait(), rows, wanted.shape)

    # The module at work.

    def forward(self, tokens: npt.ArrayLike, **options: Any) -> Any:
        """What the module returns for int [B, T], with those `options` that it takes."""
        return self._run(self.module, self.as_tokens(tokens), **options)

    def _run(self, module: Any, ids: torch.Tensor, **options: Any) -> Any:
        parameters = inspect.signature(module.forward).parameters
        taken = {name: value for name, value in options.items() if name in parameters}
        with self._at_work(ids.numel()):
            return module(ids, **taken)

    @contextlib.contextmanager
    def _at_work(self, n_rows: int) -> Iterator[None]:
        """The module as it is when it is used, and so many threads as `n_rows` tokens are worth; then as before.

        A module in training, of which this is a view, goes on training.
        """
        in_training = [part for part in self.module.modules() if part.training] if self.module.training else []
        n_before, n_threads = torch.get_num_threads(), self._n_threads(n_rows)
        for part in in_training:
            part.training = False
        if n_threads != n_before:
            torch.set_num_threads(n_threads)
        try:
            # Not inference_mode: what modules keep between calls must still do for training.
            with torch.no_grad():
                yield
        finally:
            if n_threads != n_before:
                torch.set_num_threads(n_before)
            for part in in_training:
                part.training = True

    def _n_threads(self, n_rows: int) -> int:
        """A thread for every 10^8 operations, of those that torch may take: on a machine with other work, the threads
        of a small step wait for one another many times as long as they compute."""
        n_max = torch.get_num_threads()
        if self.device.startswith("cuda"):
            return n_max
        return max(1, min(n_max, 2 * self.n_params * n_rows // _FLOP_PER_THREAD))

    @functools.cached_property
    def _way_of_steps(self) -> str:
        self._check_causal()
        return torch_steps.way_of(self)

    def _check_causal(self) -> None:
        """`Error` for a model whose logits depend on what comes after them; asked once."""
        if self._is_causal:
            return
        tokens = np.random.default_rng(1).integers(0, self.n_logits, (2, min(8, self.context_length)))
        tokens[1, :-1] = tokens[0, :-1]
        tokens[1, -1] = (tokens[0, -1] + 1) % self.n_logits
        # Not one batch: what a batch shares, such as the experts' capacity, is no look ahead.
        first, second = (torch_steps.as_numpy(self.forward(row[None], use_cache=False).logits[0]) for row in tokens)
        if first.shape != (tokens.shape[1], self.n_logits):
            raise Error(
                f"{self.name}: {tokens.shape[1]} tokens have logits of shape {first.shape}, expected "
                f"({tokens.shape[1]}, {self.n_logits})"
            )
        difference = np.abs(first[:-1] - second[:-1]).max(initial=0)
        if difference > 1e-2 * np.abs(first).max():
            raise Error(
                f"{self.name} is not causal: the logits before a token change by {difference:.3g} with that token, so "
                "what it codes could not be decoded"
            )
        self._is_causal = True

    @functools.cached_property
    def _head_is_linear(self) -> bool:
        """Whether the logits are the head's product with the last states (some models scale or cap them after it)."""
        ids = self.as_tokens(np.arange(min(8, self.n_logits))[None])
        # Of a model that has no such parts, whatever it misses is not there.
        try:
            states = self._run(self.module.base_model, ids, use_cache=False).last_hidden_state
            with torch.no_grad():
                found = self.module.get_output_embeddings()(states).float()
        except Exception:
            return False
        expected = self._run(self.module, ids, use_cache=False).logits.float()
        if found.shape != expected.shape:
            return False
        # The same product: what rounding leaves between them is far less than a cap or a scale does.
        near = 1e-5 if self.dtype == "float32" else 4e-3
        return bool((found - expected).abs().max() <= near * expected.abs().max())

    def as_tokens(self, tokens: npt.ArrayLike) -> torch.Tensor:
        """int [B, T] as int64 on the model's device; `Error` for another shape, long rows or foreign tokens."""
        array = np.asarray(tokens)
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise Error(f"tokens have shape {array.shape} and type {array.dtype}, expected integers [B, T]")
        if array.shape[1] > self.context_length:
            raise Error(
                f"{array.shape[1]} tokens a row are more than the {self.context_length} that {self.name} can read"
            )
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.n_logits:
            raise Error(f"tokens reach from {array.min()} to {array.max()}, expected 0 to {self.n_logits - 1}")
        return copy_ahead(np.ascontiguousarray(array, np.int64), torch.device(self.device))


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

    No code that the folder brings or names is run unless `trust_remote_code`; transformers always gets
    that setting, since without it it would ask on standard input.

    `device`: "cpu" (default), "cuda", "cuda:1", ...; `dtype`: "float32" (default), "bfloat16", "float16";
    `attention`: "sdpa" or "eager", by default what transformers takes for this model: "sdpa" where it computes the same
    there; `digest` gives the model's `weights_sha256` where it is not to be that of
    the weights as they are in use; `weights`: what `read_host_weights` read of the folder before. `Error` for weights
    that are missing, truncated or of other shapes.
    """
    folder = Path(folder)
    device, dtype = device or "cpu", dtype or "float32"
    if dtype not in DTYPES:
        raise Error(f"no dtype is called {dtype!r}, expected one of {', '.join(DTYPES)}")
    if attention is not None and attention not in ATTENTIONS:
        raise Error(f"no attention is called {attention!r}, expected one of {', '.join(ATTENTIONS)}")
    if not trust_remote_code:
        _refuse_code(folder)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "weights_only": True, "output_loading_info": True}
    if attention is not None:
        options["attn_implementation"] = attention
    module = _load_module(folder, device, weights, trust_remote_code, options)
    tokenizer_path = tokenizer_path or find_tokenizer_file(folder)
    if device.startswith("cuda") and not cuda.is_built():
        warnings.warn(
            "this llmcomp was built without its CUDA part: logits are copied to the processor to be coded, which is "
            "correct and slow",
            stacklevel=2,
        )
    return TorchModel(module, name=name or folder.name, step=step, tokenizer_path=tokenizer_path, digest=digest)


def _load_module(
    folder: Path,
    device: str,
    weights: dict[str, torch.Tensor] | None,
    trust_remote_code: bool,
    options: Mapping[str, Any],
) -> Any:
    """The module on its device, without a bar of transformers; all of its weights were there."""
    progress = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
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
    return module


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


def _context_length(config: Any) -> int:
    """The most tokens that a window may hold; of a model that states none, such as Mamba, 2,048."""
    for name in ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length"):
        if isinstance(found := getattr(config, name, None), int) and found > 0:
            return found
    return 2048

"""A callback of transformers' Trainer: how well the model in training compresses held-out data, while it is trained."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from llmcomp.codec.segments import as_chunks
from llmcomp.data.tokenizers import BYTES, AnyTokenizer, ByteTokenizer, Tokenizer
from llmcomp.errors import Error
from llmcomp.models.engines.torch import TorchModel
from llmcomp.scoring.score import score


class CompressionCallback(TrainerCallback):
    """Scores `data` with the model as it is, every `every` steps and at the end of training.

    data: a data set or several bytes objects, none of which the model is trained on. tokenizer: the fast tokenizer of
    the model, a `Tokenizer`, or "bytes". Each result is a dict in `history` and in the Trainer's `log_history`:
    step, llmcomp_ratio, llmcomp_bits_per_byte, llmcomp_bits_per_token. Protocol lossless, of payloads that would decode
    (llmcomp.scoring.score). The mode of the module, training or not, is afterwards what it was.
    """

    def __init__(self, data: Any, tokenizer: Any, every: int = 500, mapping: str | None = None):
        if every < 1:
            raise Error(f"every is {every}, expected 1 or more steps")
        self._chunks = as_chunks(getattr(data, "chunks", data))
        if not self._chunks:
            raise Error("no held-out data to compress")
        self._tokenizer, self._every, self._mapping = as_own_tokenizer(tokenizer), every, mapping
        self.history: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self._every == 0:
            self._score(model, state)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.history or self.history[-1]["step"] != state.global_step:
            self._score(model, state)

    def _score(self, module: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        was_training = module.training
        try:
            rows = score(
                self._chunks, in_memory_model(module, self._tokenizer, state.global_step), "lossless", self._mapping,
                progress=False,
            )  # fmt: skip
        finally:
            module.train(was_training)
        bits = 8.0 * (rows["ratio"] * rows["bytes_in"]).sum()
        n_bytes, n_tokens = float(rows["bytes_in"].sum()), float(rows["tokens"].sum())
        found = {
            "step": state.global_step,
            "llmcomp_ratio": bits / (8.0 * n_bytes),
            "llmcomp_bits_per_byte": bits / n_bytes,
            "llmcomp_bits_per_token": bits / n_tokens,
        }
        self.history.append(found)
        state.log_history.append({**found, "epoch": state.epoch})


def as_own_tokenizer(tokenizer: Any) -> AnyTokenizer:
    """llmcomp's form of a fast tokenizer of transformers, of "bytes", or of what is one already."""
    if tokenizer == BYTES:
        return ByteTokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return Tokenizer.from_bytes(backend.to_str().encode())
    if not hasattr(tokenizer, "encode_bytes"):
        raise Error(f'a {type(tokenizer).__name__} is no fast tokenizer: expected one of transformers, or "bytes"')
    return tokenizer


def in_memory_model(module: Any, tokenizer: AnyTokenizer, step: int | None = None) -> TorchModel:
    """A module of transformers that is in memory, as a model of the torch engine; its weights' digest is not taken."""
    name = str(getattr(module.config, "name_or_path", "") or type(module).__name__)
    found = TorchModel(module, name=name, step=step, tokenizer_path=BYTES, digest=lambda: "")
    found.__dict__["tokenizer"] = tokenizer
    found.__dict__["vocab_size"] = min(int(tokenizer.vocab_size), found.n_logits)
    return found

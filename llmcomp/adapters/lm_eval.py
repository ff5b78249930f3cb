"""A model of the evaluation harness (lm_eval) whose likelihoods are coded bits: `--model llmcomp`, after an import of
this module.

`loglikelihood_rolling` codes whole documents as `score` does: all bytes, sliding windows, the first token paid for. So
a task's bits_per_byte is that of payloads that decode. `loglikelihood` sums the bits of a continuation behind its
context, as the harness asks of tasks with choices.
"""

from __future__ import annotations

import math
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from llmcomp.codec.segments import MAPPING_DEFAULT, windowed_model
from llmcomp.data.mappings import get_mapping
from llmcomp.errors import Error
from llmcomp.models.adapter import ModelTraits
from llmcomp.models.load import load_model
from llmcomp.scoring.score import score


@register_model("llmcomp")
class LlmcompLM(LM):
    """model_args: pretrained (what `load_model` takes; or a model), step, engine, device."""

    def __init__(
        self,
        pretrained: Any,
        step: int | None = None,
        engine: str | None = None,
        device: str | None = None,
        **_: Any,
    ):
        super().__init__()
        # The harness names a device of its own where the user names none.
        self._model = load_model(pretrained, None if step is None else int(step), engine, device=_device(device))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Natural logarithms of the probabilities of whole documents: ideal bits with the mapping's side bits."""
        documents = [request.args[0].encode() for request in requests]
        rows = score([document for document in documents if document], self._model, progress=not disable_tqdm)
        bits = iter((rows["ideal_bits"] + rows["side_bits"]).tolist())
        return [-next(bits) * math.log(2) if document else 0.0 for document in documents]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: the natural logarithm of its probability, and whether each of its
        tokens is the likeliest."""
        return [self._continuation(*request.args) for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Not of what a compressor measures."""
        raise Error("llmcomp measures likelihoods: a task that generates text needs another model of the harness")

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        import numpy as np

        traits = ModelTraits.of(self._model)
        mapping = get_mapping(MAPPING_DEFAULT)
        whole = mapping.encode((context + continuation).encode(), traits.tokenizer).tokens
        before = mapping.encode(context.encode(), traits.tokenizer).tokens if context else whole[:0]
        # Tokens that the two share; one that bridges context and continuation belongs to the continuation.
        n = min(len(whole), len(before))
        differing = np.flatnonzero(whole[:n] != before[:n])
        first = int(differing[0]) if len(differing) else n
        (parts,) = windowed_model(self._model).intervals([whole])
        bits = -np.log2(parts[1].astype(np.float64) / parts[2].astype(np.float64))
        return -float(bits[first:].sum()) * math.log(2), self._is_greedy(whole, first, traits)

    def _is_greedy(self, whole: Any, first: int, traits: ModelTraits) -> bool:
        import numpy as np

        inputs = np.concatenate([[traits.bos_token], whole[:-1]]).astype(np.int32)
        start = max(0, len(inputs) - traits.context_length)
        if first < start:
            return False
        given = self._model.logits(inputs[None, start:])
        rows = np.asarray(given.detach().float().cpu() if hasattr(given, "detach") else given)[
            0, first - start :, : traits.vocab_size
        ]
        return bool((rows.argmax(1) == whole[first:]).all())


def _device(device: str | None) -> str | None:
    return None if device in (None, "", "mps") else device

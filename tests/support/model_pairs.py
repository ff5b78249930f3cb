"""Exact models in pairs, one on the processor and the same one on a CUDA device, and what both must say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_models import make_config, make_weights

from llmcomp.errors import Error
from llmcomp.models.checkpoint import Tensor
from llmcomp.models.engines.cuda import CudaInt8Model, CudaModel
from llmcomp.models.engines.exact import ExactModel, Int8Model

MODELS: dict[str, tuple[type[ExactModel], type[CudaModel]]] = {
    "exact": (ExactModel, CudaModel),
    "exact-int8": (Int8Model, CudaInt8Model),
}
with_both_engines = pytest.mark.parametrize("engine", MODELS)


def shortened(weights: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    if dtype == "float16":
        return {name: value.astype(np.float16) for name, value in weights.items()}
    if dtype == "bfloat16":
        upper = {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in weights.items()}
        return {name: Tensor(value, "bfloat16") for name, value in upper.items()}
    return weights


def make_pair(
    dtype: str = "float32", scale: float = 1.0, engine: str = "exact", **changes: object
) -> tuple[ExactModel, CudaModel]:
    config = make_config(**changes)
    weights = shortened(make_weights(config, scale=scale), dtype)
    on_cpu, on_device = MODELS[engine]
    return on_cpu(config, weights), on_device(config, weights)


def small_windows(**changes: object) -> tuple[ExactModel, CudaModel]:
    """Models of bytes whose windows are so short that a segment has several."""
    return make_pair(**{"vocab_size": 256, "max_position_embeddings": 32, **changes})


def bad_pair(engine: str = "exact") -> tuple[ExactModel, CudaModel]:
    """Token 9 gives NaN."""
    config = make_config(vocab_size=256, max_position_embeddings=32)
    weights = make_weights(config)
    weights["gpt_neox.embed_in.weight"][9] = np.nan
    on_cpu, on_device = MODELS[engine]
    return on_cpu(config, weights), on_device(config, weights)


def messages(cpu: Any, device: Any, call: str, *given: Any, **options: Any) -> None:
    """Both raise Error, in the same words."""
    told = []
    for one in (cpu, device):
        with pytest.raises(Error) as caught:
            getattr(one, call)(*given, **options)
        told.append(str(caught.value))
    assert told[0] == told[1]

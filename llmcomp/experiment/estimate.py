"""What cells cost before they are computed: operations, bytes, time. Formulas, and one measurement of speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llmcomp.models import counts
from llmcomp.models.adapter import ModelTraits
from llmcomp.models.sources import ModelSource
from llmcomp.scoring.published import MAX_TOKENS


class PlannedDevice(NamedTuple):
    """A device to plan for: its peak in operations a second (products in bfloat16), and the share of it to count on."""

    name: str
    peak: float
    share: float

    def seconds(self, flops: float) -> float:
        return flops / (self.peak * self.share)


# NVIDIA's data sheet: 989.5 TFLOP/s in bfloat16 without sparsity. The share is an assumption, not a measurement:
# with it the 75 published cells take 7 minutes.
H200 = PlannedDevice("H200", 989.5e12, 0.4)


def scoring_flops(source: ModelSource | Any, protocol: str, lengths: Mapping[int, int]) -> float:
    """Operations of scoring chunks under a protocol, at most: a token a byte, under "published" 1,024 a chunk.

    `lengths`: how many chunks there are of each length in bytes. Counted by the shape where a suite states it
    (`counts.forward_flops`), else two a parameter and token. Windows are the context's length, without overlaps.
    """
    model = source.checkpoint.model if isinstance(source, ModelSource) and source.checkpoint else None
    context = model.shape.get("max_position_embeddings") if model and model.shape else None
    limit = MAX_TOKENS if protocol == "published" else None
    flops = 0.0
    for n_bytes, n_chunks in lengths.items():
        n_tokens = min(n_bytes, limit or n_bytes)
        whole, rest = divmod(n_tokens, context) if context else (0, n_tokens)
        for window, n_windows in ((context, whole), (rest, 1)):
            if window and n_windows:
                flops += n_chunks * n_windows * _window_flops(source, window)
    return flops


def _window_flops(source: ModelSource | Any, n_tokens: int) -> float:
    model = source.checkpoint.model if isinstance(source, ModelSource) and source.checkpoint else None
    counted = counts.forward_flops(model.family, model.shape, n_tokens) if model and model.shape else None
    return 2.0 * count_params(source) * n_tokens if counted is None else counted


def chunk_lengths(chunks: Any) -> Counter[int]:
    return Counter(map(len, chunks))


def count_params(model: ModelSource | Any) -> int:
    """Parameters as the suite states them, else going by the size of the files, which hold little beside the weights;
    of a loaded model its own."""
    if not isinstance(model, ModelSource):
        return ModelTraits.of(model).n_params or 1_000
    if model.n_params is not None:
        return model.n_params
    config = model.read_config()
    stored = config.get("dtype", config.get("torch_dtype"))
    return model.weight_bytes // (2 if stored in ("float16", "bfloat16") else 4)


def operations_per_second(engine: str, device: str | None, dtype: str | None) -> float:
    """What a square product of the size of a small layer reaches here."""
    if engine == "torch" and device not in (None, "cpu"):
        from llmcomp.models.engines.torch_device import product_rate

        return product_rate(device, dtype)
    width = 512
    left, right = np.ones((2, width, width), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def in_bytes(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"


def in_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

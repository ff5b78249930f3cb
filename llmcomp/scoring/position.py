"""What every position of a chunk costs: how much a model gains from the context so far (in-context learning).

Bits are the ideal ones of the intervals that are coded. Drawing is plot.py's (`plot.ratio_by_position`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmcomp.codec.segments import MAPPING_DEFAULT, as_chunks, windowed_model
from llmcomp.data import mappings
from llmcomp.errors import Error
from llmcomp.models.adapter import ModelTraits
from llmcomp.models.load import load_model
from llmcomp.progress import tqdm

# How many chunks are scored between two updates of the progress bar.
_CHUNKS_PER_UPDATE = 32


def bits_by_position(
    chunks: Iterable[bytes],
    model: Any,
    unit: Literal["token", "byte"] = "byte",
    *,
    cumulative: bool = False,
    mapping: str = MAPPING_DEFAULT,
    overlap: int | None = None,
    progress: bool = True,
) -> npt.NDArray[np.float64]:
    """Bits of every position of every chunk, float64 [n_chunks, longest], NaN where a chunk is shorter.

    chunks: bytes, or a data set with `.chunks`. Every chunk is a stream of its own with the windows of `score`; without
    `cumulative` a row sums to the chunk's `ideal_bits`.
    unit: "token" gives -log2(freq / total) of each token; "byte" spreads a token's bits evenly over the bytes it stands
    for (mapping "bytes" only), so that positions of text, images and speech can be compared.
    cumulative: the mean over all positions so far instead, which over 8 is the compression rate that Delétang et al.
    draw against the length of a sequence ("Language Modeling Is Compression", ICLR 2024, in-context compression).

    Raises:
        Error: no chunks, an empty chunk, an unknown unit or mapping, or a model that gives NaN.
    """
    model = load_model(model)
    chunks = as_chunks(getattr(chunks, "chunks", chunks))
    if unit not in ("token", "byte") or (unit == "byte" and mapping != MAPPING_DEFAULT):
        raise Error(f"bits by {unit} with mapping {mapping}: expected token, or byte with mapping {MAPPING_DEFAULT}")
    if not len(chunks) or not all(map(len, chunks)):
        raise Error(f"bits by position of {len(chunks)} chunks: expected at least one, and none empty")
    rows: list[npt.NDArray[np.float64]] = []
    with tqdm(total=len(chunks), unit="chunk", disable=not progress, delay=2, leave=False) as bar:
        for at in range(0, len(chunks), _CHUNKS_PER_UPDATE):
            batch = chunks[at : at + _CHUNKS_PER_UPDATE]
            rows += _bits(batch, model, unit, mapping, overlap)
            bar.update(len(batch))
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        table[number, : len(row)] = np.cumsum(row) / np.arange(1, len(row) + 1) if cumulative else row
    return table


def _bits(
    chunks: list[bytes], model: Any, unit: str, mapping: str, overlap: int | None
) -> list[npt.NDArray[np.float64]]:
    tokenizer = ModelTraits.of(model).tokenizer
    encoded = [mappings.get_mapping(mapping).encode(chunk, tokenizer) for chunk in chunks]
    rows = []
    for item, parts in zip(encoded, windowed_model(model, overlap).intervals([e.tokens for e in encoded]), strict=True):
        bits = -np.log2(parts[1].astype(np.float64) / parts[2].astype(np.float64))
        if unit == "byte":
            n_bytes = [len(tokenizer.decode_bytes([token], stand_ins=bool(item.side))) for token in item.tokens]
            bits = np.repeat(bits / n_bytes, n_bytes)
        rows.append(bits)
    return rows

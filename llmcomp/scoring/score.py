"""score: chunks in, result rows out, with any model and either protocol."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmcomp import coding
from llmcomp.codec.container import MIXING_VERSIONS
from llmcomp.codec.segments import MAPPING_DEFAULT, Coded, SegmentCodec, as_chunks
from llmcomp.data import mappings
from llmcomp.data.token_cache import TokenCache
from llmcomp.errors import CorruptArchive, Error
from llmcomp.models.adapter import ModelTraits, weights_sha256
from llmcomp.models.load import load_model
from llmcomp.models.memory import MaxMemory
from llmcomp.scoring import published
from llmcomp.scoring.background import in_background

if TYPE_CHECKING:
    import pandas as pd


# What `adapt` adds to a row; the columns of results are the model's own.
ADAPTIVE_COLUMNS = ("adaptive_ideal_bits", "adaptive_coded_bytes", "adaptive_ratio")
# How much is scored between two updates of the progress bar.
_SCORE_BATCH_BYTES = 1 << 18


# Long: what does not go together is refused here, once.
def score(
    chunks: Iterable[bytes],
    model: Any,
    protocol: str = "lossless",
    mapping: str | None = None,
    *,
    overlap: int | None = None,
    verify: bool = False,
    adapt: bool = False,
    max_memory: MaxMemory = None,
    token_cache: TokenCache | None = None,
    device: str | None = None,
    token_bits: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """One row a chunk (results.ROW_COLUMNS) of what `model` makes of `chunks`: bytes, or a data set with `.chunks`.

    protocol "lossless": each chunk is a stream of its own, with the windows and the bits that an archive's segment
    would have: all bytes, all tokens, the first token paid for, real payload bytes. `verify` decodes every one again
    and raises CorruptArchive for the first that is not its chunk. `mapping` None means "bytes". With the torch engine
    scores come from one pass over each window, as no decoder could repeat it, unless `verify` is set. `device`: where a
    model that is given by its name is loaded.

    `adapt` adds ADAPTIVE_COLUMNS: the same for the model mixed with what each chunk's tokens teach on the way, as in
    archives (csrc/FORMAT.md, "Mixing"), every chunk beginning anew, with the windows of the model's own columns. Bits,
    coded bytes (verified too) and their ratio stand beside the model's own, which do not change; they are in no file of
    rows, no cell and no law.

    protocol "published": the published computation on the same model. b % 128, at most 1,024 tokens (or the model's
    context, if smaller), first token free, the softmax over all logits (to 2e-6 bits a token, 1e-5 with the torch
    engine), clamped at 1e-10, bits over all bytes, chunks with a ratio outside (0.01, 10) dropped. Nothing is coded and
    nothing could be decoded.

    The two never share a pass: lossless windows begin with the start token, which pays for the first token; published
    ones begin with the first token itself, so every later token has another context and another probability.

    `max_memory`: what weights and batches may take, in bytes (an integer), as a share of all memory of the model's
    device (a float), or either as text ("8GB", "0.5"); None: what is free. A batch that does not fit is halved.
    `token_cache`: tokens that are kept for other models with the same tokenizer. `token_bits`: one more column of that
    name, float32 arrays with the ideal bits of every token (lossless only).

    Raises:
        Error: an unknown protocol or mapping, an empty chunk, a model that gives NaN, or too little memory.
    """
    import pandas as pd

    from llmcomp import results

    model = load_model(model, device=device)
    dataset, data, modality = chunks, getattr(chunks, "name", ""), getattr(chunks, "modality", "")
    chunks = as_chunks(getattr(chunks, "chunks", chunks))
    if protocol not in results.PROTOCOLS:
        raise Error(f"no protocol is called {protocol!r}; there are {', '.join(results.PROTOCOLS)}")
    if protocol == "published" and mapping not in (None, published.BYTES_MAPPING):
        raise Error(f"the published protocol has mapping {published.BYTES_MAPPING!r} only, found {mapping!r}")
    if token_bits and protocol != "lossless":
        raise Error(f"the bits of every token are given with protocol 'lossless', found {protocol!r}")
    if protocol == "published" and adapt:
        raise Error("the published protocol codes nothing, so there is nothing to adapt; expected protocol 'lossless'")
    scorer: _LosslessScorer | published.PublishedScorer
    if protocol == "lossless":
        mapping = mapping or MAPPING_DEFAULT
        codec = SegmentCodec(model, mapping, overlap, is_stepwise=None if verify else False, max_memory=max_memory)
        mixing: dict[str, Any] = {"mixing": MIXING_VERSIONS[-1], "is_stepwise": None if verify else False}
        mixed = SegmentCodec(model, mapping, codec.identity.overlap, **mixing) if adapt else None
        scorer = _LosslessScorer(
            codec, mapping, token_cache or TokenCache(), verify=verify, mixed=mixed, token_bits=token_bits
        )
    else:
        mapping = published.BYTES_MAPPING
        scorer = published.PublishedScorer(model, token_cache or TokenCache(), max_memory)
    rows = _scored(chunks, scorer, progress)
    facts = {"dataset": data, "modality": modality, "protocol": protocol, "mapping": mapping, **_model_facts(model)}
    if not rows:
        return results.empty_rows()
    table = pd.DataFrame(rows).assign(batch_rows=scorer.batch_rows, **facts)
    return results.check_rows(add_places(table, dataset))


def add_places(rows: pd.DataFrame, dataset: Any) -> pd.DataFrame:
    """The rows of chunks of a data set, with how they were drawn and where each lies in it, as far as it says."""
    documents, offsets = (list(getattr(dataset, name, ())) for name in ("documents", "offsets"))
    numbers = rows["chunk"].astype(int)
    return rows.assign(
        draw=getattr(dataset, "draw", ""),
        data_sha256=hashlib.sha256(chunks[0]).hexdigest()[:16] if (chunks := getattr(dataset, "chunks", ())) else "",
        draw_seed=_column(getattr(dataset, "seed", None), rows),
        chunk_bytes=_column(getattr(dataset, "chunk_bytes", None), rows),
        document=[documents[i] if 0 <= i < len(documents) else "" for i in numbers],
        offset=_column([offsets[i] if 0 <= i < len(offsets) else None for i in numbers], rows),
    )


def _column(values: Any, rows: pd.DataFrame) -> pd.Series:
    import pandas as pd

    return pd.Series(values, rows.index, "Int64")


def adaptive_ratio(rows: pd.DataFrame) -> float:
    """All adaptive bits over all bits in, of rows that were scored with `adapt`."""
    return float((rows["adaptive_ratio"] * rows["bytes_in"]).sum() / rows["bytes_in"].sum())


def _scored(chunks: Sequence[bytes], scorer: _LosslessScorer | published.PublishedScorer, progress: bool) -> list[dict]:
    """Rows of all chunks, with their numbers and their shares of the seconds; rows of dropped chunks are missing."""
    from llmcomp.progress import tqdm

    rows: list[dict] = []

    def start(numbers: list[int]) -> Callable[[], Any]:
        return scorer.start([chunks[number] for number in numbers])

    with tqdm(total=len(chunks), unit="chunk", disable=not progress, delay=2, leave=False) as bar:
        before = time.perf_counter()
        for numbers, found in in_background(_chunk_batches(chunks), start):
            batch = scorer.rows([chunks[number] for number in numbers], found)
            now = time.perf_counter()
            # Groups overlap; from one end to the next their seconds add up to the whole.
            seconds, before = now - before, now
            n_tokens = sum(row["tokens"] for row in batch)
            for number, row in zip(numbers, batch, strict=True):
                if row.pop("kept", True):
                    rows.append({"chunk": number, "seconds": seconds * row["tokens"] / max(n_tokens, 1), **row})
            bar.update(len(numbers))
    return rows


def _chunk_batches(chunks: Sequence[bytes]) -> Iterator[list[int]]:
    numbers: list[int] = []
    n_bytes = 0
    for number in range(len(chunks)):
        if not len(chunks[number]):
            raise Error(f"chunk {number} is empty: a ratio needs at least one byte")
        numbers.append(number)
        n_bytes += len(chunks[number])
        if n_bytes >= _SCORE_BATCH_BYTES:
            yield numbers
            numbers, n_bytes = [], 0
    if numbers:
        yield numbers


def _model_facts(model: Any) -> dict[str, Any]:
    from llmcomp.version import __version__

    traits = ModelTraits.of(model)
    return {
        "model": traits.name,
        "params": traits.n_params,
        "n_params_nonembedding": traits.n_params_nonembedding,
        "step": traits.step,
        "engine": traits.engine,
        "backend": coding.backend_in_use(),
        "device": traits.device,
        "dtype": traits.dtype,
        "attention": traits.attention,
        "weights_sha256": weights_sha256(model),
        "version": __version__,
    }


class _LosslessScorer:
    """Chunks as an archive would code them."""

    def __init__(
        self,
        codec: SegmentCodec,
        mapping: str,
        cache: TokenCache,
        *,
        verify: bool,
        mixed: SegmentCodec | None,
        token_bits: bool,
    ):
        """`mixed`: the codec that decodes what the same model codes mixed; None: without the adaptive columns."""
        self._codec, self._mapping, self._cache, self._verify = codec, mappings.get_mapping(mapping), cache, verify
        self._mixed, self._has_token_bits = mixed, token_bits

    @property
    def batch_rows(self) -> int | None:
        return self._codec.batch_rows

    def start(self, batch: list[bytes]) -> Callable[[], list[tuple[Coded, ...]]]:
        """For every chunk what the model codes, and mixed where that is asked for."""
        encoded = self._cache.encoded(self._mapping, self._codec.traits.tokenizer, batch)
        if self._mixed is not None:
            return self._codec.start_both(encoded)  # type: ignore[return-value]
        wait = self._codec.start(encoded)
        return lambda: [(item,) for item in wait()]

    def rows(self, batch: list[bytes], coded: list[tuple[Coded, ...]]) -> list[dict]:
        rows = self._rows(self._codec, batch, [both[0] for both in coded])
        if self._mixed is not None:
            for row, more in zip(rows, self._rows(self._mixed, batch, [both[1] for both in coded]), strict=True):
                row |= {name: more[name.removeprefix("adaptive_")] for name in ADAPTIVE_COLUMNS}
        return rows

    def _rows(self, codec: SegmentCodec, batch: list[bytes], coded: list[Coded]) -> list[dict]:
        if self._verify:
            decoded = codec.decode([item.payload for item in coded], [len(chunk) for chunk in batch])
            if wrong := sum(chunk != content for chunk, content in zip(batch, decoded, strict=True)):
                raise CorruptArchive(f"{wrong} of {len(batch)} chunks decode to other bytes than were coded")
        return [
            {
                "bytes_in": len(chunk),
                "bytes_scored": len(chunk),
                "tokens": item.n_tokens,
                "ideal_bits": item.ideal_bits,
                "coded_bytes": len(item.stream),
                "side_bits": item.side_bits,
                "ratio": (8 * len(item.stream) + item.side_bits) / (8 * len(chunk)),
                **({"token_bits": item.token_bits.astype("float32")} if self._has_token_bits else {}),
            }
            for chunk, item in zip(batch, coded, strict=True)
        ]

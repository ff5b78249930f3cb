"""What would be scored, before it is: the facts of a data set and a look at its first chunks. Nothing is scored."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmcomp.data.datasets import Dataset

_CHUNKS_SHOWN = 5
_PREVIEW_BYTES = 48


@dataclass(frozen=True)
class Inspection:
    """Facts of a data set. `n_available`: chunks there are in all, None: any number; `n_utf8`: chunks that are UTF-8,
    but for a character that their ends cut; `first`: (source, bytes, preview) of the first few."""

    name: str
    modality: str
    origin: str
    licence: str
    n_chunks: int
    n_available: int | None
    n_distinct: int
    n_documents: int
    n_bytes: int
    chunk_bytes: int | None
    draw: str
    seed: int | None
    n_utf8: int
    sha256: str
    first: tuple[tuple[str, int, str], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        of_all = "any number" if self.n_available is None else f"{self.n_available:,}"
        chosen = {"spread": f"drawn over all by seed {self.seed}", "first": "the first ones"}.get(self.draw, "")
        size = "whole documents" if self.chunk_bytes is None else f"{self.chunk_bytes:,} bytes each"
        lines = [
            f"{self.name}: {self.modality}, {self.origin}" + (f", {self.licence}" if self.licence else ""),
            f"  chunks     {self.n_chunks:,} of {of_all}, {chosen}; {size}, {self.n_bytes:,} bytes in all",
            f"  documents  {self.n_documents:,} that chunks are of",
            f"  content    {self.n_utf8:,} chunks are UTF-8, {self.n_distinct:,} are different",
            f"  sha256     {self.sha256}",
        ]
        shown = [f"  {source} ({n_bytes:,} bytes): {preview}" for source, n_bytes, preview in self.first]
        more = [f"  ... and {self.n_chunks - len(shown):,} more"] if self.n_chunks > len(shown) else []
        return "\n".join([*lines, *shown, *more])


def inspect(data: Dataset) -> Inspection:
    """The facts of what `load_dataset` returned."""
    return Inspection(
        data.name,
        data.modality,
        data.origin,
        data.licence,
        len(data),
        data.n_available,
        len(set(data.chunks)),
        len(set(data.documents)),
        sum(map(len, data.chunks)),
        data.chunk_bytes,
        data.draw,
        data.seed,
        sum(map(_is_utf8, data.chunks)),
        data.sha256,
        tuple(
            (source, len(chunk), _preview(chunk))
            for source, chunk in zip(data.sources[:_CHUNKS_SHOWN], data.chunks, strict=False)
        ),
    )


def _is_utf8(chunk: bytes) -> bool:
    """A cut may take up to three bytes of a character at either end."""
    start = next((i for i in range(min(4, len(chunk))) if chunk[i] & 0xC0 != 0x80), 0)
    try:
        chunk[start:].decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _preview(chunk: bytes) -> str:
    """Its first bytes on one line: as text where they are, without what a terminal takes for commands, else as hex."""
    text = chunk[:_PREVIEW_BYTES].decode(errors="replace")
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if _is_utf8(chunk) and len(shown) < 1.5 * len(text) else chunk[: _PREVIEW_BYTES // 2].hex(" ")

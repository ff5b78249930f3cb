"""Named bytes: bundled samples, the user's files, objects in memory and fetched data sets, cut into chunks. No tokens,
models or coder.

How chunks are chosen. Every choice follows from the seed and from names, through SHA-256 (`drawing`), so that two
people with the same files get the same chunks, whatever their platform and library versions:

- text, and bytes under any other name (`documents`): of all chunks on the grids of the documents those that a seeded
  shuffle takes first (`draw="spread"`), or those at the beginning (`draw="first"`).
- image (`images`), speech (`speech`): crops and segments are drawn, pictures and utterances taken in turn.
- arrays (`arrays`): as text, or item by item.

So the first n of N chunks are the n chunks that a smaller request gives.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmcomp import pico
from llmcomp.atomic_write import write_beside
from llmcomp.checked_json import INDEX_BYTES_MAX, Members, read_object
from llmcomp.data import arrays, documents, download, hugging_face, images, speech
from llmcomp.data.download import fetch
from llmcomp.data.drawing import DRAWS, Found, Request, draw
from llmcomp.display import Shown
from llmcomp.errors import DatasetError, Error, named, shown

__all__ = [
    "Dataset",
    "DatasetInfo",
    "check_manifest",
    "draw",
    "fetch",
    "list_datasets",
    "load_dataset",
    "write_manifest",
]

CHUNK_BYTES = 2048
DEFAULT_N_CHUNKS = 2048


@dataclass(frozen=True, repr=False)
class Dataset(Shown):
    """Chunks of `chunk_bytes` bytes each (None: whole documents), and where every one is from (`sources`, `documents`
    and `offsets`, in the same order; offsets in bytes, None where there is none).

    `draw`: how they were chosen among the `n_available` there are (None: any number): "spread", by the `seed`, or
    "first". `seed` is None where nothing is drawn.
    """

    name: str
    modality: str
    chunks: tuple[bytes, ...]
    sources: tuple[str, ...]
    chunk_bytes: int | None
    seed: int | None
    origin: str
    licence: str
    draw: str = ""
    documents: tuple[str, ...] = ()
    offsets: tuple[int | None, ...] = ()
    n_available: int | None = None

    def __len__(self) -> int:
        return len(self.chunks)

    def _facts(self) -> dict[str, Any]:
        return {
            "": self.name,
            "modality": self.modality,
            "chunks": len(self.chunks),
            "bytes": sum(map(len, self.chunks)),
            "from": self.origin,
            "licence": self.licence,
        }

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of all chunks, one behind the other."""
        digest = hashlib.sha256()
        for chunk in self.chunks:
            digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True)
class DatasetInfo:
    """One line of `llmcomp data list`. `path`: where it lies, None if it must be fetched or named first."""

    name: str
    modality: str
    origin: str
    licence: str
    download_bytes: int
    path: Path | None


# name: (modality, origin, licence)
_BUNDLED = {
    "text-sample": ("text", "bundled sample: CPython's documentation", "PSF-2.0"),
    "image-sample": ("image", "bundled sample: portrait of Grace Hopper, United States Navy", "public domain"),
    "speech-sample": ("speech", "bundled sample: two sentences spoken by espeak-ng", "Apache-2.0"),
}
_PUBLISHED = {
    "enwik8": (
        "text",
        "the first 10^8 bytes of the English Wikipedia dump of 2006-03-03, mattmahoney.net/dc",
        "GNU FDL (Wikipedia, 2006)",
    ),
    "librispeech": ("speech", "LibriSpeech dev-clean (Panayotov et al., ICASSP 2015), openslr.org/12", "CC BY 4.0"),
    "imagenet": (
        "image",
        "ILSVRC2012 validation images (Russakovsky et al., IJCV 2015)",
        "ImageNet terms of access: research and education, no redistribution",
    ),
}
# Any name may stand before "=" in NAME=PATH; of these the modality is known.
_NAME = re.compile(r"[A-Za-z][\w.+-]*")
_MODALITY_OF_NAME = {"text": "text", "image": "image", "speech": "speech"} | {
    name: modality for name, (modality, _, _) in _PUBLISHED.items()
}


def list_datasets() -> list[DatasetInfo]:
    """The bundled samples and the data sets that `fetch` knows."""
    bundled = [
        DatasetInfo(name, modality, origin, licence, 0, pico.sample_path(modality))
        for name, (modality, origin, licence) in _BUNDLED.items()
    ]
    published = [
        DatasetInfo(name, modality, origin, licence, download.REMOTES[name].archive_bytes, download.fetched_path(name))
        for name, (modality, origin, licence) in _PUBLISHED.items()
    ]
    return bundled + published


def load_dataset(
    spec: Any,
    n_chunks: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    seed: int = 0,
    progress: bool = True,
    *,
    draw: str = "spread",
    whole: bool = False,
    name: str | None = None,
    modality: str | None = None,
    column: str | None = None,
) -> Dataset:
    """The chunks of a data set.

    Args:
        spec: one of
            "text", "image" or "speech": a bundled sample (its name is then "text-sample" ...);
            the name of a fetched data set;
            "NAME=PATH": a picture, a folder or a tar of pictures as "image=...", a FLAC or WAV file or a folder of them
            as "speech=...", under any other NAME ("text", "dna", "code") a file, a folder or a glob of files, each a
            document, whose bytes are taken as they are;
            "NAME=PATH:COLUMN": the text or bytes in a column of JSON Lines (.jsonl, .ndjson, .gz) or Parquet files;
            "NAME=hf:DATASET[,config=CONFIG][,split=SPLIT]:COLUMN": a column of text or of pictures by Hugging Face's
            `datasets` (extra llmcomp-exact[datasets]);
            or an object: a data set of that library with `column`, bytes, a list of texts or bytes, an array of NumPy
            or torch (`arrays`: what its items are).
        n_chunks: how many; None: 2,048, or as many as there are.
        chunk_bytes: of each. Text is cut on a grid from the beginning of each document; the rows of a column and of a
            list are joined by newlines before.
        draw, seed: "spread": chunks drawn by the seed over all there are. "first": the first ones in order; then they
            are neighbours and resemble one another. Pictures and speech are always drawn.
        whole: whole documents, files or rows, are the chunks, each of its own length; a model reads them with sliding
            windows.
        name, modality: of an object, "data" and what its type says unless given; `name` renames any other.

    `DatasetError` if there are fewer chunks than asked for, or none, and for files whose bytes are not their content.
    """
    if draw not in DRAWS:
        raise DatasetError(f"draw is {draw!r}, expected one of {', '.join(DRAWS)}")
    label = spec if isinstance(spec, str) else name or f"a {type(spec).__name__}"
    if chunk_bytes < 1 or (n_chunks is not None and n_chunks < 1):
        raise DatasetError(f"{label}: {n_chunks} chunks of {chunk_bytes} bytes were asked for, expected at least one")
    request = Request(n_chunks or DEFAULT_N_CHUNKS, chunk_bytes, draw, seed, whole, progress)
    try:
        if isinstance(spec, str):
            about, found = _of_text(spec, request)
        else:
            about, found = _of_object(spec, request, name, modality, column)
    except OSError as error:
        raise DatasetError(f"{label}: cannot read {error.filename or label}: {error.strerror or error}") from error
    except (MemoryError, OverflowError):
        raise DatasetError(f"{label}: chunks of {chunk_bytes:,} bytes take more memory than there is") from None
    if len(found.chunks) < (n_chunks or 1):
        what = "documents" if whole else f"chunks of {chunk_bytes:,} bytes"
        raise DatasetError(f"{label}: found {len(found.chunks)} {what}, expected {n_chunks or 1}")
    return _as_dataset(about if name is None else about._replace(name=name), found)


class _About(NamedTuple):
    name: str
    modality: str
    origin: str
    licence: str


def _as_dataset(about: _About, found: Found) -> Dataset:
    chunks = found.chunks
    return Dataset(
        about.name,
        about.modality,
        tuple(chunk.content for chunk in chunks),
        tuple(chunk.source for chunk in chunks),
        found.chunk_bytes,
        found.seed,
        about.origin,
        about.licence,
        found.draw,
        tuple(chunk.document for chunk in chunks),
        tuple(chunk.offset for chunk in chunks),
        found.n_available,
    )


def write_manifest(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Write what the chunks are, with their SHA-256, as JSON; the file appears whole or not at all."""
    path = Path(path)
    try:
        write_beside(path, (json.dumps(_manifest(dataset), indent=1) + "\n").encode())
    except OSError as error:
        raise DatasetError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_manifest(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """`DatasetError` naming the first difference unless the chunks are those that the manifest lists."""
    try:
        expected = read_object(path, INDEX_BYTES_MAX)
        entries = [Members({"chunk": chunk}, "chunks") for chunk in Members(expected, "it").array("chunks")]
        chunks = [entry.members("chunk") for entry in entries]
        listed = [(chunk.text("sha256"), chunk.text("source")) for chunk in chunks]
    except Error as error:
        raise DatasetError(f"{path}: not a manifest of chunks ({str(error).removeprefix(f'{path}: ')})") from None
    found = _manifest(dataset)
    for key in ("modality", "chunk_bytes"):
        if found[key] != expected.get(key):
            raise DatasetError(f"{path}: {key} is {found[key]!r}, the manifest has {shown(expected.get(key))}")
    if len(listed) != len(dataset):
        raise DatasetError(f"{path}: found {len(dataset)} chunks, the manifest has {len(listed)}")
    for i, ((sha256, source), chunk) in enumerate(zip(listed, found["chunks"], strict=True)):
        if chunk["sha256"] != sha256:
            raise DatasetError(
                f"{path}: chunk {i} ({chunk['source']}) has SHA-256 {chunk['sha256']}, "
                f"the manifest has {named(sha256)} ({named(source)})"
            )


def _manifest(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "modality": dataset.modality,
        "chunk_bytes": dataset.chunk_bytes,
        "draw": dataset.draw,
        "seed": dataset.seed,
        "origin": dataset.origin,
        "licence": dataset.licence,
        "sha256": dataset.sha256,
        "chunks": [
            {"source": source, "sha256": hashlib.sha256(chunk).hexdigest()}
            for chunk, source in zip(dataset.chunks, dataset.sources, strict=True)
        ],
    }


def _of_text(spec: str, request: Request) -> tuple[_About, Found]:
    """What the user wrote, resolved and read."""
    name, equals, place = spec.partition("=")
    if not equals:
        name, path, origin, licence = _known(spec)
        about = _About(name, _BUNDLED[name][0] if name in _BUNDLED else _MODALITY_OF_NAME[name], origin, licence)
        return about, _read(about, path, None, request)
    if not _NAME.fullmatch(name) or not place:
        raise DatasetError(f"{spec!r}: expected NAME=PATH, NAME one of {', '.join(_MODALITY_OF_NAME)}, or your own")
    modality = _MODALITY_OF_NAME.get(name, name)
    origin, licence = _PUBLISHED[name][1:] if name in _PUBLISHED else ("files of the user", "")
    if place.startswith(hugging_face.PREFIX):
        column = hugging_face.load_column(place)
        about = _About(name, modality, f"Hugging Face datasets: {place.removeprefix(hugging_face.PREFIX)}", "")
        return about, _read_column(about, column, request)
    file, chosen = (place, None) if modality in ("image", "speech") else documents.split_column(place)
    path = Path(os.path.expanduser(file))  # noqa: PTH111 - Path's raises for an unknown user
    about = _About(name, modality, f"{origin}; read from {Path(place).name}", licence)
    return about, _read(about, path, chosen, request)


def _known(name: str) -> tuple[str, Path, str, str]:
    """(name, path, origin, licence) of a bundled or a fetched data set."""
    if name in _PUBLISHED:
        path = download.fetched_path(name)
        if path is None:
            raise DatasetError(f"{name} is not there yet; run `llmcomp data fetch {name}`, or give {name}=PATH")
        return name, path, *_PUBLISHED[name][1:]
    sample = name if name in _BUNDLED else f"{name}-sample"
    if sample not in _BUNDLED:
        names = ", ".join([*(name.removesuffix("-sample") for name in _BUNDLED), *_PUBLISHED])
        raise DatasetError(f"no data set is called {name!r}; there are {names}, and NAME=PATH")
    modality, origin, licence = _BUNDLED[sample]
    return sample, pico.sample_path(modality), origin, licence


def _read(about: _About, path: Path, column: str | None, request: Request) -> Found:
    """Files, as their modality asks."""
    if not os.path.exists(path) and not documents.matches(path):  # noqa: PTH110 - Path's raises for a long name
        raise DatasetError(f"{about.name}: {path} does not exist")
    if about.modality in ("image", "speech"):
        if request.whole:
            raise DatasetError(f"{about.name}: whole documents are of text; pictures and speech are cut")
        cut = {"image": images.image_chunks, "speech": speech.speech_chunks}[about.modality]
        return (images.tile_chunks if about.name == "image-sample" else cut)(path, request)
    found = documents.read_files(path, column, about.modality, request.whole)
    return _cut(found, str(path), request)


def _read_column(about: _About, column: hugging_face.Column, request: Request) -> Found:
    if column.has_pictures:
        if about.modality != "image":
            raise DatasetError(f"{about.name}: {column.name} holds pictures: call it image=...")
        return images.row_chunks(column.name, column.rows, request)
    return _cut(documents.of_rows(column.name, column.rows, request.whole), column.name, request)


def _cut(found: list[documents.Document], where: str, request: Request) -> Found:
    if request.whole:
        return documents.whole(found, where, request)
    return documents.cut(found, where, request)


def _of_object(
    value: Any, request: Request, name: str | None, modality: str | None, column: str | None
) -> tuple[_About, Found]:
    label = name or "data"
    about = _About(label, modality or "text", "an object in memory", "")
    if hugging_face.is_dataset(value):
        found = hugging_face.column_of(value, column, label)
        about = about._replace(modality=modality or ("image" if found.has_pictures else "text"))
        return about, _read_column(about, found, request)
    if column is not None:
        raise DatasetError(f"{label}: a {type(value).__name__} has no columns")
    if arrays.is_array(value):
        array = arrays.as_array(value, label)
        about = about._replace(modality=modality or arrays.modality_of(array))
        return about, arrays.array_chunks(array, label, request)
    if isinstance(value, (bytes, bytearray, memoryview)):
        about = about._replace(modality=modality or "bytes")
        return about, _cut([documents.document_of(label, bytes(value))], label, request)
    if isinstance(value, (list, tuple)) and value:
        if not all(isinstance(item, str) for item in value):
            about = about._replace(modality=modality or "bytes")
        return about, _cut(documents.of_rows(label, value, request.whole), label, request)
    raise DatasetError(
        f"{value!r:.80} is no data: expected a name, NAME=PATH, bytes, a list of texts, an array or a data set"
    )

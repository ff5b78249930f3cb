"""Named bytes: bundled samples, the user's files and fetched data sets, cut into chunks. No tokens, models or coder.

How chunks are cut. Every choice follows from the seed and from names, through SHA-256 (`draw`), so that two people
with the same files get the same chunks, whatever their platform and library versions:

- text: the first chunks of the file, in order.
- image: crops of 32 rows x 64 columns, row by row, of the picture as 8-bit grey (Pillow's "L": ITU-R 601-2 luma). The
  pictures are put in order of the SHA-256 of seed and file name and taken in turn; where the crop lies is drawn for
  each chunk. (JPEG decoders may differ in a grey level; a manifest shows it.) The bundled picture is cut into tiles
  that do not overlap, in drawn order.
- speech: 16-bit little-endian samples at 16 kHz, cut on the grid from the start of each utterance. The utterances,
  and the segments of each, are put in order of a SHA-256; one segment of every utterance is taken in turn.

So the first n of N chunks are the n chunks that a smaller request gives.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llmcomp import pico
from llmcomp.atomic_write import write_beside
from llmcomp.checked_json import INDEX_BYTES_MAX, Members, read_object
from llmcomp.data import download
from llmcomp.data.download import fetch
from llmcomp.errors import DatasetError, Error, named, reason, shown

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
IMAGE_ROWS, IMAGE_COLUMNS = 32, 64
SAMPLE_RATE_HZ = 16_000
SAMPLE_BYTES = 2

# Files whose bytes are not the text that is in them.
_CONTAINERS = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"%PDF-": "PDF",
}
_CONTAINER_MAGIC_BYTES = max(map(len, _CONTAINERS))
_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SPEECH_SUFFIXES = {".flac", ".wav"}
# What those suffixes promise. Pillow goes by the content; some of its other formats start other programs.
_IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
# A compressed tar may claim any number of bytes, a sound file any number of samples.
_PICTURE_BYTES_MAX = 1 << 28
_SAMPLES_MAX = 1 << 30
# The Hugging Face set appends the class to the official name: ILSVRC2012_val_00000001_n01751748.JPEG.
_IMAGENET_CLASS = re.compile(r"_n\d{8}(?=\.)")


@dataclass(frozen=True)
class Dataset:
    """Chunks of `chunk_bytes` bytes each, and where every one is from (`sources`, in the same order).

    `seed` is None where nothing is drawn.
    """

    name: str
    modality: str
    chunks: tuple[bytes, ...]
    sources: tuple[str, ...]
    chunk_bytes: int
    seed: int | None
    origin: str
    licence: str

    def __len__(self) -> int:
        return len(self.chunks)

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
# What may stand before "=" in NAME=PATH.
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
    spec: str, n_chunks: int | None = None, chunk_bytes: int = CHUNK_BYTES, seed: int = 0, progress: bool = True
) -> Dataset:
    """The chunks of a data set.

    `spec`: "text", "image" or "speech" for a bundled sample (its name is then "text-sample" ...), "NAME=PATH" for the
    user's own files, or the name of a fetched data set. PATH is a text file; a picture, a folder or a tar of pictures;
    or a FLAC or WAV file or a folder of them. NAME is text, image, speech, or one of those that can be fetched.
    `n_chunks`: None for 2,048 or as many as there are. `DatasetError` if there are fewer than asked for, or none.
    """
    name, path, origin, licence = _resolve(spec)
    modality = _BUNDLED[name][0] if name in _BUNDLED else _MODALITY_OF_NAME[name]
    if chunk_bytes < 1 or (n_chunks is not None and n_chunks < 1):
        raise DatasetError(f"{spec}: {n_chunks} chunks of {chunk_bytes} bytes were asked for, expected at least one")
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
        raise DatasetError(f"{spec}: {path} does not exist")
    cut: Callable[[Path, int, int, int, bool], Iterator[tuple[bytes, str]]]
    cut = {"text": _text_chunks, "image": _image_chunks, "speech": _speech_chunks}[modality]
    if name == "image-sample":
        cut = _tile_chunks
    try:
        pairs = list(cut(path, n_chunks or DEFAULT_N_CHUNKS, chunk_bytes, seed, progress))
    except OSError as error:
        raise DatasetError(f"{spec}: cannot read {error.filename or path}: {error.strerror or error}") from error
    except (MemoryError, OverflowError):
        raise DatasetError(f"{spec}: chunks of {chunk_bytes:,} bytes take more memory than there is") from None
    if len(pairs) < (n_chunks or 1):
        raise DatasetError(f"{path}: found {len(pairs)} chunks of {chunk_bytes:,} bytes, expected {n_chunks or 1}")
    chunks, sources = zip(*pairs, strict=True)
    drawn_seed = None if modality == "text" else seed
    return Dataset(name, modality, chunks, sources, chunk_bytes, drawn_seed, origin, licence)


def draw(bound: int, *key: object) -> int:
    """An integer from 0 to `bound` - 1: floor(h * bound / 2^64), h the first 8 bytes of the key's SHA-256, big-endian.

    The key is its parts as text, joined by single spaces.
    """
    return int.from_bytes(_key_digest(*key)[:8], "big") * bound >> 64


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
        "seed": dataset.seed,
        "origin": dataset.origin,
        "licence": dataset.licence,
        "sha256": dataset.sha256,
        "chunks": [
            {"source": source, "sha256": hashlib.sha256(chunk).hexdigest()}
            for chunk, source in zip(dataset.chunks, dataset.sources, strict=True)
        ],
    }


def _resolve(spec: str) -> tuple[str, Path, str, str]:
    """(name, path, origin, licence) of what the user wrote."""
    if not isinstance(spec, str):
        raise DatasetError(f"{spec!r} names no data set: expected a name, or NAME=PATH")
    name, equals, file = spec.partition("=")
    if equals:
        if name not in _MODALITY_OF_NAME or not file:
            raise DatasetError(f"{spec!r}: expected NAME=PATH, NAME one of {', '.join(_MODALITY_OF_NAME)}")
        origin, licence = _PUBLISHED[name][1:] if name in _PUBLISHED else ("files of the user", "")
        named_path = Path(os.path.expanduser(file))  # noqa: PTH111 - Path's raises for an unknown user
        return name, named_path, f"{origin}; read from {Path(file).name}", licence
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


def _key_digest(*key: object) -> bytes:
    return hashlib.sha256(" ".join(map(str, key)).encode()).digest()


def _text_chunks(
    path: Path, n_chunks: int, chunk_bytes: int, _seed: int, _progress: bool
) -> Iterator[tuple[bytes, str]]:
    if path.is_dir():
        raise DatasetError(f"{path} is a folder, expected a file")
    n_bytes = path.stat().st_size
    if n_bytes < chunk_bytes:
        raise DatasetError(f"{path}: found {n_bytes:,} bytes, expected at least one chunk of {chunk_bytes:,}")
    with path.open("rb") as file:
        start = file.read(_CONTAINER_MAGIC_BYTES)
        if kind := next((kind for magic, kind in _CONTAINERS.items() if start.startswith(magic)), None):
            raise DatasetError(
                f"{path} is a {kind} file: its container would be scored, not its text; extract the text"
            )
        file.seek(0)
        for i in range(min(n_chunks, n_bytes // chunk_bytes)):
            yield file.read(chunk_bytes), f"{path.name} bytes {i * chunk_bytes}-{(i + 1) * chunk_bytes - 1}"


@dataclass(frozen=True)
class _Picture:
    """A picture file: its name without folders, and where its bytes are: a path, a tar's member, a Parquet row."""

    name: str
    place: Any


def _image_chunks(
    path: Path, n_chunks: int, chunk_bytes: int, seed: int, progress: bool
) -> Iterator[tuple[bytes, str]]:
    _check_image_chunk(chunk_bytes)
    pictures, read_all = _find_pictures(path)
    if not pictures:
        raise DatasetError(f"{path}: found no picture, expected {', '.join(sorted(_IMAGE_SUFFIXES))} files")
    pictures.sort(key=lambda picture: (_key_digest(seed, picture.name), picture.name))
    crops: dict[int, tuple[bytes, str]] = {}
    too_small: set[int] = set()
    with tqdm(total=n_chunks, desc=path.name, unit="chunk", disable=not progress, delay=2) as bar:
        while len(crops) < n_chunks:
            if len(too_small) == len(pictures):
                raise DatasetError(f"{path}: no picture has {IMAGE_ROWS} rows and {IMAGE_COLUMNS} columns or more")
            chunks_of: dict[int, list[int]] = {}
            for chunk in (chunk for chunk in range(n_chunks) if chunk not in crops):
                index = chunk % len(pictures)
                while index in too_small:  # such a picture gives its turn to the next one
                    index = (index + 1) % len(pictures)
                chunks_of.setdefault(index, []).append(chunk)
            for index, data in read_all({index: pictures[index] for index in chunks_of}):
                grey = _grey(data, pictures[index].name)
                if grey.width < IMAGE_COLUMNS or grey.height < IMAGE_ROWS:
                    too_small.add(index)
                    continue
                crops |= {chunk: _crop(grey, pictures[index].name, seed, chunk) for chunk in chunks_of[index]}
                bar.update(len(chunks_of[index]))
    for chunk in range(n_chunks):
        yield crops[chunk]


def _check_image_chunk(chunk_bytes: int) -> None:
    if chunk_bytes != IMAGE_ROWS * IMAGE_COLUMNS:
        raise DatasetError(f"an image chunk has {IMAGE_ROWS} x {IMAGE_COLUMNS} bytes, {chunk_bytes:,} were asked for")


def _grey(data: bytes, name: str) -> Any:
    from PIL import Image

    with (
        _decoding(named(name), "not a readable picture"),
        Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as picture,
    ):
        return picture.convert("L")


@contextlib.contextmanager
def _decoding(name: object, fault: str) -> Iterator[None]:
    """What a decoder runs into with a damaged file, whatever its kind, as a DatasetError that names the file.

    Failures of the file system pass, to be reported as such.
    """
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DatasetError(f"{name}: {fault} ({reason(error)})") from error


def _crop(grey: Any, name: str, seed: int, chunk: int) -> tuple[bytes, str]:
    row = draw(grey.height - IMAGE_ROWS + 1, seed, name, chunk, "row")
    column = draw(grey.width - IMAGE_COLUMNS + 1, seed, name, chunk, "column")
    return _cut_out(grey, name, row, column)


def _cut_out(grey: Any, name: str, row: int, column: int) -> tuple[bytes, str]:
    crop = grey.crop((column, row, column + IMAGE_COLUMNS, row + IMAGE_ROWS))
    return crop.tobytes(), f"{name} row {row} column {column}"


def _tile_chunks(
    path: Path, n_chunks: int, chunk_bytes: int, seed: int, _progress: bool
) -> Iterator[tuple[bytes, str]]:
    _check_image_chunk(chunk_bytes)
    grey = _grey(path.read_bytes(), path.name)
    corners = [
        (row, column)
        for row in range(0, grey.height - IMAGE_ROWS + 1, IMAGE_ROWS)
        for column in range(0, grey.width - IMAGE_COLUMNS + 1, IMAGE_COLUMNS)
    ]
    corners.sort(key=lambda corner: _key_digest(seed, path.name, *corner))
    for row, column in corners[:n_chunks]:
        yield _cut_out(grey, path.name, row, column)


_ReadAll = Callable[[dict[int, _Picture]], Iterator[tuple[int, bytes]]]


def _find_pictures(path: Path) -> tuple[list[_Picture], _ReadAll]:
    """All pictures of a folder, of a tar, or of a folder with one tar or with Parquet files; or the one picture."""
    if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file():
        return [_Picture(_picture_name(path.name), path)], _read_files
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file()]
        if files:
            return [_Picture(_picture_name(file.name), file) for file in files], _read_files
        tables = sorted(path.rglob("*.parquet"))
        if tables:
            return list(_table_pictures(tables)), _read_tables
        tars = [file for file in path.rglob("*.tar*") if file.is_file()]
        if len(tars) != 1:
            return [], _read_files
        path = tars[0]
    with _decoding(path, "expected a folder or a tar of pictures"), tarfile.open(path) as tar:
        members = [member for member in tar if Path(member.name).suffix.lower() in _IMAGE_SUFFIXES]
    pictures = [_Picture(_picture_name(member.name), member) for member in members if member.isfile()]
    return pictures, functools.partial(_read_tar, path)


def _picture_name(name: str) -> str:
    return _IMAGENET_CLASS.sub("", name.rsplit("/", 1)[-1])


def _read_files(wanted: dict[int, _Picture]) -> Iterator[tuple[int, bytes]]:
    for index, picture in wanted.items():
        yield index, picture.place.read_bytes()


def _read_tar(path: Path, wanted: dict[int, _Picture]) -> Iterator[tuple[int, bytes]]:
    # In the order of the file: a compressed tar cannot be read backwards.
    with _decoding(path, "not a readable tar"), tarfile.open(path) as tar:
        for index, picture in sorted(wanted.items(), key=lambda item: item[1].place.offset):
            member = tar.extractfile(picture.place)
            if member is None or picture.place.size > _PICTURE_BYTES_MAX:
                raise DatasetError(f"{path}: {named(picture.name)} has {picture.place.size:,} bytes: no picture")
            yield index, member.read()


def _table_pictures(tables: Iterable[Path]) -> Iterator[_Picture]:
    """The rows of Parquet files with a column image = {bytes, path}, as Hugging Face's `datasets` writes pictures."""
    from pyarrow import parquet

    for table in tables:
        with (
            _decoding(table, "expected pictures in a column image = {bytes, path}"),
            table.open("rb") as opened,
            parquet.ParquetFile(opened) as file,
        ):
            for group in range(file.num_row_groups):
                for row, image in enumerate(file.read_row_group(group, ["image.path"])["image"]):
                    yield _Picture(_picture_name(image.as_py()["path"]), (table, group, row))


def _read_tables(wanted: dict[int, _Picture]) -> Iterator[tuple[int, bytes]]:
    from pyarrow import parquet

    groups: dict[tuple[Path, int], list[tuple[int, int]]] = {}
    for index, picture in wanted.items():
        table, group, row = picture.place
        groups.setdefault((table, group), []).append((index, row))
    for (table, group), rows in groups.items():
        with (
            _decoding(table, "expected pictures in a column image = {bytes, path}"),
            table.open("rb") as opened,
            parquet.ParquetFile(opened) as file,
        ):
            images = file.read_row_group(group, ["image.bytes"])["image"]
            for index, row in rows:
                yield index, bytes(images[row].as_py()["bytes"])


def _speech_chunks(
    path: Path, n_chunks: int, chunk_bytes: int, seed: int, progress: bool
) -> Iterator[tuple[bytes, str]]:
    if chunk_bytes % SAMPLE_BYTES:
        raise DatasetError(f"a speech chunk has whole samples of 2 bytes, {chunk_bytes} bytes were asked for")
    found = path.rglob("*") if path.is_dir() else [path]
    files = [file for file in found if file.suffix.lower() in _SPEECH_SUFFIXES and file.is_file()]
    if not files:
        raise DatasetError(f"{path}: found no utterance, expected FLAC or WAV files")
    files.sort(key=lambda file: (_key_digest(seed, file.name), str(file)))
    segments: dict[Path, list[int]] = {}
    for file in tqdm(files, desc=path.name, unit="file", disable=not progress, delay=2):
        n_segments = _n_samples(file) * SAMPLE_BYTES // chunk_bytes
        segments[file] = sorted(range(n_segments), key=lambda segment: _key_digest(seed, file.name, segment))
    longest = max(map(len, segments.values()))
    turns = ((file, order[turn]) for turn in range(longest) for file, order in segments.items() if turn < len(order))
    for _, (file, segment) in zip(range(n_chunks), turns, strict=False):
        first = segment * chunk_bytes // SAMPLE_BYTES
        yield _pcm(file, first, chunk_bytes // SAMPLE_BYTES), f"{file.name} sample {first}"


def _n_samples(file: Path) -> int:
    import soundfile

    with _decoding(file, "not a readable sound file"):
        info = soundfile.info(str(file))
    if (info.samplerate, info.channels, info.subtype) != (SAMPLE_RATE_HZ, 1, "PCM_16"):
        raise DatasetError(
            f"{file}: found {info.samplerate} Hz, {info.channels} channel(s), {info.subtype}; "
            f"expected {SAMPLE_RATE_HZ} Hz, 1 channel, PCM_16"
        )
    if info.frames > _SAMPLES_MAX:
        raise DatasetError(f"{file}: claims {info.frames:,} samples, expected at most {_SAMPLES_MAX:,}")
    return int(info.frames)


def _pcm(file: Path, first: int, n_samples: int) -> bytes:
    import soundfile

    with _decoding(file, "not a readable sound file"):
        samples, _ = soundfile.read(str(file), n_samples, first, dtype="int16")
    if len(samples) != n_samples:
        raise DatasetError(f"{file}: found {len(samples)} samples from {first} on, expected {n_samples}")
    return bytes(samples.astype("<i2").tobytes())

"""Pictures -> chunks: crops of 32 rows x 64 columns, row by row, as 8-bit grey (Pillow's "L": ITU-R 601-2 luma).

The pictures are put in order of the SHA-256 of seed and file name and taken in turn; where the crop lies is drawn for
each chunk. (JPEG decoders may differ in a grey level; a manifest shows it.) The bundled picture is cut into tiles that
do not overlap, in drawn order. Pictures come from files, folders, tars, Parquet tables and rows of Hugging Face's
`datasets`; text and sound are read elsewhere.
"""

from __future__ import annotations

import functools
import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcomp.data.decoding import decoding
from llmcomp.data.drawing import Chunk, Found, Request, draw, key_digest
from llmcomp.errors import DatasetError, named
from llmcomp.progress import tqdm

IMAGE_ROWS, IMAGE_COLUMNS = 32, 64
_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# What those suffixes promise. Pillow goes by the content; some of its other formats start other programs.
_IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
# A compressed tar may claim any number of bytes.
_PICTURE_BYTES_MAX = 1 << 28
# The Hugging Face set appends the class to the official name: ILSVRC2012_val_00000001_n01751748.JPEG.
_IMAGENET_CLASS = re.compile(r"_n\d{8}(?=\.)")


@dataclass(frozen=True)
class _Picture:
    """A picture file: its name without folders, and where its bytes are: a path, a tar's member, a Parquet row."""

    name: str
    place: Any


_ReadAll = Callable[[dict[int, _Picture]], Iterator[tuple[int, bytes]]]


def image_chunks(path: Path, request: Request) -> Found:
    """Crops of the pictures at `path`; any number of them can be drawn."""
    _check_image_chunk(request.chunk_bytes)
    pictures, read_all = _find_pictures(path)
    if not pictures:
        raise DatasetError(f"{path}: found no picture, expected {', '.join(sorted(_IMAGE_SUFFIXES))} files")
    return _crops(path.name, pictures, read_all, request)


def row_chunks(name: str, rows: Any, request: Request) -> Found:
    """Crops of pictures that are rows: `rows[i]` gives {bytes, path}, as `datasets.Image(decode=False)` does."""
    _check_image_chunk(request.chunk_bytes)
    pictures = [_Picture(f"row {i}", i) for i in range(len(rows))]
    if not pictures:
        raise DatasetError(f"{name}: found no picture")

    def read_rows(wanted: dict[int, _Picture]) -> Iterator[tuple[int, bytes]]:
        for index, picture in wanted.items():
            row = rows[picture.place]
            yield index, row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes()

    return _crops(name, pictures, read_rows, request)


def _crops(name: str, pictures: list[_Picture], read_all: _ReadAll, request: Request) -> Found:
    n_chunks, seed = request.n_chunks, request.seed
    pictures.sort(key=lambda picture: (key_digest(seed, picture.name), picture.name))
    crops: dict[int, Chunk] = {}
    too_small: set[int] = set()
    with tqdm(total=n_chunks, desc=name, unit="chunk", disable=not request.progress, delay=2) as bar:
        while len(crops) < n_chunks:
            if len(too_small) == len(pictures):
                raise DatasetError(f"{name}: no picture has {IMAGE_ROWS} rows and {IMAGE_COLUMNS} columns or more")
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
    return Found([crops[chunk] for chunk in range(n_chunks)], None, "spread", seed, IMAGE_ROWS * IMAGE_COLUMNS)


def _check_image_chunk(chunk_bytes: int) -> None:
    if chunk_bytes != IMAGE_ROWS * IMAGE_COLUMNS:
        raise DatasetError(f"an image chunk has {IMAGE_ROWS} x {IMAGE_COLUMNS} bytes, {chunk_bytes:,} were asked for")


def _grey(data: bytes, name: str) -> Any:
    from PIL import Image

    with (
        decoding(named(name), "not a readable picture"),
        Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as picture,
    ):
        return picture.convert("L")


def _crop(grey: Any, name: str, seed: int, chunk: int) -> Chunk:
    row = draw(grey.height - IMAGE_ROWS + 1, seed, name, chunk, "row")
    column = draw(grey.width - IMAGE_COLUMNS + 1, seed, name, chunk, "column")
    return _cut_out(grey, name, row, column)


def _cut_out(grey: Any, name: str, row: int, column: int) -> Chunk:
    crop = grey.crop((column, row, column + IMAGE_COLUMNS, row + IMAGE_ROWS))
    return Chunk(crop.tobytes(), f"{name} row {row} column {column}", name)


def tile_chunks(path: Path, request: Request) -> Found:
    """Tiles of one picture that do not overlap, in drawn order."""
    _check_image_chunk(request.chunk_bytes)
    grey = _grey(path.read_bytes(), path.name)
    corners = [
        (row, column)
        for row in range(0, grey.height - IMAGE_ROWS + 1, IMAGE_ROWS)
        for column in range(0, grey.width - IMAGE_COLUMNS + 1, IMAGE_COLUMNS)
    ]
    corners.sort(key=lambda corner: key_digest(request.seed, path.name, *corner))
    chunks = [_cut_out(grey, path.name, row, column) for row, column in corners[: request.n_chunks]]
    return Found(chunks, len(corners), "spread", request.seed, request.chunk_bytes)


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
    with decoding(path, "expected a folder or a tar of pictures"), tarfile.open(path) as tar:
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
    with decoding(path, "not a readable tar"), tarfile.open(path) as tar:
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
            decoding(table, "expected pictures in a column image = {bytes, path}"),
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
            decoding(table, "expected pictures in a column image = {bytes, path}"),
            table.open("rb") as opened,
            parquet.ParquetFile(opened) as file,
        ):
            images = file.read_row_group(group, ["image.bytes"])["image"]
            for index, row in rows:
                yield index, bytes(images[row].as_py()["bytes"])

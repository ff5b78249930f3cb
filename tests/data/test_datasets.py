"""Chunks are what the documentation says, from folders, tars and tables, and the same for everybody."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet
from real_data import DATA, needs_data

from llmcomp.data.datasets import Dataset, check_manifest, draw, list_datasets, load_dataset, write_manifest
from llmcomp.errors import DatasetError


def load(spec: str, n_chunks: int | None = None, **options: Any) -> Dataset:
    return load_dataset(spec, n_chunks, progress=False, **options)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of noise, so that every crop tells where it is from; one in a folder below, one in colour."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(5)
    for i in range(4):
        grey = rng.integers(0, 256, (40 + 7 * i, 70 + 9 * i), np.uint8)
        Image.fromarray(grey).save(folder / ("below" if i == 2 else "") / f"ILSVRC2012_val_0000000{i}.PNG", "PNG")
    Image.fromarray(rng.integers(0, 256, (64, 99, 3), np.uint8)).save(folder / "ILSVRC2012_val_00000004.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def as_tar(folder: Path, path: Path, mode: str) -> Path:
    """The pictures in reverse order, under names as the Hugging Face set has them."""
    with tarfile.open(path, mode) as tar:
        for file in sorted(folder.rglob("*.[pP][nN][gG]"), reverse=True):
            tar.add(file, f"val/{file.stem}_n01751748{file.suffix}")
    return path


def as_table(folder: Path, path: Path) -> Path:
    path.mkdir()
    files = sorted(folder.rglob("*.[pP][nN][gG]"), key=lambda file: file.name)
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    for part, rows in enumerate((images[:2], images[2:])):
        table = pa.table({"image": rows, "label": list(range(len(rows)))})
        parquet.write_table(table, path / f"validation-0000{part}-of-00002.parquet", row_group_size=2)
    return path


def test_draw_is_the_documented_formula() -> None:
    first = int(hashlib.sha256(b"7 a.png 3 row").hexdigest()[:16], 16)
    assert draw(10, 7, "a.png", 3, "row") == first * 10 // 2**64
    draws = [draw(6, seed) for seed in range(3000)]
    assert set(draws) == set(range(6))
    assert max(draws.count(value) for value in range(6)) < 600


def test_the_first_chunks_of_text_in_order_where_asked_for(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(5000)
    (tmp_path / "some.txt").write_bytes(content)
    dataset = load(f"enwik8={tmp_path / 'some.txt'}", draw="first")
    assert (dataset.name, dataset.modality, dataset.draw, dataset.seed) == ("enwik8", "text", "first", None)
    assert dataset.chunks == (content[:2048], content[2048:4096])
    assert dataset.sha256 == hashlib.sha256(content[:4096]).hexdigest()
    assert load(f"text={tmp_path / 'some.txt'}", 3, chunk_bytes=1000, draw="first").chunks[2] == content[2000:3000]


def shuffled(n: int, seed: int) -> list[int]:
    """The documented shuffle, with a list of all numbers in place of what was moved."""
    order = list(range(n))
    for i in range(n):
        digest = hashlib.sha256(f"{seed} chunk {i}".encode()).digest()
        j = i + int.from_bytes(digest[:8], "big") * (n - i) // 2**64
        order[i], order[j] = order[j], order[i]
    return order


def test_chunks_of_text_are_drawn_over_the_whole_of_it(tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(100 * 300 + 77)
    (tmp_path / "some.txt").write_bytes(content)
    dataset = load(f"text={tmp_path / 'some.txt'}", 40, chunk_bytes=100, seed=3)
    expected = shuffled(300, 3)[:40]
    assert dataset.offsets == tuple(100 * number for number in expected)
    assert dataset.chunks == tuple(content[100 * i : 100 * i + 100] for i in expected)
    assert (dataset.draw, dataset.seed, dataset.n_available) == ("spread", 3, 300)
    # Not the neighbours at the beginning, and each third of the file has its share.
    thirds = np.bincount(np.array(expected) // 100)
    assert thirds.min() >= 6
    # More chunks keep those that there were; other seeds draw others; all chunks are all of them.
    assert load(f"text={tmp_path / 'some.txt'}", 90, chunk_bytes=100, seed=3).chunks[:40] == dataset.chunks
    assert load(f"text={tmp_path / 'some.txt'}", 40, chunk_bytes=100).chunks != dataset.chunks
    assert sorted(load(f"text={tmp_path / 'some.txt'}", chunk_bytes=100).offsets) == list(range(0, 30_000, 100))


def test_a_way_to_draw_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="draw is 'last', expected one of spread, first"):
        load("text", draw="last")


def test_pictures_and_speech_are_drawn_either_way(pictures: Path) -> None:
    first = load(f"image={pictures}", 3, draw="first")
    assert (first.draw, first.seed) == ("spread", 0)
    assert first.chunks == load(f"image={pictures}", 3).chunks
    assert first.documents == tuple(source.split()[0] for source in first.sources)


def test_crops_are_where_they_say(pictures: Path) -> None:
    dataset = load(f"image={pictures}", 12, seed=3)
    assert dataset.modality == "image"
    for number, (chunk, source) in enumerate(zip(dataset.chunks, dataset.sources, strict=True)):
        name, _, row, _, column = source.split()
        grey = np.asarray(Image.open(next(pictures.rglob(name))).convert("L"))
        row, column = int(row), int(column)
        assert chunk == grey[row : row + 32, column : column + 64].tobytes()
        # The documented draw, restated.
        digest = hashlib.sha256(f"3 {name} {number} row".encode()).digest()
        assert row == int.from_bytes(digest[:8], "big") * (grey.shape[0] - 31) // 2**64
    turns = [source.split()[0] for source in dataset.sources]
    assert len(set(turns[:5])) == 5
    assert turns[:5] == turns[5:10]
    assert len(set(dataset.chunks)) == 12


def test_crops_are_the_same_from_folder_tar_and_table(pictures: Path, tmp_path: Path) -> None:
    expected = load(f"image={pictures}", 20).chunks
    for source in (
        as_tar(pictures, tmp_path / "val.tar", "w"),
        as_tar(pictures, tmp_path / "val_images.tar.gz", "w:gz"),
        as_table(pictures, tmp_path / "table"),
    ):
        assert load(f"imagenet={source}", 20).chunks == expected
    (tmp_path / "data").mkdir()
    (tmp_path / "val_images.tar.gz").rename(tmp_path / "data" / "val_images.tar.gz")
    assert load(f"imagenet={tmp_path / 'data'}", 20).chunks == expected


def test_one_picture(pictures: Path) -> None:
    dataset = load(f"image={pictures / 'ILSVRC2012_val_00000004.png'}", 3)
    assert {source.split()[0] for source in dataset.sources} == {"ILSVRC2012_val_00000004.png"}


def test_seed_and_number_of_chunks(pictures: Path) -> None:
    assert load(f"image={pictures}", 6).chunks == load(f"image={pictures}", 15).chunks[:6]
    assert load(f"image={pictures}", 6).chunks != load(f"image={pictures}", 6, seed=1).chunks
    assert len(load(f"image={pictures}")) == 2048


def test_small_pictures_give_their_turn_away(pictures: Path) -> None:
    for i in range(3):
        Image.new("L", (63 + i, 31)).save(pictures / f"small{i}.png")
    dataset = load(f"image={pictures}", 16)
    assert not any("small" in source for source in dataset.sources)
    assert len(dataset) == 16
    for file in pictures.rglob("ILSVRC*"):
        file.unlink()
    with pytest.raises(DatasetError, match="no picture has 32 rows and 64 columns"):
        load(f"image={pictures}", 1)


@pytest.fixture
def utterances(tmp_path: Path) -> Path:
    folder = tmp_path / "utterances"
    (folder / "1" / "2").mkdir(parents=True)
    rng = np.random.default_rng(6)
    for name, n_samples in (("1-2-0.flac", 5 * 1024 + 7), ("1-2-1.flac", 2 * 1024), ("1-2-2.wav", 1030)):
        samples = rng.integers(-32768, 32768, n_samples).astype(np.int16)
        soundfile.write(folder / "1" / "2" / name, samples, 16_000, subtype="PCM_16")
    soundfile.write(folder / "short.wav", samples[:1000], 16_000, subtype="PCM_16")
    return folder


def test_speech_is_little_endian_samples_on_the_grid(utterances: Path) -> None:
    dataset = load(f"speech={utterances}")
    assert len(dataset) == 5 + 2 + 1
    assert len(set(dataset.sources)) == 8
    for chunk, source in zip(dataset.chunks, dataset.sources, strict=True):
        name, _, first = source.split()
        samples, _ = soundfile.read(next(utterances.rglob(name)), dtype="int16")
        assert int(first) % 1024 == 0
        assert chunk == samples[int(first) : int(first) + 1024].astype("<i2").tobytes()
    # One segment of every utterance is taken in turn.
    assert len({source.split()[0] for source in dataset.sources[:3]}) == 3
    assert load(f"librispeech={utterances}", 4).chunks == dataset.chunks[:4]
    assert load(f"speech={utterances}", 4, seed=2).chunks != dataset.chunks[:4]


@pytest.mark.parametrize(
    ("rate_hz", "n_channels", "subtype"), [(8_000, 1, "PCM_16"), (16_000, 2, "PCM_16"), (16_000, 1, "PCM_24")]
)
def test_other_sound_is_refused(tmp_path: Path, rate_hz: int, n_channels: int, subtype: str) -> None:
    soundfile.write(tmp_path / "other.wav", np.zeros((4096, n_channels)), rate_hz, subtype=subtype)
    with pytest.raises(
        DatasetError, match=rf"other\.wav: found {rate_hz} Hz, {n_channels} .*{subtype}; expected 16000"
    ):
        load(f"speech={tmp_path}", 1)


@pytest.mark.parametrize("modality", ["text", "image", "speech"])
def test_bundled_samples(modality: str) -> None:
    dataset = load(modality)
    assert (dataset.name, dataset.modality) == (f"{modality}-sample", modality)
    assert len(dataset) >= 32
    assert {len(chunk) for chunk in dataset.chunks} == {2048}
    assert len(set(dataset.sources)) == len(dataset)
    assert "sample" in dataset.origin
    assert dataset.licence
    assert load(f"{modality}-sample", 8).chunks == dataset.chunks[:8]


def test_list_names_what_can_be_loaded_or_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMCOMP_CACHE", str(tmp_path))
    names = {info.name: info for info in list_datasets()}
    assert set(names) == {"text-sample", "image-sample", "speech-sample", "enwik8", "librispeech", "imagenet"}
    assert names["enwik8"].path is None
    with pytest.raises(DatasetError, match="NAME=PATH"):
        load_dataset(tmp_path)
    with pytest.raises(DatasetError, match="is no data"):
        load_dataset(7)
    with pytest.raises(DatasetError, match="run `llmcomp data fetch enwik8`"):
        load("enwik8")
    (tmp_path / "enwik8").write_bytes(bytes(4096))
    assert len(load("enwik8")) == 2
    assert {info.name: info.path for info in list_datasets()}["enwik8"] == tmp_path / "enwik8"


def test_manifest_is_written_and_checked(pictures: Path, tmp_path: Path) -> None:
    dataset = load(f"image={pictures}", 5)
    manifest = tmp_path / "chunks.json"
    write_manifest(dataset, manifest)
    check_manifest(dataset, manifest)
    content = json.loads(manifest.read_text())
    assert [chunk["sha256"] for chunk in content["chunks"]] == [hashlib.sha256(c).hexdigest() for c in dataset.chunks]
    with pytest.raises(DatasetError, match="chunk 0 "):
        check_manifest(load(f"image={pictures}", 5, seed=1), manifest)
    with pytest.raises(DatasetError, match="found 4 chunks, the manifest has 5"):
        check_manifest(load(f"image={pictures}", 4), manifest)
    manifest.write_text("[]")
    with pytest.raises(DatasetError, match="not a manifest"):
        check_manifest(dataset, manifest)
    with pytest.raises(DatasetError, match=r"nowhere.json: not a manifest of chunks .No such file"):
        check_manifest(dataset, tmp_path / "nowhere.json")
    with pytest.raises(DatasetError, match="cannot be written"):
        write_manifest(dataset, tmp_path / "nowhere" / "chunks.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chunks.json", "pictures"]


def write_bad_files(folder: Path) -> None:
    (folder / "short").write_bytes(b"x" * 2047)
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "a.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "broken" / "a.flac").write_bytes(b"fLaC no sound")
    cut = io.BytesIO()
    with tarfile.open(fileobj=cut, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    (folder / "cut.tar.gz").write_bytes(cut.getvalue()[:20])
    write_bad_tars(folder)
    Image.new("RGB", (64, 64)).save(folder / "dds.png", "DDS")
    Image.new("RGB", (64, 64)).save(folder / "eps.png", "EPS")
    # A header that claims 2^35 samples, the most that FLAC's 36 bits can but one.
    soundfile.write(folder / "long.flac", np.zeros(5000, np.int16), 16_000, subtype="PCM_16")
    content = bytearray((folder / "long.flac").read_bytes())
    content[21] |= 8
    (folder / "long.flac").write_bytes(content)


def write_bad_tars(folder: Path) -> None:
    """Tars that end in other errors than tarfile's: of zlib, lzma and bz2, and of a size that no picture has."""
    with tarfile.open(fileobj=(plain := io.BytesIO()), mode="w") as tar:
        noise = np.random.default_rng(0).integers(0, 4, 100_000, np.uint8).tobytes()
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(noise)
            tar.addfile(member, io.BytesIO(noise))
    for suffix, pack in (("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)):
        packed = bytearray(pack(plain.getvalue()))
        packed[len(packed) // 20 : len(packed) // 20 + 100] = b"\xff" * 100
        (folder / f"bad.tar.{suffix}").write_bytes(packed)
    with tarfile.open(folder / "bomb.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = 1 << 40
        tar.fileobj.write(member.tobuf())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spec", "n_chunks", "message"),
    [
        ("nothing", None, "no data set is called 'nothing'; there are text, image, speech, enwik8"),
        ("no thing={}/short", None, "expected NAME=PATH"),
        ("={}/short", None, "expected NAME=PATH"),
        ("text=", None, "expected NAME=PATH"),
        ("text={}/missing", None, "missing does not exist"),
        ("enwik8={}/short", None, "found 2,047 bytes, expected at least one chunk of 2,048"),
        ("enwik8={}/empty", None, "found no file there"),
        ("image={}/empty", None, "found no picture"),
        ("image={}/short", None, "expected a folder or a tar of pictures"),
        ("image={}/cut.tar.gz", None, "expected a folder or a tar of pictures"),
        ("image={}/broken", 1, "a.jpg: not a readable picture"),
        ("image={}/bad.tar.gz", None, "expected a folder or a tar of pictures"),
        ("image={}/bad.tar.xz", None, "expected a folder or a tar of pictures"),
        ("image={}/bad.tar.bz2", None, "bad.tar.bz2"),
        ("image={}/bomb.tar", 1, "bomb.tar"),
        ("image={}/dds.png", 1, "dds.png: not a readable picture"),
        ("image={}/eps.png", 1, "eps.png: not a readable picture"),
        ("speech={}/long.flac", None, "claims 34,359,743,368 samples, expected at most 1,073,741,824"),
        ("image={}/" + "x" * 300, None, "does not exist"),
        ("image=~nobody-of-this-name/a", None, "does not exist"),
        ("text=a\0b", None, "does not exist"),
        ("speech={}/empty", None, "found no utterance"),
        ("speech={}/broken", None, "a.flac: not a readable sound file"),
        ("text", 10_000, "expected 10000"),
        ("text", 0, "expected at least one"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, spec: str, n_chunks: int | None, message: str) -> None:
    write_bad_files(tmp_path)
    with pytest.raises(DatasetError) as error:
        load(spec.format(tmp_path), n_chunks)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large")])
def test_chunks_that_memory_does_not_hold(utterances: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(soundfile, "read", fail)
    with pytest.raises(DatasetError, match=r"not a readable sound file|more memory than there is"):
        load(f"speech={utterances}", 1)
    with pytest.raises(DatasetError, match="found 0 chunks"):
        load(f"speech={utterances}", 1, chunk_bytes=1 << 62)


def test_chunks_of_other_sizes(pictures: Path, utterances: Path) -> None:
    with pytest.raises(DatasetError, match="32 x 64 bytes, 1,024 were asked for"):
        load(f"image={pictures}", 1, chunk_bytes=1024)
    with pytest.raises(DatasetError, match="whole samples"):
        load(f"speech={utterances}", 1, chunk_bytes=1023)
    assert len(load(f"speech={utterances}", chunk_bytes=1024).chunks[0]) == 1024


@needs_data
def test_real_files() -> None:
    text = load(f"enwik8={DATA / 'enwik8.head'}", 64)
    assert load(f"enwik8={DATA / 'enwik8.head'}", 1, draw="first").chunks[0].startswith(b"<mediawiki")
    assert max(text.offsets) > 3_000_000
    assert min(text.offsets) < 100_000
    image, speech = load(f"image={DATA / 'imagenet-val'}", 64), load(f"speech={DATA / 'librispeech'}", 64)
    # 45 % of the bytes of images and 50 % of those of speech have the top bit set, on all of ImageNet and LibriSpeech.
    for dataset, share in ((image, 0.45), (speech, 0.50)):
        assert np.mean(np.frombuffer(b"".join(dataset.chunks), np.uint8) > 127) == pytest.approx(share, abs=0.1)
    assert len({source.split()[0] for source in image.sources}) == 37
    assert len({source.split()[0] for source in speech.sources}) == 13


@pytest.mark.parametrize(
    ("magic", "kind"), [(b"PAR1", "Parquet"), (b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04", "zip"), (b"%PDF-1.7", "PDF")]
)
def test_a_container_is_not_scored_as_the_text_in_it(tmp_path: Path, magic: bytes, kind: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(magic + bytes(5000))
    with pytest.raises(DatasetError, match=f"is a {kind} file: its container would be scored"):
        load_dataset(f"text={path}")

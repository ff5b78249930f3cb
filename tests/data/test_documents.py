"""The user's own data: folders, globs, columns, data sets of Hugging Face's library, arrays, whole documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from llmcomp.cli.main import main
from llmcomp.data.datasets import Dataset, load_dataset
from llmcomp.errors import DatasetError

MESSAGES = [f"message {i}: the pump at station {i * 7 % 11} reports {i * i} units" for i in range(200)]


def load(spec: Any, n_chunks: int | None = None, **options: Any) -> Dataset:
    return load_dataset(spec, n_chunks, progress=False, **options)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """The same rows as JSON Lines, packed and not, and as Parquet."""
    rows = [{"time": i, "message": text, "who": None if i % 3 else "me"} for i, text in enumerate(MESSAGES)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "logs.jsonl").write_bytes(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "logs.parquet", row_group_size=64)
    return tmp_path


@pytest.mark.parametrize("file", ["logs.jsonl", "packed.jsonl.gz", "logs.parquet"])
def test_a_column_is_its_text_and_nothing_else(logs: Path, file: str) -> None:
    joined = "\n".join(MESSAGES).encode()
    found = load(f"text={logs / file}:message", chunk_bytes=512, draw="first")
    assert b"".join(found.chunks) == joined[: len(joined) // 512 * 512]
    assert found.documents == (f"{file} column message",) * len(found)
    rows = load(f"text={logs / file}:message", whole=True, draw="first")
    assert rows.chunks == tuple(text.encode() for text in MESSAGES)
    assert rows.documents[3] == f"{file} row 3"
    # Rows without a value are left out.
    assert load(f"text={logs / file}:who", whole=True).chunks == (b"me",) * 67


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text={}/logs.jsonl", "JSON Lines file: its syntax would be scored.*it has time, message, who"),
        ("text={}/logs.parquet", "Parquet file: its container would be scored.*it has time, message, who"),
        ("dna={}/logs.parquet", "Parquet file"),
        ("text={}/logs.jsonl:nothing", "no column 'nothing', found time, message, who"),
        ("text={}/logs.parquet:nothing", "no column 'nothing', found time, message, who"),
        ("text={}/logs.jsonl:time", "row 0: column time is a int, expected text or bytes"),
        ("text={}/torn.jsonl:a", "not readable as JSON Lines"),
        ("text={}/list.jsonl:a", "line 1: found a list, expected an object"),
        ("text={}/half.jsonl:a", "half of a surrogate pair"),
        ("text={}/plain.txt:message", "found no file with one of .jsonl"),
        ("text={}/torn.parquet:a", "not readable as Parquet"),
        ("text={}/*.nothing", "does not exist"),
        ("scan={}/picture.png", "is a PNG file: its container would be scored, not its data"),
    ],
)
def test_what_is_no_column_is_said(logs: Path, spec: str, message: str) -> None:
    (logs / "torn.jsonl").write_text('{"a": "b"}\n{"a": ')
    (logs / "list.jsonl").write_text("[1]\n")
    (logs / "half.jsonl").write_text('{"a": "\\ud800"}\n')
    (logs / "plain.txt").write_text("message")
    (logs / "torn.parquet").write_bytes((logs / "logs.parquet").read_bytes()[:-9])
    Image.new("L", (8, 8)).save(logs / "picture.png")
    with pytest.raises(DatasetError, match=message) as error:
        load(spec.format(logs))
    assert "\n" not in str(error.value)


def test_bytes_of_json_under_a_name_of_one_s_own(logs: Path) -> None:
    found = load(f"json={logs / 'logs.jsonl'}", 1, draw="first", chunk_bytes=64)
    assert (found.modality, found.chunks[0]) == ("json", (logs / "logs.jsonl").read_bytes()[:64])


def write_tree(folder: Path) -> dict[str, bytes]:
    rng = np.random.default_rng(2)
    files = {name: rng.bytes(700 + 200 * i) for i, name in enumerate(("a.txt", "b/c.txt", "b/d.md", "e.txt"))}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "index.txt").write_bytes(bytes(5000))
    (folder / "f.txt").write_bytes(b"")
    return files


def test_a_folder_and_a_glob_of_files(tmp_path: Path) -> None:
    """Chunks never reach over the end of a file, and every one is where it says."""
    files = write_tree(tmp_path / "tree")
    found = load(f"code={tmp_path / 'tree'}", chunk_bytes=300)
    assert len(found) == sum(len(content) // 300 for content in files.values())
    for chunk, name, offset in zip(found.chunks, found.documents, found.offsets, strict=True):
        assert chunk == files[name][offset : offset + 300]
    globbed = load(f"code={tmp_path / 'tree'}/**/*.txt", chunk_bytes=300)
    assert set(globbed.documents) == {"a.txt", "b/c.txt", "e.txt"}
    whole = load(f"code={tmp_path / 'tree'}", whole=True, draw="first")
    assert dict(zip(whole.documents, whole.chunks, strict=True)) == files
    assert (whole.chunk_bytes, whole.n_available) == (None, 4)


def test_a_name_with_a_colon_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a:b").write_bytes(b"x" * 2048)
    assert load(f"text={tmp_path / 'a:b'}").chunks == (b"x" * 2048,)


def test_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    pictures = rng.integers(0, 256, (9, 12, 10, 3), np.uint8)
    found = load(pictures, 4, name="cifar", draw="first")
    assert (found.name, found.modality, found.chunk_bytes) == ("cifar", "image", 360)
    assert found.chunks == tuple(pictures[i].tobytes() for i in range(4))
    # A view that lies otherwise in memory is read in the order of its own items.
    turned = load(pictures.transpose(0, 3, 1, 2)[::2], 1, draw="first")
    assert turned.chunks[0] == pictures[0].transpose(2, 0, 1).tobytes()
    samples = rng.integers(-(1 << 15), 1 << 15, 5000).astype(">i2")
    sound = load(samples, chunk_bytes=1024, name="sea", draw="first")
    assert (sound.modality, b"".join(sound.chunks)) == ("audio", samples.astype("<i2").tobytes()[:9216])
    genome = load(b"acgt" * 1000, name="genome", modality="dna", draw="first")
    assert (genome.modality, genome.chunks) == ("dna", (b"acgt" * 512,))
    assert load(["one", "two", "three"], whole=True, draw="first").chunks == (b"one", b"two", b"three")
    for wrong, message in (
        (rng.random((3, 4)), "an array of float64 has no bytes that mean its values"),
        (np.zeros((0, 5), np.uint8), "holds no chunk"),
        (np.zeros(5000, np.int32), "an array of int32"),
    ):
        with pytest.raises(DatasetError, match=message):
            load(wrong)
    with pytest.raises(DatasetError, match="cut values of 2 bytes"):
        load(samples, chunk_bytes=1023)


def test_tensors() -> None:
    torch = pytest.importorskip("torch")
    pictures = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 4, 3)
    found = load(pictures, name="tensors", draw="first")
    assert (found.modality, found.chunks) == ("image", tuple(part.numpy().tobytes() for part in pictures))
    with pytest.raises(DatasetError, match="an array of bfloat16"):
        load(torch.zeros(4, dtype=torch.bfloat16))


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as the library reads it from a folder, with two splits; its cache is the test's own."""
    datasets = pytest.importorskip("datasets", reason="an extra: pip install llmcomp-exact[datasets]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, rows in (("train", MESSAGES[:150]), ("test", MESSAGES[150:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in rows))
    return folder


def test_hugging_face_by_name(hub_folder: Path) -> None:
    found = load(f"text=hf:{hub_folder},split=test:text", whole=True, draw="first")
    assert found.chunks == tuple(text.encode() for text in MESSAGES[150:])
    assert (found.name, found.modality) == ("text", "text")
    for spec, message in (
        (f"hf:{hub_folder}:text", "splits train, test; choose one"),
        (f"hf:{hub_folder},split=test:body", "no column 'body'. It has text, n"),
        (f"hf:{hub_folder},split=dev:text", "datasets cannot load it"),
        (f"hf:{hub_folder},part=test:text", "expected hf:NAME"),
        ("hf:nothing", "expected hf:NAME"),
    ):
        with pytest.raises(DatasetError, match=message) as error:
            load(f"text={spec}")
        assert "\n" not in str(error.value)


def test_hugging_face_objects(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="an extra: pip install llmcomp-exact[datasets]")
    table = datasets.Dataset.from_dict({"text": MESSAGES, "n": list(range(len(MESSAGES)))})
    found = load(table, 10, column="text", name="mine", whole=True, draw="first")
    assert (found.name, found.chunks) == ("mine", tuple(text.encode() for text in MESSAGES[:10]))
    with pytest.raises(DatasetError, match=r"which column\? It has text, n"):
        load(table)
    assert load(datasets.Dataset.from_dict({"x": MESSAGES}), 1, draw="first", chunk_bytes=9).chunks[0] == b"message 0"
    noise = np.random.default_rng(3).integers(0, 256, (40, 70), np.uint8)
    pictures = datasets.Dataset.from_dict({"image": [Image.fromarray(noise)]}).cast_column("image", datasets.Image())
    found = load(pictures, 2, name="photos")
    assert found.modality == "image"
    for chunk, source in zip(found.chunks, found.sources, strict=True):
        row, column = (int(word) for word in source.split()[-3::2])
        assert chunk == noise[row : row + 32, column : column + 64].tobytes()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"pip install llmcomp-exact\[datasets\]"):
        load("text=hf:owner/name:text")


def test_inspect_shows_what_would_be_scored(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "data",
        "inspect",
        f"text={logs / 'logs.jsonl'}:message",
        "--chunks=4",
        "--chunk-bytes=256",
        "--seed=2",
    ]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    joined = "\n".join(MESSAGES).encode()
    for words in (f"4 of {len(joined) // 256}", "drawn over all by seed 2", "256 bytes each, 1,024 bytes in all"):
        assert words in told
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for source, n_bytes, preview in found["first"]:
        first = int(source.split()[-1].partition("-")[0])
        assert n_bytes == 256
        text = joined[first : first + 48].decode()
        assert preview == text.replace("\n", "\\n")
    assert (found["n_chunks"], found["n_utf8"], found["seed"], found["draw"]) == (4, 4, 2, "spread")

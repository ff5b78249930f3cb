"""Archives as file objects, what they say of themselves, and the same bytes from every process."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import TRAINING_TEXT, TinyModel

import llmcomp
from llmcomp import compress, decompress, pico
from llmcomp.codec import archive, segments
from llmcomp.codec.container import ArchiveReader, ArchiveWriter
from llmcomp.errors import CorruptArchive, Error, ModelMismatch

TINY = TinyModel()
TEXT = TRAINING_TEXT * 2
SMALL = {"segment_bytes": 100}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "text.llmc"
    path.write_bytes(compress(TEXT, TINY, **SMALL))
    return path


def test_reading_in_order_and_anywhere(path):
    with llmcomp.open(path, "rb", model=TINY) as file:
        assert file.read() == TEXT
        assert file.read() == b""
        rng = random.Random(0)
        for _ in range(40):
            at, n_bytes = rng.randint(0, len(TEXT) + 10), rng.randint(0, 250)
            assert file.seek(at) == at == file.tell()
            assert file.read(n_bytes) == TEXT[at : at + n_bytes]
        file.seek(-10, os.SEEK_END)
        assert file.read() == TEXT[-10:]
        with pytest.raises(ValueError):
            file.seek(-1)
    assert [*llmcomp.open(path, model=TINY)] == TEXT.splitlines(keepends=True)


def test_one_byte_costs_one_segment(path, monkeypatch):
    decoded = []
    real = segments.SegmentCodec.decode_segments
    monkeypatch.setattr(
        segments.SegmentCodec,
        "decode_segments",
        lambda self, segments, *rest: decoded.append(len(segments)) or real(self, segments, *rest),
    )
    with llmcomp.open(path, model=TINY, lanes=4) as file:
        file.seek(350)
        assert file.read(1) == TEXT[350:351]
        assert decoded == [1]
        file.seek(0)
        file.read()
    assert decoded[1:4] == [1, 2, 4] and set(decoded[4:-1]) == {4}


def test_text_modes(tmp_path):
    path = tmp_path / "lines.llmc"
    with llmcomp.open(path, "wt", model=TINY, encoding="utf-8", newline="\n", **SMALL) as file:
        file.write("Grüße\nder Welt\n" * 30)
    with llmcomp.open(path, "rt", model=TINY, encoding="utf-8") as file:
        assert file.readlines() == ["Grüße\n", "der Welt\n"] * 30


def test_writing_piece_by_piece_gives_the_same_archive(tmp_path):
    path = tmp_path / "text.llmc"
    with llmcomp.open(path, "wb", model=TINY, lanes=2, salt=bytes(16), **SMALL) as file:
        for at in range(0, len(TEXT), 37):
            assert file.write(TEXT[at : at + 37]) == len(TEXT[at : at + 37])
            assert not path.exists()
    assert path.read_bytes() == compress(TEXT, TINY, salt=bytes(16), **SMALL)
    target = io.BytesIO()
    with llmcomp.open(target, "wb", model=TINY, salt=bytes(16), **SMALL) as file:
        file.write(TEXT)
    assert target.getvalue() == path.read_bytes()


@pytest.mark.parametrize("mode", ["wb", "xb", "wt"])
def test_an_exception_leaves_nothing(tmp_path, mode):
    path = tmp_path / "text.llmc"
    with pytest.raises(ZeroDivisionError), llmcomp.open(path, mode, model=TINY, **SMALL) as file:
        file.write("text" if mode == "wt" else TEXT)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_failing_model_leaves_nothing(tmp_path):
    class Failing(TinyModel):
        def logits(self, inputs):
            raise RuntimeError("no card")

    with (
        pytest.raises(RuntimeError, match="no card"),
        llmcomp.open(tmp_path / "text.llmc", "wb", model=Failing(), lanes=1) as file,
    ):
        file.write(TEXT * 20)
    assert list(tmp_path.iterdir()) == []


def test_exclusive_creation(path):
    before = path.read_bytes()
    with pytest.raises(Error, match="exists"):
        llmcomp.open(path, "xb", model=TINY)
    new = path.with_name("new.llmc")
    with llmcomp.open(new, "xb", model=TINY) as file:
        file.write(b"x")
        new.write_bytes(b"somebody else's")
        with pytest.raises(Error, match="exists"):
            file.close()
    assert new.read_bytes() == b"somebody else's" and path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == [new, path]


@pytest.mark.parametrize("mode", ["ab", "r+b", "q", "rbt", "rwb", "brt"])
def test_modes_that_do_not_exist(path, mode):
    with pytest.raises(Error, match="mode"):
        llmcomp.open(path, mode, model=TINY)


def test_files_that_cannot_be_opened(tmp_path, path):
    with pytest.raises(Error, match="No such file"):
        llmcomp.open(tmp_path / "absent.llmc", model=TINY)
    with pytest.raises(Error, match="No such file"):
        llmcomp.open(tmp_path / "absent" / "text.llmc", "wb", model=TINY)
    with pytest.raises(Error, match="with a model"):
        llmcomp.open(tmp_path / "new.llmc", "wb")
    with pytest.raises(Error, match="option"):
        llmcomp.open(tmp_path / "new.llmc", "wb", model=TINY, level=9)
    with pytest.raises(ModelMismatch):
        llmcomp.open(path, model=TinyModel(name="other"))
    (tmp_path / "short.llmc").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArchive):
        llmcomp.open(tmp_path / "short.llmc", model=TINY)
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe, pytest.raises(Error, match="seek"):
        llmcomp.open(pipe, model=TINY)
    assert {child.name for child in tmp_path.iterdir()} == {"text.llmc", "short.llmc"}


def test_reading_all_checks_the_hash_of_the_content(path):
    """Two segments of equal lengths change places between archives with equal headers: only the hash can tell."""
    reader = ArchiveReader(io.BytesIO(path.read_bytes()))
    segments = list(reader.segments())
    other = list(ArchiveReader(io.BytesIO(compress(TEXT[50:] + TEXT[:50], TINY, **SMALL))).segments())
    target = io.BytesIO()
    writer = ArchiveWriter(target, reader.header)
    for number, segment in enumerate(segments):
        payload = other[number].payload if number == 3 else segment.payload
        writer.add(TEXT[100 * number : 100 * number + segment.n_bytes], payload)
    writer.finish()
    with llmcomp.open(target, model=TINY) as file:
        file.seek(800)
        assert file.read(10) == TEXT[800:810]
    with llmcomp.open(target, model=TINY) as file, pytest.raises(CorruptArchive, match="SHA-256"):
        file.read()


def test_info_needs_no_model(path):
    found = archive.info(path)
    assert found.archive_bytes == path.stat().st_size
    assert found.content_bytes == len(TEXT)
    assert found.content_sha256_prefix == hashlib.sha256(TEXT).hexdigest()[:32]
    assert (found.n_segments, found.n_stored, found.segment_bytes) == (-(-len(TEXT) // 100), 0, 100)
    assert (found.model, found.revision, found.engine, found.mapping) == ("tiny", "", "", "bytes")
    assert (found.context_length, found.overlap, found.vocab_size) == (24, 1, 256)
    assert found.ratio == path.stat().st_size / len(TEXT)
    assert "--model" in found.how_to_get
    stored = archive.info(io.BytesIO(compress(bytes(range(256)), TINY, stock=False)))
    assert (stored.model, stored.n_segments, stored.n_stored) == ("", 1, 1)
    assert "no model" in stored.how_to_get
    with pytest.raises(CorruptArchive):
        archive.info(io.BytesIO(path.read_bytes()[:-1]))
    with pytest.raises(Error, match="No such file"):
        archive.info(path.with_name("absent"))


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [("pico-13k", 2048, "bundled"), ("EleutherAI/pythia-70m", 1000, "hub"), ("somebody/model", None, "--model")],
)
def test_info_says_how_to_get_the_model(name, step, expected):
    blob = compress(TEXT, TinyModel(name=name, step=step), stock=False)
    assert expected in archive.info(io.BytesIO(blob)).how_to_get


# Processes that differ in whatever may differ.

PROGRAM = """
import sys
{before}
import io, llmcomp
from llmcomp.codec import compress
folder, own, others, lanes = sys.argv[1:]
options = dict(lanes=int(lanes), segment_bytes=400, salt=bytes(16))
content = open(folder + "/content", "rb").read()
with open(f"{{folder}}/{{own}}", "wb") as target:
    compress.compress_stream(io.BytesIO(content), target, "pico-13k", **options)
back = io.BytesIO()
with open(f"{{folder}}/{{others}}", "rb") as source:
    compress.decompress_stream(source, back, lanes=int(lanes))
assert back.getvalue() == content
"""


def run_process(folder: Path, own: str, others: str, settings: tuple[str, int, int], before: str = "") -> None:
    """Compress the folder's content to `own`, then decompress `others`; settings: backend, threads, lanes."""
    backend, n_threads, lanes = settings
    environment = {**os.environ, "LLMCOMP_BACKEND": backend, "LLMCOMP_THREADS": str(n_threads)}
    arguments = [str(folder), own, others, str(lanes)]
    program = PROGRAM.format(before=before)
    subprocess.run([sys.executable, "-c", program, *arguments], env=environment, check=True, timeout=300)


def test_processes_that_differ_agree(tmp_path):
    """Compressed with one backend, thread count and number of lanes, decoded with others: one archive, one content."""
    content = (pico.sample_path("text").read_bytes() + bytes(range(256)))[-1000:]
    (tmp_path / "content").write_bytes(content)
    run_process(tmp_path, "one", "one", ("serial", 1, 3))
    run_process(tmp_path, "two", "one", (llmcomp.backends()[-1], 2, 1))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    for backend in llmcomp.backends():
        with llmcomp.use_backend(backend), llmcomp.use_threads(2):
            assert decompress((tmp_path / "two").read_bytes()) == content


@pytest.mark.slow
def test_torch_in_the_process_does_not_matter(tmp_path):
    """torch sets flush-to-zero and its own thread count; the archive is the same."""
    pytest.importorskip("torch")
    content = pico.sample_path("text").read_bytes()[:1000]
    (tmp_path / "content").write_bytes(content)
    with_torch = "import torch; torch.set_flush_denormal(True); torch.set_num_threads(2)"
    run_process(tmp_path, "with", "with", ("serial", 1, 3), before=with_torch)
    run_process(tmp_path, "without", "with", (llmcomp.backends()[-1], 2, 1))
    run_process(tmp_path, "again", "without", ("serial", 2, 2), before=with_torch)
    assert len({(tmp_path / name).read_bytes() for name in ("with", "without", "again")}) == 1


def test_the_default_model_of_an_archive_is_found():
    content = pico.sample_path("text").read_bytes()[:3000]
    blob = compress(content, "pico-13k", stock=False)
    assert len(blob) < 0.6 * len(content)
    assert decompress(blob) == content
    with pytest.raises(ModelMismatch, match=r"pico-13k.*pico-28k"):
        decompress(blob, "pico-28k")
    with pytest.raises(ModelMismatch, match=r"step2048.*step128"):
        decompress(blob, llmcomp.load_model("pico-13k", step=128))

"""Segments that deflate or LZMA code: what is read, what is refused, and that no archive is a fool's."""

from __future__ import annotations

import contextlib
import io
import lzma
import random
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import archive_oracle
import numpy as np
import pytest
from tiny_models import TRAINING_TEXT, ConstantModel, TinyModel, starter

import llmcomp
from llmcomp import compress, decompress
from llmcomp.codec import archive, stock_codecs
from llmcomp.codec.compress import salvage_stream
from llmcomp.codec.container import ArchiveReader, ArchiveWriter, Header, Segment
from llmcomp.errors import CorruptArchive, Error

TINY = TinyModel()
SALT = bytes(range(16))
NOISE = random.Random(3).randbytes(40_000)
CONTENTS = {
    "zeros": bytes(70_000),
    "text": TRAINING_TEXT,
    "noise twice": NOISE[:3000] * 2,
    "noise": NOISE,
    "a byte": b"\xff",
    "program": Path(sys.executable).resolve().read_bytes()[:150_000],
}


def deflated(content: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(content) + deflate.flush()


def lzma_coded(content: bytes, **options: int) -> bytes:
    """By the encoder of files of the LZMA SDK, without their header."""
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 6, **options}]
    return lzma.compress(content, format=lzma.FORMAT_ALONE, filters=filters)[13:]


def made(kind: int, content: bytes) -> bytes:
    return (deflated if kind == 1 else lzma_coded)(content) + bytes([kind, 0])


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_what_is_written_is_read_by_both_decoders(content):
    payload = stock_codecs.encode(content)
    assert stock_codecs.decode(payload, len(content)) == content
    assert archive_oracle.stock_content(payload, len(content)) == content
    assert len(payload) <= min(len(deflated(content)), len(lzma_coded(content))) + 2 + len(content) // 200


@pytest.mark.parametrize("kind", [1, 2])
def test_streams_of_other_encoders_are_read(kind):
    for content in CONTENTS.values():
        assert stock_codecs.decode(made(kind, content), len(content)) == content


def wrong_payloads(kind: int) -> Iterator[tuple[str, bytes, int]]:
    content = TRAINING_TEXT[:300]
    stream = made(kind, content)[:-2]
    end = bytes([kind, 0])
    for n_bytes in (0, 1, 299, 301, 1 << 20):
        yield f"not {n_bytes} bytes", stream + end, n_bytes
    yield "nothing", end, 300
    yield "nothing for nothing", end, 0
    yield "cut", stream[:-1] + end, 300
    yield "a byte more", stream + b"\0" + end, 300
    yield "twice", stream + stream + end, 300
    for other in (0, 3, 3 - kind, 255):
        yield f"as kind {other}", stream + bytes([other, 0]), 300
    yield "no mark", stream + bytes([kind]), 300
    yield "bent", bytes([stream[0] ^ 6]) + stream[1:] + end, 300
    if kind == 2:
        for name, options in (("lc", {"lc": 4}), ("lp", {"lp": 1}), ("pb", {"pb": 0})):
            yield f"another {name}", lzma_coded(content, **options) + end, 300
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        yield "LZMA2", lzma.compress(content, format=lzma.FORMAT_RAW, filters=filters) + end, 300


@pytest.mark.parametrize(
    ("payload", "n_bytes"),
    [pytest.param(p, n, id=f"{kind} {name}") for kind in (1, 2) for name, p, n in wrong_payloads(kind)],
)
def test_other_payloads_are_refused(payload, n_bytes):
    with pytest.raises(CorruptArchive):
        stock_codecs.decode(payload, n_bytes)
    with pytest.raises((archive_oracle.Damaged, zlib.error, lzma.LZMAError)):
        archive_oracle.require(payload.endswith(b"\0"), "mark")
        archive_oracle.stock_content(payload, n_bytes)


@pytest.mark.parametrize("kind", [1, 2])
def test_damage_gives_an_error_or_as_many_bytes(kind):
    payload, rng = made(kind, TRAINING_TEXT), random.Random(kind)
    for _ in range(1000):
        bad = bytearray(payload)
        bad[rng.randrange(len(bad) - 2)] ^= 1 << rng.randrange(8)
        with contextlib.suppress(CorruptArchive):
            assert len(stock_codecs.decode(bytes(bad), len(TRAINING_TEXT))) == len(TRAINING_TEXT)


@pytest.mark.parametrize("kind", [1, 2])
def test_a_bomb_is_not_unpacked(kind):
    payload = made(kind, bytes(1 << 26))
    tracemalloc.start()
    with pytest.raises(CorruptArchive):
        stock_codecs.decode(payload, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 21  # LZMA's dictionary is half of it
    tracemalloc.stop()


# In archives.


def kinds_of(blob: bytes) -> list[object]:
    """ "stored", the kind of a stock codec, or "model", of every segment."""
    return [
        "stored" if is_stored else payload[-2] if len(payload) > 1 and payload[-1] == 0 else "model"
        for _, is_stored, payload in archive_oracle.read_segments(blob)[1]
    ]


MANY = (TRAINING_TEXT * 9)[:3000] + bytes(1000) + NOISE[:1000] + NOISE[1000:1500] * 2 + bytes(3) + TRAINING_TEXT[:77]


def test_every_kind_in_one_archive_is_read_in_every_way(tmp_path):
    model = TinyModel(context_length=64)
    blob = compress(MANY, model, segment_bytes=1000)
    assert {"stored", "model"} < set(kinds_of(blob))
    assert decompress(blob, model) == MANY
    for lanes in (1, 2, 7):
        with llmcomp.open(io.BytesIO(blob), model=model, lanes=lanes) as file:
            for at in (4990, 0, 3500, len(MANY) - 5):
                file.seek(at)
                assert file.read(20) == MANY[at : at + 20]
    damaged = bytearray(blob)
    damaged[len(blob) // 2] ^= 1
    target = io.BytesIO()
    summary = salvage_stream(io.BytesIO(bytes(damaged)), target, model)
    ((start, stop),) = summary.lost
    assert stop is not None and target.getvalue() == MANY[:start] + MANY[stop:]


def test_an_archive_that_needs_no_model_names_none():
    for content in (bytes(5000), NOISE[:2000] * 2):
        blob = compress(content, TINY)
        assert archive_oracle.read_header(archive_oracle.Reader(blob)).get("mapping") is None
        assert decompress(blob) == archive_oracle.decode(blob, [], {}, lambda: lambda token: None) == content
        assert len(blob) < len(content)
        found = archive.info(io.BytesIO(blob))
        assert (found.model, found.n_stored) == ("", 0) and "no model" in found.how_to_get
        with llmcomp.open(io.BytesIO(blob)) as file:
            assert file.read() == content
        target = io.BytesIO()
        assert salvage_stream(io.BytesIO(blob), target).lost == [] and target.getvalue() == content


@pytest.mark.parametrize("salt", [b"", SALT])
def test_a_models_payload_without_a_model_is_refused(salt):
    file = io.BytesIO()
    writer = ArchiveWriter(file, Header(100, None, salt))
    writer.add(TRAINING_TEXT[:100], b"a model's")
    writer.finish()
    for read in (decompress, lambda blob: llmcomp.open(io.BytesIO(blob)).read()):
        with pytest.raises(CorruptArchive, match="segment 0"):
            read(file.getvalue())


def test_format_1_has_none():
    blob = compress(bytes(2000), TINY, salt=b"", segment_bytes=500)
    assert not {1, 2} & set(kinds_of(blob)) and decompress(blob, TINY) == bytes(2000)
    with pytest.raises(Error, match="format 1"):
        compress(b"abc", TINY, salt=b"", stock=True)


def test_without_stock_codecs_the_model_codes_or_nothing_does():
    blob = compress(MANY, TINY, segment_bytes=1000, stock=False)
    assert set(kinds_of(blob)) == {"stored", "model"} and decompress(blob, TINY) == MANY


class Sure(ConstantModel):
    """Sure of byte 0: of a segment of zeros under mapping shift nothing is left but its side bytes, zeros as well."""

    def __init__(self) -> None:
        super().__init__([1e9] + [1e-9] * 255)


def test_a_models_payload_of_side_bytes_alone_is_no_stock_codecs(monkeypatch):
    model, content = Sure(), bytes(200)
    options = {"mapping": "shift", "segment_bytes": 100}
    for more in ({"stock": False}, {"salt": b""}):
        blob = compress(content, model, **options, **more)
        assert [payload for _, _, payload in archive_oracle.read_segments(blob)[1]] == [bytes(13)] * 2
        assert decompress(blob, model) == content
    # A payload of a stock codec that happens to be as long is not written.
    monkeypatch.setattr(stock_codecs, "encode", lambda content: b"elevenbytes\1\0")
    assert compress(content, model, **options, salt=SALT) == compress(content, model, **options, salt=SALT, stock=False)


def test_what_hardly_anything_is_left_of_never_sees_the_model():
    class Counting(TinyModel):
        n_rows = 0

        def logits(self, tokens):
            self.n_rows += np.size(tokens)
            return super().logits(tokens)

    model = Counting()
    blob = compress(bytes(3 << 14), model, segment_bytes=1 << 14)
    assert model.n_rows == 0 and len(blob) < 500 and decompress(blob, model) == bytes(3 << 14)


@pytest.mark.parametrize("segment_bytes", [1000, 1 << 16])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_no_archive_is_larger_than_xz_of_its_segments_but_for_the_frames(content, segment_bytes):
    content = content[: 20 * segment_bytes]
    model = ConstantModel([1] * 256)
    blob = compress(content, model, segment_bytes=segment_bytes)
    parts = [content[at : at + segment_bytes] for at in range(0, len(content), segment_bytes)]
    coded = sum(min(len(part), len(lzma.compress(part, preset=9))) for part in parts)
    assert len(blob) <= coded + 7 * len(parts) + 120
    assert decompress(blob, model) == content


def test_a_segment_that_mixing_makes_larger_is_coded_without():
    """What the model is sure of, and what comes again where the model is not."""
    known, again = TRAINING_TEXT[:200], b"zqx jkvb wqzj xk" * 12
    model, options = TinyModel(context_length=300), {"segment_bytes": 200, "stock": False}
    content = known + again + b"and then" + known[:190]
    blob = compress(content, model, **options)
    payloads = [payload for _, _, payload in archive_oracle.read_segments(blob)[1]]
    assert kinds_of(blob) == [3, "model", 3]
    assert decompress(blob, model) == content
    table: list[bytes | None] = [bytes([byte]) for byte in range(256)]
    assert archive_oracle.decode(blob, table, {}, starter(model)) == content
    alone, mixed = (
        [payload for _, _, payload in archive_oracle.read_segments(compress(content, model, **options, mix=mix))[1]]
        for mix in (False, True)
    )
    assert payloads == [alone[0] + b"\3\0", mixed[1], alone[2] + b"\3\0"]
    assert all(len(found) <= len(other) + 2 for found, other in zip(payloads, alone, strict=True))
    assert all(len(found) <= len(other) for found, other in zip(payloads, mixed, strict=True))
    with llmcomp.open(io.BytesIO(blob), model=model) as file:
        file.seek(150)
        assert file.read(100) == content[150:250]


def test_without_mixing_there_is_no_kind_3():
    blob = compress(TRAINING_TEXT, TINY, segment_bytes=300, mix=False, stock=False)
    with pytest.raises(CorruptArchive, match=r"segment 0 .* kind 3"):
        decompress(archive_oracle.with_payloads(blob, lambda payload: payload + b"\3\0"), TINY)
    with pytest.raises(archive_oracle.Damaged):
        archive_oracle.decode(
            archive_oracle.with_payloads(blob, lambda payload: payload + b"\3\0"),
            [None] * 256,
            {},
            starter(TINY),
        )


def test_segments_that_fail_are_named():
    model = TinyModel(context_length=64)
    segment = Segment(7, 300, False, made(1, TRAINING_TEXT[:299]))
    with pytest.raises(CorruptArchive, match=r"segment 7 .* kind 1 does not end with byte 300"):
        stock_codecs.content_of(segment)
    file = io.BytesIO()
    header = ArchiveReader(io.BytesIO(compress(TRAINING_TEXT, model, segment_bytes=300, salt=SALT))).header
    writer = ArchiveWriter(file, header)
    writer.add(TRAINING_TEXT[:300], made(1, TRAINING_TEXT[:299]))
    writer.finish()
    with pytest.raises(CorruptArchive, match="segment 0 is malformed"):
        decompress(file.getvalue(), model)


def test_the_command_line(tmp_path):
    source = tmp_path / "zeros"
    source.write_bytes(bytes(100_000))
    command = [sys.executable, "-m", "llmcomp", "compress", "-k", "-m", "pico-13k", str(source)]
    for options, kinds in ((["--no-stock"], {"model"}), ([], {1, 2})):
        subprocess.run([*command, "-f", *options], check=True, capture_output=True)
        blob = (tmp_path / "zeros.llmc").read_bytes()
        assert set(kinds_of(blob)) <= kinds and decompress(blob) == source.read_bytes()

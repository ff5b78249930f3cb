"""Window plan, segments, compress, decompress, salvage: with models small enough to say by hand what must come out."""

from __future__ import annotations

import io
import random
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import DATA, needs_data
from tiny_models import TRAINING_TEXT, HashModel, TinyModel, rows_by_hand

from llmcomp import coding, compress, decompress
from llmcomp.codec import container, windows
from llmcomp.codec.compress import DECODED_BYTES_MIN, compress_stream, decompress_stream, lanes_of, salvage_stream
from llmcomp.codec.container import ArchiveReader, ArchiveWriter
from llmcomp.codec.segments import SegmentCodec
from llmcomp.codec.windows import WindowedModel, batch_size, plan_windows
from llmcomp.data import mappings
from llmcomp.errors import CorruptArchive, Error, ModelMismatch
from llmcomp.models.adapter import AdaptedModel
from llmcomp.models.load import load_model

TINY = TinyModel()
TEXT = TRAINING_TEXT + "Grüße, 世界! <|endoftext|>".encode() + bytes(range(256))


# Windows.


def test_the_plan_of_the_docstring():
    assert plan_windows(17, 8, 2) == [(0, 0, 8), (6, 8, 14), (12, 14, 17)]
    assert plan_windows(0, 8, 2) == []
    assert plan_windows(8, 8, 0) == [(0, 0, 8)]
    assert plan_windows(3, 1, 0) == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    for overlap in (-1, 8, 9):
        with pytest.raises(Error):
            plan_windows(3, 8, overlap)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 39))
def test_windows_tile_the_stream(n_tokens, context_length, overlap):
    overlap %= context_length
    windows = plan_windows(n_tokens, context_length, overlap)
    assert [at for window in windows for at in range(window.start, window.stop)] == list(range(n_tokens))
    for number, window in enumerate(windows):
        assert window.start - window.context_start == (overlap if number else 0)
        is_full = window.stop - window.context_start == context_length
        assert is_full or (number == len(windows) - 1 and window.stop - window.context_start < context_length)


@pytest.mark.parametrize(("context_length", "overlap"), [(24, 0), (24, 5), (24, 23), (7, 3), (1, 0)])
def test_every_token_is_coded_after_exactly_its_window(context_length, overlap):
    stream = np.frombuffer(TRAINING_TEXT[:120], np.uint8).astype(np.int32)
    windowed = WindowedModel(
        AdaptedModel(TINY), vocab_size=256, bos_token=9, context_length=context_length, overlap=overlap
    )
    streams = [stream, stream[:1], stream[:50], stream[:0]]
    expected = np.stack(coding.intervals(rows_by_hand(TINY, stream, 9, context_length, overlap), stream))
    for found, part in zip(windowed.intervals(streams), streams, strict=True):
        assert np.array_equal(found, expected[:, : len(part)])


def test_one_pass_fused_stepwise_and_small_batches_give_the_same_payloads(monkeypatch):
    class Fused(TinyModel):
        def intervals(self, inputs, targets, lengths, vocab_size):
            parts = np.zeros((3, *inputs.shape), np.uint64)
            for b, n in enumerate(lengths):
                logits = self.logits(inputs[b : b + 1, :n])[0]
                parts[:, b, :n] = coding.intervals(logits, targets[b, :n], vocab_size)
            return tuple(parts)

    contents = [TEXT[:700], TEXT[300:301], TEXT[250:500]]

    def coded_by(model):
        return [
            item._replace(token_bits=item.token_bits.tolist())
            for item in SegmentCodec(model, overlap=4).encode(contents)
        ]

    expected = coded_by(TINY)
    assert coded_by(Fused()) == coded_by(TinyModel(engine="torch")) == expected
    monkeypatch.setattr("llmcomp.models.adapter.BATCH_LOGITS_BYTES", 1)
    assert coded_by(TINY) == expected
    for model in (TINY, Fused(), TinyModel(engine="torch")):
        decoded = SegmentCodec(model, overlap=4).decode(
            [coded.payload for coded in expected], [len(c) for c in contents]
        )
        assert decoded == contents


@pytest.mark.parametrize(
    ("lengths", "rows_max", "expected"),
    [
        ([100], 10, 1),
        ([100] * 10, 1000, 10),
        # Two equal batches, not one of 10 and one of 2.
        ([100] * 12, 1000, 6),
        # 200 rows are more than an eighth of 1,000; 88 is less than an eighth shorter than 100, 87 is not.
        ([100, 100, 87, 87], 1000, 2),
        ([100, 100, 88, 88], 1000, 4),
        # A batch that is still small takes shorter ones too.
        ([100, 10, 10, 10], 1000, 2),
    ],
)
def test_batches_with_little_padding(lengths: list[int], rows_max: int, expected: int) -> None:
    assert batch_size(lengths, rows_max) == expected


# Compress and decompress.


OPTIONS = [
    {},
    {"overlap": 0},
    {"overlap": 23},
    {"segment_bytes": 16},
    {"segment_bytes": 100, "overlap": 3},
    {"segment_bytes": 1 << 17},
    {"mapping": "latin1", "segment_bytes": 200},
    {"mapping": "shift", "segment_bytes": 150},
    {"mapping": "ascii", "segment_bytes": 300},
]
CONTENTS = {
    "empty": b"",
    "one byte": b"\xff",
    "text": TRAINING_TEXT,
    "mixed": TEXT,
    "zeros": bytes(700),
    "random": random.Random(0).randbytes(1000),
    "start token": b"<|endoftext|>" * 40 + TRAINING_TEXT,
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_round_trip(content, options):
    blob = compress(content, TINY, **options, stock=False)
    assert decompress(blob, TINY) == content
    assert decompress(compress(content, TINY, **options), TINY) == content
    if options.get("segment_bytes", 1 << 16) >= 1 << 16:
        assert len(blob) <= len(content) * 1.005 + 80


def test_text_shrinks():
    assert len(compress(TRAINING_TEXT * 4, TINY)) < 0.5 * len(TRAINING_TEXT * 4)


@pytest.mark.parametrize("name", mappings.MAPPINGS)
def test_round_trip_with_a_tokenizer(name, pico_tokenizer):
    model = TinyModel(tokenizer=pico_tokenizer)
    content = TEXT * 2
    for segment_bytes in (64, 1 << 16):
        blob = compress(content, model, mapping=name, segment_bytes=segment_bytes, stock=False)
        assert decompress(blob, model) == content


@pytest.mark.parametrize("name", mappings.MAPPINGS)
def test_vocabulary_that_lacks_bytes(name, pythia_tokenizer):
    """Some segments need stand-ins for the bytes that no token stands for, others do not; they decode side by side."""
    segment_codec = SegmentCodec(HashModel(pythia_tokenizer), name)
    contents = [b"plain text", bytes(range(256)), "Grüße".encode() * 5, b"\xff" * 9 + "ÿÿ".encode(), b"x"]
    coded = segment_codec.encode(contents)
    assert segment_codec.decode([item.payload for item in coded], [len(content) for content in contents]) == contents


def test_a_decoded_token_takes_four_bytes():
    """Not an array for every step: a segment of a megabyte took hundreds."""
    n_bytes, n_streams = 60_000, 2
    tokens = np.arange(64 * n_streams, dtype=np.int32).reshape(64, n_streams)
    table = np.ones((1, 256), np.int64)
    tracemalloc.start()
    walk = windows._Walk([n_bytes] * n_streams, table, [0] * n_streams, None)
    for _ in range(-(-n_bytes // 64)):
        walk.take(tokens)
    streams = walk.streams()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Room for two tokens a byte, of which the half that is not written takes no memory.
    assert peak < n_streams * 2 * n_bytes * 4 + (200 << 10)
    assert all((stream == np.resize(tokens[:, k], n_bytes)).all() for k, stream in enumerate(streams))


@pytest.mark.parametrize(
    ("segment_bytes", "encoded", "decoded"), [(1 << 16, 32, 32), (1 << 18, 8, 32), (1 << 20, 2, 16)]
)
def test_large_segments_are_coded_in_the_memory_of_others(segment_bytes, encoded, decoded):
    codec = SegmentCodec(TINY)
    assert codec.lanes == 32
    assert lanes_of(codec, None, segment_bytes) == encoded
    assert lanes_of(codec, None, segment_bytes, DECODED_BYTES_MIN) == decoded
    assert lanes_of(codec, 300, segment_bytes) == 300


def test_lanes_and_ways_of_reading_do_not_change_a_byte():
    class Drip(io.BytesIO):
        def read(self, n_bytes=-1):
            return super().read(min(n_bytes, 7) if n_bytes > 0 else n_bytes)

    content = TEXT * 3
    expected = compress(content, TINY, segment_bytes=100, salt=bytes(16))
    for lanes in (1, 2, 7, 1000):
        target = io.BytesIO()
        summary = compress_stream(Drip(content), target, TINY, segment_bytes=100, lanes=lanes, salt=bytes(16))
        assert target.getvalue() == expected
        back = io.BytesIO()
        seen: list[int] = []
        assert decompress_stream(Drip(expected), back, TINY, lanes=lanes, on_bytes=seen.append) == summary
        assert back.getvalue() == content
        assert sum(seen) == len(content)
    with pytest.raises(Error):
        compress_stream(Drip(content), io.BytesIO(), TINY, lanes=0)


@pytest.mark.parametrize("n_bytes", [1, 100, 16384, 70_000])
def test_incompressible_data_costs_at_most_half_a_percent_and_80_bytes(n_bytes):
    content = random.Random(n_bytes).randbytes(n_bytes)
    blob = compress(content, TINY)
    assert len(blob) <= n_bytes * 1.005 + 80
    assert decompress(blob, TINY) == content


class Counting(TinyModel):
    """Knows that a byte is followed by the next number; counts what it is asked for."""

    n_rows = 0

    def logits(self, inputs):
        self.n_rows += np.size(inputs)
        return super().logits(inputs) + 9 * np.eye(256, dtype=np.float32)[(np.asarray(inputs) + 1) % 256]


def test_what_cannot_shrink_is_not_coded_as_a_whole():
    noise, counting = random.Random(5).randbytes(5 << 14), bytes(range(256)) * 64
    model = Counting()
    blob = compress(noise, model, segment_bytes=1 << 14)
    assert len(blob) <= 1.005 * len(noise) + 64
    assert model.n_rows < len(noise) / 6
    # As flat a histogram, but the model knows what comes: coded, like what is too short for a decision.
    assert len(compress(counting * 2, model, segment_bytes=1 << 14, stock=False)) < len(counting) / 2
    assert decompress(blob, model) == noise


def test_an_archive_of_stored_segments_alone_needs_no_model():
    content = random.Random(1).randbytes(1000)
    assert decompress(compress(content, TINY)) == content
    assert decompress(compress(b"", TINY)) == b""


def test_header_says_how_the_model_was_used():
    blob = compress(
        TRAINING_TEXT, TinyModel(name="m", step=3, fingerprint="0f" * 32), overlap=7, mapping="latin1", stock=False
    )
    model = ArchiveReader(io.BytesIO(blob)).header.model
    assert model is not None
    assert (model.name, model.revision, model.weights_hash) == ("m", "step3", b"\x0f" * 16)
    assert (model.context_length, model.overlap, model.vocab_size, model.bos_token) == (24, 7, 256, 0)
    assert mappings.MAPPINGS[model.mapping] == "latin1"
    assert blob[4] == 2


def small_models():
    return st.builds(TinyModel, context_length=st.sampled_from([1, 5, 24]), seed=st.integers(0, 3))


@settings(max_examples=40, deadline=None)
@given(
    content=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(str.encode), st.just(TRAINING_TEXT[:250])),
    model=small_models(),
    mapping=st.sampled_from(mappings.MAPPINGS),
    segment_bytes=st.integers(16, 400),
    overlap=st.integers(0, 23),
)
def test_any_bytes_any_options_any_model(content, model, mapping, segment_bytes, overlap):
    overlap %= model.context_length
    blob = compress(content, model, mapping=mapping, segment_bytes=segment_bytes, overlap=overlap, stock=False)
    assert decompress(blob, model) == content


# What must be refused.


def test_another_model_is_refused_before_a_byte_is_written(pico_tokenizer):
    facts = {"name": "small", "step": 100, "fingerprint": "ab" * 32}
    blob = compress(TRAINING_TEXT, TinyModel(**facts), stock=False)
    assert decompress(blob, TinyModel(**facts)) == TRAINING_TEXT
    assert decompress(blob, TinyModel(**{**facts, "name": "renamed"})) == TRAINING_TEXT
    others = [
        TinyModel(**{**facts, "fingerprint": "cd" * 32}),
        TinyModel(**{**facts, "name": "large", "step": 200, "fingerprint": "cd" * 32}),
        TinyModel(**facts, engine="exact"),
        TinyModel(**facts, tokenizer=pico_tokenizer),
        TinyModel(**{**facts, "context_length": 23}),
        TinyModel(),
    ]
    for other in others:
        target = io.BytesIO()
        with pytest.raises(ModelMismatch) as caught:
            decompress_stream(io.BytesIO(blob), target, other)
        assert target.getvalue() == b""
        assert "small, step100" in str(caught.value) and other.name in str(caught.value)


def test_models_without_a_fingerprint_are_told_apart_by_name():
    blob = compress(TRAINING_TEXT, TinyModel(name="one"), stock=False)
    with pytest.raises(ModelMismatch, match="weights not recorded"):
        decompress(blob, TinyModel(name="two"))


@pytest.mark.parametrize("name", ["/etc", "../../somewhere", "unknown/model", ".", "~"])
def test_a_name_in_an_archive_is_never_a_path(name, monkeypatch):
    blob = compress(TRAINING_TEXT, TinyModel(name=name), stock=False)
    for load in ("load_model", "load_registered"):
        monkeypatch.setattr(f"llmcomp.codec.segments.{load}", lambda *_, **__: pytest.fail("a model was looked for"))
    with pytest.raises(Error, match="name the model"):
        decompress(blob)


def with_payload(blob: bytes, change) -> bytes:
    """The archive with other payloads under right checksums: what only an attacker or another arithmetic would make."""
    reader = ArchiveReader(io.BytesIO(blob))
    target = io.BytesIO()
    writer = ArchiveWriter(target, reader.header)
    for segment in reader.segments():
        writer.add(bytes(segment.n_bytes), change(segment.payload))
    writer.finish()
    return target.getvalue()


@pytest.mark.parametrize("mapping", ["bytes", "latin1", "ascii"])
def test_payloads_that_do_not_decode_to_the_content(mapping, pico_tokenizer):
    model = TinyModel(tokenizer=pico_tokenizer)
    blob = compress(TRAINING_TEXT, model, mapping=mapping, segment_bytes=200, stock=False)
    rng = random.Random(0)
    for change in (
        lambda payload: payload[:-1],
        lambda payload: payload[::-1],
        lambda payload: rng.randbytes(len(payload)),
        lambda payload: b"\0",
        lambda payload: bytes(len(payload)),
    ):
        with pytest.raises(CorruptArchive):
            decompress(with_payload(blob, change), model)


def test_segments_of_two_archives_with_equal_headers():
    """Archives of format 1 have them, and others only where both are given the same salt."""
    contents = (TRAINING_TEXT, TRAINING_TEXT[::-1])
    one, two = (compress(content, TINY, segment_bytes=100, salt=bytes(16)) for content in contents)
    segments = [list(ArchiveReader(io.BytesIO(blob)).segments()) for blob in (one, two)]
    start = one.index(segments[0][1].payload) - 6
    stop = start + 6 + len(segments[0][1].payload)
    other_start = two.index(segments[1][1].payload) - 6
    other_stop = other_start + 6 + len(segments[1][1].payload)
    spliced = one[:start] + two[other_start:other_stop] + one[stop:]
    with pytest.raises(CorruptArchive, match="SHA-256"):
        decompress(spliced, TINY)


def test_models_that_cannot_be_used():
    class NotANumber(TinyModel):
        def logits(self, inputs):
            return np.full((*np.shape(inputs), 256), np.nan, np.float32)

    with pytest.raises(Error):
        compress(TRAINING_TEXT, NotANumber())
    with pytest.raises(Error, match="no model"):
        compress(b"x", SimpleNamespace(logits=len))
    with pytest.raises(Error, match="engine"):
        compress(b"x", TinyModel(engine="strange"))
    with pytest.raises(Error, match="mapping"):
        compress(b"x", TINY, mapping="utf16")
    for options in ({"segment_bytes": 8}, {"segment_bytes": 1 << 30}, {"overlap": 24}, {"overlap": -1}):
        with pytest.raises(Error):
            compress(b"x", TINY, **options)


# Salvage.


def test_salvage_decodes_the_intact_segments():
    blob = compress(TRAINING_TEXT, TINY, segment_bytes=100)
    parts = [TRAINING_TEXT[at : at + 100] for at in range(0, len(TRAINING_TEXT), 100)]
    target = io.BytesIO()
    summary = salvage_stream(io.BytesIO(blob), target, TINY)
    assert (target.getvalue(), summary.lost, summary.n_segments) == (TRAINING_TEXT, [], len(parts))
    bad = bytearray(blob)
    third = list(ArchiveReader(io.BytesIO(blob)).segments())[2]
    bad[blob.index(third.payload)] ^= 1
    target = io.BytesIO()
    summary = salvage_stream(io.BytesIO(bad), target, TINY)
    assert target.getvalue() == b"".join(parts[:2] + parts[3:])
    assert summary.lost == [(200, 300)]
    target = io.BytesIO()
    summary = salvage_stream(io.BytesIO(blob[: blob.index(third.payload)]), target, TINY)
    assert (target.getvalue(), summary.lost) == (TRAINING_TEXT[:200], [(200, None)])


# Sizes, mixing.


@pytest.mark.slow
@needs_data
def test_an_archive_is_at_most_a_thousandth_above_the_ideal():
    content = (DATA / "enwik8.head").read_bytes()[:1_000_000]
    parts = [content[at : at + container.SEGMENT_BYTES_DEFAULT] for at in range(0, len(content), 1 << 16)]
    ideal = sum(coded.ideal_bits for coded in SegmentCodec(load_model("pico-13k")).encode(parts))
    assert ideal < 8 * len(compress(content, "pico-13k", mix=False, stock=False)) < 1.001 * ideal


@pytest.mark.parametrize("mapping", ["bytes", "latin1", "shift", "ascii"])
def test_mixed_archives_give_their_bytes_back_by_every_way_of_decoding(mapping):
    """Chains of the exact engine, sessions, and steps of one stream; segments end at different steps."""
    data = "Grüße an alle, Grüße an viele. ".encode() * 40 + bytes(range(256)) + b"end"
    for model in (load_model("pico-13k"), TINY, TinyModel(engine="torch")):
        sizes = []
        for mix in (False, True):
            blob = compress(data, model, mapping=mapping, segment_bytes=700, mix=mix, stock=False)
            assert decompress(blob, model) == data
            sizes.append(len(blob))
        assert sizes[1] < sizes[0]


def test_mixing_is_the_default_of_format_2_only():
    data = b"again and again and " * 30
    blob = compress(data, TINY, stock=False)
    assert compress(data, TINY, mix=True, stock=False) == blob
    assert len(compress(data, TINY, mix=False, stock=False)) > len(blob)
    assert compress(data, TINY, salt=b"") == compress(data, TINY, salt=b"", mix=False)
    with pytest.raises(Error, match="mixing"):
        compress(data, TINY, salt=b"", mix=True)


@pytest.mark.parametrize("data", ["text", ["a"], 7, None])
def test_what_is_not_bytes_is_told_so(data: object) -> None:
    with pytest.raises(Error, match=rf"is an? {type(data).__name__}, expected bytes"):
        compress(data, TinyModel())
    with pytest.raises(Error, match="expected bytes"):
        decompress(data)


def test_windows_of_a_small_model_are_half_its_context_where_rows_are_mixed():
    def windows(model, **options) -> tuple[int, int]:
        blob = compress(b"mixed or not, " * 9, model, stock=False, **options)
        header = container.ArchiveReader(io.BytesIO(blob)).header
        return header.model.context_length, header.model.overlap

    for engine in ("exact", "exact-int8"):
        model = load_model("pico-13k", None, engine)
        assert windows(model) == windows(model, mix=True) == (256, 16)
        assert windows(model, mix=False) == (512, 128)
        assert windows(model, overlap=40) == (512, 40)
    large = TinyModel(context_length=24)
    assert windows(large, mix=True) == (24, 1)
    large.n_params_nonembedding = 1 << 21
    assert windows(large, mix=True) == (24, 1)
    large.n_params_nonembedding -= 1
    assert windows(large, mix=True) == (12, 0)

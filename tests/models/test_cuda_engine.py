"""The exact engine on a CUDA device against the C core, which test_engine.py holds against binary64: the same bits
and archives that cross both ways. Errors, and what is missing, are in test_cuda_errors.py.

On the device of this machine, or where there is none on an emulated device: the same binding and the same kernels,
compiled for the host. What only that device can tell (allocations, waiting) is asked only there."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import emulated_device
import numpy as np
import pytest
from engine_models import VARIANTS, assert_same_bits, draw, make_config, make_weights, write_folder
from model_pairs import bad_pair, make_pair, messages, small_windows, with_both_engines

import llmcomp
from llmcomp import pico
from llmcomp.cli.main import main
from llmcomp.codec.archive import open as open_archive
from llmcomp.codec.container import ArchiveReader
from llmcomp.codec.segments import SegmentCodec
from llmcomp.errors import Error
from llmcomp.models.engines import cuda as engine_cuda
from llmcomp.models.engines import cuda_streams

pytestmark = pytest.mark.usefixtures("machine")
needs_device = pytest.mark.skipif(
    not emulated_device.has_device(), reason="there is no CUDA device, and an emulated one is too slow"
)
TEXT = pico.sample_path("text").read_bytes()


# Passes.


@with_both_engines
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_cpu(variant: str, engine: str) -> None:
    cpu, device = make_pair(engine=engine, **VARIANTS[variant])
    tokens, lengths = draw(cpu, 4, 40), [40, 0, 17, 1]
    assert_same_bits(device.logits(tokens, lengths), cpu.logits(tokens, lengths))


def test_what_is_checked_is_what_the_device_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's arrays change right after the check, as another thread may have it."""
    cpu, device = make_pair()
    tokens, targets, lengths = draw(cpu, 4, 40), draw(cpu, 4, 40), np.array([40, 0, 17, 1])
    expected = cpu.intervals(tokens.copy(), targets.copy(), lengths.copy())
    check = engine_cuda._check_tokens

    def check_and_change(*arguments: Any) -> None:
        check(*arguments)
        tokens[:], targets[:], lengths[:] = -7, 1 << 40, 1 << 40

    monkeypatch.setattr(engine_cuda, "_check_tokens", check_and_change)
    for found, wanted in zip(device.intervals(tokens, targets.copy(), lengths), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_stay_so_on_the_device(dtype: str) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 200, "vocab_size": 300}
    cpu, device = make_pair(dtype, **sizes)
    _, wide = make_pair(**sizes)
    tokens = draw(cpu, 2, 30)
    assert_same_bits(device.logits(tokens), cpu.logits(tokens))
    matrices = cpu.n_params - sum(tensor.data.size for tensor in cpu._tensors.values() if tensor.data.ndim == 1)
    assert 1.9 * matrices < wide._core.n_bytes - device._core.n_bytes < 2.1 * matrices


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_codes_take_a_byte_a_weight_on_the_device(dtype: str) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 200, "vocab_size": 300}
    cpu, device = make_pair(dtype, engine="exact-int8", **sizes)
    _, wide = make_pair(**sizes)
    tokens = draw(cpu, 2, 30)
    assert_same_bits(device.logits(tokens), cpu.logits(tokens))
    coded = 300 * 48 + 2 * (4 * 48 * 48 + 2 * 48 * 200)
    left = 4 * coded - (wide._core.n_bytes - device._core.n_bytes)
    embedding = 0 if dtype == "float32" else 2 * 300 * 48
    # Beside the codes a scale a row, and the ends of rows that are filled.
    assert coded < left + embedding < 1.25 * coded


@with_both_engines
@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_large_and_tiny_weights(scale: float, engine: str) -> None:
    cpu, device = make_pair(scale=scale, engine=engine)
    tokens = draw(cpu, 1, 30)
    assert_same_bits(device.logits(tokens), cpu.logits(tokens))


@with_both_engines
def test_intervals_are_those_of_the_cpu(engine: str) -> None:
    cpu, device = make_pair(engine=engine, vocab_size=1100)
    tokens, targets, lengths = draw(cpu, 3, 37), draw(cpu, 3, 37, seed=6) % 1000, [37, 5, 0]
    for given in ({"vocab_size": 1000}, {"lengths": lengths}, {"lengths": lengths, "vocab_size": 1000}):
        for found, expected in zip(
            device.intervals(tokens, targets, **given), cpu.intervals(tokens, targets, **given), strict=True
        ):
            assert found.dtype == np.uint64
            np.testing.assert_array_equal(found, expected)


@with_both_engines
def test_the_softmax_of_scores_is_that_of_the_cpu(engine: str) -> None:
    cpu, device = make_pair(engine=engine, vocab_size=1100)
    tokens, targets = draw(cpu, 3, 37), draw(cpu, 3, 37, seed=6)
    for lengths in (None, [37, 5, 0]):
        found, expected = (model.log2_probabilities(tokens, targets, lengths) for model in (device, cpu))
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, expected)
    messages(cpu, device, "log2_probabilities", tokens, targets + 1000)
    messages(*bad_pair(engine), "log2_probabilities", [[1, 2, 3], [4, 9, 5]], np.ones((2, 3), int))


def test_many_sequences_run_in_several_passes_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, device = make_pair(max_position_embeddings=16)
    monkeypatch.setattr(device, "_pass_rows", 40)
    monkeypatch.setattr("llmcomp.models.engines.cuda._LOGITS_BYTES_MAX", 4 * device.n_logits * 7)
    tokens, targets = draw(cpu, 9, 16), draw(cpu, 9, 16, seed=2)
    lengths = [16, 3, 0, 16, 16, 1, 1, 9, 2]
    assert_same_bits(device.logits(tokens, lengths), cpu.logits(tokens, lengths))
    for call in ("intervals", "log2_probabilities"):
        found, expected = (getattr(model, call)(tokens, targets, lengths) for model in (device, cpu))
        np.testing.assert_array_equal(found, expected)


def test_logits_can_stay_on_the_device() -> None:
    """And go from there to the functions for arrays on a device: intervals, an encoder, a decoder."""
    cpu, device = make_pair()
    tokens, targets, lengths = draw(cpu, 3, 12), draw(cpu, 3, 12, seed=2), [12, 12, 7]
    on_device = device.logits(tokens, lengths, on_device=True)
    expected = cpu.logits(tokens, lengths)
    assert_same_bits(on_device.numpy(), expected)
    for found, triple in zip(llmcomp.intervals(on_device, targets), llmcomp.intervals(expected, targets), strict=True):
        np.testing.assert_array_equal(found.numpy(), triple)
    here, there = cpu.session(3), device.session(3)
    encoders = [llmcomp.Encoder(3), llmcomp.Encoder(3)]
    for t in range(12):
        encoders[0].push(here.step(tokens[:, t]), targets[:, t])
        encoders[1].push(there.step(tokens[:, t], on_device=True), targets[:, t])
    payloads = [encoder.finish() for encoder in encoders]
    assert payloads[0] == payloads[1]
    decoder = llmcomp.Decoder(payloads[0])
    there.reset()
    for t in range(12):
        pulled = decoder.pull(there.step(tokens[:, t], on_device=True))
        np.testing.assert_array_equal(pulled.numpy(), targets[:, t])


def test_logits_of_more_bytes_than_rows_may_lie_apart_are_read(emulated: emulated_device.Machine) -> None:
    """CUDA copies rows that lie less than 2^31 bytes apart; an array on the device may be larger."""
    cpu, device = make_pair()
    tokens = draw(cpu, 2, 12)
    emulated.pitch_max = 4 * 12 * cpu.n_logits
    assert_same_bits(device.logits(tokens, on_device=True).numpy(), cpu.logits(tokens))
    assert_same_bits(device.logits(tokens), cpu.logits(tokens))


def test_an_array_is_exported_as_it_is_or_as_a_copy(emulated: emulated_device.Machine) -> None:
    _, device = make_pair()
    array = device.logits([[1, 2, 3]], on_device=True)
    view = sys.modules["llmcomp._cuda"].dlpack_view
    for copy, is_same in ((None, True), (False, True), (True, False)):
        pointer, *_, shape, _ = view(array.__dlpack__(stream=1, max_version=(1, 0), dl_device=(2, 0), copy=copy))
        assert (pointer == array.pointer, shape) == (is_same, (1, 3, device.n_logits))
    with pytest.raises(BufferError, match="not exported to DLPack device"):
        array.__dlpack__(dl_device=(1, 0))


def test_no_sequences_and_no_tokens() -> None:
    cpu, device = make_pair()
    for shape in [(0, 5), (3, 0), (0, 0)]:
        tokens = np.zeros(shape, int)
        assert device.logits(tokens).shape == (*shape, cpu.n_logits)
        assert all(part.shape == shape for part in device.intervals(tokens, tokens))
    assert not device.logits(np.zeros((2, 4), int), [0, 0]).any()


# Streams.


@with_both_engines
@pytest.mark.parametrize("variant", ["parallel", "sequential", "odd sizes", "tied"])
def test_steps_are_those_of_the_cpu(variant: str, engine: str) -> None:
    cpu, device = make_pair(engine=engine, **VARIANTS[variant])
    tokens = draw(cpu, 3, 40)
    session = device.session(3, 40)
    steps = [session.step(tokens[:, t]) for t in range(40)]
    assert_same_bits(np.stack(steps, 1), cpu.logits(tokens))
    assert session.positions.tolist() == [40, 40, 40]


@pytest.mark.parametrize("first", [1, 16, 31, 32, 33, 47])
def test_any_split_into_prefill_and_steps(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_streams, "PREFILL_ROWS", 20)  # what is longer is read in pieces
    cpu, device = make_pair()
    tokens = draw(cpu, 1, 48)
    expected = cpu.logits(tokens)[0]
    session = device.session(3)
    assert_same_bits(session.prefill(1, tokens[0, :first]), expected[first - 1])
    active = np.array([False, True, False])
    rest = min(first + 3, 48)
    for t in range(first, rest):
        assert_same_bits(session.step(np.full(3, tokens[0, t]), active)[1], expected[t])
    if rest < 48:
        assert_same_bits(session.prefill(1, tokens[0, rest:]), expected[-1])
    assert session.positions.tolist() == [0, 48, 0]


def test_streams_start_stop_and_restart_on_their_own() -> None:
    cpu, device = make_pair()
    tokens = draw(cpu, 4, 30)
    expected = cpu.logits(tokens)
    session, rng, seen = device.session(4), np.random.default_rng(5), np.zeros(4, int)
    out = np.full((4, cpu.n_logits), 7, np.float32)
    for _ in range(60):
        active = (rng.random(4) < 0.6) & (seen < 30)
        given = np.where(active, tokens[np.arange(4), np.minimum(seen, 29)], -1)
        before = out.copy()
        assert session.step(given, active, out) is out
        for stream in range(4):
            row = expected[stream, seen[stream]] if active[stream] else before[stream]
            assert_same_bits(out[stream], row)
        seen += active
        if rng.random() < 0.1:
            stream = int(rng.integers(4))
            session.reset(stream)
            seen[stream] = 0
        np.testing.assert_array_equal(session.positions, seen)
    assert not session.step([-1] * 4, np.zeros(4, bool)).any()
    session.reset()
    assert not session.positions.any()
    assert_same_bits(session.step(tokens[:, 0]), expected[:, 0])


# Archives.


@pytest.mark.parametrize("halved_streams", [2, 512])
@pytest.mark.parametrize(("overlap", "lanes"), [(0, 99), (8, 99), (8, 2), (23, 3)])
def test_streams_of_any_length_decode_side_by_side(
    overlap: int, lanes: int, halved_streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_streams, "_HALVED_STREAMS", halved_streams)
    cpu, device = small_windows()
    monkeypatch.setattr(device, "lanes", lambda n_tokens: lanes)
    rng = np.random.default_rng(3)
    contents = [rng.bytes(n) for n in (45, 1, 0, 33, 32, 5)]
    coded = SegmentCodec(cpu, overlap=overlap).encode(contents)
    codec = SegmentCodec(device, overlap=overlap)
    assert [item.payload for item in codec.encode(contents)] == [item.payload for item in coded]
    steps: list[int] = []
    lengths = [len(content) for content in contents]
    for _ in range(2):  # the second time in the same memory
        assert codec.decode([item.payload for item in coded], lengths, steps.append) == contents
    assert sum(steps) == 2 * sum(lengths)


@with_both_engines
def test_archives_cross_both_ways(engine: str) -> None:
    cpu, device = (llmcomp.load_model("pico-13k", engine=engine, device=device) for device in ("cpu", "cuda"))
    data = TEXT[:250] + "Größe, ∞".encode()
    archive = llmcomp.compress(data, cpu, segment_bytes=100, stock=False)
    assert not any(segment.stored for segment in ArchiveReader(io.BytesIO(archive)).segments())
    assert llmcomp.compress(data, device, segment_bytes=100, stock=False) == archive
    assert llmcomp.decompress(archive, device) == llmcomp.decompress(archive, cpu) == data
    assert llmcomp.decompress(archive, device="cuda") == data
    with open_archive(io.BytesIO(archive), device="cuda") as file:
        file.seek(120)
        assert file.read(50) == data[120:170]


def test_a_token_costs_no_waiting_for_the_device(emulated: emulated_device.Machine) -> None:
    cpu, device = small_windows(max_position_embeddings=300)
    content = np.random.default_rng(4).bytes(256)
    (coded,) = SegmentCodec(cpu).encode([content])
    codec = SegmentCodec(device)
    before = (emulated.n_graph_launches, emulated.n_synchronizations)
    assert codec.decode([coded.payload], [256]) == [content]
    assert 255 <= emulated.n_graph_launches - before[0] < 1.25 * 256
    # A handful to set up, then one for up to 64 tokens, fewer at the end.
    assert emulated.n_synchronizations - before[1] < 45


def test_many_streams_are_two_halves_that_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of both are on their way before either is waited for."""
    monkeypatch.setattr(cuda_streams, "_HALVED_STREAMS", 3)
    told: list[tuple[str, int]] = []
    start, collect = cuda_streams._ChainPart.start, cuda_streams._ChainPart.collect

    def tell(what: str, part: Any, call: Any, *arguments: Any) -> Any:
        told.append((what, part._core.stream))
        return call(part, *arguments)

    monkeypatch.setattr(cuda_streams._ChainPart, "start", lambda part, *given: tell("start", part, start, *given))
    monkeypatch.setattr(cuda_streams._ChainPart, "collect", lambda part: tell("collect", part, collect))
    cpu, device = small_windows()
    contents = [bytes(range(n)) for n in (20, 9, 30)]
    payloads = [item.payload for item in SegmentCodec(cpu).encode(contents)]
    assert SegmentCodec(device).decode(payloads, [len(content) for content in contents]) == contents
    assert [what for what, _ in told[:4]] == ["start", "start", "collect", "collect"]
    assert told[0][1] == told[2][1] != told[1][1] == told[3][1]


class Watched:
    """A session of the C module, and the rows of every call of decode_steps."""

    def __init__(self, session: Any) -> None:
        self._session, self.rows = session, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def decode_steps(self, *arguments: Any) -> None:
        self.rows.append(arguments[7])
        self._session.decode_steps(*arguments)


def test_streams_that_have_ended_have_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_streams, "_LOG_STEPS", 4)
    monkeypatch.setattr(cuda_streams.DecodingChain, "steps_max", 4)
    cpu, device = small_windows()
    watched: list[Watched] = []
    make = cuda_streams._ChainPart.__init__

    def make_watched(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        self._core = Watched(self._core)
        watched.append(self._core)

    monkeypatch.setattr(cuda_streams._ChainPart, "__init__", make_watched)
    contents = [bytes(range(n)) for n in (70, 3, 40, 9, 1, 60, 22)]
    coded = SegmentCodec(cpu).encode(contents)
    payloads = [item.payload for item in coded]
    assert SegmentCodec(device).decode(payloads, [len(content) for content in contents]) == contents
    (chain,) = watched
    # Windows of 32 tokens, asked for 4 at a time. Of seven streams two end within 4; a third, which is too few to make
    # room for, at 9; a fourth at 22. Of the three that go on one ends in the second window.
    assert chain.rows[:8] == [7, 5, 5, 5, 5, 5, 3, 3]
    assert chain.rows[8:11] == [3, 3, 2] and chain.rows[-1] == 1


def test_what_is_uploaded_may_be_freed_at_once(emulated: emulated_device.Machine) -> None:
    emulated.reads_host_memory = 1
    module = sys.modules["llmcomp._cuda"]
    buffer, numbers, found = module.Buffer(64, 0), np.arange(8.0), np.empty(8)
    module.upload(0, 0, buffer.pointer, numbers)
    numbers[:] = -1
    module.download(0, 0, buffer.pointer, found)
    np.testing.assert_array_equal(found, np.arange(8.0))
    cpu, device = make_pair()
    tokens = draw(cpu, 3, 20)
    assert_same_bits(device.logits(tokens), cpu.logits(tokens))


def test_scores_are_those_of_the_cpu() -> None:
    chunks = [TEXT[:120], TEXT[900:950]]
    tables = [llmcomp.score(chunks, "pico-13k", device=device, verify=True) for device in ("cpu", "cuda")]
    assert tables[1]["device"].tolist() == ["cuda:0", "cuda:0"]
    same = [column for column in tables[0] if column not in ("device", "seconds", "batch_rows")]
    assert tables[0][same].equals(tables[1][same])
    with pytest.warns(UserWarning, match="sees 512 tokens"):
        published = [llmcomp.score(chunks, "pico-13k", "published", device=device) for device in ("cpu", "cuda")]
    assert published[0]["ideal_bits"].equals(published[1]["ideal_bits"])


def test_a_sweep_takes_its_cells_from_any_device(tmp_path: Path) -> None:
    data = dataclasses.replace(llmcomp.load_dataset("text", n_chunks=1), chunks=[TEXT[:100]])
    first = llmcomp.sweep(["pico-13k"], datasets=[data], out=tmp_path, device="cuda", progress=False)
    assert first["device"].tolist() == ["cuda:0"]
    again = llmcomp.sweep(["pico-13k"], datasets=[data], out=tmp_path, progress=False)
    assert again["device"].tolist() == ["cuda:0"]


def test_the_command_line_takes_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = TEXT[:120]
    Path("a.txt").write_bytes(data)
    options = ["-q", "--device", "cuda"]
    assert main(["compress", "-k", "-m", "pico-13k", *options, "a.txt"]) == 0
    assert Path("a.txt.llmc").read_bytes() == llmcomp.compress(data, "pico-13k")
    assert main(["decompress", "-k", *options, "-o", "b.txt", "a.txt.llmc"]) == 0
    assert Path("b.txt").read_bytes() == data
    assert main(["decompress", "--test", *options, "-m", "pico-13k", "a.txt.llmc"]) == 0


@with_both_engines
def test_the_model_is_the_same_model(engine: str, tmp_path: Path) -> None:
    cpu, device = make_pair(engine=engine)
    for name in ("name", "step", "n_params", "vocab_size", "n_logits", "context_length", "fingerprint", "engine"):
        assert getattr(cpu, name) == getattr(device, name)
    assert (cpu.dtype, cpu.weights_sha256) == (device.dtype, device.weights_sha256)
    assert (cpu.device, device.device) == ("cpu", "cuda:0")
    folder = write_folder(tmp_path / "tiny", make_config(), make_weights(make_config()))
    loaded = llmcomp.load_model(folder, engine=engine, device="cuda:0")
    assert loaded.fingerprint == cpu.fingerprint
    assert llmcomp.load_model(loaded, device="cuda") is loaded
    with pytest.raises(Error, match="loaded on device 'cuda:0' already, expected 'cpu'"):
        llmcomp.compress(b"abc", loaded, device="cpu")


# Larger.


@pytest.mark.slow
def test_a_longer_archive() -> None:
    cpu, device = llmcomp.load_model("pico-77k"), llmcomp.load_model("pico-77k", device="cuda")
    data = TEXT[:9000]
    archive = llmcomp.compress(data, cpu, segment_bytes=3000, stock=False)
    assert llmcomp.compress(data, device, segment_bytes=3000, stock=False) == archive
    assert llmcomp.decompress(archive, device) == data


@pytest.mark.slow
@with_both_engines
@pytest.mark.parametrize("name", ["pico-28k", "pico-77k", "pico-224k", "pico-595k"])
def test_the_pico_suite(name: str, engine: str) -> None:
    cpu, device = (llmcomp.load_model(name, engine=engine, device=device) for device in ("cpu", "cuda"))
    tokens = cpu.tokenizer.encode_bytes(TEXT[:3000])[None, :400]
    assert_same_bits(device.logits(tokens), cpu.logits(tokens))


SHAPES = {
    "70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


@needs_device
@pytest.mark.slow
@with_both_engines
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_pythia(shape: str, dtype: str, engine: str) -> None:
    cpu, device = make_pair(dtype, engine=engine, vocab_size=50304, max_position_embeddings=2048, **SHAPES[shape])
    tokens = draw(cpu, 3, 700)
    expected = cpu.logits(tokens, [700, 33, 200])
    assert_same_bits(device.logits(tokens, [700, 33, 200]), expected)
    session = device.session(2)
    session.prefill(0, tokens[0, :500])
    for t in range(500, 520):
        assert_same_bits(session.step(tokens[[0, 1], [t, t - 500]])[0], expected[0, t])
    assert session.positions.tolist() == [520, 20]


@needs_device
@pytest.mark.slow
@with_both_engines
def test_hundreds_of_streams_at_once(engine: str) -> None:
    cpu, device = (llmcomp.load_model("pico-595k", engine=engine, device=device) for device in ("cpu", "cuda"))
    data = (TEXT * 40)[: 600 * 2048]
    archive = llmcomp.compress(data, device, segment_bytes=2048, stock=False)
    assert llmcomp.decompress(archive, device) == data
    assert (
        llmcomp.decompress(llmcomp.compress(data[:8192], device, segment_bytes=2048, stock=False), cpu) == data[:8192]
    )

"""The torch engine against transformers itself: logits, steps, pauses, blocks of intervals, weights, bad files."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import neox_config, neox_tensors, write_checkpoint
from session_checks import assert_steps_with_pauses
from tiny_models import TRAINING_TEXT, TinyModel, TinySession

torch = pytest.importorskip("torch", reason="the torch engine is an extra")
transformers = pytest.importorskip("transformers", reason="the torch engine is an extra")

from safetensors.torch import load_file, save_file  # noqa: E402

from llmcomp import compress, decompress, score  # noqa: E402
from llmcomp.bench.torch_yardsticks import published_loop  # noqa: E402
from llmcomp.errors import Error, ModelMismatch  # noqa: E402
from llmcomp.models.engines.torch import TorchModel  # noqa: E402
from llmcomp.models.engines.torch_device import DeviceStopwatch, product_rate  # noqa: E402
from llmcomp.models.engines.torch_weights import read_host_weights, read_pickled_weights  # noqa: E402
from llmcomp.models.load import load_model  # noqa: E402
from llmcomp.scoring.published import PublishedTokens  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("torch") / "tiny" / "step5", seed=5, num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> TorchModel:
    return load_model(folder, engine="torch")


def some_tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 262, shape)


def test_attributes(model: TorchModel, folder: Path) -> None:
    tensors = neox_tensors(neox_config(num_hidden_layers=2), 5)
    assert (model.name, model.step, model.engine, model.device, model.dtype) == ("tiny", 5, "torch", "cpu", "float32")
    assert model.n_params == sum(tensor.size for tensor in tensors.values())
    # 256 bytes, 5 merges and <|endoftext|>; the file's 272 rows are padded.
    assert (model.vocab_size, model.n_logits, model.context_length) == (262, 272, 128)
    assert load_model(folder, engine="torch").fingerprint == model.fingerprint


def test_tied_weights_count_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, tie_word_embeddings=True)
    tensors = neox_tensors(neox_config(tie_word_embeddings=True), 1)
    assert "embed_out.weight" not in tensors
    assert load_model(folder, engine="torch").n_params == sum(tensor.size for tensor in tensors.values())


def test_logits_are_those_of_transformers(model: TorchModel, folder: Path) -> None:
    reference = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = some_tokens((3, 17))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    found = model.logits(tokens)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert torch.is_tensor(model.logits(tokens, as_tensor=True))


def test_steps_with_pauses_agree_with_one_pass(model: TorchModel) -> None:
    tokens = some_tokens((3, 20))
    expected = model.logits(tokens)
    assert_steps_with_pauses(model.session(3), tokens, expected, share=0.6, atol=1e-4)


def test_a_stream_that_was_reset_forgets(model: TorchModel) -> None:
    tokens = some_tokens((2, 6))
    session = model.session(2)
    for t in range(4):
        session.step(tokens[:, t])
    session.reset(1)
    rows = session.step(tokens[:, 4])
    np.testing.assert_allclose(rows[0], model.logits(tokens)[0, 4], atol=1e-4)
    np.testing.assert_allclose(rows[1], model.logits(tokens[1:, 4:5])[0, 0], atol=1e-4)
    session.reset()
    fresh = model.session(2)
    assert not session.positions.any()
    assert (session.step(tokens[:, 0]) == fresh.step(tokens[:, 0])).all()


def test_the_same_calls_give_the_same_bits(model: TorchModel) -> None:
    tokens = some_tokens((2, 9))
    assert (model.logits(tokens) == model.logits(tokens)).all()
    first, second = model.session(2), model.session(2)
    for t in range(9):
        assert (first.step(tokens[:, t]) == second.step(tokens[:, t])).all()


@pytest.mark.parametrize("linear", [True, False])
def test_intervals_in_blocks(model: TorchModel, monkeypatch: pytest.MonkeyPatch, linear: bool) -> None:
    """Against the softmax in float64; 29-bit weights and 262 tokens leave less than 1e-4 bits a token."""
    monkeypatch.setattr("llmcomp.models.engines.torch._BLOCK_ROWS", 7)
    assert model._head_is_linear
    monkeypatch.setattr(model, "_head_is_linear", linear)
    tokens, targets, lengths = some_tokens((3, 11)), some_tokens((3, 11), 1), np.array([11, 4, 0])
    start, freq, total = model.intervals(tokens, targets, lengths)
    logits = model.logits(tokens)[..., :262].astype(np.float64)
    for row in range(3):
        for at in range(11):
            if at >= lengths[row]:
                assert (start[row, at], freq[row, at], total[row, at]) == (0, 0, 0)
                continue
            weights = logits[row, at]
            ideal = math.log2(math.fsum(np.exp(weights - weights.max()))) - (
                (weights[targets[row, at]] - weights.max()) / math.log(2)
            )
            assert -math.log2(int(freq[row, at]) / int(total[row, at])) == pytest.approx(ideal, abs=1e-4)
            assert int(start[row, at]) + int(freq[row, at]) <= int(total[row, at])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log2_probabilities(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Against the softmax of all logits in float64."""
    monkeypatch.setattr("llmcomp.models.engines.torch._BLOCK_ROWS", 7)
    model = load_model(folder, engine="torch", dtype=dtype)
    tokens, targets, lengths = some_tokens((3, 11)), some_tokens((3, 11), 1), np.array([11, 4, 0])
    found = model.log2_probabilities(tokens, targets, lengths)
    logits = model.logits(tokens).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.log2(np.take_along_axis(probabilities, targets[..., None], -1)[..., 0])
    # The head's product in blocks may round otherwise than in one piece; bfloat16 has 8 bits.
    np.testing.assert_allclose(found, expected * (np.arange(11) < lengths[:, None]), atol=1e-5, rtol=0.02)


def test_work_is_given_first_and_waited_for_later(model: TorchModel) -> None:
    """Two batches on their way at once, waited for on another thread and in the other order."""
    tokens, targets, lengths = some_tokens((3, 11)), some_tokens((3, 11), 1), np.array([11, 4, 0])
    for start, at_once in (
        (model.start_intervals, model.intervals),
        (model.start_log2_probabilities, model.log2_probabilities),
    ):
        waits = [start(tokens, targets, lengths), start(targets, tokens, lengths)]
        with ThreadPoolExecutor(1) as pool:
            second, first = (pool.submit(wait).result() for wait in reversed(waits))
        assert np.array_equal(first, at_once(tokens, targets, lengths))
        assert np.array_equal(second, at_once(targets, tokens, lengths))
    with pytest.raises(Error, match="targets reach from 0 to 262, expected 0 to 261"):
        model.start_intervals(tokens[:1, :2], np.array([[0, 262]]))


def test_totals_of_zero_name_the_row(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the intervals on a device leave where a row has no distribution."""

    def intervals(logits: torch.Tensor, chosen: torch.Tensor, size: int) -> tuple[np.ndarray, ...]:
        total = np.full(len(logits), size, np.uint64)
        total[5] = 0
        return np.zeros_like(total), np.ones_like(total), total

    monkeypatch.setattr("llmcomp.coding.intervals", intervals)
    wait = model.start_intervals(some_tokens((2, 4)), some_tokens((2, 4)), np.array([3, 4]))
    # Three rows of the first sequence and three of the second.
    with pytest.raises(Error, match="sequence 1, position 2"):
        wait()


class FakeDevice:
    """The calls of torch.cuda that the engine makes, over a clock that a test moves: what runs on no CI machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 0.0, 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = math.nan

            def record(self, stream: object) -> None:
                assert stream == "the stream of cuda:1"
                self.at = device.now

            def elapsed_time(self, last: Event) -> float:
                assert device.waits, "read before the device was done"
                return 1000 * (last.at - self.at)

            def synchronize(self) -> None:
                device.waits += 1

        def wait(device: str) -> None:
            self.waits += 1

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
        monkeypatch.setattr(torch.cuda, "synchronize", wait)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 10_000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2000)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1500)


def test_a_device_s_parts_are_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    watch = DeviceStopwatch("cuda:1")
    for name, seconds in (("forward", 2.0), ("intervals", 0.5), ("forward", 1.0)):
        with watch.part(name):
            device.now += seconds
        device.now += 10
    assert device.waits == 0
    assert watch.seconds() == pytest.approx({"forward": 3.0, "intervals": 0.5})
    assert watch.seconds() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_torch_does_not_find_is_named() -> None:
    with pytest.raises(Error, match=r"device 'cuda': this torch .* finds no CUDA device"):
        product_rate("cuda")


def test_a_device_s_memory_decides_its_batches(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps for later use is free: 3,000 bytes and 500."""
    FakeDevice(monkeypatch)
    monkeypatch.setattr(model, "device", "cuda:1")
    asked = model.pass_memory()
    assert (asked.free_bytes, asked.total_bytes, asked.rows_max) == (3500, 10_000, 1 << 16)
    assert asked.rows() == 1


def test_published_rows_equal_the_loop(folder: Path) -> None:
    model = load_model(folder, engine="torch")
    chunks = [b"Some years ago - never mind how long.", bytes(range(200)), b"x" * 30]
    with pytest.warns(UserWarning, match="128 tokens"):
        rows = score(chunks, model, protocol="published", progress=False)
    for row, chunk in zip(rows.itertuples(), chunks, strict=True):
        kept = PublishedTokens().encode(chunk, model.tokenizer).tokens[: model.context_length]
        assert abs(row.ratio - published_loop(model, kept) / (8 * len(chunk))) < 1e-6


def test_both_engines_tell_one_digest_of_one_checkpoint(folder: Path, tmp_path: Path) -> None:
    exact = load_model(folder)
    for dtype in ("float32", "bfloat16"):
        other = load_model(folder, engine="torch", dtype=dtype)
        assert other.weights_sha256 == exact.weights_sha256
    pickled = write_checkpoint(tmp_path / "pickled", seed=5, num_hidden_layers=2)
    (pickled / "model.safetensors").unlink()
    tensors = neox_tensors(neox_config(num_hidden_layers=2), 5)
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, pickled / "pytorch_model.bin")
    assert load_model(pickled, engine="torch").weights_sha256 == exact.weights_sha256
    changed = write_checkpoint(tmp_path / "changed", seed=6, num_hidden_layers=2)
    assert load_model(changed, engine="torch").weights_sha256 != exact.weights_sha256


def test_another_architecture(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=256, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    reference = transformers.GPT2LMHeadModel(config).eval()
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, engine="torch", attention="eager")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 10))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-4)
    session = model.session(2)
    for t in range(10):
        np.testing.assert_allclose(session.step(tokens[:, t]), expected[:, t], atol=1e-4)
    assert (model.vocab_size, model.tokenizer.bos_token) == (256, None)
    assert len(model.weights_sha256) == 64
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "opt"}), "utf-8")
    with pytest.raises(Error, match="'opt' model, the exact engine computes gpt_neox, gpt2"):
        load_model(tmp_path, engine="exact")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pickled_weights(tmp_path: Path, dtype: str) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in neox_tensors(neox_config(), 3).items()}
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    buffer = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    names = sorted(stored)
    torch.save({name: stored[name] for name in names[:5]} | buffer, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({name: stored[name] for name in names[5:]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    found = read_pickled_weights(tmp_path)
    assert set(found) == set(stored)
    for name, array in found.items():
        assert array.dtype == (np.float16 if dtype == "float16" else np.float32)
        assert (array == stored[name].float().numpy()).all()


def test_engines_agree_in_code_length() -> None:
    exact, other = load_model("pico-28k"), load_model("pico-28k", engine="torch")
    assert (other.vocab_size, other.n_params, other.context_length) == (
        exact.vocab_size,
        exact.n_params,
        exact.context_length,
    )
    tokens = np.random.default_rng(0).integers(0, exact.vocab_size, (2, 65))
    bits = []
    for model in (exact, other):
        _, freq, total = model.intervals(tokens[:, :-1], tokens[:, 1:])
        bits.append(np.log2(total.astype(np.float64)) - np.log2(freq.astype(np.float64)))
    assert np.abs(bits[0] - bits[1]).max() < 1e-3
    assert abs(bits[0].mean() - bits[1].mean()) < 1e-4


def test_an_archive_of_this_engine_decodes_on_this_machine() -> None:
    model, data = load_model("pico-13k", engine="torch"), b"Call me Ishmael. Some years ago - never mind how long. " * 6
    blob = compress(data, model, stock=False)
    assert len(blob) < len(data)
    assert decompress(blob, model) == data
    assert decompress(compress(data, model, segment_bytes=128, stock=False), model) == data
    assert decompress(blob) == data
    half = compress(data, load_model("pico-13k", engine="torch", dtype="bfloat16"), stock=False)
    with pytest.raises(ModelMismatch, match="weights"):
        decompress(half)


class OfTensors(TinyModel):
    """What a user wraps: a module's logits as it gives them, bfloat16 and with a gradient."""

    def logits(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(super().logits(tokens)).bfloat16().requires_grad_()

    def session(self, n_streams: int) -> OfTensorsSession:
        return OfTensorsSession(self, n_streams)


class OfTensorsSession(TinySession):
    def step(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(super().step(tokens)).bfloat16().requires_grad_()


def test_an_archive_of_a_model_that_gives_tensors() -> None:
    """Segments end at different steps, so that some streams are decoded without the others."""
    model = OfTensors()
    blob = compress(TRAINING_TEXT, model, segment_bytes=100, stock=False)
    assert len(blob) < len(TRAINING_TEXT)
    assert decompress(blob, model) == TRAINING_TEXT


def test_a_session_serves_chunk_after_chunk_and_window_after_window(model: TorchModel) -> None:
    chunks = [b"Call me Ishmael. " * n for n in (20, 2)]
    rows = score(chunks, model, verify=True)
    assert rows["bytes_in"].tolist() == [340, 34]
    assert rows["tokens"][0] > model.context_length


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_exact_engine_reads_pickled_weights(tmp_path: Path, dtype: str) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in neox_tensors(neox_config(), 3).items()}
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    folders = [write_checkpoint(tmp_path / name, 3) for name in ("pickled", "safe")]
    (folders[0] / "model.safetensors").unlink()
    torch.save(rounded, folders[0] / "pytorch_model.bin")
    save_file(rounded, folders[1] / "model.safetensors")
    pickled, safe = map(load_model, folders)
    tokens = some_tokens((1, 12))
    assert (pickled.logits(tokens) == safe.logits(tokens)).all()


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_parameters_and_pickles_of_old_torch_are_read(tmp_path: Path, is_zip: bool) -> None:
    folders = [write_checkpoint(tmp_path / name, 3) for name in ("pickled", "safe")]
    stored = load_file(folders[1] / "model.safetensors")
    state = {name: torch.nn.Parameter(tensor) for name, tensor in stored.items()}
    (folders[0] / "model.safetensors").unlink()
    torch.save(state, folders[0] / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    pickled, safe = map(load_model, folders)
    assert pickled.weights_sha256 == safe.weights_sha256
    tokens = np.arange(12).reshape(2, 6)
    assert (pickled.logits(tokens) == safe.logits(tokens)).all()
    pickled, safe = (load_model(folder, engine="torch") for folder in folders)
    assert (pickled.logits(tokens) == safe.logits(tokens)).all()


def other_pickles() -> dict[str, Any]:
    tensor = torch.ones(2, 3)
    return {
        "found a pickled list": [tensor],
        "found a pickled NoneType": None,
        "'state_dict' is a dict": {"state_dict": {"a": tensor}},
        "1 is a Tensor": {1: tensor},
        "'a' is a NoneType": {"a": None},
        "a is torch.float32, torch.sparse_coo": {"a": tensor.to_sparse()},
        "on meta; expected a dense": {"a": tensor.to("meta")},
        "a is torch.complex64": {"a": tensor.to(torch.complex64)},
        "a has dtype float64": {"a": tensor.double()},
        "a has dtype int8": {"a": tensor.to(torch.int8)},
        "has fewer bytes than values": {"a": torch.ones(1).expand(1 << 40)},
    }


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("message", list(other_pickles()))
def test_pickles_of_other_things_are_refused(tmp_path: Path, message: str, is_zip: bool) -> None:
    torch.save(other_pickles()[message], tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(Error, match=rf"pytorch_model\.bin: .*{re.escape(message)}") as raised:
        read_pickled_weights(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "harmed",))

    torch.save({"weight": Harmful()}, tmp_path / "pytorch_model.bin")
    for read in (read_pickled_weights, read_host_weights):
        with pytest.raises(Error, match=r"pytorch_model\.bin: it asks for .*; expected a pickle of nothing") as raised:
            read(tmp_path)
        assert "weights_only" not in str(raised.value)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(Error, match=r"pytorch_model\.bin"):
        read_pickled_weights(tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_truncated_and_missing_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Error, match="transformers cannot load this model"):
        load_model(tmp_path, engine="torch")
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps(neox_config(num_hidden_layers=2)))
    with pytest.raises(Error, match="weights are missing"):
        load_model(tmp_path, engine="torch")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.array([[1, 272]]), "272"),
        (np.array([[-1]]), "-1"),
        (np.zeros((1, 129), int), "129 tokens"),
        (np.zeros(3, int), r"\(3,\)"),
        (np.zeros((1, 3)), "float64"),
    ],
)
def test_bad_tokens(model: TorchModel, tokens: np.ndarray, words: str) -> None:
    with pytest.raises(Error, match=words):
        model.logits(tokens)


def test_bad_options(folder: Path) -> None:
    with pytest.raises(Error, match="no dtype is called 'int8'"):
        load_model(folder, engine="torch", dtype="int8")
    with pytest.raises(Error, match="no attention is called 'none'"):
        load_model(folder, engine="torch", attention="none")
    with pytest.raises(Error, match="nowhere"):
        load_model(folder, engine="torch", device="nowhere")


def test_a_session_ends_with_the_context(tmp_path: Path) -> None:
    model = load_model(write_checkpoint(tmp_path, 1, max_position_embeddings=4), engine="torch")
    session = model.session(1)
    for _ in range(4):
        session.step([1])
    with pytest.raises(Error, match="has read 4 tokens"):
        session.step([1])

"""What goes wrong with the exact engine on a CUDA device: the errors of the C core in its words, devices and memory
that are missing, and nothing that stays on the device.

As in test_cuda_engine.py: on the device of this machine, or where there is none on an emulated one."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulated_device
import numpy as np
import pytest
from engine_models import assert_same_bits, draw, make_config, make_weights
from model_pairs import bad_pair, make_pair, messages, small_windows, with_both_engines

import llmcomp
from llmcomp import pico
from llmcomp.cli.main import main
from llmcomp.codec.segments import SegmentCodec
from llmcomp.codec.windows import WindowedModel
from llmcomp.errors import CorruptArchive, Error
from llmcomp.models.adapter import AdaptedModel
from llmcomp.models.checkpoint import core_arguments
from llmcomp.models.engines.cuda import CudaInt8Model, CudaModel

pytestmark = pytest.mark.usefixtures("machine")
TEXT = pico.sample_path("text").read_bytes()


# Errors.


def test_mistakes_are_told_in_the_words_of_the_cpu() -> None:
    pair = make_pair()
    good = np.ones((2, 3), int)
    messages(*pair, "logits", [1, 2])
    messages(*pair, "logits", np.zeros((1, 49), int))
    messages(*pair, "logits", np.zeros((1, 3)))
    messages(*pair, "logits", [[1, 2, 3], [4, 61, 5]])
    messages(*pair, "logits", good, lengths=[3, 4])
    messages(*pair, "logits", good, lengths=[3, -1])
    messages(*pair, "intervals", good, [[1, 1, 1], [1, -1, 1]])
    messages(*pair, "intervals", good, good, vocab_size=62)
    messages(*pair, "session", 0)
    messages(*pair, "session", 2, 49)
    sessions = [model.session(2, 3) for model in pair]
    messages(*sessions, "step", [1, 61])
    messages(*sessions, "step", [1.0, 2.0])
    messages(*sessions, "prefill", 0, [])
    messages(*sessions, "prefill", 2, [1])
    messages(*sessions, "prefill", 1, [1, 99])
    messages(*sessions, "prefill", 1, [1, 2, 3, 4])
    messages(*sessions, "reset", 2)
    for session in sessions:
        session.prefill(1, [1, 2, 3])
    messages(*sessions, "step", [1, 1])
    assert sessions[1].positions.tolist() == [0, 3]
    with pytest.raises(Error, match="active has dtype"):
        sessions[1].step([1, 1], np.ones(2))
    with sessions[1]._used(), pytest.raises(Error, match="another thread is using this session"):
        sessions[1].step([1, 1])
    # Padding and streams that are not active may hold anything.
    assert_same_bits(pair[1].logits([[1, 99]], [1]), pair[0].logits([[1, 0]], [1]))


@with_both_engines
def test_a_row_without_valid_logits_is_named(engine: str) -> None:
    pair = bad_pair(engine)
    tokens = [[1, 2, 3], [4, 9, 5]]
    messages(*pair, "intervals", tokens, np.ones((2, 3), int))
    good = np.zeros((1, 2), int)
    np.testing.assert_array_equal(pair[0].intervals(good, good), pair[1].intervals(good, good))
    models = [
        WindowedModel(AdaptedModel(model), vocab_size=256, bos_token=9, context_length=32, overlap=4) for model in pair
    ]
    for model in models:
        with pytest.raises(Error, match="a logit is NaN"):
            model.decode([b"abc"], [5], np.ones((1, 256), np.int64), [0])


def test_what_comes_after_the_end_of_a_stream_does_not_matter() -> None:
    """The stream ends with the token after which there are no valid logits; the device goes on for a few steps."""
    cpu, device = bad_pair()
    content = bytes([*range(20, 40), 9])
    others = np.random.default_rng(1).bytes(60).replace(b"\x09", b"\x0a")
    coded = SegmentCodec(cpu, overlap=0).encode([content, others])
    found = SegmentCodec(device, overlap=0).decode([item.payload for item in coded], [len(content), len(others)])
    assert found == [content, others]


def test_payloads_of_something_else_are_refused_as_on_the_cpu() -> None:
    cpu, device = small_windows()
    rng = np.random.default_rng(7)
    token_bytes = np.where(rng.random((1, 256)) < 0.1, -1, rng.integers(1, 4, (1, 256)))
    payloads, n_bytes = [rng.bytes(40) for _ in range(5)], [90, 90, 30, 90, 90]
    told = []
    for model in (cpu, device):
        windowed = WindowedModel(AdaptedModel(model), vocab_size=256, bos_token=0, context_length=32, overlap=4)
        with pytest.raises(CorruptArchive) as caught:
            windowed.decode(payloads, n_bytes, token_bytes, [0] * 5)
        told.append(str(caught.value))
    assert told[0] == told[1] and "where it cannot stand" in told[0]


# What is missing.


def test_without_the_cuda_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "llmcomp._cuda", None)
    with pytest.raises(Error, match="device 'cuda': this llmcomp was built without its CUDA part"):
        llmcomp.load_model("pico-13k", device="cuda")
    (tmp_path / "a").write_bytes(b"abc")
    assert main(["compress", "--device", "cuda", str(tmp_path / "a")]) == 1
    assert capsys.readouterr().err.startswith("llmcomp: device 'cuda': this llmcomp was built without")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_a_driver_or_a_device(emulated: emulated_device.Machine) -> None:
    archive = llmcomp.compress(TEXT[:200], "pico-13k", stock=False)
    emulated.n_devices = 0
    with pytest.raises(Error, match=r"device 'cuda:1': no CUDA device was found \(no CUDA-capable device"):
        llmcomp.load_model("pico-13k", device="cuda:1")
    with pytest.raises(Error, match="no CUDA device was found"):
        llmcomp.decompress(archive, device="cuda")
    emulated.driver_version = 0
    with pytest.raises(Error, match="device 'cuda': no NVIDIA driver was found"):
        llmcomp.score([b"abc"], "pico-13k", device="cuda")


def test_devices_that_are_not_there_or_too_old(
    emulated: emulated_device.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Error, match="device 'cuda:1': this machine has 1 CUDA devices, numbered from 0"):
        llmcomp.load_model("pico-13k", device="cuda:1")
    for name in ("gpu", "cuda:", "cuda:x", "cuda0"):
        with pytest.raises(Error, match=f"no device is called {name!r}"):
            llmcomp.load_model("pico-13k", device=name)
    monkeypatch.setattr(sys.modules["llmcomp._cuda"], "TARGETS", "sm_80 sm_90 compute_90")
    emulated.major = 7
    with pytest.raises(Error, match=r"compute capability 7\.0; this llmcomp was built for 8\.0 and later"):
        llmcomp.load_model("pico-13k", device="cuda")


def test_too_little_memory_is_told_before_any_is_taken(emulated: emulated_device.Machine) -> None:
    config = make_config()
    weights = make_weights(config)
    emulated.memory_bytes = emulated.bytes_in_use + 10_000
    free = r"; 10000 of its \d+ are free"
    with pytest.raises(Error, match=r"the model's weights: \d+ bytes of memory are needed on CUDA device 0" + free):
        CudaModel(config, weights)
    emulated.memory_bytes += 1 << 20
    model = CudaModel(config, weights)
    used = emulated.bytes_in_use
    with pytest.raises(Error, match=r"keys, values and work of a session: \d+ bytes of memory are needed"):
        model.session(1000)
    assert emulated.bytes_in_use == used
    assert 1 <= model.lanes(48) < 100
    assert model.session(3).step([1, 2, 3]).shape == (3, 61)


def test_too_little_memory_for_the_way_to_codes(emulated: emulated_device.Machine) -> None:
    config = make_config(vocab_size=5000)
    weights = make_weights(config)
    n_bytes = CudaInt8Model(config, weights)._core.n_bytes
    gc.collect()
    before = emulated.bytes_in_use
    emulated.memory_bytes = before + n_bytes + 4 * 5000 * 24 - 1
    with pytest.raises(Error, match="a matrix of the model on its way to 8-bit codes: 480000 bytes of memory are"):
        CudaInt8Model(config, weights)
    gc.collect()
    assert emulated.bytes_in_use == before


def test_a_batch_that_does_not_fit_is_halved(
    emulated: emulated_device.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, device = small_windows()
    told = device.pass_memory()
    assert told.held_bytes == device._core.n_bytes and told.total_bytes == emulated.memory_bytes
    monkeypatch.setattr(device, "pass_memory", lambda: told._replace(row_bytes=1))
    emulated.memory_bytes = emulated.bytes_in_use + 500 * told.row_bytes + (1 << 20)
    windowed = [
        WindowedModel(AdaptedModel(model), vocab_size=256, bos_token=0, context_length=32, overlap=0)
        for model in (cpu, device)
    ]
    streams = [draw(cpu, 32, seed=i) for i in range(60)]
    found, expected = (model.intervals(streams) for model in reversed(windowed))
    np.testing.assert_array_equal(found, expected)
    assert windowed[1].batch_rows < 60 * 32


def use_and_misuse() -> None:
    cpu, device = small_windows()
    contents = [bytes(range(50)), b"x" * 33]
    coded = SegmentCodec(cpu).encode(contents)
    assert SegmentCodec(device).decode([item.payload for item in coded], [50, 33]) == contents
    session = device.session(2)
    session.prefill(0, [1, 2, 3])
    for wrong in (lambda: device.logits([[300]]), lambda: session.step([1, 300]), lambda: device.session(1, 99)):
        with pytest.raises(Error):
            wrong()
    good = core_arguments(device.config, device._tensors, False)
    without_head = {"tensors": {**good["tensors"], "head": None}}
    for broken in ({"n_heads": 7}, {"hidden": 25}, {"context_length": 1 << 25}, {"qk_norm": "full"}, without_head):
        config = {**good["config"], **({} if "tensors" in broken else broken)}
        with pytest.raises(Error):
            sys.modules["llmcomp._cuda"].TransformerModel(
                device=0, config=config, tensors=broken.get("tensors", good["tensors"]), layers=good["layers"]
            )


def test_nothing_stays_on_the_device(emulated: emulated_device.Machine) -> None:
    before = emulated.bytes_in_use
    use_and_misuse()
    gc.collect()
    assert emulated.bytes_in_use == before


def test_the_benchmark_says_that_there_is_no_device() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(emulated_device.ROOT)}
    command = [sys.executable, "benchmarks/bench_cuda_engine.py"]
    done = subprocess.run(
        command, cwd=emulated_device.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("bench_cuda_engine: device 'cuda': ")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a driver")
def test_the_check_of_the_device_says_that_there_is_none() -> None:
    command = [str(emulated_device.ROOT / "benchmarks/cuda_check.sh"), "bench"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "cuda_check: nvidia-smi is not here: no NVIDIA driver, no device to check\n"

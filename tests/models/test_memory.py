"""Bounds on memory: what users write, what batches it allows, and batches that do not fit after all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TRAINING_TEXT, TinyModel

from llmcomp import load_model, score
from llmcomp.cli.main import main
from llmcomp.codec.windows import BatchRows
from llmcomp.errors import Error
from llmcomp.models import memory
from llmcomp.models.adapter import AdaptedModel
from llmcomp.models.memory import PassMemory, allowed_bytes, host_memory, is_out_of_memory, parse_memory

CHUNKS = [TRAINING_TEXT[at : at + 160] for at in range(0, 140, 20)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8_000_000_000),
        ("1.5 G", 1_500_000_000),
        ("500MiB", 524_288_000),
        ("64k", 64_000),
        ("1", 1),
        ("123456789", 123_456_789),
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("25%", 0.25),
        ("100%", 1.0),
    ],
)
def test_what_users_write(text: str, expected: float) -> None:
    found = parse_memory(text)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("text", ["", "8 gold", "-1", "0", "0.0", "1.5", "200%", "many%", "nan", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(Error, match="memory"):
        parse_memory(text)


def test_what_is_allowed() -> None:
    assert [allowed_bytes(given, 1000) for given in (None, 10, 0.25, "100B", "50%")] == [None, 10, 250, 100, 500]
    for wrong in (0, -5, 1.5, float("nan")):
        with pytest.raises(Error, match="max_memory"):
            allowed_bytes(wrong, 1000)


def test_rows_of_a_batch() -> None:
    """10 bytes a row, 100 whatever the rows, 500 of weights: 1,000 allowed leave 400, 40 rows."""
    asked = PassMemory(10, 100, 500, free_bytes=10_000, total_bytes=20_000, rows_max=600)
    assert asked.rows(1000) == 40
    assert asked.rows(0.05) == 40
    # 80 % of what is free, less 100: 790 rows, but more than 600 make nothing faster.
    assert asked.rows() == 600
    assert asked._replace(rows_max=10_000).rows() == 790
    assert asked._replace(free_bytes=300).rows(1000) == 14
    assert asked._replace(free_bytes=0).rows() == 1
    with pytest.raises(Error, match="max_memory is 600 bytes; the weights and the smallest batch take 610"):
        asked.rows(600)


def test_the_machine_s_memory(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = host_memory()
    assert 0 < free <= total
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert host_memory()[1] >= total
    (tmp_path / "memory.max").write_text("1000\n")
    assert host_memory() == (100, 1000)


def test_what_is_out_of_memory() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch and CuPy call theirs."""

    with pytest.raises(MemoryError) as caught:
        np.zeros(1 << 60, np.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("other"))


class Small(TinyModel):
    """A device that holds `limit` inputs at once, padding included."""

    def __init__(self, limit: int, error: BaseException, **options: Any) -> None:
        super().__init__(**options)
        self.limit, self.error = limit, error
        self.sizes: list[int] = []
        self.n_released = 0

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.sizes.append(np.size(tokens))
        if np.size(tokens) > self.limit:
            raise self.error
        return super().logits(tokens)

    def release_memory(self) -> None:
        self.n_released += 1


@pytest.mark.filterwarnings("ignore:.*tokens. the published protocol is cut there")
@pytest.mark.parametrize("protocol", ["lossless", "published"])
def test_a_batch_that_does_not_fit_is_halved(protocol: str) -> None:
    torch = pytest.importorskip("torch", reason="its error is what is met")
    expected = score(CHUNKS, TinyModel(context_length=200), protocol, progress=False)
    model = Small(400, torch.OutOfMemoryError("CUDA out of memory"), context_length=200)
    rows = score(CHUNKS, model, protocol, progress=False)
    assert rows.drop(columns=["seconds", "batch_rows"]).equals(expected.drop(columns=["seconds", "batch_rows"]))
    # Seven streams of 160; the published protocol does not need the last row. Seven fail, then three, which is too much
    # again, then one after the other.
    n_rows = 160 if protocol == "lossless" else 159
    assert model.sizes == [7 * n_rows, 3 * n_rows, *[n_rows] * 7]
    assert model.n_released == 2
    assert set(rows["batch_rows"]) == {160}


def test_the_same_inside_fused_engines() -> None:
    class Fused(Small):
        """As an engine: intervals made inside."""

        def intervals(
            self, tokens: np.ndarray, targets: np.ndarray, lengths: np.ndarray, vocab_size: int
        ) -> tuple[np.ndarray, ...]:
            from llmcomp import intervals

            return intervals(self.logits(tokens), targets, vocab_size)

    expected = score(CHUNKS, TinyModel(context_length=200), progress=False)
    rows = score(CHUNKS, Fused(400, MemoryError(), context_length=200), progress=False)
    assert rows["coded_bytes"].equals(expected["coded_bytes"])


def test_one_stream_that_does_not_fit_and_other_errors() -> None:
    with pytest.raises(Error, match="160 tokens at once need more memory"):
        score(CHUNKS, Small(100, MemoryError(), context_length=200), progress=False)
    with pytest.raises(RuntimeError, match="another"):
        score(CHUNKS, Small(100, RuntimeError("another fault"), context_length=200), progress=False)


def test_max_memory_bounds_the_batches_of_any_model() -> None:
    model = Small(10**9, MemoryError(), context_length=200)
    # 256 logits of float32 are 1,024 bytes a row.
    rows = score(CHUNKS, model, max_memory=330 * 1024, progress=False)
    assert max(model.sizes) == 320
    assert set(rows["batch_rows"]) == {330}
    assert rows["coded_bytes"].equals(score(CHUNKS, TinyModel(context_length=200), progress=False)["coded_bytes"])


@pytest.mark.parametrize("engine", ["exact", "torch"])
def test_max_memory_bounds_the_batches_of_engines(engine: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch", reason="the torch engine is an extra")
    model = load_model("pico-13k", engine=engine)
    asked = model.pass_memory()
    assert asked.row_bytes > 0 and asked.held_bytes >= 2 * model.n_params
    bound = asked.held_bytes + asked.fixed_bytes + 700 * asked.row_bytes
    assert BatchRows(AdaptedModel(model), True, None, bound).n == 700
    assert BatchRows(AdaptedModel(model), True).n == asked.rows_max
    rows = score(CHUNKS, model, max_memory=bound, progress=False)
    assert set(rows["batch_rows"]) == {700}
    with pytest.raises(Error, match="the weights and the smallest batch take"):
        score(CHUNKS, model, max_memory=1000, progress=False)


# In a process of its own, so that no memory from before is used again.
MEASURED = """
import re, sys
import numpy as np
from engine_models import make_config, make_weights
from llmcomp.models.engines.exact import ExactModel

n_streams, n_tokens = int(sys.argv[1]), int(sys.argv[2])
config = make_config(
    vocab_size=4099, hidden_size=320, num_attention_heads=5, intermediate_size=1280, max_position_embeddings=6000
)
model = ExactModel(config, make_weights(config))
tokens = np.arange(n_tokens)[None] % 4099
out = np.ones((n_streams, 4099), np.float32)
model.intervals(tokens[:, :9], tokens[:, :9]), model.session(n_streams, 9).step(tokens[0, :n_streams], None, out)

def status(name):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(name + r":\\s+(\\d+)", file.read())[1])

before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
if n_streams == 1:
    memory = model.pass_memory(n_tokens)
    planned = memory.fixed_bytes + n_tokens * memory.row_bytes
    model.intervals(tokens, tokens)
else:
    planned = model.session_memory(n_streams, n_tokens) - out.nbytes
    session = model.session(n_streams, n_tokens)
    for t in range(n_tokens):
        session.step(tokens[0, np.full(n_streams, t)], None, out)
print(planned, status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory to be read here")
@pytest.mark.parametrize(("n_streams", "n_tokens"), [(1, 6000), (40, 250)])
def test_what_is_taken_is_what_was_planned(n_streams: int, n_tokens: int) -> None:
    """A pass over one window, and steps of many streams: within a tenth."""
    command = [sys.executable, "-c", MEASURED, str(n_streams), str(n_tokens)]
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
    answer = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    planned, taken = map(int, answer.stdout.split())
    assert 0.9 * planned < taken < 1.02 * planned


def test_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["score", "pico-13k", "--dataset", "text", "--chunks", "2", "-q", "--json"]
    assert main([*given, "--max-memory", "200MB"]) == 0
    (bounded,) = json.loads(capsys.readouterr().out)
    assert main(given) == 0
    (free,) = json.loads(capsys.readouterr().out)
    assert bounded == free
    assert main([*given, "--max-memory", "1kB"]) == 1
    assert "max_memory is 1,000 bytes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--max-memory", "much"])

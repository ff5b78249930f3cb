"""What several test files share: the threads of a worker's libraries, and fixtures. Builders and oracles have files of
their own; what one file needs stays there."""

from __future__ import annotations

import os

# Workers (pytest-xdist) share the processors; what is about threads sets its own number. Read when libraries load.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LLMCOMP_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "")

import gc
from collections.abc import Iterator
from pathlib import Path

import emulated_device
import pytest
from hub_server import Hub, write_checkpoint
from real_data import DATA

import llmcomp
from llmcomp import pico
from llmcomp.data.tokenizers import Tokenizer


@pytest.fixture(params=[name for name in llmcomp.backends() if name != "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the processor's backends in turn, in use."""
    with llmcomp.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of 262 tokens at steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("suite") / "tiny"
    for step in (1, 2, 3):
        write_checkpoint(folder / f"step{step}", seed=step)
    return folder


@pytest.fixture(scope="session")
def pico_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(pico.tokenizer_path())


@pytest.fixture(scope="session")
def pythia_tokenizer() -> Tokenizer:
    """Pythia's, from the real sample files."""
    path = DATA / "pythia-20B_tokenizer.json"
    if not path.exists():
        pytest.skip(f"no {path.name} in {DATA}")
    return Tokenizer.from_file(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of its own with an empty cache; huggingface_hub reads the environment only when it is imported."""
    from huggingface_hub import constants, file_download

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):  # which of them is read depends on the version
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def three_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sizes at three steps: enough for a law."""
    folder = tmp_path_factory.mktemp("models")
    for number, width in enumerate((16, 32, 48)):
        for step in (1, 10, 100):
            name = folder / f"tiny-{width}" / f"step{step}"
            write_checkpoint(name, seed=100 * number + step, hidden_size=width, intermediate_size=4 * width)
    return folder


@pytest.fixture(scope="module")
def machine() -> Iterator[emulated_device.Machine | None]:
    """The emulated device, in use; None where this machine has a device."""
    if emulated_device.has_device():
        yield None
        return
    path = emulated_device.build()
    with pytest.MonkeyPatch.context() as patch:
        yield emulated_device.install(patch, path)


@pytest.fixture
def emulated(machine: emulated_device.Machine | None) -> Iterator[emulated_device.Machine]:
    """The emulated device, as it was again afterwards."""
    if machine is None:
        pytest.skip("only the emulated device tells, or lets itself be changed")
    gc.collect()
    names = ("driver_version", "n_devices", "major", "memory_bytes", "pitch_max", "reads_host_memory")
    before = {name: getattr(machine, name) for name in names}
    yield machine
    for name, value in before.items():
        setattr(machine, name, value)

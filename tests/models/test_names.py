"""What a name means: the registry, the hub or a folder, whoever wrote it, and that no model's code runs unasked."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hub_server import Hub, neox_files, write_checkpoint
from planted import REGISTERED, STEP, archive_that_names, plant_folder, stranger_environment

import llmcomp
from llmcomp import compress, decompress, generate
from llmcomp.errors import Error, ModelMismatch
from llmcomp.models.hub import DownloadNeeded
from llmcomp.models.load import load_model
from llmcomp.models.sources import find_model, find_registered


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return tmp_path


# Names that a user gives.


def test_a_name_of_the_registry_is_not_a_folder_in_the_working_directory(here: Path) -> None:
    write_checkpoint(here / "pico-13k", seed=1)
    with pytest.warns(UserWarning, match=r"pico-13k is taken for .* registry; the folder is called \./pico-13k$"):
        found = find_model("pico-13k")
    assert found.step == 2048
    # However a folder is named as one, it is that folder, and there is nothing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (Path("pico-13k"), "./pico-13k", str(here / "pico-13k"), f"../{here.name}/pico-13k"):
            assert find_model(name).folder.resolve() == here / "pico-13k"


@pytest.mark.parametrize("name", [REGISTERED, "pythia-70m", "org/tiny-neox"])
def test_a_name_of_the_hub_is_not_a_folder_in_the_working_directory(name: str, here: Path, hub: Hub) -> None:
    write_checkpoint(here / name, seed=1)
    repo = name if "/" in name else REGISTERED
    for revision in ("main", f"step{STEP}"):
        hub.add(repo, revision, neox_files(2))
    with pytest.warns(UserWarning, match=rf"the folder is called \./{name}$"):
        found = find_model(name)
    assert (found.repo, found.folder) == (repo, None)
    assert find_model(f"./{name}").repo is None


def test_what_has_no_form_of_a_name_may_be_a_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    for name in ("mine", "a/b/c", "with space", "models/"):
        write_checkpoint(here / name, seed=1)
        assert find_model(name).folder.resolve() == here / name
    assert find_model("~/mine").folder == here / "mine"
    with pytest.raises(Error, match="found nothing"):
        find_model(Path("pico-13k"))


# Names that a file gives.


@pytest.mark.parametrize("name", ["mine", "./mine", "org/tiny-neox", "pythia-70m", "../mine", "~/mine"])
def test_a_name_in_an_archive_is_a_whole_name_of_the_registry(name: str, here: Path, hub: Hub) -> None:
    plant_folder(here / "mine", here / "marker")
    plant_folder(here / name.replace("~", "home"), here / "marker")
    hub.add("org/tiny-neox", "main", neox_files(1))
    for engine in ("exact", "torch"):
        with pytest.raises(Error, match="neither bundled nor in the registry"):
            decompress(archive_that_names(name, None, engine), download=True)
    with pytest.raises(Error, match="no model of the registry"):
        find_registered(name, download=True)
    assert hub.requests == [] and not (here / "marker").exists()


def test_a_revision_in_an_archive_is_a_step(here: Path, hub: Hub) -> None:
    for step in ("../main", "1000/../../x", "٣", "-1"):
        with pytest.raises(Error, match="neither bundled nor in the registry"):
            decompress(archive_that_names(REGISTERED, step), download=True)
    assert hub.requests == []


def test_a_bundled_name_in_an_archive_is_the_bundled_model(here: Path) -> None:
    blob = compress(b"It was a bright cold day in April. " * 20, "pico-13k", stock=False)
    plant_folder(here / "pico-13k", here / "marker")
    assert decompress(blob) == b"It was a bright cold day in April. " * 20
    with pytest.raises(ModelMismatch):
        decompress(archive_that_names("pico-13k", 2048, "exact"))
    assert not (here / "marker").exists()


# Downloads.


def test_decompressing_downloads_only_with_a_word(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(REGISTERED, "step1000", neox_files(7))
    model = load_model(REGISTERED, 1000)
    content = generate(model, 600, temperature=0.01)  # likely, so that it is coded and not stored
    blob = compress(content, model, stock=False)
    hub.requests.clear()
    assert decompress(blob) == content  # from the cache
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "empty"))
    with pytest.raises(DownloadNeeded, match=rf"{REGISTERED} step 1000 .*about 0\.14 GB.*--download.*download=True"):
        decompress(blob)
    with pytest.raises(DownloadNeeded):
        llmcomp.open(io.BytesIO(blob))
    assert hub.requests == []
    with llmcomp.open(io.BytesIO(blob), download=True) as file:
        assert file.read() == content
    assert hub.downloads("model.safetensors") > 0


def test_a_cache_that_is_not_whole_needs_a_download(here: Path, hub: Hub) -> None:
    from huggingface_hub import constants

    hub.add(REGISTERED, "step1000", neox_files(7))
    find_model(REGISTERED, 1000)  # fetches config.json alone
    hub.requests.clear()
    with pytest.raises(DownloadNeeded):
        find_registered(REGISTERED, 1000)
    find_registered(REGISTERED, 1000, download=True).fetch()
    hub.requests.clear()
    found = find_registered(REGISTERED, 1000)
    assert found.identity and found.bytes_to_download == 0 and hub.requests == []
    next(Path(constants.HF_HUB_CACHE).rglob("tokenizer.json")).unlink()
    with pytest.raises(DownloadNeeded):
        find_registered(REGISTERED, 1000)
    with pytest.raises(Error, match="no step 1001"):
        find_registered(REGISTERED, 1001)


# Code of a model.

LOAD = "from llmcomp import load_model; load_model({folder!r}, engine='torch'{more}).logits([[1, 2]])"


@pytest.mark.parametrize(("more", "runs"), [("", False), (", trust_remote_code=True", True)])
def test_code_of_a_folder_runs_only_on_demand(more: str, runs: bool, tmp_path: Path, hub: Hub) -> None:
    pytest.importorskip("transformers", reason="the torch engine is an extra")
    folder, marker = plant_folder(tmp_path / "model", tmp_path / "marker"), tmp_path / "marker"
    env = stranger_environment(tmp_path, hub.endpoint)
    program = LOAD.format(folder=str(folder), more=more)
    answer = subprocess.run(
        [sys.executable, "-c", program], input=b"y\n" * 9, capture_output=True, env=env, timeout=120, check=False
    )
    assert marker.exists() == runs, answer.stderr
    assert (answer.returncode == 0) == runs, answer.stderr
    assert b"y/N" not in answer.stdout + answer.stderr and hub.requests == []
    if not runs:
        assert b"the model needs code of its own, which is not run" in answer.stderr


@pytest.mark.parametrize("engine", ["exact", "exact-int8"])
def test_only_the_torch_engine_runs_code(engine: str) -> None:
    with pytest.raises(Error, match="runs no code of a model"):
        load_model("pico-13k", engine=engine, trust_remote_code=True)
    with pytest.raises(Error, match="expected True or False"):
        load_model("pico-13k", engine=engine, trust_remote_code="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        ({"_attn_implementation": "stranger/kernel"}, "_attn_implementation"),
        ({"parts": [{"decoder": {"experts_implementation": "stranger/kernel@main"}}]}, "experts_implementation"),
    ],
)
def test_what_would_be_fetched_and_run_is_refused(changes: dict[str, object], name: str, here: Path) -> None:
    pytest.importorskip("transformers", reason="the torch engine is an extra")
    folder = write_checkpoint(here / "model", 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(Error, match=rf"config\.json has {name}"):
        load_model(folder, engine="torch")


def test_an_adapter_is_refused(here: Path) -> None:
    pytest.importorskip("transformers", reason="the torch engine is an extra")
    folder = write_checkpoint(here / "model", 1)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "stranger/model"}')
    with pytest.raises(Error, match=r"adapter_config\.json names another model"):
        load_model(folder, engine="torch")


def test_a_pickle_runs_no_code(here: Path) -> None:
    torch = pytest.importorskip("torch", reason="pickled weights are read by torch")
    marker = here / "marker"

    class Planted:
        def __reduce__(self) -> tuple[object, tuple[Path, str]]:
            return Path.write_text, (marker, "ran")

    folder = write_checkpoint(here / "model", 1)
    (folder / "model.safetensors").unlink()
    torch.save({"gpt_neox.embed_in.weight": Planted()}, folder / "pytorch_model.bin")
    for engine in ("exact", "torch"):
        with pytest.raises(Error, match=r"pytorch_model|transformers"):
            load_model(folder, engine=engine)
    from llmcomp.models.engines.torch_weights import read_host_weights

    with pytest.raises(Error, match="expected a pickle of nothing but tensors"):
        read_host_weights(folder)
    assert not marker.exists()

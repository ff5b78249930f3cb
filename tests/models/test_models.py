"""Names to models: the registry, folders, the hub's layout on 127.0.0.1, offline, and every kind of wrong name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub, neox_config, neox_files, neox_tensors, write_checkpoint
from safetensors.numpy import save

from llmcomp import compress, decompress, pico, score
from llmcomp.errors import Error
from llmcomp.models import protocol
from llmcomp.models.hub import HubUnreachable
from llmcomp.models.load import load_model
from llmcomp.models.registry import list_models
from llmcomp.models.selection import select
from llmcomp.models.sources import find_model
from llmcomp.models.suite import load_suite
from llmcomp.scoring.baselines import random_models

REPO = "org/tiny-neox"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    # Before version 1 a session, once made, stays as it was.
    forget_sessions = getattr(_http, "reset_sessions", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    yield
    forget_sessions()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_registry_holds_the_published_grid_and_the_bundled_suite() -> None:
    known = {entry.name: entry for entry in list_models()}
    assert set(pico.SUITE_NAMES) <= set(known)
    assert known["EleutherAI/pythia-1.4b"].params == 1_414_647_808
    assert known["EleutherAI/pythia-1.4b"].nominal == 1_400_000_000
    # Biderman et al. 2023: 154 checkpoints a model.
    assert len(known["EleutherAI/pythia-70m"].steps) == 154
    grid = select(load_suite("pythia"))
    assert {checkpoint.model.size for checkpoint in grid} == {"70m", "160m", "410m", "1b", "1.4b"}
    assert {checkpoint.step for checkpoint in grid} == {1000, 8000, 32000, 128000, 143000}
    assert len(grid) == 25
    assert all(checkpoint.step in known[checkpoint.name].steps for checkpoint in grid)


@pytest.mark.parametrize(
    ("name", "step", "words"),
    [
        ("pythia-71m", None, ["pythia-71m", "EleutherAI/pythia-70m"]),
        ("pico-14k", None, ["pico-14k", "pico-13k"]),
        ("pico-13k", 100, ["pico-13k", "100", "128"]),
        ("EleutherAI/pythia-70m", 1430, ["1430", "1000", "2000"]),
        ("pythia-70m", 143001, ["143000"]),
        ("./no-such-folder", None, ["no-such-folder"]),
        ("/no/such/folder", 5, ["/no/such/folder"]),
        ("a" * 5000, None, ["no model is called"]),
        ("/" + "a" * 5000, None, ["found nothing"]),
        ("pico-13k", "128", ["'128'", "integer"]),
        ("pico-13k", 128.0, ["128.0", "integer"]),
    ],
)
def test_unknown_names_and_steps_say_what_there_is(name: str, step: int | None, words: list[str]) -> None:
    with pytest.raises(Error) as error:
        find_model(name, step)
    message = str(error.value)
    assert all(word in message for word in words)
    assert "\n" not in message


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    with pytest.raises(Error, match="a file, not a folder"):
        find_model(file)


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"model-\xff")
    write_checkpoint(folder, 1)
    model = load_model(folder)
    assert model.name == "model-\ufffd"
    assert decompress(compress(b"text" * 99, model), model) == b"text" * 99
    assert score([b"text"], model, progress=False)["model"].tolist() == [model.name]


def test_folder_of_steps(tmp_path: Path) -> None:
    suite = tmp_path / "tiny"
    for step in (8, 64):
        write_checkpoint(suite / f"step{step}", seed=step)
    last, first = find_model(suite), find_model(suite, 8)
    assert (last.name, last.step, first.step) == ("tiny", 64, 8)
    assert first.identity != last.identity
    assert find_model(suite / "step8").step == 8
    assert find_model(str(suite / "step8")).identity == first.identity
    with pytest.raises(Error, match=r"no step 9; the nearest are 8, 64"):
        find_model(suite, 9)
    with pytest.raises(Error, match="no step 9"):
        find_model(suite / "step8", 9)


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    here, there = write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 1)
    assert find_model(here).identity == find_model(there).identity
    before = find_model(there)
    assert before.identity == find_model(here).identity
    (there / "config.json").write_text(json.dumps(neox_config(rotary_pct=0.5)))
    after = find_model(there)
    assert after.identity != before.identity
    assert after.weights_digest == before.weights_digest


def test_links_in_a_folder_of_anybody_say_nothing_of_the_content(tmp_path: Path) -> None:
    """As in the hub's cache, where a link's target is named by the digest; here whoever made the folder named it."""
    sources = []
    for seed in (1, 2):
        folder = write_checkpoint(tmp_path / str(seed) / "snapshot", seed)
        (tmp_path / str(seed) / "blobs").mkdir()
        blob = tmp_path / str(seed) / "blobs" / ("0" * 64)
        (folder / "model.safetensors").rename(blob)
        (folder / "model.safetensors").symlink_to(Path("../blobs") / blob.name)
        sources.append(find_model(folder))
    assert sources[0].weights_digest != sources[1].weights_digest
    assert sources[0].identity != sources[1].identity


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no config.json"),
        ({"config.json": b"{}"}, "no weights"),
        ({"config.json": b"{}", "model-00001-of-00002.safetensors": b""}, "no weights"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b""},
            "1 of 2 shards",
        ),
    ],
)
def test_incomplete_folders(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(Error, match=words):
        find_model(tmp_path)


def test_another_architecture_is_refused_before_anything_is_downloaded(hub: Hub) -> None:
    hub.add(REPO, "main", {**neox_files(1), "config.json": json.dumps({"model_type": "mamba"}).encode()})
    with pytest.raises(Error, match=r"'mamba'.*computes gpt_neox, gpt2"):
        load_model(REPO, engine="exact")
    assert hub.downloads("model.safetensors") == 0


@pytest.mark.parametrize("config", [b"{", b"[]", b"\xff"])
def test_broken_config(tmp_path: Path, config: bytes) -> None:
    write_checkpoint(tmp_path, 1)
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(Error, match=r"config\.json"):
        load_model(tmp_path)


def test_hub_revision_by_step(hub: Hub) -> None:
    files = {step: neox_files(step) for step in (1000, 8000)}
    for step, content in files.items():
        hub.add(REPO, f"step{step}", content)
    source = find_model(REPO, 8000)
    expected = sum(len(files[8000][name]) for name in ("tokenizer.json", "model.safetensors"))
    assert source.bytes_to_download == expected
    assert hub.downloads("model.safetensors") == 0
    folder = source.fetch()
    assert (folder / "model.safetensors").read_bytes() == files[8000]["model.safetensors"]
    again = find_model(REPO, 8000)
    assert again.identity == source.identity
    assert again.bytes_to_download == 0


def test_only_the_needed_files_are_downloaded(hub: Hub) -> None:
    hub.add(REPO, "main", {**neox_files(1), "pytorch_model.bin": b"pickled", "README.md": b"#", "optimizer.pt": b"o"})
    folder = find_model(REPO).fetch()
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}


def test_random_models_beside_a_hub_s_model_need_no_weights(hub: Hub) -> None:
    files = neox_files(1)
    hub.add(REPO, "main", files)
    source = find_model(REPO)
    path = source.find_tokenizer()
    assert path is not None and path.read_bytes() == files["tokenizer.json"]
    weights, distribution = random_models(source)
    assert weights.logits([[0, 1, 2]]).shape == (1, 3, json.loads(files["config.json"])["vocab_size"])
    assert weights.vocab_size == distribution.vocab_size
    assert hub.downloads("model.safetensors") == 0


def test_shards(hub: Hub) -> None:
    tensors = neox_tensors(neox_config(), 1)
    names = sorted(tensors)
    halves = [{name: tensors[name] for name in part} for part in (names[:7], names[7:])]
    shard_names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = neox_files(1)
    del files["model.safetensors"]
    weight_map = {name: shard for shard, half in zip(shard_names, halves, strict=True) for name in half}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    hub.add(REPO, "main", {**files, **dict(zip(shard_names, map(save, halves), strict=True))})
    folder = find_model(REPO).fetch()
    assert {*shard_names, "model.safetensors.index.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.skipif(
    version("huggingface_hub").startswith("0."),
    reason="before version 1 it gives up, and a second call goes on",
)
def test_a_cut_connection_is_taken_up_where_it_ended(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    files = neox_files(1)
    hub.add(REPO, "main", files)
    source = find_model(REPO)
    hub.cut_after_bytes = 20_000
    folder = source.fetch()
    assert sha256((folder / "model.safetensors").read_bytes()) == sha256(files["model.safetensors"])
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    # Four whole blocks of the 20,000 bytes are kept.
    assert ranges == [None, "bytes=16384-"]


def test_offline_from_the_cache(hub: Hub, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(REPO, "step5", neox_files(1))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = find_model(REPO, 5)
    online.fetch()
    hub.close()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = find_model(REPO, 5)
    assert cached.identity == online.identity
    assert cached.bytes_to_download == 0
    assert hub.requests == []


def test_offline_without_cache_says_so(hub: Hub, offline: None) -> None:
    with pytest.raises(HubUnreachable, match=r"not in the cache .* HF_HUB_OFFLINE is set"):
        find_model(REPO, 5)


def test_the_cache_folder_is_a_model_folder_too(hub: Hub, tmp_path: Path) -> None:
    for step in (1, 2):
        hub.add(REPO, f"step{step}", neox_files(step))
        find_model(REPO, step).fetch()
    cache = tmp_path / "cache" / "models--org--tiny-neox"
    found = find_model(cache, 2)
    assert (found.name, found.step) == (REPO, 2)
    assert found.identity == find_model(REPO, 2).identity
    with pytest.raises(Error, match="holds no revision 'step3'; it holds step1, step2"):
        find_model(cache, 3)


def test_missing_repository_revision_and_gate(hub: Hub) -> None:
    hub.add(REPO, "step1", neox_files(1))
    with pytest.raises(Error, match="has no model org/other"):
        find_model("org/other")
    with pytest.raises(Error, match="step2: the hub has no such revision"):
        find_model(REPO, 2)
    hub.add("org/empty", "main", {"README.md": b"#"})
    with pytest.raises(Error, match=r"holds no config\.json"):
        find_model("org/empty")
    hub.token = "hf_secret"
    with pytest.raises(Error, match=r"gated.*HF_TOKEN"):
        find_model(REPO, 1)


def test_the_environment_is_respected(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_TOKEN and HF_HOME, as a user sets them: in another process."""
    server = Hub()
    server.add(REPO, "step7", neox_files(7))
    server.token = "hf_secret"
    code = f"from llmcomp.models.sources import find_model; print(find_model({REPO!r}, 7).fetch())"
    environment = {
        **os.environ,
        **{"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
    }
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    server.close()
    assert answer.returncode == 0, answer.stderr
    assert Path(answer.stdout.strip()).is_relative_to(tmp_path)


def test_equal_weights_have_equal_digests(hub: Hub) -> None:
    files = neox_files(1)
    for step, content in ((1, files), (2, files), (3, neox_files(3))):
        hub.add(REPO, f"step{step}", content)
    digests = [find_model(REPO, step).weights_digest for step in (1, 2, 3)]
    assert digests[0] == digests[1] != digests[2]
    assert hub.downloads("model.safetensors") == 0


class TableModel:
    """The smallest thing that is a model."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.zeros((*np.shape(tokens), 256), np.float32)

    def session(self, n_streams: int) -> object:
        return object()


def test_objects_pass_through() -> None:
    model = TableModel()
    assert load_model(model) is model
    assert isinstance(model, protocol.Model)
    with pytest.raises(Error, match=r"a list is no model: it has no logits\(\) and no session\(\)"):
        load_model([1])


def test_options_that_an_engine_does_not_have() -> None:
    with pytest.raises(Error, match="no choice of dtype, attention"):
        load_model("pico-13k", device="cpu", dtype="float16", attention="eager")
    with pytest.raises(Error, match="no device is called 'tpu'; expected cpu, cuda or cuda:N"):
        load_model("pico-13k", device="tpu")
    with pytest.raises(Error, match="no engine is called 'jax'"):
        load_model("pico-13k", engine="jax")


def test_without_torch_the_engine_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import llmcomp; llmcomp.load_model('pico-13k', engine='torch')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "llmcomp.errors.Error" in answer.stderr
    assert "pip install llmcomp-exact[torch]" in answer.stderr.splitlines()[-1]


def test_bundled_models_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import llmcomp; print(llmcomp.load_model('pico-13k').step)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == "2048", answer.stderr


@pytest.mark.parametrize("commit", [b"../../elsewhere", b"/etc", b"", b"a\0b", b"\xff\xfe", b"..", b"x" * 5000])
def test_a_ref_of_a_cache_leads_nowhere_else(tmp_path: Path, commit: bytes) -> None:
    cache = tmp_path / "models--org--tiny"
    write_checkpoint(cache / "snapshots" / "c0ffee", seed=1)
    write_checkpoint(tmp_path / "elsewhere", seed=1)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_bytes(b"c0ffee\n")
    assert find_model(cache).name == "org/tiny"
    (cache / "refs" / "main").write_bytes(commit)
    with pytest.raises(
        Error, match=r"refs/main: (found .*, expected the name of a commit|found 5,000 bytes)|no revision"
    ):
        find_model(cache)


def test_a_home_folder_of_nobody_is_no_folder() -> None:
    with pytest.raises(Error, match="no model folder at ~nobody-of-this-name/model: found nothing"):
        find_model("~nobody-of-this-name/model")

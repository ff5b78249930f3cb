"""Checking revisions against a hub on 127.0.0.1 with planted faults, and the lock: nothing large is ever downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, neox_files
from safetensors.numpy import save

from llmcomp.cli import main
from llmcomp.errors import Error
from llmcomp.models import hub as hub_module
from llmcomp.models.check import Report, check_revisions, find_checkpoints
from llmcomp.models.lock import Lock, LockedFile, LockedRevision, read_lock, write_lock
from llmcomp.models.sources import find_checkpoint

REPO = "me/tiny-s"
STEPS = (1, 2, 4, 8)


@pytest.fixture
def suite(tmp_path: Path) -> str:
    content = {
        "suite": "mine",
        "family": "gpt_neox",
        "repository": "me/tiny-{size}",
        "revisions": [{"name": "step{step}", "steps": list(STEPS)}],
        "models": [{"size": "s"}],
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    return str(path)


def sharded(seed: int, n_shards: int = 2) -> dict[str, bytes]:
    """A checkpoint whose weights lie in shards of which every one depends on the seed."""
    import numpy as np

    files = neox_files(seed)
    del files["model.safetensors"]
    shards = {
        f"model-{k + 1:05}-of-{n_shards:05}.safetensors": save({f"w{k}": np.full((4, 4), 10 * seed + k, np.float32)})
        for k in range(n_shards)
    }
    places = {f"w{k}": name for k, name in enumerate(shards)}
    return files | shards | {"model.safetensors.index.json": json.dumps({"weight_map": places}).encode()}


def check(suite: str, old: Lock | None = None, **words: Any) -> Report:
    return check_revisions(find_checkpoints(suite, **words), old, progress=False)


def kinds(report: Report) -> list[str]:
    return [fault.kind for fault in report.faults]


def questions(hub: Hub) -> int:
    """Requests about models; huggingface_hub has others of its own."""
    return sum(path.startswith("/api/models/") for _, path, _ in hub.requests)


def no_weights_were_sent(hub: Hub) -> bool:
    return not any(path.startswith("/cdn") or path.endswith(".safetensors") for _, path, _ in hub.requests)


def test_a_suite_without_fault(hub: Hub, suite: str) -> None:
    commits = [hub.add(REPO, f"step{step}", neox_files(step)) for step in STEPS]
    report = check(suite)
    assert report.faults == [] and "4 revisions, no fault" in str(report)
    assert [locked.commit for locked in report.lock.revisions[REPO].values()] == commits
    # One request for the branches, one for whether the model is gated, one a revision.
    assert questions(hub) == 2 + len(STEPS)
    assert no_weights_were_sent(hub)


def test_equal_weights_are_named(hub: Hub, suite: str) -> None:
    """As in EleutherAI/pythia #205: some branches serve the weights of a later one, other files differ."""
    for step in STEPS:
        hub.add(REPO, f"step{step}", neox_files(9 if step in (1, 4) else step) | {"README.md": b"%d" % step})
    report = check(suite)
    (fault,) = report.faults
    assert (fault.kind, fault.labels) == ("equal weights", (f"{REPO} step1", f"{REPO} step4"))
    assert "equal weights: me/tiny-s step1, me/tiny-s step4" in str(report)
    assert no_weights_were_sent(hub)


def test_one_shard_of_another_revision_is_named(hub: Hub, suite: str) -> None:
    """As in EleutherAI/pythia #206: the first shard of two branches is the last checkpoint's."""
    of_last = {name: data for name, data in sharded(8).items() if name.startswith("model-00001")}
    for step in STEPS:
        hub.add(REPO, f"step{step}", sharded(step) | (of_last if step == 2 else {}))
    report = check(suite)
    (fault,) = report.faults
    assert fault.kind == "shared file"
    assert [label.split()[1:] for label in fault.labels] == [
        ["step2", "model-00001-of-00002.safetensors"],
        ["step8", "model-00001-of-00002.safetensors"],
    ]


def test_missing_revisions_and_files_are_named(hub: Hub, suite: str) -> None:
    without_shard = sharded(2)
    del without_shard["model-00002-of-00002.safetensors"]
    hub.add(REPO, "step1", neox_files(1))
    hub.add(REPO, "step2", without_shard)
    hub.add(REPO, "step8", {"README.md": b"soon"})
    report = check(suite)
    told = {fault.labels: (fault.kind, fault.detail) for fault in report.faults}
    assert told[f"{REPO} step4",] == ("missing revision", f"the hub has no such revision; {REPO} has 3")
    assert told[f"{REPO} step2",] == ("missing files", "holds 1 of 2 shards of model.safetensors")
    assert told[f"{REPO} step8",][0] == "missing files" and "no config.json" in told[f"{REPO} step8",][1]
    assert len(told) == 3
    assert list(report.lock.revisions[REPO]) == ["step1"]


def test_changes_since_a_lock(hub: Hub, suite: str) -> None:
    for step in STEPS:
        hub.add(REPO, f"step{step}", neox_files(step))
    old = check(suite).lock
    hub.add(REPO, "step2", neox_files(99))
    hub.add(REPO, "step4", neox_files(4) | {"README.md": b"now with a card"})
    hub.requests.clear()
    report = check(suite, old)
    (fault,) = report.faults
    assert (fault.kind, fault.labels) == ("changed", (f"{REPO} step2",))
    assert fault.detail.endswith("model.safetensors") and "config.json" not in fault.detail
    assert len(report.notes) == 1 and "me/tiny-s step4" in report.notes[0] and "same files" in report.notes[0]
    # What stands at the same commit is not asked for again.
    assert questions(hub) == 2 + 2


def test_another_model_under_the_name_is_told_by_its_size(hub: Hub, suite: str, tmp_path: Path) -> None:
    content = json.loads(Path(suite).read_text())
    content["models"][0]["n_params"] = 11_872
    path = tmp_path / "counted.json"
    path.write_text(json.dumps(content))
    for step in STEPS:
        wide = {"hidden_size": 64, "intermediate_size": 256} if step == 4 else {}
        hub.add(REPO, f"step{step}", neox_files(step, **wide))
    (fault,) = check(str(path)).faults
    assert (fault.kind, fault.labels) == ("other size", (f"{REPO} step4",))
    assert "11,872 parameters" in fault.detail


def test_a_gated_model_is_named_once(hub: Hub, suite: str) -> None:
    for step in STEPS:
        hub.add(REPO, f"step{step}", neox_files(step))
    hub.gated.add(REPO)
    report = check(suite)
    (fault,) = report.faults
    assert fault.kind == "gated" and len(fault.labels) == len(STEPS)
    assert "accept its terms at" in fault.detail and "HF_TOKEN" in fault.detail
    assert no_weights_were_sent(hub)


def test_a_model_that_is_not_there(hub: Hub, suite: str) -> None:
    report = check(suite)
    (fault,) = report.faults
    assert fault.kind == "unreachable" and "no model me/tiny-s" in fault.detail


def test_limits_of_requests_are_waited_for(hub: Hub, suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in STEPS:
        hub.add(REPO, f"step{step}", neox_files(step))
    waits: list[float] = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    hub.busy = [429, 429, 503]
    assert check(suite).faults == []
    assert hub.busy == []
    # The hub says "Retry-After: 0".
    assert set(waits) <= {0.0}
    hub.busy = [429] * 1000
    report = check(suite)
    assert kinds(report) == ["unreachable"]
    assert "limits requests (429)" in report.faults[0].detail


def test_any_model_on_the_hub(hub: Hub) -> None:
    for name, seed in (("main", 3), ("step1", 1), ("step2", 1), ("gguf", 5)):
        hub.add("org/other", name, neox_files(seed))
    report = check("org/other")
    assert report.n_revisions == 2
    assert kinds(report) == ["equal weights"]
    assert check("org/other", steps="2").n_revisions == 1
    hub.add("org/plain", "main", neox_files(1))
    assert check("org/plain").n_revisions == 1
    with pytest.raises(Error, match="no suite, no file of one and no model"):
        find_checkpoints("other")
    with pytest.raises(Error, match="is not on the hub"):
        check("pico")


def test_the_command(hub: Hub, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in STEPS:
        hub.add(REPO, f"step{step}", neox_files(step))
    path = tmp_path / "models.lock"
    assert main(["models", "check", suite, "--lock", str(path), "-q"]) == 0
    assert "4 revisions, no fault" in capsys.readouterr().out
    before = path.read_bytes()
    hub.add(REPO, "step8", neox_files(1))
    assert main(["models", "check", suite, "--lock", str(path), "-q", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert sorted(fault["kind"] for fault in found["faults"]) == ["changed", "equal weights"]
    assert path.read_bytes() == before
    assert main(["models", "check", suite, "--lock", str(path), "-q", "--update", "--steps", "8"]) == 1
    assert read_lock(path).revisions[REPO]["step8"] != read_lock(path).revisions[REPO]["step4"]
    assert main(["models", "check", suite, "--lock", str(path), "-q", "--steps", "8"]) == 0
    assert main(["models", "check", suite, "--steps", "3"]) == 1
    assert "no step 3" in capsys.readouterr().err


def test_a_lock_is_asked_instead_of_the_hub(hub: Hub, suite: str) -> None:
    for step in STEPS:
        hub.add(REPO, f"step{step}", neox_files(step))
    lock = check(suite).lock
    hub.add(REPO, "step4", neox_files(99))
    hub.requests.clear()
    sources = [find_checkpoint(checkpoint, lock=lock) for checkpoint in find_checkpoints(suite)]
    assert questions(hub) == 0
    n_bytes = [sum(map(len, neox_files(step).values())) for step in STEPS]
    assert [source.bytes_to_download for source in sources] == n_bytes
    # The pinned commit is what is downloaded, though the branch has moved on.
    folder = sources[2].fetch()
    assert (folder / "model.safetensors").read_bytes() == neox_files(4)["model.safetensors"]


def test_content_that_is_not_what_was_stated_is_not_kept(hub: Hub, suite: str) -> None:
    files = neox_files(1)
    hub.add(REPO, "step1", files)
    (checkpoint, *_) = find_checkpoints(suite)
    source = find_checkpoint(checkpoint)
    digest = next(file.digest for file in source.files if file.name == "model.safetensors")
    assert digest is not None
    whole = files["model.safetensors"]
    hub.corrupt[digest] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(Error, match=rf"step 1: model.safetensors arrived with .* expected {digest}; nothing of it"):
        source.fetch()
    del hub.corrupt[digest]
    folder = source.fetch()
    assert (folder / "model.safetensors").read_bytes() == whole
    # A file that a crash has cut off is not trusted, and is fetched again; the others are not.
    (folder / "model.safetensors").resolve().write_bytes(whole[:1000])
    hub.requests.clear()
    assert (source.fetch() / "model.safetensors").read_bytes() == whole
    assert hub.downloads("tokenizer.json") == 0


def test_locks_are_written_whole_and_read_strictly(tmp_path: Path) -> None:
    lock = Lock()
    lock.put("a/b", "step1", LockedRevision("c1", {"config.json": LockedFile(5, "d1"), "model.bin": LockedFile(7, "")}))
    lock.put("a/b", "step2", LockedRevision("c2", {}))
    lock.put("z/z", "main", LockedRevision("c3", {}))
    path = tmp_path / "below" / "models.lock"
    write_lock(path, lock)
    assert read_lock(path) == lock
    assert [entry.name for entry in path.parent.iterdir()] == ["models.lock"]
    for step in (10, 2, 1):
        lock.put("many", f"step{step}", LockedRevision("c", {}))
    write_lock(path, lock)
    assert list(read_lock(path).revisions["many"]) == ["step1", "step2", "step10"]
    newer = Lock({"a/b": {"step2": LockedRevision("c4", {})}})
    assert lock.merged(newer).get("a/b", "step2") == LockedRevision("c4", {})
    assert lock.merged(newer).get("a/b", "step1") == lock.get("a/b", "step1")
    for content, words in (
        ("{", "no valid JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "expected a JSON object, found list"),
        ('{"format": 2}', "format is 2, expected 1"),
        ('{"format": 1, "models": {"a/b": {"s": ["c", {"x": [1e400, "d"]}]}}}', "bytes and digest of x"),
        ('{"format": 1, "models": {"a/b": {"s": ["c", {"x\\u0000": [1, "d"]}]}}}', "found 'x.x00'"),
        ('{"format": 1}', "not a lock"),
        ('{"format": 1, "models": {"a/b": {"s": [1, {}]}}}', "not a lock"),
        ('{"format": 1, "models": {"a/b": {"s": ["c", {"../x": [1, "d"]}]}}}', "'../x'"),
        ('{"format": 1, "models": {"a/b": {"s": ["c", {"x": [-1, "d"]}]}}}', "-1"),
    ):
        path.write_text(content)
        with pytest.raises(Error, match=words):
            read_lock(path)
    with pytest.raises(Error, match="No such file"):
        read_lock(tmp_path / "none")

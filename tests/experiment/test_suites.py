"""Sweeps over suites on a hub on 127.0.0.1: a file of one's own, stops, pins, bounded disk, the plan of all Pythia."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Hub, neox_config, neox_files, neox_tensors

from llmcomp import fit_scaling_law, results
from llmcomp.errors import Error
from llmcomp.experiment import choices
from llmcomp.experiment.disk import DiskLimit
from llmcomp.experiment.sweep import EqualWeightsWarning, sweep
from llmcomp.models.lock import Lock, LockedFile, LockedRevision, read_lock, write_lock
from llmcomp.models.selection import select
from llmcomp.models.suite import load_suite

WIDTHS = {"s": 16, "m": 32, "l": 48}
STEPS = (1, 2, 4, 8, 16, 32)
SEEDS = (1, 2, 3)


def n_params(width: int) -> tuple[int, int]:
    """All parameters of a checkpoint, and those without embeddings, counted tensor by tensor."""
    tensors = neox_tensors(neox_config(hidden_size=width, intermediate_size=4 * width), 0)
    sizes = {name: tensor.size for name, tensor in tensors.items()}
    total = sum(sizes.values())
    return total, total - sum(size for name, size in sizes.items() if "embed" in name)


def write_suite(folder: Path) -> Path:
    """Three sizes, six steps, three seeds, in fewer than 30 lines and without code."""
    models = []
    for size, width in WIDTHS.items():
        total, rest = n_params(width)
        entry = {"size": size, "params": total, "n_params": total, "n_params_nonembedding": rest}
        shape = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4 * width}
        models.append(entry | {"shape": shape | {"vocab_size": 272, "max_position_embeddings": 128}})
    lines = [
        "{",
        '"suite": "mine",',
        '"family": "gpt_neox",',
        '"repository": "me/tiny-{size}-seed{seed}",',
        '"seeds": [1, 2, 3],',
        '"tokens_per_step": 2048,',
        '"revisions": [{"name": "step{step}", "steps": [{"from": 1, "to": 32, "times": 2}]}],',
        '"models": [',
        ",\n".join(map(json.dumps, models)),
        "]}",
    ]
    path = folder / "mine.json"
    path.write_text("\n".join(lines))
    assert len(path.read_text().splitlines()) < 30
    return path


def files_of(size: str, step: int, seed: int) -> dict[str, bytes]:
    width = WIDTHS[size]
    return neox_files(1000 * seed + 10 * step + width, hidden_size=width, intermediate_size=4 * width)


def fill(hub: Hub, sizes: Any = tuple(WIDTHS), steps: Any = STEPS, seeds: Any = SEEDS) -> None:
    for size, step, seed in itertools.product(sizes, steps, seeds):
        hub.add(f"me/tiny-{size}-seed{seed}", f"step{step}", files_of(size, step, seed))


class Data:
    """What a sweep asks of a data set."""

    def __init__(self, name: str = "prose", n_chunks: int = 2, n_bytes: int = 60):
        self.name, self.modality = name, "text"
        self.chunks = [(b"the rain in spain %d " % i * 9)[:n_bytes] for i in range(n_chunks)]


def run(suite: Path, out: Path, **options: Any) -> Any:
    return sweep(str(suite), datasets=[Data()], out=out, **{"progress": False, **options})


@pytest.mark.slow
def test_a_suite_of_ones_own_runs_is_killed_resumes_and_fits(hub: Hub, tmp_path: Path) -> None:
    suite, out = write_suite(tmp_path), tmp_path / "out"
    fill(hub)
    text = tmp_path / "text"
    text.write_bytes(b"".join(Data(n_bytes=64).chunks))
    command = [sys.executable, "-m", "llmcomp", "sweep", "--suite", str(suite), f"--dataset=enwik8={text}", "-q"]
    command += ["--chunk-bytes=64", "--out", str(out), "--disk=1MB"]
    cache = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home")}
    process = subprocess.Popen(command, env=os.environ | cache, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.parquet"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stderr is not None
    process.stderr.close()
    finished = {path: path.read_bytes() for path in out.glob("*.parquet")}
    assert 5 <= len(finished) < 54
    answer = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    rows = results.read_rows(out)
    cells = results.cells(rows)
    assert len(cells) == 3 * 6 * 3
    assert all(path.read_bytes() == content for path, content in finished.items())
    # What lay on the disk when the process was killed is at most two checkpoints; no other is fetched twice.
    fetched = Counter(path for method, path, _ in hub.requests if method == "GET" and path.startswith("/cdn"))
    assert len(fetched) == 54 and fetched.total() <= 54 + 2
    assert not list(out.glob(".models/**/*.safetensors"))
    for cell in cells.to_dict("records"):
        size = cell["model"].split("-")[1]
        total, rest = n_params(WIDTHS[size])
        assert (cell["params"], cell["n_params_nonembedding"]) == (total, rest)
        assert cell["tokens_seen"] == 2048 * cell["step"]
        assert cell["flops"] == 6.0 * total * 2048 * cell["step"]
        assert cell["seed"] == int(cell["model"][-1])
        assert cell["commit"] == hub.branches[f"me/tiny-{size}-seed{cell['seed']}"][f"step{cell['step']}"]
    law = fit_scaling_law(rows)
    assert np.isfinite(law.predict(params=5_000, step=8)).all()


def test_operations_are_in_rows(hub: Hub, tmp_path: Path) -> None:
    fill(hub, sizes="s", steps=STEPS, seeds=(1,))
    fill(hub, sizes="s", seeds=(2, 3))
    rows = run(write_suite(tmp_path), tmp_path / "out", sizes="s", steps="4", seeds="1")
    (cell,) = results.cells(rows).to_dict("records")
    # Four steps of 2,048 tokens in windows of 128: three passes, each 2 operations a weight of every matrix and of the
    # output embedding, and 4 a number of every head for each pair of a token and one not after it.
    matrices = 16 * (3 * 16) + 16 * 16 + 2 * 16 * 64 + 16 * 272
    pairs = sum(range(1, 129))
    assert cell["flops_exact"] == 3 * (4 * 2048 / 128) * (2 * 128 * matrices + 4 * 16 * pairs)


def test_a_lock_pins_a_sweep(hub: Hub, tmp_path: Path) -> None:
    fill(hub, sizes="s", seeds=(1,))
    suite, out = write_suite(tmp_path), tmp_path / "out"
    chosen = {"sizes": "s", "seeds": "1"}
    first = run(suite, out, **chosen, steps="1,2")
    pinned = read_lock(out / "models.lock")
    assert list(pinned.revisions["me/tiny-s-seed1"]) == ["step1", "step2"]
    write_lock(tmp_path / "all.lock", pinned)
    # The branch gets other weights: a sweep of the same folder keeps to what it began with.
    hub.add("me/tiny-s-seed1", "step2", neox_files(77, hidden_size=16, intermediate_size=64))
    for path in out.glob("*.parquet"):
        path.unlink()
    again = run(suite, out, **chosen, steps="1,2,4")
    both = again[again["step"] <= 2].reset_index(drop=True)
    assert both["commit"].tolist() == first["commit"].tolist()
    assert both["coded_bytes"].tolist() == first["coded_bytes"].tolist()
    assert list(read_lock(out / "models.lock").revisions["me/tiny-s-seed1"]) == ["step1", "step2", "step4"]
    elsewhere = run(suite, tmp_path / "other", **chosen, steps="2")
    assert set(elsewhere["commit"]) & set(first["commit"]) == set()
    named = run(suite, tmp_path / "named", **chosen, steps="2", lock=tmp_path / "all.lock")
    assert set(named["commit"]) == set(first["commit"][first["step"] == 2])
    with pytest.raises(Error, match="No such file"):
        run(suite, out, lock=tmp_path / "no.lock")


def test_faults_of_single_checkpoints_are_named_and_the_rest_goes_on(hub: Hub, tmp_path: Path) -> None:
    fill(hub, sizes="sm", seeds=(1,))
    suite, out = write_suite(tmp_path), tmp_path / "out"
    del hub.branches["me/tiny-s-seed1"]["step1"]
    hub.add("me/tiny-s-seed1", "step2", {"config.json": b"{}"})
    hub.gated.add("me/tiny-m-seed1")
    whole = files_of("s", 4, 1)["model.safetensors"]
    hub.corrupt[hashlib.sha256(whole).hexdigest()] = bytes(len(whole))
    hub.add("me/tiny-s-seed1", "step16", files_of("s", 8, 1))
    with pytest.warns(EqualWeightsWarning, match="step 16 and .* step 8 have equal weights"):
        rows = run(suite, out, sizes="s,m", seeds="1", steps="1..16", disk="1MB")
    told = {(failure["model"], failure["step"]): failure["reason"] for failure in rows.attrs["failed"]}
    assert "no such revision" in told["me/tiny-s-seed1", 1]
    assert "holds no weights" in told["me/tiny-s-seed1", 2]
    assert "arrived with the digest" in told["me/tiny-s-seed1", 4]
    assert all("is gated" in told["me/tiny-m-seed1", step] for step in (1, 2, 4, 8, 16))
    assert sorted(set(rows["step"])) == [8, 16]
    recorded = json.loads((out / "failed.json").read_text())["failed"]
    assert len(recorded) == 8
    # Equal weights lie on the disk once and are fetched once.
    digest = hashlib.sha256(files_of("s", 8, 1)["model.safetensors"]).hexdigest()
    assert sum(method == "GET" and digest in path for method, path, _ in hub.requests) == 1
    # What was wrong is mended, and only that is computed.
    fill(hub, sizes="sm", seeds=(1,))
    hub.gated.clear()
    hub.corrupt.clear()
    (out / "models.lock").unlink()
    rows = run(suite, out, sizes="s,m", seeds="1", steps="1..16")
    assert rows.attrs["failed"] == [] and len(results.cells(rows)) == 10


def test_interrupted_downloads_and_limits_go_on_where_they_were(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    fill(hub, sizes="l", seeds=(1,), steps=(1,))
    suite = write_suite(tmp_path)
    size = len(files_of("l", 1, 1)["model.safetensors"])
    hub.cut_after_bytes = size // 2
    hub.busy = [429, 503]
    rows = run(suite, tmp_path / "out", sizes="l", seeds="1", steps="1")
    assert rows.attrs["failed"] == []
    ranges = [asked for _, path, asked in hub.requests if path.startswith("/cdn") and asked]
    # Whole blocks of the first half are kept.
    assert ranges == [f"bytes={size // 2 // 4096 * 4096}-"]
    sent = sum(map(len, files_of("l", 1, 1).values()))
    # Everything once, and some words of lists and redirects.
    assert sent <= hub.bytes_sent < sent + 10_000


def test_the_disk_is_bounded(hub: Hub, tmp_path: Path) -> None:
    fill(hub, sizes="sml", seeds=(1,))
    suite, out = write_suite(tmp_path), tmp_path / "out"
    largest = max(len(files_of("l", step, 1)["model.safetensors"]) for step in STEPS)
    most = 0

    def scorer(chunks: list[bytes], model: Any, protocol: str, mapping: str, **_: Any) -> Any:
        nonlocal most
        blobs = [path.stat().st_size for path in out.glob(".models/models--*/blobs/*") if not path.is_symlink()]
        most = max(most, sum(n_bytes for n_bytes in blobs if n_bytes > 10_000))
        from llmcomp import score

        return score(chunks, model, protocol=protocol, mapping=mapping, progress=False)  # type: ignore[arg-type]

    limit = largest + largest // 2
    rows = run(suite, out, seeds="1", disk=limit, scorer=scorer)
    assert rows.attrs["failed"] == [] and len(results.cells(rows)) == 18
    assert largest <= most <= limit
    assert not (out / ".models").exists()
    fetched = Counter(path for method, path, _ in hub.requests if method == "GET" and path.startswith("/cdn"))
    assert len(fetched) == 18 and set(fetched.values()) == {1}
    with pytest.raises(Error, match=r"disk is 1,000 bytes; the weights of me/tiny-s-seed1 step 1 alone take"):
        run(suite, tmp_path / "small", seeds="1", disk=1000)
    with pytest.raises(Error, match=r"disk is 1,000 bytes"):
        run(suite, tmp_path / "small", seeds="1", disk=1000, dry_run=True)
    with pytest.raises(Error, match="expected bytes"):
        run(suite, tmp_path / "small", seeds="1", disk="0.5")


def test_what_was_in_the_cache_stays_there(hub: Hub, tmp_path: Path) -> None:
    fill(hub, sizes="s", seeds=(1,))
    suite = write_suite(tmp_path)
    run(suite, tmp_path / "first", sizes="s", seeds="1", steps="1,2")
    hub.requests.clear()
    run(suite, tmp_path / "second", sizes="s", seeds="1", steps="1,2,4", disk="1MB")
    assert sum(path.startswith("/cdn") for method, path, _ in hub.requests if method == "GET") == 1
    hub.close()
    cached = list((tmp_path / "cache").rglob("model.safetensors"))
    assert len(cached) == 2 and all(path.exists() for path in cached)


def test_a_limit_that_waits_is_told_of_the_end(tmp_path: Path) -> None:
    import threading

    from llmcomp.models.hub import SourceFile
    from llmcomp.models.sources import ModelSource

    def source(name: str, n_bytes: int) -> ModelSource:
        file = SourceFile("model.safetensors", n_bytes, hashlib.sha256(name.encode()).hexdigest(), False)
        return limit.place(ModelSource(name, None, (file,), repo=f"me/{name}", commit="0" * 40))

    limit = DiskLimit(tmp_path, 100)
    first, second = source("a", 80), source("b", 60)
    limit.expect([first, second])
    limit.reserve(first)
    ends: list[str] = []

    def wait() -> None:
        try:
            limit.reserve(second)
        except Error as error:
            ends.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    limit.close()
    thread.join(10)
    assert ends == ["the sweep has ended"]


# Shapes of Pythia (Biderman et al. 2023, table 1; rows of the vocabulary as in config.json): layers, width, rows.
PYTHIA = {
    "70m": (6, 512, 50304), "160m": (12, 768, 50304), "410m": (24, 1024, 50304), "1b": (16, 2048, 50304),
    "1.4b": (24, 2048, 50304), "2.8b": (32, 2560, 50304), "6.9b": (32, 4096, 50432), "12b": (36, 5120, 50688),
}  # fmt: skip


def lock_of_pythia() -> tuple[Lock, int]:
    """Of all sizes and steps, with the sizes that the shapes have in 16 bits; and the bytes of all files."""
    steps = [0, *(2**k for k in range(10)), *range(1000, 143001, 1000)]
    lock, n_bytes_of_all = Lock(), 0
    for size, (n_layers, width, rows) in PYTHIA.items():
        n_bytes = 2 * (n_layers * (12 * width**2 + 13 * width) + 2 * width + 2 * rows * width)
        for step in steps:
            digest = hashlib.sha256(f"{size} {step}".encode()).hexdigest()
            files = {"config.json": (567, "1" * 40), "tokenizer.json": (2_113_710, "2" * 40)}
            files["pytorch_model.bin"] = (n_bytes, digest)
            commit = hashlib.sha1(digest.encode()).hexdigest()
            locked = {name: LockedFile(*file) for name, file in files.items()}
            lock.put(f"EleutherAI/pythia-{size}", f"step{step}", LockedRevision(commit, locked))
            n_bytes_of_all += n_bytes + 567 + 2_113_710
    return lock, n_bytes_of_all


def test_the_plan_of_all_of_pythia(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 sizes x 154 steps x 3 data sets x 2 protocols, from a lock, without a word from the hub."""
    lock, expected_bytes = lock_of_pythia()
    write_lock(tmp_path / "models.lock", lock)
    data = [Data(name, n_chunks=2048, n_bytes=2048) for name in ("text", "image", "speech")]
    for part in data:
        part.chunks = [bytes(2048)] * 2048
    hub.requests.clear()
    start = time.perf_counter()
    table = sweep(
        "pythia", "all", data, tmp_path / "out", sizes="70m..12b", lock=tmp_path / "models.lock", dry_run=True,
        disk="50GB",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert seconds < 10
    assert hub.requests == [] and not (tmp_path / "out").exists()
    assert len(table) == 8 * 154 * 3 * 2
    costs = table.attrs["costs"]
    assert (costs["n_cells"], costs["n_checkpoints"]) == (7392, 1232)
    assert costs["download_bytes"] == expected_bytes
    # A token a byte, published 1,024 a chunk: every matrix twice a token, attention to the tokens before.
    flops = 0.0
    for n_layers, width, rows in PYTHIA.values():
        for n_tokens in (2048, 1024):
            products = 2 * n_tokens * (12 * n_layers * width**2 + rows * width)
            attention = 4 * n_layers * width * (n_tokens * (n_tokens + 1) // 2)
            flops += 154 * 3 * 2048 * (products + attention)
    assert costs["flops"] == pytest.approx(flops, rel=1e-12)
    # 40 % of 989.5 TFLOP/s.
    assert costs["h200_seconds"] == pytest.approx(flops / (0.4 * 989.5e12))
    told = capsys.readouterr().out
    assert "7392 cells, 0 finished, 7392 to do" in told
    assert f"{expected_bytes / 1e12:.1f} TB of 1232 checkpoints" in told
    assert "at most 50.0 GB of weights at once" in told
    hours = round(costs["h200_seconds"]) // 3600
    assert f"{hours} h" in told and "one H200" in told


def test_the_published_grid_is_what_the_suite_means_without_options() -> None:
    words, protocols = choices.usual("pythia")
    assert words == ("enwik8", "imagenet", "librispeech") and protocols == ("lossless", "published")
    grid = select(load_suite("pythia"))
    assert len(grid) * len(words) == 75
    # Bharadwaj 2025: five sizes at five steps.
    assert [(c.name, c.revision) for c in grid] == [
        (f"EleutherAI/pythia-{size}", f"step{step}")
        for size in ("70m", "160m", "410m", "1b", "1.4b")
        for step in (1000, 8000, 32000, 128000, 143000)
    ]
    assert choices.usual("pico") == (("text", "image", "speech"), ("lossless",))


def test_other_choices_belong_to_suites(tmp_path: Path) -> None:
    with pytest.raises(Error, match="words choose from a suite only"):
        sweep("pico-13k", "log:3", [Data()], tmp_path, progress=False)
    with pytest.raises(Error, match="choose from a suite"):
        sweep("pico-13k", None, [Data()], tmp_path, sizes="13k", progress=False)
    with pytest.raises(Error, match="no model '14k'"):
        sweep("pico", None, [Data()], tmp_path, sizes="14k", progress=False)
    assert load_suite("pico").models[0].n_params == 45_536


def test_rows_of_the_bundled_suite_know_their_checkpoint(tmp_path: Path) -> None:
    rows = sweep("pico", "128,2048", [Data()], tmp_path, sizes="13k,28k", progress=False)
    cells = results.cells(rows)
    # SUITE.md: 45,536 and 77,520 parameters, 2,048 tokens a step.
    assert cells["params"].tolist() == [45_536] * 2 + [77_520] * 2
    assert cells["n_params_nonembedding"].tolist() == [12_768] * 2 + [28_368] * 2
    assert cells["tokens_seen"].tolist() == [128 * 2048, 2048 * 2048] * 2
    assert cells["flops"].tolist() == [6.0 * p * s * 2048 for p in (45_536, 77_520) for s in (128, 2048)]
    assert cells["commit"].tolist() == [""] * 4 and cells["seed"].isna().all()

"""Archives and folders of strangers on the command line: nothing of theirs runs, is asked or is downloaded, and a usage
error touches no file."""

from __future__ import annotations

import io
import itertools
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hub_server import Hub, neox_files
from planted import REGISTERED, STEP, archive_that_names, plant_folder, stranger_environment
from result_rows import make_rows
from tiny_models import TRAINING_TEXT

from llmcomp import compress, generate, load_model
from llmcomp.cli.main import main
from llmcomp.codec import container
from llmcomp.results import write_rows


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which folders with code are called as models of the registry. Nobody may be asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    here = tmp_path / "here"
    for name in (REGISTERED, f"{REGISTERED}/step{STEP}", REGISTERED.rpartition("/")[2], "pico-13k"):
        plant_folder(here / name, tmp_path / "marker")
    monkeypatch.chdir(here)
    return here


def run(*args: str, stdin: bytes, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "llmcomp", *args]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=cwd, env=env, timeout=120, check=False)


# A header alone is enough: what stands behind it answers any question that is asked on standard input.
def with_an_answer(archive: bytes) -> bytes:
    header = container.ArchiveReader(io.BytesIO(archive)).header
    return container.header_bytes(header) + b"y\n" * 9


@pytest.mark.parametrize("command", [("decompress",), ("decompress", "-t"), ("compress", "-d", "-c")])
def test_an_archive_on_standard_input_runs_and_asks_nothing(
    command: tuple[str, ...], stranger: Path, hub: Hub, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="the torch engine is an extra")
    env = stranger_environment(tmp_path, hub.endpoint)
    answer = run(*command, "-q", stdin=with_an_answer(archive_that_names()), cwd=stranger, env=env)
    assert not (tmp_path / "marker").exists()
    assert (answer.returncode, answer.stdout) == (1, b"")
    assert answer.stderr.count(b"\n") == 1 and b"[y/N]" not in answer.stderr
    assert REGISTERED.encode() in answer.stderr and b"--download" in answer.stderr
    assert hub.requests == []


@pytest.mark.parametrize("flags", [["-d"], ["-t"], ["-d", "-c"], ["--salvage"]])
def test_an_archive_in_a_file_runs_and_asks_nothing(
    flags: list[str], stranger: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in ("exact", "torch"):
        (stranger / "text.llmc").write_bytes(archive_that_names(engine=engine))
        assert main(["compress", "-q", *flags, "text.llmc"]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and "--download" in captured.err and "0.14 GB" in captured.err
        assert sorted(path.name for path in stranger.glob("text*")) == ["text.llmc"]
    assert not (tmp_path / "marker").exists()
    assert hub.requests == []


# Downloads need a word.


@pytest.fixture
def archive(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a model that a hub has and the cache has not."""
    from huggingface_hub import constants

    hub.add(REGISTERED, "step1000", neox_files(7))
    model = load_model(REGISTERED, 1000)
    path = tmp_path / "text.llmc"
    # What the model finds likely, so that it is coded and not stored.
    content = generate(model, 600, temperature=0.01)
    (tmp_path / "content").write_bytes(content)
    path.write_bytes(compress(content, model, stock=False))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    hub.requests.clear()
    return path


@pytest.mark.parametrize("flags", [["-d", "-k"], ["-t"], ["--salvage"]])
def test_a_flag_allows_the_download(flags: list[str], archive: Path, hub: Hub) -> None:
    assert main(["compress", "-q", *flags, str(archive)]) == 1
    assert hub.requests == [] and sorted(archive.parent.glob("text*")) == [archive]
    assert main(["compress", "-q", "--download", *flags, str(archive)]) == 0
    assert hub.downloads("model.safetensors") > 0
    # What the cache has needs no word, and no hub.
    hub.requests.clear()
    assert main(["compress", "-q", "-f", *flags, str(archive)]) == 0
    assert hub.requests == []


def test_a_model_that_the_user_names_is_downloaded(archive: Path, hub: Hub) -> None:
    assert main(["decompress", "-q", "-m", REGISTERED, "-s", "1000", str(archive)]) == 0
    assert archive.with_suffix("").read_bytes() == archive.with_name("content").read_bytes()
    assert hub.downloads("model.safetensors") > 0


def at_a_terminal(
    archive: Path, env: dict[str, str], typed: bytes, is_stderr_a_terminal: bool = True
) -> tuple[int, bytes, bytes]:
    """(exit status, what stderr got, standard output) of decompressing with the keyboard as standard input."""
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "llmcomp", "decompress", "-q", "-c", str(archive)]
    stderr = terminal if is_stderr_a_terminal else subprocess.PIPE
    process = subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=stderr, env=env)
    os.close(terminal)
    told, has_typed, deadline = b"", False, time.monotonic() + 60
    while is_stderr_a_terminal and time.monotonic() < deadline:
        if not select.select([keyboard], [], [], 0.1)[0]:
            continue
        try:
            told += os.read(keyboard, 4096)
        except OSError:  # the other side is closed
            break
        if b"[y/N]" in told and not has_typed:
            os.write(keyboard, typed)
            has_typed = True
    out, err = process.communicate(timeout=60)
    os.close(keyboard)
    return process.returncode, told + (err or b""), out


def test_a_yes_at_a_terminal_allows_the_download(archive: Path, hub: Hub, tmp_path: Path) -> None:
    env = stranger_environment(tmp_path, hub.endpoint)
    status, told, out = at_a_terminal(archive, env, b"no\n")
    assert (status, out, hub.requests) == (1, b"", [])
    assert b"0.14 GB" in told and told.count(b"[y/N]") == 1
    status, told, out = at_a_terminal(archive, env, b"y\n", is_stderr_a_terminal=False)
    assert (status, out, hub.requests) == (1, b"", []) and b"[y/N]" not in told
    status, told, out = at_a_terminal(archive, env, b"y\n")
    assert (status, out) == (0, archive.with_name("content").read_bytes()), told
    assert hub.downloads("model.safetensors") > 0


# Usage errors touch nothing.


@pytest.mark.parametrize(
    "words",
    [
        ["-9", "{file}"],
        ["{file}", "-9"],
        ["-k", "-1", "{file}"],
        ["-x y", "{file}"],
        ["-5.5", "{file}"],
        ["--best", "{file}"],
        ["{file}", "--no-such-option"],
        ["{file}", "--overlap"],
        ["--mapping", "none", "{file}"],
        ["--segment-bytes", "-4", "{file}"],
    ],
)
@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_usage_error_touches_no_file(
    command: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_bytes(TRAINING_TEXT)
    if command == "decompress":
        assert main(["compress", "-q", "-m", "pico-13k", str(text)]) == 0
        text = tmp_path / "text.llmc"
    before = text.read_bytes()
    with pytest.raises(SystemExit) as left:
        main([command, "-q", *(word.format(file=text) for word in words)])
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(text.name, before)]


def test_levels_of_gzip_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compress", "-9", str(tmp_path / "text")])
    assert "-m chooses a model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["info", "-9", str(tmp_path / "text")])


def test_a_file_with_such_a_name_comes_behind_two_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-9").write_bytes(TRAINING_TEXT)
    assert main(["compress", "-q", "-m", "pico-13k", "--", "-9"]) == 0
    assert [path.name for path in Path().iterdir()] == ["-9.llmc"]
    assert main(["decompress", "-q", "--", "-9.llmc"]) == 0
    assert Path("-9").read_bytes() == TRAINING_TEXT


def test_two_places_to_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_bytes(TRAINING_TEXT)
    assert main(["compress", "-q", "-c", "-o", str(tmp_path / "out"), str(text)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "-c and -o" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_an_error_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "a\x1b[2Jb\x9bc é世.llmc")]) == 1
    told = capsys.readouterr().err
    assert "a\\x1b[2Jb\\x9bc é世.llmc" in told and told.strip().isprintable()


def test_names_among_results_move_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for params, step in itertools.product((1000, 10_000, 100_000), (10, 100, 1000)):
        ratio = round(2048 * (0.2 + params**-0.3 + step**-0.5))
        rows.append(make_rows((ratio,) * 2, params=params, step=step, dataset="a\x1b[2J\x9bb", model=f"{params}\x07"))
    write_rows(tmp_path / "rows.parquet", pd.concat(rows))
    assert main(["fit", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "a\\x1b[2J\\x9bb" in told and told.replace("\n", "").isprintable()

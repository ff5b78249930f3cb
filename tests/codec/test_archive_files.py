"""Whole files as gzip's users expect them: names, modes, times, what is left alone, and nothing half-written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import TRAINING_TEXT, TinyModel

from llmcomp import compress, decompress
from llmcomp.codec.files import Skipped, compress_file, decompress_file, salvage_file
from llmcomp.codec.files import test_file as check_file
from llmcomp.errors import CorruptArchive, Error, ModelMismatch

TINY = TinyModel()
TEXT = TRAINING_TEXT * 2
SMALL = {"segment_bytes": 100, "progress": False}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "text.txt"
    source.write_bytes(TEXT)
    source.chmod(0o640)
    os.utime(source, ns=(10**18, 10**18 + 5))
    return source


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_there_and_back_with_mode_and_time(source):
    report = compress_file(source, TINY, keep=False, **SMALL)
    archive = source.with_name("text.txt.llmc")
    assert names(source.parent) == {"text.txt.llmc"}
    assert (report.content_bytes, report.archive_bytes) == (len(TEXT), archive.stat().st_size)
    assert report.ratio == archive.stat().st_size / len(TEXT)
    assert archive.read_bytes() == compress(TEXT, TINY, segment_bytes=100)
    assert (archive.stat().st_mode & 0o7777, archive.stat().st_mtime_ns) == (0o640, 10**18 + 5)
    report = decompress_file(archive, TINY, keep=False, progress=False)
    assert (report.content_bytes, report.n_segments, report.n_stored) == (len(TEXT), -(-len(TEXT) // 100), 0)
    assert names(source.parent) == {"text.txt"}
    assert source.read_bytes() == TEXT
    assert (source.stat().st_mode & 0o7777, source.stat().st_mtime_ns) == (0o640, 10**18 + 5)


def test_a_private_file_is_never_open_to_others(tmp_path):
    """While the archive is decoded, before its mode is set, the part file is the owner's alone."""
    modes = []

    class Watching(TinyModel):
        def session(self, n_streams):
            modes.extend(part.stat().st_mode & 0o7777 for part in tmp_path.glob(".*.part"))
            return super().session(n_streams)

    archive = tmp_path / "secret.llmc"
    archive.write_bytes(compress(TEXT, TINY, segment_bytes=100))
    archive.chmod(0o600)
    before = os.umask(0o022)
    try:
        decompress_file(archive, Watching(), progress=False)
    finally:
        os.umask(before)
    assert modes and set(modes) == {0o600}
    assert (tmp_path / "secret").stat().st_mode & 0o7777 == 0o600


def test_what_a_killed_run_left_is_removed_by_the_next(source):
    work = f"model.session = lambda n: time.sleep(600)\ndecompress_file({str(source) + '.llmc'!r}, model, force=True)"
    compress_file(source, TINY, **SMALL)
    process = subprocess.Popen(program("import time\n" + work), stderr=subprocess.PIPE)
    while not list(source.parent.glob(".*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stderr.close()
    assert list(source.parent.glob(".*.part"))
    decompress_file(f"{source}.llmc", TINY, output=source.with_name("back"), progress=False)
    assert names(source.parent) == {"text.txt", "text.txt.llmc", "back"}


def test_named_output_keep_and_test(source):
    output = source.with_name("other")
    compress_file(source, TINY, output=output, **SMALL)
    assert names(source.parent) == {"text.txt", "other"}
    assert check_file(output, TINY, progress=False).content_bytes == len(TEXT)
    assert names(source.parent) == {"text.txt", "other"}
    decompress_file(output, TINY, output=source.with_name("back"), progress=False)
    assert source.with_name("back").read_bytes() == TEXT


@pytest.mark.parametrize("name", ["\u6587" * 80, "x" * 250, "\U0001f600" * 62])
def test_names_count_in_bytes(source, name):
    """255 bytes are what file systems take: with ".llmc" these names have up to that many."""
    path = source.rename(source.with_name(name))
    compress_file(path, TINY, keep=False, **SMALL)
    assert names(path.parent) == {f"{name}.llmc"}
    decompress_file(path.with_name(f"{name}.llmc"), TINY, keep=False, progress=False)
    assert path.read_bytes() == TEXT


@pytest.mark.parametrize("name", ["\u6587" * 84, "x" * 255])
def test_an_output_whose_name_is_too_long_is_one_error(source, name):
    path = source.rename(source.with_name(name))
    with pytest.raises(Error, match=r"File name too long"):
        compress_file(path, TINY, **SMALL)
    with pytest.raises(Error, match=r"File name too long"):
        compress_file(path, TINY, output=path.with_name("y" * 300), **SMALL)
    with pytest.raises(Error, match=r"File name too long"):
        compress_file(path.with_name("z" * 300), TINY, output=path.with_name("out"), **SMALL)
    assert names(path.parent) == {name}


def test_files_that_gzip_leaves_alone(source, tmp_path):
    archive = tmp_path / "text.txt.llmc"
    archive.write_bytes(b"precious")
    link, folder = tmp_path / "link", tmp_path / "folder"
    link.symlink_to(source)
    folder.mkdir()
    before = names(tmp_path)
    for call in (
        lambda: compress_file(source, TINY, **SMALL),
        lambda: compress_file(archive, TINY, **SMALL),
        lambda: compress_file(folder, TINY, **SMALL),
        lambda: compress_file(link, TINY, keep=False, **SMALL),
        lambda: decompress_file(source, TINY, progress=False),
        lambda: decompress_file(archive, TINY, progress=False),
    ):
        with pytest.raises(Skipped):
            call()
    assert names(tmp_path) == before
    assert archive.read_bytes() == b"precious" and source.read_bytes() == TEXT
    compress_file(source, TINY, force=True, **SMALL)
    assert decompress(archive.read_bytes(), TINY) == TEXT
    compress_file(link, TINY, **SMALL)
    assert decompress((tmp_path / "link.llmc").read_bytes(), TINY) == TEXT


def test_a_file_with_other_names_is_not_removed(source):
    source.with_name("second").hardlink_to(source)
    with pytest.raises(Skipped):
        compress_file(source, TINY, keep=False, **SMALL)
    assert names(source.parent) == {"text.txt", "second"}


def test_failures_in_one_line_leave_nothing(source, tmp_path):
    archive = tmp_path / "good.llmc"
    archive.write_bytes(compress(TEXT, TINY, segment_bytes=100))
    (tmp_path / "cut.llmc").write_bytes(archive.read_bytes()[:-40])
    (tmp_path / "foreign.llmc").write_bytes(b"\x1f\x8b" + bytes(100))
    before = names(tmp_path)
    cases = [
        (CorruptArchive, lambda: decompress_file(tmp_path / "cut.llmc", TINY, progress=False)),
        (CorruptArchive, lambda: check_file(tmp_path / "cut.llmc", TINY, progress=False)),
        (CorruptArchive, lambda: decompress_file(tmp_path / "foreign.llmc", TINY, progress=False)),
        (ModelMismatch, lambda: decompress_file(archive, TinyModel(name="other"), progress=False)),
        (Error, lambda: decompress_file(archive, progress=False)),
        (Error, lambda: compress_file(tmp_path / "absent", TINY, **SMALL)),
        (Error, lambda: compress_file(source, TINY, output=tmp_path / "absent" / "x", **SMALL)),
        (Error, lambda: compress_file(source, TINY, output=tmp_path, **SMALL)),
        (Error, lambda: compress_file(source, TINY, output=source, force=True, **SMALL)),
        (Error, lambda: compress_file(source, TINY, output=source / "x", **SMALL)),
        (Error, lambda: compress_file(source, "no-such-model", **SMALL)),
        (Error, lambda: compress_file(source, TINY, mapping="utf16", progress=False)),
    ]
    for kind, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == before
    assert source.read_bytes() == TEXT


def test_salvage_of_a_file(source, tmp_path):
    archive = tmp_path / "cut.llmc"
    archive.write_bytes(compress(TEXT, TINY, segment_bytes=100)[:-40])
    report, summary = salvage_file(archive, TINY, progress=False)
    saved = (tmp_path / "cut").read_bytes()
    n_whole = len(TEXT) // 100 * 100
    assert saved == TEXT[:n_whole] and report.content_bytes == n_whole
    assert summary.lost == [(n_whole, None)]
    assert archive.exists()


def test_salvage_of_nothing_writes_nothing(tmp_path):
    archive = tmp_path / "cut.llmc"
    archive.write_bytes(compress(TEXT, TINY, segment_bytes=100)[:90])
    with pytest.raises(CorruptArchive, match="no segment"):
        salvage_file(archive, TINY, progress=False)
    assert names(tmp_path) == {"cut.llmc"}


def test_a_pipe_is_written_to_not_replaced(source, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    compress_file(source, TINY, output=pipe, force=True, **SMALL)
    assert os.read(reader, 1 << 16) == compress(TEXT, TINY, segment_bytes=100)
    os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(Skipped, match="exists"):
        compress_file(source, TINY, output=pipe, **SMALL)


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from tiny_models import TinyModel
from llmcomp.codec.files import compress_file, decompress_file
print("ready", file=sys.stderr, flush=True)
model = TinyModel()
{work}
"""


def program(work: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(tests=str(Path(__file__).parents[1] / "support"), work=work)]


def test_pipes(tmp_path):
    work = 'compress_file("-", model, salt=bytes(16))'
    packed = subprocess.run(program(work), input=TEXT, capture_output=True, check=True)
    assert packed.stdout == compress(TEXT, TINY, salt=bytes(16))
    back = subprocess.run(
        program('decompress_file("-", model)'), input=packed.stdout, capture_output=True, check=True, cwd=tmp_path
    )
    assert back.stdout == TEXT and names(tmp_path) == set()


def run_until_killed(work: str, number: int, delay: float | None) -> float:
    """Starts the program, kills it `delay` seconds after it is ready; returns how long it ran."""
    process = subprocess.Popen(program(work), stderr=subprocess.PIPE)
    assert process.stderr is not None and process.stderr.readline() == b"ready\n"
    started = time.perf_counter()
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        process.wait()
    process.stderr.close()
    return time.perf_counter() - started


def check_kills(folder: Path, signals: list[signal.Signals]) -> None:
    """Ends compressing and decompressing at random moments: the target is absent or whole, the source untouched."""
    content = TRAINING_TEXT * 20
    source, archive, target = folder / "text", folder / "whole", folder / "target"
    source.write_bytes(content)
    whole = compress(content, TINY, segment_bytes=1000)
    archive.write_bytes(whole)
    works = [
        (f"compress_file({str(source)!r}, model, output={str(target)!r}, segment_bytes=1000)", whole),
        (f"decompress_file({str(archive)!r}, model, output={str(target)!r})", content),
    ]
    rng = random.Random(len(signals))
    for work, expected in works:
        seconds = run_until_killed(work, signal.SIGKILL, None)
        for number in signals:
            target.unlink(missing_ok=True)
            before = names(folder)
            run_until_killed(work, number, rng.uniform(0, seconds))
            assert not target.exists() or target.read_bytes() == expected
            # What no program can clean up after is left beside, under another name.
            assert number == signal.SIGKILL or names(folder) <= before | {"target"}
    assert source.read_bytes() == content and archive.read_bytes() == whole


def test_killed_and_terminated_at_random_moments(tmp_path):
    check_kills(tmp_path, [signal.SIGKILL, signal.SIGTERM])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_many_moments(tmp_path, number):
    check_kills(tmp_path, [number] * 200)


START = """
import sys
from llmcomp.cli.main import main
status = main(sys.argv[1:])
heavy = {"pandas", "pyarrow", "scipy", "matplotlib", "torch", "transformers", "huggingface_hub", "safetensors"}
sys.exit(status or " ".join(sorted(heavy & set(sys.modules))) or 0)
"""


def test_compressing_starts_without_tables_figures_or_torch(tmp_path):
    """Half of a small file's time would otherwise go into imports that no archive needs."""
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    for arguments in (
        ["compress", "-q", "-m", "pico-13k", path],
        ["info", f"{path}.llmc"],
        ["compress", "-q", "-l", f"{path}.llmc"],
        ["compress", "-q", "-t", f"{path}.llmc"],
        ["decompress", "-q", f"{path}.llmc"],
    ):
        command = [sys.executable, "-c", START, *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, ""), arguments
    assert path.read_bytes() == TEXT

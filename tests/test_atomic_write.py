"""Files that appear whole or not at all: the mode of a part file, who may remove one, names of any length."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmcomp.atomic_write import remove_stale_parts, write_beside, written_beside

HOLDER = """
import sys, time
from llmcomp.atomic_write import written_beside
with written_beside(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(("private", "during", "after"), [(True, 0o600, 0o600), (False, 0o644, 0o644)])
def test_the_mode_of_the_part_and_of_the_file(tmp_path, umask, private, during, after):
    with written_beside(tmp_path / "file", private=private) as file:
        (part,) = tmp_path.iterdir()
        assert part.stat().st_mode & 0o7777 == during
        file.write(b"all of it")
    assert (tmp_path / "file").stat().st_mode & 0o7777 == after
    assert (tmp_path / "file").read_bytes() == b"all of it" and names(tmp_path) == ["file"]


def test_a_part_that_a_living_process_holds_stays_and_that_of_a_dead_one_goes(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path / "held"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        (part,) = tmp_path.iterdir()
        remove_stale_parts(tmp_path)
        write_beside(tmp_path / "other", b"x")
        assert names(tmp_path) == sorted([part.name, "other"])
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert part.read_bytes() == b"half"
    write_beside(tmp_path / "other", b"y")
    assert names(tmp_path) == ["other"]


def test_only_parts_of_this_tool_are_removed(tmp_path):
    others = [".file.part", "file.0123456789abcdef.llmcomp.part", ".file.0123.llmcomp.part", "file.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"somebody's")
    (tmp_path / ".link.0123456789abcdef.llmcomp.part").symlink_to(tmp_path / "file.part")
    os.mkfifo(tmp_path / ".pipe.0123456789abcdef.llmcomp.part")
    before = names(tmp_path)
    (tmp_path / ".file.0123456789abcdef.llmcomp.part").write_bytes(b"stale")
    remove_stale_parts(tmp_path)
    assert names(tmp_path) == before
    remove_stale_parts(tmp_path / "absent")


def test_an_exception_leaves_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), written_beside(tmp_path / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"before"


def test_without_replace_nothing_is_overwritten(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileExistsError, match="exists"), written_beside(path, replace=False) as file:
        path.write_bytes(b"meanwhile")
        file.write(b"new")
    with pytest.raises(FileExistsError, match="exists"), written_beside(path, replace=False):
        pass
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"meanwhile"


@pytest.mark.parametrize("name", ["x" * 255, "書" * 85, "\udcff" * 255, "two\nlines"])
def test_names_as_long_as_a_file_system_takes_them(tmp_path, name):
    write_beside(tmp_path / name, b"x")
    assert names(tmp_path) == [name]


def test_a_failure_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(OSError, match="No such file") as caught:
        write_beside(tmp_path / "absent" / "file", b"")
    assert caught.value.filename == str(tmp_path / "absent" / "file")

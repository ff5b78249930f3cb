"""What a shell's user meets: completion, the man page, -v, -r, -T, progress on a terminal and nowhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
import zlib
from pathlib import Path

import pytest

from llmcomp import pico
from llmcomp.cli.main import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_bytes()


def completed(words: list[str], folder: Path) -> set[str]:
    """What bash offers behind these words; the last is the one that is being written."""
    script = folder / "completion.bash"
    if not script.exists():
        made = subprocess.run([sys.executable, "-m", "llmcomp", "completion", "bash"], capture_output=True, check=True)
        script.write_bytes(made.stdout)
    array = " ".join(f"'{word}'" for word in ["llmcomp", *words])
    program = f"source {script}; COMP_WORDS=({array}); COMP_CWORD={len(words)}; _llmcomp; "
    program += "printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_commands_options_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    assert completed(["com"], tmp_path) == {"compress", "compare", "completion"}
    assert completed(["data", ""], tmp_path) >= {"list", "fetch", "manifest", "check"}
    assert completed(["compress", "--seg"], tmp_path) == {"--segment-bytes"}
    assert completed(["compress", "--engine", "exact"], tmp_path) == {"exact", "exact-int8"}
    assert completed(["compress", "-k", "let"], tmp_path) == {"letter.txt"}
    assert completed(["compress", "-o", "let"], tmp_path) == {"letter.txt"}
    assert completed(["data", "fetch", "--j"], tmp_path) == {"--json"}
    assert completed(["completion", "f"], tmp_path) <= {"fish"}


def test_every_command_and_option_is_in_every_script_and_in_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run([sys.executable, "-m", "llmcomp.cli.man_page", tmp_path / "llmcomp.1"], check=True)
    page = (tmp_path / "llmcomp.1").read_text().replace("\\-", "-").replace("\\fB", "")
    texts = [page]
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        texts.append(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\w[\w-]*) ", capsys.readouterr().out, re.MULTILINE)
    assert {"compress", "verify", "compare", "models"} <= set(listed)
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    options = set(re.findall(r"(--[a-z][a-z-]+)", capsys.readouterr().out))
    assert {"--recursive", "--threads", "--verbose"} <= options
    for text in texts:
        for word in [*listed, *options]:
            # fish names a long option without its dashes.
            assert re.search(rf"(?<![\w-]){re.escape(word)}\b", text) or f"-l {word[2:]} " in text + " ", word


def test_the_man_page_is_well_formed(tmp_path: Path) -> None:
    page = tmp_path / "llmcomp.1"
    subprocess.run([sys.executable, "-m", "llmcomp.cli.man_page", page], check=True)
    try:
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", page], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no groff")
    assert done.returncode == 0 and done.stderr == b""
    shown = re.sub(rb"\x1b\[[0-9;]*m|.\x08", b"", done.stdout).decode()
    assert "EXIT STATUS" in shown and "--segment-bytes" in shown


def make_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_bytes(TEXT[:300])
    (folder / "below/b.txt").write_bytes(TEXT[300:500])
    (folder / "below/link.txt").symlink_to(folder / "a.txt")
    return folder


def test_recursive_and_verbose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path)
    assert main(["compress", "-q", "-r", "-v", "-m", "pico-13k", str(folder)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith(f"{folder / 'a.txt'}: 300 bytes, ") and "a.txt.llmc" in told[0]
    left = {path.name for path in folder.rglob("*") if not path.is_symlink() and path.is_file()}
    assert left == {"a.txt.llmc", "b.txt.llmc"}
    assert main(["decompress", "-q", "-r", "-T", "1", str(folder)]) == 0
    assert (folder / "a.txt").read_bytes() == TEXT[:300]
    assert (folder / "below/b.txt").read_bytes() == TEXT[300:500]
    assert main(["compress", "-q", "-r", "-o", "one", str(folder)]) == 1
    assert main(["decompress", "-q", "-r", str(folder)]) == 1  # no archive is left
    assert main(["compress", "-q", str(folder)]) == 2  # a folder, as gzip without -r


def test_threads_are_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcomp import coding
    from llmcomp.codec import files

    found, before = [], coding.threads_in_use()
    original = files.compress_file
    monkeypatch.setattr(
        files, "compress_file", lambda *a, **o: (found.append(coding.threads_in_use()), original(*a, **o))[1]
    )
    path = tmp_path / "text"
    for option in ("3", "0"):
        path.write_bytes(TEXT[:200])
        assert main(["compress", "-q", "-f", "-m", "pico-13k", "-T", option, str(path)]) == 0
    assert found == [3, before] and coding.threads_in_use() == before
    with pytest.raises(SystemExit):
        main(["compress", "-T", "-1", str(path)])


def on_a_terminal(*arguments: str) -> list[tuple[float, str]]:
    """What the command writes to a terminal on standard error, with its seconds since the start."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))
    process = subprocess.Popen([sys.executable, "-m", "llmcomp", *arguments], stderr=slave, stdout=subprocess.DEVNULL)
    os.close(slave)
    started, seen = time.monotonic(), []
    while True:
        ready = select.select([master], [], [], 60)[0]
        try:
            part = os.read(master, 1 << 16) if ready else b""
        except OSError:
            part = b""
        if not part:
            break
        seen.append((time.monotonic() - started, part.decode(errors="replace")))
    os.close(master)
    assert process.wait() == 0
    return seen


RATIO = re.compile(r"ratio (\d\.\d+)")


def test_progress_moves_and_tells_the_ratio(tmp_path: Path) -> None:
    """From 0 on, while a file of several batches is worked on; while decompressing, the archive's own ratio."""
    path = tmp_path / "text"
    path.write_bytes((pico.sample_path("text").read_bytes() * 4)[:400_000])
    arguments = ["-k", "-f", "-m", "pico-13k", "-T", "1", "--segment-bytes", "32768", "--no-mix", "--no-stock"]
    arguments.append(str(path))
    bars = "".join(part for _, part in on_a_terminal("compress", *arguments))
    shares = [int(share) for share in re.findall(r"(\d+)%\|", bars)]
    assert shares[0] == 0 and len(set(shares)) > 2
    archive = tmp_path / "text.llmc"
    ratio = archive.stat().st_size / path.stat().st_size
    bars = "".join(part for _, part in on_a_terminal("decompress", "-k", "-f", "-T", "1", str(archive)))
    ratios = {float(found) for found in RATIO.findall(bars)}
    assert ratios == {round(ratio, 3)}
    assert len(set(re.findall(r"(\d+)%\|", bars))) > 2


def test_no_bar_is_drawn_where_nobody_looks(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(pico.sample_path("text").read_bytes()[:80_000])
    command = [sys.executable, "-m", "llmcomp", "compress", "-m", "pico-13k", str(path)]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


def test_a_file_that_gzip_compresses_better_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = b"".join(b"2026-11-21 18:00:%02d worker %d finished job 12%03d\n" % (i % 60, i % 4, i) for i in range(400))
    text, log_file = tmp_path / "text", tmp_path / "log"
    options = ["compress", "-q", "-k", "-f", "-m", "pico-13k", "--salt", ""]  # by the model alone
    text.write_bytes(TEXT[:6000])
    assert main([*options, str(text)]) == 0
    assert capsys.readouterr().err == ""
    log_file.write_bytes(log)
    assert main([*options, str(log_file)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    gzip_bytes = len(zlib.compress(log, 9)) + 12
    assert line.startswith(
        f"llmcomp: warning: {log_file}: gzip -9 makes {gzip_bytes:,} bytes of the first {len(log):,}"
    )
    assert f"this model {(tmp_path / 'log.llmc').stat().st_size:,};" in line

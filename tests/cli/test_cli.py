"""The command line as a user meets it: the main jobs, exit status, one line for every mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import archive_oracle
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hub_server import neox_config, neox_tensors, write_checkpoint
from pyarrow import parquet
from real_data import DATA, needs_data
from safetensors.numpy import save

from llmcomp import load_model, pico, results
from llmcomp.cli.main import main
from llmcomp.data import datasets
from llmcomp.errors import Error

TEXT = (b"It was a bright cold day in April, and the clocks were striking thirteen.\n" * 60)[:4096]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def run(*args: object, env: dict[str, str] | None = None, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "llmcomp", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **(env or {})}, check=False)


def error_line(status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that failed."""
    captured = capsys.readouterr()
    assert status == 1, captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("llmcomp: ")
    return lines[0]


# The main jobs.


def sweep_arguments(three_sizes: Path, text_file: Path, out: Path) -> list[str]:
    sizes = [f"--model={three_sizes / name}" for name in ("tiny-16", "tiny-32", "tiny-48")]
    steps = ["--step=1", "--step=10", "--step=100"]
    return ["sweep", *sizes, *steps, f"--dataset=enwik8={text_file}", "--chunks=2", f"--out={out}", "-q"]


def test_sweep_fit_and_plot(
    three_sizes: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    assert main([*sweep_arguments(three_sizes, text_file, out), "--verify", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert {(cell["model"], cell["step"]) for cell in cells} == {
        (f"tiny-{width}", step) for width in (16, 32, 48) for step in (1, 10, 100)
    }
    rows = results.read_rows(out)
    assert len(rows) == 9 * 2
    assert main(["fit", str(out), "--json"]) == 0
    law = json.loads(capsys.readouterr().out)
    assert "r2" in json.dumps(law)
    assert main(["plot", str(out), "--format=png"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert paths
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_published_cells_fit_in_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--published", "--json"]) == 0
    laws = json.loads(capsys.readouterr().out)
    # FACTS of the 75 published cells: the least-squares exponents of the text law.
    assert laws["enwik8"]["coefficients"]["alpha"] == pytest.approx(0.380, abs=0.001)
    assert laws["enwik8"]["coefficients"]["beta"] == pytest.approx(0.750, abs=0.001)


def test_a_killed_sweep_finishes_when_started_again(three_sizes: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    arguments = sweep_arguments(three_sizes, text_file, out)
    process = subprocess.Popen([sys.executable, "-m", "llmcomp", *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.parquet"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert main(arguments) == 0
    assert len(results.read_rows(out)) == 9 * 2
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())


def test_solid_archives_have_the_largest_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, archive = tmp_path / "text", tmp_path / "text.llmc"
    sizes = []
    content = b"".join(b"%d sheep and %d goats; " % (n, n * n) for n in range(9000))
    for options in ([], ["--solid"]):
        source.write_bytes(content)
        assert main(["compress", "-q", "-f", "-m", "pico-13k", *options, str(source)]) == 0
        sizes.append(archive.stat().st_size)
    header = archive_oracle.read_header(archive_oracle.Reader(archive.read_bytes()))
    assert header["segment_bytes"] == 1 << 20 and sizes[1] < 0.95 * sizes[0]
    assert main(["compress", "-q", "-d", str(archive)]) == 0
    assert source.read_bytes() == content
    with pytest.raises(SystemExit) as ended:
        main(["compress", "--solid", "--segment-bytes", "100", str(source)])
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_salvage_tells_of_what_is_lost_by_its_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = random.Random(0).randbytes(1000)
    archive, out = tmp_path / "noise.llmc", tmp_path / "noise"
    options = ["compress", "-q", "-m", "pico-13k", "--segment-bytes", "100", "--salt", "00" * 16]
    out.write_bytes(content)
    assert main([*options, str(out)]) == 0
    first = archive.read_bytes()
    out.write_bytes(content)
    assert main([*options, "-f", str(out)]) == 0
    assert archive.read_bytes() == first
    assert main(["compress", "-q", "--salvage", str(archive)]) == 0
    assert out.read_bytes() == content and archive.exists()
    archive.write_bytes(first[:-400] + bytes([first[-400] ^ 1]) + first[-399:])
    capsys.readouterr()
    assert main(["compress", "-q", "-f", "--salvage", str(archive)]) == 3
    assert "bytes 600 to 700 are lost" in capsys.readouterr().err
    assert out.read_bytes() == content[:600] + content[700:]
    assert main(["compress", "-q", "-f", "--salvage", str(archive), str(tmp_path / "absent.llmc")]) == 1
    assert main(["compress", "-q", "--salvage", str(tmp_path / "absent.llmc")]) == 1


def test_compress_and_decompress_as_gzip_does(text_file: Path, tmp_path: Path) -> None:
    archive = tmp_path / "text.txt.llmc"
    assert main(["compress", "-q", "-m", "pico-13k", str(text_file)]) == 0
    assert not text_file.exists()
    assert archive.stat().st_size < len(TEXT)
    assert main(["compress", "-q", "-t", str(archive)]) == 0
    assert main(["decompress", "-q", "-k", str(archive)]) == 0
    assert text_file.read_bytes() == TEXT
    assert archive.exists()
    assert main(["decompress", "-q", str(archive)]) == 2
    assert main(["decompress", "-q", "-f", str(archive)]) == 0
    assert not archive.exists()
    other = tmp_path / "other"
    assert main(["compress", "-q", "-m", "pico-13k", "-s", "128", "-o", str(other), str(text_file)]) == 0
    assert text_file.exists()
    assert main(["compress", "-q", "-d", "-o", str(tmp_path / "back"), str(other)]) == 0
    assert (tmp_path / "back").read_bytes() == TEXT


def test_pipes_between_processes_of_other_backends() -> None:
    one = {"LLMCOMP_BACKEND": "serial", "LLMCOMP_THREADS": "2"}
    coded = run("compress", "-q", "-m", "pico-13k", stdin=TEXT, env=one)
    assert coded.returncode == 0, coded.stderr
    assert len(coded.stdout) < len(TEXT)
    decoded = run("decompress", "-q", stdin=coded.stdout, env={"LLMCOMP_THREADS": "1"})
    assert decoded.returncode == 0, decoded.stderr
    assert decoded.stdout == TEXT


def test_several_files_and_one_that_is_missing(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.txt"
    second.write_bytes(TEXT[:100])
    missing = tmp_path / "missing.txt"
    status = main(["compress", "-q", "-m", "pico-13k", str(text_file), str(missing), str(second)])
    assert "missing.txt" in error_line(status, capsys)
    assert (tmp_path / "text.txt.llmc").exists()
    assert (tmp_path / "second.txt.llmc").exists()


def test_info(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "-q", "-m", "pico-28k", "-s", "512", "-k", str(text_file)]) == 0
    archive = f"{text_file}.llmc"
    assert main(["info", archive, "--json"]) == 0
    (about,) = json.loads(capsys.readouterr().out)
    assert (about["model"], about["revision"], about["content_bytes"]) == ("pico-28k", "step512", len(TEXT))
    assert "bundled" in about["model_is"]
    assert main(["info", archive]) == 0
    assert "pico-28k" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "serial" in capsys.readouterr().out


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def test_info_of_several_files(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert main(["compress", "-q", "-k", "-m", "pico-13k", str(empty)]) == 0
    assert main(["info", "--json", str(text_file), f"{empty}.llmc"]) == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and str(text_file) in captured.err
    for told in (captured.out, main(["compress", "-l", "--json", f"{empty}.llmc"]) or capsys.readouterr().out):
        (about,) = json.loads(told, parse_constant=refuse_constant)
        assert about["content_bytes"] == 0 and about["ratio"] is None


def test_a_name_that_the_terminal_cannot_show(text_file: Path, tmp_path: Path) -> None:
    archive = os.fsencode(tmp_path) + b"/\xff.llmc"
    assert main(["compress", "-q", "-k", "-m", "pico-13k", "-o", os.fsdecode(archive), str(text_file)]) == 0
    for command in (["info"], ["decompress", "-l"]):
        answer = run(*command, os.fsdecode(archive), env={"PYTHONIOENCODING": "utf-8:strict"})
        assert answer.returncode == 0, answer.stderr
        assert b"pico-13k" in answer.stdout


def test_standard_streams_that_are_closed(text_file: Path) -> None:
    compress = f"{sys.executable} -m llmcomp compress -q -m pico-13k"
    for command, words in ((f"{compress} -c {text_file} >&-", b"output is closed"), (f"{compress} <&-", b"input is")):
        answer = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
        assert (answer.returncode, answer.stderr.count(b"\n")) == (1, 1) and words in answer.stderr, answer.stderr


def test_list_as_gzip_does(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise, foreign = tmp_path / "noise", tmp_path / "foreign.llmc"
    noise.write_bytes(random.Random(0).randbytes(256))
    foreign.write_bytes(b"no archive")
    assert main(["compress", "-q", "-m", "pico-13k", str(text_file), str(noise)]) == 0
    archives = [Path(f"{text_file}.llmc"), Path(f"{noise}.llmc")]
    assert main(["compress", "-l", str(archives[0]), str(foreign), str(archives[1])]) == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and "foreign.llmc" in captured.err
    header, *lines = [line.split() for line in captured.out.splitlines()]
    assert header[:3] == ["compressed", "uncompressed", "ratio"]
    sizes = [path.stat().st_size for path in archives]
    assert [[int(line[0]), int(line[1])] for line in lines] == [
        [sizes[0], len(TEXT)],
        [sizes[1], 256],
        [sum(sizes), len(TEXT) + 256],
    ]
    assert [line[-1] for line in lines] == [str(text_file), str(noise), "(totals)"]
    assert lines[0][3:5] == ["pico-13k", "step2048"] and lines[1][3] == "-"


def test_checkpoints_of_a_suite_are_chosen_by_words(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", "--suite=pico", "--models=13k..28k", f"--dataset=enwik8={text_file}", "--chunks=1", "-q"]
    arguments += ["--out", str(tmp_path / "out"), "--json"]
    assert main([*arguments, "--steps=log:2", "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["step"]) for row in planned] == [
        (name, step) for name in ("pico-13k", "pico-28k") for step in (128, 2048)
    ]
    assert main([*arguments, "--tokens=262144"]) == 0
    assert [(row["params"], row["step"]) for row in json.loads(capsys.readouterr().out)] == [(45536, 128), (77520, 128)]
    assert main([*arguments, "--steps=129"]) == 1
    assert "pico-13k has no step 129; the nearest are 128, 256" in capsys.readouterr().err
    assert main([*arguments, "--disk=0.5"]) == 1
    assert "expected bytes" in capsys.readouterr().err


def test_suites_are_listed_with_what_is_uncertain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("pico", "pythia", "polypythias", "olmo3", "datadecide", "apertus"))
    assert main(["models", "pythia"]) == 0
    shown = capsys.readouterr().out
    assert (
        "EleutherAI/pythia-12b-deduped" in shown
        and "154 from 0 to 143000" in shown
        and "uncertain: pythia-2.8b" in shown
    )
    assert main(["models", "olmo3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["params"] == 7_298_011_136
    assert main(["models", "pythai"]) == 1
    assert "no suite is called 'pythai'" in capsys.readouterr().err
    assert main(["models", "one", "two"]) == 1


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    names = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert {"pico-13k", "EleutherAI/pythia-1.4b"} <= names
    assert main(["data", "list", "--json"]) == 0
    assert {"text-sample", "enwik8"} <= {entry["name"] for entry in json.loads(capsys.readouterr().out)}


def test_score_writes_its_rows(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.parquet"
    arguments = ["score", "pico-13k", "--step=2048", f"--dataset=enwik8={text_file}", "--chunks=2", "-q", "--json"]
    assert main([*arguments, "--verify", "--out", str(out)]) == 0
    (cell,) = json.loads(capsys.readouterr().out)
    rows = results.read_rows(out)
    assert cell["ratio"] == pytest.approx(rows["coded_bytes"].sum() / rows["bytes_in"].sum())
    assert rows["bytes_in"].tolist() == [2048, 2048]


def test_a_manifest_is_written_and_checked(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(tmp_path / "chunks.json")
    data = f"enwik8={text_file}"
    assert main(["data", "manifest", data, manifest, "--chunks=2"]) == 0
    assert main(["data", "check", data, manifest, "--chunks=2"]) == 0
    text_file.write_bytes(TEXT[::-1])
    assert "chunk 0" in error_line(main(["data", "check", data, manifest, "--chunks=2"]), capsys)


def test_dry_run_computes_nothing(
    three_sizes: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    assert main([*sweep_arguments(three_sizes, text_file, out), "--dry-run"]) == 0
    assert "9 cells, 0 finished, 9 to do" in capsys.readouterr().out
    assert not out.exists()


# Mistakes.


Broken = Callable[[Path], list[str]]


def missing_model(folder: Path) -> list[str]:
    return ["score", str(folder / "nowhere"), "--dataset=text"]


def foreign_folder(folder: Path) -> list[str]:
    (folder / "photos").mkdir()
    return ["score", str(folder / "photos"), "--dataset=text"]


def other_architecture(folder: Path) -> list[str]:
    model = write_checkpoint(folder / "other", 1)
    (model / "config.json").write_text(json.dumps({"model_type": "perceptron"}))
    return ["score", str(model), "--dataset=text"]


def truncated_weights(folder: Path) -> list[str]:
    model = write_checkpoint(folder / "cut", 1)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) * 2 // 3])
    return ["score", str(model), "--dataset=text"]


def nan_weights(folder: Path) -> list[str]:
    model = write_checkpoint(folder / "nan", 1)
    tensors = neox_tensors(neox_config(), 1)
    tensors["gpt_neox.final_layer_norm.bias"][:] = np.nan
    (model / "model.safetensors").write_bytes(save(tensors))
    return ["score", str(model), "--dataset=text", "--chunks=2", "-q"]


def short_data(folder: Path) -> list[str]:
    (folder / "short").write_bytes(b"too short")
    return ["score", "pico-13k", f"--dataset=enwik8={folder / 'short'}"]


def unwritable_folder(folder: Path) -> list[str]:
    (folder / "file").write_bytes(b"")
    return ["sweep", "--model=pico-13k", "--dataset=text", "--chunks=1", f"--out={folder / 'file' / 'out'}"]


def damaged_archive(folder: Path) -> list[str]:
    (folder / "text").write_bytes(TEXT)
    assert main(["compress", "-q", "-k", "-m", "pico-13k", str(folder / "text")]) == 0
    archive = folder / "text.llmc"
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    archive.write_bytes(damaged)
    (folder / "text").unlink()
    return ["decompress", "-q", str(archive)]


def another_model(folder: Path) -> list[str]:
    (folder / "text").write_bytes(TEXT)
    assert main(["compress", "-q", "-m", "pico-13k", str(folder / "text")]) == 0
    return ["decompress", "-q", "-m", "pico-28k", str(folder / "text.llmc")]


def no_results(folder: Path) -> list[str]:
    return ["fit", str(folder)]


def unknown_dataset(folder: Path) -> list[str]:
    return ["score", "pico-13k", "--dataset=novels"]


def unknown_mirror(folder: Path) -> list[str]:
    return ["data", "fetch", "everything"]


def two_outputs(folder: Path) -> list[str]:
    return ["compress", "-o", str(folder / "out"), "a", "b"]


def two_archives_on_one_output(folder: Path) -> list[str]:
    return ["compress", "-c", "a", "b"]


def report_among_the_data(folder: Path) -> list[str]:
    (folder / "text").write_bytes(TEXT)
    return ["compress", "-q", "-m", "pico-13k", "--json", "-c", str(folder / "text")]


def output_in_no_folder(folder: Path) -> list[str]:
    (folder / "text").write_bytes(TEXT)
    return ["compress", "-q", "-m", "pico-13k", "-o", str(folder / "nowhere" / "out"), str(folder / "text")]


def unknown_figure_format(folder: Path) -> list[str]:
    return ["plot", "--published", "--format=webpage", f"--out={folder / 'figures'}"]


def other_table(folder: Path) -> list[str]:
    (folder / "other").mkdir()
    parquet.write_table(pa.table({"x": [1]}), folder / "other" / "x.parquet")
    return ["score", "pico-13k", f"--dataset=image={folder / 'other'}"]


def damaged_table(folder: Path) -> list[str]:
    (folder / "damaged").mkdir()
    (folder / "damaged" / "x.parquet").write_bytes(b"PAR1" + bytes(20))
    return ["score", "pico-13k", f"--dataset=image={folder / 'damaged'}"]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (missing_model, "nowhere"),
        (foreign_folder, "config.json"),
        (other_architecture, "'perceptron'"),
        (truncated_weights, "model.safetensors"),
        (nan_weights, "NaN"),
        (short_data, "short"),
        (unwritable_folder, "cannot write results there"),
        (damaged_archive, "text.llmc"),
        (another_model, "pico-28k"),
        (no_results, "no *.parquet"),
        (unknown_dataset, "novels"),
        (unknown_mirror, "everything"),
        (two_outputs, "-o names one file"),
        (two_archives_on_one_output, "one standard output"),
        (report_among_the_data, "--json and the data"),
        (output_in_no_folder, "nowhere/out: No such file"),
        (unknown_figure_format, "'webpage'"),
        (other_table, "x.parquet"),
        (damaged_table, "x.parquet"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    mistake: Broken, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = mistake(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    capsys.readouterr()
    assert words in error_line(main(arguments), capsys)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_file_is_named_though_its_name_is_in_the_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(TEXT)
    assert "llmcomp: a: not an llmcomp archive" in error_line(main(["decompress", "-q", "-t", "a"]), capsys)


def test_tokens_out_of_range() -> None:
    model = load_model("pico-13k")
    for tokens in ([[0, model.n_logits]], [[-1]]):
        with pytest.raises(Error, match="token"):
            model.logits(np.array(tokens))


def test_a_failed_cell_makes_the_sweep_fail(three_sizes: Path, text_file: Path, tmp_path: Path) -> None:
    broken = write_checkpoint(tmp_path / "broken", 1)
    (broken / "model.safetensors").write_bytes(b"\0" * 20)
    out = tmp_path / "results"
    answer = run(
        "sweep",
        "-q",
        "--model",
        three_sizes / "tiny-16",
        "--model",
        broken,
        f"--dataset=enwik8={text_file}",
        "--out",
        out,
    )
    assert answer.returncode == 1
    assert b"1 cells failed, the first: " in answer.stderr
    assert b"Traceback" not in answer.stderr
    assert len(results.read_rows(out)) == 2


def test_usage_is_status_2() -> None:
    both = ["sweep", "--suite=pico", "--model=pico-13k", "--dry-run"]
    for arguments in ([], ["compres"], ["sweep", "--chunks", "0"], ["score"], both):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 2


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmcomp.law.fit.fit_scaling_law", interrupted)
    assert main(["fit", "--published"]) == 130
    assert capsys.readouterr().err == "llmcomp: interrupted\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Error):
        main(["fit", "/no/such/folder", "--debug"])


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m llmcomp models | head -1"
    answer = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert answer.stderr == b""


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["demo", "data", "score", "sweep", "fit", "plot", "compress", "decompress", "info", "bench", "models"]
    for command in commands:
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--help"])
        assert exit_info.value.code == 0
        assert "usage: llmcomp" in capsys.readouterr().out


# Real files.


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    answer = run("demo", "--out", tmp_path / "demo", "--chunks", "2", "--json", "-q")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert len(found["cells"]) == 75
    assert set(found["laws"]) == {"text-sample", "image-sample", "speech-sample"}
    assert all(Path(path).stat().st_size > 1000 for path in found["figures"])
    files = list((tmp_path / "demo").rglob("*.parquet"))
    # For each of three samples the compressors, random weights and the random distribution.
    assert len(files) == 75 + 3 * 3
    files = [path for path in files if not path.name.startswith("baselines_")]
    assert all(results.read_metadata(path)["llmcomp.verified"] == "true" for path in files)


@pytest.mark.slow
@needs_data
def test_every_payload_of_a_sweep_over_real_files_decodes(tmp_path: Path) -> None:
    names = {"enwik8": "enwik8.head", "image": "imagenet-val", "speech": "librispeech"}
    specs = [f"--dataset={name}={DATA / path}" for name, path in names.items()]
    out = tmp_path / "results"
    answer = run("sweep", "-q", "--suite=pico", *specs, "--chunks=2", "--verify", "--out", out)
    assert answer.returncode == 0, answer.stderr
    rows = results.read_rows(out)
    assert len(rows) == len(pico.SUITE_NAMES) * len(pico.STEPS) * 3 * 2
    for name, path in names.items():
        data = datasets.load_dataset(f"{name}={DATA / path}", n_chunks=2, progress=False)
        assert rows[rows["dataset"] == name]["bytes_in"].sum() == 25 * sum(map(len, data.chunks))


def test_chunks_are_drawn_or_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = b"".join(b"line %d of the log\n" % i for i in range(900))
    spec = f"log={tmp_path / 'own.txt'}"
    (tmp_path / "own.txt").write_bytes(content)
    given = ["score", "pico-13k", f"--dataset={spec}", "--chunks=3", "--chunk-bytes=256", "-q"]

    def rows_of(*options: str) -> pd.DataFrame:
        assert main([*given, *options, f"--out={tmp_path / 'rows.parquet'}"]) == 0
        return results.read_rows(tmp_path / "rows.parquet").sort_values("chunk")

    first, drawn, whole = rows_of("--draw=first"), rows_of("--seed=4"), rows_of("--whole", "--chunks=1")
    assert first["offset"].tolist() == [0, 256, 512] and set(first["draw"]) == {"first"}
    expected = datasets.load_dataset(spec, 3, 256, seed=4, progress=False)
    assert drawn["offset"].tolist() == list(expected.offsets) != [0, 256, 512]
    assert set(drawn["draw"]) == {"spread"} and set(drawn["draw_seed"]) == {4}
    assert whole["bytes_in"].tolist() == [len(content)]
    capsys.readouterr()

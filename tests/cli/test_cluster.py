"""`llmcomp sweep --workers | --shards | --slurm | --ray` and `llmcomp merge` as a user meets them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmcomp import results
from llmcomp.cli.main import main


@pytest.fixture
def grid(three_sizes: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_bytes(b"It was a bright cold day in April.\n" * 120)
    sizes = [f"--model={three_sizes / name}" for name in ("tiny-16", "tiny-32", "tiny-48")]
    steps = ["--step=1", "--step=10", "--step=100"]
    return ["sweep", *sizes, *steps, f"--dataset=enwik8={tmp_path / 'text.txt'}", "--chunks=2", "-q"]


def rows_of(path: Path) -> list[dict[str, object]]:
    rows = results.read_rows(path).drop(columns=list(results.MACHINE_COLUMNS))
    return rows.sort_values(["model", "step", "chunk"]).to_dict("records")


def test_workers_shards_and_one_process_say_the_same(
    grid: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, shards = (tmp_path / name for name in ("one", "two", "shards"))
    assert main([*grid, f"--out={one}", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*grid, f"--out={two}", "--json", "--workers=2"]) == 0
    assert json.loads(capsys.readouterr().out) == alone
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert main([*grid, f"--out={shards}", "--json", "--shards=4"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == []
    assert str(rows_of(one)) == str(rows_of(two)) == str(rows_of(shards))
    # What was computed is read where it lies, or as one file.
    assert main(["merge", str(shards), "-o", str(tmp_path / "all.parquet"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 18
    assert main(["fit", str(tmp_path / "all.parquet"), "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert main(["fit", str(one), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == merged


def test_large_results_are_fitted_cell_by_cell(
    grid: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*grid, f"--out={tmp_path / 'out'}"]) == 0
    capsys.readouterr()
    assert main(["fit", str(tmp_path / "out"), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("llmcomp.cli.commands._ROWS_HELD", 17)
    monkeypatch.setattr("llmcomp.results.files._BATCH_ROWS", 5)
    assert main(["fit", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "18 chunks are read cell by cell" in captured.err
    other = json.loads(captured.out)
    assert (whole["n_cells"], other["n_cells"]) == (9, 9)
    assert other["r2"] == pytest.approx(whole["r2"], rel=1e-6)


def test_an_array_job_runs_the_same_command(
    grid: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is run as Slurm would run it, twice at once, with bash in the place of Slurm."""
    out = tmp_path / "out put"
    assert main([*grid, f"--out={out}", "--shards=2", "--slurm", "--cpus=3"]) == 0
    job = capsys.readouterr().out
    directives = [line for line in job.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "--array=0-1",
        "--requeue",
        "--cpus-per-task=3",
        "--mem=3G",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
    ):
        assert f"#SBATCH {wanted}" in directives
    assert not any("gpu" in line for line in directives)
    assert list(out.iterdir()) == []
    # Slurm starts in --chdir, where the command of the script may not be on the path: here it is this Python.
    script = job.replace(shlex.join(shlex.split(job.splitlines()[-1])[:2]), f"exec {sys.executable} -m llmcomp")
    (tmp_path / "job").write_text(script)
    tasks = []
    for number in range(2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
        tasks.append(subprocess.Popen(["bash", tmp_path / "job"], stderr=subprocess.PIPE))
    for task in tasks:
        _, said = task.communicate(timeout=120)
        assert task.returncode == 0, said.decode()
    assert len(results.read_rows(out)) == 18


def test_a_gpu_is_asked_for_where_the_device_is_one(
    grid: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*grid, f"--out={tmp_path / 'out'}", "--shards=2", "--slurm", "--engine=torch", "--device=cuda"]) == 0
    assert "#SBATCH --gpus-per-task=1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shards=4"], "which of the 4 workers is this? Give --shard I"),
        (["--slurm"], "of how many workers with --shards N"),
        (["--shards=4", "--shard=-1"], "shard is -1"),
        (["--shards=4", "--shard=0", "--lease=0"], "--lease is 0"),
        (["--shards=4", "--shard=0", "--disk=1GB"], "disk bounds the downloads"),
    ],
)
def test_wrong_requests(
    grid: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert "SLURM_ARRAY_TASK_ID" not in os.environ
    assert main([*grid, f"--out={tmp_path / 'out'}", *options]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_named(grid: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    assert main([*grid, f"--out={out}"]) == 0
    capsys.readouterr()
    for arguments, words in (
        ([out, "-o", out / "all.parquet"], "would be read a second time"),
        ([tmp_path / "none", "-o", tmp_path / "all.parquet"], "no such file or folder"),
        ([out, "-o", "/proc/none/all.parquet"], "cannot write /proc/none/all.parquet"),
    ):
        assert main(["merge", *map(str, arguments)]) == 1
        assert words in capsys.readouterr().err
    # The same cells from two folders count once; other rows under the same name do not.
    assert main([*grid, f"--out={copy}"]) == 0
    capsys.readouterr()
    assert main(["merge", str(out), str(copy), "-o", str(tmp_path / "all.parquet")]) == 0
    assert "18 rows" in capsys.readouterr().out
    victim = next(copy.glob("*.parquet"))
    rows = results.read_rows(victim)
    results.write_rows(victim, rows.assign(ideal_bits=rows["ideal_bits"] + 1))
    assert main(["merge", str(out), str(copy), "-o", str(tmp_path / "all.parquet")]) == 1
    assert "of one name and hold other rows" in capsys.readouterr().err

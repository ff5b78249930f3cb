"""Which finished cells and chunks are kept, known again, set aside or computed again: torn files, more chunks, other
settings beside each other, names that look alike, older names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hub_server import write_checkpoint
from small_sweeps import STEPS, Counting, Data, cell_files, run, some_data, without_time

from llmcomp import results
from llmcomp.experiment import plan as grid
from llmcomp.experiment.sweep import sweep


def test_a_finished_cell_is_never_computed_again(suite: Path, tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    rows = run(suite, tmp_path, first)
    assert len(first.calls) == 4
    again = run(suite, tmp_path, second)
    assert second.calls == []
    pd.testing.assert_frame_equal(rows, again)


@pytest.mark.parametrize("fault", ["truncated", "empty", "another cell", "not Parquet", "no key"])
def test_files_that_are_torn_or_foreign_are_recomputed(suite: Path, tmp_path: Path, fault: str) -> None:
    rows = run(suite, tmp_path)
    victim, other = cell_files(tmp_path)[:2]
    whole = victim.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "another cell": other.read_bytes(),
        "not Parquet": b"ratio,0.1\n",
        "no key": b"",
    }
    victim.write_bytes(damaged[fault])
    if fault == "no key":
        results.write_rows(victim, rows[rows["step"] == 1].iloc[:3].assign(ratio=0.1, coded_bytes=20))
    scorer = Counting()
    again = run(suite, tmp_path, scorer)
    assert len(scorer.calls) == 1
    pd.testing.assert_frame_equal(without_time(rows), without_time(again))
    assert len(results.read_rows(tmp_path)) == len(rows)


def test_no_flipped_bit_changes_a_trusted_row(suite: Path, tmp_path: Path) -> None:
    rows = run(suite, tmp_path, steps=(1,), datasets=some_data()[:1])
    (path,) = cell_files(tmp_path)
    key = results.read_metadata(path)[grid.KEY]
    cell = grid.Cell("tiny", 1, "prose", "lossless", "bytes", key, path, 600)
    whole, n_refused = path.read_bytes(), 0
    for at in range(5, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        found = grid.finished_rows(cell)
        n_refused += found is None
        assert found is None or found.equals(rows)
    assert n_refused >= 10


class Chunks(Counting):
    """What each call was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[list[bytes]] = []

    def __call__(self, chunks: list[bytes], *rest: Any, **options: Any) -> pd.DataFrame:
        self.given.append(list(chunks))
        return super().__call__(chunks, *rest, **options)


def of_rows(rows: pd.DataFrame) -> list[list[Any]]:
    key = ["model", "step", "dataset", "chunk", "bytes_in", "coded_bytes", "data_sha256"]
    return rows.sort_values(key)[key].to_numpy().tolist()


def test_more_chunks_keep_those_that_are_there(suite: Path, tmp_path: Path) -> None:
    def asked(n: int, out: str = "out") -> tuple[pd.DataFrame, list[list[bytes]]]:
        scorer = Chunks()
        data = [Data(d.name, d.modality, d.chunks[:n]) for d in some_data(n_chunks=9)]
        return run(suite, tmp_path / out, scorer, datasets=data), scorer.given

    all_chunks = {data.name: data.chunks for data in some_data(n_chunks=9)}
    for n_before, n in ((0, 3), (3, 7), (7, 9)):
        rows, given = asked(n)
        assert sorted(given) == sorted(2 * [chunks[n_before:n] for chunks in all_chunks.values()])
        assert of_rows(rows) == of_rows(asked(n, f"alone-{n}")[0])
        assert of_rows(results.read_rows(tmp_path / "out")) == of_rows(rows)
    # Fewer are some of those; neither the files nor their sums are touched.
    for n in (2, 3, 5, 8):
        rows, given = asked(n)
        assert given == [] and of_rows(rows) == of_rows(asked(n, f"alone-{n}")[0])
    cells = sweep(suite, STEPS, [Data(d.name, d.modality, d.chunks[:5]) for d in some_data(n_chunks=9)],
                  tmp_path / "out", unit="cell", progress=False)  # fmt: skip
    assert cells["chunks"].tolist() == [5] * 4
    assert len(cell_files(tmp_path / "out")) == 4 * 3
    assert not list((tmp_path / "out").glob("*.superseded"))


def test_chunks_are_kept_only_where_they_are_the_same(suite: Path, tmp_path: Path) -> None:
    """And verified, where that is asked for."""
    before = some_data(n_chunks=3)[0]
    run(suite, tmp_path, steps=(1,), datasets=[before])
    other = Data(before.name, before.modality, [before.chunks[0], b"another chunk", *before.chunks[2:], b"and more"])
    scorer = Chunks()
    run(suite, tmp_path, scorer, steps=(1,), datasets=[other])
    assert scorer.given == [other.chunks]
    # They begin alike, so rows could not be told apart: the older are set aside.
    assert len(list(tmp_path.glob("*.superseded"))) == 1
    scorer = Chunks()
    run(suite, tmp_path, scorer, steps=(1,), datasets=[other], verify=True)
    assert scorer.given == [other.chunks]
    assert len(results.read_rows(tmp_path)) == 4


def test_other_data_and_settings_lie_beside_each_other(suite: Path, tmp_path: Path) -> None:
    content = np.random.default_rng(3).bytes(4000)
    (tmp_path / "own.bin").write_bytes(content)
    out, tables = tmp_path / "out", []
    for options in ({}, {"seed": 1}, {"draw": "first"}, {"chunk_bytes": 200}, {"engine": "exact-int8"}):
        how: dict[str, Any] = {"n_chunks": 4, "chunk_bytes": 100, **options}
        tables.append(sweep(suite, 1, {"own": tmp_path / "own.bin"}, out, progress=False, **how))
    (tmp_path / "own.bin").write_bytes(content[::-1])
    tables.append(sweep(suite, 1, {"own": tmp_path / "own.bin"}, out, n_chunks=4, chunk_bytes=100, progress=False))
    assert [len(table) for table in tables] == [4] * 6
    assert len(results.read_rows(out)) == 24
    assert len(results.cells(results.read_rows(out))) == 6
    assert not list(out.glob("*.superseded"))


@pytest.mark.parametrize("names", [("run_1", "run-1"), ("a/tiny", "b/tiny"), ("run 1/step5", "run:1/step5")])
def test_a_model_whose_name_looks_alike_keeps_its_finished_cells(tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = (write_checkpoint(tmp_path / name, seed=i) for i, name in enumerate(names))
    out, text = tmp_path / "out", some_data()[:1]
    for folder in (first, second):
        assert sweep(folder, datasets=text, out=out, scorer=Counting(), progress=False).attrs["failed"] == []
    assert not list(out.glob("*.superseded"))
    assert len(cell_files(out)) == 2
    scorer = Counting()
    sweep([first, second], datasets=text, out=out, scorer=scorer, progress=False)
    assert scorer.calls == []
    # Trained again in its place it is another model, and the cells of the older one stay as well.
    write_checkpoint(second, seed=9)
    sweep(second, datasets=text, out=out, scorer=scorer, progress=False)
    assert len(scorer.calls) == 1 and not list(out.glob("*.superseded"))
    assert len(cell_files(out)) == 3


def older_names(out: Path) -> None:
    """Files as version 0.1 called them: model, step, dataset, protocol, mapping, engine, chunks, digest of the key."""
    for path in cell_files(out):
        path.rename(re.sub(r"_[0-9a-f]{10}(?=_\d+chunks_[0-9a-f]{12}\.parquet$)", "", str(path)))


def test_finished_cells_under_older_names_are_known_again(suite: Path, tmp_path: Path) -> None:
    rows = run(suite, tmp_path)
    older_names(tmp_path)
    names = [path.name for path in cell_files(tmp_path)]
    assert re.fullmatch(r"tiny_step1_noise_lossless_bytes_exact_3chunks_[0-9a-f]{12}\.parquet", names[0])
    scorer = Counting()
    again = run(suite, tmp_path, scorer)
    assert scorer.calls == []
    pd.testing.assert_frame_equal(rows, again)
    assert [path.name for path in cell_files(tmp_path)] == names
    # Other settings set them aside, and so does a wish to have them verified.
    run(suite, tmp_path, scorer, datasets=some_data(n_chunks=2))
    assert len(results.read_rows(tmp_path)) == 4 * 2
    older_names(tmp_path)
    run(suite, tmp_path, scorer, datasets=some_data(n_chunks=2), verify=True)
    assert len(results.read_rows(tmp_path)) == 4 * 2
    assert len(list(tmp_path.glob("*.superseded"))) == 8


def test_another_models_cells_under_older_names_stay(tmp_path: Path) -> None:
    first, second = (write_checkpoint(tmp_path / name, seed=i) for i, name in enumerate(("run_1", "run-1")))
    out, text = tmp_path / "out", some_data()[:1]
    sweep(first, datasets=text, out=out, scorer=Counting(), progress=False)
    older_names(out)
    torn = out / cell_files(out)[0].name.replace("_3chunks_", "_4chunks_")
    torn.write_bytes(b"PAR1")
    sweep(second, datasets=text, out=out, scorer=Counting(), progress=False)
    assert [path.name for path in out.glob("*.superseded")] == [f"{torn.name}.superseded"]
    scorer = Counting()
    sweep([first, second], datasets=text, out=out, scorer=scorer, progress=False)
    assert scorer.calls == []


def test_copies_of_one_checkpoint_are_one_cell(suite: Path, tmp_path: Path) -> None:
    shutil.copytree(suite / "step1", tmp_path / "copy" / "tiny" / "step1")
    text, out = some_data()[:1], tmp_path / "out"
    scorer = Counting()
    run(suite, out, steps=(1,), datasets=text)
    run(tmp_path / "copy" / "tiny", out, scorer, steps=(1,), datasets=text)
    assert scorer.calls == []
    sweep([suite, tmp_path / "copy" / "tiny"], 1, text, tmp_path / "two", scorer=scorer, progress=False)
    assert len(cell_files(tmp_path / "two")) == 1
    assert len(results.read_rows(tmp_path / "two")) == 3


@pytest.mark.parametrize("name", ["\u6587" * 80, "x" * 250, "é" * 127])
def test_folders_with_names_as_long_as_file_systems_allow(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / name, seed=1)
    text = [Data("d" * 200, "text", some_data()[0].chunks)]
    rows = sweep(folder, datasets=text, out=tmp_path / "out", scorer=Counting(), progress=False)
    assert rows.attrs["failed"] == []
    assert set(rows["model"]) == {name}
    scorer = Counting()
    text = [Data("d" * 200, "text", some_data(n_chunks=4)[0].chunks)]
    sweep(folder, datasets=text, out=tmp_path / "out", scorer=scorer, progress=False)
    assert len(scorer.calls) == 1 and len(results.read_rows(tmp_path / "out")) == 4
    cell_files(tmp_path / "out")[0].write_bytes(b"PAR1")
    sweep(folder, datasets=text, out=tmp_path / "out", scorer=scorer, progress=False)
    assert len(list((tmp_path / "out").glob("*.superseded"))) == 1


def test_what_was_not_verified_is_computed_again_if_it_is_to_be(suite: Path, tmp_path: Path) -> None:
    run(suite, tmp_path)
    scorer = Counting()
    run(suite, tmp_path, scorer, verify=True)
    assert len(scorer.calls) == 4
    for verify in (True, False):
        run(suite, tmp_path, scorer, verify=verify)
    assert len(scorer.calls) == 4


def test_another_grid_in_the_same_folder_leaves_the_first_alone(suite: Path, tmp_path: Path) -> None:
    first, second = some_data()
    run(suite, tmp_path, datasets=[first])
    run(suite, tmp_path, datasets=[second])
    assert len(cell_files(tmp_path)) == 4
    assert not list(tmp_path.glob("*.superseded"))

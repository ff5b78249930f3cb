"""Rows, cells, Parquet files and the published table, against sums done by hand and files damaged on purpose."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from real_data import DATA, needs_data
from result_rows import make_rows
from scipy import stats

from llmcomp import results
from llmcomp.errors import Error


def test_empty_rows_have_every_column_in_its_dtype():
    empty = results.empty_rows()
    assert len(empty) == 0
    assert {name: str(dtype) for name, dtype in empty.dtypes.items()} == {
        n: d for n, (d, _) in results.ROW_COLUMNS.items()
    }
    assert len(results.check_rows(empty)) == 0
    assert len(results.cells(empty)) == 0


def test_check_rows_orders_converts_and_keeps_other_columns():
    rows = make_rows(modality=None)[::-1]
    rows["note"] = "kept"
    checked = results.check_rows(rows[rows.columns[::-1]])
    assert list(checked.columns) == [*results.ROW_COLUMNS, "note"]
    assert str(checked["params"].dtype) == "Int64"
    assert list(checked["modality"]) == ["", ""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "loseless"}, "protocol is not one of"),
        ({"bytes_in": [0, 1024]}, "bytes_in is not above 0"),
        ({"bytes_scored": [2049, 1]}, "bytes_scored"),
        ({"ratio": [0.9, 0.5]}, "ratio differs from its bits"),
        ({"ratio": [float("nan"), 0.5]}, "ratio has no value in row 0"),
        ({"ratio": [float("inf"), 0.5]}, "ratio is not a number"),
        ({"coded_bytes": pd.NA}, "without coded_bytes"),
        ({"chunk": [3, 3]}, "chunk 3 of model 'pico-13k', step 128, data set 'd'.*more than once"),
        ({"chunk": [0.5, 1.0]}, "chunk is not int64"),
        ({"step": -1}, "step is below 0"),
        ({"params": "many"}, "params is not Int64"),
    ],
)
def test_faults_are_named(changes, message):
    rows = make_rows().assign(**changes)
    with pytest.raises(Error, match=message):
        results.check_rows(rows)


def test_a_missing_column_and_a_foreign_object_are_named():
    with pytest.raises(Error, match=r"missing column.*seconds"):
        results.check_rows(make_rows().drop(columns="seconds"))
    with pytest.raises(Error, match="two columns are called 'ratio'"):
        results.cells(pd.concat([make_rows(), make_rows()[["ratio"]]], axis=1))
    with pytest.raises(Error, match="found list"):
        results.check_rows([1, 2])
    with pytest.raises(Error, match="a published row without ideal_bits"):
        results.check_rows(make_rows(protocol="published", ideal_bits=float("nan"), ratio=0.5))


def test_cells_weigh_bytes_in_ratio_and_chunks_in_mean_ratio():
    cell = results.cells(make_rows(coded_bytes=(500, 700), chunk_bytes=(2048, 1024)))
    assert len(cell) == 1
    row = cell.iloc[0]
    first, second = 4008 / 16384, 5608 / 8192
    assert row["ratio"] == pytest.approx((4008 + 5608) / (16384 + 8192), rel=1e-12)
    assert row["mean_ratio"] == pytest.approx((first + second) / 2, rel=1e-12)
    # two values: standard deviation |x - y| / sqrt(2), standard error |x - y| / 2
    assert row["stderr"] == pytest.approx(abs(first - second) / 2, rel=1e-12)
    assert (row["chunks"], row["bytes_in"], row["coded_bytes"], row["side_bits"]) == (2, 3072, 1200, 16)
    assert row["seconds"] == pytest.approx(0.5)
    assert row["covered"] == 1.0
    assert list(cell.columns) == list(results.CELL_COLUMNS)


def test_cells_keep_protocols_streams_and_baselines_apart():
    stream = make_rows(model="gzip", params=pd.NA, step=pd.NA, tokens=pd.NA, ideal_bits=float("nan"), mapping="")
    one = stream.iloc[:1].assign(chunk=results.STREAM_CHUNK)
    table = pd.concat([make_rows(), make_rows(protocol="published"), stream, one], ignore_index=True)
    cells = results.cells(table)
    assert list(zip(cells["model"], cells["protocol"], cells["unit"], strict=True)) == [
        ("gzip", "lossless", "chunk"), ("gzip", "lossless", "stream"),
        ("pico-13k", "lossless", "chunk"), ("pico-13k", "published", "chunk"),
    ]  # fmt: skip
    assert cells["params"].isna().tolist() == [True, True, False, False]
    assert np.isnan(cells["stderr"].iloc[1])
    assert cells["coded_bytes"].isna().tolist() == [False, False, False, True]
    assert cells["ideal_bits"].isna().tolist() == [True, True, False, False]
    pd.testing.assert_frame_equal(results.cells(cells), cells)


def test_rows_come_back_from_parquet_as_they_were(tmp_path):
    rows = results.check_rows(
        pd.concat([make_rows(), make_rows(protocol="published", params=pd.NA)], ignore_index=True)
    )
    path = results.write_rows(tmp_path / "new" / "cell.parquet", rows)
    assert [file.name for file in path.parent.iterdir()] == ["cell.parquet"]
    pd.testing.assert_frame_equal(results.read_rows(path), rows)
    # readable by anything that reads Parquet, with the units beside the columns
    schema = pq.read_schema(path)
    assert schema.field("seconds").metadata[b"unit"].startswith(b"seconds")
    assert schema.field("coded_bytes").type == pa.int64()


def test_a_folder_is_read_in_order_and_part_files_are_not(tmp_path):
    for step in (256, 128):
        results.write_rows(tmp_path / "deep=1" / f"step{step:04d}.parquet", make_rows(step=step))
    (tmp_path / ".step9999.parquet.abc.part").write_bytes(b"PAR1 half")
    (tmp_path / ".hidden.parquet").write_bytes(b"PAR1 half")
    rows = results.read_rows(tmp_path)
    assert rows["step"].tolist() == [128, 128, 256, 256]
    results.write_rows(tmp_path / "again.parquet", make_rows(step=128))
    with pytest.raises(Error, match=r"step 128.*more than once"):
        results.read_rows(tmp_path)


def test_damaged_foreign_and_missing_files_are_named(tmp_path):
    good = results.write_rows(tmp_path / "good.parquet", make_rows())
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-20])
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    (tmp_path / "empty").mkdir()
    for path, message in [
        (cut, "cut.parquet: not a readable"), (foreign, "foreign.parquet: not a file of llmcomp's rows"),
        (tmp_path, "cut.parquet"), (tmp_path / "empty", "no \\*.parquet"), (tmp_path / "none", "no such file"),
    ]:  # fmt: skip
        with pytest.raises(Error, match=message):
            results.read_rows(path)


def rewrite(path, metadata=None, **columns):
    """The file with other columns and metadata, by pyarrow alone."""
    table = pq.read_table(path)
    for name, values in columns.items():
        array = pa.array(values)
        i = table.schema.get_field_index(name)
        table = table.set_column(i, name, array) if i >= 0 else table.append_column(name, array)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **(metadata or {})}), path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"model": [[1], [2]]}, "rows: column model is list<element: int64>, expected string"),
        ({"device": [1, 2]}, "rows: column device is int64, expected string"),
        ({"step": ["9" * 400] * 2}, "rows: column step is not Int64"),
        ({"step": [float("inf")] * 2}, "rows: column step is not Int64"),
        ({"tokens": [1e300] * 2}, "rows: column tokens is not Int64"),
        ({"bytes_in": np.array([2**64 - 1] * 2, np.uint64)}, "rows: column bytes_in is not int64"),
        ({"chunk": [b"\xff", b"a"]}, "rows: column chunk is not int64"),
        ({"ratio": [{"a": 1}] * 2}, "rows: column ratio is not float64"),
        ({"params": [[], [1]]}, "rows: column params is not Int64"),
        ({"seconds": ["a\nb\x1b[2J"] * 2}, "rows: column seconds is not float64"),
    ],
)
def test_columns_of_other_types_end_in_one_error(tmp_path, columns, message):
    path = results.write_rows(tmp_path / "rows.parquet", make_rows())
    rewrite(path, **columns)
    with pytest.raises(Error) as raised:
        results.cells(results.read_rows(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


@pytest.mark.parametrize("pandas", [b"[", b"{}", b"[" * 100_000, b"\xff", b'{"index_columns": [1], "columns": 3}'])
def test_what_pandas_once_wrote_beside_the_columns_is_not_read(tmp_path, pandas):
    path = results.write_rows(tmp_path / "rows.parquet", make_rows())
    expected = results.read_rows(path)
    rewrite(path, {b"pandas": pandas})
    pd.testing.assert_frame_equal(results.read_rows(path), expected)


def test_more_rows_than_a_cell_has_are_not_read(tmp_path, monkeypatch):
    path = results.write_rows(tmp_path / "rows.parquet", make_rows())
    monkeypatch.setattr("llmcomp.results.files._ROWS_MAX", 1)
    with pytest.raises(Error, match=r"rows.parquet: 2 rows, expected at most 1"):
        results.read_rows(path)


def test_metadata_of_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.parquet")
    for read in (results.read_metadata, results.read_rows):
        with pytest.raises(Error, match="not a regular file"):
            read(tmp_path / "pipe.parquet")


def test_names_that_are_too_long(tmp_path):
    with pytest.raises(Error, match="no such file"):
        results.read_rows(tmp_path / ("x" * 300))
    with pytest.raises(Error, match="not a readable Parquet file"):
        results.read_metadata(tmp_path / ("x" * 300))


def test_a_damaged_byte_is_refused_or_harmless(tmp_path):
    rows = results.check_rows(make_rows())
    path = results.write_rows(tmp_path / "cell.parquet", rows)
    data = path.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            found = results.read_rows(path)
        except Error as error:
            assert "cell.parquet" in str(error)
        else:
            pd.testing.assert_frame_equal(found, rows)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = results.write_rows(tmp_path / "cell.parquet", make_rows())
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Error, match=r"cell.parquet: No space left"):
        results.write_rows(path, make_rows(step=256))
    with pytest.raises(Error, match=r"missing column"):
        results.write_rows(path, make_rows().drop(columns="chunk"))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cell.parquet"]
    (tmp_path / "a_file").write_text("")
    monkeypatch.undo()
    with pytest.raises(Error, match="cannot write"):
        results.write_rows(tmp_path / "a_file" / "cell.parquet", make_rows())


def test_published_is_the_75_cells():
    table = results.published()
    assert len(table) == 75
    assert list(table.columns) == list(results.CELL_COLUMNS)
    assert table.groupby("modality").size().to_dict() == {"text": 25, "image": 25, "speech": 25}
    # the sum of the published minutes, as the facts of the experiment state it
    assert table["seconds"].sum() / 60 == pytest.approx(177.8, abs=0.05)
    # 17 of the 25 image cells lost chunks to the published filter
    assert (table[table["modality"] == "image"]["chunks"] < 2048).sum() == 17
    best = table.set_index(["model", "step", "modality"])["ratio"]
    # three entries of the tables as printed (three decimals)
    assert round(best["pythia-70m", 1000, "text"], 3) == 0.223
    assert round(best["pythia-1b", 128000, "image"], 3) == 0.436
    assert round(best["pythia-1b", 128000, "speech"], 3) == 0.376


def test_published_baseline_is_two_more_cells():
    table = results.published(baseline=True)
    random = table[table["params"].isna()]
    assert len(table) == 77
    assert {m: round(r, 3) for m, r in zip(random["modality"], random["ratio"], strict=True)} == {
        "text": 0.818,
        "image": 1.531,
    }


@needs_data
def test_published_equals_the_source_file():
    source = pd.read_csv(DATA / "published_results.csv")
    table = results.published().set_index(["model", "step", "dataset"])
    for row in source.itertuples():
        cell = table.loc[row.model, int(row.checkpoint.removeprefix("step")), row.dataset]
        assert (cell["ratio"], cell["ratio_std"]) == (row.compression_ratio, row.compression_std)
        assert cell["chunks"] == row.chunks_processed


def test_the_module_needs_no_torch_and_no_figures():
    code = (
        "import sys, llmcomp.results; print([m for m in ('torch', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


ADDED_IN_2 = ["attention", "batch_rows"]
ADDED_IN_3 = ["n_params_nonembedding", "tokens_seen", "flops", "flops_exact", "seed", "commit"]
ADDED_IN_4 = ["data_sha256", "draw", "draw_seed", "chunk_bytes", "document", "offset"]


@pytest.mark.parametrize(
    ("version", "lacking"),
    [(b"1", ADDED_IN_2 + ADDED_IN_3 + ADDED_IN_4), (b"2", ADDED_IN_3 + ADDED_IN_4), (b"3", ADDED_IN_4)],
)
def test_files_of_older_formats_are_read(tmp_path, version, lacking):
    """They lack columns, and are written as the releases of their time wrote them."""
    path = results.write_rows(tmp_path / "rows.parquet", make_rows())
    table = pq.read_table(path).drop_columns(lacking)
    pq.write_table(table.replace_schema_metadata({b"llmcomp.rows": version}), path)
    rows = results.read_rows(path)
    assert list(rows.columns) == list(results.ROW_COLUMNS)
    assert {name: str(dtype) for name, dtype in rows.dtypes.items()} == {
        name: dtype for name, (dtype, _) in results.ROW_COLUMNS.items()
    }
    for name in lacking:
        is_text = results.ROW_COLUMNS[name][0] == "string"
        assert (rows[name] == "").all() if is_text else rows[name].isna().all()
    (cell,) = results.cells(rows).to_dict("records")
    assert cell["commit"] == "" and pd.isna(cell["tokens_seen"])
    pq.write_table(table.replace_schema_metadata({b"llmcomp.rows": b"5"}), path)
    with pytest.raises(Error, match="found format 5, expected format 1 or 2 or 3 or 4"):
        results.read_rows(path)


def test_cells_keep_what_is_known_of_the_checkpoint(tmp_path):
    facts = {"n_params_nonembedding": 12_768, "tokens_seen": 262_144, "flops": 7.2e10, "seed": 7, "commit": "c0ffee"}
    rows = results.read_rows(results.write_rows(tmp_path / "rows.parquet", make_rows(**facts)))
    (cell,) = results.cells(rows).to_dict("records")
    assert {name: cell[name] for name in facts} == facts
    with pytest.raises(Error, match="n_params_nonembedding is above params"):
        results.check_rows(make_rows(n_params_nonembedding=47_001))
    with pytest.raises(Error, match="tokens_seen is below 0"):
        results.check_rows(make_rows(tokens_seen=-1))


def test_cells_are_told_apart_by_attention_and_not_by_batches():
    rows = pd.concat([make_rows(attention=name, batch_rows=n) for name, n in (("sdpa", 8192), ("eager", 4096))])
    assert results.cells(rows)["attention"].tolist() == ["sdpa", "eager"]
    one, other = make_rows().iloc[:1], make_rows().iloc[1:]
    assert len(results.cells(pd.concat([one.assign(batch_rows=1), other.assign(batch_rows=2)]))) == 1


def test_cells_of_older_tables():
    cells = results.cells(make_rows()).drop(columns="attention")
    assert results.cells(cells)["attention"].tolist() == [""]


def test_a_pipe_among_the_results_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "rows.parquet")
    with pytest.raises(Error, match=r"rows\.parquet: not a regular file"):
        results.read_rows(tmp_path)


def intervals_that_hold(documents, rng, n_runs=100):
    """The shares of 95 % intervals of t that hold the mean, 0.3: by the clusters, and by chunks taken for independent.

    Chunks have the article that they are of in common (a standard deviation of 0.04), and noise of their own (0.03).
    """
    n = len(documents)
    order = rng.permutation(n)  # as drawn chunks lie in a table
    tables = []
    for run in range(n_runs):
        ratio = np.repeat(rng.normal(0.3, 0.04, n // 8), 8) + rng.normal(0, 0.03, n)
        where = {"document": np.array(documents)[order], "offset": 2048 * order, "step": run}
        tables.append(make_rows(np.round(ratio[order] * 2048), chunk_bytes=(2048,) * n, side_bits=0, **where))
    rows = pd.concat(tables)
    cells = results.cells(rows.assign(ratio=rows["coded_bytes"] / 2048))
    held = []
    for error, df in ((cells["stderr"], cells["clusters"] - 1), (cells["ratio_std"] / np.sqrt(n), n - 1)):
        held.append((abs(cells["mean_ratio"] - 0.3) < error * stats.t.ppf(0.975, np.asarray(df, float))).mean())
    return held


def test_intervals_know_that_neighbours_resemble_one_another():
    rng = np.random.default_rng(11)
    # One long text, and 32 pictures with 8 crops each.
    for documents in (["book"] * 256, [f"picture {i // 8}" for i in range(256)]):
        by_clusters, by_chunks = intervals_that_hold(documents, rng)
        assert by_clusters > 0.9
        assert by_chunks < 0.75


def test_clusters_are_documents_or_stretches_of_neighbours():
    rows = make_rows((500,) * 40, chunk_bytes=(2048,) * 40, document=[f"row {i % 20}" for i in range(40)])
    assert results.cells(rows)["clusters"][0] == 20
    rows = rows.assign(document="book", offset=[2048 * (7 * i % 40) for i in range(40)])
    clusters = results.cluster_of(results.check_rows(rows))
    assert sorted(np.bincount(clusters)) == [4] * 10
    # A stretch is one of the text, wherever its chunks stand in the table.
    assert all(np.ptp(rows["offset"][clusters == cluster]) == 3 * 2048 for cluster in range(10))
    # Where nothing is recorded, and of few chunks, each is a cluster of its own: the plain standard error.
    for changed in (rows.assign(document=""), rows[:19]):
        cell = results.cells(changed).iloc[0]
        assert cell["clusters"] == len(changed)
        assert cell["stderr"] == pytest.approx(cell["ratio_std"] / np.sqrt(len(changed)), rel=1e-12)


def test_bits_follow_from_the_ratio_whatever_a_table_says() -> None:
    rows = make_rows()
    rows["tokens"] = [400, 0]
    rows = results.check_rows(rows.assign(bits_per_byte=1.0, bits_per_token=1.0))
    assert rows["bits_per_byte"].tolist() == (8 * rows["ratio"]).tolist()
    coded_bits = 8 * rows["coded_bytes"][0] + rows["side_bits"][0]
    assert rows["bits_per_token"][0] == pytest.approx(coded_bits / 400) and np.isnan(rows["bits_per_token"][1])
    (cell,) = results.cells(rows).to_dict("records")
    all_bits = (8 * rows["coded_bytes"] + rows["side_bits"]).sum()
    assert cell["bits_per_byte"] == pytest.approx(all_bits / rows["bytes_in"].sum())
    assert cell["bits_per_token"] == pytest.approx(all_bits / 400)
    assert results.published()["bits_per_byte"].tolist() == (8 * results.published()["ratio"]).tolist()


def test_rows_hold_the_bits_of_every_token_where_they_were_asked_for(tmp_path) -> None:
    rows = make_rows().assign(token_bits=[[1.5, 2.25], [0.0]])
    back = results.read_rows(results.write_rows(tmp_path / "rows.parquet", rows))
    assert [list(bits) for bits in back["token_bits"]] == [[1.5, 2.25], [0.0]]
    assert "token_bits" not in results.read_rows(results.write_rows(tmp_path / "plain.parquet", make_rows()))
    both = pd.concat([back, results.read_rows(tmp_path / "plain.parquet").assign(step=99)])
    assert both["token_bits"].isna().sum() == len(make_rows())
    with pytest.raises(Error, match="token_bits"):
        results.check_rows(make_rows().assign(token_bits="many"))


@pytest.mark.parametrize("batch_rows", [1, 3, 1000])
def test_cells_of_parts_are_those_of_the_whole(tmp_path, monkeypatch, batch_rows):
    """Chunks of a cell in several files, streams beside chunks, missing values: read in parts of any length."""
    monkeypatch.setattr("llmcomp.results.files._BATCH_ROWS", batch_rows)
    for number, sizes in enumerate([(500, 700), (350, 360, 371), (900,)]):
        chunks = range(3 * number, 3 * number + len(sizes))
        rows = [
            make_rows(coded_bytes=(size, 1)).iloc[:1].assign(chunk=chunk)
            for size, chunk in zip(sizes, chunks, strict=True)
        ]
        results.write_rows(tmp_path / f"{number}.parquet", pd.concat(rows))
    stream = make_rows(model="gzip", params=pd.NA, step=pd.NA, tokens=pd.NA, ideal_bits=float("nan"), mapping="")
    results.write_rows(tmp_path / "stream.parquet", stream.iloc[:1].assign(chunk=results.STREAM_CHUNK))
    results.write_rows(tmp_path / "empty.parquet", results.empty_rows())
    whole = results.cells(results.read_rows(tmp_path))
    pd.testing.assert_frame_equal(results.read_cells(tmp_path), whole, rtol=1e-13)
    path, n_rows = results.merge_rows(tmp_path, tmp_path.parent / f"merged-{batch_rows}.parquet")
    assert n_rows == 7
    pd.testing.assert_frame_equal(results.read_cells([path]), whole, rtol=1e-13)


@pytest.mark.parametrize("batch_rows", [1, 1000])
def test_a_chunk_twice_is_found_without_holding_all(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr("llmcomp.results.files._BATCH_ROWS", batch_rows)
    results.write_rows(tmp_path / "a.parquet", make_rows())
    results.write_rows(tmp_path / "b.parquet", make_rows().iloc[1:])
    for read in (results.read_cells, lambda folder: results.merge_rows(folder, tmp_path.parent / "merged.parquet")):
        with pytest.raises(Error, match="more than once"):
            read(tmp_path)
    assert not (tmp_path.parent / "merged.parquet").exists()


def test_the_damaged_one_of_several_files_is_named(tmp_path):
    for name in ("a", "b", "c"):
        results.write_rows(tmp_path / f"{name}.parquet", make_rows(model=name))
    table = pq.read_table(tmp_path / "b.parquet")
    at = table.column_names.index("ratio")
    pq.write_table(table.set_column(at, table.schema.field("ratio"), pa.array([0.5, 0.5])), tmp_path / "b.parquet")
    with pytest.raises(Error, match=r"b\.parquet: rows: ratio differs from its bits"):
        results.read_cells(tmp_path)

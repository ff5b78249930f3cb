"""What low precision costs, against sums done by hand; a dtype that gives NaN; the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch engine is an extra")

from hub_server import neox_config, neox_tensors, write_checkpoint  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from llmcomp import load_model, score  # noqa: E402
from llmcomp.bench.precision import COLUMNS, run_precision_benchmark  # noqa: E402
from llmcomp.cli.main import main  # noqa: E402
from llmcomp.data.datasets import load_dataset  # noqa: E402
from llmcomp.errors import Error  # noqa: E402


def test_bits_of_every_dtype() -> None:
    torch.set_num_threads(1)
    found = run_precision_benchmark("pico-13k", 256, ["text", "speech"], n_chunks=2, progress=False)
    assert list(found.columns) == list(COLUMNS)
    assert len(found) == 3 * 4
    exact = load_model("pico-13k", 256)
    bits = {name: score(load_dataset(name, 2), exact, progress=False)["ideal_bits"] for name in ("text", "speech")}
    for row in found.itertuples():
        expected = sum(map(sum, bits.values())) if row.dataset == "all" else bits[row.dataset.split("-")[0]].sum()
        assert row.exact_bits == pytest.approx(expected)
        assert row.difference_percent == pytest.approx(100 * (row.bits / expected - 1))
        assert row.largest_chunk_percent >= abs(row.difference_percent) * (row.dataset != "all")
    by_dtype = found[found["dataset"] == "all"].set_index("dtype")
    assert by_dtype.index.tolist() == ["float32", "bfloat16", "float16", "int8"]
    # 24 bits hardly differ, 11 and 8 do: the order of the errors is that of the precisions.
    size = by_dtype["largest_chunk_percent"]
    assert size["float32"] < 1e-3 and size["float32"] < size["float16"] < size["bfloat16"] < 2
    assert size["int8"] < 10 and by_dtype["engine"].tolist() == ["torch"] * 3 + ["exact-int8"]
    assert by_dtype["within_target"]["float32"]
    assert (found["within_target"] == (found["difference_percent"].abs() <= 0.1)).all()


def test_a_dtype_that_gives_nan_has_its_reason(tmp_path: Path) -> None:
    """A weight of 1e5 is infinite in float16, and infinite less infinite is NaN."""
    write_checkpoint(tmp_path, seed=1)
    tensors = {name: torch.from_numpy(array).float() for name, array in neox_tensors(neox_config(), 1).items()}
    head = next(name for name in tensors if "embed_out" in name or "lm_head" in name)
    tensors[head][0, :] = 1e5
    save_file(tensors, tmp_path / "model.safetensors")
    found = run_precision_benchmark(tmp_path, None, "text", dtypes=("float16",), n_chunks=1, progress=False)
    assert len(found) == 2
    assert np.isnan(found["bits"]).all() and not found["within_target"].any()
    assert (found["reason"] != "").all()


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", "precision", "--model", "pico-13k", "--dataset", "text", "--chunks", "1", "-q"]
    assert main([*given, "--json", "--dtype", "bfloat16"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["dataset"], row["dtype"]) for row in rows] == [("text-sample", "bfloat16"), ("all", "bfloat16")]
    assert main([*given, "--dtype", "float32"]) == 0
    assert "difference_percent" in capsys.readouterr().out
    with pytest.raises(Error):
        main([*given, "--debug", "--model", "no-such-model"])

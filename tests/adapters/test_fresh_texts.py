"""A folder of fresh texts: categories, means, digests; the bits are score's."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

import llmcomp
from llmcomp import DatasetError, Error
from llmcomp.claims.fresh_texts import MEAN, fresh_texts
from llmcomp.cli.main import main

TEXT = (Path(__file__).parents[2] / "README.md").read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, at, n in (("news/a.txt", 0, 900), ("news/b.txt", 900, 300), ("code/c.txt", 5000, 700)):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(TEXT[at : at + n])
    (tmp_path / "texts/.hidden").write_bytes(b"")
    return tmp_path / "texts"


def test_every_byte_of_every_category_counts(folder: Path) -> None:
    models = [llmcomp.load_model("pico-13k", 128), llmcomp.load_model("pico-13k", 2048)]
    table = fresh_texts(folder, models, progress=False)
    assert table["category"].tolist() == [MEAN] * 2 + ["code"] * 2 + ["news"] * 2
    cell = table[(table["category"] == "news") & (table["model"] == "pico-13k step2048")].iloc[0]
    rows = llmcomp.score([TEXT[:900], TEXT[900:1200]], models[1], progress=False)
    assert cell["bits_per_byte"] == pytest.approx((8 * rows["coded_bytes"] + rows["side_bits"]).sum() / 1200)
    assert (cell["documents"], cell["bytes"]) == (2, 1200)
    digest = hashlib.sha256(b"news/a.txt\x00900\x00" + TEXT[:900] + b"news/b.txt\x00300\x00" + TEXT[900:1200])
    assert cell["sha256"] == digest.hexdigest()
    means = table[table["category"] == MEAN]
    assert means["model"].tolist() == ["pico-13k step2048", "pico-13k step128"]  # best first
    of_each = table[(table["category"] != MEAN) & (table["model"] == "pico-13k step2048")]["bits_per_byte"]
    assert means["bits_per_byte"].iloc[0] == pytest.approx(of_each.mean())


def test_what_is_not_fresh_is_refused(folder: Path) -> None:
    os.utime(folder / "news/a.txt", (1, 1_600_000_000))
    with pytest.raises(DatasetError, match=r"a\.txt.*not fresh"):
        fresh_texts(folder, ["pico-13k"], not_before=1_700_000_000, progress=False)


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.csv"
    options = ["fresh", str(folder), "-m", "pico-13k", "-m", "pico-13k@128", "-q", "--json"]
    assert main([*options, "--out", str(out)]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["category"] for row in table] == [MEAN] * 2 + ["code"] * 2 + ["news"] * 2
    assert len(out.read_text().splitlines()) == 7
    assert main([*options, "--not-before", "2100-01-01"]) == 1 and "not fresh" in capsys.readouterr().err
    assert main([*options, "--not-before", "soon"]) == 1 and "no date" in capsys.readouterr().err


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match="two models are called"):
        fresh_texts(folder, ["pico-13k", "pico-13k"], progress=False)
    (folder / "news/empty.txt").touch()
    with pytest.raises(DatasetError, match=r"empty\.txt is empty"):
        fresh_texts(folder, ["pico-13k"], progress=False)
    with pytest.raises(DatasetError, match="expected a folder"):
        fresh_texts(tmp_path / "nowhere", ["pico-13k"])

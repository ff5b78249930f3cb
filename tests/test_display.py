"""Everything shows itself in one line, and in a notebook as a table: never its content, never an address."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmcomp
from llmcomp.claims.compare import compare_rows
from llmcomp.codec.archive import info
from llmcomp.data.tokenizers import ByteTokenizer
from llmcomp.display import Shown


def comparison() -> Any:
    model = llmcomp.load_model("pico-13k")
    rows = llmcomp.score([b"some text %d" % i for i in range(6)], model, progress=False)
    return compare_rows(rows, rows)


def archive(tmp_path: Any) -> Any:
    path = tmp_path / "a.llmc"
    path.write_bytes(llmcomp.compress(PROSE, "pico-13k"))
    return info(path)


PROSE = (Path(__file__).parent.parent / "README.md").read_bytes()[:1500]
MAKERS = {
    "data set": lambda _: llmcomp.load_dataset("text", 40),
    "model": lambda _: llmcomp.load_model("pico-13k", 128),
    "tokenizer": lambda _: llmcomp.load_model("pico-13k").tokenizer,
    "bytes": lambda _: ByteTokenizer(),
    "encoder": lambda _: llmcomp.Encoder(7),
    "decoder": lambda _: llmcomp.Decoder([b"a", b"b"]),
    "archive": archive,
    "comparison": lambda _: comparison(),
}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_one_line_and_a_table(make: Any, tmp_path: Any) -> None:
    found = make(tmp_path)
    line, table = repr(found), found._repr_html_()
    assert "\n" not in line and len(line) < 400 and " at 0x" not in line
    assert line.startswith(f"<{type(found).__name__}")
    assert "<table>" in table and len(table) < 2000
    tags = Tags()
    tags.feed(table)
    assert tags.open == []


def test_what_matters_is_in_it(tmp_path: Any) -> None:
    model = repr(llmcomp.load_model("pico-595k", 512))
    assert all(word in model for word in ("pico-595k", "step 512", "726,144", "595,072", "exact"))
    assert "40" in repr(llmcomp.load_dataset("text", 40)) and "81,920" in repr(llmcomp.load_dataset("text", 40))
    about = archive(tmp_path)
    assert f"ratio {about.ratio:.4g}" in repr(about) and "pico-13k" in repr(about) and "1,500" in repr(about)
    assert "streams 7" in repr(llmcomp.Encoder(7))


class Hostile(Shown):
    def _facts(self) -> dict[str, Any]:
        return {"": "<script>alert(1)</script>\n", "long": "x" * 10**6, "none": None, "rows": np.float64(0.123456)}


def test_names_of_others_do_no_harm() -> None:
    assert "<script>" not in Hostile()._repr_html_() and len(Hostile()._repr_html_()) < 600
    assert "\n" not in repr(Hostile()) and "none" not in repr(Hostile()) and "0.1235" in repr(Hostile())


def test_dir_shows_public_names_alone() -> None:
    program = "import llmcomp, llmcomp.codec.files, llmcomp.cli; print(*dir(llmcomp))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert set(shown) == {*llmcomp.__all__, "__version__", "open", "plot"}
    assert all(hasattr(llmcomp, name) for name in shown)
    assert not [name for name in shown if re.match(r"_(?!_version__)", name)]

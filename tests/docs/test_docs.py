"""The documentation: every code block of the pages and the README runs, what is generated is complete, figures and
relative links exist. A block that cannot run here says why in a comment above it: <!-- not run: reason -->."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import llmcomp
from llmcomp.cli.main import _parser, parser_tree
from llmcomp.models.suite import bundled_suites, load_suite

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path for path in PAGES if "_generated" not in path.parts]
FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
SLOW = {"tutorial", "README", "ratios", "cluster"}


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks(path: Path) -> list[Block]:
    """Those that run, in their order."""
    text = path.read_text("utf-8")
    return [
        Block(found["language"], found["code"], text[: found.start("code")].count("\n") + 1)
        for found in FENCE.finditer(text)
        if found["language"] in ("python", "sh") and not found["reason"]
    ]


def page_params() -> list[Any]:
    found = [path for path in PAGES if blocks(path)]
    return [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in found]


@pytest.mark.parametrize("path", page_params())
def test_every_code_block_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after another, in an empty folder with the README in it; nothing is downloaded."""
    command = tmp_path / "bin" / "llmcomp"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m llmcomp "$@"\n')
    command.chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(ROOT / "README.md", folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "LLMCOMP_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    for block in blocks(path):
        where = f"{path.relative_to(ROOT)}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, where, "exec"), names)
        else:
            run = ["bash", "-e", "-o", "pipefail", "-c", block.code]
            done = subprocess.run(run, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"


def test_a_block_is_left_out_only_with_a_reason(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\n1\n```\n\n<!-- not run: a GPU -->\n```sh\n2\n```\n\n```text\n3\n```\n```sh\n4\n```\n")
    assert [(block.language, block.code, block.line) for block in blocks(page)] == [
        ("python", "1\n", 2),
        ("sh", "4\n", 14),
    ]


def commands_not_run(path: Path) -> list[str]:
    """Each `llmcomp ...` of the blocks that do not run, up to a pipe or a redirection, without comments."""
    found = [block["code"] for block in FENCE.finditer(path.read_text("utf-8")) if block["reason"]]
    lines = "".join(found).replace("\\\n", " ").splitlines()
    return [re.split(r"\s(?:[>|]|#\s)", line)[0] for line in lines if line.startswith("llmcomp ")]


@pytest.mark.parametrize("path", [path for path in PAGES if commands_not_run(path)], ids=lambda path: path.stem)
def test_commands_that_do_not_run_here_are_commands(path: Path) -> None:
    for command in commands_not_run(path):
        try:
            _parser().parse_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"{path.name}: {command}")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_options_names_and_files_in_the_text_exist(path: Path) -> None:
    """What is between backquotes: options of the command line, its commands, names of the package, files."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    codes = re.findall(r"`([^`]+)`", text)
    options = {name for command in parser_tree() for option in command.options for name in option.names}
    words = {command.words[0] for command in parser_tree() if command.words}
    for code in codes:
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)) <= options, code
        assert {found[1] for found in [re.match(r"llmcomp ([a-z]+)", code)] if found} <= words, code
        if found := re.match(r"llmcomp((?:\.\w+)+)", code):
            pkgutil.resolve_name(f"llmcomp{found[1]}")
        if re.fullmatch(r"(benchmarks|llmcomp|csrc|docs|tests|notebooks)/[\w/.-]+", code):
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:")) and "_generated" not in target:
            assert (path.parent / target).exists(), target


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name(generate: ModuleType, tmp_path: Path) -> None:
    generate.write(tmp_path / "out")
    page = (tmp_path / "out/python.md").read_text()
    for name in [*llmcomp.__all__, "open"]:
        assert f"\n### {name}\n" in page, name
    commands = (tmp_path / "out/cli.md").read_text()
    for word in ("compress", "selftest", "models", "data fetch"):
        assert f"# llmcomp {word}\n" in commands, word
    for suite in bundled_suites():
        page = (tmp_path / f"out/suites/{suite}.md").read_text()
        for model in load_suite(suite).models:
            assert f"| `{model.name}` |" in page


def test_a_docstring_becomes_paragraphs_and_lists(generate: ModuleType) -> None:
    text = (
        "First\nline with 2**20.\n\nArgs:\n    a: one\n        that goes on\n    b, c: `x*y` [B, T]\n\n"
        "Raises:\n    Error: never."
    )
    assert generate.prose(text) == (
        "First line with 2\\*\\*20.\n\n**Args**\n\n- a: one that goes on\n- b, c: `x*y` \\[B, T\\]\n\n"
        "**Raises**\n\n- Error: never."
    )
    assert generate.prose("`a`: one. Two.\n`b`, `c`: three.") == "- `a`: one. Two.\n- `b`, `c`: three."
    assert generate.prose("`a` is here. `b`: not.") == "`a` is here. `b`: not."

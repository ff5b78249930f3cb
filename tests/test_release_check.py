"""release/check.py finds what it is there to find: each fault is put into what is otherwise right."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from llmcomp import _core

pytest.importorskip("elftools", reason="the release check reads modules with pyelftools")
ROOT = Path(__file__).parent.parent
BACKENDS = ("serial", "avx2", "avx512", "neon")


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, in a project of version 1.2.3 that it finds nothing wrong with."""
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "release/check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3] - 2026-01-02\n")
    (tmp_path / "CITATION.cff").write_text("title: llmcomp\nversion: 1.2.3\nlicense: Apache-2.0\n")
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nSource = "https://example.org"\n')
    (tmp_path / "llmcomp/conformance").mkdir(parents=True)
    (tmp_path / "llmcomp/conformance/digests.json").write_text(json.dumps({"one": "12ab", "two": "34cd"}))
    total = hashlib.sha256(b"12ab\n34cd").hexdigest()[:16]
    rows = ["| processor | backend | compiler | versions | cases | digest |", "|---|---|---|---|---|---|"]
    rows += [f"| a machine | {name} | gcc 1 | llmcomp 1.2.3, Python 3 | 2 | {total} |" for name in BACKENDS]
    (tmp_path / "CONFORMANCE.md").write_text("# Conformance\n\n" + "\n".join(rows) + "\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_versions(check: ModuleType, tmp_path: Path) -> None:
    assert list(check.check_versions("1.2.3")) == []
    assert list(check.check_versions("9.9.9")) == [
        "CHANGELOG.md has no dated section [9.9.9]",
        "CITATION.cff is not of version 9.9.9",
    ]
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (fault,) = check.check_versions("1.2.3")
    assert fault.startswith("pyproject.toml has no [project.urls]")


def test_rows_of_conformance(check: ModuleType, tmp_path: Path) -> None:
    assert list(check.check_conformance("1.2.3")) == []
    page = tmp_path / "CONFORMANCE.md"
    rows = page.read_text().splitlines(keepends=True)
    page.write_text("".join(row for row in rows if "| neon |" not in row))
    assert list(check.check_conformance("1.2.3")) == ["no row of neon in CONFORMANCE.md"]
    page.write_text("".join(rows))
    (tmp_path / "llmcomp/conformance/digests.json").write_text(json.dumps({"one": "12ab", "two": "other"}))
    faults = list(check.check_conformance("1.2.3"))
    assert len(faults) == len(BACKENDS) and all("expected" in fault for fault in faults)


def test_an_sdist_without_a_file(check: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "llmcomp_exact-0.2.0.tar.gz"
    for names, expected in (
        (check.SDIST_FILES, []),
        (check.SDIST_FILES[1:], [f"lacks {check.SDIST_FILES[0]}"]),
        ((*check.SDIST_FILES, "llmcomp/_core.so"), ["has llmcomp/_core.so"]),
    ):
        with tarfile.open(path, "w:gz") as sdist:
            for name in names:
                sdist.addfile(tarfile.TarInfo(f"llmcomp_exact-0.2.0/{name}"), io.BytesIO())
        assert list(check.check_sdist(path)) == expected


def test_what_a_module_is_for_needs_and_exports(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(_core.__file__).read_bytes()
    if not data.startswith(b"\x7fELF"):
        pytest.skip("modules of this system are no ELF files")
    faults = list(check.check_module("llmcomp/_core.abi3.so", data, "manylinux_2_28_riscv64"))
    assert any(fault.startswith("is for ") for fault in faults) and not any("exports" in fault for fault in faults)
    monkeypatch.setattr(check, "GLIBC_MAX", (2, 0))
    monkeypatch.setattr(check, "LIBRARIES", set())
    faults = list(check.check_module("llmcomp/_other.abi3.so", data, "manylinux_2_28_x86_64"))
    assert {"needs libc.so.6", "exports PyInit__core"} <= set(faults)
    assert any(fault.startswith("needs glibc ") for fault in faults)

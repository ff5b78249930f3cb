"""The package's own facts: what pyproject.toml promises is what is tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmcomp.version import DISTRIBUTION, __version__, find_version, other_distribution

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_oldest_dependencies_are_those_that_are_allowed() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])
    lines = (ROOT / "tests/oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert floors.keys() <= pins.keys()
    for name, floor in floors.items():
        assert re.fullmatch(rf"{re.escape(floor)}(\.0)*", pins[name]), name


def test_another_package_of_the_same_name_is_noticed(tmp_path: Path) -> None:
    """The library that has the name on the package index; this one's own metadata are called otherwise."""
    for name in ("numpy-2.0.0.dist-info", "llmcomp_exact-0.2.0.dist-info", "llmcomp"):
        (tmp_path / name).mkdir()
    assert other_distribution(tmp_path) is None
    (tmp_path / "llmcomp-1.6.0.dist-info").mkdir()
    assert other_distribution(tmp_path) == "llmcomp 1.6.0"
    (tmp_path / "llmcomp" / "__init__.py").write_text("")
    (tmp_path / "llmcomp" / "version.py").write_bytes((ROOT / "llmcomp/version.py").read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import llmcomp.version"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    (line,) = (line for line in done.stderr.splitlines() if "UserWarning" in line)
    assert "llmcomp 1.6.0 is installed beside llmcomp-exact" in line and "pip uninstall" in line


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_one_version_number() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == __version__
    assert (
        f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
        or "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_a_source_tree_tells_its_own_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever version is installed, and without one; another project's pyproject.toml is not asked."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"installed {name}")
    project = tmp_path / "pyproject.toml"
    assert find_version(tmp_path / "llmcomp") == f"installed {DISTRIBUTION}"
    project.write_text(f'[project]\nname = "{DISTRIBUTION}"\nversion = "9.8.7"\n')
    assert find_version(tmp_path / "llmcomp") == "9.8.7"
    project.write_text('[project]\nname = "other"\nversion = "9.8.7"\n')
    assert find_version(tmp_path / "llmcomp") == f"installed {DISTRIBUTION}"


@pytest.mark.skipif(os.name != "posix", reason="setup.py asks for a compiler by its Unix name")
@pytest.mark.parametrize("compiler", ["false", "/nonexistent/cc -m64"])
@pytest.mark.parametrize("command", ["build", "build_ext"])
def test_without_a_compiler_one_line_says_so(command: str, compiler: str, tmp_path: Path) -> None:
    """Before anything is copied, on a machine that has hardly any programs."""
    pytest.importorskip("setuptools")
    words = [sys.executable, "setup.py", command, "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {**os.environ, "CC": compiler, "LLMCOMP_CUDA": "0", "PATH": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    expected = f"llmcomp needs a C compiler to be built, and {compiler.split(maxsplit=1)[0]} is none that runs"
    assert done.stderr.splitlines()[-1].startswith(expected)
    assert "Traceback" not in done.stderr and len(done.stdout.splitlines()) <= 2 and list(tmp_path.iterdir()) == []

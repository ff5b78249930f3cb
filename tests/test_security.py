"""SECURITY.md names tests that exist, and the package's sources make no call that runs text, unpickles or asks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmcomp"

FORBIDDEN_BUILTINS = {"input", "eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_CALLS = {"system", "popen", "read_pickle", "exec_module", "run_path", "unpack_archive", "extractall"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml", "code", "getpass"}
# Calls that must say how: name -> (keyword, value).
MUST_SAY = {("torch", "load"): ("weights_only", True), ("np", "load"): ("allow_pickle", False)}
# A question at a terminal, data from a pipe; and what `verify` starts, which its parent writes to.
READERS_OF_STANDARD_INPUT = {"cli/commands.py", "codec/files.py", "claims/worker.py"}
# `verify` runs the predictor that its caller names (SECURITY.md): from the caller's own module, and from the caller's
# own objects, which it sends to a process that it starts. So does `sweep` with its workers. Nothing of that comes from
# a file or an archive.
OF_THE_CALLER = {
    "claims/predictors.py: call of spec.loader.exec_module",
    "claims/verify.py: import of pickle",
    "claims/worker.py: import of pickle",
    "experiment/processes.py: import of pickle",
}


def dotted(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Attribute):
        return (*dotted(node.value), node.attr)
    return (node.id,) if isinstance(node, ast.Name) else ("",)


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import of {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if not isinstance(node, ast.Call):
            continue
        path, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if path[-1] in FORBIDDEN_CALLS or (len(path) == 1 and path[0] in FORBIDDEN_BUILTINS):
            yield f"call of {'.'.join(path)}"
        if path in MUST_SAY:
            keyword, value = MUST_SAY[path]
            given = keywords.get(keyword)
            if not (isinstance(given, ast.Constant) and given.value is value):
                yield f"{'.'.join(path)} without {keyword}={value}"
        if isinstance(shell := keywords.get("shell"), ast.Constant) and shell.value:
            yield f"{'.'.join(path)} by way of a shell"
        if path[-1] == "from_pretrained":
            spread = {dotted(keyword.value)[0] for keyword in node.keywords if keyword.arg is None}
            if "trust_remote_code" not in keywords and "trusted" not in spread:
                yield "from_pretrained without trust_remote_code"


def test_the_package_makes_no_such_call() -> None:
    found = [
        f"{path.relative_to(PACKAGE).as_posix()}: {fault}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for fault in faults(path.read_text())
    ]
    assert set(found) == OF_THE_CALLER


def test_standard_input_is_read_in_three_places() -> None:
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(dotted(node) == ("sys", "stdin") for node in attributes(path))
    }
    assert readers == READERS_OF_STANDARD_INPUT


def attributes(path: Path) -> Iterator[ast.Attribute]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))


@pytest.mark.parametrize(
    "source",
    [
        "answer = input('sure? ')",
        "import pickle",
        "from yaml import load",
        "torch.load(path, map_location='cpu')",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(folder, local_files_only=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_such_calls_are_found(source: str) -> None:
    assert len(list(faults(source))) == 1


def test_what_is_allowed_is_not_found() -> None:
    loads = "torch.load(p, weights_only=True); np.load(p, allow_pickle=False)"
    assert list(faults(f"{loads}; re.compile(t); model.eval(); A.from_pretrained(f, **trusted)")) == []


def test_the_tests_that_security_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 5
    for path in named:
        assert "def test_" in (ROOT / path).read_text(), path

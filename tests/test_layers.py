"""The directions of imports and includes: what may know of what. DESIGN: data flows one way through the house."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmcomp"

# What each module may import of the package, lowest first: nothing above itself. Engines may use the coder to turn
# their logits into intervals where they lie; models, tokens and datasets know nothing of it. Laws and figures know
# rows only, so that published results refit without any model code.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "coding": {"_core", "cuda", "errors"},
    "device_arrays": {"_cuda", "errors"},
    "cuda": {"_core", "device_arrays", "errors"},
    "tokens": {"errors"},
    "download": {"errors"},
    "pico": set(),
    "datasets": {"errors", "download", "pico"},
    "engine_exact": {"_core", "errors", "memory", "tokens"},
    "engine_cuda": {"cuda", "engine_exact", "errors", "memory"},
    "engine_torch": {"coding", "cuda", "errors", "memory", "tokens"},
    "models": {"cuda", "engine_cuda", "engine_exact", "engine_torch", "errors", "memory", "pico"},
    "results": {"errors"},
    "law.projection": set(),
    "law.style": {"errors", "results"},
    "law.plot": {"errors", "law.style", "results"},
    "law.scaling_law": {"errors", "law.plot", "law.projection"},
    "law.fit": {"errors", "law.projection", "law.scaling_law", "results"},
    "law.figures": {"errors", "law.fit", "law.plot", "law.style"},
    "baselines": {"datasets", "engine_exact", "errors", "models", "results", "tokens"},
    "container": {"errors"},
    "salvage": {"container", "errors"},
    "loading": set(),
    "memory": {"errors"},
    "token_cache": {"tokens"},
    "windows": {"coding", "errors", "memory"},
    "segments": {"coding", "container", "engine_exact", "errors", "memory", "models", "tokens", "windows"},
    "scoring": {"coding", "errors", "memory", "windows"},
    "position": {"errors", "models", "segments", "tokens"},
    "sampling": {"coding", "errors", "models", "segments", "tokens", "windows"},
}
# Modules above all of these: the work, the command line.
TOP = {
    "codec",
    "archive",
    "files",
    "grid",
    "sweep",
    "demo",
    "bench",
    "bench_engine",
    "bench_precision",
    "bench_sweep",
    "cli",
    "cli_commands",
}
DRAWING = {"law/style.py", "law/plot.py", "law/figures.py", "pico/samples.py"}
TORCH_MODULES = {"engine_torch", "pico/train", "pico/vocabularies", "pico/muon"}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_of_package(path: Path) -> set[str]:
    names = {name.removeprefix("llmcomp.") for name in imports_of(path) if name.startswith("llmcomp.")}
    inside = {name for name in names if (PACKAGE / f"{name.replace('.', '/')}.py").exists()}
    first = {name.split(".")[0] for name in names}
    return inside | {name for name in first if name in MAY_IMPORT or name[0] == "_"}


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_module_imports_only_what_is_below_it(module: str) -> None:
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    path = path if path.exists() else PACKAGE / module / "__init__.py"
    assert modules_of_package(path) <= MAY_IMPORT[module]


def test_every_module_has_its_place() -> None:
    paths = [*PACKAGE.glob("*.py"), *PACKAGE.glob("law/*.py")]
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths if path.name[:2] != "__"}
    assert names - TOP <= set(MAY_IMPORT), "a new module: say in MAY_IMPORT what it may import"


INCLUDE = re.compile(r'#\s*include\s+[<"]([^>"]+)[>"]')


def includes_of(path: Path) -> set[str]:
    return set(INCLUDE.findall(path.read_text()))


@pytest.mark.parametrize("folder", ["include", "core", "dispatch", "cuda", "check"])
def test_only_the_binding_knows_python(folder: str) -> None:
    for path in (ROOT / "csrc" / folder).rglob("*.[ch]*"):
        assert not any("Python.h" in name or "numpy" in name for name in includes_of(path)), path


def test_the_core_does_not_know_dispatch_or_cuda() -> None:
    for path in [*(ROOT / "csrc/core").glob("*.[ch]"), *(ROOT / "csrc/include").rglob("*.h")]:
        assert not any("dispatch" in name or "cuda" in name.lower() for name in includes_of(path)), path


def test_only_dispatch_asks_the_processor() -> None:
    for path in (ROOT / "csrc").rglob("*.[ch]"):
        if path.parent.name != "dispatch":
            assert not re.search(r"__builtin_cpu_supports|getauxval|cpuid", path.read_text()), path


def test_public_headers_include_only_public_headers() -> None:
    for path in (ROOT / "csrc/include").rglob("*.h"):
        assert all(name.startswith("llmcomp/") or name in ("stddef.h", "stdint.h") for name in includes_of(path)), path


def test_torch_is_imported_in_one_place() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name not in TORCH_MODULES:
            assert not any(module.split(".")[0] in ("torch", "transformers") for module in imports_of(path)), path


def test_matplotlib_is_imported_by_figures_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() not in DRAWING:
            assert not any(name.split(".")[0] in ("matplotlib", "mpl_toolkits") for name in imports_of(path)), path

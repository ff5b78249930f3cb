"""The directions of imports and includes: one graph of rooms for Python, one for C and CUDA, without exceptions.

A room is a folder (or a file beside them). It may use what its entry names and itself; an entry names only rooms that
stand above it in the table, so that no arrow can run up. Within a room, files may not import one another in a circle.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. `data` knows nothing of the coder, `law` nothing but rows: published results refit without a model.
PYTHON_ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "settings": {"errors"},
    "_core": {"errors", "settings"},
    "float_state": {"_core"},
    "checked_json": {"errors", "float_state"},
    "_cuda": set(),
    "atomic_write": set(),
    "progress": set(),
    "display": set(),
    "results": {"errors", "atomic_write"},
    "pico": set(),  # where the bundled files lie; how they were made is pico.recipes
    "coding": {"errors", "display", "float_state", "settings", "_core", "_cuda"},
    "data": {"errors", "display", "atomic_write", "progress", "checked_json", "pico"},
    "models": {"errors", "atomic_write", "progress", "checked_json", "float_state", "pico", "_core", "coding", "data"},
    "codec": {"errors", "display", "atomic_write", "progress", "float_state", "coding", "data", "models"},
    "scoring": {"errors", "version", "progress", "results", "coding", "data", "models", "codec"},
    "claims": {
        *("errors", "version", "results", "atomic_write", "checked_json", "progress", "display"),
        *("coding", "data", "models", "codec", "scoring"),
    },
    # llmcomp inside other libraries.
    "adapters": {"errors", "coding", "data", "models", "codec", "scoring"},
    "law": {"errors", "atomic_write", "results"},
    "experiment": {
        *("errors", "atomic_write", "checked_json", "progress", "results", "pico"),
        *("coding", "data", "models", "codec", "scoring", "law"),
    },
    "bench": {"errors", "progress", "results", "pico", "coding", "data", "models", "codec", "scoring", "experiment"},
    "conformance": {"errors", "version", "checked_json", "_core", "coding", "data", "models", "codec"},
    "pico.recipes": {"errors", "atomic_write", "results", "pico", "data", "llmcomp"},
    "cli": {
        *("errors", "atomic_write", "progress", "version", "results", "pico"),
        *("coding", "data", "models", "codec", "scoring"),
        *("claims", "law", "experiment", "bench", "conformance", "llmcomp"),
    },
    # The public names, each imported when it is first used.
    "llmcomp": {
        "errors",
        "version",
        "results",
        "coding",
        "data",
        "models",
        "codec",
        "scoring",
        "claims",
        "law",
        "experiment",
        "cli",
    },
}


C_ROOMS: dict[str, set[str]] = {
    "include": set(),
    "core/base": {"include"},
    "core/coding": {"include", "core/base"},
    "core/mixing": {"include", "core/base", "core/coding"},
    "core/int8": {"include", "core/base"},
    "core/transformer": {"include", "core/base", "core/coding", "core/int8"},
    "dispatch": {"include", "core/base", "core/coding", "core/int8", "core/transformer"},
    "cuda/coding": {"include", "core/base", "core/coding"},
    "cuda/transformer": {"include", "core/base", "core/coding", "core/int8", "core/transformer", "cuda/coding"},
    "python": {"include", "core/base", "cuda/coding", "cuda/transformer"},
    "check": {
        *("include", "core/base", "core/coding", "core/mixing", "core/int8", "core/transformer"),
        *("dispatch", "cuda/coding", "cuda/transformer"),
    },
}
# What only some rooms may include of the world outside.
OUTSIDE = {"Python.h": {"python"}, "numpy": {"python"}, "cuda_runtime": {"python", "cuda/coding", "cuda/transformer"}}
TORCH_FILES = {
    "bench/torch_yardsticks.py",
    "data/tokenizer_conversion.py",
    "models/engines/torch.py",
    "models/engines/torch_device.py",
    "adapters/trainer.py",
    "models/engines/torch_steps.py",
    "models/engines/torch_weights.py",
    "pico/train.py",
    "pico/vocabularies.py",
    "pico/muon.py",
}

Edges = Mapping[str, set[str]]


def python_modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of everything in the package; the package itself is "llmcomp"."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def python_edges(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, at its top or inside a function."""
    modules = python_modules(package)
    extensions = {f"{package.name}.{path.stem}" for path in package.glob("_*.pyi")}
    edges = {}
    for module, path in modules.items():
        used = set()
        for name in imported_names(path):
            while name and name not in modules and name not in extensions:
                name = name.rpartition(".")[0]
            if name:
                used.add(name)
        edges[module] = used - {module}
    return edges


def python_room(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return "llmcomp"
    return "pico.recipes" if parts[1] == "pico" and len(parts) > 2 else parts[1]


INCLUDE = re.compile(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', re.MULTILINE)


def c_files(csrc: Path) -> Iterator[Path]:
    return (path for path in csrc.rglob("*") if path.suffix in (".c", ".h", ".cu", ".cpp"))


def c_edges(csrc: Path) -> dict[str, set[str]]:
    """File -> the files of csrc that it includes, as the compiler finds them: -Icsrc/include -Icsrc, then beside it."""
    edges = {}
    for path in c_files(csrc):
        used = set()
        for name in INCLUDE.findall(path.read_text()):
            places = (csrc / "include" / name, csrc / name, path.parent / name)
            used |= {place.relative_to(csrc).as_posix() for place in places[:3] if place.is_file()}
        edges[path.relative_to(csrc).as_posix()] = used - {path.relative_to(csrc).as_posix()}
    return edges


def c_room(file: str) -> str:
    parts = file.split("/")
    return "/".join(parts[:2]) if parts[0] in ("core", "cuda") else parts[0]


def forbidden(edges: Edges, room_of: object, rooms: Mapping[str, set[str]]) -> list[str]:
    """Every arrow that no entry allows, and every file that stands in no room."""
    wrong = []
    for file, used in edges.items():
        room = room_of(file)  # type: ignore[operator]
        if room not in rooms:
            wrong.append(f"{file}: no room is called {room!r}")
            continue
        for other in used:
            target = room_of(other)  # type: ignore[operator]
            if target != room and target not in rooms[room]:
                wrong.append(f"{file} -> {other}: {room} may not use {target}")
    return sorted(wrong)


def circle(edges: Edges) -> list[str]:
    try:
        tuple(TopologicalSorter(edges).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("rooms", [PYTHON_ROOMS, C_ROOMS], ids=["python", "c"])
def test_the_tables_run_one_way(rooms: dict[str, set[str]]) -> None:
    seen: set[str] = set()
    for room, used in rooms.items():
        assert used - {"llmcomp", "cli"} <= seen, room
        seen.add(room)


def test_python_rooms_use_only_what_is_below_them() -> None:
    assert forbidden(python_edges(ROOT / "llmcomp"), python_room, PYTHON_ROOMS) == []


def test_no_python_import_circle() -> None:
    # `import llmcomp` for the public names is an arrow from outside, and the package's own imports of them are lazy.
    edges = {module: used - {"llmcomp"} for module, used in python_edges(ROOT / "llmcomp").items()}
    assert circle(edges) == []


def test_c_rooms_include_only_what_is_below_them() -> None:
    assert forbidden(c_edges(ROOT / "csrc"), c_room, C_ROOMS) == []


def test_no_include_circle() -> None:
    assert circle(c_edges(ROOT / "csrc")) == []


def test_only_the_binding_knows_python_and_only_cuda_knows_the_toolkit() -> None:
    for path in c_files(ROOT / "csrc"):
        room = c_room(path.relative_to(ROOT / "csrc").as_posix())
        for name in INCLUDE.findall(path.read_text()):
            allowed = next((rooms for word, rooms in OUTSIDE.items() if word in name), None)
            assert allowed is None or room in allowed or room == "check", f"{path} includes {name}"
            assert not (room == "check" and ("Python.h" in name or "numpy" in name)), f"{path} includes {name}"


def test_public_headers_need_nothing_but_two_standard_ones() -> None:
    for path in (ROOT / "csrc/include").rglob("*.h"):
        names = set(INCLUDE.findall(path.read_text()))
        assert all(name.startswith("llmcomp/") or name in ("stddef.h", "stdint.h") for name in names), path


def test_only_dispatch_asks_the_processor() -> None:
    for path in c_files(ROOT / "csrc"):
        if path.parent.name != "dispatch":
            assert not re.search(r"__builtin_cpu_supports|getauxval|cpuid", path.read_text()), path


def test_progress_bars_are_made_in_one_place() -> None:
    """Which knows where nobody looks; how the pico suite was made is no part of the installed program."""
    for path in (ROOT / "llmcomp").rglob("*.py"):
        if path.parent.name != "pico" and path.name != "progress.py":
            assert not any(name.split(".")[0] == "tqdm" for name in imported_names(path)), path


def test_torch_is_imported_in_one_place() -> None:
    package = ROOT / "llmcomp"
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix() not in TORCH_FILES:
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in imported_names(path)), path


# The tests above fail when an arrow is added that runs up, in either language and across CUDA.


def test_an_import_that_runs_up_is_found(tmp_path: Path) -> None:
    package = tmp_path / "llmcomp"
    for name, text in {
        "__init__": "",
        "errors": "",
        "coding/__init__": "",
        "coding/streams": "def f():\n    from llmcomp.models.load import load_model\n",
        "models/__init__": "",
        "models/load": "import llmcomp.coding.streams\nfrom llmcomp.coding import streams\n",
    }.items():
        (package / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    edges = python_edges(package)
    assert forbidden(edges, python_room, PYTHON_ROOMS) == [
        "llmcomp.coding.streams -> llmcomp.models.load: coding may not use models"
    ]
    assert set(circle(edges)) == {"llmcomp.coding.streams", "llmcomp.models.load"}


def test_an_include_that_runs_up_is_found(tmp_path: Path) -> None:
    files = {
        "core/base/ieee.h": '#include "core/coding/row.h"\n',
        "core/coding/row.h": '  #  include "cuda/coding/tiles.h"\n',
        "cuda/coding/tiles.h": '#include "core/transformer/kernels.h"\n',
        "core/transformer/kernels.h": "#include <stdint.h>\n",
        "elsewhere/file.c": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert forbidden(c_edges(tmp_path), c_room, C_ROOMS) == [
        "core/base/ieee.h -> core/coding/row.h: core/base may not use core/coding",
        "core/coding/row.h -> cuda/coding/tiles.h: core/coding may not use cuda/coding",
        "cuda/coding/tiles.h -> core/transformer/kernels.h: cuda/coding may not use core/transformer",
        "elsewhere/file.c: no room is called 'elsewhere'",
    ]

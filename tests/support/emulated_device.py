"""llmcomp._cuda over the emulated device of csrc/check/emulated, for machines without a device: built once by make and
loaded in the place of the real module. What a test may ask of that device, and change, is in `Machine`."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from check_programs import ROOT, make

import llmcomp
from llmcomp.coding import cuda


class Machine(ctypes.Structure):
    """emulated_machine_t of csrc/check/emulated/cuda_runtime_api.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("driver_version", "n_devices", "major", "n_processors")),
        *((name, ctypes.c_size_t) for name in ("memory_bytes", "bytes_in_use", "n_allocations")),
        *((name, ctypes.c_size_t) for name in ("n_graph_launches", "n_synchronizations", "pitch_max")),
        ("reads_host_memory", ctypes.c_int),
    ]


@functools.cache
def has_device() -> bool:
    """Whether this machine has a device of its own: first asked before another is emulated."""
    return bool(cuda.cuda_info()["devices"])


def build() -> Path:
    """The module's file, compiled where sources have changed; skips the test where there is no compiler."""
    tools = {"make": "make", "CC": os.environ.get("CC", "cc"), "CXX": os.environ.get("CXX", "c++")}
    if missing := [tool for tool in tools.values() if shutil.which(tool.split()[0]) is None]:
        pytest.skip(f"there is no CUDA device, and none can be emulated without {' and '.join(missing)}")
    if sys.platform != "linux":
        pytest.skip("there is no CUDA device, and the emulated one switches stacks as Linux does")
    folder = f"build/check/emulated-{sys.implementation.cache_tag}"
    target = f"{folder}/_cuda.so"
    variables = [f"{name}={tool}" for name, tool in tools.items() if name != "make"]
    command = ["-j2", "-f", "csrc/cuda/cuda.mk", f"PYTHON={sys.executable}", f"EMULATED={folder}", *variables]
    done = make(*command, target, folder=folder)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return ROOT / target


def install(patch: pytest.MonkeyPatch, path: Path) -> Machine:
    """Loads the module from `path` as llmcomp._cuda until `patch` is undone."""
    loader = importlib.machinery.ExtensionFileLoader("llmcomp._cuda", str(path))
    spec = importlib.util.spec_from_loader("llmcomp._cuda", loader)
    assert spec is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    patch.setitem(sys.modules, "llmcomp._cuda", module)
    patch.setattr(llmcomp, "_cuda", module, raising=False)
    return Machine.in_dll(ctypes.CDLL(str(path)), "emulated_machine")

"""What can be said of the exact engine's CUDA part without a device: its sources, compiled for the host on an emulated
device, give the bits of the serial backend; nvcc makes of them what was meant."""

import re
import sys
from pathlib import Path

import pytest
from test_cuda_build import C11, FLAGS, NVCC, compiler, flags_of_setup, needs_nvcc, run, wheel_targets

ROOT = Path(__file__).parents[2]
CORE = (
    *("base/status", "coding/intervals", "coding/rows_serial", "coding/streams"),
    *("int8/product_serial", "transformer/kernels_serial"),
)
CORE += tuple(
    f"transformer/{name}"
    for name in ("transformer", "config", "forward", "linear_map", "int8_weights", "position_tables")
)
CHECKS = tuple(f"transformer_emulated{part}" for part in ("", "_kernels", "_models", "_switches"))
SOURCES = sorted((ROOT / "csrc/cuda").glob("*/*.cu"))
ENGINE = [path for path in SOURCES if path.name != "coding.cu"]
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
emulation_needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="it switches stacks with ucontext")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/check/transformer_emulated: every CUDA source as it is, on the emulated device."""
    folder = tmp_path_factory.mktemp("cuda")
    cxx = [compiler("CXX", "g++", "c++"), "-std=c++17", *FLAGS, "-Wno-unknown-pragmas", "-Icsrc/check/emulated"]
    objects = []
    for name in (*(f"core/{name}" for name in CORE), "check/transformer_cases"):
        objects.append(folder / f"{name.replace('/', '-')}.o")
        run(compiler("CC", "gcc", "cc"), *C11, *FLAGS, "-c", f"csrc/{name}.c", "-o", objects[-1])
    for path in SOURCES:
        objects.append(folder / f"{path.parent.name}-{path.name}.o")
        run(*cxx, "-x", "c++", "-c", path, "-o", objects[-1])
    program = folder / "transformer_emulated"
    run(
        *cxx,
        *(f"csrc/check/{name}.cpp" for name in CHECKS),
        "csrc/check/emulated/runtime.cpp",
        *objects,
        "-o",
        program,
        "-pthread",
    )
    return program


@emulation_needs_linux
@pytest.mark.slow
def test_the_engine_on_an_emulated_device_gives_the_bits_of_the_serial_backend(emulated: Path) -> None:
    assert "0 failures" in run(emulated, 1, 8, timeout=300)


@emulation_needs_linux
@pytest.mark.slow
def test_the_engine_on_an_emulated_device_many_times(emulated: Path) -> None:
    assert "0 failures" in run(emulated, 2, 150)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", ENGINE, ids=lambda path: path.stem)
def test_the_ptx_rounds_every_operation_to_nearest_once(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "engine.ptx"
    arch = wheel_targets()[-1]
    run(
        NVCC,
        *flags_of_setup("CUDA_EXACT"),
        f"-arch=compute_{arch}",
        "-ptx",
        "-Icsrc",
        "-Icsrc/include",
        source,
        "-o",
        target,
    )
    operations = {word for word in target.read_text().split() if ".f32" in word or ".f64" in word}
    assert not {word for word in operations if ".ftz" in word or ".approx" in word or word.startswith("mad")}
    # nvcc may write a maximum for a comparison only with a constant: of two numbers, it has another way with NaN.
    maxima = [line.split() for line in target.read_text().splitlines() if "max.f32" in line]
    assert all(line[-1].startswith("0f") for line in maxima), maxima
    arithmetic = {word for word in operations if word.split(".")[0] in ("add", "sub", "mul", "fma", "div", "sqrt")}
    assert all(".rn." in word for word in arithmetic), arithmetic
    assert ("fma.rn.f32" in arithmetic) == (source.stem != "transformer")


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills_its_chains(tmp_path: Path) -> None:
    for arch in wheel_targets():
        for source in ENGINE:
            command = [
                NVCC,
                *flags_of_setup("CUDA_EXACT"),
                f"-arch=sm_{arch}",
                "-Xptxas",
                "-v",
                "-Icsrc",
                "-Icsrc/include",
            ]
            report = run(*command, "-c", source, "-o", tmp_path / "engine.o")
            kernels = report.split("Compiling entry function")[1:]
            assert (len(kernels) > 0) == (source.stem != "transformer")
            for kernel in kernels:
                found = SPILLS.search(kernel)
                assert found is not None
                stack, stores, loads = map(int, found.groups())
                # A thread's chains are 64 bytes and more.
                assert max(stack, stores) < 16, kernel
                assert arch not in ("80", "90") or loads == 0, kernel

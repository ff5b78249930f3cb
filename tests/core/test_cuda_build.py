"""What can be said of the CUDA part without a device: the kernels' arithmetic run on the host, what nvcc makes of the
sources, and that importing the package neither needs nor loads any of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
ENTRY_POINTS = {
    "lmc_cuda_code_length",
    "lmc_cuda_decode_step",
    "lmc_cuda_decode_stream",
    "lmc_cuda_decoders_begin",
    "lmc_cuda_encoders_begin",
    "lmc_cuda_encoders_end",
    "lmc_cuda_encoders_place",
    "lmc_cuda_encoders_put",
    "lmc_cuda_error_clear",
    "lmc_cuda_intervals",
}
KERNELS = {
    **dict.fromkeys(("intervals_kernel", "decode_kernel"), 3),  # one a dtype
    **dict.fromkeys(("encoders_place_kernel", "encoders_put_kernel", "encoders_end_kernel"), 1),
    **dict.fromkeys(("decoders_begin_kernel", "code_length_kernel"), 1),
}


def run(*command: object, **settings: object) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


# The arithmetic, on the host.


FLAGS = [
    "-O1",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-missing-field-initializers",
    "-Icsrc",
    "-Icsrc/include",
]
C11 = ["-std=c11", "-D_GNU_SOURCE"]
CORE = [f"csrc/core/{name}.c" for name in ("coding/intervals", "coding/rows_serial", "coding/streams", "base/status")]


def compiler(variable: str, *names: str) -> str:
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"no compiler was found: {', '.join(names)}")


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/check/cuda_on_host, which runs the kernels' functions in loops and compares them with the serial backend."""
    program = tmp_path_factory.mktemp("cuda") / "cuda_on_host"
    command = [compiler("CC", "gcc", "cc"), *C11, *FLAGS, "csrc/check/cuda_on_host.c", *CORE, "-lm", "-o", program]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if subprocess.run([*command, *sanitize], cwd=ROOT, capture_output=True, check=False).returncode != 0:
        run(*command)
    return program


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/check/cuda_emulated: the kernels and launchers as they are, on an emulated device."""
    folder = tmp_path_factory.mktemp("cuda")
    objects = [folder / f"{Path(source).stem}.o" for source in CORE]
    for source, target in zip(CORE, objects, strict=True):
        run(compiler("CC", "gcc", "cc"), *C11, *FLAGS, "-c", source, "-o", target)
    program = folder / "cuda_emulated"
    command = [compiler("CXX", "g++", "c++"), "-std=c++17", *FLAGS, "-Wno-unknown-pragmas", "-Icsrc/check/emulated"]
    sources = ["csrc/check/cuda_emulated.cpp", "csrc/check/emulated/runtime.cpp"]
    run(*command, *sources, *objects, "-o", program, "-pthread")
    return program


@pytest.mark.skipif(sys.platform != "linux", reason="the emulation switches stacks with ucontext")
def test_kernels_on_an_emulated_device_give_the_integers_and_payloads_of_the_core(emulated: Path) -> None:
    assert "0 failures" in run(emulated, 1, 40, timeout=240)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the emulation switches stacks with ucontext")
def test_kernels_on_an_emulated_device_many_times(emulated: Path) -> None:
    assert "0 failures" in run(emulated, 2, 600)


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_cut_into_tiles_give_the_integers_of_the_core(on_host: Path, seed: int) -> None:
    assert "0 failures" in run(on_host, "rows", seed, 400)


def test_the_weight_without_its_clamp_is_the_weight(on_host: Path) -> None:
    assert "0 failures" in run(on_host, "weights", 30011)


@pytest.mark.slow
def test_the_weight_without_its_clamp_is_the_weight_for_every_31st_float(on_host: Path) -> None:
    assert "0 failures" in run(on_host, "weights", 31)


@pytest.mark.slow
def test_many_rows_cut_into_tiles_give_the_integers_of_the_core(on_host: Path) -> None:
    assert "0 failures" in run(on_host, "rows", 3, 5000)


# What nvcc makes of it.

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


def flags_of_setup(name: str) -> list[str]:
    """A list of words in setup.py: what is tested is what is built."""
    scope: dict[str, object] = {}
    line = next(line for line in (ROOT / "setup.py").read_text().splitlines() if line.startswith(f"{name} = "))
    exec(line, scope)
    return list(scope[name])  # type: ignore[call-overload]


def wheel_targets() -> list[str]:
    """The devices that the wheel has machine code for, the oldest first."""
    found = re.search(r'^CUDA_TARGETS = "([\d ]+)"', (ROOT / "release/build_wheels.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1].split()


@needs_nvcc
@pytest.mark.slow
def test_nvcc_compiles_for_every_target_without_spilling_the_row(tmp_path: Path) -> None:
    for arch in wheel_targets():
        target = tmp_path / f"sm_{arch}.o"
        command = [
            NVCC,
            *flags_of_setup("CUDA_EXACT"),
            f"-arch=sm_{arch}",
            "-Xptxas",
            "-v",
            "-Icsrc",
            "-Icsrc/include",
            "-c",
        ]
        report = run(*command, "csrc/cuda/coding/coding.cu", "-o", target)
        blocks = report.split("Compiling entry function")[1:]
        counts = {name: sum(name in block.split("'")[1] for block in blocks) for name in KERNELS}
        assert counts == KERNELS
        # By this, tools that look into a process tell them from other libraries' kernels: cuda_check.sh.
        assert all(re.search(r"\dlmc_\w+_kernel", block.split("'")[1]) for block in blocks)
        # A thread holds 128 bytes of its row: a stack of that size would mean that they left the registers.
        stacks = [int(block.split(" bytes stack frame")[0].split()[-1]) for block in blocks]
        assert max(stacks) < 64, stacks
        names = {line.split()[-1] for line in run("nm", "--defined-only", target).splitlines() if line.split()}
        assert {name for name in names if name.startswith("lmc_cuda_")} == ENTRY_POINTS


@needs_nvcc
def test_the_ptx_holds_no_contracted_approximate_or_flushing_operation(tmp_path: Path) -> None:
    arch = wheel_targets()[-1]
    target = tmp_path / "kernels.ptx"
    command = [NVCC, *flags_of_setup("CUDA_EXACT"), f"-arch=compute_{arch}", "-ptx", "-Icsrc", "-Icsrc/include"]
    run(*command, "csrc/cuda/coding/coding.cu", "-o", target)
    row_kernels = [part for part in target.read_text().split(".entry") if "code_length" not in part.split("(")[0]]
    operations = {word for part in row_kernels for word in part.split() if ".f32" in word}
    assert {"fma.rn.f32", "cvt.rzi.u32.f32"} <= operations
    assert not {word for word in operations if ".ftz" in word or ".approx" in word or word.startswith("mad")}
    floats = {word for word in operations if word.split(".")[0] in ("add", "sub", "mul", "fma", "div")}
    assert floats and all(".rn." in word for word in floats), floats


# The module.


def python(code: str, **environment: str) -> str:
    return run(sys.executable, "-c", code, env={**os.environ, **environment}, timeout=120)


def test_importing_the_package_loads_no_cuda() -> None:
    code = (
        "import sys, numpy, llmcomp; llmcomp.intervals(numpy.zeros((1, 4), 'f'), [1]); "
        "assert 'llmcomp._cuda' not in sys.modules; "
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''; "
        "assert 'libcuda' not in maps, 'a CUDA library is loaded'"
    )
    python(code)


def test_the_module_loads_without_device_and_driver() -> None:
    pytest.importorskip("llmcomp._cuda", reason="llmcomp was built without CUDA")
    found = python("from llmcomp.coding.cuda import cuda_info; print(cuda_info())", CUDA_VISIBLE_DEVICES="")
    assert "'built': True" in found and "'devices': []" in found
    code = (
        "import llmcomp\nfrom llmcomp import _cuda\n"
        "try: _cuda.Buffer(8, 0)\nexcept llmcomp.Error as error: print(error)\nelse: raise SystemExit('a buffer?')"
    )
    assert python(code, CUDA_VISIBLE_DEVICES="").startswith("CUDA: ")


def test_a_dlpack_capsule_is_read_and_used_up() -> None:
    cuda = pytest.importorskip("llmcomp._cuda", reason="llmcomp was built without CUDA")
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(5, 4, 7, dtype=torch.bfloat16)[1:, :, 2:]
    capsule = tensor.__dlpack__()
    pointer, device_type, device, code, bits, shape, strides = cuda.dlpack_view(capsule)
    assert (pointer, device_type, device, code, bits) == (tensor.data_ptr(), 1, 0, 4, 16)
    assert (shape, strides) == (tuple(tensor.shape), tuple(tensor.stride()))
    with pytest.raises(ValueError):
        cuda.dlpack_view(capsule)


# The check of a device.

# What the script calls, on a machine without a device: nvidia-smi, compute-sanitizer with a long help, ncu, and a
# Python whose coder tests fail and whose sweep never ends.
STAND_INS = {
    "nvidia-smi": "echo 'NVIDIA A100 80GB, 580.1'",
    "compute-sanitizer": """if [ "$1" = --help ]; then
    echo "  --kernel-name arg"; for i in {1..3000}; do echo "  --option-$i, forty more characters of help"; done; exit
fi
echo "$*" >>calls; echo "12 passed in 1.0s"; echo "========= ERROR SUMMARY: 0 errors" """,
    "ncu": 'echo "$*" >>calls',
    "python": """echo "$*" >>calls
if [[ "$*" == *pytest*coding/test_cuda.py*"not slow"* ]]; then echo "=== 1 failed, 3 passed in 2.0s ==="; exit 1; fi
if [[ "$*" == *pytest* ]]; then echo "=== 3 passed in 2.0s ==="; fi
if [[ "$*" == *bench_cuda*.py* ]]; then echo "## From $1" >"${@: -1}"; fi
if [[ "$*" == *sweep* ]]; then echo "70m, published: 3 cells in 1 s"; sleep 60; fi""",
}
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


class DeviceCheck:
    """benchmarks/cuda_check.sh in a folder of its own, over the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("benchmarks", "bin", "llmcomp"):
            (folder / name).mkdir()
        shutil.copy(ROOT / "benchmarks/cuda_check.sh", folder / "benchmarks")
        (folder / "llmcomp/_cuda.so").write_bytes(b"built")
        for name, body in STAND_INS.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)

    def run(self, *steps: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHON": "python", **settings}
        command = ["bash", self.folder / "benchmarks/cuda_check.sh", *steps]
        (self.folder / "calls").unlink(missing_ok=True)
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=120
        )

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@needs_bash
def test_the_check_of_a_device_goes_in_steps_with_limits_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    check = DeviceCheck(tmp_path)
    listed = [line.split(":") for line in check.run("list").stdout.split()]
    assert [name for name, _ in listed[:6]] == ["build", "coder", "bench_cuda", "engine", "bench_cuda_engine", "sweep"]
    assert all(0 < int(limit) <= 480 for _, limit in listed)
    script = tmp_path / "benchmarks/cuda_check.sh"
    script.write_text(script.read_text().replace("sweep:480", "sweep:2"))
    out = tmp_path / "out"
    done = check.run(OUT=str(out))
    assert (done.returncode, done.stderr) == (1, "")
    report = (out / "report.md").read_text()
    told = [line.split(":")[0][2:] for line in report.splitlines() if line.startswith("- ")]
    assert told == [name for name, _ in listed]
    assert "CUDA on NVIDIA A100 80GB" in report
    assert re.search(r"- coder: failed after \d+ s: 1 failed, 3 passed in 2.0s\n", report)
    assert re.search(r"- sweep: ended after \d+ s, its limit: 70m, published: 3 cells in 1 s\n", report)
    assert len(re.findall(r"check_\w+: done in \d+ s: ERROR SUMMARY: 0 errors", report)) == 8
    assert "## From benchmarks/bench_cuda.py" in report and "## From benchmarks/bench_cuda_engine.py" in report
    # As many files as come back from a machine that gives back few.
    names = "bench_cuda.md bench_cuda_engine.md done.txt log.txt modules.tar ncu.txt report.md sweep.txt"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    # A second -q, beside pyproject.toml's, leaves out the line with the counts.
    assert not any("pytest" in call and " -q" in call for call in check.calls())
    calls = [line for line in check.calls() if line.startswith("--tool")]
    # Without what torch's kernels write, initcheck would take all that ours read for unwritten.
    assert ["--kernel-name kns=lmc_" in call for call in calls] == ["initcheck" not in call for call in calls]


@needs_bash
def test_the_check_of_a_device_goes_on_where_an_earlier_one_stopped(tmp_path: Path) -> None:
    check = DeviceCheck(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    assert check.run("build", "engine", OUT=str(first)).returncode == 0
    assert (first / "done.txt").read_text().split() == ["build", "engine"]
    (tmp_path / "llmcomp/_cuda.so").unlink()
    assert check.run("build", "engine", "profile", OUT=str(second), BEFORE=str(first)).returncode == 0
    assert (tmp_path / "llmcomp/_cuda.so").read_bytes() == b"built"
    assert not any("setup.py" in call or "pytest" in call for call in check.calls())
    report = (second / "report.md").read_text()
    assert report.count("- engine: done") == report.count("- profile: done") == 1
    late = check.run("engine", "slow", OUT=str(tmp_path / "late"), SECONDS_MAX="10")
    assert late.returncode == 1 and late.stdout.count("not begun: 10 seconds are over") == 2
    unknown = check.run("everything")
    assert unknown.returncode == 2 and "no step is called everything" in unknown.stderr


def test_the_wheels_for_a_device_are_listed_in_one_place() -> None:
    lines = (ROOT / "benchmarks/cuda_wheels.txt").read_text().splitlines()
    wheels = {re.split(r"[<>=]", line)[0] for line in lines if line and not line.startswith("#")}
    assert {"platformdirs", "soundfile"} <= wheels

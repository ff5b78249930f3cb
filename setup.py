"""The C extensions: which files, and the flags of each. Everything else about the package is in pyproject.toml.

llmcomp._cuda is built where nvcc is found (CUDA_HOME, else PATH), and left out with a warning where that fails.
LLMCOMP_CUDA=0 leaves it out, LLMCOMP_CUDA=1 makes it an error to be without it.
"""

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# No contraction, no reordering: the arithmetic is part of the file formats. csrc/FORMAT.md says why.
EXACT = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
]
WARNINGS = ["-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror=implicit-function-declaration"]
# Of the Python that is built for, which a cross build names in _PYTHON_HOST_PLATFORM; a fat Python builds for this one.
MACHINE = sysconfig.get_platform().rpartition("-")[2].replace("universal2", platform.machine()).lower()
X86_64, AARCH64 = MACHINE in ("x86_64", "amd64"), MACHINE in ("aarch64", "arm64")
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c".split()
FLAGS_BY_SUFFIX = {
    "_avx2.c": ["-mavx2", "-mfma", "-mf16c"] if X86_64 else [],
    "_avx512.c": AVX512 if X86_64 else [],
    "_avx512vnni.c": [*AVX512, "-mavx512vnni"] if X86_64 else [],
    "_neondot.c": ["-march=armv8.2-a+dotprod"] if AARCH64 else [],
}
# One module for every Python from 3.11 on, by the stable ABI: 3.10's has no buffers, a free-threaded Python has none.
STABLE_ABI = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")
LIMITED_API = [("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else []
CUDA_EXACT = ["-std=c++17", "-O3", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
CUDA_HOST = "-fPIC,-fvisibility=hidden,-ffp-contract=off"
ADVICE = "install one (apt install gcc, xcode-select --install) or a wheel (pip install llmcomp-exact)"
CUDA_MODULE = glob("csrc/python/cuda_*.c")
# What the device's part needs of the core on the host: statuses, and the tables that go with a model's weights.
CUDA_CORE = [
    *(f"csrc/core/{name}.c" for name in ("base/status", "coding/intervals", "coding/rows_serial")),
    *(
        f"csrc/core/transformer/{name}.c"
        for name in ("config", "forward", "linear_map", "kernels_serial", "position_tables")
    ),
]


def find_nvcc() -> Path | None:
    """The nvcc to use, None for a build without CUDA."""
    wanted = os.environ.get("LLMCOMP_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None) or shutil.which("nvcc")
    if found is None and wanted == "1":
        raise SystemExit("LLMCOMP_CUDA=1, but nvcc was found neither in CUDA_HOME/bin nor on the PATH")
    return Path(found) if found else None


def toolkit_of(nvcc: Path) -> Path:
    """The toolkit's folder, by nvcc's own word: nvcc may be a link or a script elsewhere."""
    told = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    tops = [line.split("TOP=", 1)[1] for line in told.stderr.splitlines() if "TOP=" in line]
    return Path(tops[0]).resolve() if tops else nvcc.resolve().parent.parent


@functools.cache
def cuda_targets() -> list[str]:
    """Machine code for these, and PTX of the last, which the driver compiles for newer devices. LLMCOMP_CUDA_TARGETS
    ("75 80 ... 120" for a wheel), else the devices of this machine, else 90."""
    found = os.environ.get("LLMCOMP_CUDA_TARGETS", "").split()
    if not found and shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(ask, capture_output=True, text=True, check=False)
        found = re.findall(r"^(\d+\.\d)$", told.stdout, re.MULTILINE)
    return sorted({target.replace(".", "") for target in found}, key=int) or ["90"]


def cuda_extension(nvcc: Path) -> Extension:
    toolkit = toolkit_of(nvcc)
    targets = " ".join([*(f"sm_{arch}" for arch in cuda_targets()), f"compute_{cuda_targets()[-1]}"])
    return Extension(
        "llmcomp._cuda",
        sources=sorted([*CUDA_MODULE, *CUDA_CORE]),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*/*.cu")),
        include_dirs=["csrc", "csrc/include", str(toolkit / "include")],
        define_macros=[("LMC_CUDA_TARGETS", f'"{targets}"'), *LIMITED_API],
        py_limited_api=STABLE_ABI,
        extra_compile_args=EXACT + WARNINGS,
        library_dirs=[str(toolkit / "lib64"), str(toolkit / "lib")],
        libraries=["cudart_static", "dl", "rt", "pthread", "stdc++"],
        optional=os.environ.get("LLMCOMP_CUDA") != "1",
    )


def demand_compiler() -> None:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    found = shutil.which(compiler)
    runs = found and not subprocess.run([found, "--version"], capture_output=True, check=False).returncode
    if os.name == "posix" and not runs:
        raise SystemExit(f"llmcomp needs a C compiler to be built, and {compiler} is none that runs: {ADVICE}")


class Build(build):
    """Without a compiler it ends before the first file is copied, whose names would hide why."""

    def run(self) -> None:
        demand_compiler()
        super().run()


class BuildExact(build_ext):
    """Compiles each file with the flags of its instruction set; a kernel never runs where it was not meant to."""

    def run(self) -> None:
        demand_compiler()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "llmcomp._cuda":
            ext.extra_objects = [self.compile_cuda(source) for source in sorted(glob("csrc/cuda/*/*.cu"))]
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, suffix, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = next((f for end, f in FLAGS_BY_SUFFIX.items() if src.endswith(end)), [])
            return compile_one(obj, src, suffix, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extension(ext)
        self.compiler._compile = compile_one

    def compile_cuda(self, source: str) -> str:
        """One .cu file to an object with machine code for every target, unless the object is newer than all sources."""
        target = Path(self.build_temp) / Path(source).with_suffix(".o")
        inputs = [source, "setup.py", *glob("csrc/**/*.h", recursive=True)]
        if target.exists() and target.stat().st_mtime > max(Path(path).stat().st_mtime for path in inputs):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        last = cuda_targets()[-1]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_targets()]
        codes += [f"-gencode=arch=compute_{last},code=compute_{last}", "-Xfatbin=-compress-all"]
        command = [
            str(NVCC),
            *CUDA_EXACT,
            *codes,
            "-Xcompiler",
            CUDA_HOST,
            "-Icsrc",
            "-Icsrc/include",
            "-c",
            source,
            "-o",
        ]
        self.announce(" ".join([*command, str(target)]), level=2)
        if subprocess.run([*command, str(target)], check=False).returncode != 0:
            raise CompileError(f"nvcc failed on {source}; LLMCOMP_CUDA=0 builds without the CUDA part")
        return str(target)


NVCC = find_nvcc()
core = Extension(
    "llmcomp._core",
    sources=sorted({*glob("csrc/core/*/*.c"), *glob("csrc/dispatch/*.c"), *glob("csrc/python/*.c")} - {*CUDA_MODULE}),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=["csrc", "csrc/include", numpy.get_include()],
    define_macros=LIMITED_API,
    py_limited_api=STABLE_ABI,
    extra_compile_args=EXACT + WARNINGS,
    libraries=["m"] if os.name == "posix" else [],
    extra_link_args=["-pthread"],
)
setup(
    cmdclass={"build": Build, "build_ext": BuildExact},
    ext_modules=[core, *([cuda_extension(NVCC)] if NVCC else [])],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)

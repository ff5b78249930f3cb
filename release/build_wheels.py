"""Builds the wheels of a release into dist/: python release/build_wheels.py [x86_64] [aarch64]

For manylinux_2_28, on any Linux machine: zig is the compiler, since it brings the symbols of that glibc and of both
processors. One wheel serves every Python from 3.11 on. With nvcc the x86-64 wheel has the CUDA part; LLMCOMP_CUDA=0
leaves it out, LLMCOMP_CUDA=1 demands it. Needs release/requirements.txt; release/check.py is what looks at the result.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GLIBC = "2.28"
ARCHITECTURES = ("x86_64", "aarch64")
# Every device since 2018, and PTX for those to come.
CUDA_TARGETS = "75 80 86 89 90 100 120"


def build(architecture: str) -> None:
    folder = ROOT / "build" / f"wheel-{architecture}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "lib", ignore_errors=True)
    compiler = write_compiler(folder / "cc", architecture)
    environment = {
        **os.environ,
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared -s",
        "CFLAGS": "-O3 -DNDEBUG",
        "_PYTHON_HOST_PLATFORM": f"linux-{architecture}",
    }
    if architecture == os.uname().machine:
        environment.setdefault("LLMCOMP_CUDA_TARGETS", CUDA_TARGETS)
    else:
        environment["LLMCOMP_CUDA"] = "0"
    where = ["egg_info", "--egg-base", str(folder), "build", "--build-base", str(folder), "--build-lib"]
    platform = f"manylinux_{GLIBC.replace('.', '_')}_{architecture}"
    wheel = ["bdist_wheel", "--plat-name", platform, "--dist-dir", "dist", "--bdist-dir", str(folder / "wheel")]
    command = [sys.executable, "setup.py", "-q", *where, str(folder / "lib"), *wheel]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def write_compiler(path: Path, architecture: str) -> str:
    """A C compiler for setup.py: zig, which calls an instruction set otherwise than gcc and clang do, and which would
    check for undefined behaviour on every run (the sanitizers of csrc/check have done that)."""
    command = f"{sys.executable} -m ziglang cc -target {architecture}-linux-gnu.{GLIBC} -fno-sanitize=all"
    path.write_text(
        "#!/bin/sh\n"
        "for word; do\n"
        "    shift\n"
        '    [ "$word" = -march=armv8.2-a+dotprod ] && word=-mcpu=generic+v8_2a+dotprod\n'
        '    set -- "$@" "$word"\n'
        "done\n"
        f'exec {command} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


for name in sys.argv[1:] or ARCHITECTURES:
    if name not in ARCHITECTURES:
        raise SystemExit(f"no wheel is built for {name!r}; expected {' or '.join(ARCHITECTURES)}")
    build(name)

"""What a release has to be, printed and checked: python release/check.py [dist]; `make release-check` calls it.

For each wheel: tags, size, content, what the modules export, need and require of glibc and Python's stable ABI. Then
versions, changelog, conformance and documentation. Ends with the number of faults as its exit status, and names each.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

ROOT = Path(__file__).parent.parent
SIZE_MAX = 20_000_000  # without the bundled models and samples
GLIBC_MAX = (2, 28)
LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-aarch64.so.1"}
LIBRARIES |= {"libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
MACHINES = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}
# Parts of an installation that nobody may forget.
WHEEL_FILES = ("llmcomp/py.typed", "llmcomp/published.csv", "llmcomp/conformance/digests.json", "llmcomp/_core.pyi")
WHEEL_FILES += ("llmcomp/pico/suite/suite.json", "llmcomp/pico/samples/text.txt", "llmcomp/models/suites/pythia.json")
SDIST_FILES = ("csrc/FORMAT.md", "csrc/core/base/ieee.h", "csrc/cuda/coding/coding.cu", "csrc/check/check.mk")
SDIST_FILES += ("Makefile", "tests/conftest.py", "tests/support/oracle.py", "tests/golden/coding.bin", "docs/conf.py")
SDIST_FILES += ("README.md", "CHANGELOG.md", "CONFORMANCE.md", "LICENSE", "notebooks/1_first_look.ipynb", "setup.py")

Fault = str


def check_wheel(path: Path, version: str) -> Iterator[Fault]:
    name, found_version, *_, platform = path.stem.split("-")
    with zipfile.ZipFile(path) as wheel:
        sizes = {entry.filename: entry.compress_size for entry in wheel.infolist()}
    size = sum(n_bytes for name, n_bytes in sizes.items() if not name.startswith("llmcomp/pico/"))
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} MB of it no models and samples")
    if (name, found_version) != ("llmcomp_exact", version):
        yield f"is called {name} {found_version}, expected llmcomp_exact {version}"
    if "-cp311-abi3-" not in path.name:
        yield "is not for the stable ABI of Python 3.11"
    if size > SIZE_MAX:
        yield f"has {size:,} bytes beside the models, expected at most {SIZE_MAX:,}"
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        yield from (f"lacks {wanted}" for wanted in WHEEL_FILES if wanted not in names)
        yield from (f"has {extra}" for extra in names if re.match(r"(tests|docs|csrc|benchmarks)/", extra))
        metadata = wheel.read(next(entry for entry in names if entry.endswith(".dist-info/METADATA"))).decode()
        yield from (
            f"METADATA lacks {line!r}"
            for line in ("Name: llmcomp-exact", f"Version: {version}")
            if line not in metadata
        )
        audit = subprocess.run([sys.executable, "-m", "abi3audit", "--strict", path], capture_output=True, check=False)
        if audit.returncode:
            yield f"uses what the stable ABI has not: {audit.stderr.decode()[-300:]}"
        yield from check_platform(path)
        modules = [entry for entry in names if entry.endswith((".so", ".pyd"))]
        if "llmcomp/_core.abi3.so" not in modules:
            yield "lacks llmcomp/_core.abi3.so"
        if platform.endswith("x86_64") and "llmcomp/_cuda.abi3.so" not in modules:
            yield "has no CUDA part: build it where nvcc is"
        for entry in modules:
            for fault in check_module(entry, wheel.read(entry), platform):
                yield f"{entry}: {fault}"


def check_platform(path: Path) -> Iterator[Fault]:
    """What auditwheel takes the wheel for: the oldest manylinux that its modules would run on."""
    audit = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", path], capture_output=True, text=True, check=False
    )
    found = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_', " ".join(audit.stdout.split()))
    print(f"  auditwheel: {f'manylinux_{found[1]}_{found[2]}' if found else 'no manylinux'}")
    if found is None or (int(found[1]), int(found[2])) > GLIBC_MAX:
        yield f"is no manylinux_{'_'.join(map(str, GLIBC_MAX))} to auditwheel: {(audit.stdout + audit.stderr)[-300:]}"


def check_module(entry: str, data: bytes, platform: str) -> Iterator[Fault]:
    elf = ELFFile(io.BytesIO(data))
    machine = MACHINES.get(elf["e_machine"], elf["e_machine"])
    needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
    exported = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] == "STB_GLOBAL"}
    glibc = max(glibc_versions(elf), default=(0, 0))
    shown = ".".join(map(str, glibc))
    print(f"  {entry}: {len(data) / 1e6:.1f} MB, {machine}, glibc {shown}, needs {' '.join(sorted(needed))}")
    print(f"  {entry}: exports {' '.join(sorted(exported))}")
    if machine not in platform:
        yield f"is for {machine}, the wheel for {platform}"
    if glibc > GLIBC_MAX:
        yield f"needs glibc {shown}, expected at most {'.'.join(map(str, GLIBC_MAX))}"
    yield from (f"needs {library}" for library in sorted(needed - LIBRARIES))
    if exported != {f"PyInit_{Path(entry).name.split('.')[0]}"}:
        yield f"exports {' '.join(sorted(exported))}"


def glibc_versions(elf: ELFFile) -> Iterator[tuple[int, ...]]:
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            for _, versions in section.iter_versions():
                for one in versions:
                    if match := re.fullmatch(r"GLIBC_([\d.]+)", one.name):
                        yield tuple(map(int, match[1].split(".")))


def check_sdist(path: Path) -> Iterator[Fault]:
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    yield from (f"lacks {wanted}" for wanted in SDIST_FILES if wanted not in names)
    yield from (f"has {name}" for name in names if name.endswith((".so", ".o", ".pyc")))


def check_versions(version: str) -> Iterator[Fault]:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md has no dated section [{version}]"
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    if f"\nversion: {version}\n" not in citation:
        yield f"CITATION.cff is not of version {version}"
    if "[project.urls]" not in (ROOT / "pyproject.toml").read_text("utf-8"):
        yield "pyproject.toml has no [project.urls]: where the repository and the site are"


def check_conformance(version: str) -> Iterator[Fault]:
    digests = json.loads((ROOT / "llmcomp/conformance/digests.json").read_text("utf-8"))
    total = hashlib.sha256("\n".join(digests.values()).encode()).hexdigest()[:16]
    lines = (ROOT / "CONFORMANCE.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    rows = [row for row in rows if f"llmcomp {version}," in row[3]]
    print(f"conformance: {len(digests)} cases, digest {total}, {len(rows)} rows of llmcomp {version}")
    backends = {row[1] for row in rows}
    yield from (
        f"no row of {name} in CONFORMANCE.md" for name in ("serial", "avx2", "avx512", "neon") if name not in backends
    )
    for row in rows:
        if row[4] == str(len(digests)) and row[5] != total:
            yield f"{row[0]}, {row[1]}: digest {row[5]} in CONFORMANCE.md, expected {total}"


def check_docs() -> Iterator[Fault]:
    index = ROOT / "build/docs/index.html"
    if not index.exists():
        yield "the documentation is not built: make docs"
    elif index.stat().st_mtime < max(path.stat().st_mtime for path in (ROOT / "docs").rglob("*.md")):
        yield "the documentation is older than its pages: make docs"


def main(dist: Path) -> int:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    version = re.search(r'^version = "([^"]+)"$', project, re.MULTILINE)[1]
    wheels, sdists = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    faults = [f"{path.name} {fault}" for path in wheels for fault in check_wheel(path, version)]
    faults += [f"{path.name} {fault}" for path in sdists for fault in check_sdist(path)]
    for machine in MACHINES.values():
        faults += [] if any(path.stem.endswith(machine) for path in wheels) else [f"no wheel for {machine}"]
    faults += [] if sdists else [f"no sdist in {dist}"]
    faults += [*check_versions(version), *check_conformance(version), *check_docs()]
    print(*(f"FAULT {fault}" for fault in faults), sep="\n", end="\n" if faults else "")
    print(f"llmcomp-exact {version}: {len(faults)} faults")
    return min(len(faults), 99)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"))

"""What the compiler makes of the kernels in which most time is spent, counted in machine code; needs no device.

    python benchmarks/cuda_sass.py [--tools FOLDER] [--arch 90] [--out FILE.md]

Compiles csrc/cuda with the flags of setup.py and counts, for each kernel: registers, instructions in all, in its
hottest stretch, and of some kinds. The hottest stretch is the loop with the most of the kernel's own work in it
(products, fma, conversions), or, where that work is not in a loop, the longest stretch without a branch. `cuobjdump` is
asked of the PATH, or of --tools. MEMBAR is counted in the whole kernel. Counts are no times.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# What is looked at: part of a kernel's mangled name, its source, and the instruction that its work is made of.
KERNELS = {
    "scores of a step's keys": ("attend_step_kernel", "transformer/attention_step.cu", "FFMA"),
    "values of a step": ("attend_step_kernel", "transformer/attention_step.cu", "FADD"),
    "attention of a pass": ("attend_pass_kernel", "transformer/attention.cu", "FFMA"),
    "products": ("product_kernel", "transformer/product.cu", "FFMA"),
    "norms": ("norm_kernel", "transformer/rows.cu", "FADD"),
    "intervals": ("intervals_kernel", "coding/coding.cu", "F2I"),
    "decoding": ("decode_kernel", "coding/coding.cu", "F2I"),
    "8-bit products": ("code_product_kernel", "transformer/product_int8.cu", "IMMA"),
}
KINDS = ("LDG", "LDGSTS", "LDS", "LDSM", "IMMA", "FFMA", "FADD", "F2I", "MEMBAR", "MUFU", "BRA")


class Instruction(NamedTuple):
    address: int
    kind: str
    text: str


def setup_words(name: str) -> list[str]:
    scope: dict[str, list[str]] = {}
    line = next(line for line in (ROOT / "setup.py").read_text().splitlines() if line.startswith(f"{name} = "))
    exec(line, scope)
    return scope[name]


def machine_code(source: str, arch: str, cuobjdump: str) -> dict[str, tuple[int, list[Instruction]]]:
    """Registers and instructions by mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        flags = [*setup_words("CUDA_EXACT"), f"-arch=sm_{arch}", "-cubin", "-Icsrc", "-Icsrc/include"]
        subprocess.run(["nvcc", *flags, f"csrc/cuda/{source}", "-o", cubin], cwd=ROOT, check=True)
        told, usage = (
            subprocess.run([cuobjdump, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-sass", "--dump-resource-usage")
        )
    registers = {name: int(n) for name, n in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
    kernels: dict[str, tuple[int, list[Instruction]]] = {}
    for line in told.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            code: list[Instruction] = []
            kernels[found[1]] = registers[found[1]], code
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([^;]*);", line):
            code.append(Instruction(int(found[1], 16), found[2], found[3]))
    return kernels


def stretches(code: list[Instruction]) -> list[list[Instruction]]:
    """Innermost loops, and what lies between branches."""
    loops, straight, current = [], [], []
    for at, one in enumerate(code):
        current.append(one)
        target = re.search(r"0x([0-9a-f]+)", one.text) if one.kind == "BRA" else None
        if target is None:
            continue
        straight.append(current)
        current = []
        first = int(target[1], 16)
        body = [other for other in code[: at + 1] if other.address >= first]
        if first < one.address and not any(
            other.kind == "BRA" and other is not one and first <= int(back[1], 16) < other.address
            for other in body
            if (back := re.search(r"0x([0-9a-f]+)", other.text))
        ):
            loops.append(body)
    return [*loops, *straight, current]


def parameters(name: str) -> str:
    """The template's, as far as they tell one kernel from another."""
    words = re.findall(r"L[ijb](\d+)E", name)
    if dtype := re.search(r"lmc_dtype(?:_t)?(\d)E", name):
        words.append(("float32", "float16", "bfloat16")[int(dtype[1])])
    if norm := re.search(r"lmc_norm(?:_t)?(\d)E", name):
        words.append(("LayerNorm", "RMSNorm")[int(norm[1])])
    if "element_copy" in name:
        words.append("by elements")
    return ", ".join(words) or "-"


def rows(arch: str, cuobjdump: str) -> list[str]:
    lines = [
        f"| sm_{arch} | parameters | registers | instructions | before the first load | hottest stretch | "
        f"{' | '.join(KINDS)} |",
        "|---|---|---|---|---|---|" + "---|" * len(KINDS),
    ]
    compiled: dict[str, dict[str, tuple[int, list[Instruction]]]] = {}
    for what, (kernel, source, work) in KERNELS.items():
        if source not in compiled:
            compiled[source] = machine_code(source, arch, cuobjdump)
        for name, (registers, code) in sorted(compiled[source].items()):
            if kernel not in name:
                continue
            hottest = max(stretches(code), key=lambda part: (sum(one.kind == work for one in part), -len(part)))
            counts, whole = Counter(one.kind for one in hottest), Counter(one.kind for one in code)
            loads = (
                at for at, one in enumerate(code) if one.kind == "LDGSTS" or (one.kind == "LDG" and ".128" in one.text)
            )
            cells = [str(whole[kind] if kind == "MEMBAR" else counts[kind]) for kind in KINDS]
            numbers = [registers, len(code), next(loads, "-"), len(hottest)]
            cells = [what, parameters(name), *map(str, numbers), *cells]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", type=Path, help="the folder of cuobjdump and nvdisasm")
    parser.add_argument("--arch", default="90")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cuobjdump = shutil.which("cuobjdump", path=str(arguments.tools) if arguments.tools else None)
    if cuobjdump is None or shutil.which("nvcc") is None:
        raise SystemExit("cuda_sass: nvcc or cuobjdump was not found: name the folder of cuobjdump with --tools")
    text = "\n".join(rows(arguments.arch, cuobjdump)) + "\n"
    sys.stdout.write(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()

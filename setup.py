"""The C extension: which files, and the flags of each. Everything else about the package is in pyproject.toml."""

import platform
from glob import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No contraction, no reordering: the arithmetic is part of the file formats. csrc/FORMAT.md says why.
EXACT = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
X86_64 = platform.machine() in ("x86_64", "AMD64")
FLAGS_BY_SUFFIX = {
    "_avx2.c": ["-mavx2", "-mfma", "-mf16c"] if X86_64 else [],
    "_avx512.c": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c".split() if X86_64 else [],
}


class BuildExact(build_ext):
    """Compiles each file with the flags of its instruction set; a kernel never runs where it was not meant to."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, suffix, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = next((f for end, f in FLAGS_BY_SUFFIX.items() if src.endswith(end)), [])
            return compile_one(obj, src, suffix, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildExact},
    ext_modules=[
        Extension(
            "llmcomp._core",
            sources=sorted(glob("csrc/core/*.c") + glob("csrc/dispatch/*.c") + glob("csrc/python/*.c")),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            include_dirs=["csrc/include", numpy.get_include()],
            extra_compile_args=EXACT + WARNINGS,
            extra_link_args=["-pthread"],
        )
    ],
)

"""LLMCOMP_BACKEND and LLMCOMP_THREADS hold for everything that loads the C core, by whatever import; what makes no
sense is one line of an error. In processes of their own: the core reads them once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

import llmcomp

# Who calls a model need not know the coder. The kernel counts the threads that the core has started.
LOADS_A_MODEL = """
    import os, sys
    import numpy as np
    from engine_models import make_config, make_weights
    from llmcomp.models.engines.exact import ExactModel
    sys.modules["llmcomp.coding"] = None  # whoever asks for the coder now gets an ImportError
    config = make_config(hidden_size=120, intermediate_size=480, vocab_size=3000)
    weights = make_weights(config)
    before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None
    model = ExactModel(config, weights)
    model._core.logits(np.ones((64, 48), np.int64))
    after = before and len(os.listdir("/proc/self/task"))
    from llmcomp import _core
    print(*_core.context_in_use(), before and after - before)
"""


def run(program: str, **settings: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for name in ("LLMCOMP_BACKEND", "LLMCOMP_THREADS"):
        environment.pop(name, None)
    environment.update({name: value for name, value in settings.items() if value is not None})
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, timeout=120, check=False, env=environment, capture_output=True, text=True)


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("backend", "threads", "expected"),
    [
        (None, None, (llmcomp.backends()[-1], usable_cpus())),
        ("", "", (llmcomp.backends()[-1], usable_cpus())),
        ("serial", "3", ("serial", 3)),
        (llmcomp.backends()[-1], "1", (llmcomp.backends()[-1], 1)),
        (None, "0005", (llmcomp.backends()[-1], 5)),
    ],
)
def test_a_model_alone_has_the_settings(backend: str | None, threads: str | None, expected: tuple[str, int]) -> None:
    done = run(LOADS_A_MODEL, LLMCOMP_BACKEND=backend, LLMCOMP_THREADS=threads)
    assert done.returncode == 0, done.stderr
    name, n_threads, n_started = done.stdout.split()
    assert (name, int(n_threads)) == expected
    if n_started != "None":
        assert int(n_started) == expected[1] - 1  # and the thread that calls


WRONG = [
    *("0", "-1", "+4", " 4", "4 ", "2.5", "1e2", "four", "٣", "²", "0x10", "65537", "\n", "4\n4", "\udcff"),
    *(str(2**31), str(2**63), str(2**64), "9" * 5000),
]


PROGRAMS = {"core": "from llmcomp import _core", "coder": "import llmcomp; llmcomp.encode", "model": LOADS_A_MODEL}


@pytest.mark.parametrize(("threads", "who"), [*((text, "core") for text in WRONG), ("x", "coder"), ("x", "model")])
def test_threads_that_are_none(threads: str, who: str) -> None:
    done = run(PROGRAMS[who], LLMCOMP_THREADS=threads)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llmcomp.errors.Error: LLMCOMP_THREADS is ") and last.endswith("a number of 1 to 65536")
    assert len(last) < 200


@pytest.mark.parametrize("backend", ["Serial", "avx1024", "cuda", "\udcff", "a\nb"])
def test_backends_that_are_none(backend: str) -> None:
    done = run("from llmcomp import _core", LLMCOMP_BACKEND=backend)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llmcomp.errors.Error: LLMCOMP_BACKEND is ") and "expected one of serial" in last


@pytest.mark.parametrize("threads", ["many", str(2**64)])
def test_the_command_line_says_it_in_one_line(threads: str) -> None:
    program = "import sys; from llmcomp.cli import main; sys.exit(main(['info']))"
    done = run(program, LLMCOMP_THREADS=threads)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"LLMCOMP_THREADS is '{threads}'; expected a number of 1 to 65536" in done.stderr


@pytest.mark.parametrize("n_threads", [0, -1, 65537, 2**64, -(2**64), pytest.param(10**5000, id="10**5000")])
def test_use_threads_takes_no_other_number(n_threads: int) -> None:
    with pytest.raises(llmcomp.Error, match=r"n_threads is .{1,60}; expected a number of 1 to 65536"):
        llmcomp.use_threads(n_threads)

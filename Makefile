# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
FAST_TESTS := -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.[ch]' -o -name '*.cu') setup.py pyproject.toml
C_FILES := $(shell find csrc -name '*.[ch]' -o -name '*.cu' -o -name '*.cpp')


.PHONY: man help demo test check check-slow check-oldest bench fuzz-archives fuzz-inputs clean format docs wheels release-check
help:
	@echo "make demo        install into $(VENV) and run the main job on the bundled models and samples"
	@echo "make test        install with the test extra and run the tests"
	@echo "make check       format, lint, types, layers, stubs"
	@echo "make check-slow  the tests that take longer"
	@echo "make check-oldest  the tests with the oldest dependencies, on OLDEST_PYTHON (python3.10)"
	@echo "make fuzz-inputs FUZZ_INPUTS (100000) damaged files of each kind that llmcomp reads"
	@echo "make bench       the benchmarks"
	@echo "make fuzz-archives  a million readings of archives with hostile fields"
	@echo "make man         build/llmcomp.1, the man page"
	@echo "make format      rewrite the sources in the house style"
	@echo "make docs        the documentation site into build/docs; a warning is an error"
	@echo "make wheels      the wheels and the sdist of a release into dist"
	@echo "make release-check  what a release has to be: wheels, versions, changelog, conformance, documentation"
	@echo "make clean       remove what was built"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# The base install: no torch, nothing downloaded but packages.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/llmcomp demo

test: $(VENV)/.installed-test
	$(BIN)/pytest $(FAST_TESTS)

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml llmcomp._core
	$(BIN)/pytest tests/test_layers.py

check-slow: $(VENV)/.installed-test
	$(BIN)/pytest -m slow

# Without torch, whose tests are skipped.
check-oldest:
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint tests/oldest.txt --editable . pytest pytest-xdist hypothesis
	.venv-oldest/bin/pytest $(FAST_TESTS)

FUZZ_INPUTS ?= 100000
fuzz-inputs: $(VENV)/.installed-test
	$(BIN)/python benchmarks/fuzz_inputs.py --inputs $(FUZZ_INPUTS)

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/bench_coding.py
	$(BIN)/python benchmarks/bench_engine.py
	$(BIN)/python benchmarks/bench_int8.py
	$(BIN)/python benchmarks/bench_pythia.py
	$(BIN)/python benchmarks/bench_archive.py
	$(BIN)/python benchmarks/bench_fit.py

fuzz-archives: $(VENV)/.installed-test
	$(BIN)/python benchmarks/fuzz_archives.py

man: $(VENV)/.installed
	mkdir -p build
	$(BIN)/python -m llmcomp.cli.man_page build/llmcomp.1

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(C_FILES)

$(VENV)/.installed-docs: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

build/release/.installed: release/requirements.txt
	$(PYTHON) -m venv build/release
	build/release/bin/pip install --quiet --requirement $<
	@touch $@

wheels: build/release/.installed
	rm -rf dist
	build/release/bin/python release/build_wheels.py
	build/release/bin/python -m build --quiet --sdist

release-check: build/release/.installed docs
	build/release/bin/python release/check.py
	PYTHON=$(PYTHON) release/try_wheel.sh dist/*manylinux*$(shell uname -m).whl

clean:
	rm -rf build dist *.egg-info llmcomp/*.so demo-results

-include csrc/check/check.mk
-include csrc/cuda/cuda.mk

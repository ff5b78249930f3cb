#!/usr/bin/env bash
# Everything that needs a CUDA card, in one command on a machine that has one:
#     benchmarks/cuda_check.sh [build] [tests] [sanitize] [bench]        all four where none is named
# Builds in place, runs the tests, runs the kernels under compute-sanitizer, measures, and leaves what it found in
# benchmarks/results/cuda-<card>.md. A step that fails does not keep the others from running, but for the build; the exit
# status is 1 then. Needs nvcc, torch with CUDA, transformers, and the test extra; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # of the toolkit: compute-sanitizer
STEPS=${*:-build tests sanitize bench}
command -v nvidia-smi >/dev/null || { echo "cuda_check: nvidia-smi is not here: no NVIDIA driver, no card to check" >&2; exit 1; }
CARD=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs 'A-Za-z0-9\n' '-' | sed 's/-*$//')
OUT=benchmarks/results
REPORT=$OUT/cuda-$CARD.md
mkdir -p "$OUT" build

# Keeps the last line of a command's output that says how it ended, under the name of the step.
note() {
    printf -- '- %s: %s\n' "$1" "$2" | tee -a "build/cuda-$CARD-checks.md"
}

build() {
    LLMCOMP_CUDA=1 "$PYTHON" setup.py -q egg_info build_ext --inplace &&
        "$PYTHON" -c 'from llmcomp.cuda import cuda_info; info = cuda_info(); print(info); assert info["devices"]'
}

tests() {
    local status=0
    "$PYTHON" -m pytest tests/coding/test_cuda*.py tests/core/test_cuda*.py tests/models/test_cuda*.py -m "" -rs \
        >"build/cuda-$CARD-tests.log" 2>&1 || status=$?
    tail -n 40 "build/cuda-$CARD-tests.log"
    note "tests" "$(tail -n 1 "build/cuda-$CARD-tests.log")"
    return "$status"
}

# Small rows and models that go through every kernel: the tools slow them down by a hundred times. Only the project's
# kernels are watched (their mangled names hold the name of their file); torch's own are not ours to judge. But initcheck
# has to see every kernel that writes what ours read.
sanitize() {
    local status=0
    sanitize_one coder coding_kernels tests/coding/test_cuda.py \
        "every_token or (streams_equal and ([2- or [257-)) or errors_name or one_stream or large_vocabularies or graph" || status=$?
    sanitize_one engine neox tests/models/test_cuda_engine.py \
        "logits_are_those or 16_bits or intervals_are or softmax_of or steps_are or split_into or start_stop or side_by_side or after_the_end" || status=$?
    return "$status"
}

sanitize_one() {
    local status=0 tool log filter help
    # Into a variable: a pipe that grep -q closes early would count as failed.
    help=$(compute-sanitizer --help 2>&1) || { note "compute-sanitizer, $1" "cannot be run: $help"; return 1; }
    for tool in memcheck racecheck initcheck synccheck; do
        log=build/cuda-$CARD-$1-$tool.log
        filter=(--kernel-regex "kns=$2") # its name until 2023
        if [[ $help == *--kernel-name* ]]; then filter=(--kernel-name "kns=$2"); fi
        if [ "$tool" = initcheck ]; then filter=(); fi
        compute-sanitizer --tool "$tool" ${filter[@]+"${filter[@]}"} --target-processes all \
            --error-exitcode 9 "$PYTHON" -m pytest "$3" -m "not slow" -x -q -k "$4" >"$log" 2>&1 || status=$?
        tail -n 3 "$log"
        note "compute-sanitizer $tool, $1" "$(
            grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1 | sed 's/=*//'
        ), $(grep -E '[0-9]+ (passed|failed)' "$log" | tail -n 1)"
    done
    return "$status"
}

bench() {
    local status=0
    rm -f "build/cuda-$CARD-bench.md" "build/cuda-$CARD-engine.md"
    "$PYTHON" benchmarks/bench_cuda.py --out "build/cuda-$CARD-bench.md" || status=$?
    "$PYTHON" benchmarks/bench_cuda_engine.py --out "build/cuda-$CARD-engine.md" || status=$?
    return "$status"
}

FAILED=0
for step in $STEPS; do
    if [ "$step" = build ]; then rm -f build/cuda-"$CARD"-*.md; fi
    "$step" && continue
    FAILED=1
    note "$step" "failed"
    if [ "$step" = build ]; then break; fi
done
{
    echo "# CUDA on $CARD"
    echo
    echo "Written by benchmarks/cuda_check.sh on $(date -u +%F)."
    echo
    cat "build/cuda-$CARD-checks.md" 2>/dev/null || true
    echo
    cat "build/cuda-$CARD-bench.md" 2>/dev/null || true
    echo
    cat "build/cuda-$CARD-engine.md" 2>/dev/null || true
} >"$REPORT"
echo "wrote $REPORT"
exit "$FAILED"

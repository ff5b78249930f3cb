#!/usr/bin/env bash
# Everything that needs a CUDA device, in steps, the important ones first, on a machine that has one:
#     benchmarks/cuda_check.sh [STEP ...]     all of them where none is named; `list` names them with their limits
# Every step has a limit, writes what it found to OUT as it ends, and keeps no other from running, but for the build. A step
# that is done is not done again: a machine that is lent for minutes at a time gets OUT of the call before as BEFORE.
#     OUT      where everything goes (default build/cuda-check), eight files: report.md, log.txt, done.txt, bench_cuda.md,
#              bench_cuda_engine.md, sweep.txt, ncu.txt, modules.tar (what was built)
#     BEFORE   the OUT of an earlier call, whose steps are done and whose modules are used
#     SECONDS_MAX   after so many no step begins, and one that runs is ended (default 540)
#     WHEELS   a folder with the wheels of benchmarks/cuda_wheels.txt, for a machine without a network
#     PYTHON   the interpreter (default python3); it needs what cuda_wheels.txt says
# The exit status is 1 where a step failed or was not begun. report.md belongs in benchmarks/results, under the device's name.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/cuda-check}
SECONDS_MAX=${SECONDS_MAX:-540}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # of the toolkit: compute-sanitizer, ncu

# Step and its limit in seconds, the important first. Slow tests are the emulated device's and the processor's, not these.
STEPS=(
    build:420 coder:240 bench_cuda:240 engine:300 bench_cuda_engine:420 sweep:480
    memcheck_coder:180 memcheck_engine:300 racecheck_coder:180 racecheck_engine:300 profile:180
    synccheck_coder:120 synccheck_engine:180 initcheck_coder:180 initcheck_engine:300 slow:480
)
if [ "${1:-}" = list ]; then
    printf '%s\n' "${STEPS[@]}"
    exit
fi
command -v nvidia-smi >/dev/null || { echo "cuda_check: nvidia-smi is not here: no NVIDIA driver, no device to check" >&2; exit 1; }
for step in "$@"; do
    [[ " ${STEPS[*]%%:*} " == *" $step "* ]] || { echo "cuda_check: no step is called $step; \`list\` names them" >&2; exit 2; }
done

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
if [ -n "${BEFORE:-}" ]; then cp "$BEFORE"/* "$OUT"/; fi
chmod u+w "$OUT"/* 2>/dev/null || true
touch "$OUT/done.txt"
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target build/wheels "$WHEELS"/*.whl
    export PYTHONPATH=$PYTHONPATH:$PWD/build/wheels
fi
if [ ! -s "$OUT/report.md" ]; then
    DEVICE=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)
    printf '# CUDA on %s\n\nWritten by benchmarks/cuda_check.sh on %s.\n\n' "$DEVICE" "$(date -u +%F)" >"$OUT/report.md"
fi

note() { printf -- '- %s: %s\n' "$1" "$2" | tee -a "$OUT/report.md"; }

# The last line of this step's output that says how it ended.
ending() { grep -E "$1" "$STEP_LOG" | tail -n 1 | sed -E 's/^[= ]+|[= ]+$//g' || true; }

tests() { "$PYTHON" -m pytest -p no:cacheprovider -rfEs "$@"; }

run_build() {
    if [ -s "$OUT/modules.tar" ]; then
        tar xf "$OUT/modules.tar" && echo "modules of an earlier call"
    else
        LLMCOMP_CUDA=1 "$PYTHON" setup.py -q egg_info build_ext --inplace && tar cf "$OUT/modules.tar" llmcomp/*.so
    fi
    "$PYTHON" -c 'from llmcomp.coding.cuda import cuda_info; info = cuda_info(); print(info); assert info["devices"]'
}
run_coder() { tests tests/coding/test_cuda.py -m "not slow"; }
ENGINE_TESTS=(tests/models/test_cuda_{engine,errors,families}.py)
run_engine() { tests "${ENGINE_TESTS[@]}" -m "not slow"; }
run_slow() { tests tests/coding/test_cuda.py "${ENGINE_TESTS[@]}" -m slow; }
run_bench_cuda() { "$PYTHON" benchmarks/bench_cuda.py --out "$OUT/bench_cuda.md"; }
run_bench_cuda_engine() {
    "$PYTHON" benchmarks/bench_cuda_engine.py --streams 512,2048 --out "$OUT/bench_cuda_engine.md"
}
# One of five checkpoints of every size: times five for the 75 cells of each protocol.
run_sweep() {
    "$PYTHON" -m llmcomp bench sweep --engine torch --device cuda --dtype bfloat16 --checkpoints 1 2>&1 |
        tee "$OUT/sweep.txt"
}

# Small rows and models that go through every kernel: the tools slow them down by a hundred times. Only this project's kernels
# are watched, which are all called lmc_...; torch's own are not ours to judge. But initcheck has to see every kernel that
# writes what ours read.
CODER_CASES="every_token or (streams_equal and ([2- or [257-)) or errors_name or one_stream or large_vocabularies or graph"
ENGINE_CASES="logits_are_those or 16_bits or intervals_are or softmax_of or steps_are or split_into or start_stop \
or side_by_side or after_the_end or windows_keep or contexts_of or gpt2-plain or olmo-clipped or gemma2-small or phi-norms"
sanitize() {
    local tool=$1 files=(tests/coding/test_cuda.py) cases=$CODER_CASES filter=() help
    if [ "$2" = engine ]; then files=("${ENGINE_TESTS[@]}") cases=$ENGINE_CASES; fi
    # Into a variable: a pipe that grep -q closes early would count as failed.
    help=$(compute-sanitizer --help 2>&1) || { echo "compute-sanitizer cannot be run: $help"; return 1; }
    if [ "$tool" != initcheck ]; then
        filter=(--kernel-regex kns=lmc_) # its name until 2023
        if [[ $help == *--kernel-name* ]]; then filter=(--kernel-name kns=lmc_); fi
    fi
    compute-sanitizer --tool "$tool" ${filter[@]+"${filter[@]}"} --target-processes all --error-exitcode 9 \
        "$PYTHON" -m pytest -p no:cacheprovider "${files[@]}" -m "not slow" -x -k "$cases"
}

# Three kernels: intervals, a product, a step's attention.
run_profile() {
    ncu --clock-control none --target-processes all --kernel-name 'regex:lmc_(intervals|product|attend_step)_kernel' \
        --launch-skip 20 --launch-count 12 --section SpeedOfLight --section Occupancy --section WarpStateStats \
        "$PYTHON" benchmarks/bench_cuda_engine.py --streams 512 --steps 70 --rows 2048 2>&1 | tee "$OUT/ncu.txt"
}

run_step() {
    case $1 in
    *check_*) sanitize "${1%_*}" "${1#*_}" ;;
    *) "run_$1" ;;
    esac
}

# A step by itself, for the limit around it.
if [ -n "${CUDA_CHECK_STEP:-}" ]; then
    run_step "$CUDA_CHECK_STEP"
    exit
fi

STEP_LOG=$(mktemp)
trap 'rm -f "$STEP_LOG"' EXIT
FAILED=0
for entry in "${STEPS[@]}"; do
    step=${entry%%:*} limit=${entry##*:}
    if [ $# -gt 0 ] && [[ " $* " != *" $step "* ]]; then continue; fi
    if grep -qx "$step" "$OUT/done.txt" && [ "$step" != build ]; then continue; fi
    left=$((SECONDS_MAX - SECONDS))
    if [ "$left" -lt 20 ]; then
        note "$step" "not begun: $SECONDS_MAX seconds are over"
        FAILED=1
        continue
    fi
    began=$SECONDS status=0
    CUDA_CHECK_STEP=$step BEFORE='' WHEELS='' timeout -k 10 $((limit < left ? limit : left)) "$0" >"$STEP_LOG" 2>&1 || status=$?
    { printf '\n==== %s, exit status %d\n' "$step" "$status"; cat "$STEP_LOG"; } >>"$OUT/log.txt"
    tail -n 20 "$STEP_LOG"
    took=$((SECONDS - began))
    summary=$(ending '[0-9]+ (passed|failed)|ERROR SUMMARY|RACECHECK SUMMARY|cells in')
    case $status in
    0) note "$step" "done in $took s${summary:+: $summary}" && echo "$step" >>"$OUT/done.txt" ;;
    124 | 137) note "$step" "ended after $took s, its limit${summary:+: $summary}" && FAILED=1 ;;
    *) note "$step" "failed after $took s${summary:+: $summary}" && FAILED=1 ;;
    esac
    if [ "$status" = 0 ] && [ -s "$OUT/$step.md" ]; then { echo; cat "$OUT/$step.md"; echo; } >>"$OUT/report.md"; fi
    if [ "$status" != 0 ] && [ "$step" = build ]; then break; fi
done
echo "wrote $OUT/report.md"
exit "$FAILED"

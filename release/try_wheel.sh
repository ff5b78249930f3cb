#!/bin/bash
# try_wheel.sh WHEEL: installs it as on a machine with nothing but Python, and runs what a newcomer runs.
# A new environment, a PATH without compiler and nvcc, CC=false; demo and selftest together have 90 seconds.
set -euo pipefail
wheel=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
cd "$folder"
bare() { env -i HOME="$folder" PATH="$folder/venv/bin" CC=false CUDA_HOME=/nonexistent "$@"; }
bare pip install --quiet --only-binary :all: "$wheel"
TIMEFORMAT="demo and selftest: %R s, %U s of processor time"
begun=$(date +%s)
time { bare llmcomp demo -q; bare llmcomp selftest -q | tee rows.txt; }
seconds=$(($(date +%s) - begun))
[ "$seconds" -lt 90 ] || { echo "FAULT demo and selftest took $seconds s, expected less than 90 (is the machine busy?)" >&2; exit 1; }
if grep -qw avx2 /proc/cpuinfo && ! grep -q '| avx2 |' rows.txt; then
    echo "FAULT the processor has AVX2, and the wheel does not see it" >&2
    exit 1
fi

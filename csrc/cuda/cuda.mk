# CUDA targets. The Makefile includes this file; it works alone too (make -f csrc/cuda/cuda.mk X).
# check-cuda-host needs no card: the kernels' arithmetic in loops on the CPU. The others want a card and nvcc.
.PHONY: check-cuda-host check-cuda bench-cuda
build/check/cuda_on_host: csrc/check/cuda_on_host.c csrc/cuda/row_tiles.h $(wildcard csrc/core/*.h csrc/include/llmcomp/*.h)
	@mkdir -p $(@D)
	$(CC) -std=c11 -D_GNU_SOURCE -O2 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all \
		-Wall -Wextra -Wno-missing-field-initializers -Icsrc/include $< \
		csrc/core/cdf.c csrc/core/cdf_serial.c csrc/core/coder.c csrc/core/status.c -lm -o $@

check-cuda-host: build/check/cuda_on_host
	$< rows 1 5000
	$< weights 101

check-cuda:
	benchmarks/cuda_check.sh build tests sanitize

bench-cuda:
	benchmarks/cuda_check.sh build bench

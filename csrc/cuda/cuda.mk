# CUDA targets. The Makefile includes this file; it works alone too (make -f csrc/cuda/cuda.mk X).
# check-cuda-host needs no device: the kernels' arithmetic in loops on the CPU, then the kernels on an emulated device. The
# others want a device and nvcc.
CUDA_CHECK_FLAGS := -O2 -g -ffp-contract=off -Wall -Wextra -Wno-missing-field-initializers -Icsrc/include -Icsrc
CUDA_CHECK_CORE := coding/intervals coding/rows_serial coding/streams base/status
.PHONY: check-cuda-host check-cuda bench-cuda
CUDA_CHECK_HEADERS := $(wildcard csrc/cuda/*/* csrc/core/*/*.h csrc/include/llmcomp/*.h csrc/check/emulated/*)
build/check/cuda_on_host: csrc/check/cuda_on_host.c $(CUDA_CHECK_HEADERS)
	@mkdir -p $(@D)
	$(CC) -std=c11 -D_GNU_SOURCE $(CUDA_CHECK_FLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all $< \
		$(CUDA_CHECK_CORE:%=csrc/core/%.c) -lm -o $@
build/check/cuda_emulated: csrc/check/cuda_emulated.cpp $(CUDA_CHECK_HEADERS)
	@mkdir -p $(@D)/cuda/base $(@D)/cuda/coding
	for name in $(CUDA_CHECK_CORE); do \
		$(CC) -std=c11 -D_GNU_SOURCE $(CUDA_CHECK_FLAGS) -c csrc/core/$$name.c -o $(@D)/cuda/$$name.o || exit 1; done
	$(CXX) -std=c++17 $(CUDA_CHECK_FLAGS) -Wno-unknown-pragmas -Icsrc/check/emulated $< csrc/check/emulated/runtime.cpp \
		$(CUDA_CHECK_CORE:%=$(@D)/cuda/%.o) -pthread -o $@

# llmcomp._cuda over the emulated device, for tests/models/test_cuda_*.py: the binding and the kernels as they are.
EMULATED ?= build/check/emulated
EMULATED_CORE := base/status coding/intervals coding/rows_serial transformer/config transformer/position_tables transformer/forward transformer/linear_map transformer/kernels_serial
EMULATED_OBJECTS := $(patsubst csrc/%,$(EMULATED)/%.o,$(wildcard csrc/python/cuda_*.c csrc/cuda/*/*.cu) \
	$(EMULATED_CORE:%=csrc/core/%.c) csrc/check/emulated/runtime.cpp)
EMULATED_HEADERS := $(CUDA_CHECK_HEADERS) $(wildcard csrc/python/*.h)
EMULATED_FLAGS = $(subst -O2 -g,-O1,$(CUDA_CHECK_FLAGS)) -fPIC -fvisibility=hidden -Icsrc/check/emulated -DLMC_CUDA_TARGETS='"emulated"' \
	-I$(shell $(or $(PYTHON),python3) -c 'import sysconfig; print(sysconfig.get_path("include"))')
$(EMULATED)/%.c.o: csrc/%.c $(EMULATED_HEADERS)
	@mkdir -p $(@D)
	$(CC) -std=c11 -D_GNU_SOURCE $(EMULATED_FLAGS) -c $< -o $@
$(EMULATED)/%.cu.o: csrc/%.cu $(EMULATED_HEADERS)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 $(EMULATED_FLAGS) -Wno-unknown-pragmas -x c++ -c $< -o $@
$(EMULATED)/%.cpp.o: csrc/%.cpp $(EMULATED_HEADERS)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 $(EMULATED_FLAGS) -c $< -o $@
$(EMULATED)/_cuda.so: $(EMULATED_OBJECTS)
	$(CXX) -shared $^ -pthread -lm -o $@

# The exact engine: all sources of csrc/cuda on the emulated device, once more with sanitizers.
CUDA_ENGINE_CORE := $(CUDA_CHECK_CORE) int8/product_serial \
	$(addprefix transformer/,kernels_serial transformer config forward linear_map int8_weights position_tables)
CUDA_SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
# 1 program, 2 flags
define cuda_engine_check
$(1): $(wildcard csrc/check/transformer_*) $(CUDA_CHECK_HEADERS) $(wildcard csrc/core/*/*.c)
	@mkdir -p $$@.parts/coding $$@.parts/transformer $$@.parts/int8 $$@.parts/base
	for name in $(CUDA_ENGINE_CORE); do \
		$(CC) -std=c11 -D_GNU_SOURCE $(CUDA_CHECK_FLAGS) $(2) -c csrc/core/$$$$name.c -o $$@.parts/$$$$name.o || exit 1; done
	for path in $(wildcard csrc/cuda/*/*.cu); do \
		$(CXX) -std=c++17 -x c++ $(CUDA_CHECK_FLAGS) $(2) -Wno-unknown-pragmas -Icsrc/check/emulated -c $$$$path \
			-o $$@.parts/$$$$(basename $$$$(dirname $$$$path))/$$$$(basename $$$$path).o || exit 1; done
	$(CC) -std=c11 -D_GNU_SOURCE $(CUDA_CHECK_FLAGS) $(2) -c csrc/check/transformer_cases.c -o $$@.parts/base/transformer_cases.o
	$(CXX) -std=c++17 $(CUDA_CHECK_FLAGS) $(2) -Wno-unknown-pragmas -Icsrc/check/emulated \
		$(wildcard csrc/check/transformer_emulated*.cpp) csrc/check/emulated/runtime.cpp $$@.parts/*/*.o -pthread -o $$@
endef
$(eval $(call cuda_engine_check,build/check/transformer_emulated,))
$(eval $(call cuda_engine_check,build/check/transformer_emulated_sanitized,$(CUDA_SANITIZE)))

check-cuda-host: build/check/cuda_on_host build/check/cuda_emulated build/check/transformer_emulated \
		build/check/transformer_emulated_sanitized
	build/check/cuda_on_host rows 1 5000
	build/check/cuda_on_host weights 101
	build/check/cuda_emulated 1 300
	build/check/transformer_emulated 1 100
	build/check/transformer_emulated_sanitized 2 4

check-cuda:
	benchmarks/cuda_check.sh build tests sanitize

bench-cuda:
	benchmarks/cuda_check.sh build bench

# Checks of the C core without Python. The Makefile includes this file; it works alone too (make -f csrc/check/check.mk X).
# Programs are built under build/check, one folder a variant. Those of the coder link CHECK_CODER, which leaves the engine out.
CHECK_DIR := build/check
CHECK_GOLDEN := tests/golden/coding.bin
CHECK_FLAGS := -std=c11 -D_GNU_SOURCE -O2 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -pthread -Icsrc/include -Icsrc \
	-Wall -Wextra -Wno-missing-field-initializers
CHECK_CODER := $(patsubst csrc/%.c,%,$(wildcard csrc/core/base/*.c csrc/core/coding/*.c csrc/core/mixing/*.c csrc/dispatch/*.c)) \
	check/no_engine
CHECK_HEADERS := $(wildcard csrc/core/*/*.h csrc/include/llmcomp/*.h csrc/check/*.h)
CHECK_CLANG ?= clang

CHECK_AVX2 := -mavx2 -mfma -mf16c
CHECK_AVX512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c
# The flags of a file's instruction set: 1 the name without .c, 2 "x86" or nothing, 3 the flags of rows_avx512.
check_isa = $(if $(2),$(if $(filter %_avx2,$(1)),$(CHECK_AVX2))$(if \
	$(filter %rows_avx512,$(1)),$(or $(3),$(CHECK_AVX512)),$(if $(filter %_avx512,$(1)),$(CHECK_AVX512)))$(if \
	$(filter %_avx512vnni,$(1)),$(CHECK_AVX512) -mavx512vnni))

# 1 variant, 2 compiler, 3 flags, 4 "x86" or nothing, 5 flags of rows_avx512 if not its own
define check_variant
$(CHECK_DIR)/$(1)/%.o: csrc/%.c $(CHECK_HEADERS)
	@mkdir -p $$(@D)
	$(2) $(CHECK_FLAGS) $(3) $$(call check_isa,$$*,$(4),$(5)) -c $$< -o $$@
$(CHECK_DIR)/$(1)/self_check: $(patsubst %,$(CHECK_DIR)/$(1)/%.o,$(CHECK_CODER) check/golden check/self_check)
	$(2) $(CHECK_FLAGS) $(3) $$^ -o $$@ -lm
$(CHECK_DIR)/$(1)/fuzz_%: $(patsubst %,$(CHECK_DIR)/$(1)/%.o,$(CHECK_CODER)) $(CHECK_DIR)/$(1)/check/fuzz_%.o
	$(2) $(CHECK_FLAGS) $(3) $$^ -o $$@ -lm
endef

CHECK_X86 := $(if $(filter x86_64 amd64,$(shell uname -m)),x86)
CHECK_UNDEFINED := -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all
# Comparisons are not traced: there are no magic numbers to be found, and it takes two thirds of the time.
CHECK_FUZZ := -fno-sanitize-coverage=trace-cmp
CHECK_FUZZ_ADDRESS := -fsanitize=fuzzer,address $(CHECK_UNDEFINED) $(CHECK_FUZZ)
CHECK_FUZZ_MEMORY := -fsanitize=fuzzer,memory $(CHECK_FUZZ)
# AVX-512 on any machine with AVX2, by SIMDe (libsimde-dev); the emulated kernels are one more backend of the self-check.
CHECK_EMULATED := -DLMC_EMULATE_AVX512
CHECK_EMULATED_ROWS := $(CHECK_AVX2) -include csrc/check/avx512_emulated.h -Wno-psabi
$(eval $(call check_variant,native,$(CC),,$(CHECK_X86)))
$(eval $(call check_variant,aarch64,aarch64-linux-gnu-gcc,-static,))
$(eval $(call check_variant,s390x,s390x-linux-gnu-gcc,-static,))
$(eval $(call check_variant,avx512,$(CC),$(CHECK_EMULATED),x86,$(CHECK_EMULATED_ROWS)))
$(eval $(call check_variant,address,$(CC),-fsanitize=address $(CHECK_UNDEFINED),$(CHECK_X86)))
$(eval $(call check_variant,thread,$(CC),-fsanitize=thread,$(CHECK_X86)))
$(eval $(call check_variant,memory,$(CHECK_CLANG),-fsanitize=memory -fsanitize-memory-track-origins,$(CHECK_X86)))
$(eval $(call check_variant,coverage,$(CC),-O0 --coverage $(CHECK_EMULATED),x86,$(CHECK_EMULATED_ROWS)))
$(eval $(call check_variant,fuzz_address,$(CHECK_CLANG),$(CHECK_FUZZ_ADDRESS),$(CHECK_X86)))
$(eval $(call check_variant,fuzz_memory,$(CHECK_CLANG),$(CHECK_FUZZ_MEMORY),$(CHECK_X86)))
.PRECIOUS: $(CHECK_DIR)/%.o
.PHONY: check-core check-cross check-avx512 check-sanitize check-valgrind check-binding coverage fuzz fuzz-short
check-core: $(CHECK_DIR)/native/self_check
	$(CHECK_DIR)/native/self_check $(CHECK_GOLDEN)

# no-fork: QEMU cannot start threads in the child of a process with threads.
check-cross: $(CHECK_DIR)/aarch64/self_check $(CHECK_DIR)/s390x/self_check
	qemu-aarch64 $(CHECK_DIR)/aarch64/self_check $(CHECK_GOLDEN) 30 no-fork
	qemu-s390x $(CHECK_DIR)/s390x/self_check $(CHECK_GOLDEN) 30 no-fork

check-avx512: $(CHECK_DIR)/avx512/self_check
	$(CHECK_DIR)/avx512/self_check $(CHECK_GOLDEN)

# check_fork forks while threads run, which ThreadSanitizer takes only when told so.
check-sanitize: $(CHECK_DIR)/address/self_check $(CHECK_DIR)/thread/self_check $(CHECK_DIR)/memory/self_check
	$(CHECK_DIR)/address/self_check $(CHECK_GOLDEN) 10
	TSAN_OPTIONS=die_after_fork=0 $(CHECK_DIR)/thread/self_check $(CHECK_GOLDEN) 50
	$(CHECK_DIR)/memory/self_check $(CHECK_GOLDEN) 20

check-valgrind: $(CHECK_DIR)/native/self_check
	valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite --show-leak-kinds=definite $(CHECK_DIR)/native/self_check $(CHECK_GOLDEN) 200

# The whole extension under the sanitizers, called by the tests of hostile callers and of many threads. What the
# interpreter itself keeps would be taken for leaks, which another test counts.
check-binding:
	rm -rf $(CHECK_DIR)/binding_*
	$(call binding_build,address,-fsanitize=address $(CHECK_UNDEFINED))
	$(call binding_build,thread,-fsanitize=thread)
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(call binding_test,address) \
		tests/coding/test_hostile.py tests/coding/test_concurrency.py tests/coding/test_intervals.py tests/coding/test_coding.py -k "not leaks"
	LD_PRELOAD="$$($(CC) -print-file-name=libtsan.so)" TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" \
		$(call binding_test,thread) tests/coding/test_concurrency.py -k thread
binding_build = CFLAGS="$(2) -O1 -g" LDFLAGS="$(2)" LLMCOMP_CUDA=0 $(BIN)/python setup.py -q build \
	--build-base $(CHECK_DIR)/binding_$(1) --build-lib $(CHECK_DIR)/binding_$(1)/lib
binding_test = PYTHONPATH=$(CHECK_DIR)/binding_$(1)/lib $(BIN)/pytest -q -p no:cacheprovider

# The coder's and the dispatcher's files; benchmarks/results/coverage.md explains the lines that are left.
CHECK_COVERED := csrc/core/(base/(status|parallel|vec_avx)|coding)|csrc/dispatch
coverage: $(CHECK_DIR)/coverage/self_check
	find $(CHECK_DIR)/coverage -name '*.gcda' -delete
	$(CHECK_DIR)/coverage/self_check $(CHECK_GOLDEN) 50
	$(or $(BIN),.venv/bin)/gcovr --root . --filter '$(CHECK_COVERED)' --object-directory $(CHECK_DIR)/coverage \
		--merge-mode-functions merge-use-line-min --txt --print-summary $(CHECK_DIR)/coverage

# FUZZ_RUNS executions of each target under each sanitizer, from the corpus; what is found lies in build/check.
FUZZ_RUNS ?= 10000000
FUZZ_TARGETS := fuzz_decode fuzz_roundtrip fuzz_mixing
FUZZ_PROGRAMS := $(foreach kind,fuzz_address fuzz_memory,$(FUZZ_TARGETS:%=$(CHECK_DIR)/$(kind)/%))
fuzz_one = mkdir -p $(CHECK_DIR)/corpus/$(notdir $(1)) && $(1) -runs=$(FUZZ_RUNS) -max_len=1024 -timeout=20 $(2) \
	-artifact_prefix=$(CHECK_DIR)/ -print_final_stats=1 -verbosity=0 $(CHECK_DIR)/corpus/$(notdir $(1)) \
	csrc/check/corpus/$(notdir $(1))
fuzz: $(FUZZ_PROGRAMS)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_address/fuzz_decode)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_address/fuzz_roundtrip)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_address/fuzz_mixing)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_memory/fuzz_decode)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_memory/fuzz_roundtrip)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_memory/fuzz_mixing)

# For CI: a few seconds a target.
fuzz-short: $(FUZZ_TARGETS:%=$(CHECK_DIR)/fuzz_address/%)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_address/fuzz_decode,-max_total_time=5)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_address/fuzz_roundtrip,-max_total_time=5)
	$(call fuzz_one,$(CHECK_DIR)/fuzz_address/fuzz_mixing,-max_total_time=5)

include csrc/check/engine.mk
include csrc/check/archive.mk
include csrc/check/pool.mk

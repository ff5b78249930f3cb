# The exact engine's check in the variants of check.mk, which includes this file; each runs with the coder's check.
CHECK_ENGINE := $(patsubst csrc/%.c,%,$(wildcard csrc/core/*/*.c csrc/dispatch/*.c)) \
	check/engine_check check/transformer_cases

# 1 variant, 2 compiler, 3 flags
define check_engine_variant
$(CHECK_DIR)/$(1)/engine_check: $(patsubst %,$(CHECK_DIR)/$(1)/%.o,$(CHECK_ENGINE))
	$(2) $(CHECK_FLAGS) $(3) $$^ -o $$@ -lm
endef
$(eval $(call check_engine_variant,native,$(CC),))
$(eval $(call check_engine_variant,aarch64,aarch64-linux-gnu-gcc,-static))
$(eval $(call check_engine_variant,s390x,s390x-linux-gnu-gcc,-static))
$(eval $(call check_engine_variant,avx512,$(CC),$(CHECK_EMULATED)))
$(eval $(call check_engine_variant,address,$(CC),-fsanitize=address $(CHECK_UNDEFINED)))
$(eval $(call check_engine_variant,thread,$(CC),-fsanitize=thread))

CHECK_EMULATED_PRODUCTS := transformer/kernels_avx512 int8/product_avx512 int8/product_avx512vnni
$(CHECK_EMULATED_PRODUCTS:%=$(CHECK_DIR)/avx512/core/%.o): $(CHECK_DIR)/avx512/core/%.o: csrc/core/%.c $(CHECK_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CHECK_FLAGS) $(CHECK_EMULATED) $(CHECK_EMULATED_ROWS) -c $< -o $@
$(CHECK_DIR)/aarch64/core/int8/product_neondot.o: csrc/core/int8/product_neondot.c $(CHECK_HEADERS)
	@mkdir -p $(@D)
	aarch64-linux-gnu-gcc $(CHECK_FLAGS) -static -march=armv8.2-a+dotprod -c $< -o $@

.PHONY: check-engine check-engine-cross check-engine-avx512 check-engine-sanitize
check-core: check-engine
check-engine: $(CHECK_DIR)/native/engine_check
	$<

check-cross: check-engine-cross
check-engine-cross: $(CHECK_DIR)/aarch64/engine_check $(CHECK_DIR)/s390x/engine_check
	qemu-aarch64 $(CHECK_DIR)/aarch64/engine_check
	qemu-s390x $(CHECK_DIR)/s390x/engine_check

check-avx512: check-engine-avx512
check-engine-avx512: $(CHECK_DIR)/avx512/engine_check
	$<

check-sanitize: check-engine-sanitize
check-engine-sanitize: $(CHECK_DIR)/address/engine_check $(CHECK_DIR)/thread/engine_check
	$(CHECK_DIR)/address/engine_check
	$(CHECK_DIR)/thread/engine_check

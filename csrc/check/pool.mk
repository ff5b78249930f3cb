# The pool of threads alone: a stress program in the variants of check.mk, which includes this file, and a model of it
# for the model checker Spin. benchmarks/results/thread_pool.md says what they have shown.
CHECK_POOL := dispatch/threads check/pool_check
# Jobs, callers, slots, forks: a few seconds. The long run is POOL_STRESS='100000000 5 9 2000'.
POOL_STRESS ?= 200000 5 9 20

# 1 variant, 2 compiler, 3 flags
define check_pool_variant
$(CHECK_DIR)/$(1)/pool_check: $(patsubst %,$(CHECK_DIR)/$(1)/%.o,$(CHECK_POOL))
	$(2) $(CHECK_FLAGS) $(3) $$^ -o $$@
endef
$(eval $(call check_pool_variant,native,$(CC),))
$(eval $(call check_pool_variant,address,$(CC),-fsanitize=address $(CHECK_UNDEFINED)))
$(eval $(call check_pool_variant,thread,$(CC),-fsanitize=thread))

.PHONY: check-pool check-pool-sanitize check-pool-model
check-core: check-pool
check-pool: $(CHECK_DIR)/native/pool_check
	$< $(POOL_STRESS)

check-sanitize: check-pool-sanitize
check-pool-sanitize: $(CHECK_DIR)/address/pool_check $(CHECK_DIR)/thread/pool_check
	$(CHECK_DIR)/address/pool_check 50000 5 9 5
	TSAN_OPTIONS=die_after_fork=0 $(CHECK_DIR)/thread/pool_check 50000 5 9 5

# 1 definitions, 2 options of the compiler, 3 of the search, 4 "errors: 0", or what must be found
check_pool_model = mkdir -p $(CHECK_DIR)/pool && cd $(CHECK_DIR)/pool && spin $(1) -a $(CURDIR)/csrc/check/pool.pml \
	> spin.txt && $(CC) -w -O2 -DCOLLAPSE -DVECTORSZ=2048 $(2) -o pan pan.c && ./pan -m1000000 $(3) > pan.txt && \
	grep -E "errors:|states, stored" pan.txt && ! grep -q "search depth too small" pan.txt && grep -q "$(4)" pan.txt
CHECK_POOL_SAFETY := -DSAFETY -DNOCLAIM
CHECK_POOL_ENDS := -DNFAIR=8
# All orders of: two callers with two jobs each; three workers; waits that end without a signal; then, with fair
# threads, that all callers return. The model with a mistake in it must fail.
check-pool-model:
	$(call check_pool_model,,$(CHECK_POOL_SAFETY),,errors: 0)
	$(call check_pool_model,-DJOBS=1 -DWORKERS=3 -DTASKS=4 -DWAKES=2,$(CHECK_POOL_SAFETY),,errors: 0)
	$(call check_pool_model,-DJOBS=1 -DSPURIOUS=1,$(CHECK_POOL_SAFETY),,errors: 0)
	$(call check_pool_model,-DJOBS=1,$(CHECK_POOL_ENDS),-a -f,errors: 0)
	$(call check_pool_model,-DFAULT=1,$(CHECK_POOL_SAFETY),,invalid end state)
	$(call check_pool_model,-DFAULT=2,$(CHECK_POOL_SAFETY),,assertion violated)
	$(call check_pool_model,-DFAULT=3,$(CHECK_POOL_SAFETY),,assertion violated)

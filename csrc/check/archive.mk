# Golden archives of bundled models decoded without Python, in the variants of check.mk, which includes this file.
# The models' weights and the contents come from Python: tests/support/dump_model.py.
CHECK_ARCHIVE := $(filter-out check/engine_check check/transformer_cases,$(CHECK_ENGINE)) check/archive_check
CHECK_MODELS := $(CHECK_DIR)/models
# pico-drawn has a segment of the model alone among mixed ones. The others take QEMU some minutes:
# CHECK_ARCHIVES_CROSS='pico-short pico-drawn pico-text pico-mixed' has them all.
CHECK_ARCHIVES_CROSS ?= pico-short pico-drawn
CHECK_ARCHIVES := $(sort $(basename $(notdir $(wildcard tests/golden/archives*/pico-*.llmc))))

# 1 variant, 2 compiler, 3 flags
define check_archive_variant
$(CHECK_DIR)/$(1)/archive_check: $(patsubst %,$(CHECK_DIR)/$(1)/%.o,$(CHECK_ARCHIVE))
	$(2) $(CHECK_FLAGS) $(3) $$^ -o $$@ -lm
endef
$(eval $(call check_archive_variant,native,$(CC),))
$(eval $(call check_archive_variant,aarch64,aarch64-linux-gnu-gcc,-static))
$(eval $(call check_archive_variant,s390x,s390x-linux-gnu-gcc,-static))
$(eval $(call check_archive_variant,address,$(CC),-fsanitize=address $(CHECK_UNDEFINED)))

$(CHECK_MODELS)/%.model $(CHECK_MODELS)/%.content: tests/support/dump_model.py tests/support/golden_archives.py
	@mkdir -p $(@D)
	$(or $(BIN),.venv/bin)/python tests/support/dump_model.py $* $(CHECK_MODELS)/$*.model $(CHECK_MODELS)/$*.content

# 1 what runs the program, 2 variant, 3 names; cmp is silent where the bytes are the same. Of archives-2-stock the model
# has coded nothing.
check_archives = for name in $(3); do for archive in $$(ls tests/golden/archives*/$$name.llmc | grep -v stock); do \
	$(1) $(CHECK_DIR)/$(2)/archive_check $(CHECK_MODELS)/$$name.model $$archive \
		| cmp - $(CHECK_MODELS)/$$name.content && echo "$(2): $$archive decodes" || exit 1; done; done
CHECK_DUMPS := $(foreach name,$(CHECK_ARCHIVES),$(CHECK_MODELS)/$(name).model)

.PHONY: check-archive check-archive-cross check-archive-sanitize
check-core: check-archive
check-archive: $(CHECK_DIR)/native/archive_check $(CHECK_DUMPS)
	$(call check_archives,,native,$(CHECK_ARCHIVES))

check-cross: check-archive-cross
check-archive-cross: $(CHECK_DIR)/aarch64/archive_check $(CHECK_DIR)/s390x/archive_check $(CHECK_DUMPS)
	$(call check_archives,qemu-aarch64,aarch64,$(CHECK_ARCHIVES_CROSS))
	$(call check_archives,qemu-s390x,s390x,$(CHECK_ARCHIVES_CROSS))

check-sanitize: check-archive-sanitize
check-archive-sanitize: $(CHECK_DIR)/address/archive_check $(CHECK_DUMPS)
	$(call check_archives,,address,$(CHECK_ARCHIVES))

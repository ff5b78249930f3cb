/* What makes a backend: one table of kernels for each room of the core. The tables' types are the rooms' own
 * (coding/row_kernels.h, transformer/kernels.h, int8/kernels.h); csrc/dispatch puts them together. */
#ifndef LLMCOMP_CORE_BASE_BACKEND_TABLE_H
#define LLMCOMP_CORE_BASE_BACKEND_TABLE_H

#include "llmcomp/backend.h"

struct lmc_backend {
    const char *name;
    const struct lmc_row_kernels *rows; /* [LMC_DTYPE_COUNT], by lmc_dtype_t */
    const struct lmc_transformer_kernels *transformer;
    const struct lmc_int8_kernels *int8;
};

#endif

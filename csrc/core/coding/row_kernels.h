/* The kernels over a row of logits that a backend brings. They get raw pointers and sizes and run in the
 * float state of ieee.h; the loops around them (intervals.c, streams.c) are the same for all backends. */
#ifndef LLMCOMP_CORE_CODING_ROW_KERNELS_H
#define LLMCOMP_CORE_CODING_ROW_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/backend_table.h"
#include "core/base/ieee.h"
#include "llmcomp/intervals.h"

typedef struct lmc_row_kernels {
    /* Maximum of n >= 1 elements, NaN ignored; *has_nan says whether there was one. */
    float (*maximum)(const void *row, size_t n, int *has_nan);
    /* Sum of lmc_weight(row[i], origin) over n elements, in uint64. Meanwhile asks for the n elements at
     * `ahead` (which need not be valid memory) to be brought into the cache. */
    uint64_t (*weight_sum)(const void *row, size_t n, lmc_origin_t origin, const void *ahead);
    /* lmc_softmax_sum of n elements, none of them NaN. */
    double (*softmax_sum)(const void *row, size_t n, float maximum);
} lmc_row_kernels_t;

/* Each in rows_<backend>.c. */
extern const lmc_row_kernels_t lmc_row_kernels_serial[LMC_DTYPE_COUNT];
#if defined(__x86_64__)
extern const lmc_row_kernels_t lmc_row_kernels_avx2[LMC_DTYPE_COUNT];
extern const lmc_row_kernels_t lmc_row_kernels_avx512[LMC_DTYPE_COUNT];
#elif defined(__aarch64__)
extern const lmc_row_kernels_t lmc_row_kernels_neon[LMC_DTYPE_COUNT];
#endif

#endif

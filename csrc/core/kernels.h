/* The table of kernels that makes a backend. Kernels get raw pointers and sizes and run in the float state of
 * ieee.h; the loops around them are the same for all backends. */
#ifndef LLMCOMP_CORE_KERNELS_H
#define LLMCOMP_CORE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "llmcomp/backend.h"
#include "llmcomp/cdf.h"
#include "ieee.h"
#include "int8_kernels.h"
#include "neox_kernels.h"

typedef struct lmc_row_kernels {
    /* Maximum of n >= 1 elements, NaN ignored; *has_nan says whether there was one. */
    float (*maximum)(const void *row, size_t n, int *has_nan);
    /* Sum of lmc_weight(row[i], origin) over n elements, in uint64. Meanwhile asks for the n elements at
     * `ahead` (which need not be valid memory) to be brought into the cache. */
    uint64_t (*weight_sum)(const void *row, size_t n, lmc_origin_t origin, const void *ahead);
    /* lmc_softmax_sum of n elements, none of them NaN. */
    double (*softmax_sum)(const void *row, size_t n, float maximum);
} lmc_row_kernels_t;

struct lmc_backend {
    const char *name;
    const lmc_row_kernels_t *rows; /* [LMC_DTYPE_COUNT], by lmc_dtype */
    const lmc_neox_kernels_t *neox;
    const lmc_int8_kernels_t *int8;
};

/* Each in cdf_<backend>.c, gemm_<backend>.c and gemm_int8_<backend>.c; csrc/dispatch puts them together. Two
 * backends have a second set of the last for processors that multiply 8-bit integers. */
extern const lmc_row_kernels_t lmc_row_kernels_serial[LMC_DTYPE_COUNT];
extern const lmc_neox_kernels_t lmc_neox_kernels_serial;
extern const lmc_int8_kernels_t lmc_int8_kernels_serial;
#if defined(__x86_64__)
extern const lmc_row_kernels_t lmc_row_kernels_avx2[LMC_DTYPE_COUNT];
extern const lmc_row_kernels_t lmc_row_kernels_avx512[LMC_DTYPE_COUNT];
extern const lmc_neox_kernels_t lmc_neox_kernels_avx2;
extern const lmc_neox_kernels_t lmc_neox_kernels_avx512;
extern const lmc_int8_kernels_t lmc_int8_kernels_avx2;
extern const lmc_int8_kernels_t lmc_int8_kernels_avx512;
extern const lmc_int8_kernels_t lmc_int8_kernels_avx512vnni;
#elif defined(__aarch64__)
extern const lmc_row_kernels_t lmc_row_kernels_neon[LMC_DTYPE_COUNT];
extern const lmc_neox_kernels_t lmc_neox_kernels_neon;
extern const lmc_int8_kernels_t lmc_int8_kernels_neon;
extern const lmc_int8_kernels_t lmc_int8_kernels_neondot;
#endif

#endif

/* The specification of the row kernels: one element after the other. Only row kernels live here; the loops
 * around them, the same for every backend, are in intervals.c. */
#include "core/coding/row_kernels.h"
#include "core/coding/row_element.h"
#include "core/coding/row_softmax.h"

static inline float serial_maximum(const void *row, size_t n, lmc_dtype_t dtype, int *has_nan) {
    float maximum = -INFINITY;
    int nan_seen = 0;
    for (size_t i = 0; i < n; i++) {
        float logit = lmc_row_element(row, i, dtype);
        nan_seen |= logit != logit;
        maximum = lmc_max(logit, maximum);
    }
    *has_nan = nan_seen;
    return maximum;
}

static inline uint64_t serial_weight_sum(const void *row, size_t n, lmc_dtype_t dtype, lmc_origin_t origin) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += lmc_weight(lmc_row_element(row, i, dtype), origin);
    return sum;
}

static float maximum_float32(const void *row, size_t n, int *has_nan) {
    return serial_maximum(row, n, LMC_FLOAT32, has_nan);
}
static float maximum_float16(const void *row, size_t n, int *has_nan) {
    return serial_maximum(row, n, LMC_FLOAT16, has_nan);
}
static float maximum_bfloat16(const void *row, size_t n, int *has_nan) {
    return serial_maximum(row, n, LMC_BFLOAT16, has_nan);
}
static uint64_t weight_sum_float32(const void *row, size_t n, lmc_origin_t origin, const void *ahead) {
    (void)ahead;
    return serial_weight_sum(row, n, LMC_FLOAT32, origin);
}
static uint64_t weight_sum_float16(const void *row, size_t n, lmc_origin_t origin, const void *ahead) {
    (void)ahead;
    return serial_weight_sum(row, n, LMC_FLOAT16, origin);
}
static uint64_t weight_sum_bfloat16(const void *row, size_t n, lmc_origin_t origin, const void *ahead) {
    (void)ahead;
    return serial_weight_sum(row, n, LMC_BFLOAT16, origin);
}
LMC_DEFINE_SOFTMAX_SUM(LMC_FLOAT32, float32)
LMC_DEFINE_SOFTMAX_SUM(LMC_FLOAT16, float16)
LMC_DEFINE_SOFTMAX_SUM(LMC_BFLOAT16, bfloat16)

const lmc_row_kernels_t lmc_row_kernels_serial[LMC_DTYPE_COUNT] = {
    [LMC_FLOAT32] = {maximum_float32, weight_sum_float32, softmax_sum_float32},
    [LMC_FLOAT16] = {maximum_float16, weight_sum_float16, softmax_sum_float16},
    [LMC_BFLOAT16] = {maximum_bfloat16, weight_sum_bfloat16, softmax_sum_bfloat16},
};

/* The row kernels in vector form, written once. A cdf_<isa>.c includes its vec_<isa>.h and then this file;
 * the results equal cdf_serial.c's bit for bit, since every lane does what lmc_weight does and integer sums
 * have no order. A function with `dtype` is inlined with a constant, so that no test of it stays in a loop.
 */
#ifndef LLMCOMP_CORE_ROW_KERNELS_H
#define LLMCOMP_CORE_ROW_KERNELS_H

#include "kernels.h"
#include "row_element.h"

#define LMC_INLINE static inline __attribute__((always_inline))

LMC_INLINE lmc_vf lmc_v_load(const void *row, size_t i, lmc_dtype dtype) {
    const unsigned char *bytes = (const unsigned char *)row;
    if (dtype == LMC_FLOAT32) return lmc_v_load_f32(bytes + 4 * i);
    if (dtype == LMC_FLOAT16) return lmc_v_load_f16(bytes + 2 * i);
    return lmc_v_load_bf16(bytes + 2 * i);
}

/* lmc_weight of ieee.h in every lane. */
LMC_INLINE lmc_vu lmc_v_weight(lmc_vf logit, lmc_vf maximum) {
    const lmc_vf magic = lmc_v_set1(LMC_ROUND_MAGIC), log2_e = lmc_v_set1(LMC_LOG2_E);
    lmc_vf difference = lmc_v_max(lmc_v_sub(logit, maximum), lmc_v_set1(LMC_DIFFERENCE_FLOOR));
    lmc_vf shifted = lmc_v_fma(difference, log2_e, magic);
    lmc_vf n = lmc_v_sub(shifted, magic);
    lmc_vf f = lmc_v_fms(difference, log2_e, n);
    lmc_vf p =
        lmc_v_fma(lmc_v_set1(LMC_EXP2_C5 * LMC_WEIGHT_SCALE), f, lmc_v_set1(LMC_EXP2_C4 * LMC_WEIGHT_SCALE));
    p = lmc_v_fma(p, f, lmc_v_set1(LMC_EXP2_C3 * LMC_WEIGHT_SCALE));
    p = lmc_v_fma(p, f, lmc_v_set1(LMC_EXP2_C2 * LMC_WEIGHT_SCALE));
    p = lmc_v_fma(p, f, lmc_v_set1(LMC_EXP2_C1 * LMC_WEIGHT_SCALE));
    p = lmc_v_fma(p, f, lmc_v_set1(LMC_WEIGHT_SCALE));
    return lmc_v_shift_right(lmc_v_truncate(p),
                             lmc_v_sub_u32(lmc_v_set1_u32(LMC_ROUND_MAGIC_BITS), lmc_v_bits(shifted)));
}

/* Four vectors a round: four weights of at most 2^29 fit a 32-bit lane, which is widened once. */
LMC_INLINE uint64_t lmc_v_weight_sum(const void *row, size_t n, lmc_dtype dtype, float maximum) {
    const lmc_vf top = lmc_v_set1(maximum);
    lmc_vsum sum = lmc_v_sum_zero();
    size_t i = 0;
    for (; i + 4 * LMC_VLEN <= n; i += 4 * LMC_VLEN) {
        lmc_vu a = lmc_v_weight(lmc_v_load(row, i, dtype), top);
        lmc_vu b = lmc_v_weight(lmc_v_load(row, i + LMC_VLEN, dtype), top);
        lmc_vu c = lmc_v_weight(lmc_v_load(row, i + 2 * LMC_VLEN, dtype), top);
        lmc_vu d = lmc_v_weight(lmc_v_load(row, i + 3 * LMC_VLEN, dtype), top);
        sum = lmc_v_sum_add(sum, lmc_v_add_u32(lmc_v_add_u32(a, b), lmc_v_add_u32(c, d)));
    }
    for (; i + LMC_VLEN <= n; i += LMC_VLEN)
        sum = lmc_v_sum_add(sum, lmc_v_weight(lmc_v_load(row, i, dtype), top));
    uint64_t total = lmc_v_sum_total(sum);
    for (; i < n; i++)
        total += lmc_weight(lmc_row_element(row, i, dtype), maximum);
    return total;
}

LMC_INLINE int lmc_row_has_nan(const void *row, size_t n, lmc_dtype dtype) {
    int nan_seen = 0;
    for (size_t i = 0; i < n; i++) {
        float logit = lmc_row_element(row, i, dtype);
        nan_seen |= logit != logit;
    }
    return nan_seen;
}

/* The sum of logit * 0 is NaN where a logit is NaN or infinite: one instruction a vector that finds the rows
 * which need a closer look. */
LMC_INLINE float lmc_v_maximum(const void *row, size_t n, lmc_dtype dtype, int *has_nan) {
    const lmc_vf zero = lmc_v_set1(0.0f);
    lmc_vf top[4], suspect[4];
    for (int j = 0; j < 4; j++)
        top[j] = lmc_v_set1(-INFINITY), suspect[j] = zero;
    size_t i = 0;
    for (; i + 4 * LMC_VLEN <= n; i += 4 * LMC_VLEN) {
        for (int j = 0; j < 4; j++) {
            lmc_vf logit = lmc_v_load(row, i + (size_t)j * LMC_VLEN, dtype);
            top[j] = lmc_v_max(logit, top[j]);
            suspect[j] = lmc_v_fma(logit, zero, suspect[j]);
        }
    }
    float maximum = lmc_v_maximum_of_lanes(lmc_v_max(lmc_v_max(top[0], top[1]), lmc_v_max(top[2], top[3])));
    float doubt =
        lmc_v_sum_of_lanes(lmc_v_add(lmc_v_add(suspect[0], suspect[1]), lmc_v_add(suspect[2], suspect[3])));
    for (; i < n; i++) {
        float logit = lmc_row_element(row, i, dtype);
        maximum = lmc_max(logit, maximum);
        doubt = lmc_fma(logit, 0.0f, doubt);
    }
    *has_nan = doubt != doubt && lmc_row_has_nan(row, n, dtype);
    return maximum;
}

#define LMC_DEFINE_ROW_KERNELS(DTYPE, NAME)                                                                  \
    static float maximum_##NAME(const void *row, size_t n, int *has_nan) {                                   \
        return lmc_v_maximum(row, n, DTYPE, has_nan);                                                        \
    }                                                                                                        \
    static uint64_t weight_sum_##NAME(const void *row, size_t n, float maximum) {                            \
        return lmc_v_weight_sum(row, n, DTYPE, maximum);                                                     \
    }

LMC_DEFINE_ROW_KERNELS(LMC_FLOAT32, float32)
LMC_DEFINE_ROW_KERNELS(LMC_FLOAT16, float16)
LMC_DEFINE_ROW_KERNELS(LMC_BFLOAT16, bfloat16)

#define LMC_ROW_KERNEL_TABLE                                                                                 \
    {                                                                                                        \
        [LMC_FLOAT32] = {maximum_float32, weight_sum_float32},                                               \
        [LMC_FLOAT16] = {maximum_float16, weight_sum_float16},                                               \
        [LMC_BFLOAT16] = {maximum_bfloat16, weight_sum_bfloat16},                                            \
    }

#endif

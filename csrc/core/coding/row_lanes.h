/* The row kernels in vector form, written once. A rows_<isa>.c includes its vec_<isa>.h and then this file;
 * the results equal rows_serial.c's bit for bit, since every lane does what lmc_weight does and integer sums
 * have no order, or have the one order of row_softmax.h. A function with `dtype` is inlined with a constant,
 * so that no test of it stays in a loop.
 */
#ifndef LLMCOMP_CORE_CODING_ROW_LANES_H
#define LLMCOMP_CORE_CODING_ROW_LANES_H

#include "core/coding/row_kernels.h"
#include "core/coding/row_element.h"
#include "core/coding/row_softmax.h"

#define LMC_INLINE static inline __attribute__((always_inline))

LMC_INLINE lmc_vf lmc_v_load(const void *row, size_t i, lmc_dtype_t dtype) {
    const unsigned char *bytes = (const unsigned char *)row;
    if (dtype == LMC_FLOAT32) return lmc_v_load_f32(bytes + 4 * i);
    if (dtype == LMC_FLOAT16) return lmc_v_load_f16(bytes + 2 * i);
    return lmc_v_load_bf16(bytes + 2 * i);
}

/* 2 * LMC_VLEN elements, in no stated order. */
LMC_INLINE void lmc_v_load_pair(const void *row, size_t i, lmc_dtype_t dtype, lmc_vf *a, lmc_vf *b) {
    if (dtype == LMC_BFLOAT16) {
        lmc_v_load_bf16_pair((const unsigned char *)row + 2 * i, a, b);
    } else {
        *a = lmc_v_load(row, i, dtype);
        *b = lmc_v_load(row, i + LMC_VLEN, dtype);
    }
}

/* lmc_weight of ieee.h in every lane. n comes from the conversion to an integer, which rounds as the scalar
 * code does. Where t >= 31.5 it is 32 or more, or what the conversion gives for numbers out of its range, and
 * the shift leaves 0, whatever the polynomial made of it. */
LMC_INLINE lmc_vu lmc_v_weight(lmc_vf logit, lmc_origin_t origin) {
    if (origin.shift != 0.0f) logit = lmc_v_sub(logit, lmc_v_set1(origin.shift));
    lmc_vf t = lmc_v_fnma(logit, lmc_v_set1(LMC_LOG2_E), lmc_v_set1(origin.offset));
    lmc_vu n = lmc_v_round(t);
    lmc_vf g = lmc_v_sub(t, lmc_v_from_int(n));
    lmc_vf p = lmc_v_fma(lmc_v_set1(LMC_WEIGHT_C4), g, lmc_v_set1(LMC_WEIGHT_C3));
    p = lmc_v_fma(p, g, lmc_v_set1(LMC_WEIGHT_C2));
    p = lmc_v_fma(p, g, lmc_v_set1(LMC_WEIGHT_C1));
    p = lmc_v_fma(p, g, lmc_v_set1(LMC_WEIGHT_C0));
    return lmc_v_shift_right(lmc_v_truncate(p), n);
}

/* Four vectors a round: four weights of at most 2^29 * 1.0004 fit a 32-bit lane, which is widened once. */
LMC_INLINE uint64_t lmc_v_sum_from(const void *row, size_t n, lmc_dtype_t dtype, lmc_origin_t origin,
                                   const void *ahead) {
    lmc_vsum_t sum = lmc_v_sum_zero();
    size_t i = 0;
    for (; i + 4 * LMC_VLEN <= n; i += 4 * LMC_VLEN) {
        for (size_t byte = 0; byte < 4 * LMC_VLEN * lmc_dtype_bytes(dtype); byte += 64) {
            __builtin_prefetch((const unsigned char *)ahead + i * lmc_dtype_bytes(dtype) + byte, 0, 2);
        }
        lmc_vf logit[4];
        lmc_v_load_pair(row, i, dtype, &logit[0], &logit[1]);
        lmc_v_load_pair(row, i + 2 * LMC_VLEN, dtype, &logit[2], &logit[3]);
        lmc_vu a = lmc_v_add_u32(lmc_v_weight(logit[0], origin), lmc_v_weight(logit[1], origin));
        lmc_vu b = lmc_v_add_u32(lmc_v_weight(logit[2], origin), lmc_v_weight(logit[3], origin));
        sum = lmc_v_sum_add(sum, lmc_v_add_u32(a, b));
    }
    for (; i + LMC_VLEN <= n; i += LMC_VLEN) {
        sum = lmc_v_sum_add(sum, lmc_v_weight(lmc_v_load(row, i, dtype), origin));
    }
    uint64_t total = lmc_v_sum_total(sum);
    for (; i < n; i++)
        total += lmc_weight(lmc_row_element(row, i, dtype), origin);
    return total;
}

/* The subtraction of the shift is compiled away where there is none, which is nearly always. */
LMC_INLINE uint64_t lmc_v_weight_sum(const void *row, size_t n, lmc_dtype_t dtype, lmc_origin_t origin,
                                     const void *ahead) {
    if (origin.shift != 0.0f) return lmc_v_sum_from(row, n, dtype, origin, ahead);
    return lmc_v_sum_from(row, n, dtype, (lmc_origin_t){0.0f, origin.offset}, ahead);
}

LMC_INLINE int lmc_row_has_nan(const void *row, size_t n, lmc_dtype_t dtype) {
    int nan_seen = 0;
    for (size_t i = 0; i < n; i++) {
        float logit = lmc_row_element(row, i, dtype);
        nan_seen |= logit != logit;
    }
    return nan_seen;
}

/* The sum of logit * 0 is NaN where a logit is NaN or infinite: one instruction a vector that finds the rows
 * which need a closer look. */
LMC_INLINE float lmc_v_maximum(const void *row, size_t n, lmc_dtype_t dtype, int *has_nan) {
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

/* The bits of a float16 or bfloat16 as a number that orders as they do; its own inverse. */
static inline int16_t lmc_order_i16(int16_t bits) {
    return bits < 0 ? (int16_t)(bits ^ 0x7FFF) : bits;
}

/* 16-bit elements, compared as integers, twice as many a vector: NaNs lie beyond the infinities. +0 counts as
 * more than -0 here, which no weight depends on. */
LMC_INLINE float lmc_v_maximum_16(const void *row, size_t n, lmc_dtype_t dtype, int *has_nan) {
    const int16_t infinity = dtype == LMC_FLOAT16 ? 0x7C00 : 0x7F80, minus_infinity = (int16_t)~infinity;
    lmc_vs top[4], bottom[4];
    for (int j = 0; j < 4; j++)
        top[j] = lmc_v_set1_i16(minus_infinity), bottom[j] = lmc_v_set1_i16(infinity);
    size_t i = 0;
    for (; i + 8 * LMC_VLEN <= n; i += 8 * LMC_VLEN) {
        for (int j = 0; j < 4; j++) {
            const unsigned char *at = (const unsigned char *)row + 2 * (i + (size_t)j * 2 * LMC_VLEN);
            lmc_vs element = lmc_v_order_i16(lmc_v_load_i16(at));
            top[j] = lmc_v_max_i16(top[j], element);
            bottom[j] = lmc_v_min_i16(bottom[j], element);
        }
    }
    int16_t highest[2 * LMC_VLEN], lowest[2 * LMC_VLEN];
    lmc_v_store_i16(highest, lmc_v_max_i16(lmc_v_max_i16(top[0], top[1]), lmc_v_max_i16(top[2], top[3])));
    lmc_v_store_i16(lowest,
                    lmc_v_min_i16(lmc_v_min_i16(bottom[0], bottom[1]), lmc_v_min_i16(bottom[2], bottom[3])));
    int16_t maximum = highest[0], minimum = lowest[0];
    for (int j = 1; j < 2 * LMC_VLEN; j++) {
        maximum = highest[j] > maximum ? highest[j] : maximum;
        minimum = lowest[j] < minimum ? lowest[j] : minimum;
    }
    for (; i < n; i++) {
        int16_t bits;
        memcpy(&bits, (const unsigned char *)row + 2 * i, sizeof bits);
        bits = lmc_order_i16(bits);
        maximum = bits > maximum ? bits : maximum;
        minimum = bits < minimum ? bits : minimum;
    }
    if (maximum > infinity || minimum < minus_infinity) return lmc_v_maximum(row, n, dtype, has_nan);
    *has_nan = 0;
    maximum = lmc_order_i16(maximum);
    return lmc_row_element(&maximum, 0, dtype);
}

#define LMC_DEFINE_ROW_KERNELS(DTYPE, NAME)                                                                  \
    static float maximum_##NAME(const void *row, size_t n, int *has_nan) {                                   \
        return DTYPE == LMC_FLOAT32 ? lmc_v_maximum(row, n, DTYPE, has_nan)                                  \
                                    : lmc_v_maximum_16(row, n, DTYPE, has_nan);                              \
    }                                                                                                        \
    static uint64_t weight_sum_##NAME(const void *row, size_t n, lmc_origin_t origin, const void *ahead) {   \
        return lmc_v_weight_sum(row, n, DTYPE, origin, ahead);                                               \
    }                                                                                                        \
    LMC_DEFINE_SOFTMAX_SUM(DTYPE, NAME)

LMC_DEFINE_ROW_KERNELS(LMC_FLOAT32, float32)
LMC_DEFINE_ROW_KERNELS(LMC_FLOAT16, float16)
LMC_DEFINE_ROW_KERNELS(LMC_BFLOAT16, bfloat16)

#define LMC_ROW_KERNEL_TABLE                                                                                 \
    {                                                                                                        \
        [LMC_FLOAT32] = {maximum_float32, weight_sum_float32, softmax_sum_float32},                          \
        [LMC_FLOAT16] = {maximum_float16, weight_sum_float16, softmax_sum_float16},                          \
        [LMC_BFLOAT16] = {maximum_bfloat16, weight_sum_bfloat16, softmax_sum_bfloat16},                      \
    }

#endif

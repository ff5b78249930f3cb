/* The rule by which a row of numbers becomes 8-bit codes: FORMAT.md, section 4.7. Scalar code, shared by the
 * CPU, CUDA and the checks. */
#ifndef LLMCOMP_CORE_INT8_RULE_H
#define LLMCOMP_CORE_INT8_RULE_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/ieee.h"

/* Codes lie in [-LMC_INT8_MAX, LMC_INT8_MAX]. */
#define LMC_INT8_MAX 127
/* Rows of codes are filled with zeros to a multiple of so many. */
#define LMC_INT8_K 16
/* 2^17 * 127^2 < 2^31: no sum overflows. */
#define LMC_INT8_INPUTS_MAX ((size_t)1 << 17)
/* A row that is smaller than this everywhere counts as zeros, so that the reciprocal is finite. */
#define LMC_INT8_SMALLEST 0x1p-100f

LMC_FN size_t lmc_int8_padded(size_t n_k) {
    return (n_k + LMC_INT8_K - 1) / LMC_INT8_K * LMC_INT8_K;
}

/* How a row of numbers becomes codes: code = x * reciprocal, rounded to the nearest integer, ties to even, or
 * 0 where mask is 0. */
typedef struct lmc_int8_rule {
    float scale, reciprocal;
    int32_t mask;
} lmc_int8_rule_t;

/* magnitude: the largest of the bits of |x|, which is infinity's or more if any x is infinite or NaN. */
LMC_FN lmc_int8_rule_t lmc_int8_rule_of(uint32_t magnitude) {
    float largest = lmc_float_of(magnitude);
    lmc_int8_rule_t rule = {0.0f, 0.0f, 0};
    if (magnitude >= 0x7F800000u) {
        rule.scale = lmc_float_of(0x7FC00000u);
    } else if (largest >= LMC_INT8_SMALLEST) {
        rule.scale = lmc_div(largest, LMC_INT8_MAX);
        rule.reciprocal = lmc_div(LMC_INT8_MAX, largest);
        rule.mask = -1;
    }
    return rule;
}

LMC_FN uint32_t lmc_int8_magnitude(float x) {
    return lmc_bits_of(x) & 0x7FFFFFFFu;
}

LMC_FN int32_t lmc_int8_code(float x, lmc_int8_rule_t rule) {
    float shifted = lmc_add(lmc_mul(x, rule.reciprocal), LMC_ROUND_MAGIC);
    return (int32_t)(lmc_bits_of(shifted) - LMC_ROUND_MAGIC_BITS) & rule.mask;
}

#endif

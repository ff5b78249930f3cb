/* The sum behind a softmax, for the scores of FORMAT.md, section 6: one text for every instruction set, whose
 * lanes are left to the compiler. Its order is fixed, so that its bits are; nothing that is coded depends on
 * them. */
#ifndef LLMCOMP_CORE_CODING_ROW_SOFTMAX_H
#define LLMCOMP_CORE_CODING_ROW_SOFTMAX_H

#include "core/coding/row_element.h"

#define LMC_SUM_LANES 16
#define LMC_SUM_BLOCK (4 * LMC_SUM_LANES)

/* -64 ln 2: smaller differences count as this one, 2^-64 beside a sum of at least 1. */
#define LMC_DIFFERENCE_FLOOR (-0x1.62e43p+5f)

LMC_FN float lmc_sum_weight(float logit, float maximum) {
    return lmc_exp2_scaled(lmc_max(lmc_sub(logit, maximum), LMC_DIFFERENCE_FLOOR), LMC_LOG2_E);
}

/* Sum of 2^((row[i] - maximum) log2 e) over n elements, none of them NaN. */
static inline __attribute__((always_inline)) double lmc_softmax_sum(const void *row, size_t n,
                                                                    lmc_dtype_t dtype, float maximum) {
    double sums[LMC_SUM_LANES] = {0}, total = 0;
    for (size_t i = 0; i < n; i += LMC_SUM_BLOCK) {
        float x[LMC_SUM_BLOCK];
        if (n - i >= LMC_SUM_BLOCK) { /* in a loop of its own, which the compiler makes vectors of */
            for (size_t j = 0; j < LMC_SUM_BLOCK; j++)
                x[j] = lmc_row_element(row, i + j, dtype);
        } else {
            for (size_t j = 0; j < LMC_SUM_BLOCK; j++)
                x[j] = i + j < n ? lmc_row_element(row, i + j, dtype) : -INFINITY;
        }
        for (size_t lane = 0; lane < LMC_SUM_LANES; lane++) {
            const float *y = x + lane;
            float a = lmc_add(lmc_sum_weight(y[0], maximum), lmc_sum_weight(y[LMC_SUM_LANES], maximum));
            float b = lmc_add(lmc_sum_weight(y[2 * LMC_SUM_LANES], maximum),
                              lmc_sum_weight(y[3 * LMC_SUM_LANES], maximum));
            sums[lane] += (double)lmc_add(a, b);
        }
    }
    for (size_t lane = 0; lane < LMC_SUM_LANES; lane++)
        total += sums[lane];
    return total;
}

#define LMC_DEFINE_SOFTMAX_SUM(DTYPE, NAME)                                                                  \
    static double softmax_sum_##NAME(const void *row, size_t n, float maximum) {                             \
        return lmc_softmax_sum(row, n, DTYPE, maximum);                                                      \
    }

#endif

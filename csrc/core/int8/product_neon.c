/* Linear maps in 8-bit integers with NEON, for processors without its 8-bit products: codes are 16-bit
 * integers. */
#include "core/int8/kernels.h"

#if defined(__aarch64__)
#define LMC_INT8_PACK 2
#include "core/int8/product_neon.h"

static inline __attribute__((always_inline)) void multiply_row(const int8_t *weights, const int32_t *codes,
                                                               int32x4_t sums[4]) {
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; half++) {
        int16x8x2_t x = vld2q_s16((const int16_t *)codes + 16 * half);
#pragma GCC unroll 2
        for (size_t j = 0; j < 2; j++) {
            sums[2 * half] = vmlal_n_s16(sums[2 * half], vget_low_s16(x.val[j]), weights[j]);
            sums[2 * half + 1] = vmlal_n_s16(sums[2 * half + 1], vget_high_s16(x.val[j]), weights[j]);
        }
    }
}

const lmc_int8_kernels_t lmc_int8_kernels_neon = {lmc_int8_quantise_panel, lmc_int8_product_run};

#endif

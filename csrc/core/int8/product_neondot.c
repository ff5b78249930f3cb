/* Linear maps in 8-bit integers with NEON's dot products (Armv8.2 DotProd): four products of 8-bit codes are
 * added into each 32-bit lane at once. */
#include "core/int8/kernels.h"

#if defined(__aarch64__)
#define LMC_INT8_PACK 4
#include "core/int8/product_neon.h"

static inline __attribute__((always_inline)) void multiply_row(const int8_t *weights, const int32_t *codes,
                                                               int32x4_t sums[4]) {
    int32_t four;
    memcpy(&four, weights, sizeof four);
    int8x16_t weight = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++)
        sums[v] = vdotq_s32(sums[v], weight, vreinterpretq_s8_s32(vld1q_s32(codes + 4 * v)));
}

const lmc_int8_kernels_t lmc_int8_kernels_neondot = {lmc_int8_quantise_panel, lmc_int8_product_run};

#endif

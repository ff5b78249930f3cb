/* Codes of a panel for the backends with vectors: LMC_INT8_PACK (2 or 4) consecutive codes of one lane lie in
 * one 32-bit word, the words of 16 lanes side by side, as the instructions take them that add several
 * products into each lane. Written with the compiler's own vectors of 16 lanes; every lane does what the
 * scalar functions of kernels.h say. */
#include <string.h>

#include "core/int8/kernels.h"

typedef float lmc_lanes_f32 __attribute__((vector_size(4 * LMC_LANES)));
typedef int32_t lmc_lanes_i32 __attribute__((vector_size(4 * LMC_LANES)));

/* By pointer, since vectors of this width have no one way to be passed. */
static inline void lmc_lanes_magnitude(const float *panel, size_t n_features, lmc_lanes_i32 *largest) {
    lmc_lanes_i32 most = {0}, x;
    for (size_t k = 0; k < n_features; k++) {
        memcpy(&x, panel + k * LMC_LANES, sizeof x);
        x &= 0x7FFFFFFF;
        lmc_lanes_i32 is_larger = x > most;
        most = (x & is_larger) | (most & ~is_larger);
    }
    *largest = most;
}

static void lmc_int8_quantise_lanes(const float *panel, size_t n_features, lmc_int8_panel_t *quantised) {
    lmc_lanes_i32 largest, mask, codes;
    lmc_lanes_f32 reciprocal, x;
    lmc_lanes_magnitude(panel, n_features, &largest);
    for (size_t lane = 0; lane < LMC_LANES; lane++) {
        lmc_int8_rule_t rule = lmc_int8_rule_of((uint32_t)largest[lane]);
        quantised->scales[lane] = rule.scale;
        reciprocal[lane] = rule.reciprocal;
        mask[lane] = rule.mask;
    }
    for (size_t k = 0; k < lmc_int8_padded(n_features); k += LMC_INT8_PACK) {
        lmc_lanes_i32 words = {0};
#pragma GCC unroll 4
        for (size_t j = 0; j < LMC_INT8_PACK; j++) {
            if (k + j >= n_features) break;
            memcpy(&x, panel + (k + j) * LMC_LANES, sizeof x);
            x = x * reciprocal;
            x = x + LMC_ROUND_MAGIC;
            memcpy(&codes, &x, sizeof codes);
            codes = (codes - (int32_t)LMC_ROUND_MAGIC_BITS) & mask;
            words |= (codes & (LMC_INT8_PACK == 4 ? 0xFF : 0xFFFF)) << (int)(32 / LMC_INT8_PACK * j);
        }
#if defined(LMC_INT8_UNSIGNED) /* code + 128 */
        words ^= (int32_t)0x80808080;
#endif
        memcpy(quantised->codes + k / LMC_INT8_PACK * LMC_LANES, &words, sizeof words);
    }
}

/* The kernel of backends that quantise all lanes, wanted or not. */
static inline void lmc_int8_quantise_panel(const float *panel, size_t n_features, size_t n_lanes,
                                           lmc_int8_panel_t *quantised) {
    (void)n_lanes;
    lmc_int8_quantise_lanes(panel, n_features, quantised);
}

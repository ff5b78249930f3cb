/* Linear maps in 8-bit integers with NEON, written once for processors with and without its 8-bit products:
 * tiles of 4 rows x 16 tokens. The including file defines LMC_INT8_PACK and multiply_row. */
#include <arm_neon.h>

#include "core/int8/code_lanes.h"

#define LMC_TILE_ROWS 4

/* Adds the products of LMC_INT8_PACK weights with the codes of 16 lanes. */
static inline __attribute__((always_inline)) void multiply_row(const int8_t *weights, const int32_t *codes,
                                                               int32x4_t sums[4]);

static void multiply_tile(const lmc_int8_product_t *p, size_t row, const lmc_int8_panel_t *input,
                          float *output) {
    size_t left = p->n_rows - row, n_rows = left < LMC_TILE_ROWS ? left : LMC_TILE_ROWS;
    const int8_t *weights[LMC_TILE_ROWS];
    int32x4_t sums[LMC_TILE_ROWS][4];
#pragma GCC unroll 4
    for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
        weights[r] = p->weights + (row + (r < n_rows ? r : n_rows - 1)) * p->n_k;
        sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = vdupq_n_s32(0);
    }
    for (size_t k = 0; k < p->n_k; k += LMC_INT8_PACK) {
#pragma GCC unroll 4
        for (size_t r = 0; r < LMC_TILE_ROWS; r++)
            multiply_row(weights[r] + k, input->codes + k / LMC_INT8_PACK * LMC_LANES, sums[r]);
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
        if (r >= n_rows) break;
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++) {
            float32x4_t y = vmulq_f32(vcvtq_f32_s32(sums[r][v]), vdupq_n_f32(p->scales[row + r]));
            y = vmulq_f32(y, vld1q_f32(input->scales + 4 * v));
            if (p->bias != NULL) y = vaddq_f32(y, vdupq_n_f32(p->bias[row + r]));
            vst1q_f32(output + (row + r) * LMC_LANES + 4 * v, y);
        }
    }
}

static void lmc_int8_product_run(const lmc_int8_product_t *p) {
    for (size_t row = 0; row < p->n_rows; row += LMC_TILE_ROWS) {
        for (size_t i = 0; i < p->n_panels; i++) {
            const char *input = (const char *)p->input + i * p->input_stride;
            multiply_tile(p, row, (const lmc_int8_panel_t *)(const void *)input,
                          p->output + i * p->output_stride);
        }
    }
}

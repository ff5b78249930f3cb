/* The matrix product with NEON: tiles of 6 rows x 16 lanes; and the forward pass's other kernels, compiled
 * for this instruction set. */
#include "core/transformer/kernels.h"

#if defined(__aarch64__)
#include "core/base/vec_neon.h"

#define LMC_TRANSFORMER_KERNELS lmc_transformer_kernels_neon
#define LMC_16BIT_LANES 0
#define LMC_TURN_RUN NULL
#define LMC_TILE_ROWS 6
#define LMC_INLINE static inline __attribute__((always_inline))

/* n_rows is a constant at every call, so that the accumulators live in registers: 24 of the 32. */
LMC_INLINE void tile(const lmc_product_t *p, size_t row, const float *input, float *output,
                     const size_t n_rows) {
    const float *weights = (const float *)p->weights + (ptrdiff_t)row * p->row_stride;
    float *out = output + row * LMC_LANES;
    float32x4_t sums[6][4];
#pragma GCC unroll 6
    for (size_t r = 0; r < n_rows; r++) {
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++)
            sums[r][v] = p->resume ? vld1q_f32(out + r * LMC_LANES + v * 4) : vdupq_n_f32(0.0f);
    }
    for (size_t k = 0; k < p->n_k; k++) {
        float32x4_t x[4];
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++)
            x[v] = vld1q_f32(input + v * 4);
#pragma GCC unroll 6
        for (size_t r = 0; r < n_rows; r++) {
            float32x4_t weight = vld1q_dup_f32(weights + (ptrdiff_t)r * p->row_stride);
#pragma GCC unroll 4
            for (size_t v = 0; v < 4; v++)
                sums[r][v] = vfmaq_f32(sums[r][v], weight, x[v]);
        }
        input += LMC_LANES;
        weights += p->k_stride;
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < n_rows; r++) {
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++) {
            if (p->bias != NULL) sums[r][v] = vaddq_f32(sums[r][v], vdupq_n_f32(p->bias[row + r]));
            vst1q_f32(out + r * LMC_LANES + v * 4, sums[r][v]);
        }
    }
}

static void lmc_product_run(const lmc_product_t *p) {
    for (size_t i = 0; i < p->n_panels; i++) {
        const float *input = p->input + i * p->input_stride;
        float *output = p->output + i * p->output_stride;
        size_t row = 0;
        for (; row + 6 <= p->n_rows; row += 6)
            tile(p, row, input, output, 6);
        for (; row + 2 <= p->n_rows; row += 2)
            tile(p, row, input, output, 2);
        for (; row < p->n_rows; row++)
            tile(p, row, input, output, 1);
    }
}

static void lmc_transpose_run(const float *panel, size_t n_features, size_t n_lanes, float *const *rows) {
    for (size_t lane = 0; lane < n_lanes; lane++) {
        for (size_t i = 0; i < n_features; i++)
            rows[lane][i] = panel[i * LMC_LANES + lane];
    }
}

#include "core/transformer/kernel_lanes.h"

#endif

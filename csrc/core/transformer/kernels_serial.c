/* The matrix product as it is specified, and the forward pass's other kernels for any processor. Nothing here
 * is fast: a backend with vectors overrides the product and compiles the rest for its own instruction set. */
#include "core/transformer/kernels.h"
#include "core/base/vec_serial.h"

#define LMC_TRANSFORMER_KERNELS lmc_transformer_kernels_serial
#define LMC_16BIT_LANES 0
#define LMC_TURN_RUN NULL
#define LMC_TILE_ROWS 8

static void lmc_product_panel(const lmc_product_t *p, const float *input, float *output) {
    for (size_t row = 0; row < p->n_rows; row++) {
        const float *weights = (const float *)p->weights + (ptrdiff_t)row * p->row_stride;
        for (size_t lane = 0; lane < LMC_LANES; lane++) {
            float chain = p->resume ? output[row * LMC_LANES + lane] : 0.0f;
            for (size_t k = 0; k < p->n_k; k++)
                chain =
                    __builtin_fmaf(weights[(ptrdiff_t)k * p->k_stride], input[k * LMC_LANES + lane], chain);
            if (p->bias != NULL) chain = chain + p->bias[row];
            output[row * LMC_LANES + lane] = chain;
        }
    }
}

static void lmc_product_run(const lmc_product_t *p) {
    for (size_t i = 0; i < p->n_panels; i++)
        lmc_product_panel(p, p->input + i * p->input_stride, p->output + i * p->output_stride);
}

static void lmc_transpose_run(const float *panel, size_t n_features, size_t n_lanes, float *const *rows) {
    for (size_t lane = 0; lane < n_lanes; lane++) {
        for (size_t i = 0; i < n_features; i++)
            rows[lane][i] = panel[i * LMC_LANES + lane];
    }
}

#include "core/transformer/kernel_lanes.h"

/* Linear maps in 8-bit integers as they are specified, for any processor. */
#include "core/int8/kernels.h"

static void lmc_int8_quantise_run(const float *panel, size_t n_features, size_t n_lanes,
                                  lmc_int8_panel_t *quantised) {
    int8_t *codes = (int8_t *)quantised->codes;
    (void)n_lanes;
    for (size_t lane = 0; lane < LMC_LANES; lane++) {
        uint32_t largest = 0;
        for (size_t k = 0; k < n_features; k++) {
            uint32_t magnitude = lmc_int8_magnitude(panel[k * LMC_LANES + lane]);
            if (magnitude > largest) largest = magnitude;
        }
        lmc_int8_rule_t rule = lmc_int8_rule_of(largest);
        quantised->scales[lane] = rule.scale;
        for (size_t k = 0; k < n_features; k++)
            codes[k * LMC_LANES + lane] = (int8_t)lmc_int8_code(panel[k * LMC_LANES + lane], rule);
        for (size_t k = n_features; k < lmc_int8_padded(n_features); k++)
            codes[k * LMC_LANES + lane] = 0;
    }
}

static void lmc_int8_product_panel(const lmc_int8_product_t *p, const lmc_int8_panel_t *input,
                                   float *output) {
    const int8_t *codes = (const int8_t *)input->codes;
    for (size_t row = 0; row < p->n_rows; row++) {
        for (size_t lane = 0; lane < LMC_LANES; lane++) {
            int32_t sum = 0;
            for (size_t k = 0; k < p->n_k; k++)
                sum += p->weights[row * p->n_k + k] * codes[k * LMC_LANES + lane];
            float y = lmc_mul(lmc_mul((float)sum, p->scales[row]), input->scales[lane]);
            if (p->bias != NULL) y = lmc_add(y, p->bias[row]);
            output[row * LMC_LANES + lane] = y;
        }
    }
}

static void lmc_int8_product_run(const lmc_int8_product_t *p) {
    for (size_t i = 0; i < p->n_panels; i++)
        lmc_int8_product_panel(p, (const lmc_int8_panel_t *)((const char *)p->input + i * p->input_stride),
                               p->output + i * p->output_stride);
}

const lmc_int8_kernels_t lmc_int8_kernels_serial = {lmc_int8_quantise_run, lmc_int8_product_run};

/* The kernels of neox_kernels.h that are plain loops over lanes. Every gemm_<backend>.c includes this file,
 * so that the compiler turns the same loops into vectors of that instruction set; `-ffp-contract=off` and
 * ieee.h keep the bits. The includer has defined lmc_product_run (the matrix product) and lmc_transpose_run,
 * and names the table it makes in LMC_NEOX_KERNELS. FORMAT.md has the formulas. */
#include <string.h>

#include "ieee.h"
#include "neox_kernels.h"

#define LMC_FOR_LANES(lane) for (size_t lane = 0; lane < LMC_LANES; lane++)

static void lmc_widen_run(const void *source, lmc_dtype dtype, size_t n, float *target) {
    const uint16_t *halves = (const uint16_t *)source;
    if (dtype == LMC_FLOAT32) {
        memcpy(target, source, n * sizeof *target);
    } else if (dtype == LMC_BFLOAT16) {
        for (size_t i = 0; i < n; i++)
            target[i] = lmc_widen_bf16(halves[i]);
    } else {
        for (size_t i = 0; i < n; i++)
            target[i] = lmc_widen_f16(halves[i]);
    }
}

/* Sums over features run in four chains, by feature modulo 4, joined as (0 + 1) + (2 + 3). */
static void lmc_join_chains(float chains[4][LMC_LANES], float divisor, float *result) {
    LMC_FOR_LANES(lane) {
        float sum =
            lmc_add(lmc_add(chains[0][lane], chains[1][lane]), lmc_add(chains[2][lane], chains[3][lane]));
        result[lane] = lmc_div(sum, divisor);
    }
}

static void lmc_layer_norm_run(const float *input, size_t n_features, const float *gain, const float *bias,
                               float epsilon, float *output) {
    float chains[4][LMC_LANES] = {{0}}, mean[LMC_LANES], factor[LMC_LANES];
    for (size_t i = 0; i < n_features; i++) {
        const float *x = input + i * LMC_LANES;
        float *chain = chains[i % 4];
        LMC_FOR_LANES(lane) chain[lane] = lmc_add(chain[lane], x[lane]);
    }
    lmc_join_chains(chains, (float)n_features, mean);
    memset(chains, 0, sizeof chains);
    for (size_t i = 0; i < n_features; i++) {
        const float *x = input + i * LMC_LANES;
        float *chain = chains[i % 4];
        LMC_FOR_LANES(lane) {
            float centred = lmc_sub(x[lane], mean[lane]);
            chain[lane] = lmc_fma(centred, centred, chain[lane]);
        }
    }
    lmc_join_chains(chains, (float)n_features, factor);
    LMC_FOR_LANES(lane) factor[lane] = lmc_div(1.0f, lmc_sqrt(lmc_add(factor[lane], epsilon)));
    for (size_t i = 0; i < n_features; i++) {
        const float *x = input + i * LMC_LANES;
        float *y = output + i * LMC_LANES, g = gain[i], b = bias[i];
        LMC_FOR_LANES(lane) y[lane] = lmc_fma(lmc_mul(lmc_sub(x[lane], mean[lane]), factor[lane]), g, b);
    }
}

static void lmc_gelu_run(float *values, size_t n_values) {
    for (size_t i = 0; i < n_values; i++)
        values[i] = lmc_gelu(values[i]);
}

static void lmc_add_run(float *x, const float *restrict y, size_t n_values) {
    for (size_t i = 0; i < n_values; i++)
        x[i] = lmc_add(x[i], y[i]);
}

static void lmc_rotate_run(float *head, size_t n_pairs, const float *cosines, const float *sines,
                           size_t table_stride) {
    for (size_t i = 0; i < n_pairs; i++) {
        float *low = head + i * LMC_LANES, *high = head + (i + n_pairs) * LMC_LANES;
        const float *cosine = cosines + i * table_stride, *sine = sines + i * table_stride;
        LMC_FOR_LANES(lane) {
            float l = low[lane], h = high[lane];
            low[lane] = lmc_fma(l, cosine[lane], -lmc_mul(h, sine[lane]));
            high[lane] = lmc_fma(h, cosine[lane], lmc_mul(l, sine[lane]));
        }
    }
}

/* ---- attention: scores, their softmax weights and the sum of these, the weighted values
 * ----------------------- */

/* scores become weights; sums[lane] is their sum over the keys that the lane sees, ascending. */
static void lmc_weigh_panel(const lmc_attention_t *attention, size_t n_before, size_t n_own, float *scores,
                            float *sums) {
    float maximum[LMC_LANES], scale = attention->scale, floor = attention->floor;
    float *own = scores + n_before * LMC_LANES;
    LMC_FOR_LANES(lane) maximum[lane] = -__builtin_inff();
    for (size_t j = 0; j < n_before; j++) {
        const float *score = scores + j * LMC_LANES;
        LMC_FOR_LANES(lane) maximum[lane] = lmc_max(score[lane], maximum[lane]);
    }
    for (size_t j = 0; j < n_own; j++) {
        for (size_t lane = j; lane < LMC_LANES; lane++)
            maximum[lane] = lmc_max(own[j * LMC_LANES + lane], maximum[lane]);
    }
    LMC_FOR_LANES(lane) sums[lane] = 0.0f;
    for (size_t j = 0; j < n_before; j++) {
        float *score = scores + j * LMC_LANES;
        LMC_FOR_LANES(lane) {
            score[lane] = lmc_softmax_weight(score[lane], maximum[lane], scale, floor);
            sums[lane] = lmc_add(sums[lane], score[lane]);
        }
    }
    for (size_t j = 0; j < n_own; j++) {
        float weight[LMC_LANES], *score = own + j * LMC_LANES;
        LMC_FOR_LANES(lane) weight[lane] = lmc_softmax_weight(score[lane], maximum[lane], scale, floor);
        memcpy(score, weight, sizeof weight);
        for (size_t lane = j; lane < LMC_LANES; lane++)
            sums[lane] = lmc_add(sums[lane], weight[lane]);
    }
}

static void lmc_attend_panel_run(const lmc_attention_t *attention, const float *query, size_t n_before,
                                 size_t n_own, float *scores, float *output) {
    size_t head_dim = attention->head_dim, n_keys = n_before + n_own;
    lmc_product_t product = {.row_stride = 1,
                             .k_stride = LMC_LANES,
                             .n_rows = LMC_LANES,
                             .n_k = head_dim,
                             .input = query,
                             .n_panels = 1,
                             .n_lanes = LMC_LANES};
    for (size_t j = 0; j < n_keys; j += LMC_LANES) {
        product.weights = attention->keys + j * head_dim;
        product.output = scores + j * LMC_LANES;
        lmc_product_run(&product);
    }
    float sums[LMC_LANES];
    lmc_weigh_panel(attention, n_before, n_own, scores, sums);
    product = (lmc_product_t){.weights = attention->values,
                              .row_stride = 1,
                              .k_stride = (ptrdiff_t)head_dim,
                              .n_rows = head_dim,
                              .n_k = n_before,
                              .input = scores,
                              .output = output,
                              .n_panels = 1,
                              .n_lanes = LMC_LANES};
    lmc_product_run(&product);
    /* A key that a lane does not see takes no part at all: 0 * value would turn an infinite value into NaN.
     */
    const float *own_weights = scores + n_before * LMC_LANES,
                *own_values = attention->values + n_before * head_dim;
    for (size_t d = 0; d < head_dim; d++) {
        float sum[LMC_LANES];
        memcpy(sum, output + d * LMC_LANES, sizeof sum);
        for (size_t j = 0; j < n_own; j++) {
            const float *weight = own_weights + j * LMC_LANES;
            float value = own_values[j * head_dim + d];
            LMC_FOR_LANES(lane) {
                float next = lmc_fma(weight[lane], value, sum[lane]);
                sum[lane] = lane >= j ? next : sum[lane];
            }
        }
        LMC_FOR_LANES(lane) output[d * LMC_LANES + lane] = lmc_div(sum[lane], sums[lane]);
    }
}

static void lmc_attend_stream_run(const lmc_attention_t *attention, const float *query, size_t n_keys,
                                  float *scores, float *output_lane) {
    size_t head_dim = attention->head_dim, n_padded = (n_keys + LMC_LANES - 1) / LMC_LANES * LMC_LANES;
    float maximum = -__builtin_inff(), sum = 0.0f, *output = scores + n_padded;
    for (size_t j = 0; j < n_padded; j += LMC_LANES) {
        const float *keys = attention->keys + j * head_dim;
        float chain[LMC_LANES] = {0};
        for (size_t d = 0; d < head_dim; d++) {
            LMC_FOR_LANES(lane) chain[lane] = lmc_fma(keys[d * LMC_LANES + lane], query[d], chain[lane]);
        }
        memcpy(scores + j, chain, sizeof chain);
    }
    for (size_t j = 0; j < n_keys; j++)
        maximum = lmc_max(scores[j], maximum);
    for (size_t j = 0; j < n_padded; j++)
        scores[j] = lmc_softmax_weight(scores[j], maximum, attention->scale, attention->floor);
    memset(output, 0, head_dim * sizeof *output);
    for (size_t j = 0; j < n_keys; j++) {
        const float *value = attention->values + j * head_dim, weight = scores[j];
        sum = lmc_add(sum, weight);
        for (size_t d = 0; d < head_dim; d++)
            output[d] = lmc_fma(weight, value[d], output[d]);
    }
    for (size_t d = 0; d < head_dim; d++)
        output_lane[d * LMC_LANES] = lmc_div(output[d], sum);
}

const lmc_neox_kernels_t LMC_NEOX_KERNELS = {
    .product = lmc_product_run,
    .widen = lmc_widen_run,
    .layer_norm = lmc_layer_norm_run,
    .gelu = lmc_gelu_run,
    .add = lmc_add_run,
    .rotate = lmc_rotate_run,
    .attend_panel = lmc_attend_panel_run,
    .attend_stream = lmc_attend_stream_run,
    .transpose = lmc_transpose_run,
};

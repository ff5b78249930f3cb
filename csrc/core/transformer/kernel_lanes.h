/* The kernels of kernels.h beside the matrix product, written once for all instruction sets. A
 * kernels_<backend>.c includes its vec_<backend>.h, defines lmc_product_run and lmc_transpose_run, names the
 * table in LMC_TRANSFORMER_KERNELS, and includes this file. Plain loops over lanes are left to the compiler;
 * loops that carry sums use the vectors, so that the sums stay in registers. Either way every lane does what
 * the scalar functions of ieee.h say. FORMAT.md has the formulas. */
#include <string.h>

#include "core/base/ieee.h"
#include "core/transformer/kernels.h"

#define LMC_FOR_LANES(lane) for (size_t lane = 0; lane < LMC_LANES; lane++)
/* Vectors a panel's feature takes; loops over them are unrolled. */
#define LMC_VECTORS (LMC_LANES / LMC_VLEN)
#define LMC_FOR_VECTORS(v) _Pragma("GCC unroll 16") for (size_t v = 0; v < LMC_VECTORS; v++)

static void lmc_widen_run(const void *source, lmc_dtype_t dtype, size_t n, float *target) {
    const uint16_t *halves = (const uint16_t *)source;
    size_t i = 0;
    if (dtype == LMC_FLOAT32) {
        memcpy(target, source, n * sizeof *target);
    } else if (dtype == LMC_BFLOAT16) {
        for (; i + LMC_VLEN <= n; i += LMC_VLEN)
            lmc_v_store_f32(target + i, lmc_v_load_bf16(halves + i));
        for (; i < n; i++)
            target[i] = lmc_widen_bf16(halves[i]);
    } else {
        for (; i + LMC_VLEN <= n; i += LMC_VLEN)
            lmc_v_store_f32(target + i, lmc_v_load_f16(halves + i));
        for (; i < n; i++)
            target[i] = lmc_widen_f16(halves[i]);
    }
}

/* Norms. */

/* chain + x, or chain + (x - middle)^2. */
static inline __attribute__((always_inline)) lmc_vf lmc_add_feature(lmc_vf chain, const float *x,
                                                                    lmc_vf middle, const int squares) {
    lmc_vf value = lmc_v_load_f32(x);
    if (!squares) return lmc_v_add(chain, value);
    lmc_vf distance = lmc_v_sub(value, middle);
    return lmc_v_fma(distance, distance, chain);
}

/* Sums over features run in four chains, by feature modulo 4, joined as (0 + 1) + (2 + 3). */
static inline __attribute__((always_inline)) void lmc_sum_features(const float *input, size_t n_features,
                                                                   const float *centre, float *result,
                                                                   const int squares) {
    for (size_t v = 0; v < LMC_LANES; v += LMC_VLEN) {
        const float *x = input + v;
        lmc_vf zero = lmc_v_set1(0.0f), a = zero, b = zero, c = zero, d = zero;
        lmc_vf middle = squares ? lmc_v_load_f32(centre + v) : zero;
        size_t i = 0;
        for (; i + 4 <= n_features; i += 4, x += 4 * LMC_LANES) {
            a = lmc_add_feature(a, x, middle, squares);
            b = lmc_add_feature(b, x + LMC_LANES, middle, squares);
            c = lmc_add_feature(c, x + 2 * LMC_LANES, middle, squares);
            d = lmc_add_feature(d, x + 3 * LMC_LANES, middle, squares);
        }
        if (i < n_features) a = lmc_add_feature(a, x, middle, squares);
        if (i + 1 < n_features) b = lmc_add_feature(b, x + LMC_LANES, middle, squares);
        if (i + 2 < n_features) c = lmc_add_feature(c, x + 2 * LMC_LANES, middle, squares);
        lmc_v_store_f32(result + v, lmc_v_add(lmc_v_add(a, b), lmc_v_add(c, d)));
    }
}

static void lmc_normalise_run(lmc_norm_rule_t rule, const float *input, size_t n_features, const float *gain,
                              const float *bias, float *output) {
    float mean[LMC_LANES] = {0}, factor[LMC_LANES], count = (float)n_features;
    if (rule.norm == LMC_NORM_LAYER) {
        lmc_sum_features(input, n_features, NULL, mean, 0);
        LMC_FOR_LANES (lane)
            mean[lane] = lmc_div(mean[lane], count);
    }
    lmc_sum_features(input, n_features, mean, factor, 1);
    LMC_FOR_LANES (lane) {
        float variance = lmc_div(factor[lane], count);
        factor[lane] = lmc_div(1.0f, lmc_sqrt(lmc_add(variance, rule.epsilon)));
    }
    lmc_vf m[LMC_VECTORS], f[LMC_VECTORS];
    LMC_FOR_VECTORS (v)
        m[v] = lmc_v_load_f32(mean + v * LMC_VLEN), f[v] = lmc_v_load_f32(factor + v * LMC_VLEN);
    for (size_t i = 0; i < n_features; i++) {
        const float *x = input + i * LMC_LANES;
        float *y = output + i * LMC_LANES;
        lmc_vf g = lmc_v_set1(gain[i]), b = lmc_v_set1(bias[i]);
        LMC_FOR_VECTORS (v) {
            lmc_vf scaled = lmc_v_mul(lmc_v_sub(lmc_v_load_f32(x + v * LMC_VLEN), m[v]), f[v]);
            lmc_v_store_f32(y + v * LMC_VLEN, lmc_v_fma(scaled, g, b));
        }
    }
}

/* Elementwise. */

/* One loop for each activation, with factors and without. */
#define LMC_ACTIVATE(EXPRESSION)                                                                             \
    do {                                                                                                     \
        for (size_t i = 0; factors == NULL && i < n_values; i++) {                                           \
            float x = values[i];                                                                             \
            values[i] = (EXPRESSION);                                                                        \
        }                                                                                                    \
        for (size_t i = 0; factors != NULL && i < n_values; i++) {                                           \
            float x = values[i];                                                                             \
            values[i] = lmc_mul((EXPRESSION), factors[i]);                                                   \
        }                                                                                                    \
    } while (0)

static void lmc_activate_run(lmc_activation_rule_t rule, float *values, const float *restrict factors,
                             size_t n_values) {
    lmc_xielu_rule_t xielu = rule.xielu;
    switch (rule.activation) {
    case LMC_ACTIVATION_GELU:
        LMC_ACTIVATE(lmc_gelu(x));
        break;
    case LMC_ACTIVATION_GELU_TANH:
        LMC_ACTIVATE(lmc_gelu_tanh(x));
        break;
    case LMC_ACTIVATION_SILU:
        LMC_ACTIVATE(lmc_silu(x));
        break;
    case LMC_ACTIVATION_RELU:
        LMC_ACTIVATE(lmc_relu(x));
        break;
    case LMC_ACTIVATION_RELU_SQUARED:
        LMC_ACTIVATE(lmc_relu_squared(x));
        break;
    case LMC_ACTIVATION_XIELU:
        LMC_ACTIVATE(lmc_xielu(x, xielu));
        break;
    }
}

static void lmc_clip_run(float *values, size_t n_values, float limit) {
    for (size_t i = 0; i < n_values; i++)
        values[i] = lmc_clip(values[i], limit);
}

static void lmc_finish_logits_run(float *values, size_t n_values, float multiplier, float cap) {
    for (size_t i = 0; i < n_values && cap == 0.0f; i++)
        values[i] = lmc_mul(values[i], multiplier);
    for (size_t i = 0; i < n_values && cap != 0.0f; i++)
        values[i] = lmc_capped_logit(values[i], multiplier, cap);
}

static void lmc_add_run(float *x, const float *restrict y, float multiplier, size_t n_values) {
    for (size_t i = 0; i < n_values; i++)
        x[i] = lmc_fma(y[i], multiplier, x[i]);
}

static void lmc_rotate_run(float *head, size_t n_pairs, const float *cosines, const float *sines,
                           size_t table_stride) {
    for (size_t i = 0; i < n_pairs; i++) {
        float *low = head + i * LMC_LANES, *high = head + (i + n_pairs) * LMC_LANES;
        const float *cosine = cosines + i * table_stride, *sine = sines + i * table_stride;
        LMC_FOR_LANES (lane) {
            float l = low[lane], h = high[lane];
            low[lane] = lmc_fma(l, cosine[lane], -lmc_mul(h, sine[lane]));
            high[lane] = lmc_fma(h, cosine[lane], lmc_mul(l, sine[lane]));
        }
    }
}

#include "core/transformer/attention_lanes.h"

const lmc_transformer_kernels_t LMC_TRANSFORMER_KERNELS = {
    .product = lmc_product_run,
    .lanes_16bit = LMC_16BIT_LANES,
    .turn = LMC_TURN_RUN,
    .tile_rows = LMC_TILE_ROWS,
    .widen = lmc_widen_run,
    .normalise = lmc_normalise_run,
    .activate = lmc_activate_run,
    .clip = lmc_clip_run,
    .finish_logits = lmc_finish_logits_run,
    .add = lmc_add_run,
    .rotate = lmc_rotate_run,
    .attend_panel = lmc_attend_panel_run,
    .attend_stream = lmc_attend_stream_run,
    .transpose = lmc_transpose_run,
};

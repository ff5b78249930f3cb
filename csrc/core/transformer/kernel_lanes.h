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

/* Layer norm. */

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

static void lmc_layer_norm_run(const float *input, size_t n_features, const float *gain, const float *bias,
                               float epsilon, float *output) {
    float mean[LMC_LANES], factor[LMC_LANES], count = (float)n_features;
    lmc_sum_features(input, n_features, NULL, mean, 0);
    LMC_FOR_LANES (lane)
        mean[lane] = lmc_div(mean[lane], count);
    lmc_sum_features(input, n_features, mean, factor, 1);
    LMC_FOR_LANES (lane) {
        float variance = lmc_div(factor[lane], count);
        factor[lane] = lmc_div(1.0f, lmc_sqrt(lmc_add(variance, epsilon)));
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
        LMC_FOR_LANES (lane) {
            float l = low[lane], h = high[lane];
            low[lane] = lmc_fma(l, cosine[lane], -lmc_mul(h, sine[lane]));
            high[lane] = lmc_fma(h, cosine[lane], lmc_mul(l, sine[lane]));
        }
    }
}

/* Attention: scores, their softmax weights and the sum of these, the weighted values. */

/* seen[LMC_LANES - j] on: ones for the lanes from j on, which see the j-th of their panel's own keys. */
static const int32_t lmc_seen[2 * LMC_LANES] = {
    [LMC_LANES] = -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

static lmc_vf lmc_seen_mask(size_t j, size_t v) {
    return lmc_v_load_f32(lmc_seen + LMC_LANES - j + v * LMC_VLEN);
}

/* Largest score that each lane sees, NaN ignored. */
static void lmc_max_panel(const float *scores, size_t n_before, size_t n_own, float *maximum) {
    lmc_vf m[LMC_VECTORS], lowest = lmc_v_set1(-__builtin_inff());
    LMC_FOR_VECTORS (v)
        m[v] = lowest;
    for (size_t j = 0; j < n_before; j++) {
        LMC_FOR_VECTORS (v)
            m[v] = lmc_v_max(lmc_v_load_f32(scores + j * LMC_LANES + v * LMC_VLEN), m[v]);
    }
    for (size_t j = 0; j < n_own; j++) {
        const float *score = scores + (n_before + j) * LMC_LANES;
        LMC_FOR_VECTORS (v) {
            lmc_vf seen = lmc_v_select(lmc_seen_mask(j, v), lmc_v_load_f32(score + v * LMC_VLEN), lowest);
            m[v] = lmc_v_max(seen, m[v]);
        }
    }
    LMC_FOR_VECTORS (v)
        lmc_v_store_f32(maximum + v * LMC_VLEN, m[v]);
}

/* scores become weights; sums[lane] is their sum over the keys that the lane sees, ascending. */
static void lmc_weigh_panel(const lmc_attention_t *attention, size_t n_before, size_t n_own, float *scores,
                            float *sums) {
    float maximum[LMC_LANES], scale = attention->scale, floor = attention->floor;
    lmc_max_panel(scores, n_before, n_own, maximum);
    for (size_t j = 0; j < n_before + n_own; j++) {
        float *score = scores + j * LMC_LANES;
        LMC_FOR_LANES (lane)
            score[lane] = lmc_softmax_weight(score[lane], maximum[lane], scale, floor);
    }
    lmc_vf sum[LMC_VECTORS];
    LMC_FOR_VECTORS (v)
        sum[v] = lmc_v_set1(0.0f);
    for (size_t j = 0; j < n_before; j++) {
        LMC_FOR_VECTORS (v)
            sum[v] = lmc_v_add(sum[v], lmc_v_load_f32(scores + j * LMC_LANES + v * LMC_VLEN));
    }
    for (size_t j = 0; j < n_own; j++) {
        const float *weight = scores + (n_before + j) * LMC_LANES;
        LMC_FOR_VECTORS (v) {
            lmc_vf next = lmc_v_add(sum[v], lmc_v_load_f32(weight + v * LMC_VLEN));
            sum[v] = lmc_v_select(lmc_seen_mask(j, v), next, sum[v]);
        }
    }
    LMC_FOR_VECTORS (v)
        lmc_v_store_f32(sums + v * LMC_VLEN, sum[v]);
}

/* Adds the panel's own keys' values to n_dims <= 4 features, and divides by the sums. A key that a lane does
 * not see takes no part at all: 0 * value would turn an infinite value into NaN. */
static inline __attribute__((always_inline)) void lmc_add_own_values(const float *weights,
                                                                     const float *values, size_t head_dim,
                                                                     size_t n_own, float *output,
                                                                     const size_t n_dims) {
    lmc_vf sum[4][LMC_VECTORS];
#pragma GCC unroll 4
    for (size_t d = 0; d < n_dims; d++) {
        LMC_FOR_VECTORS (v)
            sum[d][v] = lmc_v_load_f32(output + d * LMC_LANES + v * LMC_VLEN);
    }
    for (size_t j = 0; j < n_own; j++) {
        LMC_FOR_VECTORS (v) {
            lmc_vf weight = lmc_v_load_f32(weights + j * LMC_LANES + v * LMC_VLEN),
                   mask = lmc_seen_mask(j, v);
#pragma GCC unroll 4
            for (size_t d = 0; d < n_dims; d++) {
                lmc_vf next = lmc_v_fma(weight, lmc_v_set1(values[j * head_dim + d]), sum[d][v]);
                sum[d][v] = lmc_v_select(mask, next, sum[d][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (size_t d = 0; d < n_dims; d++) {
        LMC_FOR_VECTORS (v)
            lmc_v_store_f32(output + d * LMC_LANES + v * LMC_VLEN, sum[d][v]);
    }
}

static void lmc_attend_panel_run(const lmc_attention_t *attention, const float *query, size_t n_before,
                                 size_t n_own, float *scores, float *output) {
    size_t head_dim = attention->head_dim, n_keys = n_before + n_own, d = 0;
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
    const float *weights = scores + n_before * LMC_LANES, *values = attention->values + n_before * head_dim;
    for (; d + 4 <= head_dim; d += 4)
        lmc_add_own_values(weights, values + d, head_dim, n_own, output + d * LMC_LANES, 4);
    for (; d < head_dim; d++)
        lmc_add_own_values(weights, values + d, head_dim, n_own, output + d * LMC_LANES, 1);
    for (d = 0; d < head_dim; d++) {
        float *out = output + d * LMC_LANES;
        LMC_FOR_LANES (lane)
            out[lane] = lmc_div(out[lane], sums[lane]);
    }
}

/* One query of a stream reads each key and value once, and many streams' keys and values do not fit the
 * cache: the next ones are asked for while these are used. */
#define LMC_LINE_FLOATS 16
#define LMC_KEYS_AHEAD 64

/* Scores of n_blocks (a constant, <= 4) blocks of 16 keys for one query. */
static inline __attribute__((always_inline)) void lmc_score_blocks(const float *keys, const float *query,
                                                                   size_t head_dim, float *scores,
                                                                   const float *ahead,
                                                                   const size_t n_blocks) {
    lmc_vf chains[4][LMC_VECTORS];
#pragma GCC unroll 4
    for (size_t b = 0; b < n_blocks; b++) {
        LMC_FOR_VECTORS (v)
            chains[b][v] = lmc_v_set1(0.0f);
    }
    for (size_t d = 0; d < head_dim; d++) {
        lmc_vf q = lmc_v_set1(query[d]);
#pragma GCC unroll 4
        for (size_t b = 0; b < n_blocks; b++) {
            const float *key = keys + (b * head_dim + d) * LMC_LANES;
            __builtin_prefetch(ahead + (b * head_dim + d) * LMC_LINE_FLOATS);
            LMC_FOR_VECTORS (v)
                chains[b][v] = lmc_v_fma(lmc_v_load_f32(key + v * LMC_VLEN), q, chains[b][v]);
        }
    }
#pragma GCC unroll 4
    for (size_t b = 0; b < n_blocks; b++) {
        LMC_FOR_VECTORS (v)
            lmc_v_store_f32(scores + b * LMC_LANES + v * LMC_VLEN, chains[b][v]);
    }
}

/* Features of the weighted sum of values for one query, in n_vectors (a constant, <= 8), the last of which is
 * at `last` and may cover features of the one before once more; returns the sum of the weights. */
static inline __attribute__((always_inline)) float lmc_sum_values(const lmc_attention_t *attention, size_t d,
                                                                  ptrdiff_t last, const float *weights,
                                                                  size_t n_keys, float *output,
                                                                  const size_t n_vectors) {
    size_t head_dim = attention->head_dim;
    const float *values = attention->values + d;
    lmc_vf chains[8];
    float sum = 0.0f;
#pragma GCC unroll 8
    for (size_t v = 0; v < n_vectors; v++)
        chains[v] = lmc_v_set1(0.0f);
    for (size_t j = 0; j < n_keys; j++, values += head_dim) {
        lmc_vf weight = lmc_v_set1(weights[j]);
        const float *ahead = values + LMC_KEYS_AHEAD * head_dim;
        if (j + LMC_KEYS_AHEAD >= n_keys)
            ahead = attention->ahead + (j + LMC_KEYS_AHEAD - n_keys) * head_dim + d;
        sum = lmc_add(sum, weights[j]);
#pragma GCC unroll 8
        for (size_t v = 0; v < n_vectors; v++) {
            const float *at = v + 1 < n_vectors ? values + v * LMC_VLEN : values + last;
            if (v * LMC_VLEN % LMC_LINE_FLOATS == 0) __builtin_prefetch(ahead + v * LMC_VLEN);
            chains[v] = lmc_v_fma(weight, lmc_v_load_f32(at), chains[v]);
        }
    }
#pragma GCC unroll 8
    for (size_t v = 0; v < n_vectors; v++)
        lmc_v_store_f32(v + 1 < n_vectors ? output + d + v * LMC_VLEN : output + d + last, chains[v]);
    return sum;
}

/* Heads smaller than a vector. */
static float lmc_sum_short_values(const lmc_attention_t *attention, const float *weights, size_t n_keys,
                                  float *output) {
    size_t head_dim = attention->head_dim;
    float sum = 0.0f;
    memset(output, 0, head_dim * sizeof *output);
    for (size_t j = 0; j < n_keys; j++) {
        sum = lmc_add(sum, weights[j]);
        for (size_t i = 0; i < head_dim; i++)
            output[i] = lmc_fma(weights[j], attention->values[j * head_dim + i], output[i]);
    }
    return sum;
}

static float lmc_sum_all_values(const lmc_attention_t *attention, const float *weights, size_t n_keys,
                                float *output) {
    size_t head_dim = attention->head_dim;
    float sum = 0.0f;
    if (head_dim < LMC_VLEN) return lmc_sum_short_values(attention, weights, n_keys, output);
    for (size_t d = 0, n_vectors; d < head_dim; d += n_vectors * LMC_VLEN) {
        size_t left = head_dim - d;
        n_vectors = (left + LMC_VLEN - 1) / LMC_VLEN;
        if (n_vectors > 4) n_vectors = n_vectors < 8 ? 4 : 8;
        if (left > n_vectors * LMC_VLEN) left = n_vectors * LMC_VLEN;
        ptrdiff_t last = (ptrdiff_t)left - LMC_VLEN;
        switch (n_vectors) {
        case 1:
            sum = lmc_sum_values(attention, d, last, weights, n_keys, output, 1);
            break;
        case 2:
            sum = lmc_sum_values(attention, d, last, weights, n_keys, output, 2);
            break;
        case 3:
            sum = lmc_sum_values(attention, d, last, weights, n_keys, output, 3);
            break;
        case 4:
            sum = lmc_sum_values(attention, d, last, weights, n_keys, output, 4);
            break;
        default:
            sum = lmc_sum_values(attention, d, last, weights, n_keys, output, 8);
        }
    }
    return sum;
}

static void lmc_attend_stream_run(const lmc_attention_t *attention, const float *query, size_t n_keys,
                                  float *scores, float *output) {
    size_t head_dim = attention->head_dim, n_padded = (n_keys + LMC_LANES - 1) / LMC_LANES * LMC_LANES, j = 0;
    float largest[LMC_LANES], maximum;
    for (; j + 4 * LMC_LANES <= n_padded; j += 4 * LMC_LANES) {
        const float *keys = attention->keys + j * head_dim;
        const float *ahead =
            j + 4 * LMC_LANES < n_padded ? keys + 4 * LMC_LANES * head_dim : attention->values;
        lmc_score_blocks(keys, query, head_dim, scores + j, ahead, 4);
    }
    for (; j < n_padded; j += LMC_LANES)
        lmc_score_blocks(attention->keys + j * head_dim, query, head_dim, scores + j,
                         attention->values + j % (4 * LMC_LANES) * head_dim, 1);
    for (j = n_keys; j < n_padded; j++)
        scores[j] = -__builtin_inff();
    LMC_FOR_LANES (lane)
        largest[lane] = -__builtin_inff();
    for (j = 0; j < n_padded; j += LMC_LANES) {
        LMC_FOR_LANES (lane)
            largest[lane] = lmc_max(scores[j + lane], largest[lane]);
    }
    maximum = largest[0];
    LMC_FOR_LANES (lane)
        maximum = lmc_max(largest[lane], maximum);
    for (j = 0; j < n_padded; j++)
        scores[j] = lmc_softmax_weight(scores[j], maximum, attention->scale, attention->floor);
    float sum = lmc_sum_all_values(attention, scores, n_keys, output);
    for (size_t d = 0; d < head_dim; d++)
        output[d] = lmc_div(output[d], sum);
}

const lmc_transformer_kernels_t LMC_TRANSFORMER_KERNELS = {
    .product = lmc_product_run,
    .short_lanes = LMC_SHORT_LANES,
    .tile_rows = LMC_TILE_ROWS,
    .widen = lmc_widen_run,
    .layer_norm = lmc_layer_norm_run,
    .gelu = lmc_gelu_run,
    .add = lmc_add_run,
    .rotate = lmc_rotate_run,
    .attend_panel = lmc_attend_panel_run,
    .attend_stream = lmc_attend_stream_run,
    .transpose = lmc_transpose_run,
};

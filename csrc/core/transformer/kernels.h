/* The kernels of the GPT-NeoX forward pass that a backend brings. A panel holds LMC_LANES tokens,
 * feature-major: panel[feature * LMC_LANES + lane]. Every kernel is one serial program per lane, so that
 * neither the instruction set nor the company that a token keeps can change its bits. */
#ifndef LLMCOMP_CORE_TRANSFORMER_KERNELS_H
#define LLMCOMP_CORE_TRANSFORMER_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/backend_table.h"
#include "core/base/panel.h"
#include "llmcomp/intervals.h"

/* output[row] = bias[row] + chain of fma over k, ascending from +0, of weights[row * row_stride + k *
 * k_stride] and input[k], for each panel and lane. The chain may be cut: a later call with resume set goes on
 * from the output; only the last call has the bias (NULL: none is added). n_k may be 0. */
typedef struct lmc_product {
    const void *weights;
    lmc_dtype_t dtype; /* of the weights: binary32, but up to short_lanes */
    ptrdiff_t row_stride, k_stride;
    size_t n_rows, n_k;
    const float *input; /* n_panels of [n_k][LMC_LANES], input_stride floats apart */
    float *output;      /* n_panels of [n_rows][LMC_LANES], output_stride floats apart */
    size_t input_stride, output_stride, n_panels;
    size_t n_lanes;    /* lanes from this one on need not be computed */
    const float *bias; /* [n_rows] */
    int resume;
    /* Weights that will be wanted next, from which these were widened; NULL: nothing is known of them. */
    const char *ahead;
} lmc_product_t;

/* Keys and values of one head of one stream: key j is keys[(j / 16) * head_dim * 16 + d * 16 + j % 16]
 * (blocks of 16 keys, feature-major), value j is values[j * head_dim + d]. */
typedef struct lmc_attention {
    const float *keys, *values;
    const float *ahead; /* for a stream: the keys that will be wanted next, or anything */
    size_t head_dim;
    float scale, floor; /* of lmc_softmax_weight */
} lmc_attention_t;

typedef struct lmc_transformer_kernels {
    void (*product)(const lmc_product_t *product);
    /* product takes float16 and bfloat16 weights of one panel with so many lanes or fewer. */
    size_t short_lanes;
    /* Rows that product likes to have of a single panel's widened weights. */
    size_t tile_rows;
    /* Exact widening of n elements. */
    void (*widen)(const void *source, lmc_dtype_t dtype, size_t n, float *target);
    void (*layer_norm)(const float *input, size_t n_features, const float *gain, const float *bias,
                       float epsilon, float *output);
    void (*gelu)(float *values, size_t n_values);
    /* x += y */
    void (*add)(float *x, const float *y, size_t n_values);
    /* Turns the first 2 * n_pairs features of one head: pair i is features i and i + n_pairs; the angle of a
     * lane is cosines[i * table_stride + lane], sines[...]. */
    void (*rotate)(float *head, size_t n_pairs, const float *cosines, const float *sines,
                   size_t table_stride);
    /* One panel of 16 consecutive queries of one stream: lane i sees the keys before n_before and, of the
     * panel's own n_own keys that follow them, those up to i. scores has room for n_before + n_own keys,
     * rounded up to 16, x 16. */
    void (*attend_panel)(const lmc_attention_t *attention, const float *query, size_t n_before, size_t n_own,
                         float *scores, float *output);
    /* One query that sees n_keys; query and output are contiguous. scores has room for n_keys rounded up
     * to 16. */
    void (*attend_stream)(const lmc_attention_t *attention, const float *query, size_t n_keys, float *scores,
                          float *output);
    /* rows[lane][feature] = panel[feature][lane] for lane < n_lanes. */
    void (*transpose)(const float *panel, size_t n_features, size_t n_lanes, float *const *rows);
} lmc_transformer_kernels_t;

/* Each in kernels_<backend>.c. */
extern const lmc_transformer_kernels_t lmc_transformer_kernels_serial;
#if defined(__x86_64__)
extern const lmc_transformer_kernels_t lmc_transformer_kernels_avx2;
extern const lmc_transformer_kernels_t lmc_transformer_kernels_avx512;
#elif defined(__aarch64__)
extern const lmc_transformer_kernels_t lmc_transformer_kernels_neon;
#endif

#endif

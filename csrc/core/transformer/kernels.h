/* The kernels of the forward pass that a backend brings. A panel holds LMC_LANES tokens,
 * feature-major: panel[feature * LMC_LANES + lane]. Every kernel is one serial program per lane, so that
 * neither the instruction set nor the company that a token keeps can change its bits. */
#ifndef LLMCOMP_CORE_TRANSFORMER_KERNELS_H
#define LLMCOMP_CORE_TRANSFORMER_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/backend_table.h"
#include "core/base/panel.h"
#include "core/base/ieee.h"
#include "llmcomp/transformer.h"

/* output[row] = bias[row] + chain of fma over k, ascending from +0, of weights[row * row_stride + k *
 * k_stride] and input[k], for each panel and lane. The chain may be cut: a later call with resume set goes on
 * from the output; only the last call has the bias (NULL: none is added). n_k may be 0. */
typedef struct lmc_product {
    const void *weights;
    lmc_dtype_t dtype; /* of the weights; 16 bits: one panel of at most lanes_16bit lanes */
    ptrdiff_t row_stride, k_stride;
    size_t n_rows, n_k;
    const float *input; /* n_panels of [n_k][LMC_LANES], input_stride floats apart */
    float *output;      /* n_panels of [n_rows][LMC_LANES], output_stride floats apart */
    size_t input_stride, output_stride, n_panels;
    size_t n_lanes;    /* lanes from this one on need not be computed */
    const float *bias; /* [n_rows] */
    int resume;
    int is_turned; /* the weights are as `turn` leaves them, and n_k is the matrix's */
    /* Weights that will be wanted next, from which these were widened; NULL: nothing is known of them. */
    const char *ahead;
} lmc_product_t;

/* Keys and values of one head of one stream, in a ring of `capacity` keys (a multiple of 16) in which key j
 * is number i = j mod capacity: keys[(i / 16) * head_dim * 16 + d * 16 + i % 16] (blocks of 16 keys,
 * feature-major), values[i * head_dim + d]. A query at position n sees the last `window` keys up to its own,
 * or all where window is 0; the ring holds what its queries see. */
typedef struct lmc_attention {
    const float *keys, *values;
    const float *ahead; /* for a stream: the keys that will be wanted next, or anything */
    size_t head_dim, capacity, window;
    lmc_softmax_rule_t softmax;
} lmc_attention_t;

/* First position that a query at this one sees. */
static inline size_t lmc_first_seen(const lmc_attention_t *attention, size_t position) {
    return attention->window != 0 && position >= attention->window ? position - attention->window + 1 : 0;
}

typedef struct lmc_norm_rule {
    lmc_norm_t norm;
    float epsilon;
} lmc_norm_rule_t;

typedef struct lmc_activation_rule {
    lmc_activation_t activation;
    lmc_xielu_rule_t xielu; /* of that activation alone */
} lmc_activation_rule_t;

typedef struct lmc_transformer_kernels {
    void (*product)(const lmc_product_t *product);
    /* product takes float16 and bfloat16 weights of one panel with so many lanes or fewer. */
    size_t lanes_16bit;
    /* A matrix of 16-bit weights, LMC_TURNED_ROWS rows or a multiple of LMC_TURNED_COLUMNS columns or a
     * multiple, as product likes it best for lanes_16bit lanes or fewer; rows that begin at such a multiple
     * begin where they did. NULL where lanes_16bit is 0. */
    void (*turn)(const void *weights, lmc_dtype_t dtype, size_t n_rows, size_t n_k, void *turned);
    /* Rows that product likes to have of a single panel's widened weights. */
    size_t tile_rows;
    /* Exact widening of n elements. */
    void (*widen)(const void *source, lmc_dtype_t dtype, size_t n, float *target);
    /* Of one panel; output may be the input. */
    void (*normalise)(lmc_norm_rule_t rule, const float *input, size_t n_features, const float *gain,
                      const float *bias, float *output);
    /* values become their activations, times factors unless these are NULL. */
    void (*activate)(lmc_activation_rule_t rule, float *values, const float *factors, size_t n_values);
    /* Values beyond -limit and limit become these. */
    void (*clip)(float *values, size_t n_values, float limit);
    /* Outputs of the head become logits. */
    void (*finish_logits)(float *values, size_t n_values, float multiplier, float cap);
    /* x = fma(y, multiplier, x) */
    void (*add)(float *x, const float *y, float multiplier, size_t n_values);
    /* Turns the first 2 * n_pairs features of one head: pair i is features i and i + n_pairs; the angle of a
     * lane is cosines[i * table_stride + lane], sines[...]. */
    void (*rotate)(float *head, size_t n_pairs, const float *cosines, const float *sines,
                   size_t table_stride);
    /* One panel of n_own <= 16 consecutive queries of one stream, the first at `position`. scores has room
     * for the keys from lmc_first_seen(position) to the last query's, whole blocks of 16, x 16. */
    void (*attend_panel)(const lmc_attention_t *attention, const float *query, size_t position, size_t n_own,
                         float *scores, float *output);
    /* n_queries <= LMC_QUERIES_MAX heads of one token that meet the same keys; queries and outputs are
     * [n_queries][head_dim]. scores has room for the keys from lmc_first_seen(position) to position, whole
     * blocks of 16, x n_queries. */
    void (*attend_stream)(const lmc_attention_t *attention, const float *queries, size_t n_queries,
                          size_t position, float *scores, float *outputs);
    /* rows[lane][feature] = panel[feature][lane] for lane < n_lanes. */
    void (*transpose)(const float *panel, size_t n_features, size_t n_lanes, float *const *rows);
} lmc_transformer_kernels_t;

#define LMC_QUERIES_MAX 4
#define LMC_TURNED_ROWS 16
#define LMC_TURNED_COLUMNS 32

/* Each in kernels_<backend>.c. */
extern const lmc_transformer_kernels_t lmc_transformer_kernels_serial;
#if defined(__x86_64__)
extern const lmc_transformer_kernels_t lmc_transformer_kernels_avx2;
extern const lmc_transformer_kernels_t lmc_transformer_kernels_avx512;
#elif defined(__aarch64__)
extern const lmc_transformer_kernels_t lmc_transformer_kernels_neon;
#endif

#endif

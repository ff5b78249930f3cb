/* The exact engine: the GPT-NeoX forward pass, whose bits depend on the weights and the tokens alone.
 * FORMAT.md has the arithmetic. One pass over whole sequences, one pass that leaves its keys and values in a
 * cache, and steps of many independent streams over that cache give the same bits, for any batch, padding,
 * backend and number of threads. The caller owns all memory; the _bound functions say how much. */
#ifndef LLMCOMP_TRANSFORMER_H
#define LLMCOMP_TRANSFORMER_H

#include <stddef.h>
#include <stdint.h>

#include "llmcomp/backend.h"
#include "llmcomp/intervals.h"
#include "llmcomp/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* hidden = n_heads * head_dim; the first rotary_dims (even) of each head carry the position. */
typedef struct lmc_transformer_config {
    size_t n_layers, n_heads, hidden, intermediate;
    size_t n_embeddings; /* rows of the embedding: tokens lie in [0, n_embeddings) */
    size_t n_logits;     /* rows of the head */
    size_t context_length;
    size_t rotary_dims;
    double rotary_base;
    float layer_norm_epsilon;
    int parallel_residual;
    int int8; /* linear maps and head in 8-bit integers: another arithmetic, with weights from
               * lmc_int8_weights_quantise */
} lmc_transformer_config_t;

/* Elements in row-major order, in the byte order of this machine, aligned for their type. NULL data: all +0
 * (a bias that the model does not have); no matrix is NULL. A matrix with scales, one a row, holds 8-bit
 * codes instead, in rows of a multiple of 16. */
typedef struct lmc_transformer_tensor {
    const void *data;
    lmc_dtype_t dtype;
    const float *scales;
} lmc_transformer_tensor_t;

typedef struct lmc_transformer_layer {
    lmc_transformer_tensor_t attention_norm_gain, attention_norm_bias; /* [hidden] */
    lmc_transformer_tensor_t mlp_norm_gain, mlp_norm_bias;             /* [hidden] */
    lmc_transformer_tensor_t qkv_weight, qkv_bias;                     /* [n_heads][3][head_dim] x [hidden] */
    lmc_transformer_tensor_t dense_weight, dense_bias;                 /* [hidden][hidden] */
    lmc_transformer_tensor_t mlp_in_weight, mlp_in_bias;               /* [intermediate][hidden] */
    lmc_transformer_tensor_t mlp_out_weight, mlp_out_bias;             /* [hidden][intermediate] */
} lmc_transformer_layer_t;

typedef struct lmc_transformer_weights {
    const lmc_transformer_layer_t *layers;           /* [n_layers] */
    lmc_transformer_tensor_t embedding;              /* [n_embeddings][hidden] */
    lmc_transformer_tensor_t final_gain, final_bias; /* [hidden] */
    lmc_transformer_tensor_t head;                   /* [n_logits][hidden] */
} lmc_transformer_weights_t;

/* A model ready to run: the weights where they lie, and the tables made from them. Filled by
 * lmc_transformer_model_init. */
typedef struct lmc_transformer_model {
    lmc_transformer_config_t config;
    lmc_transformer_weights_t weights;
    float *vectors;         /* norms and biases of layer after layer, then the final norm, as binary32 */
    float *cosines, *sines; /* [rotary_dims / 2][table_length] */
    size_t table_length, head_dim;
    float softmax_scale, softmax_floor;
} lmc_transformer_model_t;

/* LMC_ERROR_ARGUMENT if no memory could hold such a model or its sizes do not fit together. */
lmc_status_t lmc_transformer_config_check(const lmc_transformer_config_t *config);
size_t lmc_transformer_tables_bound(const lmc_transformer_config_t *config); /* bytes */
lmc_status_t lmc_transformer_model_init(const lmc_context_t *context, const lmc_transformer_config_t *config,
                                        const lmc_transformer_weights_t *weights, void *tables,
                                        size_t tables_bytes, lmc_transformer_model_t *model);

/* The weights for a config with int8 set: those given, but matrices as 8-bit codes in memory, which must
 * outlive them. layers has room for n_layers and may be those of weights. A row with an infinite or NaN
 * weight gives NaN. */
size_t lmc_int8_weights_bound(const lmc_transformer_config_t *config); /* bytes */
lmc_status_t lmc_int8_weights_quantise(const lmc_context_t *context, const lmc_transformer_config_t *config,
                                       const lmc_transformer_weights_t *weights, void *memory,
                                       size_t memory_bytes, lmc_transformer_layer_t *layers,
                                       lmc_transformer_weights_t *quantised);

/* Where a pass puts what it finds; row (s, t) belongs to the token after token t of sequence s. Either
 * logits, or for targets the number of lmc_log2_softmax or the three of lmc_intervals; arrays are
 * [n_sequences][row_stride] like the tokens. Logits that are not wanted exist a block of rows at a time. */
typedef struct lmc_transformer_sink {
    float *logits; /* [n_sequences][row_stride][n_logits] or NULL */
    const int64_t *targets;
    double *log2_probabilities; /* NULL: intervals */
    uint64_t *start, *freq, *total;
    size_t vocab_size; /* symbols that get probability: the first vocab_size logits */
} lmc_transformer_sink_t;

typedef struct lmc_transformer_batch {
    const int64_t *tokens; /* [n_sequences][row_stride] */
    const size_t *lengths; /* [n_sequences], each <= n_tokens; NULL: all n_tokens */
    size_t n_sequences, n_tokens, row_stride;
} lmc_transformer_batch_t;

/* Sequences from their first position on. On LMC_ERROR_TOKEN (a token or a target) and on the errors of
 * lmc_intervals, *error_row is sequence * row_stride + t. Rows at and beyond a sequence's length are not
 * written. The bound is larger for a sink with targets. */
size_t lmc_transformer_pass_bound(const lmc_transformer_config_t *config, size_t n_sequences, size_t n_tokens,
                                  size_t n_slots, int has_targets);
lmc_status_t lmc_transformer_pass(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                  const lmc_transformer_batch_t *batch, const lmc_transformer_sink_t *sink,
                                  void *workspace, size_t workspace_bytes, size_t *error_row);

/* Keys and values of n_streams independent streams. positions[s] is the number of tokens that stream s has
 * seen: set it to 0 to start stream s again, or to anything smaller to go back. Nothing else in it is the
 * caller's business. */
typedef struct lmc_transformer_cache {
    float *keys, *values;
    size_t *positions;
    size_t n_streams, capacity; /* capacity: tokens a stream can hold, a multiple of 16 */
} lmc_transformer_cache_t;

/* Memory from calloc is best: pages that no token has reached are never touched. For n_tokens <=
 * context_length; the bound is SIZE_MAX where no memory is large enough. */
size_t lmc_transformer_cache_bound(const lmc_transformer_config_t *config, size_t n_streams, size_t n_tokens);
lmc_status_t lmc_transformer_cache_init(const lmc_transformer_config_t *config, size_t n_streams,
                                        size_t n_tokens, void *memory, size_t memory_bytes,
                                        lmc_transformer_cache_t *cache);

/* Appends n_tokens >= 1 tokens to one stream; logits [n_logits] follow the last one (NULL: not wanted).
 * LMC_ERROR_CAPACITY if the stream would outgrow the cache or the context; on an error the stream is as
 * before. */
size_t lmc_transformer_prefill_bound(const lmc_transformer_config_t *config, size_t n_tokens, size_t n_slots);
lmc_status_t lmc_transformer_prefill(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                     lmc_transformer_cache_t *cache, size_t stream, const int64_t *tokens,
                                     size_t n_tokens, float *logits, void *workspace, size_t workspace_bytes,
                                     size_t *error_row);

/* Appends one token to every stream that is active (NULL: all); logits [n_streams][n_logits], rows of streams
 * that are not active are not written. *error_row is the stream. */
size_t lmc_transformer_step_bound(const lmc_transformer_config_t *config, size_t n_streams, size_t n_slots);
lmc_status_t lmc_transformer_step(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                  lmc_transformer_cache_t *cache, const int64_t *tokens,
                                  const uint8_t *active, float *logits, void *workspace,
                                  size_t workspace_bytes, size_t *error_row);

#ifdef __cplusplus
}
#endif

#endif

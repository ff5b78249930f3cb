/* The exact engine: the forward pass of decoder-only transformers, whose bits depend on the weights and the
 * tokens alone. One graph with switches computes all of them; GPT-NeoX is one setting of these.
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

/* A model with other layers is none of this family; far above any model. */
#define LMC_LAYERS_MAX 4096
#define LMC_LAYER_KINDS_MAX 4

/* The switches: FORMAT.md, section 4, says what each of them computes. */

typedef enum lmc_norm { LMC_NORM_LAYER, LMC_NORM_RMS } lmc_norm_t;

/* Norms of queries and keys, of the model's kind: of a head's features with the gains of one head or with
 * gains of its own for each head, or of the features of all heads together. */
typedef enum lmc_qk_norm {
    LMC_QK_NORM_NONE,
    LMC_QK_NORM_HEAD,
    LMC_QK_NORM_EACH_HEAD,
    LMC_QK_NORM_FULL
} lmc_qk_norm_t;

typedef enum lmc_activation {
    LMC_ACTIVATION_GELU,
    LMC_ACTIVATION_GELU_TANH,
    LMC_ACTIVATION_SILU,
    LMC_ACTIVATION_RELU,
    LMC_ACTIVATION_RELU_SQUARED,
    LMC_ACTIVATION_XIELU
} lmc_activation_t;

typedef enum lmc_rotary_scaling {
    LMC_ROTARY_PLAIN,
    LMC_ROTARY_LINEAR,
    LMC_ROTARY_LLAMA3,
    LMC_ROTARY_YARN
} lmc_rotary_scaling_t;

/* Rotary positions: of each head the first dims features (an even number; 0: none), in halves. Of the rest,
 * a kind of scaling reads what is its own. */
typedef struct lmc_rotary {
    size_t dims;
    lmc_rotary_scaling_t scaling;
    double base;
    double factor;               /* linear, llama3, yarn */
    double original_length;      /* llama3, yarn */
    double low_factor;           /* llama3 */
    double high_factor;          /* llama3 */
    double beta_fast, beta_slow; /* yarn */
    double attention_factor;     /* yarn; 0: by the factor */
    int truncate;                /* yarn */
} lmc_rotary_t;

/* Layers of one kind see the last `window` tokens, their own among them (0: all), and have one table of
 * positions. */
typedef struct lmc_layer_kind {
    size_t window;
    lmc_rotary_t rotary;
} lmc_layer_kind_t;

/* Booleans are 0 or 1. */
typedef struct lmc_transformer_config {
    size_t n_layers, hidden, intermediate;
    size_t n_heads, n_kv_heads, head_dim; /* n_heads is a multiple of n_kv_heads */
    size_t n_embeddings;                  /* rows of the embedding: tokens lie in [0, n_embeddings) */
    size_t n_logits;                      /* rows of the head */
    size_t context_length;
    int learned_positions; /* added to the embedding */
    int head_bias;
    float embedding_multiplier, residual_multiplier, logits_multiplier;
    float logits_cap; /* 0: none */

    lmc_norm_t norm;
    float norm_epsilon;
    int norm_offset;         /* gains are 1 + what is stored */
    int pre_norm, post_norm; /* before, after attention and MLP; one of them at least */
    int parallel_residual;   /* needs pre_norm alone */
    int shared_norm;         /* of a parallel residual: the MLP reads what the attention reads */

    int fused_qkv;  /* one matrix [n_heads][3][head_dim] x [hidden] instead of three; n_kv_heads = n_heads */
    float qkv_clip; /* 0: none */
    lmc_qk_norm_t qk_norm;
    double attention_divisor;    /* scores are divided by its root, */
    double attention_multiplier; /* or multiplied by this, unless it is 0 */
    float score_cap;             /* 0: none */
    size_t n_kinds;
    lmc_layer_kind_t kinds[LMC_LAYER_KINDS_MAX];
    uint8_t layer_kinds[LMC_LAYERS_MAX]; /* the kind of every layer */

    lmc_activation_t activation;
    int gated; /* down(activation(gate(x)) * up(x)) instead of down(activation(up(x))) */

    int int8; /* linear maps and head in 8-bit integers: another arithmetic, with weights from
               * lmc_int8_weights_quantise */
} lmc_transformer_config_t;

/* Weights have named places: X(NAME, name). */
#define LMC_MODEL_SLOTS(X)                                                                                   \
    X(EMBEDDING, embedding)             /* [n_embeddings][hidden] */                                         \
    X(POSITIONS, positions)             /* [context_length][hidden] */                                       \
    X(FINAL_NORM_GAIN, final_norm_gain) /* [hidden] */                                                       \
    X(FINAL_NORM_BIAS, final_norm_bias)                                                                      \
    X(HEAD, head)           /* [n_logits][hidden] */                                                         \
    X(HEAD_BIAS, head_bias) /* [n_logits] */
#define LMC_LAYER_SLOTS(X)                                                                                   \
    X(ATTENTION_NORM_GAIN, attention_norm_gain) /* [hidden] */                                               \
    X(ATTENTION_NORM_BIAS, attention_norm_bias)                                                              \
    X(QKV, qkv) /* with fused_qkv */                                                                         \
    X(QKV_BIAS, qkv_bias)                                                                                    \
    X(Q, q) /* [n_heads * head_dim][hidden], without */                                                      \
    X(Q_BIAS, q_bias)                                                                                        \
    X(K, k) /* [n_kv_heads * head_dim][hidden] */                                                            \
    X(K_BIAS, k_bias)                                                                                        \
    X(V, v)                                                                                                  \
    X(V_BIAS, v_bias)                                                                                        \
    X(Q_NORM_GAIN, q_norm_gain) /* [head_dim], or [n_heads * head_dim] */                                    \
    X(Q_NORM_BIAS, q_norm_bias)                                                                              \
    X(K_NORM_GAIN, k_norm_gain)                                                                              \
    X(K_NORM_BIAS, k_norm_bias)                                                                              \
    X(OUT, out) /* [hidden][n_heads * head_dim] */                                                           \
    X(OUT_BIAS, out_bias)                                                                                    \
    X(ATTENTION_POST_NORM_GAIN, attention_post_norm_gain) /* [hidden] */                                     \
    X(ATTENTION_POST_NORM_BIAS, attention_post_norm_bias)                                                    \
    X(MLP_NORM_GAIN, mlp_norm_gain) /* [hidden] */                                                           \
    X(MLP_NORM_BIAS, mlp_norm_bias)                                                                          \
    X(GATE, gate) /* [intermediate][hidden] */                                                               \
    X(GATE_BIAS, gate_bias)                                                                                  \
    X(UP, up) /* [intermediate][hidden] */                                                                   \
    X(UP_BIAS, up_bias)                                                                                      \
    X(DOWN, down) /* [hidden][intermediate] */                                                               \
    X(DOWN_BIAS, down_bias)                                                                                  \
    X(MLP_POST_NORM_GAIN, mlp_post_norm_gain) /* [hidden] */                                                 \
    X(MLP_POST_NORM_BIAS, mlp_post_norm_bias)                                                                \
    X(ACTIVATION, activation) /* [4], of xIELU */

#define LMC_SLOT_OF_MODEL(NAME, name) LMC_MODEL_##NAME,
#define LMC_SLOT_OF_LAYER(NAME, name) LMC_LAYER_##NAME,
typedef enum lmc_model_slot { LMC_MODEL_SLOTS(LMC_SLOT_OF_MODEL) LMC_MODEL_SLOT_COUNT } lmc_model_slot_t;
typedef enum lmc_layer_slot { LMC_LAYER_SLOTS(LMC_SLOT_OF_LAYER) LMC_LAYER_SLOT_COUNT } lmc_layer_slot_t;

/* What belongs into a slot: n_rows = 0 says nothing, n_columns = 0 a vector of n_rows elements. */
typedef struct lmc_shape {
    size_t n_rows, n_columns;
} lmc_shape_t;
lmc_shape_t lmc_model_slot_shape(const lmc_transformer_config_t *config, lmc_model_slot_t slot);
lmc_shape_t lmc_layer_slot_shape(const lmc_transformer_config_t *config, lmc_layer_slot_t slot);

/* Elements in row-major order, in the byte order of this machine, aligned for their type. NULL data: a gain
 * of ones or a bias of +0, which the model does not have, or an empty slot; no matrix is NULL. A matrix with
 * scales, one a row, holds 8-bit codes instead, in rows of a multiple of 16. is_turned is the core's own: 0.
 */
typedef struct lmc_transformer_tensor {
    const void *data;
    lmc_dtype_t dtype;
    const float *scales;
    int is_turned;
} lmc_transformer_tensor_t;

typedef struct lmc_transformer_layer {
    lmc_transformer_tensor_t slots[LMC_LAYER_SLOT_COUNT];
} lmc_transformer_layer_t;

typedef struct lmc_transformer_weights {
    const lmc_transformer_layer_t *layers; /* [n_layers] */
    lmc_transformer_tensor_t slots[LMC_MODEL_SLOT_COUNT];
} lmc_transformer_weights_t;

/* How scores become weights: lmc_softmax_weight with scale and floor; before that, where cap_scale is not 0,
 * tanh(score * cap_scale). */
typedef struct lmc_softmax_rule {
    float scale, floor, cap_scale;
} lmc_softmax_rule_t;

/* A model ready to run: the weights where they lie, and the tables made from them. Filled by
 * lmc_transformer_model_init. */
typedef struct lmc_transformer_model {
    lmc_transformer_config_t config;
    lmc_transformer_weights_t weights;
    /* Vectors as binary32: those of layer after layer, then the model's; gains as they are multiplied with.
     */
    float *vectors;
    size_t layer_vectors_length, layer_vector_offsets[LMC_LAYER_SLOT_COUNT],
        model_vector_offsets[LMC_MODEL_SLOT_COUNT];
    /* [dims / 2][table_length], of every kind of layer; kinds with equal positions share them. */
    float *cosines[LMC_LAYER_KINDS_MAX], *sines[LMC_LAYER_KINDS_MAX];
    size_t table_length;
    lmc_softmax_rule_t softmax;
} lmc_transformer_model_t;

/* Which version of the arithmetic computes such a model: 1 for GPT-NeoX, 2 where any switch is set that
 * version 1 lacks. */
int lmc_transformer_arithmetic(const lmc_transformer_config_t *config);

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
 * seen: set it to 0 to start stream s again, or, where no layer has a window, to anything smaller to go back.
 * Layers with a window keep little more than that of a stream. Nothing else in it is the caller's business.
 */
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

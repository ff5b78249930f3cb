/* Between transformer.cu, which says what runs in which order, and the kernels of this folder: the arguments
 * of their launchers, and what all kernels share. Not for users of the library. */
#ifndef LLMCOMP_CUDA_TRANSFORMER_LAUNCH_H
#define LLMCOMP_CUDA_TRANSFORMER_LAUNCH_H

#include <cuda_runtime.h>

#include "cuda/coding/report.h"
#include "cuda/transformer/transformer.h"

/* Shared memory whose size is an argument of the launch. */
#if !defined(LMC_DYNAMIC_SHARED)
#define LMC_DYNAMIC_SHARED(TYPE, NAME) extern __shared__ TYPE NAME[]
#endif

/* The position of a row that takes no part. */
#define LMC_NO_POSITION UINT32_MAX

/* What becomes of the outputs y of a product where more is asked than a bias, the exact GELU and addends; in
 * this order: clipped, activated and then multiplied by factors, scaled and capped as logits. */
typedef struct lmc_cuda_finish {
    float clip; /* 0: none */
    bool is_activated, are_logits;
    lmc_activation_t activation;
    const float *xielu;   /* the four numbers of lmc_xielu_rule_t, of that activation alone */
    const float *factors; /* [n_tokens][n_rows], which may be the output; NULL: none */
    float logits_multiplier, logits_cap;
} lmc_cuda_finish_t;

/* Matrix product: output[t][i] = chain(weights[i], input[t]; n_k), then, where they are wanted and in this
 * order: + bias[i]; with a finish, that, and else GELU, + addends[0][t][i], fma(it, multiplier,
 * addends[1][t][i]). An addend may be the output. */
typedef struct lmc_cuda_product {
    const void *weights; /* [n_rows][n_k] of dtype */
    const float *input;  /* [n_tokens][n_k] */
    const float *bias, *addends[2];
    float multiplier;
    float *output; /* [n_tokens][n_rows] */
    uint32_t n_tokens, n_rows, n_k;
    lmc_dtype_t dtype;
    bool with_gelu, with_finish;
    lmc_cuda_finish_t finish;
    const float *scales; /* [n_rows] of weights that are codes, in place of dtype; else NULL */
} lmc_cuda_product_t;

cudaError_t lmc_cuda_product(const lmc_cuda_product_t &product, lmc_cuda_stream_t stream);

/* 8-bit codes of rows of numbers, each filled with zeros to lmc_int8_padded(n_k), and a scale a row. */
typedef struct lmc_cuda_codes {
    int8_t *codes; /* aligned to 16 bytes */
    float *scales;
} lmc_cuda_codes_t;

/* rows: [n_rows][n_k] of dtype. */
cudaError_t lmc_cuda_int8_quantise(const void *rows, lmc_dtype_t dtype, uint32_t n_rows, uint32_t n_k,
                                   const lmc_cuda_codes_t &codes, lmc_cuda_stream_t stream);
/* The product of codes, each sum as FORMAT.md, section 4.7, makes it a number; then on as lmc_cuda_product.
 * input: the codes of product.input, which is not read. */
cudaError_t lmc_cuda_int8_product(const lmc_cuda_product_t &product, const lmc_cuda_codes_t &input,
                                  lmc_cuda_stream_t stream);

/* Rows: which stream and position each is, its embedding, its norm. */

cudaError_t lmc_cuda_rows_of_pass(const lmc_cuda_transformer_batch_t &batch,
                                  const lmc_cuda_transformer_cache_t &cache, bool keeps_positions,
                                  uint32_t n_positions, const lmc_cuda_transformer_work_t &work,
                                  uint64_t *error, lmc_cuda_stream_t stream);
cudaError_t lmc_cuda_rows_of_step(const uint32_t *streams, const int32_t *tokens, uint32_t n_rows,
                                  uint32_t n_embeddings, const lmc_cuda_transformer_cache_t &cache,
                                  uint32_t n_positions, const lmc_cuda_transformer_work_t &work,
                                  uint64_t *error, lmc_cuda_stream_t stream);

/* output = embedding[token] * multiplier, + positions[row_positions[row]] where there are such. A token that
 * is not one becomes token 0; error (NULL: not wanted) says which row had it. */
typedef struct lmc_cuda_embedding {
    lmc_transformer_tensor_t tokens, positions; /* [n_embeddings], [n_positions][n_features]; or NULL data */
    float multiplier;
    uint32_t n_embeddings, n_positions, n_features, n_rows;
    float *output; /* [n_rows][n_features] */
} lmc_cuda_embedding_t;
cudaError_t lmc_cuda_embed(const lmc_cuda_embedding_t &embedding, const int32_t *tokens,
                           const uint32_t *row_positions, uint64_t *error, lmc_cuda_stream_t stream);

/* One or two norms of the same rows, which differ in gain and bias; a second output of NULL: one. Rows of
 * input and outputs begin `stride` floats apart, and an only output may be the input. is_added: the only
 * output is fma(norm, multiplier, output). */
typedef struct lmc_cuda_norm {
    lmc_norm_t kind;
    const float *input;
    const float *gains[2], *biases[2]; /* [n_gains][n_features]: row i has those of i % n_gains */
    float *outputs[2];
    uint32_t n_rows, n_features, stride, n_gains;
    float epsilon;
    bool is_added;
    float multiplier;
} lmc_cuda_norm_t;
cudaError_t lmc_cuda_norm(const lmc_cuda_norm_t &norm, lmc_cuda_stream_t stream);

/* *error = min(*error, *found moved on by first_row rows). */
cudaError_t lmc_cuda_error_merge(const uint64_t *found, uint32_t first_row, uint64_t *error,
                                 lmc_cuda_stream_t stream);
cudaError_t lmc_cuda_chain_log(const lmc_cuda_transformer_chain_t &chain, lmc_cuda_stream_t stream);

/* Attention of one layer. The cache is a ring of `capacity` keys, a multiple of 32, for every stream and key
 * head, in which key j is number i = j % capacity. keys: [stream][key head][block of 32 keys][quad][32
 * keys][4 features of the quad]; values: [stream][key head][key][n_quads * 4]. Features that fill up the last
 * quad are 0: they can only turn a score of -0 into +0, which no weight notices. A query sees the last
 * `window` keys up to its own, or all where that is 0. */
typedef struct lmc_cuda_attention {
    float *keys, *values;               /* of the layer */
    float *queries;                     /* of a row: n_heads, each query_head floats from the one before */
    const float *new_keys, *new_values; /* of a row: n_kv_heads, each key_head floats apart */
    uint32_t query_row, query_head;     /* floats from a row, or a head, to the next */
    uint32_t key_row, key_head;
    float *output; /* [n_rows][n_heads][head_dim] */
    float *scores; /* of steps, where shared memory does not hold them: [n_rows][n_heads][score_length] */
    const uint32_t *row_streams, *row_positions;
    const float *cosines, *sines; /* [n_pairs][table_length] */
    uint32_t table_length, n_pairs;
    uint32_t n_rows, n_heads, n_kv_heads, head_dim, n_quads;
    uint32_t capacity, n_positions; /* n_positions: those of a stream that are in use at most */
    uint32_t window;
    lmc_softmax_rule_t softmax;
} lmc_cuda_attention_t;

/* Queries of a row that one block of a step computes, all of which meet the same keys: 1, 2 or 4, of wide
 * heads, whose threads have more features, at most 2. */
#define LMC_CUDA_STEP_FEATURES 128
static inline uint32_t lmc_cuda_step_queries(uint32_t n_heads, uint32_t n_kv_heads, uint32_t head_dim) {
    uint32_t n_shared = n_heads / n_kv_heads;
    return n_shared <= 2 ? n_shared : head_dim <= LMC_CUDA_STEP_FEATURES ? 4 : 2;
}
/* Scores that a query can have, rounded up to a multiple of 4; capacity is one. */
static inline uint32_t lmc_cuda_score_length(uint32_t window, uint32_t capacity) {
    return window != 0 && window < capacity ? (window + 3) / 4 * 4 : capacity;
}
/* Do the queries and scores of a block of a step find room in shared memory? What a block has without asking
 * is 48 KiB; 12 KiB are stages of values, and a little is for maxima. */
static inline bool lmc_cuda_scores_are_shared(uint32_t n_queries, uint32_t n_quads, uint32_t score_length) {
    return (size_t)n_queries * (4 * n_quads + score_length) <= 9 * 1024 - 32;
}

/* Turns queries, in place, and keys, and puts keys and values into the cache. */
cudaError_t lmc_cuda_attention_place(const lmc_cuda_attention_t &attention, lmc_cuda_stream_t stream);
cudaError_t lmc_cuda_attend_pass(const lmc_cuda_attention_t &attention, const uint32_t *row_begin,
                                 uint32_t n_stretches, uint32_t n_longest, lmc_cuda_stream_t stream);
cudaError_t lmc_cuda_attend_step(const lmc_cuda_attention_t &attention, lmc_cuda_stream_t stream);

/* What every kernel's file needs. */

template <typename... PARAMETERS, typename... ARGUMENTS>
cudaError_t launch_blocks(void (*kernel)(PARAMETERS...), uint64_t n_blocks, unsigned n_threads,
                          size_t shared_bytes, lmc_cuda_stream_t stream, ARGUMENTS... arguments) {
    if (n_blocks == 0) return cudaSuccess;
    if (n_blocks > (uint64_t)INT32_MAX) return cudaErrorInvalidValue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)n_blocks);
    config.blockDim = dim3(n_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/* Lanes of a warp over a tile of 8 by 4: lanes that differ in their lowest bit (or in the one above) share an
 * address of each operand, which is when 16-byte loads of a half-warp from shared memory take one turn, not
 * two. */
static inline __device__ unsigned lane_of_8(unsigned lane) {
    return lane >> 1 & 7;
}

static inline __device__ unsigned lane_of_4(unsigned lane) {
    return (lane & 1) | (lane >> 4) << 1;
}

#endif

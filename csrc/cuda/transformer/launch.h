/* Between transformer.cu, which says what runs in which order, and the kernels of this folder: the arguments
 * of their launchers, and what all kernels share. Not for users of the library. */
#ifndef LLMCOMP_CUDA_TRANSFORMER_LAUNCH_H
#define LLMCOMP_CUDA_TRANSFORMER_LAUNCH_H

#include <cuda_runtime.h>

#include "cuda/coding/report.h"
#include "cuda/transformer/transformer.h"

/* Shared memory whose size the launcher tells. */
#if !defined(LMC_DYNAMIC_SHARED)
#define LMC_DYNAMIC_SHARED(TYPE, NAME) extern __shared__ TYPE NAME[]
#endif

/* The position of a row that takes no part. */
#define LMC_NO_POSITION UINT32_MAX

/* Matrix product: output[t][i] = chain(weights[i], input[t]; n_k), then, where they are wanted and in this
 * order: + bias[i], GELU, + addends[0][t][i], + addends[1][t][i]. An addend may be the output. */
typedef struct lmc_cuda_product {
    const void *weights; /* [n_rows][n_k] of dtype */
    const float *input;  /* [n_tokens][n_k] */
    const float *bias, *addends[2];
    float *output; /* [n_tokens][n_rows] */
    uint32_t n_tokens, n_rows, n_k;
    lmc_dtype_t dtype;
    bool with_gelu;
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

/* A token that is not one becomes token 0; error (NULL: not wanted) tells which row had it. */
cudaError_t lmc_cuda_embed(const lmc_transformer_tensor_t &embedding, uint32_t n_embeddings,
                           uint32_t n_features, const int32_t *tokens, uint32_t n_rows, float *output,
                           uint64_t *error, lmc_cuda_stream_t stream);

/* One or two norms of the same rows, which differ in gain and bias; a second output of NULL: one. */
typedef struct lmc_cuda_norm {
    const float *input; /* [n_rows][n_features] */
    const float *gains[2], *biases[2];
    float *outputs[2];
    uint32_t n_rows, n_features;
    float epsilon;
} lmc_cuda_norm_t;
cudaError_t lmc_cuda_norm(const lmc_cuda_norm_t &norm, lmc_cuda_stream_t stream);

/* *error = min(*error, *found moved on by first_row rows). */
cudaError_t lmc_cuda_error_merge(const uint64_t *found, uint32_t first_row, uint64_t *error,
                                 lmc_cuda_stream_t stream);
cudaError_t lmc_cuda_chain_log(const lmc_cuda_transformer_chain_t &chain, lmc_cuda_stream_t stream);

/* Attention of one layer. keys: [stream][head][block of 32 keys][quad][32 keys][4 features of the quad];
 * values: [stream][head][key][n_quads * 4]. Features that fill up the last quad are 0: they can only turn a
 * score of -0 into +0, which no weight notices. */
typedef struct lmc_cuda_attention {
    float *keys, *values; /* of the layer */
    float *qkv;           /* [n_rows][n_heads][query, key, value][head_dim] */
    float *output;        /* [n_rows][n_heads][head_dim] */
    const uint32_t *row_streams, *row_positions;
    const float *cosines, *sines; /* [n_pairs][table_length] */
    uint32_t table_length, n_pairs;
    uint32_t n_rows, n_heads, head_dim, n_quads;
    uint32_t capacity, n_positions; /* keys that a head has room for; those that are in use at most */
    float scale, floor;
} lmc_cuda_attention_t;

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

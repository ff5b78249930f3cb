/* What both kinds of attention share: where keys and values lie in the cache, which keys a query sees, and
 * the chain of a score. */
#ifndef LLMCOMP_CUDA_TRANSFORMER_ATTENTION_CACHE_H
#define LLMCOMP_CUDA_TRANSFORMER_ATTENTION_CACHE_H

#include "cuda/transformer/launch.h"
#include "cuda/coding/row_tiles.h"
#include "cuda/coding/warp.h"

static constexpr unsigned ATTENTION_THREADS = 128;
static constexpr unsigned KEY_BLOCK = 32; /* keys of a block of the cache; keys and queries of a tile */
static constexpr float SCORE_LOWEST = -INFINITY;
/* For newer devices the compiler takes more registers and would spill: so many blocks fewer shall fit a
 * multiprocessor. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
static constexpr unsigned BLOCKS_FEWER = 1;
#else
static constexpr unsigned BLOCKS_FEWER = 0;
#endif

/* Features of a head in the cache, with those that fill up the last quad. */
static __device__ __forceinline__ size_t padded_features(const lmc_cuda_attention_t &a) {
    return (size_t)a.n_quads * 4;
}

static __device__ __forceinline__ size_t head_offset(const lmc_cuda_attention_t &a, uint32_t stream,
                                                     uint32_t kv_head) {
    return ((size_t)stream * a.n_kv_heads + kv_head) * a.capacity * padded_features(a);
}

static __device__ __forceinline__ float chain_quad(float4 key, float4 query, float chain) {
    chain = lmc_fma(key.x, query.x, chain);
    chain = lmc_fma(key.y, query.y, chain);
    chain = lmc_fma(key.z, query.z, chain);
    return lmc_fma(key.w, query.w, chain);
}

/* The first position that a query at this one sees. */
static __device__ __forceinline__ uint32_t first_seen(const lmc_cuda_attention_t &a, uint32_t position) {
    return a.window != 0 && position >= a.window ? position - a.window + 1 : 0;
}

/* A chain becomes the score that the softmax takes. */
static __device__ __forceinline__ float capped_score(const lmc_cuda_attention_t &a, float chain) {
    return a.softmax.cap_scale == 0.0f ? chain : lmc_tanh(lmc_mul(chain, a.softmax.cap_scale));
}

static __device__ __forceinline__ float weight_of(const lmc_cuda_attention_t &a, float score, float maximum) {
    return lmc_softmax_weight(score, maximum, a.softmax.scale, a.softmax.floor);
}

/* Every query has keys of its own, sees all of them, without a cap: what GPT-NeoX needs, and kernels of their
 * own compute with less. */
static inline bool is_plain(const lmc_cuda_attention_t &a) {
    return a.n_kv_heads == a.n_heads && a.window == 0 && a.softmax.cap_scale == 0.0f;
}

#endif

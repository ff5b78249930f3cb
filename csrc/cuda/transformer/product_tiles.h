/* What the two matrix products share: how long their tiles are expected to take, and what becomes of a sum.
 */
#ifndef LLMCOMP_CUDA_TRANSFORMER_PRODUCT_TILES_H
#define LLMCOMP_CUDA_TRANSFORMER_PRODUCT_TILES_H

#include "cuda/transformer/launch.h"
#include "cuda/coding/row_tiles.h"

static __device__ __forceinline__ float activated(const lmc_cuda_finish_t &finish, float x) {
    switch (finish.activation) {
    case LMC_ACTIVATION_GELU:
        return lmc_gelu(x);
    case LMC_ACTIVATION_GELU_TANH:
        return lmc_gelu_tanh(x);
    case LMC_ACTIVATION_SILU:
        return lmc_silu(x);
    case LMC_ACTIVATION_RELU:
        return lmc_relu(x);
    case LMC_ACTIVATION_RELU_SQUARED:
        return lmc_relu_squared(x);
    default: {
        const lmc_xielu_rule_t rule = {finish.xielu[0], finish.xielu[1], finish.xielu[2], finish.xielu[3]};
        return lmc_xielu(x, rule);
    }
    }
}

static __device__ __forceinline__ float finished(const lmc_cuda_finish_t &finish, size_t at, float x) {
    if (finish.clip != 0.0f) x = lmc_clip(x, finish.clip);
    if (finish.is_activated) x = activated(finish, x);
    if (finish.factors != nullptr) x = lmc_mul(x, finish.factors[at]);
    if (!finish.are_logits) return x;
    return finish.logits_cap == 0.0f ? lmc_mul(x, finish.logits_multiplier)
                                     : lmc_capped_logit(x, finish.logits_multiplier, finish.logits_cap);
}

/* HAS_FINISH: with_finish of the product. A thread calls this for one output after the other then, since what
 * a finish may be is long. */
template <bool HAS_FINISH>
static __device__ __forceinline__ void store_output(const lmc_cuda_product_t &p, size_t token, size_t row,
                                                    float sum) {
    if (token >= p.n_tokens || row >= p.n_rows) return;
    size_t at = token * p.n_rows + row;
    if (p.bias != nullptr) sum = lmc_add(sum, p.bias[row]);
    if (HAS_FINISH) {
        sum = finished(p.finish, at, sum);
    } else {
        if (p.with_gelu) sum = lmc_gelu(sum);
        if (p.addends[0] != nullptr) sum = lmc_add(sum, p.addends[0][at]);
        if (p.addends[1] != nullptr) sum = lmc_fma(sum, p.multiplier, p.addends[1][at]);
    }
    p.output[at] = sum;
}

static inline cudaError_t count_processors(int *n_processors) {
    int device;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(n_processors, cudaDevAttrMultiProcessorCount, device);
    return status;
}

template <class TILE> uint64_t count_tiles(const lmc_cuda_product_t &p) {
    return (uint64_t)((p.n_tokens + TILE::N_TOKENS - 1) / TILE::N_TOKENS) *
           ((p.n_rows + TILE::N_ROWS - 1) / TILE::N_ROWS);
}

/* Outputs that a multiprocessor works on one after the other, over the share of its speed that a tile is
 * expected to reach. The shares are estimates; they choose between ways to the same bits. */
template <class TILE> double estimate_time(const lmc_cuda_product_t &p, int n_processors, double share) {
    uint64_t n_rounds = (count_tiles<TILE>(p) + (uint64_t)n_processors - 1) / (uint64_t)n_processors;
    return (double)(n_rounds * TILE::N_TOKENS * TILE::N_ROWS) / share;
}

#endif

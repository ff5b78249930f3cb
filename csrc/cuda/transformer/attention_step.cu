/* Attention of a step: one query a row and head, whose scores wait in memory, since the maximum must be known
 * before the first weight. A block computes one query, or up to four that meet the same keys and read them
 * together. */
#include <cuda_pipeline_primitives.h>

#include "cuda/transformer/attention_cache.h"

namespace {

/* What a block computes: `n` queries from `head` on, over n_keys keys of which the first is number first_slot
 * of the ring. */
struct step_place_t {
    uint32_t row, stream, head, kv_head, n, position, first_slot, n_keys;
};

/* IS_PLAIN: attention as is_plain says. */
template <unsigned QUERIES, bool IS_PLAIN>
__device__ __forceinline__ step_place_t place_of_block(const lmc_cuda_attention_t &a) {
    step_place_t at = {};
    if (IS_PLAIN) {
        at.row = blockIdx.x / a.n_heads;
        at.head = at.kv_head = blockIdx.x % a.n_heads;
        at.n = 1;
    } else {
        uint32_t n_shared = a.n_heads / a.n_kv_heads, n_parts = (n_shared + QUERIES - 1) / QUERIES;
        uint32_t first_of_part = blockIdx.x % n_parts * QUERIES;
        at.row = blockIdx.x / n_parts / a.n_kv_heads;
        at.kv_head = blockIdx.x / n_parts % a.n_kv_heads;
        at.head = at.kv_head * n_shared + first_of_part;
        at.n = min(QUERIES, n_shared - first_of_part);
    }
    at.position = a.row_positions[at.row];
    at.stream = a.row_streams[at.row];
    uint32_t first = IS_PLAIN ? 0 : first_seen(a, at.position);
    at.first_slot = IS_PLAIN ? 0 : first % a.capacity;
    at.n_keys = at.position + 1 - first;
    return at;
}

/* Quads of a key that a thread has on the way at once: the chains hide nothing, and there may be few other
 * threads. Whole batches have no condition on each load, which the compiler would wait for. */
constexpr unsigned LOADS = 8;

/* Scores of all keys, one key a lane, and the largest of those that this thread found. queries:
 * [QUERIES][n_quads]; scores: of each query, `apart` floats apart. */
template <unsigned QUERIES, bool IS_PLAIN>
__device__ __forceinline__ void score_keys(const lmc_cuda_attention_t &a, const step_place_t &at,
                                           const float4 *keys, const float4 *queries, float *scores,
                                           uint32_t apart, float (&maxima)[QUERIES]) {
#pragma unroll
    for (unsigned q = 0; q < QUERIES; q++)
        maxima[q] = SCORE_LOWEST;
    for (uint32_t i = threadIdx.x; i < at.n_keys; i += ATTENTION_THREADS) {
        uint32_t slot = at.first_slot + i;
        if (!IS_PLAIN && slot >= a.capacity) slot -= a.capacity;
        const float4 *of_key = keys + (size_t)(slot / KEY_BLOCK) * a.n_quads * KEY_BLOCK + slot % KEY_BLOCK;
        float chains[QUERIES] = {};
        uint32_t quad = 0;
#pragma unroll 1
        for (; quad + LOADS <= a.n_quads; quad += LOADS, of_key += LOADS * KEY_BLOCK) {
            float4 loaded[LOADS];
#pragma unroll
            for (uint32_t j = 0; j < LOADS; j++)
                loaded[j] = of_key[j * KEY_BLOCK];
#pragma unroll
            for (uint32_t j = 0; j < LOADS; j++) {
#pragma unroll
                for (unsigned q = 0; q < QUERIES; q++)
                    chains[q] = chain_quad(loaded[j], queries[q * a.n_quads + quad + j], chains[q]);
            }
        }
#pragma unroll 1
        for (; quad < a.n_quads; quad++, of_key += KEY_BLOCK) {
#pragma unroll
            for (unsigned q = 0; q < QUERIES; q++)
                chains[q] = chain_quad(*of_key, queries[q * a.n_quads + quad], chains[q]);
        }
#pragma unroll
        for (unsigned q = 0; q < QUERIES; q++) {
            float score = IS_PLAIN ? chains[q] : capped_score(a, chains[q]);
            scores[q * apart + i] = score;
            maxima[q] = lmc_max(score, maxima[q]);
        }
    }
}

/* No maximum is NaN, so that integers give it in any order. of_warps: [QUERIES][warps]. */
template <unsigned QUERIES>
__device__ __forceinline__ void find_maxima(float (&maxima)[QUERIES], int32_t *of_warps) {
    constexpr unsigned WARPS = ATTENTION_THREADS / LMC_WARP_LANES;
    int32_t keys[QUERIES];
#pragma unroll
    for (unsigned q = 0; q < QUERIES; q++) {
        keys[q] = reduce_max(lmc_max_key(maxima[q]));
        if (threadIdx.x % LMC_WARP_LANES == 0) of_warps[q * WARPS + threadIdx.x / LMC_WARP_LANES] = keys[q];
    }
    __syncthreads();
#pragma unroll
    for (unsigned q = 0; q < QUERIES; q++) {
        for (unsigned warp = 0; warp < WARPS; warp++)
            keys[q] = max(keys[q], of_warps[q * WARPS + warp]);
        maxima[q] = lmc_max_of_key(keys[q]);
    }
}

/* The values of a step pass through shared memory, a few keys a stage: all threads fetch them, 16 bytes at a
 * time, while the scores are computed and while the stage before is added up. A head's values lie one after
 * the other in the cache, so that a stage is one stretch of it, or at the end of a ring two. */
constexpr unsigned STEP_STAGES = 3, STEP_STAGE_QUADS = 2 * ATTENTION_THREADS;

template <bool IS_RING> struct value_stages_t {
    const float4 *values;                   /* of the stage that comes next; of a ring, all of them */
    float4 *stages;                         /* [STEP_STAGES][STEP_STAGE_QUADS] */
    uint32_t n_quads_left, n_keys, n_quads; /* n_keys, n_quads: of a full stage */
    uint32_t at, ring_quads;                /* of a ring: where in it the stage begins, and how long it is */

    __device__ __forceinline__ value_stages_t(const lmc_cuda_attention_t &a, const step_place_t &place,
                                              const float4 *of_head, float4 *memory, uint32_t n_keys_of_stage)
        : values(of_head), stages(memory), n_quads_left(place.n_keys * a.n_quads), n_keys(n_keys_of_stage),
          n_quads(n_keys_of_stage * a.n_quads), at(place.first_slot * a.n_quads),
          ring_quads(a.capacity * a.n_quads) {
    }

    /* Every stage is a group of copies of its own, also those past the end. */
    __device__ __forceinline__ void begin(uint32_t stage) {
        float4 *target = stages + stage * STEP_STAGE_QUADS;
        uint32_t n = min(n_quads, n_quads_left);
#pragma unroll
        for (uint32_t first = 0; first < STEP_STAGE_QUADS; first += ATTENTION_THREADS) {
            uint32_t i = first + threadIdx.x, from = i;
            if (IS_RING) from += i + at < ring_quads ? at : at - ring_quads;
            if (i < n) __pipeline_memcpy_async(&target[i], &values[from], sizeof(float4));
        }
        __pipeline_commit();
        n_quads_left -= n;
        if (!IS_RING) {
            values += n_quads;
        } else {
            at += n;
            if (at >= ring_quads) at -= ring_quads;
        }
    }
};

/* Values of N keys of a stage into the chains of a thread's features, one for each query. */
template <unsigned FEATURES, unsigned QUERIES> struct step_chains_t {
    float sums[QUERIES], chains[QUERIES][FEATURES];

    template <unsigned N>
    __device__ __forceinline__ void add(const float *weights, uint32_t apart, const float *values,
                                        uint32_t n_features) {
        float w[QUERIES][N];
#pragma unroll
        for (unsigned q = 0; q < QUERIES; q++) {
            if constexpr (N % 4 == 0) {
#pragma unroll
                for (unsigned i = 0; i < N; i += 4)
                    *(float4 *)&w[q][i] = *(const float4 *)&weights[q * apart + i];
            } else {
                w[q][0] = weights[q * apart];
            }
        }
#pragma unroll
        for (unsigned i = 0; i < N; i++) {
#pragma unroll
            for (unsigned q = 0; q < QUERIES; q++)
                sums[q] = lmc_add(sums[q], w[q][i]);
#pragma unroll
            for (unsigned f = 0; f < FEATURES; f++) {
                float value = values[i * n_features + f * ATTENTION_THREADS];
#pragma unroll
                for (unsigned q = 0; q < QUERIES; q++)
                    chains[q][f] = lmc_fma(w[q][i], value, chains[q][f]);
            }
        }
    }
};

/* The values, weighted, over the sums of the weights: a thread has features threadIdx.x + f * 128. The first
 * STEP_STAGES - 1 stages are on their way. */
template <unsigned FEATURES, unsigned QUERIES, bool IS_RING>
__device__ __forceinline__ void weigh_values(const lmc_cuda_attention_t &a, const step_place_t &at,
                                             value_stages_t<IS_RING> &stages, const float *weights,
                                             uint32_t apart, float *output) {
    constexpr unsigned BATCH = 16 / QUERIES;
    const uint32_t n_features = a.n_quads * 4;
    const bool has_feature = threadIdx.x < n_features;
    step_chains_t<FEATURES, QUERIES> chains = {};
    for (uint32_t first = 0, stage = 0; first < at.n_keys; first += stages.n_keys, weights += stages.n_keys) {
        __pipeline_wait_prior(STEP_STAGES - 2);
        __syncthreads(); /* the stage has come for all, and none still reads the one before it */
        stages.begin(stage == 0 ? STEP_STAGES - 1 : stage - 1);
        const float *values = (const float *)(stages.stages + stage * STEP_STAGE_QUADS) + threadIdx.x;
        stage = stage + 1 == STEP_STAGES ? 0 : stage + 1;
        if (!has_feature) continue;
        uint32_t n = min(stages.n_keys, at.n_keys - first), key = 0;
#pragma unroll 1
        for (; key + BATCH <= n; key += BATCH, values += BATCH * n_features)
            chains.template add<BATCH>(weights + key, apart, values, n_features);
#pragma unroll 1
        for (; key < n; key++, values += n_features)
            chains.template add<1>(weights + key, apart, values, n_features);
    }
#pragma unroll
    for (unsigned i = 0; i < QUERIES * FEATURES; i++) {
        unsigned q = i / FEATURES;
        uint32_t feature = threadIdx.x + i % FEATURES * ATTENTION_THREADS;
        if (q < at.n && feature < a.head_dim)
            output[q * a.head_dim + feature] = lmc_div(chains.chains[q][i % FEATURES], chains.sums[q]);
    }
}

/* Blocks that shall fit a multiprocessor: 7 leave a thread 72 registers, in which all LOADS of a batch can
 * wait: 112 KiB on the way. More queries have more chains. */
constexpr unsigned blocks_of_step(unsigned n_queries) {
    return n_queries == 1 ? 7 : (n_queries == 2 ? 6 : 5) - BLOCKS_FEWER;
}

/* A block has its queries and stages of values in shared memory, and the scores there or, of more keys than
 * fit, in its part of a.scores. */
template <unsigned FEATURES, unsigned QUERIES, bool IS_PLAIN, bool ARE_SHARED>
__global__ void __launch_bounds__(ATTENTION_THREADS, blocks_of_step(QUERIES))
    lmc_attend_step_kernel(const __grid_constant__ lmc_cuda_attention_t a, uint32_t n_keys_of_stage,
                           uint32_t apart) {
    LMC_DYNAMIC_SHARED(float4, step_memory);
    __shared__ int32_t of_warps[QUERIES * ATTENTION_THREADS / LMC_WARP_LANES];
    const step_place_t at = place_of_block<QUERIES, IS_PLAIN>(a);
    float *output = a.output + ((size_t)at.row * a.n_heads + at.head) * a.head_dim;
    if (at.position == LMC_NO_POSITION) {
        for (uint32_t i = threadIdx.x; i < at.n * a.head_dim; i += ATTENTION_THREADS)
            output[i] = 0.0f;
        return;
    }
    size_t in_cache = head_offset(a, at.stream, at.kv_head);
    float4 *after_queries = step_memory + QUERIES * a.n_quads;
    value_stages_t<!IS_PLAIN> stages(a, at, (const float4 *)(a.values + in_cache), after_queries,
                                     n_keys_of_stage);
    for (unsigned stage = 0; stage < STEP_STAGES - 1; stage++)
        stages.begin(stage);
    float *queries = (float *)step_memory;
    float *scores = ARE_SHARED ? (float *)(after_queries + STEP_STAGES * STEP_STAGE_QUADS)
                               : a.scores + (size_t)blockIdx.x * QUERIES * apart;
    const float *given = a.queries + (size_t)at.row * a.query_row + (size_t)at.head * a.query_head;
#pragma unroll
    for (unsigned q = 0; q < QUERIES; q++) {
        for (uint32_t i = threadIdx.x; i < padded_features(a); i += ATTENTION_THREADS)
            queries[q * padded_features(a) + i] =
                q < at.n && i < a.head_dim ? given[q * a.query_head + i] : 0.0f;
    }
    __syncthreads();
    float maxima[QUERIES];
    score_keys<QUERIES, IS_PLAIN>(a, at, (const float4 *)(a.keys + in_cache), step_memory, scores, apart,
                                  maxima);
    find_maxima<QUERIES>(maxima, of_warps);
#pragma unroll
    for (unsigned q = 0; q < QUERIES; q++) {
        for (uint32_t i = threadIdx.x; i < at.n_keys; i += ATTENTION_THREADS)
            scores[q * apart + i] = weight_of(a, scores[q * apart + i], maxima[q]);
    }
    /* Its first barrier is also the scores'. */
    weigh_values<FEATURES, QUERIES, !IS_PLAIN>(a, at, stages, scores, apart, output);
}

/* Keys whose values a full stage holds. Weights are read four at a time. */
uint32_t keys_of_stage(const lmc_cuda_attention_t &a) {
    return STEP_STAGE_QUADS / a.n_quads / 4 * 4;
}

template <unsigned FEATURES, unsigned QUERIES, bool IS_PLAIN, bool ARE_SHARED>
cudaError_t launch_step(const lmc_cuda_attention_t &a, lmc_cuda_stream_t stream) {
    uint32_t apart = lmc_cuda_score_length(a.window, a.capacity), n_shared = a.n_heads / a.n_kv_heads;
    size_t n_quads = QUERIES * a.n_quads + STEP_STAGES * STEP_STAGE_QUADS;
    size_t shared_bytes = n_quads * sizeof(float4) + (ARE_SHARED ? QUERIES * apart * sizeof(float) : 0);
    uint64_t n_blocks = (uint64_t)a.n_rows * a.n_kv_heads * ((n_shared + QUERIES - 1) / QUERIES);
    return launch_blocks(lmc_attend_step_kernel<FEATURES, QUERIES, IS_PLAIN, ARE_SHARED>, n_blocks,
                         ATTENTION_THREADS, shared_bytes, stream, a, keys_of_stage(a), apart);
}

template <unsigned FEATURES, bool ARE_SHARED>
cudaError_t launch_any_step(const lmc_cuda_attention_t &a, uint32_t n_queries, lmc_cuda_stream_t stream) {
    if (n_queries == 1 && ARE_SHARED && is_plain(a)) return launch_step<FEATURES, 1, true, true>(a, stream);
    if (n_queries == 1) return launch_step<FEATURES, 1, false, ARE_SHARED>(a, stream);
    if (FEATURES > 1 || n_queries == 2) return launch_step<FEATURES, 2, false, ARE_SHARED>(a, stream);
    return launch_step<1, 4, false, ARE_SHARED>(a, stream);
}

} // namespace

cudaError_t lmc_cuda_attend_step(const lmc_cuda_attention_t &a, lmc_cuda_stream_t stream) {
    static_assert(LMC_CUDA_STEP_FEATURES == ATTENTION_THREADS, "a thread has one feature, of wide heads two");
    uint32_t n_queries = lmc_cuda_step_queries(a.n_heads, a.n_kv_heads, a.head_dim);
    uint32_t length = lmc_cuda_score_length(a.window, a.capacity);
    bool are_shared = lmc_cuda_scores_are_shared(n_queries, a.n_quads, length);
    auto launch = a.head_dim <= LMC_CUDA_STEP_FEATURES
                      ? (are_shared ? launch_any_step<1, true> : launch_any_step<1, false>)
                      : (are_shared ? launch_any_step<2, true> : launch_any_step<2, false>);
    return launch(a, n_queries, stream);
}

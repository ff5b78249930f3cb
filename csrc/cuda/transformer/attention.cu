/* Attention of the exact engine: queries and keys turned to their positions, the cache, and one softmax whose
 * sums run over the keys in ascending order, as FORMAT.md, section 4.4, has them. The maximum of a query's
 * scores must be known before its first weight (a running maximum would round otherwise). In a step the
 * scores of one query wait in shared memory; in a pass they are computed twice, which is cheaper than keeping
 * them: a score is one chain, so it comes out the same. */
#include <cuda_pipeline_primitives.h>

#include "cuda/transformer/launch.h"
#include "cuda/coding/row_tiles.h"

namespace {

constexpr unsigned ATTENTION_THREADS = 128;
constexpr unsigned KEY_BLOCK = 32; /* keys of a block of the cache; keys and queries of a tile */
constexpr float SCORE_LOWEST = -INFINITY;

/* The cache. */

/* Features of a head in the cache, with those that fill up the last quad. */
__device__ __forceinline__ size_t padded_features(const lmc_cuda_attention_t &a) {
    return (size_t)a.n_quads * 4;
}

__device__ __forceinline__ size_t head_offset(const lmc_cuda_attention_t &a, uint32_t stream, uint32_t head) {
    return ((size_t)stream * a.n_heads + head) * a.capacity * padded_features(a);
}

__device__ __forceinline__ void store_key(const lmc_cuda_attention_t &a, float *keys, uint32_t position,
                                          uint32_t feature, float value) {
    size_t block = (size_t)(position / KEY_BLOCK) * KEY_BLOCK * padded_features(a);
    keys[block + ((feature / 4) * KEY_BLOCK + position % KEY_BLOCK) * 4 + feature % 4] = value;
}

/* Turns features i and i + n_pairs of one head: FORMAT.md, section 4.3. */
__device__ __forceinline__ void turn(const lmc_cuda_attention_t &a, const float *head, uint32_t i,
                                     uint32_t position, float *low, float *high) {
    float cosine = a.cosines[(size_t)i * a.table_length + position];
    float sine = a.sines[(size_t)i * a.table_length + position];
    float l = head[i], h = head[i + a.n_pairs];
    *low = lmc_fma(l, cosine, -lmc_mul(h, sine));
    *high = lmc_fma(h, cosine, lmc_mul(l, sine));
}

/* One block a row; a thread has one feature of a head, or the two of a pair. */
__global__ void lmc_place_kernel(const __grid_constant__ lmc_cuda_attention_t a) {
    uint32_t position = a.row_positions[blockIdx.x], stream = a.row_streams[blockIdx.x];
    uint32_t per_head = a.n_quads * 4;
    if (position == LMC_NO_POSITION) return;
    for (uint32_t i = threadIdx.x; i < a.n_heads * per_head; i += ATTENTION_THREADS) {
        uint32_t head = i / per_head, feature = i % per_head;
        float *query = a.qkv + ((size_t)blockIdx.x * a.n_heads + head) * 3 * a.head_dim;
        const float *key = query + a.head_dim, *value = key + a.head_dim;
        float *keys = a.keys + head_offset(a, stream, head),
              *values = a.values + head_offset(a, stream, head);
        bool is_feature = feature < a.head_dim;
        values[position * padded_features(a) + feature] = is_feature ? value[feature] : 0.0f;
        if (feature >= 2 * a.n_pairs) {
            store_key(a, keys, position, feature, is_feature ? key[feature] : 0.0f);
        } else if (feature < a.n_pairs) {
            float low, high;
            turn(a, key, feature, position, &low, &high);
            store_key(a, keys, position, feature, low);
            store_key(a, keys, position, feature + a.n_pairs, high);
            turn(a, query, feature, position, &low, &high);
            query[feature] = low;
            query[feature + a.n_pairs] = high;
        }
    }
}

__device__ __forceinline__ float chain_quad(float4 key, float4 query, float chain) {
    chain = lmc_fma(key.x, query.x, chain);
    chain = lmc_fma(key.y, query.y, chain);
    chain = lmc_fma(key.z, query.z, chain);
    return lmc_fma(key.w, query.w, chain);
}

/* Steps: one block for each row and head. */

/* Quads of a key that a thread has on the way at once: the chains hide nothing, and there may be few other
 * threads. Whole batches have no condition on each load, which the compiler would wait for. */
constexpr unsigned LOADS = 8;

/* Scores of all keys, one key a lane; the largest of those that this thread found. */
__device__ __forceinline__ float score_keys(const lmc_cuda_attention_t &a, const float4 *keys,
                                            const float4 *query, uint32_t n_keys, float *scores) {
    float maximum = SCORE_LOWEST;
    for (uint32_t key = threadIdx.x; key < n_keys; key += ATTENTION_THREADS) {
        const float4 *of_key = keys + (size_t)(key / KEY_BLOCK) * a.n_quads * KEY_BLOCK + key % KEY_BLOCK;
        float chain = 0.0f;
        uint32_t quad = 0;
#pragma unroll 1
        for (; quad + LOADS <= a.n_quads; quad += LOADS, of_key += LOADS * KEY_BLOCK) {
            float4 loaded[LOADS];
#pragma unroll
            for (uint32_t i = 0; i < LOADS; i++)
                loaded[i] = of_key[i * KEY_BLOCK];
#pragma unroll
            for (uint32_t i = 0; i < LOADS; i++)
                chain = chain_quad(loaded[i], query[quad + i], chain);
        }
#pragma unroll 1
        for (; quad < a.n_quads; quad++, of_key += KEY_BLOCK)
            chain = chain_quad(*of_key, query[quad], chain);
        scores[key] = chain;
        maximum = lmc_max(chain, maximum);
    }
    return maximum;
}

/* No maximum is NaN, so that integers give it in any order. */
__device__ __forceinline__ float maximum_of_block(float maximum, int32_t *keys_of_warps) {
    int32_t key = __reduce_max_sync(0xFFFFFFFFu, lmc_max_key(maximum));
    if (threadIdx.x % LMC_WARP_LANES == 0) keys_of_warps[threadIdx.x / LMC_WARP_LANES] = key;
    __syncthreads();
    for (unsigned warp = 0; warp < ATTENTION_THREADS / LMC_WARP_LANES; warp++)
        key = max(key, keys_of_warps[warp]);
    return lmc_max_of_key(key);
}

/* The values of a step pass through shared memory, a few keys a stage: all threads fetch them, 16 bytes at a
 * time, while the scores are computed and while the stage before is added up. A head's values lie one after
 * the other in the cache, so that a stage is one stretch of it. */
constexpr unsigned STEP_STAGES = 3, STEP_STAGE_QUADS = 2 * ATTENTION_THREADS;

struct value_stages_t {
    const float4 *values;                   /* of the stage that comes next */
    float4 *stages;                         /* [STEP_STAGES][STEP_STAGE_QUADS] */
    uint32_t n_quads_left, n_keys, n_quads; /* n_keys, n_quads: of a full stage */

    __device__ __forceinline__ value_stages_t(const float4 *of_head, float4 *memory, uint32_t n_quads_of_head,
                                              uint32_t n_keys_of_stage, uint32_t n_quads_of_stage)
        : values(of_head), stages(memory), n_quads_left(n_quads_of_head), n_keys(n_keys_of_stage),
          n_quads(n_quads_of_stage) {
    }

    /* Every stage is a group of copies of its own, also those past the end. */
    __device__ __forceinline__ void begin(uint32_t stage) {
        float4 *target = stages + stage * STEP_STAGE_QUADS;
        uint32_t n = min(n_quads, n_quads_left);
#pragma unroll
        for (uint32_t i = 0; i < STEP_STAGE_QUADS; i += ATTENTION_THREADS)
            if (i + threadIdx.x < n)
                __pipeline_memcpy_async(&target[i + threadIdx.x], &values[i + threadIdx.x], sizeof(float4));
        __pipeline_commit();
        values += n_quads;
        n_quads_left -= n;
    }
};

/* Values of N keys of a stage into the chains of a thread's features. */
template <unsigned FEATURES> struct step_chains_t {
    float sum, chains[FEATURES];

    template <unsigned N>
    __device__ __forceinline__ void add(const float *weights, const float *values, uint32_t n_features) {
        float w[N];
        if constexpr (N % 4 == 0) {
#pragma unroll
            for (unsigned i = 0; i < N; i += 4)
                *(float4 *)&w[i] = *(const float4 *)&weights[i];
        } else {
            w[0] = weights[0];
        }
#pragma unroll
        for (unsigned i = 0; i < N; i++) {
            sum = lmc_add(sum, w[i]);
#pragma unroll
            for (unsigned f = 0; f < FEATURES; f++)
                chains[f] = lmc_fma(w[i], values[i * n_features + f * ATTENTION_THREADS], chains[f]);
        }
    }
};

/* The values, weighted, over the sum of the weights: a thread has features threadIdx.x + f * 128. The first
 * STEP_STAGES - 1 stages are on their way. */
template <unsigned FEATURES>
__device__ __forceinline__ void weigh_values(const lmc_cuda_attention_t &a, value_stages_t &stages,
                                             const float *weights, uint32_t n_keys, float *output) {
    constexpr unsigned BATCH = 16;
    const uint32_t n_features = a.n_quads * 4;
    const bool has_feature = threadIdx.x < n_features;
    step_chains_t<FEATURES> chains = {};
    for (uint32_t first = 0, stage = 0; first < n_keys; first += stages.n_keys, weights += stages.n_keys) {
        __pipeline_wait_prior(STEP_STAGES - 2);
        __syncthreads(); /* the stage has come for all, and none still reads the one before it */
        stages.begin(stage == 0 ? STEP_STAGES - 1 : stage - 1);
        const float *values = (const float *)(stages.stages + stage * STEP_STAGE_QUADS) + threadIdx.x;
        stage = stage + 1 == STEP_STAGES ? 0 : stage + 1;
        if (!has_feature) continue;
        uint32_t n = min(stages.n_keys, n_keys - first), key = 0;
#pragma unroll 1
        for (; key + BATCH <= n; key += BATCH, values += BATCH * n_features)
            chains.template add<BATCH>(weights + key, values, n_features);
#pragma unroll 1
        for (; key < n; key++, values += n_features)
            chains.template add<1>(weights + key, values, n_features);
    }
#pragma unroll
    for (unsigned f = 0; f < FEATURES; f++) {
        uint32_t feature = threadIdx.x + f * ATTENTION_THREADS;
        if (feature < a.head_dim) output[feature] = lmc_div(chains.chains[f], chains.sum);
    }
}

/* Keys whose values a full stage holds. Weights are read four at a time. */
uint32_t keys_of_stage(const lmc_cuda_attention_t &a) {
    return STEP_STAGE_QUADS / a.n_quads / 4 * 4;
}

/* Shared memory of a step: the query, the stages of values, the scores. */
size_t step_bytes(const lmc_cuda_attention_t &a) {
    return ((size_t)a.n_quads + STEP_STAGES * STEP_STAGE_QUADS) * sizeof(float4) + a.capacity * sizeof(float);
}

/* 7 blocks leave a thread 72 registers, in which all LOADS of a batch can wait: 112 KiB on the way to a
 * multiprocessor. */
template <unsigned FEATURES>
__global__ void __launch_bounds__(ATTENTION_THREADS, 7)
    lmc_attend_step_kernel(const __grid_constant__ lmc_cuda_attention_t a, uint32_t n_keys_of_stage) {
    LMC_DYNAMIC_SHARED(float4, step_memory);
    __shared__ int32_t keys_of_warps[ATTENTION_THREADS / LMC_WARP_LANES];
    uint32_t row = blockIdx.x / a.n_heads, head = blockIdx.x % a.n_heads;
    uint32_t position = a.row_positions[row], stream = a.row_streams[row], n_keys = position + 1;
    float *output = a.output + (size_t)blockIdx.x * a.head_dim;
    if (position == LMC_NO_POSITION) {
        for (uint32_t i = threadIdx.x; i < a.head_dim; i += ATTENTION_THREADS)
            output[i] = 0.0f;
        return;
    }
    size_t in_cache = head_offset(a, stream, head);
    value_stages_t stages((const float4 *)(a.values + in_cache), step_memory + a.n_quads, n_keys * a.n_quads,
                          n_keys_of_stage, n_keys_of_stage * a.n_quads);
    for (unsigned stage = 0; stage < STEP_STAGES - 1; stage++)
        stages.begin(stage);
    float *query = (float *)step_memory;
    float *scores = (float *)(step_memory + a.n_quads + STEP_STAGES * STEP_STAGE_QUADS);
    for (uint32_t i = threadIdx.x; i < padded_features(a); i += ATTENTION_THREADS)
        query[i] = i < a.head_dim ? a.qkv[(size_t)blockIdx.x * 3 * a.head_dim + i] : 0.0f;
    __syncthreads();
    float maximum = score_keys(a, (const float4 *)(a.keys + in_cache), step_memory, n_keys, scores);
    maximum = maximum_of_block(maximum, keys_of_warps);
    for (uint32_t key = threadIdx.x; key < n_keys; key += ATTENTION_THREADS)
        scores[key] = lmc_softmax_weight(scores[key], maximum, a.scale, a.floor);
    weigh_values<FEATURES>(a, stages, scores, n_keys, output); /* its first barrier is also the scores' */
}

/* Passes: one block for a tile of queries of one stretch and one head. Threads are 16 x 8 over the tile's
 * scores, two queries and four keys each, and 8 x 16 over its outputs, four queries and UNITS quads of
 * features each. UNITS * 64 features are enough for a head. */

constexpr unsigned CHUNK_QUADS = 16, WEIGHTS_STRIDE = KEY_BLOCK + 4;
constexpr unsigned STAGE_QUADS = CHUNK_QUADS * KEY_BLOCK;

template <unsigned UNITS> struct pass_memory_t {
    float4 query[UNITS * CHUNK_QUADS][KEY_BLOCK];
    float4 stage[STAGE_QUADS]; /* keys [quad][key] or values [key][quad] */
    float weights[KEY_BLOCK][WEIGHTS_STRIDE];
    float maxima[KEY_BLOCK], sums[KEY_BLOCK];
};

/* The tile of a block: its first query is row, at position. */
struct tile_place_t {
    uint32_t row, n_queries, position, head;
    const float4 *keys, *values;
    unsigned query, key; /* of the thread's scores: query, query + 16; key, key + 8, key + 16, key + 24 */
};

__device__ __forceinline__ void load_queries(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                             float4 (*queries)[KEY_BLOCK]) {
    uint32_t n_features = a.n_quads * 4;
    for (uint32_t i = threadIdx.x; i < KEY_BLOCK * n_features; i += ATTENTION_THREADS) {
        uint32_t query = i / n_features, feature = i % n_features;
        size_t from = ((size_t)(at.row + query) * a.n_heads + at.head) * 3 * a.head_dim + feature;
        bool is_feature = query < at.n_queries && feature < a.head_dim;
        ((float *)&queries[feature / 4][query])[feature % 4] = is_feature ? a.qkv[from] : 0.0f;
    }
}

/* scores[i][j] of query + 16 i and key + 8 j of the tile of keys that begins at first_key. */
template <unsigned UNITS>
__device__ __forceinline__ void score_tile(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                           uint32_t first_key, uint32_t n_keys, pass_memory_t<UNITS> &memory,
                                           float (&scores)[2][4]) {
    const float4 *block = at.keys + (size_t)first_key * a.n_quads;
#pragma unroll
    for (unsigned i = 0; i < 8; i++)
        scores[i / 4][i % 4] = 0.0f;
    for (uint32_t first_quad = 0; first_quad < a.n_quads; first_quad += CHUNK_QUADS) {
        uint32_t n_quads = min(CHUNK_QUADS, a.n_quads - first_quad);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n_quads * KEY_BLOCK; i += ATTENTION_THREADS) {
            bool is_key = i % KEY_BLOCK < n_keys;
            memory.stage[i] = is_key ? block[first_quad * KEY_BLOCK + i] : make_float4(0, 0, 0, 0);
        }
        __syncthreads();
#pragma unroll 4
        for (uint32_t quad = 0; quad < n_quads; quad++) {
            float4 keys[4];
#pragma unroll
            for (unsigned j = 0; j < 4; j++)
                keys[j] = memory.stage[quad * KEY_BLOCK + at.key + 8 * j];
#pragma unroll
            for (unsigned i = 0; i < 2; i++) {
                float4 query = memory.query[first_quad + quad][at.query + 16 * i];
#pragma unroll
                for (unsigned j = 0; j < 4; j++)
                    scores[i][j] = chain_quad(keys[j], query, scores[i][j]);
            }
        }
    }
}

/* memory.maxima: of all scores that each query of the tile may see. */
template <unsigned UNITS>
__device__ __forceinline__ void find_maxima(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                            uint32_t n_keys, pass_memory_t<UNITS> &memory) {
    float maxima[2] = {SCORE_LOWEST, SCORE_LOWEST};
    for (uint32_t first = 0; first < n_keys; first += KEY_BLOCK) {
        float scores[2][4];
        score_tile<UNITS>(a, at, first, n_keys - first, memory, scores);
#pragma unroll
        for (unsigned i = 0; i < 2; i++) {
            uint32_t last = at.position + at.query + 16 * i;
#pragma unroll
            for (unsigned j = 0; j < 4; j++)
                if (first + at.key + 8 * j <= last) maxima[i] = lmc_max(scores[i][j], maxima[i]);
        }
    }
    for (unsigned i = 0; i < 2; i++)
        memory.weights[at.query + 16 * i][at.key] = maxima[i];
    __syncthreads();
    if (threadIdx.x < KEY_BLOCK) {
        float maximum = SCORE_LOWEST;
        for (unsigned i = 0; i < 8; i++)
            maximum = lmc_max(memory.weights[threadIdx.x][i], maximum);
        memory.maxima[threadIdx.x] = maximum;
    }
}

/* The values of some keys of a tile; sums[i][u] are the four features of quad u * 16 + (thread's quad), for
 * the thread's i-th query. SEES_ALL: every query of the tile sees every key of it. A key that a query does
 * not see takes no part: not even as a product with 0, which an infinite value would make NaN. */
template <unsigned UNITS, bool SEES_ALL>
__device__ __forceinline__ void add_values(const pass_memory_t<UNITS> &memory, uint32_t first_position,
                                           uint32_t first_key, unsigned key_in_tile, unsigned n_keys,
                                           float (&sums)[4][UNITS][4]) {
    constexpr unsigned QUADS = UNITS * CHUNK_QUADS;
    unsigned group = threadIdx.x / 16 * 4, lane = threadIdx.x % 16;
#pragma unroll 2
    for (unsigned key = 0; key < n_keys; key += 4) {
        float weights[4][4];
#pragma unroll
        for (unsigned i = 0; i < 4; i++)
            *(float4 *)weights[i] = *(const float4 *)&memory.weights[group + i][key_in_tile + key];
#pragma unroll
        for (unsigned k = 0; k < 4; k++) {
#pragma unroll
            for (unsigned u = 0; u < UNITS; u++) {
                float values[4];
                *(float4 *)values = memory.stage[(key + k) * QUADS + u * 16 + lane];
#pragma unroll
                for (unsigned i = 0; i < 4; i++) {
                    if (!SEES_ALL && first_key + key_in_tile + key + k > first_position + group + i) continue;
#pragma unroll
                    for (unsigned f = 0; f < 4; f++)
                        sums[i][u][f] = lmc_fma(weights[i][k], values[f], sums[i][u][f]);
                }
            }
        }
    }
}

/* memory.weights of a tile of keys, and what they add to memory.sums, ascending. */
template <unsigned UNITS>
__device__ __forceinline__ void weigh_tile(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                           uint32_t first_key, const float (&scores)[2][4],
                                           pass_memory_t<UNITS> &memory) {
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
#pragma unroll
        for (unsigned j = 0; j < 4; j++)
            memory.weights[at.query + 16 * i][at.key + 8 * j] =
                lmc_softmax_weight(scores[i][j], memory.maxima[at.query + 16 * i], a.scale, a.floor);
    }
    __syncthreads();
    if (threadIdx.x >= KEY_BLOCK) return;
    uint32_t last = at.position + threadIdx.x;
    uint32_t n_seen = last < first_key ? 0 : min(KEY_BLOCK, last - first_key + 1);
    float sum = first_key == 0 ? 0.0f : memory.sums[threadIdx.x];
#pragma unroll 8
    for (uint32_t key = 0; key < n_seen; key++)
        sum = lmc_add(sum, memory.weights[threadIdx.x][key]);
    memory.sums[threadIdx.x] = sum;
}

template <unsigned UNITS>
__device__ __forceinline__ void value_tile(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                           uint32_t first_key, uint32_t n_keys, pass_memory_t<UNITS> &memory,
                                           float (&sums)[4][UNITS][4]) {
    constexpr unsigned QUADS = UNITS * CHUNK_QUADS, KEYS = STAGE_QUADS / QUADS;
    bool sees_all = first_key + KEY_BLOCK - 1 <= at.position;
    for (unsigned in_tile = 0; in_tile < KEY_BLOCK && in_tile < n_keys; in_tile += KEYS) {
        __syncthreads();
        for (unsigned i = threadIdx.x; i < STAGE_QUADS; i += ATTENTION_THREADS) {
            uint32_t key = in_tile + i / QUADS, quad = i % QUADS;
            bool is_value = key < n_keys && quad < a.n_quads;
            memory.stage[i] =
                is_value ? at.values[(size_t)(first_key + key) * a.n_quads + quad] : make_float4(0, 0, 0, 0);
        }
        __syncthreads();
        if (sees_all)
            add_values<UNITS, true>(memory, at.position, first_key, in_tile, KEYS, sums);
        else
            add_values<UNITS, false>(memory, at.position, first_key, in_tile, KEYS, sums);
    }
}

template <unsigned UNITS>
__global__ void __launch_bounds__(ATTENTION_THREADS)
    lmc_attend_pass_kernel(const __grid_constant__ lmc_cuda_attention_t a, const uint32_t *row_begin,
                           uint32_t n_stretches, uint32_t n_tiles) {
    __shared__ pass_memory_t<UNITS> memory;
    /* Tiles of late queries have the most keys and begin first. */
    uint32_t tile = n_tiles - 1 - blockIdx.x / (n_stretches * a.n_heads);
    uint32_t stretch = blockIdx.x / a.n_heads % n_stretches;
    uint32_t begin = row_begin[stretch], n_rows = row_begin[stretch + 1] - begin, first = tile * KEY_BLOCK;
    if (first >= n_rows || a.row_positions[begin + first] == LMC_NO_POSITION) return;
    tile_place_t at;
    at.row = begin + first;
    at.n_queries = min(KEY_BLOCK, n_rows - first);
    at.position = a.row_positions[at.row];
    at.n_queries = min(at.n_queries, a.n_positions - at.position);
    at.head = blockIdx.x % a.n_heads;
    size_t in_cache = head_offset(a, a.row_streams[at.row], at.head);
    at.keys = (const float4 *)(a.keys + in_cache);
    at.values = (const float4 *)(a.values + in_cache);
    at.query = threadIdx.x / 32 * 4 + lane_of_4(threadIdx.x % 32);
    at.key = lane_of_8(threadIdx.x % 32);
    uint32_t n_keys = at.position + at.n_queries;
    load_queries(a, at, memory.query);
    find_maxima<UNITS>(a, at, n_keys, memory);
    float sums[4][UNITS][4] = {};
    for (uint32_t first_key = 0; first_key < n_keys; first_key += KEY_BLOCK) {
        float scores[2][4];
        score_tile<UNITS>(a, at, first_key, n_keys - first_key, memory, scores);
        weigh_tile<UNITS>(a, at, first_key, scores, memory);
        value_tile<UNITS>(a, at, first_key, n_keys - first_key, memory, sums);
    }
    __syncthreads();
    unsigned group = threadIdx.x / 16 * 4, lane = threadIdx.x % 16;
#pragma unroll
    for (unsigned i = 0; i < 4 * UNITS * 4; i++) {
        unsigned query = group + i / (UNITS * 4), unit = i / 4 % UNITS,
                 feature = (unit * 16 + lane) * 4 + i % 4;
        if (query >= at.n_queries || feature >= a.head_dim) continue;
        float *output = a.output + ((size_t)(at.row + query) * a.n_heads + at.head) * a.head_dim;
        output[feature] = lmc_div(sums[query - group][unit][i % 4], memory.sums[query]);
    }
}

} // namespace

cudaError_t lmc_cuda_attention_place(const lmc_cuda_attention_t &a, lmc_cuda_stream_t stream) {
    return launch_blocks(lmc_place_kernel, a.n_rows, ATTENTION_THREADS, 0, stream, a);
}

cudaError_t lmc_cuda_attend_pass(const lmc_cuda_attention_t &a, const uint32_t *row_begin,
                                 uint32_t n_stretches, uint32_t n_longest, lmc_cuda_stream_t stream) {
    uint32_t n_tiles = (n_longest + KEY_BLOCK - 1) / KEY_BLOCK;
    auto kernel = a.head_dim <= 64    ? lmc_attend_pass_kernel<1>
                  : a.head_dim <= 128 ? lmc_attend_pass_kernel<2>
                                      : lmc_attend_pass_kernel<4>;
    return launch_blocks(kernel, (uint64_t)n_tiles * n_stretches * a.n_heads, ATTENTION_THREADS, 0, stream, a,
                         row_begin, n_stretches, n_tiles);
}

cudaError_t lmc_cuda_attend_step(const lmc_cuda_attention_t &a, lmc_cuda_stream_t stream) {
    auto kernel = a.head_dim <= ATTENTION_THREADS ? lmc_attend_step_kernel<1> : lmc_attend_step_kernel<2>;
    return launch_blocks(kernel, (uint64_t)a.n_rows * a.n_heads, ATTENTION_THREADS, step_bytes(a), stream, a,
                         keys_of_stage(a));
}

/* Attention of the exact engine: queries and keys turned to their positions, the cache, and one softmax whose
 * sums run over the keys in ascending order, as FORMAT.md, sections 4.4 and 4.9.5, have them. The maximum of
 * a query's scores must be known before its first weight (a running maximum would round otherwise). In a
 * step, attention_step.cu, the scores of a query wait in memory; in a pass they are computed twice, which is
 * cheaper than keeping them: a score is one chain, so it comes out the same. */
#include "cuda/transformer/attention_cache.h"

namespace {

/* The cache. */

__device__ __forceinline__ void store_key(const lmc_cuda_attention_t &a, float *keys, uint32_t slot,
                                          uint32_t feature, float value) {
    size_t block = (size_t)(slot / KEY_BLOCK) * KEY_BLOCK * padded_features(a);
    keys[block + ((feature / 4) * KEY_BLOCK + slot % KEY_BLOCK) * 4 + feature % 4] = value;
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

__device__ __forceinline__ void place_query(const lmc_cuda_attention_t &a, float *query, uint32_t feature,
                                            uint32_t position) {
    float low, high;
    if (feature >= a.n_pairs) return;
    turn(a, query, feature, position, &low, &high);
    query[feature] = low;
    query[feature + a.n_pairs] = high;
}

__device__ __forceinline__ void place_key(const lmc_cuda_attention_t &a, uint32_t stream, uint32_t kv_head,
                                          uint32_t feature, uint32_t position, uint32_t slot) {
    size_t given = (size_t)blockIdx.x * a.key_row + (size_t)kv_head * a.key_head;
    size_t in_cache = head_offset(a, stream, kv_head);
    const float *key = a.new_keys + given;
    float *keys = a.keys + in_cache;
    bool is_feature = feature < a.head_dim;
    a.values[in_cache + slot * padded_features(a) + feature] =
        is_feature ? a.new_values[given + feature] : 0.0f;
    if (feature >= 2 * a.n_pairs) {
        store_key(a, keys, slot, feature, is_feature ? key[feature] : 0.0f);
    } else if (feature < a.n_pairs) {
        float low, high;
        turn(a, key, feature, position, &low, &high);
        store_key(a, keys, slot, feature, low);
        store_key(a, keys, slot, feature + a.n_pairs, high);
    }
}

/* One block a row; a thread has one feature of a head, or the two of a pair. */
__global__ void lmc_place_kernel(const __grid_constant__ lmc_cuda_attention_t a) {
    uint32_t position = a.row_positions[blockIdx.x], slot = position % a.capacity;
    uint32_t stream = a.row_streams[blockIdx.x];
    uint32_t per_head = a.n_quads * 4;
    if (position == LMC_NO_POSITION) return;
    for (uint32_t i = threadIdx.x; i < a.n_heads * per_head; i += ATTENTION_THREADS) {
        uint32_t head = i / per_head, feature = i % per_head;
        if (head < a.n_kv_heads) place_key(a, stream, head, feature, position, slot);
        place_query(a, a.queries + (size_t)blockIdx.x * a.query_row + (size_t)head * a.query_head, feature,
                    position);
    }
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

/* The tile of a block: its first query is row, at position, and sees nothing before first_key, a multiple of
 * KEY_BLOCK. */
struct tile_place_t {
    uint32_t row, n_queries, position, head, first_key;
    const float4 *keys, *values;
    unsigned query, key; /* of the thread's scores: query, query + 16; key, key + 8, key + 16, key + 24 */
};

__device__ __forceinline__ void load_queries(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                             float4 (*queries)[KEY_BLOCK]) {
    uint32_t n_features = a.n_quads * 4;
    for (uint32_t i = threadIdx.x; i < KEY_BLOCK * n_features; i += ATTENTION_THREADS) {
        uint32_t query = i / n_features, feature = i % n_features;
        size_t from = (size_t)(at.row + query) * a.query_row + (size_t)at.head * a.query_head + feature;
        bool is_feature = query < at.n_queries && feature < a.head_dim;
        ((float *)&queries[feature / 4][query])[feature % 4] = is_feature ? a.queries[from] : 0.0f;
    }
}

/* Does the query at this position see the key? IS_PLAIN, here and below: attention as is_plain says. */
template <bool IS_PLAIN>
__device__ __forceinline__ bool is_seen(const lmc_cuda_attention_t &a, uint32_t key, uint32_t position) {
    return key <= position && (IS_PLAIN || a.window == 0 || position - key < a.window);
}

/* Where the tile of keys that begins at first_key lies in the ring. */
template <bool IS_PLAIN>
__device__ __forceinline__ uint32_t slot_of_tile(const lmc_cuda_attention_t &a, uint32_t first_key) {
    return IS_PLAIN ? first_key : first_key % a.capacity;
}

/* scores[i][j] of query + 16 i and key + 8 j of the tile of keys that begins at first_key. */
template <unsigned UNITS, bool IS_PLAIN>
__device__ __forceinline__ void score_tile(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                           uint32_t first_key, uint32_t n_keys, pass_memory_t<UNITS> &memory,
                                           float (&scores)[2][4]) {
    const float4 *block = at.keys + (size_t)slot_of_tile<IS_PLAIN>(a, first_key) * a.n_quads;
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
    if constexpr (!IS_PLAIN) {
#pragma unroll
        for (unsigned i = 0; i < 8; i++)
            scores[i / 4][i % 4] = capped_score(a, scores[i / 4][i % 4]);
    }
}

/* memory.maxima: of all scores that each query of the tile may see. */
template <unsigned UNITS, bool IS_PLAIN>
__device__ __forceinline__ void find_maxima(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                            uint32_t n_keys, pass_memory_t<UNITS> &memory) {
    float maxima[2] = {SCORE_LOWEST, SCORE_LOWEST};
    for (uint32_t first = at.first_key; first < n_keys; first += KEY_BLOCK) {
        float scores[2][4];
        score_tile<UNITS, IS_PLAIN>(a, at, first, n_keys - first, memory, scores);
#pragma unroll
        for (unsigned i = 0; i < 2; i++) {
            uint32_t last = at.position + at.query + 16 * i;
#pragma unroll
            for (unsigned j = 0; j < 4; j++)
                if (is_seen<IS_PLAIN>(a, first + at.key + 8 * j, last))
                    maxima[i] = lmc_max(scores[i][j], maxima[i]);
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
template <unsigned UNITS, bool IS_PLAIN, bool SEES_ALL>
__device__ __forceinline__ void add_values(const lmc_cuda_attention_t &a, const pass_memory_t<UNITS> &memory,
                                           uint32_t first_position, uint32_t first_key, unsigned key_in_tile,
                                           unsigned n_keys, float (&sums)[4][UNITS][4]) {
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
                    if (!SEES_ALL &&
                        !is_seen<IS_PLAIN>(a, first_key + key_in_tile + key + k, first_position + group + i))
                        continue;
#pragma unroll
                    for (unsigned f = 0; f < 4; f++)
                        sums[i][u][f] = lmc_fma(weights[i][k], values[f], sums[i][u][f]);
                }
            }
        }
    }
}

/* memory.weights of a tile of keys, and what they add to memory.sums, ascending. */
template <unsigned UNITS, bool IS_PLAIN>
__device__ __forceinline__ void weigh_tile(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                           uint32_t first_key, const float (&scores)[2][4],
                                           pass_memory_t<UNITS> &memory) {
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
#pragma unroll
        for (unsigned j = 0; j < 4; j++)
            memory.weights[at.query + 16 * i][at.key + 8 * j] =
                weight_of(a, scores[i][j], memory.maxima[at.query + 16 * i]);
    }
    __syncthreads();
    if (threadIdx.x >= KEY_BLOCK) return;
    uint32_t last = at.position + threadIdx.x, first = IS_PLAIN ? 0 : first_seen(a, last);
    uint32_t n_seen = last < first_key ? 0 : min(KEY_BLOCK, last - first_key + 1);
    uint32_t n_before = first > first_key ? min(KEY_BLOCK, first - first_key) : 0;
    float sum = first_key == at.first_key ? 0.0f : memory.sums[threadIdx.x];
#pragma unroll 8
    for (uint32_t key = n_before; key < n_seen; key++)
        sum = lmc_add(sum, memory.weights[threadIdx.x][key]);
    memory.sums[threadIdx.x] = sum;
}

template <unsigned UNITS, bool IS_PLAIN>
__device__ __forceinline__ void value_tile(const lmc_cuda_attention_t &a, const tile_place_t &at,
                                           uint32_t first_key, uint32_t n_keys, pass_memory_t<UNITS> &memory,
                                           float (&sums)[4][UNITS][4]) {
    constexpr unsigned QUADS = UNITS * CHUNK_QUADS, KEYS = STAGE_QUADS / QUADS;
    bool sees_all = first_key + KEY_BLOCK - 1 <= at.position;
    if (!IS_PLAIN) sees_all = sees_all && is_seen<false>(a, first_key, at.position + KEY_BLOCK - 1);
    uint32_t slot = slot_of_tile<IS_PLAIN>(a, first_key);
    for (unsigned in_tile = 0; in_tile < KEY_BLOCK && in_tile < n_keys; in_tile += KEYS) {
        __syncthreads();
        for (unsigned i = threadIdx.x; i < STAGE_QUADS; i += ATTENTION_THREADS) {
            uint32_t key = in_tile + i / QUADS, quad = i % QUADS;
            bool is_value = key < n_keys && quad < a.n_quads;
            memory.stage[i] =
                is_value ? at.values[(size_t)(slot + key) * a.n_quads + quad] : make_float4(0, 0, 0, 0);
        }
        __syncthreads();
        if (sees_all)
            add_values<UNITS, IS_PLAIN, true>(a, memory, at.position, first_key, in_tile, KEYS, sums);
        else
            add_values<UNITS, IS_PLAIN, false>(a, memory, at.position, first_key, in_tile, KEYS, sums);
    }
}

/* Five blocks a multiprocessor leave enough registers for what more than plain attention needs. */
template <unsigned UNITS, bool IS_PLAIN>
__global__ void __launch_bounds__(ATTENTION_THREADS, IS_PLAIN || UNITS > 1 ? 0 : 5 - BLOCKS_FEWER)
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
    at.first_key = IS_PLAIN ? 0 : first_seen(a, at.position) / KEY_BLOCK * KEY_BLOCK;
    uint32_t kv_head = IS_PLAIN ? at.head : at.head / (a.n_heads / a.n_kv_heads);
    size_t in_cache = head_offset(a, a.row_streams[at.row], kv_head);
    at.keys = (const float4 *)(a.keys + in_cache);
    at.values = (const float4 *)(a.values + in_cache);
    at.query = threadIdx.x / 32 * 4 + lane_of_4(threadIdx.x % 32);
    at.key = lane_of_8(threadIdx.x % 32);
    uint32_t n_keys = at.position + at.n_queries;
    load_queries(a, at, memory.query);
    find_maxima<UNITS, IS_PLAIN>(a, at, n_keys, memory);
    float sums[4][UNITS][4] = {};
    for (uint32_t first_key = at.first_key; first_key < n_keys; first_key += KEY_BLOCK) {
        float scores[2][4];
        score_tile<UNITS, IS_PLAIN>(a, at, first_key, n_keys - first_key, memory, scores);
        weigh_tile<UNITS, IS_PLAIN>(a, at, first_key, scores, memory);
        value_tile<UNITS, IS_PLAIN>(a, at, first_key, n_keys - first_key, memory, sums);
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

template <bool IS_PLAIN>
cudaError_t launch_pass(const lmc_cuda_attention_t &a, const uint32_t *row_begin, uint32_t n_stretches,
                        uint32_t n_longest, lmc_cuda_stream_t stream) {
    uint32_t n_tiles = (n_longest + KEY_BLOCK - 1) / KEY_BLOCK;
    auto kernel = a.head_dim <= 64    ? lmc_attend_pass_kernel<1, IS_PLAIN>
                  : a.head_dim <= 128 ? lmc_attend_pass_kernel<2, IS_PLAIN>
                                      : lmc_attend_pass_kernel<4, IS_PLAIN>;
    return launch_blocks(kernel, (uint64_t)n_tiles * n_stretches * a.n_heads, ATTENTION_THREADS, 0, stream, a,
                         row_begin, n_stretches, n_tiles);
}

} // namespace

cudaError_t lmc_cuda_attention_place(const lmc_cuda_attention_t &a, lmc_cuda_stream_t stream) {
    return launch_blocks(lmc_place_kernel, a.n_rows, ATTENTION_THREADS, 0, stream, a);
}

cudaError_t lmc_cuda_attend_pass(const lmc_cuda_attention_t &a, const uint32_t *row_begin,
                                 uint32_t n_stretches, uint32_t n_longest, lmc_cuda_stream_t stream) {
    auto launch = is_plain(a) ? launch_pass<true> : launch_pass<false>;
    return launch(a, row_begin, n_stretches, n_longest, stream);
}

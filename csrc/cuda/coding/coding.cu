/* The coder's kernels and their launchers: what row_tiles.h leaves to barriers, shuffles and shared memory.
 * No memory is allocated and no host code but the launchers lives here. */
#include "cuda/coding/coding.h"

#include <cuda_runtime.h>

#include "core/coding/range_coder.h"
#include "cuda/coding/cluster.h"
#include "cuda/coding/report.h"
#include "cuda/coding/row_source.h"
#include "cuda/coding/warp.h"

namespace {

constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;
constexpr uint32_t BLOCK_THREADS_MAX = LMC_BLOCK_WARPS_MAX * LMC_WARP_LANES;
constexpr int32_t TOKEN_INACTIVE = -1, TOKEN_ERROR = -2;

/* Warps. */

/* Sums below 2^53: 24 bits at a time, so that 32 lanes fit the 32-bit reduction. */
__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
    uint64_t low = reduce_add((uint32_t)x & 0xFFFFFFu);
    uint64_t middle = reduce_add((uint32_t)(x >> 24) & 0xFFFFFFu);
    uint64_t high = reduce_add((uint32_t)(x >> 48));
    return low + (middle << 24) + (high << 48);
}

/* The sum over the lanes up to and with this one. */
__device__ __forceinline__ uint64_t warp_scan(uint64_t x, uint32_t lane) {
    for (uint32_t step = 1; step < LMC_WARP_LANES; step *= 2) {
        uint64_t other = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += other;
    }
    return x;
}

/* A row. */

struct place_t {
    uint32_t row, rank, warp, lane; /* rank of the block in its cluster; warp of the row */
    bool leads_block;               /* whether this is the first warp of its block */
};

__device__ __forceinline__ place_t place_of_thread(const lmc_tile_plan_t &plan) {
    place_t at;
    at.row = blockIdx.x >> plan.log2_blocks;
    at.rank = blockIdx.x & (plan.n_blocks - 1);
    at.warp = at.rank * plan.n_warps + threadIdx.x / LMC_WARP_LANES;
    at.lane = threadIdx.x % LMC_WARP_LANES;
    at.leads_block = threadIdx.x < LMC_WARP_LANES;
    return at;
}

/* The part of a row that a thread holds. */
struct holding_t {
    lmc_vector_t vectors[LMC_TILE_VECTORS];
    const unsigned char *row, *body;
    lmc_row_layout_t layout;
    uint32_t edge_symbol;
    float edge;
};

template <lmc_dtype_t DTYPE>
__device__ __forceinline__ void load_chunk(holding_t &held, const lmc_tile_plan_t &plan, const place_t &at,
                                           uint32_t chunk) {
    lmc_tiles_load(held.vectors, held.body, lmc_tile_begin(plan.n_chunks, at.warp, chunk, 0), at.lane,
                   held.layout.n_vectors, DTYPE);
}

/* Asks for the first chunk. Nothing that waits for other memory may come before it: the loads of a block are
 * what keeps the memory busy while the block beside it computes. */
template <lmc_dtype_t DTYPE>
__device__ __forceinline__ void begin_row(holding_t &held, const row_array_t &rows,
                                          const lmc_tile_plan_t &plan, const place_t &at) {
    held.row = row_address(rows.source, at.row);
    held.layout = lmc_row_layout((uintptr_t)held.row, rows.vocab_size, DTYPE);
    held.body = held.row + held.layout.n_head * lmc_element_bytes(DTYPE);
    cluster_begin();
    load_chunk<DTYPE>(held, plan, at, 0);
}

/* Gives every thread of the cluster the key of the row's maximum; the last chunk stays in registers. */
template <lmc_dtype_t DTYPE>
__device__ __forceinline__ int32_t maximum_of_row(holding_t &held, const row_array_t &rows,
                                                  const lmc_tile_plan_t &plan, const place_t &at,
                                                  uint32_t token, int32_t *keys, exchange_t *exchange) {
    held.edge_symbol = LMC_NO_SYMBOL_INDEX;
    held.edge = -INFINITY;
    if (at.warp == 0)
        held.edge_symbol = lmc_edge_symbol(&held.layout, rows.vocab_size, at.lane, token, DTYPE);
    if (held.edge_symbol != LMC_NO_SYMBOL_INDEX)
        held.edge = lmc_symbol_load(held.row, held.edge_symbol, DTYPE);
    uint32_t top = lmc_tiles_max(held.vectors, lmc_word_lowest(DTYPE), DTYPE);
    for (uint32_t chunk = 1; chunk < plan.n_chunks; chunk++) {
        load_chunk<DTYPE>(held, plan, at, chunk);
        top = lmc_tiles_max(held.vectors, top, DTYPE);
    }
    float maximum = lmc_max_or_nan(lmc_word_max_value(top, DTYPE), held.edge);
    int32_t key = reduce_max(lmc_max_key(maximum));
    cluster_begun();
    if (at.lane < plan.n_blocks) store_in_block(&keys[at.warp], at.lane, key, exchange);
    exchange_wait(exchange, true);
    key = LMC_KEY_NEGATIVE_INFINITY;
    for (uint32_t i = at.lane; i < plan.n_blocks * plan.n_warps; i += LMC_WARP_LANES)
        key = max(key, keys[i]);
    return reduce_max(key);
}

/* The weights of the whole warp's vectors, and of this thread's vectors before n_before. */
template <lmc_dtype_t DTYPE>
__device__ __forceinline__ uint64_t sum_row(holding_t &held, const lmc_tile_plan_t &plan, const place_t &at,
                                            uint32_t n_before, lmc_origin_t origin, uint64_t *before) {
    uint64_t sum = 0;
    *before = 0;
    for (uint32_t chunk = plan.n_chunks; chunk-- > 0;) {
        uint32_t chunk_begin = lmc_tile_begin(plan.n_chunks, at.warp, chunk, 0);
        if (origin.shift != 0.0f) {
            lmc_tiles_weight_sum_moved(held.body, chunk_begin + at.lane, held.layout.n_vectors, n_before,
                                       origin, DTYPE, &sum, before);
            continue;
        }
        if (chunk + 1 != plan.n_chunks) load_chunk<DTYPE>(held, plan, at, chunk);
        lmc_tiles_weight_sum(held.vectors, chunk_begin, at.lane, held.layout.n_vectors, n_before,
                             origin.offset, DTYPE, &sum, before);
    }
    return warp_sum(sum);
}

struct interval_output_t {
    uint64_t *start, *freq, *total, *error;
};

__device__ __forceinline__ void write_interval(const interval_output_t &out, uint32_t row, uint64_t start,
                                               uint64_t freq, uint64_t total) {
    out.start[row] = start;
    out.freq[row] = freq;
    out.total[row] = total;
}

/* One cluster a row. */
template <lmc_dtype_t DTYPE>
__global__ void __launch_bounds__(BLOCK_THREADS_MAX)
    lmc_intervals_kernel(const __grid_constant__ row_array_t rows,
                         const __grid_constant__ token_array_t tokens,
                         const __grid_constant__ lmc_tile_plan_t plan, const uint8_t *active,
                         const interval_output_t out) {
    __shared__ int32_t keys[LMC_ROW_WARPS_MAX];
    __shared__ uint64_t sums[LMC_ROW_WARPS_MAX], sum_before_in_warp;
    __shared__ exchange_t keys_come, sums_come;
    place_t at = place_of_thread(plan);
    if (active != nullptr && active[at.row] == 0) {
        if (at.rank == 0 && threadIdx.x == 0) write_interval(out, at.row, 0, 0, 0);
        return;
    }
    uint32_t n_warps = plan.n_blocks * plan.n_warps;
    if (threadIdx.x == 0) {
        exchange_expect(&keys_come, n_warps * sizeof keys[0]);
        exchange_expect(&sums_come, (n_warps + 1) * sizeof sums[0]);
    }
    holding_t held;
    begin_row<DTYPE>(held, rows, plan, at);
    uint32_t token = token_of_row(tokens, rows.vocab_size, at.row);
    int32_t key = maximum_of_row<DTYPE>(held, rows, plan, at, token, keys, &keys_come);
    lmc_status_t status = token == LMC_TOKEN_INVALID ? LMC_ERROR_TOKEN : lmc_status_of_key(key);
    if (status != LMC_OK) {
        if (at.rank != 0 || threadIdx.x != 0) return;
        write_interval(out, at.row, 0, 0, 0);
        report_error(out.error, at.row, status);
        return;
    }
    lmc_origin_t origin = lmc_origin(lmc_max_of_key(key));
    uint32_t n_before = lmc_vectors_before(&held.layout, token, DTYPE);
    uint32_t token_warp = lmc_warp_of_vector(&plan, n_before);
    uint64_t before, sum = sum_row<DTYPE>(held, plan, at, n_before, origin, &before);
    if (at.lane == 0) store_in_block(&sums[at.warp], 0, sum, &sums_come);
    /* Of a token of the tail no warp has the vector, but one must send. */
    if (at.warp == min(token_warp, n_warps - 1)) {
        before = warp_sum(before);
        if (at.lane == 0) store_in_block(&sum_before_in_warp, 0, before, &sums_come);
    }
    exchange_wait(&sums_come, at.warp == 0);
    if (at.warp != 0) return;

    uint64_t start = 0, total = 0;
    for (uint32_t i = at.lane; i < n_warps; i += LMC_WARP_LANES) {
        total += sums[i];
        start += i < token_warp ? sums[i] : i == token_warp ? sum_before_in_warp : 0;
    }
    uint64_t weight = lmc_weight_from(held.edge, origin); /* 0 for lanes without an edge: -inf */
    if (at.lane < LMC_EDGE_TOKEN_LANE) total += weight;
    if (held.edge_symbol < token) start += weight;
    start = warp_sum(start) + token;
    total = warp_sum(total) + rows.vocab_size;
    if (held.edge_symbol == token) write_interval(out, at.row, start, weight + 1, total);
}

/* Decoding. */

/* What the search works on: shares (weights with their floors) of the head, of each warp and of the tail, in
 * order. */
struct search_memory_t {
    int32_t keys[LMC_ROW_WARPS_MAX];
    uint64_t shares[LMC_ROW_WARPS_MAX + 2];
    uint64_t total, before, rest; /* before: shares of the entries below the one that holds the value */
    uint32_t entry;
    exchange_t keys_come, shares_come;
};

struct found_t {
    uint32_t symbol;
    uint64_t start, freq;
};

/* The first warp of every block: the total, the value, the entry that holds it. */
__device__ __forceinline__ void find_entry(search_memory_t &memory, uint32_t n_entries, uint32_t lane,
                                           const lmc_decoder_t &decoder) {
    uint64_t total = 0;
    for (uint32_t i = lane; i < n_entries; i += LMC_WARP_LANES)
        total += memory.shares[i];
    total = warp_sum(total);
    uint64_t value = lmc_range_value(&decoder, total), before = 0;
    for (uint32_t first = 0; first < n_entries; first += LMC_WARP_LANES) {
        uint64_t share = first + lane < n_entries ? memory.shares[first + lane] : 0;
        uint64_t end = before + warp_scan(share, lane);
        if (value < end && value >= end - share) {
            memory.total = total;
            memory.before = end - share;
            memory.rest = value - (end - share);
            memory.entry = first + lane;
        }
        before = __shfl_sync(ALL_LANES, end, LMC_WARP_LANES - 1);
        if (value < before) break;
    }
}

/* The lane whose share holds rest, by all lanes of a warp; rest becomes what is left in that share. */
__device__ __forceinline__ bool find_lane(uint64_t share, uint32_t lane, uint64_t *before, uint64_t *rest) {
    uint64_t end = warp_scan(share, lane);
    *before += end - share;
    if (*rest >= end || *rest < end - share) return false;
    *rest -= end - share;
    return true;
}

/* The token among the warp's own vectors; true in the one lane that has it. The tiles are summed again
 * without an early end, so that the indices of the registers stay constants; only the vector that was found
 * is loaded again. */
template <lmc_dtype_t DTYPE>
__device__ __forceinline__ bool find_in_body(holding_t &held, const lmc_tile_plan_t &plan, const place_t &at,
                                             lmc_origin_t origin, uint64_t before, uint64_t rest,
                                             found_t *found) {
    const uint32_t n_elements = lmc_vector_elements(DTYPE);
    uint64_t found_share = 0;
    uint32_t found_vector = LMC_NO_SYMBOL_INDEX;
    for (uint32_t chunk = 0; chunk < plan.n_chunks && found_vector == LMC_NO_SYMBOL_INDEX; chunk++) {
        uint32_t lane_begin = lmc_tile_begin(plan.n_chunks, at.warp, chunk, 0) + at.lane;
        if (plan.n_chunks > 1) load_chunk<DTYPE>(held, plan, at, chunk);
#pragma unroll
        for (uint32_t tile = 0; tile < LMC_TILE_VECTORS; tile++) {
            uint32_t vector = lane_begin + tile * LMC_WARP_LANES;
            uint64_t share = lmc_vector_weight_sum(&held.vectors[tile], origin, DTYPE) + n_elements;
            if (vector >= held.layout.n_vectors) share = 0;
            uint64_t tile_share = warp_sum(share);
            if (found_vector != LMC_NO_SYMBOL_INDEX) continue;
            if (rest < tile_share) {
                found_share = share;
                found_vector = vector;
            } else {
                rest -= tile_share;
                before += tile_share;
            }
        }
    }
    if (!find_lane(found_share, at.lane, &before, &rest)) return false;
    lmc_vector_t vector = lmc_vector_load(held.body, found_vector);
    uint64_t inside;
    uint32_t e = lmc_vector_find(&vector, origin, DTYPE, rest, &inside, &found->freq);
    found->symbol = held.layout.n_head + found_vector * n_elements + e;
    found->start = before + inside;
    return true;
}

/* One cluster a stream. single_stream: all rows belong to decoders[0], and row_begin is the only row of this
 * launch. */
template <lmc_dtype_t DTYPE>
__global__ void __launch_bounds__(BLOCK_THREADS_MAX)
    lmc_decode_kernel(const __grid_constant__ row_array_t rows, const __grid_constant__ lmc_tile_plan_t plan,
                      const uint8_t *active, lmc_decoder_t *decoders, int32_t *tokens, uint64_t *error,
                      uint32_t row_begin, bool single_stream) {
    __shared__ search_memory_t memory;
    place_t at = place_of_thread(plan);
    at.row += row_begin;
    lmc_decoder_t *stream = &decoders[single_stream ? 0 : at.row];
    if (active != nullptr && active[at.row] == 0) {
        if (at.rank == 0 && threadIdx.x == 0) tokens[at.row] = TOKEN_INACTIVE;
        return;
    }
    uint32_t n_warps = plan.n_blocks * plan.n_warps, n_entries = n_warps + 2;
    if (threadIdx.x == 0) {
        exchange_expect(&memory.keys_come, n_warps * sizeof memory.keys[0]);
        exchange_expect(&memory.shares_come, n_entries * sizeof memory.shares[0]);
    }
    holding_t held;
    begin_row<DTYPE>(held, rows, plan, at);
    int32_t key =
        maximum_of_row<DTYPE>(held, rows, plan, at, LMC_TOKEN_INVALID, memory.keys, &memory.keys_come);
    lmc_status_t status = lmc_status_of_key(key);
    if (status != LMC_OK) {
        if (at.rank != 0 || threadIdx.x != 0) return;
        tokens[at.row] = TOKEN_ERROR;
        report_error(error, at.row, status);
        return;
    }
    lmc_origin_t origin = lmc_origin(lmc_max_of_key(key));
    uint64_t unused, sum = sum_row<DTYPE>(held, plan, at, 0, origin, &unused);
    sum += (uint64_t)lmc_warp_vectors(&held.layout, plan.n_chunks, at.warp) * lmc_vector_elements(DTYPE);
    /* The thread that finds the token changes the decoder once it has all shares, so that this block must
     * have read it before it sends its own: what is sent depends on what was read. */
    lmc_decoder_t decoder = {};
    if (at.leads_block) {
        decoder = *stream;
        if ((decoder.code | decoder.range) == 0) sum = 0; /* no decoder is like that */
    }
    if (at.lane < plan.n_blocks)
        store_in_block(&memory.shares[at.warp + 1], at.lane, sum, &memory.shares_come);
    uint64_t edge_share = 0;
    if (at.warp == 0) {
        if (held.edge_symbol != LMC_NO_SYMBOL_INDEX)
            edge_share = (uint64_t)lmc_weight_from(held.edge, origin) + 1;
        uint64_t head = warp_sum(at.lane < LMC_EDGE_TAIL_LANE ? edge_share : 0);
        uint64_t tail = warp_sum(at.lane < LMC_EDGE_TAIL_LANE ? 0 : edge_share);
        if (at.lane < plan.n_blocks) {
            store_in_block(&memory.shares[0], at.lane, head, &memory.shares_come);
            store_in_block(&memory.shares[n_entries - 1], at.lane, tail, &memory.shares_come);
        }
    }
    exchange_wait(&memory.shares_come, at.leads_block);
    if (at.leads_block) find_entry(memory, n_entries, at.lane, decoder);
    __syncthreads();

    found_t found;
    bool is_mine = false;
    if (memory.entry == 0 || memory.entry == n_entries - 1) {
        if (at.warp != 0) return;
        bool is_head = at.lane < LMC_EDGE_TAIL_LANE;
        uint64_t before = memory.before, rest = memory.rest;
        uint64_t share = is_head == (memory.entry == 0) ? edge_share : 0;
        is_mine = find_lane(share, at.lane, &before, &rest);
        found = {held.edge_symbol, before, share};
    } else if (at.warp + 1 == memory.entry) {
        is_mine = find_in_body<DTYPE>(held, plan, at, origin, memory.before, memory.rest, &found);
    }
    if (!is_mine) return;
    lmc_range_take(stream, found.start, found.freq, memory.total);
    tokens[at.row] = (int32_t)found.symbol;
}

/* Streams: one a thread. */

__global__ void lmc_encoders_place_kernel(lmc_encoder_t *encoders, uint32_t n, uint8_t *bytes,
                                          size_t capacity_bytes, bool is_new) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint8_t *stream_bytes = bytes + i * capacity_bytes;
    if (is_new) lmc_range_begin_encoder(&encoders[i], stream_bytes, capacity_bytes);
    encoders[i].bytes = stream_bytes;
    encoders[i].capacity_bytes = capacity_bytes;
}

__global__ void lmc_encoders_put_kernel(lmc_encoder_t *encoders, uint32_t n, interval_output_t interval,
                                        const uint8_t *active) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n || *interval.error != LMC_CUDA_NO_ERROR || (active != nullptr && active[i] == 0)) return;
    lmc_encoder_t encoder = encoders[i];
    lmc_status_t status = LMC_OK;
    if (!lmc_interval_is_valid(interval.start[i], interval.freq[i], interval.total[i]))
        status = LMC_ERROR_INTERVAL;
    /* Room for this symbol and for the end of the stream. */
    if (encoder.capacity_bytes - encoder.n_bytes < 2 * LMC_STEP_BYTES_MAX) status = LMC_ERROR_CAPACITY;
    if (status != LMC_OK) {
        report_error(interval.error, i, status);
        return;
    }
    lmc_range_put(&encoder, interval.start[i], interval.freq[i], interval.total[i]);
    encoders[i] = encoder;
}

__global__ void lmc_encoders_end_kernel(lmc_encoder_t *encoders, uint32_t n) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) lmc_range_end(&encoders[i]);
}

__global__ void lmc_decoders_begin_kernel(lmc_decoder_t *decoders, uint32_t n, const uint8_t *payloads,
                                          const uint64_t *offsets) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) lmc_range_begin_decoder(&decoders[i], payloads + offsets[i], offsets[i + 1] - offsets[i]);
}

__global__ void lmc_code_length_kernel(size_t n, const uint64_t *freq, const uint64_t *total, double *bits) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) bits[i] = -log2((double)freq[i] / (double)total[i]);
}

/* Launching. */

constexpr uint32_t ITEM_THREADS = 64; /* few, so that hundreds of streams spread over the device */

cudaError_t plan_rows(const lmc_cuda_rows_t &rows, uint32_t n_rows, lmc_tile_plan_t *plan) {
    if (rows.vocab_size == 0 || rows.vocab_size > LMC_VOCAB_SIZE_MAX || rows.n_inner == 0)
        return cudaErrorInvalidValue;
    if (n_rows > (uint32_t)INT32_MAX / LMC_CLUSTER_BLOCKS_MAX) return cudaErrorInvalidValue;
    int device, major, n_processors;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    *plan = lmc_tile_plan(rows.vocab_size, rows.dtype, n_rows, (uint32_t)n_processors,
                          major >= 9 ? LMC_CLUSTER_BLOCKS_MAX : 1);
    return cudaSuccess;
}

/* One thread an item. */
template <typename... PARAMETERS, typename... ARGUMENTS>
cudaError_t launch_items(void (*kernel)(PARAMETERS...), size_t n_items, lmc_cuda_stream_t stream,
                         ARGUMENTS... arguments) {
    if (n_items == 0) return cudaSuccess;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((n_items + ITEM_THREADS - 1) / ITEM_THREADS));
    config.blockDim = dim3(ITEM_THREADS);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... PARAMETERS, typename... ARGUMENTS>
cudaError_t launch_rows(void (*kernel)(PARAMETERS...), uint32_t n_rows, const lmc_tile_plan_t &plan,
                        lmc_cuda_stream_t stream, ARGUMENTS... arguments) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.n_blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(n_rows * plan.n_blocks);
    config.blockDim = dim3(plan.n_warps * LMC_WARP_LANES);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = plan.n_blocks > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

cudaError_t launch_decode(const lmc_cuda_rows_t &rows, uint32_t row_begin, uint32_t n_rows,
                          const lmc_tile_plan_t &plan, const uint8_t *active, lmc_decoder_t *decoders,
                          int32_t *tokens, uint64_t *error, bool single_stream, lmc_cuda_stream_t stream) {
    auto kernel = rows.dtype == LMC_FLOAT32   ? lmc_decode_kernel<LMC_FLOAT32>
                  : rows.dtype == LMC_FLOAT16 ? lmc_decode_kernel<LMC_FLOAT16>
                                              : lmc_decode_kernel<LMC_BFLOAT16>;
    return launch_rows(kernel, n_rows, plan, stream, array_of(rows), plan, active, decoders, tokens, error,
                       row_begin, single_stream);
}

} // namespace

int lmc_cuda_error_clear(uint64_t *error, lmc_cuda_stream_t stream) {
    return cudaMemsetAsync(error, 0xFF, sizeof *error, stream);
}

int lmc_cuda_intervals(const lmc_cuda_rows_t *rows, const lmc_cuda_tokens_t *tokens, const uint8_t *active,
                       uint64_t *start, uint64_t *freq, uint64_t *total, uint64_t *error,
                       lmc_cuda_stream_t stream) {
    if (rows->n_rows == 0) return cudaSuccess;
    lmc_tile_plan_t plan;
    cudaError_t status = plan_rows(*rows, rows->n_rows, &plan);
    if (status != cudaSuccess) return status;
    auto kernel = rows->dtype == LMC_FLOAT32   ? lmc_intervals_kernel<LMC_FLOAT32>
                  : rows->dtype == LMC_FLOAT16 ? lmc_intervals_kernel<LMC_FLOAT16>
                                               : lmc_intervals_kernel<LMC_BFLOAT16>;
    interval_output_t out = {start, freq, total, error};
    return launch_rows(kernel, rows->n_rows, plan, stream, array_of(*rows), array_of(*tokens, *rows), plan,
                       active, out);
}

int lmc_cuda_code_length(size_t n, const uint64_t *freq, const uint64_t *total, double *bits,
                         lmc_cuda_stream_t stream) {
    return launch_items(lmc_code_length_kernel, n, stream, n, freq, total, bits);
}

int lmc_cuda_encoders_begin(lmc_encoder_t *encoders, uint32_t n, uint8_t *bytes, size_t capacity_bytes,
                            lmc_cuda_stream_t stream) {
    return launch_items(lmc_encoders_place_kernel, n, stream, encoders, n, bytes, capacity_bytes, true);
}

int lmc_cuda_encoders_place(lmc_encoder_t *encoders, uint32_t n, uint8_t *bytes, size_t capacity_bytes,
                            lmc_cuda_stream_t stream) {
    return launch_items(lmc_encoders_place_kernel, n, stream, encoders, n, bytes, capacity_bytes, false);
}

int lmc_cuda_encoders_put(lmc_encoder_t *encoders, uint32_t n, const uint64_t *start, const uint64_t *freq,
                          const uint64_t *total, const uint8_t *active, uint64_t *error,
                          lmc_cuda_stream_t stream) {
    interval_output_t interval = {(uint64_t *)start, (uint64_t *)freq, (uint64_t *)total, error};
    return launch_items(lmc_encoders_put_kernel, n, stream, encoders, n, interval, active);
}

int lmc_cuda_encoders_end(lmc_encoder_t *encoders, uint32_t n, lmc_cuda_stream_t stream) {
    return launch_items(lmc_encoders_end_kernel, n, stream, encoders, n);
}

int lmc_cuda_decoders_begin(lmc_decoder_t *decoders, uint32_t n, const uint8_t *payloads,
                            const uint64_t *offsets, lmc_cuda_stream_t stream) {
    return launch_items(lmc_decoders_begin_kernel, n, stream, decoders, n, payloads, offsets);
}

int lmc_cuda_decode_step(const lmc_cuda_rows_t *rows, const uint8_t *active, lmc_decoder_t *decoders,
                         int32_t *tokens, uint64_t *error, lmc_cuda_stream_t stream) {
    if (rows->n_rows == 0) return cudaSuccess;
    lmc_tile_plan_t plan;
    cudaError_t status = plan_rows(*rows, rows->n_rows, &plan);
    if (status != cudaSuccess) return status;
    return launch_decode(*rows, 0, rows->n_rows, plan, active, decoders, tokens, error, false, stream);
}

int lmc_cuda_decode_stream(const lmc_cuda_rows_t *rows, lmc_decoder_t *decoder, int32_t *tokens,
                           uint64_t *error, lmc_cuda_stream_t stream) {
    lmc_tile_plan_t plan;
    cudaError_t status = plan_rows(*rows, 1, &plan);
    for (uint32_t row = 0; row < rows->n_rows && status == cudaSuccess; row++)
        status = launch_decode(*rows, row, 1, plan, nullptr, decoder, tokens, error, true, stream);
    return status;
}

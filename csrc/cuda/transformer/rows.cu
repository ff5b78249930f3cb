/* The kernels of the exact engine that work on rows one by one: which stream and position a row is, its
 * embedding, its norm, and what becomes of errors and of decoded tokens. */
#include "cuda/transformer/launch.h"
#include "cuda/coding/row_tiles.h"

namespace {

constexpr unsigned ROW_THREADS = 128;
/* Rows of a norm's block. Their four chains each are what takes the time, and 16 lanes hide it badly: small
 * blocks, of which many fit a multiprocessor, hide it better. */
constexpr unsigned NORM_ROWS = 4, NORM_CHAINS = 4, NORM_CHUNK_MAX = 2048;

/* Streams and positions. */

/* One block a stretch: all its threads read the position that the first one then moves on. */
__global__ void lmc_rows_of_pass_kernel(const __grid_constant__ lmc_cuda_transformer_batch_t batch,
                                        const __grid_constant__ lmc_cuda_transformer_cache_t cache,
                                        bool keeps_positions, uint32_t n_positions, uint32_t *row_streams,
                                        uint32_t *row_positions, uint64_t *error) {
    uint32_t begin = batch.row_begin[blockIdx.x], n_rows = batch.row_begin[blockIdx.x + 1] - begin;
    uint32_t stream = batch.streams != nullptr ? batch.streams[blockIdx.x] : blockIdx.x, position = 0;
    bool is_known = stream < cache.n_streams;
    if (keeps_positions && is_known) position = cache.positions[stream];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n_rows; i += ROW_THREADS) {
        bool fits = is_known && position < n_positions && i < n_positions - position;
        row_streams[begin + i] = stream;
        row_positions[begin + i] = fits ? position + i : LMC_NO_POSITION;
        if (!fits) report_error(error, begin + i, LMC_ERROR_CAPACITY);
    }
    if (threadIdx.x == 0 && keeps_positions && is_known && position < n_positions)
        cache.positions[stream] = position + min(n_rows, n_positions - position);
}

__global__ void lmc_rows_of_step_kernel(const uint32_t *streams, const int32_t *tokens, uint32_t n_rows,
                                        uint32_t n_embeddings,
                                        const __grid_constant__ lmc_cuda_transformer_cache_t cache,
                                        uint32_t n_positions, uint32_t *row_streams, uint32_t *row_positions,
                                        uint8_t *is_active, uint64_t *error) {
    uint32_t row = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (row >= n_rows) return;
    uint32_t stream = streams != nullptr ? streams[row] : row;
    int32_t token = tokens[row];
    uint32_t position = stream < cache.n_streams ? cache.positions[stream] : LMC_NO_POSITION;
    bool is_token = (uint32_t)token < n_embeddings, takes_part = is_token && position < n_positions;
    if (token >= 0 && !is_token) report_error(error, row, LMC_ERROR_TOKEN);
    row_streams[row] = stream;
    row_positions[row] = takes_part ? position : LMC_NO_POSITION;
    is_active[row] = takes_part;
    if (takes_part) cache.positions[stream] = position + 1;
}

/* Embedding: one block a row. */

__device__ __forceinline__ const unsigned char *row_of(const lmc_transformer_tensor_t &matrix, uint32_t row,
                                                       uint32_t n_features) {
    return (const unsigned char *)matrix.data + (size_t)row * n_features * lmc_element_bytes(matrix.dtype);
}

__global__ void lmc_embed_kernel(const __grid_constant__ lmc_cuda_embedding_t e, const int32_t *tokens,
                                 const uint32_t *row_positions, uint64_t *error) {
    uint32_t row = blockIdx.x, token = (uint32_t)tokens[row];
    if (token >= e.n_embeddings) {
        if (error != nullptr && threadIdx.x == 0) report_error(error, row, LMC_ERROR_TOKEN);
        token = 0;
    }
    const unsigned char *source = row_of(e.tokens, token, e.n_features), *of_position = nullptr;
    if (e.positions.data != nullptr) {
        uint32_t position = row_positions[row];
        of_position = row_of(e.positions, position < e.n_positions ? position : 0, e.n_features);
    }
    for (uint32_t i = threadIdx.x; i < e.n_features; i += ROW_THREADS) {
        float x = lmc_mul(lmc_symbol_load(source, i, e.tokens.dtype), e.multiplier);
        if (of_position != nullptr) x = lmc_add(x, lmc_symbol_load(of_position, i, e.positions.dtype));
        e.output[(size_t)row * e.n_features + i] = x;
    }
}

/* Norms. */

/* A chunk of the block's rows in shared memory, floats_apart a row, which puts the chains' reads in different
 * banks. */
struct norm_chunk_t {
    float *values;
    uint32_t n_features, floats_apart;
};

__device__ __forceinline__ void load_chunk(const norm_chunk_t &chunk, const lmc_cuda_norm_t &norm,
                                           uint32_t first_row, uint32_t begin, uint32_t n) {
    __syncthreads();
    for (uint32_t row = 0; row < NORM_ROWS && first_row + row < norm.n_rows; row++) {
        const float *source = norm.input + (size_t)(first_row + row) * norm.stride + begin;
        for (uint32_t i = threadIdx.x; i < n; i += ROW_THREADS)
            chunk.values[row * chunk.floats_apart + i] = source[i];
    }
    __syncthreads();
}

/* Four chains a row, by feature modulo 4, joined as (0 + 1) + (2 + 3): FORMAT.md, section 4.2. Chunks hold a
 * multiple of 4 features, and a row that fits one is loaded once, by the first of the sums, IS_FIRST. */
template <bool SQUARES, bool IS_FIRST>
__device__ __forceinline__ void sum_features(const norm_chunk_t &chunk, const lmc_cuda_norm_t &norm,
                                             uint32_t first_row, const float *centres, float *partial,
                                             float *sums) {
    uint32_t row = threadIdx.x / NORM_CHAINS, chain = threadIdx.x % NORM_CHAINS;
    bool has_chain = row < NORM_ROWS && first_row + row < norm.n_rows;
    float sum = 0.0f, centre = SQUARES && has_chain ? centres[row] : 0.0f;
    for (uint32_t begin = 0; begin < norm.n_features; begin += chunk.n_features) {
        uint32_t n = min(norm.n_features - begin, chunk.n_features);
        if (IS_FIRST || norm.n_features > chunk.n_features) load_chunk(chunk, norm, first_row, begin, n);
        if (!has_chain) continue;
        const float *values = chunk.values + row * chunk.floats_apart;
#pragma unroll 8
        for (uint32_t i = chain; i < n; i += NORM_CHAINS) {
            float distance = lmc_sub(values[i], centre);
            sum = SQUARES ? lmc_fma(distance, distance, sum) : lmc_add(sum, values[i]);
        }
    }
    if (has_chain) partial[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < NORM_ROWS) {
        const float *p = partial + threadIdx.x * NORM_CHAINS;
        if (first_row + threadIdx.x < norm.n_rows)
            sums[threadIdx.x] = lmc_add(lmc_add(p[0], p[1]), lmc_add(p[2], p[3]));
    }
    __syncthreads();
}

__device__ __forceinline__ void write_norm(const lmc_cuda_norm_t &norm, size_t row, float mean,
                                           float factor) {
    size_t of_gains = norm.n_gains == 1 ? 0 : row % norm.n_gains * norm.n_features;
    const float *gain = norm.gains[0] + of_gains, *bias = norm.biases[0] + of_gains;
    const float *input = norm.input + row * norm.stride;
    float *output = norm.outputs[0] + row * norm.stride, *second = norm.outputs[1];
    auto scaled = [&](uint32_t i) { return lmc_mul(lmc_sub(input[i], mean), factor); };
    uint32_t i = threadIdx.x;
    if (norm.is_added) {
        for (; i < norm.n_features; i += ROW_THREADS)
            output[i] = lmc_fma(lmc_fma(scaled(i), gain[i], bias[i]), norm.multiplier, output[i]);
    } else if (norm.outputs[1] == nullptr) {
        for (; i < norm.n_features; i += ROW_THREADS)
            output[i] = lmc_fma(scaled(i), gain[i], bias[i]);
    } else {
        second += row * norm.stride;
        for (; i < norm.n_features; i += ROW_THREADS) {
            float x = scaled(i);
            output[i] = lmc_fma(x, gain[i], bias[i]);
            second[i] = lmc_fma(x, norm.gains[1][i], norm.biases[1][i]);
        }
    }
}

/* An RMSNorm is a LayerNorm about 0. */
template <lmc_norm_t KIND>
__global__ void __launch_bounds__(ROW_THREADS)
    lmc_norm_kernel(const __grid_constant__ lmc_cuda_norm_t norm, uint32_t chunk_features) {
    LMC_DYNAMIC_SHARED(float, norm_memory);
    __shared__ float partial[NORM_ROWS * NORM_CHAINS], means[NORM_ROWS], factors[NORM_ROWS];
    norm_chunk_t chunk = {norm_memory, chunk_features, chunk_features + NORM_CHAINS};
    uint32_t first_row = blockIdx.x * NORM_ROWS, row = threadIdx.x;
    bool is_row = row < NORM_ROWS && first_row + row < norm.n_rows;
    float count = (float)norm.n_features;
    if (KIND == LMC_NORM_LAYER) {
        sum_features<false, true>(chunk, norm, first_row, nullptr, partial, means);
        if (is_row) means[row] = lmc_div(means[row], count);
    } else if (row < NORM_ROWS) {
        means[row] = 0.0f;
    }
    __syncthreads();
    sum_features<true, KIND != LMC_NORM_LAYER>(chunk, norm, first_row, means, partial, factors);
    if (is_row) factors[row] = lmc_div(1.0f, lmc_sqrt(lmc_add(lmc_div(factors[row], count), norm.epsilon)));
    __syncthreads();
    for (uint32_t i = 0; i < NORM_ROWS && first_row + i < norm.n_rows; i++)
        write_norm(norm, first_row + i, means[i], factors[i]);
}

/* Errors, decoded tokens. */

__global__ void lmc_error_merge_kernel(const uint64_t *found, uint32_t first_row, uint64_t *error) {
    if (threadIdx.x == 0 && *found != LMC_CUDA_NO_ERROR)
        report_error(error, (uint32_t)(*found >> 8) + first_row, (lmc_status_t)(*found & 0xFF));
}

/* One block, so that all tokens are in the log before it counts as longer. */
__global__ void lmc_chain_log_kernel(const __grid_constant__ lmc_cuda_transformer_chain_t chain) {
    uint32_t step = *chain.n_logged;
    if (step >= chain.log_steps) return;
    for (uint32_t i = threadIdx.x; i < chain.n_rows; i += ROW_THREADS)
        chain.log[(size_t)step * chain.n_rows + i] = chain.tokens[i];
    __syncthreads();
    if (threadIdx.x == 0) *chain.n_logged = step + 1;
}

} // namespace

cudaError_t lmc_cuda_rows_of_pass(const lmc_cuda_transformer_batch_t &batch,
                                  const lmc_cuda_transformer_cache_t &cache, bool keeps_positions,
                                  uint32_t n_positions, const lmc_cuda_transformer_work_t &work,
                                  uint64_t *error, lmc_cuda_stream_t stream) {
    return launch_blocks(lmc_rows_of_pass_kernel, batch.n_stretches, ROW_THREADS, 0, stream, batch, cache,
                         keeps_positions, n_positions, work.row_streams, work.row_positions, error);
}

cudaError_t lmc_cuda_rows_of_step(const uint32_t *streams, const int32_t *tokens, uint32_t n_rows,
                                  uint32_t n_embeddings, const lmc_cuda_transformer_cache_t &cache,
                                  uint32_t n_positions, const lmc_cuda_transformer_work_t &work,
                                  uint64_t *error, lmc_cuda_stream_t stream) {
    return launch_blocks(lmc_rows_of_step_kernel, (n_rows + ROW_THREADS - 1) / ROW_THREADS, ROW_THREADS, 0,
                         stream, streams, tokens, n_rows, n_embeddings, cache, n_positions, work.row_streams,
                         work.row_positions, work.is_active, error);
}

cudaError_t lmc_cuda_embed(const lmc_cuda_embedding_t &embedding, const int32_t *tokens,
                           const uint32_t *row_positions, uint64_t *error, lmc_cuda_stream_t stream) {
    return launch_blocks(lmc_embed_kernel, embedding.n_rows, ROW_THREADS, 0, stream, embedding, tokens,
                         row_positions, error);
}

cudaError_t lmc_cuda_norm(const lmc_cuda_norm_t &norm, lmc_cuda_stream_t stream) {
    uint32_t in_fours = (norm.n_features + NORM_CHAINS - 1) / NORM_CHAINS * NORM_CHAINS;
    uint32_t chunk = in_fours < NORM_CHUNK_MAX ? in_fours : NORM_CHUNK_MAX;
    size_t shared_bytes = NORM_ROWS * (chunk + NORM_CHAINS) * sizeof(float);
    auto kernel =
        norm.kind == LMC_NORM_LAYER ? lmc_norm_kernel<LMC_NORM_LAYER> : lmc_norm_kernel<LMC_NORM_RMS>;
    return launch_blocks(kernel, (norm.n_rows + NORM_ROWS - 1) / NORM_ROWS, ROW_THREADS, shared_bytes, stream,
                         norm, chunk);
}

cudaError_t lmc_cuda_error_merge(const uint64_t *found, uint32_t first_row, uint64_t *error,
                                 lmc_cuda_stream_t stream) {
    return launch_blocks(lmc_error_merge_kernel, 1, LMC_WARP_LANES, 0, stream, found, first_row, error);
}

cudaError_t lmc_cuda_chain_log(const lmc_cuda_transformer_chain_t &chain, lmc_cuda_stream_t stream) {
    return launch_blocks(lmc_chain_log_kernel, 1, ROW_THREADS, 0, stream, chain);
}

/* The matrix product of the exact engine: every output is one chain of fma over k, ascending, in one thread.
 * Blocks own tiles of outputs, threads of a block an array of outputs each; the tile's inputs and weights
 * pass through shared memory, DEPTH values of k at a time, while the next ones are on their way. Weights of
 * the short formats are widened once, on their way into shared memory. The shape of the tile decides how fast
 * it goes, never what comes out. */
#include <cuda_pipeline_primitives.h>

#include "cuda/transformer/product_tiles.h"

namespace {

/* N_TOKENS x N_ROWS outputs, of which a thread has TOKENS x ROWS. A warp is 4 x 8 threads. */
template <int N_TOKENS_, int N_ROWS_, int TOKENS_, int ROWS_, int DEPTH_, int BLOCKS_> struct tile_t {
    static constexpr unsigned N_TOKENS = N_TOKENS_, N_ROWS = N_ROWS_, TOKENS = TOKENS_, ROWS = ROWS_;
    static constexpr unsigned DEPTH = DEPTH_, BLOCKS = BLOCKS_; /* blocks that shall fit a multiprocessor */
    static constexpr unsigned THREADS = N_TOKENS / TOKENS * (N_ROWS / ROWS);
    static constexpr unsigned WARPS_OF_ROWS = N_ROWS / ROWS / 8;
    /* With 64 chains a thread, more than four values of k at once would not leave their registers alone. */
    static constexpr unsigned UNROLL = TOKENS * ROWS == 64 ? 1 : 4;
    /* An odd number of 16-byte pieces: those of eight rows lie in different banks. */
    static constexpr unsigned STRIDE = DEPTH + 4;
};
/* A thread of the large tile loads 4 vectors of shared memory for 64 fma; the others have fewer outputs a
 * thread, so that few tokens spread over more threads and over more blocks. What ptxas of CUDA 13.0 makes of
 * the large tile for sm_90: 128 registers, nothing spilled; a stage (16 values of k) is 1,168 instructions of
 * a warp with binary32 weights and 1,182 with short ones, of which 1,024 are fma: at most 88 % and 87 % of a
 * device's rate, a bound and not a measurement. */
using large_t = tile_t<128, 128, 8, 8, 16, 2>;
using medium_t = tile_t<32, 64, 4, 4, 32, 4>;
using few_t = tile_t<8, 32, 2, 1, 64, 5>;

template <class TILE> struct stage_t {
    float input[TILE::N_TOKENS][TILE::STRIDE], weights[TILE::N_ROWS][TILE::STRIDE];
};

/* What a thread copies of a tile's rows: COUNT pieces of 16 bytes for every stage, STEP rows apart. */
template <class TILE, unsigned N_ROWS, lmc_dtype_t DTYPE> struct pieces_t {
    static constexpr unsigned ELEMENTS = DTYPE == LMC_FLOAT32 ? 4 : 8, BYTES = 16 / ELEMENTS;
    static constexpr unsigned STEP = TILE::THREADS / (TILE::DEPTH / ELEMENTS), COUNT = N_ROWS / STEP;
    static_assert(N_ROWS % STEP == 0 && TILE::DEPTH % ELEMENTS == 0, "every thread copies as many pieces");
    const unsigned char *sources[COUNT]; /* of the stage that comes next */
    unsigned row, at;                    /* of the first piece in the tile */

    /* Rows past the last are the last: what comes of them is not stored. */
    __device__ __forceinline__ pieces_t(const void *matrix, size_t first_row, uint32_t n_rows, uint32_t n_k) {
        row = threadIdx.x / (TILE::DEPTH / ELEMENTS);
        at = threadIdx.x % (TILE::DEPTH / ELEMENTS) * ELEMENTS;
#pragma unroll
        for (unsigned i = 0; i < COUNT; i++) {
            size_t index = first_row + row + i * STEP, last = n_rows - 1;
            sources[i] = (const unsigned char *)matrix + ((index < last ? index : last) * n_k + at) * BYTES;
        }
    }

    __device__ __forceinline__ void advance() {
#pragma unroll
        for (unsigned i = 0; i < COUNT; i++)
            sources[i] += TILE::DEPTH * BYTES;
    }

    /* Binary32: on its way into shared memory when this returns. left: values of k from the stage on. */
    __device__ __forceinline__ void copy(float (*target)[TILE::STRIDE], uint32_t left) {
        if (at < left) {
#pragma unroll
            for (unsigned i = 0; i < COUNT; i++)
                __pipeline_memcpy_async(&target[row + i * STEP][at], sources[i], 16);
        }
        advance();
    }

    /* A short format: to registers, and from there to shared memory. */
    __device__ __forceinline__ void load(uint4 (&vectors)[COUNT], uint32_t left) {
        if (at < left) {
#pragma unroll
            for (unsigned i = 0; i < COUNT; i++)
                vectors[i] = *(const uint4 *)sources[i];
        }
        advance();
    }

    __device__ __forceinline__ void store(const uint4 (&vectors)[COUNT], float (*target)[TILE::STRIDE],
                                          uint32_t left) const {
        if (at >= left) return;
#pragma unroll
        for (unsigned i = 0; i < COUNT; i++) {
            lmc_vector_t vector = {{vectors[i].x, vectors[i].y, vectors[i].z, vectors[i].w}};
            float4 *to = (float4 *)&target[row + i * STEP][at];
#pragma unroll
            for (unsigned e = 0; e < ELEMENTS; e += 4)
                to[e / 4] = make_float4(
                    lmc_vector_element(&vector, e, DTYPE), lmc_vector_element(&vector, e + 1, DTYPE),
                    lmc_vector_element(&vector, e + 2, DTYPE), lmc_vector_element(&vector, e + 3, DTYPE));
        }
    }
};

/* The stage that is computed and the one that is filled meanwhile. */
template <class TILE, lmc_dtype_t DTYPE> struct aligned_copy_t {
    pieces_t<TILE, TILE::N_TOKENS, LMC_FLOAT32> input;
    pieces_t<TILE, TILE::N_ROWS, DTYPE> weights;
    uint4 vectors[DTYPE == LMC_FLOAT32 ? 1 : pieces_t<TILE, TILE::N_ROWS, DTYPE>::COUNT];

    __device__ __forceinline__ aligned_copy_t(const lmc_cuda_product_t &p, size_t first_token,
                                              size_t first_row)
        : input(p.input, first_token, p.n_tokens, p.n_k), weights(p.weights, first_row, p.n_rows, p.n_k) {
    }

    __device__ __forceinline__ void begin(stage_t<TILE> &stage, uint32_t, uint32_t left) {
        input.copy(stage.input, left);
        if constexpr (DTYPE == LMC_FLOAT32)
            weights.copy(stage.weights, left);
        else
            weights.load(vectors, left);
        __pipeline_commit();
    }

    __device__ __forceinline__ void end(stage_t<TILE> &stage, uint32_t left) {
        if constexpr (DTYPE != LMC_FLOAT32) weights.store(vectors, stage.weights, left);
    }
};

/* One element after the other, for matrices whose rows do not all begin at a multiple of 16 bytes. */
template <class TILE, lmc_dtype_t DTYPE> struct element_copy_t {
    const lmc_cuda_product_t &p;
    size_t first_token, first_row;

    __device__ __forceinline__ element_copy_t(const lmc_cuda_product_t &product, size_t token, size_t row)
        : p(product), first_token(token), first_row(row) {
    }

    template <lmc_dtype_t OF>
    __device__ __forceinline__ void copy(float (*target)[TILE::STRIDE], unsigned n, const void *matrix,
                                         size_t first, uint32_t n_rows, uint32_t k) const {
        for (unsigned i = threadIdx.x; i < n * TILE::DEPTH; i += TILE::THREADS) {
            unsigned row = i / TILE::DEPTH, at = i % TILE::DEPTH;
            if (k + at >= p.n_k || first + row >= n_rows) continue;
            const unsigned char *source =
                (const unsigned char *)matrix + ((first + row) * p.n_k + k + at) * lmc_element_bytes(OF);
            target[row][at] = lmc_symbol_load(source, 0, OF);
        }
    }

    __device__ __forceinline__ void begin(stage_t<TILE> &stage, uint32_t k, uint32_t) const {
        copy<LMC_FLOAT32>(stage.input, TILE::N_TOKENS, p.input, first_token, p.n_tokens, k);
        copy<DTYPE>(stage.weights, TILE::N_ROWS, p.weights, first_row, p.n_rows, k);
    }

    __device__ __forceinline__ void end(stage_t<TILE> &, uint32_t) const {
    }
};

/* Where a thread's outputs lie in the tile: token + 4 i, row + 8 j. */
struct corner_t {
    unsigned token, row;
};

template <class TILE> __device__ __forceinline__ corner_t corner_of_thread() {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    corner_t corner;
    corner.token = warp / TILE::WARPS_OF_ROWS * 4 * TILE::TOKENS + lane_of_4(lane);
    corner.row = warp % TILE::WARPS_OF_ROWS * 8 * TILE::ROWS + lane_of_8(lane);
    return corner;
}

template <class TILE>
__device__ __forceinline__ void multiply_row(const float *x, const float (*w)[4], float (&sums)[TILE::ROWS]) {
#pragma unroll
    for (unsigned k = 0; k < 4; k++) {
#pragma unroll
        for (unsigned j = 0; j < TILE::ROWS; j++)
            sums[j] = lmc_fma(w[j][k], x[k], sums[j]);
    }
}

/* The chains go on over the DEPTH values of a full stage. */
template <class TILE>
__device__ __forceinline__ void multiply_stage(const stage_t<TILE> &stage, corner_t corner,
                                               float (&sums)[TILE::TOKENS][TILE::ROWS]) {
#pragma unroll TILE::UNROLL
    for (unsigned k = 0; k < TILE::DEPTH; k += 4) {
        float w[TILE::ROWS][4];
#pragma unroll
        for (unsigned j = 0; j < TILE::ROWS; j++)
            *(float4 *)w[j] = *(const float4 *)&stage.weights[corner.row + 8 * j][k];
#pragma unroll
        for (unsigned i = 0; i < TILE::TOKENS; i++) {
            float x[4];
            *(float4 *)x = *(const float4 *)&stage.input[corner.token + 4 * i][k];
            multiply_row<TILE>(x, w, sums[i]);
        }
    }
}

/* The same over the first n_k values: the last stage of a length that DEPTH does not divide. */
template <class TILE>
__device__ __forceinline__ void multiply_rest(const stage_t<TILE> &stage, corner_t corner, uint32_t n_k,
                                              float (&sums)[TILE::TOKENS][TILE::ROWS]) {
#pragma unroll 1
    for (uint32_t k = 0; k < n_k; k++) {
        float w[TILE::ROWS];
#pragma unroll
        for (unsigned j = 0; j < TILE::ROWS; j++)
            w[j] = stage.weights[corner.row + 8 * j][k];
#pragma unroll
        for (unsigned i = 0; i < TILE::TOKENS; i++) {
            float x = stage.input[corner.token + 4 * i][k];
#pragma unroll
            for (unsigned j = 0; j < TILE::ROWS; j++)
                sums[i][j] = lmc_fma(w[j], x, sums[i][j]);
        }
    }
}

template <class TILE>
__device__ __forceinline__ void store_sums(const lmc_cuda_product_t &p, size_t first_token, size_t first_row,
                                           corner_t corner, const float (&sums)[TILE::TOKENS][TILE::ROWS]) {
#pragma unroll
    for (unsigned i = 0; i < TILE::TOKENS; i++) {
#pragma unroll
        for (unsigned j = 0; j < TILE::ROWS; j++)
            store_output<false>(p, first_token + corner.token + 4 * i, first_row + corner.row + 8 * j,
                                sums[i][j]);
    }
}

/* Where outputs are finished: by way of memory that the stages no longer need, so that one short loop does
 * it, over outputs that lie side by side. */
template <class TILE>
__device__ __forceinline__ void finish_sums(const lmc_cuda_product_t &p, size_t first_token, size_t first_row,
                                            corner_t corner, float *memory,
                                            const float (&sums)[TILE::TOKENS][TILE::ROWS]) {
    constexpr unsigned N_ROWS = 8 * TILE::ROWS, STRIDE = N_ROWS + 8; /* a warp's; lanes in different banks */
    constexpr unsigned TOKENS = TILE::TOKENS < 4 ? TILE::TOKENS : 4, N_WARPS = TILE::THREADS / LMC_WARP_LANES;
    static_assert(N_WARPS * 4 * TOKENS * STRIDE * sizeof(float) <= 2 * sizeof(stage_t<TILE>),
                  "the stages hold the sums of some tokens of every warp");
    unsigned lane = threadIdx.x % LMC_WARP_LANES;
    memory += threadIdx.x / LMC_WARP_LANES * 4 * TOKENS * STRIDE;
    first_token += corner.token - lane_of_4(lane);
    first_row += corner.row - lane_of_8(lane);
#pragma unroll
    for (unsigned first = 0; first < TILE::TOKENS; first += TOKENS, first_token += 4 * TOKENS) {
        __syncwarp();
#pragma unroll
        for (unsigned i = 0; i < TOKENS * TILE::ROWS; i++)
            memory[(i / TILE::ROWS * 4 + lane_of_4(lane)) * STRIDE + i % TILE::ROWS * 8 + lane_of_8(lane)] =
                sums[first + i / TILE::ROWS][i % TILE::ROWS];
        __syncwarp();
#pragma unroll 1
        for (unsigned i = lane; i < 4 * TOKENS * N_ROWS; i += LMC_WARP_LANES)
            store_output<true>(p, first_token + i / N_ROWS, first_row + i % N_ROWS,
                               memory[i / N_ROWS * STRIDE + i % N_ROWS]);
    }
}

/* One tile a block; blocks that follow each other share their weights. */
template <class TILE, lmc_dtype_t DTYPE, template <class, lmc_dtype_t> class COPY, bool HAS_FINISH>
__global__ void __launch_bounds__(TILE::THREADS, TILE::BLOCKS)
    lmc_product_kernel(const __grid_constant__ lmc_cuda_product_t p) {
    alignas(16) __shared__ stage_t<TILE> stages[2];
    uint32_t n_token_tiles = (p.n_tokens + TILE::N_TOKENS - 1) / TILE::N_TOKENS;
    size_t first_token = (size_t)(blockIdx.x % n_token_tiles) * TILE::N_TOKENS,
           first_row = (size_t)(blockIdx.x / n_token_tiles) * TILE::N_ROWS;
    const corner_t corner = corner_of_thread<TILE>();
    float sums[TILE::TOKENS][TILE::ROWS] = {};
    COPY<TILE, DTYPE> copy(p, first_token, first_row);
    /* After it, a stage has come for all threads, and none still reads the other one. */
    auto meet = [] {
        __pipeline_wait_prior(0);
        __syncthreads();
    };

    copy.begin(stages[0], 0, p.n_k);
    copy.end(stages[0], p.n_k);
    uint32_t left = p.n_k, turn = 0;
    for (; left >= TILE::DEPTH; turn ^= 1) {
        meet();
        left -= TILE::DEPTH;
        copy.begin(stages[turn ^ 1], p.n_k - left, left);
        multiply_stage<TILE>(stages[turn], corner, sums);
        copy.end(stages[turn ^ 1], left);
    }
    if (left > 0) {
        meet();
        multiply_rest<TILE>(stages[turn], corner, left, sums);
    }
    if constexpr (HAS_FINISH) {
        __syncthreads(); /* none reads a stage any more */
        finish_sums<TILE>(p, first_token, first_row, corner, &stages[0].input[0][0], sums);
    } else {
        store_sums<TILE>(p, first_token, first_row, corner, sums);
    }
}

template <class TILE, template <class, lmc_dtype_t> class COPY, bool HAS_FINISH>
cudaError_t launch_kernel(const lmc_cuda_product_t &p, lmc_cuda_stream_t stream) {
    auto kernel = p.dtype == LMC_FLOAT32   ? lmc_product_kernel<TILE, LMC_FLOAT32, COPY, HAS_FINISH>
                  : p.dtype == LMC_FLOAT16 ? lmc_product_kernel<TILE, LMC_FLOAT16, COPY, HAS_FINISH>
                                           : lmc_product_kernel<TILE, LMC_BFLOAT16, COPY, HAS_FINISH>;
    return launch_blocks(kernel, count_tiles<TILE>(p), TILE::THREADS, 0, stream, p);
}

template <class TILE, template <class, lmc_dtype_t> class COPY = aligned_copy_t>
cudaError_t launch_tiles(const lmc_cuda_product_t &p, lmc_cuda_stream_t stream) {
    return p.with_finish ? launch_kernel<TILE, COPY, true>(p, stream)
                         : launch_kernel<TILE, COPY, false>(p, stream);
}

} // namespace

cudaError_t lmc_cuda_product(const lmc_cuda_product_t &p, lmc_cuda_stream_t stream) {
    int n_processors;
    cudaError_t status = count_processors(&n_processors);
    if (status != cudaSuccess) return status;
    uint32_t vector = p.dtype == LMC_FLOAT32 ? 4 : 8;
    if (p.n_k % vector != 0 || (uintptr_t)p.weights % 16 != 0 || (uintptr_t)p.input % 16 != 0)
        return launch_tiles<medium_t, element_copy_t>(p, stream);
    double large = estimate_time<large_t>(p, n_processors, 0.8),
           medium = estimate_time<medium_t>(p, n_processors, 0.5),
           few = estimate_time<few_t>(p, n_processors, 0.25);
    if (large <= medium && large <= few) return launch_tiles<large_t>(p, stream);
    return medium <= few ? launch_tiles<medium_t>(p, stream) : launch_tiles<few_t>(p, stream);
}

/* The linear maps of exact-int8: numbers to 8-bit codes, and the product of codes on the integer tensor
 * cores. Sums of integers are exact in any order, so that here, unlike in product.cu, warps may share
 * the values of k of one output. */
#include <cuda_pipeline_primitives.h>

#include "core/int8/rule.h"
#include "cuda/coding/warp.h"
#include "cuda/transformer/int8_mma.h"
#include "cuda/transformer/product_tiles.h"

namespace {

/* Codes: one block a row. */

constexpr unsigned QUANTISE_THREADS = 128, QUANTISE_WARPS = QUANTISE_THREADS / LMC_WARP_LANES;

struct number_rows_t {
    const unsigned char *numbers;
    lmc_dtype_t dtype;
    uint32_t n_k;
    bool in_vectors; /* binary32, and every row begins at a multiple of 16 bytes and is of whole vectors */
};

/* Numbers k ... k + 3 of a row; zeros beyond its end. */
__device__ __forceinline__ void load_four(const number_rows_t &rows, const unsigned char *row, uint32_t k,
                                          float (&numbers)[4]) {
    if (rows.in_vectors && k < rows.n_k) {
        float4 four = *(const float4 *)(row + k * sizeof(float));
        numbers[0] = four.x, numbers[1] = four.y, numbers[2] = four.z, numbers[3] = four.w;
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        numbers[i] = k + i < rows.n_k ? lmc_symbol_load(row, k + i, rows.dtype) : 0.0f;
}

__device__ __forceinline__ uint32_t largest_of_block(uint32_t magnitude, int32_t *of_warps) {
    int32_t of_warp = reduce_max((int32_t)magnitude); /* the sign bit is 0 */
    if (threadIdx.x % LMC_WARP_LANES == 0) of_warps[threadIdx.x / LMC_WARP_LANES] = of_warp;
    __syncthreads();
    int32_t largest = of_warps[0];
#pragma unroll
    for (unsigned warp = 1; warp < QUANTISE_WARPS; warp++)
        largest = max(largest, of_warps[warp]);
    return (uint32_t)largest;
}

__global__ void __launch_bounds__(QUANTISE_THREADS)
    lmc_quantise_kernel(const __grid_constant__ number_rows_t rows,
                        const __grid_constant__ lmc_cuda_codes_t codes) {
    __shared__ int32_t of_warps[QUANTISE_WARPS];
    const unsigned char *row = rows.numbers + (size_t)blockIdx.x * rows.n_k * lmc_element_bytes(rows.dtype);
    uint32_t n_padded = (uint32_t)lmc_int8_padded(rows.n_k), largest = 0;
    float numbers[4];
#pragma unroll 4
    for (uint32_t k = 4 * threadIdx.x; k < n_padded; k += 4 * QUANTISE_THREADS) {
        load_four(rows, row, k, numbers);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            largest = max(largest, lmc_int8_magnitude(numbers[i]));
    }
    lmc_int8_rule_t rule = lmc_int8_rule_of(largest_of_block(largest, of_warps));
    uint32_t *target = (uint32_t *)(codes.codes + (size_t)blockIdx.x * n_padded);
#pragma unroll 4
    for (uint32_t k = 4 * threadIdx.x; k < n_padded; k += 4 * QUANTISE_THREADS) {
        uint32_t word = 0;
        load_four(rows, row, k, numbers);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            word |= ((uint32_t)lmc_int8_code(numbers[i], rule) & 0xFF) << 8 * i;
        target[k / 4] = word;
    }
    if (threadIdx.x == 0) codes.scales[blockIdx.x] = rule.scale;
}

/* The product. */

constexpr unsigned PIECE_BYTES = 16, MMA_ROWS = 16, MMA_TOKENS = 8, STAGES = 3;

/* N_TOKENS x N_ROWS outputs, DEPTH values of k at a time; the block's warps stand side by side over tokens,
 * rows and values of k. */
template <int N_TOKENS_, int N_ROWS_, int DEPTH_, int OVER_TOKENS_, int OVER_ROWS_, int OVER_K_, int BLOCKS_>
struct code_tile_t {
    static constexpr unsigned N_TOKENS = N_TOKENS_, N_ROWS = N_ROWS_, DEPTH = DEPTH_, BLOCKS = BLOCKS_;
    static constexpr unsigned OVER_TOKENS = OVER_TOKENS_, OVER_ROWS = OVER_ROWS_, OVER_K = OVER_K_;
    static constexpr unsigned THREADS = 32 * OVER_TOKENS * OVER_ROWS * OVER_K;
    static constexpr unsigned PIECES = DEPTH / PIECE_BYTES;
    /* Tiles of mma that a warp has. */
    static constexpr unsigned ROW_TILES = N_ROWS / OVER_ROWS / MMA_ROWS,
                              TOKEN_TILES = N_TOKENS / OVER_TOKENS / MMA_TOKENS;
    /* Loads bring two tiles of tokens; of a single one the second is the rows that follow, and unused. */
    static constexpr unsigned TOKEN_PAIRS = (TOKEN_TILES + 1) / 2;
};
/* The large tile takes all of the shared memory that a block has without asking: 48 KiB. Its warps have 64 x
 * 64 outputs each: 8 loads of 512 bytes then feed 32 products, of smaller tiles more. Few tokens leave few
 * tiles, whose warps share the values of k. */
using large_t = code_tile_t<128, 128, 64, 2, 2, 1, 2>;
using medium_t = code_tile_t<32, 64, 64, 1, 4, 1, 6>;
using few_t = code_tile_t<8, 16, 256, 1, 1, 4, 8>;

/* The codes of a tile's tokens, then those of its weights. A piece lies not where its number says, but where
 * the pieces that a warp reads at once, one of each of eight rows, fall into different banks. */
template <class TILE> struct code_stage_t {
    uint4 pieces[TILE::N_TOKENS + TILE::N_ROWS][TILE::PIECES];

    static __device__ __forceinline__ unsigned place(unsigned row, unsigned piece) {
        static_assert(TILE::PIECES == 4 || TILE::PIECES >= 8, "rows of 64 bytes, or of 128 and more");
        return piece ^ (TILE::PIECES == 4 ? row >> 1 & 3 : row & 7);
    }

    /* Two tiles of 8 rows, of each the pieces `piece` and the next: words[0] and [1] the first piece of the
     * two, words[2] and [3] the second. */
    __device__ __forceinline__ void load(uint32_t (&words)[4], unsigned first_row, unsigned piece) const {
        unsigned lane = threadIdx.x % LMC_WARP_LANES, row = first_row + lane % 16;
        load_matrices(words, &pieces[row][place(row, piece + lane / 16)]);
    }
};

/* What a thread copies for every stage: COUNT pieces, STEP rows apart. */
template <class TILE> struct code_copy_t {
    static constexpr unsigned ROWS = TILE::N_TOKENS + TILE::N_ROWS, STEP = TILE::THREADS / TILE::PIECES;
    static constexpr unsigned COUNT = ROWS / STEP;
    static_assert(ROWS % STEP == 0, "every thread copies as many pieces");
    const int8_t *sources[COUNT]; /* of the stage that comes next */
    unsigned row, piece;

    /* Rows past the last are the last: what comes of them is not stored. */
    __device__ __forceinline__ code_copy_t(const lmc_cuda_product_t &p, const int8_t *input, uint32_t n_k,
                                           size_t first_token, size_t first_row) {
        row = threadIdx.x / TILE::PIECES;
        piece = threadIdx.x % TILE::PIECES;
#pragma unroll
        for (unsigned i = 0; i < COUNT; i++) {
            unsigned r = row + i * STEP;
            bool is_token = r < TILE::N_TOKENS;
            size_t index = is_token ? first_token + r : first_row + (r - TILE::N_TOKENS);
            size_t last = (is_token ? p.n_tokens : p.n_rows) - 1;
            const int8_t *matrix = is_token ? input : (const int8_t *)p.weights;
            sources[i] = matrix + (index < last ? index : last) * n_k + piece * PIECE_BYTES;
        }
    }

    /* left: values of k from the stage on. Zeros, which add nothing, come where the row has ended. */
    __device__ __forceinline__ void begin(code_stage_t<TILE> &stage, uint32_t left) {
        size_t n_zeros = piece * PIECE_BYTES < left ? 0 : PIECE_BYTES;
#pragma unroll
        for (unsigned i = 0; i < COUNT; i++) {
            unsigned r = row + i * STEP;
            __pipeline_memcpy_async(&stage.pieces[r][stage.place(r, piece)], sources[i], PIECE_BYTES,
                                    n_zeros);
            sources[i] += TILE::DEPTH;
        }
    }
};

/* Where the outputs and the values of k of a thread's warp begin in the tile, and the lane's part in mma. */
struct warp_place_t {
    unsigned token, row, k, g, t;
};

template <class TILE> __device__ __forceinline__ warp_place_t place_of_warp() {
    unsigned warp = threadIdx.x / LMC_WARP_LANES, lane = threadIdx.x % LMC_WARP_LANES;
    warp_place_t place;
    place.k = warp % TILE::OVER_K;
    place.row = warp / TILE::OVER_K % TILE::OVER_ROWS * (TILE::N_ROWS / TILE::OVER_ROWS);
    place.token = warp / (TILE::OVER_K * TILE::OVER_ROWS) * (TILE::N_TOKENS / TILE::OVER_TOKENS);
    place.g = lane / 4;
    place.t = lane % 4;
    return place;
}

template <class TILE> using code_sums_t = int32_t[TILE::ROW_TILES][TILE::TOKEN_TILES][4];

template <class TILE>
__device__ __forceinline__ void multiply_codes(const code_stage_t<TILE> &stage, warp_place_t warp,
                                               code_sums_t<TILE> &sums) {
#pragma unroll
    for (unsigned i = 0; i < TILE::PIECES / 2 / TILE::OVER_K; i++) {
        unsigned piece = 2 * (i * TILE::OVER_K + warp.k);
        uint32_t rows[TILE::ROW_TILES][4], tokens[TILE::TOKEN_PAIRS][4];
#pragma unroll
        for (unsigned m = 0; m < TILE::ROW_TILES; m++)
            stage.load(rows[m], TILE::N_TOKENS + warp.row + m * MMA_ROWS, piece);
#pragma unroll
        for (unsigned n = 0; n < TILE::TOKEN_PAIRS; n++)
            stage.load(tokens[n], warp.token + 2 * n * MMA_TOKENS, piece);
#pragma unroll
        for (unsigned m = 0; m < TILE::ROW_TILES; m++) {
#pragma unroll
            for (unsigned n = 0; n < TILE::TOKEN_TILES; n++) {
                const uint32_t columns[2] = {tokens[n / 2][n % 2], tokens[n / 2][2 + n % 2]};
                mma_int8(sums[m][n], rows[m], columns);
            }
        }
    }
}

/* The sums of warps that shared the values of k come together in the first of them, by way of memory that
 * the stages no longer need. */
template <class TILE>
__device__ __forceinline__ void add_over_k(int32_t *memory, warp_place_t warp, code_sums_t<TILE> &sums) {
    constexpr unsigned N_SUMS = TILE::ROW_TILES * TILE::TOKEN_TILES * 4, LANES = TILE::THREADS / TILE::OVER_K;
    static_assert(TILE::OVER_TOKENS * TILE::OVER_ROWS == 1, "otherwise a lane's place is another one");
    unsigned lane = threadIdx.x % LMC_WARP_LANES;
    int32_t *all = &sums[0][0][0];
#pragma unroll
    for (unsigned i = 0; i < N_SUMS && warp.k > 0; i++)
        memory[((warp.k - 1) * N_SUMS + i) * LANES + lane] = all[i];
    __syncthreads();
#pragma unroll
    for (unsigned k = 0; k < TILE::OVER_K - 1 && warp.k == 0; k++) {
#pragma unroll
        for (unsigned i = 0; i < N_SUMS; i++)
            all[i] += memory[(k * N_SUMS + i) * LANES + lane];
    }
}

/* Sums become outputs 16 rows at a time, by way of the warp's part of memory that the stages no longer need:
 * one short loop over outputs that lie side by side, in place of all that an output takes for every sum of a
 * thread. */
template <class TILE, bool HAS_FINISH>
__device__ __forceinline__ void store_sums(const lmc_cuda_product_t &p, const float *input_scales,
                                           size_t first_token, size_t first_row, int32_t *memory,
                                           warp_place_t warp, const code_sums_t<TILE> &sums) {
    constexpr unsigned N_TOKENS = TILE::TOKEN_TILES * MMA_TOKENS;
    constexpr unsigned STRIDE = MMA_ROWS + 4; /* the lanes of a store fall into different banks */
    static_assert(TILE::THREADS / LMC_WARP_LANES * N_TOKENS * STRIDE * sizeof(int32_t) <=
                      STAGES * sizeof(code_stage_t<TILE>),
                  "the stages hold the sums of one row of tiles of every warp");
    unsigned lane = threadIdx.x % LMC_WARP_LANES;
    memory += threadIdx.x / LMC_WARP_LANES * N_TOKENS * STRIDE;
    first_token += warp.token;
    first_row += warp.row;
#pragma unroll
    for (unsigned m = 0; m < TILE::ROW_TILES; m++, first_row += MMA_ROWS) {
        __syncwarp();
#pragma unroll
        for (unsigned i = 0; i < TILE::TOKEN_TILES * 4; i++)
            memory[(i / 4 * MMA_TOKENS + 2 * warp.t + i % 2) * STRIDE + i % 4 / 2 * 8 + warp.g] =
                sums[m][i / 4][i % 4];
        __syncwarp();
#pragma unroll 1
        for (unsigned i = lane; i < N_TOKENS * MMA_ROWS; i += LMC_WARP_LANES) {
            size_t token = first_token + i / MMA_ROWS, row = first_row + i % MMA_ROWS;
            if (token >= p.n_tokens || row >= p.n_rows) continue;
            float number = lmc_mul((float)memory[i / MMA_ROWS * STRIDE + i % MMA_ROWS], p.scales[row]);
            store_output<HAS_FINISH>(p, token, row, lmc_mul(number, input_scales[token]));
        }
    }
}

/* One tile a block; blocks that follow each other share their weights. */
template <class TILE, bool HAS_FINISH>
__global__ void __launch_bounds__(TILE::THREADS, TILE::BLOCKS)
    lmc_code_product_kernel(const __grid_constant__ lmc_cuda_product_t p,
                            const __grid_constant__ lmc_cuda_codes_t input) {
    __shared__ code_stage_t<TILE> stages[STAGES];
    uint32_t n_token_tiles = (p.n_tokens + TILE::N_TOKENS - 1) / TILE::N_TOKENS;
    uint32_t n_k = (uint32_t)lmc_int8_padded(p.n_k), n_stages = (n_k + TILE::DEPTH - 1) / TILE::DEPTH;
    size_t first_token = (size_t)(blockIdx.x % n_token_tiles) * TILE::N_TOKENS,
           first_row = (size_t)(blockIdx.x / n_token_tiles) * TILE::N_ROWS;
    const warp_place_t warp = place_of_warp<TILE>();
    code_sums_t<TILE> sums = {};
    code_copy_t<TILE> copy(p, input.codes, n_k, first_token, first_row);
    /* Every stage is a group of its own, also those past the end, so that all but the last STAGES - 2 are
     * always the ones to wait for. */
    auto begin = [&](uint32_t stage) {
        if (stage < n_stages) copy.begin(stages[stage % STAGES], n_k - stage * TILE::DEPTH);
        __pipeline_commit();
    };

    for (uint32_t stage = 0; stage < STAGES - 1; stage++)
        begin(stage);
    for (uint32_t stage = 0; stage < n_stages; stage++) {
        __pipeline_wait_prior(STAGES - 2);
        __syncthreads(); /* the stage has come for all, and none still reads the one before it */
        begin(stage + STAGES - 1);
        multiply_codes<TILE>(stages[stage % STAGES], warp, sums);
    }
    __syncthreads(); /* none reads a stage any more */
    if constexpr (TILE::OVER_K > 1) add_over_k<TILE>((int32_t *)stages, warp, sums);
    if (warp.k == 0)
        store_sums<TILE, HAS_FINISH>(p, input.scales, first_token, first_row, (int32_t *)stages, warp, sums);
}

template <class TILE>
cudaError_t launch_tiles(const lmc_cuda_product_t &p, const lmc_cuda_codes_t &input,
                         lmc_cuda_stream_t stream) {
    auto kernel = p.with_finish ? lmc_code_product_kernel<TILE, true> : lmc_code_product_kernel<TILE, false>;
    return launch_blocks(kernel, count_tiles<TILE>(p), TILE::THREADS, 0, stream, p, input);
}

} // namespace

cudaError_t lmc_cuda_int8_quantise(const void *rows, lmc_dtype_t dtype, uint32_t n_rows, uint32_t n_k,
                                   const lmc_cuda_codes_t &codes, lmc_cuda_stream_t stream) {
    bool in_vectors = dtype == LMC_FLOAT32 && n_k % 4 == 0 && (uintptr_t)rows % 16 == 0;
    number_rows_t numbers = {(const unsigned char *)rows, dtype, n_k, in_vectors};
    return launch_blocks(lmc_quantise_kernel, n_rows, QUANTISE_THREADS, 0, stream, numbers, codes);
}

cudaError_t lmc_cuda_int8_product(const lmc_cuda_product_t &p, const lmc_cuda_codes_t &input,
                                  lmc_cuda_stream_t stream) {
    int n_processors;
    cudaError_t status = count_processors(&n_processors);
    if (status != cudaSuccess) return status;
    double large = estimate_time<large_t>(p, n_processors, 0.8),
           medium = estimate_time<medium_t>(p, n_processors, 0.4),
           few = estimate_time<few_t>(p, n_processors, 0.1);
    if (large <= medium && large <= few) return launch_tiles<large_t>(p, input, stream);
    return medium <= few ? launch_tiles<medium_t>(p, input, stream) : launch_tiles<few_t>(p, input, stream);
}

/* Linear maps in 8-bit integers with AVX2: weights are widened to 16 bits, a block at a time, and two
 * products are added into each 32-bit lane at once; tiles of 6 rows x 16 tokens, or of 12 rows x 8 tokens. */
#include "core/int8/kernels.h"

#if defined(__x86_64__)
#define LMC_INT8_PACK 2
#include "core/int8/product_few_tokens_avx2.h"
#include "core/int8/code_lanes.h"

#define LMC_INLINE static inline __attribute__((always_inline))
#define LMC_TILE_ROWS 12
/* Inputs whose widened weights lie on the stack at a time: with their codes they stay in the first cache. */
#define LMC_BLOCK_INPUTS 512

/* The rows of a tile, of which n_rows are there; the others are the last of them again. */
typedef struct lmc_int8_tile {
    size_t row, n_rows, k, n_k; /* inputs k ... k + n_k */
    int16_t weights[LMC_TILE_ROWS][LMC_BLOCK_INPUTS];
} lmc_int8_tile_t;

LMC_INLINE void widen_tile(const lmc_int8_product_t *p, lmc_int8_tile_t *tile, const size_t n_rows) {
    for (size_t r = 0; r < n_rows; r++) {
        size_t row = tile->row + (r < tile->n_rows ? r : tile->n_rows - 1);
        const int8_t *from = p->weights + row * p->n_k + tile->k;
        for (size_t k = 0; k < tile->n_k; k += LMC_INT8_K) {
            /* The next tile's row, which is too short for the hardware prefetcher. */
            if (k % 64 == 0) _mm_prefetch((const char *)(from + n_rows * p->n_k + k), _MM_HINT_T0);
            __m128i narrow = _mm_loadu_si128((const __m128i *)(from + k));
            _mm256_storeu_si256((__m256i *)(tile->weights[r] + k), _mm256_cvtepi8_epi16(narrow));
        }
    }
}

/* n_rows and n_vectors are constants at every call: 12 accumulators. Between blocks the sums wait in the
 * output.
 */
LMC_INLINE void multiply_tile(const lmc_int8_product_t *p, const lmc_int8_tile_t *tile,
                              const lmc_int8_panel_t *input, float *output, const size_t n_rows,
                              const size_t n_vectors) {
    const int32_t *codes = input->codes + tile->k / 2 * LMC_LANES;
    float *out = output + tile->row * LMC_LANES;
    int is_first = tile->k == 0, is_last = tile->k + tile->n_k == p->n_k;
    __m256i sums[LMC_TILE_ROWS][2];
#pragma GCC unroll 12
    for (size_t r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (size_t v = 0; v < n_vectors; v++) {
            sums[r][v] = _mm256_setzero_si256();
            if (!is_first && r < tile->n_rows)
                sums[r][v] = _mm256_loadu_si256((const __m256i *)(out + r * LMC_LANES + v * 8));
        }
    }
    for (size_t k = 0; k < tile->n_k; k += 2) {
        __m256i x[2];
#pragma GCC unroll 2
        for (size_t v = 0; v < n_vectors; v++)
            x[v] = _mm256_loadu_si256((const __m256i *)(codes + v * 8));
#pragma GCC unroll 12
        for (size_t r = 0; r < n_rows; r++) {
            int32_t pair;
            memcpy(&pair, tile->weights[r] + k, sizeof pair);
            __m256i weight = _mm256_set1_epi32(pair);
#pragma GCC unroll 2
            for (size_t v = 0; v < n_vectors; v++)
                sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(weight, x[v]));
        }
        codes += LMC_LANES;
    }
#pragma GCC unroll 12
    for (size_t r = 0; r < n_rows; r++) {
        if (r >= tile->n_rows) break;
#pragma GCC unroll 2
        for (size_t v = 0; v < n_vectors; v++) {
            __m256 y = _mm256_castsi256_ps(sums[r][v]);
            if (is_last) {
                y = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][v]), _mm256_set1_ps(p->scales[tile->row + r]));
                y = _mm256_mul_ps(y, _mm256_loadu_ps(input->scales + v * 8));
                if (p->bias != NULL) y = _mm256_add_ps(y, _mm256_set1_ps(p->bias[tile->row + r]));
            }
            _mm256_storeu_ps(out + r * LMC_LANES + v * 8, y);
        }
    }
}

LMC_INLINE void product_tiles(const lmc_int8_product_t *p, const size_t n_rows, const size_t n_vectors) {
    lmc_int8_tile_t tile;
    for (tile.row = 0; tile.row < p->n_rows; tile.row += n_rows) {
        tile.n_rows = p->n_rows - tile.row < n_rows ? p->n_rows - tile.row : n_rows;
        for (tile.k = 0; tile.k < p->n_k; tile.k += tile.n_k) {
            tile.n_k = p->n_k - tile.k < LMC_BLOCK_INPUTS ? p->n_k - tile.k : LMC_BLOCK_INPUTS;
            widen_tile(p, &tile, n_rows);
            for (size_t i = 0; i < p->n_panels; i++) {
                const char *input = (const char *)p->input + i * p->input_stride;
                multiply_tile(p, &tile, (const lmc_int8_panel_t *)(const void *)input,
                              p->output + i * p->output_stride, n_rows, n_vectors);
            }
        }
    }
}

static void lmc_int8_quantise_run(const float *panel, size_t n_features, size_t n_lanes,
                                  lmc_int8_panel_t *quantised) {
    if (n_lanes <= LMC_INT8_FEW)
        lmc_int8_quantise_few(panel, n_features, n_lanes, quantised);
    else
        lmc_int8_quantise_lanes(panel, n_features, quantised);
}

static void lmc_int8_product_run(const lmc_int8_product_t *p) {
    if (p->n_lanes <= LMC_INT8_FEW) /* one panel */
        lmc_int8_product_few(p, p->input, p->output);
    else if (p->n_lanes > 8)
        product_tiles(p, 6, 2);
    else
        product_tiles(p, 12, 1);
}

const lmc_int8_kernels_t lmc_int8_kernels_avx2 = {lmc_int8_quantise_run, lmc_int8_product_run};

#endif

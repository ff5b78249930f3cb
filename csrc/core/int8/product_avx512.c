/* Linear maps in 8-bit integers with AVX-512 BW, for processors without its 8-bit products: weights are
 * widened to 16 bits, a block at a time, and two products are added into each 32-bit lane at once; tiles of
 * 12 rows x 2 panels. */
#include "core/int8/kernels.h"

#if defined(__x86_64__)
#define LMC_INT8_PACK 2
#if !defined(LMC_EMULATE_AVX512)
#include <immintrin.h>
#endif
#include "core/int8/code_lanes.h"

#define LMC_INLINE static inline __attribute__((always_inline))
#define LMC_TILE_ROWS 12
/* Inputs whose widened weights lie on the stack at a time: with their codes they stay in the first cache. */
#define LMC_BLOCK_INPUTS 256

/* The rows of a tile, of which n_rows are there; the others are the last of them again. */
typedef struct lmc_int8_tile {
    size_t row, n_rows, k, n_k; /* inputs k ... k + n_k */
    int16_t weights[LMC_TILE_ROWS][LMC_BLOCK_INPUTS];
} lmc_int8_tile_t;

static void widen_tile(const lmc_int8_product_t *p, lmc_int8_tile_t *tile) {
    for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
        const int8_t *from =
            p->weights + (tile->row + (r < tile->n_rows ? r : tile->n_rows - 1)) * p->n_k + tile->k;
        for (size_t k = 0; k < tile->n_k; k++)
            tile->weights[r][k] = from[k];
    }
}

/* n_panels is a constant at every call: 12 or 24 accumulators. Between blocks the sums wait in the output. */
LMC_INLINE void multiply_tile(const lmc_int8_product_t *p, const lmc_int8_tile_t *tile, size_t panel,
                              const size_t n_panels) {
    int is_first = tile->k == 0, is_last = tile->k + tile->n_k == p->n_k;
    const lmc_int8_panel_t *input[2];
    float *out[2];
    __m512i sums[LMC_TILE_ROWS][2];
#pragma GCC unroll 2
    for (size_t i = 0; i < n_panels; i++) {
        input[i] =
            (const lmc_int8_panel_t *)(const void *)((const char *)p->input + (panel + i) * p->input_stride);
        out[i] = p->output + (panel + i) * p->output_stride + tile->row * LMC_LANES;
#pragma GCC unroll 12
        for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
            sums[r][i] = _mm512_setzero_si512();
            if (!is_first && r < tile->n_rows) sums[r][i] = _mm512_loadu_si512(out[i] + r * LMC_LANES);
        }
    }
    for (size_t k = 0; k < tile->n_k; k += 2) {
        __m512i x[2];
#pragma GCC unroll 2
        for (size_t i = 0; i < n_panels; i++)
            x[i] = _mm512_loadu_si512(input[i]->codes + (tile->k + k) / 2 * LMC_LANES);
#pragma GCC unroll 12
        for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
            int32_t pair;
            memcpy(&pair, tile->weights[r] + k, sizeof pair);
            __m512i weight = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
            for (size_t i = 0; i < n_panels; i++)
                sums[r][i] = _mm512_add_epi32(sums[r][i], _mm512_madd_epi16(weight, x[i]));
        }
    }
#pragma GCC unroll 12
    for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
        if (r >= tile->n_rows) break;
#pragma GCC unroll 2
        for (size_t i = 0; i < n_panels; i++) {
            __m512 y = _mm512_castsi512_ps(sums[r][i]);
            if (is_last) {
                y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][i]), _mm512_set1_ps(p->scales[tile->row + r]));
                y = _mm512_mul_ps(y, _mm512_loadu_ps(input[i]->scales));
                if (p->bias != NULL) y = _mm512_add_ps(y, _mm512_set1_ps(p->bias[tile->row + r]));
            }
            _mm512_storeu_ps(out[i] + r * LMC_LANES, y);
        }
    }
}

static void lmc_int8_product_run(const lmc_int8_product_t *p) {
    lmc_int8_tile_t tile;
    for (tile.row = 0; tile.row < p->n_rows; tile.row += LMC_TILE_ROWS) {
        tile.n_rows = p->n_rows - tile.row < LMC_TILE_ROWS ? p->n_rows - tile.row : LMC_TILE_ROWS;
        for (tile.k = 0; tile.k < p->n_k; tile.k += tile.n_k) {
            size_t panel = 0;
            tile.n_k = p->n_k - tile.k < LMC_BLOCK_INPUTS ? p->n_k - tile.k : LMC_BLOCK_INPUTS;
            widen_tile(p, &tile);
            for (; panel + 2 <= p->n_panels; panel += 2)
                multiply_tile(p, &tile, panel, 2);
            if (panel < p->n_panels) multiply_tile(p, &tile, panel, 1);
        }
    }
}

const lmc_int8_kernels_t lmc_int8_kernels_avx512 = {lmc_int8_quantise_panel, lmc_int8_product_run};

#endif

/* Linear maps in 8-bit integers with AVX-512 VNNI, which adds four products of 8-bit codes, one of them
 * unsigned, into each 32-bit lane: activations are taken as code + 128, and 128 times the sum of a row's
 * weights is taken off again. Sums are modulo 2^32 on the way and right at the end. Tiles of 12 rows x 2
 * panels. */
#include "core/int8/kernels.h"

#if defined(__x86_64__)
#define LMC_INT8_PACK 4
#define LMC_INT8_UNSIGNED
#if !defined(LMC_EMULATE_AVX512)
#include <immintrin.h>
#endif
#include "core/int8/code_lanes.h"

#define LMC_INLINE static inline __attribute__((always_inline))
#define LMC_TILE_ROWS 12

/* -128 times the sum of each row's weights; of a tile, n_rows are there, the others are the last of them
 * again. */
typedef struct lmc_int8_tile {
    size_t row, n_rows;
    const int8_t *weights[LMC_TILE_ROWS];
    int32_t corrections[LMC_TILE_ROWS];
} lmc_int8_tile_t;

static void begin_tile(const lmc_int8_product_t *p, lmc_int8_tile_t *tile) {
    for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
        const int8_t *weights = p->weights + (tile->row + (r < tile->n_rows ? r : tile->n_rows - 1)) * p->n_k;
        int32_t sum = 0;
        for (size_t k = 0; k < p->n_k; k++)
            sum += weights[k];
        tile->weights[r] = weights;
        tile->corrections[r] = -128 * sum; /* 2^17 * 127 * 128 < 2^31 */
    }
}

/* n_panels is a constant at every call: 12 or 24 accumulators. */
LMC_INLINE void multiply_tile(const lmc_int8_product_t *p, const lmc_int8_tile_t *tile, size_t panel,
                              const size_t n_panels) {
    const lmc_int8_panel_t *input[2];
    __m512i sums[LMC_TILE_ROWS][2];
#pragma GCC unroll 2
    for (size_t i = 0; i < n_panels; i++) {
        input[i] =
            (const lmc_int8_panel_t *)(const void *)((const char *)p->input + (panel + i) * p->input_stride);
#pragma GCC unroll 12
        for (size_t r = 0; r < LMC_TILE_ROWS; r++)
            sums[r][i] = _mm512_set1_epi32(tile->corrections[r]);
    }
    for (size_t k = 0; k < p->n_k; k += 4) {
        __m512i x[2];
#pragma GCC unroll 2
        for (size_t i = 0; i < n_panels; i++)
            x[i] = _mm512_loadu_si512(input[i]->codes + k / 4 * LMC_LANES);
#pragma GCC unroll 12
        for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
            int32_t four;
            memcpy(&four, tile->weights[r] + k, sizeof four);
            __m512i weight = _mm512_set1_epi32(four);
#pragma GCC unroll 2
            for (size_t i = 0; i < n_panels; i++)
                sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], x[i], weight);
        }
    }
#pragma GCC unroll 12
    for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
        if (r >= tile->n_rows) break;
#pragma GCC unroll 2
        for (size_t i = 0; i < n_panels; i++) {
            float *out = p->output + (panel + i) * p->output_stride + (tile->row + r) * LMC_LANES;
            __m512 y =
                _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][i]), _mm512_set1_ps(p->scales[tile->row + r]));
            y = _mm512_mul_ps(y, _mm512_loadu_ps(input[i]->scales));
            if (p->bias != NULL) y = _mm512_add_ps(y, _mm512_set1_ps(p->bias[tile->row + r]));
            _mm512_storeu_ps(out, y);
        }
    }
}

static void lmc_int8_product_run(const lmc_int8_product_t *p) {
    lmc_int8_tile_t tile;
    for (tile.row = 0; tile.row < p->n_rows; tile.row += LMC_TILE_ROWS) {
        size_t panel = 0;
        tile.n_rows = p->n_rows - tile.row < LMC_TILE_ROWS ? p->n_rows - tile.row : LMC_TILE_ROWS;
        begin_tile(p, &tile);
        for (; panel + 2 <= p->n_panels; panel += 2)
            multiply_tile(p, &tile, panel, 2);
        if (panel < p->n_panels) multiply_tile(p, &tile, panel, 1);
    }
}

const lmc_int8_kernels_t lmc_int8_kernels_avx512vnni = {lmc_int8_quantise_panel, lmc_int8_product_run};

#endif

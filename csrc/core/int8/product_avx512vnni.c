/* Linear maps in 8-bit integers with AVX-512 VNNI, which adds four products of 8-bit codes, one of them
 * unsigned, into each 32-bit lane: activations are taken as code + 128, and 128 times the sum of a row's
 * weights is taken off again. Sums are modulo 2^32 on the way and right at the end. Tiles of 12 rows x 2
 * panels. For four tokens or fewer a token's codes lie one after the other, and vectors run along a row of
 * weights. */
#include "core/int8/kernels.h"

#if defined(__x86_64__)
#define LMC_INT8_PACK 4
#define LMC_INT8_UNSIGNED
#if !defined(LMC_EMULATE_AVX512)
#include <immintrin.h>
#endif
#include "core/int8/code_lanes.h"

/* Partial redundancy elimination makes GCC keep a second copy of the sums in memory: half the speed. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-pre")
#endif

#define LMC_INLINE static inline __attribute__((always_inline))
#define LMC_TILE_ROWS 12
#define LMC_INT8_FEW 4
/* Rows whose sums are in registers for few tokens. */
#define LMC_FEW_ROWS 4

/* Inputs k ... k + 63 of a row of n_k codes, with zeros behind its end. */
LMC_INLINE __m512i load_codes(const void *row, size_t k, size_t n_k) {
    const char *at = (const char *)row + k;
    if (n_k - k >= 64) return _mm512_loadu_si512(at);
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << (n_k - k)) - 1, at);
}

/* The sums of the lanes of four vectors. */
LMC_INLINE __m128i sum_lanes(const __m512i sums[4]) {
    __m256i halves[4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; r++)
        halves[r] = _mm256_add_epi32(_mm512_castsi512_si256(sums[r]), _mm512_extracti64x4_epi64(sums[r], 1));
    __m256i low = _mm256_hadd_epi32(halves[0], halves[1]), high = _mm256_hadd_epi32(halves[2], halves[3]);
    __m256i both = _mm256_hadd_epi32(low, high);
    return _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

/* Where the codes of few tokens are: behind those that quantise leaves for all lanes. */
static uint8_t *few_codes(const lmc_int8_panel_t *panel, size_t n_padded) {
    return (uint8_t *)(uintptr_t)(panel->codes + n_padded / 4 * LMC_LANES);
}

static size_t few_lanes(size_t n_lanes) {
    return n_lanes > 2 ? LMC_INT8_FEW : n_lanes;
}

static void lmc_int8_quantise_run(const float *panel, size_t n_features, size_t n_lanes,
                                  lmc_int8_panel_t *quantised) {
    size_t n_padded = lmc_int8_padded(n_features);
    lmc_int8_quantise_lanes(panel, n_features, quantised);
    if (n_lanes > LMC_INT8_FEW) return;
    uint8_t *codes = few_codes(quantised, n_padded);
    for (size_t lane = 0; lane < few_lanes(n_lanes); lane++) {
        for (size_t k = 0; k < n_padded; k += 4)
            memcpy(codes + lane * n_padded + k, quantised->codes + k / 4 * LMC_LANES + lane, 4);
    }
}

/* Four rows from row on, of which n_rows are there and the others are the last of them again, for n_lanes (1,
 * 2 or 4, a constant) tokens. The sum of the rows' weights times 128 is made beside. */
LMC_INLINE void rows_of_few(const lmc_int8_product_t *p, size_t row, size_t n_rows, const size_t n_lanes) {
    const uint8_t *codes = few_codes(p->input, p->n_k);
    const __m512i offset = _mm512_set1_epi8((char)0x80);
    const int8_t *weights[LMC_FEW_ROWS];
    __m512i sums[LMC_INT8_FEW][LMC_FEW_ROWS], corrections[LMC_FEW_ROWS];
#pragma GCC unroll 4
    for (size_t r = 0; r < LMC_FEW_ROWS; r++) {
        weights[r] = p->weights + (row + (r < n_rows ? r : n_rows - 1)) * p->n_k;
        corrections[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (size_t lane = 0; lane < n_lanes; lane++)
            sums[lane][r] = _mm512_setzero_si512();
    }
    for (size_t k = 0; k < p->n_k; k += 64) {
        __m512i x[LMC_INT8_FEW];
#pragma GCC unroll 4
        for (size_t lane = 0; lane < n_lanes; lane++)
            x[lane] = load_codes(codes + lane * p->n_k, k, p->n_k);
#pragma GCC unroll 4
        for (size_t r = 0; r < LMC_FEW_ROWS; r++) {
            /* Rows to come, which are too short for the hardware prefetcher. */
            _mm_prefetch((const char *)(weights[r] + 2 * LMC_FEW_ROWS * p->n_k + k), _MM_HINT_T1);
            __m512i weight = load_codes(weights[r], k, p->n_k);
            corrections[r] = _mm512_dpbusd_epi32(corrections[r], offset, weight);
#pragma GCC unroll 4
            for (size_t lane = 0; lane < n_lanes; lane++)
                sums[lane][r] = _mm512_dpbusd_epi32(sums[lane][r], x[lane], weight);
        }
    }
    float scales[4] = {0}, bias[4] = {0}, values[4];
    memcpy(scales, p->scales + row, n_rows * sizeof *scales);
    if (p->bias != NULL) memcpy(bias, p->bias + row, n_rows * sizeof *bias);
    __m128i too_much = sum_lanes(corrections);
    for (size_t lane = 0; lane < n_lanes; lane++) {
        __m128i sum = _mm_sub_epi32(sum_lanes(sums[lane]), too_much);
        __m128 y = _mm_mul_ps(_mm_cvtepi32_ps(sum), _mm_loadu_ps(scales));
        y = _mm_mul_ps(y, _mm_set1_ps(p->input->scales[lane]));
        if (p->bias != NULL) y = _mm_add_ps(y, _mm_loadu_ps(bias));
        _mm_storeu_ps(values, y);
        for (size_t r = 0; r < n_rows; r++)
            p->output[(row + r) * LMC_LANES + lane] = values[r];
    }
}

static void product_few(const lmc_int8_product_t *p) {
    for (size_t row = 0; row < p->n_rows; row += LMC_FEW_ROWS) {
        size_t left = p->n_rows - row, n_rows = left < LMC_FEW_ROWS ? left : LMC_FEW_ROWS;
        if (p->n_lanes == 1)
            rows_of_few(p, row, n_rows, 1);
        else if (p->n_lanes == 2)
            rows_of_few(p, row, n_rows, 2);
        else
            rows_of_few(p, row, n_rows, LMC_INT8_FEW);
    }
}

/* -128 times the sum of each row's weights; of a tile, n_rows are there, the others are the last of them
 * again. */
typedef struct lmc_int8_tile {
    size_t row, n_rows;
    const int8_t *weights[LMC_TILE_ROWS];
    int32_t corrections[LMC_TILE_ROWS];
} lmc_int8_tile_t;

static void begin_tile(const lmc_int8_product_t *p, lmc_int8_tile_t *tile) {
    const __m512i offset = _mm512_set1_epi8((char)0x80);
    __m512i sums[LMC_TILE_ROWS];
    for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
        tile->weights[r] = p->weights + (tile->row + (r < tile->n_rows ? r : tile->n_rows - 1)) * p->n_k;
        sums[r] = _mm512_setzero_si512();
        for (size_t k = 0; k < p->n_k; k += 64) /* 2^17 * 127 * 128 < 2^31 */
            sums[r] = _mm512_dpbusd_epi32(sums[r], offset, load_codes(tile->weights[r], k, p->n_k));
    }
    for (size_t r = 0; r < LMC_TILE_ROWS; r += 4) {
        __m128i four = _mm_sub_epi32(_mm_setzero_si128(), sum_lanes(sums + r));
        _mm_storeu_si128((__m128i *)(void *)(tile->corrections + r), four);
    }
}

/* n_panels and is_whole are constants at every call: 12 or 24 accumulators. Rows of a whole tile are found by
 * their distance: there are not registers for twelve addresses. */
LMC_INLINE void multiply_tile(const lmc_int8_product_t *p, const lmc_int8_tile_t *tile, size_t panel,
                              const size_t n_panels, const int is_whole) {
    const int8_t *threes[LMC_TILE_ROWS / 3];
#pragma GCC unroll 4
    for (size_t i = 0; i < LMC_TILE_ROWS / 3; i++)
        threes[i] = tile->weights[3 * i];
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
            const int8_t *row = is_whole ? threes[r / 3] + r % 3 * p->n_k : tile->weights[r];
            memcpy(&four, row + k, sizeof four);
            __m512i weight = _mm512_set1_epi32(four);
#pragma GCC unroll 2
            for (size_t i = 0; i < n_panels; i++)
                sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], x[i], weight);
        }
    }
#pragma GCC unroll 12
    for (size_t r = 0; r < LMC_TILE_ROWS; r++) {
        if (r >= tile->n_rows) continue;
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
    if (p->n_lanes <= LMC_INT8_FEW) { /* one panel */
        product_few(p);
        return;
    }
    for (tile.row = 0; tile.row < p->n_rows; tile.row += LMC_TILE_ROWS) {
        size_t panel = 0;
        tile.n_rows = p->n_rows - tile.row < LMC_TILE_ROWS ? p->n_rows - tile.row : LMC_TILE_ROWS;
        begin_tile(p, &tile);
        for (; tile.n_rows == LMC_TILE_ROWS && panel + 2 <= p->n_panels; panel += 2)
            multiply_tile(p, &tile, panel, 2, 1);
        for (; tile.n_rows == LMC_TILE_ROWS && panel < p->n_panels; panel++)
            multiply_tile(p, &tile, panel, 1, 1);
        for (; panel < p->n_panels; panel++)
            multiply_tile(p, &tile, panel, 1, 0);
    }
}

const lmc_int8_kernels_t lmc_int8_kernels_avx512vnni = {lmc_int8_quantise_run, lmc_int8_product_run};

#endif

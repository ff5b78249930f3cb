/* Linear maps in 8-bit integers for four tokens or fewer: a token's codes lie one after the other as 16-bit
 * integers, and vectors run along a row of weights, which is read once and straight from memory. For every
 * file whose instruction set includes AVX2. */
#include <immintrin.h>

#include "core/int8/kernels.h"

#define LMC_INT8_FEW 4

static void lmc_int8_quantise_few(const float *panel, size_t n_features, size_t n_lanes,
                                  lmc_int8_panel_t *quantised) {
    size_t n_padded = lmc_int8_padded(n_features);
    for (size_t lane = 0; lane < n_lanes; lane++) {
        int16_t *codes = (int16_t *)quantised->codes + lane * n_padded;
        uint32_t largest = 0;
        for (size_t k = 0; k < n_features; k++) {
            uint32_t magnitude = lmc_int8_magnitude(panel[k * LMC_LANES + lane]);
            largest = magnitude > largest ? magnitude : largest;
        }
        lmc_int8_rule_t rule = lmc_int8_rule_of(largest);
        quantised->scales[lane] = rule.scale;
        for (size_t k = 0; k < n_features; k++)
            codes[k] = (int16_t)lmc_int8_code(panel[k * LMC_LANES + lane], rule);
        memset(codes + n_features, 0, (n_padded - n_features) * sizeof *codes);
    }
}

/* The sums of the lanes of four vectors. */
static inline __m128i lmc_int8_sum_lanes(const __m256i sums[4]) {
    __m256i low = _mm256_hadd_epi32(sums[0], sums[1]), high = _mm256_hadd_epi32(sums[2], sums[3]);
    __m256i both = _mm256_hadd_epi32(low, high);
    return _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

/* Four rows from row on, of which n_rows are there and the others are the last of them again; n_lanes (1 or
 * 2) is a constant. */
static inline __attribute__((always_inline)) void
lmc_int8_rows_of_few(const lmc_int8_product_t *p, size_t row, size_t n_rows, const lmc_int8_panel_t *input,
                     size_t first_lane, const size_t n_lanes, float *output) {
    const int16_t *codes = (const int16_t *)input->codes + first_lane * p->n_k;
    const int8_t *weights[4];
    __m256i sums[2][4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; r++) {
        weights[r] = p->weights + (row + (r < n_rows ? r : n_rows - 1)) * p->n_k;
#pragma GCC unroll 2
        for (size_t lane = 0; lane < n_lanes; lane++)
            sums[lane][r] = _mm256_setzero_si256();
    }
    for (size_t k = 0; k < p->n_k; k += LMC_INT8_K) {
        /* The next rows, which are too short for the hardware prefetcher. */
        if (first_lane == 0 && k % 64 == 0) {
#pragma GCC unroll 4
            for (size_t r = 0; r < 4; r++)
                _mm_prefetch((const char *)(weights[r] + 4 * p->n_k + k), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (size_t r = 0; r < 4; r++) {
            __m256i weight = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(weights[r] + k)));
#pragma GCC unroll 2
            for (size_t lane = 0; lane < n_lanes; lane++) {
                __m256i x = _mm256_loadu_si256((const __m256i *)(codes + lane * p->n_k + k));
                sums[lane][r] = _mm256_add_epi32(sums[lane][r], _mm256_madd_epi16(weight, x));
            }
        }
    }
    for (size_t lane = 0; lane < n_lanes; lane++) {
        float scales[4] = {0}, bias[4] = {0}, values[4];
        memcpy(scales, p->scales + row, n_rows * sizeof *scales);
        if (p->bias != NULL) memcpy(bias, p->bias + row, n_rows * sizeof *bias);
        __m128 y = _mm_mul_ps(_mm_cvtepi32_ps(lmc_int8_sum_lanes(sums[lane])), _mm_loadu_ps(scales));
        y = _mm_mul_ps(y, _mm_set1_ps(input->scales[first_lane + lane]));
        if (p->bias != NULL) y = _mm_add_ps(y, _mm_loadu_ps(bias));
        _mm_storeu_ps(values, y);
        for (size_t r = 0; r < n_rows; r++)
            output[(row + r) * LMC_LANES + first_lane + lane] = values[r];
    }
}

static void lmc_int8_product_few(const lmc_int8_product_t *p, const lmc_int8_panel_t *input, float *output) {
    for (size_t row = 0; row < p->n_rows; row += 4) {
        size_t left = p->n_rows - row, n_rows = left < 4 ? left : 4, lane = 0;
        for (; lane + 2 <= p->n_lanes; lane += 2)
            lmc_int8_rows_of_few(p, row, n_rows, input, lane, 2, output);
        if (lane < p->n_lanes) lmc_int8_rows_of_few(p, row, n_rows, input, lane, 1, output);
    }
}

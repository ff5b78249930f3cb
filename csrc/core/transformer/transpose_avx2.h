/* lmc_transpose_run of kernel_lanes.h in squares of 8 x 8, for AVX2 and for AVX-512, where it is no
 * bottleneck either. */
#ifndef LLMCOMP_CORE_TRANSFORMER_TRANSPOSE_AVX2_H
#define LLMCOMP_CORE_TRANSFORMER_TRANSPOSE_AVX2_H

#include "core/transformer/kernels.h"

static inline void transpose_8x8(__m256 v[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

static void lmc_transpose_run(const float *panel, size_t n_features, size_t n_lanes, float *const *rows) {
    size_t whole = n_features / 8 * 8;
    /* Eight rows at a time: more of them, a power of two apart, would not fit the eight ways of the cache. */
    for (size_t half = 0; half < n_lanes; half += 8) {
        for (size_t i = 0; i < whole; i += 8) {
            __m256 v[8];
            for (size_t j = 0; j < 8; j++)
                v[j] = _mm256_loadu_ps(panel + (i + j) * LMC_LANES + half);
            transpose_8x8(v);
            for (size_t j = 0; j < 8 && half + j < n_lanes; j++)
                _mm256_storeu_ps(rows[half + j] + i, v[j]);
        }
    }
    for (size_t i = whole; i < n_features; i++) {
        for (size_t lane = 0; lane < n_lanes; lane++)
            rows[lane][i] = panel[i * LMC_LANES + lane];
    }
}

#endif

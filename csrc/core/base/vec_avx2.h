/* The few vector operations that kernels are written in, for AVX2 + FMA + F16C: 8 lanes. */
#ifndef LLMCOMP_CORE_BASE_VEC_AVX2_H
#define LLMCOMP_CORE_BASE_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#define LMC_VLEN 8
typedef __m256 lmc_vf;
typedef __m256i lmc_vu;
typedef __m256i lmc_vs; /* 16-bit lanes */
typedef struct lmc_vsum {
    __m256i all, high; /* of the pairs of lanes as 64-bit numbers, and of their upper halves */
} lmc_vsum_t;

static inline lmc_vf lmc_v_set1(float x) {
    return _mm256_set1_ps(x);
}
static inline lmc_vf lmc_v_load_f32(const void *p) {
    return _mm256_loadu_ps((const float *)p);
}
static inline lmc_vf lmc_v_load_f16(const void *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline lmc_vf lmc_v_load_bf16(const void *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
/* The even and the odd ones of 2 * LMC_VLEN elements. */
static inline void lmc_v_load_bf16_pair(const void *p, lmc_vf *even, lmc_vf *odd) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000)));
}
static inline void lmc_v_store_f32(float *p, lmc_vf a) {
    _mm256_storeu_ps(p, a);
}
/* a where the lane of mask is all ones, b where it is all zeros. */
static inline lmc_vf lmc_v_select(lmc_vf mask, lmc_vf a, lmc_vf b) {
    return _mm256_blendv_ps(b, a, mask);
}
static inline lmc_vf lmc_v_add(lmc_vf a, lmc_vf b) {
    return _mm256_add_ps(a, b);
}
static inline lmc_vf lmc_v_sub(lmc_vf a, lmc_vf b) {
    return _mm256_sub_ps(a, b);
}
static inline lmc_vf lmc_v_mul(lmc_vf a, lmc_vf b) {
    return _mm256_mul_ps(a, b);
}
static inline lmc_vf lmc_v_max(lmc_vf a, lmc_vf b) {
    return _mm256_max_ps(a, b);
}
static inline lmc_vf lmc_v_fma(lmc_vf a, lmc_vf b, lmc_vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
/* c - a * b */
static inline lmc_vf lmc_v_fnma(lmc_vf a, lmc_vf b, lmc_vf c) {
    return _mm256_fnmadd_ps(a, b, c);
}
/* To the nearest integer, ties to even; 2^31 as unsigned where that does not fit. */
static inline lmc_vu lmc_v_round(lmc_vf a) {
    return _mm256_cvtps_epi32(a);
}
static inline lmc_vf lmc_v_from_int(lmc_vu a) {
    return _mm256_cvtepi32_ps(a);
}
static inline lmc_vu lmc_v_truncate(lmc_vf a) {
    return _mm256_cvttps_epi32(a);
}
static inline lmc_vu lmc_v_add_u32(lmc_vu a, lmc_vu b) {
    return _mm256_add_epi32(a, b);
}
/* Logical; zero where the count is 32 or more. */
static inline lmc_vu lmc_v_shift_right(lmc_vu a, lmc_vu count) {
    return _mm256_srlv_epi32(a, count);
}

static inline lmc_vsum_t lmc_v_sum_zero(void) {
    return (lmc_vsum_t){_mm256_setzero_si256(), _mm256_setzero_si256()};
}
static inline lmc_vsum_t lmc_v_sum_add(lmc_vsum_t sum, lmc_vu lanes) {
    sum.all = _mm256_add_epi64(sum.all, lanes);
    sum.high = _mm256_add_epi64(sum.high, _mm256_srli_epi64(lanes, 32));
    return sum;
}
/* `all` has the upper halves 2^32 times, modulo 2^64; they are wanted once. */
static inline uint64_t lmc_v_sum_total(lmc_vsum_t sum) {
    uint64_t lanes[4];
    __m256i low = _mm256_sub_epi64(sum.all, _mm256_slli_epi64(sum.high, 32));
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi64(low, sum.high));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

static inline lmc_vs lmc_v_set1_i16(int16_t x) {
    return _mm256_set1_epi16(x);
}
static inline lmc_vs lmc_v_load_i16(const void *p) {
    return _mm256_loadu_si256((const __m256i *)p);
}
static inline void lmc_v_store_i16(int16_t *p, lmc_vs a) {
    _mm256_storeu_si256((__m256i *)p, a);
}
/* lmc_order_i16 in every lane. */
static inline lmc_vs lmc_v_order_i16(lmc_vs a) {
    return _mm256_xor_si256(a, _mm256_srli_epi16(_mm256_srai_epi16(a, 15), 1));
}
static inline lmc_vs lmc_v_max_i16(lmc_vs a, lmc_vs b) {
    return _mm256_max_epi16(a, b);
}
static inline lmc_vs lmc_v_min_i16(lmc_vs a, lmc_vs b) {
    return _mm256_min_epi16(a, b);
}

static inline float lmc_v_maximum_of_lanes(lmc_vf a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
/* In no stated order: only for sums whose value does not depend on it. */
static inline float lmc_v_sum_of_lanes(lmc_vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#endif

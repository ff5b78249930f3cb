/* The few vector operations that kernels are written in, for AVX-512 F + BW + DQ + VL: 16 lanes. */
#ifndef LLMCOMP_CORE_BASE_VEC_AVX512_H
#define LLMCOMP_CORE_BASE_VEC_AVX512_H

#if !defined(LMC_EMULATE_AVX512) /* the checks bring their own where the processor has none */
#include <immintrin.h>
#endif
#include <stdint.h>

#define LMC_VLEN 16
typedef __m512 lmc_vf;
typedef __m512i lmc_vu;
typedef __m512i lmc_vs; /* 16-bit lanes */
typedef struct lmc_vsum {
    __m512i all, high; /* of the pairs of lanes as 64-bit numbers, and of their upper halves */
} lmc_vsum_t;

static inline lmc_vf lmc_v_set1(float x) {
    return _mm512_set1_ps(x);
}
static inline lmc_vf lmc_v_load_f32(const void *p) {
    return _mm512_loadu_ps(p);
}
static inline lmc_vf lmc_v_load_f16(const void *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline lmc_vf lmc_v_load_bf16(const void *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* The even and the odd ones of 2 * LMC_VLEN elements. */
static inline void lmc_v_load_bf16_pair(const void *p, lmc_vf *even, lmc_vf *odd) {
    __m512i pairs = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
}
static inline void lmc_v_store_f32(float *p, lmc_vf a) {
    _mm512_storeu_ps(p, a);
}
/* a where the lane of mask is all ones, b where it is all zeros. */
static inline lmc_vf lmc_v_select(lmc_vf mask, lmc_vf a, lmc_vf b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(mask)), b, a);
}
static inline lmc_vf lmc_v_add(lmc_vf a, lmc_vf b) {
    return _mm512_add_ps(a, b);
}
static inline lmc_vf lmc_v_sub(lmc_vf a, lmc_vf b) {
    return _mm512_sub_ps(a, b);
}
static inline lmc_vf lmc_v_mul(lmc_vf a, lmc_vf b) {
    return _mm512_mul_ps(a, b);
}
static inline lmc_vf lmc_v_max(lmc_vf a, lmc_vf b) {
    return _mm512_max_ps(a, b);
}
static inline lmc_vf lmc_v_fma(lmc_vf a, lmc_vf b, lmc_vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
/* c - a * b */
static inline lmc_vf lmc_v_fnma(lmc_vf a, lmc_vf b, lmc_vf c) {
    return _mm512_fnmadd_ps(a, b, c);
}
/* To the nearest integer, ties to even; 2^31 as unsigned where that does not fit. */
static inline lmc_vu lmc_v_round(lmc_vf a) {
    return _mm512_cvtps_epi32(a);
}
static inline lmc_vf lmc_v_from_int(lmc_vu a) {
    return _mm512_cvtepi32_ps(a);
}
static inline lmc_vu lmc_v_truncate(lmc_vf a) {
    return _mm512_cvttps_epi32(a);
}
static inline lmc_vu lmc_v_add_u32(lmc_vu a, lmc_vu b) {
    return _mm512_add_epi32(a, b);
}
/* Logical; zero where the count is 32 or more. */
static inline lmc_vu lmc_v_shift_right(lmc_vu a, lmc_vu count) {
    return _mm512_srlv_epi32(a, count);
}

static inline lmc_vsum_t lmc_v_sum_zero(void) {
    return (lmc_vsum_t){_mm512_setzero_si512(), _mm512_setzero_si512()};
}
static inline lmc_vsum_t lmc_v_sum_add(lmc_vsum_t sum, lmc_vu lanes) {
    sum.all = _mm512_add_epi64(sum.all, lanes);
    sum.high = _mm512_add_epi64(sum.high, _mm512_srli_epi64(lanes, 32));
    return sum;
}
/* `all` has the upper halves 2^32 times, modulo 2^64; they are wanted once. */
static inline uint64_t lmc_v_sum_total(lmc_vsum_t sum) {
    uint64_t lanes[8], total = 0;
    __m512i low = _mm512_sub_epi64(sum.all, _mm512_slli_epi64(sum.high, 32));
    _mm512_storeu_si512(lanes, _mm512_add_epi64(low, sum.high));
    for (int i = 0; i < 8; i++)
        total += lanes[i];
    return total;
}

static inline lmc_vs lmc_v_set1_i16(int16_t x) {
    return _mm512_set1_epi16(x);
}
static inline lmc_vs lmc_v_load_i16(const void *p) {
    return _mm512_loadu_si512(p);
}
static inline void lmc_v_store_i16(int16_t *p, lmc_vs a) {
    _mm512_storeu_si512(p, a);
}
/* lmc_order_i16 in every lane. */
static inline lmc_vs lmc_v_order_i16(lmc_vs a) {
    return _mm512_xor_si512(a, _mm512_srli_epi16(_mm512_srai_epi16(a, 15), 1));
}
static inline lmc_vs lmc_v_max_i16(lmc_vs a, lmc_vs b) {
    return _mm512_max_epi16(a, b);
}
static inline lmc_vs lmc_v_min_i16(lmc_vs a, lmc_vs b) {
    return _mm512_min_epi16(a, b);
}

static inline float lmc_v_maximum_of_lanes(lmc_vf a) {
    return _mm512_reduce_max_ps(a);
}
/* In no stated order: only for sums whose value does not depend on it. */
static inline float lmc_v_sum_of_lanes(lmc_vf a) {
    return _mm512_reduce_add_ps(a);
}

#endif

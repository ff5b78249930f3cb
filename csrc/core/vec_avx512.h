/* The few vector operations that kernels are written in, for AVX-512 F + BW + DQ + VL: 16 lanes. */
#ifndef LLMCOMP_CORE_VEC_AVX512_H
#define LLMCOMP_CORE_VEC_AVX512_H

#if !defined(LMC_EMULATE_AVX512) /* the checks bring their own where the processor has none */
#include <immintrin.h>
#endif
#include <stdint.h>

#define LMC_VLEN 16
typedef __m512 lmc_vf;
typedef __m512i lmc_vu;
typedef struct lmc_vsum {
    __m512i even, odd;
} lmc_vsum;

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

static inline lmc_vsum lmc_v_sum_zero(void) {
    return (lmc_vsum){_mm512_setzero_si512(), _mm512_setzero_si512()};
}
static inline lmc_vsum lmc_v_sum_add(lmc_vsum sum, lmc_vu lanes) {
    const __m512i low_half = _mm512_set1_epi64(0xFFFFFFFF);
    sum.even = _mm512_add_epi64(sum.even, _mm512_and_si512(lanes, low_half));
    sum.odd = _mm512_add_epi64(sum.odd, _mm512_srli_epi64(lanes, 32));
    return sum;
}
static inline uint64_t lmc_v_sum_total(lmc_vsum sum) {
    uint64_t lanes[8], total = 0;
    _mm512_storeu_si512(lanes, _mm512_add_epi64(sum.even, sum.odd));
    for (int i = 0; i < 8; i++)
        total += lanes[i];
    return total;
}

static inline float lmc_v_maximum_of_lanes(lmc_vf a) {
    return _mm512_reduce_max_ps(a);
}
/* In no stated order: only for sums whose value does not depend on it. */
static inline float lmc_v_sum_of_lanes(lmc_vf a) {
    return _mm512_reduce_add_ps(a);
}

#endif

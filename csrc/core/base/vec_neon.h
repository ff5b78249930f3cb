/* The few vector operations that kernels are written in, for AArch64 Advanced SIMD: 4 lanes. */
#ifndef LLMCOMP_CORE_BASE_VEC_NEON_H
#define LLMCOMP_CORE_BASE_VEC_NEON_H

#include <arm_neon.h>
#include <stdint.h>

#define LMC_VLEN 4
typedef float32x4_t lmc_vf;
typedef uint32x4_t lmc_vu;
typedef int16x8_t lmc_vs;
typedef uint64x2_t lmc_vsum_t;

static inline lmc_vf lmc_v_set1(float x) {
    return vdupq_n_f32(x);
}
static inline lmc_vf lmc_v_load_f32(const void *p) {
    return vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)p));
}
static inline lmc_vf lmc_v_load_f16(const void *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)p)));
}
static inline lmc_vf lmc_v_load_bf16(const void *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)p)), 16));
}
/* The even and the odd ones of 2 * LMC_VLEN elements. */
static inline void lmc_v_load_bf16_pair(const void *p, lmc_vf *even, lmc_vf *odd) {
    uint32x4_t pairs = vreinterpretq_u32_u8(vld1q_u8((const uint8_t *)p));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000)));
}
static inline void lmc_v_store_f32(float *p, lmc_vf a) {
    vst1q_f32(p, a);
}
/* a where the lane of mask is all ones, b where it is all zeros. */
static inline lmc_vf lmc_v_select(lmc_vf mask, lmc_vf a, lmc_vf b) {
    return vbslq_f32(vreinterpretq_u32_f32(mask), a, b);
}
static inline lmc_vf lmc_v_add(lmc_vf a, lmc_vf b) {
    return vaddq_f32(a, b);
}
static inline lmc_vf lmc_v_sub(lmc_vf a, lmc_vf b) {
    return vsubq_f32(a, b);
}
static inline lmc_vf lmc_v_mul(lmc_vf a, lmc_vf b) {
    return vmulq_f32(a, b);
}
/* a where a > b, else b, as on x86: b where either is NaN. */
static inline lmc_vf lmc_v_max(lmc_vf a, lmc_vf b) {
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}
static inline lmc_vf lmc_v_fma(lmc_vf a, lmc_vf b, lmc_vf c) {
    return vfmaq_f32(c, a, b);
}
/* c - a * b */
static inline lmc_vf lmc_v_fnma(lmc_vf a, lmc_vf b, lmc_vf c) {
    return vfmsq_f32(c, a, b);
}
/* To the nearest integer, ties to even; the conversion saturates, and 64 stands for all from there on, so
 * that lmc_v_shift_right can take it. */
static inline lmc_vu lmc_v_round(lmc_vf a) {
    return vreinterpretq_u32_s32(vminq_s32(vcvtnq_s32_f32(a), vdupq_n_s32(64)));
}
static inline lmc_vf lmc_v_from_int(lmc_vu a) {
    return vcvtq_f32_s32(vreinterpretq_s32_u32(a));
}
static inline lmc_vu lmc_v_truncate(lmc_vf a) {
    return vreinterpretq_u32_s32(vcvtq_s32_f32(a));
}
static inline lmc_vu lmc_v_add_u32(lmc_vu a, lmc_vu b) {
    return vaddq_u32(a, b);
}
/* Logical; zero where the count is 32 or more, and it is at most 64: the instruction reads the low byte of
 * the negated count, signed. */
static inline lmc_vu lmc_v_shift_right(lmc_vu a, lmc_vu count) {
    return vshlq_u32(a, vnegq_s32(vreinterpretq_s32_u32(count)));
}

static inline lmc_vsum_t lmc_v_sum_zero(void) {
    return vdupq_n_u64(0);
}
static inline lmc_vsum_t lmc_v_sum_add(lmc_vsum_t sum, lmc_vu lanes) {
    return vpadalq_u32(sum, lanes);
}
static inline uint64_t lmc_v_sum_total(lmc_vsum_t sum) {
    return vaddvq_u64(sum);
}

static inline lmc_vs lmc_v_set1_i16(int16_t x) {
    return vdupq_n_s16(x);
}
static inline lmc_vs lmc_v_load_i16(const void *p) {
    return vreinterpretq_s16_u8(vld1q_u8((const uint8_t *)p));
}
static inline void lmc_v_store_i16(int16_t *p, lmc_vs a) {
    vst1q_s16(p, a);
}
/* lmc_order_i16 in every lane. */
static inline lmc_vs lmc_v_order_i16(lmc_vs a) {
    uint16x8_t sign = vreinterpretq_u16_s16(vshrq_n_s16(a, 15));
    return veorq_s16(a, vreinterpretq_s16_u16(vshrq_n_u16(sign, 1)));
}
static inline lmc_vs lmc_v_max_i16(lmc_vs a, lmc_vs b) {
    return vmaxq_s16(a, b);
}
static inline lmc_vs lmc_v_min_i16(lmc_vs a, lmc_vs b) {
    return vminq_s16(a, b);
}

static inline float lmc_v_maximum_of_lanes(lmc_vf a) {
    return vmaxvq_f32(a);
}
/* In no stated order: only for sums whose value does not depend on it. */
static inline float lmc_v_sum_of_lanes(lmc_vf a) {
    return vaddvq_f32(a);
}

#endif

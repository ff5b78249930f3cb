/* The vector operations of the other vec_*.h that the forward pass needs, for a vector of one lane: the
 * specification of what each of them does in every lane. */
#ifndef LLMCOMP_CORE_BASE_VEC_SERIAL_H
#define LLMCOMP_CORE_BASE_VEC_SERIAL_H

#include "core/base/ieee.h"

#define LMC_VLEN 1
typedef float lmc_vf;

static inline lmc_vf lmc_v_set1(float x) {
    return x;
}
static inline lmc_vf lmc_v_load_f32(const void *p) {
    return *(const float *)p;
}
static inline lmc_vf lmc_v_load_f16(const void *p) {
    return lmc_widen_f16(*(const uint16_t *)p);
}
static inline lmc_vf lmc_v_load_bf16(const void *p) {
    return lmc_widen_bf16(*(const uint16_t *)p);
}
static inline void lmc_v_store_f32(float *p, lmc_vf a) {
    *p = a;
}
/* a where the lane of mask is all ones, b where it is all zeros. */
static inline lmc_vf lmc_v_select(lmc_vf mask, lmc_vf a, lmc_vf b) {
    return lmc_bits_of(mask) != 0 ? a : b;
}
static inline lmc_vf lmc_v_add(lmc_vf a, lmc_vf b) {
    return lmc_add(a, b);
}
static inline lmc_vf lmc_v_sub(lmc_vf a, lmc_vf b) {
    return lmc_sub(a, b);
}
static inline lmc_vf lmc_v_mul(lmc_vf a, lmc_vf b) {
    return lmc_mul(a, b);
}
static inline lmc_vf lmc_v_max(lmc_vf a, lmc_vf b) {
    return lmc_max(a, b);
}
static inline lmc_vf lmc_v_fma(lmc_vf a, lmc_vf b, lmc_vf c) {
    return lmc_fma(a, b, c);
}

#endif

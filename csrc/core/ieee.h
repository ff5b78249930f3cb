/* The only float rules of llmcomp: the processor's floating-point state, exact widening of the short formats, and
 * the functions that are built from + - * / sqrt fma alone. Scalar code, shared by the CPU, CUDA and the checks;
 * core/ieee_vec.h says the same for vectors. Nothing here may call libm (fma and sqrt are IEEE operations) or
 * depend on how the compiler contracts expressions: build with -ffp-contract=off. */
#ifndef LLMCOMP_CORE_IEEE_H
#define LLMCOMP_CORE_IEEE_H

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define LMC_FN static __host__ __device__ __forceinline__
#else
#define LMC_FN static inline
#endif

#if defined(__FAST_MATH__)
#error "llmcomp's arithmetic needs IEEE semantics: build without -ffast-math"
#endif

/* ---- the processor's state -------------------------------------------------------------------------------- */

/* Round to nearest even, denormals kept, no traps: whatever the caller left set (PyTorch and -ffast-math libraries
 * switch denormals off) is saved here and restored afterwards. */
#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
#include <xmmintrin.h>
typedef unsigned int lmc_float_state_t;
static inline lmc_float_state_t lmc_float_state_enter(void) {
    unsigned int saved = _mm_getcsr();
    _mm_setcsr(0x1F80u);
    return saved;
}
static inline void lmc_float_state_leave(lmc_float_state_t saved) {
    _mm_setcsr(saved);
}
#elif defined(__aarch64__) && !defined(__CUDA_ARCH__)
typedef uint64_t lmc_float_state_t;
static inline lmc_float_state_t lmc_float_state_enter(void) {
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
    return saved;
}
static inline void lmc_float_state_leave(lmc_float_state_t saved) {
    __asm__ volatile("msr fpcr, %0" : : "r"(saved) : "memory");
}
#else
#include <fenv.h>
typedef int lmc_float_state_t;
static inline lmc_float_state_t lmc_float_state_enter(void) {
    int saved = fegetround();
    fesetround(FE_TONEAREST);
    return saved;
}
static inline void lmc_float_state_leave(lmc_float_state_t saved) {
    fesetround(saved);
}
#endif

/* ---- operations that a compiler must not touch -------------------------------------------------------------- */

#if defined(__CUDA_ARCH__)
#define lmc_fma(a, b, c) __fmaf_rn((a), (b), (c))
#define lmc_add(a, b) __fadd_rn((a), (b))
#define lmc_sub(a, b) __fsub_rn((a), (b))
#define lmc_mul(a, b) __fmul_rn((a), (b))
#define lmc_div(a, b) __fdiv_rn((a), (b))
#define lmc_sqrt(a) __fsqrt_rn((a))
#else
#define lmc_fma(a, b, c) __builtin_fmaf((a), (b), (c))
#define lmc_add(a, b) ((float)((a) + (b)))
#define lmc_sub(a, b) ((float)((a) - (b)))
#define lmc_mul(a, b) ((float)((a) * (b)))
#define lmc_div(a, b) ((float)((a) / (b)))
#define lmc_sqrt(a) __builtin_sqrtf((a))
#endif

LMC_FN uint32_t lmc_bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

LMC_FN float lmc_float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* a where a > b, else b: b where either is NaN, as the vector instructions have it. */
LMC_FN float lmc_max(float a, float b) {
    return a > b ? a : b;
}

/* ---- exact widening ------------------------------------------------------------------------------------------- */

LMC_FN float lmc_widen_bf16(uint16_t bits) {
    return lmc_float_of((uint32_t)bits << 16);
}

/* binary16: rebias the exponent by an exact product with 2^112; infinities and NaN get the top exponent. */
LMC_FN float lmc_widen_f16(uint16_t bits) {
    uint32_t magnitude = (uint32_t)(bits & 0x7FFFu) << 13;
    float value = lmc_mul(lmc_float_of(magnitude), 0x1p112f);
    if (magnitude >= 0x0F800000u) value = lmc_float_of(magnitude | 0x7F800000u);
    return lmc_float_of(lmc_bits_of(value) | (uint32_t)(bits & 0x8000u) << 16);
}

/* ---- 2^x ---------------------------------------------------------------------------------------------------- */

#define LMC_LOG2_E 0x1.715476p+0f
/* Adding 1.5 * 2^23 rounds |x| < 2^22 to an integer, which is then in the low bits of the sum. */
#define LMC_ROUND_MAGIC 0x1.8p+23f
#define LMC_ROUND_MAGIC_BITS 0x4B400000u
/* 2^f on [-1/2, 1/2] by minimax of the relative error (9.3e-8) with P(0) = 1, coefficients rounded one by one to
 * binary32 while the rest was refitted; 1.5e-7 with the rounding of its evaluation. */
#define LMC_EXP2_C1 0x1.62e42ap-1f
#define LMC_EXP2_C2 0x1.ebf9c2p-3f
#define LMC_EXP2_C3 0x1.c6b6d8p-5f
#define LMC_EXP2_C4 0x1.3ce8acp-7f
#define LMC_EXP2_C5 0x1.5bda4p-10f

/* scale * 2^f for |f| <= 1/2; scale a power of two, so that its products with the coefficients are exact. */
#define LMC_EXP2_POLYNOMIAL(f, scale)                                                                             \
    lmc_fma(lmc_fma(lmc_fma(lmc_fma(lmc_fma(LMC_EXP2_C5 * (scale), (f), LMC_EXP2_C4 * (scale)), (f),                \
                                    LMC_EXP2_C3 * (scale)),                                                       \
                            (f), LMC_EXP2_C2 * (scale)),                                                          \
                    (f), LMC_EXP2_C1 * (scale)),                                                                  \
            (f), (scale))

/* ---- the weight of a symbol ---------------------------------------------------------------------------------- */

#define LMC_WEIGHT_SCALE 0x1p+29f
/* Below this difference every weight is the floor; it keeps -inf and huge logits inside the rounding trick. */
#define LMC_DIFFERENCE_FLOOR (-64.0f)

/* floor(2^29 * 2^t) for t = (logit - maximum) * log2 e <= 0: the weight of a symbol less its floor of one.
 * t = n + f with integer n <= 0; the polynomial in f, cut to an integer, is shifted right by -n. */
LMC_FN uint32_t lmc_weight(float logit, float maximum) {
    float difference = lmc_max(lmc_sub(logit, maximum), LMC_DIFFERENCE_FLOOR);
    float shifted = lmc_fma(difference, LMC_LOG2_E, LMC_ROUND_MAGIC);
    float n = lmc_sub(shifted, LMC_ROUND_MAGIC);
    float f = lmc_fma(difference, LMC_LOG2_E, -n);
    uint32_t mantissa = (uint32_t)(int32_t)LMC_EXP2_POLYNOMIAL(f, LMC_WEIGHT_SCALE);
    uint32_t shift = LMC_ROUND_MAGIC_BITS - lmc_bits_of(shifted);
    return shift < 32 ? mantissa >> shift : 0;
}

#endif

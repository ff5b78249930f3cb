/* The only float rules of llmcomp: the processor's floating-point state, exact widening of the 16-bit
 * formats, and the functions that are built from + - * / sqrt fma alone. Scalar code, shared by the CPU, CUDA
 * and the checks; core/base/vec_<isa>.h say the same for vectors. Nothing here may call libm (fma and sqrt
 * are IEEE operations) or depend on how the compiler contracts expressions: build with -ffp-contract=off. */
#ifndef LLMCOMP_CORE_BASE_IEEE_H
#define LLMCOMP_CORE_BASE_IEEE_H

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

/* The processor's state. */

/* Round to nearest even, denormals kept, no traps: whatever the caller left set (PyTorch and -ffast-math
 * libraries switch denormals off) is saved here and restored afterwards. */
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
typedef fenv_t lmc_float_state_t;
static inline lmc_float_state_t lmc_float_state_enter(void) {
    fenv_t saved;
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    return saved;
}
static inline void lmc_float_state_leave(lmc_float_state_t saved) {
    fesetenv(&saved);
}
#endif

/* Operations that a compiler must not touch. */

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

/* Exact widening. */

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

/* 2^x. */

#define LMC_LOG2_E 0x1.715476p+0f
/* Adding 1.5 * 2^23 rounds |x| < 2^22 to an integer, which is then in the low bits of the sum. */
#define LMC_ROUND_MAGIC 0x1.8p+23f
#define LMC_ROUND_MAGIC_BITS 0x4B400000u
/* 2^f on [-1/2, 1/2] by minimax of the relative error (9.3e-8) with P(0) = 1, coefficients rounded one by one
 * to binary32 while the rest was refitted; 1.5e-7 with the rounding of its evaluation. */
#define LMC_EXP2_C1 0x1.62e42ap-1f
#define LMC_EXP2_C2 0x1.ebf9c2p-3f
#define LMC_EXP2_C3 0x1.c6b6d8p-5f
#define LMC_EXP2_C4 0x1.3ce8acp-7f
#define LMC_EXP2_C5 0x1.5bda4p-10f

/* scale * 2^f for |f| <= 1/2; scale a power of two, so that its products with the coefficients are exact. */
#define LMC_EXP2_POLYNOMIAL(f, scale)                                                                        \
    lmc_fma(lmc_fma(lmc_fma(lmc_fma(lmc_fma(LMC_EXP2_C5 *(scale), (f), LMC_EXP2_C4 *(scale)), (f),           \
                                    LMC_EXP2_C3 *(scale)),                                                   \
                            (f), LMC_EXP2_C2 *(scale)),                                                      \
                    (f), LMC_EXP2_C1 *(scale)),                                                              \
            (f), (scale))

/* p * 2^n for p in [1/2, 2) and n = shifted - LMC_ROUND_MAGIC, where the result is normal: n goes to the
 * exponent. */
LMC_FN float lmc_scale_by_shifted(float p, float shifted) {
    return lmc_float_of(lmc_bits_of(p) + (lmc_bits_of(shifted) << 23));
}

/* 2^(x * scale) for x with a result that is normal. */
LMC_FN float lmc_exp2_scaled(float x, float scale) {
    float shifted = lmc_fma(x, scale, LMC_ROUND_MAGIC);
    float n = lmc_sub(shifted, LMC_ROUND_MAGIC);
    float f = lmc_fma(x, scale, -n);
    return lmc_scale_by_shifted(LMC_EXP2_POLYNOMIAL(f, 1.0f), shifted);
}

/* Attention and GELU. */

/* Exponents below this one count as this one: 2^-64 beside a sum >= 1 is nothing, and no product gets
 * denormal. */
#define LMC_SOFTMAX_EXPONENT_FLOOR (-64.0f)

/* 2^((score - maximum) * scale) with scale = log2 e / sqrt(head_dim) and floor = LMC_SOFTMAX_EXPONENT_FLOOR /
 * scale, or NaN if the difference is NaN. */
LMC_FN float lmc_softmax_weight(float score, float maximum, float scale, float floor) {
    float difference = lmc_sub(score, maximum);
    float weight = lmc_exp2_scaled(lmc_max(difference, floor), scale);
    return difference == difference ? weight : difference;
}

/* log2(erfc(a / sqrt 2)) = a * Q(a) on [0, 5.5], fitted for the least absolute error of erfc / 2 (1.5e-8),
 * coefficients rounded one by one to binary32 while the rest was refitted. Beyond 5.5 it falls on towards
 * -inf. */
#define LMC_GELU_Q0 (-0x1.26aee2p+0f)
#define LMC_GELU_Q1 (-0x1.d63828p-2f)
#define LMC_GELU_Q2 (-0x1.ae593ep-5f)
#define LMC_GELU_Q3 0x1.d2ff7cp-8f
#define LMC_GELU_Q4 (-0x1.9090c8p-13f)
#define LMC_GELU_Q5 (-0x1.52ca7ep-13f)
#define LMC_GELU_Q6 0x1.1b686ap-15f
#define LMC_GELU_Q7 (-0x1.39da7cp-19f)
#define LMC_GELU_EXPONENT_FLOOR (-120.0f)

/* x * Phi(x), the exact (erf) GELU: h = Phi(-|x|) = 2^(|x| Q(|x|)) / 2, then h or 1 - h. Absolute error <=
 * 0.9 ulp of x. */
LMC_FN float lmc_gelu(float x) {
    float a = lmc_float_of(lmc_bits_of(x) & 0x7FFFFFFFu);
    float q = lmc_fma(LMC_GELU_Q7, a, LMC_GELU_Q6);
    q = lmc_fma(q, a, LMC_GELU_Q5);
    q = lmc_fma(q, a, LMC_GELU_Q4);
    q = lmc_fma(q, a, LMC_GELU_Q3);
    q = lmc_fma(q, a, LMC_GELU_Q2);
    q = lmc_fma(q, a, LMC_GELU_Q1);
    q = lmc_fma(q, a, LMC_GELU_Q0);
    float t = lmc_max(lmc_mul(q, a), LMC_GELU_EXPONENT_FLOOR);
    float shifted = lmc_add(t, LMC_ROUND_MAGIC);
    float f = lmc_sub(t, lmc_sub(shifted, LMC_ROUND_MAGIC));
    float h = lmc_scale_by_shifted(LMC_EXP2_POLYNOMIAL(f, 0.5f), shifted);
    float rest = lmc_sub(1.0f, h);
    return lmc_mul(x, x < 0.0f ? h : rest);
}

/* Exponentials of what is not positive, and what is made of them: FORMAT.md, section 4.8.6. */

/* Smaller arguments count as this one, so that no result gets denormal. */
#define LMC_EXP_FLOOR (-80.0f)

/* e^-a for a >= 0. */
LMC_FN float lmc_exp_of_minus(float a) {
    return lmc_exp2_scaled(lmc_max(-a, LMC_EXP_FLOOR), LMC_LOG2_E);
}

/* e^-a - 1 for a >= 0, with no cancellation near 0. */
LMC_FN float lmc_expm1_of_minus(float a) {
    float x = lmc_max(-a, LMC_EXP_FLOOR);
    float shifted = lmc_fma(x, LMC_LOG2_E, LMC_ROUND_MAGIC);
    float f = lmc_fma(x, LMC_LOG2_E, -lmc_sub(shifted, LMC_ROUND_MAGIC));
    float q = lmc_fma(LMC_EXP2_C5, f, LMC_EXP2_C4);
    q = lmc_fma(q, f, LMC_EXP2_C3);
    q = lmc_fma(q, f, LMC_EXP2_C2);
    q = lmc_fma(q, f, LMC_EXP2_C1);
    float power = lmc_scale_by_shifted(1.0f, shifted);
    return lmc_fma(lmc_mul(q, f), power, lmc_sub(power, 1.0f));
}

LMC_FN float lmc_magnitude(float x) {
    return lmc_float_of(lmc_bits_of(x) & 0x7FFFFFFFu);
}

LMC_FN float lmc_sigmoid(float x) {
    float e = lmc_exp_of_minus(lmc_magnitude(x));
    return lmc_div(x < 0.0f ? e : 1.0f, lmc_add(1.0f, e));
}

LMC_FN float lmc_tanh(float x) {
    float m = lmc_expm1_of_minus(lmc_mul(2.0f, lmc_magnitude(x)));
    float t = lmc_div(-m, lmc_add(m, 2.0f));
    t = lmc_float_of((lmc_bits_of(t) & 0x7FFFFFFFu) | (lmc_bits_of(x) & 0x80000000u));
    return x == x ? t : x;
}

LMC_FN float lmc_silu(float x) {
    return lmc_mul(x, lmc_sigmoid(x));
}

/* 2 sqrt(2 / pi), and 0.044715 times that. */
#define LMC_GELU_TANH_K1 0x1.988454p+0f
#define LMC_GELU_TANH_K2 0x1.2444f2p-4f

LMC_FN float lmc_gelu_tanh(float x) {
    float inner = lmc_mul(x, lmc_fma(LMC_GELU_TANH_K2, lmc_mul(x, x), LMC_GELU_TANH_K1));
    return lmc_mul(x, lmc_sigmoid(inner));
}

LMC_FN float lmc_relu(float x) {
    return x < 0.0f ? 0.0f : x;
}

LMC_FN float lmc_relu_squared(float x) {
    return lmc_mul(lmc_relu(x), lmc_relu(x));
}

/* The four numbers of a layer, ready to compute with. */
typedef struct lmc_xielu_rule {
    float alpha_p, alpha_n, beta, eps;
} lmc_xielu_rule_t;

LMC_FN float lmc_xielu(float x, lmc_xielu_rule_t rule) {
    float linear = lmc_mul(rule.beta, x);
    float positive = lmc_fma(lmc_mul(rule.alpha_p, x), x, linear);
    float m = lmc_expm1_of_minus(-(x < rule.eps ? x : rule.eps));
    float negative = lmc_fma(lmc_sub(m, x), rule.alpha_n, linear);
    return x > 0.0f ? positive : negative;
}

/* Values beyond -limit and limit become these. */
LMC_FN float lmc_clip(float x, float limit) {
    float below = x > limit ? limit : x;
    return below < -limit ? -limit : below;
}

/* What becomes of an output of the head where logits are capped. */
LMC_FN float lmc_capped_logit(float y, float multiplier, float cap) {
    float share = lmc_mul(lmc_mul(y, multiplier), lmc_div(1.0f, cap));
    return lmc_mul(lmc_tanh(share), cap);
}

/* Binary64, for the tables of positions. */

#if defined(__CUDA_ARCH__)
#define lmc_fma64(a, b, c) __fma_rn((a), (b), (c))
#else
#define lmc_fma64(a, b, c) __builtin_fma((a), (b), (c))
#endif
/* Adding 1.5 * 2^52 rounds |x| < 2^51 to an integer. */
#define LMC_ROUND_MAGIC64 0x1.8p+52
#define LMC_LN_2 0x1.62e42fefa39efp-1
#define LMC_LN_2_LOW 0x1.abc9e3b39803fp-56
#define LMC_TWO_OVER_PI 0x1.45f306dc9c883p-1
#define LMC_HALF_PI 0x1.921fb54442d18p+0
#define LMC_HALF_PI_LOW 0x1.1a62633145c07p-54

/* e^x for |x| < 700, relative error about 2^-52: x = n ln 2 + r, the series of e^r by Horner's rule. */
LMC_FN double lmc_exp64(double x) {
    double n = (x / LMC_LN_2 + LMC_ROUND_MAGIC64) - LMC_ROUND_MAGIC64;
    double r = lmc_fma64(-n, LMC_LN_2_LOW, lmc_fma64(-n, LMC_LN_2, x));
    double sum = 1.0;
    for (int k = 16; k >= 1; k--)
        sum = lmc_fma64(sum, r / k, 1.0);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    bits += (uint64_t)(int64_t)n << 52;
    memcpy(&sum, &bits, sizeof sum);
    return sum;
}

/* ln x for normal x > 0, error about 2^-52 of max(1, |ln x|): x = 2^n m, ln m = 2 artanh((m - 1) / (m + 1)).
 */
LMC_FN double lmc_log64(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    /* 0x3FE6A09E667F3BCD is sqrt(1/2): m lies in [sqrt(1/2), sqrt 2). */
    int64_t n = (int64_t)(bits - 0x3FE6A09E667F3BCDu) >> 52;
    bits -= (uint64_t)n << 52;
    double m;
    memcpy(&m, &bits, sizeof m);
    double s = (m - 1.0) / (m + 1.0), sum = 0.0;
    for (int k = 27; k >= 1; k -= 2)
        sum = lmc_fma64(sum, s * s, 1.0 / k);
    return lmc_fma64((double)n, LMC_LN_2, 2.0 * s * sum);
}

/* ln(1 + e^x), error about 2^-52 of max(1, x). */
LMC_FN double lmc_softplus64(double x) {
    double magnitude = x < 0 ? -x : x;
    double tail = magnitude > 700.0 ? 0.0 : lmc_exp64(-magnitude);
    return (x > 0 ? x : 0.0) + lmc_log64(1.0 + tail);
}

/* sin x and cos x for binary32 values x with |x| < 2^30, error about 2^-53: x = n pi/2 + r, both series by
 * Horner's rule. x - n * LMC_HALF_PI is a multiple of 2^-52 below one, hence exact. */
LMC_FN void lmc_sincos64(double x, double *sine, double *cosine) {
    double n = (x * LMC_TWO_OVER_PI + LMC_ROUND_MAGIC64) - LMC_ROUND_MAGIC64;
    double r = lmc_fma64(-n, LMC_HALF_PI_LOW, lmc_fma64(-n, LMC_HALF_PI, x));
    double s = 1.0, c = 1.0;
    for (int k = 19; k >= 3; k -= 2)
        s = lmc_fma64(s, -(r * r) / (k * (k - 1)), 1.0);
    for (int k = 18; k >= 2; k -= 2)
        c = lmc_fma64(c, -(r * r) / (k * (k - 1)), 1.0);
    s *= r;
    int quadrant = (int)((int64_t)n & 3);
    *sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
    *cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
}

/* The weight of a symbol. */

/* 2^29 * 2^-g on [-1/2, 1/2] by minimax of the relative error (2.8e-6) with P(0) = 2^29, coefficients rounded
 * one by one to binary32 while the rest was refitted. */
#define LMC_WEIGHT_C0 0x1p+29f
#define LMC_WEIGHT_C1 (-0x1.62e12cp+28f)
#define LMC_WEIGHT_C2 0x1.ec036ep+26f
#define LMC_WEIGHT_C3 (-0x1.c9fc68p+24f)
#define LMC_WEIGHT_C4 0x1.3a0518p+22f
/* From here on n rounds to 32 or more, and every weight is the floor of one. */
#define LMC_WEIGHT_T_END 31.5f
/* A product of a larger maximum with log2 e would be too coarse: such rows are first moved to a maximum of 0.
 */
#define LMC_MAXIMUM_IN_PLACE 8192.0f

/* Where t = (maximum - logit) * log2 e is counted from: t = fma(-(logit - shift), log2 e, offset). */
typedef struct lmc_origin {
    float shift;
    float offset;
} lmc_origin_t;

LMC_FN lmc_origin_t lmc_origin(float maximum) {
    lmc_origin_t origin = {0.0f, 0.0f};
    if (maximum > LMC_MAXIMUM_IN_PLACE || maximum < -LMC_MAXIMUM_IN_PLACE)
        origin.shift = maximum;
    else
        origin.offset = lmc_mul(maximum, LMC_LOG2_E);
    return origin;
}

/* floor(2^29 * 2^-t): the weight of a symbol less its floor of one. t = n + g with integer n; the polynomial
 * in g, cut to an integer, is shifted right by n. t may be as low as -2^-11, by the rounding of the offset.
 */
LMC_FN uint32_t lmc_weight(float logit, lmc_origin_t origin) {
    float t = lmc_fma(-lmc_sub(logit, origin.shift), LMC_LOG2_E, origin.offset);
    /* Below -1 only where the caller changes the row meanwhile: its conversion would not be defined. */
    if (!(t > -1.0f && t < LMC_WEIGHT_T_END)) return 0;
    float shifted = lmc_add(t, LMC_ROUND_MAGIC);
    float g = lmc_sub(t, lmc_sub(shifted, LMC_ROUND_MAGIC));
    float p = lmc_fma(LMC_WEIGHT_C4, g, LMC_WEIGHT_C3);
    p = lmc_fma(p, g, LMC_WEIGHT_C2);
    p = lmc_fma(p, g, LMC_WEIGHT_C1);
    p = lmc_fma(p, g, LMC_WEIGHT_C0);
    return (uint32_t)(int32_t)p >> ((lmc_bits_of(shifted) - LMC_ROUND_MAGIC_BITS) & 31u);
}

#endif

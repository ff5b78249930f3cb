/* AVX-512 on a machine that has AVX2 only, for the checks: SIMDe has most intrinsics that core/vec_avx512.h
 * uses; the rest is here, as two of the AVX2 instructions with the same rounding and the same result out of
 * range. The compiler is told to include this file first (check.mk). */
#ifndef LLMCOMP_CHECK_AVX512_EMULATED_H
#define LLMCOMP_CHECK_AVX512_EMULATED_H

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <string.h>

/* Both halves of a vector, in memory, so that neither calling conventions nor types of another width matter.
 */
#define LMC_EMULATED_HALVES(RESULT, ARGUMENT, NAME, FUNCTION, HALF_RESULT, HALF_ARGUMENT)                    \
    static inline RESULT emulated_##NAME(ARGUMENT argument) {                                                \
        HALF_ARGUMENT halves[2];                                                                             \
        HALF_RESULT results[2];                                                                              \
        RESULT result;                                                                                       \
        memcpy(halves, &argument, sizeof halves);                                                            \
        results[0] = FUNCTION(halves[0]), results[1] = FUNCTION(halves[1]);                                  \
        memcpy(&result, results, sizeof result);                                                             \
        return result;                                                                                       \
    }

LMC_EMULATED_HALVES(simde__m512i, simde__m512, cvtps_epi32, _mm256_cvtps_epi32, __m256i, __m256)
LMC_EMULATED_HALVES(simde__m512i, simde__m512, cvttps_epi32, _mm256_cvttps_epi32, __m256i, __m256)
LMC_EMULATED_HALVES(simde__m512, simde__m512i, cvtepi32_ps, _mm256_cvtepi32_ps, __m256, __m256i)
LMC_EMULATED_HALVES(simde__m512i, __m256i, cvtepu16_epi32, _mm256_cvtepu16_epi32, __m256i, __m128i)
LMC_EMULATED_HALVES(simde__m512, __m256i, cvtph_ps, _mm256_cvtph_ps, __m256, __m128i)

static inline float emulated_reduce_max_ps(simde__m512 vector) {
    float lanes[16];
    memcpy(lanes, &vector, sizeof lanes);
    for (int i = 1; i < 16; i++)
        if (lanes[i] > lanes[0]) lanes[0] = lanes[i];
    return lanes[0];
}

static inline float emulated_reduce_add_ps(simde__m512 vector) {
    float lanes[16];
    memcpy(lanes, &vector, sizeof lanes);
    for (int i = 1; i < 16; i++)
        lanes[0] += lanes[i];
    return lanes[0];
}

static inline simde__m512i emulated_maskz_loadu_epi8(uint64_t mask, const void *bytes) {
    char lanes[64] = {0};
    simde__m512i result;
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1) lanes[i] = ((const char *)bytes)[i];
    memcpy(&result, lanes, sizeof result);
    return result;
}

/* SIMDe 0.7 gives this name to the masked form. */
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 simde_mm512_madd_epi16

#define _mm512_maskz_loadu_epi8 emulated_maskz_loadu_epi8
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvttps_epi32 emulated_cvttps_epi32
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps

#endif

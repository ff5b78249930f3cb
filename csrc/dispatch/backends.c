/* The only place that asks the processor what it can do, and the only global table. */
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdatomic.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <asm/hwcap.h>
#endif

#include "core/coding/row_kernels.h"
#include "core/int8/kernels.h"
#include "core/transformer/kernels.h"

static const lmc_backend_t backend_serial = {"serial", lmc_row_kernels_serial,
                                             &lmc_transformer_kernels_serial, &lmc_int8_kernels_serial};

#if defined(__x86_64__)
static const lmc_backend_t backend_avx2 = {"avx2", lmc_row_kernels_avx2, &lmc_transformer_kernels_avx2,
                                           &lmc_int8_kernels_avx2};
static const lmc_backend_t backend_avx512 = {"avx512", lmc_row_kernels_avx512,
                                             &lmc_transformer_kernels_avx512, &lmc_int8_kernels_avx512};
static const lmc_backend_t backend_avx512_vnni = {
    "avx512", lmc_row_kernels_avx512, &lmc_transformer_kernels_avx512, &lmc_int8_kernels_avx512vnni};

/* What processor and operating system (XCR0: which registers it saves) have. Not by __builtin_cpu_supports:
 * it says no to everything where the compiler's library is zig's. CPUID takes microseconds in a virtual
 * machine, so the answer is kept. */
enum { HAS_AVX2 = 1, HAS_AVX512 = 2, HAS_VNNI = 4, XCR0_YMM = 0x06, XCR0_ZMM = 0xe6 };

static int ask_processor(void) {
    const unsigned base = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
    const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & base) != base) return 0;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & bit_AVX2) == 0 || (saved & XCR0_YMM) != XCR0_YMM)
        return 0;
    if ((b & wide) != wide || (saved & XCR0_ZMM) != XCR0_ZMM) return HAS_AVX2;
    return HAS_AVX2 | HAS_AVX512 | ((c & bit_AVX512VNNI) != 0 ? HAS_VNNI : 0);
}
static int processor_has(int what) {
    static atomic_int answer = -1;
    if (atomic_load(&answer) < 0) atomic_store(&answer, ask_processor());
    return (atomic_load(&answer) & what) != 0;
}
static int has_avx2(void) {
    return processor_has(HAS_AVX2);
}
static int has_avx512(void) {
    return processor_has(HAS_AVX512);
}
static const lmc_backend_t *best_avx512(void) {
    return processor_has(HAS_VNNI) ? &backend_avx512_vnni : &backend_avx512;
}
#elif defined(__aarch64__)
static const lmc_backend_t backend_neon = {"neon", lmc_row_kernels_neon, &lmc_transformer_kernels_neon,
                                           &lmc_int8_kernels_neon};
static const lmc_backend_t backend_neon_dot = {"neon", lmc_row_kernels_neon, &lmc_transformer_kernels_neon,
                                               &lmc_int8_kernels_neondot};

static const lmc_backend_t *best_neon(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return &backend_neon_dot;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 ? &backend_neon_dot : &backend_neon;
#else
    return &backend_neon;
#endif
}
#endif

const char *lmc_backend_name(const lmc_backend_t *backend) {
    return backend->name;
}

const lmc_backend_t *lmc_backend_at(size_t index) {
    const lmc_backend_t *usable[3];
    size_t n_usable = 0;
    usable[n_usable++] = &backend_serial;
#if defined(__x86_64__)
    if (has_avx2()) usable[n_usable++] = &backend_avx2;
    if (has_avx512()) usable[n_usable++] = best_avx512();
#elif defined(__aarch64__)
    usable[n_usable++] = best_neon(); /* Advanced SIMD is part of every AArch64 */
#endif
    return index < n_usable ? usable[index] : NULL;
}

size_t lmc_backend_count(void) {
    size_t count = 0;
    while (lmc_backend_at(count) != NULL)
        count++;
    return count;
}

const lmc_backend_t *lmc_backend_find(const char *name) {
    const lmc_backend_t *backend = NULL;
    for (size_t i = 0; (backend = lmc_backend_at(i)) != NULL; i++) {
        if (strcmp(backend->name, name) == 0) break;
    }
    return backend;
}

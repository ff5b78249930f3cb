/* Linear maps in 8-bit integers: the two kernels that a backend brings for them. The sums are integers and
 * exact, so that their order is the kernel's own choice; rule.h has how numbers become codes. */
#ifndef LLMCOMP_CORE_INT8_KERNELS_H
#define LLMCOMP_CORE_INT8_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/backend_table.h"
#include "core/base/panel.h"
#include "core/int8/rule.h"

/* The codes of a panel of numbers. How they lie is the backend's own affair: 2 bytes a code are enough for
 * any, and a backend's product finds what its quantise left. */
typedef struct lmc_int8_panel {
    float scales[LMC_LANES];
    int32_t codes[]; /* lmc_int8_padded(n_k) * LMC_LANES * 2 bytes */
} lmc_int8_panel_t;

static inline size_t lmc_int8_panel_bytes(size_t n_k) {
    return sizeof(lmc_int8_panel_t) + lmc_int8_padded(n_k) * LMC_LANES * sizeof(int16_t);
}

/* output[row][lane] = (sum * scales[row]) * scale of the lane, then + bias[row]; sum is over the products of
 * the codes and becomes a binary32 with one rounding. */
typedef struct lmc_int8_product {
    const int8_t *weights;         /* [n_rows][n_k] */
    const float *scales;           /* [n_rows] */
    const float *bias;             /* [n_rows]; NULL: none is added */
    size_t n_rows, n_k;            /* n_k: a multiple of LMC_INT8_K */
    const lmc_int8_panel_t *input; /* n_panels, input_stride bytes apart */
    float *output;                 /* n_panels of [n_rows][LMC_LANES], output_stride floats apart */
    size_t input_stride, output_stride, n_panels;
    size_t n_lanes; /* lanes from this one on need not be computed; as it was for quantise */
} lmc_int8_product_t;

typedef struct lmc_int8_kernels {
    void (*quantise)(const float *panel, size_t n_features, size_t n_lanes, lmc_int8_panel_t *codes);
    void (*product)(const lmc_int8_product_t *product);
} lmc_int8_kernels_t;

/* Each in product_<backend>.c; avx512 and neon have a second set for processors that multiply 8-bit integers.
 */
extern const lmc_int8_kernels_t lmc_int8_kernels_serial;
#if defined(__x86_64__)
extern const lmc_int8_kernels_t lmc_int8_kernels_avx2;
extern const lmc_int8_kernels_t lmc_int8_kernels_avx512;
extern const lmc_int8_kernels_t lmc_int8_kernels_avx512vnni;
#elif defined(__aarch64__)
extern const lmc_int8_kernels_t lmc_int8_kernels_neon;
extern const lmc_int8_kernels_t lmc_int8_kernels_neondot;
#endif

#endif

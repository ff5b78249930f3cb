/* The matrix product with AVX-512: tiles of 8 rows x 2 panels or 1. Rows that lie a power of two apart meet
 * in the eight ways of the first cache, so that more of them would push each other out. And the forward
 * pass's other kernels, compiled for this instruction set. */
#include "core/transformer/kernels.h"

#if defined(__x86_64__)
#include "core/base/vec_avx512.h"

#include "core/transformer/product_16bit_avx2.h"

#define LMC_TRANSFORMER_KERNELS lmc_transformer_kernels_avx512
#define LMC_TILE_ROWS 8
#define LMC_LINE_FLOATS 16

/* sums += weights of one column times the lanes of one feature. */
LMC_INLINE void add_column(__m512 sums[8][2], const float *weights, ptrdiff_t row_stride, const float *input,
                           size_t input_stride, const size_t n_rows, const size_t n_panels) {
    __m512 x[2];
#pragma GCC unroll 2
    for (size_t i = 0; i < n_panels; i++)
        x[i] = _mm512_loadu_ps(input + i * input_stride);
#pragma GCC unroll 8
    for (size_t r = 0; r < n_rows; r++) {
        __m512 weight = _mm512_set1_ps(weights[(ptrdiff_t)r * row_stride]);
#pragma GCC unroll 2
        for (size_t i = 0; i < n_panels; i++)
            sums[r][i] = _mm512_fmadd_ps(weight, x[i], sums[r][i]);
    }
}

/* n_rows and n_panels are constants at every call, so that the accumulators live in registers. */
LMC_INLINE void tile(const lmc_product_t *p, size_t row, size_t panel, const size_t n_rows,
                     const size_t n_panels) {
    const float *weights = (const float *)p->weights + (ptrdiff_t)row * p->row_stride;
    const float *input = p->input + panel * p->input_stride;
    float *output = p->output + panel * p->output_stride + row * LMC_LANES;
    const char *ahead = panel == 0 ? lmc_next_tile(p, row, n_rows) : NULL, *short_ahead = p->ahead;
    ptrdiff_t row_stride = p->row_stride, k_stride = p->k_stride;
    __m512 sums[8][2];
#pragma GCC unroll 8
    for (size_t r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (size_t i = 0; i < n_panels; i++)
            sums[r][i] = p->resume ? _mm512_loadu_ps(output + i * p->output_stride + r * LMC_LANES)
                                   : _mm512_setzero_ps();
    }
    size_t left = p->n_k;
    for (; left >= LMC_LINE_FLOATS; left -= LMC_LINE_FLOATS) {
        lmc_prefetch_tile(&ahead, &short_ahead, n_rows);
#pragma GCC unroll 2
        for (size_t k = 0; k < LMC_LINE_FLOATS; k++, weights += k_stride, input += LMC_LANES)
            add_column(sums, weights, row_stride, input, p->input_stride, n_rows, n_panels);
    }
    for (; left > 0; left--, weights += k_stride, input += LMC_LANES)
        add_column(sums, weights, row_stride, input, p->input_stride, n_rows, n_panels);
#pragma GCC unroll 8
    for (size_t r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (size_t i = 0; i < n_panels; i++) {
            if (p->bias != NULL) sums[r][i] = _mm512_add_ps(sums[r][i], _mm512_set1_ps(p->bias[row + r]));
            _mm512_storeu_ps(output + i * p->output_stride + r * LMC_LANES, sums[r][i]);
        }
    }
}

/* A panel of eight tokens or fewer: half a vector, since some processors take twice as long for a whole one.
 */
LMC_INLINE void half_tile(const lmc_product_t *p, size_t row, const size_t n_rows) {
    const float *weights = (const float *)p->weights + (ptrdiff_t)row * p->row_stride, *input = p->input;
    const char *ahead = lmc_next_tile(p, row, n_rows);
    float *output = p->output + row * LMC_LANES;
    ptrdiff_t row_stride = p->row_stride, k_stride = p->k_stride;
    __m256 sums[8];
#pragma GCC unroll 8
    for (size_t r = 0; r < n_rows; r++)
        sums[r] = p->resume ? _mm256_loadu_ps(output + r * LMC_LANES) : _mm256_setzero_ps();
    for (size_t k = 0; k < p->n_k; k++) {
        __m256 x = _mm256_loadu_ps(input);
        if (ahead != NULL && k % LMC_LINE_FLOATS == 0) {
#pragma GCC unroll 8
            for (size_t r = 0; r < n_rows; r++)
                _mm_prefetch(ahead + r * LMC_LINE_BYTES, LMC_HINT_AHEAD);
            ahead += n_rows * LMC_LINE_BYTES;
        }
#pragma GCC unroll 8
        for (size_t r = 0; r < n_rows; r++) {
            __m256 weight = _mm256_broadcast_ss(weights + (ptrdiff_t)r * row_stride);
            sums[r] = _mm256_fmadd_ps(weight, x, sums[r]);
        }
        input += LMC_LANES;
        weights += k_stride;
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < n_rows; r++) {
        if (p->bias != NULL) sums[r] = _mm256_add_ps(sums[r], _mm256_broadcast_ss(p->bias + row + r));
        _mm256_storeu_ps(output + r * LMC_LANES, sums[r]);
    }
}

static void half_product(const lmc_product_t *p) {
    size_t row = 0;
    for (; row + 8 <= p->n_rows; row += 8)
        half_tile(p, row, 8);
    for (; row + 4 <= p->n_rows; row += 4)
        half_tile(p, row, 4);
    for (; row < p->n_rows; row++)
        half_tile(p, row, 1);
}

static void lmc_product_run(const lmc_product_t *p) {
    size_t panel = 0;
    if (lmc_product_few_run(p)) return;
    if (p->n_panels == 1 && p->n_lanes <= 8) {
        half_product(p);
        return;
    }
    for (; panel + 2 <= p->n_panels; panel += 2) {
        size_t row = 0;
        for (; row + 8 <= p->n_rows; row += 8)
            tile(p, row, panel, 8, 2);
        for (; row + 4 <= p->n_rows; row += 4)
            tile(p, row, panel, 4, 2);
        for (; row < p->n_rows; row++)
            tile(p, row, panel, 1, 2);
    }
    if (panel < p->n_panels) {
        size_t row = 0;
        for (; row + 8 <= p->n_rows; row += 8)
            tile(p, row, panel, 8, 1);
        for (; row < p->n_rows; row++)
            tile(p, row, panel, 1, 1);
    }
}

#include "core/transformer/kernel_lanes.h"

#endif

/* The matrix product with AVX2 and FMA: tiles of 6 rows x 16 lanes (or 12 rows x 8 lanes when the panel holds
 * few tokens), one broadcast weight a row; with four tokens or fewer the vectors run over 8 rows, whose
 * weights are transposed in registers. And the forward pass's other kernels, compiled for this instruction
 * set. */
#include "core/transformer/kernels.h"

#if defined(__x86_64__)
#include "core/base/vec_avx2.h"

#include "core/transformer/product_16bit_avx2.h"

#define LMC_TRANSFORMER_KERNELS lmc_transformer_kernels_avx2
#define LMC_TILE_ROWS 6
#define LMC_LINE_FLOATS 16

/* sums += weights of one column times the lanes of one feature. */
LMC_INLINE void add_column(__m256 sums[12][2], const float *weights, ptrdiff_t row_stride, const float *input,
                           const size_t n_rows, const size_t n_vectors) {
    __m256 x[2];
#pragma GCC unroll 2
    for (size_t v = 0; v < n_vectors; v++)
        x[v] = _mm256_loadu_ps(input + v * 8);
#pragma GCC unroll 12
    for (size_t r = 0; r < n_rows; r++) {
        __m256 weight = _mm256_broadcast_ss(weights + (ptrdiff_t)r * row_stride);
#pragma GCC unroll 2
        for (size_t v = 0; v < n_vectors; v++)
            sums[r][v] = _mm256_fmadd_ps(weight, x[v], sums[r][v]);
    }
}

/* n_rows and n_vectors are constants at every call, so that the accumulators live in registers: 12 of the 16.
 */
LMC_INLINE void tile(const lmc_product_t *p, size_t row, size_t panel, const size_t n_rows,
                     const size_t n_vectors) {
    const float *weights = (const float *)p->weights + (ptrdiff_t)row * p->row_stride;
    const float *input = p->input + panel * p->input_stride;
    const char *ahead = panel == 0 ? lmc_next_tile(p, row, n_rows) : NULL, *short_ahead = p->ahead;
    float *out = p->output + panel * p->output_stride + row * LMC_LANES;
    ptrdiff_t row_stride = p->row_stride, k_stride = p->k_stride;
    size_t left = p->n_k;
    __m256 sums[12][2];
#pragma GCC unroll 12
    for (size_t r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (size_t v = 0; v < n_vectors; v++)
            sums[r][v] = p->resume ? _mm256_loadu_ps(out + r * LMC_LANES + v * 8) : _mm256_setzero_ps();
    }
    for (; left >= LMC_LINE_FLOATS; left -= LMC_LINE_FLOATS) {
        lmc_prefetch_tile(&ahead, &short_ahead, n_rows);
#pragma GCC unroll 4
        for (size_t k = 0; k < LMC_LINE_FLOATS; k++, weights += k_stride, input += LMC_LANES)
            add_column(sums, weights, row_stride, input, n_rows, n_vectors);
    }
    for (; left > 0; left--, weights += k_stride, input += LMC_LANES)
        add_column(sums, weights, row_stride, input, n_rows, n_vectors);
#pragma GCC unroll 12
    for (size_t r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (size_t v = 0; v < n_vectors; v++) {
            if (p->bias != NULL)
                sums[r][v] = _mm256_add_ps(sums[r][v], _mm256_broadcast_ss(p->bias + row + r));
            _mm256_storeu_ps(out + r * LMC_LANES + v * 8, sums[r][v]);
        }
    }
}

/* Up to n_rows (a constant) rows of all panels, which are few enough for their weights to stay in cache. */
LMC_INLINE void tiles(const lmc_product_t *p, size_t row, const size_t n_rows, const size_t n_vectors) {
    for (size_t panel = 0; panel < p->n_panels; panel++)
        tile(p, row, panel, n_rows, n_vectors);
}

static void product_16_lanes(const lmc_product_t *p) {
    size_t row = 0;
    for (; row + 6 <= p->n_rows; row += 6)
        tiles(p, row, 6, 2);
    switch (p->n_rows - row) {
    case 5:
        tiles(p, row, 5, 2);
        break;
    case 4:
        tiles(p, row, 4, 2);
        break;
    case 3:
        tiles(p, row, 3, 2);
        break;
    case 2:
        tiles(p, row, 2, 2);
        break;
    case 1:
        tiles(p, row, 1, 2);
        break;
    default:
        break;
    }
}

/* More than eight rows a power of two apart would not fit the eight ways of the cache. */
static void product_8_lanes(const lmc_product_t *p) {
    size_t row = 0;
    for (; row + 8 <= p->n_rows; row += 8)
        tiles(p, row, 8, 1);
    for (; row + 4 <= p->n_rows; row += 4)
        tiles(p, row, 4, 1);
    for (; row < p->n_rows; row++)
        tiles(p, row, 1, 1);
}

static void lmc_product_run(const lmc_product_t *p) {
    if (lmc_product_few_run(p)) return;
    if (p->n_lanes > 8)
        product_16_lanes(p);
    else
        product_8_lanes(p);
}

#include "core/transformer/kernel_lanes.h"

#endif

/* The matrix product with AVX2 and FMA: tiles of 6 rows x 16 lanes (or 12 rows x 8 lanes when the panel holds
 * few tokens), one broadcast weight a row; and the forward pass's other kernels, compiled for this
 * instruction set. */
#include "kernels.h"

#if defined(__x86_64__)
#include "vec_avx2.h"

#define LMC_NEOX_KERNELS lmc_neox_kernels_avx2
#define LMC_INLINE static inline __attribute__((always_inline))

/* n_rows and n_vectors are constants at every call, so that the accumulators live in registers: 12 of the 16.
 */
LMC_INLINE void tile(const lmc_product_t *p, size_t row, const float *input, float *output,
                     const size_t n_rows, const size_t n_vectors) {
    const float *weights = p->weights + (ptrdiff_t)row * p->row_stride;
    ptrdiff_t row_stride = p->row_stride, k_stride = p->k_stride;
    float *out = output + row * LMC_LANES;
    __m256 sums[12][2];
#pragma GCC unroll 12
    for (size_t r = 0; r < n_rows; r++) {
#pragma GCC unroll 2
        for (size_t v = 0; v < n_vectors; v++)
            sums[r][v] = p->resume ? _mm256_loadu_ps(out + r * LMC_LANES + v * 8) : _mm256_setzero_ps();
    }
    for (size_t k = 0; k < p->n_k; k++) {
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
        input += LMC_LANES;
        weights += k_stride;
    }
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

static void product_16_lanes(const lmc_product_t *p, const float *input, float *output) {
    size_t row = 0;
    for (; row + 6 <= p->n_rows; row += 6)
        tile(p, row, input, output, 6, 2);
    switch (p->n_rows - row) {
    case 5:
        tile(p, row, input, output, 5, 2);
        break;
    case 4:
        tile(p, row, input, output, 4, 2);
        break;
    case 3:
        tile(p, row, input, output, 3, 2);
        break;
    case 2:
        tile(p, row, input, output, 2, 2);
        break;
    case 1:
        tile(p, row, input, output, 1, 2);
        break;
    default:
        break;
    }
}

static void product_8_lanes(const lmc_product_t *p, const float *input, float *output) {
    size_t row = 0;
    for (; row + 12 <= p->n_rows; row += 12)
        tile(p, row, input, output, 12, 1);
    for (; row + 4 <= p->n_rows; row += 4)
        tile(p, row, input, output, 4, 1);
    for (; row < p->n_rows; row++)
        tile(p, row, input, output, 1, 1);
}

static void lmc_product_run(const lmc_product_t *p) {
    for (size_t i = 0; i < p->n_panels; i++) {
        const float *input = p->input + i * p->input_stride;
        float *output = p->output + i * p->output_stride;
        if (p->n_lanes > 8)
            product_16_lanes(p, input, output);
        else
            product_8_lanes(p, input, output);
    }
}

#include "transpose_avx2.h"
#include "neox_lanes.h"

#endif

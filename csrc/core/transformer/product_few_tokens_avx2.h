/* The matrix product of float32 weights for at most four tokens; memory-bound, so AVX-512 uses it too. The
 * vectors run over 8 rows, whose weights are transposed in registers. Rows are taken whole, as they
 * lie in memory. */
#ifndef LLMCOMP_CORE_TRANSFORMER_PRODUCT_FEW_TOKENS_AVX2_H
#define LLMCOMP_CORE_TRANSFORMER_PRODUCT_FEW_TOKENS_AVX2_H

#include <string.h>

#include "core/base/ieee.h"
#include "core/transformer/kernels.h"
#include "core/transformer/transpose_avx2.h"

#define LMC_INLINE static inline __attribute__((always_inline))
#define LMC_LINE_BYTES 64
/* What comes next is asked for into the second cache: the first has no room beside the rows at work, and
 * waiting for the second is hidden. */
#define LMC_HINT_AHEAD _MM_HINT_T1
/* Tokens of a product's columns that lie packed on the stack. */
#define LMC_PACKED_FLOATS 8192
/* A tile of two blocks of rows, whose chains hide each other's latency, is at most this large: more than that
 * and the next tile, which is prefetched meanwhile, would push it out of the cache. */
#define LMC_TWO_BLOCKS_BYTES 16384

static const char *lmc_weights_at(const lmc_product_t *p, size_t row, size_t k) {
    size_t element_bytes = p->dtype == LMC_FLOAT32 ? 4 : 2;
    return (const char *)p->weights + (row * (size_t)p->row_stride + k) * element_bytes;
}

/* A tile is too short for the hardware prefetcher to find the next one: it is prefetched meanwhile, line by
 * line. NULL where the rows of the next tile do not follow in memory. */
static const char *lmc_next_tile(const lmc_product_t *p, size_t row, size_t n_rows) {
    int is_dense = p->k_stride == 1 && p->row_stride == (ptrdiff_t)p->n_k;
    return is_dense ? lmc_weights_at(p, row + n_rows, 0) : NULL;
}

/* While n_rows (a constant) rows of a float32 tile are used for a line of columns: so many lines of the next
 * tile, or of what the caller asked for (16-bit weights, half as many). NULL: nothing is to come. */
LMC_INLINE void lmc_prefetch_tile(const char **ahead, const char **short_ahead, const size_t n_rows) {
    if (*ahead != NULL) {
#pragma GCC unroll 12
        for (size_t line = 0; line < n_rows; line++)
            _mm_prefetch(*ahead + line * LMC_LINE_BYTES, LMC_HINT_AHEAD);
        *ahead += n_rows * LMC_LINE_BYTES;
    } else if (*short_ahead != NULL) {
#pragma GCC unroll 6
        for (size_t line = 0; line < n_rows / 2; line++)
            _mm_prefetch(*short_ahead + line * LMC_LINE_BYTES, LMC_HINT_AHEAD);
        *short_ahead += n_rows / 2 * LMC_LINE_BYTES;
    }
}

/* Columns k ... k + 7 of 8 rows, 32 bits wide: columns[j] has those of k + j, a row a lane. */
LMC_INLINE void lmc_load_columns(const void *weights, ptrdiff_t row_bytes, __m256 columns[8]) {
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; half++) {
        __m256 rows[4], pairs[4];
#pragma GCC unroll 4
        for (size_t r = 0; r < 4; r++) {
            const char *low = (const char *)weights + (ptrdiff_t)r * row_bytes + 16 * half;
            const char *high = low + 4 * row_bytes;
            __m256 both = _mm256_castps128_ps256(_mm_loadu_ps((const float *)(const void *)low));
            rows[r] = _mm256_insertf128_ps(both, _mm_loadu_ps((const float *)(const void *)high), 1);
        }
        pairs[0] = _mm256_unpacklo_ps(rows[0], rows[1]);
        pairs[1] = _mm256_unpackhi_ps(rows[0], rows[1]);
        pairs[2] = _mm256_unpacklo_ps(rows[2], rows[3]);
        pairs[3] = _mm256_unpackhi_ps(rows[2], rows[3]);
        columns[4 * half] = _mm256_shuffle_ps(pairs[0], pairs[2], 0x44);
        columns[4 * half + 1] = _mm256_shuffle_ps(pairs[0], pairs[2], 0xEE);
        columns[4 * half + 2] = _mm256_shuffle_ps(pairs[1], pairs[3], 0x44);
        columns[4 * half + 3] = _mm256_shuffle_ps(pairs[1], pairs[3], 0xEE);
    }
}

/* sums[t] += 8 columns of 8 rows times token t, whose values of a column are x[column * n_tokens + t]. */
LMC_INLINE void lmc_add_columns(__m256 sums[4], const float *weights, ptrdiff_t row_stride, const float *x,
                                const size_t n_tokens) {
    __m256 columns[8];
    lmc_load_columns(weights, row_stride * (ptrdiff_t)sizeof *weights, columns);
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; j++) {
#pragma GCC unroll 4
        for (size_t t = 0; t < n_tokens; t++)
            sums[t] = _mm256_fmadd_ps(columns[j], _mm256_broadcast_ss(x + j * n_tokens + t), sums[t]);
    }
}

LMC_INLINE float lmc_weight_of(const char *weights, ptrdiff_t i, const lmc_dtype_t dtype) {
    if (dtype == LMC_FLOAT32) return ((const float *)(const void *)weights)[i];
    uint16_t bits = ((const uint16_t *)(const void *)weights)[i];
    return dtype == LMC_FLOAT16 ? lmc_widen_f16(bits) : lmc_widen_bf16(bits);
}

/* Sums of 8 rows: what the output has of them, or zeros; and back, with the bias where it is due. */
LMC_INLINE void lmc_begin_sums(__m256 *sums, const float *out, int resume, const size_t n_tokens) {
    float lanes[8] = {0};
/* All of them: sums that are once told apart by a variable stay in memory to the end. */
#pragma GCC unroll 8
    for (size_t t = 0; t < n_tokens; t++) {
        for (size_t r = 0; r < 8 && resume; r++)
            lanes[r] = out[r * LMC_LANES + t];
        sums[t] = _mm256_loadu_ps(lanes);
    }
}

LMC_INLINE void lmc_end_sums(const __m256 *sums, float *out, const float *bias, const size_t n_tokens) {
    __m256 ended[8];
#pragma GCC unroll 8
    for (size_t t = 0; t < n_tokens; t++)
        ended[t] = bias == NULL ? sums[t] : _mm256_add_ps(sums[t], _mm256_loadu_ps(bias));
    if (n_tokens == 8) {
        transpose_8x8(ended);
        for (size_t r = 0; r < 8; r++)
            _mm256_storeu_ps(out + r * LMC_LANES, ended[r]);
        return;
    }
    float lanes[8];
#pragma GCC unroll 4
    for (size_t t = 0; t < n_tokens; t++) {
        _mm256_storeu_ps(lanes, ended[t]);
        for (size_t r = 0; r < 8; r++)
            out[r * LMC_LANES + t] = lanes[r];
    }
}

/* 8 * n_blocks rows for n_tokens tokens over n_k weights from column k on. n_tokens and n_blocks are
 * constants at every call. */
LMC_INLINE void lmc_rows_of_few(const lmc_product_t *p, size_t row, size_t k, size_t n_k, const float *x,
                                const size_t n_tokens, const size_t n_blocks) {
    ptrdiff_t stride = p->row_stride;
    const float *weights = (const float *)p->weights + (ptrdiff_t)row * stride + (ptrdiff_t)k;
    /* Not if rows are cut: the next piece of this row would come next. */
    const char *ahead = n_k == p->n_k ? lmc_next_tile(p, row, 8 * n_blocks) : NULL;
    int resume = p->resume || k > 0, is_end = k + n_k == p->n_k;
    float *out = p->output + row * LMC_LANES, lanes[8];
    __m256 sums[2][4];
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++)
        lmc_begin_sums(sums[b], out + 8 * b * LMC_LANES, resume, n_tokens);
    size_t left = n_k;
    for (; left >= 8; left -= 8, weights += 8, x += 8 * n_tokens) {
        if (ahead != NULL) {
#pragma GCC unroll 8
            for (size_t line = 0; line < 4 * n_blocks; line++)
                _mm_prefetch(ahead + line * LMC_LINE_BYTES, LMC_HINT_AHEAD);
            ahead += 4 * n_blocks * LMC_LINE_BYTES;
        }
#pragma GCC unroll 2
        for (size_t b = 0; b < n_blocks; b++)
            lmc_add_columns(sums[b], weights + (ptrdiff_t)(8 * b) * stride, stride, x, n_tokens);
    }
    for (; left > 0; left--, weights++, x += n_tokens) {
#pragma GCC unroll 2
        for (size_t b = 0; b < n_blocks; b++) {
            for (size_t r = 0; r < 8; r++)
                lanes[r] = weights[(ptrdiff_t)(8 * b + r) * stride];
            __m256 column = _mm256_loadu_ps(lanes);
#pragma GCC unroll 4
            for (size_t t = 0; t < n_tokens; t++)
                sums[b][t] = _mm256_fmadd_ps(column, _mm256_broadcast_ss(x + t), sums[b][t]);
        }
    }
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++) {
        const float *bias = is_end && p->bias != NULL ? p->bias + row + 8 * b : NULL;
        lmc_end_sums(sums[b], out + 8 * b * LMC_LANES, bias, n_tokens);
    }
}

/* A row that makes no block of eight. */
LMC_INLINE void lmc_row_of_few(const lmc_product_t *p, size_t row, const lmc_dtype_t dtype, size_t n_tokens) {
    const char *weights = lmc_weights_at(p, row, 0);
    float *out = p->output + row * LMC_LANES;
    for (size_t t = 0; t < n_tokens; t++) {
        float chain = p->resume ? out[t] : 0.0f;
        for (size_t k = 0; k < p->n_k; k++)
            chain = lmc_fma(lmc_weight_of(weights, (ptrdiff_t)k, dtype), p->input[k * LMC_LANES + t], chain);
        out[t] = p->bias == NULL ? chain : lmc_add(chain, p->bias[row]);
    }
}

/* n_tokens of n_k inputs of a panel, without the gaps between them. */
LMC_INLINE void lmc_pack_inputs(const float *input, size_t n_k, float *x, const size_t n_tokens) {
    for (size_t i = 0; i < n_k; i++)
        memcpy(x + i * n_tokens, input + i * LMC_LANES, n_tokens * sizeof *x);
}

LMC_INLINE void lmc_product_of_few(const lmc_product_t *p, const size_t n_tokens) {
    const size_t n_packed = LMC_PACKED_FLOATS / n_tokens;
    float x[LMC_PACKED_FLOATS];
    size_t row = 0;
    for (size_t k = 0; k == 0 || k < p->n_k; k += n_packed) {
        size_t left = p->n_k - k, n_k = left < n_packed ? left : n_packed;
        int is_short = 16 * n_k * sizeof(float) <= LMC_TWO_BLOCKS_BYTES;
        lmc_pack_inputs(p->input + k * LMC_LANES, n_k, x, n_tokens);
        row = 0;
        for (; n_tokens < 4 && is_short && row + 16 <= p->n_rows; row += 16)
            lmc_rows_of_few(p, row, k, n_k, x, n_tokens, 2);
        for (; row + 8 <= p->n_rows; row += 8)
            lmc_rows_of_few(p, row, k, n_k, x, n_tokens, 1);
    }
    for (; row < p->n_rows; row++)
        lmc_row_of_few(p, row, LMC_FLOAT32, n_tokens);
}

#endif

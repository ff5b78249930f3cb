/* The matrix product of 16-bit weights for at most eight tokens; memory-bound, so AVX-512 uses it too. The
 * vectors run over 8 rows, whose weights are turned into columns while they are 16 bits wide: half the
 * instructions that it takes after widening.
 *
 * float16: a tile of rows, a line of each, is turned in a buffer; each column is widened where it is used.
 * bfloat16: two neighbours are turned as one number of 32 bits, which a shift and a mask widen. */
#ifndef LLMCOMP_CORE_TRANSFORMER_PRODUCT_16BIT_AVX2_H
#define LLMCOMP_CORE_TRANSFORMER_PRODUCT_16BIT_AVX2_H

#include "core/transformer/product_few_tokens_avx2.h"

/* Columns of a tile: a line of each row, so that no line is needed again when others have pushed it out. */
#define LMC_TILE_COLUMNS 32
#define LMC_TILE_WEIGHTS (8 * LMC_TILE_COLUMNS)
/* Blocks of 8 rows side by side, so that the chains of one hide the latency of the other's. */
#define LMC_16BIT_BLOCKS 2
#define LMC_16BIT_LANES 8

/* Where column k of a tile begins: they lie as lmc_turn_columns leaves them, k beside k + 8. */
static inline size_t lmc_turned_column(size_t k) {
    return k / 16 * 128 + k % 8 * 16 + k % 16 / 8 * 8;
}

/* 16 columns of 8 rows. */
LMC_INLINE void lmc_turn_columns(const uint16_t *weights, ptrdiff_t row_stride, uint16_t *columns) {
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (size_t r = 0; r < 8; r++)
        a[r] = _mm256_loadu_si256((const __m256i *)(const void *)(weights + (ptrdiff_t)r * row_stride));
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        b[i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[i + 4] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(b[2 * i], b[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(b[2 * i], b[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        size_t first =
            i / 2 * 4 + i % 2; /* rows 0 to 3 of columns 2i and 2i + 1; rows 4 to 7 are two further */
        __m256i *out = (__m256i *)(void *)columns + 2 * i;
        _mm256_store_si256(out, _mm256_unpacklo_epi64(a[first], a[first + 2]));
        _mm256_store_si256(out + 1, _mm256_unpackhi_epi64(a[first], a[first + 2]));
    }
}

/* LMC_TILE_COLUMNS of them. */
LMC_INLINE void lmc_turn_tile(const uint16_t *weights, ptrdiff_t row_stride, uint16_t *columns) {
    lmc_turn_columns(weights, row_stride, columns);
    lmc_turn_columns(weights + 16, row_stride, columns + lmc_turned_column(16));
}

LMC_INLINE __m256 lmc_widen_column(const uint16_t *column, const lmc_dtype_t dtype) {
    __m128i bits = _mm_load_si128((const __m128i *)(const void *)column);
    if (dtype == LMC_FLOAT16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* sums[b][t] += weights[b], a column of block b, times the value of token t. */
LMC_INLINE void lmc_add_weights(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES],
                                const __m256 weights[LMC_16BIT_BLOCKS], const float *x, const size_t n_tokens,
                                const size_t n_blocks) {
#pragma GCC unroll 8
    for (size_t t = 0; t < n_tokens; t++) {
        __m256 value = _mm256_broadcast_ss(x + t);
#pragma GCC unroll 2
        for (size_t b = 0; b < n_blocks; b++)
            sums[b][t] = _mm256_fmadd_ps(weights[b], value, sums[b][t]);
    }
}

/* The same with columns in memory, of 16 bits a weight. */
LMC_INLINE void lmc_add_column(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const uint16_t *column,
                               const float *x, const lmc_dtype_t dtype, const size_t n_tokens,
                               const size_t n_blocks) {
    __m256 weights[LMC_16BIT_BLOCKS];
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++)
        weights[b] = lmc_widen_column(column + b * LMC_TILE_WEIGHTS, dtype);
    lmc_add_weights(sums, weights, x, n_tokens, n_blocks);
}

/* A tile of float16: turned in the buffer `columns`, widened where it is used. */
LMC_INLINE void lmc_add_tile(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const uint16_t *weights,
                             ptrdiff_t row_stride, uint16_t *columns, const float *x, const lmc_dtype_t dtype,
                             const size_t n_tokens, const size_t n_blocks) {
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++)
        lmc_turn_tile(weights + (ptrdiff_t)(8 * b) * row_stride, row_stride, columns + b * LMC_TILE_WEIGHTS);
    for (size_t i = 0; i < LMC_TILE_COLUMNS; i += 8) {
/* No more: clang would fetch the inputs of all columns first, and have no registers for the sums. */
#pragma GCC unroll 2
        for (size_t j = 0; j < 8; j++, x += n_tokens)
            lmc_add_column(sums, columns + lmc_turned_column(i) + 16 * j, x, dtype, n_tokens, n_blocks);
    }
}

/* Half a tile of bfloat16. Two neighbours of a row are 32 bits, which are turned into columns in registers
 * and widened by a shift and a mask. */
LMC_INLINE void lmc_add_pairs(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const uint16_t *weights,
                              ptrdiff_t row_stride, const float *x, const size_t n_tokens,
                              const size_t n_blocks) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)0xFFFF0000));
    __m256 pairs[LMC_16BIT_BLOCKS][8];
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++)
        lmc_load_columns(weights + (ptrdiff_t)(8 * b) * row_stride, row_stride * (ptrdiff_t)sizeof *weights,
                         pairs[b]);
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; j++) {
#pragma GCC unroll 2
        for (size_t odd = 0; odd < 2; odd++, x += n_tokens) {
            __m256 wide[LMC_16BIT_BLOCKS];
#pragma GCC unroll 2
            for (size_t b = 0; b < n_blocks; b++) {
                __m256i bits = _mm256_castps_si256(pairs[b][j]);
                wide[b] = odd ? _mm256_and_ps(pairs[b][j], upper)
                              : _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
            }
            lmc_add_weights(sums, wide, x, n_tokens, n_blocks);
        }
    }
}

/* 8 * n_blocks rows for n_tokens tokens over n_k weights from column k on, whose inputs are x[k * n_tokens +
 * t]. dtype, n_tokens and n_blocks are constants at every call. */
LMC_INLINE void lmc_short_rows(const lmc_product_t *p, size_t row, size_t k, size_t n_k, const float *x,
                               const lmc_dtype_t dtype, const size_t n_tokens, const size_t n_blocks) {
    _Alignas(32) uint16_t columns[LMC_16BIT_BLOCKS * LMC_TILE_WEIGHTS];
    ptrdiff_t stride = p->row_stride;
    const uint16_t *weights = (const uint16_t *)(const void *)lmc_weights_at(p, row, k);
    /* The rows that come next are asked for in the order in which they lie in memory, if that is their own.
     */
    int is_whole = n_k == p->n_k && stride == (ptrdiff_t)n_k;
    const char *ahead = (const char *)(weights + (ptrdiff_t)(8 * n_blocks) * stride);
    ptrdiff_t line_bytes = is_whole ? LMC_LINE_BYTES : 2 * stride;
    int resume = p->resume || k > 0, is_end = k + n_k == p->n_k;
    float *out = p->output + row * LMC_LANES;
    __m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES];
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++)
        lmc_begin_sums(sums[b], out + 8 * b * LMC_LANES, resume, n_tokens);
    size_t left = n_k;
    for (; left >= LMC_TILE_COLUMNS; left -= LMC_TILE_COLUMNS, weights += LMC_TILE_COLUMNS) {
#pragma GCC unroll 16
        for (size_t line = 0; line < 8 * n_blocks; line++)
            _mm_prefetch(ahead + (ptrdiff_t)line * line_bytes, LMC_HINT_AHEAD);
        ahead += is_whole ? 8 * n_blocks * LMC_LINE_BYTES : LMC_LINE_BYTES;
        if (dtype == LMC_BFLOAT16) {
            lmc_add_pairs(sums, weights, stride, x, n_tokens, n_blocks);
            lmc_add_pairs(sums, weights + 16, stride, x + 16 * n_tokens, n_tokens, n_blocks);
        } else {
            lmc_add_tile(sums, weights, stride, columns, x, dtype, n_tokens, n_blocks);
        }
        x += LMC_TILE_COLUMNS * n_tokens;
    }
    for (; left > 0; left--, weights++, x += n_tokens) {
        for (size_t r = 0; r < 8 * n_blocks; r++)
            columns[r / 8 * LMC_TILE_WEIGHTS + r % 8] = weights[(ptrdiff_t)r * stride];
        lmc_add_column(sums, columns, x, dtype, n_tokens, n_blocks);
    }
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++) {
        const float *bias = is_end && p->bias != NULL ? p->bias + row + 8 * b : NULL;
        lmc_end_sums(sums[b], out + 8 * b * LMC_LANES, bias, n_tokens);
    }
}

LMC_INLINE void lmc_short_product(const lmc_product_t *p, const lmc_dtype_t dtype, const size_t n_tokens) {
    const size_t n_blocks = n_tokens <= 4 ? 2 : 1, n_packed = LMC_PACKED_FLOATS / n_tokens;
    float x[LMC_PACKED_FLOATS];
    size_t row = 0;
    for (size_t k = 0; k == 0 || k < p->n_k; k += n_packed) {
        size_t left = p->n_k - k, n_k = left < n_packed ? left : n_packed;
        lmc_pack_inputs(p->input + k * LMC_LANES, n_k, x, n_tokens);
        row = 0;
        for (; row + 8 * n_blocks <= p->n_rows; row += 8 * n_blocks)
            lmc_short_rows(p, row, k, n_k, x, dtype, n_tokens, n_blocks);
        for (; n_blocks > 1 && row + 8 <= p->n_rows; row += 8)
            lmc_short_rows(p, row, k, n_k, x, dtype, n_tokens, 1);
    }
    for (; row < p->n_rows; row++)
        lmc_row_of_few(p, row, dtype, n_tokens);
}

LMC_INLINE void lmc_short_product_of(const lmc_product_t *p, const lmc_dtype_t dtype) {
    if (p->n_lanes == 1)
        lmc_short_product(p, dtype, 1);
    else if (p->n_lanes == 2)
        lmc_short_product(p, dtype, 2);
    else if (p->n_lanes <= 4)
        lmc_short_product(p, dtype, 4);
    else
        lmc_short_product(p, dtype, 8);
}

/* Returns 0, having done nothing, where the tokens are too many: more than 4, or 8 with 16-bit weights. */
static int lmc_product_few_run(const lmc_product_t *p) {
    size_t most = p->dtype == LMC_FLOAT32 ? 4 : LMC_16BIT_LANES;
    if (p->n_panels != 1 || p->k_stride != 1 || p->n_lanes > most) return 0;
    if (p->dtype == LMC_FLOAT16)
        lmc_short_product_of(p, LMC_FLOAT16);
    else if (p->dtype == LMC_BFLOAT16)
        lmc_short_product_of(p, LMC_BFLOAT16);
    else if (p->n_lanes == 1)
        lmc_product_of_few(p, 1);
    else if (p->n_lanes == 2)
        lmc_product_of_few(p, 2);
    else
        lmc_product_of_few(p, 4);
    return 1;
}

#endif

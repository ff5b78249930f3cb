/* The matrix product of 16-bit weights for at most eight tokens, for AVX2 and for AVX-512, which has more
 * registers. The vectors run over 8 rows, whose weights are turned into columns while they are 16 bits wide:
 * half the instructions that it takes after widening.
 *
 * float16: a tile is turned while the one before is multiplied, so that the processor has both kinds of work
 * at hand; each column is widened where it is used. bfloat16: two neighbours are turned as one number of 32
 * bits, in registers where a product does it on its way, and a shift and a mask widen them. */
#ifndef LLMCOMP_CORE_TRANSFORMER_PRODUCT_16BIT_AVX2_H
#define LLMCOMP_CORE_TRANSFORMER_PRODUCT_16BIT_AVX2_H

#include "core/transformer/product_few_tokens_avx2.h"

/* Columns of a tile: a line of each row, so that no line is needed again when others have pushed it out. A
 * tile is turned in halves. */
#define LMC_TILE_COLUMNS 32
#define LMC_HALF_WEIGHTS (8 * LMC_TILE_COLUMNS / 2)
#define LMC_TILE_WEIGHTS (2 * LMC_HALF_WEIGHTS)
/* So far ahead are turned weights asked for. */
#define LMC_TURNED_AHEAD_BYTES 8192
/* Blocks of 8 rows side by side, so that the chains of one hide the latency of the other's and a token's
 * value is loaded once for both; AVX2 has no registers for the sums of 16 rows and more than four tokens. */
#define LMC_16BIT_BLOCKS 2
#if defined(__AVX512VL__)
#define LMC_BLOCKS_OF(N_TOKENS) LMC_16BIT_BLOCKS
#else
#define LMC_BLOCKS_OF(N_TOKENS) ((N_TOKENS) <= 4 ? LMC_16BIT_BLOCKS : 1)
#endif
#define LMC_16BIT_LANES 8
/* clang would fetch the inputs of more columns first, and have no registers for the sums. */
#if defined(__clang__)
#define LMC_UNROLLED_COLUMNS _Pragma("GCC unroll 4")
#else
#define LMC_UNROLLED_COLUMNS _Pragma("GCC unroll 8")
#endif
#define LMC_FOR_QUARTER_COLUMNS(j) LMC_UNROLLED_COLUMNS for (size_t j = 0; j < LMC_TILE_COLUMNS / 4; j++)
#define LMC_TURN_RUN lmc_turn_run

/* 16 columns of 8 rows: k beside k + 8. */
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

LMC_INLINE void lmc_turn_half(const uint16_t *weights, ptrdiff_t row_stride, uint16_t *half,
                              const lmc_dtype_t dtype) {
    if (dtype == LMC_FLOAT16) {
        lmc_turn_columns(weights, row_stride, half);
        return;
    }
    __m256 pairs[8];
    lmc_load_columns(weights, row_stride * (ptrdiff_t)sizeof *weights, pairs);
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; j++)
        _mm256_store_ps((float *)(void *)(half + 16 * j), pairs[j]);
}

/* The first or the second bfloat16 of each 32 bits. */
LMC_INLINE __m256 lmc_widen_pair(__m256i pair, const size_t odd) {
    return _mm256_castsi256_ps(odd ? _mm256_and_si256(pair, _mm256_set1_epi32((int32_t)0xFFFF0000))
                                   : _mm256_slli_epi32(pair, 16));
}

/* Column k of a turned half, k < 16. */
LMC_INLINE __m256 lmc_widen_column(const uint16_t *half, size_t k, const lmc_dtype_t dtype) {
    if (dtype == LMC_FLOAT16)
        return _mm256_cvtph_ps(
            _mm_load_si128((const __m128i *)(const void *)(half + k % 8 * 16 + k / 8 * 8)));
    return lmc_widen_pair(_mm256_load_si256((const __m256i *)(const void *)(half + k / 2 * 16)), k % 2);
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

/* The same for column k of turned halves. */
LMC_INLINE void lmc_add_column(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const uint16_t *half, size_t k,
                               const float *x, const lmc_dtype_t dtype, const size_t n_tokens,
                               const size_t n_blocks) {
    __m256 weights[LMC_16BIT_BLOCKS];
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++)
        weights[b] = lmc_widen_column(half + b * LMC_TILE_WEIGHTS, k, dtype);
    lmc_add_weights(sums, weights, x, n_tokens, n_blocks);
}

/* The same for half a tile of bfloat16 as it lies in memory. */
LMC_INLINE void lmc_add_pairs(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const uint16_t *weights,
                              ptrdiff_t row_stride, const float *x, const size_t n_tokens,
                              const size_t n_blocks) {
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
            for (size_t b = 0; b < n_blocks; b++)
                wide[b] = lmc_widen_pair(_mm256_castps_si256(pairs[b][j]), odd);
            lmc_add_weights(sums, wide, x, n_tokens, n_blocks);
        }
    }
}

/* The same for a quarter of a turned tile's columns, whose inputs begin at x. */
LMC_INLINE void lmc_add_quarter(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const uint16_t *tile,
                                size_t quarter, const float *x, const lmc_dtype_t dtype,
                                const size_t n_tokens, const size_t n_blocks) {
    LMC_FOR_QUARTER_COLUMNS (j)
        lmc_add_column(sums, tile + quarter / 2 * LMC_HALF_WEIGHTS, quarter % 2 * 8 + j, x + j * n_tokens,
                       dtype, n_tokens, n_blocks);
}

/* The same for the columns that make no tile. */
LMC_INLINE void lmc_add_rest(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const uint16_t *weights,
                             ptrdiff_t row_stride, size_t n_k, const float *x, const lmc_dtype_t dtype,
                             const size_t n_tokens, const size_t n_blocks) {
    _Alignas(32) uint16_t column[LMC_16BIT_BLOCKS * LMC_TILE_WEIGHTS];
    const size_t apart = dtype == LMC_BFLOAT16 ? 2 : 1;
    for (size_t k = 0; k < n_k; k++) {
        for (size_t r = 0; r < 8 * n_blocks; r++)
            column[r / 8 * LMC_TILE_WEIGHTS + r % 8 * apart] =
                weights[(ptrdiff_t)r * row_stride + (ptrdiff_t)k];
        lmc_add_column(sums, column, 0, x + k * n_tokens, dtype, n_tokens, n_blocks);
    }
}

LMC_INLINE void lmc_begin_blocks(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const float *out, int resume,
                                 const size_t n_tokens, const size_t n_blocks) {
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++)
        lmc_begin_sums(sums[b], out + 8 * b * LMC_LANES, resume, n_tokens);
}

LMC_INLINE void lmc_end_blocks(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], float *out, const float *bias,
                               const size_t n_tokens, const size_t n_blocks) {
#pragma GCC unroll 2
    for (size_t b = 0; b < n_blocks; b++)
        lmc_end_sums(sums[b], out + 8 * b * LMC_LANES, bias == NULL ? NULL : bias + 8 * b, n_tokens);
}

/* The bias of a row, where the columns up to `end` are the last ones. */
static inline const float *lmc_bias_from(const lmc_product_t *p, size_t row, size_t end) {
    return end == p->n_k && p->bias != NULL ? p->bias + row : NULL;
}

/* Halves `first` to `end` of a tile are turned: half h of block b is number 2b + h. */
LMC_INLINE void lmc_turn_halves(const uint16_t *weights, ptrdiff_t row_stride, uint16_t *tile, size_t first,
                                size_t end, const lmc_dtype_t dtype) {
#pragma GCC unroll 4
    for (size_t i = first; i < end; i++)
        lmc_turn_half(weights + (ptrdiff_t)(i / 2 * 8) * row_stride + i % 2 * (LMC_TILE_COLUMNS / 2),
                      row_stride, tile + i * LMC_HALF_WEIGHTS, dtype);
}

/* A turned tile of float16 is multiplied, and the next one turned between its quarters. */
LMC_INLINE void lmc_add_and_turn(__m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES], const uint16_t *tile,
                                 const float *x, const uint16_t *next, ptrdiff_t row_stride,
                                 uint16_t *next_tile, const size_t n_tokens, const size_t n_blocks) {
#pragma GCC unroll 4
    for (size_t part = 0; part < 4; part++, x += LMC_TILE_COLUMNS / 4 * n_tokens) {
        lmc_turn_halves(next, row_stride, next_tile, part * n_blocks / 2, (part + 1) * n_blocks / 2,
                        LMC_FLOAT16);
        lmc_add_quarter(sums, tile, part, x, LMC_FLOAT16, n_tokens, n_blocks);
    }
}

/* All whole groups of 8 * n_blocks rows from `row` on, for n_tokens tokens, over n_k weights from column k
 * on, whose inputs are x[k * n_tokens + t]; returns the row after them. dtype, n_tokens and n_blocks are
 * constants at every call. */
LMC_INLINE size_t lmc_short_rows(const lmc_product_t *p, size_t row, size_t k, size_t n_k, const float *x,
                                 const lmc_dtype_t dtype, const size_t n_tokens, const size_t n_blocks) {
    _Alignas(32) uint16_t tiles[2][LMC_16BIT_BLOCKS * LMC_TILE_WEIGHTS];
    const size_t n_rows = 8 * n_blocks;
    size_t n_tiles = n_k / LMC_TILE_COLUMNS, rest = n_k % LMC_TILE_COLUMNS, turned = 0;
    ptrdiff_t stride = p->row_stride;
    const uint16_t *group = (const uint16_t *)(const void *)lmc_weights_at(p, row, k);
    /* The rows that come next are asked for in the order in which they lie in memory, if that is their own.
     */
    int is_whole = n_k == p->n_k && stride == (ptrdiff_t)n_k;
    ptrdiff_t line_bytes = is_whole ? LMC_LINE_BYTES : 2 * stride;
    if (dtype == LMC_FLOAT16 && n_tiles > 0 && row + n_rows <= p->n_rows)
        lmc_turn_halves(group, stride, tiles[0], 0, 2 * n_blocks, dtype);
    for (; row + n_rows <= p->n_rows; row += n_rows) {
        const uint16_t *weights = group, *next_group = group + (ptrdiff_t)n_rows * stride;
        const char *ahead = (const char *)next_group;
        float *out = p->output + row * LMC_LANES;
        __m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES];
        lmc_begin_blocks(sums, out, p->resume || k > 0, n_tokens, n_blocks);
        for (size_t i = 0; i < n_tiles; i++, turned ^= 1, weights += LMC_TILE_COLUMNS) {
            /* What is turned meanwhile; after the last tile of all it is this one again, for nothing. */
            const uint16_t *next = i + 1 < n_tiles                 ? weights + LMC_TILE_COLUMNS
                                   : row + 2 * n_rows <= p->n_rows ? next_group
                                                                   : weights;
#pragma GCC unroll 16
            for (size_t line = 0; line < n_rows; line++)
                _mm_prefetch(ahead + (ptrdiff_t)line * line_bytes, LMC_HINT_AHEAD);
            ahead += is_whole ? (ptrdiff_t)n_rows * LMC_LINE_BYTES : LMC_LINE_BYTES;
            const float *at = x + i * LMC_TILE_COLUMNS * n_tokens;
            if (dtype == LMC_BFLOAT16) {
                lmc_add_pairs(sums, weights, stride, at, n_tokens, n_blocks);
                lmc_add_pairs(sums, weights + 16, stride, at + 16 * n_tokens, n_tokens, n_blocks);
            } else {
                lmc_add_and_turn(sums, tiles[turned], at, next, stride, tiles[turned ^ 1], n_tokens,
                                 n_blocks);
            }
        }
        lmc_add_rest(sums, weights, stride, rest, x + (n_k - rest) * n_tokens, dtype, n_tokens, n_blocks);
        lmc_end_blocks(sums, out, lmc_bias_from(p, row, k + n_k), n_tokens, n_blocks);
        group = next_group;
    }
    return row;
}

/* Turned matrices: of each LMC_TURNED_ROWS rows, tile by tile, both blocks. */
static void lmc_turn_run(const void *weights, lmc_dtype_t dtype, size_t n_rows, size_t n_k, void *turned) {
    uint16_t *out = (uint16_t *)turned;
    for (size_t row = 0; row < n_rows; row += LMC_TURNED_ROWS) {
        for (size_t k = 0; k < n_k; k += LMC_TURNED_COLUMNS, out += LMC_16BIT_BLOCKS * LMC_TILE_WEIGHTS) {
            const uint16_t *from = (const uint16_t *)weights + row * n_k + k;
            lmc_turn_halves(from, (ptrdiff_t)n_k, out, 0, 2 * LMC_16BIT_BLOCKS, dtype);
        }
    }
}

/* All rows of a turned matrix, over n_k weights from column k on, a multiple of LMC_TURNED_COLUMNS. */
LMC_INLINE void lmc_turned_rows(const lmc_product_t *p, size_t k, size_t n_k, const float *inputs,
                                const lmc_dtype_t dtype, const size_t n_tokens, const size_t n_blocks) {
    for (size_t row = 0; row < p->n_rows; row += 8 * n_blocks) {
        const uint16_t *tile = (const uint16_t *)p->weights +
                               row / LMC_TURNED_ROWS * LMC_TURNED_ROWS * p->n_k + k * LMC_TURNED_ROWS +
                               row % LMC_TURNED_ROWS / 8 * LMC_TILE_WEIGHTS;
        const float *x = inputs;
        float *out = p->output + row * LMC_LANES;
        __m256 sums[LMC_16BIT_BLOCKS][LMC_16BIT_LANES];
        lmc_begin_blocks(sums, out, p->resume || k > 0, n_tokens, n_blocks);
        for (size_t left = n_k; left > 0; left -= LMC_TURNED_COLUMNS) {
#pragma GCC unroll 16
            for (size_t line = 0; line < 8 * n_blocks; line++)
                _mm_prefetch((const char *)tile + LMC_TURNED_AHEAD_BYTES + line * LMC_LINE_BYTES,
                             LMC_HINT_AHEAD);
#pragma GCC unroll 4
            for (size_t part = 0; part < 4; part++, x += LMC_TILE_COLUMNS / 4 * n_tokens)
                lmc_add_quarter(sums, tile, part, x, dtype, n_tokens, n_blocks);
            tile += LMC_16BIT_BLOCKS * LMC_TILE_WEIGHTS;
        }
        lmc_end_blocks(sums, out, lmc_bias_from(p, row, k + n_k), n_tokens, n_blocks);
    }
}

LMC_INLINE void lmc_short_product(const lmc_product_t *p, const lmc_dtype_t dtype, const size_t n_tokens) {
    const size_t n_blocks = LMC_BLOCKS_OF(n_tokens), n_packed = LMC_PACKED_FLOATS / n_tokens;
    /* A block's pairs of bfloat16 take eight registers of their own. */
    const size_t n_unturned = dtype == LMC_BFLOAT16 && n_tokens > 4 ? 1 : n_blocks;
    float x[LMC_PACKED_FLOATS];
    size_t row = 0;
    for (size_t k = 0; k == 0 || k < p->n_k; k += n_packed) {
        size_t left = p->n_k - k, n_k = left < n_packed ? left : n_packed;
        lmc_pack_inputs(p->input + k * LMC_LANES, n_k, x, n_tokens);
        if (p->is_turned) {
            lmc_turned_rows(p, k, n_k, x, dtype, n_tokens, n_blocks);
            row = p->n_rows;
            continue;
        }
        row = lmc_short_rows(p, 0, k, n_k, x, dtype, n_tokens, n_unturned);
        if (n_unturned > 1) row = lmc_short_rows(p, row, k, n_k, x, dtype, n_tokens, 1);
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

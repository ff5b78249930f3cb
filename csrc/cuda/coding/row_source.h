/* Where a kernel finds its rows of logits and their tokens: coding.h's description of them, made ready by the
 * launcher. */
#ifndef LLMCOMP_CUDA_CODING_ROW_SOURCE_H
#define LLMCOMP_CUDA_CODING_ROW_SOURCE_H

#include "cuda/coding/coding.h"
#include "cuda/coding/row_tiles.h"

/* Rows and tokens as a kernel gets them: what lies before the first load must not divide. */
struct row_source_t {
    const unsigned char *data;
    int64_t outer_stride_bytes, inner_stride_bytes;
    lmc_divisor_t n_inner;
};

struct row_array_t {
    row_source_t source;
    uint32_t vocab_size;
};

struct token_array_t {
    row_source_t source;
    uint32_t element_bytes;
};

static __device__ __forceinline__ const unsigned char *row_address(const row_source_t &source, uint32_t row) {
    uint32_t outer = lmc_divide(row, source.n_inner), inner = row - outer * source.n_inner.divisor;
    return source.data + (int64_t)outer * source.outer_stride_bytes +
           (int64_t)inner * source.inner_stride_bytes;
}

static __device__ __forceinline__ uint32_t token_of_row(const token_array_t &tokens, uint32_t vocab_size,
                                                        uint32_t row) {
    const unsigned char *address = row_address(tokens.source, row);
    int64_t token = tokens.element_bytes == 8 ? *(const int64_t *)address : *(const int32_t *)address;
    return token >= 0 && token < (int64_t)vocab_size ? (uint32_t)token : LMC_TOKEN_INVALID;
}

static inline row_source_t source_of(const void *data, int64_t outer, int64_t inner, uint32_t n_inner) {
    return row_source_t{(const unsigned char *)data, outer, inner, lmc_divisor_of(n_inner)};
}

static inline row_array_t array_of(const lmc_cuda_rows_t &rows) {
    return row_array_t{source_of(rows.data, rows.outer_stride_bytes, rows.inner_stride_bytes, rows.n_inner),
                       rows.vocab_size};
}

static inline token_array_t array_of(const lmc_cuda_tokens_t &tokens, const lmc_cuda_rows_t &rows) {
    return token_array_t{
        source_of(tokens.data, tokens.outer_stride_bytes, tokens.inner_stride_bytes, rows.n_inner),
        tokens.element_bytes};
}

#endif

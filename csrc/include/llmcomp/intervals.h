/* Rows of logits to integer intervals, back from a value to its token, and to the softmax of a token.
 * FORMAT.md, sections 2 and 6, has the contract. */
#ifndef LLMCOMP_INTERVALS_H
#define LLMCOMP_INTERVALS_H

#include <stddef.h>
#include <stdint.h>

#include "llmcomp/backend.h"
#include "llmcomp/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LMC_WEIGHT_BITS 29
#define LMC_VOCAB_SIZE_MAX ((size_t)1 << 21)
/* 2^21 weights of at most 2^29 + 1 each. */
#define LMC_TOTAL_MAX ((uint64_t)1 << 51)

typedef enum lmc_dtype { LMC_FLOAT32 = 0, LMC_FLOAT16 = 1, LMC_BFLOAT16 = 2 } lmc_dtype_t;
#define LMC_DTYPE_COUNT 3

/* Rows of logits where they lie: row i starts at data + i * row_stride_bytes and its first vocab_size
 * elements, one after the other, are the symbols. A row need not be aligned. */
typedef struct lmc_rows {
    const void *data;
    ptrdiff_t row_stride_bytes;
    size_t n_rows;
    size_t vocab_size;
    lmc_dtype_t dtype;
} lmc_rows_t;

/* start[i], freq[i], total[i] of tokens[i] in row i; all 0 where active[i] is 0 (active may be NULL: all
 * are). On an error, *error_row is the first row that has one. */
lmc_status_t lmc_intervals(const lmc_context_t *context, const lmc_rows_t *rows, const int64_t *tokens,
                           const unsigned char *active, uint64_t *start, uint64_t *freq, uint64_t *total,
                           size_t *error_row);

/* log2 of the softmax at tokens[i] of row i, at most 0, -inf for a logit of -inf: for scores, nothing is
 * coded by it. Errors as lmc_intervals. */
lmc_status_t lmc_log2_softmax(const lmc_context_t *context, const lmc_rows_t *rows, const int64_t *tokens,
                              double *log2_probabilities, size_t *error_row);

/* One row of a distribution that a decoder can search. Sums of blocks of LMC_SEARCH_BLOCK weights. */
#define LMC_SEARCH_BLOCK 1024
#define LMC_SEARCH_BLOCKS_MAX (LMC_VOCAB_SIZE_MAX / LMC_SEARCH_BLOCK)
typedef struct lmc_search {
    float maximum;
    uint64_t total;
    uint64_t block_sums[LMC_SEARCH_BLOCKS_MAX];
} lmc_search_t;

/* Fills search for one row; then lmc_search_find gives the token whose interval holds value < total. */
lmc_status_t lmc_search_row(const lmc_backend_t *backend, const void *row, lmc_dtype_t dtype,
                            size_t vocab_size, lmc_search_t *search);
size_t lmc_search_find(const lmc_backend_t *backend, const void *row, lmc_dtype_t dtype, size_t vocab_size,
                       const lmc_search_t *search, uint64_t value, uint64_t *start, uint64_t *freq);

/* Weights that are added to those of a few tokens of a row; tokens ascend, each inside the row. */
typedef struct lmc_added {
    const int32_t *tokens;
    const uint64_t *weights;
    size_t n;
    uint64_t total; /* of the weights */
} lmc_added_t;

/* As lmc_search_find, value < search->total + added->total; own is the weight that the row itself gives. */
size_t lmc_search_find_added(const lmc_backend_t *backend, const void *row, lmc_dtype_t dtype,
                             size_t vocab_size, const lmc_search_t *search, const lmc_added_t *added,
                             uint64_t value, uint64_t *start, uint64_t *freq, uint64_t *own);

#ifdef __cplusplus
}
#endif

#endif

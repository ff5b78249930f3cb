/* The coder on a CUDA device: launchers for C. Raw device pointers, no framework, no hidden memory. Every
 * launcher puts its kernels on the caller's stream and returns at once with a cudaError_t as an int, 0 for
 * success; the caller has made the device of the pointers current. Integers are those of intervals.h and
 * coder.h, bit for bit. */
#ifndef LLMCOMP_CUDA_CODING_CODING_H
#define LLMCOMP_CUDA_CODING_CODING_H

#include <stddef.h>
#include <stdint.h>

#include "llmcomp/intervals.h"
#include "llmcomp/coder.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *lmc_cuda_stream_t; /* a cudaStream_t, without its header */

/* Row i starts at data + i / n_inner * outer_stride_bytes + i % n_inner * inner_stride_bytes, a multiple of
 * the size of an element; its first vocab_size elements, one after the other, are the symbols. */
typedef struct lmc_cuda_rows {
    const void *data;
    int64_t outer_stride_bytes, inner_stride_bytes;
    uint32_t n_rows, n_inner; /* n_inner >= 1 */
    uint32_t vocab_size;
    lmc_dtype_t dtype;
} lmc_cuda_rows_t;

/* The token of row i, by the n_inner of the rows. */
typedef struct lmc_cuda_tokens {
    const void *data;
    int64_t outer_stride_bytes, inner_stride_bytes;
    uint32_t element_bytes; /* 4: int32, 8: int64 */
} lmc_cuda_tokens_t;

/* The first error of all launches since lmc_cuda_error_clear: row * 256 + lmc_status_t, LMC_CUDA_NO_ERROR if
 * none. */
#define LMC_CUDA_NO_ERROR UINT64_MAX
int lmc_cuda_error_clear(uint64_t *error, lmc_cuda_stream_t stream);

/* lmc_intervals. A row with an error gets three zeros and its number in *error. active may be NULL. */
int lmc_cuda_intervals(const lmc_cuda_rows_t *rows, const lmc_cuda_tokens_t *tokens, const uint8_t *active,
                       uint64_t *start, uint64_t *freq, uint64_t *total, uint64_t *error,
                       lmc_cuda_stream_t stream);
/* log2 of the softmax at the tokens: lmc_log2_softmax. A row with an error gets NaN, and its number plus
 * first_row in *error. */
int lmc_cuda_log2_softmax(const lmc_cuda_rows_t *rows, const lmc_cuda_tokens_t *tokens,
                          double *log2_probabilities, uint32_t first_row, uint64_t *error,
                          lmc_cuda_stream_t stream);
/* bits[i] = -log2(freq[i] / total[i]). */
int lmc_cuda_code_length(size_t n, const uint64_t *freq, const uint64_t *total, double *bits,
                         lmc_cuda_stream_t stream);

/* n encoders whose stream i writes to bytes + i * capacity_bytes. place: again after the caller moved the
 * bytes. */
int lmc_cuda_encoders_begin(lmc_encoder_t *encoders, uint32_t n, uint8_t *bytes, size_t capacity_bytes,
                            lmc_cuda_stream_t stream);
int lmc_cuda_encoders_place(lmc_encoder_t *encoders, uint32_t n, uint8_t *bytes, size_t capacity_bytes,
                            lmc_cuda_stream_t stream);
/* One symbol into every active stream. Does nothing where *error is set before: a step with a bad row codes
 * nothing, nor does any later one. LMC_ERROR_CAPACITY in *error where a stream is full. */
int lmc_cuda_encoders_put(lmc_encoder_t *encoders, uint32_t n, const uint64_t *start, const uint64_t *freq,
                          const uint64_t *total, const uint8_t *active, uint64_t *error,
                          lmc_cuda_stream_t stream);
int lmc_cuda_encoders_end(lmc_encoder_t *encoders, uint32_t n, lmc_cuda_stream_t stream);

/* n decoders whose stream i reads payloads[offsets[i]] ... payloads[offsets[i + 1] - 1]. */
int lmc_cuda_decoders_begin(lmc_decoder_t *decoders, uint32_t n, const uint8_t *payloads,
                            const uint64_t *offsets, lmc_cuda_stream_t stream);
/* lmc_decode_step: one token of every active stream, -1 where it is not active, -2 where its row has an
 * error. */
int lmc_cuda_decode_step(const lmc_cuda_rows_t *rows, const uint8_t *active, lmc_decoder_t *decoders,
                         int32_t *tokens, uint64_t *error, lmc_cuda_stream_t stream);
/* lmc_decode_stream: one launch a row. After a row with an error tokens mean nothing. */
int lmc_cuda_decode_stream(const lmc_cuda_rows_t *rows, lmc_decoder_t *decoder, int32_t *tokens,
                           uint64_t *error, lmc_cuda_stream_t stream);

#ifdef __cplusplus
}
#endif

#endif

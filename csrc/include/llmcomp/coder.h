/* Integer intervals to payload bytes and back: a batch of independent range-coder streams.
 * core/range_coder.h explains the arithmetic. */
#ifndef LLMCOMP_CODER_H
#define LLMCOMP_CODER_H

#include <stddef.h>
#include <stdint.h>

#include "llmcomp/backend.h"
#include "llmcomp/intervals.h"
#include "llmcomp/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes that one symbol, or the end of a stream, adds at the most. */
#define LMC_STEP_BYTES_MAX 8

typedef struct lmc_encoder {
    uint64_t low;
    uint64_t range;
    uint8_t *bytes; /* the caller's, and his to move to a larger place between calls */
    size_t n_bytes;
    size_t capacity_bytes;
} lmc_encoder_t;

typedef struct lmc_decoder {
    uint64_t code;
    uint64_t range;
    const uint8_t *bytes; /* the caller's; must stay while the decoder is used */
    size_t n_bytes;
    size_t position;
} lmc_decoder_t;

void lmc_encoder_init(lmc_encoder_t *encoder, uint8_t *bytes, size_t capacity_bytes);
/* n symbols into one stream. LMC_ERROR_CAPACITY unless n * LMC_STEP_BYTES_MAX bytes are free,
 * LMC_ERROR_INTERVAL with *error_index; nothing is coded then. */
lmc_status_t lmc_encoder_put(lmc_encoder_t *encoder, size_t n, const uint64_t *start, const uint64_t *freq,
                             const uint64_t *total, size_t *error_index);
/* Ends the stream; afterwards its first n_bytes bytes are the payload, the fewest that decode. */
lmc_status_t lmc_encoder_end(lmc_encoder_t *encoder);

void lmc_decoder_init(lmc_decoder_t *decoder, const uint8_t *bytes, size_t n_bytes);
/* The value whose interval the caller looks up, then the interval that he found. */
lmc_status_t lmc_decoder_value(const lmc_decoder_t *decoder, uint64_t total, uint64_t *value);
lmc_status_t lmc_decoder_take(lmc_decoder_t *decoder, uint64_t start, uint64_t freq, uint64_t total);

/* One token of every active stream: rows->n_rows streams, row i for decoders[i]. active may be NULL (all).
 * tokens[i] is -1 where the stream is not active. On an error, *error_row is the first row that has one and
 * its stream, as every stream of a row with an error, is where it was. searches: one a slot of the executor.
 */
lmc_status_t lmc_decode_step(const lmc_context_t *context, const lmc_rows_t *rows,
                             const unsigned char *active, lmc_decoder_t *decoders, lmc_search_t *searches,
                             int32_t *tokens, size_t *error_row);

/* The tokens of one stream, one a row. On an error, *error_row is its row; the tokens before it are valid. */
lmc_status_t lmc_decode_stream(const lmc_context_t *context, const lmc_rows_t *rows, lmc_decoder_t *decoder,
                               lmc_search_t *search, int32_t *tokens, size_t *error_row);

#ifdef __cplusplus
}
#endif

#endif

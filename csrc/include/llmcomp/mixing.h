/* Rows of a model mixed with what a stream's own tokens teach, in integers: FORMAT.md, section 7. */
#ifndef LLMCOMP_MIXING_H
#define LLMCOMP_MIXING_H

#include <stddef.h>
#include <stdint.h>

#include "llmcomp/backend.h"
#include "llmcomp/coder.h"
#include "llmcomp/intervals.h"
#include "llmcomp/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LMC_MIXING_VERSION 1
/* The totals of a model's rows, and the largest weight, that leave room for what is added. */
#define LMC_MIXING_TOTAL_MAX ((LMC_TOTAL_MAX >> 3) * 5)
#define LMC_MIXING_FREQ_MAX ((uint64_t)1 << 30)
#define LMC_MIXING_TOKENS_MAX ((size_t)1 << 28)

/* What one stream has taught so far. It lies at the beginning of the memory that the caller gives. */
typedef struct lmc_mixer lmc_mixer_t;

/* Bytes of memory for a stream of at most n_tokens_max tokens; 0 above LMC_MIXING_TOKENS_MAX. */
size_t lmc_mixer_bound(size_t n_tokens_max);
/* The mixer of a stream that has no tokens yet; memory is aligned to 8 bytes and stays the mixer's. */
lmc_status_t lmc_mixer_begin(void *memory, size_t memory_bytes, size_t n_tokens_max, lmc_mixer_t **mixer);

/* The next n tokens of a stream to be encoded: the model's intervals, those of lmc_intervals, become the
 * mixed ones in place. LMC_ERROR_TOKEN or LMC_ERROR_INTERVAL with *error_index, the mixer then being of no
 * more use, or LMC_ERROR_CAPACITY, when nothing has changed. */
lmc_status_t lmc_mixer_encode(lmc_mixer_t *mixer, size_t n, const int64_t *tokens, uint64_t *start,
                              uint64_t *freq, uint64_t *total, size_t *error_index);

/* Asks memory for what the next row will need; nothing changes but the time. */
void lmc_mixer_seek(lmc_mixer_t *mixer);
/* What is added to the next row of a model whose weights sum to total, for a reader of the row such as
 * lmc_search_find_added; valid until the mixer takes a token. */
lmc_status_t lmc_mixer_predict(lmc_mixer_t *mixer, uint64_t total, lmc_added_t *added);
/* The token that came after lmc_mixer_predict, and its weight without what was added. */
lmc_status_t lmc_mixer_take(lmc_mixer_t *mixer, int64_t token, uint64_t freq);

/* lmc_decode_step for streams with mixers, mixers[i] that of row i. */
lmc_status_t lmc_mixed_decode_step(const lmc_context_t *context, const lmc_rows_t *rows,
                                   const unsigned char *active, lmc_decoder_t *decoders,
                                   lmc_mixer_t *const *mixers, lmc_search_t *searches, int32_t *tokens,
                                   size_t *error_row);

#ifdef __cplusplus
}
#endif

#endif

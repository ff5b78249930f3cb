/* Payloads to tokens by the exact engine: steps and decoders in turn, many at a call. */
#ifndef LLMCOMP_DECODING_H
#define LLMCOMP_DECODING_H

#include "llmcomp/coder.h"
#include "llmcomp/mixing.h"
#include "llmcomp/transformer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Arrays of n_streams, those of the cache. */
typedef struct lmc_transformer_chain {
    lmc_decoder_t *decoders;
    lmc_mixer_t *const *mixers; /* NULL: the rows are the model's alone */
    size_t vocab_size;          /* symbols that get probability */
    const uint8_t *active;      /* NULL: all */
    int64_t *tokens;        /* what the next step reads: given for the first, then what the last one found */
    float *logits;          /* [n_streams][n_logits], scratch */
    lmc_search_t *searches; /* scratch, one a slot of the executor */
} lmc_transformer_chain_t;

/* Bytes of workspace of lmc_transformer_decode, for an executor of n_slots. */
size_t lmc_transformer_decode_bound(const lmc_transformer_config_t *config, size_t n_streams, size_t n_slots);

/* n_steps times: one token into every active stream, and the next one out of its decoder, int32
 * [n_steps][n_streams] in found, -1 where not active. Errors are those of lmc_transformer_step and
 * lmc_decode_step or lmc_mixed_decode_step, *error_row the stream; the chain is of no use after one. */
lmc_status_t lmc_transformer_decode(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                    lmc_transformer_cache_t *cache, const lmc_transformer_chain_t *chain,
                                    size_t n_steps, int32_t *found, void *workspace, size_t workspace_bytes,
                                    size_t *error_row);

#ifdef __cplusplus
}
#endif

#endif

/* A chain of steps: the model's and the coder's in turn. The arithmetic of both is elsewhere. */
#include "llmcomp/decoding.h"

lmc_status_t lmc_transformer_decode(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                    lmc_transformer_cache_t *cache, const lmc_transformer_chain_t *chain,
                                    size_t n_steps, int32_t *found, void *workspace, size_t workspace_bytes,
                                    size_t *error_row) {
    lmc_rows_t rows = {.data = chain->logits,
                       .row_stride_bytes = (ptrdiff_t)(model->config.n_logits * sizeof(float)),
                       .n_rows = cache->n_streams,
                       .vocab_size = chain->vocab_size,
                       .dtype = LMC_FLOAT32};
    if (chain->vocab_size > model->config.n_logits) return LMC_ERROR_VOCAB_SIZE;
    for (size_t i = 0; i < n_steps; i++, found += cache->n_streams) {
        lmc_status_t status = lmc_transformer_step(context, model, cache, chain->tokens, chain->active,
                                                   chain->logits, workspace, workspace_bytes, error_row);
        if (status == LMC_OK && chain->mixers != NULL)
            status = lmc_mixed_decode_step(context, &rows, chain->active, chain->decoders, chain->mixers,
                                           chain->searches, found, error_row);
        else if (status == LMC_OK)
            status = lmc_decode_step(context, &rows, chain->active, chain->decoders, chain->searches, found,
                                     error_row);
        if (status != LMC_OK) return status;
        for (size_t s = 0; s < cache->n_streams; s++)
            chain->tokens[s] = found[s];
    }
    return LMC_OK;
}

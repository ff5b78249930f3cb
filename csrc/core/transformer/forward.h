/* The layers, between transformer.c (checks, memory, who runs what) and forward.c. Not for users of the
 * library. */
#ifndef LLMCOMP_CORE_TRANSFORMER_FORWARD_H
#define LLMCOMP_CORE_TRANSFORMER_FORWARD_H

#include "core/transformer/group.h"

void lmc_group_embed(const lmc_group_t *group);
/* Norm, queries, keys and values of a layer; then, when every panel of the stream has got so far, the rest.
 */
void lmc_group_project(const lmc_group_t *group, size_t layer);
void lmc_group_finish(const lmc_group_t *group, size_t layer);
/* Final norm, head, and what the sink wants. */
void lmc_group_head(const lmc_group_t *group);

/* Whether streams are spread over threads, each by itself, not the rows of a matrix (transformer.c). */
int lmc_is_small(const lmc_transformer_config_t *config);
/* Of streams from `first` on, before `end`; `active` NULL: all. */
size_t lmc_count_active(const uint8_t *active, size_t first, size_t end);
/* What lmc_transformer_step refuses, before anything is done. */
lmc_status_t lmc_check_step(const lmc_transformer_config_t *config, const lmc_transformer_cache_t *cache,
                            const int64_t *tokens, const uint8_t *active, size_t *error_row);
/* lmc_transformer_step of the streams from `first` on, before `end`, alone; arrays are those of all. */
lmc_status_t lmc_step_streams(const lmc_context_t *context, const lmc_transformer_model_t *model,
                              lmc_transformer_cache_t *cache, size_t first, size_t end, const int64_t *tokens,
                              const uint8_t *active, float *logits, void *workspace, size_t workspace_bytes,
                              size_t *error_row);

#endif

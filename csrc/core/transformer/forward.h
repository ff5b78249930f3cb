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

#endif

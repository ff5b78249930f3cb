/* A small model whose 16-bit matrices lie as the kernels for few tokens want them. */
#ifndef LLMCOMP_CORE_TRANSFORMER_TURNED_WEIGHTS_H
#define LLMCOMP_CORE_TRANSFORMER_TURNED_WEIGHTS_H

#include "core/transformer/group.h"

/* Bytes of memory that lmc_turn_weights takes; 0 for a model that is not worth it. */
size_t lmc_turned_weights_bound(const lmc_transformer_config_t *config);

/* A copy of model in memory, aligned to LMC_HOST_ALIGNMENT, with those matrices turned that allow it: for
 * steps of at most lanes_16bit streams alone. */
lmc_transformer_model_t lmc_turn_weights(const lmc_transformer_kernels_t *kernels,
                                         const lmc_transformer_model_t *model, void *memory);

#endif

/* Configurations for the checks of the exact engine, in C and C++: GPT-NeoX's, from which others differ by a
 * switch or two. */
#ifndef LLMCOMP_CHECK_TRANSFORMER_CASES_H
#define LLMCOMP_CHECK_TRANSFORMER_CASES_H

#include <string.h>

#include "llmcomp/transformer.h"

/* Sizes are the caller's: n_layers, hidden, intermediate, n_heads, n_embeddings, n_logits, context_length. */
static inline lmc_transformer_config_t check_neox_config(lmc_transformer_config_t sizes, size_t rotary_dims) {
    lmc_transformer_config_t config = sizes;
    config.head_dim = config.hidden / config.n_heads;
    config.n_kv_heads = config.n_heads;
    config.embedding_multiplier = config.residual_multiplier = config.logits_multiplier = 1.0f;
    config.norm_epsilon = 1e-5f;
    config.pre_norm = 1;
    config.fused_qkv = 1;
    config.attention_divisor = (double)config.head_dim;
    config.n_kinds = 1;
    config.kinds[0].rotary.dims = rotary_dims;
    config.kinds[0].rotary.base = 10000.0;
    return config;
}

#define CHECK_IS_GAIN(NAME, name) strcmp(#name + (sizeof #name > 5 ? sizeof #name - 5 : 0), "gain") == 0,
static inline int check_is_layer_gain(int slot) {
    const int gains[] = {LMC_LAYER_SLOTS(CHECK_IS_GAIN) 0};
    return gains[slot];
}

#endif

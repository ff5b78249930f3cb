/* Models for the checks of the exact engine, in C and C++: GPT-NeoX's configuration, from which others differ
 * by a switch or two, and the written cases, whose weights come from a generator and whose logits have a
 * hash. */
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

/* Sequences of a case, and its tokens a sequence at most. */
enum { CHECK_SEQUENCES = 5, CHECK_TOKENS = 37, CHECK_TOKENS_MAX = 330 };
/* Where the generator begins; weights come first, then tokens. */
#define CHECK_CASE_SEED 1

/* hash: of the logits [CHECK_SEQUENCES][n_tokens][n_logits]. */
typedef struct check_case {
    const char *name;
    lmc_transformer_config_t sizes; /* as check_neox_config wants them, and what is simply another number */
    size_t rotary_dims;
    void (*change)(lmc_transformer_config_t *config); /* NULL: GPT-NeoX */
    size_t n_tokens;
    lmc_dtype_t dtype;
    uint64_t hash;
} check_case_t;
extern const check_case_t check_cases[];
extern const size_t check_n_cases;

lmc_transformer_config_t check_case_config(const check_case_t *c);
/* layers: room for those of the config. */
lmc_transformer_weights_t check_case_weights(const check_case_t *c, uint64_t *random,
                                             const lmc_transformer_config_t *config,
                                             lmc_transformer_layer_t *layers);
void check_case_weights_free(const lmc_transformer_config_t *config,
                             const lmc_transformer_weights_t *weights);
/* FNV-1a over the bits of n numbers. */
uint64_t check_case_hash(const float *values, size_t n);
/* [CHECK_SEQUENCES][n_tokens] */
void check_case_tokens(const check_case_t *c, uint64_t *random, int64_t *tokens);

#endif

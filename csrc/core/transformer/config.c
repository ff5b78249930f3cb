/* What a configuration asks for: whether its numbers fit together, what belongs into each slot of the
 * weights, and which version of the arithmetic it needs. */
#include "core/transformer/group.h"

/* Far above any model; keeps every product of sizes below 2^63. */
#define LMC_SIZE_MAX ((size_t)1 << 24)
#define LMC_WIDTH_MAX ((size_t)1 << 17)

static int is_size(size_t n) {
    return n >= 1 && n <= LMC_SIZE_MAX;
}

static int is_within(double x, double low, double high) {
    return x >= low && x <= high;
}

static int are_sizes_right(const lmc_transformer_config_t *config) {
    int sizes = is_size(config->n_layers) && is_size(config->n_heads) && is_size(config->n_kv_heads) &&
                is_size(config->head_dim) && is_size(config->hidden) && is_size(config->intermediate) &&
                is_size(config->n_embeddings) && is_size(config->n_logits) &&
                is_size(config->context_length) && config->n_layers <= LMC_LAYERS_MAX &&
                config->hidden <= LMC_WIDTH_MAX && config->intermediate <= ((size_t)1 << 20) &&
                config->n_logits <= LMC_VOCAB_SIZE_MAX;
    if (!sizes || config->n_heads % config->n_kv_heads != 0) return 0;
    if (config->n_heads > LMC_WIDTH_MAX / config->head_dim) return 0;
    if (config->fused_qkv && config->n_kv_heads != config->n_heads) return 0;
    return !config->int8 || config->intermediate <= LMC_INT8_INPUTS_MAX;
}

static int is_rotary_right(const lmc_rotary_t *rotary, size_t head_dim) {
    if (rotary->dims % 2 != 0 || rotary->dims > head_dim) return 0;
    if (rotary->dims == 0) return 1;
    int is_right = is_within(rotary->base, 1.0, 1e30);
    if (rotary->scaling == LMC_ROTARY_PLAIN) return is_right;
    is_right &= is_within(rotary->factor, 1e-6, 1e6);
    if (rotary->scaling == LMC_ROTARY_LINEAR) return is_right;
    is_right &= is_within(rotary->original_length, 1.0, 1e12);
    if (rotary->scaling == LMC_ROTARY_LLAMA3)
        return is_right && is_within(rotary->low_factor, 1e-6, 1e6) &&
               is_within(rotary->high_factor, 1e-6, 1e6) && rotary->high_factor != rotary->low_factor;
    return is_right && rotary->scaling == LMC_ROTARY_YARN && rotary->base > 1.0 &&
           is_within(rotary->beta_fast, 1e-6, 1e6) && is_within(rotary->beta_slow, 1e-6, 1e6) &&
           (rotary->attention_factor == 0.0 || is_within(rotary->attention_factor, 1e-6, 1e6));
}

static int are_kinds_right(const lmc_transformer_config_t *config) {
    if (config->n_kinds < 1 || config->n_kinds > LMC_LAYER_KINDS_MAX) return 0;
    for (size_t i = 0; i < config->n_kinds; i++) {
        if (!is_rotary_right(&config->kinds[i].rotary, config->head_dim)) return 0;
    }
    for (size_t i = 0; i < config->n_layers; i++) {
        if (config->layer_kinds[i] >= config->n_kinds) return 0;
    }
    return 1;
}

static int is_flag(int x) {
    return x == 0 || x == 1;
}

static int are_switches_right(const lmc_transformer_config_t *config) {
    int flags = is_flag(config->learned_positions) && is_flag(config->head_bias) &&
                is_flag(config->norm_offset) && is_flag(config->pre_norm) && is_flag(config->post_norm) &&
                is_flag(config->parallel_residual) && is_flag(config->shared_norm) &&
                is_flag(config->fused_qkv) && is_flag(config->gated);
    int kinds = (unsigned)config->norm <= LMC_NORM_RMS && (unsigned)config->qk_norm <= LMC_QK_NORM_FULL &&
                (unsigned)config->activation <= LMC_ACTIVATION_XIELU;
    if (!flags || !kinds || !(config->pre_norm || config->post_norm)) return 0;
    if (config->parallel_residual && (!config->pre_norm || config->post_norm)) return 0;
    return config->parallel_residual || !config->shared_norm;
}

static int are_numbers_right(const lmc_transformer_config_t *config) {
    return is_within(config->norm_epsilon, 0.0, 1.0) && is_within(config->embedding_multiplier, 1e-6, 1e6) &&
           is_within(config->residual_multiplier, 1e-6, 1e6) &&
           is_within(config->logits_multiplier, 1e-6, 1e6) &&
           (config->logits_cap == 0.0f || is_within(config->logits_cap, 1e-3, 1e6)) &&
           (config->score_cap == 0.0f || is_within(config->score_cap, 1e-3, 1e6)) &&
           (config->qkv_clip == 0.0f || is_within(config->qkv_clip, 1e-6, 1e30)) &&
           is_within(config->attention_divisor, 1e-6, 1e9) &&
           (config->attention_multiplier == 0.0 || is_within(config->attention_multiplier, 1e-6, 1e6));
}

lmc_status_t lmc_transformer_config_check(const lmc_transformer_config_t *config) {
    return are_sizes_right(config) && are_kinds_right(config) && are_switches_right(config) &&
                   are_numbers_right(config)
               ? LMC_OK
               : LMC_ERROR_ARGUMENT;
}

int lmc_transformer_arithmetic(const lmc_transformer_config_t *config) {
    int graph = !config->learned_positions && !config->head_bias && config->embedding_multiplier == 1.0f &&
                config->residual_multiplier == 1.0f && config->logits_multiplier == 1.0f &&
                config->logits_cap == 0.0f && config->norm == LMC_NORM_LAYER && !config->norm_offset &&
                config->pre_norm && !config->post_norm && !config->shared_norm;
    int attention =
        config->n_kv_heads == config->n_heads && config->n_heads * config->head_dim == config->hidden &&
        config->qkv_clip == 0.0f && config->qk_norm == LMC_QK_NORM_NONE &&
        config->attention_divisor == (double)config->head_dim && config->attention_multiplier == 0.0 &&
        config->score_cap == 0.0f && config->n_kinds == 1 && config->kinds[0].window == 0 &&
        config->kinds[0].rotary.scaling == LMC_ROTARY_PLAIN;
    int mlp = config->activation == LMC_ACTIVATION_GELU && !config->gated;
    return graph && attention && mlp ? 1 : 2;
}

/* Slots. */

static lmc_shape_t matrix_if(int is_there, size_t n_rows, size_t n_columns) {
    return is_there ? (lmc_shape_t){n_rows, n_columns} : (lmc_shape_t){0, 0};
}

static lmc_shape_t vector_if(int is_there, size_t n) {
    return matrix_if(is_there, n, 0);
}

lmc_shape_t lmc_model_slot_shape(const lmc_transformer_config_t *config, lmc_model_slot_t slot) {
    size_t hidden = config->hidden;
    switch (slot) {
    case LMC_MODEL_EMBEDDING:
        return matrix_if(1, config->n_embeddings, hidden);
    case LMC_MODEL_POSITIONS:
        return matrix_if(config->learned_positions, config->context_length, hidden);
    case LMC_MODEL_FINAL_NORM_GAIN:
    case LMC_MODEL_FINAL_NORM_BIAS:
        return vector_if(1, hidden);
    case LMC_MODEL_HEAD:
        return matrix_if(1, config->n_logits, hidden);
    case LMC_MODEL_HEAD_BIAS:
        return vector_if(config->head_bias, config->n_logits);
    default:
        return vector_if(0, 0);
    }
}

/* Gains of the norms of so many heads. */
static lmc_shape_t qk_norm_shape(const lmc_transformer_config_t *config, size_t n_heads) {
    int is_one = config->qk_norm == LMC_QK_NORM_HEAD;
    return vector_if(config->qk_norm != LMC_QK_NORM_NONE, (is_one ? 1 : n_heads) * config->head_dim);
}

/* As long as there are slots: a table. */
lmc_shape_t lmc_layer_slot_shape(const lmc_transformer_config_t *config, lmc_layer_slot_t slot) {
    size_t hidden = config->hidden, wide = config->intermediate, head_dim = config->head_dim;
    size_t of_queries = config->n_heads * head_dim, of_keys = config->n_kv_heads * head_dim;
    int is_fused = config->fused_qkv;
    switch (slot) {
    case LMC_LAYER_ATTENTION_NORM_GAIN:
    case LMC_LAYER_ATTENTION_NORM_BIAS:
        return vector_if(config->pre_norm, hidden);
    case LMC_LAYER_QKV:
        return matrix_if(is_fused, 3 * of_queries, hidden);
    case LMC_LAYER_QKV_BIAS:
        return vector_if(is_fused, 3 * of_queries);
    case LMC_LAYER_Q:
        return matrix_if(!is_fused, of_queries, hidden);
    case LMC_LAYER_Q_BIAS:
        return vector_if(!is_fused, of_queries);
    case LMC_LAYER_K:
    case LMC_LAYER_V:
        return matrix_if(!is_fused, of_keys, hidden);
    case LMC_LAYER_K_BIAS:
    case LMC_LAYER_V_BIAS:
        return vector_if(!is_fused, of_keys);
    case LMC_LAYER_Q_NORM_GAIN:
    case LMC_LAYER_Q_NORM_BIAS:
        return qk_norm_shape(config, config->n_heads);
    case LMC_LAYER_K_NORM_GAIN:
    case LMC_LAYER_K_NORM_BIAS:
        return qk_norm_shape(config, config->n_kv_heads);
    case LMC_LAYER_OUT:
        return matrix_if(1, hidden, of_queries);
    case LMC_LAYER_OUT_BIAS:
    case LMC_LAYER_DOWN_BIAS:
        return vector_if(1, hidden);
    case LMC_LAYER_MLP_NORM_GAIN:
    case LMC_LAYER_MLP_NORM_BIAS:
        return vector_if(config->pre_norm && !config->shared_norm, hidden);
    case LMC_LAYER_ATTENTION_POST_NORM_GAIN:
    case LMC_LAYER_ATTENTION_POST_NORM_BIAS:
    case LMC_LAYER_MLP_POST_NORM_GAIN:
    case LMC_LAYER_MLP_POST_NORM_BIAS:
        return vector_if(config->post_norm, hidden);
    case LMC_LAYER_GATE:
        return matrix_if(config->gated, wide, hidden);
    case LMC_LAYER_GATE_BIAS:
        return vector_if(config->gated, wide);
    case LMC_LAYER_UP:
        return matrix_if(1, wide, hidden);
    case LMC_LAYER_UP_BIAS:
        return vector_if(1, wide);
    case LMC_LAYER_DOWN:
        return matrix_if(1, hidden, wide);
    case LMC_LAYER_ACTIVATION:
        return vector_if(config->activation == LMC_ACTIVATION_XIELU, 4);
    default:
        return vector_if(0, 0);
    }
}

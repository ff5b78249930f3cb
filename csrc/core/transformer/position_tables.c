/* Checks of a configuration, and the tables that a model needs beside its weights: norms and biases as
 * binary32, and the cosines and sines of the rotary positions. */
#include <string.h>

#include "core/transformer/forward.h"
#include "core/base/parallel.h"

/* Far above any model; keeps every product of sizes below 2^63. */
#define LMC_SIZE_MAX ((size_t)1 << 24)

static int is_size(size_t n) {
    return n >= 1 && n <= LMC_SIZE_MAX;
}

lmc_status_t lmc_transformer_config_check(const lmc_transformer_config_t *config) {
    int sizes = is_size(config->n_layers) && is_size(config->n_heads) && is_size(config->hidden) &&
                is_size(config->intermediate) && is_size(config->n_embeddings) && is_size(config->n_logits) &&
                is_size(config->context_length) && config->n_layers <= 4096 && config->hidden <= (1 << 17) &&
                config->intermediate <= (1 << 20) && config->n_logits <= LMC_VOCAB_SIZE_MAX;
    if (!sizes || config->hidden % config->n_heads != 0) return LMC_ERROR_ARGUMENT;
    if (config->rotary_dims % 2 != 0 || config->rotary_dims > config->hidden / config->n_heads)
        return LMC_ERROR_ARGUMENT;
    if (config->int8 && config->intermediate > LMC_INT8_INPUTS_MAX) return LMC_ERROR_ARGUMENT;
    int reals = config->rotary_base >= 1.0 && config->rotary_base <= 1e30 &&
                config->layer_norm_epsilon >= 0.0f && config->layer_norm_epsilon <= 1.0f;
    return reals ? LMC_OK : LMC_ERROR_ARGUMENT;
}

/* A panel may begin at any position of the context and looks 15 further. */
static size_t table_length(const lmc_transformer_config_t *config) {
    return (config->context_length + 2 * LMC_LANES - 1) / LMC_LANES * LMC_LANES;
}

static size_t vectors_length(const lmc_transformer_config_t *config) {
    return config->n_layers * lmc_layer_vectors_length(config) + 2 * config->hidden;
}

size_t lmc_transformer_tables_bound(const lmc_transformer_config_t *config) {
    size_t angles = config->rotary_dims / 2 * table_length(config);
    return (vectors_length(config) + 2 * angles) * sizeof(float) + sizeof(float);
}

/* Angles with the roundings of the published models: 2i/n, base^(2i/n), its reciprocal and the product with
 * the position are each rounded to binary32. */
static void fill_angles(lmc_transformer_model_t *model) {
    const lmc_transformer_config_t *config = &model->config;
    for (size_t i = 0; i < config->rotary_dims / 2; i++) {
        float exponent = lmc_div((float)(2 * i), (float)config->rotary_dims);
        float power = (float)lmc_exp64((double)exponent * lmc_log64(config->rotary_base));
        float frequency = lmc_div(1.0f, power);
        for (size_t position = 0; position < model->table_length; position++) {
            double sine, cosine;
            lmc_sincos64((double)lmc_mul((float)position, frequency), &sine, &cosine);
            model->sines[i * model->table_length + position] = (float)sine;
            model->cosines[i * model->table_length + position] = (float)cosine;
        }
    }
}

static void fill_vector(const lmc_context_t *context, lmc_transformer_tensor_t tensor, size_t n,
                        float *target) {
    if (tensor.data == NULL)
        memset(target, 0, n * sizeof *target);
    else
        context->backend->transformer->widen(tensor.data, tensor.dtype, n, target);
}

typedef struct lmc_init {
    const lmc_context_t *context;
    lmc_transformer_model_t *model;
} lmc_init_t;

static void fill_tables(void *argument, size_t index, size_t slot) {
    (void)index, (void)slot;
    const lmc_init_t *init = (const lmc_init_t *)argument;
    lmc_transformer_model_t *model = init->model;
    const lmc_transformer_config_t *config = &model->config;
    for (size_t i = 0; i < config->n_layers; i++) {
        const lmc_transformer_layer_t *layer = &model->weights.layers[i];
        lmc_layer_vectors_t vectors = lmc_layer_vectors_at(model, i);
        fill_vector(init->context, layer->attention_norm_gain, config->hidden, vectors.attention_norm_gain);
        fill_vector(init->context, layer->attention_norm_bias, config->hidden, vectors.attention_norm_bias);
        fill_vector(init->context, layer->mlp_norm_gain, config->hidden, vectors.mlp_norm_gain);
        fill_vector(init->context, layer->mlp_norm_bias, config->hidden, vectors.mlp_norm_bias);
        fill_vector(init->context, layer->qkv_bias, 3 * config->hidden, vectors.qkv_bias);
        fill_vector(init->context, layer->dense_bias, config->hidden, vectors.dense_bias);
        fill_vector(init->context, layer->mlp_in_bias, config->intermediate, vectors.mlp_in_bias);
        fill_vector(init->context, layer->mlp_out_bias, config->hidden, vectors.mlp_out_bias);
    }
    float *final = model->vectors + config->n_layers * lmc_layer_vectors_length(config);
    fill_vector(init->context, model->weights.final_gain, config->hidden, final);
    fill_vector(init->context, model->weights.final_bias, config->hidden, final + config->hidden);
    fill_angles(model);
    double scale =
        0x1.71547652b82fep+0 / __builtin_sqrt((double)model->head_dim); /* log2 e / sqrt(head_dim) */
    model->softmax_scale = (float)scale;
    model->softmax_floor = (float)(LMC_SOFTMAX_EXPONENT_FLOOR / scale);
}

int lmc_transformer_has_matrices(const lmc_transformer_config_t *config,
                                 const lmc_transformer_weights_t *weights) {
    int all = weights->embedding.data != NULL && weights->head.data != NULL;
    for (size_t i = 0; i < config->n_layers; i++) {
        const lmc_transformer_layer_t *layer = &weights->layers[i];
        all &= layer->qkv_weight.data != NULL && layer->dense_weight.data != NULL;
        all &= layer->mlp_in_weight.data != NULL && layer->mlp_out_weight.data != NULL;
    }
    return all;
}

/* Matrices are codes where the config says int8, and only there. */
static int are_of_arithmetic(const lmc_transformer_config_t *config,
                             const lmc_transformer_weights_t *weights) {
    int is_int8 = config->int8 != 0, agree = (weights->head.scales != NULL) == is_int8;
    for (size_t i = 0; i < config->n_layers; i++) {
        const lmc_transformer_layer_t *layer = &weights->layers[i];
        agree &= (layer->qkv_weight.scales != NULL) == is_int8;
        agree &= (layer->dense_weight.scales != NULL) == is_int8;
        agree &= (layer->mlp_in_weight.scales != NULL) == is_int8;
        agree &= (layer->mlp_out_weight.scales != NULL) == is_int8;
    }
    return agree;
}

lmc_status_t lmc_transformer_model_init(const lmc_context_t *context, const lmc_transformer_config_t *config,
                                        const lmc_transformer_weights_t *weights, void *tables,
                                        size_t tables_bytes, lmc_transformer_model_t *model) {
    lmc_status_t status = lmc_transformer_config_check(config);
    if (status != LMC_OK) return status;
    if (tables_bytes < lmc_transformer_tables_bound(config)) return LMC_ERROR_CAPACITY;
    if (!lmc_transformer_has_matrices(config, weights) || !are_of_arithmetic(config, weights))
        return LMC_ERROR_ARGUMENT;
    model->config = *config;
    model->weights = *weights;
    model->head_dim = config->hidden / config->n_heads;
    model->table_length = table_length(config);
    model->vectors = (float *)tables;
    model->cosines = model->vectors + vectors_length(config);
    model->sines = model->cosines + config->rotary_dims / 2 * model->table_length;
    lmc_init_t init = {context, model};
    lmc_run_tasks(NULL, 1, fill_tables, &init);
    return LMC_OK;
}

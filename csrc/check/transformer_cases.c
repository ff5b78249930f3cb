/* The written cases of the exact engine: models of every family's kind, and their weights. They never change,
 * or the hashes beside them would. */
#include "check/transformer_cases.h"

#include "check/neox_layer_order.h"

#include "check.h"

lmc_transformer_config_t check_case_config(const check_case_t *c) {
    lmc_transformer_config_t config = check_neox_config(c->sizes, c->rotary_dims);
    if (c->change != NULL) c->change(&config);
    return config;
}

void check_case_tokens(const check_case_t *c, uint64_t *random, int64_t *tokens) {
    for (size_t i = 0; i < CHECK_SEQUENCES * c->n_tokens; i++)
        tokens[i] = (int64_t)(check_random(random) % c->sizes.n_embeddings);
}

uint64_t check_case_hash(const float *values, size_t n) {
    uint64_t hash = CHECK_HASH_EMPTY;
    for (size_t i = 0; i < n; i++)
        hash = check_hash(hash, lmc_bits_of(values[i]), 4);
    return hash;
}

/* GPT-NeoX in arithmetic version 1: these hashes never change. */

static void base_of_5000(lmc_transformer_config_t *config) {
    config->kinds[0].rotary.base = 5000.0;
}

static void small_epsilon(lmc_transformer_config_t *config) {
    config->norm_epsilon = 1e-6f;
}

/* Version 2. Together these have every switch in more than one position. */

static void llama(lmc_transformer_config_t *config) {
    config->norm = LMC_NORM_RMS;
    config->activation = LMC_ACTIVATION_SILU;
    config->gated = 1;
    config->fused_qkv = 0;
    config->n_kv_heads = 2;
    config->head_dim = 10;
    config->attention_divisor = 10.0;
    config->kinds[0].rotary = (lmc_rotary_t){.dims = 10,
                                             .scaling = LMC_ROTARY_LLAMA3,
                                             .base = 500000.0,
                                             .factor = 8.0,
                                             .original_length = 16.0,
                                             .low_factor = 1.0,
                                             .high_factor = 4.0};
}

static void gemma(lmc_transformer_config_t *config) {
    llama(config);
    config->norm_offset = config->post_norm = 1;
    config->activation = LMC_ACTIVATION_GELU_TANH;
    config->qk_norm = LMC_QK_NORM_HEAD;
    config->embedding_multiplier = 6.0f;
    config->attention_divisor = 24.0;
    config->score_cap = 5.0f;
    config->logits_cap = 3.0f;
    config->n_kinds = 2;
    config->kinds[0] = (lmc_layer_kind_t){5, {.dims = 10, .base = 10000.0}};
    config->kinds[1] =
        (lmc_layer_kind_t){0, {.dims = 10, .scaling = LMC_ROTARY_LINEAR, .base = 1e6, .factor = 8.0}};
    config->layer_kinds[1] = 1;
}

static void olmo(lmc_transformer_config_t *config) {
    llama(config);
    config->pre_norm = 0, config->post_norm = 1;
    config->qk_norm = LMC_QK_NORM_FULL;
    config->qkv_clip = 0.75f;
    config->kinds[0] = (lmc_layer_kind_t){20,
                                          {.dims = 10,
                                           .scaling = LMC_ROTARY_YARN,
                                           .base = 10000.0,
                                           .factor = 4.0,
                                           .original_length = 16.0,
                                           .beta_fast = 32.0,
                                           .beta_slow = 1.0,
                                           .truncate = 1}};
}

static void gpt2(lmc_transformer_config_t *config) {
    config->learned_positions = 1;
    config->activation = LMC_ACTIVATION_GELU_TANH;
    config->fused_qkv = 0;
    config->attention_divisor = 1.0;
}

static void phi(lmc_transformer_config_t *config) {
    config->fused_qkv = 0;
    config->parallel_residual = config->shared_norm = config->head_bias = 1;
    config->qk_norm = LMC_QK_NORM_EACH_HEAD;
    config->activation = LMC_ACTIVATION_RELU_SQUARED;
}

static void apertus(lmc_transformer_config_t *config) {
    llama(config);
    config->gated = 0;
    config->activation = LMC_ACTIVATION_XIELU;
    config->n_kv_heads = 1;
    config->residual_multiplier = 0.22f;
    config->attention_multiplier = 0.25;
    config->logits_multiplier = 0.125f;
}

/* Layers with a window, for streams so long that their keys lie in rings. */
static void rings(lmc_transformer_config_t *config) {
    llama(config);
    config->n_kv_heads = 1;
    config->activation = LMC_ACTIVATION_RELU;
    config->n_kinds = 2;
    config->kinds[0].window = 9;
    config->kinds[1].window = 37;
    config->layer_kinds[1] = 1;
}

#define SIZES(N_LAYERS, N_HEADS, HIDDEN, INTERMEDIATE, VOCAB, CONTEXT)                                       \
    .n_layers = N_LAYERS, .n_heads = N_HEADS, .hidden = HIDDEN, .intermediate = INTERMEDIATE,                \
    .n_embeddings = VOCAB, .n_logits = VOCAB, .context_length = CONTEXT

const check_case_t check_cases[] = {
    {"float32, parallel",
     {SIZES(2, 3, 24, 40, 61, 40), .parallel_residual = 1},
     2,
     NULL,
     CHECK_TOKENS,
     LMC_FLOAT32,
     0xb90e22adb99cb08b},
    {"float16, sequential, odd",
     {SIZES(2, 3, 42, 67, 53, 37)},
     4,
     base_of_5000,
     CHECK_TOKENS,
     LMC_FLOAT16,
     0xa7f5a2b313fe8339},
    {"bfloat16, wide",
     {SIZES(1, 1, 144, 300, 31, 64), .parallel_residual = 1},
     144,
     small_epsilon,
     CHECK_TOKENS,
     LMC_BFLOAT16,
     0xfed37132fbd532c3},
    {"int8 of float32",
     {SIZES(2, 3, 24, 40, 61, 40), .parallel_residual = 1, .int8 = 1},
     2,
     NULL,
     CHECK_TOKENS,
     LMC_FLOAT32,
     0x2a75e1070cb967d2},
    {"int8 of bfloat16, sequential, odd, wide",
     {SIZES(1, 2, 42, 530, 53, 37), .int8 = 1},
     4,
     base_of_5000,
     CHECK_TOKENS,
     LMC_BFLOAT16,
     0x59a6a1ad384579c0},
    {"float16, to be turned",
     {SIZES(2, 2, 64, 96, 80, 37)},
     8,
     NULL,
     CHECK_TOKENS,
     LMC_FLOAT16,
     0x95ba5f98d6057d48},
    {"bfloat16, to be turned",
     {SIZES(1, 1, 32, 1056, 61, 37)},
     8,
     NULL,
     CHECK_TOKENS,
     LMC_BFLOAT16,
     0x256d3d13244eb10d},
    {"llama", {SIZES(2, 6, 36, 43, 61, 40)}, 0, llama, CHECK_TOKENS, LMC_FLOAT32, 0xdb8e202dba41cefb},
    {"gemma", {SIZES(2, 6, 36, 70, 61, 40)}, 0, gemma, CHECK_TOKENS, LMC_FLOAT16, 0xf1ad8352a4ba26f8},
    {"olmo", {SIZES(2, 4, 36, 43, 53, 40)}, 0, olmo, CHECK_TOKENS, LMC_BFLOAT16, 0x1076ab82d04ca568},
    {"gpt2", {SIZES(2, 3, 42, 67, 53, 37)}, 0, gpt2, CHECK_TOKENS, LMC_FLOAT32, 0x9ec5dff8883bc982},
    {"phi", {SIZES(2, 3, 42, 67, 53, 37)}, 6, phi, CHECK_TOKENS, LMC_FLOAT32, 0x4e108e580761065f},
    {"apertus", {SIZES(2, 5, 36, 70, 61, 40)}, 0, apertus, CHECK_TOKENS, LMC_FLOAT32, 0x5cb318587cf3ee53},
    {"rings",
     {SIZES(2, 2, 8, 12, 13, CHECK_TOKENS_MAX)},
     0,
     rings,
     CHECK_TOKENS_MAX,
     LMC_FLOAT32,
     0xf9b9db4aa812c89a},
    {"int8 of llama",
     {SIZES(2, 6, 36, 43, 61, 40), .int8 = 1},
     0,
     llama,
     CHECK_TOKENS,
     LMC_BFLOAT16,
     0x4ea3afb3963e1596},
    {"int8 of gemma",
     {SIZES(2, 6, 36, 70, 61, 40), .int8 = 1},
     0,
     gemma,
     CHECK_TOKENS,
     LMC_FLOAT32,
     0xd54a689b8bfd3c6c},
    {"int8 of apertus",
     {SIZES(2, 5, 36, 70, 61, 40), .int8 = 1},
     0,
     apertus,
     CHECK_TOKENS,
     LMC_FLOAT16,
     0x4a3e3fbcd3523de8},
};
const size_t check_n_cases = sizeof check_cases / sizeof *check_cases;

/* Weights. */

static lmc_transformer_tensor_t make_tensor(uint64_t *random, lmc_dtype_t dtype, size_t n, size_t n_inputs,
                                            int is_gain) {
    char *data = check_malloc(n * 4);
    /* Six exponents down from that of about 1 / sqrt(n_inputs). */
    unsigned top = 127;
    for (size_t k = n_inputs; k > 1; k /= 4)
        top--;
    for (size_t i = 0; i < n; i++) {
        uint64_t r = check_random(random);
        unsigned exponent = is_gain ? 127 : top - (unsigned)(r >> 40) % 6;
        uint32_t sign = is_gain ? 0 : (uint32_t)(r >> 63) << 31;
        uint32_t bits = sign | exponent << 23 | ((uint32_t)r & (is_gain ? 0xFFFFFu : 0x7FFFFFu));
        uint16_t upper = (uint16_t)(bits >> 16);
        uint16_t half = (uint16_t)(sign >> 16 | (exponent - 112) << 10 | (bits & 0x7FFFFFu) >> 13);
        if (dtype == LMC_FLOAT32) memcpy(data + 4 * i, &bits, 4);
        if (dtype == LMC_FLOAT16) memcpy(data + 2 * i, &half, 2);
        if (dtype == LMC_BFLOAT16) memcpy(data + 2 * i, &upper, 2);
    }
    return (lmc_transformer_tensor_t){data, dtype};
}

static lmc_transformer_tensor_t make_slot(uint64_t *random, lmc_dtype_t dtype, lmc_shape_t shape, int is_gain,
                                          size_t n_inputs) {
    if (shape.n_rows == 0) return (lmc_transformer_tensor_t){0};
    if (shape.n_columns == 0) return make_tensor(random, dtype, shape.n_rows, is_gain ? 1 : 16, is_gain);
    return make_tensor(random, dtype, shape.n_rows * shape.n_columns, n_inputs, 0);
}

static void make_layer_slot(uint64_t *random, lmc_dtype_t dtype, const lmc_transformer_config_t *config,
                            lmc_layer_slot_t slot, lmc_transformer_layer_t *layer) {
    static const float xielu[] = {0.25f, -0.5f, 0.5f, -0x1p-20f};
    lmc_shape_t shape = lmc_layer_slot_shape(config, slot);
    int is_last = slot == LMC_LAYER_OUT || slot == LMC_LAYER_DOWN; /* the others get larger weights */
    if (layer->slots[slot].data != NULL || shape.n_rows == 0) return;
    layer->slots[slot] = make_slot(random, dtype, shape, check_is_layer_gain(slot),
                                   is_last ? shape.n_columns : shape.n_columns / 4);
    if (slot != LMC_LAYER_ACTIVATION) return;
    memcpy((void *)layer->slots[slot].data, xielu, sizeof xielu);
    layer->slots[slot].dtype = LMC_FLOAT32;
}

static void make_layer(uint64_t *random, lmc_dtype_t dtype, const lmc_transformer_config_t *config,
                       lmc_transformer_layer_t *layer) {
    memset(layer, 0, sizeof *layer);
    for (size_t i = 0; i < sizeof neox_layer_order / sizeof *neox_layer_order; i++)
        make_layer_slot(random, dtype, config, neox_layer_order[i], layer);
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++)
        make_layer_slot(random, dtype, config, (lmc_layer_slot_t)slot, layer);
}

lmc_transformer_weights_t check_case_weights(const check_case_t *c, uint64_t *random,
                                             const lmc_transformer_config_t *config,
                                             lmc_transformer_layer_t *layers) {
    static const lmc_model_slot_t order[] = {LMC_MODEL_EMBEDDING,       LMC_MODEL_FINAL_NORM_GAIN,
                                             LMC_MODEL_FINAL_NORM_BIAS, LMC_MODEL_HEAD,
                                             LMC_MODEL_POSITIONS,       LMC_MODEL_HEAD_BIAS};
    lmc_transformer_weights_t weights = {.layers = layers};
    for (size_t i = 0; i < config->n_layers; i++)
        make_layer(random, c->dtype, config, &layers[i]);
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        lmc_shape_t shape = lmc_model_slot_shape(config, order[i]);
        weights.slots[order[i]] = make_slot(random, c->dtype, shape, order[i] == LMC_MODEL_FINAL_NORM_GAIN,
                                            order[i] == LMC_MODEL_HEAD ? shape.n_columns / 4 : 1);
    }
    return weights;
}

static void free_tensors(const lmc_transformer_tensor_t *tensors, size_t n) {
    for (size_t i = 0; i < n; i++)
        free((void *)tensors[i].data);
}

void check_case_weights_free(const lmc_transformer_config_t *config,
                             const lmc_transformer_weights_t *weights) {
    for (size_t i = 0; i < config->n_layers; i++)
        free_tensors(weights->layers[i].slots, LMC_LAYER_SLOT_COUNT);
    free_tensors(weights->slots, LMC_MODEL_SLOT_COUNT);
}

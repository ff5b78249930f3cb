/* The exact engine without Python: tiny models whose weights come from a generator, computed in one pass, in
 * steps and in a prefill with steps, by every backend, with and without threads. All must give one hash,
 * which is written here: it holds on every processor and in either byte order. tests/models/test_engine.py is
 * what shows that the logits are right. */
#include "check.h"

#include <string.h>

#include "llmcomp/transformer.h"
#include "check/transformer_cases.h"

_Atomic long check_failures;

/* What dispatch does not choose here: AVX-512 where it is emulated, and the kernels for processors without
 * 8-bit products. */
#if defined(LMC_EMULATE_AVX512)
static const lmc_backend_t more[] = {
    {"avx512 (emulated)", lmc_row_kernels_avx512, &lmc_transformer_kernels_avx512, &lmc_int8_kernels_avx512},
    {"avx512 with vnni (emulated)", lmc_row_kernels_avx512, &lmc_transformer_kernels_avx512,
     &lmc_int8_kernels_avx512vnni}};
#elif defined(__x86_64__)
static const lmc_backend_t more[] = {{"avx512 without vnni", lmc_row_kernels_avx512,
                                      &lmc_transformer_kernels_avx512, &lmc_int8_kernels_avx512}};
#elif defined(__aarch64__)
static const lmc_backend_t more[] = {
    {"neon without dotprod", lmc_row_kernels_neon, &lmc_transformer_kernels_neon, &lmc_int8_kernels_neon}};
#endif

const lmc_backend_t *check_backend(size_t index) {
    if (index < lmc_backend_count()) return lmc_backend_at(index);
#if defined(__x86_64__) && !defined(LMC_EMULATE_AVX512)
    if (lmc_backend_find("avx512") == NULL) return NULL;
#endif
#if defined(__x86_64__) || defined(__aarch64__)
    index -= lmc_backend_count();
    if (index < sizeof more / sizeof *more) return &more[index];
#endif
    return NULL;
}

enum { N_SEQUENCES = 5, N_TOKENS = 37, N_TOKENS_MAX = 330 };

typedef struct engine_case {
    const char *name;
    lmc_transformer_config_t sizes; /* as check_neox_config wants them, and what is simply another number */
    size_t rotary_dims;
    void (*change)(lmc_transformer_config_t *config); /* NULL: GPT-NeoX */
    size_t n_tokens;
    lmc_dtype_t dtype;
    uint64_t hash;
} engine_case_t;

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

static const engine_case_t cases[] = {
    {"float32, parallel",
     {SIZES(2, 3, 24, 40, 61, 40), .parallel_residual = 1},
     2,
     NULL,
     N_TOKENS,
     LMC_FLOAT32,
     0xb90e22adb99cb08b},
    {"float16, sequential, odd",
     {SIZES(2, 3, 42, 67, 53, 37)},
     4,
     base_of_5000,
     N_TOKENS,
     LMC_FLOAT16,
     0xa7f5a2b313fe8339},
    {"bfloat16, wide",
     {SIZES(1, 1, 144, 300, 31, 64), .parallel_residual = 1},
     144,
     small_epsilon,
     N_TOKENS,
     LMC_BFLOAT16,
     0xfed37132fbd532c3},
    {"int8 of float32",
     {SIZES(2, 3, 24, 40, 61, 40), .parallel_residual = 1, .int8 = 1},
     2,
     NULL,
     N_TOKENS,
     LMC_FLOAT32,
     0x2a75e1070cb967d2},
    {"int8 of bfloat16, sequential, odd, wide",
     {SIZES(1, 2, 42, 530, 53, 37), .int8 = 1},
     4,
     base_of_5000,
     N_TOKENS,
     LMC_BFLOAT16,
     0x59a6a1ad384579c0},
    {"llama", {SIZES(2, 6, 36, 43, 61, 40)}, 0, llama, N_TOKENS, LMC_FLOAT32, 0xdb8e202dba41cefb},
    {"gemma", {SIZES(2, 6, 36, 70, 61, 40)}, 0, gemma, N_TOKENS, LMC_FLOAT16, 0xf1ad8352a4ba26f8},
    {"olmo", {SIZES(2, 4, 36, 43, 53, 40)}, 0, olmo, N_TOKENS, LMC_BFLOAT16, 0x1076ab82d04ca568},
    {"gpt2", {SIZES(2, 3, 42, 67, 53, 37)}, 0, gpt2, N_TOKENS, LMC_FLOAT32, 0x9ec5dff8883bc982},
    {"phi", {SIZES(2, 3, 42, 67, 53, 37)}, 6, phi, N_TOKENS, LMC_FLOAT32, 0x4e108e580761065f},
    {"apertus", {SIZES(2, 5, 36, 70, 61, 40)}, 0, apertus, N_TOKENS, LMC_FLOAT32, 0x5cb318587cf3ee53},
    {"rings",
     {SIZES(2, 2, 8, 12, 13, N_TOKENS_MAX)},
     0,
     rings,
     N_TOKENS_MAX,
     LMC_FLOAT32,
     0xf9b9db4aa812c89a},
    {"int8 of llama",
     {SIZES(2, 6, 36, 43, 61, 40), .int8 = 1},
     0,
     llama,
     N_TOKENS,
     LMC_BFLOAT16,
     0x4ea3afb3963e1596},
    {"int8 of gemma",
     {SIZES(2, 6, 36, 70, 61, 40), .int8 = 1},
     0,
     gemma,
     N_TOKENS,
     LMC_FLOAT32,
     0xd54a689b8bfd3c6c},
    {"int8 of apertus",
     {SIZES(2, 5, 36, 70, 61, 40), .int8 = 1},
     0,
     apertus,
     N_TOKENS,
     LMC_FLOAT16,
     0x4a3e3fbcd3523de8},
};

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

/* The order in which GPT-NeoX's tensors were drawn when its hashes were written; then all others. */
static const lmc_layer_slot_t first_slots[] = {LMC_LAYER_ATTENTION_NORM_GAIN,
                                               LMC_LAYER_ATTENTION_NORM_BIAS,
                                               LMC_LAYER_MLP_NORM_GAIN,
                                               LMC_LAYER_MLP_NORM_BIAS,
                                               LMC_LAYER_QKV,
                                               LMC_LAYER_QKV_BIAS,
                                               LMC_LAYER_OUT,
                                               LMC_LAYER_OUT_BIAS,
                                               LMC_LAYER_UP,
                                               LMC_LAYER_UP_BIAS,
                                               LMC_LAYER_DOWN,
                                               LMC_LAYER_DOWN_BIAS};

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
    for (size_t i = 0; i < sizeof first_slots / sizeof *first_slots; i++)
        make_layer_slot(random, dtype, config, first_slots[i], layer);
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++)
        make_layer_slot(random, dtype, config, (lmc_layer_slot_t)slot, layer);
}

static lmc_transformer_weights_t make_weights(uint64_t *random, lmc_dtype_t dtype,
                                              const lmc_transformer_config_t *config,
                                              lmc_transformer_layer_t *layers) {
    static const lmc_model_slot_t order[] = {LMC_MODEL_EMBEDDING,       LMC_MODEL_FINAL_NORM_GAIN,
                                             LMC_MODEL_FINAL_NORM_BIAS, LMC_MODEL_HEAD,
                                             LMC_MODEL_POSITIONS,       LMC_MODEL_HEAD_BIAS};
    lmc_transformer_weights_t weights = {.layers = layers};
    for (size_t i = 0; i < config->n_layers; i++)
        make_layer(random, dtype, config, &layers[i]);
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        lmc_shape_t shape = lmc_model_slot_shape(config, order[i]);
        weights.slots[order[i]] = make_slot(random, dtype, shape, order[i] == LMC_MODEL_FINAL_NORM_GAIN,
                                            order[i] == LMC_MODEL_HEAD ? shape.n_columns / 4 : 1);
    }
    return weights;
}

static void free_tensors(const lmc_transformer_tensor_t *tensors, size_t n) {
    for (size_t i = 0; i < n; i++)
        free((void *)tensors[i].data);
}

/* Three ways to the same logits. */

typedef struct engine_run {
    lmc_context_t context;
    lmc_transformer_model_t model;
    int64_t tokens[N_SEQUENCES * N_TOKENS_MAX]; /* [N_SEQUENCES][n_tokens] */
    size_t n_tokens, n_slots;
} engine_run_t;

static void run_pass(const engine_run_t *run, float *logits) {
    const lmc_transformer_config_t *config = &run->model.config;
    lmc_transformer_batch_t batch = {run->tokens, NULL, N_SEQUENCES, run->n_tokens, run->n_tokens};
    lmc_transformer_sink_t sink = {.logits = logits};
    size_t bytes = lmc_transformer_pass_bound(config, N_SEQUENCES, run->n_tokens, run->n_slots, 0), error = 0;
    void *workspace = check_malloc(bytes);
    lmc_status_t status =
        lmc_transformer_pass(&run->context, &run->model, &batch, &sink, workspace, bytes, &error);
    CHECK(status == LMC_OK, "%s", lmc_status_message(status));
    CHECK(lmc_transformer_pass(&run->context, &run->model, &batch, &sink, workspace, bytes / 4, &error) ==
              LMC_ERROR_CAPACITY,
          "a quarter of the workspace was enough");
    free(workspace);
}

/* Prefills n_first tokens of every stream, then steps, n_together streams in a call. Writes rows from n_first
 * - 1 on (0: all). */
static void run_steps(const engine_run_t *run, size_t n_first, size_t n_together, float *logits) {
    const lmc_transformer_config_t *config = &run->model.config;
    size_t cache_bytes = lmc_transformer_cache_bound(config, N_SEQUENCES, run->n_tokens), error = 0;
    size_t step_bytes = lmc_transformer_step_bound(config, N_SEQUENCES, run->n_slots);
    size_t prefill_bytes = lmc_transformer_prefill_bound(config, run->n_tokens, run->n_slots);
    size_t bytes = step_bytes > prefill_bytes ? step_bytes : prefill_bytes,
           row = run->n_tokens * config->n_logits;
    void *memory = check_malloc(cache_bytes), *workspace = check_malloc(bytes);
    float *step = check_malloc(N_SEQUENCES * config->n_logits * sizeof *step);
    lmc_transformer_cache_t cache;
    lmc_status_t status =
        lmc_transformer_cache_init(config, N_SEQUENCES, run->n_tokens, memory, cache_bytes, &cache);
    for (size_t s = 0; s < N_SEQUENCES && n_first > 0; s++) {
        status = lmc_transformer_prefill(
            &run->context, &run->model, &cache, s, run->tokens + s * run->n_tokens, n_first,
            logits + s * row + (n_first - 1) * config->n_logits, workspace, bytes, &error);
        CHECK(status == LMC_OK, "%s", lmc_status_message(status));
    }
    for (size_t t = n_first; t < run->n_tokens; t++) {
        int64_t tokens[N_SEQUENCES];
        uint8_t active[N_SEQUENCES];
        for (size_t s = 0; s < N_SEQUENCES; s++)
            tokens[s] = run->tokens[s * run->n_tokens + t];
        for (size_t first = 0; first < N_SEQUENCES; first += n_together) {
            for (size_t s = 0; s < N_SEQUENCES; s++)
                active[s] = s / n_together == first / n_together;
            status = lmc_transformer_step(&run->context, &run->model, &cache, tokens, active, step, workspace,
                                          bytes, &error);
            CHECK(status == LMC_OK, "%s", lmc_status_message(status));
            for (size_t s = first; s < N_SEQUENCES && active[s]; s++)
                memcpy(logits + s * row + t * config->n_logits, step + s * config->n_logits,
                       config->n_logits * sizeof *step);
        }
    }
    free(memory), free(workspace), free(step);
}

static uint64_t hash_of(const float *values, size_t n) {
    uint64_t hash = CHECK_HASH_EMPTY;
    for (size_t i = 0; i < n; i++)
        hash = check_hash(hash, lmc_bits_of(values[i]), 4);
    return hash;
}

/* The sinks with targets against the same of the logits, which are right by then: here every token's own. */
static void check_targets(const engine_run_t *run, const char *name, const float *logits) {
    enum { N_ROWS_MAX = N_SEQUENCES * N_TOKENS_MAX };
    size_t n_rows = N_SEQUENCES * run->n_tokens;
    const lmc_transformer_config_t *config = &run->model.config;
    lmc_context_t serial = {lmc_backend_at(0), NULL};
    lmc_rows_t rows = {logits, (ptrdiff_t)(config->n_logits * sizeof *logits), n_rows, config->n_logits,
                       LMC_FLOAT32};
    lmc_transformer_batch_t batch = {run->tokens, NULL, N_SEQUENCES, run->n_tokens, run->n_tokens};
    static uint64_t found[3][N_ROWS_MAX], expected[3][N_ROWS_MAX];
    static double softmax_found[N_ROWS_MAX], softmax_expected[N_ROWS_MAX];
    lmc_transformer_sink_t intervals = {.targets = batch.tokens,
                                        .start = found[0],
                                        .freq = found[1],
                                        .total = found[2],
                                        .vocab_size = config->n_logits};
    lmc_transformer_sink_t softmax = {
        .targets = batch.tokens, .log2_probabilities = softmax_found, .vocab_size = config->n_logits};
    size_t bytes = lmc_transformer_pass_bound(config, N_SEQUENCES, run->n_tokens, run->n_slots, 1), error = 0;
    void *workspace = check_malloc(bytes);
    lmc_status_t statuses[] = {
        lmc_transformer_pass(&run->context, &run->model, &batch, &intervals, workspace, bytes, &error),
        lmc_transformer_pass(&run->context, &run->model, &batch, &softmax, workspace, bytes, &error),
        lmc_intervals(&serial, &rows, batch.tokens, NULL, expected[0], expected[1], expected[2], &error),
        lmc_log2_softmax(&serial, &rows, batch.tokens, softmax_expected, &error)};
    for (size_t i = 0; i < sizeof statuses / sizeof *statuses; i++)
        CHECK(statuses[i] == LMC_OK, "%s", lmc_status_message(statuses[i]));
    CHECK(memcmp(found, expected, sizeof found) == 0, "%s, %s: intervals", name,
          lmc_backend_name(run->context.backend));
    CHECK(memcmp(softmax_found, softmax_expected, sizeof softmax_found) == 0, "%s, %s: softmax", name,
          lmc_backend_name(run->context.backend));
    free(workspace);
}

static void check_run(const engine_run_t *run, const engine_case_t *c) {
    size_t n = N_SEQUENCES * run->n_tokens * run->model.config.n_logits;
    const char *backend = lmc_backend_name(run->context.backend);
    float *logits = check_malloc(n * sizeof *logits);
    run_pass(run, logits);
    uint64_t hash = hash_of(logits, n);
    CHECK(hash == c->hash, "%s, %s, %zu threads: pass gives %016llx", c->name, backend, run->n_slots,
          (unsigned long long)hash);
    check_targets(run, c->name, logits);
    /* All of them for version 1; of the others, which the tests of the package run too, enough for each
     * kernel. */
    const size_t firsts[] = {0, 1, 16, 21, run->n_tokens - 7}, is_long = run->n_tokens > N_TOKENS;
    const size_t every = lmc_transformer_arithmetic(&run->model.config) == 1 ? 1 : 3;
    for (size_t i = is_long ? 4 : 0; i < sizeof firsts / sizeof *firsts; i += every) {
        size_t n_together = N_SEQUENCES - i; /* kernels differ by how many tokens there are */
        run_steps(run, firsts[i], n_together, logits);
        CHECK(hash_of(logits, n) == hash, "%s, %s, %zu threads: %zu tokens, then steps of %zu", c->name,
              backend, run->n_slots, firsts[i], n_together);
    }
    free(logits);
}

static void check_case(const engine_case_t *c) {
    lmc_transformer_layer_t layers[2], in_use_layers[2];
    lmc_transformer_config_t config = check_neox_config(c->sizes, c->rotary_dims);
    uint64_t random = 1;
    if (c->change != NULL) c->change(&config);
    lmc_transformer_weights_t weights = make_weights(&random, c->dtype, &config, layers), in_use = weights;
    size_t int8_bytes = config.int8 ? lmc_int8_weights_bound(&config) : 0;
    void *int8 = check_malloc(int8_bytes);
    static engine_run_t run;
    run.n_tokens = c->n_tokens;
    for (size_t i = 0; i < N_SEQUENCES * c->n_tokens; i++)
        run.tokens[i] = (int64_t)(check_random(&random) % config.n_embeddings);
    size_t bytes = lmc_transformer_tables_bound(&config);
    void *tables = check_malloc(bytes);
    lmc_executor_t two = lmc_executor_threads(2);
    for (size_t b = 0; (run.context.backend = check_backend(b)) != NULL; b++) {
        for (run.n_slots = 1; run.n_slots <= 2; run.n_slots++) {
            run.context.executor = run.n_slots == 1 ? NULL : &two;
            lmc_status_t status = LMC_OK;
            if (config.int8)
                status = lmc_int8_weights_quantise(&run.context, &config, &weights, int8, int8_bytes,
                                                   in_use_layers, &in_use);
            CHECK(status == LMC_OK, "%s: %s", c->name, lmc_status_message(status));
            status = lmc_transformer_model_init(&run.context, &config, &in_use, tables, bytes, &run.model);
            CHECK(status == LMC_OK, "%s: %s", c->name, lmc_status_message(status));
            if (status == LMC_OK) check_run(&run, c);
        }
    }
    for (size_t i = 0; i < config.n_layers; i++)
        free_tensors(layers[i].slots, LMC_LAYER_SLOT_COUNT);
    free_tensors(weights.slots, LMC_MODEL_SLOT_COUNT);
    free(tables), free(int8);
}

int main(void) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_case(&cases[i]);
    if (check_failures == 0) printf("engine: all backends give the written hashes\n");
    return check_failures != 0;
}

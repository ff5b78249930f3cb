/* The exact engine without Python: tiny models whose weights come from a generator, computed in one pass, in
 * steps and in a prefill with steps, by every backend, with and without threads. All must give one hash,
 * which is written here: it holds on every processor and in either byte order. tests/models/test_engine.py is
 * what shows that the logits are right. */
#include "check.h"

#include <string.h>

#include "llmcomp/transformer.h"

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

enum { N_SEQUENCES = 5, N_TOKENS = 37 };

typedef struct engine_case {
    const char *name;
    lmc_transformer_config_t config;
    lmc_dtype_t dtype;
    uint64_t hash;
} engine_case_t;

static const engine_case_t cases[] = {
    {"float32, parallel", {2, 3, 24, 40, 61, 61, 40, 2, 10000.0, 1e-5f, 1}, LMC_FLOAT32, 0xb90e22adb99cb08b},
    {"float16, sequential, odd",
     {2, 3, 42, 67, 53, 53, 37, 4, 5000.0, 1e-5f, 0},
     LMC_FLOAT16,
     0xa7f5a2b313fe8339},
    {"bfloat16, wide",
     {1, 1, 144, 300, 31, 31, 64, 144, 10000.0, 1e-6f, 1},
     LMC_BFLOAT16,
     0xfed37132fbd532c3},
    {"int8 of float32", {2, 3, 24, 40, 61, 61, 40, 2, 10000.0, 1e-5f, 1, 1}, LMC_FLOAT32, 0x2a75e1070cb967d2},
    {"int8 of bfloat16, sequential, odd, wide",
     {1, 2, 42, 530, 53, 53, 37, 4, 5000.0, 1e-5f, 0, 1},
     LMC_BFLOAT16,
     0x59a6a1ad384579c0},
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

static void make_layer(uint64_t *random, lmc_dtype_t dtype, size_t d, size_t m,
                       lmc_transformer_layer_t *layer) {
    layer->attention_norm_gain = make_tensor(random, dtype, d, 1, 1);
    layer->attention_norm_bias = make_tensor(random, dtype, d, 16, 0);
    layer->mlp_norm_gain = make_tensor(random, dtype, d, 1, 1);
    layer->mlp_norm_bias = make_tensor(random, dtype, d, 16, 0);
    layer->qkv_weight = make_tensor(random, dtype, 3 * d * d, d / 4, 0);
    layer->qkv_bias = make_tensor(random, dtype, 3 * d, 16, 0);
    layer->dense_weight = make_tensor(random, dtype, d * d, d, 0);
    layer->dense_bias = make_tensor(random, dtype, d, 16, 0);
    layer->mlp_in_weight = make_tensor(random, dtype, m * d, d / 4, 0);
    layer->mlp_in_bias = make_tensor(random, dtype, m, 16, 0);
    layer->mlp_out_weight = make_tensor(random, dtype, d * m, m, 0);
    layer->mlp_out_bias = make_tensor(random, dtype, d, 16, 0);
}

static void free_layer(lmc_transformer_layer_t *layer) {
    lmc_transformer_tensor_t *tensors = (lmc_transformer_tensor_t *)layer;
    for (size_t i = 0; i < sizeof *layer / sizeof *tensors; i++)
        free((void *)tensors[i].data);
}

/* Three ways to the same logits. */

typedef struct engine_run {
    lmc_context_t context;
    lmc_transformer_model_t model;
    int64_t tokens[N_SEQUENCES][N_TOKENS];
    size_t n_slots;
} engine_run_t;

static void run_pass(const engine_run_t *run, float *logits) {
    const lmc_transformer_config_t *config = &run->model.config;
    lmc_transformer_batch_t batch = {&run->tokens[0][0], NULL, N_SEQUENCES, N_TOKENS, N_TOKENS};
    lmc_transformer_sink_t sink = {.logits = logits};
    size_t bytes = lmc_transformer_pass_bound(config, N_SEQUENCES, N_TOKENS, run->n_slots, 0), error = 0;
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
    size_t cache_bytes = lmc_transformer_cache_bound(config, N_SEQUENCES, N_TOKENS), error = 0;
    size_t step_bytes = lmc_transformer_step_bound(config, N_SEQUENCES, run->n_slots);
    size_t prefill_bytes = lmc_transformer_prefill_bound(config, N_TOKENS, run->n_slots);
    size_t bytes = step_bytes > prefill_bytes ? step_bytes : prefill_bytes, row = N_TOKENS * config->n_logits;
    void *memory = check_malloc(cache_bytes), *workspace = check_malloc(bytes);
    float *step = check_malloc(N_SEQUENCES * config->n_logits * sizeof *step);
    lmc_transformer_cache_t cache;
    lmc_status_t status =
        lmc_transformer_cache_init(config, N_SEQUENCES, N_TOKENS, memory, cache_bytes, &cache);
    for (size_t s = 0; s < N_SEQUENCES && n_first > 0; s++) {
        status = lmc_transformer_prefill(&run->context, &run->model, &cache, s, run->tokens[s], n_first,
                                         logits + s * row + (n_first - 1) * config->n_logits, workspace,
                                         bytes, &error);
        CHECK(status == LMC_OK, "%s", lmc_status_message(status));
    }
    for (size_t t = n_first; t < N_TOKENS; t++) {
        int64_t tokens[N_SEQUENCES];
        uint8_t active[N_SEQUENCES];
        for (size_t s = 0; s < N_SEQUENCES; s++)
            tokens[s] = run->tokens[s][t];
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
    enum { N_ROWS = N_SEQUENCES * N_TOKENS };
    const lmc_transformer_config_t *config = &run->model.config;
    lmc_context_t serial = {lmc_backend_at(0), NULL};
    lmc_rows_t rows = {logits, (ptrdiff_t)(config->n_logits * sizeof *logits), N_ROWS, config->n_logits,
                       LMC_FLOAT32};
    lmc_transformer_batch_t batch = {&run->tokens[0][0], NULL, N_SEQUENCES, N_TOKENS, N_TOKENS};
    uint64_t found[3][N_ROWS], expected[3][N_ROWS];
    double softmax_found[N_ROWS], softmax_expected[N_ROWS];
    lmc_transformer_sink_t intervals = {.targets = batch.tokens,
                                        .start = found[0],
                                        .freq = found[1],
                                        .total = found[2],
                                        .vocab_size = config->n_logits};
    lmc_transformer_sink_t softmax = {
        .targets = batch.tokens, .log2_probabilities = softmax_found, .vocab_size = config->n_logits};
    size_t bytes = lmc_transformer_pass_bound(config, N_SEQUENCES, N_TOKENS, run->n_slots, 1), error = 0;
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
    size_t n = N_SEQUENCES * N_TOKENS * c->config.n_logits;
    const char *backend = lmc_backend_name(run->context.backend);
    float *logits = check_malloc(n * sizeof *logits);
    run_pass(run, logits);
    uint64_t hash = hash_of(logits, n);
    CHECK(hash == c->hash, "%s, %s, %zu threads: pass gives %016llx", c->name, backend, run->n_slots,
          (unsigned long long)hash);
    check_targets(run, c->name, logits);
    static const size_t firsts[] = {0, 1, 16, 21, 30};
    for (size_t i = 0; i < sizeof firsts / sizeof *firsts; i++) {
        size_t n_together = N_SEQUENCES - i; /* kernels differ by how many tokens there are */
        run_steps(run, firsts[i], n_together, logits);
        CHECK(hash_of(logits, n) == hash, "%s, %s, %zu threads: %zu tokens, then steps of %zu", c->name,
              backend, run->n_slots, firsts[i], n_together);
    }
    free(logits);
}

static void check_case(const engine_case_t *c) {
    lmc_transformer_layer_t layers[2];
    uint64_t random = 1;
    size_t d = c->config.hidden;
    for (size_t i = 0; i < c->config.n_layers; i++)
        make_layer(&random, c->dtype, d, c->config.intermediate, &layers[i]);
    lmc_transformer_weights_t weights = {
        .layers = layers,
        .embedding = make_tensor(&random, c->dtype, c->config.n_embeddings * d, 1, 0),
        .final_gain = make_tensor(&random, c->dtype, d, 1, 1),
        .final_bias = make_tensor(&random, c->dtype, d, 16, 0),
        .head = make_tensor(&random, c->dtype, c->config.n_logits * d, d / 4, 0)};
    lmc_transformer_weights_t in_use = weights;
    lmc_transformer_layer_t in_use_layers[2];
    size_t int8_bytes = c->config.int8 ? lmc_int8_weights_bound(&c->config) : 0;
    void *int8 = check_malloc(int8_bytes);
    engine_run_t run;
    for (size_t i = 0; i < N_SEQUENCES * N_TOKENS; i++)
        run.tokens[i / N_TOKENS][i % N_TOKENS] = (int64_t)(check_random(&random) % c->config.n_embeddings);
    size_t bytes = lmc_transformer_tables_bound(&c->config);
    void *tables = check_malloc(bytes);
    lmc_executor_t two = lmc_executor_threads(2);
    for (size_t b = 0; (run.context.backend = check_backend(b)) != NULL; b++) {
        for (run.n_slots = 1; run.n_slots <= 2; run.n_slots++) {
            run.context.executor = run.n_slots == 1 ? NULL : &two;
            lmc_status_t status = LMC_OK;
            if (c->config.int8)
                status = lmc_int8_weights_quantise(&run.context, &c->config, &weights, int8, int8_bytes,
                                                   in_use_layers, &in_use);
            CHECK(status == LMC_OK, "%s", lmc_status_message(status));
            status = lmc_transformer_model_init(&run.context, &c->config, &in_use, tables, bytes, &run.model);
            CHECK(status == LMC_OK, "%s", lmc_status_message(status));
            check_run(&run, c);
        }
    }
    for (size_t i = 0; i < c->config.n_layers; i++)
        free_layer(&layers[i]);
    free((void *)weights.embedding.data), free((void *)weights.final_gain.data);
    free((void *)weights.final_bias.data), free((void *)weights.head.data), free(tables), free(int8);
}

int main(void) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_case(&cases[i]);
    if (check_failures == 0) printf("engine: all backends give the written hashes\n");
    return check_failures != 0;
}

/* The exact engine without Python: the tiny models of transformer_cases.c, computed in one pass, in steps and
 * in a prefill with steps, by every backend, with and without threads. All must give one hash, which is
 * written there: it holds on every processor and in either byte order; and chains of steps must decode what
 * was coded with these logits. tests/models/test_engine.py is what shows that the logits are right. */
#include "check.h"

#include <string.h>

#include "llmcomp/decoding.h"
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

enum { N_SEQUENCES = CHECK_SEQUENCES, N_TOKENS = CHECK_TOKENS, N_TOKENS_MAX = CHECK_TOKENS_MAX };

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

/* Payloads of the sequences after their first tokens, coded with the logits of a pass. */

enum { N_SLOTS_MAX = 2, PAYLOAD_BYTES = LMC_STEP_BYTES_MAX * (N_TOKENS_MAX + 1) };

typedef struct coded_run {
    uint8_t payloads[N_SEQUENCES][PAYLOAD_BYTES];
    lmc_decoder_t decoders[N_SEQUENCES];
    lmc_mixer_t *mixers[N_SEQUENCES];
} coded_run_t;

static void begin_mixer(coded_run_t *coded, size_t s, size_t n_tokens) {
    size_t bytes = lmc_mixer_bound(n_tokens);
    if (coded->mixers[s] == NULL) coded->mixers[s] = check_malloc(bytes);
    CHECK(lmc_mixer_begin(coded->mixers[s], bytes, n_tokens, &coded->mixers[s]) == LMC_OK, "no mixer");
}

static void code_sequence(const engine_run_t *run, const float *logits, size_t s, int is_mixed,
                          coded_run_t *coded) {
    static uint64_t intervals[3][N_TOKENS_MAX];
    size_t n_logits = run->model.config.n_logits, n = run->n_tokens - 1, error = 0;
    const int64_t *tokens = run->tokens + s * run->n_tokens + 1;
    lmc_rows_t rows = {logits + s * run->n_tokens * n_logits, (ptrdiff_t)(n_logits * sizeof *logits), n,
                       n_logits, LMC_FLOAT32};
    lmc_encoder_t encoder;
    lmc_encoder_init(&encoder, coded->payloads[s], PAYLOAD_BYTES);
    lmc_status_t status =
        lmc_intervals(&run->context, &rows, tokens, NULL, intervals[0], intervals[1], intervals[2], &error);
    if (is_mixed) begin_mixer(coded, s, n);
    if (status == LMC_OK && is_mixed)
        status =
            lmc_mixer_encode(coded->mixers[s], n, tokens, intervals[0], intervals[1], intervals[2], &error);
    if (status == LMC_OK)
        status = lmc_encoder_put(&encoder, n, intervals[0], intervals[1], intervals[2], &error);
    if (status == LMC_OK) status = lmc_encoder_end(&encoder);
    CHECK(status == LMC_OK, "%s", lmc_status_message(status));
    lmc_decoder_init(&coded->decoders[s], coded->payloads[s], encoder.n_bytes);
    if (is_mixed) begin_mixer(coded, s, n);
}

/* A call of many steps and one of few, for which weights of 16 bits are not turned. */
static void check_chain(const engine_run_t *run, const char *name, const float *logits, int is_mixed) {
    const lmc_transformer_config_t *config = &run->model.config;
    static coded_run_t coded;
    static int32_t found[N_TOKENS_MAX][N_SEQUENCES];
    lmc_search_t searches[N_SLOTS_MAX];
    int64_t tokens[N_SEQUENCES];
    for (size_t s = 0; s < N_SEQUENCES; s++) {
        code_sequence(run, logits, s, is_mixed, &coded);
        tokens[s] = run->tokens[s * run->n_tokens];
    }
    size_t cache_bytes = lmc_transformer_cache_bound(config, N_SEQUENCES, run->n_tokens), error = 0;
    size_t bytes = lmc_transformer_decode_bound(config, N_SEQUENCES, run->n_slots);
    void *memory = check_malloc(cache_bytes), *workspace = check_malloc(bytes);
    float *scratch = check_malloc(N_SEQUENCES * config->n_logits * sizeof *scratch);
    lmc_transformer_cache_t cache;
    lmc_transformer_chain_t chain = {.decoders = coded.decoders,
                                     .mixers = is_mixed ? coded.mixers : NULL,
                                     .vocab_size = config->n_logits,
                                     .tokens = tokens,
                                     .logits = scratch,
                                     .searches = searches};
    lmc_status_t status =
        lmc_transformer_cache_init(config, N_SEQUENCES, run->n_tokens, memory, cache_bytes, &cache);
    size_t n = run->n_tokens - 1, n_last = 3;
    if (status == LMC_OK)
        status = lmc_transformer_decode(&run->context, &run->model, &cache, &chain, n - n_last, found[0],
                                        workspace, bytes, &error);
    if (status == LMC_OK)
        status = lmc_transformer_decode(&run->context, &run->model, &cache, &chain, n_last, found[n - n_last],
                                        workspace, bytes, &error);
    CHECK(status == LMC_OK, "%s: %s", name, lmc_status_message(status));
    for (size_t i = 0; i < n * N_SEQUENCES; i++) {
        size_t t = i / N_SEQUENCES, s = i % N_SEQUENCES;
        CHECK(found[t][s] == run->tokens[s * run->n_tokens + t + 1],
              "%s, %s, %zu threads: chain, step %zu of stream %zu", name,
              lmc_backend_name(run->context.backend), run->n_slots, t, s);
    }
    for (size_t s = 0; s < N_SEQUENCES; s++)
        free(coded.mixers[s]), coded.mixers[s] = NULL;
    free(memory), free(workspace), free(scratch);
}

static void check_run(const engine_run_t *run, const check_case_t *c) {
    size_t n = N_SEQUENCES * run->n_tokens * run->model.config.n_logits;
    const char *backend = lmc_backend_name(run->context.backend);
    float *logits = check_malloc(n * sizeof *logits);
    run_pass(run, logits);
    uint64_t hash = check_case_hash(logits, n);
    CHECK(hash == c->hash, "%s, %s, %zu threads: pass gives %016llx", c->name, backend, run->n_slots,
          (unsigned long long)hash);
    check_targets(run, c->name, logits);
    for (int is_mixed = 0; is_mixed < 2; is_mixed++)
        check_chain(run, c->name, logits, is_mixed);
    /* All of them for version 1; of the others, which the tests of the package run too, enough for each
     * kernel. */
    const size_t firsts[] = {0, 1, 16, 21, run->n_tokens - 7}, is_long = run->n_tokens > N_TOKENS;
    const size_t every = lmc_transformer_arithmetic(&run->model.config) == 1 ? 1 : 3;
    for (size_t i = is_long ? 4 : 0; i < sizeof firsts / sizeof *firsts; i += every) {
        size_t n_together = N_SEQUENCES - i; /* kernels differ by how many tokens there are */
        run_steps(run, firsts[i], n_together, logits);
        CHECK(check_case_hash(logits, n) == hash, "%s, %s, %zu threads: %zu tokens, then steps of %zu",
              c->name, backend, run->n_slots, firsts[i], n_together);
    }
    free(logits);
}

static void check_case(const check_case_t *c) {
    lmc_transformer_layer_t layers[2], in_use_layers[2];
    lmc_transformer_config_t config = check_case_config(c);
    uint64_t random = CHECK_CASE_SEED;
    lmc_transformer_weights_t weights = check_case_weights(c, &random, &config, layers), in_use = weights;
    size_t int8_bytes = config.int8 ? lmc_int8_weights_bound(&config) : 0;
    void *int8 = check_malloc(int8_bytes);
    static engine_run_t run;
    run.n_tokens = c->n_tokens;
    check_case_tokens(c, &random, run.tokens);
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
    check_case_weights_free(&config, &weights);
    free(tables), free(int8);
}

int main(void) {
    for (size_t i = 0; i < check_n_cases; i++)
        check_case(&check_cases[i]);
    if (check_failures == 0) printf("engine: all backends give the written hashes\n");
    return check_failures != 0;
}

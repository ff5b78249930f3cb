/* The coder's self-check, without Python: the golden file, the backends against each other, streams over the
 * thread pool, the processor's float state, and every error.
 *     self_check tests/golden/coding.bin [thinning [no-fork]]
 * thinning n looks at every n-th number only, for emulators. */
#include "check.h"

#include <fenv.h>
#include <pthread.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "llmcomp/coder.h"

_Atomic long check_failures;

#if defined(LMC_EMULATE_AVX512)
static const lmc_backend_t emulated = {"avx512 (emulated)", lmc_row_kernels_avx512,
                                       &lmc_transformer_kernels_serial};
#endif

const lmc_backend_t *check_backend(size_t index) {
#if defined(LMC_EMULATE_AVX512)
    if (index == lmc_backend_count()) return &emulated;
#endif
    return lmc_backend_at(index);
}

static const char *name_of(const lmc_context_t *context) {
    return lmc_backend_name(context->backend);
}

/* The golden file. */

static lmc_rows_t rows_of(const golden_case_t *c) {
    ptrdiff_t stride = (ptrdiff_t)(c->vocab_size * lmc_dtype_bytes(c->dtype));
    return (lmc_rows_t){c->logits, stride, c->n_rows, c->vocab_size, c->dtype};
}

static void check_golden_case(const lmc_context_t *context, const golden_case_t *c) {
    lmc_rows_t rows = rows_of(c);
    size_t n = c->n_rows, error = 0, capacity = (n + 1) * LMC_STEP_BYTES_MAX;
    uint64_t *triple = check_malloc(3 * n * sizeof *triple);
    uint8_t *payload = check_malloc(capacity);
    int32_t *tokens = check_malloc(n * sizeof *tokens);
    lmc_search_t *search = check_malloc(sizeof *search);
    lmc_encoder_t encoder;
    lmc_decoder_t decoder;

    lmc_status_t status =
        lmc_intervals(context, &rows, c->tokens, NULL, triple, triple + n, triple + 2 * n, &error);
    CHECK(status == LMC_OK, "%s: %s", name_of(context), lmc_status_message(status));
    size_t bytes = n * sizeof *triple;
    int is_same = memcmp(triple, c->start, bytes) == 0 && memcmp(triple + n, c->freq, bytes) == 0 &&
                  memcmp(triple + 2 * n, c->total, bytes) == 0;
    CHECK(is_same, "%s: intervals of seed %llu", name_of(context), (unsigned long long)c->seed);

    lmc_encoder_init(&encoder, payload, capacity);
    CHECK(lmc_encoder_put(&encoder, n, c->start, c->freq, c->total, &error) == LMC_OK, "seed %llu",
          (unsigned long long)c->seed);
    CHECK(lmc_encoder_end(&encoder) == LMC_OK, "seed %llu", (unsigned long long)c->seed);
    is_same = encoder.n_bytes == c->payload_bytes && memcmp(payload, c->payload, c->payload_bytes) == 0;
    CHECK(is_same, "payload of seed %llu", (unsigned long long)c->seed);

    lmc_decoder_init(&decoder, c->payload, c->payload_bytes);
    status = lmc_decode_stream(context, &rows, &decoder, search, tokens, &error);
    CHECK(status == LMC_OK && error == n, "%s: %s", name_of(context), lmc_status_message(status));
    for (size_t i = 0; i < n; i++)
        CHECK(tokens[i] == c->tokens[i], "%s: token %zu of seed %llu", name_of(context), i,
              (unsigned long long)c->seed);
    free(triple), free(payload), free(tokens), free(search);
}

/* Over the softmax at all tokens of the golden file: the same on every processor.
 * tests/coding/test_softmax.py is what shows that it is right. */
#define GOLDEN_SOFTMAX_HASH 0x222B1024710749C1u

static uint64_t hash_softmax(const lmc_context_t *context, const golden_case_t *c, uint64_t hash) {
    lmc_rows_t rows = rows_of(c);
    size_t error = 0;
    double *found = check_malloc(c->n_rows * sizeof *found);
    lmc_status_t status = lmc_log2_softmax(context, &rows, c->tokens, found, &error);
    CHECK(status == LMC_OK, "%s: %s", name_of(context), lmc_status_message(status));
    for (size_t i = 0; i < c->n_rows; i++) {
        uint64_t bits;
        memcpy(&bits, &found[i], sizeof bits);
        hash = check_hash(hash, bits, 8);
    }
    free(found);
    return hash;
}

static void check_golden(const char *path) {
    size_t n_cases;
    golden_case_t *cases = golden_read(path, &n_cases);
    lmc_executor_t two = lmc_executor_threads(2);
    const lmc_backend_t *backend;
    for (size_t b = 0; (backend = check_backend(b)) != NULL; b++) {
        lmc_context_t alone = {backend, NULL}, threaded = {backend, &two};
        uint64_t hash = CHECK_HASH_EMPTY;
        for (size_t i = 0; i < n_cases; i++) {
            const lmc_context_t *context = i % 2 ? &threaded : &alone;
            check_golden_case(context, &cases[i]);
            hash = hash_softmax(context, &cases[i], hash);
        }
        CHECK(hash == GOLDEN_SOFTMAX_HASH, "%s: the softmax of all cases has the hash %016llx", backend->name,
              (unsigned long long)hash);
    }
    golden_free(cases, n_cases);
}

/* Row kernels against the serial ones. */

#define BLOCK 67 /* four AVX-512 vectors and three elements */

static void check_sums(const void *row, lmc_dtype_t dtype, float maximum) {
    const lmc_backend_t *serial = lmc_backend_at(0), *backend;
    lmc_origin_t origin = lmc_origin(maximum);
    uint64_t expected = serial->rows[dtype].weight_sum(row, BLOCK, origin, row);
    for (size_t b = 1; (backend = check_backend(b)) != NULL; b++) {
        uint64_t found = backend->rows[dtype].weight_sum(row, BLOCK, origin, row);
        CHECK(found == expected, "%s: dtype %d, maximum %a", backend->name, (int)dtype, (double)maximum);
    }
}

static int is_above(float logit, float maximum) {
    return !(logit <= maximum);
}

/* All of float32 but for what thinning leaves out, at or below each maximum, in rows that are not aligned. */
static void check_float32_weights(uint32_t thinning) {
    static const float maxima[] = {0.0f,    1e-40f,   -1e-40f, 1.0f,     13.7f, -5.0f, 8192.0f,
                                   8193.0f, -8192.0f, -9e3f,   65504.0f, 3e38f, -3e38f};
    unsigned char buffer[4 * BLOCK + 1];
    for (size_t m = 0; m < sizeof maxima / sizeof *maxima; m++) {
        uint64_t bits = 0;
        while (bits < UINT64_C(1) << 32) {
            for (size_t i = 0; i < BLOCK; i++, bits += thinning) {
                float logit = lmc_float_of((uint32_t)bits);
                if (is_above(logit, maxima[m])) logit = -INFINITY;
                memcpy(buffer + 1 + 4 * i, &logit, 4);
            }
            check_sums(buffer + 1, LMC_FLOAT32, maxima[m]);
        }
    }
}

/* Where weights are more than the floor: 32 octaves below each maximum, by random steps. */
static void check_near_weights(uint32_t thinning) {
    uint64_t state = 1;
    float row[BLOCK];
    for (long round = 0; round < 3000000 / (long)thinning + 100; round++) {
        uint64_t r = check_random(&state);
        float maximum = (float)(int64_t)r * (r & 1 ? 0x1p-58f : 0x1p-49f);
        for (size_t i = 0; i < BLOCK; i++) {
            float below = (float)(check_random(&state) >> 32) * 0x1p-32f;
            row[i] = lmc_sub(maximum, lmc_mul(below, (r >> (i & 63) & 1) ? 24.0f : 1.0f));
        }
        check_sums(row, LMC_FLOAT32, maximum);
    }
}

static void check_short_weights(void) {
    static const float maxima[] = {0.0f, 6e-8f, 13.5f, -5.0f, 8192.0f, 9000.0f, -9000.0f, 65504.0f};
    unsigned char buffer[2 * BLOCK + 1];
    for (int d = LMC_FLOAT16; d <= LMC_BFLOAT16; d++) {
        for (size_t m = 0; m < sizeof maxima / sizeof *maxima; m++) {
            uint32_t bits = 0;
            while (bits < 65536) {
                for (size_t i = 0; i < BLOCK; i++, bits++) {
                    uint16_t element = (uint16_t)bits;
                    if (is_above(lmc_row_element(&element, 0, (lmc_dtype_t)d), maxima[m]))
                        element = d == LMC_FLOAT16 ? 0xFC00u : 0xFF80u;
                    memcpy(buffer + 1 + 2 * i, &element, 2);
                }
                check_sums(buffer + 1, (lmc_dtype_t)d, maxima[m]);
            }
        }
    }
}

/* Every place of rows of many lengths: the maximum, a NaN and the infinities are seen wherever they stand. */
static void check_maxima(const lmc_backend_t *backend) {
    static const uint32_t nan[] = {0x7FC00000u, 0x7E00u, 0x7FC0u},
                          infinity[] = {0x7F800000u, 0x7C00u, 0x7F80u};
    static const uint32_t two[] = {0x40000000u, 0x4000u, 0x4000u}, sign[] = {0x80000000u, 0x8000u, 0x8000u};
    for (int d = 0; d < LMC_DTYPE_COUNT; d++) {
        size_t element_bytes = lmc_dtype_bytes((lmc_dtype_t)d);
        for (size_t n = 1; n <= 140; n += n < 70 ? 1 : 23) {
            for (size_t place = 0; place < n; place++) {
                unsigned char row[4 * 140];
                uint32_t contents[4] = {two[d], nan[d], infinity[d], sign[d] | infinity[d]};
                for (int k = 0; k < 4; k++) {
                    uint16_t short_bits = (uint16_t)contents[k];
                    int has_nan = 0;
                    memset(row, 0, sizeof row);
                    memcpy(row + place * element_bytes,
                           element_bytes == 4 ? (void *)&contents[k] : (void *)&short_bits, element_bytes);
                    float maximum = backend->rows[d].maximum(row, n, &has_nan);
                    CHECK(!has_nan == (k != 1), "%s: dtype %d, n %zu, place %zu", backend->name, d, n, place);
                    float expected = k == 0 ? 2.0f : k == 2 ? INFINITY : k == 3 && n == 1 ? -INFINITY : 0.0f;
                    CHECK(k == 1 || maximum == expected, "%s: dtype %d, n %zu, place %zu", backend->name, d,
                          n, place);
                }
            }
        }
    }
}

/* Streams over the pool. */

#define N_STREAMS 37
#define N_STEPS 12

typedef struct stream_test {
    lmc_context_t context;
    uint64_t seed;
    size_t vocab_size;
} stream_test_t;

typedef struct stream_buffers {
    float *logits; /* [N_STEPS][N_STREAMS][vocab_size] */
    int64_t tokens[N_STEPS][N_STREAMS];
    unsigned char active[N_STEPS][N_STREAMS];
    uint8_t bytes[N_STREAMS][(N_STEPS + 1) * LMC_STEP_BYTES_MAX];
    lmc_encoder_t encoders[N_STREAMS];
    lmc_decoder_t decoders[N_STREAMS];
} stream_buffers_t;

static lmc_rows_t step_rows(const stream_buffers_t *s, size_t step, size_t vocab_size) {
    const float *first = s->logits + step * N_STREAMS * vocab_size;
    return (lmc_rows_t){first, (ptrdiff_t)(4 * vocab_size), N_STREAMS, vocab_size, LMC_FLOAT32};
}

static void fill_streams(stream_buffers_t *s, const stream_test_t *test) {
    uint64_t state = test->seed;
    for (size_t i = 0; i < N_STEPS * N_STREAMS * test->vocab_size; i++)
        s->logits[i] = (float)(check_random(&state) >> 40) * 0x1p-20f;
    for (size_t i = 0; i < N_STEPS * N_STREAMS; i++) {
        (&s->tokens[0][0])[i] = (int64_t)(check_random(&state) % test->vocab_size);
        (&s->active[0][0])[i] = check_random(&state) % 4 != 0;
    }
}

static void encode_streams(stream_buffers_t *s, const stream_test_t *test) {
    uint64_t start[N_STREAMS], freq[N_STREAMS], total[N_STREAMS];
    size_t error;
    for (size_t i = 0; i < N_STREAMS; i++)
        lmc_encoder_init(&s->encoders[i], s->bytes[i], sizeof s->bytes[i]);
    for (size_t step = 0; step < N_STEPS; step++) {
        lmc_rows_t rows = step_rows(s, step, test->vocab_size);
        lmc_status_t status = lmc_intervals(&test->context, &rows, s->tokens[step], s->active[step], start,
                                            freq, total, &error);
        CHECK(status == LMC_OK, "%s", lmc_status_message(status));
        for (size_t i = 0; i < N_STREAMS; i++) {
            if (s->active[step][i])
                status = lmc_encoder_put(&s->encoders[i], 1, &start[i], &freq[i], &total[i], &error);
            else
                CHECK(start[i] == 0 && freq[i] == 0 && total[i] == 0, "stream %zu", i);
            CHECK(status == LMC_OK, "%s", lmc_status_message(status));
        }
    }
    for (size_t i = 0; i < N_STREAMS; i++)
        CHECK(lmc_encoder_end(&s->encoders[i]) == LMC_OK, "stream %zu", i);
}

static void decode_streams(stream_buffers_t *s, const stream_test_t *test) {
    const lmc_executor_t *executor = test->context.executor;
    lmc_search_t *searches = check_malloc((executor == NULL ? 1 : executor->n_slots) * sizeof *searches);
    int32_t tokens[N_STREAMS];
    size_t error;
    for (size_t i = 0; i < N_STREAMS; i++)
        lmc_decoder_init(&s->decoders[i], s->bytes[i], s->encoders[i].n_bytes);
    for (size_t step = 0; step < N_STEPS; step++) {
        lmc_rows_t rows = step_rows(s, step, test->vocab_size);
        lmc_status_t status =
            lmc_decode_step(&test->context, &rows, s->active[step], s->decoders, searches, tokens, &error);
        CHECK(status == LMC_OK, "%s", lmc_status_message(status));
        for (size_t i = 0; i < N_STREAMS; i++) {
            int64_t expected = s->active[step][i] ? s->tokens[step][i] : -1;
            CHECK(tokens[i] == expected, "%s: step %zu, stream %zu, vocabulary %zu", name_of(&test->context),
                  step, i, test->vocab_size);
        }
    }
    free(searches);
}

static void *run_streams(void *argument) {
    const stream_test_t *test = (const stream_test_t *)argument;
    stream_buffers_t *s = check_malloc(sizeof *s);
    s->logits = check_malloc(N_STEPS * N_STREAMS * test->vocab_size * sizeof(float));
    fill_streams(s, test);
    encode_streams(s, test);
    decode_streams(s, test);
    free(s->logits);
    free(s);
    return NULL;
}

static void check_streams(void) {
    static const size_t vocab_sizes[] = {1, 3, 64, 65, 1024, 2300};
    lmc_executor_t executors[] = {lmc_executor_threads(1), lmc_executor_threads(2), lmc_executor_threads(5)};
    const lmc_backend_t *backend;
    for (size_t b = 0; (backend = check_backend(b)) != NULL; b++) {
        for (size_t v = 0; v < sizeof vocab_sizes / sizeof *vocab_sizes; v++) {
            for (size_t e = 0; e < 4; e++) {
                stream_test_t test = {{backend, e < 3 ? &executors[e] : NULL}, 100 * v + e, vocab_sizes[v]};
                run_streams(&test);
            }
        }
    }
}

/* Callers that meet in the pool: one has it, the others work alone. */
static void check_many_callers(void) {
    lmc_executor_t three = lmc_executor_threads(3);
    const lmc_backend_t *fastest = lmc_backend_at(lmc_backend_count() - 1);
    stream_test_t tests[6];
    pthread_t threads[6];
    for (size_t i = 0; i < 6; i++) {
        tests[i] = (stream_test_t){{fastest, &three}, 900 + i, 1500};
        if (pthread_create(&threads[i], NULL, run_streams, &tests[i]) != 0) abort();
    }
    for (size_t i = 0; i < 6; i++)
        pthread_join(threads[i], NULL);
}

/* A child of fork has none of the pool's threads and starts its own. */
static void check_fork(void) {
    lmc_executor_t two = lmc_executor_threads(2);
    stream_test_t test = {{lmc_backend_at(0), &two}, 7, 200};
    int status = -1;
    run_streams(&test);
    pid_t child = fork();
    if (child == 0) {
        run_streams(&test);
        exit(check_failures != 0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with status %d", status);
    run_streams(&test);
}

/* The float state of the caller. */

#define STATE_ROW 40

/* The three numbers of the interval, and the bits of the softmax. */
static void state_case(const lmc_backend_t *backend, uint64_t numbers[4]) {
    float row[STATE_ROW];
    lmc_rows_t rows = {row, sizeof row, 1, STATE_ROW, LMC_FLOAT32};
    lmc_context_t context = {backend, NULL};
    int64_t token = STATE_ROW - 2;
    size_t error;
    double softmax;
    for (uint32_t i = 0; i < STATE_ROW; i++) /* denormals, and numbers whose weights have to be rounded */
        row[i] = lmc_float_of(i % 2 ? 0x00400000u - i : 0xBE000000u + 0x10003u * i);
    CHECK(lmc_intervals(&context, &rows, &token, NULL, numbers, numbers + 1, numbers + 2, &error) == LMC_OK,
          "row");
    CHECK(lmc_log2_softmax(&context, &rows, &token, &softmax, &error) == LMC_OK, "row");
    memcpy(&numbers[3], &softmax, sizeof softmax);
}

static void check_float_state(void) {
    const lmc_backend_t *backend;
    uint64_t expected[4], found[4];
    state_case(lmc_backend_at(0), expected);
    for (size_t b = 0; (backend = check_backend(b)) != NULL; b++) {
        fesetround(FE_UPWARD);
        state_case(backend, found);
        CHECK(fegetround() == FE_UPWARD, "%s: the caller's rounding is given back", backend->name);
        fesetround(FE_TONEAREST);
        CHECK(memcmp(found, expected, sizeof found) == 0, "%s: rounding upward", backend->name);
#if defined(__x86_64__)
        _mm_setcsr(_mm_getcsr() | 0x8040u);                /* flush to zero, denormals are zero */
        if ((_mm_getcsr() & 0x8040u) != 0x8040u) continue; /* Valgrind has no such state */
        state_case(backend, found);
        CHECK((_mm_getcsr() & 0x8040u) == 0x8040u, "%s: the caller's state is given back", backend->name);
        _mm_setcsr(_mm_getcsr() & ~0x8040u);
        CHECK(memcmp(found, expected, sizeof found) == 0, "%s: flush to zero", backend->name);
        _mm_setcsr(_mm_getcsr() & ~0x1F80u); /* all traps */
        state_case(backend, found);
        CHECK((_mm_getcsr() & 0x1F80u) == 0, "%s: the caller's traps are given back", backend->name);
        _mm_setcsr(0x1F80u);
        CHECK(memcmp(found, expected, sizeof found) == 0, "%s: traps", backend->name);
#endif
    }
}

#if defined(__x86_64__)
static void start_task(void *argument, size_t task, size_t slot) {
    (void)argument, (void)task, (void)slot;
}
#endif

/* Workers are born with the state of the thread that starts them, here of the first call with so many
 * threads. */
static void check_float_state_of_workers(void) {
#if defined(__x86_64__)
    lmc_executor_t many = lmc_executor_threads(40);
    stream_test_t test = {{lmc_backend_at(lmc_backend_count() - 1), &many}, 31, 4000};
    unsigned saved = _mm_getcsr();
    _mm_setcsr((saved & ~0x1F80u) | 0x4000u); /* all traps, rounding upward */
    many.run(&many, many.n_slots, start_task, NULL);
    _mm_setcsr(saved);
    run_streams(&test);
#endif
}

/* Errors. */

/* Rows 2 and 4 of 6 have no distribution: the first of them is named. */
static void check_row_errors(const lmc_context_t *context, lmc_search_t *searches) {
    float logits[6][100];
    uint64_t start[6], freq[6], total[6];
    double softmax[6];
    int64_t tokens[6] = {0};
    int32_t decoded[6];
    lmc_decoder_t decoders[6];
    const struct {
        float logit;
        lmc_status_t status;
    } faults[] = {
        {NAN, LMC_ERROR_NAN}, {INFINITY, LMC_ERROR_POSITIVE_INFINITY}, {-INFINITY, LMC_ERROR_NO_SYMBOL}};
    for (size_t f = 0; f < 3; f++) {
        lmc_rows_t rows = {logits, sizeof logits[0], 6, 100, LMC_FLOAT32};
        size_t error = 99;
        memset(logits, 0, sizeof logits);
        for (size_t i = 0; i < 100; i++)
            logits[2][i] = logits[4][i] = faults[f].logit;
        lmc_status_t status = lmc_intervals(context, &rows, tokens, NULL, start, freq, total, &error);
        CHECK(status == faults[f].status && error == 2, "status %d at row %zu", (int)status, error);
        error = 99;
        status = lmc_log2_softmax(context, &rows, tokens, softmax, &error);
        CHECK(status == faults[f].status && error == 2, "status %d at row %zu", (int)status, error);
        for (size_t i = 0; i < 6; i++)
            lmc_decoder_init(&decoders[i], (const uint8_t *)"\x80", 1);
        error = 99;
        status = lmc_decode_step(context, &rows, NULL, decoders, searches, decoded, &error);
        CHECK(status == faults[f].status && error == 2, "status %d at row %zu", (int)status, error);
        lmc_decoder_init(&decoders[0], (const uint8_t *)"\x80", 1);
        status = lmc_decode_stream(context, &rows, &decoders[0], searches, decoded, &error);
        CHECK(status == faults[f].status && error == 2, "status %d at row %zu", (int)status, error);
    }
}

/* Tokens beside the vocabulary, and vocabularies beside what is allowed. */
static void check_range_errors(const lmc_context_t *context, lmc_search_t *searches) {
    static const float logits[6][100];
    uint64_t start[6], freq[6], total[6];
    double softmax[6];
    int64_t tokens[6] = {0};
    int32_t decoded[6];
    lmc_decoder_t decoders[6];
    lmc_rows_t rows = {logits, sizeof logits[0], 6, 100, LMC_FLOAT32};
    for (size_t i = 0; i < 6; i++)
        lmc_decoder_init(&decoders[i], (const uint8_t *)"\x80", 1);
    for (int i = 0; i < 2; i++) {
        size_t error = 99;
        tokens[3] = i == 0 ? -1 : 100;
        lmc_status_t status = lmc_intervals(context, &rows, tokens, NULL, start, freq, total, &error);
        CHECK(status == LMC_ERROR_TOKEN && error == 3, "status %d at row %zu", (int)status, error);
        error = 99;
        status = lmc_log2_softmax(context, &rows, tokens, softmax, &error);
        CHECK(status == LMC_ERROR_TOKEN && error == 3, "status %d at row %zu", (int)status, error);
        rows.vocab_size = i == 0 ? 0 : LMC_VOCAB_SIZE_MAX + 1;
        CHECK(lmc_intervals(context, &rows, tokens, NULL, start, freq, total, &error) == LMC_ERROR_VOCAB_SIZE,
              " ");
        CHECK(lmc_log2_softmax(context, &rows, tokens, softmax, &error) == LMC_ERROR_VOCAB_SIZE, " ");
        CHECK(lmc_decode_step(context, &rows, NULL, decoders, searches, decoded, &error) ==
                  LMC_ERROR_VOCAB_SIZE,
              " ");
        CHECK(lmc_decode_stream(context, &rows, decoders, searches, decoded, &error) == LMC_ERROR_VOCAB_SIZE,
              " ");
        rows.vocab_size = 100;
    }
}

static void check_input_errors(const lmc_context_t *context) {
    lmc_search_t *searches = check_malloc(8 * sizeof *searches);
    check_row_errors(context, searches);
    check_range_errors(context, searches);
    free(searches);
}

static void check_coder_errors(void) {
    uint8_t bytes[20];
    uint64_t start[2] = {0, 1}, freq[2] = {1, 1}, total[2] = {3, 3}, value;
    size_t error = 99;
    lmc_encoder_t encoder;
    lmc_decoder_t decoder;
    lmc_encoder_init(&encoder, bytes, 15);
    CHECK(lmc_encoder_put(&encoder, 2, start, freq, total, &error) == LMC_ERROR_CAPACITY,
          "15 bytes for two symbols");
    lmc_encoder_init(&encoder, bytes, 7);
    CHECK(lmc_encoder_end(&encoder) == LMC_ERROR_CAPACITY, "7 bytes for the end");
    const uint64_t bad[][3] = {{1, 0, 3},         {3, 1, 3}, {2, 2, 3}, {0, 1, 0}, {0, 1, LMC_TOTAL_MAX + 1},
                               {2, UINT64_MAX, 3}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        start[1] = bad[i][0], freq[1] = bad[i][1], total[1] = bad[i][2];
        lmc_encoder_init(&encoder, bytes, sizeof bytes);
        CHECK(lmc_encoder_put(&encoder, 2, start, freq, total, &error) == LMC_ERROR_INTERVAL && error == 1,
              "case %zu", i);
        CHECK(encoder.n_bytes == 0 && encoder.low == 0 && encoder.range == UINT64_MAX, "nothing is coded");
        lmc_decoder_init(&decoder, bytes, 0);
        CHECK(lmc_decoder_take(&decoder, start[1], freq[1], total[1]) == LMC_ERROR_INTERVAL, "case %zu", i);
    }
    lmc_decoder_init(&decoder, (const uint8_t *)"\x80", 1);
    CHECK(lmc_decoder_value(&decoder, 0, &value) == LMC_ERROR_INTERVAL, "total 0");
    CHECK(lmc_decoder_value(&decoder, LMC_TOTAL_MAX + 1, &value) == LMC_ERROR_INTERVAL, "total above 2^51");
    CHECK(lmc_decoder_value(&decoder, 3, &value) == LMC_OK && value == 1, "half of three");
    CHECK(lmc_decoder_take(&decoder, 2, 1, 3) == LMC_ERROR_INTERVAL,
          "an interval that does not hold the value");
    CHECK(lmc_decoder_take(&decoder, 0, 1, 3) == LMC_ERROR_INTERVAL,
          "an interval that does not hold the value");
    CHECK(lmc_decoder_take(&decoder, 1, 1, 3) == LMC_OK, "the right one");
}

static void check_dispatch(void) {
    size_t n = lmc_backend_count();
    CHECK(n >= 1 && lmc_backend_at(n) == NULL, "%zu backends", n);
    CHECK(lmc_backend_find("serial") == lmc_backend_at(0), "serial is the first");
    CHECK(lmc_backend_find("none such") == NULL, "an unknown name");
    CHECK(lmc_executor_threads(0).n_slots == 1, "at least one thread");
    CHECK(lmc_executor_threads(SIZE_MAX).n_slots == 256, "at most 256 threads");
    for (int status = LMC_OK; status <= LMC_ERROR_ARGUMENT + 1; status++) {
        const char *message = lmc_status_message((lmc_status_t)status);
        CHECK(message != NULL && strlen(message) > 5, "status %d", status);
    }
}

int main(int n_arguments, char **arguments) {
    if (n_arguments < 2) {
        fprintf(stderr, "usage: self_check GOLDEN_FILE [THINNING [no-fork]]\n");
        return 2;
    }
    int thinning = n_arguments > 2 ? atoi(arguments[2]) : 1;
    lmc_executor_t four = lmc_executor_threads(4);
    const lmc_backend_t *backend;
    check_dispatch();
    if (n_arguments < 4) check_fork();
    check_golden(arguments[1]);
    check_float32_weights(1021u * (uint32_t)thinning);
    check_near_weights((uint32_t)thinning);
    check_short_weights();
    check_streams();
    check_many_callers();
    check_float_state_of_workers();
    check_float_state();
    check_coder_errors();
    printf("self_check:");
    for (size_t b = 0; (backend = check_backend(b)) != NULL; b++) {
        lmc_context_t alone = {backend, NULL}, threaded = {backend, &four};
        check_maxima(backend);
        check_input_errors(&alone);
        check_input_errors(&threaded);
        printf(" %s,", lmc_backend_name(backend));
    }
    printf(" %ld failures\n", (long)check_failures);
    return check_failures != 0;
}

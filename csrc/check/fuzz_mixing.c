/* libFuzzer target: any payload decoded with a mixer and any finite logits. Another backend gives the same
 * tokens as serial, an encoder of these tokens gives intervals that fit the coder, and what it writes decodes
 * to them again, on that backend. */
#include "fuzz_input.h"

#include "core/coding/row_element.h"
#include "llmcomp/coder.h"
#include "llmcomp/mixing.h"

/* Most streams are short, for the sake of many executions: 32 tokens have contexts of every order twice. One
 * in LARGE_EVERY has so many symbols that they collide where a row's symbols are looked up. */
#define TOKENS_MAX 64
#define VOCAB_SIZE_MAX 130
#define TOKENS_FEW 32
#define VOCAB_SIZE_SMALL 20
#define LARGE_EVERY 64

/* The rows of a few positions, one after the other and from the start again. */
typedef struct rows_source {
    const float *logits;
    size_t n_rows, vocab_size;
} rows_source_t;

static lmc_rows_t row_of(const rows_source_t *source, size_t position) {
    const float *row = source->logits + position % source->n_rows * source->vocab_size;
    return (lmc_rows_t){row, (ptrdiff_t)(source->vocab_size * sizeof *row), 1, source->vocab_size,
                        LMC_FLOAT32};
}

static lmc_mixer_t *begin_mixer(void *memory, size_t n_tokens_max) {
    lmc_mixer_t *mixer = NULL;
    FUZZ_ASSERT(lmc_mixer_begin(memory, lmc_mixer_bound(n_tokens_max), n_tokens_max, &mixer) == LMC_OK);
    return mixer;
}

static void decode_tokens(const lmc_backend_t *backend, const rows_source_t *source, const uint8_t *bytes,
                          size_t n_bytes, void *memory, size_t n_tokens, int32_t *tokens) {
    static lmc_search_t search;
    lmc_context_t context = {backend, NULL};
    lmc_mixer_t *mixer = begin_mixer(memory, n_tokens);
    lmc_decoder_t decoder;
    size_t error_row = 0;
    lmc_decoder_init(&decoder, bytes, n_bytes);
    for (size_t i = 0; i < n_tokens; i++) {
        lmc_rows_t row = row_of(source, i);
        FUZZ_ASSERT(lmc_mixed_decode_step(&context, &row, NULL, &decoder, &mixer, &search, &tokens[i],
                                          &error_row) == LMC_OK);
        FUZZ_ASSERT(tokens[i] >= 0 && (size_t)tokens[i] < source->vocab_size);
    }
    lmc_rows_t row = row_of(source, 0);
    int32_t more;
    FUZZ_ASSERT(lmc_mixed_decode_step(&context, &row, NULL, &decoder, &mixer, &search, &more, &error_row) ==
                LMC_ERROR_CAPACITY);
}

static void encode_and_decode(const lmc_backend_t *decoding, const rows_source_t *source,
                              const int32_t *tokens, void *memory, size_t n_tokens) {
    static uint8_t bytes[(TOKENS_MAX + 1) * LMC_STEP_BYTES_MAX];
    lmc_context_t context = {lmc_backend_at(0), NULL};
    lmc_mixer_t *mixer = begin_mixer(memory, n_tokens);
    lmc_encoder_t encoder;
    size_t error = 0;
    int32_t again[TOKENS_MAX];
    lmc_encoder_init(&encoder, bytes, sizeof bytes);
    for (size_t i = 0; i < n_tokens; i++) {
        lmc_rows_t row = row_of(source, i);
        int64_t token = tokens[i];
        uint64_t start, freq, total;
        FUZZ_ASSERT(lmc_intervals(&context, &row, &token, NULL, &start, &freq, &total, &error) == LMC_OK);
        FUZZ_ASSERT(lmc_mixer_encode(mixer, 1, &token, &start, &freq, &total, &error) == LMC_OK);
        FUZZ_ASSERT(lmc_encoder_put(&encoder, 1, &start, &freq, &total, &error) == LMC_OK);
    }
    FUZZ_ASSERT(lmc_encoder_end(&encoder) == LMC_OK);
    decode_tokens(decoding, source, bytes, encoder.n_bytes, memory, n_tokens, again);
    FUZZ_ASSERT(memcmp(again, tokens, n_tokens * sizeof *tokens) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes) {
    fuzz_input_t input = {data, n_bytes};
    unsigned kind = (unsigned)fuzz_take(&input, 1);
    int is_large = kind % LARGE_EVERY == LARGE_EVERY - 1;
    const lmc_backend_t *other = lmc_backend_at(kind / LARGE_EVERY % lmc_backend_count());
    size_t vocab_size = fuzz_take(&input, 1) % (is_large ? VOCAB_SIZE_MAX : VOCAB_SIZE_SMALL) + 1;
    size_t n_tokens = fuzz_take(&input, 1) % (is_large ? TOKENS_MAX : TOKENS_FEW) + 1;
    unsigned shape = (unsigned)fuzz_take(&input, 1);
    size_t n_rows = shape % 3 + 1;
    float *logits = malloc(n_rows * vocab_size * sizeof *logits);
    void *memory = malloc(lmc_mixer_bound(n_tokens));
    FUZZ_ASSERT(logits != NULL && memory != NULL);
    for (size_t i = 0; i < n_rows * vocab_size; i++)
        logits[i] = (float)((int)fuzz_take(&input, 1) - 128) / (float)(1u << shape / 3 % 4 * 2);
    rows_source_t source = {logits, n_rows, vocab_size};
    int32_t expected[TOKENS_MAX], tokens[TOKENS_MAX];
    decode_tokens(lmc_backend_at(0), &source, input.bytes, input.n_bytes, memory, n_tokens, expected);
    decode_tokens(other, &source, input.bytes, input.n_bytes, memory, n_tokens, tokens);
    FUZZ_ASSERT(memcmp(expected, tokens, n_tokens * sizeof *tokens) == 0);
    encode_and_decode(other, &source, expected, memory, n_tokens);
    free(logits), free(memory);
    return 0;
}

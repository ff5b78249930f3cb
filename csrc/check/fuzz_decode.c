/* libFuzzer target: any payload with any logits, NaN and infinities among them. Every backend gives the same
 * tokens, or the same error at the same row; the rows lie in memory of just their size, so that a read past
 * them is seen. */
#include "fuzz_input.h"

#include "core/coding/row_element.h"
#include "llmcomp/coder.h"

#define ROWS_MAX 6
#define VOCAB_SIZE_MAX 260

typedef struct outcome {
    lmc_status_t status;
    size_t error_row;
    int32_t tokens[ROWS_MAX];
} outcome_t;

static outcome_t decode_one_stream(const lmc_context_t *context, const lmc_rows_t *rows, fuzz_input_t payload,
                                   lmc_search_t *search) {
    outcome_t outcome = {LMC_OK, 0, {0}};
    lmc_decoder_t decoder;
    lmc_decoder_init(&decoder, payload.bytes, payload.n_bytes);
    outcome.status = lmc_decode_stream(context, rows, &decoder, search, outcome.tokens, &outcome.error_row);
    for (size_t i = 0; i < rows->n_rows && outcome.status == LMC_OK; i++)
        FUZZ_ASSERT(outcome.tokens[i] >= 0 && (size_t)outcome.tokens[i] < rows->vocab_size);
    for (size_t i = outcome.error_row; i < ROWS_MAX; i++)
        outcome.tokens[i] = 0;
    return outcome;
}

/* Stream i reads the payload from its byte i on. */
static outcome_t decode_a_step(const lmc_context_t *context, const lmc_rows_t *rows, fuzz_input_t payload,
                               const unsigned char *active, lmc_search_t *search) {
    outcome_t outcome = {LMC_OK, 0, {0}};
    lmc_decoder_t decoders[ROWS_MAX];
    for (size_t i = 0; i < rows->n_rows; i++) {
        size_t skipped = i < payload.n_bytes ? i : payload.n_bytes;
        lmc_decoder_init(&decoders[i], payload.bytes + skipped, payload.n_bytes - skipped);
    }
    outcome.status =
        lmc_decode_step(context, rows, active, decoders, search, outcome.tokens, &outcome.error_row);
    for (size_t i = 0; i < rows->n_rows && outcome.status == LMC_OK; i++) {
        FUZZ_ASSERT(active[i] ? outcome.tokens[i] >= 0 : outcome.tokens[i] == -1);
        FUZZ_ASSERT(outcome.tokens[i] < (int64_t)rows->vocab_size);
    }
    return outcome;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes) {
    fuzz_input_t input = {data, n_bytes};
    static lmc_search_t search;
    unsigned char active[ROWS_MAX];
    lmc_dtype_t dtype = (lmc_dtype_t)(fuzz_take(&input, 1) % LMC_DTYPE_COUNT);
    size_t vocab_size = fuzz_take(&input, 2) % VOCAB_SIZE_MAX + 1,
           n_rows = fuzz_take(&input, 1) % (ROWS_MAX + 1);
    size_t row_bytes = vocab_size * lmc_dtype_bytes(dtype);
    for (size_t i = 0; i < ROWS_MAX; i++)
        active[i] = fuzz_take(&input, 1) & 1;
    unsigned char *logits = malloc(n_rows * row_bytes + 1);
    FUZZ_ASSERT(logits != NULL);
    fuzz_take_bytes(&input, logits, n_rows * row_bytes);
    lmc_rows_t rows = {logits, (ptrdiff_t)row_bytes, n_rows, vocab_size, dtype};
    outcome_t stream_expected = {LMC_OK, 0, {0}}, step_expected = {LMC_OK, 0, {0}};
    for (size_t b = 0; b < lmc_backend_count(); b++) {
        lmc_context_t context = {lmc_backend_at(b), NULL};
        outcome_t stream = decode_one_stream(&context, &rows, input, &search);
        outcome_t step = decode_a_step(&context, &rows, input, active, &search);
        if (b == 0) stream_expected = stream, step_expected = step;
        FUZZ_ASSERT(stream.status == stream_expected.status && stream.error_row == stream_expected.error_row);
        FUZZ_ASSERT(memcmp(stream.tokens, stream_expected.tokens, sizeof stream.tokens) == 0);
        FUZZ_ASSERT(step.status == step_expected.status && step.error_row == step_expected.error_row);
        FUZZ_ASSERT(memcmp(step.tokens, step_expected.tokens, n_rows * sizeof *step.tokens) == 0);
    }
    free(logits);
    return 0;
}

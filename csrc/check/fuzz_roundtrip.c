/* libFuzzer target: tokens under any logits, and any valid intervals, are coded and come back; the payload is
 * as short as promised, and every backend has the same intervals, or the same error at the same row. */
#include "fuzz_input.h"

#include <math.h>

#include "core/coding/row_element.h"
#include "llmcomp/coder.h"

#define ROWS_MAX 8
#define VOCAB_SIZE_MAX 140
#define SYMBOLS_MAX 40

typedef struct message {
    uint64_t start[SYMBOLS_MAX], freq[SYMBOLS_MAX], total[SYMBOLS_MAX];
    size_t n_symbols;
    uint8_t payload[(SYMBOLS_MAX + 1) * LMC_STEP_BYTES_MAX];
    size_t payload_bytes;
} message_t;

static void encode(message_t *message) {
    lmc_encoder_t encoder;
    size_t error;
    double ideal_bits = 0;
    lmc_encoder_init(&encoder, message->payload, sizeof message->payload);
    FUZZ_ASSERT(lmc_encoder_put(&encoder, message->n_symbols, message->start, message->freq, message->total,
                                &error) == LMC_OK);
    FUZZ_ASSERT(lmc_encoder_end(&encoder) == LMC_OK);
    message->payload_bytes = encoder.n_bytes;
    FUZZ_ASSERT(encoder.n_bytes == 0 || message->payload[encoder.n_bytes - 1] != 0);
    /* range_coder.h: a symbol costs at most log2(1 / (1 - total / range)) <= 1.5 * total / 2^56 bits too
     * much. */
    for (size_t i = 0; i < message->n_symbols; i++) {
        ideal_bits += log2((double)message->total[i] / (double)message->freq[i]);
        ideal_bits += 1.5 * (double)message->total[i] * 0x1p-56;
    }
    FUZZ_ASSERT(8.0 * (double)encoder.n_bytes <= ideal_bits + 9);
}

static void decode_intervals(const message_t *message) {
    lmc_decoder_t decoder;
    uint64_t value;
    lmc_decoder_init(&decoder, message->payload, message->payload_bytes);
    for (size_t i = 0; i < message->n_symbols; i++) {
        FUZZ_ASSERT(lmc_decoder_value(&decoder, message->total[i], &value) == LMC_OK);
        FUZZ_ASSERT(value >= message->start[i] && value - message->start[i] < message->freq[i]);
        FUZZ_ASSERT(lmc_decoder_take(&decoder, message->start[i], message->freq[i], message->total[i]) ==
                    LMC_OK);
    }
}

static void check_intervals(fuzz_input_t *input) {
    message_t message = {.n_symbols = fuzz_take(input, 1) % (SYMBOLS_MAX + 1)};
    for (size_t i = 0; i < message.n_symbols; i++) {
        /* The byte chooses how many bits the numbers have; one of the last symbols is what makes carries run.
         */
        uint64_t shape = fuzz_take(input, 1), mask = LMC_TOTAL_MAX >> shape % 51;
        message.total[i] = fuzz_take(input, 7) % mask + 1;
        message.start[i] = shape >= 128 ? message.total[i] - 1 : fuzz_take(input, 7) % message.total[i];
        message.freq[i] = fuzz_take(input, 2) % (message.total[i] - message.start[i]) + 1;
        if (shape % 4 == 1) message.freq[i] = message.total[i] - message.start[i];
    }
    encode(&message);
    decode_intervals(&message);
}

static void check_rows(fuzz_input_t *input) {
    static lmc_search_t search;
    lmc_dtype_t dtype = (lmc_dtype_t)(fuzz_take(input, 1) % LMC_DTYPE_COUNT);
    size_t vocab_size = fuzz_take(input, 1) % VOCAB_SIZE_MAX + 1,
           n_rows = fuzz_take(input, 1) % (ROWS_MAX + 1);
    size_t row_bytes = vocab_size * lmc_dtype_bytes(dtype);
    int64_t tokens[ROWS_MAX];
    int32_t decoded[ROWS_MAX];
    for (size_t i = 0; i < n_rows; i++)
        tokens[i] = (int64_t)(fuzz_take(input, 1) % (vocab_size + 1)) - (fuzz_take(input, 1) == 7);
    unsigned char *logits = malloc(n_rows * row_bytes + 1);
    FUZZ_ASSERT(logits != NULL);
    fuzz_take_bytes(input, logits, n_rows * row_bytes);
    lmc_rows_t rows = {logits, (ptrdiff_t)row_bytes, n_rows, vocab_size, dtype};
    lmc_status_t first_status = LMC_OK;
    message_t first = {.n_symbols = 0};
    size_t first_error = 0;
    for (size_t b = 0; b < lmc_backend_count(); b++) {
        lmc_context_t context = {lmc_backend_at(b), NULL};
        message_t message = {.n_symbols = n_rows};
        size_t error_row = 0;
        lmc_status_t status = lmc_intervals(&context, &rows, tokens, NULL, message.start, message.freq,
                                            message.total, &error_row);
        if (b == 0) first_status = status, first_error = error_row, first = message;
        FUZZ_ASSERT(status == first_status && error_row == first_error);
        if (status != LMC_OK) continue;
        FUZZ_ASSERT(memcmp(message.start, first.start, sizeof first.start) == 0);
        FUZZ_ASSERT(memcmp(message.freq, first.freq, sizeof first.freq) == 0);
        FUZZ_ASSERT(memcmp(message.total, first.total, sizeof first.total) == 0);
        encode(&message);
        lmc_decoder_t decoder;
        lmc_decoder_init(&decoder, message.payload, message.payload_bytes);
        FUZZ_ASSERT(lmc_decode_stream(&context, &rows, &decoder, &search, decoded, &error_row) == LMC_OK);
        for (size_t i = 0; i < n_rows; i++)
            FUZZ_ASSERT(decoded[i] == tokens[i]);
    }
    free(logits);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes) {
    fuzz_input_t input = {data, n_bytes};
    if (fuzz_take(&input, 1) & 1)
        check_rows(&input);
    else
        check_intervals(&input);
    return 0;
}

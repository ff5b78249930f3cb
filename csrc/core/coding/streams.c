/* The batch loops over range-coder streams. */
#include "llmcomp/coder.h"

#include "core/coding/row_kernels.h"
#include "core/base/parallel.h"
#include "core/coding/range_coder.h"

void lmc_encoder_init(lmc_encoder_t *encoder, uint8_t *bytes, size_t capacity_bytes) {
    lmc_range_begin_encoder(encoder, bytes, capacity_bytes);
}

lmc_status_t lmc_encoder_put(lmc_encoder_t *encoder, size_t n, const uint64_t *start, const uint64_t *freq,
                             const uint64_t *total, size_t *error_index) {
    if ((encoder->capacity_bytes - encoder->n_bytes) / LMC_STEP_BYTES_MAX < n) return LMC_ERROR_CAPACITY;
    for (size_t i = 0; i < n; i++) {
        if (lmc_interval_is_valid(start[i], freq[i], total[i])) continue;
        *error_index = i;
        return LMC_ERROR_INTERVAL;
    }
    lmc_encoder_t state = *encoder; /* a copy that no byte written can alias */
    for (size_t i = 0; i < n; i++) {
        uint64_t below = start[i], share = freq[i], whole = total[i];
        /* Only of a caller who changes his arrays meanwhile: his stream is lost, but nothing is divided by 0.
         */
        if (!lmc_interval_is_valid(below, share, whole)) return LMC_ERROR_INTERVAL;
        lmc_range_put(&state, below, share, whole);
    }
    *encoder = state;
    return LMC_OK;
}

lmc_status_t lmc_encoder_end(lmc_encoder_t *encoder) {
    if (encoder->capacity_bytes - encoder->n_bytes < LMC_STEP_BYTES_MAX) return LMC_ERROR_CAPACITY;
    lmc_range_end(encoder);
    return LMC_OK;
}

void lmc_decoder_init(lmc_decoder_t *decoder, const uint8_t *bytes, size_t n_bytes) {
    lmc_range_begin_decoder(decoder, bytes, n_bytes);
}

lmc_status_t lmc_decoder_value(const lmc_decoder_t *decoder, uint64_t total, uint64_t *value) {
    if (total == 0 || total > LMC_TOTAL_MAX) return LMC_ERROR_INTERVAL;
    *value = lmc_range_value(decoder, total);
    return LMC_OK;
}

lmc_status_t lmc_decoder_take(lmc_decoder_t *decoder, uint64_t start, uint64_t freq, uint64_t total) {
    if (!lmc_interval_is_valid(start, freq, total)) return LMC_ERROR_INTERVAL;
    uint64_t value = lmc_range_value(decoder, total);
    if (value < start || value - start >= freq) return LMC_ERROR_INTERVAL;
    lmc_range_take(decoder, start, freq, total);
    return LMC_OK;
}

static lmc_status_t decode_row(const lmc_backend_t *backend, const lmc_rows_t *rows, size_t i,
                               lmc_decoder_t *decoder, lmc_search_t *search, int32_t *token) {
    const void *row = (const unsigned char *)rows->data + (ptrdiff_t)i * rows->row_stride_bytes;
    lmc_status_t status = lmc_search_row(backend, row, rows->dtype, rows->vocab_size, search);
    if (status != LMC_OK) return status;
    uint64_t start, freq;
    uint64_t value = lmc_range_value(decoder, search->total);
    *token =
        (int32_t)lmc_search_find(backend, row, rows->dtype, rows->vocab_size, search, value, &start, &freq);
    /* Only the row of a caller who changes it meanwhile does not fit its own sums. */
    if (!lmc_interval_is_valid(start, freq, search->total)) return LMC_ERROR_INTERVAL;
    lmc_range_take(decoder, start, freq, search->total);
    return LMC_OK;
}

typedef struct decode_job {
    const lmc_backend_t *backend;
    const lmc_rows_t *rows;
    const unsigned char *active;
    lmc_decoder_t *decoders;
    lmc_search_t *searches;
    int32_t *tokens;
} decode_job_t;

#define TOKEN_INACTIVE (-1)
#define TOKEN_ERROR (-2)

static void decode_task(void *argument, size_t task_index, size_t slot) {
    const decode_job_t *job = (const decode_job_t *)argument;
    int32_t *token = &job->tokens[task_index];
    *token = TOKEN_INACTIVE;
    if (job->active != NULL && !job->active[task_index]) return;
    if (decode_row(job->backend, job->rows, task_index, &job->decoders[task_index], &job->searches[slot],
                   token) != LMC_OK) {
        *token = TOKEN_ERROR;
    }
}

lmc_status_t lmc_decode_step(const lmc_context_t *context, const lmc_rows_t *rows,
                             const unsigned char *active, lmc_decoder_t *decoders, lmc_search_t *searches,
                             int32_t *tokens, size_t *error_row) {
    if (rows->vocab_size == 0 || rows->vocab_size > LMC_VOCAB_SIZE_MAX) return LMC_ERROR_VOCAB_SIZE;
    decode_job_t job = {context->backend, rows, active, decoders, searches, tokens};
    lmc_run_tasks(context->executor, rows->n_rows, decode_task, &job);
    for (size_t i = 0; i < rows->n_rows; i++) {
        if (tokens[i] != TOKEN_ERROR) continue;
        *error_row = i;
        lmc_float_state_t saved = lmc_float_state_enter();
        lmc_status_t status = decode_row(context->backend, rows, i, &decoders[i], &searches[0], &tokens[i]);
        lmc_float_state_leave(saved);
        if (status != LMC_OK) return status; /* as in lmc_intervals */
    }
    return LMC_OK;
}

typedef struct stream_job {
    const lmc_backend_t *backend;
    const lmc_rows_t *rows;
    lmc_decoder_t *decoder;
    lmc_search_t *search;
    int32_t *tokens;
    size_t n_decoded;
    lmc_status_t status;
} stream_job_t;

static void stream_task(void *argument, size_t task_index, size_t slot) {
    stream_job_t *job = (stream_job_t *)argument;
    (void)task_index, (void)slot;
    for (size_t i = 0; i < job->rows->n_rows && job->status == LMC_OK; i++) {
        job->status = decode_row(job->backend, job->rows, i, job->decoder, job->search, &job->tokens[i]);
        if (job->status == LMC_OK) job->n_decoded++;
    }
}

lmc_status_t lmc_decode_stream(const lmc_context_t *context, const lmc_rows_t *rows, lmc_decoder_t *decoder,
                               lmc_search_t *search, int32_t *tokens, size_t *error_row) {
    if (rows->vocab_size == 0 || rows->vocab_size > LMC_VOCAB_SIZE_MAX) return LMC_ERROR_VOCAB_SIZE;
    stream_job_t job = {context->backend, rows, decoder, search, tokens, 0, LMC_OK};
    lmc_run_tasks(NULL, 1, stream_task, &job); /* each row needs the stream as the one before left it */
    *error_row = job.n_decoded;
    return job.status;
}

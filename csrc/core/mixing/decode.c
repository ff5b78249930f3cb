/* A step of range-coder streams whose rows are mixed: the loop of coding/streams.c with a mixer beside every
 * stream. */
#include "llmcomp/mixing.h"

#include "core/base/parallel.h"
#include "core/coding/range_coder.h"

#define TOKEN_INACTIVE (-1)
#define TOKEN_ERROR (-2)

typedef struct mixed_job {
    const lmc_backend_t *backend;
    const lmc_rows_t *rows;
    const unsigned char *active;
    lmc_decoder_t *decoders;
    lmc_mixer_t *const *mixers;
    lmc_search_t *searches;
    int32_t *tokens;
} mixed_job_t;

static lmc_status_t decode_row(const mixed_job_t *job, size_t i, lmc_search_t *search) {
    const lmc_rows_t *rows = job->rows;
    lmc_decoder_t *decoder = &job->decoders[i];
    const void *row = (const unsigned char *)rows->data + (ptrdiff_t)i * rows->row_stride_bytes;
    lmc_added_t added;
    uint64_t start, freq, own;
    lmc_mixer_seek(job->mixers[i]);
    lmc_status_t status = lmc_search_row(job->backend, row, rows->dtype, rows->vocab_size, search);
    if (status != LMC_OK) return status;
    status = lmc_mixer_predict(job->mixers[i], search->total, &added);
    if (status != LMC_OK) return status;
    uint64_t total = search->total + added.total;
    size_t token = lmc_search_find_added(job->backend, row, rows->dtype, rows->vocab_size, search, &added,
                                         lmc_range_value(decoder, total), &start, &freq, &own);
    /* Only the row of a caller who changes it meanwhile does not fit its own sums. */
    if (!lmc_interval_is_valid(start, freq, total)) return LMC_ERROR_INTERVAL;
    status = lmc_mixer_take(job->mixers[i], (int64_t)token, own);
    if (status != LMC_OK) return status;
    lmc_range_take(decoder, start, freq, total);
    job->tokens[i] = (int32_t)token;
    return LMC_OK;
}

static void mixed_task(void *argument, size_t task_index, size_t slot) {
    const mixed_job_t *job = (const mixed_job_t *)argument;
    job->tokens[task_index] = TOKEN_INACTIVE;
    if (job->active != NULL && !job->active[task_index]) return;
    if (decode_row(job, task_index, &job->searches[slot]) != LMC_OK) job->tokens[task_index] = TOKEN_ERROR;
}

lmc_status_t lmc_mixed_decode_step(const lmc_context_t *context, const lmc_rows_t *rows,
                                   const unsigned char *active, lmc_decoder_t *decoders,
                                   lmc_mixer_t *const *mixers, lmc_search_t *searches, int32_t *tokens,
                                   size_t *error_row) {
    if (rows->vocab_size == 0 || rows->vocab_size > LMC_VOCAB_SIZE_MAX) return LMC_ERROR_VOCAB_SIZE;
    mixed_job_t job = {context->backend, rows, active, decoders, mixers, searches, tokens};
    lmc_run_tasks(context->executor, rows->n_rows, mixed_task, &job);
    for (size_t i = 0; i < rows->n_rows; i++) {
        if (tokens[i] != TOKEN_ERROR) continue;
        *error_row = i;
        lmc_float_state_t saved = lmc_float_state_enter();
        lmc_status_t status = decode_row(&job, i, &searches[0]);
        lmc_float_state_leave(saved);
        if (status != LMC_OK) return status; /* as in lmc_decode_step */
    }
    return LMC_OK;
}

/* Intervals of tokens, their softmax, and the search of a row: the same for every backend, on top of its row
 * kernels. */
#include "llmcomp/intervals.h"

#include "core/coding/row_kernels.h"
#include "core/base/parallel.h"
#include "core/coding/row_element.h"

/* A search steps over this many weights at a time inside a block, then goes symbol by symbol. */
#define SEARCH_STEP 64
/* Logits a task handles: below this a thread costs more than it brings. */
#define TASK_LOGITS 65536

static const void *row_offset(const void *row, size_t i, lmc_dtype_t dtype) {
    return (const unsigned char *)row + i * lmc_dtype_bytes(dtype);
}

static lmc_status_t row_maximum(const lmc_row_kernels_t *kernels, const void *row, size_t vocab_size,
                                float *maximum) {
    int has_nan;
    *maximum = kernels->maximum(row, vocab_size, &has_nan);
    if (has_nan) return LMC_ERROR_NAN;
    if (*maximum == INFINITY) return LMC_ERROR_POSITIVE_INFINITY;
    if (*maximum == -INFINITY) return LMC_ERROR_NO_SYMBOL;
    return LMC_OK;
}

static const void *row_at(const lmc_rows_t *rows, size_t i) {
    return (const unsigned char *)rows->data + (ptrdiff_t)i * rows->row_stride_bytes;
}

static lmc_status_t row_interval(const lmc_backend_t *backend, const lmc_rows_t *rows, size_t i,
                                 int64_t token, uint64_t *start, uint64_t *freq, uint64_t *total) {
    if (token < 0 || (uint64_t)token >= rows->vocab_size) return LMC_ERROR_TOKEN;
    const lmc_row_kernels_t *kernels = &backend->rows[rows->dtype];
    const void *row = row_at(rows, i);
    size_t t = (size_t)token;
    float maximum;
    lmc_status_t status = row_maximum(kernels, row, rows->vocab_size, &maximum);
    if (status != LMC_OK) return status;
    lmc_origin_t origin = lmc_origin(maximum);
    const void *ahead = (const unsigned char *)row + rows->row_stride_bytes; /* most likely the next row */
    *start = kernels->weight_sum(row, t, origin, ahead) + t;
    *freq = (uint64_t)lmc_weight(lmc_row_element(row, t, rows->dtype), origin) + 1;
    size_t n_after = rows->vocab_size - t - 1;
    const void *after = row_offset(row, t + 1, rows->dtype);
    *total = *start + *freq + n_after +
             kernels->weight_sum(after, n_after, origin, row_offset(ahead, t + 1, rows->dtype));
    return LMC_OK;
}

typedef struct intervals_job {
    const lmc_backend_t *backend;
    const lmc_rows_t *rows;
    const int64_t *tokens;
    const unsigned char *active;
    uint64_t *start, *freq, *total;
    size_t rows_per_task;
} intervals_job_t;

/* A row with an error gets total 0, which no valid row has. */
static void intervals_task(void *argument, size_t task_index, size_t slot) {
    const intervals_job_t *job = (const intervals_job_t *)argument;
    size_t first = task_index * job->rows_per_task, end = first + job->rows_per_task;
    (void)slot;
    if (end > job->rows->n_rows) end = job->rows->n_rows;
    for (size_t i = first; i < end; i++) {
        lmc_status_t status = LMC_OK;
        int is_active = job->active == NULL || job->active[i];
        if (is_active) {
            status = row_interval(job->backend, job->rows, i, job->tokens[i], &job->start[i], &job->freq[i],
                                  &job->total[i]);
        }
        if (!is_active || status != LMC_OK) job->start[i] = job->freq[i] = job->total[i] = 0;
    }
}

lmc_status_t lmc_intervals(const lmc_context_t *context, const lmc_rows_t *rows, const int64_t *tokens,
                           const unsigned char *active, uint64_t *start, uint64_t *freq, uint64_t *total,
                           size_t *error_row) {
    if (rows->vocab_size == 0 || rows->vocab_size > LMC_VOCAB_SIZE_MAX) return LMC_ERROR_VOCAB_SIZE;
    size_t rows_per_task = TASK_LOGITS / rows->vocab_size + 1;
    intervals_job_t job = {context->backend, rows, tokens, active, start, freq, total, rows_per_task};
    lmc_run_tasks(context->executor, (rows->n_rows + rows_per_task - 1) / rows_per_task, intervals_task,
                  &job);
    for (size_t i = 0; i < rows->n_rows; i++) {
        if (total[i] != 0 || (active != NULL && !active[i])) continue;
        *error_row = i;
        lmc_float_state_t saved = lmc_float_state_enter();
        lmc_status_t status =
            row_interval(context->backend, rows, i, tokens[i], &start[i], &freq[i], &total[i]);
        lmc_float_state_leave(saved);
        if (status != LMC_OK) return status; /* it is OK where the caller changed the row meanwhile */
    }
    return LMC_OK;
}

static lmc_status_t row_log2_softmax(const lmc_backend_t *backend, const lmc_rows_t *rows, size_t i,
                                     int64_t token, double *log2_probability) {
    if (token < 0 || (uint64_t)token >= rows->vocab_size) return LMC_ERROR_TOKEN;
    const lmc_row_kernels_t *kernels = &backend->rows[rows->dtype];
    const void *row = row_at(rows, i);
    float maximum;
    lmc_status_t status = row_maximum(kernels, row, rows->vocab_size, &maximum);
    if (status != LMC_OK) return status;
    double difference = (double)lmc_row_element(row, (size_t)token, rows->dtype) - (double)maximum;
    double log_sum = lmc_log64(kernels->softmax_sum(row, rows->vocab_size, maximum));
    *log2_probability = (difference - log_sum) / LMC_LN_2;
    return LMC_OK;
}

typedef struct softmax_job {
    const lmc_backend_t *backend;
    const lmc_rows_t *rows;
    const int64_t *tokens;
    double *log2_probabilities;
    size_t rows_per_task;
} softmax_job_t;

/* A row with an error gets 1, which no probability's logarithm is. */
static void softmax_task(void *argument, size_t task_index, size_t slot) {
    const softmax_job_t *job = (const softmax_job_t *)argument;
    size_t first = task_index * job->rows_per_task, end = first + job->rows_per_task;
    (void)slot;
    if (end > job->rows->n_rows) end = job->rows->n_rows;
    for (size_t i = first; i < end; i++) {
        double *result = &job->log2_probabilities[i];
        if (row_log2_softmax(job->backend, job->rows, i, job->tokens[i], result) != LMC_OK) *result = 1;
    }
}

lmc_status_t lmc_log2_softmax(const lmc_context_t *context, const lmc_rows_t *rows, const int64_t *tokens,
                              double *log2_probabilities, size_t *error_row) {
    if (rows->vocab_size == 0 || rows->vocab_size > LMC_VOCAB_SIZE_MAX) return LMC_ERROR_VOCAB_SIZE;
    size_t rows_per_task = TASK_LOGITS / rows->vocab_size + 1;
    softmax_job_t job = {context->backend, rows, tokens, log2_probabilities, rows_per_task};
    lmc_run_tasks(context->executor, (rows->n_rows + rows_per_task - 1) / rows_per_task, softmax_task, &job);
    for (size_t i = 0; i < rows->n_rows; i++) {
        if (log2_probabilities[i] <= 0) continue;
        *error_row = i;
        lmc_float_state_t saved = lmc_float_state_enter();
        lmc_status_t status = row_log2_softmax(context->backend, rows, i, tokens[i], &log2_probabilities[i]);
        lmc_float_state_leave(saved);
        if (status != LMC_OK) return status; /* it is OK where the caller changed the row meanwhile */
    }
    return LMC_OK;
}

lmc_status_t lmc_search_row(const lmc_backend_t *backend, const void *row, lmc_dtype_t dtype,
                            size_t vocab_size, lmc_search_t *search) {
    const lmc_row_kernels_t *kernels = &backend->rows[dtype];
    lmc_status_t status = row_maximum(kernels, row, vocab_size, &search->maximum);
    if (status != LMC_OK) return status;
    lmc_origin_t origin = lmc_origin(search->maximum);
    search->total = 0;
    for (size_t first = 0, block = 0; first < vocab_size; first += LMC_SEARCH_BLOCK, block++) {
        size_t n = vocab_size - first < LMC_SEARCH_BLOCK ? vocab_size - first : LMC_SEARCH_BLOCK;
        const void *ahead = row_offset(row, vocab_size + first, dtype); /* most likely the next row */
        search->block_sums[block] = kernels->weight_sum(row_offset(row, first, dtype), n, origin, ahead) + n;
        search->total += search->block_sums[block];
    }
    return LMC_OK;
}

/* What is added to tokens below `end`, from the next one on that has not been passed; *n_passed moves there.
 */
static uint64_t added_below(const lmc_added_t *added, size_t end, size_t *n_passed) {
    uint64_t sum = 0;
    for (; *n_passed < added->n && (size_t)added->tokens[*n_passed] < end; ++*n_passed)
        sum += added->weights[*n_passed];
    return sum;
}

size_t lmc_search_find_added(const lmc_backend_t *backend, const void *row, lmc_dtype_t dtype,
                             size_t vocab_size, const lmc_search_t *search, const lmc_added_t *added,
                             uint64_t value, uint64_t *start, uint64_t *freq, uint64_t *own) {
    const lmc_row_kernels_t *kernels = &backend->rows[dtype];
    lmc_origin_t origin = lmc_origin(search->maximum);
    uint64_t sum = 0;
    size_t token = 0, n_passed = 0;
    for (size_t block = 0; token + LMC_SEARCH_BLOCK < vocab_size; block++) {
        size_t n_ahead = n_passed;
        uint64_t step = search->block_sums[block] + added_below(added, token + LMC_SEARCH_BLOCK, &n_ahead);
        if (sum + step > value) break;
        sum += step;
        token += LMC_SEARCH_BLOCK;
        n_passed = n_ahead;
    }
    while (token + SEARCH_STEP < vocab_size) { /* the last step is left to the loop below */
        const void *at = row_offset(row, token, dtype);
        size_t n_ahead = n_passed;
        uint64_t step = kernels->weight_sum(at, SEARCH_STEP, origin, at) + SEARCH_STEP;
        step += added_below(added, token + SEARCH_STEP, &n_ahead);
        if (sum + step > value) break;
        sum += step;
        token += SEARCH_STEP;
        n_passed = n_ahead;
    }
    for (;; token++) {
        *own = (uint64_t)lmc_weight(lmc_row_element(row, token, dtype), origin) + 1;
        *freq = *own + added_below(added, token + 1, &n_passed);
        /* The second test only matters to a caller who changes the row meanwhile: stay inside it. */
        if (sum + *freq > value || token + 1 == vocab_size) break;
        sum += *freq;
    }
    *start = sum;
    return token;
}

size_t lmc_search_find(const lmc_backend_t *backend, const void *row, lmc_dtype_t dtype, size_t vocab_size,
                       const lmc_search_t *search, uint64_t value, uint64_t *start, uint64_t *freq) {
    static const lmc_added_t nothing = {NULL, NULL, 0, 0};
    uint64_t own;
    return lmc_search_find_added(backend, row, dtype, vocab_size, search, &nothing, value, start, freq, &own);
}

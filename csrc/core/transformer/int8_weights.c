/* The weights of the linear maps and the head as 8-bit codes, made from those of a checkpoint. How codes are
 * multiplied is the kernels' business, and where in the forward pass that of forward.c. */
#include <string.h>

#include "core/transformer/group.h"
#include "core/base/parallel.h"
#include "core/base/size.h"

#define LMC_ROWS_PER_TASK 64
/* Weights of a row that are widened at a time. */
#define LMC_PIECE 1024

/* A matrix among the weights: where it is in both structures, and its shape. */
typedef struct lmc_int8_matrix {
    const lmc_transformer_tensor_t *source;
    lmc_transformer_tensor_t *target;
    size_t n_rows, n_k;
} lmc_int8_matrix_t;

static size_t aligned(size_t n_bytes) {
    return lmc_round_up(n_bytes, LMC_HOST_ALIGNMENT);
}

static size_t matrix_bytes(size_t n_rows, size_t n_k) {
    return aligned(n_rows * sizeof(float)) + aligned(n_rows * lmc_int8_padded(n_k));
}

size_t lmc_int8_weights_bound(const lmc_transformer_config_t *config) {
    size_t layer = 0;
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++) {
        lmc_shape_t shape = lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot);
        if (shape.n_columns > 0) layer += matrix_bytes(shape.n_rows, shape.n_columns);
    }
    return config->n_layers * layer + matrix_bytes(config->n_logits, config->hidden) + LMC_HOST_ALIGNMENT;
}

typedef struct lmc_int8_job {
    const lmc_backend_t *backend;
    lmc_transformer_tensor_t source;
    float *scales;
    int8_t *codes;
    size_t n_rows, n_k;
} lmc_int8_job_t;

static void quantise_row(const lmc_int8_job_t *job, size_t row) {
    float piece[LMC_PIECE];
    size_t element_bytes = job->source.dtype == LMC_FLOAT32 ? 4 : 2, n_k = job->n_k;
    const char *from = (const char *)job->source.data + row * n_k * element_bytes;
    int8_t *codes = job->codes + row * lmc_int8_padded(n_k);
    lmc_int8_rule_t rule = {0};
    uint32_t largest = 0;
    for (int counting = 1; counting >= 0; counting--) {
        for (size_t k = 0; k < n_k; k += LMC_PIECE) {
            size_t n = n_k - k < LMC_PIECE ? n_k - k : LMC_PIECE;
            job->backend->transformer->widen(from + k * element_bytes, job->source.dtype, n, piece);
            for (size_t i = 0; i < n && counting; i++) {
                uint32_t magnitude = lmc_int8_magnitude(piece[i]);
                largest = magnitude > largest ? magnitude : largest;
            }
            for (size_t i = 0; i < n && !counting; i++)
                codes[k + i] = (int8_t)lmc_int8_code(piece[i], rule);
        }
        rule = lmc_int8_rule_of(largest);
    }
    job->scales[row] = rule.scale;
    memset(codes + n_k, 0, lmc_int8_padded(n_k) - n_k);
}

static void quantise_rows(void *argument, size_t index, size_t slot) {
    (void)slot;
    const lmc_int8_job_t *job = (const lmc_int8_job_t *)argument;
    for (size_t i = 0; i < LMC_ROWS_PER_TASK && index * LMC_ROWS_PER_TASK + i < job->n_rows; i++)
        quantise_row(job, index * LMC_ROWS_PER_TASK + i);
}

/* Returns where the memory goes on. */
static char *quantise_matrix(const lmc_context_t *context, lmc_int8_matrix_t matrix, char *memory) {
    lmc_int8_job_t job = {.backend = context->backend,
                          .source = *matrix.source,
                          .scales = (float *)(void *)memory,
                          .codes = (int8_t *)memory + aligned(matrix.n_rows * sizeof(float)),
                          .n_rows = matrix.n_rows,
                          .n_k = matrix.n_k};
    size_t n_tasks = (matrix.n_rows + LMC_ROWS_PER_TASK - 1) / LMC_ROWS_PER_TASK;
    lmc_run_tasks(context->executor, n_tasks, quantise_rows, &job);
    *matrix.target =
        (lmc_transformer_tensor_t){.data = job.codes, .dtype = LMC_FLOAT32, .scales = job.scales};
    return memory + matrix_bytes(matrix.n_rows, matrix.n_k);
}

lmc_status_t lmc_int8_weights_quantise(const lmc_context_t *context, const lmc_transformer_config_t *config,
                                       const lmc_transformer_weights_t *weights, void *memory,
                                       size_t memory_bytes, lmc_transformer_layer_t *layers,
                                       lmc_transformer_weights_t *quantised) {
    lmc_status_t status = lmc_transformer_config_check(config);
    if (status != LMC_OK) return status;
    if (memory_bytes < lmc_int8_weights_bound(config)) return LMC_ERROR_CAPACITY;
    if (!lmc_transformer_has_tensors(config, weights)) return LMC_ERROR_ARGUMENT;
    char *at = lmc_align(memory, LMC_HOST_ALIGNMENT);
    lmc_transformer_tensor_t head = weights->slots[LMC_MODEL_HEAD];
    for (size_t i = 0; i < config->n_layers; i++) {
        const lmc_transformer_layer_t source = weights->layers[i];
        layers[i] = source;
        for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++) {
            lmc_shape_t shape = lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot);
            lmc_int8_matrix_t matrix = {&source.slots[slot], &layers[i].slots[slot], shape.n_rows,
                                        shape.n_columns};
            if (shape.n_columns > 0) at = quantise_matrix(context, matrix, at);
        }
    }
    *quantised = *weights;
    quantised->layers = layers;
    lmc_int8_matrix_t matrix = {&head, &quantised->slots[LMC_MODEL_HEAD], config->n_logits, config->hidden};
    quantise_matrix(context, matrix, at);
    return LMC_OK;
}

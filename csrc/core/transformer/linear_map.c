/* Matrix products of a group of panels: a block of weights is read, and widened, once for all its panels.
 * Only the order of blocks is decided here; sums live in the kernels. */
#include "core/transformer/linear_map.h"

static void store_logits(const lmc_matrix_t *matrix, size_t first_row, size_t n_rows, const float *block) {
    const lmc_group_t *group = matrix->group;
    for (size_t i = 0; i < group->n_panels; i++) {
        size_t n_lanes = group->forward->panels[group->first_panel + i].n_lanes;
        float *rows[LMC_LANES];
        for (size_t lane = 0; lane < n_lanes; lane++)
            rows[lane] = matrix->logits[i * LMC_LANES + lane] + first_row;
        lmc_kernels_of(group->forward)->transpose(block + i * n_rows * LMC_LANES, n_rows, n_lanes, rows);
    }
}

/* product->n_rows rows from first_row on, the chains cut into pieces of block_k. With a buffer, 16-bit
 * weights are widened into it, with a gap between rows so that these do not lie a power of two apart and meet
 * in the cache. */
static void multiply_rows(const lmc_matrix_t *matrix, size_t first_row, size_t block_k, float *buffer,
                          lmc_product_t *product) {
    const lmc_transformer_kernels_t *kernels = lmc_kernels_of(matrix->group->forward);
    size_t element_bytes = matrix->weight.dtype == LMC_FLOAT32 ? 4 : 2;
    for (size_t k = 0; k < matrix->n_k; k += block_k) {
        size_t k_left = matrix->n_k - k;
        const char *weights =
            (const char *)matrix->weight.data + (first_row * matrix->n_k + k) * element_bytes;
        product->n_k = k_left < block_k ? k_left : block_k;
        product->input = matrix->input + k * LMC_LANES;
        product->resume = k > 0;
        product->bias = k_left <= block_k && matrix->bias != NULL ? matrix->bias + first_row : NULL;
        product->weights = weights;
        product->dtype = matrix->weight.dtype;
        product->is_turned = matrix->weight.is_turned;
        product->row_stride = (ptrdiff_t)matrix->n_k;
        if (buffer != NULL) {
            product->weights = buffer;
            product->dtype = LMC_FLOAT32;
            product->row_stride = (ptrdiff_t)(product->n_k + LMC_ROW_GAP);
            if (product->n_panels == 1 && product->n_k == matrix->n_k)
                product->ahead = weights + product->n_rows * matrix->n_k * element_bytes;
            for (size_t row = 0; row < product->n_rows; row++)
                kernels->widen(weights + row * matrix->n_k * element_bytes, matrix->weight.dtype,
                               product->n_k, buffer + (ptrdiff_t)row * product->row_stride);
        }
        kernels->product(product);
    }
}

/* In 8-bit integers: first the input as codes, then the same blocks of rows. */

static void quantise_panel(void *argument, size_t index, size_t slot) {
    (void)slot;
    const lmc_matrix_t *matrix = (const lmc_matrix_t *)argument;
    const lmc_group_t *group = matrix->group;
    char *codes = (char *)lmc_buffers_of(group)->codes + index * lmc_int8_panel_bytes(matrix->n_k);
    group->forward->backend->int8->quantise(matrix->input + index * matrix->n_k * LMC_LANES, matrix->n_k,
                                            lmc_lanes_of(group), (lmc_int8_panel_t *)(void *)codes);
}

static void multiply_codes(const lmc_matrix_t *matrix, size_t first_row, const lmc_product_t *product) {
    size_t n_k = lmc_int8_padded(matrix->n_k);
    lmc_int8_product_t codes = {
        .weights = (const int8_t *)matrix->weight.data + first_row * n_k,
        .scales = matrix->weight.scales + first_row,
        .bias = matrix->bias == NULL ? NULL : matrix->bias + first_row,
        .n_rows = product->n_rows,
        .n_k = n_k,
        .input = (const lmc_int8_panel_t *)lmc_buffers_of(matrix->group)->codes,
        .output = product->output,
        .input_stride = lmc_int8_panel_bytes(matrix->n_k),
        .output_stride = product->output_stride,
        .n_panels = product->n_panels,
        .n_lanes = product->n_lanes,
    };
    matrix->group->forward->backend->int8->product(&codes);
}

/* n_rows rows from first_row on for all panels of the group, to panels of output_rows features: a block of
 * weights is read (and widened) once. */
static void multiply_block(const lmc_matrix_t *matrix, size_t first_row, size_t n_rows, size_t output_rows,
                           float *output, float *weight_buffer) {
    const lmc_group_t *group = matrix->group;
    const lmc_transformer_kernels_t *kernels = lmc_kernels_of(group->forward);
    size_t n_lanes = lmc_lanes_of(group);
    int is_single = group->n_panels == 1;
    int is_widened = matrix->weight.dtype != LMC_FLOAT32 && !(is_single && n_lanes <= kernels->lanes_16bit);
    size_t part = n_rows, block_k = is_single ? matrix->n_k : LMC_BLOCK_K;
    if (is_widened) {
        part = is_single ? kernels->tile_rows : LMC_BLOCK_ROWS;
        block_k = LMC_WIDENED_K;
    }
    lmc_product_t product = {.k_stride = 1,
                             .n_panels = group->n_panels,
                             .n_lanes = n_lanes,
                             .input_stride = matrix->n_k * LMC_LANES,
                             .output_stride = output_rows * LMC_LANES};
    for (size_t row = 0; row < n_rows; row += part) {
        product.n_rows = n_rows - row < part ? n_rows - row : part;
        product.output = output + row * LMC_LANES;
        if (matrix->weight.scales != NULL)
            multiply_codes(matrix, first_row + row, &product);
        else
            multiply_rows(matrix, first_row + row, block_k, is_widened ? weight_buffer : NULL, &product);
    }
}

/* What becomes of a block of outputs; factors: of the same rows, panels of n_rows features. */
static void finish_block(const lmc_matrix_t *matrix, size_t n_rows, size_t output_rows, float *output,
                         const float *factors) {
    const lmc_transformer_config_t *config = &matrix->group->forward->model->config;
    const lmc_transformer_kernels_t *kernels = lmc_kernels_of(matrix->group->forward);
    size_t n_values = n_rows * LMC_LANES;
    int is_finished = config->logits_multiplier == 1.0f && config->logits_cap == 0.0f;
    for (size_t i = 0; i < matrix->group->n_panels; i++) {
        float *values = output + i * output_rows * LMC_LANES;
        if (matrix->clip != 0.0f) kernels->clip(values, n_values, matrix->clip);
        if (matrix->activation != NULL)
            kernels->activate(*matrix->activation, values, factors == NULL ? NULL : factors + i * n_values,
                              n_values);
        if (matrix->output == NULL && !is_finished)
            kernels->finish_logits(values, n_values, config->logits_multiplier, config->logits_cap);
    }
}

static void matrix_block(void *argument, size_t block, size_t slot) {
    const lmc_matrix_t *matrix = (const lmc_matrix_t *)argument;
    const lmc_task_buffers_t *buffers = &matrix->group->forward->tasks[slot];
    size_t first_row = block * matrix->block_rows, left = matrix->n_rows - first_row;
    size_t n_rows = left < matrix->block_rows ? left : matrix->block_rows;
    int to_panels = matrix->output != NULL, is_gated = matrix->factors != NULL;
    float *output = to_panels ? matrix->output + first_row * LMC_LANES : buffers->output;
    size_t output_rows = to_panels ? matrix->output_rows : n_rows;
    if (is_gated)
        multiply_block(matrix->factors, first_row, n_rows, n_rows, buffers->output, buffers->weights);
    multiply_block(matrix, first_row, n_rows, output_rows, output, buffers->weights);
    finish_block(matrix, n_rows, output_rows, output, is_gated ? buffers->output : NULL);
    if (!to_panels) store_logits(matrix, first_row, n_rows, output);
}

/* A single panel takes more rows at a time, as long as that leaves a few tasks for every thread: what a
 * kernel does once for all rows is little then, and the rows of the head fill the memory that they have for
 * many panels. */
static size_t choose_block_rows(const lmc_matrix_t *matrix) {
    const lmc_executor_t *inner = matrix->group->forward->inner;
    size_t n_tasks = inner == NULL ? 1 : LMC_TASKS_PER_SLOT * lmc_slot_count(inner);
    size_t n_blocks = matrix->n_rows / (n_tasks * LMC_BLOCK_ROWS);
    if (matrix->group->n_panels > 1 || n_blocks <= 1) return LMC_BLOCK_ROWS;
    return (n_blocks < LMC_GROUP_PANELS ? n_blocks : LMC_GROUP_PANELS) * LMC_BLOCK_ROWS;
}

void lmc_run_matrix(lmc_matrix_t *matrix) {
    matrix->block_rows = choose_block_rows(matrix);
    size_t n_blocks = (matrix->n_rows + matrix->block_rows - 1) / matrix->block_rows;
    if (matrix->weight.scales != NULL && !matrix->has_codes)
        lmc_run_in_group(matrix->group, matrix->group->n_panels, quantise_panel, matrix);
    lmc_run_in_group(matrix->group, n_blocks, matrix_block, matrix);
}

lmc_matrix_t lmc_linear_map(const lmc_group_t *group, size_t layer, lmc_layer_slot_t weight,
                            lmc_layer_slot_t bias, const float *input, float *output) {
    const lmc_transformer_model_t *model = group->forward->model;
    lmc_shape_t shape = lmc_layer_slot_shape(&model->config, weight);
    return (lmc_matrix_t){.group = group,
                          .weight = model->weights.layers[layer].slots[weight],
                          .bias = lmc_layer_vector(model, layer, bias),
                          .n_rows = shape.n_rows,
                          .n_k = shape.n_columns,
                          .input = input,
                          .output = output,
                          .output_rows = shape.n_rows};
}

/* The layers of GPT-NeoX, on groups of panels. Only the order of work is decided here, never that of a sum:
 * sums live in the kernels. No memory is allocated and nothing is checked. */
#include <string.h>

#include "core/transformer/forward.h"
#include "core/base/parallel.h"

static const lmc_transformer_kernels_t *kernels_of(const lmc_forward_t *forward) {
    return forward->backend->transformer;
}

size_t lmc_layer_vectors_length(const lmc_transformer_config_t *config) {
    return 9 * config->hidden + config->intermediate;
}

lmc_layer_vectors_t lmc_layer_vectors_at(const lmc_transformer_model_t *model, size_t layer) {
    size_t hidden = model->config.hidden;
    float *at = model->vectors + layer * lmc_layer_vectors_length(&model->config);
    return (lmc_layer_vectors_t){.attention_norm_gain = at,
                                 .attention_norm_bias = at + hidden,
                                 .mlp_norm_gain = at + 2 * hidden,
                                 .mlp_norm_bias = at + 3 * hidden,
                                 .qkv_bias = at + 4 * hidden,
                                 .dense_bias = at + 7 * hidden,
                                 .mlp_out_bias = at + 8 * hidden,
                                 .mlp_in_bias = at + 9 * hidden};
}

/* Work inside a group. */

static void run_in_group(const lmc_group_t *group, size_t n_tasks, lmc_task_fn_t task, void *argument) {
    const lmc_executor_t *inner = group->forward->inner;
    if (inner != NULL) {
        lmc_run_tasks(inner, n_tasks, task, argument);
    } else {
        for (size_t i = 0; i < n_tasks; i++)
            task(argument, i, group->slot);
    }
}

static size_t lanes_of(const lmc_group_t *group) {
    const lmc_panel_t *panels = group->forward->panels + group->first_panel;
    return group->n_panels == 1 ? panels[0].n_lanes : LMC_LANES;
}

static float *group_hidden(const lmc_group_t *group) {
    return group->forward->hidden + group->first_panel * group->forward->model->config.hidden * LMC_LANES;
}

static lmc_group_buffers_t *buffers_of(const lmc_group_t *group) {
    return &group->forward->groups[group->slot];
}

/* The matrix product of a group. */

typedef struct lmc_matrix {
    const lmc_group_t *group;
    lmc_transformer_tensor_t weight; /* [n_rows][n_k] */
    const float *bias;
    size_t n_rows, n_k;
    size_t block_rows;  /* of a task; run_matrix chooses */
    const float *input; /* panels of n_k features */
    float *output;      /* panels of n_rows features; NULL: rows are written to the lanes of logits */
    int with_gelu;
    float *const *logits; /* [n_panels * LMC_LANES] */
} lmc_matrix_t;

static void store_logits(const lmc_matrix_t *matrix, size_t first_row, size_t n_rows, const float *block) {
    const lmc_group_t *group = matrix->group;
    for (size_t i = 0; i < group->n_panels; i++) {
        size_t n_lanes = group->forward->panels[group->first_panel + i].n_lanes;
        float *rows[LMC_LANES];
        for (size_t lane = 0; lane < n_lanes; lane++)
            rows[lane] = matrix->logits[i * LMC_LANES + lane] + first_row;
        kernels_of(group->forward)->transpose(block + i * n_rows * LMC_LANES, n_rows, n_lanes, rows);
    }
}

/* product->n_rows rows from first_row on, the chains cut into pieces of block_k. With a buffer short weights
 * are widened into it, with a gap between rows so that these do not lie a power of two apart and meet in the
 * cache. */
static void multiply_rows(const lmc_matrix_t *matrix, size_t first_row, size_t block_k, float *buffer,
                          lmc_product_t *product) {
    const lmc_transformer_kernels_t *kernels = kernels_of(matrix->group->forward);
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
    char *codes = (char *)buffers_of(group)->codes + index * lmc_int8_panel_bytes(matrix->n_k);
    group->forward->backend->int8->quantise(matrix->input + index * matrix->n_k * LMC_LANES, matrix->n_k,
                                            lanes_of(group), (lmc_int8_panel_t *)(void *)codes);
}

static void multiply_codes(const lmc_matrix_t *matrix, size_t first_row, const lmc_product_t *product) {
    size_t n_k = lmc_int8_padded(matrix->n_k);
    lmc_int8_product_t codes = {
        .weights = (const int8_t *)matrix->weight.data + first_row * n_k,
        .scales = matrix->weight.scales + first_row,
        .bias = matrix->bias == NULL ? NULL : matrix->bias + first_row,
        .n_rows = product->n_rows,
        .n_k = n_k,
        .input = (const lmc_int8_panel_t *)buffers_of(matrix->group)->codes,
        .output = product->output,
        .input_stride = lmc_int8_panel_bytes(matrix->n_k),
        .output_stride = product->output_stride,
        .n_panels = product->n_panels,
        .n_lanes = product->n_lanes,
    };
    matrix->group->forward->backend->int8->product(&codes);
}

/* One block of rows for all panels of the group: a block of weights is read (and widened) once. */
static void matrix_block(void *argument, size_t block, size_t slot) {
    const lmc_matrix_t *matrix = (const lmc_matrix_t *)argument;
    const lmc_group_t *group = matrix->group;
    const lmc_transformer_kernels_t *kernels = kernels_of(group->forward);
    const lmc_task_buffers_t *buffers = &group->forward->tasks[slot];
    size_t first_row = block * matrix->block_rows, left = matrix->n_rows - first_row;
    size_t n_rows = left < matrix->block_rows ? left : matrix->block_rows, n_lanes = lanes_of(group);
    int to_panels = matrix->output != NULL, is_single = group->n_panels == 1;
    int is_widened = matrix->weight.dtype != LMC_FLOAT32 && !(is_single && n_lanes <= kernels->short_lanes);
    size_t part = matrix->block_rows, block_k = is_single ? matrix->n_k : LMC_BLOCK_K;
    if (is_widened) {
        part = is_single ? kernels->tile_rows : LMC_BLOCK_ROWS;
        block_k = LMC_WIDENED_K;
    }
    float *output = to_panels ? matrix->output + first_row * LMC_LANES : buffers->output;
    lmc_product_t product = {.k_stride = 1,
                             .n_panels = group->n_panels,
                             .n_lanes = n_lanes,
                             .input_stride = matrix->n_k * LMC_LANES,
                             .output_stride = (to_panels ? matrix->n_rows : n_rows) * LMC_LANES};
    for (size_t row = 0; row < n_rows; row += part) {
        product.n_rows = n_rows - row < part ? n_rows - row : part;
        product.output = output + row * LMC_LANES;
        if (matrix->weight.scales != NULL)
            multiply_codes(matrix, first_row + row, &product);
        else
            multiply_rows(matrix, first_row + row, block_k, is_widened ? buffers->weights : NULL, &product);
    }
    if (!to_panels) store_logits(matrix, first_row, n_rows, output);
    for (size_t i = 0; matrix->with_gelu && i < group->n_panels; i++)
        kernels->gelu(output + i * product.output_stride, n_rows * LMC_LANES);
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

static void run_matrix(lmc_matrix_t *matrix) {
    matrix->block_rows = choose_block_rows(matrix);
    size_t n_blocks = (matrix->n_rows + matrix->block_rows - 1) / matrix->block_rows;
    if (matrix->weight.scales != NULL)
        run_in_group(matrix->group, matrix->group->n_panels, quantise_panel, matrix);
    run_in_group(matrix->group, n_blocks, matrix_block, matrix);
}

static void apply_linear(const lmc_group_t *group, lmc_transformer_tensor_t weight, const float *bias,
                         size_t n_rows, size_t n_k, const float *input, float *output, int with_gelu) {
    lmc_matrix_t matrix = {.group = group,
                           .weight = weight,
                           .bias = bias,
                           .n_rows = n_rows,
                           .n_k = n_k,
                           .input = input,
                           .output = output,
                           .with_gelu = with_gelu};
    run_matrix(&matrix);
}

/* Norms and residuals, a panel a task. */

typedef struct lmc_panelwise {
    const lmc_group_t *group;
    const float *gain, *bias;
    float *input, *output;
} lmc_panelwise_t;

static void norm_panel(void *argument, size_t index, size_t slot) {
    (void)slot;
    const lmc_panelwise_t *norm = (const lmc_panelwise_t *)argument;
    const lmc_transformer_config_t *config = &norm->group->forward->model->config;
    size_t offset = index * config->hidden * LMC_LANES;
    kernels_of(norm->group->forward)
        ->layer_norm(norm->input + offset, config->hidden, norm->gain, norm->bias, config->layer_norm_epsilon,
                     norm->output + offset);
}

static void normalise(const lmc_group_t *group, const float *gain, const float *bias, float *input) {
    lmc_panelwise_t norm = {group, gain, bias, input, buffers_of(group)->normed};
    run_in_group(group, group->n_panels, norm_panel, &norm);
}

static void add_to(const lmc_group_t *group, float *x, const float *y) {
    kernels_of(group->forward)->add(x, y, group->n_panels * group->forward->model->config.hidden * LMC_LANES);
}

/* Embedding. */

static void embed_panel(void *argument, size_t index, size_t slot) {
    const lmc_group_t *group = (const lmc_group_t *)argument;
    const lmc_forward_t *forward = group->forward;
    const lmc_panel_t *panel = &forward->panels[group->first_panel + index];
    lmc_transformer_tensor_t embedding = forward->model->weights.embedding;
    size_t hidden = forward->model->config.hidden, n_embeddings = forward->model->config.n_embeddings;
    size_t element_bytes = embedding.dtype == LMC_FLOAT32 ? 4 : 2;
    float *out = group_hidden(group) + index * hidden * LMC_LANES, *vector = forward->tasks[slot].vector;
    memset(out, 0, hidden * LMC_LANES * sizeof *out);
    for (size_t lane = 0; lane < panel->n_lanes; lane++) {
        /* Foreign only if the caller has changed his tokens since they were checked. */
        size_t token = (size_t)panel->tokens[lane] < n_embeddings ? (size_t)panel->tokens[lane] : 0;
        const char *row = (const char *)embedding.data + token * hidden * element_bytes;
        kernels_of(forward)->widen(row, embedding.dtype, hidden, vector);
        for (size_t i = 0; i < hidden; i++)
            out[i * LMC_LANES + lane] = vector[i];
    }
}

void lmc_group_embed(const lmc_group_t *group) {
    run_in_group(group, group->n_panels, embed_panel, (void *)group);
}

/* Queries, keys, values. */

typedef struct lmc_layer_task {
    const lmc_group_t *group;
    size_t layer;
} lmc_layer_task_t;

/* Elements before the keys (or values) of one head of one stream in a layer. */
static size_t cache_offset(const lmc_forward_t *forward, size_t layer, size_t stream, size_t head) {
    const lmc_transformer_cache_t *cache = &forward->cache;
    const lmc_transformer_config_t *config = &forward->model->config;
    size_t index = ((layer % forward->cache_layers) * cache->n_streams + stream) * config->n_heads + head;
    return index * cache->capacity * forward->model->head_dim;
}

static void rotate_head(const lmc_forward_t *forward, const lmc_panel_t *panel, float *gathered, float *query,
                        float *key) {
    const lmc_transformer_model_t *model = forward->model;
    size_t n_pairs = model->config.rotary_dims / 2, stride = model->table_length;
    const float *cosines = model->cosines + panel->positions[0], *sines = model->sines + panel->positions[0];
    if (forward->stepping) {
        float *gathered_sines = gathered + n_pairs * LMC_LANES;
        for (size_t i = 0; i < n_pairs; i++) {
            for (size_t lane = 0; lane < LMC_LANES; lane++) {
                size_t position = panel->positions[lane];
                gathered[i * LMC_LANES + lane] = model->cosines[i * stride + position];
                gathered_sines[i * LMC_LANES + lane] = model->sines[i * stride + position];
            }
        }
        cosines = gathered, sines = gathered_sines, stride = LMC_LANES;
    }
    kernels_of(forward)->rotate(query, n_pairs, cosines, sines, stride);
    kernels_of(forward)->rotate(key, n_pairs, cosines, sines, stride);
}

static void store_keys(const lmc_forward_t *forward, const lmc_panel_t *panel, size_t layer, size_t head,
                       const float *key) {
    size_t head_dim = forward->model->head_dim;
    if (!forward->stepping && panel->n_lanes == LMC_LANES && panel->positions[0] % LMC_LANES == 0) {
        float *target = forward->cache.keys + cache_offset(forward, layer, panel->streams[0], head);
        memcpy(target + panel->positions[0] * head_dim, key, head_dim * LMC_LANES * sizeof *key);
        return;
    }
    for (size_t lane = 0; lane < panel->n_lanes; lane++) {
        size_t position = panel->positions[lane], in_block = position % LMC_LANES;
        float *target = forward->cache.keys + cache_offset(forward, layer, panel->streams[lane], head) +
                        (position - in_block) * head_dim + in_block;
        for (size_t d = 0; d < head_dim; d++)
            target[d * LMC_LANES] = key[d * LMC_LANES + lane];
    }
}

static void store_values(const lmc_forward_t *forward, const lmc_panel_t *panel, size_t layer, size_t head,
                         const float *value) {
    size_t head_dim = forward->model->head_dim;
    float *rows[LMC_LANES];
    for (size_t lane = 0; lane < panel->n_lanes; lane++) {
        rows[lane] = forward->cache.values + cache_offset(forward, layer, panel->streams[lane], head) +
                     panel->positions[lane] * head_dim;
    }
    kernels_of(forward)->transpose(value, head_dim, panel->n_lanes, rows);
}

/* One head of one panel: rotates its query and key, keeps the query, puts key and value into the cache. */
static void place_head(void *argument, size_t index, size_t slot) {
    const lmc_layer_task_t *task = (const lmc_layer_task_t *)argument;
    const lmc_group_t *group = task->group;
    const lmc_forward_t *forward = group->forward;
    size_t n_heads = forward->model->config.n_heads, hidden = forward->model->config.hidden;
    size_t panel_index = index / n_heads, head = index % n_heads,
           head_floats = forward->model->head_dim * LMC_LANES;
    const lmc_panel_t *panel = &forward->panels[group->first_panel + panel_index];
    float *query = buffers_of(group)->wide + panel_index * 3 * hidden * LMC_LANES + head * 3 * head_floats;
    rotate_head(forward, panel, forward->tasks[slot].vector, query, query + head_floats);
    memcpy(forward->queries + (group->first_panel + panel_index) * hidden * LMC_LANES + head * head_floats,
           query, head_floats * sizeof *query);
    store_keys(forward, panel, task->layer, head, query + head_floats);
    store_values(forward, panel, task->layer, head, query + 2 * head_floats);
}

void lmc_group_project(const lmc_group_t *group, size_t layer) {
    const lmc_transformer_config_t *config = &group->forward->model->config;
    lmc_layer_vectors_t vectors = lmc_layer_vectors_at(group->forward->model, layer);
    const lmc_transformer_layer_t *weights = &group->forward->model->weights.layers[layer];
    lmc_layer_task_t task = {group, layer};
    normalise(group, vectors.attention_norm_gain, vectors.attention_norm_bias, group_hidden(group));
    apply_linear(group, weights->qkv_weight, vectors.qkv_bias, 3 * config->hidden, config->hidden,
                 buffers_of(group)->normed, buffers_of(group)->wide, 0);
    run_in_group(group, group->n_panels * config->n_heads, place_head, &task);
}

/* Attention, MLP, residuals. */

/* Lanes of one head, each with its own stream's keys and values. */
static void attend_streams(const lmc_layer_task_t *task, const lmc_panel_t *panel, size_t head,
                           lmc_attention_t *attention, lmc_task_buffers_t buffers, const float *query,
                           float *output) {
    const lmc_forward_t *forward = task->group->forward;
    size_t head_dim = attention->head_dim;
    float *one_query = buffers.vector, *one_output = buffers.vector + head_dim;
    size_t in_cache = cache_offset(forward, task->layer, panel->streams[0], head);
    for (size_t lane = 0; lane < panel->n_lanes; lane++) {
        attention->keys = forward->cache.keys + in_cache;
        attention->values = forward->cache.values + in_cache;
        if (lane + 1 < panel->n_lanes)
            in_cache = cache_offset(forward, task->layer, panel->streams[lane + 1], head);
        attention->ahead = forward->cache.keys + in_cache;
        for (size_t d = 0; d < head_dim; d++)
            one_query[d] = query[d * LMC_LANES + lane];
        kernels_of(forward)->attend_stream(attention, one_query, panel->positions[lane] + 1, buffers.scores,
                                           one_output);
        for (size_t d = 0; d < head_dim; d++)
            output[d * LMC_LANES + lane] = one_output[d];
    }
}

static void attend_head(void *argument, size_t index, size_t slot) {
    const lmc_layer_task_t *task = (const lmc_layer_task_t *)argument;
    const lmc_group_t *group = task->group;
    const lmc_forward_t *forward = group->forward;
    const lmc_transformer_model_t *model = forward->model;
    size_t panel_index = index % group->n_panels, head = index / group->n_panels, head_dim = model->head_dim;
    const lmc_panel_t *panel = &forward->panels[group->first_panel + panel_index];
    size_t offset = head * head_dim * LMC_LANES, panel_floats = model->config.hidden * LMC_LANES;
    const float *query = forward->queries + (group->first_panel + panel_index) * panel_floats + offset;
    float *output = buffers_of(group)->attended + panel_index * panel_floats + offset;
    lmc_attention_t attention = {
        .head_dim = head_dim, .scale = model->softmax_scale, .floor = model->softmax_floor};
    if (forward->stepping) {
        attend_streams(task, panel, head, &attention, forward->tasks[slot], query, output);
        return;
    }
    size_t in_cache = cache_offset(forward, task->layer, panel->streams[0], head);
    attention.keys = forward->cache.keys + in_cache;
    attention.values = forward->cache.values + in_cache;
    kernels_of(forward)->attend_panel(&attention, query, panel->positions[0], panel->n_lanes,
                                      forward->tasks[slot].scores, output);
}

void lmc_group_finish(const lmc_group_t *group, size_t layer) {
    const lmc_transformer_config_t *config = &group->forward->model->config;
    lmc_layer_vectors_t vectors = lmc_layer_vectors_at(group->forward->model, layer);
    const lmc_transformer_layer_t *weights = &group->forward->model->weights.layers[layer];
    const lmc_group_buffers_t *buffers = buffers_of(group);
    float *hidden = group_hidden(group);
    lmc_layer_task_t task = {group, layer};
    run_in_group(group, group->n_panels * config->n_heads, attend_head, &task);
    apply_linear(group, weights->dense_weight, vectors.dense_bias, config->hidden, config->hidden,
                 buffers->attended, buffers->residual, 0);
    /* Parallel: x = (mlp(x) + attention) + x. Sequential: x = attention + x, then x = mlp(x) + x. */
    if (!config->parallel_residual) add_to(group, hidden, buffers->residual);
    normalise(group, vectors.mlp_norm_gain, vectors.mlp_norm_bias, hidden);
    apply_linear(group, weights->mlp_in_weight, vectors.mlp_in_bias, config->intermediate, config->hidden,
                 buffers->normed, buffers->wide, 1);
    apply_linear(group, weights->mlp_out_weight, vectors.mlp_out_bias, config->hidden, config->intermediate,
                 buffers->wide, buffers->attended, 0);
    if (config->parallel_residual) add_to(group, buffers->attended, buffers->residual);
    add_to(group, hidden, buffers->attended);
}

/* Head. */

/* What the sink wants of the targets of a panel. */
static void targets_of_panel(void *argument, size_t index, size_t slot) {
    (void)slot;
    const lmc_group_t *group = (const lmc_group_t *)argument;
    const lmc_forward_t *forward = group->forward;
    const lmc_transformer_sink_t *sink = &forward->sink;
    const lmc_panel_t *panel = &forward->panels[group->first_panel + index];
    size_t stride = lmc_logits_stride(&forward->model->config), row = panel->rows[0], failed = 0;
    lmc_context_t context = {forward->backend, NULL};
    lmc_rows_t rows = {.data = buffers_of(group)->logits + index * LMC_LANES * stride,
                       .row_stride_bytes = (ptrdiff_t)(stride * sizeof(float)),
                       .n_rows = panel->n_lanes,
                       .vocab_size = sink->vocab_size,
                       .dtype = LMC_FLOAT32};
    lmc_status_t *status = &forward->statuses[group->first_panel + index];
    if (sink->log2_probabilities != NULL)
        *status =
            lmc_log2_softmax(&context, &rows, sink->targets + row, sink->log2_probabilities + row, &failed);
    else
        *status = lmc_intervals(&context, &rows, sink->targets + row, NULL, sink->start + row,
                                sink->freq + row, sink->total + row, &failed);
    forward->error_rows[group->first_panel + index] = row + failed;
}

static void head_of_panels(const lmc_group_t *group, const float *normed) {
    const lmc_forward_t *forward = group->forward;
    const lmc_transformer_config_t *config = &forward->model->config;
    float *rows[LMC_GROUP_PANELS * LMC_LANES];
    for (size_t i = 0; i < group->n_panels * LMC_LANES; i++) {
        const lmc_panel_t *panel = &forward->panels[group->first_panel + i / LMC_LANES];
        size_t lane = i % LMC_LANES;
        if (lane >= panel->n_lanes)
            rows[i] = NULL;
        else if (forward->sink.logits != NULL)
            rows[i] = forward->sink.logits + panel->rows[lane] * config->n_logits;
        else
            rows[i] = buffers_of(group)->logits + i * lmc_logits_stride(config);
    }
    lmc_matrix_t matrix = {.group = group,
                           .weight = forward->model->weights.head,
                           .n_rows = config->n_logits,
                           .n_k = config->hidden,
                           .input = normed,
                           .logits = rows};
    run_matrix(&matrix);
    if (forward->sink.logits == NULL) run_in_group(group, group->n_panels, targets_of_panel, (void *)group);
}

void lmc_group_head(const lmc_group_t *group) {
    const lmc_transformer_model_t *model = group->forward->model;
    const float *gain = model->vectors + model->config.n_layers * lmc_layer_vectors_length(&model->config);
    normalise(group, gain, gain + model->config.hidden, group_hidden(group));
    size_t most = group->forward->head_panels, n_parts = (group->n_panels + most - 1) / most;
    size_t step = (group->n_panels + n_parts - 1) / n_parts;
    for (size_t i = 0; i < group->n_panels; i += step) {
        size_t left = group->n_panels - i;
        lmc_group_t part = {group->forward, group->first_panel + i, left < step ? left : step, group->slot};
        head_of_panels(&part, buffers_of(group)->normed + i * model->config.hidden * LMC_LANES);
    }
}

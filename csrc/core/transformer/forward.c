/* The layers, on groups of panels. Only the order of work is decided here, never that of a sum:
 * sums live in the kernels. No memory is allocated and nothing is checked.
 *
 * Words of this room:
 *   lane       one token on its way through the layers; vectors of a processor run over lanes.
 *   panel      LMC_LANES (16) lanes side by side, feature-major: panel[feature * 16 + lane]. In a pass
 *              the lanes are consecutive positions of one sequence, in a step tokens of several streams.
 *   group      up to LMC_GROUP_PANELS (8) panels that go through a layer together, so that a block of
 *              weights is read (and widened to binary32) once for all of them.
 *   slot       one thread's place in a call, with buffers of its own; a task runs in a slot. Of weights,
 *              the named place that a tensor fills (transformer.h).
 *   chain      one sum: fma over k, ascending from +0. A chain may be cut into pieces that resume, never
 *              split into partial sums: so its bits do not depend on who computes it.
 *   workspace  the memory that the caller gives for one call.
 *
 *   A sequence of 37 tokens in a pass:        The workspace, in this order:
 *
 *     lane       0    1   ...   15             panels     which token, stream and row each lane is
 *     panel 0    t0   t1  ...  t15             statuses   of each panel, with targets
 *     panel 1    t16  t17 ...  t31             hidden     the residual stream of all panels
 *     panel 2    t32  ... t36  -- --           queries    of all panels, from one stage to the next
 *                                              keys, values   in a pass: of two layers, in turn
 *     a group: panels 0 to 2, all features     per slot   normed, wide, attended, residual, logits (codes in
 *     of one lane 16 floats apart                         int8) of a group; widened weights, outputs, scores
 *                                                         and one vector of a task
 *
 * A pass goes layer by layer: lmc_group_project (norm, queries, keys, values) for all groups, then
 * lmc_group_finish (attention, MLP), because the panels of a sequence need each other's keys. */
#include <string.h>

#include "core/transformer/forward.h"
#include "core/base/parallel.h"

static const lmc_transformer_kernels_t *kernels_of(const lmc_forward_t *forward) {
    return forward->backend->transformer;
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
    float *output;      /* panels of output_rows features; NULL: rows are written to the lanes of logits */
    size_t output_rows;
    int has_codes; /* of the input, which the matrix before had too */
    /* What becomes of the outputs, where it is wanted. */
    float clip;
    const lmc_activation_rule_t *activation;
    const struct lmc_matrix
        *factors;         /* of the activations: the outputs of a matrix of the same shape and input */
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

/* product->n_rows rows from first_row on, the chains cut into pieces of block_k. With a buffer, 16-bit
 * weights are widened into it, with a gap between rows so that these do not lie a power of two apart and meet
 * in the cache. */
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

/* n_rows rows from first_row on for all panels of the group, to panels of output_rows features: a block of
 * weights is read (and widened) once. */
static void multiply_block(const lmc_matrix_t *matrix, size_t first_row, size_t n_rows, size_t output_rows,
                           float *output, float *weight_buffer) {
    const lmc_group_t *group = matrix->group;
    const lmc_transformer_kernels_t *kernels = kernels_of(group->forward);
    size_t n_lanes = lanes_of(group);
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
    const lmc_transformer_kernels_t *kernels = kernels_of(matrix->group->forward);
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

static void run_matrix(lmc_matrix_t *matrix) {
    matrix->block_rows = choose_block_rows(matrix);
    size_t n_blocks = (matrix->n_rows + matrix->block_rows - 1) / matrix->block_rows;
    if (matrix->weight.scales != NULL && !matrix->has_codes)
        run_in_group(matrix->group, matrix->group->n_panels, quantise_panel, matrix);
    run_in_group(matrix->group, n_blocks, matrix_block, matrix);
}

/* A linear map of a layer, all of whose outputs stay panels. */
static lmc_matrix_t linear_map(const lmc_group_t *group, size_t layer, lmc_layer_slot_t weight,
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

static void apply_linear(const lmc_group_t *group, size_t layer, lmc_layer_slot_t weight,
                         lmc_layer_slot_t bias, const float *input, float *output) {
    lmc_matrix_t matrix = linear_map(group, layer, weight, bias, input, output);
    run_matrix(&matrix);
}

/* Norms and residuals, a panel a task. */

typedef struct lmc_panelwise {
    const lmc_group_t *group;
    const float *gain, *bias;
    float *input, *output;
} lmc_panelwise_t;

static lmc_norm_rule_t norm_rule(const lmc_transformer_config_t *config) {
    return (lmc_norm_rule_t){config->norm, config->norm_epsilon};
}

static void norm_panel(void *argument, size_t index, size_t slot) {
    (void)slot;
    const lmc_panelwise_t *norm = (const lmc_panelwise_t *)argument;
    const lmc_transformer_config_t *config = &norm->group->forward->model->config;
    size_t offset = index * config->hidden * LMC_LANES;
    kernels_of(norm->group->forward)
        ->normalise(norm_rule(config), norm->input + offset, config->hidden, norm->gain, norm->bias,
                    norm->output + offset);
}

static void normalise(const lmc_group_t *group, const float *gain, const float *bias, float *input,
                      float *output) {
    lmc_panelwise_t norm = {group, gain, bias, input, output};
    run_in_group(group, group->n_panels, norm_panel, &norm);
}

/* Before attention or MLP: what these read. */
static const float *before(const lmc_group_t *group, size_t layer, lmc_layer_slot_t gain,
                           lmc_layer_slot_t bias) {
    const lmc_transformer_model_t *model = group->forward->model;
    if (!model->config.pre_norm) return group_hidden(group);
    normalise(group, lmc_layer_vector(model, layer, gain), lmc_layer_vector(model, layer, bias),
              group_hidden(group), buffers_of(group)->normed);
    return buffers_of(group)->normed;
}

/* After attention or MLP, in place. */
static void after(const lmc_group_t *group, size_t layer, lmc_layer_slot_t gain, lmc_layer_slot_t bias,
                  float *x) {
    const lmc_transformer_model_t *model = group->forward->model;
    if (model->config.post_norm)
        normalise(group, lmc_layer_vector(model, layer, gain), lmc_layer_vector(model, layer, bias), x, x);
}

static void add_to(const lmc_group_t *group, float *x, const float *y, float multiplier) {
    kernels_of(group->forward)
        ->add(x, y, multiplier, group->n_panels * group->forward->model->config.hidden * LMC_LANES);
}

/* Embedding. */

/* A row of a matrix among the model's weights, as binary32. */
static void read_row(const lmc_forward_t *forward, lmc_model_slot_t slot, size_t row, float *vector) {
    lmc_transformer_tensor_t tensor = forward->model->weights.slots[slot];
    size_t hidden = forward->model->config.hidden, element_bytes = tensor.dtype == LMC_FLOAT32 ? 4 : 2;
    kernels_of(forward)->widen((const char *)tensor.data + row * hidden * element_bytes, tensor.dtype, hidden,
                               vector);
}

static void embed_panel(void *argument, size_t index, size_t slot) {
    const lmc_group_t *group = (const lmc_group_t *)argument;
    const lmc_forward_t *forward = group->forward;
    const lmc_panel_t *panel = &forward->panels[group->first_panel + index];
    const lmc_transformer_config_t *config = &forward->model->config;
    size_t hidden = config->hidden;
    float *out = group_hidden(group) + index * hidden * LMC_LANES, *vector = forward->tasks[slot].vector;
    memset(out, 0, hidden * LMC_LANES * sizeof *out);
    for (size_t lane = 0; lane < panel->n_lanes; lane++) {
        /* Foreign only if the caller has changed his tokens since they were checked. */
        size_t token = (size_t)panel->tokens[lane];
        read_row(forward, LMC_MODEL_EMBEDDING, token < config->n_embeddings ? token : 0, vector);
        for (size_t i = 0; i < hidden; i++)
            out[i * LMC_LANES + lane] = lmc_mul(vector[i], config->embedding_multiplier);
        if (!config->learned_positions) continue;
        read_row(forward, LMC_MODEL_POSITIONS, panel->positions[lane], vector);
        for (size_t i = 0; i < hidden; i++)
            out[i * LMC_LANES + lane] = lmc_add(out[i * LMC_LANES + lane], vector[i]);
    }
}

void lmc_group_embed(const lmc_group_t *group) {
    run_in_group(group, group->n_panels, embed_panel, (void *)group);
}

/* Queries, keys, values. */

/* A layer of a group, and its part of the cache: of each stream, each head's ring of `kept` keys. */
typedef struct lmc_layer_task {
    const lmc_group_t *group;
    size_t layer, cache_start, kept;
    const lmc_layer_kind_t *kind;
    const float *cosines, *sines;
} lmc_layer_task_t;

static lmc_layer_task_t layer_task(const lmc_group_t *group, size_t layer) {
    const lmc_forward_t *forward = group->forward;
    const lmc_transformer_config_t *config = &forward->model->config;
    size_t kind = config->layer_kinds[layer], capacity = forward->cache.capacity, n_tokens = 0;
    for (size_t i = 0; i < layer && !forward->is_pass; i++)
        n_tokens += lmc_kept_tokens(config, config->layer_kinds[i], capacity);
    if (forward->is_pass) n_tokens = layer % 2 * capacity;
    return (lmc_layer_task_t){.group = group,
                              .layer = layer,
                              .cache_start =
                                  n_tokens * forward->cache.n_streams * config->n_kv_heads * config->head_dim,
                              .kept = forward->is_pass ? capacity : lmc_kept_tokens(config, kind, capacity),
                              .kind = &config->kinds[kind],
                              .cosines = forward->model->cosines[kind],
                              .sines = forward->model->sines[kind]};
}

/* Elements before the keys (or values) of one head of one stream. */
static size_t cache_offset(const lmc_layer_task_t *task, size_t stream, size_t kv_head) {
    const lmc_transformer_config_t *config = &task->group->forward->model->config;
    return task->cache_start + (stream * config->n_kv_heads + kv_head) * task->kept * config->head_dim;
}

/* A head of queries, keys or values of a panel, among the outputs of the maps. */
typedef enum lmc_part { LMC_QUERIES, LMC_KEYS, LMC_VALUES } lmc_part_t;

static float *part_of_head(const lmc_group_t *group, size_t panel_index, lmc_part_t part, size_t head) {
    const lmc_transformer_config_t *config = &group->forward->model->config;
    size_t first = part == LMC_QUERIES ? 0 : config->n_heads + (part == LMC_VALUES ? config->n_kv_heads : 0);
    size_t index = config->fused_qkv ? 3 * head + (size_t)part : first + head;
    return buffers_of(group)->wide +
           (panel_index * lmc_qkv_width(config) + index * config->head_dim) * LMC_LANES;
}

static void project_part(const lmc_group_t *group, size_t layer, lmc_layer_slot_t weight,
                         lmc_layer_slot_t bias, const float *input, float *output, int has_codes) {
    lmc_matrix_t matrix = linear_map(group, layer, weight, bias, input, output);
    matrix.output_rows = lmc_qkv_width(&group->forward->model->config);
    matrix.clip = group->forward->model->config.qkv_clip;
    matrix.has_codes = has_codes;
    run_matrix(&matrix);
}

/* The norms of all heads' queries and keys at once, a panel a task. */
static void norm_all_heads(void *argument, size_t panel_index, size_t slot) {
    (void)slot;
    const lmc_layer_task_t *task = (const lmc_layer_task_t *)argument;
    const lmc_transformer_model_t *model = task->group->forward->model;
    const lmc_transformer_config_t *config = &model->config;
    const lmc_transformer_kernels_t *kernels = kernels_of(task->group->forward);
    float *queries = part_of_head(task->group, panel_index, LMC_QUERIES, 0);
    float *keys = part_of_head(task->group, panel_index, LMC_KEYS, 0);
    kernels->normalise(norm_rule(config), queries, lmc_query_width(config),
                       lmc_layer_vector(model, task->layer, LMC_LAYER_Q_NORM_GAIN),
                       lmc_layer_vector(model, task->layer, LMC_LAYER_Q_NORM_BIAS), queries);
    kernels->normalise(norm_rule(config), keys, config->n_kv_heads * config->head_dim,
                       lmc_layer_vector(model, task->layer, LMC_LAYER_K_NORM_GAIN),
                       lmc_layer_vector(model, task->layer, LMC_LAYER_K_NORM_BIAS), keys);
}

/* Of one head's queries or keys. */
static void norm_head(const lmc_layer_task_t *task, lmc_layer_slot_t gain, lmc_layer_slot_t bias, size_t head,
                      float *x) {
    const lmc_transformer_model_t *model = task->group->forward->model;
    const lmc_transformer_config_t *config = &model->config;
    if (config->qk_norm != LMC_QK_NORM_HEAD && config->qk_norm != LMC_QK_NORM_EACH_HEAD) return;
    size_t offset = config->qk_norm == LMC_QK_NORM_EACH_HEAD ? head * config->head_dim : 0;
    kernels_of(task->group->forward)
        ->normalise(norm_rule(config), x, config->head_dim,
                    lmc_layer_vector(model, task->layer, gain) + offset,
                    lmc_layer_vector(model, task->layer, bias) + offset, x);
}

static void rotate_head(const lmc_layer_task_t *task, const lmc_panel_t *panel, float *gathered, float *x) {
    const lmc_forward_t *forward = task->group->forward;
    size_t n_pairs = task->kind->rotary.dims / 2, stride = forward->model->table_length;
    const float *cosines = task->cosines + panel->positions[0], *sines = task->sines + panel->positions[0];
    if (n_pairs == 0) return;
    if (forward->stepping) {
        float *gathered_sines = gathered + n_pairs * LMC_LANES;
        for (size_t i = 0; i < n_pairs; i++) {
            for (size_t lane = 0; lane < LMC_LANES; lane++) {
                size_t position = panel->positions[lane];
                gathered[i * LMC_LANES + lane] = task->cosines[i * stride + position];
                gathered_sines[i * LMC_LANES + lane] = task->sines[i * stride + position];
            }
        }
        cosines = gathered, sines = gathered_sines, stride = LMC_LANES;
    }
    kernels_of(forward)->rotate(x, n_pairs, cosines, sines, stride);
}

static void store_keys(const lmc_layer_task_t *task, const lmc_panel_t *panel, size_t kv_head,
                       const float *key) {
    const lmc_forward_t *forward = task->group->forward;
    size_t head_dim = forward->model->config.head_dim;
    if (!forward->stepping && panel->n_lanes == LMC_LANES && panel->positions[0] % LMC_LANES == 0) {
        float *target = forward->cache.keys + cache_offset(task, panel->streams[0], kv_head);
        memcpy(target + panel->positions[0] % task->kept * head_dim, key, head_dim * LMC_LANES * sizeof *key);
        return;
    }
    for (size_t lane = 0; lane < panel->n_lanes; lane++) {
        size_t position = panel->positions[lane] % task->kept, in_block = position % LMC_LANES;
        float *target = forward->cache.keys + cache_offset(task, panel->streams[lane], kv_head) +
                        (position - in_block) * head_dim + in_block;
        for (size_t d = 0; d < head_dim; d++)
            target[d * LMC_LANES] = key[d * LMC_LANES + lane];
    }
}

static void store_values(const lmc_layer_task_t *task, const lmc_panel_t *panel, size_t kv_head,
                         const float *value) {
    const lmc_forward_t *forward = task->group->forward;
    size_t head_dim = forward->model->config.head_dim;
    float *rows[LMC_LANES];
    for (size_t lane = 0; lane < panel->n_lanes; lane++) {
        rows[lane] = forward->cache.values + cache_offset(task, panel->streams[lane], kv_head) +
                     panel->positions[lane] % task->kept * head_dim;
    }
    kernels_of(forward)->transpose(value, head_dim, panel->n_lanes, rows);
}

/* One key head of one panel: its key and value go into the cache, the queries that meet it are kept. */
static void place_head(void *argument, size_t index, size_t slot) {
    const lmc_layer_task_t *task = (const lmc_layer_task_t *)argument;
    const lmc_group_t *group = task->group;
    const lmc_forward_t *forward = group->forward;
    const lmc_transformer_config_t *config = &forward->model->config;
    size_t panel_index = index / config->n_kv_heads, kv_head = index % config->n_kv_heads;
    size_t head_floats = config->head_dim * LMC_LANES, n_shared = config->n_heads / config->n_kv_heads;
    const lmc_panel_t *panel = &forward->panels[group->first_panel + panel_index];
    float *vector = forward->tasks[slot].vector;
    float *kept = forward->queries + (group->first_panel + panel_index) * config->n_heads * head_floats;
    for (size_t head = kv_head * n_shared; head < (kv_head + 1) * n_shared; head++) {
        float *query = part_of_head(group, panel_index, LMC_QUERIES, head);
        norm_head(task, LMC_LAYER_Q_NORM_GAIN, LMC_LAYER_Q_NORM_BIAS, head, query);
        rotate_head(task, panel, vector, query);
        memcpy(kept + head * head_floats, query, head_floats * sizeof *query);
    }
    float *key = part_of_head(group, panel_index, LMC_KEYS, kv_head);
    norm_head(task, LMC_LAYER_K_NORM_GAIN, LMC_LAYER_K_NORM_BIAS, kv_head, key);
    rotate_head(task, panel, vector, key);
    store_keys(task, panel, kv_head, key);
    store_values(task, panel, kv_head, part_of_head(group, panel_index, LMC_VALUES, kv_head));
}

void lmc_group_project(const lmc_group_t *group, size_t layer) {
    const lmc_transformer_config_t *config = &group->forward->model->config;
    lmc_layer_task_t task = layer_task(group, layer);
    const float *x = before(group, layer, LMC_LAYER_ATTENTION_NORM_GAIN, LMC_LAYER_ATTENTION_NORM_BIAS);
    if (config->fused_qkv) {
        project_part(group, layer, LMC_LAYER_QKV, LMC_LAYER_QKV_BIAS, x, buffers_of(group)->wide, 0);
    } else {
        project_part(group, layer, LMC_LAYER_Q, LMC_LAYER_Q_BIAS, x, part_of_head(group, 0, LMC_QUERIES, 0),
                     0);
        project_part(group, layer, LMC_LAYER_K, LMC_LAYER_K_BIAS, x, part_of_head(group, 0, LMC_KEYS, 0), 1);
        project_part(group, layer, LMC_LAYER_V, LMC_LAYER_V_BIAS, x, part_of_head(group, 0, LMC_VALUES, 0),
                     1);
    }
    if (config->qk_norm == LMC_QK_NORM_FULL) run_in_group(group, group->n_panels, norm_all_heads, &task);
    run_in_group(group, group->n_panels * config->n_kv_heads, place_head, &task);
}

/* Attention, MLP, residuals. */

static lmc_attention_t attention_of(const lmc_layer_task_t *task, size_t in_cache) {
    const lmc_forward_t *forward = task->group->forward;
    return (lmc_attention_t){.keys = forward->cache.keys + in_cache,
                             .values = forward->cache.values + in_cache,
                             .head_dim = forward->model->config.head_dim,
                             .capacity = task->kept,
                             .window = task->kind->window,
                             .softmax = forward->model->softmax};
}

/* n_queries <= LMC_QUERIES_MAX heads of a panel from `head` on that meet one key head; of each lane with its
 * own stream's keys and values. */
static void attend_streams(const lmc_layer_task_t *task, const lmc_panel_t *panel, size_t kv_head,
                           size_t n_queries, lmc_task_buffers_t buffers, const float *queries,
                           float *output) {
    const lmc_forward_t *forward = task->group->forward;
    size_t n_features = n_queries * forward->model->config.head_dim;
    float *of_lane = buffers.vector, *found = buffers.vector + n_features;
    size_t in_cache = cache_offset(task, panel->streams[0], kv_head);
    for (size_t lane = 0; lane < panel->n_lanes; lane++) {
        lmc_attention_t attention = attention_of(task, in_cache);
        if (lane + 1 < panel->n_lanes) in_cache = cache_offset(task, panel->streams[lane + 1], kv_head);
        attention.ahead = forward->cache.keys + in_cache;
        for (size_t i = 0; i < n_features; i++)
            of_lane[i] = queries[i * LMC_LANES + lane];
        kernels_of(forward)->attend_stream(&attention, of_lane, n_queries, panel->positions[lane],
                                           buffers.scores, found);
        for (size_t i = 0; i < n_features; i++)
            output[i * LMC_LANES + lane] = found[i];
    }
}

/* Heads of queries that a task takes, all of which meet the same keys. */
static size_t heads_per_task(const lmc_forward_t *forward) {
    const lmc_transformer_config_t *config = &forward->model->config;
    size_t n_shared = config->n_heads / config->n_kv_heads;
    if (!forward->stepping) return 1;
    return n_shared < LMC_QUERIES_MAX ? n_shared : LMC_QUERIES_MAX;
}

static size_t tasks_per_kv_head(const lmc_forward_t *forward) {
    const lmc_transformer_config_t *config = &forward->model->config;
    size_t n_shared = config->n_heads / config->n_kv_heads, n_heads = heads_per_task(forward);
    return (n_shared + n_heads - 1) / n_heads;
}

/* Some heads of a panel. Neighbours read the same keys. */
static void attend_heads(void *argument, size_t index, size_t slot) {
    const lmc_layer_task_t *task = (const lmc_layer_task_t *)argument;
    const lmc_group_t *group = task->group;
    const lmc_forward_t *forward = group->forward;
    const lmc_transformer_config_t *config = &forward->model->config;
    size_t panel_index = index % group->n_panels, part = index / group->n_panels;
    size_t kv_head = part / tasks_per_kv_head(forward), n_shared = config->n_heads / config->n_kv_heads;
    size_t first = part % tasks_per_kv_head(forward) * heads_per_task(forward), left = n_shared - first;
    size_t n_queries = left < heads_per_task(forward) ? left : heads_per_task(forward);
    const lmc_panel_t *panel = &forward->panels[group->first_panel + panel_index];
    size_t head_floats = config->head_dim * LMC_LANES;
    size_t offset = (panel_index * config->n_heads + kv_head * n_shared + first) * head_floats;
    const float *queries = forward->queries + group->first_panel * config->n_heads * head_floats + offset;
    float *output = buffers_of(group)->attended + offset;
    if (forward->stepping) {
        attend_streams(task, panel, kv_head, n_queries, forward->tasks[slot], queries, output);
        return;
    }
    lmc_attention_t attention = attention_of(task, cache_offset(task, panel->streams[0], kv_head));
    kernels_of(forward)->attend_panel(&attention, queries, panel->positions[0], panel->n_lanes,
                                      forward->tasks[slot].scores, output);
}

static void apply_mlp(const lmc_group_t *group, size_t layer, const float *input, float *output) {
    const lmc_transformer_model_t *model = group->forward->model;
    lmc_activation_rule_t rule = {.activation = model->config.activation};
    if (rule.activation == LMC_ACTIVATION_XIELU)
        memcpy(&rule.xielu, lmc_layer_vector(model, layer, LMC_LAYER_ACTIVATION), sizeof rule.xielu);
    float *wide = buffers_of(group)->wide;
    lmc_matrix_t up = linear_map(group, layer, LMC_LAYER_UP, LMC_LAYER_UP_BIAS, input, wide);
    lmc_matrix_t gate = linear_map(group, layer, LMC_LAYER_GATE, LMC_LAYER_GATE_BIAS, input, wide);
    lmc_matrix_t *activated = model->config.gated ? &gate : &up;
    activated->activation = &rule;
    if (model->config.gated) gate.factors = &up;
    run_matrix(activated);
    apply_linear(group, layer, LMC_LAYER_DOWN, LMC_LAYER_DOWN_BIAS, wide, output);
}

void lmc_group_finish(const lmc_group_t *group, size_t layer) {
    const lmc_transformer_config_t *config = &group->forward->model->config;
    const lmc_group_buffers_t *buffers = buffers_of(group);
    float *hidden = group_hidden(group), multiplier = config->residual_multiplier;
    lmc_layer_task_t task = layer_task(group, layer);
    size_t n_parts = config->n_kv_heads * tasks_per_kv_head(group->forward);
    run_in_group(group, group->n_panels * n_parts, attend_heads, &task);
    apply_linear(group, layer, LMC_LAYER_OUT, LMC_LAYER_OUT_BIAS, buffers->attended, buffers->residual);
    after(group, layer, LMC_LAYER_ATTENTION_POST_NORM_GAIN, LMC_LAYER_ATTENTION_POST_NORM_BIAS,
          buffers->residual);
    if (!config->parallel_residual) add_to(group, hidden, buffers->residual, multiplier);
    const float *x = config->shared_norm
                         ? before(group, layer, LMC_LAYER_ATTENTION_NORM_GAIN, LMC_LAYER_ATTENTION_NORM_BIAS)
                         : before(group, layer, LMC_LAYER_MLP_NORM_GAIN, LMC_LAYER_MLP_NORM_BIAS);
    apply_mlp(group, layer, x, buffers->attended);
    after(group, layer, LMC_LAYER_MLP_POST_NORM_GAIN, LMC_LAYER_MLP_POST_NORM_BIAS, buffers->attended);
    if (config->parallel_residual) add_to(group, buffers->attended, buffers->residual, 1.0f);
    add_to(group, hidden, buffers->attended, multiplier);
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
    const lmc_transformer_model_t *model = forward->model;
    lmc_matrix_t matrix = {.group = group,
                           .weight = model->weights.slots[LMC_MODEL_HEAD],
                           .bias = config->head_bias ? lmc_model_vector(model, LMC_MODEL_HEAD_BIAS) : NULL,
                           .n_rows = config->n_logits,
                           .n_k = config->hidden,
                           .input = normed,
                           .logits = rows};
    run_matrix(&matrix);
    if (forward->sink.logits == NULL) run_in_group(group, group->n_panels, targets_of_panel, (void *)group);
}

void lmc_group_head(const lmc_group_t *group) {
    const lmc_transformer_model_t *model = group->forward->model;
    normalise(group, lmc_model_vector(model, LMC_MODEL_FINAL_NORM_GAIN),
              lmc_model_vector(model, LMC_MODEL_FINAL_NORM_BIAS), group_hidden(group),
              buffers_of(group)->normed);
    size_t most = group->forward->head_panels, n_parts = (group->n_panels + most - 1) / most;
    size_t step = (group->n_panels + n_parts - 1) / n_parts;
    for (size_t i = 0; i < group->n_panels; i += step) {
        size_t left = group->n_panels - i;
        lmc_group_t part = {group->forward, group->first_panel + i, left < step ? left : step, group->slot};
        head_of_panels(&part, buffers_of(group)->normed + i * model->config.hidden * LMC_LANES);
    }
}

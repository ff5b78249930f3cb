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
 *   turned     of 16-bit weights: laid out as columns of 16 rows, tile by tile, which is what a product for
 *              few tokens reads; a product does it on its way, a chain of steps once for all of them.
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
#include "core/transformer/linear_map.h"

static void apply_linear(const lmc_group_t *group, size_t layer, lmc_layer_slot_t weight,
                         lmc_layer_slot_t bias, const float *input, float *output) {
    lmc_matrix_t matrix = lmc_linear_map(group, layer, weight, bias, input, output);
    lmc_run_matrix(&matrix);
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
    lmc_kernels_of(norm->group->forward)
        ->normalise(norm_rule(config), norm->input + offset, config->hidden, norm->gain, norm->bias,
                    norm->output + offset);
}

static void normalise(const lmc_group_t *group, const float *gain, const float *bias, float *input,
                      float *output) {
    lmc_panelwise_t norm = {group, gain, bias, input, output};
    lmc_run_in_group(group, group->n_panels, norm_panel, &norm);
}

/* Before attention or MLP: what these read. */
static const float *before(const lmc_group_t *group, size_t layer, lmc_layer_slot_t gain,
                           lmc_layer_slot_t bias) {
    const lmc_transformer_model_t *model = group->forward->model;
    if (!model->config.pre_norm) return lmc_group_hidden(group);
    normalise(group, lmc_layer_vector(model, layer, gain), lmc_layer_vector(model, layer, bias),
              lmc_group_hidden(group), lmc_buffers_of(group)->normed);
    return lmc_buffers_of(group)->normed;
}

/* After attention or MLP, in place. */
static void after(const lmc_group_t *group, size_t layer, lmc_layer_slot_t gain, lmc_layer_slot_t bias,
                  float *x) {
    const lmc_transformer_model_t *model = group->forward->model;
    if (model->config.post_norm)
        normalise(group, lmc_layer_vector(model, layer, gain), lmc_layer_vector(model, layer, bias), x, x);
}

static void add_to(const lmc_group_t *group, float *x, const float *y, float multiplier) {
    lmc_kernels_of(group->forward)
        ->add(x, y, multiplier, group->n_panels * group->forward->model->config.hidden * LMC_LANES);
}

/* Embedding. */

/* A row of a matrix among the model's weights, as binary32. */
static void read_row(const lmc_forward_t *forward, lmc_model_slot_t slot, size_t row, float *vector) {
    lmc_transformer_tensor_t tensor = forward->model->weights.slots[slot];
    size_t hidden = forward->model->config.hidden, element_bytes = tensor.dtype == LMC_FLOAT32 ? 4 : 2;
    lmc_kernels_of(forward)->widen((const char *)tensor.data + row * hidden * element_bytes, tensor.dtype,
                                   hidden, vector);
}

static void embed_panel(void *argument, size_t index, size_t slot) {
    const lmc_group_t *group = (const lmc_group_t *)argument;
    const lmc_forward_t *forward = group->forward;
    const lmc_panel_t *panel = &forward->panels[group->first_panel + index];
    const lmc_transformer_config_t *config = &forward->model->config;
    size_t hidden = config->hidden;
    float *out = lmc_group_hidden(group) + index * hidden * LMC_LANES, *vector = forward->tasks[slot].vector;
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
    lmc_run_in_group(group, group->n_panels, embed_panel, (void *)group);
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
    return lmc_buffers_of(group)->wide +
           (panel_index * lmc_qkv_width(config) + index * config->head_dim) * LMC_LANES;
}

static void project_part(const lmc_group_t *group, size_t layer, lmc_layer_slot_t weight,
                         lmc_layer_slot_t bias, const float *input, float *output, int has_codes) {
    lmc_matrix_t matrix = lmc_linear_map(group, layer, weight, bias, input, output);
    matrix.output_rows = lmc_qkv_width(&group->forward->model->config);
    matrix.clip = group->forward->model->config.qkv_clip;
    matrix.has_codes = has_codes;
    lmc_run_matrix(&matrix);
}

/* The norms of all heads' queries and keys at once, a panel a task. */
static void norm_all_heads(void *argument, size_t panel_index, size_t slot) {
    (void)slot;
    const lmc_layer_task_t *task = (const lmc_layer_task_t *)argument;
    const lmc_transformer_model_t *model = task->group->forward->model;
    const lmc_transformer_config_t *config = &model->config;
    const lmc_transformer_kernels_t *kernels = lmc_kernels_of(task->group->forward);
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
    lmc_kernels_of(task->group->forward)
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
    lmc_kernels_of(forward)->rotate(x, n_pairs, cosines, sines, stride);
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
    lmc_kernels_of(forward)->transpose(value, head_dim, panel->n_lanes, rows);
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
        project_part(group, layer, LMC_LAYER_QKV, LMC_LAYER_QKV_BIAS, x, lmc_buffers_of(group)->wide, 0);
    } else {
        project_part(group, layer, LMC_LAYER_Q, LMC_LAYER_Q_BIAS, x, part_of_head(group, 0, LMC_QUERIES, 0),
                     0);
        project_part(group, layer, LMC_LAYER_K, LMC_LAYER_K_BIAS, x, part_of_head(group, 0, LMC_KEYS, 0), 1);
        project_part(group, layer, LMC_LAYER_V, LMC_LAYER_V_BIAS, x, part_of_head(group, 0, LMC_VALUES, 0),
                     1);
    }
    if (config->qk_norm == LMC_QK_NORM_FULL) lmc_run_in_group(group, group->n_panels, norm_all_heads, &task);
    lmc_run_in_group(group, group->n_panels * config->n_kv_heads, place_head, &task);
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
        lmc_kernels_of(forward)->attend_stream(&attention, of_lane, n_queries, panel->positions[lane],
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
    float *output = lmc_buffers_of(group)->attended + offset;
    if (forward->stepping) {
        attend_streams(task, panel, kv_head, n_queries, forward->tasks[slot], queries, output);
        return;
    }
    lmc_attention_t attention = attention_of(task, cache_offset(task, panel->streams[0], kv_head));
    lmc_kernels_of(forward)->attend_panel(&attention, queries, panel->positions[0], panel->n_lanes,
                                          forward->tasks[slot].scores, output);
}

static void apply_mlp(const lmc_group_t *group, size_t layer, const float *input, float *output) {
    const lmc_transformer_model_t *model = group->forward->model;
    lmc_activation_rule_t rule = {.activation = model->config.activation};
    if (rule.activation == LMC_ACTIVATION_XIELU)
        memcpy(&rule.xielu, lmc_layer_vector(model, layer, LMC_LAYER_ACTIVATION), sizeof rule.xielu);
    float *wide = lmc_buffers_of(group)->wide;
    lmc_matrix_t up = lmc_linear_map(group, layer, LMC_LAYER_UP, LMC_LAYER_UP_BIAS, input, wide);
    lmc_matrix_t gate = lmc_linear_map(group, layer, LMC_LAYER_GATE, LMC_LAYER_GATE_BIAS, input, wide);
    lmc_matrix_t *activated = model->config.gated ? &gate : &up;
    activated->activation = &rule;
    if (model->config.gated) gate.factors = &up;
    lmc_run_matrix(activated);
    apply_linear(group, layer, LMC_LAYER_DOWN, LMC_LAYER_DOWN_BIAS, wide, output);
}

void lmc_group_finish(const lmc_group_t *group, size_t layer) {
    const lmc_transformer_config_t *config = &group->forward->model->config;
    const lmc_group_buffers_t *buffers = lmc_buffers_of(group);
    float *hidden = lmc_group_hidden(group), multiplier = config->residual_multiplier;
    lmc_layer_task_t task = layer_task(group, layer);
    size_t n_parts = config->n_kv_heads * tasks_per_kv_head(group->forward);
    lmc_run_in_group(group, group->n_panels * n_parts, attend_heads, &task);
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
    lmc_rows_t rows = {.data = lmc_buffers_of(group)->logits + index * LMC_LANES * stride,
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
            rows[i] = lmc_buffers_of(group)->logits + i * lmc_logits_stride(config);
    }
    const lmc_transformer_model_t *model = forward->model;
    lmc_matrix_t matrix = {.group = group,
                           .weight = model->weights.slots[LMC_MODEL_HEAD],
                           .bias = config->head_bias ? lmc_model_vector(model, LMC_MODEL_HEAD_BIAS) : NULL,
                           .n_rows = config->n_logits,
                           .n_k = config->hidden,
                           .input = normed,
                           .logits = rows};
    lmc_run_matrix(&matrix);
    if (forward->sink.logits == NULL)
        lmc_run_in_group(group, group->n_panels, targets_of_panel, (void *)group);
}

void lmc_group_head(const lmc_group_t *group) {
    const lmc_transformer_model_t *model = group->forward->model;
    normalise(group, lmc_model_vector(model, LMC_MODEL_FINAL_NORM_GAIN),
              lmc_model_vector(model, LMC_MODEL_FINAL_NORM_BIAS), lmc_group_hidden(group),
              lmc_buffers_of(group)->normed);
    size_t most = group->forward->head_panels, n_parts = (group->n_panels + most - 1) / most;
    size_t step = (group->n_panels + n_parts - 1) / n_parts;
    for (size_t i = 0; i < group->n_panels; i += step) {
        size_t left = group->n_panels - i;
        lmc_group_t part = {group->forward, group->first_panel + i, left < step ? left : step, group->slot};
        head_of_panels(&part, lmc_buffers_of(group)->normed + i * model->config.hidden * LMC_LANES);
    }
}

/* The exact engine's entry points: what they check, how they cut the caller's memory, and which thread gets
 * which panels. The layers themselves are in forward.c, checks of a config in config.c, tables in
 * position_tables.c. */
#include <string.h>

#include "core/transformer/forward.h"
#include "core/base/parallel.h"
#include "core/base/size.h"

/* Per-slot cap on buffered logits; exceeded only when one panel of 16 rows is larger. */
#define LMC_LOGITS_BYTES_MAX ((size_t)16 << 20)
/* Below this many weights in its layers a model is so quick that streams are spread over threads, not the
 * rows of a matrix: each matrix would be done before the threads have met. */
#define LMC_SMALL_MODEL_WEIGHTS ((size_t)1 << 21)

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Memory. */

static lmc_arena_t arena_on(void *memory) {
    return (lmc_arena_t){memory == NULL ? NULL : lmc_align(memory, LMC_HOST_ALIGNMENT), 0,
                         LMC_HOST_ALIGNMENT};
}

/* What a call needs; 0 for what it does not. */
typedef struct lmc_demand {
    size_t n_panels, n_slots;
    size_t own_cache_streams; /* a pass brings its own cache: two layers of it */
    size_t capacity;          /* keys that one query can meet */
    int has_targets;
} lmc_demand_t;

static size_t panels_of_logits(const lmc_transformer_config_t *config) {
    size_t panel_bytes = LMC_LANES * lmc_logits_stride(config) * sizeof(float);
    return larger(1, smaller(LMC_GROUP_PANELS, LMC_LOGITS_BYTES_MAX / panel_bytes));
}

static void cut_slot(lmc_arena_t *arena, const lmc_transformer_config_t *config, const lmc_demand_t *demand,
                     lmc_group_buffers_t *group, lmc_task_buffers_t *task) {
    size_t panel_floats = LMC_GROUP_PANELS * LMC_LANES, head_dim = config->head_dim;
    group->normed = lmc_arena_floats(arena, panel_floats * config->hidden);
    group->wide = lmc_arena_floats(arena, panel_floats * larger(lmc_qkv_width(config), config->intermediate));
    group->attended = lmc_arena_floats(arena, panel_floats * larger(lmc_query_width(config), config->hidden));
    group->residual = lmc_arena_floats(arena, panel_floats * config->hidden);
    group->logits = NULL;
    if (demand->has_targets)
        group->logits =
            lmc_arena_floats(arena, panels_of_logits(config) * LMC_LANES * lmc_logits_stride(config));
    size_t codes_bytes = lmc_int8_panel_bytes(lmc_longest_input(config));
    group->codes = config->int8 ? lmc_arena_cut(arena, LMC_GROUP_PANELS, codes_bytes) : NULL;
    task->weights = lmc_arena_floats(arena, LMC_WEIGHT_BUFFER_FLOATS);
    task->output = lmc_arena_floats(arena, panel_floats * LMC_BLOCK_ROWS);
    task->scores = lmc_arena_floats(arena, (demand->capacity + head_dim) * LMC_LANES);
    size_t angles = 0;
    for (size_t kind = 0; kind < config->n_kinds; kind++)
        angles = larger(angles, config->kinds[kind].rotary.dims * LMC_LANES);
    task->vector =
        lmc_arena_floats(arena, larger(larger(config->hidden, angles), 2 * LMC_QUERIES_MAX * head_dim));
}

/* Fills the pointers of forward and *panels, or with a NULL workspace only counts; returns the bytes, or 0 if
 * they are more than available_bytes. */
static size_t cut_workspace(const lmc_transformer_config_t *config, const lmc_demand_t *demand,
                            void *workspace, size_t available_bytes, lmc_forward_t *forward,
                            lmc_panel_t **panels) {
    for (int counting = 1; counting >= 0; counting--) {
        lmc_arena_t arena = arena_on(counting ? NULL : workspace);
        lmc_group_buffers_t group;
        lmc_task_buffers_t task;
        size_t panel_lanes = demand->n_panels * LMC_LANES;
        size_t cache_floats =
            2 * demand->own_cache_streams * demand->capacity * config->n_kv_heads * config->head_dim;
        *panels = (lmc_panel_t *)lmc_arena_cut(&arena, demand->n_panels, sizeof **panels);
        forward->groups = (lmc_group_buffers_t *)lmc_arena_cut(&arena, demand->n_slots, sizeof group);
        forward->tasks = (lmc_task_buffers_t *)lmc_arena_cut(&arena, demand->n_slots, sizeof task);
        forward->statuses =
            (lmc_status_t *)lmc_arena_cut(&arena, demand->n_panels, sizeof *forward->statuses);
        forward->error_rows = (size_t *)lmc_arena_cut(&arena, demand->n_panels, sizeof *forward->error_rows);
        forward->hidden = lmc_arena_floats(&arena, panel_lanes * config->hidden);
        forward->queries = lmc_arena_floats(&arena, panel_lanes * lmc_query_width(config));
        if (demand->own_cache_streams > 0) {
            forward->cache.keys = lmc_arena_floats(&arena, cache_floats);
            forward->cache.values = lmc_arena_floats(&arena, cache_floats);
        }
        for (size_t i = 0; i < demand->n_slots; i++)
            cut_slot(&arena, config, demand, counting ? &group : &forward->groups[i],
                     counting ? &task : &forward->tasks[i]);
        if (workspace == NULL) return arena.used_bytes + LMC_HOST_ALIGNMENT;
        if (counting && arena.used_bytes + LMC_HOST_ALIGNMENT > available_bytes) return 0;
    }
    return available_bytes;
}

static size_t count_workspace(const lmc_transformer_config_t *config, const lmc_demand_t *demand) {
    lmc_forward_t forward;
    lmc_panel_t *panels;
    return cut_workspace(config, demand, NULL, 0, &forward, &panels);
}

/* Who does what. */

typedef void (*lmc_stage_fn)(const lmc_group_t *group, size_t argument);

typedef struct lmc_stage {
    const lmc_forward_t *forward;
    lmc_stage_fn run;
    size_t argument;
} lmc_stage_t;

static void run_group(void *argument, size_t index, size_t slot) {
    const lmc_stage_t *stage = (const lmc_stage_t *)argument;
    const lmc_forward_t *forward = stage->forward;
    size_t first = index * forward->group_panels, left = forward->n_panels - first;
    lmc_group_t group = {forward, first, smaller(left, forward->group_panels), slot};
    stage->run(&group, stage->argument);
}

/* Groups side by side, or one after the other while forward->inner spreads the work of each. */
static void run_stage(const lmc_forward_t *forward, const lmc_executor_t *executor, lmc_stage_fn run,
                      size_t argument) {
    lmc_stage_t stage = {forward, run, argument};
    size_t n_groups = (forward->n_panels + forward->group_panels - 1) / forward->group_panels;
    lmc_run_tasks(forward->inner != NULL ? NULL : executor, n_groups, run_group, &stage);
}

/* Panels for as few rounds as possible in which every slot has a group of about the same size. */
static void plan_groups(lmc_forward_t *forward, const lmc_executor_t *executor,
                        int whole_groups_in_parallel) {
    size_t n_slots = lmc_slot_count(executor), n_panels = forward->n_panels;
    if (n_slots > 1 && whole_groups_in_parallel) {
        size_t n_rounds = (n_panels + n_slots * LMC_GROUP_PANELS - 1) / (n_slots * LMC_GROUP_PANELS);
        forward->group_panels = (n_panels + n_slots * n_rounds - 1) / (n_slots * n_rounds);
    } else {
        forward->group_panels = smaller(LMC_GROUP_PANELS, n_panels);
        forward->inner = n_slots > 1 ? executor : NULL;
    }
    forward->head_panels =
        forward->sink.logits != NULL ? LMC_GROUP_PANELS : panels_of_logits(&forward->model->config);
}

static void stage_first(const lmc_group_t *group, size_t argument) {
    (void)argument;
    lmc_group_embed(group);
    lmc_group_project(group, 0);
}

static void stage_layer(const lmc_group_t *group, size_t layer) {
    lmc_group_finish(group, layer);
    if (layer + 1 < group->forward->model->config.n_layers) lmc_group_project(group, layer + 1);
}

static void stage_head(const lmc_group_t *group, size_t argument) {
    (void)argument;
    lmc_group_head(group);
}

static void stage_all(const lmc_group_t *group, size_t argument) {
    (void)argument;
    lmc_group_embed(group);
    for (size_t layer = 0; layer < group->forward->model->config.n_layers; layer++) {
        lmc_group_project(group, layer);
        lmc_group_finish(group, layer);
    }
    lmc_group_head(group);
}

/* Panels of one stream need each other's keys, so that all of them stand before a layer's attention. */
static void run_layers(const lmc_forward_t *forward, const lmc_executor_t *executor) {
    run_stage(forward, executor, stage_first, 0);
    for (size_t layer = 0; layer < forward->model->config.n_layers; layer++)
        run_stage(forward, executor, stage_layer, layer);
}

static lmc_forward_t forward_of(const lmc_context_t *context, const lmc_transformer_model_t *model) {
    lmc_forward_t forward;
    memset(&forward, 0, sizeof forward);
    forward.model = model;
    forward.backend = context->backend;
    return forward;
}

/* Panels of one stretch of a stream; returns how many. row is the sink's row of the first token. */
static size_t fill_panels(lmc_panel_t *panels, const int64_t *tokens, size_t n_tokens, size_t stream,
                          size_t position, size_t row) {
    size_t n_panels = 0;
    for (size_t t = 0; t < n_tokens; t += LMC_LANES) {
        lmc_panel_t *panel = &panels[n_panels++];
        panel->n_lanes = smaller(LMC_LANES, n_tokens - t);
        for (size_t lane = 0; lane < panel->n_lanes; lane++) {
            panel->tokens[lane] = tokens[t + lane];
            panel->streams[lane] = stream;
            panel->positions[lane] = position + t + lane;
            panel->rows[lane] = row + t + lane;
        }
    }
    return n_panels;
}

/* First index of a token outside [0, n_embeddings), or n_tokens. */
static size_t find_foreign_token(const int64_t *tokens, size_t n_tokens, size_t n_allowed) {
    size_t i = 0;
    while (i < n_tokens && tokens[i] >= 0 && (uint64_t)tokens[i] < n_allowed)
        i++;
    return i;
}

/* Pass. */

static lmc_demand_t pass_demand(size_t n_sequences, size_t n_tokens, size_t n_slots, int has_targets) {
    size_t capacity = lmc_round_up(n_tokens, LMC_LANES);
    return (lmc_demand_t){.n_panels = n_sequences * (capacity / LMC_LANES),
                          .n_slots = n_slots,
                          .own_cache_streams = n_sequences,
                          .capacity = capacity,
                          .has_targets = has_targets};
}

size_t lmc_transformer_pass_bound(const lmc_transformer_config_t *config, size_t n_sequences, size_t n_tokens,
                                  size_t n_slots, int has_targets) {
    lmc_demand_t demand = pass_demand(n_sequences, n_tokens, n_slots, has_targets);
    return count_workspace(config, &demand);
}

static lmc_status_t check_batch(const lmc_transformer_config_t *config, const lmc_transformer_batch_t *batch,
                                const lmc_transformer_sink_t *sink, size_t *error_row) {
    if (batch->n_tokens > config->context_length) return LMC_ERROR_CAPACITY;
    if (batch->n_tokens > batch->row_stride) return LMC_ERROR_ARGUMENT;
    if (sink->logits == NULL && (sink->vocab_size == 0 || sink->vocab_size > config->n_logits))
        return LMC_ERROR_VOCAB_SIZE;
    for (size_t s = 0; s < batch->n_sequences; s++) {
        size_t length = batch->lengths == NULL ? batch->n_tokens : batch->lengths[s];
        if (length > batch->n_tokens) return LMC_ERROR_ARGUMENT;
        size_t row = s * batch->row_stride,
               t = find_foreign_token(batch->tokens + row, length, config->n_embeddings);
        *error_row = row + t;
        if (t < length) return LMC_ERROR_TOKEN;
        if (sink->logits != NULL) continue;
        t = find_foreign_token(sink->targets + row, length, sink->vocab_size);
        *error_row = row + t;
        if (t < length) return LMC_ERROR_TOKEN;
    }
    return LMC_OK;
}

lmc_status_t lmc_transformer_pass(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                  const lmc_transformer_batch_t *batch, const lmc_transformer_sink_t *sink,
                                  void *workspace, size_t workspace_bytes, size_t *error_row) {
    const lmc_transformer_config_t *config = &model->config;
    lmc_status_t status = check_batch(config, batch, sink, error_row);
    if (status != LMC_OK || batch->n_sequences == 0 || batch->n_tokens == 0) return status;
    lmc_forward_t forward = forward_of(context, model);
    lmc_panel_t *panels;
    size_t n_slots = lmc_slot_count(context->executor);
    lmc_demand_t demand = pass_demand(batch->n_sequences, batch->n_tokens, n_slots, sink->logits == NULL);
    if (cut_workspace(config, &demand, workspace, workspace_bytes, &forward, &panels) == 0)
        return LMC_ERROR_CAPACITY;
    forward.cache.n_streams = batch->n_sequences;
    forward.cache.capacity = demand.capacity;
    forward.is_pass = 1;
    forward.sink = *sink;
    forward.panels = panels;
    for (size_t s = 0; s < batch->n_sequences; s++) {
        size_t row = s * batch->row_stride,
               length = batch->lengths == NULL ? batch->n_tokens : batch->lengths[s];
        forward.n_panels += fill_panels(panels + forward.n_panels, batch->tokens + row, length, s, 0, row);
    }
    if (forward.n_panels == 0) return LMC_OK;
    plan_groups(&forward, context->executor, forward.n_panels >= 2 * n_slots);
    run_layers(&forward, context->executor);
    run_stage(&forward, context->executor, stage_head, 0);
    for (size_t i = 0; sink->logits == NULL && i < forward.n_panels; i++) {
        *error_row = forward.error_rows[i];
        if (forward.statuses[i] != LMC_OK) return forward.statuses[i];
    }
    return LMC_OK;
}

/* Cache, prefill, step. */

static size_t cache_floats(const lmc_transformer_config_t *config, size_t n_streams, size_t n_tokens) {
    size_t capacity = lmc_round_up(n_tokens, LMC_LANES), kept = 0;
    for (size_t i = 0; i < config->n_layers; i++)
        kept += lmc_kept_tokens(config, config->layer_kinds[i], capacity);
    return kept * n_streams * config->n_kv_heads * config->head_dim;
}

size_t lmc_transformer_cache_bound(const lmc_transformer_config_t *config, size_t n_streams,
                                   size_t n_tokens) {
    /* Of one stream below 2^54: config_check. */
    if (n_streams > SIZE_MAX / 16 / larger(cache_floats(config, 1, n_tokens), 1)) return SIZE_MAX;
    size_t floats_bytes =
        lmc_round_up(cache_floats(config, n_streams, n_tokens) * sizeof(float), LMC_HOST_ALIGNMENT);
    return 2 * floats_bytes + lmc_round_up(n_streams * sizeof(size_t), LMC_HOST_ALIGNMENT) +
           LMC_HOST_ALIGNMENT;
}

lmc_status_t lmc_transformer_cache_init(const lmc_transformer_config_t *config, size_t n_streams,
                                        size_t n_tokens, void *memory, size_t memory_bytes,
                                        lmc_transformer_cache_t *cache) {
    if (n_streams == 0 || n_tokens == 0 || n_tokens > config->context_length) return LMC_ERROR_ARGUMENT;
    if (memory_bytes < lmc_transformer_cache_bound(config, n_streams, n_tokens)) return LMC_ERROR_CAPACITY;
    lmc_arena_t arena = arena_on(memory);
    cache->positions = (size_t *)lmc_arena_cut(&arena, n_streams, sizeof(size_t));
    cache->keys = lmc_arena_floats(&arena, cache_floats(config, n_streams, n_tokens));
    cache->values = lmc_arena_floats(&arena, cache_floats(config, n_streams, n_tokens));
    cache->n_streams = n_streams;
    cache->capacity = lmc_round_up(n_tokens, LMC_LANES);
    memset(cache->positions, 0, n_streams * sizeof(size_t));
    return LMC_OK;
}

static size_t tokens_that_fit(const lmc_transformer_config_t *config, const lmc_transformer_cache_t *cache) {
    return smaller(config->context_length, cache->capacity);
}

static lmc_demand_t cached_demand(const lmc_transformer_config_t *config, size_t n_panels, size_t n_slots) {
    return (lmc_demand_t){.n_panels = n_panels,
                          .n_slots = n_slots,
                          .capacity = lmc_round_up(config->context_length, LMC_LANES)};
}

size_t lmc_transformer_prefill_bound(const lmc_transformer_config_t *config, size_t n_tokens,
                                     size_t n_slots) {
    lmc_demand_t demand = cached_demand(config, (n_tokens + LMC_LANES - 1) / LMC_LANES, n_slots);
    return count_workspace(config, &demand);
}

/* The head for the last token alone, which moves to the first lane of the first panel. */
static void head_of_last(lmc_forward_t *forward, lmc_panel_t *panels, const lmc_executor_t *executor) {
    size_t hidden = forward->model->config.hidden, last = forward->n_panels - 1;
    const float *from = forward->hidden + last * hidden * LMC_LANES + panels[last].n_lanes - 1;
    for (size_t i = 0; i < hidden; i++)
        forward->hidden[i * LMC_LANES] = from[i * LMC_LANES];
    panels[0].n_lanes = 1;
    panels[0].rows[0] = 0;
    forward->n_panels = 1;
    plan_groups(forward, executor, 0);
    run_stage(forward, executor, stage_head, 0);
}

/* A prefill brings this many tokens at a time, so that rings keep what the first of them sees. */
static size_t stretch_tokens(const lmc_transformer_config_t *config, const lmc_transformer_cache_t *cache,
                             size_t n_tokens) {
    size_t most = n_tokens;
    for (size_t kind = 0; kind < config->n_kinds; kind++) {
        if (lmc_kept_tokens(config, kind, cache->capacity) < cache->capacity)
            most = smaller(most, LMC_STRETCH_TOKENS);
    }
    return most;
}

lmc_status_t lmc_transformer_prefill(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                     lmc_transformer_cache_t *cache, size_t stream, const int64_t *tokens,
                                     size_t n_tokens, float *logits, void *workspace, size_t workspace_bytes,
                                     size_t *error_row) {
    const lmc_transformer_config_t *config = &model->config;
    *error_row = 0;
    if (stream >= cache->n_streams || n_tokens == 0) return LMC_ERROR_ARGUMENT;
    size_t position = cache->positions[stream], limit = tokens_that_fit(config, cache);
    if (position > limit || n_tokens > limit - position) return LMC_ERROR_CAPACITY;
    *error_row = find_foreign_token(tokens, n_tokens, config->n_embeddings);
    if (*error_row < n_tokens) return LMC_ERROR_TOKEN;
    lmc_forward_t forward = forward_of(context, model);
    lmc_panel_t *panels;
    size_t n_slots = lmc_slot_count(context->executor), stretch = stretch_tokens(config, cache, n_tokens);
    lmc_demand_t demand = cached_demand(config, (n_tokens + LMC_LANES - 1) / LMC_LANES, n_slots);
    if (cut_workspace(config, &demand, workspace, workspace_bytes, &forward, &panels) == 0)
        return LMC_ERROR_CAPACITY;
    forward.cache = *cache;
    forward.sink.logits = logits;
    forward.panels = panels;
    for (size_t t = 0; t < n_tokens; t += stretch) {
        size_t n = smaller(stretch, n_tokens - t);
        forward.n_panels = fill_panels(panels, tokens + t, n, stream, position + t, 0);
        forward.inner = NULL;
        plan_groups(&forward, context->executor, forward.n_panels >= 2 * n_slots);
        run_layers(&forward, context->executor);
    }
    if (logits != NULL) head_of_last(&forward, panels, context->executor);
    cache->positions[stream] = position + n_tokens;
    return LMC_OK;
}

/* Where every slot gets a panel of its own there are no more panels than slots. */
static lmc_demand_t step_demand(const lmc_transformer_config_t *config, size_t n_streams, size_t n_slots) {
    return cached_demand(config, larger((n_streams + LMC_LANES - 1) / LMC_LANES, n_slots), n_slots);
}

size_t lmc_transformer_step_bound(const lmc_transformer_config_t *config, size_t n_streams, size_t n_slots) {
    lmc_demand_t demand = step_demand(config, n_streams, n_slots);
    return count_workspace(config, &demand);
}

/* Streams of a cache from `first` on, before `end`. */
typedef struct lmc_streams {
    const lmc_transformer_cache_t *cache;
    const uint8_t *active;
    size_t first, end;
} lmc_streams_t;

static int is_active(lmc_streams_t streams, size_t stream) {
    return streams.active == NULL || streams.active[stream];
}

static lmc_status_t check_step(const lmc_transformer_config_t *config, lmc_streams_t streams,
                               const int64_t *tokens, size_t *error_row) {
    for (size_t s = streams.first; s < streams.end; s++) {
        if (!is_active(streams, s)) continue;
        *error_row = s;
        if (streams.cache->positions[s] >= tokens_that_fit(config, streams.cache)) return LMC_ERROR_CAPACITY;
        if (find_foreign_token(tokens + s, 1, config->n_embeddings) == 0) return LMC_ERROR_TOKEN;
    }
    return LMC_OK;
}

/* Active streams, packed into as few lanes as possible, of which a panel has at most panel_lanes. */
static size_t fill_step_panels(lmc_panel_t *panels, lmc_streams_t streams, const int64_t *tokens,
                               size_t panel_lanes) {
    size_t n_lanes = 0;
    for (size_t s = streams.first; s < streams.end; s++) {
        if (!is_active(streams, s)) continue;
        lmc_panel_t *panel = &panels[n_lanes / panel_lanes];
        size_t lane = n_lanes++ % panel_lanes;
        if (lane == 0) memset(panel, 0, sizeof *panel);
        panel->n_lanes = lane + 1;
        panel->tokens[lane] = tokens[s];
        panel->streams[lane] = panel->rows[lane] = s;
        panel->positions[lane] = streams.cache->positions[s];
    }
    return (n_lanes + panel_lanes - 1) / panel_lanes;
}

size_t lmc_count_active(const uint8_t *active, size_t first, size_t end) {
    size_t n = 0;
    for (size_t s = first; s < end; s++)
        n += active == NULL || active[s];
    return n;
}

int lmc_is_small(const lmc_transformer_config_t *config) {
    size_t layer_weights = config->hidden * (lmc_qkv_width(config) + lmc_query_width(config) +
                                             (config->gated ? 3 : 2) * config->intermediate);
    return config->n_layers * layer_weights < LMC_SMALL_MODEL_WEIGHTS;
}

lmc_status_t lmc_check_step(const lmc_transformer_config_t *config, const lmc_transformer_cache_t *cache,
                            const int64_t *tokens, const uint8_t *active, size_t *error_row) {
    return check_step(config, (lmc_streams_t){cache, active, 0, cache->n_streams}, tokens, error_row);
}

lmc_status_t lmc_step_streams(const lmc_context_t *context, const lmc_transformer_model_t *model,
                              lmc_transformer_cache_t *cache, size_t first, size_t end, const int64_t *tokens,
                              const uint8_t *active, float *logits, void *workspace, size_t workspace_bytes,
                              size_t *error_row) {
    const lmc_transformer_config_t *config = &model->config;
    lmc_streams_t streams = {cache, active, first, end};
    lmc_status_t status = check_step(config, streams, tokens, error_row);
    size_t n_active = lmc_count_active(active, first, end);
    if (status != LMC_OK || n_active == 0) return status;
    lmc_forward_t forward = forward_of(context, model);
    lmc_panel_t *panels;
    size_t n_slots = lmc_slot_count(context->executor), share = (n_active + n_slots - 1) / n_slots;
    lmc_demand_t demand = step_demand(config, n_active, n_slots);
    if (cut_workspace(config, &demand, workspace, workspace_bytes, &forward, &panels) == 0)
        return LMC_ERROR_CAPACITY;
    forward.cache = *cache;
    forward.sink.logits = logits;
    forward.stepping = 1;
    forward.panels = panels;
    int small = lmc_is_small(config);
    forward.n_panels =
        fill_step_panels(panels, streams, tokens, small ? smaller(LMC_LANES, share) : LMC_LANES);
    plan_groups(&forward, context->executor, small);
    run_stage(&forward, context->executor, stage_all, 0);
    for (size_t s = first; s < end; s++)
        cache->positions[s] += (size_t)is_active(streams, s);
    return LMC_OK;
}

lmc_status_t lmc_transformer_step(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                  lmc_transformer_cache_t *cache, const int64_t *tokens,
                                  const uint8_t *active, float *logits, void *workspace,
                                  size_t workspace_bytes, size_t *error_row) {
    return lmc_step_streams(context, model, cache, 0, cache->n_streams, tokens, active, logits, workspace,
                            workspace_bytes, error_row);
}

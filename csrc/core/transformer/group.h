/* What the files of the forward pass share: panels, groups, their memory, and the sizes that follow from a
 * config. forward.c has the words. */
#ifndef LLMCOMP_CORE_TRANSFORMER_GROUP_H
#define LLMCOMP_CORE_TRANSFORMER_GROUP_H

#include "core/base/parallel.h"
#include "core/coding/row_kernels.h"
#include "core/int8/kernels.h"
#include "core/transformer/kernels.h"
#include "llmcomp/transformer.h"

/* Panels that share one reading of the weights, in blocks of rows. Chains are cut where a tile's columns
 * would no longer stay in cache for all the panels; a single panel takes rows whole, as they lie in memory.
 */
#define LMC_GROUP_PANELS 8
#define LMC_BLOCK_ROWS 48
#define LMC_BLOCK_K 1024
#define LMC_TASKS_PER_SLOT 4
/* 16-bit weights are widened first, into a block of BLOCK_ROWS x WIDENED_K, or for a single panel, which uses
 * each weight but once, of a tile's rows x WIDENED_K. ROW_GAP lies between rows in the buffer. */
#define LMC_WIDENED_K 512
#define LMC_ROW_GAP 16
#define LMC_WEIGHT_BUFFER_FLOATS ((size_t)LMC_BLOCK_ROWS * (LMC_WIDENED_K + LMC_ROW_GAP))

/* Floats between rows of buffered logits: not a power of two. */
static inline size_t lmc_logits_stride(const lmc_transformer_config_t *config) {
    return (config->n_logits + 63) / 64 * 64 + LMC_ROW_GAP;
}

/* Which tokens the lanes of a panel are. In a pass the lanes are consecutive positions of one stream. */
typedef struct lmc_panel {
    size_t n_lanes;
    int64_t tokens[LMC_LANES];
    size_t streams[LMC_LANES], positions[LMC_LANES];
    size_t rows[LMC_LANES]; /* where the sink has the lane's results */
} lmc_panel_t;

/* Memory of the group that a slot works on: panels of so many features. */
typedef struct lmc_group_buffers {
    float *normed;   /* [LMC_GROUP_PANELS][hidden] */
    float *wide;     /* [LMC_GROUP_PANELS][max(lmc_qkv_width, intermediate)] */
    float *attended; /* [LMC_GROUP_PANELS][max(n_heads * head_dim, hidden)] */
    float *residual; /* [LMC_GROUP_PANELS][hidden] */
    float *logits;   /* [head_panels * LMC_LANES][lmc_logits_stride], with targets */
    void *codes;     /* [LMC_GROUP_PANELS] lmc_int8_panel_t of lmc_longest_input; NULL: not int8 */
} lmc_group_buffers_t;

/* Memory of the task that a slot runs. */
typedef struct lmc_task_buffers {
    float *weights; /* [LMC_WEIGHT_BUFFER_FLOATS] */
    float *output;  /* [LMC_GROUP_PANELS][LMC_BLOCK_ROWS][LMC_LANES] of the head, or of what is gated */
    float *scores;  /* [capacity + head_dim][LMC_LANES] */
    float *vector;  /* [max(hidden, 2 * LMC_QUERIES_MAX * head_dim, rotary dims * LMC_LANES)] */
} lmc_task_buffers_t;

typedef struct lmc_forward {
    const lmc_transformer_model_t *model;
    const lmc_backend_t *backend;
    const lmc_executor_t *inner; /* spreads the work inside a group; NULL: a group stays in its thread */
    const lmc_panel_t *panels;
    size_t n_panels, group_panels, head_panels;
    int stepping;   /* lanes are streams, not positions */
    float *hidden;  /* [n_panels][hidden] panels */
    float *queries; /* [n_panels][lmc_query_width] panels */
    lmc_transformer_cache_t cache;
    /* A pass keeps whole sequences, of two layers in turn; else the cache has what each layer keeps. */
    int is_pass;
    lmc_group_buffers_t *groups; /* [n_slots] */
    lmc_task_buffers_t *tasks;   /* [n_slots] */
    lmc_transformer_sink_t sink;
    lmc_status_t *statuses; /* [n_panels], with targets */
    size_t *error_rows;     /* [n_panels] */
} lmc_forward_t;

/* A group of panels on its way; functions below work on all its panels. */
typedef struct lmc_group {
    const lmc_forward_t *forward;
    size_t first_panel, n_panels, slot;
} lmc_group_t;

/* Features of all queries; of all queries, keys and values; and the most that a linear map reads. */
static inline size_t lmc_query_width(const lmc_transformer_config_t *config) {
    return config->n_heads * config->head_dim;
}
static inline size_t lmc_qkv_width(const lmc_transformer_config_t *config) {
    return (config->n_heads + 2 * config->n_kv_heads) * config->head_dim;
}
static inline size_t lmc_longest_input(const lmc_transformer_config_t *config) {
    size_t longest = config->hidden > config->intermediate ? config->hidden : config->intermediate;
    return longest > lmc_query_width(config) ? longest : lmc_query_width(config);
}

/* Tokens of a stream that a layer of a kind keeps, of `capacity` that the cache is for: a multiple of 16. A
 * window is kept with room for the tokens that a prefill brings at a time. */
#define LMC_STRETCH_TOKENS ((size_t)256)
static inline size_t lmc_kept_tokens(const lmc_transformer_config_t *config, size_t kind, size_t capacity) {
    size_t window = config->kinds[kind].window;
    size_t kept = (window + LMC_STRETCH_TOKENS + LMC_LANES - 1) / LMC_LANES * LMC_LANES;
    return window != 0 && kept < capacity ? kept : capacity;
}

/* Where a vector is that belongs into a slot. */
static inline float *lmc_layer_vector(const lmc_transformer_model_t *model, size_t layer,
                                      lmc_layer_slot_t slot) {
    return model->vectors + layer * model->layer_vectors_length + model->layer_vector_offsets[slot];
}
static inline float *lmc_model_vector(const lmc_transformer_model_t *model, lmc_model_slot_t slot) {
    return model->vectors + model->model_vector_offsets[slot];
}

/* A group and its thread. */

static inline const lmc_transformer_kernels_t *lmc_kernels_of(const lmc_forward_t *forward) {
    return forward->backend->transformer;
}

/* Work inside a group. */

static inline void lmc_run_in_group(const lmc_group_t *group, size_t n_tasks, lmc_task_fn_t task,
                                    void *argument) {
    const lmc_executor_t *inner = group->forward->inner;
    if (inner != NULL) {
        lmc_run_tasks(inner, n_tasks, task, argument);
    } else {
        for (size_t i = 0; i < n_tasks; i++)
            task(argument, i, group->slot);
    }
}

static inline size_t lmc_lanes_of(const lmc_group_t *group) {
    const lmc_panel_t *panels = group->forward->panels + group->first_panel;
    return group->n_panels == 1 ? panels[0].n_lanes : LMC_LANES;
}

static inline float *lmc_group_hidden(const lmc_group_t *group) {
    return group->forward->hidden + group->first_panel * group->forward->model->config.hidden * LMC_LANES;
}

static inline lmc_group_buffers_t *lmc_buffers_of(const lmc_group_t *group) {
    return &group->forward->groups[group->slot];
}

/* Every matrix that the model has is there, and nothing that it has not. */
int lmc_transformer_has_tensors(const lmc_transformer_config_t *config,
                                const lmc_transformer_weights_t *weights);

#endif

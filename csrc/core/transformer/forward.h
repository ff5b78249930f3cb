/* Between transformer.c (checks, memory, who runs what) and forward.c (the layers). Not for users of the
 * library. */
#ifndef LLMCOMP_CORE_TRANSFORMER_FORWARD_H
#define LLMCOMP_CORE_TRANSFORMER_FORWARD_H

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
/* Short weights are widened first, into a block of BLOCK_ROWS x WIDENED_K, or for a single panel, which uses
 * each weight but once, of a tile's rows x WIDENED_K. ROW_GAP lies between rows in the buffer. */
#define LMC_WIDENED_K 512
#define LMC_ROW_GAP 16
#define LMC_WEIGHT_BUFFER_FLOATS ((size_t)LMC_BLOCK_ROWS * (LMC_WIDENED_K + LMC_ROW_GAP))

/* Floats between rows of logits that wait for their numbers: not a power of two. */
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
    float *wide;     /* [LMC_GROUP_PANELS][max(3 hidden, intermediate)] */
    float *attended; /* [LMC_GROUP_PANELS][hidden] */
    float *residual; /* [LMC_GROUP_PANELS][hidden] */
    float *logits;   /* [head_panels * LMC_LANES][lmc_logits_stride], with targets */
    void *codes;     /* [LMC_GROUP_PANELS] lmc_int8_panel_t of max(hidden, intermediate); NULL: not int8 */
} lmc_group_buffers_t;

/* Memory of the task that a slot runs. */
typedef struct lmc_task_buffers {
    float *weights; /* [LMC_WEIGHT_BUFFER_FLOATS] */
    float *output;  /* [LMC_GROUP_PANELS][LMC_BLOCK_ROWS][LMC_LANES] of the head */
    float *scores;  /* [capacity + head_dim][LMC_LANES] */
    float *vector;  /* [max(2 * hidden, rotary_dims * LMC_LANES)] */
} lmc_task_buffers_t;

typedef struct lmc_forward {
    const lmc_transformer_model_t *model;
    const lmc_backend_t *backend;
    const lmc_executor_t *inner; /* spreads the work inside a group; NULL: a group stays in its thread */
    const lmc_panel_t *panels;
    size_t n_panels, group_panels, head_panels;
    int stepping;   /* lanes are streams, not positions */
    float *hidden;  /* [n_panels][hidden] panels */
    float *queries; /* [n_panels][hidden] panels */
    lmc_transformer_cache_t cache;
    size_t cache_layers;         /* keys and values of layer l are in layer buffer l % cache_layers */
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

void lmc_group_embed(const lmc_group_t *group);
/* Norm, queries, keys and values of a layer; then, when every panel of the stream has got so far, the rest.
 */
void lmc_group_project(const lmc_group_t *group, size_t layer);
void lmc_group_finish(const lmc_group_t *group, size_t layer);
/* Final norm, head, and what the sink wants. */
void lmc_group_head(const lmc_group_t *group);

/* vectors of one layer inside model->vectors */
typedef struct lmc_layer_vectors {
    float *attention_norm_gain, *attention_norm_bias, *mlp_norm_gain, *mlp_norm_bias;
    float *qkv_bias, *dense_bias, *mlp_in_bias, *mlp_out_bias;
} lmc_layer_vectors_t;
size_t lmc_layer_vectors_length(const lmc_transformer_config_t *config);
lmc_layer_vectors_t lmc_layer_vectors_at(const lmc_transformer_model_t *model, size_t layer);

int lmc_transformer_has_matrices(const lmc_transformer_config_t *config,
                                 const lmc_transformer_weights_t *weights);

#endif

/* The linear maps of a group of panels: what forward.c asks for and linear_map.c computes, and how both reach
 * a group's memory and spread its tasks. */
#ifndef LLMCOMP_CORE_TRANSFORMER_LINEAR_MAP_H
#define LLMCOMP_CORE_TRANSFORMER_LINEAR_MAP_H

#include "core/base/parallel.h"
#include "core/transformer/forward.h"

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

/* A matrix product of a group. */
typedef struct lmc_matrix {
    const lmc_group_t *group;
    lmc_transformer_tensor_t weight; /* [n_rows][n_k] */
    const float *bias;
    size_t n_rows, n_k;
    size_t block_rows;  /* of a task; lmc_run_matrix chooses */
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

/* A map of a layer, all of whose outputs stay panels. */
lmc_matrix_t lmc_linear_map(const lmc_group_t *group, size_t layer, lmc_layer_slot_t weight,
                            lmc_layer_slot_t bias, const float *input, float *output);
/* Computes it, in blocks of rows that are the tasks of the group. */
void lmc_run_matrix(lmc_matrix_t *matrix);

#endif

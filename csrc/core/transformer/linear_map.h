/* The linear maps of a group of panels. */
#ifndef LLMCOMP_CORE_TRANSFORMER_LINEAR_MAP_H
#define LLMCOMP_CORE_TRANSFORMER_LINEAR_MAP_H

#include "core/transformer/group.h"

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

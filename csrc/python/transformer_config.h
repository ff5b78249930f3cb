/* The sizes of a model as both modules take them from Python. */
#ifndef LLMCOMP_PYTHON_TRANSFORMER_CONFIG_H
#define LLMCOMP_PYTHON_TRANSFORMER_CONFIG_H

#include <Python.h>

#include "llmcomp/transformer.h"

#define LMC_PY_CONFIG_SIZES 8

/* In the order of TransformerModel's arguments. */
static inline void lmc_py_config_set_sizes(lmc_transformer_config_t *config,
                                           const Py_ssize_t sizes[LMC_PY_CONFIG_SIZES]) {
    config->n_layers = (size_t)sizes[0];
    config->n_heads = (size_t)sizes[1];
    config->hidden = (size_t)sizes[2];
    config->intermediate = (size_t)sizes[3];
    config->n_embeddings = (size_t)sizes[4];
    config->n_logits = (size_t)sizes[5];
    config->context_length = (size_t)sizes[6];
    config->rotary_dims = (size_t)sizes[7];
}

#endif

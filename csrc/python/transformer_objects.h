/* The objects of the exact engine, for the two files that make them. */
#ifndef LLMCOMP_PYTHON_TRANSFORMER_OBJECTS_H
#define LLMCOMP_PYTHON_TRANSFORMER_OBJECTS_H

#include "python/common.h"

#include <stdatomic.h>

#include "llmcomp/transformer.h"

typedef struct transformer_model_object {
    PyObject_HEAD
    lmc_transformer_model_t model;
    lmc_transformer_layer_t *layers;
    void *tables;
    void *codes;      /* of the matrices, where these are 8-bit integers */
    PyObject *arrays; /* keeps alive what the weights are read from */
} transformer_model_object_t;

typedef struct transformer_session_object {
    PyObject_HEAD
    transformer_model_object_t *owner;
    lmc_transformer_cache_t cache;
    size_t n_tokens;
    void *memory, *workspace;
    size_t workspace_bytes;
    atomic_flag in_use;
} transformer_session_object_t;

#define LMC_PY_STREAMS_MAX ((Py_ssize_t)1 << 20)

/* TransformerModel.session(n_streams, n_tokens). */
PyObject *lmc_py_model_session(PyObject *model, PyObject *arguments);
extern PyType_Spec lmc_py_session_spec;

#endif

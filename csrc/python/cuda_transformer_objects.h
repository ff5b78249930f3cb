/* The exact engine's objects on a device, for the two files that make them. */
#ifndef LLMCOMP_PYTHON_CUDA_TRANSFORMER_OBJECTS_H
#define LLMCOMP_PYTHON_CUDA_TRANSFORMER_OBJECTS_H

#include "cuda/transformer/transformer.h"
#include "python/cuda_objects.h"

typedef struct cuda_model_object {
    PyObject_HEAD
    lmc_transformer_model_t placed;
    lmc_transformer_layer_t *layers; /* of the host, with pointers of the device: placed points to it */
    void *memory;
    size_t n_bytes;
    int device;
} cuda_model_object_t;

/* TransformerModel.session(n_layers, n_streams, n_tokens, n_rows). */
PyObject *lmc_py_cuda_model_session(PyObject *model, PyObject *arguments);
extern PyType_Spec lmc_py_cuda_session_spec;

#endif

/* What the files of the binding share: the module's state, errors from statuses, threads and the backend in use. */
#ifndef LLMCOMP_PYTHON_COMMON_H
#define LLMCOMP_PYTHON_COMMON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL llmcomp_core_ARRAY_API
#ifndef LMC_PY_IMPORT_ARRAY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "llmcomp/backend.h"
#include "llmcomp/status.h"

typedef struct lmc_module_state {
    PyObject *error;           /* llmcomp.errors.Error */
    PyTypeObject *encoder_type;
    PyTypeObject *decoder_type;
    PyTypeObject *neox_model_type;
    PyTypeObject *neox_session_type;
} lmc_module_state_t;

extern struct PyModuleDef lmc_module_definition;

/* The state of the module that defined `type` or a base of it; NULL with an exception set if there is none. */
lmc_module_state_t *lmc_py_state_of_type(PyTypeObject *type);

/* The context of this call: the backend of use_backend or LLMCOMP_BACKEND, the threads of LLMCOMP_THREADS.
 * executor is storage that must outlive the context. */
lmc_context_t lmc_py_context(lmc_executor_t *executor);

/* Each adds its types and functions to the module; -1 with an exception set on failure. */
int lmc_py_add_coding(PyObject *module);
int lmc_py_add_neox(PyObject *module);

#endif

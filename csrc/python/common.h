/* What the files of the binding share: the module's state, errors from statuses, the context of a call, and
 * logits and tokens as the core wants them. */
#ifndef LLMCOMP_PYTHON_COMMON_H
#define LLMCOMP_PYTHON_COMMON_H

#include "python/limited_api.h"

#define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL llmcomp_core_ARRAY_API
#ifndef LMC_PY_IMPORT_ARRAY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "llmcomp/backend.h"
#include "llmcomp/intervals.h"
#include "llmcomp/status.h"

typedef struct lmc_module_state {
    PyObject *error; /* llmcomp.errors.Error */
    PyTypeObject *encoder_type;
    PyTypeObject *decoder_type;
    PyTypeObject *transformer_model_type;
    PyTypeObject *transformer_session_type;
} lmc_module_state_t;

/* The state of the module that defined `type`; NULL with an exception set if there is none.
 */
lmc_module_state_t *lmc_py_state_of_type(PyTypeObject *type);

/* The context of this call: the backend and threads of use_backend, use_threads or the environment.
 * executor is storage that must outlive the context. */
lmc_context_t lmc_py_context(lmc_executor_t *executor);

/* Each adds its types and functions to the module; -1 with an exception set on failure. */
int lmc_py_add_settings(PyObject *module);
int lmc_py_add_coding(PyObject *module);
int lmc_py_add_transformer(PyObject *module);
int lmc_py_add_softmax(PyObject *module);

/* array.c */

/* Logits of the caller, [..., n_logits] in rows; owner keeps the memory. */
typedef struct lmc_py_logits {
    PyArrayObject *owner; /* float32, float16, or uint16 that holds bfloat16 */
    lmc_rows_t rows;      /* vocab_size already applied */
} lmc_py_logits_t;

/* Takes a NumPy array or an object with __dlpack__ on the CPU: without a copy where each row is contiguous
 * and the rows are evenly spaced; the core bears that others change logits while it reads them, not that they
 * free them. vocab_size 0 means the length of the last axis. -1 with an exception set on failure. */
int lmc_py_logits_parse(PyObject *error, PyObject *object, size_t vocab_size, lmc_py_logits_t *logits);
void lmc_py_logits_release(lmc_py_logits_t *logits);

/* int64, C-contiguous, of the shape that is expected: a copy, so that what is checked is what is used,
 * whatever other threads do to the caller's array. A new reference. */
PyArrayObject *lmc_py_integers_parse(PyObject *error, PyObject *object, const char *name, int n_dims,
                                     const npy_intp *shape);
/* As lmc_py_integers_parse, but perhaps the caller's own memory: who takes these copies them before checking
 * them. */
PyArrayObject *lmc_py_integers_borrow(PyObject *error, PyObject *object, const char *name, int n_dims,
                                      const npy_intp *shape);
/* Logits, and tokens of their shape without the last axis; both are released by the caller. */
int lmc_py_rows_parse(PyObject *error, PyObject *logits_object, PyObject *tokens_object, size_t vocab_size,
                      lmc_py_logits_t *logits, PyArrayObject **tokens);
/* bool, C-contiguous, [n], a copy as well; None gives NULL without an exception. */
int lmc_py_mask_parse(PyObject *error, PyObject *object, npy_intp n, PyArrayObject **mask);
/* None -> 0; else an int of 1 ... LMC_VOCAB_SIZE_MAX. */
int lmc_py_vocab_size_parse(PyObject *error, PyObject *object, size_t *vocab_size);

/* Raises llmcomp.Error for a status at a row: names the row, and the token where it is the fault. Returns
 * NULL. */
PyObject *lmc_py_raise_status(PyObject *error, lmc_status_t status, size_t row, const int64_t *tokens,
                              size_t vocab_size);

#endif

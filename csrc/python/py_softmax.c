/* The softmax of rows for Python: scores of logits that are already there, by no model of ours. */
#include "python/common.h"

static PyObject *log2_softmax(PyObject *module, PyObject *arguments) {
    PyObject *logits_object, *tokens_object, *vocab_object;
    lmc_module_state_t *state = PyModule_GetState(module);
    lmc_py_logits_t logits;
    PyArrayObject *tokens;
    size_t vocab_size, error_row = 0;
    if (!PyArg_ParseTuple(arguments, "OOO", &logits_object, &tokens_object, &vocab_object)) return NULL;
    if (lmc_py_vocab_size_parse(state->error, vocab_object, &vocab_size) < 0) return NULL;
    if (lmc_py_rows_parse(state->error, logits_object, tokens_object, vocab_size, &logits, &tokens) < 0)
        return NULL;
    PyObject *found = PyArray_EMPTY(PyArray_NDIM(tokens), PyArray_DIMS(tokens), NPY_FLOAT64, 0);
    if (found != NULL) {
        const int64_t *token_data = (const int64_t *)PyArray_DATA(tokens);
        double *found_data = (double *)PyArray_DATA((PyArrayObject *)found);
        lmc_executor_t executor;
        lmc_context_t context = lmc_py_context(&executor);
        lmc_status_t status;
        Py_BEGIN_ALLOW_THREADS
        status = lmc_log2_softmax(&context, &logits.rows, token_data, found_data, &error_row);
        Py_END_ALLOW_THREADS
        if (status != LMC_OK) {
            Py_CLEAR(found);
            lmc_py_raise_status(state->error, status, error_row, token_data, logits.rows.vocab_size);
        }
    }
    Py_DECREF(tokens);
    lmc_py_logits_release(&logits);
    return found;
}

static PyMethodDef softmax_functions[] = {
    {"log2_softmax", log2_softmax, METH_VARARGS,
     "log2_softmax(logits, tokens, vocab_size): see llmcomp.coding."},
    {NULL, NULL, 0, NULL},
};

int lmc_py_add_softmax(PyObject *module) {
    return PyModule_AddFunctions(module, softmax_functions);
}

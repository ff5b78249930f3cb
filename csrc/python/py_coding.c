/* Intervals and the coding of one stream at once for Python: parse, check, allocate, release the GIL, call,
 * raise. The objects that code streams side by side are in py_coding_streams.c. */
#include "python/coding_objects.h"

#include <string.h>

/* Intervals. */

static PyObject *new_uint64(int n_dims, const npy_intp *shape) {
    return PyArray_EMPTY(n_dims, (npy_intp *)shape, NPY_UINT64, 0);
}

static int triple_new(lmc_py_triple_t *triple, int n_dims, const npy_intp *shape) {
    triple->start = new_uint64(n_dims, shape);
    triple->freq = new_uint64(n_dims, shape);
    triple->total = new_uint64(n_dims, shape);
    return triple->start != NULL && triple->freq != NULL && triple->total != NULL ? 0 : -1;
}

int lmc_py_intervals_of(PyObject *error, const lmc_py_logits_t *logits, PyArrayObject *tokens,
                        PyArrayObject *mask, lmc_py_triple_t *triple) {
    if (triple_new(triple, PyArray_NDIM(tokens), PyArray_DIMS(tokens)) < 0) return -1;
    const int64_t *token_data = (const int64_t *)PyArray_DATA(tokens);
    const unsigned char *active = mask == NULL ? NULL : (const unsigned char *)PyArray_DATA(mask);
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    lmc_status_t status;
    size_t error_row = 0;
    Py_BEGIN_ALLOW_THREADS
    status = lmc_intervals(&context, &logits->rows, token_data, active, lmc_py_uint64_data(triple->start),
                           lmc_py_uint64_data(triple->freq), lmc_py_uint64_data(triple->total), &error_row);
    Py_END_ALLOW_THREADS
    if (status == LMC_OK) return 0;
    lmc_py_raise_status(error, status, error_row, token_data, logits->rows.vocab_size);
    return -1;
}

static PyObject *intervals(PyObject *module, PyObject *arguments) {
    PyObject *logits_object, *tokens_object, *vocab_object, *result = NULL;
    lmc_module_state_t *state = PyModule_GetState(module);
    lmc_py_logits_t logits;
    PyArrayObject *tokens;
    size_t vocab_size;
    lmc_py_triple_t triple = {NULL, NULL, NULL};
    if (!PyArg_ParseTuple(arguments, "OOO", &logits_object, &tokens_object, &vocab_object)) return NULL;
    if (lmc_py_vocab_size_parse(state->error, vocab_object, &vocab_size) < 0) return NULL;
    if (lmc_py_rows_parse(state->error, logits_object, tokens_object, vocab_size, &logits, &tokens) < 0)
        return NULL;
    if (lmc_py_intervals_of(state->error, &logits, tokens, NULL, &triple) == 0) {
        result = PyTuple_Pack(3, triple.start, triple.freq, triple.total);
    }
    lmc_py_triple_clear(&triple);
    Py_DECREF(tokens);
    lmc_py_logits_release(&logits);
    return result;
}

/* One stream at once. */

int lmc_py_encoder_reserve(lmc_encoder_t *stream, size_t n_symbols) {
    size_t needed = stream->n_bytes + (n_symbols + 1) * LMC_STEP_BYTES_MAX;
    if (needed <= stream->capacity_bytes) return 0;
    size_t capacity = stream->capacity_bytes * 2 > needed ? stream->capacity_bytes * 2 : needed;
    uint8_t *bytes = PyMem_RawRealloc(stream->bytes, capacity);
    if (bytes == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    stream->bytes = bytes;
    stream->capacity_bytes = capacity;
    return 0;
}

static PyObject *encode_stream(PyObject *error, const lmc_py_triple_t *triple, size_t n_symbols) {
    lmc_encoder_t stream;
    lmc_status_t status;
    size_t error_index = 0;
    lmc_encoder_init(&stream, NULL, 0);
    if (n_symbols > (size_t)PY_SSIZE_T_MAX / LMC_STEP_BYTES_MAX - 1) return PyErr_NoMemory();
    if (lmc_py_encoder_reserve(&stream, n_symbols) < 0) return NULL;
    const uint64_t *start = lmc_py_uint64_data(triple->start), *freq = lmc_py_uint64_data(triple->freq);
    const uint64_t *total = lmc_py_uint64_data(triple->total);
    Py_BEGIN_ALLOW_THREADS
    status = lmc_encoder_put(&stream, n_symbols, start, freq, total, &error_index);
    if (status == LMC_OK) status = lmc_encoder_end(&stream);
    Py_END_ALLOW_THREADS
    PyObject *payload = NULL;
    if (status != LMC_OK)
        lmc_py_raise_status(error, status, error_index, NULL, 0);
    else
        payload = PyBytes_FromStringAndSize((const char *)stream.bytes, (Py_ssize_t)stream.n_bytes);
    PyMem_RawFree(stream.bytes);
    return payload;
}

static PyObject *encode_intervals(PyObject *module, PyObject *arguments) {
    static const char *names[] = {"start", "freq", "total"};
    lmc_module_state_t *state = PyModule_GetState(module);
    PyObject *objects[3], *payload = NULL;
    PyArrayObject *arrays[3] = {NULL, NULL, NULL};
    npy_intp shape[1] = {0};
    if (!PyArg_ParseTuple(arguments, "OOO", &objects[0], &objects[1], &objects[2])) return NULL;
    for (int i = 0; i < 3; i++) {
        if (i == 0) shape[0] = PyObject_Length(objects[0]);
        if (shape[0] < 0) goto done;
        /* lmc_encoder_put checks each triple again as it takes it. */
        arrays[i] = lmc_py_integers_borrow(state->error, objects[i], names[i], 1, shape);
        if (arrays[i] == NULL) goto done;
    }
    lmc_py_triple_t triple = {(PyObject *)arrays[0], (PyObject *)arrays[1], (PyObject *)arrays[2]};
    payload = encode_stream(state->error, &triple, (size_t)shape[0]);
done:
    for (int i = 0; i < 3; i++)
        Py_XDECREF(arrays[i]);
    return payload;
}

/* The mixed intervals in place of the model's; the arrays are this call's own. */
static int mix_stream(PyObject *error, const PyArrayObject *tokens, const lmc_py_triple_t *triple, size_t n) {
    const int64_t *token_data = (const int64_t *)PyArray_DATA(tokens);
    size_t bytes = lmc_mixer_bound(n), error_index = 0;
    void *memory = bytes == 0 ? NULL : PyMem_RawMalloc(bytes);
    lmc_mixer_t *mixer;
    lmc_status_t status;
    if (memory == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lmc_mixer_begin(memory, bytes, n, &mixer);
    if (status == LMC_OK)
        status = lmc_mixer_encode(mixer, n, token_data, lmc_py_uint64_data(triple->start),
                                  lmc_py_uint64_data(triple->freq), lmc_py_uint64_data(triple->total),
                                  &error_index);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(memory);
    if (status == LMC_OK) return 0;
    lmc_py_raise_status(error, status, error_index, token_data, LMC_VOCAB_SIZE_MAX);
    return -1;
}

static PyObject *mix_intervals(PyObject *module, PyObject *arguments) {
    static const char *names[] = {"tokens", "start", "freq", "total"};
    lmc_module_state_t *state = PyModule_GetState(module);
    PyObject *objects[4], *result = NULL;
    PyArrayObject *arrays[4] = {NULL, NULL, NULL, NULL};
    if (!PyArg_ParseTuple(arguments, "OOOO", &objects[0], &objects[1], &objects[2], &objects[3])) return NULL;
    npy_intp n = PyObject_Length(objects[0]);
    for (int i = 0; n >= 0 && i < 4; i++) {
        arrays[i] = lmc_py_integers_parse(state->error, objects[i], names[i], 1, &n);
        if (arrays[i] == NULL) n = -1;
    }
    lmc_py_triple_t triple = {NULL, NULL, NULL};
    if (n >= 0 && triple_new(&triple, 1, &n) == 0) {
        memcpy(lmc_py_uint64_data(triple.start), PyArray_DATA(arrays[1]), (size_t)n * sizeof(uint64_t));
        memcpy(lmc_py_uint64_data(triple.freq), PyArray_DATA(arrays[2]), (size_t)n * sizeof(uint64_t));
        memcpy(lmc_py_uint64_data(triple.total), PyArray_DATA(arrays[3]), (size_t)n * sizeof(uint64_t));
        if (mix_stream(state->error, arrays[0], &triple, (size_t)n) == 0)
            result = PyTuple_Pack(3, triple.start, triple.freq, triple.total);
    }
    lmc_py_triple_clear(&triple);
    for (int i = 0; i < 4; i++)
        Py_XDECREF(arrays[i]);
    return result;
}

static PyObject *encode(PyObject *module, PyObject *arguments) {
    PyObject *logits_object, *tokens_object, *vocab_object, *payload = NULL;
    lmc_module_state_t *state = PyModule_GetState(module);
    lmc_py_logits_t logits;
    PyArrayObject *tokens;
    size_t vocab_size;
    lmc_py_triple_t triple = {NULL, NULL, NULL};
    if (!PyArg_ParseTuple(arguments, "OOO", &logits_object, &tokens_object, &vocab_object)) return NULL;
    if (lmc_py_vocab_size_parse(state->error, vocab_object, &vocab_size) < 0) return NULL;
    if (lmc_py_rows_parse(state->error, logits_object, tokens_object, vocab_size, &logits, &tokens) < 0)
        return NULL;
    if (PyArray_NDIM(logits.owner) != 2) {
        PyErr_Format(state->error, "logits have %d dimensions; expected [T, V]", PyArray_NDIM(logits.owner));
    } else if (lmc_py_intervals_of(state->error, &logits, tokens, NULL, &triple) == 0) {
        payload = encode_stream(state->error, &triple, logits.rows.n_rows);
    }
    lmc_py_triple_clear(&triple);
    Py_DECREF(tokens);
    lmc_py_logits_release(&logits);
    return payload;
}

/* The tokens of a payload, one a row; NULL with an exception set. */
static PyObject *decode_rows(PyObject *error_type, const Py_buffer *payload, const lmc_rows_t *rows) {
    size_t error_row = 0;
    npy_intp shape[1] = {(npy_intp)rows->n_rows};
    PyObject *tokens = PyArray_EMPTY(1, shape, NPY_INT32, 0);
    lmc_search_t *search = PyMem_RawMalloc(sizeof *search);
    if (tokens == NULL || search == NULL) {
        Py_XDECREF(tokens);
        PyMem_RawFree(search);
        return PyErr_NoMemory();
    }
    int32_t *token_data = (int32_t *)PyArray_DATA((PyArrayObject *)tokens);
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    lmc_decoder_t stream;
    lmc_status_t status;
    Py_BEGIN_ALLOW_THREADS
    lmc_decoder_init(&stream, payload->buf, (size_t)payload->len);
    status = lmc_decode_stream(&context, rows, &stream, search, token_data, &error_row);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(search);
    if (status != LMC_OK) {
        Py_CLEAR(tokens);
        lmc_py_raise_status(error_type, status, error_row, NULL, 0);
    }
    return tokens;
}

static PyObject *decode(PyObject *module, PyObject *arguments) {
    PyObject *logits_object, *vocab_object, *tokens = NULL;
    Py_buffer payload;
    lmc_module_state_t *state = PyModule_GetState(module);
    lmc_py_logits_t logits;
    size_t vocab_size;
    if (!PyArg_ParseTuple(arguments, "y*OO", &payload, &logits_object, &vocab_object)) return NULL;
    if (lmc_py_vocab_size_parse(state->error, vocab_object, &vocab_size) < 0 ||
        lmc_py_logits_parse(state->error, logits_object, vocab_size, &logits) < 0) {
        PyBuffer_Release(&payload);
        return NULL;
    }
    if (PyArray_NDIM(logits.owner) != 2)
        PyErr_Format(state->error, "logits have %d dimensions; expected [T, V]", PyArray_NDIM(logits.owner));
    else
        tokens = decode_rows(state->error, &payload, &logits.rows);
    lmc_py_logits_release(&logits);
    PyBuffer_Release(&payload);
    return tokens;
}

static PyMethodDef coding_functions[] = {
    {"intervals", intervals, METH_VARARGS, "intervals(logits, tokens, vocab_size): see llmcomp.coding."},
    {"encode", encode, METH_VARARGS, "encode(logits, tokens, vocab_size): see llmcomp.coding."},
    {"encode_intervals", encode_intervals, METH_VARARGS,
     "encode_intervals(start, freq, total): see llmcomp.coding."},
    {"mix_intervals", mix_intervals, METH_VARARGS,
     "mix_intervals(tokens, start, freq, total): see llmcomp.coding."},
    {"decode", decode, METH_VARARGS, "decode(payload, logits, vocab_size): see llmcomp.coding."},
    {NULL, NULL, 0, NULL},
};

int lmc_py_add_coding(PyObject *module) {
    lmc_module_state_t *state = PyModule_GetState(module);
    state->encoder_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &lmc_py_encoder_spec, NULL);
    if (state->encoder_type == NULL || PyModule_AddType(module, state->encoder_type) < 0) return -1;
    state->decoder_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &lmc_py_decoder_spec, NULL);
    if (state->decoder_type == NULL || PyModule_AddType(module, state->decoder_type) < 0) return -1;
    return PyModule_AddFunctions(module, coding_functions);
}

/* TransformerSession: streams of tokens with their keys and values, one caller at a time. */
#include "python/transformer_objects.h"

#include <string.h>

#include "python/coding_objects.h"
#include "python/large_pages.h"
#include "llmcomp/decoding.h"

PyObject *lmc_py_model_session(PyObject *object, PyObject *arguments) {
    transformer_model_object_t *self = (transformer_model_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    const lmc_transformer_config_t *config = &self->model.config;
    Py_ssize_t n_streams, n_tokens;
    if (state == NULL || !PyArg_ParseTuple(arguments, "nn", &n_streams, &n_tokens)) return NULL;
    if (n_streams < 1 || n_streams > LMC_PY_STREAMS_MAX)
        return PyErr_Format(state->error, "n_streams is %zd; expected 1 or more", n_streams);
    if (n_tokens < 1 || (size_t)n_tokens > config->context_length)
        return PyErr_Format(state->error, "a session of %zd tokens; the context of the model holds %zu",
                            n_tokens, config->context_length);
    PyTypeObject *type = state->transformer_session_type;
    transformer_session_object_t *session = (transformer_session_object_t *)lmc_py_new(type);
    if (session == NULL) return NULL;
    atomic_flag_clear(&session->in_use);
    Py_INCREF(self);
    session->owner = self;
    session->n_tokens = (size_t)n_tokens;
    size_t bytes = lmc_transformer_cache_bound(config, (size_t)n_streams, (size_t)n_tokens);
    session->memory = PyMem_RawCalloc(bytes, 1);
    lmc_py_want_large_pages(session->memory, bytes);
    if (session->memory == NULL) {
        Py_DECREF(session);
        return PyErr_NoMemory();
    }
    lmc_transformer_cache_init(config, (size_t)n_streams, (size_t)n_tokens, session->memory, bytes,
                               &session->cache);
    return (PyObject *)session;
}

static void session_dealloc(PyObject *object) {
    transformer_session_object_t *self = (transformer_session_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyMem_RawFree(self->memory);
    PyMem_RawFree(self->workspace);
    Py_XDECREF((PyObject *)self->owner);
    lmc_py_delete(object, type);
}

/* The session is one caller's at a time; then it has a workspace of at least so many bytes. */
static int session_begin(PyObject *error, transformer_session_object_t *self, size_t workspace_bytes) {
    if (atomic_flag_test_and_set(&self->in_use)) {
        PyErr_SetString(error, "another thread is using this session");
        return -1;
    }
    if (workspace_bytes <= self->workspace_bytes) return 0;
    PyMem_RawFree(self->workspace);
    self->workspace = PyMem_RawMalloc(workspace_bytes);
    self->workspace_bytes = self->workspace == NULL ? 0 : workspace_bytes;
    if (self->workspace != NULL) return 0;
    atomic_flag_clear(&self->in_use);
    PyErr_NoMemory();
    return -1;
}

static void raise_session_error(PyObject *error, transformer_session_object_t *self, lmc_status_t status,
                                size_t stream, long long token) {
    if (status == LMC_ERROR_TOKEN)
        PyErr_Format(error, "stream %zu: token %lld is outside the vocabulary; expected 0 to %zu", stream,
                     token, self->owner->model.config.n_embeddings - 1);
    else if (status == LMC_ERROR_CAPACITY)
        PyErr_Format(error, "stream %zu has seen %zu tokens; the session holds %zu", stream,
                     self->cache.positions[stream], self->n_tokens);
    else
        PyErr_Format(error, "stream %zu: %s", stream, lmc_status_message(status));
}

/* float32 [n_streams, n_logits]: the caller's own, or a new one. */
static PyArrayObject *parse_output(PyObject *error, PyObject *object, npy_intp n_streams, npy_intp n_logits) {
    npy_intp shape[2] = {n_streams, n_logits};
    if (object == NULL || object == Py_None) return (PyArrayObject *)PyArray_ZEROS(2, shape, NPY_FLOAT32, 0);
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != NPY_FLOAT32 || !PyArray_ISCARRAY(array) ||
        PyArray_NDIM(array) != 2 || PyArray_DIM(array, 0) != n_streams || PyArray_DIM(array, 1) != n_logits) {
        PyErr_Format(error, "out must be a contiguous float32 array [%zd, %zd]", (Py_ssize_t)n_streams,
                     (Py_ssize_t)n_logits);
        return NULL;
    }
    Py_INCREF(object);
    return array;
}

/* 0 if some active stream has no room for n_steps tokens in this session, which may be shorter than the
 * context. */
static int session_has_room(const transformer_session_object_t *self, const uint8_t *active, size_t n_steps,
                            size_t *stream) {
    for (size_t s = 0; s < self->cache.n_streams; s++) {
        *stream = s;
        if ((active == NULL || active[s]) && n_steps > self->n_tokens - self->cache.positions[s]) return 0;
    }
    return 1;
}

static int session_run_step(PyObject *error, transformer_session_object_t *self, PyArrayObject *tokens,
                            PyArrayObject *mask, PyArrayObject *logits) {
    const lmc_transformer_model_t *model = &self->owner->model;
    const int64_t *token_data = (const int64_t *)PyArray_DATA(tokens);
    const uint8_t *active = mask == NULL ? NULL : (const uint8_t *)PyArray_DATA(mask);
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    lmc_status_t status = LMC_ERROR_CAPACITY;
    size_t stream = 0;
    if (session_begin(error, self,
                      lmc_transformer_step_bound(&model->config, self->cache.n_streams, executor.n_slots)) <
        0)
        return -1;
    if (session_has_room(self, active, 1, &stream)) {
        Py_BEGIN_ALLOW_THREADS
        status = lmc_transformer_step(&context, model, &self->cache, token_data, active,
                                      (float *)PyArray_DATA(logits), self->workspace, self->workspace_bytes,
                                      &stream);
        Py_END_ALLOW_THREADS
    }
    if (status != LMC_OK) raise_session_error(error, self, status, stream, (long long)token_data[stream]);
    atomic_flag_clear(&self->in_use);
    return status == LMC_OK ? 0 : -1;
}

static PyObject *session_step(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"tokens", "active", "out", NULL};
    transformer_session_object_t *self = (transformer_session_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    PyObject *tokens_object, *mask_object = NULL, *out_object = NULL;
    PyArrayObject *mask = NULL, *logits = NULL;
    npy_intp n_streams = (npy_intp)self->cache.n_streams;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O|OO", names, &tokens_object, &mask_object,
                                     &out_object))
        return NULL;
    PyArrayObject *tokens = lmc_py_integers_parse(state->error, tokens_object, "tokens", 1, &n_streams);
    if (tokens == NULL) return NULL;
    if (lmc_py_mask_parse(state->error, mask_object, n_streams, &mask) == 0)
        logits =
            parse_output(state->error, out_object, n_streams, (npy_intp)self->owner->model.config.n_logits);
    if (logits != NULL && session_run_step(state->error, self, tokens, mask, logits) < 0) Py_CLEAR(logits);
    Py_XDECREF(mask);
    Py_DECREF(tokens);
    return (PyObject *)logits;
}

/* The chain's scratch, which begins with the tokens; NULL with an exception set. */
static void *make_chain(lmc_transformer_chain_t *chain, PyArrayObject *tokens, size_t n_logits,
                        size_t n_slots) {
    size_t n_streams = (size_t)PyArray_DIM(tokens, 0), tokens_bytes = n_streams * sizeof *chain->tokens;
    size_t searches_bytes = n_slots * sizeof *chain->searches;
    char *memory = PyMem_RawMalloc(tokens_bytes + searches_bytes + n_streams * n_logits * sizeof(float));
    if (memory == NULL) return PyErr_NoMemory();
    memcpy(memory, PyArray_DATA(tokens), tokens_bytes);
    chain->tokens = (int64_t *)(void *)memory;
    chain->searches = (lmc_search_t *)(void *)(memory + tokens_bytes);
    chain->logits = (float *)(void *)(memory + tokens_bytes + searches_bytes);
    return memory;
}

static int session_run_decode(PyObject *error, transformer_session_object_t *self, lmc_py_decoder_t *decoder,
                              PyArrayObject *tokens, PyArrayObject *mask, PyArrayObject *found) {
    const lmc_transformer_model_t *model = &self->owner->model;
    size_t n_logits = model->config.n_logits, n_steps = (size_t)PyArray_DIM(found, 0), stream = 0;
    lmc_transformer_chain_t chain = {.decoders = decoder->streams,
                                     .mixers = decoder->mixers,
                                     .vocab_size = decoder->vocab_size == 0 ? n_logits : decoder->vocab_size,
                                     .active = mask == NULL ? NULL : (const uint8_t *)PyArray_DATA(mask)};
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    lmc_status_t status = LMC_ERROR_CAPACITY;
    void *memory = make_chain(&chain, tokens, n_logits, executor.n_slots);
    if (memory == NULL) return -1;
    if (session_begin(error, self,
                      lmc_transformer_decode_bound(&model->config, self->cache.n_streams, executor.n_slots)) <
        0) {
        PyMem_RawFree(memory);
        return -1;
    }
    if (session_has_room(self, chain.active, n_steps, &stream)) {
        Py_BEGIN_ALLOW_THREADS
        status = lmc_transformer_decode(&context, model, &self->cache, &chain, n_steps,
                                        (int32_t *)PyArray_DATA(found), self->workspace,
                                        self->workspace_bytes, &stream);
        Py_END_ALLOW_THREADS
    }
    if (status != LMC_OK) raise_session_error(error, self, status, stream, (long long)chain.tokens[stream]);
    PyMem_RawFree(memory);
    atomic_flag_clear(&self->in_use);
    return status == LMC_OK ? 0 : -1;
}

static PyObject *session_decode(PyObject *object, PyObject *arguments) {
    transformer_session_object_t *self = (transformer_session_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    PyObject *decoder_object, *tokens_object, *mask_object = NULL;
    PyArrayObject *mask = NULL, *found = NULL;
    npy_intp n_streams = (npy_intp)self->cache.n_streams, shape[2] = {0, n_streams};
    Py_ssize_t n_steps;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTuple(arguments, "O!On|O", state->decoder_type, &decoder_object, &tokens_object, &n_steps,
                          &mask_object))
        return NULL;
    lmc_py_decoder_t *decoder = (lmc_py_decoder_t *)decoder_object;
    if (PyTuple_GET_SIZE(decoder->payloads) != n_streams)
        return PyErr_Format(state->error, "a decoder of %zd streams; the session has %zd",
                            PyTuple_GET_SIZE(decoder->payloads), (Py_ssize_t)n_streams);
    if (decoder->vocab_size > self->owner->model.config.n_logits)
        return PyErr_Format(state->error, "a decoder of %zu symbols; the model has %zu logits",
                            decoder->vocab_size, self->owner->model.config.n_logits);
    if (n_steps < 0 || (size_t)n_steps > self->n_tokens)
        return PyErr_Format(state->error, "%zd steps; the session holds %zu tokens", n_steps, self->n_tokens);
    PyArrayObject *tokens = lmc_py_integers_parse(state->error, tokens_object, "tokens", 1, &n_streams);
    if (tokens == NULL) return NULL;
    shape[0] = n_steps;
    if (lmc_py_mask_parse(state->error, mask_object, n_streams, &mask) == 0)
        found = (PyArrayObject *)PyArray_EMPTY(2, shape, NPY_INT32, 0);
    if (found != NULL && atomic_flag_test_and_set(&decoder->in_use)) {
        PyErr_SetString(state->error, "another thread is using this decoder");
        Py_CLEAR(found);
    } else if (found != NULL) {
        if (session_run_decode(state->error, self, decoder, tokens, mask, found) < 0) Py_CLEAR(found);
        atomic_flag_clear(&decoder->in_use);
    }
    Py_XDECREF(mask);
    Py_DECREF(tokens);
    return (PyObject *)found;
}

static int session_run_prefill(PyObject *error, transformer_session_object_t *self, size_t stream,
                               PyArrayObject *tokens, PyArrayObject *logits) {
    const lmc_transformer_model_t *model = &self->owner->model;
    const int64_t *token_data = (const int64_t *)PyArray_DATA(tokens);
    size_t n_tokens = (size_t)PyArray_DIM(tokens, 0), error_row = 0;
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    lmc_status_t status = LMC_ERROR_CAPACITY;
    if (session_begin(error, self,
                      lmc_transformer_prefill_bound(&model->config, n_tokens, executor.n_slots)) < 0)
        return -1;
    if (n_tokens <= self->n_tokens - self->cache.positions[stream]) {
        Py_BEGIN_ALLOW_THREADS
        status = lmc_transformer_prefill(&context, model, &self->cache, stream, token_data, n_tokens,
                                         (float *)PyArray_DATA(logits), self->workspace,
                                         self->workspace_bytes, &error_row);
        Py_END_ALLOW_THREADS
    }
    if (status == LMC_ERROR_CAPACITY)
        PyErr_Format(error, "stream %zu has seen %zu tokens and cannot take %zu more; the session holds %zu",
                     stream, self->cache.positions[stream], n_tokens, self->n_tokens);
    else if (status != LMC_OK)
        raise_session_error(error, self, status, stream, (long long)token_data[error_row]);
    atomic_flag_clear(&self->in_use);
    return status == LMC_OK ? 0 : -1;
}

static int check_stream(PyObject *error, const transformer_session_object_t *self, Py_ssize_t stream) {
    if (stream >= 0 && (size_t)stream < self->cache.n_streams) return 0;
    PyErr_Format(error, "stream %zd; the session has streams 0 to %zu", stream, self->cache.n_streams - 1);
    return -1;
}

static PyObject *session_prefill(PyObject *object, PyObject *arguments) {
    transformer_session_object_t *self = (transformer_session_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    Py_ssize_t stream;
    PyObject *tokens_object;
    if (state == NULL || !PyArg_ParseTuple(arguments, "nO", &stream, &tokens_object)) return NULL;
    if (check_stream(state->error, self, stream) < 0) return NULL;
    PyObject *any = PyArray_FROM_O(tokens_object);
    if (any == NULL) return NULL;
    npy_intp n_tokens = PyArray_SIZE((PyArrayObject *)any),
             n_logits = (npy_intp)self->owner->model.config.n_logits;
    PyArrayObject *tokens = lmc_py_integers_parse(state->error, any, "tokens", 1, &n_tokens);
    Py_DECREF(any);
    if (tokens == NULL) return NULL;
    PyObject *logits = NULL;
    if (n_tokens == 0)
        PyErr_SetString(state->error, "prefill of 0 tokens; expected at least 1");
    else
        logits = PyArray_EMPTY(1, &n_logits, NPY_FLOAT32, 0);
    if (logits != NULL &&
        session_run_prefill(state->error, self, (size_t)stream, tokens, (PyArrayObject *)logits) < 0)
        Py_CLEAR(logits);
    Py_DECREF(tokens);
    return logits;
}

static PyObject *session_reset(PyObject *object, PyObject *arguments) {
    transformer_session_object_t *self = (transformer_session_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    PyObject *stream_object = Py_None;
    if (state == NULL || !PyArg_ParseTuple(arguments, "|O", &stream_object)) return NULL;
    Py_ssize_t stream = 0;
    if (stream_object != Py_None) {
        stream = PyNumber_AsSsize_t(stream_object, PyExc_OverflowError);
        if (stream == -1 && PyErr_Occurred()) return NULL;
        if (check_stream(state->error, self, stream) < 0) return NULL;
    }
    if (session_begin(state->error, self, 0) < 0) return NULL;
    if (stream_object == Py_None)
        memset(self->cache.positions, 0, self->cache.n_streams * sizeof(size_t));
    else
        self->cache.positions[stream] = 0;
    atomic_flag_clear(&self->in_use);
    Py_RETURN_NONE;
}

static PyObject *session_n_streams(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(((transformer_session_object_t *)object)->cache.n_streams);
}

static PyObject *session_positions(PyObject *object, void *unused) {
    (void)unused;
    transformer_session_object_t *self = (transformer_session_object_t *)object;
    npy_intp n_streams = (npy_intp)self->cache.n_streams;
    PyObject *positions = PyArray_EMPTY(1, &n_streams, NPY_INT64, 0);
    for (npy_intp i = 0; positions != NULL && i < n_streams; i++)
        ((int64_t *)PyArray_DATA((PyArrayObject *)positions))[i] = (int64_t)self->cache.positions[i];
    return positions;
}

PyDoc_STRVAR(session_doc, "Streams of tokens with their keys and values; TransformerModel.session makes it.");
PyDoc_STRVAR(step_doc,
             "step($self, tokens, active=None, out=None)\n--\n\n"
             "One token into every active stream: int [n_streams] -> float32 [n_streams, n_logits].");
PyDoc_STRVAR(
    decode_doc,
    "decode($self, decoder, tokens, n_steps, active=None, /)\n--\n\n"
    "n_steps times one token into every active stream and the next one out of the decoder: int "
    "[n_streams]\n-> int32 [n_steps, n_streams], -1 where not active. After an error neither is of use.");
PyDoc_STRVAR(prefill_doc, "prefill($self, stream, tokens, /)\n--\n\n"
                          "Tokens int [n] into one stream -> float32 [n_logits], the logits after the last.");
PyDoc_STRVAR(reset_doc, "reset($self, stream=None, /)\n--\n\nOne stream, or all of them, start again.");

static PyMethodDef session_methods[] = {
    {"step", (PyCFunction)(void (*)(void))session_step, METH_VARARGS | METH_KEYWORDS, step_doc},
    {"decode", session_decode, METH_VARARGS, decode_doc},
    {"prefill", session_prefill, METH_VARARGS, prefill_doc},
    {"reset", session_reset, METH_VARARGS, reset_doc},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef session_properties[] = {
    {"n_streams", session_n_streams, NULL, "Number of streams.", NULL},
    {"positions", session_positions, NULL, "int64 [n_streams]: tokens that each stream has seen (a copy).",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot session_slots[] = {
    {Py_tp_doc, (void *)session_doc},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_methods, session_methods},
    {Py_tp_getset, session_properties},
    {0, NULL},
};
PyType_Spec lmc_py_session_spec = {
    .name = "llmcomp._core.TransformerSession",
    .basicsize = sizeof(transformer_session_object_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = session_slots,
};

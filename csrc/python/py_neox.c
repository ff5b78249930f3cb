/* The exact engine for Python: NeoxModel and NeoxSession. Checks the arguments, owns the memory, releases the
 * GIL. llmcomp/engine_exact.py reads the files and has the public documentation. */
#include "common.h"

#include <stdatomic.h>
#include <string.h>

#include "llmcomp/neox.h"

/* A pass over more sequences than fit this workspace runs a few sequences at a time; Ctrl-C is heard in
 * between. */
#define PASS_WORKSPACE_BYTES ((size_t)32 << 20)

typedef struct neox_model_object {
    PyObject_HEAD lmc_neox_model_t model;
    lmc_neox_layer_t *layers;
    void *tables;
    PyObject *arrays; /* tuple that keeps the weights alive */
} neox_model_object_t;

typedef struct neox_session_object {
    PyObject_HEAD neox_model_object_t *owner;
    lmc_neox_cache_t cache;
    size_t n_tokens;
    void *memory, *workspace;
    size_t workspace_bytes;
    atomic_flag in_use;
} neox_session_object_t;

/* ---- weights
 * ----------------------------------------------------------------------------------------------------------
 */

#define N_GLOBAL_TENSORS 4
#define N_LAYER_TENSORS 12

static int dtype_of(PyArrayObject *array) {
    switch (PyArray_TYPE(array)) {
    case NPY_FLOAT32:
        return LMC_FLOAT32;
    case NPY_FLOAT16:
        return LMC_FLOAT16;
    case NPY_UINT16:
        return LMC_BFLOAT16;
    default:
        return -1;
    }
}

static int take_tensor(PyObject *error, PyObject *object, Py_ssize_t index, size_t n_elements,
                       lmc_neox_tensor_t *tensor) {
    tensor->data = NULL;
    tensor->dtype = LMC_FLOAT32;
    if (object == Py_None) return 0;
    if (!PyArray_Check(object) || dtype_of((PyArrayObject *)object) < 0) {
        PyErr_Format(error, "tensor %zd is no array of float32, float16 or uint16 (bfloat16)", index);
        return -1;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if ((size_t)PyArray_SIZE(array) != n_elements || !PyArray_ISCARRAY_RO(array)) {
        PyErr_Format(
            error, "tensor %zd has %zd elements; expected %zu, contiguous, aligned and in native byte order",
            index, (Py_ssize_t)PyArray_SIZE(array), n_elements);
        return -1;
    }
    tensor->data = PyArray_DATA(array);
    tensor->dtype = (lmc_dtype)dtype_of(array);
    return 0;
}

static int take_layer(PyObject *error, const lmc_neox_config_t *config, PyObject *arrays, Py_ssize_t first,
                      lmc_neox_layer_t *layer) {
    size_t d = config->hidden, m = config->intermediate;
    lmc_neox_tensor_t *tensors[N_LAYER_TENSORS] = {
        &layer->attention_norm_gain, &layer->attention_norm_bias, &layer->mlp_norm_gain,
        &layer->mlp_norm_bias,       &layer->qkv_weight,          &layer->qkv_bias,
        &layer->dense_weight,        &layer->dense_bias,          &layer->mlp_in_weight,
        &layer->mlp_in_bias,         &layer->mlp_out_weight,      &layer->mlp_out_bias};
    size_t sizes[N_LAYER_TENSORS] = {d, d, d, d, 3 * d * d, 3 * d, d * d, d, m * d, m, d * m, d};
    for (Py_ssize_t i = 0; i < N_LAYER_TENSORS; i++) {
        PyObject *object = PyTuple_GET_ITEM(arrays, first + i);
        if (take_tensor(error, object, first + i, sizes[i], tensors[i]) < 0) return -1;
    }
    return 0;
}

static int take_weights(PyObject *error, const lmc_neox_config_t *config, PyObject *arrays,
                        lmc_neox_layer_t *layers, lmc_neox_weights_t *weights) {
    size_t expected = N_GLOBAL_TENSORS + N_LAYER_TENSORS * config->n_layers;
    if ((size_t)PyTuple_GET_SIZE(arrays) != expected) {
        PyErr_Format(error, "%zd tensors; expected %zu", PyTuple_GET_SIZE(arrays), expected);
        return -1;
    }
    lmc_neox_tensor_t *tensors[N_GLOBAL_TENSORS] = {&weights->embedding, &weights->final_gain,
                                                    &weights->final_bias, &weights->head};
    size_t sizes[N_GLOBAL_TENSORS] = {config->n_embeddings * config->hidden, config->hidden, config->hidden,
                                      config->n_logits * config->hidden};
    for (Py_ssize_t i = 0; i < N_GLOBAL_TENSORS; i++) {
        if (take_tensor(error, PyTuple_GET_ITEM(arrays, i), i, sizes[i], tensors[i]) < 0) return -1;
    }
    for (size_t i = 0; i < config->n_layers; i++) {
        Py_ssize_t first = (Py_ssize_t)(N_GLOBAL_TENSORS + N_LAYER_TENSORS * i);
        if (take_layer(error, config, arrays, first, &layers[i]) < 0) return -1;
    }
    weights->layers = layers;
    return 0;
}

/* ---- NeoxModel
 * -------------------------------------------------------------------------------------------------------- */

static int parse_config(PyObject *arguments, PyObject *keywords, lmc_neox_config_t *config,
                        PyObject **arrays) {
    static char *names[] = {
        "n_layers",          "n_heads",        "hidden",      "intermediate", "n_embeddings",
        "n_logits",          "context_length", "rotary_dims", "rotary_base",  "layer_norm_epsilon",
        "parallel_residual", "tensors",        NULL};
    Py_ssize_t sizes[8];
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "nnnnnnnndfpO!", names, &sizes[0], &sizes[1],
                                     &sizes[2], &sizes[3], &sizes[4], &sizes[5], &sizes[6], &sizes[7],
                                     &config->rotary_base, &config->layer_norm_epsilon,
                                     &config->parallel_residual, &PyTuple_Type, arrays))
        return -1;
    config->n_layers = (size_t)sizes[0];
    config->n_heads = (size_t)sizes[1];
    config->hidden = (size_t)sizes[2];
    config->intermediate = (size_t)sizes[3];
    config->n_embeddings = (size_t)sizes[4];
    config->n_logits = (size_t)sizes[5];
    config->context_length = (size_t)sizes[6];
    config->rotary_dims = (size_t)sizes[7];
    return 0;
}

static int model_fill(PyObject *error, neox_model_object_t *self, const lmc_neox_config_t *config,
                      PyObject *arrays) {
    lmc_neox_weights_t weights;
    size_t tables_bytes = lmc_neox_tables_bound(config);
    self->layers = PyMem_RawCalloc(config->n_layers, sizeof *self->layers);
    self->tables = PyMem_RawMalloc(tables_bytes);
    if (self->layers == NULL || self->tables == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (take_weights(error, config, arrays, self->layers, &weights) < 0) return -1;
    Py_INCREF(arrays);
    self->arrays = arrays;
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    Py_BEGIN_ALLOW_THREADS lmc_neox_model_init(&context, config, &weights, self->tables, tables_bytes,
                                               &self->model);
    Py_END_ALLOW_THREADS return 0;
}

static PyObject *model_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    lmc_module_state_t *state = lmc_py_state_of_type(type);
    lmc_neox_config_t config;
    PyObject *arrays;
    if (state == NULL || parse_config(arguments, keywords, &config, &arrays) < 0) return NULL;
    if (lmc_neox_config_check(&config) != LMC_OK) {
        PyErr_SetString(state->error, "the sizes of the model do not fit together or are out of range");
        return NULL;
    }
    neox_model_object_t *self = (neox_model_object_t *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    if (model_fill(state->error, self, &config, arrays) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void model_dealloc(PyObject *object) {
    neox_model_object_t *self = (neox_model_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyMem_RawFree(self->layers);
    PyMem_RawFree(self->tables);
    Py_XDECREF(self->arrays);
    type->tp_free(object);
    Py_DECREF(type);
}

/* ---- a pass
 * -------------------------------------------------------------------------------------------------------------
 */

/* int64 [B, T] with T within the context; a new reference. */
static PyArrayObject *parse_token_rows(PyObject *error, const lmc_neox_config_t *config, PyObject *object,
                                       const char *name) {
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(object);
    if (array == NULL) return NULL;
    if (PyArray_NDIM(array) != 2) {
        PyErr_Format(error, "%s have %d dimensions; expected 2, [sequences, positions]", name,
                     PyArray_NDIM(array));
        Py_DECREF(array);
        return NULL;
    }
    if ((size_t)PyArray_DIM(array, 1) > config->context_length) {
        PyErr_Format(error, "%zd tokens a sequence; the context of the model holds %zu",
                     (Py_ssize_t)PyArray_DIM(array, 1), config->context_length);
        Py_DECREF(array);
        return NULL;
    }
    npy_intp shape[2] = {PyArray_DIM(array, 0), PyArray_DIM(array, 1)};
    PyArrayObject *integers = lmc_py_integers_parse(error, (PyObject *)array, name, 2, shape);
    Py_DECREF(array);
    return integers;
}

/* size_t [B] on the heap, or NULL without an exception for None. */
static int parse_lengths(PyObject *error, PyObject *object, npy_intp n_sequences, npy_intp n_tokens,
                         size_t **lengths) {
    *lengths = NULL;
    if (object == NULL || object == Py_None) return 0;
    PyArrayObject *array = lmc_py_integers_parse(error, object, "lengths", 1, &n_sequences);
    if (array == NULL) return -1;
    const int64_t *values = (const int64_t *)PyArray_DATA(array);
    *lengths = PyMem_RawMalloc((size_t)(n_sequences + 1) * sizeof **lengths);
    if (*lengths == NULL) PyErr_NoMemory();
    for (npy_intp i = 0; *lengths != NULL && i < n_sequences; i++) {
        (*lengths)[i] = (size_t)values[i];
        if (values[i] >= 0 && values[i] <= n_tokens) continue;
        PyErr_Format(error, "sequence %zd has length %lld; expected 0 to %zd", (Py_ssize_t)i,
                     (long long)values[i], (Py_ssize_t)n_tokens);
        PyMem_RawFree(*lengths);
        *lengths = NULL;
    }
    Py_DECREF(array);
    return *lengths == NULL ? -1 : 0;
}

/* Sequences a wave: as few waves as the workspace allows, of about the same size. */
static size_t sequences_per_wave(const lmc_neox_config_t *config, size_t n_sequences, size_t n_tokens,
                                 size_t n_slots, int fused) {
    size_t one = lmc_neox_pass_bound(config, 1, n_tokens, n_slots, fused);
    size_t two = lmc_neox_pass_bound(config, 2, n_tokens, n_slots, fused);
    size_t most = 1 + PASS_WORKSPACE_BYTES / (two - one > 0 ? two - one : 1);
    size_t n_waves = (n_sequences + most - 1) / most;
    return n_waves <= 1 ? n_sequences : (n_sequences + n_waves - 1) / n_waves;
}

static void raise_pass_error(PyObject *error, lmc_status status, const lmc_neox_batch_t *batch,
                             const lmc_neox_sink_t *sink, size_t n_embeddings, size_t row) {
    size_t sequence = row / batch->row_stride, position = row % batch->row_stride;
    if (status != LMC_ERROR_TOKEN) {
        PyErr_Format(error, "sequence %zu, position %zu: %s", sequence, position, lmc_status_message(status));
        return;
    }
    int is_input = batch->tokens[row] < 0 || (uint64_t)batch->tokens[row] >= n_embeddings;
    long long token = (long long)(is_input ? batch->tokens[row] : sink->targets[row]);
    PyErr_Format(error, "sequence %zu, position %zu: %s %lld is outside the vocabulary; expected 0 to %zu",
                 sequence, position, is_input ? "token" : "target", token,
                 (is_input ? n_embeddings : sink->vocab_size) - 1);
}

static lmc_status run_wave(const lmc_context_t *context, const lmc_neox_model_t *model,
                           const lmc_neox_batch_t *all, const lmc_neox_sink_t *sink, size_t first,
                           size_t n_sequences, void *workspace, size_t workspace_bytes, size_t *error_row) {
    size_t rows = first * all->row_stride;
    lmc_neox_batch_t batch = *all;
    lmc_neox_sink_t part = {.vocab_size = sink->vocab_size};
    batch.tokens += rows;
    batch.n_sequences = n_sequences;
    if (all->lengths != NULL) batch.lengths += first;
    if (sink->logits != NULL) {
        part.logits = sink->logits + rows * model->config.n_logits;
    } else {
        part.targets = sink->targets + rows;
        part.start = sink->start + rows;
        part.freq = sink->freq + rows;
        part.total = sink->total + rows;
    }
    lmc_status status = lmc_neox_pass(context, model, &batch, &part, workspace, workspace_bytes, error_row);
    *error_row += rows;
    return status;
}

static int run_pass(PyObject *error, neox_model_object_t *self, const lmc_neox_batch_t *batch,
                    const lmc_neox_sink_t *sink) {
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    const lmc_neox_config_t *config = &self->model.config;
    if (batch->n_sequences == 0 || batch->n_tokens == 0) return 0;
    int fused = sink->logits == NULL;
    size_t per_wave =
        sequences_per_wave(config, batch->n_sequences, batch->n_tokens, executor.n_slots, fused);
    size_t workspace_bytes = lmc_neox_pass_bound(config, per_wave, batch->n_tokens, executor.n_slots, fused);
    void *workspace = PyMem_RawMalloc(workspace_bytes);
    if (workspace == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    lmc_status status = LMC_OK;
    size_t error_row = 0;
    int interrupted = 0;
    for (size_t first = 0; first < batch->n_sequences && status == LMC_OK && !interrupted;
         first += per_wave) {
        size_t left = batch->n_sequences - first;
        Py_BEGIN_ALLOW_THREADS status =
            run_wave(&context, &self->model, batch, sink, first, left < per_wave ? left : per_wave, workspace,
                     workspace_bytes, &error_row);
        Py_END_ALLOW_THREADS interrupted = PyErr_CheckSignals() < 0;
    }
    PyMem_RawFree(workspace);
    if (interrupted) return -1;
    if (status == LMC_OK) return 0;
    raise_pass_error(error, status, batch, sink, config->n_embeddings, error_row);
    return -1;
}

static lmc_neox_batch_t batch_of(PyArrayObject *tokens, const size_t *lengths) {
    return (lmc_neox_batch_t){.tokens = (const int64_t *)PyArray_DATA(tokens),
                              .lengths = lengths,
                              .n_sequences = (size_t)PyArray_DIM(tokens, 0),
                              .n_tokens = (size_t)PyArray_DIM(tokens, 1),
                              .row_stride = (size_t)PyArray_DIM(tokens, 1)};
}

static PyObject *model_logits(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"tokens", "lengths", NULL};
    neox_model_object_t *self = (neox_model_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    PyObject *tokens_object, *lengths_object = NULL, *logits = NULL;
    size_t *lengths = NULL;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O|O", names, &tokens_object, &lengths_object))
        return NULL;
    PyArrayObject *tokens = parse_token_rows(state->error, &self->model.config, tokens_object, "tokens");
    if (tokens == NULL) return NULL;
    npy_intp shape[3] = {PyArray_DIM(tokens, 0), PyArray_DIM(tokens, 1),
                         (npy_intp)self->model.config.n_logits};
    if (parse_lengths(state->error, lengths_object, shape[0], shape[1], &lengths) == 0)
        logits = lengths == NULL ? PyArray_EMPTY(3, shape, NPY_FLOAT32, 0)
                                 : PyArray_ZEROS(3, shape, NPY_FLOAT32, 0);
    if (logits != NULL) {
        lmc_neox_batch_t batch = batch_of(tokens, lengths);
        lmc_neox_sink_t sink = {.logits = (float *)PyArray_DATA((PyArrayObject *)logits)};
        if (run_pass(state->error, self, &batch, &sink) < 0) Py_CLEAR(logits);
    }
    PyMem_RawFree(lengths);
    Py_DECREF(tokens);
    return logits;
}

static PyObject *pass_intervals(PyObject *error, neox_model_object_t *self, PyArrayObject *tokens,
                                PyArrayObject *targets, const size_t *lengths, size_t vocab_size) {
    npy_intp *shape = PyArray_DIMS(tokens);
    PyObject *start = PyArray_ZEROS(2, shape, NPY_UINT64, 0);
    PyObject *freq = PyArray_ZEROS(2, shape, NPY_UINT64, 0);
    PyObject *total = PyArray_ZEROS(2, shape, NPY_UINT64, 0), *result = NULL;
    if (start != NULL && freq != NULL && total != NULL) {
        lmc_neox_batch_t batch = batch_of(tokens, lengths);
        lmc_neox_sink_t sink = {.targets = (const int64_t *)PyArray_DATA(targets),
                                .start = (uint64_t *)PyArray_DATA((PyArrayObject *)start),
                                .freq = (uint64_t *)PyArray_DATA((PyArrayObject *)freq),
                                .total = (uint64_t *)PyArray_DATA((PyArrayObject *)total),
                                .vocab_size = vocab_size};
        if (run_pass(error, self, &batch, &sink) == 0) result = PyTuple_Pack(3, start, freq, total);
    }
    Py_XDECREF(start);
    Py_XDECREF(freq);
    Py_XDECREF(total);
    return result;
}

static PyObject *model_intervals(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"tokens", "targets", "lengths", "vocab_size", NULL};
    neox_model_object_t *self = (neox_model_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    PyObject *tokens_object, *targets_object, *lengths_object = NULL, *vocab_object = NULL, *result = NULL;
    size_t *lengths = NULL, vocab_size, n_logits = self->model.config.n_logits;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO|OO", names, &tokens_object, &targets_object,
                                     &lengths_object, &vocab_object))
        return NULL;
    if (lmc_py_vocab_size_parse(state->error, vocab_object, &vocab_size) < 0) return NULL;
    if (vocab_size > n_logits)
        return PyErr_Format(state->error, "vocab_size is %zu; the model has %zu logits", vocab_size,
                            n_logits);
    PyArrayObject *tokens = parse_token_rows(state->error, &self->model.config, tokens_object, "tokens");
    if (tokens == NULL) return NULL;
    PyArrayObject *targets =
        lmc_py_integers_parse(state->error, targets_object, "targets", 2, PyArray_DIMS(tokens));
    if (targets != NULL && parse_lengths(state->error, lengths_object, PyArray_DIM(tokens, 0),
                                         PyArray_DIM(tokens, 1), &lengths) == 0)
        result = pass_intervals(state->error, self, tokens, targets, lengths,
                                vocab_size == 0 ? n_logits : vocab_size);
    PyMem_RawFree(lengths);
    Py_XDECREF(targets);
    Py_DECREF(tokens);
    return result;
}

/* ---- NeoxSession
 * -------------------------------------------------------------------------------------------------------- */

static PyObject *model_session(PyObject *object, PyObject *arguments) {
    neox_model_object_t *self = (neox_model_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    const lmc_neox_config_t *config = &self->model.config;
    Py_ssize_t n_streams, n_tokens;
    if (state == NULL || !PyArg_ParseTuple(arguments, "nn", &n_streams, &n_tokens)) return NULL;
    if (n_streams < 1 || n_streams > (Py_ssize_t)1 << 20)
        return PyErr_Format(state->error, "n_streams is %zd; expected 1 or more", n_streams);
    if (n_tokens < 1 || (size_t)n_tokens > config->context_length)
        return PyErr_Format(state->error, "a session of %zd tokens; the context of the model holds %zu",
                            n_tokens, config->context_length);
    PyTypeObject *type = state->neox_session_type;
    neox_session_object_t *session = (neox_session_object_t *)type->tp_alloc(type, 0);
    if (session == NULL) return NULL;
    atomic_flag_clear(&session->in_use);
    Py_INCREF(self);
    session->owner = self;
    session->n_tokens = (size_t)n_tokens;
    size_t bytes = lmc_neox_cache_bound(config, (size_t)n_streams, (size_t)n_tokens);
    session->memory = PyMem_RawCalloc(bytes, 1);
    if (session->memory == NULL) {
        Py_DECREF(session);
        return PyErr_NoMemory();
    }
    lmc_neox_cache_init(config, (size_t)n_streams, (size_t)n_tokens, session->memory, bytes, &session->cache);
    return (PyObject *)session;
}

static void session_dealloc(PyObject *object) {
    neox_session_object_t *self = (neox_session_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyMem_RawFree(self->memory);
    PyMem_RawFree(self->workspace);
    Py_XDECREF((PyObject *)self->owner);
    type->tp_free(object);
    Py_DECREF(type);
}

/* The session is one caller's at a time; then it has a workspace of at least so many bytes. */
static int session_begin(PyObject *error, neox_session_object_t *self, size_t workspace_bytes) {
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

static void raise_session_error(PyObject *error, neox_session_object_t *self, lmc_status status,
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

/* 0 if some active stream is full for this session, which may be shorter than the context. */
static int session_has_room(const neox_session_object_t *self, const uint8_t *active, size_t *stream) {
    for (size_t s = 0; s < self->cache.n_streams; s++) {
        *stream = s;
        if ((active == NULL || active[s]) && self->cache.positions[s] >= self->n_tokens) return 0;
    }
    return 1;
}

static int session_run_step(PyObject *error, neox_session_object_t *self, PyArrayObject *tokens,
                            PyArrayObject *mask, PyArrayObject *logits) {
    const lmc_neox_model_t *model = &self->owner->model;
    const int64_t *token_data = (const int64_t *)PyArray_DATA(tokens);
    const uint8_t *active = mask == NULL ? NULL : (const uint8_t *)PyArray_DATA(mask);
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    lmc_status status = LMC_ERROR_CAPACITY;
    size_t stream = 0;
    if (session_begin(error, self,
                      lmc_neox_step_bound(&model->config, self->cache.n_streams, executor.n_slots)) < 0)
        return -1;
    if (session_has_room(self, active, &stream)) {
        Py_BEGIN_ALLOW_THREADS status =
            lmc_neox_step(&context, model, &self->cache, token_data, active, (float *)PyArray_DATA(logits),
                          self->workspace, self->workspace_bytes, &stream);
        Py_END_ALLOW_THREADS
    }
    if (status != LMC_OK) raise_session_error(error, self, status, stream, (long long)token_data[stream]);
    atomic_flag_clear(&self->in_use);
    return status == LMC_OK ? 0 : -1;
}

static PyObject *session_step(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"tokens", "active", "out", NULL};
    neox_session_object_t *self = (neox_session_object_t *)object;
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

static int session_run_prefill(PyObject *error, neox_session_object_t *self, size_t stream,
                               PyArrayObject *tokens, PyArrayObject *logits) {
    const lmc_neox_model_t *model = &self->owner->model;
    const int64_t *token_data = (const int64_t *)PyArray_DATA(tokens);
    size_t n_tokens = (size_t)PyArray_DIM(tokens, 0), error_row = 0;
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    lmc_status status = LMC_ERROR_CAPACITY;
    if (session_begin(error, self, lmc_neox_prefill_bound(&model->config, n_tokens, executor.n_slots)) < 0)
        return -1;
    if (n_tokens <= self->n_tokens - self->cache.positions[stream]) {
        Py_BEGIN_ALLOW_THREADS status = lmc_neox_prefill(&context, model, &self->cache, stream, token_data,
                                                         n_tokens, (float *)PyArray_DATA(logits),
                                                         self->workspace, self->workspace_bytes, &error_row);
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

static int check_stream(PyObject *error, const neox_session_object_t *self, Py_ssize_t stream) {
    if (stream >= 0 && (size_t)stream < self->cache.n_streams) return 0;
    PyErr_Format(error, "stream %zd; the session has streams 0 to %zu", stream, self->cache.n_streams - 1);
    return -1;
}

static PyObject *session_prefill(PyObject *object, PyObject *arguments) {
    neox_session_object_t *self = (neox_session_object_t *)object;
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
    neox_session_object_t *self = (neox_session_object_t *)object;
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
    return PyLong_FromSize_t(((neox_session_object_t *)object)->cache.n_streams);
}

static PyObject *session_positions(PyObject *object, void *unused) {
    (void)unused;
    neox_session_object_t *self = (neox_session_object_t *)object;
    npy_intp n_streams = (npy_intp)self->cache.n_streams;
    PyObject *positions = PyArray_EMPTY(1, &n_streams, NPY_INT64, 0);
    for (npy_intp i = 0; positions != NULL && i < n_streams; i++)
        ((int64_t *)PyArray_DATA((PyArrayObject *)positions))[i] = (int64_t)self->cache.positions[i];
    return positions;
}

/* ---- types
 * ----------------------------------------------------------------------------------------------------------------
 */

PyDoc_STRVAR(
    model_doc,
    "NeoxModel(n_layers, n_heads, hidden, intermediate, n_embeddings, n_logits, context_length, "
    "rotary_dims, rotary_base, layer_norm_epsilon, parallel_residual, tensors)\n--\n\n"
    "A GPT-NeoX model over arrays that stay where they are: tensors is a tuple of the embedding, the "
    "final norm's gain and bias, the head, then 12 a layer in the order of neox.h.");
PyDoc_STRVAR(logits_doc, "logits($self, tokens, lengths=None)\n--\n\n"
                         "int [B, T] -> float32 [B, T, n_logits]; rows from lengths[b] on are zeros.");
PyDoc_STRVAR(intervals_doc, "intervals($self, tokens, targets, lengths=None, vocab_size=None)\n--\n\n"
                            "int [B, T] twice -> (start, freq, total), uint64 [B, T] each.");
PyDoc_STRVAR(session_of_doc, "session($self, n_streams, n_tokens, /)\n--\n\n"
                             "A cache for n_streams streams of up to n_tokens tokens.");
PyDoc_STRVAR(session_doc, "Streams of tokens with their keys and values; NeoxModel.session makes it.");
PyDoc_STRVAR(step_doc,
             "step($self, tokens, active=None, out=None)\n--\n\n"
             "One token into every active stream: int [n_streams] -> float32 [n_streams, n_logits].");
PyDoc_STRVAR(prefill_doc, "prefill($self, stream, tokens, /)\n--\n\n"
                          "Tokens int [n] into one stream -> float32 [n_logits], the logits after the last.");
PyDoc_STRVAR(reset_doc, "reset($self, stream=None, /)\n--\n\nOne stream, or all of them, start again.");

static PyMethodDef model_methods[] = {
    {"logits", (PyCFunction)(void (*)(void))model_logits, METH_VARARGS | METH_KEYWORDS, logits_doc},
    {"intervals", (PyCFunction)(void (*)(void))model_intervals, METH_VARARGS | METH_KEYWORDS, intervals_doc},
    {"session", model_session, METH_VARARGS, session_of_doc},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot model_slots[] = {
    {Py_tp_doc, (void *)model_doc},
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, model_methods},
    {0, NULL},
};
static PyType_Spec model_spec = {
    .name = "llmcomp._core.NeoxModel",
    .basicsize = sizeof(neox_model_object_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = model_slots,
};

static PyMethodDef session_methods[] = {
    {"step", (PyCFunction)(void (*)(void))session_step, METH_VARARGS | METH_KEYWORDS, step_doc},
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
static PyType_Spec session_spec = {
    .name = "llmcomp._core.NeoxSession",
    .basicsize = sizeof(neox_session_object_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = session_slots,
};

int lmc_py_add_neox(PyObject *module) {
    lmc_module_state_t *state = PyModule_GetState(module);
    state->neox_model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
    state->neox_session_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &session_spec, NULL);
    if (state->neox_model_type == NULL || state->neox_session_type == NULL) return -1;
    return PyModule_AddType(module, state->neox_model_type) < 0 ||
                   PyModule_AddType(module, state->neox_session_type) < 0
               ? -1
               : 0;
}

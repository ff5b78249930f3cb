/* The exact engine for Python: TransformerModel. Checks the arguments, owns the memory, releases the GIL.
 * TransformerSession is in py_transformer_session.c; llmcomp/models/engines/exact.py reads the files and has
 * the public documentation. */
#include "python/transformer_objects.h"
#include "python/transformer_config.h"

#include <string.h>

#include "core/base/ieee.h"
#include "llmcomp/decoding.h"

/* A pass over more sequences than fit this workspace runs a few sequences at a time; Ctrl-C is heard in
 * between. */
#define PASS_WORKSPACE_BYTES ((size_t)32 << 20)

/* Weights. */

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

/* Keeps what it takes. */
typedef struct array_taker {
    PyObject *error, *arrays; /* a list */
} array_taker_t;

static int take_array(void *taker, const char *name, PyObject *object, size_t n_elements,
                      lmc_transformer_tensor_t *tensor) {
    array_taker_t *self = (array_taker_t *)taker;
    int dtype = PyArray_Check(object) ? dtype_of((PyArrayObject *)object) : -1;
    if (dtype < 0) {
        PyErr_Format(self->error, "tensor %s is no array of float32, float16 or uint16 (bfloat16)", name);
        return -1;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if ((size_t)PyArray_SIZE(array) != n_elements || !PyArray_ISCARRAY_RO(array)) {
        PyErr_Format(self->error,
                     "tensor %s has %zd elements; expected %zu, contiguous, aligned and in native byte order",
                     name, (Py_ssize_t)PyArray_SIZE(array), n_elements);
        return -1;
    }
    tensor->data = PyArray_DATA(array);
    tensor->dtype = (lmc_dtype_t)dtype;
    return PyList_Append(self->arrays, object);
}

/* TransformerModel. */

static int raise_status(PyObject *error, lmc_status_t status) {
    if (status == LMC_OK) return 0;
    PyErr_Format(error, "the tensors of the model: %s", lmc_status_message(status));
    return -1;
}

/* Codes take the place of the matrices among the weights; of the arrays only the embedding's and the
 * positions' are read from then on. */
static int quantise(PyObject *error, const lmc_context_t *context, transformer_model_object_t *self,
                    const lmc_transformer_config_t *config, lmc_transformer_weights_t *weights) {
    size_t codes_bytes = lmc_int8_weights_bound(config);
    lmc_transformer_weights_t given = *weights;
    self->codes = PyMem_RawMalloc(codes_bytes);
    if (self->codes == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    lmc_status_t status;
    Py_BEGIN_ALLOW_THREADS
    status =
        lmc_int8_weights_quantise(context, config, &given, self->codes, codes_bytes, self->layers, weights);
    Py_END_ALLOW_THREADS
    return raise_status(error, status);
}

/* The arrays that int8 leaves in use. */
static PyObject *arrays_of_rows(PyObject *of_model) {
    PyObject *embedding = PyDict_GetItemString(of_model, "embedding");
    PyObject *positions = PyDict_GetItemString(of_model, "positions");
    return PyTuple_Pack(2, embedding, positions == NULL ? Py_None : positions);
}

static int model_fill(PyObject *error, transformer_model_object_t *self,
                      const lmc_transformer_config_t *config, PyObject *of_model, PyObject *of_layers) {
    lmc_transformer_weights_t weights;
    size_t tables_bytes = lmc_transformer_tables_bound(config);
    array_taker_t taker = {error, PyList_New(0)};
    self->arrays = taker.arrays;
    self->layers = PyMem_RawCalloc(config->n_layers, sizeof *self->layers);
    self->tables = PyMem_RawMalloc(tables_bytes);
    if (self->arrays == NULL || self->layers == NULL || self->tables == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (lmc_py_weights_take(error, config, of_model, of_layers, take_array, &taker, self->layers, &weights) <
        0)
        return -1;
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    if (config->int8 && quantise(error, &context, self, config, &weights) < 0) return -1;
    lmc_status_t status;
    Py_BEGIN_ALLOW_THREADS
    status = lmc_transformer_model_init(&context, config, &weights, self->tables, tables_bytes, &self->model);
    Py_END_ALLOW_THREADS
    if (raise_status(error, status) < 0) return -1;
    if (!config->int8) return 0;
    self->arrays = arrays_of_rows(of_model);
    Py_DECREF(taker.arrays);
    return self->arrays == NULL ? -1 : 0;
}

static PyObject *make_model(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    lmc_module_state_t *state = lmc_py_state_of_type(type);
    lmc_transformer_config_t config = {0};
    static char *names[] = {"config", "tensors", "layers", NULL};
    PyObject *of_config, *of_model, *of_layers;
    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(arguments, keywords, "OOO", names, &of_config, &of_model, &of_layers))
        return NULL;
    if (lmc_py_config_parse(state->error, of_config, &config) < 0) return NULL;
    if (lmc_transformer_config_check(&config) != LMC_OK) {
        PyErr_SetString(state->error, "the numbers of the model do not fit together or are out of range");
        return NULL;
    }
    transformer_model_object_t *self = (transformer_model_object_t *)lmc_py_new(type);
    if (self == NULL) return NULL;
    if (model_fill(state->error, self, &config, of_model, of_layers) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

/* The numbers of the configuration are rounded and compared on their way in. */
static PyObject *model_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    lmc_float_state_t saved = lmc_float_state_enter();
    PyObject *self = make_model(type, arguments, keywords);
    lmc_float_state_leave(saved);
    return self;
}

static void model_dealloc(PyObject *object) {
    transformer_model_object_t *self = (transformer_model_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyMem_RawFree(self->layers);
    PyMem_RawFree(self->tables);
    PyMem_RawFree(self->codes);
    Py_XDECREF(self->arrays);
    lmc_py_delete(object, type);
}

/* A pass. */

/* int64 [B, T] with T within the context; a new reference. */
static PyArrayObject *parse_token_rows(PyObject *error, const lmc_transformer_config_t *config,
                                       PyObject *object, const char *name) {
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(object);
    if (array == NULL) return NULL;
    if (PyArray_NDIM(array) != 2) {
        PyErr_Format(error, "%s have %d dimensions; expected 2, [sequences, positions]", name,
                     PyArray_NDIM(array));
        Py_DECREF(array);
        return NULL;
    }
    npy_intp shape[2] = {PyArray_DIM(array, 0), PyArray_DIM(array, 1)};
    if ((size_t)shape[1] > config->context_length) {
        PyErr_Format(error, "%zd tokens a sequence; the context of the model holds %zu", (Py_ssize_t)shape[1],
                     config->context_length);
        Py_DECREF(array);
        return NULL;
    }
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
static size_t sequences_per_wave(const lmc_transformer_config_t *config, size_t n_sequences, size_t n_tokens,
                                 size_t n_slots, int has_targets) {
    size_t one = lmc_transformer_pass_bound(config, 1, n_tokens, n_slots, has_targets);
    size_t two = lmc_transformer_pass_bound(config, 2, n_tokens, n_slots, has_targets);
    size_t most = 1 + PASS_WORKSPACE_BYTES / (two - one > 0 ? two - one : 1);
    size_t n_waves = (n_sequences + most - 1) / most;
    return n_waves <= 1 ? n_sequences : (n_sequences + n_waves - 1) / n_waves;
}

/* (a, b) at least 1, of which b are tokens that the context holds. */
static int parse_counts(PyObject *object, PyObject *arguments, size_t *n_sequences, size_t *n_tokens) {
    const lmc_transformer_config_t *config = &((transformer_model_object_t *)object)->model.config;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    Py_ssize_t counts[2];
    if (state == NULL || !PyArg_ParseTuple(arguments, "nn", &counts[0], &counts[1])) return -1;
    *n_sequences = (size_t)counts[0];
    *n_tokens = (size_t)counts[1];
    if (counts[0] >= 1 && counts[0] <= LMC_PY_STREAMS_MAX && counts[1] >= 1 &&
        (size_t)counts[1] <= config->context_length)
        return 0;
    PyErr_Format(state->error, "%zd sequences of %zd tokens; expected 1 to %zd, of 1 to %zu", counts[0],
                 counts[1], LMC_PY_STREAMS_MAX, config->context_length);
    return -1;
}

static PyObject *model_pass_bytes(PyObject *object, PyObject *arguments) {
    const lmc_transformer_config_t *config = &((transformer_model_object_t *)object)->model.config;
    lmc_executor_t executor;
    size_t n_sequences, n_tokens;
    if (parse_counts(object, arguments, &n_sequences, &n_tokens) < 0) return NULL;
    lmc_py_context(&executor);
    size_t n_slots = executor.n_slots;
    size_t per_wave = sequences_per_wave(config, n_sequences, n_tokens, n_slots, 1);
    return PyLong_FromSize_t(lmc_transformer_pass_bound(config, per_wave, n_tokens, n_slots, 1));
}

static PyObject *model_session_bytes(PyObject *object, PyObject *arguments) {
    const lmc_transformer_config_t *config = &((transformer_model_object_t *)object)->model.config;
    lmc_executor_t executor;
    size_t n_streams, n_tokens;
    if (parse_counts(object, arguments, &n_streams, &n_tokens) < 0) return NULL;
    lmc_py_context(&executor);
    size_t cache = lmc_transformer_cache_bound(config, n_streams, n_tokens),
           work = lmc_transformer_decode_bound(config, n_streams, executor.n_slots) +
                  n_streams * config->n_logits * sizeof(float);
    return PyLong_FromSize_t(cache > SIZE_MAX - work ? SIZE_MAX : cache + work);
}

static void raise_pass_error(PyObject *error, lmc_status_t status, const lmc_transformer_batch_t *batch,
                             const lmc_transformer_sink_t *sink, size_t n_embeddings, size_t row) {
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

static lmc_status_t run_wave(const lmc_context_t *context, const lmc_transformer_model_t *model,
                             const lmc_transformer_batch_t *all, const lmc_transformer_sink_t *sink,
                             size_t first, size_t n_sequences, void *workspace, size_t workspace_bytes,
                             size_t *error_row) {
    size_t rows = first * all->row_stride;
    lmc_transformer_batch_t batch = *all;
    lmc_transformer_sink_t part = {.vocab_size = sink->vocab_size};
    batch.tokens += rows;
    batch.n_sequences = n_sequences;
    if (all->lengths != NULL) batch.lengths += first;
    if (sink->targets != NULL) part.targets = sink->targets + rows;
    if (sink->logits != NULL) {
        part.logits = sink->logits + rows * model->config.n_logits;
    } else if (sink->log2_probabilities != NULL) {
        part.log2_probabilities = sink->log2_probabilities + rows;
    } else {
        part.start = sink->start + rows;
        part.freq = sink->freq + rows;
        part.total = sink->total + rows;
    }
    lmc_status_t status =
        lmc_transformer_pass(context, model, &batch, &part, workspace, workspace_bytes, error_row);
    *error_row += rows;
    return status;
}

static int run_pass(PyObject *error, transformer_model_object_t *self, const lmc_transformer_batch_t *batch,
                    const lmc_transformer_sink_t *sink) {
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    const lmc_transformer_config_t *config = &self->model.config;
    if (batch->n_sequences == 0 || batch->n_tokens == 0) return 0;
    int has_targets = sink->logits == NULL;
    size_t per_wave =
        sequences_per_wave(config, batch->n_sequences, batch->n_tokens, executor.n_slots, has_targets);
    size_t workspace_bytes =
        lmc_transformer_pass_bound(config, per_wave, batch->n_tokens, executor.n_slots, has_targets);
    void *workspace = PyMem_RawMalloc(workspace_bytes);
    if (workspace == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    lmc_status_t status = LMC_OK;
    size_t error_row = 0;
    int interrupted = 0;
    for (size_t first = 0; first < batch->n_sequences && status == LMC_OK && !interrupted;
         first += per_wave) {
        size_t left = batch->n_sequences - first;
        Py_BEGIN_ALLOW_THREADS
        status = run_wave(&context, &self->model, batch, sink, first, left < per_wave ? left : per_wave,
                          workspace, workspace_bytes, &error_row);
        Py_END_ALLOW_THREADS
        interrupted = PyErr_CheckSignals() < 0;
    }
    PyMem_RawFree(workspace);
    if (interrupted) return -1;
    if (status == LMC_OK) return 0;
    raise_pass_error(error, status, batch, sink, config->n_embeddings, error_row);
    return -1;
}

static lmc_transformer_batch_t batch_of(PyArrayObject *tokens, const size_t *lengths) {
    return (lmc_transformer_batch_t){.tokens = (const int64_t *)PyArray_DATA(tokens),
                                     .lengths = lengths,
                                     .n_sequences = (size_t)PyArray_DIM(tokens, 0),
                                     .n_tokens = (size_t)PyArray_DIM(tokens, 1),
                                     .row_stride = (size_t)PyArray_DIM(tokens, 1)};
}

static PyObject *model_logits(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"tokens", "lengths", NULL};
    transformer_model_object_t *self = (transformer_model_object_t *)object;
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
        lmc_transformer_batch_t batch = batch_of(tokens, lengths);
        lmc_transformer_sink_t sink = {.logits = (float *)PyArray_DATA((PyArrayObject *)logits)};
        if (run_pass(state->error, self, &batch, &sink) < 0) Py_CLEAR(logits);
    }
    PyMem_RawFree(lengths);
    Py_DECREF(tokens);
    return logits;
}

/* What a pass makes of targets; a new reference. */
typedef PyObject *(*pass_fn)(PyObject *error, transformer_model_object_t *self, PyArrayObject *tokens,
                             PyArrayObject *targets, const size_t *lengths, size_t vocab_size);

static PyObject *pass_log2_probabilities(PyObject *error, transformer_model_object_t *self,
                                         PyArrayObject *tokens, PyArrayObject *targets, const size_t *lengths,
                                         size_t vocab_size) {
    PyObject *found = PyArray_ZEROS(2, PyArray_DIMS(tokens), NPY_FLOAT64, 0);
    if (found == NULL) return NULL;
    lmc_transformer_batch_t batch = batch_of(tokens, lengths);
    lmc_transformer_sink_t sink = {.targets = (const int64_t *)PyArray_DATA(targets),
                                   .log2_probabilities = (double *)PyArray_DATA((PyArrayObject *)found),
                                   .vocab_size = vocab_size};
    if (run_pass(error, self, &batch, &sink) < 0) Py_CLEAR(found);
    return found;
}

static PyObject *pass_intervals(PyObject *error, transformer_model_object_t *self, PyArrayObject *tokens,
                                PyArrayObject *targets, const size_t *lengths, size_t vocab_size) {
    npy_intp *shape = PyArray_DIMS(tokens);
    PyObject *start = PyArray_ZEROS(2, shape, NPY_UINT64, 0);
    PyObject *freq = PyArray_ZEROS(2, shape, NPY_UINT64, 0);
    PyObject *total = PyArray_ZEROS(2, shape, NPY_UINT64, 0), *result = NULL;
    if (start != NULL && freq != NULL && total != NULL) {
        lmc_transformer_batch_t batch = batch_of(tokens, lengths);
        lmc_transformer_sink_t sink = {.targets = (const int64_t *)PyArray_DATA(targets),
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

static PyObject *run_with_targets(PyObject *object, PyObject *arguments, PyObject *keywords, pass_fn pass) {
    static char *names[] = {"tokens", "targets", "lengths", "vocab_size", NULL};
    transformer_model_object_t *self = (transformer_model_object_t *)object;
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
        result = pass(state->error, self, tokens, targets, lengths, vocab_size == 0 ? n_logits : vocab_size);
    PyMem_RawFree(lengths);
    Py_XDECREF(targets);
    Py_DECREF(tokens);
    return result;
}

static PyObject *model_intervals(PyObject *object, PyObject *arguments, PyObject *keywords) {
    return run_with_targets(object, arguments, keywords, pass_intervals);
}

static PyObject *model_log2_probabilities(PyObject *object, PyObject *arguments, PyObject *keywords) {
    return run_with_targets(object, arguments, keywords, pass_log2_probabilities);
}

/* The type. */

PyDoc_STRVAR(
    model_doc,
    "TransformerModel(config, tensors, layers)\n--\n\n"
    "A decoder-only transformer over arrays that stay where they are. config: the members of "
    "lmc_transformer_config_t by name, with kinds, a tuple of dicts, and layer_kinds, bytes. tensors, and "
    "a dict of layers for each layer: arrays by the names of the slots of llmcomp/transformer.h. With int8 "
    "in config the matrices are 8-bit codes, made here.");
PyDoc_STRVAR(logits_doc, "logits($self, tokens, lengths=None)\n--\n\n"
                         "int [B, T] -> float32 [B, T, n_logits]; rows from lengths[b] on are zeros.");
PyDoc_STRVAR(intervals_doc, "intervals($self, tokens, targets, lengths=None, vocab_size=None)\n--\n\n"
                            "int [B, T] twice -> (start, freq, total), uint64 [B, T] each.");
PyDoc_STRVAR(log2_probabilities_doc,
             "log2_probabilities($self, tokens, targets, lengths=None, vocab_size=None)\n--\n\n"
             "int [B, T] twice -> log2 of the softmax at the targets, float64 [B, T].");
PyDoc_STRVAR(session_of_doc, "session($self, n_streams, n_tokens, /)\n--\n\n"
                             "A cache for n_streams streams of up to n_tokens tokens.");
PyDoc_STRVAR(pass_bytes_doc,
             "pass_bytes($self, n_sequences, n_tokens, /)\n--\n\n"
             "What a pass with targets allocates beside its arguments and results, by the threads in "
             "use now.");
PyDoc_STRVAR(session_bytes_doc, "session_bytes($self, n_streams, n_tokens, /)\n--\n\n"
                                "What such a session and its steps allocate, logits included.");

static PyMethodDef model_methods[] = {
    {"logits", (PyCFunction)(void (*)(void))model_logits, METH_VARARGS | METH_KEYWORDS, logits_doc},
    {"intervals", (PyCFunction)(void (*)(void))model_intervals, METH_VARARGS | METH_KEYWORDS, intervals_doc},
    {"log2_probabilities", (PyCFunction)(void (*)(void))model_log2_probabilities,
     METH_VARARGS | METH_KEYWORDS, log2_probabilities_doc},
    {"session", lmc_py_model_session, METH_VARARGS, session_of_doc},
    {"pass_bytes", model_pass_bytes, METH_VARARGS, pass_bytes_doc},
    {"session_bytes", model_session_bytes, METH_VARARGS, session_bytes_doc},
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
    .name = "llmcomp._core.TransformerModel",
    .basicsize = sizeof(transformer_model_object_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = model_slots,
};

static PyObject *transformer_arithmetic(PyObject *module, PyObject *of_config) {
    lmc_module_state_t *state = PyModule_GetState(module);
    lmc_transformer_config_t config;
    if (lmc_py_config_parse(state->error, of_config, &config) < 0) return NULL;
    return PyLong_FromLong(lmc_transformer_arithmetic(&config));
}

static PyMethodDef module_methods[] = {
    {"transformer_arithmetic", transformer_arithmetic, METH_O,
     "transformer_arithmetic($module, config, /)\n--\n\nThe version of the arithmetic that such a model "
     "needs."},
    {NULL, NULL, 0, NULL},
};

int lmc_py_add_transformer(PyObject *module) {
    if (PyModule_AddFunctions(module, module_methods) < 0) return -1;
    lmc_module_state_t *state = PyModule_GetState(module);
    state->transformer_model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
    state->transformer_session_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(module, &lmc_py_session_spec, NULL);
    if (state->transformer_model_type == NULL || state->transformer_session_type == NULL) return -1;
    if (PyModule_AddType(module, state->transformer_model_type) < 0) return -1;
    return PyModule_AddType(module, state->transformer_session_type);
}

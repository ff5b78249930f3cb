/* Encoder and Decoder, which code streams side by side, one step a call: parse, check, allocate, release the
 * GIL, call, raise. */
#include "python/coding_objects.h"
#include "python/large_pages.h"

#include <stdatomic.h>

/* Encoder. */

typedef struct encoder_object {
    PyObject_HEAD
    Py_ssize_t n_streams;
    lmc_encoder_t *streams;
    size_t vocab_size; /* 0: the length of the last axis */
    int is_finished;
    atomic_flag in_use;
} encoder_object_t;

#define FIRST_CAPACITY_BYTES 64

static int parse_n_streams(PyObject *error, Py_ssize_t n_streams) {
    if (n_streams >= 0 && n_streams <= PY_SSIZE_T_MAX / (Py_ssize_t)sizeof(lmc_encoder_t)) return 0;
    PyErr_Format(error, "n_streams is %zd; expected 0 or more", n_streams);
    return -1;
}

static PyObject *encoder_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"n_streams", "vocab_size", NULL};
    Py_ssize_t n_streams;
    PyObject *vocab_object = NULL;
    lmc_module_state_t *state = lmc_py_state_of_type(type);
    size_t vocab_size;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "n|O", names, &n_streams, &vocab_object))
        return NULL;
    if (parse_n_streams(state->error, n_streams) < 0) return NULL;
    if (lmc_py_vocab_size_parse(state->error, vocab_object, &vocab_size) < 0) return NULL;
    encoder_object_t *self = (encoder_object_t *)lmc_py_new(type);
    if (self == NULL) return NULL;
    atomic_flag_clear(&self->in_use);
    self->vocab_size = vocab_size;
    self->streams = PyMem_RawCalloc(n_streams > 0 ? (size_t)n_streams : 1, sizeof(lmc_encoder_t));
    if (self->streams == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    self->n_streams = n_streams;
    for (Py_ssize_t i = 0; i < n_streams; i++) {
        lmc_encoder_init(&self->streams[i], NULL, 0);
        if (lmc_py_encoder_reserve(&self->streams[i], FIRST_CAPACITY_BYTES / LMC_STEP_BYTES_MAX - 1) < 0) {
            Py_DECREF(self);
            return NULL;
        }
    }
    return (PyObject *)self;
}

static void encoder_dealloc(PyObject *object) {
    encoder_object_t *self = (encoder_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    for (Py_ssize_t i = 0; self->streams != NULL && i < self->n_streams; i++)
        PyMem_RawFree(self->streams[i].bytes);
    PyMem_RawFree(self->streams);
    lmc_py_delete(object, type);
}

/* An object is one caller's at a time; a second one gets an error instead of a broken stream. */
static int acquire(PyObject *error, atomic_flag *in_use) {
    if (!atomic_flag_test_and_set(in_use)) return 0;
    PyErr_SetString(error, "another thread is using this object");
    return -1;
}

static int encoder_begin(PyObject *error, encoder_object_t *self) {
    if (acquire(error, &self->in_use) < 0) return -1;
    if (!self->is_finished) return 0;
    atomic_flag_clear(&self->in_use);
    PyErr_SetString(error, "the encoder is finished; expected push only before finish");
    return -1;
}

/* One symbol into every active stream: all of them, or none and an exception. */
static int encoder_put(PyObject *error, encoder_object_t *self, const lmc_py_triple_t *triple,
                       PyArrayObject *mask) {
    const unsigned char *active = mask == NULL ? NULL : (const unsigned char *)PyArray_DATA(mask);
    const uint64_t *start = lmc_py_uint64_data(triple->start), *freq = lmc_py_uint64_data(triple->freq);
    const uint64_t *total = lmc_py_uint64_data(triple->total);
    for (Py_ssize_t i = 0; i < self->n_streams; i++) {
        if (active != NULL && !active[i]) continue;
        if (freq[i] == 0 || total[i] > LMC_TOTAL_MAX || start[i] >= total[i] ||
            freq[i] > total[i] - start[i]) {
            lmc_py_raise_status(error, LMC_ERROR_INTERVAL, (size_t)i, NULL, 0);
            return -1;
        }
        if (lmc_py_encoder_reserve(&self->streams[i], 1) < 0) return -1;
    }
    for (Py_ssize_t i = 0; i < self->n_streams; i++) {
        size_t error_index;
        if (active != NULL && !active[i]) continue;
        lmc_encoder_put(&self->streams[i], 1, &start[i], &freq[i], &total[i], &error_index);
    }
    return 0;
}

static int check_n_rows(PyObject *error, int n_dims, npy_intp n_rows, Py_ssize_t n_streams) {
    if (n_dims == 2 && n_rows == n_streams) return 0;
    PyErr_Format(error, "logits have %d dimensions and %zd rows; expected [%zd, vocab_size]", n_dims,
                 (Py_ssize_t)n_rows, n_streams);
    return -1;
}

static PyObject *encoder_push(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"logits", "tokens", "active", NULL};
    encoder_object_t *self = (encoder_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    PyObject *logits_object, *tokens_object, *mask_object = NULL;
    PyArrayObject *tokens, *mask = NULL;
    lmc_py_logits_t logits;
    lmc_py_triple_t triple = {NULL, NULL, NULL};
    int failed = 1;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO|O", names, &logits_object, &tokens_object,
                                     &mask_object)) {
        return NULL;
    }
    if (lmc_py_rows_parse(state->error, logits_object, tokens_object, self->vocab_size, &logits, &tokens) < 0)
        return NULL;
    int n_dims = PyArray_NDIM(logits.owner);
    if (check_n_rows(state->error, n_dims, PyArray_DIM(logits.owner, 0), self->n_streams) == 0 &&
        lmc_py_mask_parse(state->error, mask_object, self->n_streams, &mask) == 0 &&
        encoder_begin(state->error, self) == 0) {
        failed = lmc_py_intervals_of(state->error, &logits, tokens, mask, &triple) < 0 ||
                 encoder_put(state->error, self, &triple, mask) < 0;
        atomic_flag_clear(&self->in_use);
    }
    lmc_py_triple_clear(&triple);
    Py_XDECREF(mask);
    Py_DECREF(tokens);
    lmc_py_logits_release(&logits);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *encoder_push_intervals(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"start", "freq", "total", "active", NULL};
    encoder_object_t *self = (encoder_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    PyObject *objects[3], *mask_object = NULL;
    PyArrayObject *arrays[3] = {NULL, NULL, NULL}, *mask = NULL;
    npy_intp shape[1] = {self->n_streams};
    int failed = 1;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOO|O", names, &objects[0], &objects[1],
                                     &objects[2], &mask_object)) {
        return NULL;
    }
    /* int64 and uint64 share their bits; a negative number is above LMC_TOTAL_MAX and so refused. */
    for (int i = 0; i < 3; i++) {
        arrays[i] = lmc_py_integers_parse(state->error, objects[i], names[i], 1, shape);
        if (arrays[i] == NULL) goto done;
    }
    lmc_py_triple_t triple = {(PyObject *)arrays[0], (PyObject *)arrays[1], (PyObject *)arrays[2]};
    if (lmc_py_mask_parse(state->error, mask_object, self->n_streams, &mask) == 0 &&
        encoder_begin(state->error, self) == 0) {
        failed = encoder_put(state->error, self, &triple, mask) < 0;
        atomic_flag_clear(&self->in_use);
    }
done:
    for (int i = 0; i < 3; i++)
        Py_XDECREF(arrays[i]);
    Py_XDECREF(mask);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *encoder_finish(PyObject *object, PyObject *unused) {
    encoder_object_t *self = (encoder_object_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    (void)unused;
    if (state == NULL || encoder_begin(state->error, self) < 0) return NULL;
    self->is_finished = 1;
    PyObject *payloads = PyList_New(self->n_streams);
    for (Py_ssize_t i = 0; payloads != NULL && i < self->n_streams; i++) {
        lmc_encoder_t *stream = &self->streams[i];
        lmc_encoder_end(stream);
        PyObject *payload =
            PyBytes_FromStringAndSize((const char *)stream->bytes, (Py_ssize_t)stream->n_bytes);
        if (payload == NULL)
            Py_CLEAR(payloads);
        else
            PyList_SET_ITEM(payloads, i, payload);
    }
    atomic_flag_clear(&self->in_use);
    return payloads;
}

static PyObject *encoder_n_streams(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromSsize_t(((encoder_object_t *)object)->n_streams);
}

PyDoc_STRVAR(encoder_doc,
             "Encoder(n_streams, vocab_size=None)\n--\n\n"
             "Codes n_streams independent streams of tokens side by side, one token of each at a step.");
PyDoc_STRVAR(
    encoder_push_doc,
    "push($self, logits, tokens, active=None)\n--\n\n"
    "One token into every active stream: logits [n_streams, V], tokens int [n_streams], active bool "
    "[n_streams].\nOn an error nothing is coded. The rows of streams that are not active are not read.");
PyDoc_STRVAR(encoder_push_intervals_doc,
             "push_intervals($self, start, freq, total, active=None)\n--\n\n"
             "As push, with the integers that intervals() gave: uint64 [n_streams] each.");
PyDoc_STRVAR(
    encoder_finish_doc,
    "finish($self)\n--\n\nEnds all streams and returns their payloads, a list of n_streams bytes objects.");

static PyMethodDef encoder_methods[] = {
    {"push", (PyCFunction)(void (*)(void))encoder_push, METH_VARARGS | METH_KEYWORDS, encoder_push_doc},
    {"push_intervals", (PyCFunction)(void (*)(void))encoder_push_intervals, METH_VARARGS | METH_KEYWORDS,
     encoder_push_intervals_doc},
    {"finish", encoder_finish, METH_NOARGS, encoder_finish_doc},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef encoder_properties[] = {
    {"n_streams", encoder_n_streams, NULL, "Number of streams.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot encoder_slots[] = {
    {Py_tp_doc, (void *)encoder_doc}, {Py_tp_new, encoder_new},           {Py_tp_dealloc, encoder_dealloc},
    {Py_tp_methods, encoder_methods}, {Py_tp_getset, encoder_properties}, {0, NULL},
};
PyType_Spec lmc_py_encoder_spec = {
    .name = "llmcomp._core.Encoder",
    .basicsize = sizeof(encoder_object_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = encoder_slots,
};

/* Decoder. */

static PyObject *bytes_of_payloads(PyObject *error, PyObject *object) {
    if (PyBytes_Check(object) || PyByteArray_Check(object) || PyUnicode_Check(object)) {
        return PyErr_Format(error, "payloads are one %R; expected a list of bytes, one a stream",
                            Py_TYPE(object));
    }
    PyObject *given = PySequence_Tuple(object);
    PyObject *payloads = given == NULL ? NULL : PyTuple_New(PyTuple_GET_SIZE(given));
    for (Py_ssize_t i = 0; payloads != NULL && i < PyTuple_GET_SIZE(given); i++) {
        PyObject *item = PyTuple_GET_ITEM(given, i);
        PyObject *bytes = NULL;
        if (PyObject_CheckBuffer(item))
            bytes = PyBytes_FromObject(item);
        else
            PyErr_Format(error, "payload %zd is of %R; expected bytes", i, Py_TYPE(item));
        if (bytes == NULL)
            Py_CLEAR(payloads);
        else
            PyTuple_SET_ITEM(payloads, i, bytes);
    }
    Py_XDECREF(given);
    return payloads;
}

/* A mixer for every stream: n_tokens_max is a sequence of ints, one a stream, or None. -1 with an exception
 * set, and then too what there is belongs to the decoder. */
static int decoder_add_mixers(PyObject *error, lmc_py_decoder_t *self, PyObject *n_tokens_max) {
    if (n_tokens_max == NULL || n_tokens_max == Py_None) return 0;
    npy_intp n_streams = PyTuple_GET_SIZE(self->payloads);
    PyArrayObject *counts = lmc_py_integers_parse(error, n_tokens_max, "n_tokens_max", 1, &n_streams);
    if (counts == NULL) return -1;
    const int64_t *count = (const int64_t *)PyArray_DATA(counts);
    int result = 0;
    self->mixers = PyMem_RawCalloc(n_streams > 0 ? (size_t)n_streams : 1, sizeof *self->mixers);
    if (self->mixers == NULL) PyErr_NoMemory(), result = -1;
    for (npy_intp i = 0; i < n_streams && result == 0; i++) {
        size_t bytes = count[i] < 0 ? 0 : lmc_mixer_bound((size_t)count[i]);
        if (bytes == 0) {
            PyErr_Format(error, "n_tokens_max of stream %zd is %lld; expected 0 to %zu", (Py_ssize_t)i,
                         (long long)count[i], LMC_MIXING_TOKENS_MAX);
            result = -1;
        } else {
            void *memory = PyMem_RawMalloc(bytes);
            lmc_py_want_large_pages(memory, bytes);
            if (memory == NULL)
                PyErr_NoMemory(), result = -1;
            else
                lmc_mixer_begin(memory, bytes, (size_t)count[i], &self->mixers[i]);
        }
    }
    Py_DECREF(counts);
    return result;
}

static PyObject *decoder_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"payloads", "vocab_size", "n_tokens_max", NULL};
    PyObject *payloads_object, *vocab_object = NULL, *tokens_object = NULL;
    lmc_module_state_t *state = lmc_py_state_of_type(type);
    size_t vocab_size;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O|OO", names, &payloads_object, &vocab_object,
                                     &tokens_object))
        return NULL;
    if (lmc_py_vocab_size_parse(state->error, vocab_object, &vocab_size) < 0) return NULL;
    PyObject *payloads = bytes_of_payloads(state->error, payloads_object);
    if (payloads == NULL) return NULL;
    lmc_py_decoder_t *self = (lmc_py_decoder_t *)lmc_py_new(type);
    if (self == NULL) {
        Py_DECREF(payloads);
        return NULL;
    }
    atomic_flag_clear(&self->in_use);
    self->payloads = payloads;
    self->vocab_size = vocab_size;
    Py_ssize_t n_streams = PyTuple_GET_SIZE(payloads);
    self->streams = PyMem_RawCalloc(n_streams > 0 ? (size_t)n_streams : 1, sizeof(lmc_decoder_t));
    if (self->streams == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < n_streams; i++) {
        PyObject *payload = PyTuple_GET_ITEM(payloads, i);
        lmc_decoder_init(&self->streams[i], (const uint8_t *)PyBytes_AS_STRING(payload),
                         (size_t)PyBytes_GET_SIZE(payload));
    }
    if (decoder_add_mixers(state->error, self, tokens_object) < 0) Py_CLEAR(self);
    return (PyObject *)self;
}

static void decoder_dealloc(PyObject *object) {
    lmc_py_decoder_t *self = (lmc_py_decoder_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    for (Py_ssize_t i = 0; self->mixers != NULL && i < PyTuple_GET_SIZE(self->payloads); i++)
        PyMem_RawFree(self->mixers[i]);
    PyMem_RawFree(self->mixers);
    PyMem_RawFree(self->streams);
    Py_XDECREF(self->payloads);
    lmc_py_delete(object, type);
}

static PyObject *pull_step(PyObject *error, lmc_py_decoder_t *self, const lmc_py_logits_t *logits,
                           PyArrayObject *mask) {
    const unsigned char *active = mask == NULL ? NULL : (const unsigned char *)PyArray_DATA(mask);
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    lmc_search_t *searches = PyMem_RawMalloc(executor.n_slots * sizeof *searches);
    npy_intp shape[1] = {(npy_intp)logits->rows.n_rows};
    PyObject *tokens = PyArray_EMPTY(1, shape, NPY_INT32, 0);
    lmc_status_t status = LMC_OK;
    size_t error_row = 0;
    if (tokens == NULL || searches == NULL) {
        PyMem_RawFree(searches);
        if (tokens != NULL) PyErr_NoMemory();
        Py_XDECREF(tokens);
        return NULL;
    }
    int32_t *token_data = (int32_t *)PyArray_DATA((PyArrayObject *)tokens);
    Py_BEGIN_ALLOW_THREADS
    if (self->mixers != NULL)
        status = lmc_mixed_decode_step(&context, &logits->rows, active, self->streams, self->mixers, searches,
                                       token_data, &error_row);
    else
        status =
            lmc_decode_step(&context, &logits->rows, active, self->streams, searches, token_data, &error_row);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(searches);
    if (status != LMC_OK) {
        Py_DECREF(tokens);
        return lmc_py_raise_status(error, status, error_row, NULL, 0);
    }
    return tokens;
}

static PyObject *decoder_pull(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"logits", "active", NULL};
    lmc_py_decoder_t *self = (lmc_py_decoder_t *)object;
    lmc_module_state_t *state = lmc_py_state_of_type(Py_TYPE(object));
    PyObject *logits_object, *mask_object = NULL, *tokens = NULL;
    PyArrayObject *mask = NULL;
    lmc_py_logits_t logits;
    if (state == NULL) return NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O|O", names, &logits_object, &mask_object))
        return NULL;
    if (lmc_py_logits_parse(state->error, logits_object, self->vocab_size, &logits) < 0) return NULL;
    Py_ssize_t n_streams = PyTuple_GET_SIZE(self->payloads);
    int n_dims = PyArray_NDIM(logits.owner);
    if (check_n_rows(state->error, n_dims, PyArray_DIM(logits.owner, 0), n_streams) == 0 &&
        lmc_py_mask_parse(state->error, mask_object, n_streams, &mask) == 0 &&
        acquire(state->error, &self->in_use) == 0) {
        tokens = pull_step(state->error, self, &logits, mask);
        atomic_flag_clear(&self->in_use);
    }
    Py_XDECREF(mask);
    lmc_py_logits_release(&logits);
    return tokens;
}

static PyObject *decoder_n_streams(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromSsize_t(PyTuple_GET_SIZE(((lmc_py_decoder_t *)object)->payloads));
}

PyDoc_STRVAR(decoder_doc,
             "Decoder(payloads, vocab_size=None, n_tokens_max=None)\n--\n\n"
             "Decodes the payloads of an Encoder side by side, one token of each stream at a step.\n"
             "n_tokens_max, int [n_streams]: the streams are of mixed intervals, and none is longer.");
PyDoc_STRVAR(
    decoder_pull_doc,
    "pull($self, logits, active=None)\n--\n\n"
    "The next token of every active stream, int32 [n_streams], -1 where not active: logits [n_streams, V] as "
    "they\nwere pushed, active bool [n_streams]. A stream does not know its length: past its end come tokens "
    "that mean nothing.\nOn an error streams without one may have moved on: start again from the payloads.");

static PyMethodDef decoder_methods[] = {
    {"pull", (PyCFunction)(void (*)(void))decoder_pull, METH_VARARGS | METH_KEYWORDS, decoder_pull_doc},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef decoder_properties[] = {
    {"n_streams", decoder_n_streams, NULL, "Number of streams.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot decoder_slots[] = {
    {Py_tp_doc, (void *)decoder_doc}, {Py_tp_new, decoder_new},           {Py_tp_dealloc, decoder_dealloc},
    {Py_tp_methods, decoder_methods}, {Py_tp_getset, decoder_properties}, {0, NULL},
};
PyType_Spec lmc_py_decoder_spec = {
    .name = "llmcomp._core.Decoder",
    .basicsize = sizeof(lmc_py_decoder_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = decoder_slots,
};

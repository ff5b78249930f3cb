/* TransformerSession on a device: keys and values of some streams, the memory of a call, and a CUDA stream of
 * its own on which everything runs. Calls return before the device is done; `check` waits.
 * llmcomp/models/engines/cuda.py checks the arguments and lets in one thread at a time; pointers of the
 * device are Python integers here. */
#include "core/base/size.h"
#include "python/cuda_transformer_objects.h"

#include <string.h>

/* A graph of one decoding step, and what it was captured with. */
typedef struct step_graph {
    cudaGraphExec_t executable;
    lmc_cuda_transformer_chain_t chain;
    float *logits;
} step_graph_t;

typedef struct cuda_session_object {
    PyObject_HEAD
    cuda_model_object_t *owner;
    lmc_cuda_transformer_cache_t cache;
    lmc_cuda_transformer_work_t work;
    uint64_t *error;
    void *memory;
    size_t n_bytes;
    cudaStream_t stream;
    step_graph_t graph;
} cuda_session_object_t;

static module_state_t *state_of(PyObject *object) {
    return PyType_GetModuleState(Py_TYPE(object));
}

/* Making one. */

static int session_begin(cuda_session_object_t *self, uint32_t n_layers, uint32_t n_streams,
                         uint32_t n_tokens, uint32_t n_rows, size_t work_bytes) {
    const lmc_transformer_config_t *config = &self->owner->placed.config;
    char *base = self->memory;
    self->error = (uint64_t *)(void *)base;
    lmc_cuda_transformer_work_init(config, n_rows, base + LMC_DEVICE_ALIGNMENT, &self->work);
    int status = cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking);
    if (status == cudaSuccess) status = lmc_cuda_error_clear(self->error, self->stream);
    if (status == cudaSuccess)
        status = lmc_cuda_transformer_cache_init(config, n_layers, n_streams, n_tokens,
                                                 base + LMC_DEVICE_ALIGNMENT +
                                                     lmc_round_up(work_bytes, LMC_DEVICE_ALIGNMENT),
                                                 &self->cache, self->stream);
    return status;
}

PyObject *lmc_py_cuda_model_session(PyObject *object, PyObject *arguments) {
    cuda_model_object_t *owner = (cuda_model_object_t *)object;
    module_state_t *state = state_of(object);
    const lmc_transformer_config_t *config = &owner->placed.config;
    unsigned int n_layers, n_streams, n_tokens, n_rows;
    int result;
    if (!PyArg_ParseTuple(arguments, "IIII", &n_layers, &n_streams, &n_tokens, &n_rows)) return NULL;
    PyTypeObject *type = state->transformer_session_type;
    cuda_session_object_t *self = (cuda_session_object_t *)lmc_py_new(type);
    if (self == NULL) return NULL;
    Py_INCREF(owner);
    self->owner = owner;
    size_t cache_bytes = lmc_cuda_transformer_cache_bytes(config, n_layers, n_streams, n_tokens);
    size_t work_bytes = lmc_cuda_transformer_work_bytes(config, n_rows);
    self->n_bytes = LMC_DEVICE_ALIGNMENT + lmc_round_up(work_bytes, LMC_DEVICE_ALIGNMENT) + cache_bytes;
    result = lmc_py_device_allocate(state, owner->device, self->n_bytes, "keys, values and work of a session",
                                    &self->memory);
    if (result == 0) {
        ON_DEVICE(state->error, owner->device, result,
                  session_begin(self, n_layers, n_streams, n_tokens, n_rows, work_bytes));
    }
    if (result < 0) Py_CLEAR(self);
    return (PyObject *)self;
}

static void graph_clear(step_graph_t *graph) {
    if (graph->executable != NULL) cudaGraphExecDestroy(graph->executable);
    memset(graph, 0, sizeof *graph);
}

static void session_dealloc(PyObject *object) {
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    int device = self->owner->device, saved;
    if (self->stream != NULL && device_enter(device, &saved) == cudaSuccess) {
        cudaStreamSynchronize(self->stream);
        graph_clear(&self->graph);
        cudaStreamDestroy(self->stream);
        device_leave(device, saved);
    }
    lmc_py_device_free(device, self->memory);
    Py_DECREF((PyObject *)self->owner);
    lmc_py_delete(object, type);
}

/* Passes. */

static PyObject *session_run_pass(PyObject *object, PyObject *arguments) {
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    number_t tokens, row_begin, streams;
    unsigned int n_stretches, n_rows, n_longest;
    int result;
    if (!PyArg_ParseTuple(arguments, "KKKIII", &tokens, &row_begin, &streams, &n_stretches, &n_rows,
                          &n_longest))
        return NULL;
    lmc_cuda_transformer_batch_t batch = {.tokens = POINTER(const int32_t *, tokens),
                                          .row_begin = POINTER(const uint32_t *, row_begin),
                                          .streams = POINTER(const uint32_t *, streams),
                                          .n_stretches = n_stretches,
                                          .n_rows = n_rows,
                                          .n_longest = n_longest};
    ON_DEVICE(state_of(object)->error, self->owner->device, result,
              lmc_cuda_transformer_pass(&self->owner->placed, &batch, &self->cache, &self->work, self->error,
                                        self->stream));
    return none_or_null(result);
}

static PyObject *session_head(PyObject *object, PyObject *arguments) {
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    unsigned int first_row, n_rows;
    number_t logits;
    int result;
    if (!PyArg_ParseTuple(arguments, "IIK", &first_row, &n_rows, &logits)) return NULL;
    ON_DEVICE(state_of(object)->error, self->owner->device, result,
              lmc_cuda_transformer_head(&self->owner->placed, &self->work, first_row, n_rows,
                                        POINTER(float *, logits), self->stream));
    return none_or_null(result);
}

static PyObject *session_intervals(PyObject *object, PyObject *arguments) {
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    unsigned int n_rows, vocab_size, n_logits_rows;
    number_t targets, start, freq, total, logits;
    int result;
    if (!PyArg_ParseTuple(arguments, "IKKKKIIK", &n_rows, &targets, &start, &freq, &total, &vocab_size,
                          &n_logits_rows, &logits))
        return NULL;
    lmc_cuda_transformer_sink_t sink = {.targets = POINTER(const int32_t *, targets),
                                        .start = POINTER(uint64_t *, start),
                                        .freq = POINTER(uint64_t *, freq),
                                        .total = POINTER(uint64_t *, total),
                                        .vocab_size = vocab_size,
                                        .n_logits_rows = n_logits_rows,
                                        .logits = POINTER(float *, logits)};
    ON_DEVICE(state_of(object)->error, self->owner->device, result,
              lmc_cuda_transformer_intervals(&self->owner->placed, &self->work, 0, n_rows, &sink, self->error,
                                             self->stream));
    return none_or_null(result);
}

static PyObject *session_log2_softmax(PyObject *object, PyObject *arguments) {
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    unsigned int n_rows, n_logits_rows;
    number_t targets, log2_probabilities, logits;
    int result;
    if (!PyArg_ParseTuple(arguments, "IKKIK", &n_rows, &targets, &log2_probabilities, &n_logits_rows,
                          &logits))
        return NULL;
    lmc_cuda_transformer_sink_t sink = {.targets = POINTER(const int32_t *, targets),
                                        .log2_probabilities = POINTER(double *, log2_probabilities),
                                        .n_logits_rows = n_logits_rows,
                                        .logits = POINTER(float *, logits)};
    ON_DEVICE(state_of(object)->error, self->owner->device, result,
              lmc_cuda_transformer_log2_softmax(&self->owner->placed, &self->work, 0, n_rows, &sink,
                                                self->error, self->stream));
    return none_or_null(result);
}

/* Steps. */

static PyObject *session_step(PyObject *object, PyObject *arguments) {
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    number_t tokens, logits;
    int result;
    if (!PyArg_ParseTuple(arguments, "KK", &tokens, &logits)) return NULL;
    ON_DEVICE(state_of(object)->error, self->owner->device, result,
              lmc_cuda_transformer_step(&self->owner->placed, &self->cache, self->cache.n_streams, NULL,
                                        POINTER(const int32_t *, tokens), POINTER(float *, logits),
                                        &self->work, self->error, self->stream));
    return none_or_null(result);
}

static int decode_step(cuda_session_object_t *self, const lmc_cuda_transformer_chain_t *chain,
                       float *logits) {
    return lmc_cuda_transformer_decode_step(&self->owner->placed, &self->cache, chain, logits, &self->work,
                                            self->error, self->stream);
}

static int capture_step(cuda_session_object_t *self, const lmc_cuda_transformer_chain_t *chain,
                        float *logits) {
    cudaGraph_t graph = NULL;
    graph_clear(&self->graph);
    int status = cudaStreamBeginCapture(self->stream, cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess) return status;
    status = decode_step(self, chain, logits);
    int ended = cudaStreamEndCapture(self->stream, &graph);
    if (status == cudaSuccess) status = ended;
    if (status == cudaSuccess)
        status = cudaGraphInstantiateWithFlags(&self->graph.executable, graph, 0); /* alike since CUDA 11.4 */
    if (graph != NULL) cudaGraphDestroy(graph);
    self->graph.chain = *chain;
    self->graph.logits = logits;
    return status;
}

static int is_same_chain(const lmc_cuda_transformer_chain_t *a, const lmc_cuda_transformer_chain_t *b) {
    return a->streams == b->streams && a->decoders == b->decoders && a->tokens == b->tokens &&
           a->log == b->log && a->n_logged == b->n_logged && a->log_steps == b->log_steps &&
           a->n_rows == b->n_rows && a->vocab_size == b->vocab_size;
}

/* The first step of a chain is launched kernel by kernel: what CUDA loads when a kernel is first used is
 * there before the capture. */
static int run_decode_steps(cuda_session_object_t *self, const lmc_cuda_transformer_chain_t *chain,
                            float *logits, uint32_t n_steps) {
    int is_captured = self->graph.executable != NULL && is_same_chain(&self->graph.chain, chain) &&
                      self->graph.logits == logits;
    int status = cudaMemsetAsync(chain->n_logged, 0, sizeof *chain->n_logged, self->stream);
    if (status == cudaSuccess && !is_captured) status = decode_step(self, chain, logits);
    if (status == cudaSuccess && !is_captured && n_steps > 1) status = capture_step(self, chain, logits);
    for (uint32_t i = is_captured ? 0 : 1; i < n_steps && status == cudaSuccess; i++)
        status = cudaGraphLaunch(self->graph.executable, self->stream);
    return status;
}

static PyObject *session_decode_steps(PyObject *object, PyObject *arguments) {
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    unsigned int n_steps, log_steps, n_rows, vocab_size;
    number_t streams, decoders, tokens, log, n_logged, logits;
    int result;
    if (!PyArg_ParseTuple(arguments, "IKKKKKIIIK", &n_steps, &streams, &decoders, &tokens, &log, &n_logged,
                          &log_steps, &n_rows, &vocab_size, &logits))
        return NULL;
    lmc_cuda_transformer_chain_t chain = {.streams = POINTER(const uint32_t *, streams),
                                          .decoders = POINTER(lmc_decoder_t *, decoders),
                                          .tokens = POINTER(int32_t *, tokens),
                                          .log = POINTER(int32_t *, log),
                                          .n_logged = POINTER(uint32_t *, n_logged),
                                          .log_steps = log_steps,
                                          .n_rows = n_rows,
                                          .vocab_size = vocab_size};
    ON_DEVICE(state_of(object)->error, self->owner->device, result,
              run_decode_steps(self, &chain, POINTER(float *, logits), n_steps));
    return none_or_null(result);
}

/* The state. */

static PyObject *session_set_positions(PyObject *object, PyObject *arguments) {
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    module_state_t *state = state_of(object);
    unsigned int first;
    Py_buffer positions;
    int result = -1;
    if (!PyArg_ParseTuple(arguments, "Iy*", &first, &positions)) return NULL;
    size_t room = (self->cache.n_streams - (size_t)first) * sizeof(uint32_t);
    if (first > self->cache.n_streams || (size_t)positions.len > room)
        PyErr_SetString(state->error, "positions of more streams than the session has");
    else
        ON_DEVICE(state->error, self->owner->device, result,
                  lmc_py_upload(self->owner->device, self->cache.positions + first, positions.buf,
                                (size_t)positions.len, self->stream));
    PyBuffer_Release(&positions);
    return none_or_null(result);
}

static int read_error(cuda_session_object_t *self, uint64_t *found) {
    int status = cudaMemcpyAsync(found, self->error, sizeof *found, cudaMemcpyDeviceToHost, self->stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(self->stream);
    if (status == cudaSuccess && *found != LMC_CUDA_NO_ERROR)
        status = lmc_cuda_error_clear(self->error, self->stream);
    return status;
}

static PyObject *session_check(PyObject *object, PyObject *unused) {
    (void)unused;
    cuda_session_object_t *self = (cuda_session_object_t *)object;
    uint64_t found = LMC_CUDA_NO_ERROR;
    int result;
    ON_DEVICE(state_of(object)->error, self->owner->device, result, read_error(self, &found));
    if (result < 0) return NULL;
    if (found == LMC_CUDA_NO_ERROR) Py_RETURN_NONE;
    return Py_BuildValue("(Ks)", (number_t)(found >> 8), lmc_status_message((lmc_status_t)(found & 0xFF)));
}

static PyObject *session_stream(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(((cuda_session_object_t *)object)->stream);
}

static PyObject *session_stretch_max(PyObject *object, void *unused) {
    (void)unused;
    const cuda_session_object_t *self = (const cuda_session_object_t *)object;
    return PyLong_FromUnsignedLong(
        lmc_cuda_transformer_stretch_max(&self->owner->placed.config, &self->cache));
}

static PyObject *session_n_bytes(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(((cuda_session_object_t *)object)->n_bytes);
}

static PyMethodDef session_methods[] = {
    {"run_pass", session_run_pass, METH_VARARGS,
     "run_pass($self, tokens, row_begin, streams, n_stretches, n_rows, n_longest, /)\n--\n\n"
     "All layers for stretches of tokens, without padding; streams 0: stretch i belongs to stream i."},
    {"head", session_head, METH_VARARGS,
     "head($self, first_row, n_rows, logits, /)\n--\n\nLogits of rows of the last pass."},
    {"intervals", session_intervals, METH_VARARGS,
     "intervals($self, n_rows, targets, start, freq, total, vocab_size, n_logits_rows, logits, /)\n--\n\n"
     "Intervals of all rows of the last pass, n_logits_rows at a time through logits."},
    {"log2_softmax", session_log2_softmax, METH_VARARGS,
     "log2_softmax($self, n_rows, targets, log2_probabilities, n_logits_rows, logits, /)\n--\n\n"
     "log2 of the softmax at the targets of all rows of the last pass, like intervals."},
    {"step", session_step, METH_VARARGS,
     "step($self, tokens, logits, /)\n--\n\nOne token into every stream whose token is not negative."},
    {"decode_steps", session_decode_steps, METH_VARARGS,
     "decode_steps($self, n_steps, streams, decoders, tokens, log, n_logged, log_steps, n_rows, "
     "vocab_size, logits, /)\n--\n\nSteps whose results are the next one's inputs, from one captured graph."},
    {"set_positions", session_set_positions, METH_VARARGS,
     "set_positions($self, first, positions, /)\n--\n\nuint32: tokens that streams first and on have seen."},
    {"check", session_check, METH_NOARGS,
     "check($self)\n--\n\nWaits; None, or (row, phrase) of the first error since the last check."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef session_properties[] = {
    {"stream", session_stream, NULL, "Its CUDA stream.", NULL},
    {"n_bytes", session_n_bytes, NULL, "Memory of the device that it takes.", NULL},
    {"stretch_max", session_stretch_max, NULL, "Tokens that a stream can take in one pass.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot session_slots[] = {
    {Py_tp_doc, "Keys and values of streams on a device; TransformerModel.session makes it."},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_methods, session_methods},
    {Py_tp_getset, session_properties},
    {0, NULL},
};
PyType_Spec lmc_py_cuda_session_spec = {
    .name = "llmcomp._cuda.TransformerSession",
    .basicsize = sizeof(cuda_session_object_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = session_slots,
};

/* TransformerModel on a device: takes a model's weights there, once and as they are stored, for
 * llmcomp/models/engines/cuda.py, which checks the arguments of a call. TransformerSession is in
 * cuda_transformer_session.c. */
#include "python/cuda_transformer_objects.h"
#include "python/transformer_config.h"
#include "core/base/size.h"

#include <string.h>

#include "core/base/ieee.h"

/* Weights of the host. */

/* The caller's arrays while they are read; tensors in the order of llmcomp/transformer.h, global ones first.
 */
typedef struct host_weights {
    PyObject *error;
    lmc_transformer_config_t config;
    lmc_transformer_weights_t weights;
    lmc_transformer_layer_t *layers;
    Py_buffer *buffers;
    size_t n_buffers;
    void *tables;
    size_t tables_bytes;
} host_weights_t;

static void host_weights_release(host_weights_t *host) {
    for (size_t i = 0; i < host->n_buffers; i++)
        PyBuffer_Release(&host->buffers[i]);
    PyMem_RawFree(host->buffers);
    PyMem_RawFree(host->layers);
    PyMem_RawFree(host->tables);
}

static int dtype_of(const Py_buffer *buffer) {
    const char *format = buffer->format;
    if (format == NULL || format[0] == '\0' || format[1] != '\0') return -1;
    return format[0] == 'f'   ? (int)LMC_FLOAT32
           : format[0] == 'e' ? (int)LMC_FLOAT16
           : format[0] == 'H' ? (int)LMC_BFLOAT16
                              : -1;
}

static int take_array(void *taker, const char *name, PyObject *object, size_t n_elements,
                      lmc_transformer_tensor_t *tensor) {
    host_weights_t *host = (host_weights_t *)taker;
    Py_buffer *buffer = &host->buffers[host->n_buffers];
    if (PyObject_GetBuffer(object, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return -1;
    host->n_buffers++;
    if (dtype_of(buffer) < 0 || (size_t)buffer->len != n_elements * (size_t)buffer->itemsize) {
        PyErr_Format(host->error,
                     "tensor %s has %zd bytes; expected %zu of float32, float16 or uint16 (bfloat16)", name,
                     buffer->len, n_elements);
        return -1;
    }
    *tensor = (lmc_transformer_tensor_t){buffer->buf, (lmc_dtype_t)dtype_of(buffer)};
    return 0;
}

static int take_weights(PyObject *error, host_weights_t *host, PyObject *of_model, PyObject *of_layers) {
    const lmc_transformer_config_t *config = &host->config;
    size_t most = LMC_MODEL_SLOT_COUNT + LMC_LAYER_SLOT_COUNT * config->n_layers;
    host->error = error;
    host->tables_bytes = lmc_transformer_tables_bound(config);
    host->buffers = PyMem_RawCalloc(most, sizeof *host->buffers);
    host->layers = PyMem_RawCalloc(config->n_layers, sizeof *host->layers);
    host->tables = PyMem_RawMalloc(host->tables_bytes);
    if (host->buffers == NULL || host->layers == NULL || host->tables == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    return lmc_py_weights_take(error, config, of_model, of_layers, take_array, host, host->layers,
                               &host->weights);
}

/* Weights of the device. */

/* Places matrices one after the other; with a NULL base it only adds up what they take. */
typedef struct upload_plan {
    char *base;
    size_t used;
    void *passage;        /* memory of the device for a matrix that becomes codes */
    size_t passage_bytes; /* of the largest one */
    int int8;
    int status; /* of the first copy that failed */
} upload_plan_t;

static const void *place(upload_plan_t *plan, const void *data, size_t n_bytes) {
    size_t at = plan->used;
    plan->used += lmc_round_up(n_bytes, LMC_DEVICE_ALIGNMENT);
    if (plan->base == NULL) return NULL;
    if (plan->status == cudaSuccess)
        plan->status = cudaMemcpy(plan->base + at, data, n_bytes, cudaMemcpyHostToDevice);
    return plan->base + at;
}

static size_t matrix_bytes(lmc_transformer_tensor_t tensor, size_t n_rows, size_t n_k) {
    return n_rows * n_k * (tensor.dtype == LMC_FLOAT32 ? 4 : 2);
}

static lmc_transformer_tensor_t place_as_stored(upload_plan_t *plan, lmc_transformer_tensor_t tensor,
                                                size_t n_rows, size_t n_k) {
    return (lmc_transformer_tensor_t){place(plan, tensor.data, matrix_bytes(tensor, n_rows, n_k)),
                                      tensor.dtype};
}

static lmc_transformer_tensor_t place_codes(upload_plan_t *plan, lmc_transformer_tensor_t tensor,
                                            size_t n_rows, size_t n_k) {
    size_t at = plan->used, n_bytes = matrix_bytes(tensor, n_rows, n_k);
    lmc_transformer_tensor_t codes = {NULL, tensor.dtype};
    plan->used += lmc_round_up(lmc_cuda_int8_weights_bytes(n_rows, n_k), LMC_DEVICE_ALIGNMENT);
    if (n_bytes > plan->passage_bytes) plan->passage_bytes = n_bytes;
    if (plan->base == NULL) return codes;
    if (plan->status == cudaSuccess)
        plan->status = cudaMemcpy(plan->passage, tensor.data, n_bytes, cudaMemcpyHostToDevice);
    tensor.data = plan->passage;
    if (plan->status == cudaSuccess)
        plan->status = lmc_cuda_int8_weights_quantise(&tensor, n_rows, n_k, plan->base + at, &codes, NULL);
    return codes;
}

/* The matrix of a linear map. */
static lmc_transformer_tensor_t place_matrix(upload_plan_t *plan, lmc_transformer_tensor_t tensor,
                                             size_t n_rows, size_t n_k) {
    return plan->int8 ? place_codes(plan, tensor, n_rows, n_k) : place_as_stored(plan, tensor, n_rows, n_k);
}

/* The matrices, tied ones once, then the tables. Norms and biases are in the tables. */
static const void *place_weights(upload_plan_t *plan, const host_weights_t *host,
                                 lmc_transformer_weights_t *placed, lmc_transformer_layer_t *layers) {
    const lmc_transformer_config_t *config = &host->config;
    lmc_transformer_tensor_t embedding = host->weights.slots[LMC_MODEL_EMBEDDING];
    lmc_transformer_tensor_t head = host->weights.slots[LMC_MODEL_HEAD];
    int is_tied = head.data == embedding.data && !plan->int8;
    embedding = place_as_stored(plan, embedding, config->n_embeddings, config->hidden);
    placed->slots[LMC_MODEL_EMBEDDING] = embedding;
    lmc_transformer_tensor_t positions = host->weights.slots[LMC_MODEL_POSITIONS];
    if (positions.data != NULL)
        placed->slots[LMC_MODEL_POSITIONS] =
            place_as_stored(plan, positions, config->context_length, config->hidden);
    placed->slots[LMC_MODEL_HEAD] =
        is_tied ? embedding : place_matrix(plan, head, config->n_logits, config->hidden);
    for (size_t i = 0; i < config->n_layers; i++) {
        for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++) {
            lmc_shape_t shape = lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot);
            if (shape.n_columns > 0)
                layers[i].slots[slot] =
                    place_matrix(plan, host->layers[i].slots[slot], shape.n_rows, shape.n_columns);
        }
    }
    placed->layers = layers;
    return place(plan, host->tables, host->tables_bytes);
}

/* TransformerModel. */

/* passage: memory of the device for the largest matrix, where the weights become codes. */
static int upload_weights(const host_weights_t *host, void *memory, void *passage,
                          lmc_transformer_weights_t *placed, lmc_transformer_layer_t *layers,
                          const void **tables) {
    upload_plan_t plan = {
        .base = memory, .passage = passage, .int8 = host->config.int8, .status = cudaSuccess};
    *tables = place_weights(&plan, host, placed, layers);
    return plan.status == cudaSuccess ? (int)cudaDeviceSynchronize() : plan.status;
}

static int model_fill(const module_state_t *state, cuda_model_object_t *self, host_weights_t *host) {
    lmc_transformer_model_t model;
    lmc_transformer_weights_t placed;
    memset(&placed, 0, sizeof placed);
    lmc_status_t status;
    Py_BEGIN_ALLOW_THREADS
    status = lmc_cuda_transformer_model_prepare(&host->config, &host->weights, host->tables,
                                                host->tables_bytes, &model);
    Py_END_ALLOW_THREADS
    if (status != LMC_OK) {
        PyErr_SetString(state->error, lmc_status_message(status));
        return -1;
    }
    self->layers = PyMem_RawCalloc(host->config.n_layers, sizeof *self->layers);
    if (self->layers == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    upload_plan_t count = {.int8 = host->config.int8};
    place_weights(&count, host, &placed, self->layers);
    self->n_bytes = count.used;
    void *passage = NULL;
    if (lmc_py_device_allocate(state, self->device, self->n_bytes, "the model's weights", &self->memory) < 0)
        return -1;
    if (count.passage_bytes > 0 &&
        lmc_py_device_allocate(state, self->device, count.passage_bytes,
                               "a matrix of the model on its way to 8-bit codes", &passage) < 0)
        return -1;
    int result;
    const void *tables;
    ON_DEVICE(state->error, self->device, result,
              upload_weights(host, self->memory, passage, &placed, self->layers, &tables));
    lmc_py_device_free(self->device, passage);
    if (result < 0) return -1;
    lmc_cuda_transformer_model_place(&model, &placed, tables, &self->placed);
    return 0;
}

static PyObject *make_model(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    module_state_t *state = PyType_GetModuleState(type);
    static char *names[] = {"device", "config", "tensors", "layers", NULL};
    PyObject *of_config, *of_model, *of_layers;
    int device;
    host_weights_t host;
    memset(&host, 0, sizeof host);
    if (state == NULL || !PyArg_ParseTupleAndKeywords(arguments, keywords, "iOOO", names, &device, &of_config,
                                                      &of_model, &of_layers))
        return NULL;
    if (lmc_py_config_parse(state->error, of_config, &host.config) < 0) return NULL;
    if (lmc_cuda_transformer_config_check(&host.config) != LMC_OK) {
        return PyErr_Format(
            state->error,
            "the numbers of the model do not fit together or are out of range; on a CUDA device heads "
            "have at most %d features, and one norm over all heads needs q, k and v apart",
            LMC_CUDA_HEAD_DIM_MAX);
    }
    cuda_model_object_t *self = (cuda_model_object_t *)lmc_py_new(type);
    if (self == NULL) return NULL;
    self->device = device;
    if (take_weights(state->error, &host, of_model, of_layers) < 0 || model_fill(state, self, &host) < 0)
        Py_CLEAR(self);
    host_weights_release(&host);
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
    cuda_model_object_t *self = (cuda_model_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    lmc_py_device_free(self->device, self->memory);
    PyMem_RawFree(self->layers);
    lmc_py_delete(object, type);
}

static PyObject *model_cache_bytes(PyObject *object, PyObject *arguments) {
    const lmc_transformer_config_t *config = &((cuda_model_object_t *)object)->placed.config;
    unsigned int n_layers, n_streams, n_tokens;
    if (!PyArg_ParseTuple(arguments, "III", &n_layers, &n_streams, &n_tokens)) return NULL;
    return PyLong_FromSize_t(lmc_cuda_transformer_cache_bytes(config, n_layers, n_streams, n_tokens));
}

static PyObject *model_work_bytes(PyObject *object, PyObject *argument) {
    unsigned long n_rows = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromSize_t(
        lmc_cuda_transformer_work_bytes(&((cuda_model_object_t *)object)->placed.config, (uint32_t)n_rows));
}

static PyObject *model_n_bytes(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(((cuda_model_object_t *)object)->n_bytes);
}

PyDoc_STRVAR(model_doc,
             "TransformerModel(device, config, tensors, layers)\n--\n\n"
             "A model whose weights are copied to the device; the rest as in _core.TransformerModel.");

static PyMethodDef model_methods[] = {
    {"cache_bytes", model_cache_bytes, METH_VARARGS,
     "cache_bytes($self, n_layers, n_streams, n_tokens, /)\n--\n\nMemory of keys and values."},
    {"work_bytes", model_work_bytes, METH_O,
     "work_bytes($self, n_rows, /)\n--\n\nMemory between the kernels of a pass of so many tokens."},
    {"session", lmc_py_cuda_model_session, METH_VARARGS,
     "session($self, n_layers, n_streams, n_tokens, n_rows, /)\n--\n\n"
     "Keys and values of n_layers layers (all, or 1 for passes), and room for calls of n_rows tokens."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef model_properties[] = {
    {"n_bytes", model_n_bytes, NULL, "Memory of the device that the weights take.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot model_slots[] = {
    {Py_tp_doc, (void *)model_doc}, {Py_tp_new, model_new},           {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, model_methods}, {Py_tp_getset, model_properties}, {0, NULL},
};
static PyType_Spec model_spec = {
    .name = "llmcomp._cuda.TransformerModel",
    .basicsize = sizeof(cuda_model_object_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = model_slots,
};

int lmc_py_add_cuda_transformer(PyObject *module) {
    module_state_t *state = PyModule_GetState(module);
    state->transformer_model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
    state->transformer_session_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(module, &lmc_py_cuda_session_spec, NULL);
    if (state->transformer_model_type == NULL || state->transformer_session_type == NULL) return -1;
    if (PyModule_AddType(module, state->transformer_model_type) < 0) return -1;
    return PyModule_AddType(module, state->transformer_session_type);
}

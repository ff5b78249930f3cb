/* The module llmcomp._cuda: launchers, device memory and DLPack capsules for llmcomp/coding/cuda.py, which
 * parses and checks what users give. Pointers and streams are Python integers here; every function makes its
 * device current and puts the caller's device back. Built only where nvcc is found; loads where there is
 * neither GPU nor driver. */
#include "python/cuda_objects.h"

#include <string.h>

#include "python/dlpack.h"

/* Buffer: device memory with an owner. */

typedef struct buffer_object {
    PyObject_HEAD
    void *data;
    Py_ssize_t n_bytes;
    int device;
} buffer_object_t;

/* Done when this returns: whatever stream is used next may not wait for the default one. */
static int clear(void *data, size_t n_bytes) {
    int status = cudaMemset(data, 0, n_bytes);
    return status == cudaSuccess ? (int)cudaStreamSynchronize(0) : status;
}

static PyObject *buffer_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"n_bytes", "device", NULL};
    Py_ssize_t n_bytes;
    int device, result;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "ni", names, &n_bytes, &device)) return NULL;
    module_state_t *state = PyType_GetModuleState(type);
    buffer_object_t *self = (buffer_object_t *)lmc_py_new(type);
    if (self == NULL || state == NULL) {
        Py_XDECREF(self);
        return NULL;
    }
    self->n_bytes = n_bytes;
    self->device = device;
    result = lmc_py_device_allocate(state, device, (size_t)n_bytes, "an array", &self->data);
    if (result == 0) ON_DEVICE(state->error, device, result, clear(self->data, (size_t)n_bytes));
    if (result < 0) Py_CLEAR(self);
    return (PyObject *)self;
}

static void buffer_dealloc(PyObject *object) {
    buffer_object_t *self = (buffer_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    lmc_py_device_free(self->device, self->data);
    lmc_py_delete(object, type);
}

static PyObject *buffer_pointer(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(((buffer_object_t *)object)->data);
}

static PyObject *buffer_n_bytes(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromSsize_t(((buffer_object_t *)object)->n_bytes);
}

static PyGetSetDef buffer_properties[] = {
    {"pointer", buffer_pointer, NULL, "Address on the device.", NULL},
    {"n_bytes", buffer_n_bytes, NULL, "Its size.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot buffer_slots[] = {
    {Py_tp_doc, "Buffer(n_bytes, device): zeros on the device, freed with this object."},
    {Py_tp_new, buffer_new},
    {Py_tp_dealloc, buffer_dealloc},
    {Py_tp_getset, buffer_properties},
    {0, NULL},
};
static PyType_Spec buffer_spec = {
    .name = "llmcomp._cuda.Buffer",
    .basicsize = sizeof(buffer_object_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = buffer_slots,
};

/* DLPack. */

static PyObject *tuple_of_int64(const int64_t *numbers, int32_t n) {
    PyObject *tuple = PyTuple_New(n);
    for (int32_t i = 0; tuple != NULL && i < n; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (number == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, number);
    }
    return tuple;
}

/* The capsule is used up; the array that gave it keeps the memory. */
static PyObject *dlpack_view(PyObject *module, PyObject *capsule) {
    (void)module;
    dl_managed_tensor_t *managed = PyCapsule_GetPointer(capsule, "dltensor");
    if (managed == NULL) return NULL;
    const dl_tensor_t *tensor = &managed->tensor;
    PyObject *shape = tuple_of_int64(tensor->shape, tensor->n_dims), *strides = Py_None, *view = NULL;
    if (tensor->strides != NULL)
        strides = tuple_of_int64(tensor->strides, tensor->n_dims);
    else
        Py_INCREF(strides);
    if (shape != NULL && strides != NULL && tensor->dtype.lanes == 1) {
        view = Py_BuildValue("(KiiiiOO)", (number_t)(uintptr_t)tensor->data + tensor->byte_offset,
                             (int)tensor->device.type, (int)tensor->device.id, (int)tensor->dtype.code,
                             (int)tensor->dtype.bits, shape, strides);
    } else if (shape != NULL && strides != NULL) {
        PyErr_SetString(PyExc_TypeError, "an array of vector elements");
    }
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    if (view == NULL) return NULL;
    PyCapsule_SetName(capsule, "used_dltensor");
    if (managed->deleter != NULL) managed->deleter(managed);
    return view;
}

typedef struct exported_tensor {
    dl_managed_tensor_t managed;
    int64_t shape[DL_DIMS_MAX];
} exported_tensor_t;

/* Whoever took the tensor may drop it from any thread. */
static void exported_delete(dl_managed_tensor_t *managed) {
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_XDECREF((PyObject *)managed->manager_context);
    PyMem_RawFree(managed);
    PyGILState_Release(gil);
}

static void exported_capsule_free(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return; /* used: its new owner deletes it */
    exported_delete(PyCapsule_GetPointer(capsule, "dltensor"));
}

static PyObject *dlpack_capsule(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    buffer_object_t *buffer;
    PyObject *shape;
    int code, bits;
    if (!PyArg_ParseTuple(arguments, "O!iiO!", state->buffer_type, &buffer, &code, &bits, &PyTuple_Type,
                          &shape))
        return NULL;
    if (PyTuple_GET_SIZE(shape) > DL_DIMS_MAX) {
        return PyErr_Format(state->error, "an array of %zd dimensions; expected at most %d",
                            PyTuple_GET_SIZE(shape), DL_DIMS_MAX);
    }
    exported_tensor_t *exported = PyMem_RawCalloc(1, sizeof *exported);
    if (exported == NULL) return PyErr_NoMemory();
    for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(shape); d++)
        exported->shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
    dl_tensor_t *tensor = &exported->managed.tensor;
    tensor->data = buffer->data;
    tensor->device.type = DL_CUDA;
    tensor->device.id = buffer->device;
    tensor->n_dims = (int32_t)PyTuple_GET_SIZE(shape);
    tensor->dtype.code = (uint8_t)code;
    tensor->dtype.bits = (uint8_t)bits;
    tensor->dtype.lanes = 1;
    tensor->shape = exported->shape;
    exported->managed.manager_context = buffer;
    exported->managed.deleter = exported_delete;
    PyObject *capsule =
        PyErr_Occurred() ? NULL : PyCapsule_New(&exported->managed, "dltensor", exported_capsule_free);
    if (capsule == NULL) {
        PyMem_RawFree(exported);
        return NULL;
    }
    Py_INCREF(buffer);
    return capsule;
}

/* Copies. */

static int copy_rows(void *target, size_t target_pitch, const void *source, size_t source_pitch,
                     size_t n_bytes, size_t n_rows, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (n_bytes == 0 || n_rows == 0) return cudaSuccess;
    /* A pitch may not reach 2^31 bytes, one row may. */
    if (n_rows == 1) return cudaMemcpyAsync(target, source, n_bytes, kind, stream);
    return cudaMemcpy2DAsync(target, target_pitch, source, source_pitch, n_bytes, n_rows, kind, stream);
}

static PyObject *upload(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, target;
    Py_buffer source;
    if (!PyArg_ParseTuple(arguments, "iKKy*", &device, &stream, &target, &source)) return NULL;
    ON_DEVICE(state->error, device, result,
              lmc_py_upload(device, POINTER(void *, target), source.buf, (size_t)source.len,
                            POINTER(cudaStream_t, stream)));
    PyBuffer_Release(&source);
    return none_or_null(result);
}

static int copy_rows_to_host(void *target, const void *source, size_t source_pitch, size_t n_bytes,
                             size_t n_rows, cudaStream_t stream) {
    int status =
        copy_rows(target, n_bytes, source, source_pitch, n_bytes, n_rows, cudaMemcpyDeviceToHost, stream);
    return status == cudaSuccess ? (int)cudaStreamSynchronize(stream) : status;
}

static PyObject *download_rows(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, source;
    Py_ssize_t pitch, n_bytes, n_rows;
    if (!PyArg_ParseTuple(arguments, "iKKnnn", &device, &stream, &source, &pitch, &n_bytes, &n_rows))
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, n_bytes * n_rows);
    if (bytes == NULL) return NULL;
    char *target = PyBytes_AS_STRING(bytes);
    ON_DEVICE(state->error, device, result,
              copy_rows_to_host(target, POINTER(const void *, source), (size_t)pitch, (size_t)n_bytes,
                                (size_t)n_rows, POINTER(cudaStream_t, stream)));
    if (result < 0) Py_CLEAR(bytes);
    return bytes;
}

static PyObject *download(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, source;
    Py_buffer target;
    if (!PyArg_ParseTuple(arguments, "iKKw*", &device, &stream, &source, &target)) return NULL;
    size_t n_bytes = (size_t)target.len;
    ON_DEVICE(state->error, device, result,
              copy_rows_to_host(target.buf, POINTER(const void *, source), n_bytes, n_bytes, 1,
                                POINTER(cudaStream_t, stream)));
    PyBuffer_Release(&target);
    return none_or_null(result);
}

static PyObject *memory(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    size_t n_free = 0, n_all = 0;
    if (!PyArg_ParseTuple(arguments, "i", &device)) return NULL;
    ON_DEVICE(state->error, device, result, cudaMemGetInfo(&n_free, &n_all));
    return result < 0 ? NULL : Py_BuildValue("(KK)", (number_t)n_free, (number_t)n_all);
}

static PyObject *copy_rows_on_device(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, target, source;
    Py_ssize_t target_pitch, source_pitch, n_bytes, n_rows;
    if (!PyArg_ParseTuple(arguments, "iKKnKnnn", &device, &stream, &target, &target_pitch, &source,
                          &source_pitch, &n_bytes, &n_rows)) {
        return NULL;
    }
    ON_DEVICE(state->error, device, result,
              copy_rows(POINTER(void *, target), (size_t)target_pitch, POINTER(const void *, source),
                        (size_t)source_pitch, (size_t)n_bytes, (size_t)n_rows, cudaMemcpyDeviceToDevice,
                        POINTER(cudaStream_t, stream)));
    return none_or_null(result);
}

/* Errors found on the device. */

static PyObject *error_clear(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, error;
    if (!PyArg_ParseTuple(arguments, "iKK", &device, &stream, &error)) return NULL;
    ON_DEVICE(state->error, device, result,
              lmc_cuda_error_clear(POINTER(uint64_t *, error), POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

/* Waits for the stream; None, or (row, whether its token is the fault, the phrase of the status). */
static PyObject *error_read(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, error;
    uint64_t found;
    if (!PyArg_ParseTuple(arguments, "iKK", &device, &stream, &error)) return NULL;
    ON_DEVICE(state->error, device, result,
              copy_rows_to_host(&found, POINTER(const void *, error), sizeof found, sizeof found, 1,
                                POINTER(cudaStream_t, stream)));
    if (result < 0) return NULL;
    if (found == LMC_CUDA_NO_ERROR) Py_RETURN_NONE;
    lmc_status_t status = (lmc_status_t)(found & 0xFF);
    return Py_BuildValue("(KNs)", (number_t)(found >> 8), PyBool_FromLong(status == LMC_ERROR_TOKEN),
                         lmc_status_message(status));
}

static PyObject *is_capturing(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream;
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (!PyArg_ParseTuple(arguments, "iK", &device, &stream)) return NULL;
    ON_DEVICE(state->error, device, result, cudaStreamIsCapturing(POINTER(cudaStream_t, stream), &capture));
    return result < 0 ? NULL : PyBool_FromLong(capture != cudaStreamCaptureStatusNone);
}

/* The number of the device that memory belongs to; negative for memory that is none's. */
static PyObject *device_of(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    struct cudaPointerAttributes attributes;
    number_t pointer;
    if (!PyArg_ParseTuple(arguments, "K", &pointer)) return NULL;
    int status = cudaPointerGetAttributes(&attributes, POINTER(const void *, pointer));
    if (status != cudaSuccess) return lmc_py_raise_cuda(state->error, status);
    return PyLong_FromLong(attributes.type == cudaMemoryTypeUnregistered ? -1 : attributes.device);
}

/* What this machine has. */

static PyObject *device_description(int device) {
    struct cudaDeviceProp properties;
    int status = cudaGetDeviceProperties(&properties, device);
    if (status != cudaSuccess) return PyUnicode_FromString(cudaGetErrorString((cudaError_t)status));
    return Py_BuildValue("{s:s,s:(ii),s:i,s:K}", "name", properties.name, "compute_capability",
                         properties.major, properties.minor, "multiprocessors",
                         properties.multiProcessorCount, "memory_bytes", (number_t)properties.totalGlobalMem);
}

/* (driver version or 0, list of devices, what stands in the way or None) */
static PyObject *machine(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    int driver = 0, count = 0;
    cudaDriverGetVersion(&driver);
    int status = cudaGetDeviceCount(&count);
    PyObject *devices = PyList_New(0);
    for (int device = 0; devices != NULL && status == cudaSuccess && device < count; device++) {
        PyObject *description = device_description(device);
        if (description == NULL || PyList_Append(devices, description) < 0) Py_CLEAR(devices);
        Py_XDECREF(description);
    }
    if (devices == NULL) return NULL;
    return Py_BuildValue("(iNz)", driver, devices,
                         status == cudaSuccess ? NULL : cudaGetErrorString((cudaError_t)status));
}

/* The module. */

#define FUNCTION(NAME, DOC) {#NAME, NAME, METH_VARARGS, DOC}
static PyMethodDef functions[] = {
    {"machine", machine, METH_NOARGS, "(driver version, devices, what stands in the way or None)."},
    {"dlpack_view", dlpack_view, METH_O,
     "(pointer, device type, device, type code, bits, shape, strides in elements or None) of a capsule, used "
     "up."},
    FUNCTION(dlpack_capsule, "dlpack_capsule(buffer, code, bits, shape): a capsule that shares the buffer."),
    FUNCTION(upload, "upload(device, stream, pointer, bytes)."),
    FUNCTION(download_rows,
             "download_rows(device, stream, pointer, pitch, n_bytes, n_rows) -> bytes; waits."),
    FUNCTION(download, "download(device, stream, pointer, target): into a writable buffer; waits."),
    FUNCTION(memory, "memory(device) -> (free, all) bytes."),
    FUNCTION(
        copy_rows_on_device,
        "copy_rows_on_device(device, stream, target, target_pitch, source, source_pitch, n_bytes, n_rows)."),
    FUNCTION(error_clear, "error_clear(device, stream, error)."),
    FUNCTION(error_read, "error_read(device, stream, error): None or (row, is_token, phrase); waits."),
    FUNCTION(is_capturing, "is_capturing(device, stream)."),
    FUNCTION(device_of, "device_of(pointer): negative where no device has it."),
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module) {
    module_state_t *state = PyModule_GetState(module);
    PyObject *errors = PyImport_ImportModule("llmcomp.errors");
    if (errors == NULL) return -1;
    state->error = PyObject_GetAttrString(errors, "Error");
    Py_DECREF(errors);
    if (state->error == NULL) return -1;
    state->memory_error = PyErr_NewException("llmcomp._cuda.OutOfMemoryError", state->error, NULL);
    state->buffer_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &buffer_spec, NULL);
    if (state->memory_error == NULL || state->buffer_type == NULL) return -1;
    if (PyModule_AddObjectRef(module, "OutOfMemoryError", state->memory_error) < 0) return -1;
    if (PyModule_AddType(module, state->buffer_type) < 0) return -1;
    if (PyModule_AddIntConstant(module, "TOOLKIT_VERSION", CUDART_VERSION) < 0) return -1;
    if (PyModule_AddStringConstant(module, "TARGETS", LMC_CUDA_TARGETS) < 0) return -1;
    return lmc_py_add_cuda_coding(module) < 0 ? -1 : lmc_py_add_cuda_transformer(module);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state_t *state = PyModule_GetState(module);
    Py_VISIT(state->error);
    Py_VISIT(state->memory_error);
    Py_VISIT(state->buffer_type);
    Py_VISIT(state->transformer_model_type);
    Py_VISIT(state->transformer_session_type);
    return 0;
}

static int module_clear(PyObject *module) {
    module_state_t *state = PyModule_GetState(module);
    Py_CLEAR(state->error);
    Py_CLEAR(state->memory_error);
    Py_CLEAR(state->buffer_type);
    Py_CLEAR(state->transformer_model_type);
    Py_CLEAR(state->transformer_session_type);
    return 0;
}

static void module_free(void *module) {
    module_clear((PyObject *)module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030D0000 && !defined(Py_LIMITED_API)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "llmcomp._cuda",
    .m_doc = "The CUDA part of llmcomp. Use it through the package's public names.",
    .m_size = sizeof(module_state_t),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__cuda(void) {
    return PyModuleDef_Init(&module_definition);
}

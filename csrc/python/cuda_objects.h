/* What the files of the module llmcomp._cuda share: its state, the current device, memory that is asked for
 * before it is taken, and pointers as numbers. */
#ifndef LLMCOMP_PYTHON_CUDA_OBJECTS_H
#define LLMCOMP_PYTHON_CUDA_OBJECTS_H

#include "python/limited_api.h"

#include <cuda_runtime_api.h>

#include "cuda/coding/coding.h"

typedef struct module_state {
    PyObject *error;        /* llmcomp.errors.Error */
    PyObject *memory_error; /* OutOfMemoryError, one of them */
    PyTypeObject *buffer_type;
    PyTypeObject *transformer_model_type;
    PyTypeObject *transformer_session_type;
} module_state_t;

PyObject *lmc_py_raise_cuda(PyObject *error, int status);

/* The current device. */

static inline int device_enter(int device, int *saved) {
    int status = cudaGetDevice(saved);
    if (status == cudaSuccess && *saved != device) status = cudaSetDevice(device);
    return status;
}

static inline void device_leave(int device, int saved) {
    if (saved != device) cudaSetDevice(saved);
}

/* Evaluates CALL, an int status, on the device and without the GIL; -1 with an exception set on failure. */
#define ON_DEVICE(ERROR, DEVICE, RESULT, CALL)                                                               \
    do {                                                                                                     \
        int on_device_saved, on_device_status;                                                               \
        Py_BEGIN_ALLOW_THREADS                                                                               \
        on_device_status = device_enter((DEVICE), &on_device_saved);                                         \
        if (on_device_status == cudaSuccess) {                                                               \
            on_device_status = (CALL);                                                                       \
            device_leave((DEVICE), on_device_saved);                                                         \
        }                                                                                                    \
        Py_END_ALLOW_THREADS;                                                                                \
        (RESULT) = on_device_status == cudaSuccess ? 0 : -1;                                                 \
        if (on_device_status != cudaSuccess) lmc_py_raise_cuda((ERROR), on_device_status);                   \
    } while (0)

#define POINTER(TYPE, NUMBER) ((TYPE)(uintptr_t)(NUMBER))
typedef unsigned long long number_t;

static inline PyObject *none_or_null(int result) {
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

/* Memory of the device, its contents unknown. -1 with an exception: OutOfMemoryError says how much `what`
 * needs and how much is free. */
int lmc_py_device_allocate(const module_state_t *state, int device, size_t n_bytes, const char *what,
                           void **memory);
void lmc_py_device_free(int device, void *memory);

/* A copy from memory of the host, a cudaError_t as an int: when this returns it has been read, and the caller
 * may free it. */
int lmc_py_upload(int device, void *target, const void *source, size_t n_bytes, cudaStream_t stream);

/* Functions and types of the other files; each adds its own to the module, -1 with an exception on failure.
 */
int lmc_py_add_cuda_coding(PyObject *module);
int lmc_py_add_cuda_transformer(PyObject *module);

#endif

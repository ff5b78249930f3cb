/* Device memory as the files of llmcomp._cuda use it: taken where it fits, given back, filled from the host.
 */
#include "python/cuda_objects.h"

PyObject *lmc_py_raise_cuda(PyObject *error, int status) {
    return PyErr_Format(error, "CUDA: %s", cudaGetErrorString((cudaError_t)status));
}

/* Not taken where it would not fit: then free_bytes < n_bytes. */
static int ask_and_allocate(size_t n_bytes, size_t *free_bytes, size_t *all_bytes, void **memory) {
    int status = cudaMemGetInfo(free_bytes, all_bytes);
    if (status != cudaSuccess || n_bytes > *free_bytes) return status;
    status = cudaMalloc(memory, n_bytes);
    if (status != cudaErrorMemoryAllocation) return status;
    cudaGetLastError(); /* free, but in pieces; the error must not meet the next launch */
    return cudaSuccess;
}

int lmc_py_device_allocate(const module_state_t *state, int device, size_t n_bytes, const char *what,
                           void **memory) {
    size_t free_bytes = 0, all_bytes = 0;
    int result;
    *memory = NULL;
    ON_DEVICE(state->error, device, result,
              ask_and_allocate(n_bytes > 0 ? n_bytes : 1, &free_bytes, &all_bytes, memory));
    if (result < 0) return -1;
    if (*memory != NULL) return 0;
    PyErr_Format(state->memory_error,
                 "%s: %zu bytes of memory are needed on CUDA device %d; %zu of its %zu are free", what,
                 n_bytes, device, free_bytes, all_bytes);
    return -1;
}

void lmc_py_device_free(int device, void *memory) {
    int saved;
    if (memory == NULL || device_enter(device, &saved) != cudaSuccess) return;
    cudaFree(memory);
    device_leave(device, saved);
}

/* CUDA stages what is not pinned before a call returns, but for devices that read the host's memory by
 * themselves; what is pinned is read later in any case. */
int lmc_py_upload(int device, void *target, const void *source, size_t n_bytes, cudaStream_t stream) {
    struct cudaPointerAttributes attributes;
    int reads_host = 0;
    if (n_bytes == 0) return cudaSuccess;
    int status = cudaMemcpyAsync(target, source, n_bytes, cudaMemcpyHostToDevice, stream);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&reads_host, cudaDevAttrPageableMemoryAccess, device);
    if (status == cudaSuccess && !reads_host) {
        status = cudaPointerGetAttributes(&attributes, source);
        reads_host = status == cudaSuccess && attributes.type != cudaMemoryTypeUnregistered;
    }
    return status == cudaSuccess && reads_host ? (int)cudaStreamSynchronize(stream) : status;
}

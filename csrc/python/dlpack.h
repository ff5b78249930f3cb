/* The part of DLPack's ABI (github.com/dmlc/dlpack, version 0) that the bindings need. */
#ifndef LLMCOMP_PYTHON_DLPACK_H
#define LLMCOMP_PYTHON_DLPACK_H

#include <stdint.h>

typedef struct dl_tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t n_dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL: C-contiguous */
    uint64_t byte_offset;
} dl_tensor_t;

typedef struct dl_managed_tensor {
    dl_tensor_t tensor;
    void *manager_context;
    void (*deleter)(struct dl_managed_tensor *self);
} dl_managed_tensor_t;

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3 };
enum { DL_FLOAT = 2, DL_BFLOAT = 4 };
#define DL_DIMS_MAX 16

#endif

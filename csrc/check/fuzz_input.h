/* How the fuzz targets read their bytes: numbers from the front, zeros when nothing is left. */
#ifndef LLMCOMP_CHECK_FUZZ_INPUT_H
#define LLMCOMP_CHECK_FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FUZZ_ASSERT(condition)                                                                               \
    do {                                                                                                     \
        if (!(condition)) abort();                                                                           \
    } while (0)

typedef struct fuzz_input {
    const uint8_t *bytes;
    size_t n_bytes;
} fuzz_input_t;

static inline uint64_t fuzz_take(fuzz_input_t *input, size_t n_bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        value = value << 8 | (input->n_bytes > 0 ? *input->bytes : 0);
        if (input->n_bytes > 0) input->bytes++, input->n_bytes--;
    }
    return value;
}

static inline void fuzz_take_bytes(fuzz_input_t *input, void *target, size_t n_bytes) {
    size_t n_left = input->n_bytes < n_bytes ? input->n_bytes : n_bytes;
    memset(target, 0, n_bytes);
    memcpy(target, input->bytes, n_left);
    input->bytes += n_left, input->n_bytes -= n_left;
}

#endif

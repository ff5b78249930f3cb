/* How kernels tell of errors: one 64-bit word, the row above the status, of which the lowest stays. */
#ifndef LLMCOMP_CUDA_CODING_REPORT_H
#define LLMCOMP_CUDA_CODING_REPORT_H

#include <stdint.h>

#include "llmcomp/status.h"

static inline __device__ void report_error(uint64_t *error, uint32_t row, lmc_status_t status) {
    atomicMin((unsigned long long *)error, (unsigned long long)row << 8 | (unsigned long long)status);
}

#endif

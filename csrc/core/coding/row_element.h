/* Elements of a row of logits, widened exactly to binary32. A row need not be aligned. */
#ifndef LLMCOMP_CORE_CODING_ROW_ELEMENT_H
#define LLMCOMP_CORE_CODING_ROW_ELEMENT_H

#include <math.h>
#include <stddef.h>

#include "core/base/ieee.h"
#include "llmcomp/intervals.h"

static inline size_t lmc_dtype_bytes(lmc_dtype_t dtype) {
    return dtype == LMC_FLOAT32 ? 4 : 2;
}

static inline float lmc_row_element(const void *row, size_t i, lmc_dtype_t dtype) {
    const unsigned char *bytes = (const unsigned char *)row;
    if (dtype == LMC_FLOAT32) {
        float logit;
        memcpy(&logit, bytes + 4 * i, sizeof logit);
        return logit;
    }
    uint16_t bits;
    memcpy(&bits, bytes + 2 * i, sizeof bits);
    return dtype == LMC_FLOAT16 ? lmc_widen_f16(bits) : lmc_widen_bf16(bits);
}

#endif

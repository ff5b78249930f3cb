/* The row kernels for AVX2 + FMA + F16C: row_lanes.h over vec_avx2.h, nothing of its own. */
#if defined(__x86_64__)
#include "core/base/vec_avx2.h"
#include "core/coding/row_lanes.h"

const lmc_row_kernels_t lmc_row_kernels_avx2[LMC_DTYPE_COUNT] = LMC_ROW_KERNEL_TABLE;
#endif

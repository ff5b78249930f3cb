/* The row kernels for AArch64 Advanced SIMD: row_lanes.h over vec_neon.h, nothing of its own. */
#if defined(__aarch64__)
#include "core/base/vec_neon.h"
#include "core/coding/row_lanes.h"

const lmc_row_kernels_t lmc_row_kernels_neon[LMC_DTYPE_COUNT] = LMC_ROW_KERNEL_TABLE;
#endif

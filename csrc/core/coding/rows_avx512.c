/* The row kernels for AVX-512 F + BW + DQ + VL: row_lanes.h over vec_avx512.h, nothing of its own. */
#if defined(__x86_64__)
#include "core/base/vec_avx512.h"
#include "core/coding/row_lanes.h"

const lmc_row_kernels_t lmc_row_kernels_avx512[LMC_DTYPE_COUNT] = LMC_ROW_KERNEL_TABLE;
#endif

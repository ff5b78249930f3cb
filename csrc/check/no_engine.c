/* For programs that check the coder alone: the tables that csrc/dispatch names, without the engine's kernels.
 */
#include "../core/kernels.h"

const lmc_neox_kernels_t lmc_neox_kernels_serial;
#if defined(__x86_64__)
const lmc_neox_kernels_t lmc_neox_kernels_avx2, lmc_neox_kernels_avx512;
#elif defined(__aarch64__)
const lmc_neox_kernels_t lmc_neox_kernels_neon;
#endif

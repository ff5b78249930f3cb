/* For programs that check the coder alone: the tables that csrc/dispatch names, without the engine's kernels.
 */
#include "core/coding/row_kernels.h"
#include "core/int8/kernels.h"
#include "core/transformer/kernels.h"

const lmc_transformer_kernels_t lmc_transformer_kernels_serial;
const lmc_int8_kernels_t lmc_int8_kernels_serial;
#if defined(__x86_64__)
const lmc_transformer_kernels_t lmc_transformer_kernels_avx2, lmc_transformer_kernels_avx512;
const lmc_int8_kernels_t lmc_int8_kernels_avx2, lmc_int8_kernels_avx512, lmc_int8_kernels_avx512vnni;
#elif defined(__aarch64__)
const lmc_transformer_kernels_t lmc_transformer_kernels_neon;
const lmc_int8_kernels_t lmc_int8_kernels_neon, lmc_int8_kernels_neondot;
#endif

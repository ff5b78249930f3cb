/* Sums and maxima over the 32 lanes of a warp, which all call. Devices before sm_80 have no instruction for
 * them. */
#ifndef LLMCOMP_CUDA_CODING_WARP_H
#define LLMCOMP_CUDA_CODING_WARP_H

#include <cuda_runtime.h>
#include <stdint.h>

static __device__ __forceinline__ uint32_t reduce_add(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    for (unsigned distance = 16; distance > 0; distance /= 2)
        x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    return x;
#else
    return __reduce_add_sync(0xFFFFFFFFu, x);
#endif
}

static __device__ __forceinline__ int32_t reduce_max(int32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    for (unsigned distance = 16; distance > 0; distance /= 2)
        x = max(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
    return x;
#else
    return __reduce_max_sync(0xFFFFFFFFu, x);
#endif
}

#endif

/* A cluster of blocks, or the block alone where there are none (before sm_90): its barrier, and stores to the
 * shared memory of its blocks. The only PTX of the project that touches more than registers;
 * csrc/check/cuda_emulated.cpp has the same functions for the host. */
#ifndef LLMCOMP_CUDA_CODING_CLUSTER_H
#define LLMCOMP_CUDA_CODING_CLUSTER_H

#include <stdint.h>

/* begin and begun around the first loads: no block may write to the memory of one that has not started. */
__device__ __forceinline__ void cluster_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_begun() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_sync() {
    __syncwarp(); /* the aligned barrier wants the lanes together */
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
#else
    __syncthreads();
#endif
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t address_in_block(const void *shared, uint32_t rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"((uint32_t)__cvta_generic_to_shared(shared)), "r"(rank));
    return address;
}
#endif

/* Stores to the same shared variable of block `rank` of the cluster. */
__device__ __forceinline__ void store_in_block(int32_t *shared, uint32_t rank, int32_t value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(address_in_block(shared, rank)), "r"(value)
                 : "memory");
#else
    *shared = value;
#endif
}

__device__ __forceinline__ void store_in_block(uint64_t *shared, uint32_t rank, uint64_t value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address_in_block(shared, rank)), "l"(value)
                 : "memory");
#else
    *shared = value;
#endif
}

#endif

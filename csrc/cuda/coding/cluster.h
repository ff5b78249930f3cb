/* A cluster of blocks, or the block alone where there are none (before sm_90): what its warps store into the
 * shared memory of its blocks, and how a block knows that all of it has come. The only PTX of the project
 * that touches memory besides int8_mma.h; csrc/check/emulated has the same functions for the host.
 *
 * An exchange counts bytes, not threads: a store completes them at the barrier of the block that it goes to
 * (st.async, mbarrier), so that no warp waits for memory to be flushed, nor does one that reads nothing wait
 * at all. A block may end when every byte meant for it has come; one that still sends holds no other up. */
#ifndef LLMCOMP_CUDA_CODING_CLUSTER_H
#define LLMCOMP_CUDA_CODING_CLUSTER_H

#include <stdint.h>

/* In shared memory; for one exchange. */
typedef uint64_t exchange_t;

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t shared_address(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}
#endif

/* By one thread of the block before cluster_begin: so many bytes will come. */
__device__ __forceinline__ void exchange_expect(exchange_t *exchange, uint32_t n_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(exchange)) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(exchange)),
                 "r"(n_bytes)
                 : "memory");
#else
    *exchange = n_bytes; /* not read again: exchange_wait is a plain barrier here */
#endif
}

/* begin and begun around the first loads: no block may write to the memory of one that has not started. */
__device__ __forceinline__ void cluster_begin() {
    __syncwarp(); /* the aligned barrier wants the lanes together */
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\n\tbarrier.cluster.arrive.relaxed.aligned;" ::
                     : "memory");
#endif
}

__device__ __forceinline__ void cluster_begun() {
    __syncwarp();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t address_in_block(const void *shared, uint32_t rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(shared)), "r"(rank));
    return address;
}
#endif

/* Stores to the same shared variable of block `rank` of the cluster, as part of an exchange. */
__device__ __forceinline__ void store_in_block(int32_t *shared, uint32_t rank, int32_t value,
                                               exchange_t *exchange) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(
                     address_in_block(shared, rank)),
                 "r"(value), "r"(address_in_block(exchange, rank))
                 : "memory");
#else
    *shared = value;
#endif
}

__device__ __forceinline__ void store_in_block(uint64_t *shared, uint32_t rank, uint64_t value,
                                               exchange_t *exchange) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(
                     address_in_block(shared, rank)),
                 "l"(value), "r"(address_in_block(exchange, rank))
                 : "memory");
#else
    *shared = value;
#endif
}

/* Until all bytes have come to this block; by all of its threads, of which those that read nothing need not
 * wait. */
__device__ __forceinline__ void exchange_wait(exchange_t *exchange, bool reads) {
#if __CUDA_ARCH__ >= 900
    if (!reads) return;
    asm volatile("{\n\t"
                 ".reg .pred has_come;\n\t"
                 "wait:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 has_come, [%0], 0;\n\t"
                 "@!has_come bra wait;\n\t"
                 "}" ::"r"(shared_address(exchange))
                 : "memory");
#else
    (void)reads;
    __syncthreads();
#endif
}

#endif

/* The instruction that multiplies 8-bit codes, mma.sync of the PTX manual, and ldmatrix, which brings its
 * operands from shared memory. Devices before sm_80 have tiles of 8 x 8 over 16 values of k, sums and
 * operands of which are parts of the larger ones; before sm_75 they have neither. csrc/check/emulated has the
 * same functions for the host. */
#ifndef LLMCOMP_CUDA_TRANSFORMER_INT8_MMA_H
#define LLMCOMP_CUDA_TRANSFORMER_INT8_MMA_H

#include <stdint.h>

/* sums += rows * columns, a tile of 16 x 8 over 32 values of k, by all lanes of a warp together. With
 * g = lane / 4 and t = lane % 4, a word holds 4 values of k from 4 t on:
 * rows:    row g and row g + 8 for k < 16, then both for k >= 16
 * columns: column g for k < 16, then for k >= 16
 * sums:    row g, columns 2 t and 2 t + 1, then row g + 8 */
__device__ __forceinline__ void mma_int8(int32_t (&sums)[4], const uint32_t (&rows)[4],
                                         const uint32_t (&columns)[2]) {
#if __CUDA_ARCH__ < 800
#pragma unroll
    for (unsigned i = 0; i < 4; i++)
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+r"(sums[i % 2 * 2]), "+r"(sums[i % 2 * 2 + 1])
                     : "r"(rows[i]), "r"(columns[i / 2]));
#else
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
#endif
}

/* words[i] of lane l is word l % 4 of row l / 4 of matrix i, a matrix being 8 rows of 16 bytes of shared
 * memory, each aligned to 16 bytes; row: lane l names row l % 8 of matrix l / 8. By all lanes of a warp. */
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

#endif

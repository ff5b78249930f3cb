/* Sizes of memory: rounding up, and cutting a caller's block into aligned pieces. C and C++. */
#ifndef LLMCOMP_CORE_BASE_SIZE_H
#define LLMCOMP_CORE_BASE_SIZE_H

#include <stddef.h>
#include <stdint.h>

/* A line of any processor's cache, and of any vector. */
#define LMC_HOST_ALIGNMENT ((size_t)64)
/* What cudaMalloc gives, so that every piece of a block is aligned as an allocation of its own. */
#define LMC_DEVICE_ALIGNMENT ((size_t)256)

static inline size_t lmc_round_up(size_t n, size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* The first address at or behind memory that is a multiple of alignment. */
static inline char *lmc_align(void *memory, size_t alignment) {
    uintptr_t address = (uintptr_t)memory;
    return (char *)memory + (lmc_round_up(address, alignment) - address);
}

/* Cuts pieces from an aligned block, one behind the other; with a NULL base it only adds up what they take.
 */
typedef struct lmc_arena {
    char *base;
    size_t used_bytes;
    size_t alignment;
} lmc_arena_t;

static inline void *lmc_arena_cut(lmc_arena_t *arena, size_t n, size_t element_bytes) {
    char *piece = arena->base == NULL ? NULL : arena->base + arena->used_bytes;
    arena->used_bytes += lmc_round_up(n * element_bytes, arena->alignment);
    return piece;
}

static inline float *lmc_arena_floats(lmc_arena_t *arena, size_t n) {
    return (float *)lmc_arena_cut(arena, n, sizeof(float));
}

#endif

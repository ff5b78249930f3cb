/* What the check programs share: counting failures, random numbers that are the same everywhere, the list of
 * backends, and the golden file. Only programs of csrc/check include this. */
#ifndef LLMCOMP_CHECK_CHECK_H
#define LLMCOMP_CHECK_CHECK_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/coding/row_kernels.h"
#include "core/int8/kernels.h"
#include "core/transformer/kernels.h"
#include "core/coding/row_element.h"

extern _Atomic long check_failures;

#define CHECK(condition, ...)                                                                                \
    do {                                                                                                     \
        if (!(condition) && check_failures++ < 20) {                                                         \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                  \
            fprintf(stderr, __VA_ARGS__);                                                                    \
            fputc('\n', stderr);                                                                             \
        }                                                                                                    \
    } while (0)

/* SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014). */
static inline uint64_t check_random(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* FNV-1a over the bytes of a number, least significant first; the hash of none is CHECK_HASH_EMPTY. */
#define CHECK_HASH_EMPTY 0xCBF29CE484222325u
static inline uint64_t check_hash(uint64_t hash, uint64_t bits, int n_bytes) {
    for (int byte = 0; byte < n_bytes; byte++)
        hash = (hash ^ (bits >> 8 * byte & 0xFF)) * 0x100000001B3u;
    return hash;
}

static inline void *check_malloc(size_t n_bytes) {
    void *memory = malloc(n_bytes > 0 ? n_bytes : 1);
    if (memory == NULL) {
        fprintf(stderr, "out of memory: %zu bytes\n", n_bytes);
        exit(2);
    }
    return memory;
}

/* Every usable backend, and the emulated AVX-512 one where that is built; NULL past the end. */
const lmc_backend_t *check_backend(size_t index);

/* One case of tests/golden/coding.bin; tests/support/golden_coding.py has the layout. All memory is the
 * case's. */
typedef struct golden_case {
    lmc_dtype_t dtype;
    uint32_t kind, vocab_size, n_rows;
    uint64_t seed, logits_hash;
    int64_t *tokens;
    uint64_t *start, *freq, *total;
    uint8_t *payload;
    uint32_t payload_bytes;
    void *logits; /* made by the generator */
} golden_case_t;

/* Exits with a message if the file cannot be read. */
golden_case_t *golden_read(const char *path, size_t *n_cases);
void golden_free(golden_case_t *cases, size_t n_cases);

#endif

/* Reads the golden file of the coder and makes its logits, as tests/support/golden_coding.py does, byte order
 * by hand. */
#include "check.h"

#include <string.h>

enum { NORMAL, PEAKED, FLAT, TIED, STEEP, BITS, MASKED, OFFSET };

static uint64_t read_integer(FILE *file, int n_bytes) {
    uint64_t value = 0;
    for (int i = 0; i < n_bytes; i++) {
        int byte = fgetc(file);
        if (byte == EOF) {
            fprintf(stderr, "the golden file ends too early\n");
            exit(2);
        }
        value |= (uint64_t)byte << (8 * i);
    }
    return value;
}

/* The generator of logits. */

static uint16_t half_of_float(float value) { /* exact for the values of the generator */
    uint32_t bits = lmc_bits_of(value);
    uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude == 0) return (uint16_t)sign;
    if (magnitude >= 0x7F800000u) return (uint16_t)(sign | 0x7C00u);
    return (uint16_t)(sign | (magnitude - (112u << 23)) >> 13);
}

static int64_t floor_shift(int64_t value, int shift) {
    return (value - (value & ((1 << shift) - 1))) / (1 << shift);
}

/* In units of 2^-14 (float32) or 2^-4; INT64_MIN for -inf. */
static int64_t logit_level(const golden_case_t *c, size_t row, size_t column, uint64_t r) {
    int64_t field0 = (int64_t)(r & 0xFFFF), bell = -131070;
    int is_short = c->dtype != LMC_FLOAT32;
    int64_t unit = is_short ? 16 : 16384;
    for (int i = 0; i < 4; i++)
        bell += (int64_t)(r >> 16 * i & 0xFFFF);
    if (is_short) bell = floor_shift(bell, 10);
    switch (c->kind) {
    case PEAKED:
        return column == c->vocab_size / 2 ? 12 * unit : floor_shift(bell, 2);
    case FLAT:
        return -7 * unit - unit / 4;
    case TIED:
        return -(field0 & 3) * unit;
    case STEEP:
        return is_short ? -(field0 & 127) * (unit / 2) : -(field0 * 16);
    case MASKED:
        return (field0 & 7) != 0 && column + 1 < c->vocab_size ? INT64_MIN : bell;
    case OFFSET:
        return floor_shift(bell, 6) * 64 + (row % 2 ? -8190 : 8190) * unit;
    default:
        return bell;
    }
}

static uint32_t logit_bits(const golden_case_t *c, size_t row, size_t column, uint64_t r) {
    static const uint32_t exponents[] = {0x7F800000u, 0x7C00u, 0x7F80u};
    if (c->kind == BITS) {
        uint32_t bits = (uint32_t)r & (c->dtype == LMC_FLOAT32 ? 0xFFFFFFFFu : 0xFFFFu);
        return (bits & exponents[c->dtype]) == exponents[c->dtype] ? 0 : bits;
    }
    int64_t level = logit_level(c, row, column, r);
    float value =
        level == INT64_MIN ? -INFINITY : (float)level * (c->dtype == LMC_FLOAT32 ? 0x1p-14f : 0x1p-4f);
    if (c->dtype == LMC_FLOAT16) return half_of_float(value);
    return c->dtype == LMC_FLOAT32 ? lmc_bits_of(value) : lmc_bits_of(value) >> 16;
}

static void make_logits(golden_case_t *c) {
    size_t n_logits = (size_t)c->vocab_size * c->n_rows, element_bytes = lmc_dtype_bytes(c->dtype);
    uint64_t state = c->seed, hash = 0;
    c->logits = check_malloc(n_logits * element_bytes);
    for (size_t i = 0; i < n_logits; i++) {
        uint32_t bits = logit_bits(c, i / c->vocab_size, i % c->vocab_size, check_random(&state));
        uint16_t short_bits = (uint16_t)bits;
        hash += (uint64_t)(i + 1) * bits;
        if (c->dtype == LMC_FLOAT32)
            memcpy((char *)c->logits + 4 * i, &bits, 4);
        else
            memcpy((char *)c->logits + 2 * i, &short_bits, 2);
    }
    CHECK(hash == c->logits_hash, "the generator does not make the logits of seed %llu",
          (unsigned long long)c->seed);
}

/* The file. */

static void read_case(FILE *file, golden_case_t *c) {
    c->dtype = (lmc_dtype_t)read_integer(file, 4);
    c->kind = (uint32_t)read_integer(file, 4);
    c->vocab_size = (uint32_t)read_integer(file, 4);
    c->n_rows = (uint32_t)read_integer(file, 4);
    c->seed = read_integer(file, 8);
    c->logits_hash = read_integer(file, 8);
    c->tokens = check_malloc(c->n_rows * sizeof *c->tokens);
    c->start = check_malloc(c->n_rows * sizeof *c->start);
    c->freq = check_malloc(c->n_rows * sizeof *c->freq);
    c->total = check_malloc(c->n_rows * sizeof *c->total);
    for (size_t i = 0; i < c->n_rows; i++) {
        c->tokens[i] = (int64_t)read_integer(file, 4);
        c->start[i] = read_integer(file, 8);
        c->freq[i] = read_integer(file, 8);
        c->total[i] = read_integer(file, 8);
    }
    c->payload_bytes = (uint32_t)read_integer(file, 4);
    c->payload = check_malloc(c->payload_bytes);
    if (fread(c->payload, 1, c->payload_bytes, file) != c->payload_bytes) read_integer(file, 1);
    make_logits(c);
}

golden_case_t *golden_read(const char *path, size_t *n_cases) {
    char magic[8];
    FILE *file = fopen(path, "rb");
    if (file == NULL || fread(magic, 1, 8, file) != 8 || memcmp(magic, "LMCGOLD1", 8) != 0) {
        fprintf(stderr, "%s is not a golden file of the coder\n", path);
        exit(2);
    }
    *n_cases = (size_t)read_integer(file, 4);
    golden_case_t *cases = check_malloc(*n_cases * sizeof *cases);
    for (size_t i = 0; i < *n_cases; i++)
        read_case(file, &cases[i]);
    fclose(file);
    return cases;
}

void golden_free(golden_case_t *cases, size_t n_cases) {
    for (size_t i = 0; i < n_cases; i++) {
        free(cases[i].tokens), free(cases[i].start), free(cases[i].freq), free(cases[i].total);
        free(cases[i].payload), free(cases[i].logits);
    }
    free(cases);
}

/* The CUDA row kernels without a device: csrc/cuda/row_tiles.h, which is their arithmetic and index
 * arithmetic, run in loops over blocks, warps and lanes and compared with the serial backend. cuda_on_host
 * rows SEED N_CASES     intervals, errors and decoding of random and adversarial rows cuda_on_host weights
 * STRIDE every STRIDE-th float: the device's form of the weight, and the order keys Barriers, shuffles and
 * shared memory have no part in it: tests/coding/test_cuda.py checks them on a device. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/coding/row_kernels.h"
#include "core/int8/kernels.h"
#include "core/transformer/kernels.h"
#include "core/coding/range_coder.h"
#include "cuda/coding/row_tiles.h"
#include "llmcomp/coder.h"

static const lmc_backend_t serial = {"serial", lmc_row_kernels_serial, NULL};
static const lmc_context_t context = {&serial, NULL};
static long n_failures;

#define CHECK(CONDITION, ...)                                                                                \
    do {                                                                                                     \
        if (!(CONDITION) && n_failures++ < 20) {                                                             \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #CONDITION);                                  \
            fprintf(stderr, __VA_ARGS__);                                                                    \
            fputc('\n', stderr);                                                                             \
        }                                                                                                    \
    } while (0)

/* SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014). */
static uint64_t random_state;
static uint64_t random_bits(void) {
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}
static uint32_t random_below(uint32_t n) {
    return (uint32_t)((random_bits() >> 32) * n >> 32);
}
static float random_unit(void) {
    return (float)(random_bits() >> 40) * 0x1p-24f;
}

/* The kernels of coding.cu in loops. */

typedef struct row_case {
    const unsigned char *row;
    uint32_t vocab_size;
    lmc_dtype_t dtype;
    lmc_tile_plan_t plan;
    lmc_row_layout_t layout;
} row_case_t;

static uint32_t n_warps_of(const row_case_t *c) {
    return c->plan.n_blocks * c->plan.n_warps;
}

static const unsigned char *body_of(const row_case_t *c) {
    return c->row + (size_t)c->layout.n_head * lmc_element_bytes(c->dtype);
}

static int32_t maximum_of_lane(const row_case_t *c, uint32_t warp, uint32_t lane) {
    lmc_vector_t vectors[LMC_TILE_VECTORS];
    uint32_t top = lmc_word_lowest(c->dtype);
    for (uint32_t chunk = 0; chunk < c->plan.n_chunks; chunk++) {
        uint32_t begin = lmc_tile_begin(c->plan.n_chunks, warp, chunk, 0);
        lmc_tiles_load(vectors, body_of(c), begin, lane, c->layout.n_vectors, c->dtype);
        top = lmc_tiles_max(vectors, top, c->dtype);
    }
    return lmc_max_key(lmc_word_max_value(top, c->dtype));
}

static uint32_t edge_of_lane(const row_case_t *c, uint32_t lane, uint32_t token, float *edge) {
    uint32_t symbol = lmc_edge_symbol(&c->layout, c->vocab_size, lane, token, c->dtype);
    *edge = symbol == LMC_NO_SYMBOL_INDEX ? -INFINITY : lmc_symbol_load(c->row, symbol, c->dtype);
    return symbol;
}

static int32_t maximum_of_row(const row_case_t *c, uint32_t token) {
    int32_t key = LMC_KEY_NEGATIVE_INFINITY;
    for (uint32_t warp = 0; warp < n_warps_of(c); warp++) {
        for (uint32_t lane = 0; lane < LMC_WARP_LANES; lane++) {
            int32_t of_lane = maximum_of_lane(c, warp, lane);
            if (of_lane > key) key = of_lane;
        }
    }
    for (uint32_t lane = 0; lane < LMC_WARP_LANES; lane++) {
        float edge;
        edge_of_lane(c, lane, token, &edge);
        if (lmc_max_key(edge) > key) key = lmc_max_key(edge);
    }
    return key;
}

static uint64_t sum_of_warp(const row_case_t *c, uint32_t warp, uint32_t n_before, lmc_origin_t origin,
                            uint64_t *before) {
    lmc_vector_t vectors[LMC_TILE_VECTORS];
    uint64_t sum = 0;
    *before = 0;
    for (uint32_t lane = 0; lane < LMC_WARP_LANES; lane++) {
        for (uint32_t chunk = c->plan.n_chunks; chunk-- > 0;) {
            uint32_t begin = lmc_tile_begin(c->plan.n_chunks, warp, chunk, 0);
            if (origin.shift != 0.0f) {
                lmc_tiles_weight_sum_moved(body_of(c), begin + lane, c->layout.n_vectors, n_before, origin,
                                           c->dtype, &sum, before);
                continue;
            }
            lmc_tiles_load(vectors, body_of(c), begin, lane, c->layout.n_vectors, c->dtype);
            lmc_tiles_weight_sum(vectors, begin, lane, c->layout.n_vectors, n_before, origin.offset, c->dtype,
                                 &sum, before);
        }
    }
    return sum;
}

static lmc_status_t intervals_of_row(const row_case_t *c, int64_t wanted, uint64_t *start, uint64_t *freq,
                                     uint64_t *total) {
    uint32_t token = wanted >= 0 && wanted < (int64_t)c->vocab_size ? (uint32_t)wanted : LMC_TOKEN_INVALID;
    int32_t key = maximum_of_row(c, token);
    lmc_status_t status = token == LMC_TOKEN_INVALID ? LMC_ERROR_TOKEN : lmc_status_of_key(key);
    if (status != LMC_OK) return status;
    lmc_origin_t origin = lmc_origin(lmc_max_of_key(key));
    uint32_t n_before = lmc_vectors_before(&c->layout, token, c->dtype);
    uint32_t token_warp = lmc_warp_of_vector(&c->plan, n_before);
    *start = token;
    *total = c->vocab_size;
    int n_found = 0;
    for (uint32_t warp = 0; warp < n_warps_of(c); warp++) {
        uint64_t before, sum = sum_of_warp(c, warp, n_before, origin, &before);
        *total += sum;
        *start += warp < token_warp ? sum : warp == token_warp ? before : 0;
    }
    for (uint32_t lane = 0; lane < LMC_WARP_LANES; lane++) {
        float edge;
        uint32_t symbol = edge_of_lane(c, lane, token, &edge);
        uint64_t weight = lmc_weight_from(edge, origin);
        if (lane < LMC_EDGE_TOKEN_LANE) *total += weight;
        if (symbol < token) *start += weight;
        if (symbol == token) *freq = weight + 1, n_found++;
    }
    CHECK(n_found == 1, "token %u has %d lanes", token, n_found);
    return LMC_OK;
}

/* The token of the value among the vectors of a warp; rest and before as in find_in_body. */
static int find_in_warp(const row_case_t *c, uint32_t warp, lmc_origin_t origin, uint64_t rest,
                        uint64_t before, uint32_t *token, uint64_t *start, uint64_t *freq) {
    uint32_t n_elements = lmc_vector_elements(c->dtype);
    for (uint32_t tile = 0; tile < c->plan.n_chunks * LMC_TILE_VECTORS; tile++) {
        for (uint32_t lane = 0; lane < LMC_WARP_LANES; lane++) {
            uint32_t vector = lmc_tile_begin(c->plan.n_chunks, warp, 0, tile) + lane;
            if (vector >= c->layout.n_vectors) return 0;
            lmc_vector_t loaded = lmc_vector_load(body_of(c), vector);
            uint64_t share = lmc_vector_weight_sum(&loaded, origin, c->dtype) + n_elements, inside;
            if (rest < share) {
                uint32_t e = lmc_vector_find(&loaded, origin, c->dtype, rest, &inside, freq);
                *token = c->layout.n_head + vector * n_elements + e;
                *start = before + inside;
                return 1;
            }
            rest -= share;
            before += share;
        }
    }
    return 0;
}

static int find_in_edges(const row_case_t *c, uint32_t first_lane, lmc_origin_t origin, uint64_t rest,
                         uint64_t before, uint32_t *token, uint64_t *start, uint64_t *freq) {
    for (uint32_t lane = first_lane; lane < first_lane + LMC_EDGE_TAIL_LANE; lane++) {
        float edge;
        *token = edge_of_lane(c, lane, LMC_TOKEN_INVALID, &edge);
        if (*token == LMC_NO_SYMBOL_INDEX) continue;
        *freq = (uint64_t)lmc_weight_from(edge, origin) + 1;
        *start = before;
        if (rest < *freq) return 1;
        rest -= *freq;
        before += *freq;
    }
    return 0;
}

static uint64_t edge_share(const row_case_t *c, uint32_t first_lane, lmc_origin_t origin) {
    uint64_t share = 0;
    for (uint32_t lane = first_lane; lane < first_lane + LMC_EDGE_TAIL_LANE; lane++) {
        float edge;
        if (edge_of_lane(c, lane, LMC_TOKEN_INVALID, &edge) != LMC_NO_SYMBOL_INDEX)
            share += (uint64_t)lmc_weight_from(edge, origin) + 1;
    }
    return share;
}

static lmc_status_t decode_row(const row_case_t *c, lmc_decoder_t *decoder, int32_t *decoded) {
    static uint64_t shares[LMC_ROW_WARPS_MAX + 2];
    int32_t key = maximum_of_row(c, LMC_TOKEN_INVALID);
    lmc_status_t status = lmc_status_of_key(key);
    if (status != LMC_OK) return status;
    lmc_origin_t origin = lmc_origin(lmc_max_of_key(key));
    uint32_t n_entries = n_warps_of(c) + 2, entry = 0, token = 0;
    uint64_t total = 0, before = 0, start = 0, freq = 0, unused;
    shares[0] = edge_share(c, 0, origin);
    shares[n_entries - 1] = edge_share(c, LMC_EDGE_TAIL_LANE, origin);
    for (uint32_t warp = 0; warp < n_warps_of(c); warp++)
        shares[warp + 1] =
            sum_of_warp(c, warp, 0, origin, &unused) +
            (uint64_t)lmc_warp_vectors(&c->layout, c->plan.n_chunks, warp) * lmc_vector_elements(c->dtype);
    for (uint32_t i = 0; i < n_entries; i++)
        total += shares[i];
    uint64_t value = lmc_range_value(decoder, total);
    while (value >= before + shares[entry])
        before += shares[entry++];
    int is_found =
        entry == 0 ? find_in_edges(c, 0, origin, value - before, before, &token, &start, &freq)
        : entry == n_entries - 1
            ? find_in_edges(c, LMC_EDGE_TAIL_LANE, origin, value - before, before, &token, &start, &freq)
            : find_in_warp(c, entry - 1, origin, value - before, before, &token, &start, &freq);
    CHECK(is_found, "entry %u of %u", entry, n_entries);
    lmc_range_take(decoder, start, freq, total);
    *decoded = (int32_t)token;
    return LMC_OK;
}

/* Rows. */

static void store(unsigned char *row, uint32_t i, lmc_dtype_t dtype, float x) {
    uint32_t bits = lmc_bits_of(x), exponent = bits >> 23 & 0xFF;
    if (dtype == LMC_BFLOAT16) bits >>= 16;
    if (dtype == LMC_FLOAT16) { /* cut, and what is out of range clipped */
        uint32_t half = exponent < 113   ? 0
                        : exponent > 142 ? 0x7BFF
                                         : (exponent - 112) << 10 | (bits >> 13 & 0x3FF);
        if (exponent == 255) half = 0x7C00 | (bits >> 13 & 0x3FF);
        bits = half | (bits >> 16 & 0x8000);
    }
    memcpy(row + (size_t)i * lmc_element_bytes(dtype), &bits, lmc_element_bytes(dtype)); /* little endian */
}

/* Logits of a random row: like a model's, flat, spiky, far from 0, and any bits that are no error. */
static float random_logit(uint32_t kind, float centre) {
    switch (kind) {
    case 0:
        return 12.0f * (random_unit() + random_unit() + random_unit() - 1.5f);
    case 1:
        return centre;
    case 2:
        return random_below(100) == 0 ? centre : centre - 30.0f * random_unit();
    case 3:
        return random_below(3) == 0 ? -INFINITY : 4.0f * random_unit();
    case 4:
        return centre + 40000.0f * random_unit();
    default: {
        float x = lmc_float_of((uint32_t)random_bits());
        return x == x && x != INFINITY ? x : 0x1p-140f;
    }
    }
}
#define ROW_KINDS 6

static void random_row(unsigned char *row, uint32_t vocab_size, lmc_dtype_t dtype) {
    uint32_t kind = random_below(ROW_KINDS);
    float centre = random_below(2) == 0 ? 20.0f * random_unit() - 10.0f : 1e5f * random_unit() - 5e4f;
    for (uint32_t i = 0; i < vocab_size; i++)
        store(row, i, dtype, random_logit(kind, centre));
    uint32_t fault = random_below(40);
    if (fault == 0) store(row, random_below(vocab_size), dtype, lmc_float_of(0x7FC00001u));
    if (fault == 1) store(row, random_below(vocab_size), dtype, INFINITY);
    if (fault == 2)
        for (uint32_t i = 0; i < vocab_size; i++)
            store(row, i, dtype, -INFINITY);
}

static uint32_t random_vocab_size(void) {
    static const uint32_t sizes[] = {1,     7,     8,      9,      255,     256,     257,
                                     2047,  2048,  2049,   8191,   8193,    16384,   50257,
                                     50304, 65536, 151936, 262144, 1000000, 1u << 21};
    uint32_t choice = random_below(100);
    if (choice < 60) return 1 + random_below(600);
    if (choice < 90) return 1 + random_below(12000);
    return sizes[random_below(choice < 99 ? 13 : sizeof sizes / sizeof *sizes)];
}

/* A divisor of rows: any number of rows below 2^31, and those beside its multiples. */
static void check_divisor(void) {
    uint32_t divisor = 1 + random_below(random_below(2) ? 100 : INT32_MAX);
    lmc_divisor_t by = lmc_divisor_of(divisor);
    uint32_t multiple = random_below(INT32_MAX / divisor + 1) * divisor;
    uint32_t numbers[] = {0, random_below(1u << 31), multiple, multiple > 0 ? multiple - 1 : 0, INT32_MAX};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        CHECK(lmc_divide(numbers[i], by) == numbers[i] / divisor, "%u / %u", numbers[i], divisor);
}

/* The plan of a launch, or any other that covers the row. */
static lmc_tile_plan_t random_plan(uint32_t vocab_size, lmc_dtype_t dtype) {
    lmc_tile_plan_t plan = lmc_tile_plan(vocab_size, dtype, 1 + random_below(5000), 1 + random_below(200),
                                         1u << random_below(4));
    CHECK(plan.n_blocks <= LMC_CLUSTER_BLOCKS_MAX && plan.n_warps >= 1 && plan.n_warps <= LMC_BLOCK_WARPS_MAX,
          "%u blocks of %u warps", plan.n_blocks, plan.n_warps);
    CHECK(plan.n_blocks == 1u << plan.log2_blocks, "%u blocks, 2^%u", plan.n_blocks, plan.log2_blocks);
    uint64_t covered = (uint64_t)plan.n_blocks * plan.n_warps * plan.n_chunks * LMC_TILE_VECTORS *
                       LMC_WARP_LANES * lmc_vector_elements(dtype);
    CHECK(covered >= vocab_size, "a plan for %u symbols covers %llu", vocab_size,
          (unsigned long long)covered);
    if (random_below(2) == 0) return plan;
    uint32_t unit = LMC_TILE_VECTORS * LMC_WARP_LANES * lmc_vector_elements(dtype),
             n_units = (vocab_size + unit - 1) / unit;
    plan.n_blocks = 1u << random_below(4);
    plan.n_warps = 1 + random_below(LMC_BLOCK_WARPS_MAX);
    plan.n_chunks = (n_units + plan.n_blocks * plan.n_warps - 1) / (plan.n_blocks * plan.n_warps);
    plan.warp_vectors = lmc_divisor_of(plan.n_chunks * LMC_TILE_VECTORS * LMC_WARP_LANES);
    return plan;
}

/* One step of a decoder in any state; wanted: the token that it must find, -1 where only the core knows. */
static void check_decoding(const row_case_t *c, const lmc_rows_t *rows, lmc_decoder_t decoder,
                           int32_t wanted) {
    static lmc_search_t search;
    lmc_decoder_t expected = decoder;
    int32_t token = -1, expected_token = -1;
    size_t row;
    lmc_status_t status = decode_row(c, &decoder, &token);
    lmc_status_t expected_status =
        lmc_decode_step(&context, rows, NULL, &expected, &search, &expected_token, &row);
    CHECK(status == expected_status, "%d instead of %d for %u symbols", status, expected_status,
          c->vocab_size);
    if (status != LMC_OK) return;
    CHECK(token == expected_token && decoder.code == expected.code && decoder.range == expected.range &&
              decoder.position == expected.position,
          "token %d instead of %d of %u", token, expected_token, c->vocab_size);
    CHECK(wanted < 0 || token == wanted, "token %d instead of %d of %u", token, wanted, c->vocab_size);
}

static void check_case(void) {
    check_divisor();
    row_case_t c = {.vocab_size = random_vocab_size(), .dtype = (lmc_dtype_t)random_below(LMC_DTYPE_COUNT)};
    size_t n_bytes = (size_t)c.vocab_size * lmc_element_bytes(c.dtype);
    size_t offset = random_below(LMC_VECTOR_BYTES / lmc_element_bytes(c.dtype)) * lmc_element_bytes(c.dtype);
    /* The row ends where the memory ends, so that the address sanitizer sees a read past it. */
    unsigned char *memory = malloc(offset + n_bytes);
    if (memory == NULL) exit(2);
    random_row(memory + offset, c.vocab_size, c.dtype);
    c.row = memory + offset;
    c.plan = random_plan(c.vocab_size, c.dtype);
    c.layout = lmc_row_layout((uintptr_t)c.row, c.vocab_size, c.dtype);

    int64_t token = random_below(50) == 0 ? (int64_t)random_bits() : (int64_t)random_below(c.vocab_size);
    uint64_t found[3] = {0}, expected[3] = {0};
    size_t row = 0;
    lmc_rows_t rows = {c.row, (ptrdiff_t)n_bytes, 1, c.vocab_size, c.dtype};
    lmc_status_t status = intervals_of_row(&c, token, &found[0], &found[1], &found[2]);
    lmc_status_t expected_status =
        lmc_intervals(&context, &rows, &token, NULL, &expected[0], &expected[1], &expected[2], &row);
    CHECK(status == expected_status, "%d instead of %d for %u symbols", status, expected_status,
          c.vocab_size);
    CHECK(status != LMC_OK || memcmp(found, expected, sizeof found) == 0,
          "token %lld of %u, type %d, head %u", (long long)token, c.vocab_size, c.dtype, c.layout.n_head);

    uint8_t payload[16];
    for (size_t i = 0; i < sizeof payload; i++)
        payload[i] = (uint8_t)random_bits();
    lmc_decoder_t decoder;
    lmc_decoder_init(&decoder, payload, sizeof payload);
    check_decoding(&c, &rows, decoder, -1);
    if (expected_status == LMC_OK) { /* the first and the last number of the token's share */
        uint64_t r = decoder.range / expected[2];
        decoder.code = r * expected[0];
        check_decoding(&c, &rows, decoder, (int32_t)token);
        decoder.code += r * expected[1] - 1;
        check_decoding(&c, &rows, decoder, (int32_t)token);
    }
    free(memory);
}

/* Floats. */

static void check_weights(uint32_t stride) {
    const lmc_origin_t origins[] = {lmc_origin(0.0f), lmc_origin(17.25f), lmc_origin(-8192.0f),
                                    lmc_origin(1e30f)};
    const float maxima[] = {0.0f, 17.25f, -8192.0f, 1e30f};
    for (uint64_t bits = 0; bits <= UINT32_MAX; bits += stride) {
        float logit = lmc_float_of((uint32_t)bits);
        if (logit != logit || logit == INFINITY) continue;
        for (size_t i = 0; i < sizeof maxima / sizeof *maxima; i++) {
            if (logit > maxima[i]) continue;
            uint32_t weight = lmc_weight_from(logit, origins[i]);
            CHECK(weight == lmc_weight(logit, origins[i]), "logit %a, maximum %a", logit, maxima[i]);
        }
        CHECK(lmc_bits_of(lmc_max_of_key(lmc_max_key(logit))) == (uint32_t)bits, "key of %a", logit);
        float other = lmc_float_of((uint32_t)random_bits());
        if (other == other && other != logit)
            CHECK((lmc_max_key(logit) < lmc_max_key(other)) == (logit < other), "keys of %a, %a", logit,
                  other);
    }
    CHECK(lmc_max_key(NAN) > lmc_max_key(INFINITY), "the key of NaN");
    CHECK(lmc_max_key(INFINITY) == LMC_KEY_POSITIVE_INFINITY, "the key of +inf");
    CHECK(lmc_max_key(-INFINITY) == LMC_KEY_NEGATIVE_INFINITY, "the key of -inf");
}

int main(int argc, char **argv) {
    int is_rows = argc == 4 && strcmp(argv[1], "rows") == 0,
        is_weights = argc == 3 && strcmp(argv[1], "weights") == 0;
    if (!is_rows && !is_weights) {
        fprintf(stderr, "usage: cuda_on_host rows SEED N_CASES | weights STRIDE\n");
        return 2;
    }
    if (is_weights) check_weights((uint32_t)strtoul(argv[2], NULL, 0));
    if (is_rows) {
        random_state = strtoull(argv[2], NULL, 0);
        for (long n = strtol(argv[3], NULL, 0); n > 0; n--)
            check_case();
    }
    printf("%ld failures\n", n_failures);
    return n_failures == 0 ? 0 : 1;
}

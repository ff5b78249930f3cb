/* csrc/cuda/coding_kernels.cu as it is, barriers, shuffles, clusters and launchers with it, on an emulated
 * device and against the serial backend: cuda_emulated SEED N_CASES emulated/cuda_runtime.h says what the
 * emulation can and cannot show; cuda_on_host.c checks the arithmetic, far faster. */
#include <cuda_runtime.h>

extern "C" { /* first: coding.h includes two of these */
#include "core/coding/row_kernels.h"
#include "core/int8/kernels.h"
#include "core/transformer/kernels.h"
#include "llmcomp/coder.h"
}
#include "cuda/coding/coding.cu"

static long n_failures;
#define CHECK(CONDITION, ...)                                                                                \
    do {                                                                                                     \
        if (!(CONDITION) && n_failures++ < 20) {                                                             \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #CONDITION);                                  \
            fprintf(stderr, __VA_ARGS__);                                                                    \
            fputc('\n', stderr);                                                                             \
        }                                                                                                    \
    } while (0)

static const lmc_backend_t serial = {"serial", lmc_row_kernels_serial, nullptr};
static const lmc_context_t context = {&serial, nullptr};

/* SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014). */
static uint64_t random_state;
static uint64_t random_bits() {
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}
static uint32_t random_below(uint32_t n) {
    return (uint32_t)((random_bits() >> 32) * n >> 32);
}

/* Rows [n_outer][n_inner] with gaps, as a slice of a larger array has them; the bits of the logits are
 * random. */
struct rows_t {
    std::vector<unsigned char> memory;
    lmc_cuda_rows_t on_device;

    explicit rows_t(uint32_t vocab_size, uint32_t n_outer, uint32_t n_inner, uint32_t faults) {
        lmc_dtype_t dtype = (lmc_dtype_t)random_below(LMC_DTYPE_COUNT);
        uint32_t bytes = lmc_element_bytes(dtype), gap = random_below(40);
        int64_t inner = (int64_t)(vocab_size + gap) * bytes,
                outer = inner * n_inner + random_below(9) * bytes;
        size_t first = random_below(16) * bytes;
        memory.resize(first + (size_t)outer * n_outer + 16);
        uint32_t kind = random_below(3);
        for (size_t i = 0; i + bytes <= memory.size(); i += bytes)
            store(&memory[i], dtype, kind);
        on_device = {&memory[first], outer, inner, n_outer * n_inner, n_inner, vocab_size, dtype};
        for (uint32_t i = 0; i < faults; i++)
            spoil(random_below(n_outer * n_inner), random_below(3));
    }

    static void store(unsigned char *target, lmc_dtype_t dtype, uint32_t kind) {
        float unit = (float)(random_bits() >> 40) * 0x1p-24f;
        uint32_t bits = lmc_bits_of(kind == 0 ? 24.0f * unit - 12.0f : kind == 1 ? 12000.0f * unit : 3.0f);
        if (dtype == LMC_BFLOAT16) bits >>= 16;
        if (dtype == LMC_FLOAT16) bits = random_below(0x5000) | (uint32_t)(random_bits() & 0x8000);
        memcpy(target, &bits, lmc_element_bytes(dtype));
    }

    unsigned char *row(uint32_t i) {
        return (unsigned char *)on_device.data + i / on_device.n_inner * on_device.outer_stride_bytes +
               i % on_device.n_inner * on_device.inner_stride_bytes;
    }

    void spoil(uint32_t i, uint32_t how) {
        lmc_dtype_t dtype = on_device.dtype;
        uint32_t infinity = dtype == LMC_FLOAT32 ? 0x7F800000u : dtype == LMC_FLOAT16 ? 0x7C00u : 0x7F80u;
        uint32_t nan = infinity | 1, negative = infinity | (dtype == LMC_FLOAT32 ? 0x80000000u : 0x8000u);
        uint32_t bytes = lmc_element_bytes(dtype), where = random_below(on_device.vocab_size);
        if (how < 2) memcpy(row(i) + where * bytes, how == 0 ? &nan : &infinity, bytes);
        for (uint32_t e = 0; how == 2 && e < on_device.vocab_size; e++)
            memcpy(row(i) + e * bytes, &negative, bytes);
    }

    lmc_rows_t on_host(uint32_t i) {
        return {row(i), 0, 1, on_device.vocab_size, on_device.dtype};
    }
};

static std::vector<uint8_t> random_mask(uint32_t n) {
    std::vector<uint8_t> mask(n);
    for (uint8_t &one : mask)
        one = random_below(5) != 0;
    return mask;
}

static uint32_t random_vocab_size() {
    uint32_t choice = random_below(10);
    return 1 + random_below(choice < 4 ? 100 : choice < 8 ? 3000 : choice < 9 ? 9000 : 40000);
}

static void check_intervals() {
    uint32_t n_inner = 1 + random_below(3), n_outer = 1 + random_below(2), n = n_inner * n_outer;
    rows_t rows(random_vocab_size(), n_outer, n_inner, random_below(4) == 0);
    std::vector<int64_t> tokens(n);
    std::vector<int32_t> narrow(n);
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = random_below(rows.on_device.vocab_size);
        if (random_below(30) == 0) tokens[i] = random_below(2) == 0 ? -1 : rows.on_device.vocab_size;
        narrow[i] = (int32_t)tokens[i];
    }
    bool is_narrow = random_below(2) == 0;
    uint32_t bytes = is_narrow ? 4 : 8;
    lmc_cuda_tokens_t on_device = {is_narrow ? (void *)narrow.data() : (void *)tokens.data(),
                                   (int64_t)bytes * n_inner, bytes, bytes};
    std::vector<uint8_t> active = random_mask(n);
    const uint8_t *mask = random_below(3) == 0 ? active.data() : nullptr;
    std::vector<uint64_t> found(3 * n, ~(uint64_t)0);
    uint64_t error, expected_error = LMC_CUDA_NO_ERROR;
    lmc_cuda_error_clear(&error, nullptr);
    int status = lmc_cuda_intervals(&rows.on_device, &on_device, mask, &found[0], &found[n], &found[2 * n],
                                    &error, nullptr);
    CHECK(status == cudaSuccess, "status %d", status);
    for (uint32_t i = n; i-- > 0;) {
        uint64_t triple[3] = {0, 0, 0};
        size_t unused;
        lmc_rows_t row = rows.on_host(i);
        lmc_status_t of_row = LMC_OK;
        if (mask == nullptr || mask[i])
            of_row = lmc_intervals(&context, &row, &tokens[i], nullptr, &triple[0], &triple[1], &triple[2],
                                   &unused);
        if (of_row != LMC_OK) expected_error = (uint64_t)i << 8 | of_row;
        CHECK(found[i] == triple[0] && found[n + i] == triple[1] && found[2 * n + i] == triple[2],
              "row %u of %u, %zu symbols, type %d", i, n, row.vocab_size, row.dtype);
    }
    CHECK(error == expected_error, "error %llx instead of %llx", (unsigned long long)error,
          (unsigned long long)expected_error);
}

/* Some steps of n streams, of which each step skips some. */
struct steps_t {
    uint32_t n, n_steps, vocab_size;
    std::vector<rows_t> rows;
    std::vector<std::vector<int64_t>> tokens;
    std::vector<std::vector<uint8_t>> active;
};

/* Their payloads, by the device's encoders and by the core's. */
static std::vector<std::vector<uint8_t>> encode_steps(steps_t &steps) {
    uint32_t n = steps.n;
    size_t capacity = (steps.n_steps + 2) * LMC_STEP_BYTES_MAX;
    std::vector<uint8_t> bytes(n * capacity), expected_bytes(n * capacity);
    std::vector<lmc_encoder_t> encoders(n), expected(n);
    std::vector<uint64_t> triple(3 * n);
    uint64_t error;
    lmc_cuda_error_clear(&error, nullptr);
    lmc_cuda_encoders_begin(encoders.data(), n, bytes.data(), capacity, nullptr);
    for (uint32_t i = 0; i < n; i++)
        lmc_encoder_init(&expected[i], &expected_bytes[i * capacity], capacity);
    for (uint32_t step = 0; step < steps.n_steps; step++) {
        const uint8_t *active = steps.active[step].data();
        lmc_cuda_tokens_t on_device = {steps.tokens[step].data(), 0, 8, 8};
        lmc_cuda_intervals(&steps.rows[step].on_device, &on_device, active, &triple[0], &triple[n],
                           &triple[2 * n], &error, nullptr);
        lmc_cuda_encoders_put(encoders.data(), n, &triple[0], &triple[n], &triple[2 * n], active, &error,
                              nullptr);
        for (uint32_t i = 0; i < n; i++) {
            size_t unused;
            if (active[i])
                lmc_encoder_put(&expected[i], 1, &triple[i], &triple[n + i], &triple[2 * n + i], &unused);
        }
    }
    lmc_cuda_encoders_end(encoders.data(), n, nullptr);
    CHECK(error == LMC_CUDA_NO_ERROR, "error %llx", (unsigned long long)error);
    std::vector<std::vector<uint8_t>> payloads;
    for (uint32_t i = 0; i < n; i++) {
        lmc_encoder_end(&expected[i]);
        bool is_same = encoders[i].n_bytes == expected[i].n_bytes &&
                       memcmp(encoders[i].bytes, expected[i].bytes, expected[i].n_bytes) == 0;
        CHECK(is_same, "stream %u of %u after %u steps", i, n, steps.n_steps);
        payloads.emplace_back(encoders[i].bytes, encoders[i].bytes + encoders[i].n_bytes);
    }
    return payloads;
}

static void check_streams() {
    steps_t steps = {1 + random_below(4), 1 + random_below(6), random_vocab_size(), {}, {}, {}};
    uint32_t n = steps.n;
    for (uint32_t step = 0; step < steps.n_steps; step++) {
        steps.rows.emplace_back(steps.vocab_size, 1, n, 0);
        steps.active.push_back(random_mask(n));
        steps.tokens.emplace_back();
        for (uint32_t i = 0; i < n; i++)
            steps.tokens[step].push_back(random_below(steps.vocab_size));
    }
    std::vector<uint8_t> bytes;
    std::vector<uint64_t> offsets(1, 0);
    for (const auto &payload : encode_steps(steps)) {
        bytes.insert(bytes.end(), payload.begin(), payload.end());
        offsets.push_back(bytes.size());
    }
    std::vector<lmc_decoder_t> decoders(n);
    std::vector<int32_t> decoded(n);
    uint64_t error;
    lmc_cuda_error_clear(&error, nullptr);
    lmc_cuda_decoders_begin(decoders.data(), n, bytes.data(), offsets.data(), nullptr);
    for (uint32_t step = 0; step < steps.n_steps; step++) {
        const std::vector<uint8_t> &active = steps.active[step];
        lmc_cuda_decode_step(&steps.rows[step].on_device, active.data(), decoders.data(), decoded.data(),
                             &error, nullptr);
        for (uint32_t i = 0; i < n; i++) {
            int32_t wanted = active[i] ? (int32_t)steps.tokens[step][i] : TOKEN_INACTIVE;
            CHECK(decoded[i] == wanted, "token %d instead of %d of %u", decoded[i], wanted, steps.vocab_size);
        }
    }
    CHECK(error == LMC_CUDA_NO_ERROR, "error %llx", (unsigned long long)error);
}

/* One stream of any bytes, with a bad row at the end. */
static void check_stream_of_rows() {
    static lmc_search_t search;
    uint32_t n = 2 + random_below(5);
    rows_t rows(random_vocab_size(), 1, n, 0);
    rows.spoil(n - 1, random_below(3));
    uint8_t payload[8];
    for (uint8_t &one : payload)
        one = (uint8_t)random_bits();
    uint64_t offsets[2] = {0, random_below(9)}, error;
    lmc_decoder_t decoder, expected;
    std::vector<int32_t> tokens(n), wanted(n);
    lmc_cuda_error_clear(&error, nullptr);
    lmc_cuda_decoders_begin(&decoder, 1, payload, offsets, nullptr);
    lmc_cuda_decode_stream(&rows.on_device, &decoder, tokens.data(), &error, nullptr);
    lmc_decoder_init(&expected, payload, offsets[1]);
    lmc_rows_t on_host = {rows.row(0), rows.on_device.inner_stride_bytes, n, rows.on_device.vocab_size,
                          rows.on_device.dtype};
    size_t error_row;
    lmc_status_t status =
        lmc_decode_stream(&context, &on_host, &expected, &search, wanted.data(), &error_row);
    CHECK(error == ((uint64_t)error_row << 8 | status), "error %llx", (unsigned long long)error);
    for (uint32_t i = 0; i < error_row; i++)
        CHECK(tokens[i] == wanted[i], "row %u: %d instead of %d", i, tokens[i], wanted[i]);
    CHECK(tokens[n - 1] == TOKEN_ERROR, "%d", tokens[n - 1]);
    CHECK(decoder.code == expected.code && decoder.range == expected.range &&
              decoder.position == expected.position,
          "the decoder after %u rows", n);
}

/* Decoders set to the first and to the last number of a token's share, tokens at the ends of head, warps and
 * tail. */
static void check_boundaries() {
    rows_t rows(random_vocab_size(), 1, 4, 0);
    const lmc_cuda_rows_t &on_device = rows.on_device;
    uint32_t n = on_device.n_rows,
             unit = LMC_TILE_VECTORS * LMC_WARP_LANES * lmc_vector_elements(on_device.dtype);
    std::vector<int64_t> tokens(n);
    std::vector<uint64_t> triple(3 * n);
    for (uint32_t i = 0; i < n; i++) {
        lmc_row_layout_t layout =
            lmc_row_layout((uintptr_t)rows.row(i), on_device.vocab_size, on_device.dtype);
        uint32_t warp_begin = layout.n_head + unit * random_below(on_device.vocab_size / unit + 1);
        uint32_t token = (i % 2 == 0 ? warp_begin : on_device.vocab_size - layout.n_tail) - random_below(2);
        tokens[i] = token < on_device.vocab_size ? token : on_device.vocab_size - 1;
        lmc_rows_t row = rows.on_host(i);
        size_t unused;
        lmc_intervals(&context, &row, &tokens[i], nullptr, &triple[i], &triple[n + i], &triple[2 * n + i],
                      &unused);
    }
    for (int at_end = 0; at_end < 2; at_end++) {
        std::vector<lmc_decoder_t> decoders(n);
        std::vector<int32_t> found(n);
        uint64_t error;
        lmc_cuda_error_clear(&error, nullptr);
        for (uint32_t i = 0; i < n; i++) {
            lmc_decoder_init(&decoders[i], nullptr, 0);
            uint64_t r = decoders[i].range / triple[2 * n + i];
            decoders[i].code = r * triple[i] + (at_end ? r * triple[n + i] - 1 : 0);
        }
        lmc_cuda_decode_step(&on_device, nullptr, decoders.data(), found.data(), &error, nullptr);
        for (uint32_t i = 0; i < n; i++)
            CHECK(found[i] == tokens[i], "token %d instead of %lld of %u", found[i], (long long)tokens[i],
                  on_device.vocab_size);
    }
}

/* A full stream and a bad interval stop their own stream only, and every later step. */
static void check_encoder_errors() {
    uint8_t bytes[2][3 * LMC_STEP_BYTES_MAX];
    lmc_encoder_t encoders[2];
    uint64_t error, start[2] = {0, 5}, freq[2] = {1, 0}, total[2] = {LMC_TOTAL_MAX, 9};
    lmc_cuda_error_clear(&error, nullptr);
    lmc_cuda_encoders_begin(encoders, 2, bytes[0], sizeof bytes[0], nullptr);
    lmc_cuda_encoders_put(encoders, 2, start, freq, total, nullptr, &error, nullptr);
    CHECK(error == (1 << 8 | LMC_ERROR_INTERVAL) && encoders[1].range == UINT64_MAX, "%llx",
          (unsigned long long)error);
    uint64_t low = encoders[0].low, range = encoders[0].range;
    lmc_cuda_encoders_put(encoders, 1, start, freq, total, nullptr, &error, nullptr);
    CHECK(encoders[0].low == low && encoders[0].range == range, "a step after an error coded something");
    lmc_cuda_error_clear(&error, nullptr);
    for (int i = 0; i < 9; i++)
        lmc_cuda_encoders_put(encoders, 1, start, freq, total, nullptr, &error, nullptr);
    CHECK(error == LMC_ERROR_CAPACITY && encoders[0].n_bytes + LMC_STEP_BYTES_MAX <= sizeof bytes[0], "%llx",
          (unsigned long long)error);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: cuda_emulated SEED N_CASES\n");
        return 2;
    }
    random_state = strtoull(argv[1], nullptr, 0);
    check_encoder_errors();
    for (long n = strtol(argv[2], nullptr, 0); n > 0; n--) {
        emulated_machine.major = random_below(4) == 0 ? 8 : 9;
        emulated_machine.n_processors = 1 + (int)random_below(20);
        check_intervals();
        check_streams();
        check_stream_of_rows();
        check_boundaries();
    }
    printf("%ld failures\n", n_failures);
    return n_failures == 0 ? 0 : 1;
}

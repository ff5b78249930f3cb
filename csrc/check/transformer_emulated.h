/* What the files of transformer_emulated compare with: random tensors and models, the serial backend's
 * logits, and memory that plays the device's, as large as its _bytes function says and full of NaN. */
#ifndef LLMCOMP_CHECK_TRANSFORMER_EMULATED_H
#define LLMCOMP_CHECK_TRANSFORMER_EMULATED_H

extern "C" {
#include "core/coding/row_kernels.h"
#include "core/int8/kernels.h"
#include "core/transformer/kernels.h"
#include "llmcomp/coder.h"
#include "llmcomp/transformer.h"
#include "check/transformer_cases.h"
}
#include "cuda/transformer/transformer.h"
#include "cuda/transformer/launch.h"
#include "cuda/coding/row_tiles.h"

#include <stdio.h>
#include <stdlib.h>

#include <vector>

inline long check_n_failures;
inline long check_failed() {
    return check_n_failures;
}
#define CHECK(CONDITION, ...)                                                                                \
    do {                                                                                                     \
        if (!(CONDITION) && check_n_failures++ < 20) {                                                       \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #CONDITION);                                  \
            fprintf(stderr, __VA_ARGS__);                                                                    \
            fputc('\n', stderr);                                                                             \
        }                                                                                                    \
    } while (0)

/* SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014). */
inline uint64_t check_random_state;
inline void check_seed(uint64_t seed) {
    check_random_state = seed;
}
inline uint64_t check_bits() {
    uint64_t z = check_random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}
inline uint32_t check_below(uint32_t n) {
    return (uint32_t)((check_bits() >> 32) * n >> 32);
}

inline const lmc_backend_t check_serial_backend = {"serial", lmc_row_kernels_serial,
                                                   &lmc_transformer_kernels_serial, &lmc_int8_kernels_serial};
inline const lmc_context_t check_serial = {&check_serial_backend, nullptr};

/* The same bits, or both NaN: a processor may choose a NaN's sign and payload. */
inline bool check_same(float a, float b) {
    return lmc_bits_of(a) == lmc_bits_of(b) || (a != a && b != b);
}

inline void check_logits(const float *found, const float *wanted, size_t n_rows, size_t n_logits,
                         const char *what) {
    size_t n_wrong = 0, first = 0;
    for (size_t i = n_rows * n_logits; i-- > 0;) {
        if (check_same(found[i], wanted[i])) continue;
        n_wrong++;
        first = i;
    }
    CHECK(n_wrong == 0, "%s: %zu of %zu logits, the first in row %zu of %zu", what, n_wrong,
          n_rows * n_logits, first / n_logits, n_rows);
}

struct check_memory_t {
    void *data;

    explicit check_memory_t(size_t n_bytes) {
        if (posix_memalign(&data, 256, n_bytes) != 0) abort();
        memset(data, 0xFF, n_bytes);
    }
    ~check_memory_t() {
        free(data);
    }
    check_memory_t(const check_memory_t &) = delete;
};

/* Random numbers of a type, some of them tiny or -0; at an address that is a multiple of 16, or only of the
 * size of one. */
struct check_tensor_t {
    lmc_dtype_t dtype;
    std::vector<float> memory;
    size_t offset_bytes;

    check_tensor_t(lmc_dtype_t type, size_t n, float scale) : dtype(type), memory(n + 8), offset_bytes(0) {
        uint32_t bytes = lmc_element_bytes(type);
        size_t to_boundary = (size_t)(-(uintptr_t)memory.data() & 15);
        offset_bytes = to_boundary + (type != LMC_FLOAT32 && check_below(8) == 0 ? bytes : 0);
        for (size_t i = 0; i < n; i++) {
            float unit = (float)(check_bits() >> 40) * 0x1p-23f - 1.0f, value = scale * unit;
            if (check_below(40) == 0) value *= check_below(2) ? 0x1p-16f : -0.0f;
            uint32_t word = lmc_bits_of(value), sign = word >> 31 << 15;
            uint32_t magnitude = word & 0x7FFFFFFFu;
            if (type == LMC_BFLOAT16) word >>= 16;
            /* Cut, not rounded; what is too small becomes a denormal of some kind. */
            if (type == LMC_FLOAT16)
                word = sign | (magnitude < 0x38800000u ? magnitude >> 20 : (magnitude - 0x38000000u) >> 13);
            memcpy(at(i), &word, bytes);
        }
    }

    unsigned char *at(size_t i) const {
        return (unsigned char *)memory.data() + offset_bytes + i * lmc_element_bytes(dtype);
    }
};

typedef std::vector<int64_t> check_history_t;

/* GPT-NeoX of a random shape. */
inline lmc_transformer_config_t check_random_neox(uint32_t head_dim, uint32_t context_length) {
    lmc_transformer_config_t sizes = {};
    sizes.n_layers = 1 + check_below(2);
    sizes.n_heads = 1 + check_below(head_dim > 24 ? 2 : 4);
    sizes.hidden = sizes.n_heads * head_dim;
    sizes.intermediate = check_below(2) ? 8 * (1 + check_below(10)) : 1 + check_below(70);
    sizes.n_embeddings = 1 + check_below(50);
    sizes.n_logits = 1 + check_below(90);
    sizes.context_length = context_length;
    lmc_transformer_config_t config = check_neox_config(sizes, 2 * check_below(head_dim / 2 + 1));
    config.parallel_residual = (int)check_below(2);
    config.int8 = check_below(3) == 0;
    return config;
}

/* Half of them GPT-NeoX, half with switches thrown (transformer_emulated_switches.cpp). */
void check_throw_switches(lmc_transformer_config_t &config);
inline lmc_transformer_config_t check_random_config() {
    static const uint32_t head_dims[] = {1, 2, 3, 5, 8, 12, 16, 24, 66, 130};
    uint32_t kind = check_below(8);
    lmc_transformer_config_t config = check_random_neox(head_dims[kind < 7 ? kind : 7 + check_below(3)],
                                                        1 + check_below(check_below(3) == 0 ? 100 : 40));
    if (check_below(2)) check_throw_switches(config);
    return config;
}

/* A model for the core and for the device. */
struct check_model_t {
    lmc_transformer_config_t config;
    lmc_dtype_t dtype;
    std::vector<check_tensor_t> tensors; /* of random weights, the embedding first */
    std::vector<lmc_transformer_layer_t> layers, layers_of_codes;
    std::vector<unsigned char> tables, device_tables, codes;
    std::vector<std::unique_ptr<check_memory_t>> device_codes;
    std::vector<lmc_transformer_layer_t> device_layers;
    lmc_transformer_model_t model, placed;

    /* With random weights. */
    explicit check_model_t(const lmc_transformer_config_t &of)
        : config(of), dtype((lmc_dtype_t)check_below(LMC_DTYPE_COUNT)) {
        begin(random_weights());
    }

    /* With weights that live as long. */
    check_model_t(const lmc_transformer_config_t &of, const lmc_transformer_weights_t &weights)
        : config(of), dtype(LMC_FLOAT32), layers(weights.layers, weights.layers + of.n_layers) {
        begin(weights);
    }

    /* A tensor of n elements; norms and biases may be missing, which is +0. */
    lmc_transformer_tensor_t make(size_t n, float scale, bool may_be_missing) {
        if (may_be_missing && check_below(6) == 0) return {nullptr, dtype, nullptr};
        tensors.emplace_back(check_below(10) == 0 ? (lmc_dtype_t)check_below(LMC_DTYPE_COUNT) : dtype, n,
                             scale);
        return {tensors.back().at(0), tensors.back().dtype, nullptr};
    }

    /* What a slot holds: gains around 2, biases that may be missing, matrices of about 1 / sqrt(inputs). */
    lmc_transformer_tensor_t make_slot(lmc_shape_t shape, bool is_gain, float scale) {
        if (shape.n_rows == 0) return {nullptr, LMC_FLOAT32, nullptr};
        if (shape.n_columns == 0) return make(shape.n_rows, is_gain ? 2.0f : 0.5f, !is_gain);
        return make(shape.n_rows * shape.n_columns, scale / sqrtf((float)shape.n_columns), false);
    }

    lmc_transformer_weights_t random_weights() {
        lmc_transformer_weights_t weights = {};
        tensors.reserve(LMC_MODEL_SLOT_COUNT + config.n_layers * LMC_LAYER_SLOT_COUNT);
        for (int i = 0; i < LMC_MODEL_SLOT_COUNT; i++) {
            lmc_shape_t shape = lmc_model_slot_shape(&config, (lmc_model_slot_t)i);
            bool is_embedding = i == LMC_MODEL_EMBEDDING;
            weights.slots[i] = make_slot(shape, i == LMC_MODEL_FINAL_NORM_GAIN,
                                         is_embedding ? sqrtf((float)config.hidden) : 4.0f);
        }
        for (size_t i = 0; i < config.n_layers; i++) {
            lmc_transformer_layer_t layer;
            for (int j = 0; j < LMC_LAYER_SLOT_COUNT; j++) {
                lmc_shape_t shape = lmc_layer_slot_shape(&config, (lmc_layer_slot_t)j);
                bool is_sharp = j == LMC_LAYER_QKV || j == LMC_LAYER_Q || j == LMC_LAYER_K;
                layer.slots[j] = make_slot(shape, check_is_layer_gain(j), is_sharp ? 4.0f : 2.0f);
            }
            static const float xielu[] = {0.25f, -0.5f, 0.5f, -0x1p-20f};
            if (config.activation == LMC_ACTIVATION_XIELU)
                layer.slots[LMC_LAYER_ACTIVATION] = {xielu, LMC_FLOAT32, nullptr};
            layers.push_back(layer);
        }
        weights.layers = layers.data();
        return weights;
    }

    void begin(const lmc_transformer_weights_t &weights) {
        tables.resize(lmc_transformer_tables_bound(&config));
        lmc_status_t status =
            lmc_cuda_transformer_model_prepare(&config, &weights, tables.data(), tables.size(), &model);
        CHECK(status == LMC_OK, "%s", lmc_status_message(status));
        device_tables = tables;
        lmc_transformer_weights_t device_weights = weights;
        if (config.int8) quantise(weights, device_weights);
        lmc_cuda_transformer_model_place(&model, &device_weights, device_tables.data(), &placed);
    }

    /* Codes by the core, for the core's model, and by the device. */
    void quantise(const lmc_transformer_weights_t &weights, lmc_transformer_weights_t &device_weights) {
        codes.resize(lmc_int8_weights_bound(&config));
        layers_of_codes = device_layers = layers;
        lmc_status_t status = lmc_int8_weights_quantise(&check_serial, &config, &weights, codes.data(),
                                                        codes.size(), layers_of_codes.data(), &model.weights);
        CHECK(status == LMC_OK, "%s", lmc_status_message(status));
        device_weights.layers = device_layers.data();
        quantise_on_device(device_weights.slots[LMC_MODEL_HEAD], config.n_logits, config.hidden);
        for (lmc_transformer_layer_t &layer : device_layers) {
            for (int j = 0; j < LMC_LAYER_SLOT_COUNT; j++) {
                lmc_shape_t shape = lmc_layer_slot_shape(&config, (lmc_layer_slot_t)j);
                if (shape.n_columns > 0) quantise_on_device(layer.slots[j], shape.n_rows, shape.n_columns);
            }
        }
    }

    void quantise_on_device(lmc_transformer_tensor_t &matrix, size_t n_rows, size_t n_k) {
        const lmc_transformer_tensor_t source = matrix;
        device_codes.push_back(std::make_unique<check_memory_t>(lmc_cuda_int8_weights_bytes(n_rows, n_k)));
        int status =
            lmc_cuda_int8_weights_quantise(&source, n_rows, n_k, device_codes.back()->data, &matrix, nullptr);
        CHECK(status == cudaSuccess, "a launch failed");
    }

    /* [history.size()][n_logits], by the serial backend. */
    std::vector<float> logits_of(const check_history_t &history) const {
        size_t n = history.size(), bytes = lmc_transformer_pass_bound(&config, 1, n, 1, 0), error;
        std::vector<float> logits(n * config.n_logits);
        std::vector<unsigned char> workspace(bytes);
        lmc_transformer_batch_t batch = {history.data(), nullptr, 1, n, n};
        lmc_transformer_sink_t sink = {};
        sink.logits = logits.data();
        lmc_status_t status =
            lmc_transformer_pass(&check_serial, &model, &batch, &sink, workspace.data(), bytes, &error);
        CHECK(status == LMC_OK || n == 0, "%s", lmc_status_message(status));
        return logits;
    }

    std::vector<float> last_logits_of(const check_history_t &history) const {
        std::vector<float> logits = logits_of(history);
        return std::vector<float>(logits.end() - (ptrdiff_t)config.n_logits, logits.end());
    }
};

struct check_cache_t {
    check_memory_t memory;
    lmc_cuda_transformer_cache_t cache;
    uint32_t n_positions;

    check_cache_t(const check_model_t &model, uint32_t n_layers, uint32_t n_streams, uint32_t n_tokens)
        : memory(lmc_cuda_transformer_cache_bytes(&model.config, n_layers, n_streams, n_tokens)) {
        int status = lmc_cuda_transformer_cache_init(&model.config, n_layers, n_streams, n_tokens,
                                                     memory.data, &cache, nullptr);
        CHECK(status == cudaSuccess, "%u tokens", n_tokens);
        n_positions = (uint32_t)min((size_t)cache.capacity, model.config.context_length);
    }
};

struct check_work_t {
    check_memory_t memory;
    lmc_cuda_transformer_work_t work;

    check_work_t(const lmc_transformer_config_t &config, uint32_t n_rows)
        : memory(lmc_cuda_transformer_work_bytes(&config, n_rows)) {
        lmc_cuda_transformer_work_init(&config, n_rows, memory.data, &work);
    }
};

/* Of the other files. Kinds of a product 0: few tokens; 1: more, for which the large tile is too large; 2:
 * the large tile, one or more. */
void check_product(uint32_t kind);
void check_code_product(uint32_t kind);
void check_norm(bool is_long);
void check_softmax();
void check_attend_step();

void check_pass(const check_model_t &model);
void check_streams(const check_model_t &model);
void check_capacity(const check_model_t &model);
void check_chain(const check_model_t &model);
void check_not_finite(check_model_t &model);

void check_each_switch();
void check_written_cases();

#endif

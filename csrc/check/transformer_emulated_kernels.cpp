/* For transformer_emulated.cpp: kernels of the exact engine by themselves, in sizes that a small model does
 * not reach, against plain loops and the serial backend's kernels. */
#include <cuda_runtime.h>

#include "transformer_emulated.h"

static uint32_t below(uint32_t n) {
    return check_below(n);
}

/* Products. */

static float widened(const check_tensor_t &tensor, size_t i) {
    float wide;
    lmc_transformer_kernels_serial.widen(tensor.at(i), tensor.dtype, 1, &wide);
    return wide;
}

/* A finish at random, and what it makes of a number. */
static const lmc_xielu_rule_t check_xielu = {0.75f, 1.5f, 0.5f, -0x1p-20f};

static lmc_cuda_finish_t random_finish(const float *factors) {
    lmc_cuda_finish_t finish = {};
    finish.clip = below(3) == 0 ? 0.5f : 0.0f;
    finish.is_activated = below(4) != 0;
    finish.activation = (lmc_activation_t)below(LMC_ACTIVATION_XIELU + 1);
    finish.xielu = &check_xielu.alpha_p;
    finish.factors = below(2) ? factors : nullptr;
    finish.are_logits = below(4) == 0;
    finish.logits_multiplier = 0.75f;
    finish.logits_cap = below(2) ? 0.5f : 0.0f;
    return finish;
}

static float finished_alone(const lmc_cuda_finish_t &finish, float x, float factor) {
    const lmc_transformer_kernels_t &kernels = lmc_transformer_kernels_serial;
    const lmc_activation_rule_t rule = {finish.activation, check_xielu};
    if (finish.clip != 0.0f) kernels.clip(&x, 1, finish.clip);
    if (finish.is_activated) kernels.activate(rule, &x, nullptr, 1);
    if (finish.factors != nullptr) x = x * factor;
    if (finish.are_logits) kernels.finish_logits(&x, 1, finish.logits_multiplier, finish.logits_cap);
    return x;
}

/* What becomes of a sum; first and before: at the output's place, of the addend and of the output. */
static float output_alone(const lmc_cuda_product_t &p, float sum, float first, float before) {
    if (p.with_finish) return finished_alone(p.finish, sum, before);
    if (p.with_gelu) sum = lmc_gelu(sum);
    if (p.addends[0] != nullptr) sum += first;
    return p.addends[1] != nullptr ? fmaf(sum, p.multiplier, before) : sum;
}

/* The GELU and addends, or a finish; the output is one of its own inputs, or not. */
static void throw_ends(lmc_cuda_product_t &p, const float *first) {
    bool is_in_place = below(2);
    p.with_finish = below(2);
    p.finish = random_finish(p.output);
    p.with_gelu = below(2);
    p.addends[0] = below(2) ? first : nullptr;
    p.addends[1] = is_in_place ? p.output : nullptr;
    p.multiplier = below(2) ? 1.0f : 0.22f;
}

/* On one processor lmc_cuda_product chooses a tile by the sizes alone. */
void check_product(uint32_t kind) {
    static const uint32_t k_units[] = {1, 4, 8, 64};
    uint32_t n_tokens = kind == 0   ? 1 + below(8)
                        : kind == 1 ? 20 + below(40)
                                    : 65 + below(64) + 128 * below(2);
    uint32_t n_rows = kind < 2 ? 1 + below(150) : 65 + below(64) + 128 * below(2);
    uint32_t unit = k_units[below(4)], n_k = unit * (1 + below(unit == 64 ? 2 : 130 / unit));
    check_tensor_t weights((lmc_dtype_t)below(LMC_DTYPE_COUNT), (size_t)n_rows * n_k, 0.5f);
    check_tensor_t input(LMC_FLOAT32, (size_t)n_tokens * n_k, 1.0f), bias(LMC_FLOAT32, n_rows, 1.0f);
    check_tensor_t first(LMC_FLOAT32, (size_t)n_tokens * n_rows, 1.0f), output = first;
    bool has_bias = below(2);
    lmc_cuda_product_t p = {};
    p.weights = weights.at(0);
    p.dtype = weights.dtype;
    p.input = (const float *)input.at(0);
    p.bias = has_bias ? (const float *)bias.at(0) : nullptr;
    p.output = (float *)output.at(0);
    p.n_tokens = n_tokens;
    p.n_rows = n_rows;
    p.n_k = n_k;
    throw_ends(p, (const float *)first.at(0));
    CHECK(lmc_cuda_product(p, nullptr) == cudaSuccess, "a launch failed");
    long n_wrong = 0;
    for (size_t t = 0; t < n_tokens; t++) {
        for (size_t i = 0; i < n_rows; i++) {
            float chain = 0.0f;
            for (size_t k = 0; k < n_k; k++)
                chain = fmaf(widened(weights, i * n_k + k), widened(input, t * n_k + k), chain);
            if (has_bias) chain += widened(bias, i);
            float other = widened(first, t * n_rows + i);
            n_wrong += !check_same(output_alone(p, chain, other, other), p.output[t * n_rows + i]);
        }
    }
    CHECK(n_wrong == 0, "%ld outputs of %u x %u over %u, type %d", n_wrong, n_tokens, n_rows, n_k,
          weights.dtype);
}

/* A row as codes, in other words than rule.h: FORMAT.md, section 4.7. */
static float codes_of_row(const float *row, size_t n_k, int8_t *codes) {
    float largest = 0.0f;
    bool is_finite = true;
    for (size_t k = 0; k < n_k; k++) {
        is_finite = is_finite && isfinite(row[k]);
        largest = max(largest, fabsf(row[k]));
    }
    float reciprocal = !is_finite || largest < 0x1p-100f ? 0.0f : 127.0f / largest;
    for (size_t k = 0; k < n_k; k++)
        codes[k] = reciprocal == 0.0f ? 0 : (int8_t)nearbyintf(row[k] * reciprocal);
    return !is_finite ? NAN : reciprocal == 0.0f ? 0.0f : largest / 127.0f;
}

/* n rows of n_k numbers each as codes, by the device and alone. */
static void check_codes(check_tensor_t &numbers, uint32_t n, uint32_t n_k, const lmc_cuda_codes_t &codes) {
    uint32_t n_padded = (n_k + 15) / 16 * 16, bytes = lmc_element_bytes(numbers.dtype);
    /* A row of zeros, and one that is not finite. */
    memset(numbers.at((size_t)below(n) * n_k), 0, n_k * bytes);
    if (below(2)) memset(numbers.at(below(n) * n_k + below(n_k)), 0xFF, bytes);
    CHECK(lmc_cuda_int8_quantise(numbers.at(0), numbers.dtype, n, n_k, codes, nullptr) == cudaSuccess,
          "a launch failed");
    std::vector<float> row(n_k);
    std::vector<int8_t> wanted(n_padded);
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < n_k; k++)
            row[k] = widened(numbers, i * n_k + k);
        float scale = codes_of_row(row.data(), n_k, wanted.data());
        CHECK(check_same(scale, codes.scales[i]), "row %zu", i);
        CHECK(memcmp(wanted.data(), codes.codes + i * n_padded, n_padded) == 0, "row %zu", i);
    }
}

/* Codes and their product by themselves; kinds as in check_product. */
void check_code_product(uint32_t kind) {
    uint32_t n_tokens = kind == 0   ? 1 + below(8)
                        : kind == 1 ? 20 + below(40)
                                    : 65 + below(64) + 128 * below(2);
    uint32_t n_rows = kind < 2 ? 1 + below(150) : 65 + below(64) + 128 * below(2);
    uint32_t n_k = 1 + below(below(3) == 0 ? 900 : 150), n_all = n_tokens + n_rows;
    check_tensor_t numbers((lmc_dtype_t)below(LMC_DTYPE_COUNT), (size_t)n_all * n_k, 2.0f);
    check_tensor_t bias(LMC_FLOAT32, n_rows, 1.0f), before(LMC_FLOAT32, (size_t)n_tokens * n_rows, 1.0f);
    check_tensor_t output = before;
    uint32_t n_padded = (n_k + 15) / 16 * 16;
    check_memory_t codes((size_t)n_all * n_padded), scales(n_all * sizeof(float));
    lmc_cuda_codes_t all = {(int8_t *)codes.data, (float *)scales.data};
    check_codes(numbers, n_all, n_k, all);
    lmc_cuda_product_t p = {};
    p.weights = all.codes + (size_t)n_tokens * n_padded;
    p.scales = all.scales + n_tokens;
    p.bias = below(2) ? (const float *)bias.at(0) : nullptr;
    p.output = (float *)output.at(0);
    p.n_tokens = n_tokens;
    p.n_rows = n_rows;
    p.n_k = n_k;
    throw_ends(p, (const float *)before.at(0));
    CHECK(lmc_cuda_int8_product(p, all, nullptr) == cudaSuccess, "a launch failed");
    long n_wrong = 0;
    for (size_t i = 0; i < (size_t)n_tokens * n_rows; i++) {
        size_t token = i / n_rows, row = i % n_rows;
        int64_t sum = 0;
        for (size_t k = 0; k < n_k; k++)
            sum += all.codes[token * n_padded + k] * all.codes[(n_tokens + row) * n_padded + k];
        float number = (float)sum * p.scales[row] * all.scales[token], other = widened(before, i);
        if (p.bias != nullptr) number += p.bias[row];
        n_wrong += !check_same(output_alone(p, number, other, other), p.output[i]);
    }
    CHECK(n_wrong == 0, "%ld outputs of %u x %u over %u", n_wrong, n_tokens, n_rows, n_k);
}

/* Row by row and alone; given: what the input was; there: what the output was. */
static void check_norm_rows(const lmc_cuda_norm_t &norm, uint32_t n_outputs, const check_tensor_t &given,
                            const check_tensor_t &there) {
    uint32_t n_features = norm.n_features;
    std::vector<float> panel((size_t)n_features * LMC_LANES), wanted(panel.size());
    for (uint32_t row = 0; row < norm.n_rows; row++) {
        size_t at = (size_t)row * norm.stride, of_gains = row % norm.n_gains * n_features;
        for (uint32_t i = 0; i < n_features; i++)
            panel[i * LMC_LANES] = widened(given, at + i);
        for (uint32_t o = 0; o < n_outputs; o++) {
            const lmc_norm_rule_t rule = {norm.kind, norm.epsilon};
            lmc_transformer_kernels_serial.normalise(rule, panel.data(), n_features, norm.gains[o] + of_gains,
                                                     norm.biases[o] + of_gains, wanted.data());
            long n_wrong = 0;
            for (uint32_t i = 0; i < n_features; i++) {
                float y = wanted[i * LMC_LANES];
                if (norm.is_added) y = fmaf(y, norm.multiplier, widened(there, at + i));
                n_wrong += !check_same(y, norm.outputs[o][at + i]);
            }
            CHECK(n_wrong == 0, "%ld of %u features, row %u of %u", n_wrong, n_features, row, norm.n_rows);
        }
    }
}

/* is_long: of more features than shared memory holds at once. One norm of either kind, in place or not, with
 * gains that go around and gaps between rows, put upon what is there; or two at once. */
void check_norm(bool is_long) {
    uint32_t n_outputs = 1 + below(2);
    lmc_cuda_norm_t norm = {};
    norm.kind = below(2) ? LMC_NORM_LAYER : LMC_NORM_RMS;
    norm.n_rows = 1 + below(9);
    norm.n_features = is_long ? 2049 + below(3000) : 1 + below(300);
    norm.stride = norm.n_features + (n_outputs == 1 ? below(3) : 0);
    norm.n_gains = n_outputs == 1 ? 1 + below(3) : 1;
    norm.epsilon = 1e-5f;
    norm.multiplier = 0.22f;
    size_t n_gains = (size_t)norm.n_gains * norm.n_features, n = (size_t)norm.n_rows * norm.stride;
    check_tensor_t given(LMC_FLOAT32, n, 2.0f), input = given;
    check_tensor_t gains[2] = {{LMC_FLOAT32, n_gains, 1.0f}, {LMC_FLOAT32, n_gains, 1.0f}};
    check_tensor_t biases[2] = {{LMC_FLOAT32, n_gains, 1.0f}, {LMC_FLOAT32, n_gains, 1.0f}};
    check_tensor_t there(LMC_FLOAT32, n, 2.0f), outputs[2] = {there, there};
    norm.input = (const float *)input.at(0);
    for (uint32_t i = 0; i < n_outputs; i++) {
        norm.gains[i] = (const float *)gains[i].at(0);
        norm.biases[i] = (const float *)biases[i].at(0);
        norm.outputs[i] = (float *)outputs[i].at(0);
    }
    norm.is_added = n_outputs == 1 && below(2);
    bool is_in_place = n_outputs == 1 && !norm.is_added && below(2);
    if (is_in_place) norm.outputs[0] = (float *)input.at(0);
    CHECK(lmc_cuda_norm(norm, nullptr) == cudaSuccess, "a launch failed");
    check_norm_rows(norm, n_outputs, given, there);
}

/* Rows of any type with a gap between them, one of them spoiled. */
void check_softmax() {
    /* Half of the rows end at, before or after a block of 64. */
    uint32_t n_rows = 1 + below(20), n = below(2) ? 1 + below(400) : 64 * (1 + below(6)) + below(3) - 1,
             gap = below(9);
    check_tensor_t logits((lmc_dtype_t)below(LMC_DTYPE_COUNT), (size_t)n_rows * (n + gap), 12.0f);
    uint32_t bytes = lmc_element_bytes(logits.dtype), bad = below(2 * n_rows);
    std::vector<int64_t> targets(n_rows);
    for (int64_t &target : targets)
        target = below(n);
    if (bad < n_rows && below(2)) targets[bad] = n;
    if (bad < n_rows && targets[bad] < (int64_t)n) memset(logits.at(bad * (n + gap) + below(n)), 0x7F, bytes);
    if (bad < n_rows && targets[bad] < (int64_t)n && logits.dtype == LMC_FLOAT32)
        memset(logits.at(bad * (n + gap) + below(n)), 0xFF, bytes);
    std::vector<double> found(n_rows, 7.0);
    lmc_cuda_rows_t rows = {logits.at(0), 0, (int64_t)(n + gap) * bytes, n_rows, n_rows, n, logits.dtype};
    lmc_cuda_tokens_t tokens = {targets.data(), 0, 8, 8};
    uint64_t error = LMC_CUDA_NO_ERROR, wanted_error = LMC_CUDA_NO_ERROR;
    CHECK(lmc_cuda_log2_softmax(&rows, &tokens, found.data(), 3, &error, nullptr) == cudaSuccess,
          "a launch failed");
    for (uint32_t i = n_rows; i-- > 0;) {
        double wanted = 0.0;
        size_t unused;
        lmc_rows_t row = {logits.at((size_t)i * (n + gap)), 0, 1, n, logits.dtype};
        lmc_status_t status = lmc_log2_softmax(&check_serial, &row, &targets[i], &wanted, &unused);
        if (status != LMC_OK) wanted_error = (uint64_t)(i + 3) << 8 | status;
        CHECK(status == LMC_OK ? found[i] == wanted : found[i] != found[i], "row %u: %.17g, not %.17g", i,
              found[i], wanted);
    }
    CHECK(error == wanted_error, "error %llx", (unsigned long long)error);
}

/* Attention of a step alone: rings that have gone around, windows, caps, queries that share keys, more scores
 * than shared memory holds. */

/* Keys and values of one stream and head in the serial backend's layout; a slot that no query sees is NaN. */
struct check_ring_t {
    uint32_t head_dim, capacity;
    std::vector<float> keys, values;

    check_ring_t(uint32_t features, uint32_t slots)
        : head_dim(features), capacity(slots), keys((size_t)slots * features, NAN), values(keys) {
    }
    float &key(uint32_t slot, uint32_t feature) {
        return keys[(size_t)(slot / 16 * head_dim * 16) + feature * 16 + slot % 16];
    }
    float &value(uint32_t slot, uint32_t feature) {
        return values[(size_t)slot * head_dim + feature];
    }
    void fill(uint32_t first, uint32_t last) {
        for (uint32_t j = first; j <= last; j++) {
            for (uint32_t i = 0; i < head_dim; i++) {
                key(j % capacity, i) = (float)(check_bits() >> 40) * 0x1p-23f - 1.0f;
                value(j % capacity, i) = (float)(check_bits() >> 40) * 0x1p-23f - 1.0f;
            }
        }
    }
    /* To the device's layout. */
    void place(uint32_t n_quads, float *to_keys, float *to_values) {
        for (uint32_t slot = 0; slot < capacity; slot++) {
            for (uint32_t i = 0; i < n_quads * 4; i++) {
                size_t in_block = (slot / 32 * n_quads + i / 4) * 32 + slot % 32;
                to_keys[in_block * 4 + i % 4] = i < head_dim ? key(slot, i) : 0.0f;
                to_values[(size_t)slot * n_quads * 4 + i] = i < head_dim ? value(slot, i) : 0.0f;
            }
        }
    }
    std::vector<float> attend(const lmc_cuda_attention_t &a, const float *query, uint32_t position) {
        std::vector<float> scores(capacity + 32), output(head_dim);
        const lmc_attention_t attention = {keys.data(), values.data(), keys.data(), head_dim,
                                           capacity,    a.window,      a.softmax};
        lmc_transformer_kernels_serial.attend_stream(&attention, query, 1, position, scores.data(),
                                                     output.data());
        return output;
    }
};

static lmc_softmax_rule_t random_softmax(uint32_t head_dim) {
    float scale = LMC_LOG2_E / sqrtf((float)head_dim);
    return {scale, LMC_SOFTMAX_EXPONENT_FLOOR / scale, below(2) ? 0.3f : 0.0f};
}

static lmc_cuda_attention_t random_attention() {
    static const uint32_t head_dims[] = {3, 8, 64, 130};
    bool is_long = below(8) == 0;
    lmc_cuda_attention_t a = {};
    a.n_kv_heads = 1 + below(2);
    a.n_heads = a.n_kv_heads * (1 + below(is_long ? 4 : 7));
    a.head_dim = head_dims[below(is_long ? 2 : 4)];
    a.n_quads = (a.head_dim + 3) / 4;
    a.query_head = a.head_dim;
    a.query_row = a.n_heads * a.head_dim;
    a.n_rows = 1 + below(3);
    a.capacity = 32 * (1 + below(is_long ? 300 : 12));
    a.window = below(2) ? 1 + below(a.capacity - 1) : 0;
    a.softmax = random_softmax(a.head_dim);
    return a;
}

/* Puts keys and values of a row into the device's memory, and returns its outputs. */
static std::vector<float> attend_alone(const lmc_cuda_attention_t &a, uint32_t row, uint32_t position,
                                       bool takes_part) {
    uint32_t n_shared = a.n_heads / a.n_kv_heads;
    size_t of_head = (size_t)a.capacity * a.n_quads * 4;
    uint32_t first = a.window != 0 && position >= a.window ? position - a.window + 1 : 0;
    std::vector<float> outputs;
    for (uint32_t kv_head = 0; kv_head < a.n_kv_heads; kv_head++) {
        check_ring_t ring(a.head_dim, a.capacity);
        size_t at = (row * a.n_kv_heads + kv_head) * of_head;
        ring.fill(first, position);
        ring.place(a.n_quads, a.keys + at, a.values + at);
        for (uint32_t head = kv_head * n_shared; head < (kv_head + 1) * n_shared; head++) {
            std::vector<float> one(a.head_dim, 0.0f);
            const float *query = a.queries + (size_t)row * a.query_row + head * a.query_head;
            if (takes_part) one = ring.attend(a, query, position);
            outputs.insert(outputs.end(), one.begin(), one.end());
        }
    }
    return outputs;
}

void check_attend_step() {
    lmc_cuda_attention_t a = random_attention();
    uint32_t n_shared = a.n_heads / a.n_kv_heads;
    uint32_t n_queries = lmc_cuda_step_queries(a.n_heads, a.n_kv_heads, a.head_dim);
    size_t n_heads = (size_t)a.n_rows * a.n_kv_heads, n_keys = n_heads * a.capacity * a.n_quads * 4;
    size_t n_scores = n_heads * ((n_shared + n_queries - 1) / n_queries * n_queries) *
                      lmc_cuda_score_length(a.window, a.capacity);
    check_memory_t keys(n_keys * sizeof(float)), values(n_keys * sizeof(float)),
        scores(n_scores * sizeof(float));
    check_tensor_t queries(LMC_FLOAT32, a.n_rows * a.query_row, 1.0f), output = queries;
    a.keys = (float *)keys.data;
    a.values = (float *)values.data;
    a.scores = (float *)scores.data;
    a.queries = (float *)queries.at(0);
    a.output = (float *)output.at(0);
    std::vector<uint32_t> streams = {0, 1, 2}, positions;
    std::vector<float> wanted;
    for (uint32_t row = 0; row < a.n_rows; row++) {
        uint32_t position = a.window == 0 ? below(a.capacity) : below(3 * a.capacity);
        bool takes_part = below(5) != 0;
        positions.push_back(takes_part ? position : LMC_NO_POSITION);
        std::vector<float> one = attend_alone(a, row, position, takes_part);
        wanted.insert(wanted.end(), one.begin(), one.end());
    }
    a.row_streams = streams.data();
    a.row_positions = positions.data();
    CHECK(lmc_cuda_attend_step(a, nullptr) == cudaSuccess, "a launch failed");
    long n_wrong = 0;
    for (size_t i = 0; i < wanted.size(); i++)
        n_wrong += !check_same(wanted[i], a.output[i]);
    CHECK(n_wrong == 0, "%ld outputs of %u rows, %u heads of %u, %u key heads, capacity %u, window %u",
          n_wrong, a.n_rows, a.n_heads, a.head_dim, a.n_kv_heads, a.capacity, a.window);
}

/* For transformer_emulated.cpp: the switches of FORMAT.md, section 4.9, one by one and together at random,
 * and the written cases of transformer_cases.c with their hashes. */
#include <cuda_runtime.h>

#include "transformer_emulated.h"

static uint32_t below(uint32_t n) {
    return check_below(n);
}

static bool is_thrown() {
    return below(2) == 0;
}

/* n_sequences of n tokens each in one pass: logits [n_sequences][n][n_logits]. */
static std::vector<float> logits_of_pass(const check_model_t &model, const std::vector<int32_t> &tokens,
                                         uint32_t n_sequences, const char *name) {
    uint32_t n_rows = (uint32_t)tokens.size(), n = n_rows / n_sequences;
    std::vector<uint32_t> row_begin;
    for (uint32_t s = 0; s <= n_sequences; s++)
        row_begin.push_back(s * n);
    check_cache_t cache(model, 1, n_sequences, n);
    check_work_t work(model.config, n_rows);
    std::vector<float> logits(n_rows * model.config.n_logits);
    lmc_cuda_transformer_batch_t batch = {tokens.data(), row_begin.data(), nullptr, n_sequences, n_rows, n};
    uint64_t error = LMC_CUDA_NO_ERROR;
    lmc_cuda_transformer_pass(&model.placed, &batch, &cache.cache, &work.work, &error, nullptr);
    lmc_cuda_transformer_head(&model.placed, &work.work, 0, n_rows, logits.data(), nullptr);
    CHECK(error == LMC_CUDA_NO_ERROR, "%s: error %llx", name, (unsigned long long)error);
    return logits;
}

/* The first n tokens in stretches of at most n_together, or as many as may be, the last ones in steps,
 * against the logits of a pass. Of a layer with a window the keys go around their ring. */
static void check_pieces(const check_model_t &model, const int32_t *tokens, uint32_t n, uint32_t n_together,
                         const float *wanted, const char *name) {
    const uint32_t n_steps = 7;
    const size_t n_logits = model.config.n_logits;
    check_cache_t cache(model, (uint32_t)model.config.n_layers, 1, n);
    check_work_t work(model.config, n);
    std::vector<float> logits(n_logits);
    uint64_t error = LMC_CUDA_NO_ERROR;
    uint32_t most = min(n_together, lmc_cuda_transformer_stretch_max(&model.config, &cache.cache)), at = 0;
    while (at < n - n_steps) {
        uint32_t row_begin[2] = {0, min(most, n - n_steps - at)};
        lmc_cuda_transformer_batch_t batch = {&tokens[at], row_begin, nullptr, 1, row_begin[1], row_begin[1]};
        int status =
            lmc_cuda_transformer_pass(&model.placed, &batch, &cache.cache, &work.work, &error, nullptr);
        CHECK(status == cudaSuccess, "%s", name);
        lmc_cuda_transformer_head(&model.placed, &work.work, row_begin[1] - 1, 1, logits.data(), nullptr);
        at += row_begin[1];
        check_logits(logits.data(), wanted + (at - 1) * n_logits, 1, n_logits, name);
    }
    for (; at < n; at++) {
        lmc_cuda_transformer_step(&model.placed, &cache.cache, 1, nullptr, &tokens[at], logits.data(),
                                  &work.work, &error, nullptr);
        check_logits(logits.data(), wanted + at * n_logits, 1, n_logits, name);
    }
    CHECK(error == LMC_CUDA_NO_ERROR, "%s: error %llx", name, (unsigned long long)error);
}

/* One by one. A switch whose sizes go together sets them, too. */

static void group_queries(lmc_transformer_config_t &config, size_t n_kv_heads, size_t n_shared) {
    config.fused_qkv = 0;
    config.n_kv_heads = n_kv_heads;
    config.n_heads = n_kv_heads * n_shared;
}

static lmc_rotary_t random_rotary(const lmc_transformer_config_t &config, lmc_rotary_scaling_t scaling) {
    lmc_rotary_t rotary = {};
    rotary.dims = 2 * below((uint32_t)config.head_dim / 2 + 1);
    rotary.scaling = scaling;
    rotary.base = 10000.0;
    rotary.factor = 4.0;
    rotary.original_length = 16.0;
    rotary.low_factor = 1.0;
    rotary.high_factor = 4.0;
    rotary.beta_fast = 32.0;
    rotary.beta_slow = 1.0;
    rotary.attention_factor = is_thrown() ? 1.3 : 0.0;
    rotary.truncate = is_thrown();
    return rotary;
}

static void set_kinds(lmc_transformer_config_t &config, size_t n_kinds) {
    config.n_kinds = n_kinds;
    for (size_t i = 0; i < config.n_layers; i++)
        config.layer_kinds[i] = (uint8_t)(i % n_kinds);
}

typedef lmc_transformer_config_t config_t;
static const struct {
    const char *name;
    void (*change)(config_t &config);
} switches[] = {
    {"RMSNorm", [](config_t &c) { c.norm = LMC_NORM_RMS; }},
    {"gains of 1 + w", [](config_t &c) { c.norm_offset = 1; }},
    {"norms after", [](config_t &c) { c.parallel_residual = 0, c.pre_norm = 0, c.post_norm = 1; }},
    {"norms before and after", [](config_t &c) { c.parallel_residual = 0, c.post_norm = 1; }},
    {"one norm for both", [](config_t &c) { c.parallel_residual = c.shared_norm = 1; }},
    {"residual multiplier, parallel",
     [](config_t &c) { c.parallel_residual = 1, c.residual_multiplier = 0.22f; }},
    {"residual multiplier, sequential",
     [](config_t &c) { c.parallel_residual = 0, c.residual_multiplier = 0.22f; }},
    {"residual multiplier, norms after",
     [](config_t &c) { c.parallel_residual = 0, c.post_norm = 1, c.residual_multiplier = 0.22f; }},
    {"embedding multiplier", [](config_t &c) { c.embedding_multiplier = 6.0f; }},
    {"logits multiplier", [](config_t &c) { c.logits_multiplier = 0.125f; }},
    {"logits cap", [](config_t &c) { c.logits_cap = 3.0f; }},
    {"learned positions", [](config_t &c) { c.learned_positions = 1; }},
    {"head bias", [](config_t &c) { c.head_bias = 1; }},
    {"three maps for q, k and v", [](config_t &c) { c.fused_qkv = 0; }},
    {"clipping, fused", [](config_t &c) { c.qkv_clip = 0.75f; }},
    {"clipping, three maps", [](config_t &c) { c.fused_qkv = 0, c.qkv_clip = 0.75f; }},
    {"norm of heads, fused", [](config_t &c) { c.qk_norm = LMC_QK_NORM_HEAD; }},
    {"norm of heads", [](config_t &c) { c.fused_qkv = 0, c.qk_norm = LMC_QK_NORM_HEAD; }},
    {"norm of each head, fused", [](config_t &c) { c.qk_norm = LMC_QK_NORM_EACH_HEAD; }},
    {"norm of each head, grouped",
     [](config_t &c) { group_queries(c, 2, 2), c.qk_norm = LMC_QK_NORM_EACH_HEAD; }},
    {"norm of all heads, grouped", [](config_t &c) { group_queries(c, 2, 2), c.qk_norm = LMC_QK_NORM_FULL; }},
    {"two queries a key", [](config_t &c) { group_queries(c, 2, 2); }},
    {"three queries a key", [](config_t &c) { group_queries(c, 1, 3); }},
    {"seven queries a key", [](config_t &c) { group_queries(c, 2, 7); }},
    {"heads of their own size", [](config_t &c) { c.hidden += 5; }},
    {"attention divisor", [](config_t &c) { c.attention_divisor = 24.0; }},
    {"attention multiplier", [](config_t &c) { c.attention_multiplier = 0.25; }},
    {"score cap", [](config_t &c) { c.score_cap = 2.0f; }},
    {"a window of one", [](config_t &c) { c.kinds[0].window = 1; }},
    {"a window", [](config_t &c) { c.kinds[0].window = 9; }},
    {"a window, grouped", [](config_t &c) { group_queries(c, 2, 3), c.kinds[0].window = 33; }},
    {"two kinds of layers",
     [](config_t &c) {
         set_kinds(c, 2);
         c.kinds[0].window = 7;
         c.kinds[1].rotary = random_rotary(c, LMC_ROTARY_LINEAR);
     }},
    {"llama3 positions", [](config_t &c) { c.kinds[0].rotary = random_rotary(c, LMC_ROTARY_LLAMA3); }},
    {"yarn positions", [](config_t &c) { c.kinds[0].rotary = random_rotary(c, LMC_ROTARY_YARN); }},
    {"no positions", [](config_t &c) { c.kinds[0].rotary.dims = 0; }},
    {"tanh GELU", [](config_t &c) { c.activation = LMC_ACTIVATION_GELU_TANH; }},
    {"SiLU", [](config_t &c) { c.activation = LMC_ACTIVATION_SILU; }},
    {"ReLU", [](config_t &c) { c.activation = LMC_ACTIVATION_RELU; }},
    {"squared ReLU", [](config_t &c) { c.activation = LMC_ACTIVATION_RELU_SQUARED; }},
    {"xIELU", [](config_t &c) { c.activation = LMC_ACTIVATION_XIELU; }},
    {"gated GELU", [](config_t &c) { c.gated = 1; }},
    {"gated tanh GELU", [](config_t &c) { c.gated = 1, c.activation = LMC_ACTIVATION_GELU_TANH; }},
    {"gated SiLU", [](config_t &c) { c.gated = 1, c.activation = LMC_ACTIVATION_SILU; }},
};

void check_each_switch() {
    const uint32_t n = 45;
    emulated_machine.n_processors = 1 + (int)below(20);
    for (const auto &one : switches) {
        for (int int8 = 0; int8 < 2; int8++) {
            config_t config = check_random_neox(2 + below(10), n);
            config.int8 = int8;
            one.change(config);
            check_model_t model(config);
            std::vector<int32_t> tokens;
            std::vector<float> wanted;
            for (uint32_t sequence = 0; sequence < 2; sequence++) {
                check_history_t history;
                while (history.size() < n)
                    history.push_back(below((uint32_t)config.n_embeddings));
                tokens.insert(tokens.end(), history.begin(), history.end());
                std::vector<float> logits = model.logits_of(history);
                wanted.insert(wanted.end(), logits.begin(), logits.end());
            }
            std::vector<float> found = logits_of_pass(model, tokens, 2, one.name);
            check_logits(found.data(), wanted.data(), tokens.size(), config.n_logits, one.name);
            check_pieces(model, tokens.data(), n, 20, wanted.data(), one.name);
        }
    }
}

/* Together. */

static void throw_attention_switches(config_t &config) {
    config.fused_qkv = below(3) == 0;
    if (!config.fused_qkv) group_queries(config, 1 + below(2), 1 + below(below(3) == 0 ? 7 : 3));
    config.qk_norm = (lmc_qk_norm_t)below(LMC_QK_NORM_FULL + (config.fused_qkv ? 0 : 1));
    config.qkv_clip = below(4) == 0 ? 0.75f : 0.0f;
    config.attention_divisor = is_thrown() ? (double)config.head_dim : 5.0;
    config.attention_multiplier = below(4) == 0 ? 0.25 : 0.0;
    config.score_cap = below(3) == 0 ? 2.0f : 0.0f;
    set_kinds(config, 1 + below(3));
    for (size_t i = 0; i < config.n_kinds; i++) {
        config.kinds[i].rotary = random_rotary(config, (lmc_rotary_scaling_t)below(LMC_ROTARY_YARN + 1));
        config.kinds[i].window = is_thrown() ? 1 + below((uint32_t)config.context_length + 5) : 0;
    }
}

void check_throw_switches(config_t &config) {
    config.hidden = is_thrown() ? config.hidden : 1 + below(70);
    config.learned_positions = below(4) == 0;
    config.head_bias = below(4) == 0;
    config.embedding_multiplier = is_thrown() ? 1.0f : 2.5f;
    config.residual_multiplier = is_thrown() ? 1.0f : 0.22f;
    config.logits_multiplier = is_thrown() ? 1.0f : 0.125f;
    config.logits_cap = below(3) == 0 ? 3.0f : 0.0f;
    config.norm = is_thrown() ? LMC_NORM_RMS : LMC_NORM_LAYER;
    config.norm_offset = below(4) == 0;
    config.parallel_residual = below(3) == 0;
    config.shared_norm = config.parallel_residual && is_thrown();
    config.post_norm = !config.parallel_residual && is_thrown();
    config.pre_norm = !config.post_norm || is_thrown();
    config.activation = (lmc_activation_t)below(LMC_ACTIVATION_XIELU + 1);
    config.gated = is_thrown();
    throw_attention_switches(config);
}

/* The written cases. */

/* A longer stretch would put keys where others are still seen: it is refused. */
static void check_too_long_a_stretch(const check_model_t &model, const std::vector<int32_t> &tokens) {
    const uint32_t n = LMC_CUDA_STRETCH_TOKENS + 1, row_begin[2] = {0, n};
    check_cache_t cache(model, (uint32_t)model.config.n_layers, 1, CHECK_TOKENS_MAX);
    check_work_t work(model.config, n);
    uint64_t error = LMC_CUDA_NO_ERROR;
    lmc_cuda_transformer_batch_t batch = {tokens.data(), row_begin, nullptr, 1, n, n};
    CHECK(lmc_cuda_transformer_stretch_max(&model.config, &cache.cache) == n - 1, "of rings");
    int status = lmc_cuda_transformer_pass(&model.placed, &batch, &cache.cache, &work.work, &error, nullptr);
    CHECK(status == cudaErrorInvalidValue, "status %d", status);
}

void check_written_cases() {
    emulated_machine.n_processors = 7;
    for (size_t i = 0; i < check_n_cases; i++) {
        const check_case_t &c = check_cases[i];
        const config_t config = check_case_config(&c);
        lmc_transformer_layer_t layers[2];
        uint64_t random = CHECK_CASE_SEED;
        lmc_transformer_weights_t weights = check_case_weights(&c, &random, &config, layers);
        std::vector<int64_t> drawn(CHECK_SEQUENCES * c.n_tokens);
        check_case_tokens(&c, &random, drawn.data());
        std::vector<int32_t> tokens(drawn.begin(), drawn.end());
        {
            check_model_t model(config, weights);
            std::vector<float> logits = logits_of_pass(model, tokens, CHECK_SEQUENCES, c.name);
            uint64_t hash = check_case_hash(logits.data(), logits.size());
            CHECK(hash == c.hash, "%s: pass gives %016llx", c.name, (unsigned long long)hash);
            check_pieces(model, tokens.data(), (uint32_t)c.n_tokens, CHECK_TOKENS_MAX, logits.data(), c.name);
            if (c.n_tokens == CHECK_TOKENS_MAX) check_too_long_a_stretch(model, tokens);
        }
        check_case_weights_free(&config, &weights);
    }
}

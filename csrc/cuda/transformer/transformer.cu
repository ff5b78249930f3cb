/* The exact engine's entry points on a CUDA device: what they check, how they cut the caller's memory, and
 * the order of the kernels. No kernel and no arithmetic of its own lives here. */
#if !defined(_Static_assert)
#define _Static_assert static_assert /* C's, in the header of the core */
#endif
extern "C" {
#include "core/base/size.h"
#include "core/transformer/forward.h"
}
#include "cuda/transformer/launch.h"

namespace {

constexpr size_t PIECE_BYTES = 16;
constexpr uint32_t KEY_BLOCK = 32;

/* Runs CALL unless something failed before it. */
#define LMC_THEN(STATUS, CALL)                                                                               \
    do {                                                                                                     \
        if ((STATUS) == cudaSuccess) (STATUS) = (CALL);                                                      \
    } while (0)

template <typename T> T *cut(lmc_arena_t &arena, size_t n) {
    return (T *)lmc_arena_cut(&arena, n, sizeof(T));
}

uint32_t quads_of_head(const lmc_transformer_config_t &config) {
    return (uint32_t)((config.head_dim + 3) / 4);
}

/* Tokens of a stream that a layer keeps: with a window that, and room for what a pass brings at a time, where
 * the cache has every layer's own keys. */
uint32_t kept_tokens(const lmc_transformer_config_t &config, size_t layer,
                     const lmc_cuda_transformer_cache_t &cache) {
    size_t window = config.kinds[config.layer_kinds[layer]].window;
    size_t kept = lmc_round_up(window + LMC_CUDA_STRETCH_TOKENS, KEY_BLOCK);
    return window != 0 && cache.n_layers > 1 && kept < cache.capacity ? (uint32_t)kept : cache.capacity;
}

/* Floats of the keys, or of the values, of one layer. */
size_t layer_floats(const lmc_transformer_config_t &config, size_t layer,
                    const lmc_cuda_transformer_cache_t &cache) {
    return (size_t)cache.n_streams * config.n_kv_heads * kept_tokens(config, layer, cache) *
           quads_of_head(config) * 4;
}

size_t floats_before(const lmc_transformer_config_t &config, size_t layer,
                     const lmc_cuda_transformer_cache_t &cache) {
    size_t n_floats = 0;
    for (size_t i = 0; i < layer % cache.n_layers; i++)
        n_floats += layer_floats(config, i, cache);
    return n_floats;
}

uint32_t score_length(const lmc_transformer_config_t &config, size_t layer,
                      const lmc_cuda_transformer_cache_t &cache) {
    size_t window = config.kinds[config.layer_kinds[layer]].window;
    uint32_t kept = kept_tokens(config, layer, cache);
    return lmc_cuda_score_length(window < kept ? (uint32_t)window : 0, kept);
}

/* Floats of the scores of a step that do not fit shared memory, of the layer that has the most. */
size_t score_floats(const lmc_transformer_config_t &config, const lmc_cuda_transformer_cache_t &cache) {
    uint32_t n_queries = lmc_cuda_step_queries((uint32_t)config.n_heads, (uint32_t)config.n_kv_heads,
                                               (uint32_t)config.head_dim);
    size_t n_shared = config.n_heads / config.n_kv_heads, longest = 0;
    for (size_t layer = 0; layer < config.n_layers; layer++) {
        uint32_t length = score_length(config, layer, cache);
        bool are_shared = lmc_cuda_scores_are_shared(n_queries, quads_of_head(config), length);
        if (!are_shared && length > longest) longest = length;
    }
    return cache.n_streams * config.n_kv_heads * lmc_round_up(n_shared, n_queries) * longest;
}

size_t cut_cache(const lmc_transformer_config_t &config, void *memory, lmc_cuda_transformer_cache_t *cache) {
    lmc_arena_t arena = {(char *)memory, 0, LMC_DEVICE_ALIGNMENT};
    size_t n_floats = 0, n_scores = cache->n_layers == config.n_layers ? score_floats(config, *cache) : 0;
    for (size_t layer = 0; layer < cache->n_layers; layer++)
        n_floats += layer_floats(config, layer, *cache);
    cache->positions = cut<uint32_t>(arena, cache->n_streams);
    cache->keys = cut<float>(arena, n_floats);
    cache->values = cut<float>(arena, n_floats);
    cache->scores = n_scores > 0 ? cut<float>(arena, n_scores) : nullptr;
    return arena.used_bytes;
}

size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

size_t cut_work(const lmc_transformer_config_t &config, void *memory, lmc_cuda_transformer_work_t *work) {
    lmc_arena_t arena = {(char *)memory, 0, LMC_DEVICE_ALIGNMENT};
    size_t n = work->n_rows, hidden = config.hidden;
    bool has_two_norms = config.parallel_residual && !config.shared_norm;
    work->hidden = cut<float>(arena, n * hidden);
    work->normed = cut<float>(arena, n * hidden);
    work->normed_mlp = has_two_norms ? cut<float>(arena, n * hidden) : work->normed;
    work->wide = cut<float>(arena, n * larger(lmc_qkv_width(&config), config.intermediate));
    work->attended = cut<float>(arena, n * lmc_query_width(&config));
    work->residual = cut<float>(arena, n * hidden);
    work->row_streams = cut<uint32_t>(arena, n);
    work->row_positions = cut<uint32_t>(arena, n);
    work->is_active = cut<uint8_t>(arena, n);
    work->error = cut<uint64_t>(arena, 1);
    work->codes = config.int8 ? cut<int8_t>(arena, n * lmc_int8_padded(lmc_longest_input(&config))) : nullptr;
    work->code_scales = config.int8 ? cut<float>(arena, n) : nullptr;
    return arena.used_bytes;
}

uint32_t usable_positions(const lmc_transformer_config_t &config, const lmc_cuda_transformer_cache_t &cache) {
    return config.context_length < cache.capacity ? (uint32_t)config.context_length : cache.capacity;
}

/* The layers. */

/* What a pass or a step runs on, and how its queries meet the keys: row_begin of a pass, NULL of a step. */
struct forward_t {
    const lmc_transformer_model_t &model;
    const lmc_cuda_transformer_cache_t &cache;
    const lmc_cuda_transformer_work_t &work;
    uint32_t n_rows;
    const uint32_t *row_begin;
    uint32_t n_stretches, n_longest;
    lmc_cuda_stream_t stream;
};

lmc_cuda_product_t linear(const forward_t &f, const lmc_transformer_tensor_t &weight, const float *bias,
                          size_t n_rows, size_t n_k, const float *input, float *output) {
    lmc_cuda_product_t product = {};
    product.weights = weight.data;
    product.dtype = weight.dtype;
    product.input = input;
    product.bias = bias;
    product.output = output;
    product.n_tokens = f.n_rows;
    product.n_rows = (uint32_t)n_rows;
    product.n_k = (uint32_t)n_k;
    product.scales = weight.scales;
    return product;
}

lmc_cuda_product_t linear_of_layer(const forward_t &f, size_t layer, lmc_layer_slot_t weight,
                                   lmc_layer_slot_t bias, const float *input, float *output) {
    lmc_shape_t shape = lmc_layer_slot_shape(&f.model.config, weight);
    return linear(f, f.model.weights.layers[layer].slots[weight], lmc_layer_vector(&f.model, layer, bias),
                  shape.n_rows, shape.n_columns, input, output);
}

/* has_codes: the product before had the same input. */
cudaError_t multiply(const forward_t &f, const lmc_cuda_product_t &product, bool has_codes = false) {
    if (product.scales == nullptr) return lmc_cuda_product(product, f.stream);
    lmc_cuda_codes_t codes = {f.work.codes, f.work.code_scales};
    cudaError_t status = cudaSuccess;
    if (!has_codes)
        status = lmc_cuda_int8_quantise(product.input, LMC_FLOAT32, product.n_tokens, product.n_k, codes,
                                        f.stream);
    LMC_THEN(status, lmc_cuda_int8_product(product, codes, f.stream));
    return status;
}

/* A norm of the state, all its features. */
lmc_cuda_norm_t norm_of(const forward_t &f, const float *gain, const float *bias, float *output) {
    const lmc_transformer_config_t &config = f.model.config;
    lmc_cuda_norm_t norm = {};
    norm.kind = config.norm;
    norm.input = f.work.hidden;
    norm.n_rows = f.n_rows;
    norm.n_features = norm.stride = (uint32_t)config.hidden;
    norm.n_gains = 1;
    norm.epsilon = config.norm_epsilon;
    norm.gains[0] = gain;
    norm.biases[0] = bias;
    norm.outputs[0] = output;
    return norm;
}

lmc_cuda_norm_t norm_of_layer(const forward_t &f, size_t layer, lmc_layer_slot_t gain, lmc_layer_slot_t bias,
                              float *output) {
    return norm_of(f, lmc_layer_vector(&f.model, layer, gain), lmc_layer_vector(&f.model, layer, bias),
                   output);
}

/* state = fma(y, residual_multiplier, state), with y the output of a linear map of the layer, or its norm. */
cudaError_t add_to_state(const forward_t &f, lmc_cuda_product_t product, size_t layer, lmc_layer_slot_t gain,
                         lmc_layer_slot_t bias) {
    const lmc_transformer_config_t &config = f.model.config;
    if (!config.post_norm) {
        product.output = f.work.hidden;
        product.addends[1] = f.work.hidden;
        product.multiplier = config.residual_multiplier;
        return multiply(f, product);
    }
    product.output = f.work.residual;
    cudaError_t status = multiply(f, product);
    lmc_cuda_norm_t norm = norm_of_layer(f, layer, gain, bias, f.work.hidden);
    norm.input = f.work.residual;
    norm.is_added = true;
    norm.multiplier = config.residual_multiplier;
    LMC_THEN(status, lmc_cuda_norm(norm, f.stream));
    return status;
}

lmc_cuda_attention_t attention_of_layer(const forward_t &f, size_t layer) {
    const lmc_transformer_config_t &config = f.model.config;
    size_t offset = floats_before(config, layer, f.cache), kind = config.layer_kinds[layer];
    size_t of_queries = lmc_query_width(&config), of_keys = config.n_kv_heads * config.head_dim;
    uint32_t head_dim = (uint32_t)config.head_dim;
    lmc_cuda_attention_t attention = {};
    attention.keys = f.cache.keys + offset;
    attention.values = f.cache.values + offset;
    attention.queries = f.work.wide;
    attention.new_keys = f.work.wide + (config.fused_qkv ? head_dim : f.n_rows * of_queries);
    attention.new_values = attention.new_keys + (config.fused_qkv ? head_dim : f.n_rows * of_keys);
    attention.query_head = attention.key_head = config.fused_qkv ? 3 * head_dim : head_dim;
    attention.query_row = attention.query_head * (uint32_t)config.n_heads;
    attention.key_row = attention.key_head * (uint32_t)config.n_kv_heads;
    attention.output = f.work.attended;
    attention.scores = f.cache.scores;
    attention.row_streams = f.work.row_streams;
    attention.row_positions = f.work.row_positions;
    attention.cosines = f.model.cosines[kind];
    attention.sines = f.model.sines[kind];
    attention.table_length = (uint32_t)f.model.table_length;
    attention.n_pairs = (uint32_t)config.kinds[kind].rotary.dims / 2;
    attention.n_rows = f.n_rows;
    attention.n_heads = (uint32_t)config.n_heads;
    attention.n_kv_heads = (uint32_t)config.n_kv_heads;
    attention.head_dim = head_dim;
    attention.n_quads = quads_of_head(config);
    attention.capacity = kept_tokens(config, layer, f.cache);
    attention.n_positions = usable_positions(config, f.cache);
    /* One that no stream outgrows is none. */
    size_t window = config.kinds[kind].window;
    attention.window = window < attention.capacity ? (uint32_t)window : 0;
    attention.softmax = f.model.softmax;
    return attention;
}

/* Norms of queries or keys, in place: of each of n_heads heads, or of all together. */
cudaError_t norm_heads(const forward_t &f, size_t layer, lmc_layer_slot_t gain, lmc_layer_slot_t bias,
                       float *heads, uint32_t n_heads, uint32_t head_floats) {
    const lmc_transformer_config_t &config = f.model.config;
    bool are_together = config.qk_norm == LMC_QK_NORM_FULL;
    lmc_cuda_norm_t norm = norm_of_layer(f, layer, gain, bias, heads);
    norm.input = heads;
    norm.n_rows = are_together ? f.n_rows : f.n_rows * n_heads;
    norm.n_features = (uint32_t)config.head_dim * (are_together ? n_heads : 1);
    norm.stride = are_together ? norm.n_features : head_floats;
    norm.n_gains = config.qk_norm == LMC_QK_NORM_EACH_HEAD ? n_heads : 1;
    return lmc_cuda_norm(norm, f.stream);
}

/* Queries, keys and values of a layer, biases added, clipped and normalised, where attention wants them. */
cudaError_t project(const forward_t &f, size_t layer, const float *input, const lmc_cuda_attention_t &to) {
    const lmc_transformer_config_t &config = f.model.config;
    float *keys = (float *)to.new_keys, *values = (float *)to.new_values;
    auto map = [&](lmc_layer_slot_t weight, lmc_layer_slot_t bias, float *output) {
        lmc_cuda_product_t product = linear_of_layer(f, layer, weight, bias, input, output);
        product.with_finish = config.qkv_clip != 0.0f;
        product.finish.clip = config.qkv_clip;
        return multiply(f, product, weight == LMC_LAYER_K || weight == LMC_LAYER_V);
    };
    cudaError_t status = config.fused_qkv ? map(LMC_LAYER_QKV, LMC_LAYER_QKV_BIAS, to.queries)
                                          : map(LMC_LAYER_Q, LMC_LAYER_Q_BIAS, to.queries);
    if (!config.fused_qkv) {
        LMC_THEN(status, map(LMC_LAYER_K, LMC_LAYER_K_BIAS, keys));
        LMC_THEN(status, map(LMC_LAYER_V, LMC_LAYER_V_BIAS, values));
    }
    if (config.qk_norm == LMC_QK_NORM_NONE) return status;
    LMC_THEN(status, norm_heads(f, layer, LMC_LAYER_Q_NORM_GAIN, LMC_LAYER_Q_NORM_BIAS, to.queries,
                                to.n_heads, to.query_head));
    LMC_THEN(status, norm_heads(f, layer, LMC_LAYER_K_NORM_GAIN, LMC_LAYER_K_NORM_BIAS, keys, to.n_kv_heads,
                                to.key_head));
    return status;
}

/* work.attended. Both norms of a layer with parallel residuals have the same input, hence the same mean and
 * factor. */
cudaError_t run_attention(const forward_t &f, size_t layer) {
    const lmc_transformer_config_t &config = f.model.config;
    cudaError_t status = cudaSuccess;
    if (config.pre_norm) {
        lmc_cuda_norm_t norm = norm_of_layer(f, layer, LMC_LAYER_ATTENTION_NORM_GAIN,
                                             LMC_LAYER_ATTENTION_NORM_BIAS, f.work.normed);
        if (config.parallel_residual && !config.shared_norm) {
            norm.gains[1] = lmc_layer_vector(&f.model, layer, LMC_LAYER_MLP_NORM_GAIN);
            norm.biases[1] = lmc_layer_vector(&f.model, layer, LMC_LAYER_MLP_NORM_BIAS);
            norm.outputs[1] = f.work.normed_mlp;
        }
        status = lmc_cuda_norm(norm, f.stream);
    }
    lmc_cuda_attention_t attention = attention_of_layer(f, layer);
    LMC_THEN(status, project(f, layer, config.pre_norm ? f.work.normed : f.work.hidden, attention));
    LMC_THEN(status, lmc_cuda_attention_place(attention, f.stream));
    if (f.row_begin != nullptr)
        LMC_THEN(status, lmc_cuda_attend_pass(attention, f.row_begin, f.n_stretches, f.n_longest, f.stream));
    else
        LMC_THEN(status, lmc_cuda_attend_step(attention, f.stream));
    return status;
}

/* work.wide = act(up(input)), or act(gate(input)) * up(input). */
cudaError_t run_wide(const forward_t &f, size_t layer, const float *input) {
    const lmc_transformer_config_t &config = f.model.config;
    lmc_cuda_product_t up = linear_of_layer(f, layer, LMC_LAYER_UP, LMC_LAYER_UP_BIAS, input, f.work.wide);
    lmc_cuda_product_t gate =
        linear_of_layer(f, layer, LMC_LAYER_GATE, LMC_LAYER_GATE_BIAS, input, f.work.wide);
    lmc_cuda_product_t &last = config.gated ? gate : up;
    last.with_gelu = !config.gated && config.activation == LMC_ACTIVATION_GELU;
    last.with_finish = !last.with_gelu;
    last.finish.is_activated = true;
    last.finish.activation = config.activation;
    last.finish.factors = config.gated ? f.work.wide : nullptr;
    if (config.activation == LMC_ACTIVATION_XIELU)
        last.finish.xielu = lmc_layer_vector(&f.model, layer, LMC_LAYER_ACTIVATION);
    cudaError_t status = multiply(f, up);
    if (config.gated) LMC_THEN(status, multiply(f, gate, true));
    return status;
}

/* Parallel: x = fma(mlp(x) + attention, multiplier, x). Sequential: x = fma(attention, multiplier, x), then
 * the same of mlp(x). */
cudaError_t run_mlp(const forward_t &f, size_t layer) {
    const lmc_transformer_config_t &config = f.model.config;
    lmc_cuda_product_t out =
        linear_of_layer(f, layer, LMC_LAYER_OUT, LMC_LAYER_OUT_BIAS, f.work.attended, f.work.residual);
    lmc_cuda_product_t down =
        linear_of_layer(f, layer, LMC_LAYER_DOWN, LMC_LAYER_DOWN_BIAS, f.work.wide, f.work.hidden);
    cudaError_t status;
    if (config.parallel_residual) {
        status = multiply(f, out);
        down.addends[0] = f.work.residual;
    } else {
        status = add_to_state(f, out, layer, LMC_LAYER_ATTENTION_POST_NORM_GAIN,
                              LMC_LAYER_ATTENTION_POST_NORM_BIAS);
        if (config.pre_norm)
            LMC_THEN(status, lmc_cuda_norm(norm_of_layer(f, layer, LMC_LAYER_MLP_NORM_GAIN,
                                                         LMC_LAYER_MLP_NORM_BIAS, f.work.normed_mlp),
                                           f.stream));
    }
    LMC_THEN(status, run_wide(f, layer, config.pre_norm ? f.work.normed_mlp : f.work.hidden));
    LMC_THEN(status,
             add_to_state(f, down, layer, LMC_LAYER_MLP_POST_NORM_GAIN, LMC_LAYER_MLP_POST_NORM_BIAS));
    return status;
}

cudaError_t run_layers(const forward_t &f, const int32_t *tokens, uint64_t *token_error) {
    const lmc_transformer_config_t &config = f.model.config;
    lmc_cuda_embedding_t embedding = {f.model.weights.slots[LMC_MODEL_EMBEDDING],
                                      f.model.weights.slots[LMC_MODEL_POSITIONS],
                                      config.embedding_multiplier,
                                      (uint32_t)config.n_embeddings,
                                      (uint32_t)config.context_length,
                                      (uint32_t)config.hidden,
                                      f.n_rows,
                                      f.work.hidden};
    cudaError_t status = lmc_cuda_embed(embedding, tokens, f.work.row_positions, token_error, f.stream);
    for (size_t layer = 0; layer < config.n_layers; layer++) {
        LMC_THEN(status, run_attention(f, layer));
        LMC_THEN(status, run_mlp(f, layer));
    }
    return status;
}

/* Is the configuration one that the launchers take, and the call within what its memory was cut for? */
bool is_fitting(const lmc_transformer_model_t *model, const lmc_cuda_transformer_work_t *work,
                uint32_t n_rows) {
    return lmc_cuda_transformer_config_check(&model->config) == LMC_OK && n_rows <= work->n_rows;
}

} // namespace

lmc_status_t lmc_cuda_transformer_config_check(const lmc_transformer_config_t *config) {
    lmc_status_t status = lmc_transformer_config_check(config);
    if (status != LMC_OK) return status;
    bool fits = config->head_dim <= LMC_CUDA_HEAD_DIM_MAX &&
                !(config->fused_qkv && config->qk_norm == LMC_QK_NORM_FULL);
    return fits ? LMC_OK : LMC_ERROR_ARGUMENT;
}

lmc_status_t lmc_cuda_transformer_model_prepare(const lmc_transformer_config_t *config,
                                                const lmc_transformer_weights_t *weights, void *tables,
                                                size_t tables_bytes, lmc_transformer_model_t *model) {
    static const lmc_backend_t serial = {"serial", lmc_row_kernels_serial, &lmc_transformer_kernels_serial,
                                         nullptr};
    const lmc_context_t context = {&serial, nullptr};
    lmc_status_t status = lmc_cuda_transformer_config_check(config);
    if (status != LMC_OK) return status;
    /* The tables are the same for both arithmetics, and the matrices are not codes yet. */
    lmc_transformer_config_t of_tables = *config;
    of_tables.int8 = 0;
    status = lmc_transformer_model_init(&context, &of_tables, weights, tables, tables_bytes, model);
    if (status == LMC_OK) model->config.int8 = config->int8;
    return status;
}

size_t lmc_cuda_int8_weights_bytes(size_t n_rows, size_t n_k) {
    return lmc_round_up(n_rows * sizeof(float), PIECE_BYTES) + n_rows * lmc_int8_padded(n_k);
}

int lmc_cuda_int8_weights_quantise(const lmc_transformer_tensor_t *matrix, size_t n_rows, size_t n_k,
                                   void *memory, lmc_transformer_tensor_t *quantised,
                                   lmc_cuda_stream_t stream) {
    int8_t *codes = (int8_t *)memory + lmc_round_up(n_rows * sizeof(float), PIECE_BYTES);
    *quantised = lmc_transformer_tensor_t{codes, LMC_FLOAT32, (float *)memory};
    return lmc_cuda_int8_quantise(matrix->data, matrix->dtype, (uint32_t)n_rows, (uint32_t)n_k,
                                  lmc_cuda_codes_t{codes, (float *)memory}, stream);
}

void lmc_cuda_transformer_model_place(const lmc_transformer_model_t *model,
                                      const lmc_transformer_weights_t *weights, const void *device_tables,
                                      lmc_transformer_model_t *placed) {
    *placed = *model;
    placed->weights = *weights;
    placed->vectors = (float *)device_tables;
    for (size_t kind = 0; kind < model->config.n_kinds; kind++) {
        placed->cosines[kind] = placed->vectors + (model->cosines[kind] - model->vectors);
        placed->sines[kind] = placed->vectors + (model->sines[kind] - model->vectors);
    }
}

size_t lmc_cuda_transformer_cache_bytes(const lmc_transformer_config_t *config, uint32_t n_layers,
                                        uint32_t n_streams, uint32_t n_tokens) {
    lmc_cuda_transformer_cache_t cache = {};
    cache.n_layers = n_layers;
    cache.n_streams = n_streams;
    cache.capacity = (uint32_t)lmc_round_up(n_tokens, KEY_BLOCK);
    return cut_cache(*config, nullptr, &cache);
}

int lmc_cuda_transformer_cache_init(const lmc_transformer_config_t *config, uint32_t n_layers,
                                    uint32_t n_streams, uint32_t n_tokens, void *memory,
                                    lmc_cuda_transformer_cache_t *cache, lmc_cuda_stream_t stream) {
    if (n_layers == 0 || n_layers > config->n_layers || n_streams == 0 || n_tokens == 0 ||
        n_tokens > config->context_length || lmc_cuda_transformer_config_check(config) != LMC_OK)
        return cudaErrorInvalidValue;
    cache->n_layers = n_layers;
    cache->n_streams = n_streams;
    cache->capacity = (uint32_t)lmc_round_up(n_tokens, KEY_BLOCK);
    cut_cache(*config, memory, cache);
    return cudaMemsetAsync(cache->positions, 0, n_streams * sizeof *cache->positions, stream);
}

uint32_t lmc_cuda_transformer_stretch_max(const lmc_transformer_config_t *config,
                                          const lmc_cuda_transformer_cache_t *cache) {
    for (size_t layer = 0; layer < config->n_layers; layer++)
        if (kept_tokens(*config, layer, *cache) < cache->capacity) return LMC_CUDA_STRETCH_TOKENS;
    return cache->capacity;
}

size_t lmc_cuda_transformer_work_bytes(const lmc_transformer_config_t *config, uint32_t n_rows) {
    lmc_cuda_transformer_work_t work = {};
    work.n_rows = n_rows;
    return cut_work(*config, nullptr, &work);
}

void lmc_cuda_transformer_work_init(const lmc_transformer_config_t *config, uint32_t n_rows, void *memory,
                                    lmc_cuda_transformer_work_t *work) {
    work->n_rows = n_rows;
    cut_work(*config, memory, work);
}

int lmc_cuda_transformer_pass(const lmc_transformer_model_t *model, const lmc_cuda_transformer_batch_t *batch,
                              const lmc_cuda_transformer_cache_t *cache,
                              const lmc_cuda_transformer_work_t *work, uint64_t *error,
                              lmc_cuda_stream_t stream) {
    if (!is_fitting(model, work, batch->n_rows)) return cudaErrorInvalidValue;
    if (batch->n_rows == 0) return cudaSuccess;
    bool keeps_positions = cache->n_layers == model->config.n_layers;
    if (!keeps_positions && cache->n_layers != 1) return cudaErrorInvalidValue;
    /* Rows without room in the cache are reported one by one, unless they would overwrite needed keys. */
    uint32_t most = lmc_cuda_transformer_stretch_max(&model->config, cache);
    if (most < cache->capacity && batch->n_longest > most) return cudaErrorInvalidValue;
    forward_t f = {*model,           *cache, *work, batch->n_rows, batch->row_begin, batch->n_stretches,
                   batch->n_longest, stream};
    cudaError_t status = lmc_cuda_rows_of_pass(*batch, *cache, keeps_positions,
                                               usable_positions(model->config, *cache), *work, error, stream);
    LMC_THEN(status, run_layers(f, batch->tokens, error));
    return status;
}

int lmc_cuda_transformer_head(const lmc_transformer_model_t *model, const lmc_cuda_transformer_work_t *work,
                              uint32_t first_row, uint32_t n_rows, float *logits, lmc_cuda_stream_t stream) {
    const lmc_transformer_config_t &config = model->config;
    if (n_rows > work->n_rows || first_row > work->n_rows - n_rows) return cudaErrorInvalidValue;
    if (n_rows == 0) return cudaSuccess;
    const lmc_cuda_transformer_cache_t no_cache = {};
    forward_t f = {*model, no_cache, *work, n_rows, nullptr, 0, 0, stream};
    lmc_cuda_norm_t norm = norm_of(f, lmc_model_vector(model, LMC_MODEL_FINAL_NORM_GAIN),
                                   lmc_model_vector(model, LMC_MODEL_FINAL_NORM_BIAS), work->normed);
    norm.input = work->hidden + (size_t)first_row * config.hidden;
    const float *bias = config.head_bias ? lmc_model_vector(model, LMC_MODEL_HEAD_BIAS) : nullptr;
    lmc_cuda_product_t head = linear(f, model->weights.slots[LMC_MODEL_HEAD], bias, config.n_logits,
                                     config.hidden, work->normed, logits);
    head.with_finish = head.finish.are_logits = config.logits_multiplier != 1.0f || config.logits_cap != 0.0f;
    head.finish.logits_multiplier = config.logits_multiplier;
    head.finish.logits_cap = config.logits_cap;
    cudaError_t status = lmc_cuda_norm(norm, stream);
    LMC_THEN(status, multiply(f, head));
    return status;
}

static lmc_cuda_rows_t rows_of_logits(const lmc_transformer_model_t *model, const float *logits,
                                      uint32_t n_rows, uint32_t vocab_size) {
    int64_t row_bytes = (int64_t)(model->config.n_logits * sizeof(float));
    return lmc_cuda_rows_t{logits, 0, row_bytes, n_rows, n_rows, vocab_size, LMC_FLOAT32};
}

/* Logits of the rows first_row and on, a block at a time, each followed by what call(row, n) does with it. */
template <typename CALL>
static cudaError_t over_blocks(const lmc_transformer_model_t *model, const lmc_cuda_transformer_work_t *work,
                               uint32_t first_row, uint32_t n_rows, const lmc_cuda_transformer_sink_t *sink,
                               lmc_cuda_stream_t stream, CALL call) {
    if (sink->n_logits_rows == 0) return cudaErrorInvalidValue;
    cudaError_t status = cudaSuccess;
    for (uint32_t done = 0; done < n_rows && status == cudaSuccess; done += sink->n_logits_rows) {
        uint32_t n = n_rows - done < sink->n_logits_rows ? n_rows - done : sink->n_logits_rows;
        uint32_t row = first_row + done;
        status = (cudaError_t)lmc_cuda_transformer_head(model, work, row, n, sink->logits, stream);
        LMC_THEN(status, call(row, n));
    }
    return status;
}

int lmc_cuda_transformer_intervals(const lmc_transformer_model_t *model,
                                   const lmc_cuda_transformer_work_t *work, uint32_t first_row,
                                   uint32_t n_rows, const lmc_cuda_transformer_sink_t *sink, uint64_t *error,
                                   lmc_cuda_stream_t stream) {
    if (sink->vocab_size > model->config.n_logits) return cudaErrorInvalidValue;
    return over_blocks(model, work, first_row, n_rows, sink, stream, [=](uint32_t row, uint32_t n) {
        lmc_cuda_rows_t rows = rows_of_logits(model, sink->logits, n, sink->vocab_size);
        lmc_cuda_tokens_t tokens = {sink->targets + row, 0, sizeof(int32_t), sizeof(int32_t)};
        cudaError_t status = (cudaError_t)lmc_cuda_error_clear(work->error, stream);
        LMC_THEN(status,
                 (cudaError_t)lmc_cuda_intervals(&rows, &tokens, nullptr, sink->start + row, sink->freq + row,
                                                 sink->total + row, work->error, stream));
        LMC_THEN(status, lmc_cuda_error_merge(work->error, row, error, stream));
        return status;
    });
}

int lmc_cuda_transformer_log2_softmax(const lmc_transformer_model_t *model,
                                      const lmc_cuda_transformer_work_t *work, uint32_t first_row,
                                      uint32_t n_rows, const lmc_cuda_transformer_sink_t *sink,
                                      uint64_t *error, lmc_cuda_stream_t stream) {
    return over_blocks(model, work, first_row, n_rows, sink, stream, [=](uint32_t row, uint32_t n) {
        lmc_cuda_rows_t rows = rows_of_logits(model, sink->logits, n, (uint32_t)model->config.n_logits);
        lmc_cuda_tokens_t tokens = {sink->targets + row, 0, sizeof(int32_t), sizeof(int32_t)};
        return (cudaError_t)lmc_cuda_log2_softmax(&rows, &tokens, sink->log2_probabilities + row, row, error,
                                                  stream);
    });
}

int lmc_cuda_transformer_step(const lmc_transformer_model_t *model, const lmc_cuda_transformer_cache_t *cache,
                              uint32_t n_rows, const uint32_t *streams, const int32_t *tokens, float *logits,
                              const lmc_cuda_transformer_work_t *work, uint64_t *error,
                              lmc_cuda_stream_t stream) {
    const lmc_transformer_config_t &config = model->config;
    if (!is_fitting(model, work, n_rows) || n_rows > cache->n_streams || cache->n_layers != config.n_layers)
        return cudaErrorInvalidValue;
    forward_t f = {*model, *cache, *work, n_rows, nullptr, 0, 0, stream};
    cudaError_t status = lmc_cuda_rows_of_step(streams, tokens, n_rows, (uint32_t)config.n_embeddings, *cache,
                                               usable_positions(config, *cache), *work, error, stream);
    LMC_THEN(status, run_layers(f, tokens, nullptr));
    LMC_THEN(status, (cudaError_t)lmc_cuda_transformer_head(model, work, 0, n_rows, logits, stream));
    return status;
}

int lmc_cuda_transformer_decode_step(const lmc_transformer_model_t *model,
                                     const lmc_cuda_transformer_cache_t *cache,
                                     const lmc_cuda_transformer_chain_t *chain, float *logits,
                                     const lmc_cuda_transformer_work_t *work, uint64_t *error,
                                     lmc_cuda_stream_t stream) {
    if (chain->vocab_size == 0 || chain->vocab_size > model->config.n_logits) return cudaErrorInvalidValue;
    lmc_cuda_rows_t rows = rows_of_logits(model, logits, chain->n_rows, chain->vocab_size);
    cudaError_t status = (cudaError_t)lmc_cuda_transformer_step(model, cache, chain->n_rows, chain->streams,
                                                                chain->tokens, logits, work, error, stream);
    LMC_THEN(status, (cudaError_t)lmc_cuda_decode_step(&rows, work->is_active, chain->decoders, chain->tokens,
                                                       error, stream));
    LMC_THEN(status, lmc_cuda_chain_log(*chain, stream));
    return status;
}

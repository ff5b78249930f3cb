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

/* Floats of the keys, or of the values, of one layer. */
size_t layer_floats(const lmc_transformer_config_t &config, uint32_t n_streams, uint32_t capacity) {
    return (size_t)n_streams * config.n_heads * capacity * quads_of_head(config) * 4;
}

size_t cut_cache(const lmc_transformer_config_t &config, void *memory, lmc_cuda_transformer_cache_t *cache) {
    lmc_arena_t arena = {(char *)memory, 0, LMC_DEVICE_ALIGNMENT};
    size_t n_floats = cache->n_layers * layer_floats(config, cache->n_streams, cache->capacity);
    cache->positions = cut<uint32_t>(arena, cache->n_streams);
    cache->keys = cut<float>(arena, n_floats);
    cache->values = cut<float>(arena, n_floats);
    return arena.used_bytes;
}

size_t cut_work(const lmc_transformer_config_t &config, void *memory, lmc_cuda_transformer_work_t *work) {
    lmc_arena_t arena = {(char *)memory, 0, LMC_DEVICE_ALIGNMENT};
    size_t n = work->n_rows, hidden = config.hidden;
    size_t wide = 3 * hidden > config.intermediate ? 3 * hidden : config.intermediate;
    work->hidden = cut<float>(arena, n * hidden);
    work->normed = cut<float>(arena, n * hidden);
    work->normed_mlp = config.parallel_residual ? cut<float>(arena, n * hidden) : work->normed;
    work->wide = cut<float>(arena, n * wide);
    work->attended = cut<float>(arena, n * hidden);
    work->residual = cut<float>(arena, n * hidden);
    work->row_streams = cut<uint32_t>(arena, n);
    work->row_positions = cut<uint32_t>(arena, n);
    work->is_active = cut<uint8_t>(arena, n);
    work->error = cut<uint64_t>(arena, 1);
    size_t longest = lmc_int8_padded(hidden > config.intermediate ? hidden : config.intermediate);
    work->codes = config.int8 ? cut<int8_t>(arena, n * longest) : nullptr;
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

cudaError_t multiply(const forward_t &f, const lmc_cuda_product_t &product) {
    if (product.scales == nullptr) return lmc_cuda_product(product, f.stream);
    lmc_cuda_codes_t codes = {f.work.codes, f.work.code_scales};
    cudaError_t status =
        lmc_cuda_int8_quantise(product.input, LMC_FLOAT32, product.n_tokens, product.n_k, codes, f.stream);
    LMC_THEN(status, lmc_cuda_int8_product(product, codes, f.stream));
    return status;
}

lmc_cuda_attention_t attention_of_layer(const forward_t &f, size_t layer) {
    const lmc_transformer_config_t &config = f.model.config;
    size_t offset = layer % f.cache.n_layers * layer_floats(config, f.cache.n_streams, f.cache.capacity);
    lmc_cuda_attention_t attention = {};
    attention.keys = f.cache.keys + offset;
    attention.values = f.cache.values + offset;
    attention.qkv = f.work.wide;
    attention.output = f.work.attended;
    attention.row_streams = f.work.row_streams;
    attention.row_positions = f.work.row_positions;
    attention.cosines = f.model.cosines[0];
    attention.sines = f.model.sines[0];
    attention.table_length = (uint32_t)f.model.table_length;
    attention.n_pairs = (uint32_t)config.kinds[0].rotary.dims / 2;
    attention.n_rows = f.n_rows;
    attention.n_heads = (uint32_t)config.n_heads;
    attention.head_dim = (uint32_t)config.head_dim;
    attention.n_quads = quads_of_head(config);
    attention.capacity = f.cache.capacity;
    attention.n_positions = usable_positions(config, f.cache);
    attention.scale = f.model.softmax.scale;
    attention.floor = f.model.softmax.floor;
    return attention;
}

lmc_cuda_norm_t norm_of(const forward_t &f, const float *gain, const float *bias, float *output) {
    lmc_cuda_norm_t norm = {};
    norm.input = f.work.hidden;
    norm.n_rows = f.n_rows;
    norm.n_features = (uint32_t)f.model.config.hidden;
    norm.epsilon = f.model.config.norm_epsilon;
    norm.gains[0] = gain;
    norm.biases[0] = bias;
    norm.outputs[0] = output;
    return norm;
}

/* Norms, queries, keys and values, attention: work.attended. Both norms of a layer with parallel residuals
 * have the same input, hence the same mean and factor. */
cudaError_t run_attention(const forward_t &f, size_t layer) {
    lmc_cuda_norm_t norm =
        norm_of(f, lmc_layer_vector(&f.model, layer, LMC_LAYER_ATTENTION_NORM_GAIN),
                lmc_layer_vector(&f.model, layer, LMC_LAYER_ATTENTION_NORM_BIAS), f.work.normed);
    if (f.model.config.parallel_residual) {
        norm.gains[1] = lmc_layer_vector(&f.model, layer, LMC_LAYER_MLP_NORM_GAIN);
        norm.biases[1] = lmc_layer_vector(&f.model, layer, LMC_LAYER_MLP_NORM_BIAS);
        norm.outputs[1] = f.work.normed_mlp;
    }
    lmc_cuda_attention_t attention = attention_of_layer(f, layer);
    cudaError_t status = lmc_cuda_norm(norm, f.stream);
    LMC_THEN(status, multiply(f, linear_of_layer(f, layer, LMC_LAYER_QKV, LMC_LAYER_QKV_BIAS, f.work.normed,
                                                 f.work.wide)));
    LMC_THEN(status, lmc_cuda_attention_place(attention, f.stream));
    if (f.row_begin != nullptr)
        LMC_THEN(status, lmc_cuda_attend_pass(attention, f.row_begin, f.n_stretches, f.n_longest, f.stream));
    else
        LMC_THEN(status, lmc_cuda_attend_step(attention, f.stream));
    return status;
}

/* Parallel: x = (mlp(x) + attention) + x. Sequential: x = attention + x, then x = mlp(x) + x. */
cudaError_t run_mlp(const forward_t &f, size_t layer) {
    const lmc_transformer_config_t &config = f.model.config;
    float *x = f.work.hidden;
    lmc_cuda_product_t dense =
        linear_of_layer(f, layer, LMC_LAYER_OUT, LMC_LAYER_OUT_BIAS, f.work.attended, f.work.residual);
    lmc_cuda_product_t in =
        linear_of_layer(f, layer, LMC_LAYER_UP, LMC_LAYER_UP_BIAS, f.work.normed_mlp, f.work.wide);
    lmc_cuda_product_t out = linear_of_layer(f, layer, LMC_LAYER_DOWN, LMC_LAYER_DOWN_BIAS, f.work.wide, x);
    in.with_gelu = true;
    out.addends[1] = x;
    if (config.parallel_residual) {
        out.addends[0] = f.work.residual;
    } else {
        dense.output = x;
        dense.addends[1] = x;
    }
    cudaError_t status = multiply(f, dense);
    if (!config.parallel_residual)
        LMC_THEN(status, lmc_cuda_norm(norm_of(f, lmc_layer_vector(&f.model, layer, LMC_LAYER_MLP_NORM_GAIN),
                                               lmc_layer_vector(&f.model, layer, LMC_LAYER_MLP_NORM_BIAS),
                                               f.work.normed_mlp),
                                       f.stream));
    LMC_THEN(status, multiply(f, in));
    LMC_THEN(status, multiply(f, out));
    return status;
}

cudaError_t run_layers(const forward_t &f, const int32_t *tokens, uint64_t *token_error) {
    const lmc_transformer_config_t &config = f.model.config;
    cudaError_t status =
        lmc_cuda_embed(f.model.weights.slots[LMC_MODEL_EMBEDDING], (uint32_t)config.n_embeddings,
                       (uint32_t)config.hidden, tokens, f.n_rows, f.work.hidden, token_error, f.stream);
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
    bool fits = config->head_dim <= LMC_CUDA_HEAD_DIM_MAX && config->context_length <= LMC_CUDA_CONTEXT_MAX &&
                lmc_transformer_arithmetic(config) == 1 && config->fused_qkv;
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
    cudaError_t status = lmc_cuda_norm(norm, stream);
    LMC_THEN(status, multiply(f, linear(f, model->weights.slots[LMC_MODEL_HEAD], nullptr, config.n_logits,
                                        config.hidden, work->normed, logits)));
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

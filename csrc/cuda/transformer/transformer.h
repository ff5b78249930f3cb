/* The exact engine on a CUDA device: launchers for C, as coding.h has them for the coder. Raw device
 * pointers, no framework, no hidden memory: the caller owns every buffer and a _bytes function returns its
 * size. Every launcher puts its kernels on the caller's stream, returns at once with a cudaError_t as an int
 * (0 for success), and can be captured in a graph; the caller has made the device of the pointers current.
 * The bits are those of llmcomp/transformer.h, but for a NaN's: it is one here (0x7FFFFFFF), while a
 * processor keeps some operand's sign and payload. They show in an array of logits and nowhere else: a row of
 * logits that holds one is an error for every coder and every score.
 *
 * One pass:  model_prepare, model_place, cache_init (one layer), then pass and head or intervals.
 * Streams:   cache_init (all layers), pass for what is known, then step, or decode_step again and again. */
#ifndef LLMCOMP_CUDA_TRANSFORMER_TRANSFORMER_H
#define LLMCOMP_CUDA_TRANSFORMER_TRANSFORMER_H

#include "cuda/coding/coding.h"
#include "llmcomp/transformer.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LMC_CUDA_HEAD_DIM_MAX 256

/* lmc_transformer_config_check, and LMC_ERROR_ARGUMENT for larger heads, and for norms of all queries or keys
 * together (LMC_QK_NORM_FULL) where a fused matrix has them apart: no family has that. */
lmc_status_t lmc_cuda_transformer_config_check(const lmc_transformer_config_t *config);

/* The model. */

/* lmc_transformer_model_init on the host. weights: the host's; only norms and biases are read. tables:
 * lmc_transformer_tables_bound bytes of the host. */
lmc_status_t lmc_cuda_transformer_model_prepare(const lmc_transformer_config_t *config,
                                                const lmc_transformer_weights_t *weights, void *tables,
                                                size_t tables_bytes, lmc_transformer_model_t *model);
/* A matrix [n_rows][n_k] of the device as 8-bit codes, the same that lmc_int8_weights_quantise makes, in
 * memory of the device that is aligned to 16 bytes. The matrix itself is not needed afterwards. */
size_t lmc_cuda_int8_weights_bytes(size_t n_rows, size_t n_k);
int lmc_cuda_int8_weights_quantise(const lmc_transformer_tensor_t *matrix, size_t n_rows, size_t n_k,
                                   void *memory, lmc_transformer_tensor_t *quantised,
                                   lmc_cuda_stream_t stream);
/* *placed is the model as the launchers below want it. weights: matrices with device pointers, each aligned
 * to 16 bytes for speed and to its type in any case, in its own format, or where the config says int8 as
 * codes (all but the embedding); norms and biases are not read, and the array weights->layers stays on the
 * host. device_tables: a copy of tables, all of it. */
void lmc_cuda_transformer_model_place(const lmc_transformer_model_t *model,
                                      const lmc_transformer_weights_t *weights, const void *device_tables,
                                      lmc_transformer_model_t *placed);

/* The cache: keys and values of n_streams streams. */

/* positions[s], on the device, is the number of tokens that stream s has seen. Write 0 there, on the same
 * CUDA stream, to start stream s again, or, where no layer has a window, anything smaller to go back. Of
 * several layers those with a window keep that, and room for LMC_CUDA_STRETCH_TOKENS more. */
typedef struct lmc_cuda_transformer_cache {
    float *keys, *values, *scores; /* scores of a step, where a block has no room for them; else NULL */
    uint32_t *positions;
    uint32_t n_streams, capacity; /* capacity: tokens a stream can hold, a multiple of 32 */
    uint32_t n_layers;
} lmc_cuda_transformer_cache_t;

/* n_layers: the model's; or 1 for a pass that leaves nothing behind. */
size_t lmc_cuda_transformer_cache_bytes(const lmc_transformer_config_t *config, uint32_t n_layers,
                                        uint32_t n_streams, uint32_t n_tokens);
/* The most tokens that a stream can take in one pass, n_longest of its batch. */
#define LMC_CUDA_STRETCH_TOKENS 256
uint32_t lmc_cuda_transformer_stretch_max(const lmc_transformer_config_t *config,
                                          const lmc_cuda_transformer_cache_t *cache);
/* memory: of the device, aligned to 256 bytes as cudaMalloc gives it; only the positions are written. */
int lmc_cuda_transformer_cache_init(const lmc_transformer_config_t *config, uint32_t n_layers,
                                    uint32_t n_streams, uint32_t n_tokens, void *memory,
                                    lmc_cuda_transformer_cache_t *cache, lmc_cuda_stream_t stream);

/* Memory of a call: what lies between the kernels. One can serve many calls that follow each other. */

typedef struct lmc_cuda_transformer_work {
    float *hidden, *normed, *normed_mlp, *wide, *attended, *residual;
    uint32_t *row_streams, *row_positions;
    uint8_t *is_active;
    uint64_t *error;
    int8_t *codes; /* of the inputs of one product, and their scales; NULL where the config is not int8 */
    float *code_scales;
    uint32_t n_rows;
} lmc_cuda_transformer_work_t;

size_t lmc_cuda_transformer_work_bytes(const lmc_transformer_config_t *config, uint32_t n_rows);
/* memory: aligned like the cache's. Nothing is written. */
void lmc_cuda_transformer_work_init(const lmc_transformer_config_t *config, uint32_t n_rows, void *memory,
                                    lmc_cuda_transformer_work_t *work);

/* Pass. */

/* Stretches of tokens, one after the other without padding: stretch i is rows row_begin[i] ...
 * row_begin[i + 1] - 1 and goes on after the positions[s] tokens of its stream s. Device pointers. */
typedef struct lmc_cuda_transformer_batch {
    const int32_t *tokens;     /* [n_rows] */
    const uint32_t *row_begin; /* [n_stretches + 1], ascending from 0 to n_rows */
    const uint32_t *streams;   /* [n_stretches], none twice; NULL: stretch i belongs to stream i */
    uint32_t n_stretches, n_rows;
    uint32_t n_longest; /* rows of the longest stretch, or more */
} lmc_cuda_transformer_batch_t;

/* All layers for all rows, whose last state stays in work; positions are moved on by the lengths. With a
 * cache of one layer (of a model with more) every stretch begins at position 0 and positions stay. In *error,
 * as row * 256 + status: LMC_ERROR_TOKEN for a token outside the embedding, LMC_ERROR_CAPACITY for a row
 * that finds no room in the cache or the context; what follows such a row means nothing. */
int lmc_cuda_transformer_pass(const lmc_transformer_model_t *model, const lmc_cuda_transformer_batch_t *batch,
                              const lmc_cuda_transformer_cache_t *cache,
                              const lmc_cuda_transformer_work_t *work, uint64_t *error,
                              lmc_cuda_stream_t stream);

/* After a pass, for any of its rows and as often as wanted: logits [n_rows][n_logits] of the rows first_row
 * and on. */
int lmc_cuda_transformer_head(const lmc_transformer_model_t *model, const lmc_cuda_transformer_work_t *work,
                              uint32_t first_row, uint32_t n_rows, float *logits, lmc_cuda_stream_t stream);

/* After a pass: the three numbers of lmc_intervals for its rows first_row and on, n_logits_rows at a time
 * through logits [n_logits_rows][n_logits]. targets and results are indexed by the pass's rows, and so are
 * errors. */
typedef struct lmc_cuda_transformer_sink {
    const int32_t *targets;
    uint64_t *start, *freq, *total; /* of intervals */
    double *log2_probabilities;     /* of a softmax */
    uint32_t vocab_size;            /* of intervals: the first vocab_size logits are the symbols */
    uint32_t n_logits_rows;
    float *logits;
} lmc_cuda_transformer_sink_t;
int lmc_cuda_transformer_intervals(const lmc_transformer_model_t *model,
                                   const lmc_cuda_transformer_work_t *work, uint32_t first_row,
                                   uint32_t n_rows, const lmc_cuda_transformer_sink_t *sink, uint64_t *error,
                                   lmc_cuda_stream_t stream);

/* After a pass, for the same rows in the same blocks: the number of lmc_log2_softmax, over all n_logits. */
int lmc_cuda_transformer_log2_softmax(const lmc_transformer_model_t *model,
                                      const lmc_cuda_transformer_work_t *work, uint32_t first_row,
                                      uint32_t n_rows, const lmc_cuda_transformer_sink_t *sink,
                                      uint64_t *error, lmc_cuda_stream_t stream);

/* Steps. */

/* Appends tokens[i] to stream streams[i] of the cache, none twice, or where streams is NULL to stream i;
 * logits [n_rows][n_logits]. A row takes no part where its token is negative or its stream full or not there:
 * its logits mean nothing then. LMC_ERROR_TOKEN in *error for a token at or beyond n_embeddings. */
int lmc_cuda_transformer_step(const lmc_transformer_model_t *model, const lmc_cuda_transformer_cache_t *cache,
                              uint32_t n_rows, const uint32_t *streams, const int32_t *tokens, float *logits,
                              const lmc_cuda_transformer_work_t *work, uint64_t *error,
                              lmc_cuda_stream_t stream);

/* What a chain of decoding steps works on; device pointers. Rows need not be all of the cache's streams:
 * those that have ended are left out, and cost no products. */
typedef struct lmc_cuda_transformer_chain {
    const uint32_t *streams; /* [n_rows] as of a step, or NULL */
    lmc_decoder_t *decoders; /* [n_rows] */
    int32_t *tokens;         /* [n_rows]: the inputs of the next step, which its results replace: the token
                                decoded, -1 where the stream took no part, -2 where its row has an error */
    int32_t *log;            /* [log_steps][n_rows]: the results of step after step */
    uint32_t *n_logged; /* steps in log; the caller sets it to 0. Steps beyond log_steps are not logged. */
    uint32_t log_steps, n_rows, vocab_size;
} lmc_cuda_transformer_chain_t;

/* lmc_cuda_transformer_step, then lmc_cuda_decode_step on its logits. The results are the next step's inputs,
 * so that the same call, or a graph captured from it, may be repeated without a word from the host. */
int lmc_cuda_transformer_decode_step(const lmc_transformer_model_t *model,
                                     const lmc_cuda_transformer_cache_t *cache,
                                     const lmc_cuda_transformer_chain_t *chain, float *logits,
                                     const lmc_cuda_transformer_work_t *work, uint64_t *error,
                                     lmc_cuda_stream_t stream);

#ifdef __cplusplus
}
#endif

#endif

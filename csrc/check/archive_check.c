/* Decodes an archive by the core alone, on whatever processor this is built for: the layout of FORMAT.md,
 * section 5, the windows and the tokens are written here a second time, the arithmetic is the core's. The
 * content goes to standard output, once all backends agree on it and every segment was coded again, in one
 * pass, to the same bytes. Mapping "bytes" with a vocabulary that lacks no byte is all that it knows.
 *
 *     archive_check MODEL ARCHIVE [CONTENT]
 *
 * MODEL is what tests/support/dump_model.py makes of a checkpoint. The hash of the content is left to the
 * caller. Neither deflate nor LZMA is here: segments of these kinds are taken from CONTENT, which is what the
 * archive should hold, and counted on standard error; without it they are an error. */
#include "check.h"

#include <stdarg.h>
#include <string.h>

#include "check/neox_layer_order.h"
#include "llmcomp/coder.h"
#include "llmcomp/mixing.h"
#include "llmcomp/transformer.h"

_Atomic long check_failures;

const lmc_backend_t *check_backend(size_t index) {
    return lmc_backend_at(index);
}

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

static void must(lmc_status_t status) {
    if (status != LMC_OK) die("%s", lmc_status_message(status));
}

/* Files. */

typedef struct reader {
    const uint8_t *bytes;
    size_t n_bytes, at;
} reader_t;

static reader_t reader_open(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) die("%s: cannot be read", path);
    size_t n_bytes = (size_t)ftell(file);
    uint8_t *bytes = check_malloc(n_bytes);
    rewind(file);
    if (fread(bytes, 1, n_bytes, file) != n_bytes) die("%s: cannot be read", path);
    fclose(file);
    return (reader_t){bytes, n_bytes, 0};
}

static const uint8_t *take(reader_t *reader, size_t n_bytes) {
    if (n_bytes > reader->n_bytes - reader->at) die("the file ends too early");
    reader->at += n_bytes;
    return reader->bytes + reader->at - n_bytes;
}

static uint64_t integer(reader_t *reader, int n_bytes) {
    const uint8_t *bytes = take(reader, (size_t)n_bytes);
    uint64_t value = 0;
    for (int i = 0; i < n_bytes; i++)
        value |= (uint64_t)bytes[i] << (8 * i);
    return value;
}

static uint64_t varint(reader_t *reader) {
    uint64_t value = 0, byte = 0x80;
    for (int shift = 0; byte & 0x80; shift += 7) {
        if (shift > 21) die("a varint is too long");
        byte = integer(reader, 1);
        value |= (byte & 0x7F) << shift;
    }
    return value;
}

/* CRC-32 (ISO-HDLC) of the bytes behind those whose CRC-32 is `crc`. */
static uint32_t crc32_of(uint32_t crc, const uint8_t *bytes, size_t n_bytes) {
    crc = ~crc;
    for (size_t i = 0; i < n_bytes; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

/* The model. */

typedef struct checkpoint {
    lmc_transformer_config_t config;
    lmc_transformer_weights_t weights;
    const uint8_t **token_bytes; /* NULL: stands for no bytes */
    size_t *token_lengths;
    size_t n_tokens;
} checkpoint_t;

static double number(reader_t *reader) {
    uint64_t bits = integer(reader, 8);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static lmc_transformer_tensor_t read_tensor(reader_t *reader, lmc_dtype_t dtype) {
    size_t n = integer(reader, 8);
    if (n == 0) return (lmc_transformer_tensor_t){NULL, dtype, NULL};
    size_t width = dtype == LMC_FLOAT32 ? 4 : 2;
    char *data = check_malloc(n * width);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)integer(reader, (int)width);
        uint16_t half = (uint16_t)bits;
        memcpy(data + i * width, width == 4 ? (const void *)&bits : (const void *)&half, width);
    }
    return (lmc_transformer_tensor_t){data, dtype, NULL};
}

static void read_tokens(reader_t *reader, checkpoint_t *model) {
    int n_single_bytes = 0;
    model->n_tokens = integer(reader, 8);
    model->token_bytes = check_malloc(model->n_tokens * sizeof *model->token_bytes);
    model->token_lengths = check_malloc(model->n_tokens * sizeof *model->token_lengths);
    for (size_t i = 0; i < model->n_tokens; i++) {
        size_t length = integer(reader, 4);
        model->token_lengths[i] = length == UINT32_MAX ? 0 : length;
        model->token_bytes[i] = length == UINT32_MAX ? NULL : take(reader, length);
        n_single_bytes += length == 1;
    }
    if (n_single_bytes != 256) die("the vocabulary has %d of 256 bytes", n_single_bytes);
}

/* The order of the model's own tensors in the file; then each layer's, neox_layer_order. */
static const lmc_model_slot_t model_order[] = {LMC_MODEL_EMBEDDING, LMC_MODEL_FINAL_NORM_GAIN,
                                               LMC_MODEL_FINAL_NORM_BIAS, LMC_MODEL_HEAD};

static lmc_transformer_config_t read_config(reader_t *reader) {
    lmc_transformer_config_t config = {.embedding_multiplier = 1,
                                       .residual_multiplier = 1,
                                       .logits_multiplier = 1,
                                       .pre_norm = 1,
                                       .fused_qkv = 1,
                                       .n_kinds = 1};
    config.n_layers = integer(reader, 8);
    config.n_heads = config.n_kv_heads = integer(reader, 8);
    config.hidden = integer(reader, 8), config.intermediate = integer(reader, 8);
    config.n_embeddings = integer(reader, 8), config.n_logits = integer(reader, 8);
    config.context_length = integer(reader, 8);
    config.kinds[0].rotary.dims = integer(reader, 8);
    config.parallel_residual = (int)integer(reader, 8);
    config.kinds[0].rotary.base = number(reader);
    config.norm_epsilon = (float)number(reader);
    config.head_dim = config.hidden / config.n_heads;
    config.attention_divisor = (double)config.head_dim;
    return config;
}

static checkpoint_t read_checkpoint(const char *path) {
    reader_t reader = reader_open(path);
    checkpoint_t model;
    model.config = read_config(&reader);
    lmc_dtype_t dtype = (lmc_dtype_t)integer(&reader, 8);
    must(lmc_transformer_config_check(&model.config));
    memset(&model.weights, 0, sizeof model.weights);
    for (size_t i = 0; i < sizeof model_order / sizeof *model_order; i++)
        model.weights.slots[model_order[i]] = read_tensor(&reader, dtype);
    if (model.weights.slots[LMC_MODEL_HEAD].data == NULL)
        model.weights.slots[LMC_MODEL_HEAD] = model.weights.slots[LMC_MODEL_EMBEDDING];
    lmc_transformer_layer_t *layers = check_malloc(model.config.n_layers * sizeof *layers);
    memset(layers, 0, model.config.n_layers * sizeof *layers);
    model.weights.layers = layers;
    for (size_t i = 0; i < model.config.n_layers; i++)
        for (size_t j = 0; j < sizeof neox_layer_order / sizeof *neox_layer_order; j++)
            layers[i].slots[neox_layer_order[j]] = read_tensor(&reader, dtype);
    read_tokens(&reader, &model);
    return model;
}

/* Segments. */

typedef struct header {
    size_t segment_bytes, context_length, overlap, vocab_size;
    int64_t bos_token;
    uint32_t check;
    int is_mixed, may_be_marked;
} header_t;

/* Of a marked payload. */
enum { KIND_DEFLATE = 1, KIND_LZMA = 2, KIND_ALONE = 3 };

typedef struct codec {
    const checkpoint_t *checkpoint;
    header_t header;
    lmc_context_t context;
    lmc_transformer_model_t model;
    lmc_transformer_cache_t cache;
    void *tables, *cache_memory, *step_workspace, *pass_workspace;
    size_t step_bytes, pass_bytes;
    float *logits; /* [n_logits], after the last step */
    lmc_search_t search;
    int is_mixed; /* this segment */
    reader_t content;
    size_t n_taken; /* segments */
} codec_t;

static void codec_init(codec_t *codec, const checkpoint_t *checkpoint, const lmc_backend_t *backend) {
    const lmc_transformer_config_t *config = &checkpoint->config;
    size_t context_length = codec->header.context_length;
    codec->checkpoint = checkpoint;
    codec->context = (lmc_context_t){backend, NULL};
    size_t tables_bytes = lmc_transformer_tables_bound(config),
           cache_bytes = lmc_transformer_cache_bound(config, 1, context_length);
    codec->step_bytes = lmc_transformer_step_bound(config, 1, 1);
    codec->pass_bytes = lmc_transformer_pass_bound(config, 1, context_length, 1, 1);
    codec->tables = check_malloc(tables_bytes), codec->cache_memory = check_malloc(cache_bytes);
    codec->step_workspace = check_malloc(codec->step_bytes),
    codec->pass_workspace = check_malloc(codec->pass_bytes);
    codec->logits = check_malloc(config->n_logits * sizeof *codec->logits);
    must(lmc_transformer_model_init(&codec->context, config, &checkpoint->weights, codec->tables,
                                    tables_bytes, &codec->model));
    must(lmc_transformer_cache_init(config, 1, context_length, codec->cache_memory, cache_bytes,
                                    &codec->cache));
}

static void codec_free(codec_t *codec) {
    free(codec->tables), free(codec->cache_memory), free(codec->step_workspace);
    free(codec->pass_workspace), free(codec->logits);
}

static void step(codec_t *codec, int64_t token) {
    size_t error = 0;
    must(lmc_transformer_step(&codec->context, &codec->model, &codec->cache, &token, NULL, codec->logits,
                              codec->step_workspace, codec->step_bytes, &error));
}

/* Reads the start token and the tokens before the window; returns the number of inputs. */
static size_t open_window(codec_t *codec, const int64_t *tokens, size_t n_tokens) {
    size_t n_context = n_tokens < codec->header.overlap ? n_tokens : codec->header.overlap;
    codec->cache.positions[0] = 0;
    step(codec, codec->header.bos_token);
    for (size_t i = n_tokens - n_context; i < n_tokens; i++)
        step(codec, tokens[i]);
    return 1 + n_context;
}

/* The mixer of a segment, NULL where the archive has none; the caller frees it. */
static lmc_mixer_t *new_mixer(const codec_t *codec, size_t n_bytes) {
    lmc_mixer_t *mixer = NULL;
    if (!codec->is_mixed) return NULL;
    size_t memory_bytes = lmc_mixer_bound(n_bytes); /* a token of mapping bytes has a byte or more */
    must(lmc_mixer_begin(check_malloc(memory_bytes), memory_bytes, n_bytes, &mixer));
    return mixer;
}

/* Returns the number of tokens; content gets n_bytes bytes, tokens at most 2 n_bytes. */
static size_t decode_segment(codec_t *codec, const uint8_t *payload, size_t payload_bytes, size_t n_bytes,
                             uint8_t *content, int64_t *tokens) {
    size_t n_tokens = 0, n_done = 0, n_inputs = codec->header.context_length, error = 0;
    lmc_rows_t row = {codec->logits, 0, 1, codec->header.vocab_size, LMC_FLOAT32};
    lmc_decoder_t decoder;
    lmc_decoder_init(&decoder, payload, payload_bytes);
    lmc_mixer_t *mixer = new_mixer(codec, n_bytes);
    while (n_done < n_bytes) {
        if (n_inputs == codec->header.context_length) {
            n_inputs = open_window(codec, tokens, n_tokens);
        } else {
            step(codec, tokens[n_tokens - 1]);
            n_inputs++;
        }
        int32_t token;
        if (mixer != NULL)
            must(lmc_mixed_decode_step(&codec->context, &row, NULL, &decoder, &mixer, &codec->search, &token,
                                       &error));
        else
            must(lmc_decode_step(&codec->context, &row, NULL, &decoder, &codec->search, &token, &error));
        size_t length = codec->checkpoint->token_lengths[token];
        if (length == 0 || length > n_bytes - n_done)
            die("token %d cannot stand at byte %zu", (int)token, n_done);
        memcpy(content + n_done, codec->checkpoint->token_bytes[token], length);
        n_done += length;
        tokens[n_tokens++] = token;
    }
    free(mixer);
    return n_tokens;
}

/* The tokens' payload, from one pass a window; bytes has room for 8 bytes a token and the end. */
static size_t encode_segment(codec_t *codec, const int64_t *tokens, size_t n_tokens, uint8_t *bytes) {
    size_t context_length = codec->header.context_length, error = 0;
    int64_t *inputs = check_malloc(context_length * sizeof *inputs);
    uint64_t *parts = check_malloc(3 * context_length * sizeof *parts);
    uint64_t *start = parts, *freq = parts + context_length, *total = parts + 2 * context_length;
    lmc_encoder_t encoder;
    lmc_encoder_init(&encoder, bytes, (n_tokens + 1) * LMC_STEP_BYTES_MAX);
    lmc_mixer_t *mixer = new_mixer(codec, n_tokens);
    for (size_t at = 0, stop; at < n_tokens; at = stop) {
        size_t first = at < codec->header.overlap ? 0 : at - codec->header.overlap;
        stop = first + context_length < n_tokens ? first + context_length : n_tokens;
        inputs[0] = codec->header.bos_token;
        memcpy(inputs + 1, tokens + first, (stop - first - 1) * sizeof *inputs);
        lmc_transformer_batch_t batch = {inputs, NULL, 1, stop - first, context_length};
        lmc_transformer_sink_t sink = {.targets = tokens + first,
                                       .start = start,
                                       .freq = freq,
                                       .total = total,
                                       .vocab_size = codec->header.vocab_size};
        must(lmc_transformer_pass(&codec->context, &codec->model, &batch, &sink, codec->pass_workspace,
                                  codec->pass_bytes, &error));
        size_t skip = at - first;
        if (mixer != NULL)
            must(lmc_mixer_encode(mixer, stop - at, tokens + at, start + skip, freq + skip, total + skip,
                                  &error));
        must(lmc_encoder_put(&encoder, stop - at, start + skip, freq + skip, total + skip, &error));
    }
    must(lmc_encoder_end(&encoder));
    free(inputs), free(parts), free(mixer);
    if (encoder.n_bytes == 0) bytes[encoder.n_bytes++] = 0; /* a payload is never empty */
    return encoder.n_bytes;
}

static void code_segment(codec_t *codec, const uint8_t *payload, size_t payload_bytes, size_t n_bytes,
                         uint8_t *content) {
    int64_t *tokens = check_malloc(2 * n_bytes * sizeof *tokens);
    size_t n_tokens = decode_segment(codec, payload, payload_bytes, n_bytes, content, tokens);
    uint8_t *again = check_malloc((n_tokens + 1) * LMC_STEP_BYTES_MAX);
    size_t again_bytes = encode_segment(codec, tokens, n_tokens, again);
    CHECK(again_bytes == payload_bytes && memcmp(again, payload, payload_bytes) == 0,
          "%s: %zu tokens are coded to another payload", lmc_backend_name(codec->context.backend), n_tokens);
    free(tokens), free(again);
}

/* Archives. */

static header_t read_header(reader_t *reader) {
    header_t header = {0};
    if (memcmp(take(reader, 4), "\x89LMC", 4) != 0) die("not an archive");
    uint64_t version = integer(reader, 1);
    if (version != 1 && version != 2) die("not an archive of format 1 or 2");
    if (integer(reader, 1) != 1) die("the archive names no model");
    if (version == 2) take(reader, 16); /* salt */
    header.segment_bytes = varint(reader);
    take(reader, 2); /* arithmetic, engine */
    if (integer(reader, 1) != 0) die("the archive has another mapping than bytes");
    uint64_t mixing = version == 2 ? integer(reader, 1) : 0;
    if (mixing > 1) die("the archive has another mixing");
    header.is_mixed = mixing == 1, header.may_be_marked = version == 2;
    header.context_length = varint(reader);
    header.overlap = varint(reader);
    header.vocab_size = varint(reader);
    header.bos_token = (int64_t)varint(reader);
    take(reader, 16 + 8);
    for (int i = 0; i < 2; i++)
        take(reader, integer(reader, 1));
    header.check = crc32_of(0, reader->bytes, reader->at);
    if (integer(reader, 4) != header.check) die("the header is damaged");
    return header;
}

static void check_frame(const header_t *header, uint32_t check, uint64_t n_segment, size_t n_bytes,
                        const uint8_t *payload, size_t payload_bytes) {
    uint64_t fields[] = {header->check, n_segment, n_bytes, payload_bytes};
    static const int widths[] = {4, 8, 4, 4};
    uint8_t key[20], *at = key;
    for (int i = 0; i < 4; i++)
        for (int byte = 0; byte < widths[i]; byte++)
            *at++ = (uint8_t)(fields[i] >> 8 * byte);
    if (check != (crc32_of(0, payload, payload_bytes) ^ crc32_of(0, key, sizeof key)))
        die("segment %llu is damaged", (unsigned long long)n_segment);
}

/* A segment at byte `at` of the content. */
static void open_payload(codec_t *codec, size_t at, const uint8_t *payload, size_t payload_bytes,
                         size_t n_bytes, uint8_t *content) {
    int kind = 0;
    if (codec->header.may_be_marked && payload_bytes > 1 && payload[payload_bytes - 1] == 0)
        kind = payload[payload_bytes -= 2];
    codec->is_mixed = codec->header.is_mixed && kind != KIND_ALONE;
    if (kind == 0 || (kind == KIND_ALONE && codec->header.is_mixed)) {
        code_segment(codec, payload, payload_bytes, n_bytes, content);
        return;
    }
    if (kind != KIND_DEFLATE && kind != KIND_LZMA) die("no archive has a payload of kind %d here", kind);
    if (codec->content.bytes == NULL) die("a payload of kind %d (1: deflate, 2: LZMA) needs CONTENT", kind);
    reader_t reader = {codec->content.bytes, codec->content.n_bytes, 0};
    take(&reader, at);
    memcpy(content, take(&reader, n_bytes), n_bytes);
    codec->n_taken++;
}

/* Returns the number of bytes; *content is the caller's to free. */
static size_t decode_archive(codec_t *codec, reader_t reader, uint8_t **content) {
    const header_t *header = &codec->header;
    int tag_bytes = header->segment_bytes <= 1 << 16 ? 2 : 3;
    uint64_t end_tag = ((uint64_t)1 << 8 * tag_bytes) - 1, n_segments = 0;
    size_t n_content = 0;
    int is_end = 0;
    *content = NULL;
    while (!is_end) {
        uint64_t tag = integer(&reader, tag_bytes);
        is_end = tag == end_tag;
        size_t n_bytes = is_end ? varint(&reader) : header->segment_bytes;
        if (n_bytes == 0) break;
        if (is_end) tag = integer(&reader, tag_bytes);
        uint32_t check = (uint32_t)integer(&reader, 4);
        size_t payload_bytes = tag == 0 ? n_bytes : tag;
        const uint8_t *payload = take(&reader, payload_bytes);
        check_frame(header, check, n_segments++, n_bytes, payload, payload_bytes);
        *content = realloc(*content, n_content + n_bytes);
        if (*content == NULL) die("out of memory");
        if (tag == 0)
            memcpy(*content + n_content, payload, n_bytes);
        else
            open_payload(codec, n_content, payload, payload_bytes, n_bytes, *content + n_content);
        n_content += n_bytes;
    }
    size_t tail_at = reader.at;
    take(&reader, n_segments > 0 ? (n_segments - 1) / 256 * 6 : 0);
    if (integer(&reader, 8) != n_content) die("the trailer states another size");
    take(&reader, 16);
    if (crc32_of(header->check, reader.bytes + tail_at, reader.at - tail_at) != integer(&reader, 4))
        die("the trailer is damaged");
    if (reader.at != reader.n_bytes) die("bytes follow the archive");
    return n_content;
}

int main(int n_arguments, char **arguments) {
    if (n_arguments < 3 || n_arguments > 4) die("usage: archive_check MODEL ARCHIVE [CONTENT]");
    /* Static: the program's end is theirs, and no leak. */
    static checkpoint_t checkpoint;
    static reader_t archive;
    static uint8_t *content;
    static codec_t codec;
    checkpoint = read_checkpoint(arguments[1]);
    archive = reader_open(arguments[2]);
    if (n_arguments == 4) codec.content = reader_open(arguments[3]);
    codec.header = read_header(&archive);
    if (codec.header.vocab_size > checkpoint.n_tokens)
        die("the archive has more symbols than the model's tokenizer");
    uint8_t *other;
    size_t n_content = 0;
    const lmc_backend_t *backend;
    for (size_t b = 0; (backend = check_backend(b)) != NULL; b++) {
        codec_init(&codec, &checkpoint, backend);
        codec.n_taken = 0;
        size_t n_other = decode_archive(&codec, archive, &other);
        codec_free(&codec);
        /* An empty archive's content is NULL. */
        int is_same = n_other == n_content && (n_content == 0 || memcmp(other, content, n_content) == 0);
        CHECK(b == 0 || is_same, "%s: another content", lmc_backend_name(backend));
        free(content);
        content = other, n_content = n_other;
    }
    if (codec.n_taken > 0)
        fprintf(stderr, "%zu segments of deflate or LZMA: taken from the content\n", codec.n_taken);
    if (check_failures == 0) fwrite(content, 1, n_content, stdout);
    return check_failures != 0;
}

/* For transformer_emulated.cpp: small models of any shape and with any switches, in one pass, in pieces, in
 * steps of streams that come and go, and in a chain of decoding steps, against the serial backend. */
#include <cuda_runtime.h>

#include "transformer_emulated.h"

static uint32_t below(uint32_t n) {
    return check_below(n);
}

/* One pass over sequences of unequal lengths: logits and intervals. */

/* Sequences of any length, with targets, and the logits that they shall have. */
struct sequences_t {
    uint32_t n, n_longest = 0, n_rows, vocab_size;
    std::vector<int32_t> tokens, targets;
    std::vector<uint32_t> row_begin;
    std::vector<float> wanted;

    explicit sequences_t(const check_model_t &model)
        : n(1 + below(4)), vocab_size(1 + below((uint32_t)model.config.n_logits)), row_begin(1, 0) {
        for (uint32_t sequence = 0; sequence < n; sequence++) {
            uint32_t length = below((uint32_t)model.config.context_length + 1);
            check_history_t history;
            while (history.size() < length)
                history.push_back(below((uint32_t)model.config.n_embeddings));
            tokens.insert(tokens.end(), history.begin(), history.end());
            row_begin.push_back((uint32_t)tokens.size());
            n_longest = max(n_longest, length);
            std::vector<float> logits = model.logits_of(history);
            wanted.insert(wanted.end(), logits.begin(), logits.end());
        }
        n_rows = (uint32_t)tokens.size();
        for (uint32_t i = 0; i < n_rows; i++)
            targets.push_back(below(vocab_size));
    }
};

static void check_log2_softmax(const check_model_t &model, const check_work_t &work,
                               const sequences_t &sequences, const lmc_cuda_transformer_sink_t &sink) {
    const size_t n_logits = model.config.n_logits;
    uint64_t error = LMC_CUDA_NO_ERROR;
    lmc_cuda_transformer_log2_softmax(&model.placed, &work.work, 0, sequences.n_rows, &sink, &error, nullptr);
    CHECK(error == LMC_CUDA_NO_ERROR, "error %llx", (unsigned long long)error);
    for (uint32_t i = 0; i < sequences.n_rows; i++) {
        int64_t target = sequences.targets[i];
        double one, found = sink.log2_probabilities[i];
        size_t unused;
        lmc_rows_t row = {&sequences.wanted[i * n_logits], 0, 1, n_logits, LMC_FLOAT32};
        lmc_log2_softmax(&check_serial, &row, &target, &one, &unused);
        CHECK(one == found, "row %u: %.17g, not %.17g", i, found, one);
    }
}

/* One target may be none of the vocabulary. */
static void check_intervals(const check_model_t &model, const check_work_t &work, sequences_t &sequences,
                            const lmc_cuda_transformer_sink_t &sink) {
    uint32_t n_rows = sequences.n_rows, bad = n_rows > 0 && below(3) == 0 ? below(n_rows) : UINT32_MAX;
    if (bad != UINT32_MAX) sequences.targets[bad] = (int32_t)sequences.vocab_size;
    uint64_t error = LMC_CUDA_NO_ERROR;
    lmc_cuda_transformer_intervals(&model.placed, &work.work, 0, n_rows, &sink, &error, nullptr);
    uint64_t wanted_error = bad == UINT32_MAX ? LMC_CUDA_NO_ERROR : (uint64_t)bad << 8 | LMC_ERROR_TOKEN;
    CHECK(error == wanted_error, "error %llx", (unsigned long long)error);
    for (uint32_t i = 0; i < n_rows; i++) {
        uint64_t triple[3] = {0, 0, 0};
        int64_t target = sequences.targets[i];
        size_t unused;
        const float *logits = &sequences.wanted[i * model.config.n_logits];
        lmc_rows_t row = {logits, 0, 1, sequences.vocab_size, LMC_FLOAT32};
        if (i != bad)
            lmc_intervals(&check_serial, &row, &target, nullptr, &triple[0], &triple[1], &triple[2], &unused);
        CHECK(triple[0] == sink.start[i] && triple[1] == sink.freq[i] && triple[2] == sink.total[i], "row %u",
              i);
    }
}

void check_pass(const check_model_t &model) {
    const lmc_transformer_config_t &config = model.config;
    sequences_t sequences(model);
    uint32_t n_rows = sequences.n_rows, n_block = 1 + below(40), n_first = below(n_rows + 1);
    check_cache_t cache(model, 1, sequences.n, (uint32_t)config.context_length);
    check_work_t work(config, n_rows + below(3));
    check_memory_t logits((size_t)max(n_rows, n_block) * config.n_logits * sizeof(float));
    lmc_cuda_transformer_batch_t batch = {
        sequences.tokens.data(), sequences.row_begin.data(), nullptr, sequences.n, n_rows,
        sequences.n_longest};
    uint64_t error = LMC_CUDA_NO_ERROR;
    int status = lmc_cuda_transformer_pass(&model.placed, &batch, &cache.cache, &work.work, &error, nullptr);
    CHECK(status == cudaSuccess && error == LMC_CUDA_NO_ERROR, "a pass failed");
    float *found = (float *)logits.data;
    lmc_cuda_transformer_head(&model.placed, &work.work, n_first, n_rows - n_first,
                              found + n_first * config.n_logits, nullptr);
    lmc_cuda_transformer_head(&model.placed, &work.work, 0, n_first, found, nullptr);
    check_logits(found, sequences.wanted.data(), n_rows, config.n_logits, "pass");

    std::vector<uint64_t> start(n_rows), freq(n_rows), total(n_rows);
    std::vector<double> log2_probabilities(n_rows);
    lmc_cuda_transformer_sink_t sink = {
        sequences.targets.data(),  start.data(),         freq.data(), total.data(),
        log2_probabilities.data(), sequences.vocab_size, n_block,     found};
    check_log2_softmax(model, work, sequences, sink);
    check_intervals(model, work, sequences, sink);
}

/* Streams that grow by stretches and by steps, pause, go back and start again. */

/* Stretches for some of the streams, each in any piece; logits of their last rows. */
static void extend(const check_model_t &model, check_cache_t &cache,
                   std::vector<check_history_t> &histories) {
    const lmc_transformer_config_t &config = model.config;
    std::vector<uint32_t> streams, row_begin(1, 0);
    std::vector<int32_t> tokens;
    uint32_t n_longest = 0;
    for (uint32_t s = (uint32_t)histories.size(); s-- > 0;) {
        uint32_t room = cache.n_positions - (uint32_t)histories[s].size();
        room = min(room, lmc_cuda_transformer_stretch_max(&config, &cache.cache));
        if (room == 0 || below(2) == 0) continue;
        uint32_t length = 1 + below(room);
        for (uint32_t i = 0; i < length; i++) {
            histories[s].push_back(below((uint32_t)config.n_embeddings));
            tokens.push_back((int32_t)histories[s].back());
        }
        streams.push_back(s);
        row_begin.push_back((uint32_t)tokens.size());
        n_longest = max(n_longest, length);
    }
    uint32_t n_rows = (uint32_t)tokens.size(), n_stretches = (uint32_t)streams.size();
    check_work_t work(config, n_rows);
    lmc_cuda_transformer_batch_t batch = {tokens.data(), row_begin.data(), streams.data(),
                                          n_stretches,   n_rows,           n_longest};
    uint64_t error = LMC_CUDA_NO_ERROR;
    lmc_cuda_transformer_pass(&model.placed, &batch, &cache.cache, &work.work, &error, nullptr);
    CHECK(error == LMC_CUDA_NO_ERROR, "error %llx", (unsigned long long)error);
    for (uint32_t i = 0; i < n_stretches; i++) {
        check_memory_t logits(config.n_logits * sizeof(float));
        lmc_cuda_transformer_head(&model.placed, &work.work, row_begin[i + 1] - 1, 1, (float *)logits.data,
                                  nullptr);
        check_logits((float *)logits.data, model.last_logits_of(histories[streams[i]]).data(), 1,
                     config.n_logits, "stretch");
        CHECK(cache.cache.positions[streams[i]] == histories[streams[i]].size(), "position of %u",
              streams[i]);
    }
}

/* 0 ... n - 1, in a random order where they are to be named. */
static std::vector<uint32_t> random_streams(uint32_t n, bool are_named) {
    std::vector<uint32_t> streams(n);
    for (uint32_t i = 0; i < n; i++)
        streams[i] = i;
    for (uint32_t i = n; are_named && i > 1; i--)
        std::swap(streams[i - 1], streams[below(i)]);
    return streams;
}

static void step(const check_model_t &model, check_cache_t &cache, std::vector<check_history_t> &histories) {
    const lmc_transformer_config_t &config = model.config;
    uint32_t n = 1 + below((uint32_t)histories.size());
    std::vector<int32_t> tokens(n);
    uint64_t error = LMC_CUDA_NO_ERROR, wanted_error = LMC_CUDA_NO_ERROR;
    std::vector<uint8_t> takes_part(n);
    bool are_named = below(2);
    std::vector<uint32_t> streams = random_streams((uint32_t)histories.size(), are_named);
    for (uint32_t row = n; row-- > 0;) {
        check_history_t &history = histories[streams[row]];
        tokens[row] = below(4) == 0 ? -1 - (int32_t)below(2) : (int32_t)below((uint32_t)config.n_embeddings);
        takes_part[row] = tokens[row] >= 0 && history.size() < cache.n_positions;
        if (takes_part[row]) history.push_back(tokens[row]);
        if (below(20) != 0 || takes_part[row]) continue;
        tokens[row] = (int32_t)config.n_embeddings + (int32_t)below(2);
        wanted_error = (uint64_t)row << 8 | LMC_ERROR_TOKEN;
    }
    check_work_t work(config, n);
    check_memory_t logits(n * config.n_logits * sizeof(float));
    float *found = (float *)logits.data;
    lmc_cuda_transformer_step(&model.placed, &cache.cache, n, are_named ? streams.data() : nullptr,
                              tokens.data(), found, &work.work, &error, nullptr);
    CHECK(error == wanted_error, "error %llx", (unsigned long long)error);
    for (uint32_t row = 0; row < n; row++) {
        const check_history_t &history = histories[streams[row]];
        CHECK(cache.cache.positions[streams[row]] == history.size(), "position of %u", streams[row]);
        if (takes_part[row])
            check_logits(found + row * config.n_logits, model.last_logits_of(history).data(), 1,
                         config.n_logits, "step");
    }
}

void check_streams(const check_model_t &model) {
    uint32_t n_streams = 1 + below(below(4) == 0 ? 40 : 5);
    check_cache_t cache(model, (uint32_t)model.config.n_layers, n_streams,
                        1 + below((uint32_t)model.config.context_length));
    std::vector<check_history_t> histories(n_streams);
    for (uint32_t turn = 0; turn < 6; turn++) {
        for (uint32_t s = 0; s < n_streams; s++) {
            if (below(4) != 0) continue;
            size_t n_kept = below(2) == 0 ? 0 : below((uint32_t)histories[s].size() + 1);
            histories[s].resize(n_kept);
            cache.cache.positions[s] = (uint32_t)n_kept;
        }
        if (turn % 3 == 0)
            extend(model, cache, histories);
        else
            step(model, cache, histories);
    }
}

/* A stretch that does not fit is an error of its first row too many, and touches nothing else. */
void check_capacity(const check_model_t &model) {
    uint32_t n_positions = 1 + below((uint32_t)model.config.context_length);
    check_cache_t cache(model, (uint32_t)model.config.n_layers, 2, n_positions);
    n_positions = cache.n_positions;
    uint32_t first = below(n_positions), n_rows = n_positions - first + 1 + below(3);
    std::vector<int32_t> tokens(n_rows, 0);
    uint32_t row_begin[2] = {0, n_rows}, stream = 1;
    check_work_t work(model.config, n_rows);
    lmc_cuda_transformer_batch_t batch = {tokens.data(), row_begin, &stream, 1, n_rows, n_rows};
    uint64_t error = LMC_CUDA_NO_ERROR;
    cache.cache.positions[1] = first;
    memset(cache.cache.keys, 0, (size_t)((char *)cache.cache.values - (char *)cache.cache.keys) * 2);
    lmc_cuda_transformer_pass(&model.placed, &batch, &cache.cache, &work.work, &error, nullptr);
    CHECK(error == ((uint64_t)(n_positions - first) << 8 | LMC_ERROR_CAPACITY), "error %llx",
          (unsigned long long)error);
    CHECK(cache.cache.positions[0] == 0 && cache.cache.positions[1] == n_positions, "%u",
          cache.cache.positions[1]);
    stream = 2;
    error = LMC_CUDA_NO_ERROR;
    lmc_cuda_transformer_pass(&model.placed, &batch, &cache.cache, &work.work, &error, nullptr);
    CHECK(error == LMC_ERROR_CAPACITY, "a stream that is not there: error %llx", (unsigned long long)error);
}

/* One decoding step, launched again and again: as calls, or as a graph captured once. */
struct repeated_step_t {
    std::function<void()> launch;
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;

    repeated_step_t(std::function<void(cudaStream_t)> step, bool as_graph) {
        launch = [step] { step(nullptr); };
        if (!as_graph) return;
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        step(stream);
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "the step cannot be captured");
        cudaGraphInstantiateWithFlags(&executable, graph, 0);
        launch = [this] { cudaGraphLaunch(executable, stream); };
    }
    ~repeated_step_t() {
        if (graph == nullptr) return;
        cudaGraphExecDestroy(executable);
        cudaGraphDestroy(graph);
        cudaStreamDestroy(stream);
    }
    repeated_step_t(const repeated_step_t &) = delete;
};

/* Streams of any bytes as the core decodes them, one step after the other. */
struct decoded_alone_t {
    const check_model_t &model;
    uint32_t vocab_size, n_positions;
    std::vector<check_history_t> histories;
    std::vector<lmc_decoder_t> decoders;
    std::vector<int32_t> tokens;

    void step() {
        static lmc_search_t search;
        for (size_t s = 0; s < tokens.size(); s++) {
            bool takes_part = tokens[s] >= 0 && histories[s].size() < n_positions;
            int32_t input = tokens[s];
            tokens[s] = -1;
            if (!takes_part) continue;
            histories[s].push_back(input);
            std::vector<float> logits = model.last_logits_of(histories[s]);
            lmc_rows_t row = {logits.data(), 0, 1, vocab_size, LMC_FLOAT32};
            size_t unused;
            lmc_decode_step(&check_serial, &row, nullptr, &decoders[s], &search, &tokens[s], &unused);
        }
    }
    void check(const std::vector<lmc_decoder_t> &found) const {
        for (size_t s = 0; s < tokens.size(); s++)
            CHECK(found[s].code == decoders[s].code && found[s].range == decoders[s].range &&
                      found[s].position == decoders[s].position,
                  "the decoder of stream %zu", s);
    }
};

/* A chain of decoding steps against the core's session and decoder, until all streams are full. */
void check_chain(const check_model_t &model) {
    const lmc_transformer_config_t &config = model.config;
    uint32_t n = 1 + below(5), vocab_size = 1 + below((uint32_t)config.n_logits);
    vocab_size = (uint32_t)min((size_t)vocab_size, config.n_embeddings);
    uint32_t n_steps = 1 + below((uint32_t)config.context_length + 2), log_steps = 1 + below(n_steps + 1);
    std::vector<uint8_t> payloads(40 * n);
    for (uint8_t &one : payloads)
        one = (uint8_t)below(256);
    std::vector<lmc_decoder_t> decoders(n);
    std::vector<int32_t> tokens(n), log((size_t)log_steps * n);
    for (uint32_t s = 0; s < n; s++) {
        lmc_decoder_init(&decoders[s], &payloads[40 * s], below(41));
        tokens[s] = below(5) == 0 ? -1 : (int32_t)below((uint32_t)config.n_embeddings);
    }
    uint32_t n_logged = 0;
    uint64_t error = LMC_CUDA_NO_ERROR;
    check_cache_t cache(model, (uint32_t)config.n_layers, n + below(2), (uint32_t)config.context_length);
    check_work_t work(config, n);
    check_memory_t logits(n * config.n_logits * sizeof(float));
    bool are_named = below(2);
    std::vector<uint32_t> streams = random_streams(cache.cache.n_streams, are_named);
    const uint32_t *names = are_named ? streams.data() : nullptr;
    lmc_cuda_transformer_chain_t chain = {
        names, decoders.data(), tokens.data(), log.data(), &n_logged, log_steps, n, vocab_size};
    decoded_alone_t wanted = {model,    vocab_size, cache.n_positions, std::vector<check_history_t>(n),
                              decoders, tokens};
    repeated_step_t repeated(
        [&](cudaStream_t stream) {
            int status = lmc_cuda_transformer_decode_step(&model.placed, &cache.cache, &chain,
                                                          (float *)logits.data, &work.work, &error, stream);
            CHECK(status == cudaSuccess, "a launch failed");
        },
        below(2));
    for (uint32_t step = 0; step < n_steps; step++) {
        repeated.launch();
        wanted.step();
        CHECK(tokens == wanted.tokens, "step %u of %u, %u streams", step, n_steps, n);
        CHECK(n_logged == min(step + 1, log_steps), "%u logged after %u", n_logged, step);
        if (step < log_steps)
            CHECK(std::equal(tokens.begin(), tokens.end(), log.begin() + (size_t)step * n), "the log");
    }
    wanted.check(decoders);
    CHECK(error == LMC_CUDA_NO_ERROR, "error %llx", (unsigned long long)error);
}

/* Values that are not finite stay where they are: a later token does not reach back, nor one stream into
 * another. */
void check_not_finite(check_model_t &model) {
    const lmc_transformer_config_t &config = model.config;
    if (config.context_length < 3) return;
    uint32_t token = below((uint32_t)config.n_embeddings),
             length = 3 + below((uint32_t)config.context_length - 2);
    check_tensor_t &embedding = model.tensors[0];
    uint32_t bits = embedding.dtype == LMC_FLOAT32   ? 0x7F800000u
                    : embedding.dtype == LMC_FLOAT16 ? 0x7C00u
                                                     : 0x7F80u;
    memcpy(embedding.at(token * config.hidden), &bits, lmc_element_bytes(embedding.dtype));
    check_history_t history(length, (token + 1) % (int64_t)config.n_embeddings);
    history[1 + below(length - 1)] = token;
    std::vector<int32_t> tokens(history.begin(), history.end());
    uint32_t row_begin[2] = {0, length};
    check_cache_t cache(model, 1, 1, (uint32_t)config.context_length);
    check_work_t work(config, length);
    check_memory_t logits(length * config.n_logits * sizeof(float));
    lmc_cuda_transformer_batch_t batch = {tokens.data(), row_begin, nullptr, 1, length, length};
    uint64_t error = LMC_CUDA_NO_ERROR;
    lmc_cuda_transformer_pass(&model.placed, &batch, &cache.cache, &work.work, &error, nullptr);
    lmc_cuda_transformer_head(&model.placed, &work.work, 0, length, (float *)logits.data, nullptr);
    check_logits((float *)logits.data, model.logits_of(history).data(), length, config.n_logits,
                 "not finite");
}

/* Launchers of the coder for llmcomp/coding/cuda.py, which checks the arguments: pointers and streams are
 * Python integers here. */
#include "python/cuda_objects.h"

#include <stddef.h>

/* rows: (data, outer stride, inner stride, n_rows, n_inner, vocab_size, dtype); tokens: (data, outer stride,
 * inner stride, bytes of one). */
#define ROWS_FORMAT "(KLLIIIi)"
#define TOKENS_FORMAT "(KLLI)"
typedef struct parsed_rows {
    number_t data;
    long long outer, inner;
    unsigned int n_rows, n_inner, vocab_size;
    int dtype;
} parsed_rows_t;
#define ROWS_TARGETS(P)                                                                                      \
    &(P).data, &(P).outer, &(P).inner, &(P).n_rows, &(P).n_inner, &(P).vocab_size, &(P).dtype

static lmc_cuda_rows_t rows_of(const parsed_rows_t *parsed) {
    return (lmc_cuda_rows_t){POINTER(const void *, parsed->data),
                             parsed->outer,
                             parsed->inner,
                             parsed->n_rows,
                             parsed->n_inner,
                             parsed->vocab_size,
                             (lmc_dtype_t)parsed->dtype};
}

static PyObject *intervals(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, token_data, active, start, freq, total, error;
    long long token_outer, token_inner;
    unsigned int token_bytes;
    parsed_rows_t parsed;
    if (!PyArg_ParseTuple(arguments, "iK" ROWS_FORMAT TOKENS_FORMAT "KKKKK", &device, &stream,
                          ROWS_TARGETS(parsed), &token_data, &token_outer, &token_inner, &token_bytes,
                          &active, &start, &freq, &total, &error)) {
        return NULL;
    }
    lmc_cuda_rows_t rows = rows_of(&parsed);
    lmc_cuda_tokens_t tokens = {POINTER(const void *, token_data), token_outer, token_inner, token_bytes};
    ON_DEVICE(state->error, device, result,
              lmc_cuda_intervals(&rows, &tokens, POINTER(const uint8_t *, active), POINTER(uint64_t *, start),
                                 POINTER(uint64_t *, freq), POINTER(uint64_t *, total),
                                 POINTER(uint64_t *, error), POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

static PyObject *log2_softmax(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, token_data, log2_probabilities, error;
    long long token_outer, token_inner;
    unsigned int token_bytes;
    parsed_rows_t parsed;
    if (!PyArg_ParseTuple(arguments, "iK" ROWS_FORMAT TOKENS_FORMAT "KK", &device, &stream,
                          ROWS_TARGETS(parsed), &token_data, &token_outer, &token_inner, &token_bytes,
                          &log2_probabilities, &error)) {
        return NULL;
    }
    lmc_cuda_rows_t rows = rows_of(&parsed);
    lmc_cuda_tokens_t tokens = {POINTER(const void *, token_data), token_outer, token_inner, token_bytes};
    ON_DEVICE(state->error, device, result,
              lmc_cuda_log2_softmax(&rows, &tokens, POINTER(double *, log2_probabilities), 0,
                                    POINTER(uint64_t *, error), POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

static PyObject *code_length(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, freq, total, bits;
    Py_ssize_t n;
    if (!PyArg_ParseTuple(arguments, "iKnKKK", &device, &stream, &n, &freq, &total, &bits)) return NULL;
    ON_DEVICE(state->error, device, result,
              lmc_cuda_code_length((size_t)n, POINTER(const uint64_t *, freq),
                                   POINTER(const uint64_t *, total), POINTER(double *, bits),
                                   POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

typedef int (*place_fn)(lmc_encoder_t *, uint32_t, uint8_t *, size_t, lmc_cuda_stream_t);

static PyObject *place_encoders(PyObject *module, PyObject *arguments, place_fn place) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, encoders, bytes;
    unsigned int n;
    Py_ssize_t capacity;
    if (!PyArg_ParseTuple(arguments, "iKKIKn", &device, &stream, &encoders, &n, &bytes, &capacity))
        return NULL;
    ON_DEVICE(state->error, device, result,
              place(POINTER(lmc_encoder_t *, encoders), n, POINTER(uint8_t *, bytes), (size_t)capacity,
                    POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

static PyObject *encoders_begin(PyObject *module, PyObject *arguments) {
    return place_encoders(module, arguments, lmc_cuda_encoders_begin);
}

static PyObject *encoders_place(PyObject *module, PyObject *arguments) {
    return place_encoders(module, arguments, lmc_cuda_encoders_place);
}

static PyObject *encoders_put(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, encoders, start, freq, total, active, error;
    unsigned int n;
    if (!PyArg_ParseTuple(arguments, "iKKIKKKKK", &device, &stream, &encoders, &n, &start, &freq, &total,
                          &active, &error)) {
        return NULL;
    }
    ON_DEVICE(state->error, device, result,
              lmc_cuda_encoders_put(POINTER(lmc_encoder_t *, encoders), n, POINTER(const uint64_t *, start),
                                    POINTER(const uint64_t *, freq), POINTER(const uint64_t *, total),
                                    POINTER(const uint8_t *, active), POINTER(uint64_t *, error),
                                    POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

static PyObject *encoders_end(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, encoders;
    unsigned int n;
    if (!PyArg_ParseTuple(arguments, "iKKI", &device, &stream, &encoders, &n)) return NULL;
    ON_DEVICE(
        state->error, device, result,
        lmc_cuda_encoders_end(POINTER(lmc_encoder_t *, encoders), n, POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

static PyObject *decoders_begin(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, decoders, payloads, offsets;
    unsigned int n;
    if (!PyArg_ParseTuple(arguments, "iKKIKK", &device, &stream, &decoders, &n, &payloads, &offsets))
        return NULL;
    ON_DEVICE(state->error, device, result,
              lmc_cuda_decoders_begin(POINTER(lmc_decoder_t *, decoders), n,
                                      POINTER(const uint8_t *, payloads), POINTER(const uint64_t *, offsets),
                                      POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

static PyObject *decode_step(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, active, decoders, tokens, error;
    parsed_rows_t parsed;
    if (!PyArg_ParseTuple(arguments, "iK" ROWS_FORMAT "KKKK", &device, &stream, ROWS_TARGETS(parsed), &active,
                          &decoders, &tokens, &error)) {
        return NULL;
    }
    lmc_cuda_rows_t rows = rows_of(&parsed);
    ON_DEVICE(state->error, device, result,
              lmc_cuda_decode_step(&rows, POINTER(const uint8_t *, active),
                                   POINTER(lmc_decoder_t *, decoders), POINTER(int32_t *, tokens),
                                   POINTER(uint64_t *, error), POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

static PyObject *decode_stream(PyObject *module, PyObject *arguments) {
    module_state_t *state = PyModule_GetState(module);
    int device, result;
    number_t stream, decoder, tokens, error;
    parsed_rows_t parsed;
    if (!PyArg_ParseTuple(arguments, "iK" ROWS_FORMAT "KKK", &device, &stream, ROWS_TARGETS(parsed), &decoder,
                          &tokens, &error)) {
        return NULL;
    }
    lmc_cuda_rows_t rows = rows_of(&parsed);
    ON_DEVICE(state->error, device, result,
              lmc_cuda_decode_stream(&rows, POINTER(lmc_decoder_t *, decoder), POINTER(int32_t *, tokens),
                                     POINTER(uint64_t *, error), POINTER(lmc_cuda_stream_t, stream)));
    return none_or_null(result);
}

#define FUNCTION(NAME, DOC) {#NAME, NAME, METH_VARARGS, DOC}
static PyMethodDef functions[] = {
    FUNCTION(intervals, "intervals(device, stream, rows, tokens, active, start, freq, total, error)."),
    FUNCTION(log2_softmax, "log2_softmax(device, stream, rows, tokens, log2_probabilities, error)."),
    FUNCTION(code_length, "code_length(device, stream, n, freq, total, bits)."),
    FUNCTION(encoders_begin, "encoders_begin(device, stream, encoders, n, bytes, capacity_bytes)."),
    FUNCTION(encoders_place, "encoders_place(device, stream, encoders, n, bytes, capacity_bytes)."),
    FUNCTION(encoders_put, "encoders_put(device, stream, encoders, n, start, freq, total, active, error)."),
    FUNCTION(encoders_end, "encoders_end(device, stream, encoders, n)."),
    FUNCTION(decoders_begin, "decoders_begin(device, stream, decoders, n, payloads, offsets)."),
    FUNCTION(decode_step, "decode_step(device, stream, rows, active, decoders, tokens, error)."),
    FUNCTION(decode_stream, "decode_stream(device, stream, rows, decoder, tokens, error)."),
    {NULL, NULL, 0, NULL},
};

int lmc_py_add_cuda_coding(PyObject *module) {
    if (PyModule_AddFunctions(module, functions) < 0) return -1;
    if (PyModule_AddIntConstant(module, "ENCODER_BYTES", (long)sizeof(lmc_encoder_t)) < 0) return -1;
    if (PyModule_AddIntConstant(module, "ENCODER_LENGTH_OFFSET", (long)offsetof(lmc_encoder_t, n_bytes)) < 0)
        return -1;
    if (PyModule_AddIntConstant(module, "DECODER_BYTES", (long)sizeof(lmc_decoder_t)) < 0) return -1;
    if (PyModule_AddIntConstant(module, "STEP_BYTES_MAX", LMC_STEP_BYTES_MAX) < 0) return -1;
    return PyModule_AddIntConstant(module, "VOCAB_SIZE_MAX", (long)LMC_VOCAB_SIZE_MAX);
}

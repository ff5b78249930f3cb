/* Intervals as arrays of Python, and the objects of the coder, for the files that make and use them. */
#ifndef LLMCOMP_PYTHON_CODING_OBJECTS_H
#define LLMCOMP_PYTHON_CODING_OBJECTS_H

#include "python/common.h"

#include <stdatomic.h>

#include "llmcomp/coder.h"
#include "llmcomp/mixing.h"

/* Three arrays of uint64, C-contiguous and of one shape. */
typedef struct lmc_py_triple {
    PyObject *start, *freq, *total;
} lmc_py_triple_t;

static inline uint64_t *lmc_py_uint64_data(PyObject *array) {
    return (uint64_t *)PyArray_DATA((PyArrayObject *)array);
}

static inline void lmc_py_triple_clear(lmc_py_triple_t *triple) {
    Py_CLEAR(triple->start);
    Py_CLEAR(triple->freq);
    Py_CLEAR(triple->total);
}

/* The triples of tokens, which have the shape of logits without its last axis; the rows that mask leaves out
 * are not read. -1 with an exception set, and then too the triple is the caller's to clear. */
int lmc_py_intervals_of(PyObject *error, const lmc_py_logits_t *logits, PyArrayObject *tokens,
                        PyArrayObject *mask, lmc_py_triple_t *triple);

/* Room for n more symbols and the end of the stream. -1 with an exception set. */
int lmc_py_encoder_reserve(lmc_encoder_t *stream, size_t n_symbols);

typedef struct lmc_py_decoder {
    PyObject_HEAD
    PyObject *payloads; /* a tuple of bytes, which hold what the streams read */
    lmc_decoder_t *streams;
    lmc_mixer_t **mixers; /* NULL: none; each is memory of its own */
    size_t vocab_size;    /* 0: all logits */
    atomic_flag in_use;
} lmc_py_decoder_t;

extern PyType_Spec lmc_py_encoder_spec, lmc_py_decoder_spec;

#endif

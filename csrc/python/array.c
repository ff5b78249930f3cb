/* Arrays of the caller to what the core takes: NumPy, DLPack on the CPU, integers and masks. */
#include "python/common.h"

#include <string.h>

#include "python/dlpack.h"

/* DLPack. */

#define CAPSULE_OWNED "llmcomp_dltensor"

static void owned_capsule_free(PyObject *capsule) {
    dl_managed_tensor_t *managed = PyCapsule_GetPointer(capsule, CAPSULE_OWNED);
    if (managed != NULL && managed->deleter != NULL) managed->deleter(managed);
}

static int check_device(PyObject *error, PyObject *object) {
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    int type, id;
    if (device == NULL) return -1;
    int parsed = PyArg_ParseTuple(device, "ii;__dlpack_device__", &type, &id);
    Py_DECREF(device);
    if (!parsed) return -1;
    if (type == DL_CPU || type == DL_CUDA_HOST) return 0;
    PyErr_Format(error,
                 "logits are on a device of DLPack type %d, id %d; expected the CPU (move them with .cpu())",
                 type, id);
    return -1;
}

/* A NumPy view of a DLPack tensor; bfloat16 as uint16 with *is_bfloat16 set. */
static PyArrayObject *view_of_tensor(PyObject *error, PyObject *capsule, const dl_tensor_t *tensor,
                                     int *is_bfloat16) {
    npy_intp shape[NPY_MAXDIMS], strides[NPY_MAXDIMS];
    int type_number = -1;
    *is_bfloat16 = tensor->dtype.code == DL_BFLOAT && tensor->dtype.bits == 16;
    if (*is_bfloat16) type_number = NPY_UINT16;
    if (tensor->dtype.code == DL_FLOAT && tensor->dtype.bits == 32) type_number = NPY_FLOAT32;
    if (tensor->dtype.code == DL_FLOAT && tensor->dtype.bits == 16) type_number = NPY_FLOAT16;
    if (type_number < 0 || tensor->dtype.lanes != 1) {
        PyErr_Format(error,
                     "logits have DLPack type code %d of %d bits; expected float32, float16 or bfloat16",
                     tensor->dtype.code, tensor->dtype.bits);
        return NULL;
    }
    if (tensor->n_dims < 1 || tensor->n_dims > NPY_MAXDIMS) {
        PyErr_Format(error, "logits have %d dimensions; expected 1 or more", (int)tensor->n_dims);
        return NULL;
    }
    npy_intp element_bytes = tensor->dtype.bits / 8, dense = element_bytes;
    for (int d = tensor->n_dims - 1; d >= 0; d--) {
        shape[d] = (npy_intp)tensor->shape[d];
        strides[d] = tensor->strides == NULL ? dense : (npy_intp)tensor->strides[d] * element_bytes;
        dense *= shape[d] > 0 ? shape[d] : 1;
    }
    PyObject *view = PyArray_New(&PyArray_Type, tensor->n_dims, shape, type_number, strides,
                                 (char *)tensor->data + tensor->byte_offset, 0, 0, NULL);
    if (view == NULL) return NULL;
    Py_INCREF(capsule);
    if (PyArray_SetBaseObject((PyArrayObject *)view, capsule) < 0) {
        Py_DECREF(view);
        return NULL;
    }
    return (PyArrayObject *)view;
}

/* torch does not export a tensor that wants a gradient; here only its numbers are read. A new reference. */
static PyObject *without_gradient(PyObject *object) {
    PyObject *wanted = PyObject_GetAttrString(object, "requires_grad");
    if (wanted == Py_True) {
        Py_DECREF(wanted);
        return PyObject_CallMethod(object, "detach", NULL);
    }
    if (wanted == NULL) PyErr_Clear();
    Py_XDECREF(wanted);
    Py_INCREF(object);
    return object;
}

static PyArrayObject *array_from_dlpack(PyObject *error, PyObject *object, int *is_bfloat16) {
    if (check_device(error, object) < 0) return NULL;
    PyObject *exporter = without_gradient(object);
    if (exporter == NULL) return NULL;
    PyObject *capsule = PyObject_CallMethod(exporter, "__dlpack__", NULL);
    Py_DECREF(exporter);
    if (capsule == NULL) return NULL;
    dl_managed_tensor_t *managed = PyCapsule_GetPointer(capsule, "dltensor");
    PyObject *owned = managed == NULL ? NULL : PyCapsule_New(managed, CAPSULE_OWNED, owned_capsule_free);
    if (owned == NULL) {
        Py_DECREF(capsule);
        return NULL;
    }
    PyCapsule_SetName(capsule, "used_dltensor"); /* from here on `owned` frees the tensor */
    Py_DECREF(capsule);
    PyArrayObject *view = view_of_tensor(error, owned, &managed->tensor, is_bfloat16);
    Py_DECREF(owned);
    return view;
}

/* Logits. */

/* ml_dtypes' bfloat16 (JAX, TensorFlow) is a user-defined NumPy type: known by its name. */
static int is_bfloat16_array(PyArrayObject *array) {
    if (PyArray_ITEMSIZE(array) != 2 || !PyTypeNum_ISUSERDEF(PyArray_TYPE(array))) return 0;
    PyObject *type = (PyObject *)PyArray_DESCR(array)->typeobj,
             *name = PyObject_GetAttrString(type, "__name__");
    int is_bfloat16 = name != NULL && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
    Py_XDECREF(name);
    PyErr_Clear();
    return is_bfloat16;
}

static PyArrayObject *array_of_logits(PyObject *error, PyObject *object, int *is_bfloat16) {
    *is_bfloat16 = 0;
    if (!PyArray_Check(object) && PyObject_HasAttrString(object, "__dlpack__")) {
        return array_from_dlpack(error, object, is_bfloat16);
    }
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(object);
    if (array == NULL) return NULL;
    *is_bfloat16 = is_bfloat16_array(array);
    int type_number = PyArray_TYPE(array);
    if (!*is_bfloat16 && type_number != NPY_FLOAT32 && type_number != NPY_FLOAT16) {
        PyErr_Format(error, "logits have dtype %S; expected float32, float16 or bfloat16",
                     PyArray_DESCR(array));
        Py_DECREF(array);
        return NULL;
    }
    if (PyArray_NDIM(array) < 1) {
        PyErr_SetString(error, "logits have 0 dimensions; expected the vocabulary in the last one");
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

/* Whether rows are contiguous and lie at one distance; then *row_stride is it. */
static int has_even_rows(PyArrayObject *array, npy_intp *row_stride) {
    int last = PyArray_NDIM(array) - 1;
    const npy_intp *shape = PyArray_DIMS(array), *strides = PyArray_STRIDES(array);
    if (PyArray_ISBYTESWAPPED(array)) return 0;
    if (shape[last] > 1 && strides[last] != PyArray_ITEMSIZE(array)) return 0;
    npy_intp expected = 0;
    int seen = 0;
    *row_stride = shape[last] * PyArray_ITEMSIZE(array);
    for (int d = last - 1; d >= 0; d--) {
        if (shape[d] == 1) continue;
        if (!seen) *row_stride = strides[d];
        if (seen && strides[d] != expected) return 0;
        expected = strides[d] * shape[d];
        seen = 1;
    }
    return 1;
}

int lmc_py_logits_parse(PyObject *error, PyObject *object, size_t vocab_size, lmc_py_logits_t *logits) {
    int is_bfloat16;
    npy_intp row_stride;
    PyArrayObject *given = array_of_logits(error, object, &is_bfloat16);
    if (given == NULL) return -1;
    /* A view of our own: the caller's array may get another shape or dtype while it is in use. */
    PyArrayObject *array = (PyArrayObject *)PyArray_View(given, NULL, &PyArray_Type);
    Py_DECREF(given);
    if (array == NULL) return -1;
    if (!has_even_rows(array, &row_stride)) {
        PyArray_Descr *native = PyArray_DescrNewByteorder(PyArray_DESCR(array), NPY_NATIVE);
        PyObject *copy = native == NULL
                             ? NULL
                             : PyArray_FromArray(array, native, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_ENSURECOPY);
        Py_DECREF(array);
        if (copy == NULL) return -1;
        array = (PyArrayObject *)copy;
        has_even_rows(array, &row_stride);
    }
    npy_intp n_logits = PyArray_DIM(array, PyArray_NDIM(array) - 1);
    if (n_logits < 1 || (size_t)n_logits > LMC_VOCAB_SIZE_MAX || vocab_size > (size_t)n_logits) {
        PyErr_Format(error, "the last axis of logits has length %zd; expected %zu to %zu",
                     (Py_ssize_t)n_logits, vocab_size > 1 ? vocab_size : (size_t)1, LMC_VOCAB_SIZE_MAX);
        Py_DECREF(array);
        return -1;
    }
    lmc_dtype_t dtype = PyArray_TYPE(array) == NPY_FLOAT32 ? LMC_FLOAT32
                        : is_bfloat16                      ? LMC_BFLOAT16
                                                           : LMC_FLOAT16;
    logits->owner = array;
    logits->rows = (lmc_rows_t){PyArray_DATA(array), row_stride, (size_t)(PyArray_SIZE(array) / n_logits),
                                vocab_size == 0 ? (size_t)n_logits : vocab_size, dtype};
    return 0;
}

void lmc_py_logits_release(lmc_py_logits_t *logits) {
    Py_CLEAR(logits->owner);
}

/* Integers and masks. */

/* The one way in for numbers that are checked and then used as indices or sizes: a copy that is ours alone,
 * C-contiguous and of this type, before anything is checked. The caller may have threads, or an __array__ of
 * a later argument, that change the array's elements or its shape meanwhile. A new reference; steals `array`.
 */
static PyArrayObject *own_copy(PyArrayObject *array, int type_number) {
    PyObject *copy = PyArray_FromArray(array, PyArray_DescrFromType(type_number),
                                       NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST | NPY_ARRAY_ENSURECOPY |
                                           NPY_ARRAY_ENSUREARRAY);
    Py_DECREF(array);
    return (PyArrayObject *)copy;
}

/* As own_copy, of int64, but the caller's memory where it has that form already, or that of uint64. */
static PyArrayObject *int64_in_place(PyArrayObject *array) {
    if (PyTypeNum_ISUNSIGNED(PyArray_TYPE(array)) && PyArray_ITEMSIZE(array) == 8 &&
        PyArray_ISNOTSWAPPED(array)) {
        PyObject *view = PyArray_View(array, PyArray_DescrFromType(NPY_INT64), &PyArray_Type);
        Py_DECREF(array);
        if (view == NULL) return NULL;
        array = (PyArrayObject *)view;
    }
    PyObject *integers =
        PyArray_FromArray(array, PyArray_DescrFromType(NPY_INT64), NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    return (PyArrayObject *)integers;
}

static int check_shape(PyObject *error, PyArrayObject *array, const char *name, int n_dims,
                       const npy_intp *shape) {
    int same = PyArray_NDIM(array) == n_dims;
    for (int d = 0; same && d < n_dims; d++)
        same = PyArray_DIM(array, d) == shape[d];
    if (same) return 0;
    PyObject *found = PyObject_GetAttrString((PyObject *)array, "shape");
    PyObject *expected = PyArray_IntTupleFromIntp(n_dims, shape);
    if (found != NULL && expected != NULL)
        PyErr_Format(error, "%s have shape %S; expected %S", name, found, expected);
    Py_XDECREF(found);
    Py_XDECREF(expected);
    return -1;
}

static PyArrayObject *parse_integers(PyObject *error, PyObject *object, const char *name, int n_dims,
                                     const npy_intp *shape, int in_place) {
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(object);
    if (array == NULL) return NULL;
    int is_empty_list = PyArray_SIZE(array) == 0; /* np.asarray([]) has dtype float64 */
    if (!PyTypeNum_ISINTEGER(PyArray_TYPE(array)) && !is_empty_list) {
        PyErr_Format(error, "%s have dtype %S; expected integers", name, PyArray_DESCR(array));
        Py_DECREF(array);
        return NULL;
    }
    /* uint64 above 2^63 wraps to a negative number, which is no token either. */
    array = in_place ? int64_in_place(array) : own_copy(array, NPY_INT64);
    if (array != NULL && check_shape(error, array, name, n_dims, shape) < 0) Py_CLEAR(array);
    return array;
}

PyArrayObject *lmc_py_integers_parse(PyObject *error, PyObject *object, const char *name, int n_dims,
                                     const npy_intp *shape) {
    return parse_integers(error, object, name, n_dims, shape, 0);
}

PyArrayObject *lmc_py_integers_borrow(PyObject *error, PyObject *object, const char *name, int n_dims,
                                      const npy_intp *shape) {
    return parse_integers(error, object, name, n_dims, shape, 1);
}

int lmc_py_rows_parse(PyObject *error, PyObject *logits_object, PyObject *tokens_object, size_t vocab_size,
                      lmc_py_logits_t *logits, PyArrayObject **tokens) {
    if (lmc_py_logits_parse(error, logits_object, vocab_size, logits) < 0) return -1;
    *tokens = lmc_py_integers_parse(error, tokens_object, "tokens", PyArray_NDIM(logits->owner) - 1,
                                    PyArray_DIMS(logits->owner));
    if (*tokens != NULL) return 0;
    lmc_py_logits_release(logits);
    return -1;
}

int lmc_py_mask_parse(PyObject *error, PyObject *object, npy_intp n, PyArrayObject **mask) {
    *mask = NULL;
    if (object == NULL || object == Py_None) return 0;
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(object);
    if (array == NULL) return -1;
    if (PyArray_TYPE(array) == NPY_BOOL && (array = own_copy(array, NPY_BOOL)) == NULL) return -1;
    if (PyArray_TYPE(array) != NPY_BOOL || PyArray_NDIM(array) != 1 || PyArray_DIM(array, 0) != n) {
        PyErr_Format(error, "active has dtype %S and %d dimensions; expected bool [%zd]",
                     PyArray_DESCR(array), PyArray_NDIM(array), (Py_ssize_t)n);
        Py_DECREF(array);
        return -1;
    }
    *mask = array;
    return 0;
}

int lmc_py_vocab_size_parse(PyObject *error, PyObject *object, size_t *vocab_size) {
    *vocab_size = 0;
    if (object == NULL || object == Py_None) return 0;
    PyObject *number = PyNumber_Index(object);
    if (number == NULL) return -1;
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (value < 1 || overflow || (size_t)value > LMC_VOCAB_SIZE_MAX) {
        if (!PyErr_Occurred()) {
            PyErr_Format(error, "vocab_size is %S; expected 1 to %zu", object, LMC_VOCAB_SIZE_MAX);
        }
        return -1;
    }
    *vocab_size = (size_t)value;
    return 0;
}

PyObject *lmc_py_raise_status(PyObject *error, lmc_status_t status, size_t row, const int64_t *tokens,
                              size_t vocab_size) {
    if (status == LMC_ERROR_TOKEN) {
        return PyErr_Format(error, "row %zu: token %lld is outside the vocabulary; expected 0 to %zu", row,
                            (long long)tokens[row], vocab_size - 1);
    }
    return PyErr_Format(error, "row %zu: %s", row, lmc_status_message(status));
}

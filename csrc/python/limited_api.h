/* Python.h, and what the stable ABI leaves out of it under the same names, so that one module serves every
 * Python from 3.11 on (setup.py defines Py_LIMITED_API for it). Nothing here knows llmcomp. */
#ifndef LLMCOMP_PYTHON_LIMITED_API_H
#define LLMCOMP_PYTHON_LIMITED_API_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if defined(Py_LIMITED_API)
#include <stdlib.h>

#define PyDict_GET_SIZE PyDict_Size
#define PyTuple_GET_SIZE PyTuple_Size
#define PyTuple_GET_ITEM PyTuple_GetItem
#define PyTuple_SET_ITEM (void)PyTuple_SetItem
#define PyList_SET_ITEM (void)PyList_SetItem
#define PyBytes_GET_SIZE PyBytes_Size
#define PyBytes_AS_STRING PyBytes_AsString
/* As Python's own: no bytes are an allocation too. */
#define PyMem_RawMalloc(N_BYTES) malloc((N_BYTES) > 0 ? (N_BYTES) : 1)
#define PyMem_RawCalloc(N, N_BYTES) calloc((N) > 0 ? (N) : 1, (N_BYTES) > 0 ? (N_BYTES) : 1)
#define PyMem_RawRealloc realloc
#define PyMem_RawFree free
/* Functions there, which take no pointers to our own objects. */
#undef Py_INCREF
#undef Py_DECREF
#undef Py_XDECREF
#define Py_INCREF(OBJECT) Py_IncRef((PyObject *)(OBJECT))
#define Py_DECREF(OBJECT) Py_DecRef((PyObject *)(OBJECT))
#define Py_XDECREF(OBJECT) Py_DecRef((PyObject *)(OBJECT))
#endif

/* A new object of a heap type without a garbage collector's header, and its end. */
static inline PyObject *lmc_py_new(PyTypeObject *type) {
    return PyType_GenericAlloc(type, 0);
}

static inline void lmc_py_delete(PyObject *object, PyTypeObject *type) {
    PyObject_Free(object);
    Py_DECREF(type);
}

#endif

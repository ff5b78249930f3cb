/* The module llmcomp._core: its state, and the list of what it offers. */
#define LMC_PY_IMPORT_ARRAY
#include "python/common.h"

#include "core/base/ieee.h"

/* What compiled this file, for reports. */
#if defined(__clang__)
#define TEXT_OF(number) #number
#define VERSION_OF(major, minor, patch) TEXT_OF(major) "." TEXT_OF(minor) "." TEXT_OF(patch)
#define COMPILER "clang " VERSION_OF(__clang_major__, __clang_minor__, __clang_patchlevel__)
#elif defined(__GNUC__)
#define COMPILER "gcc " __VERSION__
#else
#define COMPILER "another compiler"
#endif

/* The float state, for code of Python that makes floats on which bits depend: llmcomp/float_state.py. */

#define CAPSULE_STATE "llmcomp_float_state"

static void free_state(PyObject *capsule) {
    PyMem_Free(PyCapsule_GetPointer(capsule, CAPSULE_STATE));
}

static PyObject *float_state_enter(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    lmc_float_state_t *saved = PyMem_Malloc(sizeof *saved);
    if (saved == NULL) return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(saved, CAPSULE_STATE, free_state);
    if (capsule == NULL)
        PyMem_Free(saved);
    else
        *saved = lmc_float_state_enter();
    return capsule;
}

static PyObject *float_state_leave(PyObject *module, PyObject *capsule) {
    (void)module;
    const lmc_float_state_t *saved = PyCapsule_GetPointer(capsule, CAPSULE_STATE);
    if (saved == NULL) return NULL;
    lmc_float_state_leave(*saved);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"float_state_enter", float_state_enter, METH_NOARGS,
     "Sets this thread's float state to that of the core; returns what it was."},
    {"float_state_leave", float_state_leave, METH_O,
     "float_state_leave(state): sets it back to what float_state_enter returned."},
    {NULL, NULL, 0, NULL},
};

/* The module. */

static int module_exec(PyObject *module) {
    lmc_module_state_t *state = PyModule_GetState(module);
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    PyObject *errors = PyImport_ImportModule("llmcomp.errors");
    if (errors == NULL) return -1;
    state->error = PyObject_GetAttrString(errors, "Error");
    Py_DECREF(errors);
    if (state->error == NULL) return -1;
    if (lmc_py_add_settings(module) < 0) return -1;
    if (PyModule_AddIntConstant(module, "VOCAB_SIZE_MAX", (long)LMC_VOCAB_SIZE_MAX) < 0) return -1;
    if (PyModule_AddStringConstant(module, "COMPILER", COMPILER) < 0) return -1;
    if (lmc_py_add_coding(module) < 0 || lmc_py_add_transformer(module) < 0) return -1;
    return lmc_py_add_softmax(module);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    lmc_module_state_t *state = PyModule_GetState(module);
    Py_VISIT(state->error);
    Py_VISIT(state->encoder_type);
    Py_VISIT(state->decoder_type);
    Py_VISIT(state->transformer_model_type);
    Py_VISIT(state->transformer_session_type);
    return 0;
}

static int module_clear(PyObject *module) {
    lmc_module_state_t *state = PyModule_GetState(module);
    Py_CLEAR(state->error);
    Py_CLEAR(state->encoder_type);
    Py_CLEAR(state->decoder_type);
    Py_CLEAR(state->transformer_model_type);
    Py_CLEAR(state->transformer_session_type);
    return 0;
}

static void module_free(void *module) {
    module_clear((PyObject *)module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030D0000 && !defined(Py_LIMITED_API)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "llmcomp._core",
    .m_doc = "The C core of llmcomp. Use it through the package's public names.",
    .m_size = sizeof(lmc_module_state_t),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&module_definition);
}

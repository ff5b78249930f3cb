/* The module llmcomp._core: its state, the backend and thread settings, and the list of what it offers. */
#define LMC_PY_IMPORT_ARRAY
#include "python/common.h"

#include <stdatomic.h>

#include "core/base/ieee.h"

/* What compiled this file, for reports. */
#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define COMPILER "gcc " __VERSION__
#else
#define COMPILER "another compiler"
#endif

/* Settings: a default for the process, from when the module is loaded, an override for the thread
 * (use_backend, use_threads). */

static _Atomic(const lmc_backend_t *) default_backend;
static atomic_size_t default_threads = 1;
static _Thread_local const lmc_backend_t *override_backend;
static _Thread_local size_t override_threads;

lmc_context_t lmc_py_context(lmc_executor_t *executor) {
    const lmc_backend_t *backend =
        override_backend != NULL ? override_backend : atomic_load(&default_backend);
    size_t n_threads = override_threads != 0 ? override_threads : atomic_load(&default_threads);
    *executor = lmc_executor_threads(n_threads);
    return (lmc_context_t){backend, n_threads > 1 ? executor : NULL};
}

static const lmc_backend_t *find_backend(PyObject *module, const char *name) {
    const lmc_backend_t *backend = lmc_backend_find(name);
    lmc_module_state_t *state = PyModule_GetState(module);
    if (backend == NULL) PyErr_Format(state->error, "backend \"%s\" is not available on this machine", name);
    return backend;
}

static PyObject *backend_names(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    Py_ssize_t count = (Py_ssize_t)lmc_backend_count();
    PyObject *names = PyTuple_New(count);
    for (Py_ssize_t i = 0; names != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(lmc_backend_name(lmc_backend_at((size_t)i)));
        if (name == NULL)
            Py_CLEAR(names);
        else
            PyTuple_SET_ITEM(names, i, name);
    }
    return names;
}

static PyObject *set_override(PyObject *module, PyObject *arguments) {
    const char *name;
    Py_ssize_t n_threads;
    const lmc_backend_t *backend = NULL;
    if (!PyArg_ParseTuple(arguments, "zn", &name, &n_threads)) return NULL;
    if (name != NULL && (backend = find_backend(module, name)) == NULL) return NULL;
    override_backend = backend;
    override_threads = n_threads < 0 ? 0 : (size_t)n_threads;
    Py_RETURN_NONE;
}

static PyObject *override_in_use(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *name = override_backend == NULL ? NULL : lmc_backend_name(override_backend);
    return Py_BuildValue("zn", name, (Py_ssize_t)override_threads);
}

static PyObject *context_in_use(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    lmc_executor_t executor;
    lmc_context_t context = lmc_py_context(&executor);
    return Py_BuildValue("sn", lmc_backend_name(context.backend), (Py_ssize_t)executor.n_slots);
}

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
    {"backend_names", backend_names, METH_NOARGS,
     "Names of the backends that this machine can run, slowest first."},
    {"set_override", set_override, METH_VARARGS,
     "set_override(backend | None, n_threads | 0): for this thread."},
    {"override_in_use", override_in_use, METH_NOARGS, "The arguments of this thread's last set_override."},
    {"float_state_enter", float_state_enter, METH_NOARGS,
     "Sets this thread's float state to that of the core; returns what it was."},
    {"float_state_leave", float_state_leave, METH_O,
     "float_state_leave(state): sets it back to what float_state_enter returned."},
    {"context_in_use", context_in_use, METH_NOARGS,
     "(backend, n_threads) of a call made now from this thread."},
    {NULL, NULL, 0, NULL},
};

/* The module. */

lmc_module_state_t *lmc_py_state_of_type(PyTypeObject *type) {
#if PY_VERSION_HEX >= 0x030B0000 && !defined(Py_LIMITED_API)
    PyObject *module = PyType_GetModuleByDef(type, &lmc_module_definition);
#else
    PyObject *module = PyType_GetModule(type); /* none of our types can be subclassed */
#endif
    return module == NULL ? NULL : PyModule_GetState(module);
}

/* llmcomp/settings.py reads the environment and raises llmcomp.Error where that makes no sense. */
static int take_defaults(PyObject *module) {
    PyObject *settings = PyImport_ImportModule("llmcomp.settings"), *names = backend_names(module, NULL);
    PyObject *found = NULL;
    const char *name;
    Py_ssize_t n_threads;
    if (settings != NULL && names != NULL)
        found = PyObject_CallMethod(settings, "core_defaults", "(O)", names);
    Py_XDECREF(settings);
    Py_XDECREF(names);
    if (found == NULL) return -1;
    const lmc_backend_t *backend =
        PyArg_ParseTuple(found, "sn;core_defaults", &name, &n_threads) ? find_backend(module, name) : NULL;
    if (backend != NULL) {
        atomic_store(&default_backend, backend);
        atomic_store(&default_threads, (size_t)n_threads);
    }
    Py_DECREF(found);
    return backend == NULL ? -1 : 0;
}

static int module_exec(PyObject *module) {
    lmc_module_state_t *state = PyModule_GetState(module);
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    PyObject *errors = PyImport_ImportModule("llmcomp.errors");
    if (errors == NULL) return -1;
    state->error = PyObject_GetAttrString(errors, "Error");
    Py_DECREF(errors);
    if (state->error == NULL) return -1;
    if (take_defaults(module) < 0) return -1;
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

struct PyModuleDef lmc_module_definition = {
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
    return PyModuleDef_Init(&lmc_module_definition);
}

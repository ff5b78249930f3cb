/* The backend and the threads of a call: a default for the process, from when the module is loaded, and an
 * override for the thread (use_backend, use_threads); and the module's state, which every call looks up. */
#include "python/common.h"

#include <stdatomic.h>

lmc_module_state_t *lmc_py_state_of_type(PyTypeObject *type) {
    PyObject *module = PyType_GetModule(type); /* none of our types can be subclassed */
    return module == NULL ? NULL : PyModule_GetState(module);
}

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

static PyMethodDef functions[] = {
    {"backend_names", backend_names, METH_NOARGS,
     "Names of the backends that this machine can run, slowest first."},
    {"set_override", set_override, METH_VARARGS,
     "set_override(backend | None, n_threads | 0): for this thread."},
    {"override_in_use", override_in_use, METH_NOARGS, "The arguments of this thread's last set_override."},
    {"context_in_use", context_in_use, METH_NOARGS,
     "(backend, n_threads) of a call made now from this thread."},
    {NULL, NULL, 0, NULL},
};

int lmc_py_add_settings(PyObject *module) {
    return PyModule_AddFunctions(module, functions) < 0 || take_defaults(module) < 0 ? -1 : 0;
}

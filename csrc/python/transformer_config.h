/* A model's configuration and tensors as both modules take them from Python: dictionaries by the names of
 * llmcomp/transformer.h. */
#ifndef LLMCOMP_PYTHON_TRANSFORMER_CONFIG_H
#define LLMCOMP_PYTHON_TRANSFORMER_CONFIG_H

#include <Python.h>

#include <stddef.h>
#include <string.h>

#include "llmcomp/transformer.h"

typedef enum lmc_py_field_kind {
    LMC_PY_SIZE,
    LMC_PY_FLAG,
    LMC_PY_FLOAT,
    LMC_PY_DOUBLE,
    LMC_PY_CHOICE
} lmc_py_field_kind_t;

/* A member of a structure; choices of LMC_PY_CHOICE are in the order of their enumeration, then NULL. */
typedef struct lmc_py_field {
    const char *name;
    lmc_py_field_kind_t kind;
    size_t offset;
    const char *const *choices;
} lmc_py_field_t;

static const char *const lmc_py_norms[] = {"layer", "rms", NULL};
static const char *const lmc_py_qk_norms[] = {"none", "head", "each_head", "full", NULL};
static const char *const lmc_py_activations[] = {"gelu",         "gelu_tanh", "silu", "relu",
                                                 "relu_squared", "xielu",     NULL};
static const char *const lmc_py_scalings[] = {"plain", "linear", "llama3", "yarn", NULL};

#define LMC_PY_FIELD(STRUCTURE, NAME, KIND) {#NAME, KIND, offsetof(STRUCTURE, NAME), NULL}
#define LMC_PY_CHOOSE(STRUCTURE, NAME, CHOICES) {#NAME, LMC_PY_CHOICE, offsetof(STRUCTURE, NAME), CHOICES}
#define LMC_PY_OF_CONFIG(NAME, KIND) LMC_PY_FIELD(lmc_transformer_config_t, NAME, KIND)
#define LMC_PY_OF_ROTARY(NAME, KIND) LMC_PY_FIELD(lmc_rotary_t, NAME, KIND)

static const lmc_py_field_t lmc_py_config_fields[] = {
    LMC_PY_OF_CONFIG(n_layers, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(hidden, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(intermediate, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(n_heads, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(n_kv_heads, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(head_dim, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(n_embeddings, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(n_logits, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(context_length, LMC_PY_SIZE),
    LMC_PY_OF_CONFIG(learned_positions, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(head_bias, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(embedding_multiplier, LMC_PY_FLOAT),
    LMC_PY_OF_CONFIG(residual_multiplier, LMC_PY_FLOAT),
    LMC_PY_OF_CONFIG(logits_multiplier, LMC_PY_FLOAT),
    LMC_PY_OF_CONFIG(logits_cap, LMC_PY_FLOAT),
    LMC_PY_CHOOSE(lmc_transformer_config_t, norm, lmc_py_norms),
    LMC_PY_OF_CONFIG(norm_epsilon, LMC_PY_FLOAT),
    LMC_PY_OF_CONFIG(norm_offset, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(pre_norm, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(post_norm, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(parallel_residual, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(shared_norm, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(fused_qkv, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(qkv_clip, LMC_PY_FLOAT),
    LMC_PY_CHOOSE(lmc_transformer_config_t, qk_norm, lmc_py_qk_norms),
    LMC_PY_OF_CONFIG(attention_divisor, LMC_PY_DOUBLE),
    LMC_PY_OF_CONFIG(attention_multiplier, LMC_PY_DOUBLE),
    LMC_PY_OF_CONFIG(score_cap, LMC_PY_FLOAT),
    LMC_PY_CHOOSE(lmc_transformer_config_t, activation, lmc_py_activations),
    LMC_PY_OF_CONFIG(gated, LMC_PY_FLAG),
    LMC_PY_OF_CONFIG(int8, LMC_PY_FLAG),
};

/* Of a kind of layers: its window, and what is the rotary's. */
static const lmc_py_field_t lmc_py_rotary_fields[] = {
    LMC_PY_OF_ROTARY(dims, LMC_PY_SIZE),
    LMC_PY_CHOOSE(lmc_rotary_t, scaling, lmc_py_scalings),
    LMC_PY_OF_ROTARY(base, LMC_PY_DOUBLE),
    LMC_PY_OF_ROTARY(factor, LMC_PY_DOUBLE),
    LMC_PY_OF_ROTARY(original_length, LMC_PY_DOUBLE),
    LMC_PY_OF_ROTARY(low_factor, LMC_PY_DOUBLE),
    LMC_PY_OF_ROTARY(high_factor, LMC_PY_DOUBLE),
    LMC_PY_OF_ROTARY(beta_fast, LMC_PY_DOUBLE),
    LMC_PY_OF_ROTARY(beta_slow, LMC_PY_DOUBLE),
    LMC_PY_OF_ROTARY(attention_factor, LMC_PY_DOUBLE),
    LMC_PY_OF_ROTARY(truncate, LMC_PY_FLAG),
};

#define LMC_PY_COUNT(ARRAY) (sizeof(ARRAY) / sizeof *(ARRAY))

static inline int lmc_py_choice_parse(PyObject *error, const lmc_py_field_t *field, PyObject *value,
                                      int *choice) {
    for (*choice = 0; PyUnicode_Check(value) && field->choices[*choice] != NULL; ++*choice) {
        if (PyUnicode_CompareWithASCIIString(value, field->choices[*choice]) == 0) return 0;
    }
    PyErr_Format(error, "config: %s is %R, which is none of its values", field->name, value);
    return -1;
}

/* value is written to the member of target. */
static inline int lmc_py_field_parse(PyObject *error, const lmc_py_field_t *field, PyObject *value,
                                     void *target) {
    char *at = (char *)target + field->offset;
    Py_ssize_t size = 0;
    double number = 0;
    int integer = 0;
    switch (field->kind) {
    case LMC_PY_SIZE:
        size = PyLong_AsSsize_t(value);
        if (size == -1 && PyErr_Occurred()) return -1;
        if (size < 0) {
            PyErr_Format(error, "config: %s is %zd, expected 0 or more", field->name, size);
            return -1;
        }
        memcpy(at, &(size_t){(size_t)size}, sizeof(size_t));
        return 0;
    case LMC_PY_FLAG:
        integer = PyObject_IsTrue(value);
        break;
    case LMC_PY_CHOICE:
        if (lmc_py_choice_parse(error, field, value, &integer) < 0) return -1;
        break;
    default:
        number = PyFloat_AsDouble(value);
        if (number == -1 && PyErr_Occurred()) return -1;
        if (field->kind == LMC_PY_DOUBLE)
            memcpy(at, &number, sizeof number);
        else
            memcpy(at, &(float){(float)number}, sizeof(float));
        return 0;
    }
    if (integer < 0) return -1;
    memcpy(at, &integer, sizeof integer);
    return 0;
}

/* Every field of the dictionary; n_others: keys that belong to somebody else. */
static inline int lmc_py_fields_parse(PyObject *error, PyObject *dictionary, const lmc_py_field_t *fields,
                                      size_t n_fields, Py_ssize_t n_others, void *target) {
    if (!PyDict_Check(dictionary)) {
        PyErr_SetString(error, "config: expected a dict");
        return -1;
    }
    for (size_t i = 0; i < n_fields; i++) {
        PyObject *value = PyDict_GetItemString(dictionary, fields[i].name);
        if (value == NULL) {
            PyErr_Format(error, "config: lacks %s", fields[i].name);
            return -1;
        }
        if (lmc_py_field_parse(error, &fields[i], value, target) < 0) return -1;
    }
    if (PyDict_GET_SIZE(dictionary) == (Py_ssize_t)n_fields + n_others) return 0;
    PyErr_Format(error, "config: %zd keys, expected %zd: %R", PyDict_GET_SIZE(dictionary),
                 (Py_ssize_t)n_fields + n_others, dictionary);
    return -1;
}

static inline int lmc_py_kinds_parse(PyObject *error, PyObject *kinds, lmc_transformer_config_t *config) {
    if (!PyTuple_Check(kinds) || PyTuple_GET_SIZE(kinds) > LMC_LAYER_KINDS_MAX) {
        PyErr_Format(error, "config: kinds is no tuple of at most %d dicts", LMC_LAYER_KINDS_MAX);
        return -1;
    }
    static const lmc_py_field_t window = LMC_PY_FIELD(lmc_layer_kind_t, window, LMC_PY_SIZE);
    config->n_kinds = (size_t)PyTuple_GET_SIZE(kinds);
    for (size_t i = 0; i < config->n_kinds; i++) {
        PyObject *kind = PyTuple_GET_ITEM(kinds, (Py_ssize_t)i);
        if (lmc_py_fields_parse(error, kind, lmc_py_rotary_fields, LMC_PY_COUNT(lmc_py_rotary_fields), 1,
                                &config->kinds[i].rotary) < 0)
            return -1;
        PyObject *value = PyDict_GetItemString(kind, window.name);
        if (value == NULL) {
            PyErr_SetString(error, "config: a kind lacks its window");
            return -1;
        }
        if (lmc_py_field_parse(error, &window, value, &config->kinds[i]) < 0) return -1;
    }
    return 0;
}

/* dictionary: the fields, "kinds", a tuple of dicts, and "layer_kinds", bytes with a kind for every layer. */
static inline int lmc_py_config_parse(PyObject *error, PyObject *dictionary,
                                      lmc_transformer_config_t *config) {
    memset(config, 0, sizeof *config);
    if (lmc_py_fields_parse(error, dictionary, lmc_py_config_fields, LMC_PY_COUNT(lmc_py_config_fields), 2,
                            config) < 0)
        return -1;
    PyObject *kinds = PyDict_GetItemString(dictionary, "kinds");
    PyObject *layer_kinds = PyDict_GetItemString(dictionary, "layer_kinds");
    if (kinds == NULL || layer_kinds == NULL || !PyBytes_Check(layer_kinds)) {
        PyErr_SetString(error, "config: lacks kinds, a tuple, or layer_kinds, bytes");
        return -1;
    }
    size_t n_layers = (size_t)PyBytes_GET_SIZE(layer_kinds);
    if (n_layers != config->n_layers || n_layers > LMC_LAYERS_MAX) {
        PyErr_Format(error, "config: layer_kinds has %zu layers, expected %zu, at most %d", n_layers,
                     config->n_layers, LMC_LAYERS_MAX);
        return -1;
    }
    memcpy(config->layer_kinds, PyBytes_AS_STRING(layer_kinds), n_layers);
    return lmc_py_kinds_parse(error, kinds, config);
}

/* Tensors: of the model, and of each layer, a dict from the names of slots to arrays; None, or a name left
 * out, is a tensor that the model does not have. */

static const char *const lmc_py_model_slots[] = {
#define LMC_PY_SLOT_NAME(NAME, name) #name,
    LMC_MODEL_SLOTS(LMC_PY_SLOT_NAME)};
static const char *const lmc_py_layer_slots[] = {LMC_LAYER_SLOTS(LMC_PY_SLOT_NAME)};

/* Takes an array for a tensor of n_elements; the caller's own, since the modules see arrays differently. */
typedef int (*lmc_py_take_fn)(void *taker, const char *name, PyObject *array, size_t n_elements,
                              lmc_transformer_tensor_t *tensor);

static inline int lmc_py_slots_take(PyObject *error, PyObject *arrays, const char *const *names,
                                    const lmc_shape_t *shapes, size_t n_slots, lmc_py_take_fn take,
                                    void *taker, lmc_transformer_tensor_t *slots) {
    Py_ssize_t n_known = 0;
    if (!PyDict_Check(arrays)) {
        PyErr_SetString(error, "tensors: expected a dict of arrays");
        return -1;
    }
    for (size_t i = 0; i < n_slots; i++) {
        PyObject *array = PyDict_GetItemString(arrays, names[i]);
        size_t n_elements = shapes[i].n_rows * (shapes[i].n_columns > 0 ? shapes[i].n_columns : 1);
        slots[i] = (lmc_transformer_tensor_t){.dtype = LMC_FLOAT32};
        n_known += array != NULL;
        if (array == NULL || array == Py_None) continue;
        if (n_elements == 0) {
            PyErr_Format(error, "tensor %s: the model has no place for it", names[i]);
            return -1;
        }
        if (take(taker, names[i], array, n_elements, &slots[i]) < 0) return -1;
    }
    if (n_known == PyDict_GET_SIZE(arrays)) return 0;
    PyErr_Format(error, "tensors: %zd names, of which %zd are known", PyDict_GET_SIZE(arrays), n_known);
    return -1;
}

/* layers: room for config->n_layers. */
static inline int lmc_py_weights_take(PyObject *error, const lmc_transformer_config_t *config,
                                      PyObject *of_model, PyObject *of_layers, lmc_py_take_fn take,
                                      void *taker, lmc_transformer_layer_t *layers,
                                      lmc_transformer_weights_t *weights) {
    lmc_shape_t model_shapes[LMC_MODEL_SLOT_COUNT], layer_shapes[LMC_LAYER_SLOT_COUNT];
    for (int slot = 0; slot < LMC_MODEL_SLOT_COUNT; slot++)
        model_shapes[slot] = lmc_model_slot_shape(config, (lmc_model_slot_t)slot);
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++)
        layer_shapes[slot] = lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot);
    if (!PyTuple_Check(of_layers) || (size_t)PyTuple_GET_SIZE(of_layers) != config->n_layers) {
        PyErr_Format(error, "layers: expected a tuple of %zu dicts", config->n_layers);
        return -1;
    }
    weights->layers = layers;
    if (lmc_py_slots_take(error, of_model, lmc_py_model_slots, model_shapes, LMC_MODEL_SLOT_COUNT, take,
                          taker, weights->slots) < 0)
        return -1;
    for (size_t i = 0; i < config->n_layers; i++) {
        if (lmc_py_slots_take(error, PyTuple_GET_ITEM(of_layers, (Py_ssize_t)i), lmc_py_layer_slots,
                              layer_shapes, LMC_LAYER_SLOT_COUNT, take, taker, layers[i].slots) < 0)
            return -1;
    }
    return 0;
}

#endif

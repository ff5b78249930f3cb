/* The tables that a model needs beside its weights: norms, biases and other vectors as binary32, and the
 * cosines and sines of the rotary positions. */
#include <string.h>

#include "core/transformer/group.h"
#include "core/base/parallel.h"

#define LMC_PI 0x1.921fb54442d18p+1

/* A panel may begin at any position of the context and looks 15 further. */
static size_t table_length(const lmc_transformer_config_t *config) {
    return (config->context_length + 2 * LMC_LANES - 1) / LMC_LANES * LMC_LANES;
}

static int is_vector(lmc_shape_t shape) {
    return shape.n_rows > 0 && shape.n_columns == 0;
}

static size_t layer_vectors(const lmc_transformer_config_t *config, size_t *offsets) {
    size_t length = 0;
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++) {
        lmc_shape_t shape = lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot);
        if (offsets != NULL) offsets[slot] = length;
        if (is_vector(shape)) length += shape.n_rows;
    }
    return length;
}

static size_t model_vectors(const lmc_transformer_config_t *config, size_t *offsets) {
    size_t first = config->n_layers * layer_vectors(config, NULL), length = 0;
    for (int slot = 0; slot < LMC_MODEL_SLOT_COUNT; slot++) {
        lmc_shape_t shape = lmc_model_slot_shape(config, (lmc_model_slot_t)slot);
        if (offsets != NULL) offsets[slot] = first + length;
        if (is_vector(shape)) length += shape.n_rows;
    }
    return first + length;
}

static int are_equal(const lmc_rotary_t *a, const lmc_rotary_t *b) {
    return a->dims == b->dims && a->scaling == b->scaling && a->base == b->base && a->factor == b->factor &&
           a->original_length == b->original_length && a->low_factor == b->low_factor &&
           a->high_factor == b->high_factor && a->beta_fast == b->beta_fast && a->beta_slow == b->beta_slow &&
           a->attention_factor == b->attention_factor && a->truncate == b->truncate;
}

/* The first kind that has the same positions. */
static size_t kind_with_table(const lmc_transformer_config_t *config, size_t kind) {
    size_t i = 0;
    while (!are_equal(&config->kinds[i].rotary, &config->kinds[kind].rotary))
        i++;
    return i;
}

/* Elements of the cosines, or the sines, that a kind does not share with one before it. */
static size_t table_floats(const lmc_transformer_config_t *config, size_t kind) {
    if (kind_with_table(config, kind) != kind) return 0;
    return config->kinds[kind].rotary.dims / 2 * table_length(config);
}

size_t lmc_transformer_tables_bound(const lmc_transformer_config_t *config) {
    size_t n_floats = model_vectors(config, NULL);
    for (size_t kind = 0; kind < config->n_kinds; kind++)
        n_floats += 2 * table_floats(config, kind);
    return n_floats * sizeof(float) + sizeof(float);
}

/* Frequencies. */

static double yarn_dim(const lmc_rotary_t *rotary, double n_turns) {
    double length = rotary->original_length / (n_turns * 2.0 * LMC_PI);
    return (double)rotary->dims * lmc_log64(length) / (2.0 * lmc_log64(rotary->base));
}

static double floor_of(double x) {
    double rounded = (x + LMC_ROUND_MAGIC64) - LMC_ROUND_MAGIC64;
    return rounded > x ? rounded - 1.0 : rounded;
}

static float yarn_frequency(const lmc_rotary_t *rotary, size_t i, float power, float plain) {
    double low = yarn_dim(rotary, rotary->beta_fast), high = yarn_dim(rotary, rotary->beta_slow);
    double last = (double)(rotary->dims - 1);
    if (rotary->truncate) low = floor_of(low), high = -floor_of(-high);
    low = low > 0.0 ? low : 0.0;
    high = high < last ? high : last;
    if (low == high) high += 0.001;
    float ramp = lmc_div(lmc_sub((float)i, (float)low), (float)(high - low));
    ramp = ramp > 0.0f ? ramp : 0.0f;
    ramp = ramp < 1.0f ? ramp : 1.0f;
    float share = lmc_sub(1.0f, ramp);
    float stretched = lmc_div(1.0f, lmc_mul((float)rotary->factor, power));
    return lmc_add(lmc_mul(stretched, lmc_sub(1.0f, share)), lmc_mul(plain, share));
}

static float llama3_frequency(const lmc_rotary_t *rotary, float plain) {
    float length = (float)rotary->original_length, factor = (float)rotary->factor;
    float wave = lmc_mul(lmc_div(1.0f, plain), (float)(2.0 * LMC_PI));
    int is_long = wave > (float)(rotary->original_length / rotary->low_factor);
    int is_short = wave < (float)(rotary->original_length / rotary->high_factor);
    float frequency = is_long ? lmc_div(plain, factor) : plain;
    if (is_long || is_short) return frequency;
    float smooth = lmc_sub(lmc_mul(lmc_div(1.0f, wave), length), (float)rotary->low_factor);
    smooth = lmc_div(smooth, (float)(rotary->high_factor - rotary->low_factor));
    return lmc_add(lmc_div(lmc_mul(lmc_sub(1.0f, smooth), frequency), factor), lmc_mul(smooth, frequency));
}

/* With the roundings of the published models: 2i/n, base^(2i/n), its reciprocal, what a scaling makes of
 * that, and the product with the position are each rounded to binary32. */
static float frequency_of(const lmc_rotary_t *rotary, size_t i) {
    float exponent = lmc_div((float)(2 * i), (float)rotary->dims);
    float power = (float)lmc_exp64((double)exponent * lmc_log64(rotary->base));
    float plain = lmc_div(1.0f, power);
    if (rotary->scaling == LMC_ROTARY_LINEAR) return lmc_div(plain, (float)rotary->factor);
    if (rotary->scaling == LMC_ROTARY_LLAMA3) return llama3_frequency(rotary, plain);
    if (rotary->scaling == LMC_ROTARY_YARN) return yarn_frequency(rotary, i, power, plain);
    return plain;
}

static float attention_factor_of(const lmc_rotary_t *rotary) {
    if (rotary->scaling != LMC_ROTARY_YARN) return 1.0f;
    if (rotary->attention_factor != 0.0) return (float)rotary->attention_factor;
    return rotary->factor <= 1.0 ? 1.0f : (float)(0.1 * lmc_log64(rotary->factor) + 1.0);
}

typedef struct lmc_angles {
    lmc_transformer_model_t *model;
    size_t kind;
} lmc_angles_t;

static void fill_angles(void *argument, size_t i, size_t slot) {
    (void)slot;
    const lmc_angles_t *angles = (const lmc_angles_t *)argument;
    lmc_transformer_model_t *model = angles->model;
    const lmc_rotary_t *rotary = &model->config.kinds[angles->kind].rotary;
    float frequency = frequency_of(rotary, i), factor = attention_factor_of(rotary);
    float *sines = model->sines[angles->kind] + i * model->table_length;
    float *cosines = model->cosines[angles->kind] + i * model->table_length;
    for (size_t position = 0; position < model->table_length; position++) {
        double sine, cosine;
        lmc_sincos64((double)lmc_mul((float)position, frequency), &sine, &cosine);
        sines[position] = lmc_mul((float)sine, factor);
        cosines[position] = lmc_mul((float)cosine, factor);
    }
}

/* Places and fills the tables of all kinds. */
static void make_angles(const lmc_context_t *context, lmc_transformer_model_t *model, float *at) {
    const lmc_transformer_config_t *config = &model->config;
    for (size_t kind = 0; kind < config->n_kinds; kind++) {
        size_t n_floats = table_floats(config, kind), same = kind_with_table(config, kind);
        model->cosines[kind] = same == kind ? at : model->cosines[same];
        model->sines[kind] = same == kind ? at + n_floats : model->sines[same];
        at += 2 * n_floats;
        lmc_angles_t angles = {model, kind};
        if (n_floats > 0)
            lmc_run_tasks(context->executor, config->kinds[kind].rotary.dims / 2, fill_angles, &angles);
    }
}

/* Vectors. */

static void fill_vector(const lmc_context_t *context, lmc_transformer_tensor_t tensor, size_t n, int is_gain,
                        int has_offset, float *target) {
    if (tensor.data == NULL) {
        for (size_t i = 0; i < n; i++)
            target[i] = is_gain ? 1.0f : 0.0f;
        return;
    }
    context->backend->transformer->widen(tensor.data, tensor.dtype, n, target);
    for (size_t i = 0; i < n && is_gain && has_offset; i++)
        target[i] = lmc_add(1.0f, target[i]);
}

#define LMC_IS_GAIN(NAME, name) sizeof #name > 5 && strcmp(&#name[sizeof #name - 5], "gain") == 0,
static int is_layer_gain(int slot) {
    const int gains[] = {LMC_LAYER_SLOTS(LMC_IS_GAIN)};
    return gains[slot];
}

static void fill_layer(const lmc_context_t *context, lmc_transformer_model_t *model, size_t layer) {
    const lmc_transformer_config_t *config = &model->config;
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++) {
        lmc_shape_t shape = lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot);
        float *target = lmc_layer_vector(model, layer, (lmc_layer_slot_t)slot);
        if (is_vector(shape))
            fill_vector(context, model->weights.layers[layer].slots[slot], shape.n_rows, is_layer_gain(slot),
                        config->norm_offset, target);
    }
    if (config->activation != LMC_ACTIVATION_XIELU) return;
    float *numbers = lmc_layer_vector(model, layer, LMC_LAYER_ACTIVATION);
    numbers[0] = (float)lmc_softplus64((double)numbers[0]);
    numbers[1] = (float)((double)numbers[2] + lmc_softplus64((double)numbers[1]));
}

/* Scores times log2 e and the model's own factor are exponents of 2; where scores are capped, the cap comes
 * between. */
static lmc_softmax_rule_t softmax_of(const lmc_transformer_config_t *config) {
    const double log2_e = 0x1.71547652b82fep+0;
    double root = __builtin_sqrt(config->attention_divisor), multiplier = config->attention_multiplier;
    double exponents = multiplier != 0.0 ? log2_e * multiplier : log2_e / root, cap_scale = 0.0;
    if (config->score_cap != 0.0f) {
        cap_scale = (multiplier != 0.0 ? multiplier : 1.0 / root) / (double)config->score_cap;
        exponents = log2_e * (double)config->score_cap;
    }
    return (lmc_softmax_rule_t){.scale = (float)exponents,
                                .floor = (float)(LMC_SOFTMAX_EXPONENT_FLOOR / exponents),
                                .cap_scale = (float)cap_scale};
}

typedef struct lmc_init {
    const lmc_context_t *context;
    lmc_transformer_model_t *model;
} lmc_init_t;

static void fill_vectors(void *argument, size_t index, size_t slot) {
    (void)index, (void)slot;
    const lmc_init_t *init = (const lmc_init_t *)argument;
    lmc_transformer_model_t *model = init->model;
    const lmc_transformer_config_t *config = &model->config;
    model->softmax = softmax_of(config);
    for (size_t i = 0; i < config->n_layers; i++)
        fill_layer(init->context, model, i);
    for (int i = 0; i < LMC_MODEL_SLOT_COUNT; i++) {
        lmc_shape_t shape = lmc_model_slot_shape(config, (lmc_model_slot_t)i);
        if (is_vector(shape))
            fill_vector(init->context, model->weights.slots[i], shape.n_rows, i == LMC_MODEL_FINAL_NORM_GAIN,
                        config->norm_offset, model->vectors + model->model_vector_offsets[i]);
    }
}

/* Tensors. */

/* Is a tensor there where there must be one, and none where the model has no place for it? */
static int is_tensor_right(lmc_shape_t shape, lmc_transformer_tensor_t tensor, int is_needed) {
    if (shape.n_rows == 0) return tensor.data == NULL;
    return tensor.data != NULL || (shape.n_columns == 0 && !is_needed);
}

int lmc_transformer_has_tensors(const lmc_transformer_config_t *config,
                                const lmc_transformer_weights_t *weights) {
    int all = 1;
    for (int slot = 0; slot < LMC_MODEL_SLOT_COUNT; slot++)
        all &= is_tensor_right(lmc_model_slot_shape(config, (lmc_model_slot_t)slot), weights->slots[slot], 0);
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++) {
        lmc_shape_t shape = lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot);
        for (size_t i = 0; i < config->n_layers; i++)
            all &= is_tensor_right(shape, weights->layers[i].slots[slot], slot == LMC_LAYER_ACTIVATION);
    }
    return all;
}

/* Matrices of linear maps are codes where the config says int8, and only there. */
static int are_of_arithmetic(const lmc_transformer_config_t *config,
                             const lmc_transformer_weights_t *weights) {
    int is_int8 = config->int8 != 0, agree = (weights->slots[LMC_MODEL_HEAD].scales != NULL) == is_int8;
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++) {
        int is_matrix = lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot).n_columns > 0;
        for (size_t i = 0; i < config->n_layers && is_matrix; i++)
            agree &= (weights->layers[i].slots[slot].scales != NULL) == is_int8;
    }
    return agree;
}

lmc_status_t lmc_transformer_model_init(const lmc_context_t *context, const lmc_transformer_config_t *config,
                                        const lmc_transformer_weights_t *weights, void *tables,
                                        size_t tables_bytes, lmc_transformer_model_t *model) {
    lmc_status_t status = lmc_transformer_config_check(config);
    if (status != LMC_OK) return status;
    if (tables_bytes < lmc_transformer_tables_bound(config)) return LMC_ERROR_CAPACITY;
    if (!lmc_transformer_has_tensors(config, weights) || !are_of_arithmetic(config, weights))
        return LMC_ERROR_ARGUMENT;
    model->config = *config;
    model->weights = *weights;
    model->table_length = table_length(config);
    model->vectors = (float *)tables;
    model->layer_vectors_length = layer_vectors(config, model->layer_vector_offsets);
    size_t n_vectors = model_vectors(config, model->model_vector_offsets);
    lmc_init_t init = {context, model};
    lmc_run_tasks(NULL, 1, fill_vectors, &init);
    make_angles(context, model, model->vectors + n_vectors);
    return LMC_OK;
}

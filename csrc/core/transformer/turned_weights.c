/* Of a small model matrices are turned once for many steps: with few tokens a step that is a fifth of a
 * product. */
#include "core/transformer/turned_weights.h"

#include "core/base/size.h"
#include "core/transformer/forward.h"

/* Of the head; what is turned takes its memory once more. */
#define HEAD_WEIGHTS_MAX ((size_t)1 << 22)

static size_t matrix_bytes(lmc_shape_t shape) {
    return lmc_round_up(shape.n_rows * shape.n_columns * sizeof(uint16_t), LMC_HOST_ALIGNMENT);
}

size_t lmc_turned_weights_bound(const lmc_transformer_config_t *config) {
    lmc_shape_t head = {config->n_logits, config->hidden};
    size_t layer = lmc_round_up(sizeof(lmc_transformer_layer_t), LMC_HOST_ALIGNMENT);
    if (!lmc_is_small(config) || config->int8 || head.n_rows > HEAD_WEIGHTS_MAX / head.n_columns) return 0;
    for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++)
        layer += matrix_bytes(lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot));
    return config->n_layers * layer + matrix_bytes(head);
}

/* The tensor itself where the kernels cannot turn it. */
static lmc_transformer_tensor_t turn_matrix(const lmc_transformer_kernels_t *kernels,
                                            lmc_transformer_tensor_t tensor, lmc_shape_t shape,
                                            lmc_arena_t *arena) {
    if (shape.n_columns == 0 || tensor.dtype == LMC_FLOAT32 || shape.n_rows % LMC_TURNED_ROWS != 0 ||
        shape.n_columns % LMC_TURNED_COLUMNS != 0)
        return tensor;
    void *turned = lmc_arena_cut(arena, shape.n_rows * shape.n_columns, sizeof(uint16_t));
    kernels->turn(tensor.data, tensor.dtype, shape.n_rows, shape.n_columns, turned);
    return (lmc_transformer_tensor_t){.data = turned, .dtype = tensor.dtype, .is_turned = 1};
}

lmc_transformer_model_t lmc_turn_weights(const lmc_transformer_kernels_t *kernels,
                                         const lmc_transformer_model_t *model, void *memory) {
    lmc_arena_t arena = {(char *)memory, 0, LMC_HOST_ALIGNMENT};
    const lmc_transformer_config_t *config = &model->config;
    lmc_transformer_model_t result = *model;
    lmc_transformer_layer_t *layers =
        (lmc_transformer_layer_t *)lmc_arena_cut(&arena, config->n_layers, sizeof *layers);
    for (size_t i = 0; i < config->n_layers; i++) {
        layers[i] = model->weights.layers[i];
        for (int slot = 0; slot < LMC_LAYER_SLOT_COUNT; slot++)
            layers[i].slots[slot] = turn_matrix(kernels, layers[i].slots[slot],
                                                lmc_layer_slot_shape(config, (lmc_layer_slot_t)slot), &arena);
    }
    result.weights.layers = layers;
    result.weights.slots[LMC_MODEL_HEAD] =
        turn_matrix(kernels, model->weights.slots[LMC_MODEL_HEAD],
                    (lmc_shape_t){config->n_logits, config->hidden}, &arena);
    return result;
}

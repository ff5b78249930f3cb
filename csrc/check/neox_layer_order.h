/* The tensors of a GPT-NeoX layer in the order in which they lie in a dumped model
 * (tests/support/dump_model.py), and in which those of the written hashes were drawn. */
#ifndef LLMCOMP_CHECK_NEOX_LAYER_ORDER_H
#define LLMCOMP_CHECK_NEOX_LAYER_ORDER_H

#include "llmcomp/transformer.h"

static const lmc_layer_slot_t neox_layer_order[] = {LMC_LAYER_ATTENTION_NORM_GAIN,
                                                    LMC_LAYER_ATTENTION_NORM_BIAS,
                                                    LMC_LAYER_MLP_NORM_GAIN,
                                                    LMC_LAYER_MLP_NORM_BIAS,
                                                    LMC_LAYER_QKV,
                                                    LMC_LAYER_QKV_BIAS,
                                                    LMC_LAYER_OUT,
                                                    LMC_LAYER_OUT_BIAS,
                                                    LMC_LAYER_UP,
                                                    LMC_LAYER_UP_BIAS,
                                                    LMC_LAYER_DOWN,
                                                    LMC_LAYER_DOWN_BIAS};

#endif

/* The kernels of the GPT-NeoX forward pass that a backend brings. */
#ifndef LLMCOMP_CORE_NEOX_KERNELS_H
#define LLMCOMP_CORE_NEOX_KERNELS_H

typedef struct lmc_neox_kernels {
    void (*unused)(void); /* replaced by the engine */
} lmc_neox_kernels_t;

#endif

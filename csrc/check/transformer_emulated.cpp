/* The exact engine's CUDA sources as they are, on the emulated device of emulated/cuda_runtime.h and against
 * the serial backend, bit for bit: transformer_emulated SEED N_CASES. First the written cases and each switch
 * by itself, then N_CASES of everything at random. */
#include <cuda_runtime.h>

#include "transformer_emulated.h"

static uint32_t below(uint32_t n) {
    return check_below(n);
}

/* The head sizes at which attention cuts a tile of values into 2 and 4 stages, and a step's threads have two
 * features; contexts of several tiles of keys and several stages of a step. */
static void check_wide_heads() {
    for (uint32_t head_dim : {66u, 130u, 256u}) {
        check_model_t model(check_random_neox(head_dim, 70));
        check_pass(model);
        check_streams(model);
    }
}

static void check_kernels() {
    emulated_machine.major = below(4) == 0 ? 8 : 9;
    emulated_machine.n_processors = 1;
    for (uint32_t kind = 0; kind < 3; kind++) {
        check_product(kind);
        check_code_product(kind);
    }
    check_norm(false);
    check_norm(true);
    for (uint32_t i = 0; i < 4; i++) {
        check_softmax();
        check_attend_step();
    }
}

static void check_model() {
    emulated_machine.n_processors = 1 + (int)below(20);
    check_model_t model(check_random_config());
    check_pass(model);
    check_streams(model);
    check_capacity(model);
    check_chain(model);
    check_not_finite(model);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: transformer_emulated SEED N_CASES\n");
        return 2;
    }
    check_seed(strtoull(argv[1], nullptr, 0));
    const std::function<void()> first[] = {check_kernels, check_written_cases, check_each_switch,
                                           check_wide_heads};
    long n = strtol(argv[2], nullptr, 0);
    for (const auto &check : first)
        if (check_failed() == 0) check();
    for (; n > 0 && check_failed() == 0; n--) {
        check_kernels();
        check_model();
    }
    printf("%ld failures\n", check_failed());
    return check_failed() == 0 ? 0 : 1;
}

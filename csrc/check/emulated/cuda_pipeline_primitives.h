/* A stand-in for CUDA's header of this name; see cuda_runtime.h beside it. An asynchronous copy is done as
 * late as it may be, when its thread waits for it, or at once: by the block's dice, so that a kernel which
 * reads too early, or writes over what is still read, shows wrong numbers in one of the two. */
#ifndef LLMCOMP_CHECK_EMULATED_CUDA_PIPELINE_PRIMITIVES_H
#define LLMCOMP_CHECK_EMULATED_CUDA_PIPELINE_PRIMITIVES_H

#include <cuda_runtime.h>

namespace emulator {
inline void do_copy(const copy_t &copy) {
    memcpy(copy.target, copy.source, copy.n_bytes - copy.n_zeros);
    memset((char *)copy.target + copy.n_bytes - copy.n_zeros, 0, copy.n_zeros);
}
} // namespace emulator

inline void __pipeline_memcpy_async(void *target, const void *source, size_t n_bytes, size_t n_zeros = 0) {
    if ((uintptr_t)target % n_bytes != 0 || (uintptr_t)source % n_bytes != 0)
        emulator::fail("an asynchronous copy that is not aligned");
    emulator::fiber_t &self = emulator::block->fibers[emulator::block->current];
    emulator::copy_t copy = {target, source, n_bytes, n_zeros, self.n_copy_groups};
    if ((emulator::block->random >> 33) % 2 == 0)
        emulator::do_copy(copy);
    else
        self.copies.push_back(copy);
}

inline void __pipeline_commit() {
    emulator::block->fibers[emulator::block->current].n_copy_groups++;
}

inline void __pipeline_wait_prior(size_t n_groups_left) {
    emulator::fiber_t &self = emulator::block->fibers[emulator::block->current];
    auto is_waited_for = [&](const emulator::copy_t &copy) {
        return copy.group + n_groups_left < self.n_copy_groups;
    };
    for (const emulator::copy_t &copy : self.copies)
        if (is_waited_for(copy)) emulator::do_copy(copy);
    self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), is_waited_for),
                      self.copies.end());
}

#endif

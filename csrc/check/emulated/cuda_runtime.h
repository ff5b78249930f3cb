/* A stand-in for CUDA's header of this name, with which the sources of csrc/cuda compile as C++ for the host:
 * for csrc/check/cuda_emulated.cpp and transformer_emulated.cpp, and for an extension module that the tests
 * load. A thread of the device is a fiber, a block an operating-system thread, so that shared memory is
 * thread_local; warp operations and barriers wait for exactly the threads that the device waits for, and a
 * wait that can never end, or a store to a block that has not begun or has ended, stops the program. Timing
 * and memory order are not the device's: races need compute-sanitizer on a device. */
#ifndef LLMCOMP_CHECK_EMULATED_CUDA_RUNTIME_H
#define LLMCOMP_CHECK_EMULATED_CUDA_RUNTIME_H

#include <math.h>
#include <sched.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define LMC_DYNAMIC_SHARED(TYPE, NAME) TYPE *NAME = (TYPE *)emulator::block->dynamic_shared.get()
using std::max;
using std::min;

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

namespace emulator {

constexpr unsigned N_LANES = 32;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr int SECONDS_MAX = 60;

enum class waits_for { nothing, warp, block, cluster, bytes, end };

struct copy_t {
    void *target;
    const void *source;
    size_t n_bytes, n_zeros; /* n_zeros: of n_bytes, the last ones */
    uint64_t group;
};

struct fiber_t {
    ucontext_t entry;
    jmp_buf place; /* where it waits: unlike ucontext's, no switch by these asks the system */
    bool has_begun = false;
    waits_for wait = waits_for::nothing;
    uint64_t target =
        0; /* the generation or number of arrivals that ends the wait, or where its bytes count */
    uint64_t cluster_phase = 0; /* arrivals of this thread at the cluster's barrier */
    std::vector<copy_t> copies; /* asynchronous, not yet done */
    uint64_t n_copy_groups = 0;
};

struct warp_t {
    uint64_t generation = 0;
    unsigned n_arrived = 0;
    uint64_t values[2][N_LANES]; /* by the parity of the generation: no lane is two ahead of another */
};

struct cluster_t {
    explicit cluster_t(unsigned blocks) : places(blocks), has_ended(blocks) {
    }
    std::atomic<uint64_t> n_arrivals{0};
    std::vector<std::atomic<char *>> places; /* where the anchor of each block lies, null before it begins */
    std::vector<std::atomic<bool>> has_ended;
    uint64_t n_threads = 0;
};

struct block_t {
    cluster_t *cluster;
    unsigned index, rank, n_threads, current = 0, n_ended = 0, n_arrived = 0;
    uint64_t generation = 0, random;
    size_t dynamic_bytes;
    std::unique_ptr<char[]> dynamic_shared; /* exactly as large, so that a sanitizer sees what lies beyond */
    const std::function<void()> *body;
    jmp_buf scheduler;
    fiber_t *fibers;
    std::vector<warp_t> warps;
};

inline thread_local block_t *block;
/* Every thread lays out its thread_local variables alike: what lies at a distance from this one in one block
 * lies at the same distance in another. */
inline thread_local char anchor;

[[noreturn]] inline void fail(const char *what) {
    fprintf(stderr, "emulated block %u, thread %u: %s\n", block->index, block->current, what);
    _Exit(3);
}

inline void wait(waits_for what, uint64_t target) {
    fiber_t &self = block->fibers[block->current];
    self.wait = what;
    self.target = target;
    if (_setjmp(self.place) == 0) _longjmp(block->scheduler, 1);
}

/* All lanes give a value and get those of all. */
inline const uint64_t *exchange(uint64_t value) {
    warp_t &warp = block->warps[block->current / N_LANES];
    uint64_t generation = warp.generation;
    warp.values[generation % 2][block->current % N_LANES] = value;
    if (++warp.n_arrived == N_LANES) {
        warp.n_arrived = 0;
        warp.generation++;
    } else {
        wait(waits_for::warp, generation + 1);
    }
    return warp.values[generation % 2];
}

inline void release_block_if_complete() {
    if (block->n_arrived == 0 || block->n_arrived + block->n_ended != block->n_threads) return;
    block->n_arrived = 0;
    block->generation++;
}

inline void run_bodies() {
    for (;;) {
        (*block->body)();
        fiber_t &self = block->fibers[block->current];
        self.wait = waits_for::end;
        block->n_ended++;
        release_block_if_complete();
        if (_setjmp(self.place) == 0) _longjmp(block->scheduler, 1);
    }
}

/* Until the fiber waits or ends. */
inline void switch_to(fiber_t &fiber) {
    if (_setjmp(block->scheduler) != 0) return;
    if (fiber.has_begun) _longjmp(fiber.place, 1);
    fiber.has_begun = true;
    setcontext(&fiber.entry);
}

inline bool is_ready(const fiber_t &fiber, unsigned thread) {
    switch (fiber.wait) {
    case waits_for::nothing:
        return true;
    case waits_for::warp:
        return block->warps[thread / N_LANES].generation >= fiber.target;
    case waits_for::block:
        return block->generation >= fiber.target;
    case waits_for::cluster:
        return block->cluster->n_arrivals >= fiber.target;
    case waits_for::bytes:
        return __atomic_load_n((uint64_t *)(uintptr_t)fiber.target, __ATOMIC_SEQ_CST) == 0;
    default:
        return false;
    }
}

inline bool run_warp(unsigned warp) {
    bool has_run = false;
    for (unsigned thread = warp * N_LANES; thread < (warp + 1) * N_LANES; thread++) {
        fiber_t &fiber = block->fibers[thread];
        if (!is_ready(fiber, thread)) continue;
        fiber.wait = waits_for::nothing;
        block->current = thread;
        switch_to(fiber);
        has_run = true;
    }
    return has_run;
}

/* The fibers of this operating-system thread: made once, they run a thread of one block after the other. */
inline fiber_t *fibers_of(unsigned n_threads) {
    static thread_local std::unique_ptr<char[]> stacks;
    static thread_local std::unique_ptr<fiber_t[]> fibers;
    static thread_local unsigned n_fibers = 0;
    if (n_threads > n_fibers) {
        stacks.reset(new char[n_threads * STACK_BYTES]);
        fibers.reset(new fiber_t[n_threads]);
        n_fibers = n_threads;
        for (unsigned i = 0; i < n_threads; i++) {
            ucontext_t &entry = fibers[i].entry;
            getcontext(&entry);
            entry.uc_stack.ss_sp = stacks.get() + i * STACK_BYTES;
            entry.uc_stack.ss_size = STACK_BYTES;
            makecontext(&entry, run_bodies, 0);
        }
    }
    for (unsigned i = 0; i < n_threads; i++) {
        fibers[i].wait = waits_for::nothing;
        fibers[i].cluster_phase = 0;
    }
    return fibers.get();
}

inline void run_block(block_t *self) {
    block = self;
    self->cluster->places[self->rank] = &anchor;
    self->fibers = fibers_of(self->n_threads);
    self->warps.resize(self->n_threads / N_LANES);
    self->dynamic_shared.reset(new char[self->dynamic_bytes]);
    unsigned n_warps = self->n_threads / N_LANES;
    time_t begin = time(nullptr);
    while (self->n_ended < self->n_threads) {
        bool has_run = false;
        unsigned first =
            (unsigned)(self->random = self->random * 6364136223846793005u + 1442695040888963407u) % n_warps;
        for (unsigned i = 0; i < n_warps; i++)
            while (run_warp((first + i) % n_warps))
                has_run = true;
        if (has_run) continue;
        sched_yield();
        if (time(nullptr) - begin > SECONDS_MAX) fail("a wait that does not end");
    }
    self->cluster->has_ended[self->rank] = true;
}

inline uint64_t launch_seed = 1;

inline void run_cluster(unsigned first_block, unsigned n_blocks, unsigned n_threads, size_t dynamic_bytes,
                        const std::function<void()> &body) {
    cluster_t cluster(n_blocks);
    cluster.n_threads = (uint64_t)n_blocks * n_threads;
    std::vector<block_t> blocks(n_blocks);
    std::vector<std::thread> workers;
    std::atomic<unsigned> n_running{n_blocks};
    for (unsigned rank = 0; rank < n_blocks; rank++) {
        block_t &one = blocks[rank];
        one.cluster = &cluster;
        one.index = first_block + rank;
        one.rank = rank;
        one.n_threads = n_threads;
        one.dynamic_bytes = dynamic_bytes;
        one.random = launch_seed++;
        one.body = &body;
        if (n_blocks == 1) return run_block(&one);
        workers.emplace_back([&one, &n_running] {
            run_block(&one);
            n_running--; /* the variables of an ended block stay until none can store to them */
            while (n_running > 0)
                sched_yield();
        });
    }
    for (std::thread &worker : workers)
        worker.join();
}

/* threadIdx and its like: x is read from the fiber that runs. */
template <unsigned (*READ)()> struct index_t {
    struct {
        operator unsigned() const {
            return READ();
        }
    } x;
};
inline unsigned thread_index() {
    return block->current;
}
inline unsigned block_index() {
    return block->index;
}
inline unsigned block_size() {
    return block->n_threads;
}

} // namespace emulator

inline constexpr emulator::index_t<emulator::thread_index> threadIdx{};
inline constexpr emulator::index_t<emulator::block_index> blockIdx{};
inline constexpr emulator::index_t<emulator::block_size> blockDim{};

/* Operations of the device. */

inline void __syncwarp() {
    emulator::exchange(0);
}

inline void __syncthreads() {
    uint64_t generation = emulator::block->generation;
    emulator::block->n_arrived++;
    emulator::release_block_if_complete();
    if (emulator::block->generation == generation) emulator::wait(emulator::waits_for::block, generation + 1);
}

inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
    const uint64_t *values = emulator::exchange(value);
    uint32_t sum = 0;
    for (unsigned lane = 0; lane < emulator::N_LANES; lane++)
        sum += (uint32_t)values[lane];
    return sum;
}

inline int32_t __reduce_max_sync(uint32_t, int32_t value) {
    const uint64_t *values = emulator::exchange((uint32_t)value);
    int32_t top = INT32_MIN;
    for (unsigned lane = 0; lane < emulator::N_LANES; lane++)
        top = max(top, (int32_t)(uint32_t)values[lane]);
    return top;
}

inline uint64_t __shfl_sync(uint32_t, uint64_t value, uint32_t lane) {
    return emulator::exchange(value)[lane % emulator::N_LANES];
}

inline uint64_t __shfl_up_sync(uint32_t, uint64_t value, uint32_t distance) {
    unsigned lane = emulator::block->current % emulator::N_LANES;
    const uint64_t *values = emulator::exchange(value);
    return values[lane >= distance ? lane - distance : lane];
}

inline unsigned long long atomicMin(unsigned long long *target, unsigned long long value) {
    unsigned long long found = __atomic_load_n(target, __ATOMIC_SEQ_CST);
    while (value < found &&
           !__atomic_compare_exchange_n(target, &found, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return found;
}

/* int8_mma.h, emulated: every lane asks the others for the two rows and two columns of its sums. */

#define LLMCOMP_CUDA_TRANSFORMER_INT8_MMA_H

inline void mma_int8(int32_t (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2]) {
    unsigned lane = emulator::block->current % emulator::N_LANES, g = lane / 4, t = lane % 4;
    int8_t a[2][32], b[2][32];
    for (unsigned half = 0; half < 2; half++) {
        const uint64_t *words = emulator::exchange(rows[2 * half] | (uint64_t)rows[2 * half + 1] << 32);
        for (unsigned i = 0; i < 8; i++)
            memcpy(&a[i % 2][16 * half + i / 2 * 4], (const uint32_t *)&words[4 * g + i / 2] + i % 2, 4);
    }
    const uint64_t *words = emulator::exchange(columns[0] | (uint64_t)columns[1] << 32);
    for (unsigned i = 0; i < 16; i++)
        memcpy(&b[i / 8][16 * (i % 2) + i / 2 % 4 * 4],
               (const uint32_t *)&words[4 * (2 * t + i / 8) + i / 2 % 4] + i % 2, 4);
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 32; k++)
            sums[i] += a[i / 2][k] * b[i % 2][k];
}

inline void load_matrices(uint32_t (&words)[4], const void *row) {
    unsigned lane = emulator::block->current % emulator::N_LANES;
    if ((uintptr_t)row % 16 != 0) emulator::fail("a row of a matrix that is not aligned");
    const uint64_t *rows = emulator::exchange((uintptr_t)row);
    for (unsigned i = 0; i < 4; i++)
        memcpy(&words[i], (const char *)rows[8 * i + lane / 4] + lane % 4 * 4, 4);
}

/* cluster.h, emulated: before sm_90 its exchanges are barriers of the block. */

#define LLMCOMP_CUDA_CODING_CLUSTER_H

typedef uint64_t exchange_t; /* bytes that have not come */

inline void exchange_expect(exchange_t *exchange, uint32_t n_bytes) {
    __atomic_store_n(exchange, n_bytes, __ATOMIC_SEQ_CST);
}

inline void cluster_begin() {
    __syncwarp();
    emulator::block->fibers[emulator::block->current].cluster_phase++;
    emulator::block->cluster->n_arrivals++;
}

inline void cluster_begun() {
    __syncwarp();
    emulator::fiber_t &self = emulator::block->fibers[emulator::block->current];
    emulator::wait(emulator::waits_for::cluster, self.cluster_phase * emulator::block->cluster->n_threads);
}

template <typename T> inline void store_in_block(T *shared, uint32_t rank, T value, exchange_t *exchange) {
    emulator::cluster_t &cluster = *emulator::block->cluster;
    char *place = cluster.places[rank];
    if (place == nullptr) emulator::fail("a store to a block that has not begun");
    if (cluster.has_ended[rank]) emulator::fail("a store to a block that has ended");
    *(T *)(place + ((char *)shared - &emulator::anchor)) = value;
    if (emulated_machine.major < 9) return;
    uint64_t *left = (uint64_t *)(place + ((char *)exchange - &emulator::anchor));
    if (__atomic_fetch_sub(left, sizeof(T), __ATOMIC_SEQ_CST) < sizeof(T))
        emulator::fail("more bytes came in an exchange than were expected");
}

inline void exchange_wait(exchange_t *exchange, bool reads) {
    if (emulated_machine.major < 9)
        __syncthreads();
    else if (reads)
        emulator::wait(emulator::waits_for::bytes, (uint64_t)(uintptr_t)exchange);
}

/* The runtime. */

enum { cudaLaunchAttributeClusterDimension = 4 };
struct dim3 {
    dim3(unsigned n = 1) : x(n), y(1), z(1) {
    }
    unsigned x, y, z;
};
struct cudaLaunchAttribute {
    int id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

namespace emulator {
/* Does it now, or when the graph that the stream is being captured in is launched (runtime.cpp). */
cudaError_t submit(cudaStream_t stream, std::function<void()> work);
} // namespace emulator

template <typename KERNEL, typename... ARGUMENTS>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, KERNEL kernel,
                                      ARGUMENTS... arguments) {
    unsigned n_blocks = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
    unsigned n_all = config->gridDim.x, n_threads = config->blockDim.x;
    size_t dynamic_bytes = config->dynamicSmemBytes;
    std::function<void()> body = [=] { kernel(arguments...); };
    return emulator::submit(config->stream, [=] {
        for (unsigned first = 0; first < n_all; first += n_blocks)
            emulator::run_cluster(first, n_blocks, n_threads, dynamic_bytes, body);
    });
}

#endif

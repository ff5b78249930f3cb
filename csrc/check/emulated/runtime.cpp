/* The emulated device's runtime (cuda_runtime_api.h): memory, streams, graphs. Kernels run in cuda_runtime.h.
 */
#include <mutex>
#include <unordered_map>

#include "cuda_runtime.h"

emulated_machine_t emulated_machine = {13000, 1, 9, 132, (size_t)4 << 30, 0, 0, 0, 0, INT32_MAX, 0};

struct CUgraph_st {
    std::vector<std::function<void()>> nodes;
};
struct CUgraphExec_st {
    std::vector<std::function<void()>> nodes;
};
struct CUstream_st {
    CUgraph_st *captured = nullptr;
};

namespace emulator {

namespace {
std::mutex late_lock;
std::vector<std::function<void()>> late_uploads;
} // namespace

static void do_late_uploads() {
    std::vector<std::function<void()>> now;
    {
        std::lock_guard<std::mutex> hold(late_lock);
        now.swap(late_uploads);
    }
    for (const std::function<void()> &upload : now)
        upload();
}

cudaError_t submit(cudaStream_t stream, std::function<void()> work) {
    do_late_uploads();
    if (stream != nullptr && stream->captured != nullptr)
        stream->captured->nodes.push_back(std::move(work));
    else
        work();
    return cudaSuccess;
}

} // namespace emulator

/* Memory: filled with a pattern, since nobody may count on zeros, and with a guard behind its end. */

namespace {

constexpr size_t GUARD_BYTES = 64;
constexpr unsigned char GUARD = 0xCD, UNTOUCHED = 0xA5;
std::mutex memory_lock;
std::unordered_map<void *, size_t> allocations;

} // namespace

cudaError_t cudaMalloc(void **memory, size_t n_bytes) {
    std::lock_guard<std::mutex> hold(memory_lock);
    *memory = nullptr;
    if (n_bytes > emulated_machine.memory_bytes - emulated_machine.bytes_in_use)
        return cudaErrorMemoryAllocation;
    size_t rounded = (n_bytes + GUARD_BYTES + 255) / 256 * 256;
    unsigned char *found = (unsigned char *)aligned_alloc(256, rounded);
    if (found == nullptr) return cudaErrorMemoryAllocation;
    memset(found, UNTOUCHED, n_bytes);
    memset(found + n_bytes, GUARD, GUARD_BYTES);
    allocations[found] = n_bytes;
    emulated_machine.bytes_in_use += n_bytes;
    emulated_machine.n_allocations++;
    *memory = found;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    if (memory == nullptr) return cudaSuccess;
    std::lock_guard<std::mutex> hold(memory_lock);
    auto place = allocations.find(memory);
    if (place == allocations.end()) return cudaErrorInvalidValue;
    for (size_t i = 0; i < GUARD_BYTES; i++) {
        if (((unsigned char *)memory)[place->second + i] == GUARD) continue;
        fprintf(stderr, "emulated device: something was stored behind the %zu bytes of an allocation\n",
                place->second);
        _Exit(3);
    }
    emulated_machine.bytes_in_use -= place->second;
    emulated_machine.n_allocations--;
    allocations.erase(place);
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *memory) {
    std::lock_guard<std::mutex> hold(memory_lock);
    *attributes = {cudaMemoryTypeUnregistered, -2};
    for (const auto &[begin, n_bytes] : allocations)
        if ((uintptr_t)memory - (uintptr_t)begin < n_bytes) *attributes = {cudaMemoryTypeDevice, 0};
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *free_bytes = emulated_machine.memory_bytes - emulated_machine.bytes_in_use;
    *total_bytes = emulated_machine.memory_bytes;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t n_bytes, cudaStream_t stream) {
    return emulator::submit(stream, [=] { memset(target, value, n_bytes); });
}

cudaError_t cudaMemset(void *target, int value, size_t n_bytes) {
    return cudaMemsetAsync(target, value, n_bytes, nullptr);
}

cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch,
                              size_t n_bytes, size_t n_rows, enum cudaMemcpyKind, cudaStream_t stream) {
    if (max(target_pitch, source_pitch) > emulated_machine.pitch_max) return cudaErrorInvalidPitchValue;
    if (n_rows > 0 && (n_bytes > target_pitch || n_bytes > source_pitch)) return cudaErrorInvalidValue;
    return emulator::submit(stream, [=] {
        for (size_t i = 0; i < n_rows; i++)
            memmove((char *)target + i * target_pitch, (const char *)source + i * source_pitch, n_bytes);
    });
}

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t n_bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    auto copy = [=] { memmove(target, source, n_bytes); };
    if (kind != cudaMemcpyHostToDevice || !emulated_machine.reads_host_memory)
        return emulator::submit(stream, copy);
    std::lock_guard<std::mutex> hold(emulator::late_lock);
    emulator::late_uploads.push_back(copy);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t n_bytes, enum cudaMemcpyKind kind) {
    cudaError_t status = cudaMemcpyAsync(target, source, n_bytes, kind, nullptr);
    emulator::do_late_uploads();
    return status;
}

/* Streams and graphs. */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = new CUstream_st;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream->captured;
    delete stream;
    return cudaSuccess;
}

/* To wait for a stream that is being captured is an error, as on a device. */
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    emulated_machine.n_synchronizations++;
    emulator::do_late_uploads();
    return stream != nullptr && stream->captured != nullptr ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    emulated_machine.n_synchronizations++;
    emulator::do_late_uploads();
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    bool is_capturing = stream != nullptr && stream->captured != nullptr;
    *status = is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode) {
    if (stream == nullptr || stream->captured != nullptr) return cudaErrorStreamCaptureUnsupported;
    stream->captured = new CUgraph_st;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (stream == nullptr || stream->captured == nullptr) return cudaErrorInvalidValue;
    *graph = stream->captured;
    stream->captured = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                          unsigned long long) {
    *executable = new CUgraphExec_st{graph->nodes};
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    emulated_machine.n_graph_launches++;
    for (const std::function<void()> &node : executable->nodes)
        emulator::submit(stream, node);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}

/* The machine. */

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidPitchValue:
        return "invalid pitch argument";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    default:
        return "operation not permitted when stream is capturing";
    }
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = emulated_machine.driver_version;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 0;
    if (emulated_machine.driver_version == 0) return cudaErrorInsufficientDriver;
    if (emulated_machine.n_devices == 0) return cudaErrorNoDevice;
    *count = emulated_machine.n_devices;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    int count;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && (device < 0 || device >= count)) status = cudaErrorInvalidDevice;
    return status;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? emulated_machine.major
             : attribute == cudaDevAttrPageableMemoryAccess ? emulated_machine.reads_host_memory
                                                            : emulated_machine.n_processors;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    *properties = {};
    snprintf(properties->name, sizeof properties->name, "emulated device");
    properties->totalGlobalMem = emulated_machine.memory_bytes;
    properties->major = emulated_machine.major;
    properties->multiProcessorCount = emulated_machine.n_processors;
    return cudaSuccess;
}

/* The softmax at a row's target, for scores: FORMAT.md, section 6. A lane has one of the row's 16 chains, so
 * that the order of the sums is the specification's. */
extern "C" {
#include "core/coding/row_softmax.h"
}
#include "cuda/transformer/launch.h"
#include "cuda/coding/row_tiles.h"

namespace {

constexpr unsigned SOFTMAX_THREADS = 128, SOFTMAX_ROWS = SOFTMAX_THREADS / LMC_SUM_LANES;
constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

__device__ __forceinline__ double lane_value(double value, unsigned lane) {
    unsigned long long bits;
    memcpy(&bits, &value, sizeof bits);
    bits = __shfl_sync(ALL_LANES, bits, lane);
    memcpy(&value, &bits, sizeof bits);
    return value;
}

/* lmc_max_key of the row's maximum, in all of its lanes. */
__device__ __forceinline__ int32_t maximum_of_row(const float *row, uint32_t n, unsigned lane) {
    float top = -INFINITY;
#pragma unroll 8
    for (uint32_t i = lane % LMC_SUM_LANES; i < n; i += LMC_SUM_LANES)
        top = lmc_max_or_nan(row[i], top);
    int32_t key = lmc_max_key(top);
#pragma unroll
    for (unsigned distance = LMC_SUM_LANES / 2; distance > 0; distance /= 2)
        key = max(key, (int32_t)__shfl_sync(ALL_LANES, (uint32_t)key, lane ^ distance));
    return key;
}

__device__ __forceinline__ double add_four(const float (&x)[4], float maximum, double sum) {
    float a = lmc_add(lmc_sum_weight(x[0], maximum), lmc_sum_weight(x[1], maximum));
    float b = lmc_add(lmc_sum_weight(x[2], maximum), lmc_sum_weight(x[3], maximum));
    return sum + (double)lmc_add(a, b);
}

/* The chain of a lane. */
__device__ __forceinline__ double sum_chain(const float *row, uint32_t n, unsigned chain, float maximum) {
    double sum = 0.0;
    float x[4];
    uint32_t begin = 0;
#pragma unroll 4
    for (; n - begin >= LMC_SUM_BLOCK; begin += LMC_SUM_BLOCK) {
#pragma unroll
        for (unsigned j = 0; j < 4; j++)
            x[j] = row[begin + j * LMC_SUM_LANES + chain];
        sum = add_four(x, maximum, sum);
    }
    if (begin < n) {
#pragma unroll
        for (unsigned j = 0; j < 4; j++) {
            uint32_t i = begin + j * LMC_SUM_LANES + chain;
            x[j] = i < n ? row[i] : -INFINITY;
        }
        sum = add_four(x, maximum, sum);
    }
    return sum;
}

__global__ void __launch_bounds__(SOFTMAX_THREADS)
    lmc_log2_softmax_kernel(const __grid_constant__ lmc_cuda_softmax_t softmax) {
    unsigned lane = threadIdx.x % LMC_WARP_LANES, chain = lane % LMC_SUM_LANES;
    uint32_t index = blockIdx.x * SOFTMAX_ROWS + threadIdx.x / LMC_SUM_LANES, n = softmax.n_logits;
    bool is_row = index < softmax.n_rows;
    if (!is_row) index = softmax.n_rows - 1; /* in step with the rows of its warp, for nothing */
    const float *row = softmax.logits + (size_t)index * n;
    int32_t key = maximum_of_row(row, n, lane);
    float maximum = lmc_max_of_key(key);
    double chain_sum = sum_chain(row, n, chain, maximum), sum = 0.0;
#pragma unroll
    for (unsigned c = 0; c < LMC_SUM_LANES; c++)
        sum += lane_value(chain_sum, lane - chain + c);
    if (!is_row || chain != 0) return;
    uint32_t target = (uint32_t)softmax.targets[index];
    lmc_status_t status = target >= n ? LMC_ERROR_TOKEN : lmc_status_of_key(key);
    double result = 0.0;
    if (status == LMC_OK)
        result = (((double)row[target] - (double)maximum) - lmc_log64(sum)) / LMC_LN_2;
    else
        report_error(softmax.error, softmax.first_row + index, status);
    softmax.log2_probabilities[index] = result;
}

} // namespace

cudaError_t lmc_cuda_log2_softmax(const lmc_cuda_softmax_t &softmax, lmc_cuda_stream_t stream) {
    uint64_t n_blocks = ((uint64_t)softmax.n_rows + SOFTMAX_ROWS - 1) / SOFTMAX_ROWS;
    return launch_blocks(lmc_log2_softmax_kernel, n_blocks, SOFTMAX_THREADS, 0, stream, softmax);
}

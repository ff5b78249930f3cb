/* The softmax at a row's target, for scores: FORMAT.md, section 6. A lane has one of the row's 16 chains, so
 * that the order of the sums is the specification's. */
extern "C" {
#include "core/coding/row_softmax.h"
}
#include <cuda_runtime.h>

#include "cuda/coding/report.h"
#include "cuda/coding/row_source.h"

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
template <lmc_dtype_t DTYPE>
__device__ __forceinline__ int32_t maximum_of_row(const unsigned char *row, uint32_t n, unsigned lane) {
    float top = -INFINITY;
#pragma unroll 8
    for (uint32_t i = lane % LMC_SUM_LANES; i < n; i += LMC_SUM_LANES)
        top = lmc_max_or_nan(lmc_symbol_load(row, i, DTYPE), top);
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
template <lmc_dtype_t DTYPE>
__device__ __forceinline__ double sum_chain(const unsigned char *row, uint32_t n, unsigned chain,
                                            float maximum) {
    double sum = 0.0;
    float x[4];
    uint32_t begin = 0;
#pragma unroll 4
    for (; n - begin >= LMC_SUM_BLOCK; begin += LMC_SUM_BLOCK) {
#pragma unroll
        for (unsigned j = 0; j < 4; j++)
            x[j] = lmc_symbol_load(row, begin + j * LMC_SUM_LANES + chain, DTYPE);
        sum = add_four(x, maximum, sum);
    }
    if (begin < n) {
#pragma unroll
        for (unsigned j = 0; j < 4; j++) {
            uint32_t i = begin + j * LMC_SUM_LANES + chain;
            x[j] = i < n ? lmc_symbol_load(row, i, DTYPE) : -INFINITY;
        }
        sum = add_four(x, maximum, sum);
    }
    return sum;
}

template <lmc_dtype_t DTYPE>
__global__ void __launch_bounds__(SOFTMAX_THREADS)
    lmc_log2_softmax_kernel(const __grid_constant__ row_array_t rows,
                            const __grid_constant__ token_array_t tokens, uint32_t n_rows,
                            double *log2_probabilities, uint32_t first_row, uint64_t *error) {
    unsigned lane = threadIdx.x % LMC_WARP_LANES, chain = lane % LMC_SUM_LANES;
    uint32_t index = blockIdx.x * SOFTMAX_ROWS + threadIdx.x / LMC_SUM_LANES, n = rows.vocab_size;
    bool is_row = index < n_rows;
    if (!is_row) index = n_rows - 1; /* in step with the rows of its warp, for nothing */
    const unsigned char *row = row_address(rows.source, index);
    int32_t key = maximum_of_row<DTYPE>(row, n, lane);
    float maximum = lmc_max_of_key(key);
    double chain_sum = sum_chain<DTYPE>(row, n, chain, maximum), sum = 0.0;
#pragma unroll
    for (unsigned c = 0; c < LMC_SUM_LANES; c++)
        sum += lane_value(chain_sum, lane - chain + c);
    if (!is_row || chain != 0) return;
    uint32_t token = token_of_row(tokens, n, index);
    lmc_status_t status = token == LMC_TOKEN_INVALID ? LMC_ERROR_TOKEN : lmc_status_of_key(key);
    double result = (double)NAN;
    if (status == LMC_OK)
        result = (((double)lmc_symbol_load(row, token, DTYPE) - (double)maximum) - lmc_log64(sum)) / LMC_LN_2;
    else
        report_error(error, first_row + index, status);
    log2_probabilities[index] = result;
}

} // namespace

int lmc_cuda_log2_softmax(const lmc_cuda_rows_t *rows, const lmc_cuda_tokens_t *tokens,
                          double *log2_probabilities, uint32_t first_row, uint64_t *error,
                          lmc_cuda_stream_t stream) {
    if (rows->n_rows == 0) return cudaSuccess;
    if (rows->vocab_size == 0 || rows->n_inner == 0 || rows->n_rows > (uint32_t)INT32_MAX)
        return cudaErrorInvalidValue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((rows->n_rows + SOFTMAX_ROWS - 1) / SOFTMAX_ROWS);
    config.blockDim = dim3(SOFTMAX_THREADS);
    config.stream = stream;
    auto kernel = rows->dtype == LMC_FLOAT32   ? lmc_log2_softmax_kernel<LMC_FLOAT32>
                  : rows->dtype == LMC_FLOAT16 ? lmc_log2_softmax_kernel<LMC_FLOAT16>
                                               : lmc_log2_softmax_kernel<LMC_BFLOAT16>;
    return cudaLaunchKernelEx(&config, kernel, array_of(*rows), array_of(*tokens, *rows), rows->n_rows,
                              log2_probabilities, first_row, error);
}

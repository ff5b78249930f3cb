/* What one thread does with a row of logits in the CUDA kernels, and who does which part of a row: the
 * arithmetic and the index arithmetic, without barriers, shuffles or shared memory, which are in
 * coding.cu. The same text compiles for the host, where csrc/check/cuda_on_host.c runs it in loops
 * over threads and compares with the core.
 *
 * A row is a head of single elements up to the first 16-byte boundary, a body of 16-byte vectors, and a tail
 * of single elements. 32 vectors, one a lane, are a tile; a warp owns n_chunks * LMC_TILE_VECTORS tiles that
 * follow each other, a cluster of n_blocks blocks of n_warps warps owns the row. With n_chunks = 1 every
 * thread keeps its vectors in registers, so that the row is read once; longer rows are read twice, the second
 * time mostly from the L2 cache. Head and tail, and the elements before the token in its own vector, belong
 * to the lanes of the first warp ("edges"). */
#ifndef LLMCOMP_CUDA_CODING_ROW_TILES_H
#define LLMCOMP_CUDA_CODING_ROW_TILES_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "core/base/ieee.h"
#include "llmcomp/intervals.h"

#if defined(__CUDA_ARCH__)
#define LMC_UNROLL _Pragma("unroll")
#define LMC_UNROLL_NOT _Pragma("unroll 1")
#else
#define LMC_UNROLL
#define LMC_UNROLL_NOT
#endif

#define LMC_WARP_LANES 32
#define LMC_VECTOR_BYTES 16
#define LMC_TILE_VECTORS 8 /* vectors of a thread: 32 registers, half of what a thread of 1,024 can have */
#define LMC_CLUSTER_BLOCKS_MAX 8
#define LMC_BLOCK_WARPS_MAX 32
#define LMC_ROW_WARPS_MAX (LMC_CLUSTER_BLOCKS_MAX * LMC_BLOCK_WARPS_MAX)
/* Several small blocks on a multiprocessor, so that some load while others compute. */
#define LMC_BLOCK_WARPS_AIM 8
#define LMC_NO_SYMBOL_INDEX UINT32_MAX
#define LMC_TOKEN_INVALID UINT32_MAX

typedef struct lmc_vector {
    uint32_t words[4];
} lmc_vector_t;

/* Division of numbers below 2^31 by one that is known before a launch, without the device's long way to it:
 * with s = 31 + ceil(log2(d)), n * (floor(2^s / d) + 1) exceeds n * 2^s / d by at most n < 2^(s -
 * ceil(log2(d))), too little to reach the next multiple of 2^s. */
typedef struct lmc_divisor {
    uint32_t divisor, multiplier, shift;
} lmc_divisor_t;

LMC_FN lmc_divisor_t lmc_divisor_of(uint32_t divisor) {
    lmc_divisor_t of;
    of.divisor = divisor;
    of.shift = 31;
    while ((uint64_t)1 << (of.shift - 31) < divisor)
        of.shift++;
    of.multiplier = (uint32_t)(((uint64_t)1 << of.shift) / divisor + 1);
    return of;
}

LMC_FN uint32_t lmc_divide(uint32_t n, lmc_divisor_t by) {
    return (uint32_t)((uint64_t)n * by.multiplier >> by.shift);
}

/* The parts of a row. */

typedef struct lmc_row_layout {
    uint32_t n_head, n_vectors, n_tail;
} lmc_row_layout_t;

LMC_FN uint32_t lmc_element_bytes(lmc_dtype_t dtype) {
    return dtype == LMC_FLOAT32 ? 4 : 2;
}

LMC_FN uint32_t lmc_vector_elements(lmc_dtype_t dtype) {
    return LMC_VECTOR_BYTES / lmc_element_bytes(dtype);
}

/* address: of the first element, a multiple of the element's size. */
LMC_FN lmc_row_layout_t lmc_row_layout(uintptr_t address, uint32_t vocab_size, lmc_dtype_t dtype) {
    lmc_row_layout_t layout;
    uint32_t to_boundary = (uint32_t)(-address & (LMC_VECTOR_BYTES - 1)) / lmc_element_bytes(dtype);
    layout.n_head = to_boundary < vocab_size ? to_boundary : vocab_size;
    layout.n_vectors = (vocab_size - layout.n_head) / lmc_vector_elements(dtype);
    layout.n_tail = vocab_size - layout.n_head - layout.n_vectors * lmc_vector_elements(dtype);
    return layout;
}

typedef struct lmc_tile_plan {
    uint32_t n_blocks, n_warps,
        n_chunks; /* blocks of a row, warps of a block, loads of LMC_TILE_VECTORS of a thread */
    uint32_t log2_blocks;
    lmc_divisor_t warp_vectors; /* vectors of a warp */
} lmc_tile_plan_t;

/* Holds for every alignment of the row: a head only makes the body shorter. More blocks than the row needs
 * are taken where there are too few rows to use all processors. max_blocks: 1 where there are no clusters, a
 * power of two. */
LMC_FN lmc_tile_plan_t lmc_tile_plan(uint32_t vocab_size, lmc_dtype_t dtype, uint64_t n_rows,
                                     uint32_t n_processors, uint32_t max_blocks) {
    lmc_tile_plan_t plan;
    uint32_t tile_elements = lmc_vector_elements(dtype) * LMC_WARP_LANES;
    uint32_t n_units =
        (vocab_size + tile_elements * LMC_TILE_VECTORS - 1) / (tile_elements * LMC_TILE_VECTORS);
    plan.n_blocks = 1;
    plan.log2_blocks = 0;
    while (plan.n_blocks < max_blocks && plan.n_blocks < n_units &&
           (n_units > plan.n_blocks * LMC_BLOCK_WARPS_AIM || n_rows * plan.n_blocks < n_processors))
        plan.n_blocks = 1u << ++plan.log2_blocks;
    plan.n_warps = (n_units + plan.n_blocks - 1) / plan.n_blocks;
    if (plan.n_warps > LMC_BLOCK_WARPS_MAX) plan.n_warps = LMC_BLOCK_WARPS_MAX;
    plan.n_chunks = (n_units + plan.n_blocks * plan.n_warps - 1) / (plan.n_blocks * plan.n_warps);
    plan.warp_vectors = lmc_divisor_of(plan.n_chunks * LMC_TILE_VECTORS * LMC_WARP_LANES);
    return plan;
}

/* The first vector of a warp's tile; warp counts over all blocks of the row. */
LMC_FN uint32_t lmc_tile_begin(uint32_t n_chunks, uint32_t warp, uint32_t chunk, uint32_t tile) {
    return ((warp * n_chunks + chunk) * LMC_TILE_VECTORS + tile) * LMC_WARP_LANES;
}

/* Whether a warp's chunk is all vectors of the row: most are, and need no condition on each. */
LMC_FN int lmc_chunk_is_whole(uint32_t chunk_begin, uint32_t n_vectors) {
    return chunk_begin + LMC_TILE_VECTORS * LMC_WARP_LANES <= n_vectors;
}

LMC_FN uint32_t lmc_warp_vectors(const lmc_row_layout_t *layout, uint32_t n_chunks, uint32_t warp) {
    uint32_t begin = lmc_tile_begin(n_chunks, warp, 0, 0), end = lmc_tile_begin(n_chunks, warp + 1, 0, 0);
    if (begin >= layout->n_vectors) return 0;
    return (end < layout->n_vectors ? end : layout->n_vectors) - begin;
}

/* Where a token's symbols before it end: whole vectors of the body, in order; 0 for a token of the head, all
 * for one of the tail. */
LMC_FN uint32_t lmc_vectors_before(const lmc_row_layout_t *layout, uint32_t token, lmc_dtype_t dtype) {
    if (token < layout->n_head) return 0;
    uint32_t n = (token - layout->n_head) / lmc_vector_elements(dtype);
    return n < layout->n_vectors ? n : layout->n_vectors;
}

/* The warp that holds the vector after those; the number of warps or more if no warp does. */
LMC_FN uint32_t lmc_warp_of_vector(const lmc_tile_plan_t *plan, uint32_t vector) {
    return lmc_divide(vector, plan->warp_vectors);
}

/* Edges: the symbol of a lane of the first warp, or LMC_NO_SYMBOL_INDEX. */

#define LMC_EDGE_TAIL_LANE 8
#define LMC_EDGE_TOKEN_LANE 16 /* below it: head and tail, which count towards the total */

LMC_FN uint32_t lmc_edge_symbol(const lmc_row_layout_t *layout, uint32_t vocab_size, uint32_t lane,
                                uint32_t token, lmc_dtype_t dtype) {
    if (lane < LMC_EDGE_TAIL_LANE) return lane < layout->n_head ? lane : LMC_NO_SYMBOL_INDEX;
    if (lane < LMC_EDGE_TOKEN_LANE) {
        lane -= LMC_EDGE_TAIL_LANE;
        return lane < layout->n_tail ? vocab_size - layout->n_tail + lane : LMC_NO_SYMBOL_INDEX;
    }
    uint32_t body_end = vocab_size - layout->n_tail;
    if (token < layout->n_head || token >= body_end) return LMC_NO_SYMBOL_INDEX; /* also LMC_TOKEN_INVALID */
    uint32_t n_before = lmc_vectors_before(layout, token, dtype) * lmc_vector_elements(dtype);
    uint32_t symbol = layout->n_head + n_before + (lane - LMC_EDGE_TOKEN_LANE);
    return symbol <= token ? symbol : LMC_NO_SYMBOL_INDEX;
}

/* Elements. */

LMC_FN float lmc_widen(uint32_t bits16, lmc_dtype_t dtype) {
    if (dtype == LMC_BFLOAT16) return lmc_float_of(bits16 << 16);
#if defined(__CUDA_ARCH__)
    float wide; /* exact, as lmc_widen_f16, in one instruction */
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"((unsigned short)bits16));
    return wide;
#else
    return lmc_widen_f16((uint16_t)bits16);
#endif
}

/* Element e of a vector; e is a constant after unrolling. */
LMC_FN float lmc_vector_element(const lmc_vector_t *vector, uint32_t e, lmc_dtype_t dtype) {
    if (dtype == LMC_FLOAT32) return lmc_float_of(vector->words[e]);
    uint32_t word = vector->words[e / 2];
    if (dtype == LMC_BFLOAT16 && e % 2 == 1) return lmc_float_of(word & 0xFFFF0000u);
    return lmc_widen(e % 2 == 1 ? word >> 16 : word & 0xFFFFu, dtype);
}

LMC_FN float lmc_symbol_load(const unsigned char *row, uint32_t symbol, lmc_dtype_t dtype) {
#if defined(__CUDA_ARCH__)
    if (dtype == LMC_FLOAT32) return ((const float *)row)[symbol];
    return lmc_widen(((const unsigned short *)row)[symbol], dtype);
#else
    uint32_t bits = 0;
    memcpy(&bits, row + (size_t)symbol * lmc_element_bytes(dtype), lmc_element_bytes(dtype));
    return dtype == LMC_FLOAT32 ? lmc_float_of(bits) : lmc_widen(bits, dtype);
#endif
}

/* -inf in every element: neither maximum nor weights notice it. */
LMC_FN uint32_t lmc_word_lowest(lmc_dtype_t dtype) {
    return dtype == LMC_FLOAT32 ? 0xFF800000u : dtype == LMC_FLOAT16 ? 0xFC00FC00u : 0xFF80FF80u;
}

/* body is aligned to a vector: a device faults otherwise, and so does the check on the host, where nothing
 * else would notice. */
LMC_FN lmc_vector_t lmc_vector_load(const unsigned char *body, uint32_t vector) {
    lmc_vector_t loaded;
#if defined(__CUDA_ARCH__)
    uint4 words = __ldcs((const uint4 *)body + vector);
    loaded.words[0] = words.x;
    loaded.words[1] = words.y;
    loaded.words[2] = words.z;
    loaded.words[3] = words.w;
#else
    assert((uintptr_t)body % LMC_VECTOR_BYTES == 0);
    memcpy(&loaded, body + (size_t)vector * LMC_VECTOR_BYTES, LMC_VECTOR_BYTES);
#endif
    return loaded;
}

/* The vectors of a thread in one chunk, LMC_WARP_LANES apart; chunk_begin is the first one of the warp. */
LMC_FN void lmc_tiles_load(lmc_vector_t vectors[LMC_TILE_VECTORS], const unsigned char *body,
                           uint32_t chunk_begin, uint32_t lane, uint32_t n_vectors, lmc_dtype_t dtype) {
    if (lmc_chunk_is_whole(chunk_begin, n_vectors)) {
        LMC_UNROLL
        for (uint32_t tile = 0; tile < LMC_TILE_VECTORS; tile++)
            vectors[tile] = lmc_vector_load(body, chunk_begin + lane + tile * LMC_WARP_LANES);
        return;
    }
    uint32_t lowest = lmc_word_lowest(dtype);
    LMC_UNROLL
    for (uint32_t tile = 0; tile < LMC_TILE_VECTORS; tile++) {
        uint32_t vector = chunk_begin + lane + tile * LMC_WARP_LANES;
        lmc_vector_t nothing = {{lowest, lowest, lowest, lowest}};
        vectors[tile] = vector < n_vectors ? lmc_vector_load(body, vector) : nothing;
    }
}

/* The maximum; NaN wins over everything. Devices before sm_80 have no such instruction. */

LMC_FN float lmc_max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float top;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(top) : "f"(a), "f"(b));
    return top;
#else
    return a != a || a > b ? a : b;
#endif
}

/* Element by element on a 32-bit word: one binary32, or two of the short formats. */
LMC_FN uint32_t lmc_word_max(uint32_t a, uint32_t b, lmc_dtype_t dtype) {
    if (dtype == LMC_FLOAT32) return lmc_bits_of(lmc_max_or_nan(lmc_float_of(a), lmc_float_of(b)));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t top;
    if (dtype == LMC_BFLOAT16)
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(top) : "r"(a), "r"(b));
    else
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(top) : "r"(a), "r"(b));
    return top;
#else
    float a_low = lmc_widen(a & 0xFFFFu, dtype), b_low = lmc_widen(b & 0xFFFFu, dtype);
    float a_high = lmc_widen(a >> 16, dtype), b_high = lmc_widen(b >> 16, dtype);
    uint32_t low = a_low != a_low || a_low > b_low ? a : b,
             high = a_high != a_high || a_high > b_high ? a : b;
    return (low & 0xFFFFu) | (high & 0xFFFF0000u);
#endif
}

LMC_FN float lmc_word_max_value(uint32_t word, lmc_dtype_t dtype) {
    if (dtype == LMC_FLOAT32) return lmc_float_of(word);
    return lmc_max_or_nan(lmc_widen(word & 0xFFFFu, dtype), lmc_widen(word >> 16, dtype));
}

LMC_FN uint32_t lmc_tiles_max(const lmc_vector_t vectors[LMC_TILE_VECTORS], uint32_t top, lmc_dtype_t dtype) {
    LMC_UNROLL
    for (uint32_t tile = 0; tile < LMC_TILE_VECTORS; tile++)
        LMC_UNROLL
    for (uint32_t i = 0; i < 4; i++)
        top = lmc_word_max(vectors[tile].words[i], top, dtype);
    return top;
}

/* An integer with the order of the floats, so that warps can use the integer reduction; NaN is above +inf. */
LMC_FN int32_t lmc_max_key(float x) {
    uint32_t bits = lmc_bits_of(x);
    if (x != x) return INT32_MAX;
    return (int32_t)((bits & 0x80000000u) != 0 ? bits ^ 0x7FFFFFFFu : bits);
}

#define LMC_KEY_POSITIVE_INFINITY ((int32_t)0x7F800000)
#define LMC_KEY_NEGATIVE_INFINITY (-(int32_t)0x7F800001)

LMC_FN float lmc_max_of_key(int32_t key) {
    uint32_t bits = (uint32_t)key;
    return lmc_float_of(key < 0 ? bits ^ 0x7FFFFFFFu : bits);
}

LMC_FN lmc_status_t lmc_status_of_key(int32_t key) {
    if (key > LMC_KEY_POSITIVE_INFINITY) return LMC_ERROR_NAN;
    if (key == LMC_KEY_POSITIVE_INFINITY) return LMC_ERROR_POSITIVE_INFINITY;
    return key == LMC_KEY_NEGATIVE_INFINITY ? LMC_ERROR_NO_SYMBOL : LMC_OK;
}

/* Weights. */

/* The device's conversion: saturated, and 0 for NaN. */
LMC_FN uint32_t lmc_truncate_saturated(float x) {
#if defined(__CUDA_ARCH__)
    return __float2uint_rz(x);
#else
    return x >= 0x1p32f ? UINT32_MAX : x > 0.0f ? (uint32_t)x : 0;
#endif
}

/* The device's shift gives 0 for a count of 32 or more. */
LMC_FN uint32_t lmc_shift_right_or_zero(uint32_t x, uint32_t n) {
#if defined(__CUDA_ARCH__)
    uint32_t shifted;
    asm("shr.u32 %0, %1, %2;" : "=r"(shifted) : "r"(x), "r"(n));
    return shifted;
#else
    return n < 32 ? x >> n : 0;
#endif
}

/* lmc_weight of ieee.h without its test of t, where nothing has to be taken off the logit first. t >= 31.5,
 * +inf included, makes the bits of shifted 32 or more larger than those of the magic number: the weight is 0,
 * whatever the polynomial gave. csrc/check/cuda_on_host.c compares the two for every logit. */
LMC_FN uint32_t lmc_weight_in_place(float logit, float offset) {
    float t = lmc_fma(-logit, LMC_LOG2_E, offset);
    float shifted = lmc_add(t, LMC_ROUND_MAGIC);
    float g = lmc_sub(t, lmc_sub(shifted, LMC_ROUND_MAGIC));
    float p = lmc_fma(LMC_WEIGHT_C4, g, LMC_WEIGHT_C3);
    p = lmc_fma(p, g, LMC_WEIGHT_C2);
    p = lmc_fma(p, g, LMC_WEIGHT_C1);
    p = lmc_fma(p, g, LMC_WEIGHT_C0);
    return lmc_shift_right_or_zero(lmc_truncate_saturated(p), lmc_bits_of(shifted) - LMC_ROUND_MAGIC_BITS);
}

LMC_FN uint32_t lmc_weight_from(float logit, lmc_origin_t origin) {
    return lmc_weight_in_place(lmc_sub(logit, origin.shift), origin.offset);
}

/* Four weights of at most 2^29 * 1.0004 fit 32 bits; eight need not. A constant shift of 0 costs nothing. */
LMC_FN uint64_t lmc_vector_weight_sum(const lmc_vector_t *vector, lmc_origin_t origin, lmc_dtype_t dtype) {
    uint64_t sum = 0;
    LMC_UNROLL
    for (uint32_t e = 0; e < lmc_vector_elements(dtype); e += 4) {
        uint32_t four = 0;
        LMC_UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            float logit = lmc_vector_element(vector, e + i, dtype);
            if (origin.shift != 0.0f) logit = lmc_sub(logit, origin.shift);
            four += lmc_weight_in_place(logit, origin.offset);
        }
        sum += four;
    }
    return sum;
}

/* The weights of a thread in one chunk: all of them, and those of vectors before n_before. */
LMC_FN void lmc_tiles_weight_sum(const lmc_vector_t vectors[LMC_TILE_VECTORS], uint32_t chunk_begin,
                                 uint32_t lane, uint32_t n_vectors, uint32_t n_before, float offset,
                                 lmc_dtype_t dtype, uint64_t *sum, uint64_t *before) {
    lmc_origin_t in_place = {0.0f, offset};
    uint32_t chunk_end = chunk_begin + LMC_TILE_VECTORS * LMC_WARP_LANES;
    /* A chunk in which neither the row ends nor what lies before the token. */
    if (chunk_end <= n_vectors && (n_before <= chunk_begin || n_before >= chunk_end)) {
        uint64_t weights = 0;
        LMC_UNROLL
        for (uint32_t tile = 0; tile < LMC_TILE_VECTORS; tile++)
            weights += lmc_vector_weight_sum(&vectors[tile], in_place, dtype);
        *sum += weights;
        if (n_before >= chunk_end) *before += weights;
        return;
    }
    LMC_UNROLL
    for (uint32_t tile = 0; tile < LMC_TILE_VECTORS; tile++) {
        uint32_t vector = chunk_begin + lane + tile * LMC_WARP_LANES;
        if (vector >= n_vectors) break;
        uint64_t weights = lmc_vector_weight_sum(&vectors[tile], in_place, dtype);
        *sum += weights;
        if (vector < n_before) *before += weights;
    }
}

/* The same for a maximum beyond LMC_MAXIMUM_IN_PLACE: rare, so it loads again instead of doubling the code
 * above. */
LMC_FN void lmc_tiles_weight_sum_moved(const unsigned char *body, uint32_t lane_begin, uint32_t n_vectors,
                                       uint32_t n_before, lmc_origin_t origin, lmc_dtype_t dtype,
                                       uint64_t *sum, uint64_t *before) {
    LMC_UNROLL_NOT
    for (uint32_t tile = 0; tile < LMC_TILE_VECTORS; tile++) {
        uint32_t vector = lane_begin + tile * LMC_WARP_LANES;
        if (vector >= n_vectors) break;
        lmc_vector_t loaded = lmc_vector_load(body, vector);
        uint64_t weights = lmc_vector_weight_sum(&loaded, origin, dtype);
        *sum += weights;
        if (vector < n_before) *before += weights;
    }
}

/* The search for a value. */

/* The element of a vector whose interval holds rest, which lies inside the vector; *before is what lies below
 * it in the vector, *freq its own share. */
LMC_FN uint32_t lmc_vector_find(const lmc_vector_t *vector, lmc_origin_t origin, lmc_dtype_t dtype,
                                uint64_t rest, uint64_t *before, uint64_t *freq) {
    uint32_t n = lmc_vector_elements(dtype), found = n;
    uint64_t sum = 0;
    *before = *freq = 0;
    LMC_UNROLL
    for (uint32_t e = 0; e < n; e++) {
        uint64_t share = (uint64_t)lmc_weight_from(lmc_vector_element(vector, e, dtype), origin) + 1;
        if (found == n && rest < sum + share) {
            found = e;
            *before = sum;
            *freq = share;
        }
        sum += share;
    }
    return found;
}

#endif

/* Attention, written once for all instruction sets as kernel_lanes.h is, which includes this file: scores,
 * their softmax weights and the sum of these, the weighted values. A lane of a panel is a query; for the few
 * queries of a step lanes are keys, or features of a head. Every sum runs over the keys that a query sees,
 * ascending.
 */

/* How many of the keys from `from` on, and before `to`, lie in one piece of the ring. */
static inline size_t lmc_piece_length(const lmc_attention_t *attention, size_t from, size_t to) {
    size_t room = attention->capacity - from % attention->capacity;
    return to - from < room ? to - from : room;
}

static inline const float *lmc_values_from(const lmc_attention_t *attention, size_t from) {
    return attention->values + from % attention->capacity * attention->head_dim;
}

/* Panels. */

/* The keys that a panel meets: those that some lane does not see come first and last, [first, lead) and
 * [position, end); all lanes see those between. masks has a row for each of the former. */
typedef struct lmc_panel_keys {
    size_t base; /* a multiple of 16, from which on there are scores */
    size_t first, lead, position, end;
    int32_t lead_masks[LMC_LANES][LMC_LANES], own_masks[LMC_LANES][LMC_LANES];
} lmc_panel_keys_t;

static void lmc_find_panel_keys(const lmc_attention_t *attention, size_t position, size_t n_own,
                                lmc_panel_keys_t *keys) {
    size_t window = attention->window, last = position + LMC_LANES - 1;
    keys->first = lmc_first_seen(attention, position);
    keys->lead = lmc_first_seen(attention, last);
    if (keys->lead > position) keys->lead = position;
    keys->position = position;
    keys->end = position + n_own;
    keys->base = keys->first / LMC_LANES * LMC_LANES;
    for (size_t j = keys->first; j < keys->lead; j++) {
        LMC_FOR_LANES (lane)
            keys->lead_masks[j - keys->first][lane] = -(position + lane < j + window);
    }
    for (size_t j = position; j < keys->end; j++) {
        LMC_FOR_LANES (lane) {
            int is_recent = window == 0 || position + lane < j + window;
            keys->own_masks[j - position][lane] = -(is_recent && position + lane >= j);
        }
    }
}

/* Largest score that each lane sees, NaN ignored. */
static void lmc_max_masked(const float *scores, size_t n_keys, int32_t masks[][LMC_LANES], lmc_vf *maxima) {
    lmc_vf lowest = lmc_v_set1(-__builtin_inff());
    for (size_t j = 0; j < n_keys; j++) {
        LMC_FOR_VECTORS (v) {
            lmc_vf score = lmc_v_load_f32(scores + j * LMC_LANES + v * LMC_VLEN);
            lmc_vf seen = lmc_v_select(lmc_v_load_f32(masks[j] + v * LMC_VLEN), score, lowest);
            maxima[v] = lmc_v_max(seen, maxima[v]);
        }
    }
}

static void lmc_max_panel(lmc_panel_keys_t *keys, const float *scores, float *maximum) {
    lmc_vf m[LMC_VECTORS];
    LMC_FOR_VECTORS (v)
        m[v] = lmc_v_set1(-__builtin_inff());
    lmc_max_masked(scores + (keys->first - keys->base) * LMC_LANES, keys->lead - keys->first,
                   keys->lead_masks, m);
    for (size_t j = keys->lead - keys->base; j < keys->position - keys->base; j++) {
        LMC_FOR_VECTORS (v)
            m[v] = lmc_v_max(lmc_v_load_f32(scores + j * LMC_LANES + v * LMC_VLEN), m[v]);
    }
    lmc_max_masked(scores + (keys->position - keys->base) * LMC_LANES, keys->end - keys->position,
                   keys->own_masks, m);
    LMC_FOR_VECTORS (v)
        lmc_v_store_f32(maximum + v * LMC_VLEN, m[v]);
}

static void lmc_add_masked_weights(const float *weights, size_t n_keys, int32_t masks[][LMC_LANES],
                                   lmc_vf *sums) {
    for (size_t j = 0; j < n_keys; j++) {
        LMC_FOR_VECTORS (v) {
            lmc_vf next = lmc_v_add(sums[v], lmc_v_load_f32(weights + j * LMC_LANES + v * LMC_VLEN));
            sums[v] = lmc_v_select(lmc_v_load_f32(masks[j] + v * LMC_VLEN), next, sums[v]);
        }
    }
}

/* scores become weights; sums[lane] is their sum over the keys that the lane sees, ascending. */
static void lmc_weigh_panel(const lmc_attention_t *attention, lmc_panel_keys_t *keys, float *scores,
                            float *sums) {
    float maximum[LMC_LANES];
    lmc_softmax_rule_t rule = attention->softmax;
    float *weights = scores + (keys->first - keys->base) * LMC_LANES;
    size_t n_weights = (keys->end - keys->first) * LMC_LANES;
    for (size_t i = 0; i < n_weights && rule.cap_scale != 0.0f; i++)
        weights[i] = lmc_tanh(lmc_mul(weights[i], rule.cap_scale));
    lmc_max_panel(keys, scores, maximum);
    for (size_t i = 0; i < n_weights; i += LMC_LANES) {
        float *score = weights + i;
        LMC_FOR_LANES (lane)
            score[lane] = lmc_softmax_weight(score[lane], maximum[lane], rule.scale, rule.floor);
    }
    lmc_vf sum[LMC_VECTORS];
    LMC_FOR_VECTORS (v)
        sum[v] = lmc_v_set1(0.0f);
    lmc_add_masked_weights(weights, keys->lead - keys->first, keys->lead_masks, sum);
    for (size_t j = keys->lead - keys->base; j < keys->position - keys->base; j++) {
        LMC_FOR_VECTORS (v)
            sum[v] = lmc_v_add(sum[v], lmc_v_load_f32(scores + j * LMC_LANES + v * LMC_VLEN));
    }
    lmc_add_masked_weights(scores + (keys->position - keys->base) * LMC_LANES, keys->end - keys->position,
                           keys->own_masks, sum);
    LMC_FOR_VECTORS (v)
        lmc_v_store_f32(sums + v * LMC_VLEN, sum[v]);
}

/* Adds n_keys values to n_dims <= 4 features. A key that a lane does not see takes no part at all: 0 * value
 * would turn an infinite value into NaN. */
static inline __attribute__((always_inline)) void
lmc_add_masked_dims(const float *weights, const float *values, size_t head_dim, size_t n_keys,
                    int32_t masks[][LMC_LANES], float *output, const size_t n_dims) {
    lmc_vf sum[4][LMC_VECTORS];
#pragma GCC unroll 4
    for (size_t d = 0; d < n_dims; d++) {
        LMC_FOR_VECTORS (v)
            sum[d][v] = lmc_v_load_f32(output + d * LMC_LANES + v * LMC_VLEN);
    }
    for (size_t j = 0; j < n_keys; j++) {
        LMC_FOR_VECTORS (v) {
            lmc_vf weight = lmc_v_load_f32(weights + j * LMC_LANES + v * LMC_VLEN),
                   mask = lmc_v_load_f32(masks[j] + v * LMC_VLEN);
#pragma GCC unroll 4
            for (size_t d = 0; d < n_dims; d++) {
                lmc_vf next = lmc_v_fma(weight, lmc_v_set1(values[j * head_dim + d]), sum[d][v]);
                sum[d][v] = lmc_v_select(mask, next, sum[d][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (size_t d = 0; d < n_dims; d++) {
        LMC_FOR_VECTORS (v)
            lmc_v_store_f32(output + d * LMC_LANES + v * LMC_VLEN, sum[d][v]);
    }
}

/* weights: of the keys from `from` on. */
static void lmc_add_masked_values(const lmc_attention_t *attention, const float *weights, size_t from,
                                  size_t to, int32_t masks[][LMC_LANES], float *output) {
    size_t head_dim = attention->head_dim;
    for (size_t n_keys; from < to; from += n_keys, weights += n_keys * LMC_LANES, masks += n_keys) {
        const float *values = lmc_values_from(attention, from);
        size_t d = 0;
        n_keys = lmc_piece_length(attention, from, to);
        for (; d + 4 <= head_dim; d += 4)
            lmc_add_masked_dims(weights, values + d, head_dim, n_keys, masks, output + d * LMC_LANES, 4);
        for (; d < head_dim; d++)
            lmc_add_masked_dims(weights, values + d, head_dim, n_keys, masks, output + d * LMC_LANES, 1);
    }
}

/* The values that all lanes see. */
static void lmc_add_common_values(const lmc_attention_t *attention, const lmc_panel_keys_t *keys,
                                  const float *weights, int resume, float *output) {
    lmc_product_t product = {.row_stride = 1,
                             .k_stride = (ptrdiff_t)attention->head_dim,
                             .n_rows = attention->head_dim,
                             .output = output,
                             .n_panels = 1,
                             .n_lanes = LMC_LANES,
                             .resume = resume};
    for (size_t from = keys->lead; from < keys->position || !product.resume; from += product.n_k) {
        product.weights = lmc_values_from(attention, from);
        product.input = weights + (from - keys->base) * LMC_LANES;
        product.n_k = lmc_piece_length(attention, from, keys->position);
        lmc_product_run(&product);
        product.resume = 1;
    }
}

static void lmc_attend_panel_run(const lmc_attention_t *attention, const float *query, size_t position,
                                 size_t n_own, float *scores, float *output) {
    size_t head_dim = attention->head_dim;
    lmc_panel_keys_t keys;
    lmc_find_panel_keys(attention, position, n_own, &keys);
    lmc_product_t product = {.row_stride = 1,
                             .k_stride = LMC_LANES,
                             .n_rows = LMC_LANES,
                             .n_k = head_dim,
                             .input = query,
                             .n_panels = 1,
                             .n_lanes = LMC_LANES};
    for (size_t j = keys.base; j < keys.end; j += LMC_LANES) {
        product.weights = attention->keys + j % attention->capacity * head_dim;
        product.output = scores + (j - keys.base) * LMC_LANES;
        lmc_product_run(&product);
    }
    float sums[LMC_LANES];
    lmc_weigh_panel(attention, &keys, scores, sums);
    int has_lead = keys.first < keys.lead;
    if (has_lead) {
        memset(output, 0, head_dim * LMC_LANES * sizeof *output);
        lmc_add_masked_values(attention, scores + (keys.first - keys.base) * LMC_LANES, keys.first, keys.lead,
                              keys.lead_masks, output);
    }
    lmc_add_common_values(attention, &keys, scores, has_lead, output);
    lmc_add_masked_values(attention, scores + (position - keys.base) * LMC_LANES, position, keys.end,
                          keys.own_masks, output);
    for (size_t d = 0; d < head_dim; d++) {
        float *out = output + d * LMC_LANES;
        LMC_FOR_LANES (lane)
            out[lane] = lmc_div(out[lane], sums[lane]);
    }
}

/* Steps: one token of a stream reads each key and value once, for all heads that meet them, and many streams'
 * keys and values do not fit the cache: while keys are used the values of the same place are asked for, while
 * values are used the next stream's keys, so that memory is busy all the time. Where these are so many that
 * the second cache does not hold them meanwhile, what comes a little later. */
#define LMC_LINE_FLOATS 16
#define LMC_TO_SECOND_CACHE 2
#define LMC_HELD_FLOATS ((size_t)1 << 16)
#define LMC_KEYS_AHEAD 64

/* Blocks of keys, and vectors of features, that go side by side for so many queries: as many chains as
 * registers hold. */
#if LMC_VLEN == 8
#define LMC_SCORE_BLOCKS(N_QUERIES) ((N_QUERIES) == 1 ? 4 : (N_QUERIES) == 4 ? 1 : 2)
#define LMC_VALUE_VECTORS(N_QUERIES) ((N_QUERIES) == 1 ? 8 : (N_QUERIES) == 4 ? 2 : 4)
#else
#define LMC_SCORE_BLOCKS(N_QUERIES) (LMC_VLEN == 16 || (N_QUERIES) == 1 ? 4 : 1)
#define LMC_VALUE_VECTORS(N_QUERIES) ((N_QUERIES) <= (LMC_VLEN == 16 ? 3 : 2) ? 8 : 4)
#endif

/* Scores of n_blocks blocks of 16 keys for n_queries queries; both are constants. */
static inline __attribute__((always_inline)) void
lmc_score_blocks(const float *keys, const float *queries, size_t head_dim, float *scores, size_t stride,
                 const float *ahead, const size_t n_queries, const size_t n_blocks) {
    lmc_vf chains[LMC_QUERIES_MAX][4][LMC_VECTORS];
#pragma GCC unroll 4
    for (size_t q = 0; q < n_queries; q++) {
#pragma GCC unroll 4
        for (size_t b = 0; b < n_blocks; b++) {
            LMC_FOR_VECTORS (v)
                chains[q][b][v] = lmc_v_set1(0.0f);
        }
    }
    for (size_t d = 0; d < head_dim; d++) {
        lmc_vf query[LMC_QUERIES_MAX];
#pragma GCC unroll 4
        for (size_t q = 0; q < n_queries; q++)
            query[q] = lmc_v_set1(queries[q * head_dim + d]);
#pragma GCC unroll 4
        for (size_t b = 0; b < n_blocks; b++) {
            const float *key = keys + (b * head_dim + d) * LMC_LANES;
            __builtin_prefetch(ahead + (b * head_dim + d) * LMC_LINE_FLOATS, 0, LMC_TO_SECOND_CACHE);
            LMC_FOR_VECTORS (v) {
                lmc_vf x = lmc_v_load_f32(key + v * LMC_VLEN);
#pragma GCC unroll 4
                for (size_t q = 0; q < n_queries; q++)
                    chains[q][b][v] = lmc_v_fma(x, query[q], chains[q][b][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (size_t q = 0; q < n_queries; q++) {
#pragma GCC unroll 4
        for (size_t b = 0; b < n_blocks; b++) {
            LMC_FOR_VECTORS (v)
                lmc_v_store_f32(scores + q * stride + b * LMC_LANES + v * LMC_VLEN, chains[q][b][v]);
        }
    }
}

/* The keys that a query at `position` sees: [first, position], with scores from base to base + stride. */
typedef struct lmc_stream_keys {
    size_t base, first, end, stride;
} lmc_stream_keys_t;

static inline __attribute__((always_inline)) void lmc_score_stream(const lmc_attention_t *attention,
                                                                   lmc_stream_keys_t keys,
                                                                   const float *queries, float *scores,
                                                                   const size_t n_queries) {
    const size_t n_blocks = LMC_SCORE_BLOCKS(n_queries), most = n_blocks * LMC_LANES;
    size_t head_dim = attention->head_dim, end = keys.base + keys.stride;
    const float *first_values = lmc_values_from(attention, keys.first);
    int are_held = keys.stride * head_dim <= LMC_HELD_FLOATS;
    for (size_t from = keys.base, n_keys; from < end; from += n_keys) {
        const float *at = attention->keys + from % attention->capacity * head_dim;
        n_keys = lmc_piece_length(attention, from, end);
        size_t j = 0;
        for (; j + most <= n_keys; j += most) {
            const float *ahead = first_values + (from - keys.base + j) * head_dim;
            if (!are_held && j + most < n_keys) ahead = at + (j + most) * head_dim;
            lmc_score_blocks(at + j * head_dim, queries, head_dim, scores + (from - keys.base) + j,
                             keys.stride, ahead, n_queries, n_blocks);
        }
        for (; j < n_keys; j += LMC_LANES)
            lmc_score_blocks(at + j * head_dim, queries, head_dim, scores + (from - keys.base) + j,
                             keys.stride, first_values + (from - keys.base + j) * head_dim, n_queries, 1);
    }
}

/* Scores of one query become weights; those of keys that it does not see are not to be read. */
static void lmc_weigh_stream(lmc_softmax_rule_t rule, lmc_stream_keys_t keys, float *scores) {
    float largest[LMC_LANES], maximum;
    for (size_t j = 0; j < keys.stride && rule.cap_scale != 0.0f; j++)
        scores[j] = lmc_tanh(lmc_mul(scores[j], rule.cap_scale));
    for (size_t j = keys.base; j < keys.first; j++)
        scores[j - keys.base] = -__builtin_inff();
    for (size_t j = keys.end - keys.base; j < keys.stride; j++)
        scores[j] = -__builtin_inff();
    LMC_FOR_LANES (lane)
        largest[lane] = -__builtin_inff();
    for (size_t j = 0; j < keys.stride; j += LMC_LANES) {
        LMC_FOR_LANES (lane)
            largest[lane] = lmc_max(scores[j + lane], largest[lane]);
    }
    maximum = largest[0];
    LMC_FOR_LANES (lane)
        maximum = lmc_max(largest[lane], maximum);
    for (size_t j = 0; j < keys.stride; j++)
        scores[j] = lmc_softmax_weight(scores[j], maximum, rule.scale, rule.floor);
}

/* Features of the weighted sums of values for n_queries queries, in n_vectors (<= 8) each, the last of which
 * is at `last` and may cover features of the one before once more; both numbers are constants. sums: of the
 * weights. */
static inline __attribute__((always_inline)) void
lmc_sum_values(const lmc_attention_t *attention, lmc_stream_keys_t keys, size_t d, ptrdiff_t last,
               const float *scores, float *outputs, float *sums, const size_t n_queries,
               const size_t n_vectors) {
    size_t head_dim = attention->head_dim;
    int are_held = keys.stride * head_dim <= LMC_HELD_FLOATS;
    lmc_vf chains[LMC_QUERIES_MAX][8];
    float sum[LMC_QUERIES_MAX] = {0};
#pragma GCC unroll 4
    for (size_t q = 0; q < n_queries; q++) {
#pragma GCC unroll 8
        for (size_t v = 0; v < n_vectors; v++)
            chains[q][v] = lmc_v_set1(0.0f);
    }
    for (size_t from = keys.first, n_keys; from < keys.end; from += n_keys) {
        const float *values = lmc_values_from(attention, from) + d, *weights = scores + (from - keys.base);
        n_keys = lmc_piece_length(attention, from, keys.end);
        for (size_t j = 0; j < n_keys; j++, values += head_dim) {
            const float *ahead = attention->ahead + (from - keys.first + j) * head_dim + d;
            if (!are_held)
                ahead = j + LMC_KEYS_AHEAD < n_keys
                            ? values + LMC_KEYS_AHEAD * head_dim
                            : attention->ahead + (j + LMC_KEYS_AHEAD - n_keys) * head_dim + d;
            lmc_vf weight[LMC_QUERIES_MAX];
#pragma GCC unroll 4
            for (size_t q = 0; q < n_queries; q++) {
                weight[q] = lmc_v_set1(weights[q * keys.stride + j]);
                sum[q] = lmc_add(sum[q], weights[q * keys.stride + j]);
            }
#pragma GCC unroll 8
            for (size_t v = 0; v < n_vectors; v++) {
                const float *at = v + 1 < n_vectors ? values + v * LMC_VLEN : values + last;
                if (v * LMC_VLEN % LMC_LINE_FLOATS == 0)
                    __builtin_prefetch(ahead + v * LMC_VLEN, 0, LMC_TO_SECOND_CACHE);
                lmc_vf x = lmc_v_load_f32(at);
#pragma GCC unroll 4
                for (size_t q = 0; q < n_queries; q++)
                    chains[q][v] = lmc_v_fma(weight[q], x, chains[q][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (size_t q = 0; q < n_queries; q++) {
        float *out = outputs + q * head_dim + d;
        sums[q] = sum[q];
#pragma GCC unroll 8
        for (size_t v = 0; v < n_vectors; v++)
            lmc_v_store_f32(v + 1 < n_vectors ? out + v * LMC_VLEN : out + last, chains[q][v]);
    }
}

/* Heads smaller than a vector. */
static void lmc_sum_short_values(const lmc_attention_t *attention, lmc_stream_keys_t keys,
                                 const float *weights, float *output, float *sum) {
    size_t head_dim = attention->head_dim;
    memset(output, 0, head_dim * sizeof *output);
    *sum = 0.0f;
    for (size_t j = keys.first; j < keys.end; j++) {
        const float *values = lmc_values_from(attention, j);
        float weight = weights[j - keys.base];
        *sum = lmc_add(*sum, weight);
        for (size_t i = 0; i < head_dim; i++)
            output[i] = lmc_fma(weight, values[i], output[i]);
    }
}

static inline __attribute__((always_inline)) void lmc_sum_all_values(const lmc_attention_t *attention,
                                                                     lmc_stream_keys_t keys,
                                                                     const float *scores, float *outputs,
                                                                     float *sums, const size_t n_queries) {
    const size_t most = LMC_VALUE_VECTORS(n_queries);
    size_t head_dim = attention->head_dim;
    for (size_t d = 0, n_vectors; d < head_dim; d += n_vectors * LMC_VLEN) {
        size_t left = head_dim - d;
        n_vectors = (left + LMC_VLEN - 1) / LMC_VLEN;
        if (n_vectors > 4) n_vectors = n_vectors < 8 ? 4 : 8;
        if (n_vectors > most) n_vectors = most;
        if (left > n_vectors * LMC_VLEN) left = n_vectors * LMC_VLEN;
        ptrdiff_t last = (ptrdiff_t)left - LMC_VLEN;
        if (n_vectors == 1)
            lmc_sum_values(attention, keys, d, last, scores, outputs, sums, n_queries, 1);
        else if (n_vectors == 2)
            lmc_sum_values(attention, keys, d, last, scores, outputs, sums, n_queries, 2);
        else if (most > 2 && n_vectors == 3)
            lmc_sum_values(attention, keys, d, last, scores, outputs, sums, n_queries, 3);
        else if (most > 2 && n_vectors == 4)
            lmc_sum_values(attention, keys, d, last, scores, outputs, sums, n_queries, 4);
        else if (most > 4)
            lmc_sum_values(attention, keys, d, last, scores, outputs, sums, n_queries, 8);
    }
}

static inline __attribute__((always_inline)) void lmc_attend_queries(const lmc_attention_t *attention,
                                                                     lmc_stream_keys_t keys,
                                                                     const float *queries, float *scores,
                                                                     float *outputs, const size_t n_queries) {
    size_t head_dim = attention->head_dim;
    float sums[LMC_QUERIES_MAX] = {0};
    lmc_score_stream(attention, keys, queries, scores, n_queries);
    for (size_t q = 0; q < n_queries; q++)
        lmc_weigh_stream(attention->softmax, keys, scores + q * keys.stride);
    for (size_t q = 0; q < n_queries && head_dim < LMC_VLEN; q++)
        lmc_sum_short_values(attention, keys, scores + q * keys.stride, outputs + q * head_dim, &sums[q]);
    if (head_dim >= LMC_VLEN) lmc_sum_all_values(attention, keys, scores, outputs, sums, n_queries);
    for (size_t q = 0; q < n_queries; q++) {
        for (size_t d = 0; d < head_dim; d++)
            outputs[q * head_dim + d] = lmc_div(outputs[q * head_dim + d], sums[q]);
    }
}

static void lmc_attend_stream_run(const lmc_attention_t *attention, const float *queries, size_t n_queries,
                                  size_t position, float *scores, float *outputs) {
    lmc_stream_keys_t keys = {.first = lmc_first_seen(attention, position), .end = position + 1};
    keys.base = keys.first / LMC_LANES * LMC_LANES;
    keys.stride = (keys.end - keys.base + LMC_LANES - 1) / LMC_LANES * LMC_LANES;
    if (n_queries == 1)
        lmc_attend_queries(attention, keys, queries, scores, outputs, 1);
    else if (n_queries == 2)
        lmc_attend_queries(attention, keys, queries, scores, outputs, 2);
    else if (n_queries == 3)
        lmc_attend_queries(attention, keys, queries, scores, outputs, 3);
    else
        lmc_attend_queries(attention, keys, queries, scores, outputs, 4);
}

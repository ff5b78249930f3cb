/* What the tokens of a stream teach about the next one, as integer masses beside the model's weights.
 * FORMAT.md, section 7, is the contract; rows and streams of bits are elsewhere. */
#include "llmcomp/mixing.h"

#include <string.h>

#include "core/base/size.h"

#define N_ORDERS 6
#define AGES_MAX 16
#define SYMBOLS_MAX (N_ORDERS * AGES_MAX)
#define N_SIZES 7 /* classes of how often a context was seen, and below of how many tokens followed it */
#define N_FOLLOWERS 4
#define SHARES_SETS ((N_ORDERS + 1) * 8)
/* Fixed point: shares of a context in 2^16, of a step in 2^24, probabilities and masses in 2^30. */
#define TRUST_ONE 65536
#define TRUST_MIN 256
#define TRUST_STEPS_MAX 47
#define SHARE_ONE (1 << 24)
#define SHARE_MIN 1024
#define SHARE_RATE 20
#define MASS_ONE ((uint64_t)1 << 30)
#define AGE_KEPT 218 /* of 256, from one occurrence of a context to the one before */
#define MODEL_SHARE_BITS 19
#define SCALE_BITS 13
#define FOUND_SLOTS 256 /* at least twice SYMBOLS_MAX, a power of two */

static const size_t orders[N_ORDERS] = {1, 2, 3, 4, 6, 12};

/* What is left to the steps below, learnt: the share of a step is the rest. */
typedef struct trust {
    int32_t below;
    int32_t n_steps;
} trust_t;

/* What one order knows at this position: its last occurrences, youngest first. */
typedef struct step {
    uint32_t positions[AGES_MAX]; /* of tokens, both counted from 1 */
    int32_t tokens[AGES_MAX];
    size_t n_ages;
    uint64_t weight; /* of all ages */
    trust_t *trust;  /* NULL: the context is new */
    size_t seat;     /* where the table is searched from */
    uint32_t *slot;  /* where the table has, or will have, this context; NULL: the stream is shorter */
} step_t;

struct lmc_mixer {
    size_t n_tokens, n_tokens_max, n_slots;
    int32_t *tokens;
    uint32_t *previous[N_ORDERS]; /* of a position, the one before with the same context; both count from 1 */
    uint32_t *table[N_ORDERS];    /* the youngest position of a context, 0: none */
    trust_t trusts[N_ORDERS][N_SIZES * N_FOLLOWERS];
    int32_t shares[SHARES_SETS][N_ORDERS + 1];
    uint64_t age_weights[AGES_MAX];
    uint64_t total; /* of the row that was asked for; 0: none was */
    int is_sought;  /* seats of this row are known */
    int32_t *share;
    step_t steps[N_ORDERS];
    size_t n_symbols;
    int32_t symbols[SYMBOLS_MAX];
    uint64_t masses[SYMBOLS_MAX];
    uint8_t found_order[SYMBOLS_MAX];
    uint32_t row; /* the number of this row: what is found in others is not found in this one */
    uint32_t found_row[FOUND_SLOTS];
    uint8_t found[FOUND_SLOTS];
};

static size_t slots_for(size_t n_tokens_max) {
    size_t n = 64;
    while (n < n_tokens_max + n_tokens_max / 2)
        n *= 2;
    return n;
}

/* Cuts memory, or with NULL only counts how much it takes. */
static size_t lay_out(lmc_mixer_t *mixer, void *memory, size_t n_tokens_max) {
    lmc_arena_t arena = {memory, 0, sizeof(uint64_t)};
    lmc_mixer_t ignored, *to = mixer == NULL ? &ignored : mixer;
    lmc_arena_cut(&arena, 1, sizeof(lmc_mixer_t));
    to->tokens = (int32_t *)lmc_arena_cut(&arena, n_tokens_max, sizeof(int32_t));
    for (size_t i = 0; i < N_ORDERS; i++) {
        to->previous[i] = (uint32_t *)lmc_arena_cut(&arena, n_tokens_max, sizeof(uint32_t));
        to->table[i] = (uint32_t *)lmc_arena_cut(&arena, slots_for(n_tokens_max), sizeof(uint32_t));
    }
    return arena.used_bytes;
}

size_t lmc_mixer_bound(size_t n_tokens_max) {
    return n_tokens_max > LMC_MIXING_TOKENS_MAX ? 0 : lay_out(NULL, NULL, n_tokens_max);
}

lmc_status_t lmc_mixer_begin(void *memory, size_t memory_bytes, size_t n_tokens_max, lmc_mixer_t **result) {
    size_t needed = lmc_mixer_bound(n_tokens_max);
    if (needed == 0) return LMC_ERROR_ARGUMENT;
    if (memory_bytes < needed) return LMC_ERROR_CAPACITY;
    lmc_mixer_t *mixer = (lmc_mixer_t *)memory;
    memset(mixer, 0, sizeof *mixer);
    lay_out(mixer, memory, n_tokens_max);
    mixer->n_tokens_max = n_tokens_max;
    mixer->n_slots = slots_for(n_tokens_max);
    for (size_t i = 0; i < N_ORDERS; i++) {
        memset(mixer->table[i], 0, mixer->n_slots * sizeof(uint32_t));
        for (size_t j = 0; j < N_SIZES * N_FOLLOWERS; j++)
            mixer->trusts[i][j].below = TRUST_ONE / 2;
    }
    for (size_t i = 0; i < SHARES_SETS; i++)
        for (size_t j = 0; j <= N_ORDERS; j++)
            mixer->shares[i][j] = j == N_ORDERS ? SHARE_ONE / 10 * 4 : SHARE_ONE / 10;
    uint64_t weight = TRUST_ONE;
    for (size_t i = 0; i < AGES_MAX; i++, weight = weight * AGE_KEPT / 256)
        mixer->age_weights[i] = weight;
    *result = mixer;
    return LMC_OK;
}

/* Contexts. The table is open addressed and compares tokens, so that it decides nothing but the speed. */

static int has_context(const lmc_mixer_t *mixer, size_t order, size_t position) {
    return memcmp(mixer->tokens + position - order, mixer->tokens + mixer->n_tokens - order,
                  order * sizeof(int32_t)) == 0;
}

static size_t seat_of(const lmc_mixer_t *mixer, size_t i) {
    uint64_t hash = 0;
    for (size_t j = mixer->n_tokens - orders[i]; j < mixer->n_tokens; j++)
        hash = (hash ^ (uint32_t)mixer->tokens[j]) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29;
    return (size_t)(hash >> 7) & (mixer->n_slots - 1);
}

/* All that is read of a stream lies somewhere in megabytes, outside the caches: it is asked for in time, of
 * all orders side by side. */
void lmc_mixer_seek(lmc_mixer_t *mixer) {
    for (size_t i = 0; i < N_ORDERS && !mixer->is_sought && mixer->n_tokens >= orders[i]; i++) {
        mixer->steps[i].seat = seat_of(mixer, i);
        __builtin_prefetch(&mixer->table[i][mixer->steps[i].seat]);
    }
    mixer->is_sought = 1;
}

static uint32_t *find_context(const lmc_mixer_t *mixer, size_t i) {
    size_t slot = mixer->steps[i].seat;
    uint32_t *table = mixer->table[i];
    while (table[slot] != 0 && !has_context(mixer, orders[i], table[slot] - 1))
        slot = (slot + 1) & (mixer->n_slots - 1);
    return &table[slot];
}

static void find_positions(lmc_mixer_t *mixer) {
    uint32_t at[N_ORDERS] = {0};
    lmc_mixer_seek(mixer);
    for (size_t i = 0; i < N_ORDERS && mixer->n_tokens >= orders[i]; i++) {
        uint32_t seated = mixer->table[i][mixer->steps[i].seat];
        if (seated > orders[i]) __builtin_prefetch(&mixer->tokens[seated - 1 - orders[i]]);
    }
    for (size_t i = 0; i < N_ORDERS; i++) {
        step_t *step = &mixer->steps[i];
        step->n_ages = 0;
        step->slot = mixer->n_tokens < orders[i] ? NULL : find_context(mixer, i);
        if (step->slot != NULL) at[i] = *step->slot;
    }
    for (size_t age = 0; age < AGES_MAX; age++) {
        for (size_t i = 0; i < N_ORDERS; i++) {
            if (at[i] == 0) continue;
            step_t *step = &mixer->steps[i];
            step->positions[step->n_ages++] = at[i];
            __builtin_prefetch(&mixer->tokens[at[i] - 1]);
            at[i] = mixer->previous[i][at[i] - 1];
        }
    }
}

/* The place of a token among the symbols of this row, a new one if need be. */
static size_t symbol_place(lmc_mixer_t *mixer, int32_t token) {
    size_t slot = (uint32_t)token * 0x9E3779B1u >> 24;
    for (;; slot = (slot + 1) % FOUND_SLOTS) {
        if (mixer->found_row[slot] != mixer->row) break;
        if (mixer->symbols[mixer->found[slot]] == token) return mixer->found[slot];
    }
    size_t place = mixer->n_symbols++;
    mixer->found_row[slot] = mixer->row;
    mixer->found[slot] = (uint8_t)place;
    mixer->symbols[place] = token;
    mixer->masses[place] = 0;
    mixer->found_order[place] = 0;
    return place;
}

static size_t size_class(size_t n_ages) {
    return n_ages < 4 ? n_ages - 1 : n_ages < 6 ? 3 : n_ages < 9 ? 4 : n_ages < 16 ? 5 : 6;
}

/* Gathers what one order knows; 0 if its context is new. Then *n_followers different tokens came after it. */
static int gather_step(lmc_mixer_t *mixer, size_t i, uint8_t places[AGES_MAX], size_t *n_followers) {
    step_t *step = &mixer->steps[i];
    step->trust = NULL;
    if (step->n_ages == 0) return 0;
    *n_followers = 0;
    step->weight = 0;
    for (size_t age = 0; age < step->n_ages; age++) {
        int32_t token = mixer->tokens[step->positions[age] - 1];
        size_t place = symbol_place(mixer, token);
        *n_followers += mixer->found_order[place] != i + 1;
        mixer->found_order[place] = (uint8_t)(i + 1);
        places[age] = (uint8_t)place;
        step->weight += mixer->age_weights[age];
        step->tokens[age] = token;
    }
    size_t followers = *n_followers < N_FOLLOWERS ? *n_followers : N_FOLLOWERS;
    step->trust = &mixer->trusts[i][size_class(step->n_ages) * N_FOLLOWERS + followers - 1];
    return 1;
}

/* The masses of a row, in 2^30 together with the model's share of it, which is returned. */
static uint64_t mix_row(lmc_mixer_t *mixer) {
    uint8_t places[N_ORDERS][AGES_MAX];
    size_t set = 0, n_followers;
    mixer->n_symbols = 0;
    mixer->row++;
    find_positions(mixer);
    for (size_t i = 0; i < N_ORDERS; i++) {
        if (!gather_step(mixer, i, places[i], &n_followers)) continue;
        size_t n_ages = mixer->steps[i].n_ages;
        set = (i + 1) * 8 + ((n_ages < 4 ? n_ages : 4) - 1) * 2 + (n_followers == 1);
    }
    mixer->share = mixer->shares[set];
    uint64_t reach = 0; /* of all steps from this one up, what comes down to it */
    for (size_t i = N_ORDERS; i-- > 0;) {
        step_t *step = &mixer->steps[i];
        reach += (uint64_t)mixer->share[i + 1] << 6;
        if (step->trust == NULL) continue;
        uint64_t below = reach * (uint64_t)step->trust->below >> 16;
        uint64_t unit = ((reach - below) << 16) / step->weight;
        for (size_t j = 0; j < step->n_ages; j++)
            mixer->masses[places[i][j]] += unit * mixer->age_weights[j] >> 16;
        reach = below;
    }
    return reach + ((uint64_t)mixer->share[0] << 6);
}

/* From parts of 2^30 to the model's own scale. */
static lmc_status_t predict(lmc_mixer_t *mixer, uint64_t total) {
    if (total == 0 || total > LMC_MIXING_TOTAL_MAX) return LMC_ERROR_INTERVAL;
    if (mixer->n_tokens == mixer->n_tokens_max) return LMC_ERROR_CAPACITY;
    uint64_t model = mix_row(mixer), least = (total >> MODEL_SHARE_BITS) + 1;
    uint64_t scale = (total << SCALE_BITS) / (model > least ? model : least);
    for (size_t i = 0; i < mixer->n_symbols; i++)
        mixer->masses[i] = scale * mixer->masses[i] >> SCALE_BITS;
    mixer->total = total;
    return LMC_OK;
}

/* Learning. */

static void learn(lmc_mixer_t *mixer, int64_t token, uint64_t freq) {
    uint64_t chances[N_ORDERS + 1];
    uint64_t chance = chances[0] = freq * MASS_ONE / mixer->total + 1;
    for (size_t i = 0; i < N_ORDERS; i++) {
        step_t *step = &mixer->steps[i];
        trust_t *trust = step->trust;
        if (trust != NULL) {
            uint64_t weight = 0;
            for (size_t j = 0; j < step->n_ages; j++)
                weight += step->tokens[j] == token ? mixer->age_weights[j] : 0;
            uint64_t below = chance * (uint64_t)trust->below;
            uint64_t own = (weight * MASS_ONE / step->weight) * (uint64_t)(TRUST_ONE - trust->below);
            chance = ((below + own) >> 16) + 1;
            int32_t credit = (int32_t)(below / chance);
            trust->below += (credit - trust->below) / (trust->n_steps + 3);
            if (trust->below < TRUST_MIN) trust->below = TRUST_MIN;
            if (trust->below > TRUST_ONE - TRUST_MIN) trust->below = TRUST_ONE - TRUST_MIN;
            if (trust->n_steps < TRUST_STEPS_MAX) trust->n_steps++;
        }
        chances[i + 1] = chance;
    }
    uint64_t whole = 0;
    for (size_t i = 0; i <= N_ORDERS; i++)
        whole += (uint64_t)mixer->share[i] * chances[i];
    for (size_t i = 0; i <= N_ORDERS; i++) {
        int32_t credit = (int32_t)((uint64_t)mixer->share[i] * chances[i] / ((whole >> 24) + 1));
        mixer->share[i] += (credit - mixer->share[i]) / SHARE_RATE;
        if (mixer->share[i] < SHARE_MIN) mixer->share[i] = SHARE_MIN;
    }
}

lmc_status_t lmc_mixer_take(lmc_mixer_t *mixer, int64_t token, uint64_t freq) {
    if (mixer->total == 0) return LMC_ERROR_ARGUMENT;
    if (freq == 0 || freq > LMC_MIXING_FREQ_MAX || freq > mixer->total) return LMC_ERROR_INTERVAL;
    if (token < 0 || token >= (int64_t)LMC_VOCAB_SIZE_MAX) return LMC_ERROR_TOKEN;
    learn(mixer, token, freq);
    uint32_t position = (uint32_t)mixer->n_tokens + 1;
    for (size_t i = 0; i < N_ORDERS; i++) {
        uint32_t *slot = mixer->steps[i].slot;
        if (slot == NULL) continue;
        mixer->previous[i][position - 1] = *slot;
        *slot = position;
    }
    mixer->tokens[mixer->n_tokens++] = (int32_t)token;
    mixer->total = 0;
    mixer->is_sought = 0;
    return LMC_OK;
}

/* Rows. */

lmc_status_t lmc_mixer_encode(lmc_mixer_t *mixer, size_t n, const int64_t *tokens, uint64_t *start,
                              uint64_t *freq, uint64_t *total, size_t *error_index) {
    if (n > mixer->n_tokens_max - mixer->n_tokens) return LMC_ERROR_CAPACITY;
    for (size_t t = 0; t < n; t++) {
        *error_index = t;
        if (start[t] > total[t] || freq[t] > total[t] - start[t]) return LMC_ERROR_INTERVAL;
        lmc_status_t status = predict(mixer, total[t]);
        if (status != LMC_OK) return status;
        uint64_t before = 0, own = 0, all = 0;
        for (size_t i = 0; i < mixer->n_symbols; i++) {
            before += mixer->symbols[i] < tokens[t] ? mixer->masses[i] : 0;
            own += mixer->symbols[i] == tokens[t] ? mixer->masses[i] : 0;
            all += mixer->masses[i];
        }
        status = lmc_mixer_take(mixer, tokens[t], freq[t]);
        if (status != LMC_OK) return status;
        start[t] += before;
        freq[t] += own;
        total[t] += all;
    }
    return LMC_OK;
}

static void sort_symbols(lmc_mixer_t *mixer) {
    for (size_t i = 1; i < mixer->n_symbols; i++) {
        int32_t token = mixer->symbols[i];
        uint64_t mass = mixer->masses[i];
        size_t at = i;
        for (; at > 0 && mixer->symbols[at - 1] > token; at--) {
            mixer->symbols[at] = mixer->symbols[at - 1];
            mixer->masses[at] = mixer->masses[at - 1];
        }
        mixer->symbols[at] = token;
        mixer->masses[at] = mass;
    }
}

lmc_status_t lmc_mixer_predict(lmc_mixer_t *mixer, uint64_t total, lmc_added_t *added) {
    lmc_status_t status = predict(mixer, total);
    if (status != LMC_OK) return status;
    sort_symbols(mixer);
    added->n = mixer->n_symbols;
    added->tokens = mixer->symbols;
    added->weights = mixer->masses;
    added->total = 0;
    for (size_t i = 0; i < mixer->n_symbols; i++)
        added->total += mixer->masses[i];
    return LMC_OK;
}

/* A chain of steps: the model's and the coder's in turn. The arithmetic of both is elsewhere. */
#include "llmcomp/decoding.h"

#include "core/base/parallel.h"
#include "core/base/size.h"
#include "core/transformer/forward.h"
#include "core/transformer/turned_weights.h"

/* Turning takes about as long as a step, and saves a tenth of each. */
#define TURNING_STEPS_MIN 12

/* The streams that a task takes through all steps, and the first error among them. */
typedef struct lmc_chain_share {
    size_t first, end;
    lmc_status_t status;
    size_t stage, error_row; /* two stages a step, in the order of errors */
} lmc_chain_share_t;

typedef struct lmc_chain_job {
    lmc_context_t context; /* of a share's steps */
    const lmc_transformer_model_t *model;
    lmc_transformer_cache_t *cache;
    const lmc_transformer_chain_t *chain;
    size_t n_steps, n_active, n_shares;
    int32_t *found;
    lmc_chain_share_t *shares;
    char *workspace; /* of slot_bytes a slot */
    size_t slot_bytes;
} lmc_chain_job_t;

/* Streams side by side, each share with as many that are active as the others. */
static lmc_chain_share_t share_of(const lmc_chain_job_t *job, size_t index) {
    const uint8_t *active = job->chain->active;
    size_t begin = index * job->n_active / job->n_shares, end = (index + 1) * job->n_active / job->n_shares;
    lmc_chain_share_t share = {job->cache->n_streams, job->cache->n_streams, LMC_OK, 0, 0};
    for (size_t s = 0, n = 0; s < job->cache->n_streams; s++) {
        if (n == begin && s < share.first) share.first = s;
        if (n == end && end < job->n_active) {
            share.end = s;
            break;
        }
        n += active == NULL || active[s];
    }
    return share;
}

static void run_share(void *argument, size_t index, size_t slot) {
    const lmc_chain_job_t *job = (const lmc_chain_job_t *)argument;
    const lmc_transformer_chain_t *chain = job->chain;
    lmc_chain_share_t *share = &job->shares[index];
    *share = share_of(job, index);
    size_t first = share->first, n = share->end - first, n_logits = job->model->config.n_logits;
    const uint8_t *active = chain->active == NULL ? NULL : chain->active + first;
    int32_t *found = job->found + first;
    lmc_search_t *searches = chain->searches + slot;
    lmc_rows_t rows = {.data = chain->logits + first * n_logits,
                       .row_stride_bytes = (ptrdiff_t)(n_logits * sizeof(float)),
                       .n_rows = n,
                       .vocab_size = chain->vocab_size,
                       .dtype = LMC_FLOAT32};
    for (size_t i = 0; i < job->n_steps; i++, found += job->cache->n_streams) {
        share->stage = 2 * i;
        share->status = lmc_step_streams(
            &job->context, job->model, job->cache, first, share->end, chain->tokens, chain->active,
            chain->logits, job->workspace + slot * job->slot_bytes, job->slot_bytes, &share->error_row);
        if (share->status != LMC_OK) return;
        share->stage++;
        if (chain->mixers != NULL)
            share->status = lmc_mixed_decode_step(&job->context, &rows, active, chain->decoders + first,
                                                  chain->mixers + first, searches, found, &share->error_row);
        else
            share->status = lmc_decode_step(&job->context, &rows, active, chain->decoders + first, searches,
                                            found, &share->error_row);
        share->error_row += first;
        if (share->status != LMC_OK) return;
        for (size_t s = 0; s < n; s++)
            chain->tokens[first + s] = found[s];
    }
}

/* Of a small model every thread takes streams of its own through all steps: none waits for another, and what
 * they have learnt stays in its caches. */
static size_t shares_of(const lmc_transformer_config_t *config, size_t n_active, size_t n_slots) {
    if (!lmc_is_small(config) || n_active < 2) return 1;
    return n_active < n_slots ? n_active : n_slots;
}

static size_t slot_bytes_of(const lmc_transformer_config_t *config, size_t n_active, size_t n_shares) {
    return lmc_round_up(lmc_transformer_step_bound(config, (n_active + n_shares - 1) / n_shares, 1),
                        LMC_HOST_ALIGNMENT);
}

/* And every share's streams are few enough for what is turned. */
static int is_worth_turning(const lmc_chain_job_t *job) {
    const lmc_transformer_kernels_t *kernels = job->context.backend->transformer;
    return kernels->turn != NULL && job->n_steps >= TURNING_STEPS_MIN &&
           (job->n_active + job->n_shares - 1) / job->n_shares <= kernels->lanes_16bit &&
           lmc_turned_weights_bound(&job->model->config) > 0;
}

size_t lmc_transformer_decode_bound(const lmc_transformer_config_t *config, size_t n_streams,
                                    size_t n_slots) {
    size_t together = lmc_transformer_step_bound(config, n_streams, n_slots), apart = 0;
    if (lmc_is_small(config)) apart = n_slots * slot_bytes_of(config, n_streams, n_slots);
    return (together > apart ? together : apart) + LMC_HOST_ALIGNMENT + lmc_turned_weights_bound(config) +
           lmc_round_up(n_slots * sizeof(lmc_chain_share_t), LMC_HOST_ALIGNMENT);
}

lmc_status_t lmc_transformer_decode(const lmc_context_t *context, const lmc_transformer_model_t *model,
                                    lmc_transformer_cache_t *cache, const lmc_transformer_chain_t *chain,
                                    size_t n_steps, int32_t *found, void *workspace, size_t workspace_bytes,
                                    size_t *error_row) {
    size_t n_slots = lmc_slot_count(context->executor),
           n_active = lmc_count_active(chain->active, 0, cache->n_streams);
    lmc_arena_t arena = {lmc_align(workspace, LMC_HOST_ALIGNMENT), 0, LMC_HOST_ALIGNMENT};
    lmc_chain_job_t job = {*context, model, cache, chain, n_steps, n_active, 1, found, NULL, NULL, 0};
    if (chain->vocab_size > model->config.n_logits) return LMC_ERROR_VOCAB_SIZE;
    if (workspace_bytes < lmc_transformer_decode_bound(&model->config, cache->n_streams, n_slots))
        return LMC_ERROR_CAPACITY;
    lmc_status_t status =
        n_steps == 0 ? LMC_OK
                     : lmc_check_step(&model->config, cache, chain->tokens, chain->active, error_row);
    if (status != LMC_OK) return status;
    job.n_shares = shares_of(&model->config, n_active, n_slots);
    job.shares = (lmc_chain_share_t *)lmc_arena_cut(&arena, n_slots, sizeof *job.shares);
    lmc_transformer_model_t turned;
    if (is_worth_turning(&job)) {
        turned = lmc_turn_weights(context->backend->transformer, model,
                                  lmc_arena_cut(&arena, lmc_turned_weights_bound(&model->config), 1));
        job.model = &turned;
    }
    job.workspace = arena.base + arena.used_bytes;
    if (job.n_shares > 1) {
        job.context.executor = NULL;
        job.slot_bytes = slot_bytes_of(&model->config, n_active, job.n_shares);
        lmc_run_tasks(context->executor, job.n_shares, run_share, &job);
    } else {
        job.slot_bytes = lmc_transformer_step_bound(&model->config, cache->n_streams, n_slots);
        run_share(&job, 0, 0);
    }
    const lmc_chain_share_t *first = job.shares;
    for (size_t i = 1; i < job.n_shares; i++) {
        const lmc_chain_share_t *share = &job.shares[i];
        if (share->status != LMC_OK && (first->status == LMC_OK || share->stage < first->stage))
            first = share;
    }
    *error_row = first->error_row;
    return first->status;
}

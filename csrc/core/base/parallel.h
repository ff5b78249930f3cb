/* How the core spreads work: every task runs in the float state of ieee.h, on whatever thread. */
#ifndef LLMCOMP_CORE_BASE_PARALLEL_H
#define LLMCOMP_CORE_BASE_PARALLEL_H

#include "llmcomp/backend.h"
#include "core/base/ieee.h"

typedef struct lmc_guarded_task {
    lmc_task_fn_t task;
    void *argument;
} lmc_guarded_task_t;

static inline void lmc_run_guarded(void *argument, size_t task_index, size_t slot) {
    const lmc_guarded_task_t *guarded = (const lmc_guarded_task_t *)argument;
    lmc_float_state_t saved = lmc_float_state_enter();
    guarded->task(guarded->argument, task_index, slot);
    lmc_float_state_leave(saved);
}

static inline size_t lmc_slot_count(const lmc_executor_t *executor) {
    return executor == NULL ? 1 : executor->n_slots;
}

static inline void lmc_run_tasks(const lmc_executor_t *executor, size_t n_tasks, lmc_task_fn_t task,
                                 void *argument) {
    lmc_guarded_task_t guarded = {task, argument};
    if (executor != NULL && n_tasks > 1) {
        executor->run(executor, n_tasks, lmc_run_guarded, &guarded);
        return;
    }
    for (size_t i = 0; i < n_tasks; i++)
        lmc_run_guarded(&guarded, i, 0);
}

#endif

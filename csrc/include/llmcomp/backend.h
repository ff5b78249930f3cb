/* Backends (one set of kernels per instruction set) and the executor that spreads tasks over threads.
 * The core takes both as arguments; only csrc/dispatch chooses them. */
#ifndef LLMCOMP_BACKEND_H
#define LLMCOMP_BACKEND_H

#include <stddef.h>

#include "llmcomp/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The kernels of one instruction set. "serial" is the specification; every other backend gives the same bits.
 */
typedef struct lmc_backend lmc_backend_t;

/* Runs task(argument, task_index, slot) once for every task_index < n_tasks, in any order and on any thread.
 * slot < n_slots names the scratch memory that a task may use: no two tasks run in one slot at a time. */
typedef void (*lmc_task_fn_t)(void *argument, size_t task_index, size_t slot);
typedef struct lmc_executor {
    void (*run)(const struct lmc_executor *self, size_t n_tasks, lmc_task_fn_t task, void *argument);
    size_t n_slots;
} lmc_executor_t;

/* What the functions of the core work with. A NULL executor means: in the calling thread. */
typedef struct lmc_context {
    const lmc_backend_t *backend;
    const lmc_executor_t *executor;
} lmc_context_t;

const char *lmc_backend_name(const lmc_backend_t *backend);

/* csrc/dispatch: what was built and this processor can run, slowest first; index 0 is always "serial". */
size_t lmc_backend_count(void);
const lmc_backend_t *lmc_backend_at(size_t index);       /* NULL past the end */
const lmc_backend_t *lmc_backend_find(const char *name); /* NULL if unknown or not usable here */

/* csrc/dispatch: an executor on a pool of threads that all callers share; n_threads >= 1.
 * A call that finds the pool busy, or comes from a forked child before its own first use, still runs every
 * task. */
lmc_executor_t lmc_executor_threads(size_t n_threads);

#ifdef __cplusplus
}
#endif

#endif

/* One pool of threads for the process, shared by all callers, started when first needed. A caller that finds
 * it busy, or cannot start threads, does its tasks alone: the results are the same. A caller never waits for
 * a worker that has not begun: one that wakes up late finds no job. csrc/check/pool.pml is a model of this
 * file, whose states are all looked at; both change together. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "llmcomp/backend.h"

#define WORKERS_MAX 255
/* How often a thread looks for what it waits for before it sleeps: some 20 microseconds, a fraction of what a
 * sleep and a wake-up cost. The parts of a model's step follow each other within that time. */
#define SPINS 1000
/* How many sleeping workers a thread of a job wakes before its first task. */
#ifndef WAKES
#define WAKES 4
#endif

typedef struct pool_job {
    lmc_task_fn_t task;
    void *argument;
    size_t n_tasks;
    atomic_size_t next_task;
    size_t n_helpers; /* workers 0 .. n_helpers - 1 take part, in slots 1 .. n_helpers */
} pool_job_t;

static struct {
    pthread_mutex_t caller; /* held by the caller whose job the pool runs */
    pthread_mutex_t lock;   /* guards all below */
    pthread_cond_t helper_done;
    pthread_cond_t job_posted[WORKERS_MAX]; /* one a worker: a job wakes those that it wants and no others */
    size_t n_workers;
    pool_job_t *job;
    atomic_ulong job_number; /* these two are also read without the lock, while spinning */
    atomic_size_t n_running;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .helper_done = PTHREAD_COND_INITIALIZER};

static void run_tasks(pool_job_t *job, size_t slot) {
    size_t i;
    while ((i = atomic_fetch_add(&job->next_task, 1)) < job->n_tasks)
        job->task(job->argument, i, slot);
}

/* Slot s wakes slots WAKES * s + 1 to WAKES * s + WAKES while tasks are left. A job of tiny tasks then costs
 * its caller a few wake-ups, however many threads it may have, and 16 threads are awake after two rounds. */
static void wake_next(pool_job_t *job, size_t slot) {
    size_t first = WAKES * slot; /* slot s + 1 is worker s */
    if (atomic_load(&job->next_task) >= job->n_tasks) return;
    for (size_t worker = first; worker < first + WAKES && worker < job->n_helpers; worker++)
        pthread_cond_signal(&pool.job_posted[worker]);
}

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void *worker_main(void *argument) {
    size_t worker = (size_t)argument;
    unsigned long seen = 0; /* job numbers start at 1 */
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&pool.job_number) == seen; i++)
            pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (pool.job == NULL || pool.job_number == seen)
            pthread_cond_wait(&pool.job_posted[worker], &pool.lock);
        pool_job_t *job = pool.job;
        seen = pool.job_number;
        int takes_part = worker < job->n_helpers;
        if (takes_part) pool.n_running++;
        pthread_mutex_unlock(&pool.lock);
        if (!takes_part) continue;
        wake_next(job, worker + 1);
        run_tasks(job, worker + 1);
        pthread_mutex_lock(&pool.lock);
        if (--pool.n_running == 0) pthread_cond_signal(&pool.helper_done);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* Called with pool.lock held. Signals stay with the caller's threads. */
static void start_workers(size_t n_wanted) {
    sigset_t all, saved;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.n_workers < n_wanted) {
        pthread_t thread;
        pthread_cond_init(&pool.job_posted[pool.n_workers], NULL);
        if (pthread_create(&thread, &attributes, worker_main, (void *)pool.n_workers) != 0) break;
        pool.n_workers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
}

/* Only the forking thread lives on in a child: it starts with an empty pool. */
static void forget_pool(void) {
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.helper_done, NULL); /* those of the workers: where they start */
    pool.n_workers = 0;
    pool.job = NULL;
    pool.n_running = 0;
}

static void register_fork_handler(void) {
    pthread_atfork(NULL, NULL, forget_pool);
}

static void run_on_pool(const lmc_executor_t *self, size_t n_tasks, lmc_task_fn_t task, void *argument) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pool_job_t job = {.task = task, .argument = argument, .n_tasks = n_tasks};
    size_t n_threads = self->n_slots < n_tasks ? self->n_slots : n_tasks;
    pthread_once(&once, register_fork_handler);
    if (n_threads < 2 || pthread_mutex_trylock(&pool.caller) != 0) {
        run_tasks(&job, 0);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    job.n_helpers = n_threads - 1;
    start_workers(job.n_helpers);
    if (job.n_helpers > pool.n_workers) job.n_helpers = pool.n_workers;
    pool.job = &job;
    pool.job_number++;
    pthread_mutex_unlock(&pool.lock);
    wake_next(&job, 0);

    run_tasks(&job, 0);

    pthread_mutex_lock(&pool.lock);
    pool.job = NULL; /* a worker that wakes up only now has nothing to do */
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; i < SPINS && atomic_load(&pool.n_running) > 0; i++)
        pause_briefly();
    pthread_mutex_lock(&pool.lock);
    while (pool.n_running > 0)
        pthread_cond_wait(&pool.helper_done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.caller);
}

lmc_executor_t lmc_executor_threads(size_t n_threads) {
    if (n_threads < 1) n_threads = 1;
    if (n_threads > WORKERS_MAX + 1) n_threads = WORKERS_MAX + 1;
    return (lmc_executor_t){run_on_pool, n_threads};
}

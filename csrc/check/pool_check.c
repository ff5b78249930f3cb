/* The pool of threads of csrc/dispatch/threads.c under load: many callers with jobs of random size, nested
 * jobs, and forks in between. Every task must run once, in a slot that no other task has, and its results
 * must be seen. pool_check [jobs [callers [slots [forks]]]] csrc/check/pool.pml is the model of the same pool
 * for a model checker. */
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

#define CALLERS_MAX 64
#define TASKS_MAX 40
#define SLOTS_MAX 256
/* With no job done for so long, the pool has lost a wake-up. */
#define STUCK_SECONDS 120

_Atomic long check_failures = 0;
static atomic_ulong n_jobs_left, n_jobs_done, n_jobs_helped, n_nested;

/* Plain memory: ThreadSanitizer sees it where two tasks meet in one. */
typedef struct stress_job {
    const lmc_executor_t *executor;
    uint64_t seed;
    unsigned work, yields, is_nested;
    unsigned n_runs[TASKS_MAX], was_helped[TASKS_MAX];
    uint64_t results[TASKS_MAX];
    unsigned char in_slot[SLOTS_MAX];
} stress_job_t;

static uint64_t result_of(uint64_t seed, size_t task, unsigned work) {
    uint64_t state = seed + task;
    for (unsigned i = 0; i < work; i++)
        check_random(&state);
    return check_random(&state);
}

static void run_job(const lmc_executor_t *executor, uint64_t *random, size_t n_tasks, unsigned is_nested);

static void stress_task(void *argument, size_t task, size_t slot) {
    stress_job_t *job = (stress_job_t *)argument;
    CHECK(task < TASKS_MAX && slot < job->executor->n_slots, "task %zu in slot %zu", task, slot);
    CHECK(job->in_slot[slot]++ == 0, "two tasks in slot %zu", slot);
    job->n_runs[task]++;
    job->was_helped[task] = slot > 0;
    job->results[task] = result_of(job->seed, task, job->work);
    if (job->yields) sched_yield();
    if (job->is_nested && task % 8 == 3) {
        uint64_t random = job->seed + task;
        run_job(job->executor, &random, 5, 0);
        atomic_fetch_add(&n_nested, 1);
    }
    job->in_slot[slot]--;
}

static void run_job(const lmc_executor_t *executor, uint64_t *random, size_t n_tasks, unsigned is_nested) {
    stress_job_t job = {.executor = executor, .seed = check_random(random), .is_nested = is_nested};
    unsigned n_helped = 0;
    /* Most tasks are nothing, some are longer than a thread looks before it sleeps. */
    job.work = job.seed % 64 == 0 ? (unsigned)(job.seed >> 8 & 0xFFF) : (unsigned)(job.seed >> 8 & 3);
    job.yields =
        (job.seed >> 32) % 32 == 0; /* so that workers get to the tasks where all processors are busy */
    executor->run(executor, n_tasks, stress_task, &job);
    for (size_t task = 0; task < TASKS_MAX; task++) {
        unsigned expected = task < n_tasks;
        CHECK(job.n_runs[task] == expected, "task %zu of %zu ran %u times", task, n_tasks, job.n_runs[task]);
        n_helped += job.was_helped[task];
        if (expected)
            CHECK(job.results[task] == result_of(job.seed, task, job.work), "the result of task %zu", task);
    }
    if (n_helped > 0) atomic_fetch_add_explicit(&n_jobs_helped, 1, memory_order_relaxed);
}

typedef struct caller {
    uint64_t random;
    size_t n_slots;
} caller_t;

static void *caller_main(void *argument) {
    caller_t *caller = (caller_t *)argument;
    for (unsigned long left; (left = atomic_fetch_sub(&n_jobs_left, 1)) != 0 && left < ULONG_MAX / 2;) {
        uint64_t choice = check_random(&caller->random);
        lmc_executor_t executor = lmc_executor_threads(1 + choice % caller->n_slots);
        size_t n_tasks = (choice >> 32 & 3) != 0 ? choice >> 40 & 7 : choice >> 40 & 31;
        run_job(&executor, &caller->random, n_tasks, (choice >> 34 & 63) == 0);
        atomic_fetch_add(&n_jobs_done, 1);
        if (choice >> 48 == 0) usleep(200); /* long enough for all workers to fall asleep */
    }
    return NULL;
}

static void *watch_main(void *argument) {
    unsigned long seen = ULONG_MAX;
    (void)argument;
    for (int seconds = 0;; seconds++) {
        unsigned long done = atomic_load(&n_jobs_done);
        if (done != seen) seconds = 0;
        seen = done;
        if (seconds >= STUCK_SECONDS) {
            fprintf(stderr, "no job ended within %d seconds; %lu had\n", STUCK_SECONDS, done);
            abort();
        }
        sleep(1);
    }
    return NULL;
}

/* A child has a pool of its own, whatever other threads had the pool do when it came to be. */
static void fork_once(uint64_t seed) {
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        lmc_executor_t executor = lmc_executor_threads(4);
        alarm(STUCK_SECONDS);
        for (int i = 0; i < 200; i++)
            run_job(&executor, &seed, 9, 1);
        _exit(check_failures != 0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child ended with status %d", status);
}

static void count_task(void *argument, size_t task, size_t slot) {
    (void)task, (void)slot;
    atomic_fetch_add((atomic_ulong *)argument, 1);
}

/* Sizes that the core does not ask for, and the system's threads are not started for them. */
static void check_sizes(void) {
    atomic_ulong n_runs = 0;
    lmc_executor_t executor = lmc_executor_threads(3);
    executor.run(&executor, 0, count_task, &n_runs);
    CHECK(n_runs == 0, "0 tasks: %lu ran", n_runs);
    executor.run(&executor, 1, count_task, &n_runs);
    CHECK(n_runs == 1, "1 task: %lu ran", n_runs);
    executor.n_slots = 0;
    executor.run(&executor, 7, count_task, &n_runs);
    CHECK(n_runs == 8, "7 tasks without a slot: %lu ran", n_runs - 1);
}

/* Jobs of two tasks on a pool that was once wide wake one worker, and the others sleep on: each that woke up
 * would go back to sleep, which the system counts. */
#define WIDE 200
static void check_narrow_after_wide(void) {
    enum { N_JOBS = 100 };
    lmc_executor_t two = lmc_executor_threads(2), wide = lmc_executor_threads(WIDE);
    atomic_ulong n_runs = 0;
    struct rusage before, after;
    wide.run(&wide, WIDE, count_task, &n_runs);
    usleep(300000);
    getrusage(RUSAGE_SELF, &before);
    for (int i = 0; i < N_JOBS; i++) {
        two.run(&two, 2, count_task, &n_runs);
        usleep(2000);
    }
    getrusage(RUSAGE_SELF, &after);
    long n_sleeps = after.ru_nvcsw - before.ru_nvcsw;
    CHECK(n_runs == WIDE + 2 * N_JOBS, "%lu tasks ran", n_runs);
    CHECK(n_sleeps < 20 * N_JOBS, "%ld sleeps in %d jobs of two tasks", n_sleeps, N_JOBS);
    printf("after a job of %d threads: %ld sleeps in %d jobs of two tasks\n", WIDE, n_sleeps, N_JOBS);
}

static unsigned long argument_at(int n_arguments, char **arguments, int index, unsigned long otherwise) {
    return index < n_arguments ? strtoul(arguments[index], NULL, 10) : otherwise;
}

int main(int n_arguments, char **arguments) {
    unsigned long n_jobs = argument_at(n_arguments, arguments, 1, 200000);
    unsigned long n_callers = argument_at(n_arguments, arguments, 2, 5);
    unsigned long n_slots = argument_at(n_arguments, arguments, 3, 9);
    unsigned long n_forks = argument_at(n_arguments, arguments, 4, 20);
    pthread_t threads[CALLERS_MAX], watch;
    caller_t callers[CALLERS_MAX];
    if (n_callers < 1 || n_callers > CALLERS_MAX || n_slots < 1 || n_slots > SLOTS_MAX) {
        fprintf(stderr, "usage: pool_check [JOBS [CALLERS (1 to 64) [SLOTS (1 to 256) [FORKS]]]]\n");
        return 2;
    }
    check_sizes();
    atomic_store(&n_jobs_left, n_jobs);
    if (pthread_create(&watch, NULL, watch_main, NULL) != 0) abort();
    for (unsigned long i = 0; i < n_callers; i++) {
        callers[i] = (caller_t){i * 1000003 + n_jobs, n_slots};
        if (pthread_create(&threads[i], NULL, caller_main, &callers[i]) != 0) abort();
    }
    for (unsigned long i = 0; i < n_forks; i++)
        fork_once(i);
    for (unsigned long i = 0; i < n_callers; i++)
        pthread_join(threads[i], NULL);
    printf("%lu jobs, %lu with helpers, %lu nested, %lu forks\n", n_jobs_done, n_jobs_helped, n_nested,
           n_forks);
    CHECK(n_jobs_done == n_jobs, "%lu jobs of %lu", n_jobs_done, n_jobs);
    CHECK(n_slots < 2 || n_jobs < 1000 || n_jobs_helped > 0, "no worker ever ran a task");
    check_narrow_after_wide();
    return check_failures != 0;
}

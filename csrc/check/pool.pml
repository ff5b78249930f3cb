/* A model of csrc/dispatch/threads.c for the model checker Spin, which looks at every order in which the threads may
 * run. Same steps, same names. What threads.c does under pool.lock is one step here, as nothing else touches what the
 * lock guards (ThreadSanitizer looks at that); outside of it, one step is one access to shared memory. The looking
 * before a sleep, which only reads, fork and the float state are left out. check-pool-model in pool.mk runs it.
 * Checked in every state: a task runs once, in a slot of its own; a job is not touched after its caller has
 * returned; all its tasks are done by then; no thread waits for ever. FAULT puts a mistake in, which must be found. */
#ifndef CALLERS
#define CALLERS 2
#endif
#ifndef WORKERS
#define WORKERS 2
#endif
#ifndef JOBS
#define JOBS 2 /* of each caller, one after the other */
#endif
#ifndef TASKS
#define TASKS 3 /* of a job, at most */
#endif
#ifndef WAKES
#define WAKES 1 /* 4 in threads.c: with one, two workers are enough for a worker that wakes another */
#endif
#ifndef SPURIOUS
#define SPURIOUS 0 /* 1: a wait may end without a signal, as POSIX allows */
#endif
#ifndef FAULT
#define FAULT 0
#endif
#define SLOTS (WORKERS + 1)
#define NO_JOB CALLERS

/* The pool. */
bool caller_mutex;
bool posted_waits[WORKERS], done_waits; /* who sleeps on a condition */
byte job = NO_JOB, job_number, n_running, n_workers;

/* The jobs: one of each caller at a time, on its stack. */
bool is_alive[CALLERS], in_slot[CALLERS * SLOTS];
byte n_tasks[CALLERS], next_task[CALLERS], n_helpers[CALLERS], n_done[CALLERS * TASKS];
byte n_returned; /* callers that have done all their jobs */

inline run_tasks(j, slot) {
    do
    :: atomic { next_task[j] < n_tasks[j] ->
                assert(is_alive[j] && !in_slot[j * SLOTS + slot]);
                i = next_task[j];
                next_task[j]++;
                in_slot[j * SLOTS + slot] = true }
       atomic { n_done[j * TASKS + i]++;
                in_slot[j * SLOTS + slot] = false;
                i = 0 }
    :: atomic { next_task[j] >= n_tasks[j] -> assert(is_alive[j]); break }
    od
}

inline wake_next(j, slot) {
    if
    :: atomic { next_task[j] < n_tasks[j] -> assert(is_alive[j]); i = WAKES * (slot) }
       do
       :: atomic { i < WAKES * (slot) + WAKES && i < n_helpers[j] -> posted_waits[i] = false; i++ }
       :: atomic { !(i < WAKES * (slot) + WAKES && i < n_helpers[j]) -> i = 0; break }
       od
    :: next_task[j] >= n_tasks[j]
    fi
}

proctype worker(byte w) {
    byte i, j, seen;
    bool takes_part;
    do
    :: atomic {
           if
           :: job == NO_JOB || job_number == seen -> posted_waits[w] = true
           :: else ->
              j = job;
              seen = job_number;
              assert(is_alive[j]);
              takes_part = w < n_helpers[j];
              n_running = n_running + takes_part
           fi
       }
       if
       :: posted_waits[w] ->
end_sleeps:
          if
          :: !posted_waits[w]
          :: SPURIOUS -> posted_waits[w] = false
          fi
       :: takes_part ->
          wake_next(j, w + 1);
          run_tasks(j, w + 1);
          atomic {
              n_running--;
              if
              :: n_running == 0 && FAULT != 1 -> done_waits = false
              :: else
              fi;
              takes_part = false;
              j = 0
          }
       :: else
       fi
    od
}

inline run_on_pool() {
    atomic {
        n_helpers[me] = n_threads - 1;
        do
        :: n_workers < n_helpers[me] -> run worker(n_workers); n_workers++
        :: n_workers < n_helpers[me] -> n_helpers[me] = n_workers /* the system starts no more threads */
        :: else -> break
        od;
        job = me;
        job_number++
    }
    wake_next(me, 0);
    run_tasks(me, 0);
    atomic {
        if
        :: FAULT != 2 -> job = NO_JOB
        :: else
        fi
    }
    do
    :: atomic { n_running > 0 && FAULT != 3 -> done_waits = true }
       if
       :: !done_waits
       :: SPURIOUS -> done_waits = false
       fi
    :: atomic { n_running == 0 || FAULT == 3 -> break }
    od;
    caller_mutex = false
}

inline begin_job() {
    atomic {
        select(i : 0 .. TASKS);
        select(n_threads : 1 .. SLOTS);
        n_tasks[me] = i;
        next_task[me] = 0;
        is_alive[me] = true;
        n_threads = (n_threads < i -> n_threads : i);
        i = 0
    }
}

inline end_job() {
    atomic {
        is_alive[me] = false;
        n_helpers[me] = 0;
        n_threads = 0;
        do
        :: i < TASKS ->
           assert(n_done[me * TASKS + i] == (i < n_tasks[me] -> 1 : 0));
           n_done[me * TASKS + i] = 0;
           i++
        :: else -> break
        od;
        i = 0;
        n_jobs++
    }
}

proctype caller(byte me) {
    byte i, n_threads, n_jobs;
    do
    :: n_jobs < JOBS ->
       begin_job();
       if
       :: atomic { n_threads >= 2 && !caller_mutex -> caller_mutex = true }
          run_on_pool()
       :: atomic { n_threads < 2 || caller_mutex -> skip }
          run_tasks(me, 0)
       fi;
       end_job()
    :: else -> break
    od;
    n_returned++
}

init {
    byte i;
    atomic {
        do
        :: i < CALLERS -> run caller(i); i++
        :: else -> break
        od
    }
}

ltl all_return { <>(n_returned == CALLERS) }

/* _crew.h says what this does, and why.
 *
 * A helper's state says whether it may touch anything of a step. It is `active` only while it takes and does pieces, and is waited for;
 * while it waits itself it is `parked`, and looks at nothing but its own state and the stage, which is never freed. The caller ends a
 * step by dismissing all who are not active. A state has the number of its step, so that no late helper mistakes one step for another.
 *
 * Helpers sleep when there has been nothing to do for a moment: torch's own threads, which spin for milliseconds after each of their
 * loops, are not used between the steps of a decoding loop.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../_processors.h"
#include "_crew.h"

#define MOST_THREADS 1024
#define MOMENT_NS 200000 /* that a helper spins before it sleeps: Python needs as long between two steps */
#define SPINS 4000       /* some ten microseconds of waiting for others, before they may have the core */

typedef struct {
    _Alignas(64) atomic_long next;
    _Alignas(64) atomic_long done;
} Stage;

enum { INVITED, ACTIVE, PARKED, DISMISSED };

typedef struct {
    _Alignas(64) _Atomic uint64_t state; /* number of the step * 4 + one of these */
    long thread;
} Helper;

struct Worker {
    Stage *stage;   /* the next one */
    Helper *helper; /* NULL of the caller */
    long thread;
    uint64_t step;
    int is_over;
};

static Helper helpers[MOST_THREADS];
static unsigned num_helpers;
static atomic_uint max_threads = 1;
static pthread_mutex_t one_step = PTHREAD_MUTEX_INITIALIZER;

static struct {
    Work work;
    const void *context;
    Stage *stages;
    long num_stages; /* that there is room for */
} current;

static _Atomic uint32_t step_number; /* changes when there is work */
static atomic_int sleepers;

INLINE uint64_t state_of(uint64_t step, int state) { return step * 4 + (uint64_t)state; }

INLINE void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

INLINE int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void wait_for_wake(uint32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, &step_number, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
    nanosleep(&(struct timespec){0, MOMENT_NS}, NULL);
    (void)seen;
#endif
}

static void wake_all(void) {
#if defined(__linux__)
    syscall(SYS_futex, &step_number, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
}

/* Waits for another step than the one seen. */
static uint32_t next_step(uint32_t seen) {
    int64_t start = now_ns();
    for (;;) {
        for (int i = 0; i < 64; i++) {
            uint32_t step = atomic_load(&step_number);
            if (step != seen) return step;
            rest();
        }
        if (now_ns() - start < MOMENT_NS) continue;
        atomic_fetch_add(&sleepers, 1);
        wait_for_wake(seen);
        atomic_fetch_sub(&sleepers, 1);
    }
}

static void *help(void *data) {
    Helper *helper = data;
    uint32_t step = 0;
    for (;;) {
        step = next_step(step);
        uint64_t invited = state_of(step, INVITED);
        if (!atomic_compare_exchange_strong(&helper->state, &invited, state_of(step, ACTIVE))) continue;
        Worker worker = {current.stages, helper, helper->thread, step, 0};
        current.work(current.context, &worker);
        if (!worker.is_over) atomic_store(&helper->state, state_of(step, DISMISSED));
    }
    return NULL;
}

/* A forked child has none of its parent's threads. */
static void forget_helpers(void) {
    num_helpers = 0;
    pthread_mutex_init(&one_step, NULL);
}

static void start_helpers(unsigned wanted) {
    static int is_prepared;
    if (num_helpers >= wanted) return;
    if (!is_prepared) is_prepared = pthread_atfork(NULL, NULL, forget_helpers) == 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's thread */
    while (num_helpers < wanted) {
        Helper *helper = &helpers[num_helpers];
        pthread_t thread;
        atomic_store(&helper->state, state_of(0, DISMISSED));
        helper->thread = (long)num_helpers + 1;
        if (pthread_create(&thread, NULL, help, helper)) break; /* fewer will do */
        pthread_detach(thread);
        num_helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void crew_use(unsigned threads) {
    atomic_store(&max_threads, threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads);
}

long crew_piece(long items) {
    long threads = (long)atomic_load_explicit(&max_threads, memory_order_relaxed), pieces = threads > 1 ? 4 * threads : 1;
    return items > pieces ? (items + pieces - 1) / pieces : 1;
}

static int make_room(long num_stages) {
    if (num_stages <= current.num_stages) return 1;
    if (num_stages < 2 * current.num_stages) num_stages = 2 * current.num_stages;
    if (num_stages < 512) num_stages = 512;
    void *stages;
    if (posix_memalign(&stages, sizeof(Stage), (size_t)num_stages * sizeof(Stage))) return 0;
    current.stages = stages; /* a parked helper may still look at the old ones */
    current.num_stages = num_stages;
    return 1;
}

static void dismiss(Helper *helper, uint64_t step) {
    for (long spins = 0;; spins++) {
        uint64_t state = atomic_load(&helper->state);
        if (state == state_of(step, DISMISSED)) return;
        if (state != state_of(step, ACTIVE) &&
            atomic_compare_exchange_strong(&helper->state, &state, state_of(step, DISMISSED)))
            return;
        if (spins < SPINS)
            rest();
        else
            sched_yield();
    }
}

int crew_run(Work work, const void *context, long num_stages) {
    pthread_mutex_lock(&one_step);
    if (!make_room(num_stages)) {
        pthread_mutex_unlock(&one_step);
        return 0;
    }
    for (long i = 0; i < num_stages; i++) {
        atomic_store_explicit(&current.stages[i].next, 0, memory_order_relaxed);
        atomic_store_explicit(&current.stages[i].done, 0, memory_order_relaxed);
    }
    current.work = work, current.context = context;
    unsigned wanted = atomic_load(&max_threads) - 1;
    start_helpers(wanted);
    unsigned invited = wanted < num_helpers ? wanted : num_helpers;
    uint32_t step = atomic_load(&step_number) + 1;
    if (invited) {
        for (unsigned i = 0; i < invited; i++) atomic_store(&helpers[i].state, state_of(step, INVITED));
        atomic_store(&step_number, step);
        if (atomic_load(&sleepers)) wake_all();
    }
    Worker caller = {current.stages, NULL, 0, step, 0};
    work(context, &caller);
    for (unsigned i = 0; i < invited; i++) dismiss(&helpers[i], step);
    pthread_mutex_unlock(&one_step);
    return 1;
}

/* Waits until a stage is done. Returns 0 to a helper that was dismissed meanwhile. */
static int wait_for_others(Worker *worker, Stage *stage, long items) {
    Helper *helper = worker->helper;
    uint64_t parked = state_of(worker->step, PARKED);
    if (helper) atomic_store(&helper->state, parked);
    for (long spins = 0; atomic_load_explicit(&stage->done, memory_order_acquire) < items; spins++) {
        if (helper && atomic_load_explicit(&helper->state, memory_order_relaxed) != parked) return 0;
        if (spins < SPINS)
            rest();
        else
            sched_yield();
    }
    return !helper || atomic_compare_exchange_strong(&helper->state, &parked, state_of(worker->step, ACTIVE));
}

int share(Worker *worker, Part part, const void *context, long items, long piece) {
    Stage *stage = worker->stage++;
    for (;;) {
        long first = atomic_fetch_add_explicit(&stage->next, piece, memory_order_relaxed);
        if (first >= items) break;
        long last = first + piece < items ? first + piece : items;
        part(context, first, last, worker->thread);
        atomic_fetch_add_explicit(&stage->done, last - first, memory_order_acq_rel);
    }
    if (atomic_load_explicit(&stage->done, memory_order_acquire) >= items) return 1;
    if (!wait_for_others(worker, stage, items)) worker->is_over = 1;
    return !worker->is_over;
}

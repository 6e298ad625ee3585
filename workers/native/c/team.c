// Threads wait for gates. A gate is a counter that increases whenever the gate opens; a waiting thread
// first spins and then sleeps (futex) until it changes. Source: futex(2), futex(7).
#define _GNU_SOURCE
#include "team.h"

#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CACHE_LINE = 64 };

struct gate {
    _Alignas(CACHE_LINE) _Atomic uint32_t opened;  // number of openings, modulo 2**32
    _Atomic uint32_t num_sleepers;
};

struct team {
    int count, num_spins;
    pthread_t *threads;  // [count - 1]
    team_task *task;     // task of the section that `begin` opened; NULL ends the threads
    void *job;
    void *scratch;
    size_t scratch_bytes;
    _Atomic int is_claimed;
    struct gate begin, barrier;
    _Alignas(CACHE_LINE) _Atomic int num_arrived;  // threads at the barrier
};

struct member {
    struct team *team;
    int thread;
};

static void gate_wait(struct gate *gate, uint32_t seen, int num_spins) {
    for (int i = 0; i < num_spins; i++) {
        if (atomic_load_explicit(&gate->opened, memory_order_acquire) != seen) return;
        _mm_pause();
    }
    // Sequentially consistent, as in gate_open: either the sleeper sees the new value, or the
    // opener sees the sleeper.
    atomic_fetch_add(&gate->num_sleepers, 1);
    while (atomic_load(&gate->opened) == seen)
        syscall(SYS_futex, &gate->opened, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&gate->num_sleepers, 1);
}

static void gate_open(struct gate *gate) {
    atomic_fetch_add(&gate->opened, 1);
    if (atomic_load(&gate->num_sleepers))
        syscall(SYS_futex, &gate->opened, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void team_barrier(struct team *team, int count) {
    if (count == 1) return;
    uint32_t seen = atomic_load_explicit(&team->barrier.opened, memory_order_relaxed);
    if (atomic_fetch_add(&team->num_arrived, 1) == count - 1) {
        atomic_store(&team->num_arrived, 0);
        gate_open(&team->barrier);
    } else {
        gate_wait(&team->barrier, seen, team->num_spins);
    }
}

static void *serve(void *argument) {
    struct member member = *(struct member *)argument;
    free(argument);
    struct team *team = member.team;
    for (uint32_t seen = 0;; seen++) {
        gate_wait(&team->begin, seen, team->num_spins);
        if (!team->task) return NULL;
        team->task(team->job, team, member.thread, team->count);
        team_barrier(team, team->count);
    }
}

static void begin(struct team *team, team_task *task, void *job) {
    team->task = task;
    team->job = job;
    gate_open(&team->begin);
}

static void join(struct team *team, int num_threads) {
    begin(team, NULL, NULL);
    for (int i = 0; i < num_threads; i++) pthread_join(team->threads[i], NULL);
    free(team->threads);
    free(team->scratch);
    free(team);
}

struct team *team_new(int count, int num_spins) {
    struct team *team = aligned_alloc(CACHE_LINE, sizeof *team);
    if (!team) return NULL;
    *team = (struct team){.count = count, .num_spins = num_spins};
    team->threads = calloc((size_t)count, sizeof *team->threads);
    for (int i = 0; i < count - 1; i++) {
        struct member *member = malloc(sizeof *member);
        if (member) *member = (struct member){team, i + 1};
        if (!team->threads || !member ||
            pthread_create(&team->threads[i], NULL, serve, member)) {
            free(member);
            join(team, i);
            return NULL;
        }
    }
    return team;
}

void team_free(struct team *team) { join(team, team->count - 1); }

void *team_scratch(struct team *team, size_t num_bytes) {
    if (num_bytes > team->scratch_bytes) {
        free(team->scratch);
        size_t rounded = (num_bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
        team->scratch = aligned_alloc(CACHE_LINE, rounded);
        team->scratch_bytes = team->scratch ? rounded : 0;
    }
    return team->scratch;
}

int team_size(const struct team *team) { return team->count; }

int team_claim(struct team *team) { return !atomic_exchange(&team->is_claimed, 1); }

void team_release(struct team *team) { atomic_store(&team->is_claimed, 0); }

void team_run(struct team *team, team_task *task, void *job, int count) {
    if (count == 1 || team->count == 1) {
        task(job, team, 0, 1);
        return;
    }
    begin(team, task, job);
    task(job, team, 0, team->count);
    team_barrier(team, team->count);
}

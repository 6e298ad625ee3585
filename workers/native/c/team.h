// Team of threads that run short parallel sections of one caller, without Python's GIL.
#ifndef TEAM_H
#define TEAM_H

#include <stddef.h>

struct team;

// Function that each member of a team calls: `thread` of `count`, 0 for the caller itself.
typedef void team_task(void *job, struct team *team, int thread, int count);

// Create a team of the caller and `count` - 1 threads that spin `num_spins` pauses before they sleep.
// NULL if the system cannot create threads.
struct team *team_new(int count, int num_spins);

// End the threads, which must be idle.
void team_free(struct team *team);

// Memory of at least `num_bytes`, aligned to 64, valid until the next call; NULL if memory is
// exhausted. Only the caller of the team may call this, before `team_run`.
void *team_scratch(struct team *team, size_t num_bytes);

// Number of members, including the caller.
int team_size(const struct team *team);

// Results of functions that compute with a team.
enum result {
    OK = 0,
    BUSY = 1,
    NO_MEMORY = 2,
    NO_EXPERT = 3,
    NO_INPUT = 4,
    UNEXPECTED = 5,  // exchange: an unexpected message or a time-out; Python continues
    UNSENT = 6,      // exchange: a peer's buffers are full, or it is lost; Python continues
};

// Claim the team: 0 if another thread uses it.
int team_claim(struct team *team);
void team_release(struct team *team);

// Call `task` on `count` members (1, or all for 0 or less) and return when all have returned.
void team_run(struct team *team, team_task *task, void *job, int count);

// Wait for the other `count` - 1 members that run the task; their writes are then visible.
void team_barrier(struct team *team, int count);

#endif

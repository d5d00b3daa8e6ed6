/* Threads that share the work of a step: the caller's and its helpers.
 *
 * A step is a row of stages. Whoever is there takes pieces of a stage until none is left, and goes on when all of them are done. Nobody
 * waits for a helper that the system has stopped or not started yet, unless it is in the middle of a piece: the others do the work,
 * and it finds later that they have. So a step beside a busy neighbour takes no longer than alone on the cores that are left, by much.
 */
#ifndef SSV_CREW_H
#define SSV_CREW_H

typedef struct Worker Worker;

/* Goes through the stages, the same ones whoever it is; returns as soon as `share` returns 0. */
typedef void (*Work)(const void *context, Worker *worker);

/* A piece of a stage. `thread` is below the number of threads. */
typedef void (*Part)(const void *context, long first, long last, long thread);

/* How many threads there shall be from now on, the caller's being one. */
void crew_use(unsigned threads);

/* Pieces of a stage: a few for each thread. */
long crew_piece(long items);

/* Has the crew do a step of at most so many stages. Returns 0 without memory. Not to be called within a step. */
int crew_run(Work work, const void *context, long num_stages);

/* The next stage. Returns 0 to a helper without which the step is over: nothing of it is there any more. */
int share(Worker *worker, Part part, const void *context, long items, long piece);

#endif

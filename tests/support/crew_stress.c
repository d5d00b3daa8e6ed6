/* Many steps of runtime/engines/_crew.c, of any number of threads, whose memory is gone as soon as they are done: for ThreadSanitizer
 * (`make sanitize-cpu`). Every stage has to touch every cell once. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../runtime/engines/_crew.h"

#define STEPS 20000

typedef struct {
    long *cells, num_cells;
    int stages;
} Context;

static void part(const void *context, long first, long last, long thread) {
    const Context *c = context;
    (void)thread;
    for (long i = first; i < last; i++) c->cells[i]++;
}

static void work(const void *context, Worker *worker) {
    const Context *c = context;
    for (int stage = 0; stage < c->stages; stage++)
        if (!share(worker, part, c, c->num_cells, crew_piece(c->num_cells))) return;
}

int main(void) {
    for (int step = 0; step < STEPS; step++) {
        Context *c = malloc(sizeof *c);
        c->num_cells = 1 + step % 37;
        c->stages = 1 + step % 50;
        c->cells = calloc((size_t)c->num_cells, sizeof(long));
        crew_use(1 + (unsigned)step % 4);
        if (!crew_run(work, c, c->stages)) return 1;
        for (long i = 0; i < c->num_cells; i++)
            if (c->cells[i] != c->stages) {
                printf("step %d: cell %ld was touched %ld times, not %d\n", step, i, c->cells[i], c->stages);
                return 1;
            }
        free(c->cells);
        memset(c, 255, sizeof *c);
        free(c);
        if (step % 500 == 0) usleep(1000); /* helpers fall asleep */
    }
    puts("every stage of every step was done once");
    return 0;
}

/* What the kernels of all processors share; _linear.h says what they compute and how weights lie.
 *
 * One read of the weights serves all rows of a step. The weights of a block stay in registers while they meet one row after the other, and a
 * run of tiles stays in the second cache while it meets the next few rows.
 *
 * A further processor is a function more of each kind, here, and an entry in the table of _linear_any.c.
 * All of it is compiled with -ffp-contract=off: what is fused is said to be.
 */
#ifndef SSV_LINEAR_KERNELS_H
#define SSV_LINEAR_KERNELS_H

#include <string.h>

#include "../_processors.h"
#include "_linear.h"

#define W8_BYTES (TILE * BLOCK)
#define W4_BYTES (TILE * BLOCK / 2 + 4 * TILE)
#define STEPS (BLOCK / 4) /* of four inputs */

INLINE uint32_t four(const int8_t *values) {
    uint32_t all;
    memcpy(&all, values, 4);
    return all;
}

/* The end of a tile or a part of one: from what was added up to outputs, `count` of them from `first` on. */
INLINE void put(const Linear *w, long first, long count, const float *sums, float *out, int add) {
    for (long i = 0; i < count; i++) {
        float y = w->scale ? sums[i] * w->scale[first + i] : sums[i];
        if (w->bias) y += w->bias[first + i];
        out[first + i] = add ? out[first + i] + y : y;
    }
}

/* Of some number of rows, known to the compiler. */
#define CASE(body, n) \
    case n:           \
        body(n);      \
        break;

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_KERNELS
int has_512(void);
int has_avx2(void);
LinearProduct product_512, product_avx2;
#endif

#if defined(__aarch64__) && defined(__GNUC__)
#define HAS_ARM_KERNELS
int has_dot(void);
LinearProduct product_dot;
#endif

#endif

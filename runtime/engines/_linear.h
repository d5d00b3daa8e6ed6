/* Linear layers with quantized weights on a CPU: what their kernels give to the other compiled stages.
 *
 * Weights have 8 or 4 bits, activations 8, in blocks of BLOCK inputs. A row's result does not depend on the rows beside it, nor
 * on the processor: sums within a block are whole numbers, blocks are added in their order, each with one fused multiply-add (two where
 * there is a minimum), and every processor's kernel does just that. runtime/engines/linear.py has the definition.
 *
 * Packed weights: tiles of TILE outputs, one after the other; of each the blocks, one after the other; of each block
 *   8 bits: for every four inputs, TILE times the four weights of an output, + 128: 512 bytes.
 *   4 bits: scale and minimum of the TILE outputs, fp16; then for every eight inputs TILE times four bytes of an output, the first four
 *           inputs in their low halves, the next four in their high ones: 64 + 256 bytes.
 * Outputs and inputs beyond the matrix are there, and have no effect.
 */
#ifndef SSV_LINEAR_H
#define SSV_LINEAR_H

#include <stdint.h>

#define TILE 16
#define BLOCK 32

/* As `_Linear` of runtime/engines/linear.py. */
typedef struct {
    const uint8_t *weights;
    const float *scale; /* [tiles * TILE], of 8-bit weights; NULL says that they have 4 */
    const float *bias;  /* [outputs], or NULL */
    int64_t outputs, blocks;
} Linear;

/* Quantized rows: value = scale * whole number. */
typedef struct {
    int8_t *values; /* [rows, blocks, BLOCK], 0 beyond the row */
    float *scale;   /* [rows, blocks] */
    float *offset;  /* [rows, blocks], scale times the sum of the whole numbers, for a minimum */
    int32_t *sum;   /* [rows, blocks], -128 times that sum, for weights + 128 */
} Rows;

/* Blocks from first to last, of `x` [length], into row `row` of `rows`. `blocks` is of a whole row. */
typedef void LinearQuantize(const float *x, long length, const Rows *rows, long row, long blocks, long first, long last);

/* out[row * stride + output] = or += the product, for all rows and the outputs of some tiles. */
typedef void LinearProduct(const Linear *w, const Rows *x, long rows, float *out, long stride, int add, long first_tile,
                           long last_tile);

typedef struct {
    LinearQuantize *quantize;
    LinearProduct *product;
} LinearKernels;

typedef struct {
    const char *name;
    int (*is_here)(void);
    LinearKernels kernels;
} LinearProcessor;

/* The best first; behind the last, which is everywhere, one without a name. */
extern const LinearProcessor linear_processors[];

/* Packs outputs, whose number is one of whole tiles but for the last. scale: [outputs] of 8 bits; halves: [outputs, blocks], fp16 scale and
 * minimum, of 4 bits, and `scale` and `least` the same in fp32. */
void linear_pack(const float *w, long outputs, long inputs, const float *scale, const float *least,
                 const uint16_t *scale_half, const uint16_t *least_half, uint8_t *packed);

/* Of the capsule, whose pointer is to the table in use. */
#define LINEAR_KERNELS "ssv.runtime.engines._linear.kernels"

#endif

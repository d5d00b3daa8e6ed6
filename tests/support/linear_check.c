/* Linear layers of random shapes by every processor's kernels against plain C's, bit for bit, and a hash of what they gave: the same on
 * whatever processor this was compiled for. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../runtime/engines/_linear.h"

#define SHAPES 300
#define MOST_ROWS 33

static uint64_t state = 88172645463325252u;

/* Marsaglia's xorshift64. */
static uint64_t next(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static long up_to(long most) { return 1 + (long)(next() >> 33) % most; }

static float number(void) { return (float)((int64_t)next() >> 40) * 0x1p-20f; } /* -8 to 8 */

static void *room(long bytes) {
    void *memory = malloc((size_t)bytes); /* of just that size: a sanitizer sees what is read behind it */
    if (!memory) abort();
    return memory;
}

static float *numbers(long count, float factor) {
    float *made = room(count * (long)sizeof(float));
    for (long i = 0; i < count; i++) made[i] = number() * factor;
    return made;
}

static uint64_t hash = 14695981039346656037u; /* FNV-1a */

static void add_to_hash(const void *data, long bytes) {
    for (long i = 0; i < bytes; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
}

/* Powers of two: fp16 holds them exactly, subnormal ones as well. */
static uint16_t power_half(long exponent) {
    return (uint16_t)(exponent >= -14 ? (exponent + 15) << 10 : 1 << (exponent + 24));
}

/* What a processor's kernels make of rows, on top of what is in `out` if it is added. */
static void multiply(const LinearProcessor *p, const Linear *linear, const float *x, long inputs, long rows, float *out, int add) {
    long numbers = rows * linear->blocks, tiles = (linear->outputs + TILE - 1) / TILE;
    Rows quantized = {room(numbers * BLOCK), room(numbers * 4), room(numbers * 4), room(numbers * 4)};
    for (long r = 0; r < rows; r++)
        p->kernels.quantize(x + r * inputs, inputs, &quantized, r, linear->blocks, 0, linear->blocks);
    p->kernels.product(linear, &quantized, rows, out, linear->outputs, add, 0, tiles / 2);
    p->kernels.product(linear, &quantized, rows, out, linear->outputs, add, tiles / 2, tiles);
    free(quantized.values), free(quantized.scale), free(quantized.offset), free(quantized.sum);
}

static int check_shape(long shape) {
    long outputs = up_to(90), inputs = up_to(200), rows = up_to(MOST_ROWS);
    long blocks = (inputs + BLOCK - 1) / BLOCK, tiles = (outputs + TILE - 1) / TILE, has_8_bits = shape % 2;
    int add = shape % 3 == 0;
    float *weights = numbers(outputs * inputs, 0.05f), *x = numbers(rows * inputs, 1.0f);
    float *bias = shape % 5 < 2 ? numbers(outputs, 1.0f) : NULL, *before = numbers(rows * outputs, 1.0f);
    for (long i = 0; i < inputs; i++) x[i] *= 1e-33f; /* a row that counts as zero */
    uint8_t *packed = room(tiles * blocks * (has_8_bits ? TILE * BLOCK : TILE * BLOCK / 2 + 4 * TILE));
    float *scale = room((has_8_bits ? tiles * TILE : outputs * blocks) * (long)sizeof(float)), *least = NULL;
    uint16_t *scale_half = NULL, *least_half = NULL;
    if (has_8_bits) {
        for (long i = 0; i < tiles * TILE; i++) scale[i] = (float)up_to(9) * 5e-4f;
    } else {
        long count = outputs * blocks;
        least = room(count * (long)sizeof(float));
        scale_half = room(count * 2), least_half = room(count * 2);
        for (long i = 0; i < count; i++) {
            long exponent = i % 7 ? -6 : -20;
            scale_half[i] = power_half(exponent), scale[i] = i % 7 ? 0x1p-6f : 0x1p-20f;
            least_half[i] = (uint16_t)(power_half(-2) | 0x8000), least[i] = -0.25f;
        }
    }
    linear_pack(weights, outputs, inputs, scale, least, scale_half, least_half, packed);
    Linear linear = {packed, has_8_bits ? scale : NULL, bias, outputs, blocks};
    long out_bytes = rows * outputs * (long)sizeof(float);
    float *expected = room(out_bytes), *found = room(out_bytes);
    const LinearProcessor *plain = linear_processors;
    while (strcmp(plain->name, "any") != 0) plain++;
    memcpy(expected, before, (size_t)out_bytes);
    multiply(plain, &linear, x, inputs, rows, expected, add);
    int same = 1;
    for (const LinearProcessor *p = linear_processors; p->name; p++) {
        if (!p->is_here()) continue;
        memcpy(found, before, (size_t)out_bytes);
        multiply(p, &linear, x, inputs, rows, found, add);
        if (memcmp(found, expected, (size_t)out_bytes) == 0) continue;
        printf("%s is not plain C: %ld rows, %ld inputs, %ld outputs of %d bits\n", p->name, rows, inputs, outputs,
               has_8_bits ? 8 : 4);
        same = 0;
    }
    add_to_hash(packed, tiles * blocks * (has_8_bits ? TILE * BLOCK : TILE * BLOCK / 2 + 4 * TILE));
    add_to_hash(expected, out_bytes);
    free(weights), free(x), free(bias), free(before), free(packed), free(scale), free(least), free(scale_half), free(least_half);
    free(expected), free(found);
    return same;
}

int main(void) {
    int same = 1;
    for (const LinearProcessor *p = linear_processors; p->name; p++)
        if (p->is_here()) printf("%s ", p->name);
    for (long shape = 0; shape < SHAPES; shape++) same &= check_shape(shape);
    printf("%016llx\n", (unsigned long long)hash);
    return !same;
}

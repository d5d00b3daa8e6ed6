/* Linear layers with quantized weights on whatever processor there is: quantization of rows, products, packing, and which processors have
 * kernels of their own. */
#include <math.h>

#include "_linear_kernels.h"

#define LEVELS 127.0f

/* Largest magnitudes below this count as zero: their scale's inverse would overflow. */
#define LEAST 1e-30f

INLINE void quantize_block(const float *x, long length, const Rows *rows, long at) {
    float padded_x[BLOCK];
    if (length < BLOCK) {
        memset(padded_x, 0, sizeof padded_x);
        memcpy(padded_x, x, (size_t)length * sizeof(float));
        x = padded_x;
    }
    int32_t bits = 0, sum = 0, whole[BLOCK];
    for (int i = 0; i < BLOCK; i++) { /* magnitudes are in the order of their bits */
        int32_t magnitude;
        memcpy(&magnitude, x + i, 4);
        magnitude &= 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
    }
    float largest;
    memcpy(&largest, &bits, 4);
    float factor = largest < LEAST ? 0.0f : LEVELS / largest, scale = largest < LEAST ? 0.0f : largest / LEVELS;
    for (int i = 0; i < BLOCK; i++) whole[i] = (int32_t)((x[i] * factor + 12582912.0f) - 12582912.0f); /* to the nearest, half to even */
    for (int i = 0; i < BLOCK; i++) {
        rows->values[at * BLOCK + i] = (int8_t)whole[i];
        sum += whole[i];
    }
    rows->scale[at] = scale;
    rows->offset[at] = scale * (float)sum;
    rows->sum[at] = -128 * sum;
}

MULTIVERSION
static void quantize_any(const float *x, long length, const Rows *rows, long row, long blocks, long first, long last) {
    for (long g = first; g < last; g++) {
        long left = length - g * BLOCK;
        quantize_block(x + g * BLOCK, left < BLOCK ? left : BLOCK, rows, row * blocks + g);
    }
}

INLINE float half_to_float(uint16_t half) {
    uint32_t exponent = (half >> 10) & 31, fraction = half & 1023, bits;
    float value;
    if (exponent == 31)
        bits = 0x7f800000 | fraction << 13;
    else if (exponent)
        bits = (exponent + 112) << 23 | fraction << 13;
    else {
        value = (float)fraction * 0x1p-24f;
        memcpy(&bits, &value, 4);
    }
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static void product_any(const Linear *w, const Rows *x, long rows, float *out, long stride, int add, long first_tile,
                        long last_tile) {
    for (long tile = first_tile; tile < last_tile; tile++) {
        const uint8_t *start = w->weights + tile * w->blocks * (w->scale ? W8_BYTES : W4_BYTES);
        for (long r = 0; r < rows; r++) {
            const uint8_t *block = start;
            float sums[TILE] = {0};
            for (long g = 0; g < w->blocks; g++) {
                long at = r * w->blocks + g;
                const int8_t *a = x->values + at * BLOCK;
                int32_t dots[TILE] = {0};
                if (w->scale) {
                    for (int s = 0; s < STEPS; s++, block += 4 * TILE)
                        for (int i = 0; i < 4 * TILE; i++) dots[i / 4] += (block[i] - 128) * a[4 * s + i % 4];
                    for (int i = 0; i < TILE; i++) sums[i] = fmaf((float)dots[i], x->scale[at], sums[i]);
                    continue;
                }
                uint16_t halves[2 * TILE];
                memcpy(halves, block, sizeof halves);
                block += sizeof halves;
                for (int s = 0; s < STEPS; s += 2, block += 4 * TILE)
                    for (int i = 0; i < 4 * TILE; i++)
                        dots[i / 4] += (block[i] & 15) * a[4 * s + i % 4] + (block[i] >> 4) * a[4 * s + 4 + i % 4];
                for (int i = 0; i < TILE; i++) {
                    sums[i] = fmaf(half_to_float(halves[TILE + i]), x->offset[at], sums[i]);
                    sums[i] = fmaf(half_to_float(halves[i]), (float)dots[i] * x->scale[at], sums[i]);
                }
            }
            long first = tile * TILE, left = w->outputs - first;
            put(w, first, left < TILE ? left : TILE, sums, out + r * stride, add);
        }
    }
}

/* --- Packing ----------------------------------------------------------------------------------------------------------------- */

/* A block of an output's weights, x / scale to the nearest, for x from `least` on. */
INLINE void round_block(const float *x, long length, float least, float scale, float lowest, float highest, int shift,
                        uint8_t *whole) {
    float padded_x[BLOCK] = {0};
    memcpy(padded_x, x, (size_t)length * sizeof(float));
    for (int i = 0; i < BLOCK; i++) {
        float y = (padded_x[i] - least) / scale;
        y = y < lowest ? lowest : y > highest ? highest : y;
        whole[i] = (uint8_t)((int32_t)((y + 12582912.0f) - 12582912.0f) + shift);
    }
    memset(whole + length, shift, (size_t)(BLOCK - length));
}

MULTIVERSION
void linear_pack(const float *w, long outputs, long inputs, const float *scale, const float *least,
                 const uint16_t *scale_half, const uint16_t *least_half, uint8_t *packed) {
    long blocks = (inputs + BLOCK - 1) / BLOCK;
    for (long first = 0; first < outputs; first += TILE) {
        for (long g = 0; g < blocks; g++) {
            uint8_t whole[TILE][BLOCK];
            long length = inputs - g * BLOCK < BLOCK ? inputs - g * BLOCK : BLOCK;
            for (long i = 0; i < TILE; i++) {
                long o = first + i, at = o * blocks + g;
                if (o >= outputs)
                    memset(whole[i], least ? 0 : 128, BLOCK);
                else if (least)
                    round_block(w + o * inputs + g * BLOCK, length, least[at], scale[at] > 0.0f ? scale[at] : 1.0f, 0.0f, 15.0f,
                                0, whole[i]);
                else
                    round_block(w + o * inputs + g * BLOCK, length, 0.0f, scale[o], -LEVELS, LEVELS, 128, whole[i]);
            }
            if (!least) {
                for (int s = 0; s < STEPS; s++, packed += 4 * TILE)
                    for (int i = 0; i < TILE; i++) memcpy(packed + 4 * i, whole[i] + 4 * s, 4);
                continue;
            }
            uint16_t halves[2][TILE] = {{0}};
            for (long i = 0; i < TILE && first + i < outputs; i++) {
                halves[0][i] = scale_half[(first + i) * blocks + g];
                halves[1][i] = least_half[(first + i) * blocks + g];
            }
            memcpy(packed, halves, sizeof halves);
            packed += sizeof halves;
            for (int s = 0; s < STEPS; s += 2, packed += 4 * TILE)
                for (int i = 0; i < TILE; i++)
                    for (int b = 0; b < 4; b++)
                        packed[4 * i + b] = (uint8_t)(whole[i][4 * s + b] | whole[i][4 * s + 4 + b] << 4);
        }
    }
}

/* --- Processors -------------------------------------------------------------------------------------------------------------- */

static int has_any(void) { return 1; }

const LinearProcessor linear_processors[] = {
#ifdef HAS_X86_KERNELS
    {"avx512_vnni", has_512, {quantize_any, product_512}},
    {"avx2", has_avx2, {quantize_any, product_avx2}},
#endif
#ifdef HAS_ARM_KERNELS
    {"neon_dot", has_dot, {quantize_any, product_dot}},
#endif
    {"any", has_any, {quantize_any, product_any}},
    {NULL, NULL, {NULL, NULL}},
};

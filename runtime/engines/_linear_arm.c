/* Products with quantized weights by NEON's dot product: optional in ARMv8.2, there from Cortex-A55 and A76 (Raspberry Pi 5) on. */
#include "_linear_kernels.h"

#ifdef HAS_ARM_KERNELS
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#define DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#define INLINE_DOT static inline __attribute__((always_inline)) DOT

#define ROWS_DOT 8 /* that the weights of a block meet from registers */
#define FOUR 4     /* outputs of a register: a quarter of a tile is done at a time, or the registers would not do */

#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif

/* A row's dot products with the weights of a block; each lane has four weights of an output. */
INLINE_DOT int32x4_t dot(const int8x16_t *weights, const int8_t *a) {
    int8x16_t low = vld1q_s8(a), high = vld1q_s8(a + 16);
    int32x4_t first = vdotq_laneq_s32(vdupq_n_s32(0), weights[0], low, 0); /* two chains */
    int32x4_t second = vdotq_laneq_s32(vdupq_n_s32(0), weights[4], high, 0);
    first = vdotq_laneq_s32(first, weights[1], low, 1);
    second = vdotq_laneq_s32(second, weights[5], high, 1);
    first = vdotq_laneq_s32(first, weights[2], low, 2);
    second = vdotq_laneq_s32(second, weights[6], high, 2);
    first = vdotq_laneq_s32(first, weights[3], low, 3);
    second = vdotq_laneq_s32(second, weights[7], high, 3);
    return vaddq_s32(first, second);
}

INLINE_DOT void put_dot(const Linear *w, long first, float32x4_t sum, float *out, int add) {
    long left = w->outputs - first;
    if (left >= FOUR) {
        if (w->scale) sum = vmulq_f32(sum, vld1q_f32(w->scale + first));
        if (w->bias) sum = vaddq_f32(sum, vld1q_f32(w->bias + first));
        if (add) sum = vaddq_f32(vld1q_f32(out + first), sum);
        vst1q_f32(out + first, sum);
        return;
    }
    float sums[FOUR];
    vst1q_f32(sums, sum);
    put(w, first, left, sums, out, add);
}

INLINE_DOT void quarter_w8_dot(const Linear *w, const Rows *x, long row, const int count, float *out, long stride, int add,
                               long tile, int quarter) {
    const uint8_t *block = w->weights + tile * w->blocks * W8_BYTES + 4 * FOUR * quarter;
    long blocks = w->blocks;
    float32x4_t sum[ROWS_DOT];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) sum[r] = vdupq_n_f32(0.0f);
    for (long g = 0; g < blocks; g++, block += W8_BYTES) {
        int8x16_t weights[STEPS];
#pragma GCC unroll 8
        for (int s = 0; s < STEPS; s++) /* less 128 */
            weights[s] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(block + 4 * TILE * s), vdupq_n_u8(128)));
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            long at = (row + r) * blocks + g;
            float32x4_t dots = vcvtq_f32_s32(dot(weights, x->values + at * BLOCK));
            sum[r] = vfmaq_f32(sum[r], dots, vdupq_n_f32(x->scale[at]));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) put_dot(w, tile * TILE + quarter * FOUR, sum[r], out + (row + r) * stride, add);
}

INLINE_DOT float32x4_t halves(const uint8_t *from) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))); }

INLINE_DOT void quarter_w4_dot(const Linear *w, const Rows *x, long row, const int count, float *out, long stride, int add,
                               long tile, int quarter) {
    const uint8_t *block = w->weights + tile * w->blocks * W4_BYTES;
    long blocks = w->blocks;
    float32x4_t sum[ROWS_DOT];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) sum[r] = vdupq_n_f32(0.0f);
    for (long g = 0; g < blocks; g++, block += W4_BYTES) {
        int8x16_t weights[STEPS];
        float32x4_t scale = halves(block + 2 * FOUR * quarter), least = halves(block + 2 * TILE + 2 * FOUR * quarter);
#pragma GCC unroll 8
        for (int s = 0; s < STEPS; s += 2) {
            uint8x16_t both = vld1q_u8(block + 4 * TILE + 2 * TILE * s + 4 * FOUR * quarter);
            weights[s] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
            weights[s + 1] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        }
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            long at = (row + r) * blocks + g;
            float32x4_t dots = vcvtq_f32_s32(dot(weights, x->values + at * BLOCK));
            sum[r] = vfmaq_f32(sum[r], least, vdupq_n_f32(x->offset[at]));
            sum[r] = vfmaq_f32(sum[r], scale, vmulq_f32(dots, vdupq_n_f32(x->scale[at])));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) put_dot(w, tile * TILE + quarter * FOUR, sum[r], out + (row + r) * stride, add);
}

#define TILE_DOT(n)                                                      \
    for (long t = first_tile; t < last_tile; t++)                        \
        for (int quarter = 0; quarter < TILE / FOUR; quarter++)          \
            if (w->scale)                                                \
                quarter_w8_dot(w, x, row, n, out, stride, add, t, quarter); \
            else                                                         \
                quarter_w4_dot(w, x, row, n, out, stride, add, t, quarter)

DOT void product_dot(const Linear *w, const Rows *x, long rows, float *out, long stride, int add, long first_tile,
                     long last_tile) {
    for (long row = 0; row < rows; row += ROWS_DOT) {
        switch (rows - row) {
            CASE(TILE_DOT, 1)
            CASE(TILE_DOT, 2)
            CASE(TILE_DOT, 3)
            CASE(TILE_DOT, 4)
            CASE(TILE_DOT, 5)
            CASE(TILE_DOT, 6)
            CASE(TILE_DOT, 7)
        default:
            TILE_DOT(8);
        }
    }
}

int has_dot(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 0;
#endif
}

#endif

/* Products with quantized weights by AVX-512 VNNI and AVX2. */
#include "_linear_kernels.h"

#ifdef HAS_X86_KERNELS
#include <immintrin.h>

/* Rows that the weights of a block meet from registers. */
#define ROWS_512 8
#define ROWS_AVX2 4

/* --- AVX-512 VNNI ------------------------------------------------------------------------------------------------------------ */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define INLINE_512 static inline __attribute__((always_inline)) AVX512

#define AHEAD 4096 /* bytes: what a core reads while memory answers */

INLINE_512 void put_512(const Linear *w, long tile, __m512 sum, float *out, int add) {
    long first = tile * TILE, left = w->outputs - first;
    __mmask16 mask = left < TILE ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
    if (w->scale) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(w->scale + first));
    if (w->bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, w->bias + first));
    if (add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + first), sum);
    _mm512_mask_storeu_ps(out + first, mask, sum);
}

/* A row's dot products with the weights of a block. */
INLINE_512 __m512i dot_512(const __m512i *weights, const int8_t *a, __m512i start) {
    __m512i first = start, second = _mm512_setzero_si512(); /* two chains */
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; s += 2) {
        first = _mm512_dpbusd_epi32(first, weights[s], _mm512_set1_epi32((int)four(a + 4 * s)));
        second = _mm512_dpbusd_epi32(second, weights[s + 1], _mm512_set1_epi32((int)four(a + 4 * s + 4)));
    }
    return _mm512_add_epi32(first, second);
}

INLINE_512 void tile_w8_512(const Linear *w, const Rows *x, long row, const int count, float *out, long stride, int add,
                            long tile) {
    const uint8_t *block = w->weights + tile * w->blocks * W8_BYTES;
    long blocks = w->blocks;
    __m512 sum[ROWS_512];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) sum[r] = _mm512_setzero_ps();
    for (long g = 0; g < blocks; g++, block += W8_BYTES) {
        __m512i weights[STEPS];
#pragma GCC unroll 8
        for (int s = 0; s < STEPS; s++) {
            _mm_prefetch((const char *)block + AHEAD + 64 * s, _MM_HINT_T0);
            weights[s] = _mm512_loadu_si512(block + 64 * s);
        }
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            long at = (row + r) * blocks + g;
            __m512i dots = dot_512(weights, x->values + at * BLOCK, _mm512_set1_epi32(x->sum[at]));
            sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(x->scale[at]), sum[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) put_512(w, tile, sum[r], out + (row + r) * stride, add);
}

INLINE_512 void tile_w4_512(const Linear *w, const Rows *x, long row, const int count, float *out, long stride, int add,
                            long tile) {
    const uint8_t *block = w->weights + tile * w->blocks * W4_BYTES;
    const __m512i low = _mm512_set1_epi8(15);
    long blocks = w->blocks;
    __m512 sum[ROWS_512];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) sum[r] = _mm512_setzero_ps();
    for (long g = 0; g < blocks; g++, block += W4_BYTES) {
        __m512i weights[STEPS];
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));
        __m512 least = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(block + 32)));
        _mm_prefetch((const char *)block + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int s = 0; s < STEPS; s += 2) {
            const uint8_t *from = block + 64 + 32 * s;
            _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
            __m512i both = _mm512_loadu_si512(from);
            weights[s] = _mm512_and_si512(both, low);
            weights[s + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            long at = (row + r) * blocks + g;
            __m512 dots = _mm512_cvtepi32_ps(dot_512(weights, x->values + at * BLOCK, _mm512_setzero_si512()));
            sum[r] = _mm512_fmadd_ps(least, _mm512_set1_ps(x->offset[at]), sum[r]);
            sum[r] = _mm512_fmadd_ps(scale, _mm512_mul_ps(dots, _mm512_set1_ps(x->scale[at])), sum[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) put_512(w, tile, sum[r], out + (row + r) * stride, add);
}

#define TILE_512(n)                                                         \
    if (w->scale)                                                           \
        for (long t = first_tile; t < last_tile; t++)                       \
            tile_w8_512(w, x, row, n, out, stride, add, t);                 \
    else                                                                    \
        for (long t = first_tile; t < last_tile; t++)                       \
            tile_w4_512(w, x, row, n, out, stride, add, t)

AVX512 void product_512(const Linear *w, const Rows *x, long rows, float *out, long stride, int add,
                        long first_tile, long last_tile) {
    for (long row = 0; row < rows; row += ROWS_512) {
        switch (rows - row) {
            CASE(TILE_512, 1)
            CASE(TILE_512, 2)
            CASE(TILE_512, 3)
            CASE(TILE_512, 4)
            CASE(TILE_512, 5)
            CASE(TILE_512, 6)
            CASE(TILE_512, 7)
        default:
            TILE_512(8);
        }
    }
}

/* --- AVX2 -------------------------------------------------------------------------------------------------------------------- */

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE_AVX2 static inline __attribute__((always_inline)) AVX2

#define HALF (TILE / 2) /* outputs of a register */

INLINE_AVX2 void put_avx2(const Linear *w, long tile, int half, __m256 sum, float *out, int add) {
    long first = tile * TILE + half * HALF, left = w->outputs - first;
    if (left >= HALF) {
        if (w->scale) sum = _mm256_mul_ps(sum, _mm256_loadu_ps(w->scale + first));
        if (w->bias) sum = _mm256_add_ps(sum, _mm256_loadu_ps(w->bias + first));
        if (add) sum = _mm256_add_ps(_mm256_loadu_ps(out + first), sum);
        _mm256_storeu_ps(out + first, sum);
        return;
    }
    float sums[HALF];
    _mm256_storeu_ps(sums, sum);
    put(w, first, left, sums, out, add);
}

INLINE_AVX2 __m256i four_avx2(const int8_t *a) { return _mm256_set1_epi32((int)four(a)); }

/* Magnitudes times values of the weights' sign: a pair of them is at most 2 * 127 * 127, which 16 bits hold. */
INLINE_AVX2 void half_w8_avx2(const Linear *w, const Rows *x, long row, const int count, float *out, long stride, int add,
                              long tile, int half) {
    const uint8_t *block = w->weights + tile * w->blocks * W8_BYTES + 4 * HALF * half;
    const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8(-128);
    long blocks = w->blocks;
    __m256 sum[ROWS_AVX2];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) sum[r] = _mm256_setzero_ps();
    for (long g = 0; g < blocks; g++, block += W8_BYTES) {
        __m256i dots[ROWS_AVX2];
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) dots[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int s = 0; s < STEPS; s++) {
            _mm_prefetch((const char *)block + AHEAD + 64 * s, _MM_HINT_T0);
            __m256i weights = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(block + 64 * s)), middle);
            __m256i magnitudes = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
            for (int r = 0; r < count; r++) {
                __m256i a = four_avx2(x->values + ((row + r) * blocks + g) * BLOCK + 4 * s);
                __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(a, weights));
                dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(pairs, ones));
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < count; r++)
            sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), _mm256_set1_ps(x->scale[(row + r) * blocks + g]), sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) put_avx2(w, tile, half, sum[r], out + (row + r) * stride, add);
}

/* A pair is at most 2 * 15 * 127, and a block's eight together 30480: all of them are added up in 16 bits. */
INLINE_AVX2 void half_w4_avx2(const Linear *w, const Rows *x, long row, const int count, float *out, long stride, int add,
                              long tile, int half) {
    const uint8_t *block = w->weights + tile * w->blocks * W4_BYTES;
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    long blocks = w->blocks;
    __m256 sum[ROWS_AVX2];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) sum[r] = _mm256_setzero_ps();
    for (long g = 0; g < blocks; g++, block += W4_BYTES) {
        __m256i weights[STEPS];
        __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(block + 2 * HALF * half)));
        __m256 least = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(block + 2 * TILE + 2 * HALF * half)));
        _mm_prefetch((const char *)block + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int s = 0; s < STEPS; s += 2) {
            const uint8_t *from = block + 4 * TILE + 32 * s + 4 * HALF * half;
            _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
            __m256i both = _mm256_loadu_si256((const __m256i *)from);
            weights[s] = _mm256_and_si256(both, low);
            weights[s + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            long at = (row + r) * blocks + g;
            const int8_t *a = x->values + at * BLOCK;
            __m256i pairs = _mm256_maddubs_epi16(weights[0], four_avx2(a));
#pragma GCC unroll 8
            for (int s = 1; s < STEPS; s++)
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(weights[s], four_avx2(a + 4 * s)));
            __m256 dots = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
            sum[r] = _mm256_fmadd_ps(least, _mm256_set1_ps(x->offset[at]), sum[r]);
            sum[r] = _mm256_fmadd_ps(scale, _mm256_mul_ps(dots, _mm256_set1_ps(x->scale[at])), sum[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) put_avx2(w, tile, half, sum[r], out + (row + r) * stride, add);
}

#define TILE_AVX2(n)                                                     \
    for (long t = first_tile; t < last_tile; t++)                        \
        for (int half = 0; half < 2; half++)                             \
            if (w->scale)                                                \
                half_w8_avx2(w, x, row, n, out, stride, add, t, half);   \
            else                                                         \
                half_w4_avx2(w, x, row, n, out, stride, add, t, half)

AVX2 void product_avx2(const Linear *w, const Rows *x, long rows, float *out, long stride, int add,
                       long first_tile, long last_tile) {
    for (long row = 0; row < rows; row += ROWS_AVX2) {
        switch (rows - row) {
            CASE(TILE_AVX2, 1)
            CASE(TILE_AVX2, 2)
            CASE(TILE_AVX2, 3)
        default:
            TILE_AVX2(4);
        }
    }
}

int has_512(void) { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"); }
int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#endif

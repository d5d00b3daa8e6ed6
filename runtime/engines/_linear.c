/* Linear layers with quantized weights on a CPU, for AVX-512 VNNI, AVX2, and whatever else there is. _linear.h says what they
 * compute and how weights lie.
 *
 * One read of the weights serves all rows of a step. The weights of a block stay in registers while they meet one row after the other, and a
 * run of tiles stays in the second cache while it meets the next few rows.
 *
 * A further processor is a function more of each kind and an entry in `processors`.
 * Compiled with -ffp-contract=off: what is fused is said to be.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <string.h>

#include "../_processors.h"
#include "_linear.h"

#define W8_BYTES (TILE * BLOCK)
#define W4_BYTES (TILE * BLOCK / 2 + 4 * TILE)
#define STEPS (BLOCK / 4) /* of four inputs */

#define LEVELS 127.0f

/* Largest magnitudes below this count as zero: their scale's inverse would overflow. */
#define LEAST 1e-30f

/* Rows that the weights of a block meet from registers. */
#define ROWS_512 8
#define ROWS_AVX2 4

INLINE uint32_t four(const int8_t *values) {
    uint32_t all;
    memcpy(&all, values, 4);
    return all;
}

/* --- Any processor ---------------------------------------------------------------------------------------------------------- */

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

/* The end of a tile: of what was added up to outputs, of which the last tile may have fewer than TILE. */
INLINE void put(const Linear *w, long tile, const float *sums, float *out, int add) {
    long first = tile * TILE, count = w->outputs - first < TILE ? w->outputs - first : TILE;
    for (long i = 0; i < count; i++) {
        float y = w->scale ? sums[i] * w->scale[first + i] : sums[i];
        if (w->bias) y += w->bias[first + i];
        out[first + i] = add ? out[first + i] + y : y;
    }
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
            put(w, tile, sums, out + r * stride, add);
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

/* Packs outputs, whose number is one of whole tiles but for the last. scale: [outputs] of 8 bits; halves: [outputs, blocks], fp16 scale and
 * minimum, of 4 bits, and `scale` and `least` the same in fp32. */
MULTIVERSION
static void pack(const float *w, long outputs, long inputs, const float *scale, const float *least,
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

/* Of some number of rows, known to the compiler. */
#define CASE(body, n) \
    case n:           \
        body(n);      \
        break;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* --- AVX-512 VNNI ------------------------------------------------------------------------------------------------------------ */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define INLINE_512 static inline __attribute__((always_inline)) AVX512

#define AHEAD 2048 /* bytes: what a core reads while memory answers */

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

AVX512 static void product_512(const Linear *w, const Rows *x, long rows, float *out, long stride, int add,
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
    for (long i = 0; i < left; i++) {
        float y = w->scale ? sums[i] * w->scale[first + i] : sums[i];
        if (w->bias) y += w->bias[first + i];
        out[first + i] = add ? out[first + i] + y : y;
    }
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

AVX2 static void product_avx2(const Linear *w, const Rows *x, long rows, float *out, long stride, int add,
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

static int has_512(void) { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"); }
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

static int has_any(void) { return 1; }

/* The best first. */
static const struct {
    const char *name;
    int (*is_here)(void);
    LinearKernels kernels;
} processors[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    {"avx512_vnni", has_512, {quantize_any, product_512}},
    {"avx2", has_avx2, {quantize_any, product_avx2}},
#endif
    {"any", has_any, {quantize_any, product_any}},
};
#define PROCESSORS (sizeof processors / sizeof *processors)

static LinearKernels in_use;

#define PACK_ARGS 8

/* Pointers arrive as integers; the caller owns the memory and has checked shapes. */
static PyObject *py_pack(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    long number[PACK_ARGS];
    void *pointer[PACK_ARGS];
    if (given != PACK_ARGS) return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", PACK_ARGS, given);
    for (int i = 0; i < PACK_ARGS; i++) {
        number[i] = PyLong_AsLong(objects[i]);
        pointer[i] = (void *)number[i];
        if (number[i] == -1 && PyErr_Occurred()) return NULL;
    }
    pack(pointer[0], number[1], number[2], pointer[3], pointer[4], pointer[5], pointer[6], pointer[7]);
    Py_RETURN_NONE;
}

static PyObject *py_processors(PyObject *self, PyObject *none) {
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < PROCESSORS; i++) {
        if (!processors[i].is_here()) continue;
        PyObject *name = PyUnicode_FromString(processors[i].name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_use(PyObject *self, PyObject *wanted) {
    const char *name = PyUnicode_AsUTF8(wanted);
    if (!name) return NULL;
    for (size_t i = 0; i < PROCESSORS; i++)
        if (strcmp(processors[i].name, name) == 0 && processors[i].is_here()) {
            in_use = processors[i].kernels;
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "no kernels for %s here", name);
    return NULL;
}

static PyMethodDef methods[] = {
    {"pack", (PyCFunction)(void (*)(void))py_pack, METH_FASTCALL,
     "pack(weights, outputs, inputs, scale, least, scale_half, least_half, packed)"},
    {"processors", py_processors, METH_NOARGS, "processors() -> those whose kernels run here, the best first"},
    {"use", py_use, METH_O, "use(processor)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_linear", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__linear(void) {
    size_t best = 0;
    while (!processors[best].is_here()) best++;
    in_use = processors[best].kernels;
    PyObject *made = PyModule_Create(&module), *kernels = PyCapsule_New(&in_use, LINEAR_KERNELS, NULL);
    if (!made || !kernels || PyModule_AddObjectRef(made, "kernels", kernels)) Py_CLEAR(made);
    Py_XDECREF(kernels);
    return made;
}

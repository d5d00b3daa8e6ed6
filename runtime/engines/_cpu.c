/* A decoder's step on the CPU: all its layers and its LM head in one call, and what a target and a draft have around them.
 *
 * At one to a dozen rows a step, a chain of small tensor operations costs more in dispatch than in arithmetic, and starting and joining
 * threads for each of them more than that. Here the threads go through the stages of a step side by side and share the work of each.
 * What they compute is defined in PyTorch by `Decoder`, `Draft` and `Scorer` of ssv.model with the layers of runtime/engines/linear.py,
 * and the tests compare the two. The products are those of _linear.h.
 *
 * Every row is computed by itself, in an order that does not depend on the rows beside it: a token's result is the same to
 * the last bit whether it is decoded alone or verified among others.
 *
 * Pointers arrive as integers (tensor.data_ptr()) or in structures of ctypes; the caller owns the memory and has checked shapes and lengths.
 * All tensors are contiguous, rows first, and fp32 but for positions and counts, which are int32. M rows of the step.
 * Compiled with -ffast-math (vector expf), never linked with it (that would flush subnormals in the whole process).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../_processors.h"
#include "_crew.h"
#include "_linear.h"

static const LinearKernels *kernels;

/* --- Products ---------------------------------------------------------------------------------------------------------------- */

#define TILES_BYTES (192 << 10) /* of weights that stay in the second cache */

typedef struct {
    const Linear *linear;
    const Rows *rows;
    long num_rows;
    float *out;
    long stride;
    int add;
} Product;

static void product_part(const void *context, long first, long last, long thread) {
    const Product *p = context;
    (void)thread;
    kernels->product(p->linear, p->rows, p->num_rows, p->out, p->stride, p->add, first, last);
}

static int share_product(Worker *worker, const Product *p) {
    long tiles = (p->linear->outputs + TILE - 1) / TILE, piece = crew_piece(tiles);
    long most = TILES_BYTES / (p->linear->blocks * BLOCK * TILE);
    if (piece > most) piece = most > 0 ? most : 1;
    return share(worker, product_part, p, tiles, piece);
}

/* --- Layers ------------------------------------------------------------------------------------------------------------------ */

/* As `_Layer` of runtime/engines/cpu_layers.py. */
typedef struct {
    const Linear *qkv, *o, *gate_up, *down;
    const float *attn_norm, *q_norm, *k_norm, *mlp_norm;
} Layer;

/* As `_Step` of runtime/engines/cpu_layers.py; what may be left out is NULL. */
typedef struct {
    double eps;
    int64_t num_layers, hidden, inner, heads, kv_heads, dim;
    const Layer *layers;
    const float *cosine, *sine; /* [length, dim / 2], by position */
    /* What a conditioned draft joins, normed side by side. Its product is added to x before the first layer; without `join` the first
     * layer's query, key and value see it, and no norm of x (attn_norm is NULL). */
    const Linear *join;
    const float *embed_norm, *feature_norm, *embedded, *features;
    /* The cache: [layers, batch, kv_heads, length, dim], the layers layer_size floats apart. */
    float *keys, *values;
    int64_t layer_size, length, batch;
    /* Where the tokens of the step lie in the cache, and what they see of it: [batch]; counts: tokens of each row, one row after
     * the other; prefix: [batch] and path: [rows, depth] of `Branches`, NULL for chains. */
    const int32_t *first_slot, *counts, *prefix, *path;
    int64_t depth;
    float *x; /* [rows, hidden] */
    int64_t rows;
    /* Outputs of some layers, ascending: [rows, num_tapped * hidden]. */
    const int64_t *tapped_layers;
    int64_t num_tapped;
    float *tapped;
    /* The LM head, of some rows. */
    const Linear *head;
    const float *head_norm;
    const int64_t *gathered;
    int64_t num_gathered;
    float *logits;
    /* Room: for quantized rows of any product; product: [rows, the widest]; queries, attended: [rows, heads * dim]; own: own_size floats
     * for each thread. */
    Rows quantized;
    float *product, *queries, *attended, *own;
    int64_t own_size;
} Step;

/* Where a token lies, and the slots that it sees, in logical order: slot j up to whole, then path[j - whole]. */
typedef struct {
    long row, slot, seen, whole; /* row: of the cache */
    const int32_t *path;
} Token;

typedef struct {
    const Step *step;
    const Token *tokens;
    const Layer *layer;
    long index; /* of the layer */
} Context;

INLINE long blocks_of(long inputs) { return (inputs + BLOCK - 1) / BLOCK; }

INLINE float *own_room(const Step *s, long thread) { return s->own + thread * s->own_size; }

/* out = norm(x) * weight. */
MULTIVERSION
static void norm_row(const float *x, const float *weight, float eps, float *out, long hidden) {
    float squares = 0.0f;
    for (long i = 0; i < hidden; i++) squares += x[i] * x[i];
    float factor = 1.0f / sqrtf(squares / (float)hidden + eps);
    for (long i = 0; i < hidden; i++) out[i] = x[i] * factor * weight[i];
}

static void norm_and_quantize(const Step *s, const float *x, const float *weight, long row, long thread) {
    float *normed = own_room(s, thread);
    long blocks = blocks_of(s->hidden);
    norm_row(x, weight, (float)s->eps, normed, s->hidden);
    kernels->quantize(normed, s->hidden, &s->quantized, row, blocks, 0, blocks);
}

static void join_part(const void *context, long first, long last, long thread) {
    const Step *s = ((const Context *)context)->step;
    long hidden = s->hidden, blocks = blocks_of(2 * hidden);
    float *both = own_room(s, thread);
    for (long m = first; m < last; m++) {
        norm_row(s->embedded + m * hidden, s->embed_norm, (float)s->eps, both, hidden);
        norm_row(s->features + m * hidden, s->feature_norm, (float)s->eps, both + hidden, hidden);
        kernels->quantize(both, 2 * hidden, &s->quantized, m, blocks, 0, blocks);
    }
}

/* Keeps what the layer before has made of some rows, if it is wanted. */
static void keep_tapped(const Step *s, long layer, long first, long last) {
    for (long i = 0; i < s->num_tapped; i++) {
        if (s->tapped_layers[i] != layer) continue;
        for (long m = first; m < last; m++)
            memcpy(s->tapped + (m * s->num_tapped + i) * s->hidden, s->x + m * s->hidden,
                   (size_t)s->hidden * sizeof(float));
    }
}

static void attn_norm_part(const void *context, long first, long last, long thread) {
    const Context *c = context;
    const Step *s = c->step;
    keep_tapped(s, c->index - 1, first, last);
    for (long m = first; m < last; m++) norm_and_quantize(s, s->x + m * s->hidden, c->layer->attn_norm, m, thread);
}

static void mlp_norm_part(const void *context, long first, long last, long thread) {
    const Context *c = context;
    const Step *s = c->step;
    for (long m = first; m < last; m++) norm_and_quantize(s, s->x + m * s->hidden, c->layer->mlp_norm, m, thread);
}

static void last_part(const void *context, long first, long last, long thread) {
    const Step *s = ((const Context *)context)->step;
    (void)thread;
    keep_tapped(s, s->num_layers - 1, first, last);
}

static void head_norm_part(const void *context, long first, long last, long thread) {
    const Step *s = ((const Context *)context)->step;
    for (long r = first; r < last; r++) norm_and_quantize(s, s->x + s->gathered[r] * s->hidden, s->head_norm, r, thread);
}

/* out = silu(gate) * up, n of them. */
MULTIVERSION
static void gate(const float *gate, const float *up, float *out, long n) {
    for (long i = 0; i < n; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* A part is one block of a row. */
static void gate_part(const void *context, long first, long last, long thread) {
    const Step *s = ((const Context *)context)->step;
    long blocks = blocks_of(s->inner);
    float *gated = own_room(s, thread);
    while (first < last) {
        long m = first / blocks, from = first % blocks, to = from + last - first < blocks ? from + last - first : blocks;
        long start = from * BLOCK, stop = to * BLOCK < s->inner ? to * BLOCK : s->inner;
        const float *row = s->product + m * 2 * s->inner;
        gate(row + start, row + s->inner + start, gated + start, stop - start);
        kernels->quantize(gated, s->inner, &s->quantized, m, blocks, from, to);
        first += to - from;
    }
}

static void quantize_attended_part(const void *context, long first, long last, long thread) {
    const Step *s = ((const Context *)context)->step;
    long width = s->heads * s->dim, blocks = blocks_of(width);
    (void)thread;
    for (long m = first; m < last; m++)
        kernels->quantize(s->attended + m * width, width, &s->quantized, m, blocks, 0, blocks);
}

/* One head of one token: RMSNorm if there is a weight, then rotation of pairs half a head apart. */
MULTIVERSION
static void norm_and_rotate(const float *in, const float *norm, float eps, const float *cosine, const float *sine, float *out,
                            long dim) {
    float head[dim];
    for (long d = 0; d < dim; d++) head[d] = in[d];
    if (norm) {
        float squares = 0.0f;
        for (long d = 0; d < dim; d++) squares += head[d] * head[d];
        float factor = 1.0f / sqrtf(squares / (float)dim + eps);
        for (long d = 0; d < dim; d++) head[d] *= factor * norm[d];
    }
    long half = dim / 2;
    for (long p = 0; p < half; p++) {
        out[p] = head[p] * cosine[p] - head[p + half] * sine[p];
        out[p + half] = head[p + half] * cosine[p] + head[p] * sine[p];
    }
}

INLINE long slot_of(const Token *v, long j) { return j < v->whole ? j : v->path[j - v->whole]; }

/* Eight floats, anywhere in memory. Written out because left to itself the compiler spends most of an attention of some hundred
 * keys outside its multiplications: on loop ends it does not know, and on sums it keeps in memory. */
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
#define EIGHT 8

#ifdef __clang__
#define LANES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Lanes __attribute__((vector_size(32)));
#define LANES(a, b, ...) __builtin_shuffle(a, b, (Lanes){__VA_ARGS__})
#endif

/* Sums of the lanes of four vectors, each step halving two of them into one. */
INLINE void sum_lanes(const Eight *s, float factor, float *out) {
    Eight a = LANES(s[0], s[1], 0, 8, 1, 9, 4, 12, 5, 13) + LANES(s[0], s[1], 2, 10, 3, 11, 6, 14, 7, 15);
    Eight b = LANES(s[2], s[3], 0, 8, 1, 9, 4, 12, 5, 13) + LANES(s[2], s[3], 2, 10, 3, 11, 6, 14, 7, 15);
    Eight c = LANES(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + LANES(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 4; i++) out[i] = (c[i] + c[i + 4]) * factor;
}

/* The last n floats of a head, and zeros behind them. */
INLINE Eight rest_of(const float *x, long n) {
    Eight rest = {0};
    for (long i = 0; i < n; i++) rest[i] = x[i];
    return rest;
}

/* weights[j] = query . key j * root, for all keys seen from the first-th on, a multiple of four. How a key's sum is made depends on j
 * alone, not on the slot it lies in: a token has the same bits in a tree as in a chain. */
INLINE void dot_keys(const float *query, const float *key, float root, float *weights, const Token *v, long first, long dim) {
    long j = first, d, whole = dim - dim % EIGHT, seen = v->seen;
    for (; j + 4 <= seen; j += 4) { /* four keys at a time: independent sums, one read of the query */
        const float *k0 = key + slot_of(v, j) * dim, *k1 = key + slot_of(v, j + 1) * dim;
        const float *k2 = key + slot_of(v, j + 2) * dim, *k3 = key + slot_of(v, j + 3) * dim;
        Eight s[4] = {{0}, {0}, {0}, {0}};
        for (d = 0; d < whole; d += EIGHT) {
            const Eight q = *(const Eight *)(query + d);
            s[0] += q * *(const Eight *)(k0 + d);
            s[1] += q * *(const Eight *)(k1 + d);
            s[2] += q * *(const Eight *)(k2 + d);
            s[3] += q * *(const Eight *)(k3 + d);
        }
        sum_lanes(s, root, weights + j);
        for (; d < dim; d++) {
            float q = query[d] * root;
            weights[j] += q * k0[d];
            weights[j + 1] += q * k1[d];
            weights[j + 2] += q * k2[d];
            weights[j + 3] += q * k3[d];
        }
    }
    for (; j < seen; j++) {
        const float *k = key + slot_of(v, j) * dim;
        float dot = 0.0f;
        for (d = 0; d < dim; d++) dot += query[d] * k[d];
        weights[j] = dot * root;
    }
}

/* out = (sums + weighted sum of the values seen from the first-th on) * factor; sums: NULL where first is 0. */
INLINE void mix_values(const float *weights, const float *value, float factor, const float *sums, float *out, const Token *v, long first,
                       long dim) {
    long d = 0, seen = v->seen;
    for (; d + 8 * EIGHT <= dim; d += 8 * EIGHT) { /* as many sums as registers hold */
        Eight s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, s4 = {0}, s5 = {0}, s6 = {0}, s7 = {0};
        if (sums) {
            const Eight *from = (const Eight *)(sums + d);
            s0 = from[0], s1 = from[1], s2 = from[2], s3 = from[3], s4 = from[4], s5 = from[5], s6 = from[6], s7 = from[7];
        }
        for (long j = first; j < seen; j++) {
            const Eight *x = (const Eight *)(value + slot_of(v, j) * dim + d);
            float w = weights[j];
            s0 += w * x[0], s1 += w * x[1], s2 += w * x[2], s3 += w * x[3];
            s4 += w * x[4], s5 += w * x[5], s6 += w * x[6], s7 += w * x[7];
        }
        Eight *result = (Eight *)(out + d);
        result[0] = s0 * factor, result[1] = s1 * factor, result[2] = s2 * factor, result[3] = s3 * factor;
        result[4] = s4 * factor, result[5] = s5 * factor, result[6] = s6 * factor, result[7] = s7 * factor;
    }
    for (; d + EIGHT <= dim; d += EIGHT) {
        Eight sum = {0};
        if (sums) sum = *(const Eight *)(sums + d);
        for (long j = first; j < seen; j++) sum += weights[j] * *(const Eight *)(value + slot_of(v, j) * dim + d);
        *(Eight *)(out + d) = sum * factor;
    }
    if (d < dim) {
        Eight sum = {0};
        for (long j = 0; j < seen; j++) sum += weights[j] * rest_of(value + slot_of(v, j) * dim + d, dim - d);
        for (long i = 0; d + i < dim; i++) out[d + i] = sum[i] * factor;
    }
}

/* Rotates queries and keys, and stores keys and values into the cache. A part is one head of a row. */
static void store_part(const void *context, long first, long last, long thread) {
    const Context *c = context;
    const Step *s = c->step;
    const Layer *layer = c->layer;
    long width = s->heads + 2 * s->kv_heads, dim = s->dim;
    (void)thread;
    for (long item = first; item < last; item++) {
        long m = item / width, n = item % width, k = n - s->heads;
        const Token *token = &c->tokens[m];
        const float *in = s->product + item * dim, *cosine = s->cosine + (token->seen - 1) * (dim / 2);
        const float *sine = s->sine + (token->seen - 1) * (dim / 2);
        if (k < 0) {
            norm_and_rotate(in, layer->q_norm, (float)s->eps, cosine, sine, s->queries + (m * s->heads + n) * dim, dim);
            continue;
        }
        int is_key = k < s->kv_heads;
        if (!is_key) k -= s->kv_heads;
        float *to = (is_key ? s->keys : s->values) + c->index * s->layer_size +
                    ((token->row * s->kv_heads + k) * s->length + token->slot) * dim;
        if (is_key)
            norm_and_rotate(in, layer->k_norm, (float)s->eps, cosine, sine, to, dim);
        else
            memcpy(to, in, (size_t)dim * sizeof(float));
    }
}

/* A query head of a token, and room for as many weights as it sees keys. */
typedef struct {
    const Token *token;
    const float *in;
    float *out, *weights;
} Query;

#define PAIRS 4
#define TOGETHER (2 * PAIRS) /* queries that share a read of keys and values; `own_size` of a step has room for their weights */
#define MOST_DIMS 512        /* of such queries */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma")))
#define INLINE_512 static inline __attribute__((always_inline)) AVX512

static int pairs_run_here(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* Two queries lie in the halves of a register, the keys and values in both halves of another: a query's sums are those of `dot_keys`
 * and `mix_values` to the last bit, and half as many products as there make them. */
INLINE_512 void dot_pairs(const int pairs, const float *both, const float *keys, float root, const Query *of, long num, long common, long dim) {
    for (long j = 0; j < common; j += 4, keys += 4 * dim) {
        __m512 s[PAIRS][4];
#pragma GCC unroll 4
        for (int p = 0; p < pairs; p++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) s[p][i] = _mm512_setzero_ps();
        for (long d = 0; d < dim; d += EIGHT) {
            __m512 key[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) key[i] = _mm512_broadcast_f32x8(_mm256_loadu_ps(keys + i * dim + d));
#pragma GCC unroll 4
            for (int p = 0; p < pairs; p++) {
                __m512 query = _mm512_loadu_ps(both + 2 * (p * dim + d));
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) s[p][i] = _mm512_fmadd_ps(query, key[i], s[p][i]);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < pairs; p++) { /* as `sum_lanes` */
            __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(s[p][0], s[p][1]), _mm512_unpackhi_ps(s[p][0], s[p][1]));
            __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(s[p][2], s[p][3]), _mm512_unpackhi_ps(s[p][2], s[p][3]));
            __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
            __m512 dots = _mm512_mul_ps(_mm512_add_ps(c, _mm512_shuffle_f32x4(c, c, 0xb1)), _mm512_set1_ps(root));
            _mm_storeu_ps(of[2 * p].weights + j, _mm512_castps512_ps128(dots));
            if (2 * p + 1 < num) _mm_storeu_ps(of[2 * p + 1].weights + j, _mm512_extractf32x4_ps(dots, 2));
        }
    }
}

/* sums: [2 * pairs, dim]. */
INLINE_512 void mix_pairs(const int pairs, const float *values, const Query *of, long num, float *sums, long common, long dim) {
    for (long d = 0; d < dim; d += 4 * EIGHT) {
        __m512 s[PAIRS][4];
        const float *weights[TOGETHER];
#pragma GCC unroll 4
        for (int p = 0; p < pairs; p++) {
            weights[2 * p] = of[2 * p].weights, weights[2 * p + 1] = of[2 * p + 1 < num ? 2 * p + 1 : 2 * p].weights;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) s[p][i] = _mm512_setzero_ps();
        }
        const float *x = values + d;
        for (long j = 0; j < common; j++, x += dim) {
            __m512 value[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) value[i] = _mm512_broadcast_f32x8(_mm256_loadu_ps(x + EIGHT * i));
#pragma GCC unroll 4
            for (int p = 0; p < pairs; p++) {
                __m512 weight = _mm512_mask_broadcastss_ps(_mm512_set1_ps(weights[2 * p][j]), 0xff00, _mm_load_ss(weights[2 * p + 1] + j));
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) s[p][i] = _mm512_fmadd_ps(weight, value[i], s[p][i]);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < pairs; p++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                _mm256_storeu_ps(sums + 2 * p * dim + d + EIGHT * i, _mm512_castps512_ps256(s[p][i]));
                _mm256_storeu_ps(sums + (2 * p + 1) * dim + d + EIGHT * i, _mm512_extractf32x8_ps(s[p][i], 1));
            }
    }
}

#define OF_PAIRS(call)      \
    switch ((num + 1) / 2) { \
    case 1: call(1); break;  \
    case 2: call(2); break;  \
    case 3: call(3); break;  \
    default: call(4);        \
    }

AVX512 static void dot_together(const float *keys, float root, const Query *of, long num, long common, long dim) {
    float both[2 * PAIRS * MOST_DIMS];
    for (long n = 0; n < (num + 1) / 2 * 2; n++) {
        const float *query = of[n < num ? n : num - 1].in;
        for (long d = 0; d < dim; d += EIGHT) memcpy(both + 2 * (n / 2 * dim + d) + n % 2 * EIGHT, query + d, EIGHT * sizeof(float));
    }
#define DOT(n) dot_pairs(n, both, keys, root, of, num, common, dim)
    OF_PAIRS(DOT)
}

AVX512 static void mix_together(const float *values, const Query *of, long num, float *sums, long common, long dim) {
#define MIX(n) mix_pairs(n, values, of, num, sums, common, dim)
    OF_PAIRS(MIX)
}
#else
static int pairs_run_here(void) { return 0; }
static void dot_together(const float *keys, float root, const Query *of, long num, long common, long dim) {}
static void mix_together(const float *values, const Query *of, long num, float *sums, long common, long dim) {}
#endif

static int has_pairs;

/* Weights of the keys from the first-th on; those before are there. */
MULTIVERSION
static void weigh(const Query *q, const float *keys, float root, long first, long dim) {
    dot_keys(q->in, keys, root, q->weights, q->token, first, dim);
}

/* Makes shares of weights that are still to be divided by their sum; returns it. */
MULTIVERSION
static float exponents(float *weight, long seen) {
    float largest = -3.0e38f, sum = 0.0f;
    for (long j = 0; j < seen; j++) largest = weight[j] > largest ? weight[j] : largest;
    for (long j = 0; j < seen; j++) weight[j] = expf(weight[j] - largest);
    for (long j = 0; j < seen; j++) sum += weight[j];
    return sum;
}

MULTIVERSION
static void mix(const Query *q, const float *values, float factor, const float *sums, long first, long dim) {
    mix_values(q->weights, values, factor, sums, q->out, q->token, first, dim);
}

/* Attention of some queries that share a row and a key/value head, TOGETHER at the most: all of them over the keys, then all over the
 * values, so that each is read from afar once. What all see in the slots of its places is read once for all, and from registers. */
static void attend_queries(const Query *of, long num, const float *keys, const float *values, long dim) {
    float root = 1.0f / sqrtf((float)dim), total[TOGETHER], sums[TOGETHER * MOST_DIMS];
    long common = 0;
    if (has_pairs && dim % (4 * EIGHT) == 0 && dim <= MOST_DIMS) {
        common = of->token->seen;
        for (long n = 0; n < num; n++) {
            const Token *token = of[n].token;
            if (token->seen < common) common = token->seen;
            if (token->whole < common) common = token->whole;
        }
        common -= common % 4;
    }
    if (common) dot_together(keys, root, of, num, common, dim);
    for (long n = 0; n < num; n++) {
        weigh(of + n, keys, root, common, dim);
        total[n] = exponents(of[n].weights, of[n].token->seen);
    }
    if (common) mix_together(values, of, num, sums, common, dim);
    for (long n = 0; n < num; n++) mix(of + n, values, 1.0f / total[n], common ? sums + n * dim : NULL, common, dim);
}

/* A part is one query head of a row; those of a key/value head lie side by side. */
static void attend_part(const void *context, long first, long last, long thread) {
    const Context *c = context;
    const Step *s = c->step;
    long groups = s->heads / s->kv_heads, dim = s->dim, of_head = s->rows * groups;
    while (first < last) {
        Query of[TOGETHER];
        float *weights = own_room(s, thread);
        long k = first / of_head, row = c->tokens[first % of_head / groups].row, num = 0;
        for (; first < last && num < TOGETHER && first / of_head == k; first++) {
            long m = first % of_head / groups, at = (m * s->heads + k * groups + first % groups) * dim;
            const Token *token = &c->tokens[m];
            if (token->row != row) break;
            of[num++] = (Query){token, s->queries + at, s->attended + at, weights};
            weights += token->seen;
        }
        long base = c->index * s->layer_size + (row * s->kv_heads + k) * s->length * dim;
        attend_queries(of, num, s->keys + base, s->values + base, dim);
    }
}

/* --- A step ------------------------------------------------------------------------------------------------------------------ */

#define STAGES_A_LAYER 10
#define OTHER_STAGES 5

static int share_items(Worker *worker, Part part, const Context *c, long items) {
    return share(worker, part, c, items, crew_piece(items));
}

static int run_layer(Worker *worker, const Context *c) {
    const Step *s = c->step;
    const Layer *layer = c->layer;
    const Rows *x = &s->quantized;
    long rows = s->rows, hidden = s->hidden, inner = s->inner, heads = s->heads + 2 * s->kv_heads;
    return (!layer->attn_norm || share_items(worker, attn_norm_part, c, rows)) &&
           share_product(worker, &(Product){layer->qkv, x, rows, s->product, heads * s->dim, 0}) &&
           share_items(worker, store_part, c, rows * heads) && share_items(worker, attend_part, c, rows * s->heads) &&
           share_items(worker, quantize_attended_part, c, rows) &&
           share_product(worker, &(Product){layer->o, x, rows, s->x, hidden, 1}) &&
           share_items(worker, mlp_norm_part, c, rows) &&
           share_product(worker, &(Product){layer->gate_up, x, rows, s->product, 2 * inner, 0}) &&
           share_items(worker, gate_part, c, rows * blocks_of(inner)) &&
           share_product(worker, &(Product){layer->down, x, rows, s->x, hidden, 1});
}

static void run_step(const void *context, Worker *worker) {
    Context c = *(const Context *)context;
    const Step *s = c.step;
    if (s->embedded && !share_items(worker, join_part, &c, s->rows)) return;
    if (s->join && !share_product(worker, &(Product){s->join, &s->quantized, s->rows, s->x, s->hidden, 1})) return;
    for (c.index = 0; c.index < s->num_layers; c.index++) {
        c.layer = &s->layers[c.index];
        if (!run_layer(worker, &c)) return;
    }
    if (s->num_tapped && !share_items(worker, last_part, &c, s->rows)) return;
    if (s->num_gathered && share_items(worker, head_norm_part, &c, s->num_gathered))
        share_product(worker, &(Product){s->head, &s->quantized, s->num_gathered, s->logits, s->head->outputs, 0});
}

/* What token t of row b sees; it is row m of the step. */
static Token token_of(const Step *s, long b, long t, long m) {
    long slot = s->first_slot[b] + t;
    if (!s->path) return (Token){b, slot, slot + 1, slot + 1, NULL};
    const int32_t *path = s->path + m * s->depth;
    long length = s->depth;
    while (path[length - 1] < 0) length--; /* its own slot is always there */
    return (Token){b, slot, s->prefix[b] + length, s->prefix[b], path};
}

static PyObject *py_run(PyObject *self, PyObject *address) {
    const Step *s = PyLong_AsVoidPtr(address);
    if (!s) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no step");
    Token *tokens = malloc((size_t)(s->rows ? s->rows : 1) * sizeof(Token));
    if (!tokens) return PyErr_NoMemory();
    long m = 0;
    for (long b = 0; b < s->batch; b++)
        for (long t = 0; t < s->counts[b]; t++, m++) tokens[m] = token_of(s, b, t, m);
    Context c = {s, tokens, NULL, 0};
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = crew_run(run_step, &c, STAGES_A_LAYER * s->num_layers + OTHER_STAGES);
    Py_END_ALLOW_THREADS
    free(tokens);
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* --- A linear layer by itself ------------------------------------------------------------------------------------------------ */

typedef struct {
    const float *x;
    long inputs;
    Product product;
} Alone;

static void quantize_part(const void *context, long first, long last, long thread) {
    const Alone *a = context;
    long blocks = a->product.linear->blocks;
    (void)thread;
    for (long m = first; m < last; m++)
        kernels->quantize(a->x + m * a->inputs, a->inputs, a->product.rows, m, blocks, 0, blocks);
}

static void run_alone(const void *context, Worker *worker) {
    const Alone *a = context;
    long rows = a->product.num_rows;
    if (share(worker, quantize_part, a, rows, crew_piece(rows))) share_product(worker, &a->product);
}

/* --- The scorer --- */

/* The op `score` of plugins/reference.py: sigmoid(weight . features + bias) of each row; hidden = 0 leaves the state out.
   Logits have to be numbers: a row without a distribution is not told apart. */
MULTIVERSION
static void score_rows(const float *state, const float *logits, const float *weight, float bias, float *out, long rows,
                       long hidden, long vocab) {
    for (long m = 0; m < rows; m++) {
        const float *row = logits + m * vocab, *h = state + m * hidden, *confidence = weight + hidden;
        float top = row[0], second = -1.0e4f, rest = 0.0f, weighted = 0.0f, squares = 0.0f, dot = 0.0f;
        int ties = 0;
        for (long i = 0; i < vocab; i++) top = row[i] > top ? row[i] : top;
        for (long i = 0; i < vocab; i++) {
            float below = row[i] - top, floored = below < -80.0f ? -80.0f : below; /* no 0 * inf for logits of -inf */
            /* Without the top itself: next to its 1, what is left of a sure token would be rounded away. */
            float mass = below < 0.0f ? expf(floored) : 0.0f;
            rest += mass;
            weighted += mass * floored;
            ties += below == 0.0f;
            second = below < 0.0f && below > second ? below : second;
        }
        rest += (float)(ties - 1);
        if (ties > 1) second = 0.0f;
        float total = 1.0f + rest, left = rest / total;
        float score = bias + confidence[0] * logf(left > 1e-7f ? left : 1e-7f) +
                      confidence[1] * (logf(total) - weighted / total) - confidence[2] * second;
        if (hidden) {
            for (long i = 0; i < hidden; i++) {
                squares += h[i] * h[i];
                dot += h[i] * weight[i];
            }
            score += dot / sqrtf(squares / (float)hidden + 1e-6f);
        }
        out[m] = 1.0f / (1.0f + expf(-score));
    }
}

/* --- What Python calls --- */

#define MAX_ARGS 9

typedef struct {
    void *pointer[MAX_ARGS];
    long number[MAX_ARGS];
} Args;

/* Reads integers; each is kept both as a number and as an address. */
static int read_args(PyObject *const *objects, Py_ssize_t given, Py_ssize_t wanted, Args *args) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        args->number[i] = PyLong_AsLong(objects[i]);
        args->pointer[i] = (void *)args->number[i];
        if (args->number[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

/* The same after a number that is not whole. */
static int read_float_and_args(PyObject *const *objects, Py_ssize_t given, Py_ssize_t wanted, double *number, Args *args) {
    if (given < 1) {
        PyErr_Format(PyExc_TypeError, "expected a number and %zd integers", wanted);
        return -1;
    }
    *number = PyFloat_AsDouble(objects[0]);
    if (*number == -1.0 && PyErr_Occurred()) return -1;
    return read_args(objects + 1, given - 1, wanted, args);
}

static PyObject *py_score(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    double bias;
    if (read_float_and_args(objects, given, 7, &bias, &a)) return NULL;
    score_rows(a.pointer[0], a.pointer[1], a.pointer[2], (float)bias, a.pointer[3], a.number[4], a.number[5],
               a.number[6]);
    Py_RETURN_NONE;
}

static PyObject *py_linear(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    if (read_args(objects, given, 9, &a)) return NULL;
    const Linear *linear = a.pointer[0];
    Rows rows = {a.pointer[1], a.pointer[2], a.pointer[3], a.pointer[4]};
    Alone alone = {a.pointer[5], a.number[6], {linear, &rows, a.number[7], a.pointer[8], linear->outputs, 0}};
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = crew_run(run_alone, &alone, 2);
    Py_END_ALLOW_THREADS
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_use_threads(PyObject *self, PyObject *threads) {
    unsigned long number = PyLong_AsUnsignedLong(threads);
    if (PyErr_Occurred()) return NULL;
    crew_use((unsigned)number);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"run", py_run, METH_O, "run(step)"},
    {"linear", (PyCFunction)(void (*)(void))py_linear, METH_FASTCALL,
     "linear(linear, values, scale, offset, sum, x, inputs, rows, out)"},
    {"score", (PyCFunction)(void (*)(void))py_score, METH_FASTCALL,
     "score(bias, state, logits, weight, out, rows, hidden, vocab)"},
    {"use_threads", py_use_threads, METH_O, "use_threads(threads)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) {
    PyObject *linear = PyImport_ImportModule("ssv.runtime.engines._linear"); /* PyCapsule_Import does not import modules of packages */
    Py_XDECREF(linear);
    kernels = linear ? PyCapsule_Import(LINEAR_KERNELS, 0) : NULL;
    has_pairs = pairs_run_here();
    return kernels ? PyModule_Create(&module) : NULL;
}

/* The work between the int8 matrix products of a decoder on the CPU, each stage one pass over a few rows.
 *
 * At one to a dozen rows a step, a chain of small tensor operations costs more in dispatch than in arithmetic. Three of
 * these stages replace some twenty of them a layer, the others what a target and a draft have around their layers.
 * What they compute is defined in PyTorch by `Decoder`, `Draft` and `Scorer` of ssv.model and by `quantize_rows` of
 * runtime/engines/cpu_int8.py, and the tests compare the two.
 *
 * Every row is computed by itself, in an order that does not depend on the rows beside it: a token's result is the same to
 * the last bit whether it is decoded alone or verified among others.
 *
 * Pointers arrive as integers (tensor.data_ptr()); the caller owns the memory and has checked shapes and lengths.
 * All tensors are contiguous, rows first, and fp32 but for positions and counts, which are int32. M rows of the step.
 * Compiled with -ffast-math (vector expf), never linked with it (that would flush subnormals in the whole process).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>

#include "../_processors.h"

/* Rows are shared between the threads of the OpenMP runtime that torch has loaded: its products have just used them, so they are awake,
 * and a runtime of our own would fight with them for the cores. Without one (see use_threads) a single thread does all. */
typedef void (*Fork)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*Count)(void);
static Fork fork_threads;
static Count thread_number, num_threads;
static unsigned max_threads = 1;

typedef void (*Part)(const void *context, long first, long last, long thread);

typedef struct {
    Part part;
    const void *context;
    long rows;
} Job;

static void run_part(void *data) {
    const Job *job = data;
    long thread = thread_number(), threads = num_threads();
    job->part(job->context, job->rows * thread / threads, job->rows * (thread + 1) / threads, thread);
}

static void share_rows(Part part, const void *context, long rows) {
    Job job = {part, context, rows};
    if (rows < 2 || max_threads < 2) {
        part(context, 0, rows, 0);
        return;
    }
    fork_threads(run_part, &job, rows < (long)max_threads ? (unsigned)rows : max_threads, 0);
}

/* 7 bits, centred: the AVX2 int8 product adds pairs of u8 * s8 in 16 bits, which 8-bit activations would saturate. */
#define LEVELS 63.0f

INLINE float largest_magnitude(const float *x, long n) {
    float largest = 0.0f;
    for (long i = 0; i < n; i++) {
        float magnitude = fabsf(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* Scales a row so that its largest magnitude is LEVELS; returns what undoes it. */
INLINE float scale_to_levels(float *x, long n) {
    float largest = largest_magnitude(x, n);
    if (largest == 0.0f) return 0.0f;
    float factor = LEVELS / largest;
    for (long i = 0; i < n; i++) x[i] *= factor;
    return largest / LEVELS;
}

/* x += product * product_scale + bias; out = x * weight scaled to LEVELS; out_scale undoes that and normalises. */
MULTIVERSION
static void add_norm_rows(float *x, const float *product, const float *product_scale, const float *bias,
                          const float *weight, float eps, float *out, float *out_scale, long rows, long hidden) {
    for (long m = 0; m < rows; m++) {
        float *row = x + m * hidden, *result = out + m * hidden, squares = 0.0f;
        if (product) {
            const float *added = product + m * hidden;
            float scale = product_scale[m];
            for (long i = 0; i < hidden; i++) row[i] += added[i] * scale;
        }
        if (bias)
            for (long i = 0; i < hidden; i++) row[i] += bias[i];
        for (long i = 0; i < hidden; i++) {
            squares += row[i] * row[i];
            result[i] = row[i] * weight[i];
        }
        out_scale[m] = scale_to_levels(result, hidden) / sqrtf(squares / (float)hidden + eps);
    }
}

/* out = x * factor scaled to LEVELS. */
MULTIVERSION
static void scale_rows(const float *x, const float *factor, float *out, float *out_scale, long rows, long inner) {
    for (long m = 0; m < rows; m++) {
        const float *row = x + m * inner;
        float *result = out + m * inner;
        for (long i = 0; i < inner; i++) result[i] = factor ? row[i] * factor[i] : row[i];
        out_scale[m] = scale_to_levels(result, inner);
    }
}

/* out = norm(embedded) * embed_weight beside norm(features) * feature_weight, scaled to LEVELS; [rows, 2 * hidden]. */
MULTIVERSION
static void join_rows(const float *embedded, const float *features, const float *embed_weight,
                      const float *feature_weight, float eps, float *out, float *out_scale, long rows, long hidden) {
    for (long m = 0; m < rows; m++) {
        for (long part = 0; part < 2; part++) {
            const float *row = (part ? features : embedded) + m * hidden, *weight = part ? feature_weight : embed_weight;
            float *result = out + (2 * m + part) * hidden, squares = 0.0f;
            for (long i = 0; i < hidden; i++) squares += row[i] * row[i];
            float factor = 1.0f / sqrtf(squares / (float)hidden + eps);
            for (long i = 0; i < hidden; i++) result[i] = row[i] * factor * weight[i];
        }
        out_scale[m] = scale_to_levels(out + 2 * m * hidden, 2 * hidden);
    }
}

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

/* out = silu(gate) * up scaled to LEVELS, gate and up being the halves of the scaled product. */
MULTIVERSION
static void gated_rows(const float *product, const float *product_scale, const float *bias, float *out,
                       float *out_scale, long rows, long inner) {
    for (long m = 0; m < rows; m++) {
        const float *gate = product + m * 2 * inner, *up = gate + inner;
        float *result = out + m * inner, scale = product_scale[m];
        if (bias) {
            for (long i = 0; i < inner; i++) {
                float g = gate[i] * scale + bias[i], u = up[i] * scale + bias[inner + i];
                result[i] = g / (1.0f + expf(-g)) * u;
            }
        } else {
            for (long i = 0; i < inner; i++) {
                float g = gate[i] * scale, u = up[i] * scale;
                result[i] = g / (1.0f + expf(-g)) * u;
            }
        }
        out_scale[m] = scale_to_levels(result, inner);
    }
}

/* One head of one token: RMSNorm if there is a weight, then rotation of pairs half a head apart. */
INLINE void norm_and_rotate(const float *in, float scale, const float *bias, const float *norm, float eps,
                                   const float *cosine, const float *sine, float *out, long dim) {
    float head[dim];
    for (long d = 0; d < dim; d++) head[d] = in[d] * scale + (bias ? bias[d] : 0.0f);
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

typedef struct {
    long batch, heads, kv_heads, dim, length; /* length: S, slots of a cache row */
} Shape;

/* Where the tokens of a step lie in the cache, and what they see of it: first_slot: [batch]; counts: [batch], tokens of each row, one
 * row after the other; prefix: [batch] and path: [rows, depth] of `Branches`, NULL for chains. */
typedef struct {
    const int32_t *first_slot, *counts, *prefix, *path;
    long depth;
} Places;

/* The slots that a token sees, in logical order: slot j up to whole, then path[j - whole]. */
typedef struct {
    long seen, whole;
    const int32_t *path;
} Seen;

/* Of token t of row b, which is row m of the step. */
INLINE Seen seen_by(const Places *p, long b, long t, long m) {
    if (!p->path) {
        long seen = p->first_slot[b] + t + 1;
        return (Seen){seen, seen, NULL};
    }
    const int32_t *path = p->path + m * p->depth;
    long length = p->depth;
    while (path[length - 1] < 0) length--; /* its own slot is always there */
    return (Seen){p->prefix[b] + length, p->prefix[b], path};
}

INLINE long slot_of(const Seen *v, long j) { return j < v->whole ? j : v->path[j - v->whole]; }

/* Splits the scaled qkv product into heads, rotates queries and keys, stores keys and values into the cache.
 * cosine, sine: [length, dim / 2], by position; keys, values: [batch, kv_heads, length, dim]; queries out: [rows, heads, dim]. */
MULTIVERSION
static void store_rows(const float *qkv, const float *qkv_scale, const float *bias, const float *q_norm,
                       const float *k_norm, float eps, const float *cosine, const float *sine, float *queries,
                       float *keys, float *values, const Places *places, const Shape *s, long first_row,
                       long last_row) {
    long width = (s->heads + 2 * s->kv_heads) * s->dim, half = s->dim / 2, m = 0;
    for (long b = 0; b < s->batch; b++) {
        for (long t = 0; t < places->counts[b]; t++, m++) {
            if (m < first_row || m >= last_row) continue;
            long at = places->first_slot[b] + t, position = seen_by(places, b, t, m).seen - 1;
            const float *row = qkv + m * width, *c = cosine + position * half, *sn = sine + position * half;
            for (long n = 0; n < s->heads; n++)
                norm_and_rotate(row + n * s->dim, qkv_scale[m], bias ? bias + n * s->dim : NULL, q_norm, eps, c, sn,
                                queries + (m * s->heads + n) * s->dim, s->dim);
            for (long k = 0; k < s->kv_heads; k++) {
                long from = (s->heads + k) * s->dim, to = ((b * s->kv_heads + k) * s->length + at) * s->dim;
                norm_and_rotate(row + from, qkv_scale[m], bias ? bias + from : NULL, k_norm, eps, c, sn, keys + to,
                                s->dim);
                from += s->kv_heads * s->dim;
                for (long d = 0; d < s->dim; d++)
                    values[to + d] = row[from + d] * qkv_scale[m] + (bias ? bias[from + d] : 0.0f);
            }
        }
    }
}

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

/* weights[j] = query . key j * root, for all keys seen. How a key's sum is made depends on j alone, not on the slot it lies in: a token
 * has the same bits in a tree as in a chain. */
INLINE void dot_keys(const float *query, const float *key, float root, float *weights, const Seen *v, long dim) {
    long j = 0, d, whole = dim - dim % EIGHT, seen = v->seen;
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

/* out = weighted sum of the values seen * factor. */
INLINE void mix_values(const float *weights, const float *value, float factor, float *out, const Seen *v, long dim) {
    long d = 0, seen = v->seen;
    for (; d + 8 * EIGHT <= dim; d += 8 * EIGHT) { /* as many sums as registers hold */
        Eight s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, s4 = {0}, s5 = {0}, s6 = {0}, s7 = {0};
        for (long j = 0; j < seen; j++) {
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
        for (long j = 0; j < seen; j++) sum += weights[j] * *(const Eight *)(value + slot_of(v, j) * dim + d);
        *(Eight *)(out + d) = sum * factor;
    }
    if (d < dim) {
        Eight sum = {0};
        for (long j = 0; j < seen; j++) sum += weights[j] * rest_of(value + slot_of(v, j) * dim + d, dim - d);
        for (long i = 0; d + i < dim; i++) out[d + i] = sum[i] * factor;
    }
}

/* Attention of every query to the keys that it sees; out [rows, heads * dim] scaled to LEVELS.
 * weights: room for [heads / kv_heads, length]. Rows before first_row and from last_row on are left out. */
MULTIVERSION
static void attend_rows(const float *queries, const float *keys, const float *values, const Places *places,
                        float *weights, float *out, float *out_scale, const Shape *s, long first_row, long last_row) {
    long groups = s->heads / s->kv_heads, dim = s->dim, m = 0;
    float root = 1.0f / sqrtf((float)dim);
    for (long b = 0; b < s->batch; b++) {
        for (long t = 0; t < places->counts[b]; t++, m++) {
            if (m < first_row || m >= last_row) continue;
            const Seen v = seen_by(places, b, t, m);
            for (long k = 0; k < s->kv_heads; k++) {
                long base = (b * s->kv_heads + k) * s->length * dim, first = (m * s->heads + k * groups) * dim;
                /* All heads over the keys, then all over the values: each is read from afar once. */
                for (long g = 0; g < groups; g++)
                    dot_keys(queries + first + g * dim, keys + base, root, weights + g * s->length, &v, dim);
                for (long g = 0; g < groups; g++) {
                    float *weight = weights + g * s->length, largest = -3.0e38f, sum = 0.0f;
                    for (long j = 0; j < v.seen; j++) largest = weight[j] > largest ? weight[j] : largest;
                    for (long j = 0; j < v.seen; j++) weight[j] = expf(weight[j] - largest);
                    for (long j = 0; j < v.seen; j++) sum += weight[j];
                    mix_values(weight, values + base, 1.0f / sum, out + first + g * dim, &v, dim);
                }
            }
            out_scale[m] = scale_to_levels(out + m * s->heads * dim, s->heads * dim);
        }
    }
}

#define MAX_ARGS 24

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

static PyObject *py_add_norm(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    double eps;
    if (read_float_and_args(objects, given, 9, &eps, &a)) return NULL;
    add_norm_rows(a.pointer[0], a.pointer[1], a.pointer[2], a.pointer[3], a.pointer[4], (float)eps, a.pointer[5],
                  a.pointer[6], a.number[7], a.number[8]);
    Py_RETURN_NONE;
}

static PyObject *py_join(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    double eps;
    if (read_float_and_args(objects, given, 8, &eps, &a)) return NULL;
    join_rows(a.pointer[0], a.pointer[1], a.pointer[2], a.pointer[3], (float)eps, a.pointer[4], a.pointer[5],
              a.number[6], a.number[7]);
    Py_RETURN_NONE;
}

static PyObject *py_score(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    double bias;
    if (read_float_and_args(objects, given, 7, &bias, &a)) return NULL;
    score_rows(a.pointer[0], a.pointer[1], a.pointer[2], (float)bias, a.pointer[3], a.number[4], a.number[5],
               a.number[6]);
    Py_RETURN_NONE;
}

static PyObject *py_scale(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    if (read_args(objects, given, 6, &a)) return NULL;
    scale_rows(a.pointer[0], a.pointer[1], a.pointer[2], a.pointer[3], a.number[4], a.number[5]);
    Py_RETURN_NONE;
}

static void gated_part(const void *context, long first, long last, long thread) {
    const Args *a = context;
    long inner = a->number[6];
    (void)thread;
    gated_rows((float *)a->pointer[0] + 2 * first * inner, (float *)a->pointer[1] + first, a->pointer[2],
               (float *)a->pointer[3] + first * inner, (float *)a->pointer[4] + first, last - first, inner);
}

static PyObject *py_gated(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    if (read_args(objects, given, 7, &a)) return NULL;
    share_rows(gated_part, &a, a.number[5]);
    Py_RETURN_NONE;
}

typedef struct {
    const Args *args;
    Places places;
    Shape shape;
    float eps;
} Attention;

static void store_part(const void *context, long first, long last, long thread) {
    const Attention *c = context;
    void *const *p = c->args->pointer;
    (void)thread;
    store_rows(p[0], p[1], p[2], p[3], p[4], c->eps, p[5], p[6], p[7], p[8], p[9], &c->places, &c->shape, first, last);
}

static void attend_part(const void *context, long first, long last, long thread) {
    const Attention *c = context;
    void *const *p = c->args->pointer;
    float *weights = (float *)p[15] + thread * (c->shape.heads / c->shape.kv_heads) * c->shape.length;
    attend_rows(p[7], p[8], p[9], &c->places, weights, p[16], p[17], &c->shape, first, last);
}

static PyObject *py_attend(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    double eps;
    if (read_float_and_args(objects, given, 23, &eps, &a)) return NULL;
    Attention c = {
        &a,
        {a.pointer[10], a.pointer[11], a.pointer[12], a.pointer[13], a.number[14]},
        {a.number[18], a.number[19], a.number[20], a.number[21], a.number[22]},
        (float)eps,
    };
    long rows = 0;
    for (long b = 0; b < c.shape.batch; b++) rows += c.places.counts[b];
    share_rows(store_part, &c, rows);
    share_rows(attend_part, &c, rows);
    Py_RETURN_NONE;
}

static PyObject *py_use_threads(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    Args a;
    if (read_args(objects, given, 4, &a)) return NULL;
    fork_threads = (Fork)a.pointer[0];
    thread_number = (Count)a.pointer[1];
    num_threads = (Count)a.pointer[2];
    max_threads = (unsigned)a.number[3];
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add_norm", (PyCFunction)(void (*)(void))py_add_norm, METH_FASTCALL,
     "add_norm(eps, x, product, product_scale, bias, weight, out, out_scale, rows, hidden)"},
    {"scale", (PyCFunction)(void (*)(void))py_scale, METH_FASTCALL, "scale(x, factor, out, out_scale, rows, inner)"},
    {"gated", (PyCFunction)(void (*)(void))py_gated, METH_FASTCALL,
     "gated(product, product_scale, bias, out, out_scale, rows, inner)"},
    {"attend", (PyCFunction)(void (*)(void))py_attend, METH_FASTCALL,
     "attend(eps, qkv, qkv_scale, bias, q_norm, k_norm, cos, sin, queries, keys, values, first_slot, counts, prefix, path, "
     "depth, weights, out, out_scale, batch, heads, kv_heads, dim, length)"},
    {"join", (PyCFunction)(void (*)(void))py_join, METH_FASTCALL,
     "join(eps, embedded, features, embed_weight, feature_weight, out, out_scale, rows, hidden)"},
    {"score", (PyCFunction)(void (*)(void))py_score, METH_FASTCALL,
     "score(bias, state, logits, weight, out, rows, hidden, vocab)"},
    {"use_threads", (PyCFunction)(void (*)(void))py_use_threads, METH_FASTCALL,
     "use_threads(GOMP_parallel, omp_get_thread_num, omp_get_num_threads, threads)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }

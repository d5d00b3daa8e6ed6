/* Sampled tokens on the CPU, a row of logits at a time: temperature, top-k and top-p as runtime/decode/sampling.py has them, and the noise of
 * `choose` in plugins/reference.py. The tests compare the two.
 *
 * Nothing is put in order: a row of fifty thousand logits is read twice or three times, and what may be kept is a few hundred of them.
 * A row's token does not depend on the rows beside it, nor on the machine: sums have a fixed order, and no product is joined with a sum
 * (-ffp-contract=off). Infinities and NaN mean what they are (no -ffast-math).
 *
 * Pointers arrive as integers (tensor.data_ptr()); the caller owns the memory and has checked shapes, types and lengths.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "../_processors.h"

#define BLOCK 64 /* columns that are looked at together */
#define LANES 16

/* Sixteen numbers, anywhere in memory: left to itself the compiler would take one at a time where the order of a sum is fixed. */
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
    float logit, weight; /* weight: e to the logit's distance from the largest, over the temperature */
    int32_t column;
} Candidate;

/* What one row needs, for the widest vocabulary so far. Kept between calls, of which there is one at a time: the interpreter is held. */
static struct {
    float *weight, *block_max;
    Candidate *candidate;
    long columns;
} room;

typedef struct {
    const float *logits;
    const int64_t *tokens; /* of the columns; NULL where a column is its token */
    long vocab;
    float temperature, top_p;
    long top_k;
    uint32_t key[2], position;
} Row;

INLINE Floats where(Ints mask, Floats a, Floats b) { return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask)); }

/* e to the x for x <= 0 within 2e-7 of it, and 0 below -80. The polynomial is that of Cephes. */
INLINE Floats exp_below(Floats x) {
    Ints is_least = x < -80.0f;
    x = where(is_least, x - x - 80.0f, x);
    Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounded to the nearest */
    Floats rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Floats sum = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    Floats value = sum * rest * rest + rest + 1.0f;
    Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
    return (Floats)((Ints)(value * (Floats)power) & ~is_least);
}

/* Philox4x32-10 (Salmon et al. 2011), of the counter (block, position, 0, 0). */
INLINE void philox(uint32_t block, uint32_t position, const uint32_t *key, uint32_t *w0, uint32_t *w1, uint32_t *w2,
                   uint32_t *w3) {
    uint32_t c0 = block, c1 = position, c2 = 0, c3 = 0, k0 = key[0], k1 = key[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0, n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = (uint32_t)b, c2 = n2, c3 = (uint32_t)a;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    *w0 = c0, *w1 = c1, *w2 = c2, *w3 = c3;
}

/* Noise of a token from its random word: Gumbel's distribution, by inversion. */
INLINE double gumbel(uint32_t word) { return -log(-log(((double)word + 0.5) * 0x1p-32)); }

/* At least that noise, cheaply. For u the uniform number it is -log(-log u) <= -log(1 - u); 1 - u is more than half of ~word in units of
 * 2^-31; and what a number's bits say, read as exponent and fraction, is at most its logarithm to base 2. 109.52 is 158 ln 2 and a little
 * for rounding. */
INLINE Floats gumbel_bounds(const uint32_t *word) {
    Ints half = (Ints)((~*(const Words *)word) >> 1);
    Ints bits = (Ints)__builtin_convertvector(half, Floats);
    return 109.52f - 0.69314718f * (__builtin_convertvector(bits, Floats) * 0x1p-23f);
}

INLINE uint32_t word_of(const Row *r, int64_t token) {
    uint32_t word[4];
    philox((uint32_t)(token >> 2), r->position, r->key, &word[0], &word[1], &word[2], &word[3]);
    return word[token & 3];
}

/* The number whose bits are these, those of a negative one turned round but for the sign. */
INLINE float float_of(int32_t ordered) {
    union {
        int32_t bits;
        float number;
    } value = {ordered ^ ((ordered >> 31) & 0x7fffffff)};
    return value.number;
}

INLINE int precedes(const Candidate *a, const Candidate *b) {
    return a->logit > b->logit || (a->logit == b->logit && a->column < b->column);
}

INLINE void swap(Candidate *a, Candidate *b) {
    Candidate held = *a;
    *a = *b, *b = held;
}

/* Puts the fewest of the most likely whose mass reaches the budget first, in any order; returns how many. A candidate's mass is its weight,
 * or 1 where they are counted. Quickselect: of equal logits the lower column comes first, so that no two are the same. */
static long keep(Candidate *c, long count, double budget, int counted) {
    long first = 0, last = count;
    double before = 0.0;
    while (last - first > 1) {
        long middle = first + (last - first) / 2, end = last - 1;
        if (precedes(&c[middle], &c[first])) swap(&c[middle], &c[first]);
        if (precedes(&c[end], &c[first])) swap(&c[end], &c[first]);
        if (precedes(&c[end], &c[middle])) swap(&c[end], &c[middle]);
        swap(&c[middle], &c[end]);
        double mass = before;
        long at = first;
        for (long i = first; i < end; i++) {
            if (!precedes(&c[i], &c[end])) continue;
            mass += counted ? 1.0 : c[i].weight;
            swap(&c[i], &c[at++]);
        }
        swap(&c[at], &c[end]);
        if (mass >= budget && at > first) {
            last = at;
            continue;
        }
        before = mass + (counted ? 1.0 : c[at].weight);
        first = at + 1;
        if (before >= budget) return first;
    }
    return last;
}

/* Sixteen logits of a row, as distances to the largest over the temperature; -inf where the row ends. */
INLINE Floats distances(const Row *r, float largest, long column) {
    Floats x;
    if (column + LANES <= r->vocab)
        x = *(const Floats *)(r->logits + column);
    else
        for (int l = 0; l < LANES; l++) x[l] = column + l < r->vocab ? r->logits[column + l] : -INFINITY;
    return (x - largest) / r->temperature;
}

/* The largest logit of each block, and of all; NaN if any is. In whole numbers that have the same order, and no rule for NaN. */
INLINE float find_largest(const Row *r, float *block_max) {
    int32_t largest = INT32_MIN, odd = 0;
    for (long start = 0, block = 0; start < r->vocab; start += BLOCK, block++) {
        long stop = start + BLOCK < r->vocab ? start + BLOCK : r->vocab;
        const int32_t *bits = (const int32_t *)r->logits;
        int32_t top = INT32_MIN;
        for (long i = start; i < stop; i++) {
            int32_t ordered = bits[i] ^ ((bits[i] >> 31) & 0x7fffffff);
            top = ordered > top ? ordered : top;
            odd |= (bits[i] & 0x7fffffff) > 0x7f800000;
        }
        block_max[block] = float_of(top);
        largest = top > largest ? top : largest;
    }
    return odd ? NAN : float_of(largest);
}

/* Weights of all columns; returns their sum. */
INLINE double weigh(const Row *r, float largest, float *weight) {
    double total = 0.0;
    for (long start = 0; start < r->vocab; start += BLOCK) {
        Floats sum = {0};
        for (long i = start; i < start + BLOCK; i += LANES) {
            Floats each = exp_below(distances(r, largest, i));
            *(Floats *)(weight + i) = each;
            sum += each;
        }
        for (int l = 0; l < LANES; l++) total += sum[l];
    }
    return total;
}

/* The candidates whose logit is at least `least`. */
static long collect(const Row *r, const float *block_max, float least, Candidate *c) {
    long count = 0;
    for (long start = 0, block = 0; start < r->vocab; start += BLOCK, block++) {
        if (block_max[block] < least) continue;
        long stop = start + BLOCK < r->vocab ? start + BLOCK : r->vocab;
        for (long i = start; i < stop; i++)
            if (r->logits[i] >= least) c[count++] = (Candidate){r->logits[i], 0.0f, (int32_t)i};
    }
    return count;
}

/* What top-k and top-p keep, as candidates; returns how many. */
MULTIVERSION
static long filter(const Row *r, float largest) {
    Candidate *c = room.candidate;
    long blocks = (r->vocab + BLOCK - 1) / BLOCK, count;
    if (r->top_k) {
        /* As many blocks as are to be kept have a logit of at least this, so the last one kept has too. */
        float least = -INFINITY;
        if (r->top_k <= blocks) {
            for (long i = 0; i < blocks; i++) c[i] = (Candidate){room.block_max[i], 0.0f, (int32_t)i};
            long best = keep(c, blocks, (double)r->top_k, 1);
            least = c[0].logit;
            for (long i = 1; i < best; i++) least = c[i].logit < least ? c[i].logit : least;
        }
        count = keep(c, collect(r, room.block_max, least, c), (double)r->top_k, 1);
        if (r->top_p >= 1.0f) return count;
        double total = 0.0;
        for (long i = 0; i < count; i++) {
            Floats distance = {(c[i].logit - largest) / r->temperature};
            c[i].weight = exp_below(distance)[0];
            total += c[i].weight;
        }
        return keep(c, count, r->top_p * total, 0);
    }
    /* All that weigh less than this together weigh less than what top-p leaves out: none of them is kept. */
    double total = weigh(r, largest, room.weight);
    double lightest = 0.5 * (1.0 - (double)r->top_p) * total / (double)r->vocab;
    float least = lightest > 1e-34 ? nextafterf(largest + r->temperature * (float)log(lightest), -INFINITY) : -INFINITY;
    count = collect(r, room.block_max, least, c);
    for (long i = 0; i < count; i++) c[i].weight = room.weight[c[i].column];
    return keep(c, count, r->top_p * total, 0);
}

/* Random words of a block of columns. */
INLINE void words_of_block(const Row *r, long start, uint32_t *word) {
    if (r->tokens) {
        for (int i = 0; i < BLOCK; i++) {
            uint32_t token = (uint32_t)r->tokens[start + i < r->vocab ? start + i : r->vocab - 1], w0, w1, w2, w3;
            philox(token >> 2, r->position, r->key, &w0, &w1, &w2, &w3);
            uint32_t low = token & 1 ? w1 : w0, high = token & 1 ? w3 : w2;
            word[i] = token & 2 ? high : low;
        }
        return;
    }
    for (int i = 0; i < BLOCK / 4; i++)
        philox((uint32_t)(start / 4 + i), r->position, r->key, &word[4 * i], &word[4 * i + 1], &word[4 * i + 2], &word[4 * i + 3]);
}

/* The column with the largest score among all. Few can have it: the others are told by a bound. */
MULTIVERSION
static long choose_of_all(const Row *r, float largest) {
    double best = -INFINITY;
    long chosen = -1;
    for (long start = 0; start < r->vocab; start += BLOCK) {
        uint32_t word[BLOCK];
        words_of_block(r, start, word);
        for (long i = start; i < start + BLOCK && i < r->vocab; i += LANES) {
            Floats distance = distances(r, largest, i), bound = distance + gumbel_bounds(word + i - start);
            float least = (float)best;
            int passes = 0;
            for (int l = 0; l < LANES; l++) passes |= bound[l] > least;
            for (int l = 0; passes && l < LANES; l++) {
                double score = distance[l] + gumbel(word[i - start + l]);
                if (score > best) best = score, chosen = i + l;
            }
        }
    }
    return chosen;
}

/* The same among candidates: of equal scores the lower column's. */
static long choose_of_kept(const Row *r, float largest, long count) {
    double best = -INFINITY;
    long chosen = -1;
    for (long i = 0; i < count; i++) {
        long column = room.candidate[i].column;
        float distance = (room.candidate[i].logit - largest) / r->temperature;
        double score = distance + gumbel(word_of(r, r->tokens ? r->tokens[column] : column));
        if (score > best || (score == best && column < chosen)) best = score, chosen = column;
    }
    return chosen;
}

/* The column that a row chooses; -1 where the logits are no distribution. */
MULTIVERSION
static long choose_column(const Row *r) {
    float largest = find_largest(r, room.block_max);
    if (!isfinite(largest)) return -1;
    if (r->temperature == 0.0f) {
        for (long block = 0;; block++) {
            if (room.block_max[block] != largest) continue;
            for (long i = block * BLOCK;; i++)
                if (r->logits[i] == largest) return i;
        }
    }
    int keeps_all = !r->top_k && r->top_p >= 1.0f;
    return keeps_all ? choose_of_all(r, largest) : choose_of_kept(r, largest, filter(r, largest));
}

typedef struct {
    double score; /* logit + temperature times noise, counted from the largest logit */
    int32_t column;
} Ranked;

#define MOST_RANKED 64

/* Puts a column where it belongs among the best so far; of equal scores the lower column is first. */
INLINE long insert(Ranked *best, long held, long count, double score, int32_t column) {
    long at = held < count ? held : count - 1;
    if (held == count && !(score > best[at].score || (score == best[at].score && column < best[at].column))) return held;
    for (; at > 0 && (score > best[at - 1].score || (score == best[at - 1].score && column < best[at - 1].column)); at--)
        best[at] = best[at - 1];
    best[at] = (Ranked){score, column};
    return held < count ? held + 1 : count;
}

/* The columns that a row chooses first, second and so on, and the share of e to the score that each has. What top-k and top-p leave out
 * counts without noise: another model may keep it. */
MULTIVERSION
static void rank_columns(const Row *r, long count, int32_t *out, float *share) {
    Ranked best[MOST_RANKED];
    long held = 0;
    double total = 0.0;
    float largest = find_largest(r, room.block_max);
    for (long k = 0; k < count; k++) out[k] = -1, share[k] = 0.0f;
    if (!isfinite(largest)) return;
    if (r->temperature == 0.0f) {
        Row plain = *r;
        plain.temperature = 1.0f;
        total = weigh(&plain, largest, room.weight);
        for (long start = 0, block = 0; start < r->vocab; start += BLOCK, block++) {
            if (held == count && !((double)room.block_max[block] - largest > best[held - 1].score)) continue;
            long stop = start + BLOCK < r->vocab ? start + BLOCK : r->vocab;
            for (long i = start; i < stop; i++)
                if (r->logits[i] > -INFINITY) held = insert(best, held, count, (double)r->logits[i] - largest, (int32_t)i);
        }
        for (long k = 0; k < held; k++) out[k] = best[k].column, share[k] = (float)(exp(best[k].score) / total);
        return;
    }
    int keeps_all = !r->top_k && r->top_p >= 1.0f;
    long kept = keeps_all ? r->vocab : filter(r, largest);
    if (!keeps_all) {
        Row plain = *r;
        plain.temperature = 1.0f;
        total = weigh(&plain, largest, room.weight);
    }
    for (long i = 0; i < kept; i++) {
        int32_t column = keeps_all ? (int32_t)i : room.candidate[i].column;
        float distance = (r->logits[column] - largest) / r->temperature;
        if (!(distance > -INFINITY)) continue;
        double score = distance + gumbel(word_of(r, r->tokens ? r->tokens[column] : column));
        held = insert(best, held, count, score, column);
        total += exp(score * r->temperature) - (keeps_all ? 0.0 : room.weight[column]);
    }
    for (long k = 0; k < held; k++) out[k] = best[k].column, share[k] = (float)(exp(best[k].score * r->temperature) / total);
}

static int make_room(long vocab) {
    vocab += BLOCK; /* the last block is written whole */
    if (vocab <= room.columns) return 0;
    long blocks = (vocab + BLOCK - 1) / BLOCK;
    free(room.weight), free(room.block_max), free(room.candidate);
    room.weight = malloc((size_t)vocab * sizeof(float));
    room.block_max = malloc((size_t)blocks * sizeof(float));
    room.candidate = malloc((size_t)vocab * sizeof(Candidate));
    room.columns = room.weight && room.block_max && room.candidate ? vocab : 0;
    return room.columns ? 0 : -1;
}

/* Where the settings of a call's rows lie. */
typedef struct {
    unsigned long long logits, tokens, temperature, top_k, top_p, seed, position;
} Settings;

INLINE Row row_of(const Settings *s, long vocab, long m) {
    uint64_t key = ((uint64_t *)s->seed)[m];
    int64_t kept = ((int64_t *)s->top_k)[m];
    return (Row){
        .logits = (float *)s->logits + m * vocab,
        .tokens = (int64_t *)s->tokens,
        .vocab = vocab,
        .temperature = ((float *)s->temperature)[m],
        .top_p = ((float *)s->top_p)[m],
        .top_k = kept < vocab ? kept : 0,
        .key = {(uint32_t)key, (uint32_t)(key >> 32)},
        .position = (uint32_t)((int64_t *)s->position)[m],
    };
}

static PyObject *py_choose(PyObject *self, PyObject *args) {
    Settings s;
    unsigned long long out;
    long rows, vocab;
    if (!PyArg_ParseTuple(args, "KKKKKKKKll", &s.logits, &s.tokens, &s.temperature, &s.top_k, &s.top_p, &s.seed, &s.position, &out,
                          &rows, &vocab))
        return NULL;
    if (make_room(vocab)) return PyErr_NoMemory();
    for (long m = 0; m < rows; m++) {
        Row row = row_of(&s, vocab, m);
        ((int32_t *)out)[m] = (int32_t)choose_column(&row);
    }
    Py_RETURN_NONE;
}

static PyObject *py_rank(PyObject *self, PyObject *args) {
    Settings s;
    unsigned long long out, share;
    long rows, vocab, count;
    if (!PyArg_ParseTuple(args, "KKKKKKKKKlll", &s.logits, &s.tokens, &s.temperature, &s.top_k, &s.top_p, &s.seed, &s.position, &out,
                          &share, &rows, &vocab, &count))
        return NULL;
    if (count < 1 || count > MOST_RANKED) return PyErr_Format(PyExc_ValueError, "1 to %d columns can be ranked", MOST_RANKED);
    if (make_room(vocab)) return PyErr_NoMemory();
    for (long m = 0; m < rows; m++) {
        Row row = row_of(&s, vocab, m);
        rank_columns(&row, count, (int32_t *)out + m * count, (float *)share + m * count);
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"choose", py_choose, METH_VARARGS,
     "choose(logits, tokens, temperature, top_k, top_p, seed, position, out, rows, vocab): fp32 [rows, vocab], int64 [vocab] or 0, fp32, "
     "int64, fp32, int64, int64, int32 [rows]"},
    {"rank", py_rank, METH_VARARGS,
     "rank(logits, tokens, temperature, top_k, top_p, seed, position, out, share, rows, vocab, count): as choose, int32 and fp32 [rows, "
     "count]"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sampling", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__sampling(void) { return PyModule_Create(&module); }

/* A decoder's step for few tokens, as five kernels a layer: norm and QKV | attention | O and residual | norm, gate, up and
 * SiLU | down and residual. They are captured in CUDA graphs and follow one another by programmatic dependent launch: each
 * has its weights on the way before it waits for the kernel before it.
 *
 * What they compute is defined in PyTorch by `Decoder` and `Draft` of ssv.model; `ssv.runtime.engines.cuda` drives them.
 *
 * Every token is computed by itself, in an order that depends neither on the tokens beside it nor on where its keys lie: its
 * logits are the same bits alone, in a chain, in a tree and beside other rows. So the sums of a product are split by its width
 * alone, and those of attention by logical position; and products are fused with sums only where it says `fmaf`.
 *
 * Weights are bf16, FP8 (E4M3) or INT4, packed as A fragments of mma.m16n8k16 (`ssv.runtime.engines.cuda.packing`): tokens are
 * its columns. The narrow ones become bf16 in registers, which holds all of their values, and their scales are multiplied with
 * sums, in fp32. Residuals, queries and logits are fp32; what goes into a product is bf16.
 *
 * Compiled in parts: with TILES the products of steps of up to 8 * TILES tokens, for one format of weights: BITS, AHEAD, and
 * GROUP_PAIRS of INT4, and for blocks of up to THREADS threads, BLOCKS of them on a multiprocessor, with SEVERAL tiles of channels
 * or one, CHANNELS of them multiplied at once, and with or without tokens that it HOLDS in shared memory; without it the other
 * kernels, for one model's shape: HEAD_DIM, GROUP (query heads of a key/value head), QK_NORM (0 or 1).
 */
#ifdef TILES
/* --- products --------------------------------------------------------------------------------------------------------- */

/* Pairs of the other operand: as many as registers hold. */
#define AT_ONCE (TILES * CHANNELS > 4 ? 1 : TILES * CHANNELS > 2 && THREADS * BLOCKS > 384 ? 2 : 4)

/* What a warp has on the way: AHEAD pairs. Where all of them are its own nothing is compared, since a step of INT4 is bound by
 * instructions before it is by memory. */
struct Ahead {
    uint4 a[PIECES(AHEAD)];
#if BITS == 4
    float2 scale[AHEAD / GROUP_PAIRS];
#endif

    /* From pair `at` on; `weight` is that of pair `first`. */
    __device__ __forceinline__ void load(const uint4 *weight, const float2 *scales, int first, int at, int last) {
        weight += PIECES(at - first) * 32;
        if (at + AHEAD <= last) {
#pragma unroll
            for (int i = 0; i < PIECES(AHEAD); i++) a[i] = load_weights(weight + i * 32);
        } else {
#pragma unroll
            for (int i = 0; i < PIECES(AHEAD); i++) a[i] = at + PAIR_OF(i) < last ? load_weights(weight + i * 32) : make_uint4(0, 0, 0, 0);
        }
#if BITS == 4
        scales += at / GROUP_PAIRS * 8;
#pragma unroll
        for (int i = 0; i < AHEAD / GROUP_PAIRS; i++)
            scale[i] = at + i * GROUP_PAIRS < last ? load_scales(scales + i * 8) : make_float2(0.0f, 0.0f);
#endif
    }

    /* Adds the products of AT_ONCE of them, from `part` on. */
    __device__ __forceinline__ void multiply_by(float (&c)[TILES][4], const uint4 (&b)[AT_ONCE][TILES], int part) const {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const uint4 one = fragment(a, part + i, 0), other = fragment(a, part + i, 1);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
#if BITS == 4
                float sum[4] = {};
                multiply(sum, one, b[i][t].x, b[i][t].y);
                multiply(sum, other, b[i][t].z, b[i][t].w);
                const float2 by = scale[(part + i) / GROUP_PAIRS];
                add_scaled(c[t], sum, by);
#else
                multiply(c[t], one, b[i][t].x, b[i][t].y);
                multiply(c[t], other, b[i][t].z, b[i][t].w);
#endif
            }
        }
    }
};

/* The other operand of AT_ONCE pairs; `held`: those that `hold_tokens` has put there. */
__device__ __forceinline__ void load_tokens(uint4 (&b)[AT_ONCE][TILES], const uint4 *const (&x)[TILES], const uint4 *held, int at, int last) {
    if (HOLDS) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++) b[i][t] = at + i < last ? held[((at + i) * TILES + t) * 32] : make_uint4(0, 0, 0, 0);
    } else if (at + AT_ONCE <= last) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++) b[i][t] = x[t][(at + i) * 4];
    } else {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++) b[i][t] = at + i < last ? x[t][(at + i) * 4] : make_uint4(0, 0, 0, 0);
    }
}

/* Every lane puts there what it will read itself. */
__device__ __forceinline__ void hold_tokens(uint4 *held, const uint4 *const (&x)[TILES], int first, int last) {
#pragma unroll 2
    for (int at = first; at < last; at++)
#pragma unroll
        for (int t = 0; t < TILES; t++) held[(at * TILES + t) * 32] = x[t][at * 4];
}

/* One block computes TILE channels of up to 8 * TILES tokens, those from 8 * TILES * blockIdx.x on (blocks of the same channels are
 * side by side, so that weights are read from memory once). Then it computes others, of which the first weights are on their way
 * before it ends with those before; the sums of `together` tiles are added up at once, each by another warp. CHANNELS of these are
 * multiplied with the same registers of tokens, which are what a step of many tokens reads most of. Its warps share K:
 * `share` pairs each, which K alone decides, and their sums are added in their order. What the epilogue needs is on its way before
 * the products are there. */
template <int KIND>
__device__ __forceinline__ void linear(const Linear &p) {
    extern __shared__ float4 shared[]; /* [1, or 2 by turns if blocks have several][together][warps][TILES][32]; held: [pairs][TILES][32] */
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const int first = warp * p.share, last = min(first + p.share, p.pairs), active = (p.pairs + p.share - 1) / p.share;
    release_next();
    const uint4 *weight = p.weight + ((size_t)blockIdx.y * PIECES(p.pairs) + PIECES(first)) * 32 + lane;
    const size_t stride = (size_t)gridDim.y * PIECES(p.pairs) * 32;
    Ahead ahead[CHANNELS];
#if BITS == 4
    const float2 *scales = (const float2 *)p.scale + (size_t)blockIdx.y * p.groups * 8 + g;
    const size_t scales_stride = (size_t)gridDim.y * p.groups * 8;
#else
    const float2 *scales = nullptr;
    const size_t scales_stride = 0;
#endif
    /* Of tile `of` and of those beside it; where there is none, `of` again, whose sums nobody reads. */
    const auto load_ahead = [&](int of, int at) {
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
            const size_t to = of + j * gridDim.y < p.tiles ? j : 0;
            ahead[j].load(weight + to * stride, scales + to * scales_stride, first, at, last);
        }
    };
    load_ahead(blockIdx.y, first);
    /* The numbers of a step and what belongs to the model are there before the graph begins. */
    const int num = p.step[p.gathered ? NUM_GATHERED : NUM_TOKENS];
    const int begin = blockIdx.x * 8 * TILES;
    const int which = begin + warp % TILES * 8, behind = warp / TILES; /* tokens that it finishes, and of which of the tiles */
    if (begin >= num) return;
    const bool may_finish = behind < (SEVERAL ? p.together : 1) && which < num;
    const uint4 *x[TILES]; /* where the tokens begin; behind the last the first, whose columns nobody reads */
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int m = begin + t * 8 + g < num ? begin + t * 8 + g : begin;
        x[t] = (const uint4 *)p.x + (size_t)(p.gathered ? p.step[GATHER + m] : m) * 4 * p.pairs + q;
    }
    float squares[2] = {}, factor[2] = {1.0f, 1.0f};
    float4 *sums = shared;
    uint4 *held = HOLDS ? (uint4 *)(shared + 2 * p.together * active * TILES * 32) + lane : nullptr;
    for (int next = blockIdx.y;;) {
        const bool is_first = !SEVERAL || next == blockIdx.y;
        const int tile = next + (SEVERAL ? behind * gridDim.y : 0);
        const bool finishes = may_finish && tile < p.tiles;
        Finish<KIND> its;
        if (finishes) its.load(p, tile, g);
        if (is_first) wait_for_previous();
        if (HOLDS && is_first) hold_tokens(held, x, first, last);

        uint4 b[AT_ONCE][TILES];
        load_tokens(b, x, held, first, last);
        float2 residual[2] = {};
        if (finishes)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int m = which + 2 * q + i;
                if (m >= num) continue;
                residual[i] = its.residual_of(p, tile, g, m);
                if (p.squares && is_first) squares[i] = some_squares(p, p.gathered ? p.step[GATHER + m] : m, g);
            }
        for (int s = 0, of = next;;) {
            const int then = of + CHANNELS * gridDim.y;
            const bool is_last = !SEVERAL || then >= p.tiles;
            if (s) load_tokens(b, x, held, first, last);
            float c[CHANNELS][TILES][4] = {};
            for (int base = first; base < last; base += AHEAD) {
#pragma unroll
                for (int part = 0; part < AHEAD; part += AT_ONCE) {
                    if (part || base > first) load_tokens(b, x, held, base + part, last);
#pragma unroll
                    for (int j = 0; j < CHANNELS; j++) ahead[j].multiply_by(c[j], b, part);
                }
                int at = base + AHEAD, its = of;
                if (at >= last) /* of the next tiles */
                    at = is_last ? last : first, its = then, weight += CHANNELS * stride, scales += CHANNELS * scales_stride;
                load_ahead(its, at);
            }
            if (warp < active)
#pragma unroll
                for (int j = 0; j < CHANNELS; j++)
#pragma unroll
                    for (int t = 0; t < TILES; t++)
                        sums[(((s + j) * active + warp) * TILES + t) * 32 + lane] = make_float4(c[j][t][0], c[j][t][1], c[j][t][2], c[j][t][3]);
            if (!SEVERAL || (s += CHANNELS) == p.together || (of = then) >= p.tiles) break;
        }
        __syncthreads();
        if (finishes) {
            float s[4] = {};
            for (int w = 0; w < active; w++) {
                const float4 part = sums[((behind * active + w) * TILES + warp % TILES) * 32 + lane];
                s[0] += part.x, s[1] += part.y, s[2] += part.z, s[3] += part.w;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int m = which + 2 * q + i;
                if (p.squares && is_first) factor[i] = factor_of(p, squares[i]);
                its.put(p, tile, g, m, m < num, i, s, residual[i], factor[i]);
            }
        }
        /* Who is still adding these up is waited for at the next barrier, before they are written again. */
        if (!SEVERAL || (next += p.together * gridDim.y) >= p.tiles) break;
        sums = sums == shared ? shared + p.together * active * TILES * 32 : shared;
    }
    if (KIND == STORE && p.from && !blockIdx.x)
        for (int m = blockIdx.y; m < num; m += gridDim.y) {
            const float *from = p.from + (size_t)p.step[GATHER + m] * p.pairs * 32;
            for (int i = threadIdx.x; i < p.pairs * 32; i += blockDim.x) p.copied[(size_t)m * p.pairs * 32 + i] = from[i];
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) store(const Linear p) { linear<STORE>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) add(const Linear p) { linear<ADD>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gate(const Linear p) { linear<GATE>(p); }

#else
/* --- what goes into the first layer --------------------------------------------------------------------------------- */

struct Embed {
    const int *step;
    const u16 *table;  /* [V, H] */
    const float *norm; /* [H], of the first layer */
    float *x;          /* [TOKENS, H] residuals */
    u16 *scaled;       /* [TOKENS, H] x * norm, still to be divided by the root mean square */
    float *squares;    /* [TOKENS, H / TILE] sums of squares of x */
    int hidden;
};

extern "C" __global__ void embed(const Embed p) {
    const int m = blockIdx.x;
    release_next();
    wait_for_previous();
    if (m >= p.step[NUM_TOKENS]) return;
    const u16 *row = p.table + (size_t)p.step[ID + m] * p.hidden;
    for (int tile = threadIdx.x; tile < p.hidden / TILE; tile += blockDim.x) {
        float sum = 0.0f;
        for (int i = tile * TILE; i < (tile + 1) * TILE; i++) {
            float value = widen(row[i]);
            p.x[m * p.hidden + i] = value;
            p.scaled[m * p.hidden + i] = round_one(value * p.norm[i]);
            sum = fmaf(value, value, sum);
        }
        p.squares[m * (p.hidden / TILE) + tile] = sum;
    }
}

struct Join {
    const int *step;
    const u16 *table;      /* [V, H] */
    const float *features; /* [TOKENS, H] */
    const float *embed_norm, *feature_norm;
    float *x;    /* [TOKENS, H]: the features, to which the product is added */
    u16 *joined; /* [TOKENS, 2 * H] */
    int hidden;
    float eps;
};

#define QUADS 5 /* of numbers that a lane loads at once */

/* What a conditioned draft's join multiplies: norm(embedding) beside norm(features), by all lanes of a warp. */
__device__ __forceinline__ void join_token(const u16 *embedded, const float *features, const float *embed_norm, const float *feature_norm, float *x,
                                           u16 *joined, int hidden, float eps) {
    const int lane = threadIdx.x & 31, quads = hidden / 4;
    float of_embedded = 0.0f, of_features = 0.0f;
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
        float squares[2] = {};
#pragma unroll 1
        for (int base = lane; base < quads; base += 32 * QUADS) {
            uint2 e[QUADS];
            float4 f[QUADS];
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                const int at = base + 32 * i < quads ? base + 32 * i : base;
                e[i] = ((const uint2 *)embedded)[at], f[i] = ((const float4 *)features)[at];
            }
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                const int at = base + 32 * i;
                if (at >= quads) break;
                const float one[4] = {low(e[i].x), high(e[i].x), low(e[i].y), high(e[i].y)}, other[4] = {f[i].x, f[i].y, f[i].z, f[i].w};
                if (!pass) {
#pragma unroll
                    for (int k = 0; k < 4; k++) squares[0] = fmaf(one[k], one[k], squares[0]), squares[1] = fmaf(other[k], other[k], squares[1]);
                    continue;
                }
                const float4 n = ((const float4 *)embed_norm)[at], m = ((const float4 *)feature_norm)[at];
                ((uint2 *)joined)[at] = make_uint2(round_pair(one[0] * of_embedded * n.x, one[1] * of_embedded * n.y),
                                                   round_pair(one[2] * of_embedded * n.z, one[3] * of_embedded * n.w));
                ((uint2 *)(joined + hidden))[at] = make_uint2(round_pair(other[0] * of_features * m.x, other[1] * of_features * m.y),
                                                              round_pair(other[2] * of_features * m.z, other[3] * of_features * m.w));
                ((float4 *)x)[at] = f[i];
            }
        }
        if (pass) return;
        of_embedded = rsqrtf(__fdividef(sum_of_warp(squares[0]), (float)hidden) + eps);
        of_features = rsqrtf(__fdividef(sum_of_warp(squares[1]), (float)hidden) + eps);
    }
}

/* A warp a token. */
extern "C" __global__ void __launch_bounds__(32) join(const Join p) {
    const size_t m = blockIdx.x;
    release_next();
    wait_for_previous();
    if (m >= p.step[NUM_TOKENS]) return;
    join_token(p.table + (size_t)p.step[ID + m] * p.hidden, p.features + m * p.hidden, p.embed_norm, p.feature_norm, p.x + m * p.hidden,
               p.joined + 2 * m * p.hidden, p.hidden, p.eps);
}

/* --- the likeliest token --------------------------------------------------------------------------------------------- */

struct Largest {
    const int *step;
    const float *logits;     /* [rows, V] */
    const long long *tokens; /* [V], of the columns; NULL: their numbers */
    long long *token;        /* [rows]: of the largest logit, the first of equals; -1 beside NaN or where none is finite */
    int vocab;
};

/* One block of 1,024 threads a row. */
extern "C" __global__ void __launch_bounds__(1024) largest(const Largest p) {
    __shared__ float values[32];
    __shared__ int columns[32];
    const int r = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    release_next();
    wait_for_previous();
    if (r >= p.step[NUM_GATHERED]) return;
    const float *row = p.logits + (size_t)r * p.vocab;
    float most = -1.0f / 0.0f;
    int column = p.vocab;
    bool is_number = true;
#define TAKE(value, at)                                                                                                  \
    is_number &= (value) == (value);                                                                                     \
    if ((value) > most) most = (value), column = (at);
    if (p.vocab % 4 == 0) {
#pragma unroll 4
        for (int i = threadIdx.x; i < p.vocab / 4; i += 1024) {
            const float4 four = ((const float4 *)row)[i];
            TAKE(four.x, 4 * i)
            TAKE(four.y, 4 * i + 1)
            TAKE(four.z, 4 * i + 2)
            TAKE(four.w, 4 * i + 3)
        }
    } else {
        for (int i = threadIdx.x; i < p.vocab; i += 1024) {
            const float value = row[i];
            TAKE(value, i)
        }
    }
    is_number = __syncthreads_and(is_number);
    largest_of_warp(most, column);
    if (!lane) values[warp] = most, columns[warp] = column;
    __syncthreads();
    most = values[lane], column = columns[lane];
    largest_of_warp(most, column);
    if (!threadIdx.x) p.token[r] = !is_number || column >= p.vocab || most > 3.0e38f ? -1 : p.tokens ? p.tokens[column] : column;
}

/* --- trees ------------------------------------------------------------------------------------------------------------ */

#define MOST_CHILDREN 16 /* of a node, and most nodes of a level that get children */
#define MOST_LEVELS 16

#define SLICES 32 /* of a row's columns: a block each, and a lane of the warp that joins them */
#define SIFTERS 4 /* warps of a block */

struct Sift {
    const int *step;
    const float *logits; /* [rows, V] */
    float *value;        /* [rows, MOST_CHILDREN, SLICES] the largest logits of each slice, the first of equals first */
    int *column;         /* the same of their columns; V: there are no more */
    float *sums;         /* [rows, 2, SLICES] of the others' e^d and d e^d, d being how far they are below the slice's largest */
    int vocab, count;
};

#define FARTHEST 1.0e4f /* logits count as at most so far below */

/* Joins what the lanes of a warp know of parts of a row: the largest logit and its column of each (V: it has none), and the others'
 * sums. All lanes learn the sums of all but the largest of the row, `most` in column `at`. */
__device__ __forceinline__ void join_sums(float top, int column, float &others, float &dot, float most, int at, int vocab) {
    const float below = fmaxf(top - most, -FARTHEST), factor = __expf(below);
    const float left = others + (column < vocab && column != at ? 1.0f : 0.0f); /* the largest of other parts is not left out */
    dot = sum_of_warp(factor * fmaf(below, left, dot)), others = sum_of_warp(factor * left);
}

/* Calls f(value, column) for a thread's columns of a slice; what is behind the last counts as the lowest. */
template <typename F>
__device__ __forceinline__ void sift_each(const float *row, int first, int last, F f) {
#pragma unroll 1
    for (int i = first; i < last; i += 128 * SIFTERS) {
        float value[4];
#pragma unroll
        for (int u = 0; u < 4; u++) value[u] = i + u < last ? row[i + u] : -1.0f / 0.0f;
#pragma unroll
        for (int u = 0; u < 4; u++) f(value[u], i + u);
    }
}

/* A slice of a row. A warp sifts a part of its columns, of which each thread has the best that is not taken yet. */
extern "C" __global__ void __launch_bounds__(32 * SIFTERS) sift(const Sift p) {
    __shared__ float values[SIFTERS * MOST_CHILDREN], others[SIFTERS], dots[SIFTERS];
    __shared__ int columns[SIFTERS * MOST_CHILDREN];
    const int slice = blockIdx.x, r = blockIdx.y, t = threadIdx.x, warp = t >> 5, lane = t & 31;
    const float lowest = -1.0f / 0.0f;
    release_next();
    if (r >= p.step[NUM_GATHERED]) return;
    const int size = ((p.vocab + SLICES - 1) / SLICES + 3) & ~3, first = slice * size + 4 * t, last = min((slice + 1) * size, p.vocab);
    const float *row = p.logits + (size_t)r * p.vocab;
    wait_for_previous();
    float own = lowest;
    int column = p.vocab;
    sift_each(row, first, last, [&](float value, int i) {
        if (value > own) own = value, column = i;
    });
    float other = 0.0f, dot = 0.0f;
#pragma unroll 1
    for (int k = 0; k < p.count; k++) {
        float most = own;
        int at = column;
        largest_of_warp(most, at);
        if (!lane) values[warp * p.count + k] = most, columns[warp * p.count + k] = at;
        if (!k)
            sift_each(row, first, last, [&](float value, int i) {
                const float below = fmaxf(value - most, -FARTHEST), part = i == at ? 0.0f : __expf(below);
                other += value == value ? part : value, dot = fmaf(below, part, dot);
            });
        if (at == column && at < p.vocab) { /* its next best: smaller, or the same and behind it */
            own = lowest, column = p.vocab;
            sift_each(row, first, last, [&](float value, int i) {
                if ((value < most || (value == most && i > at)) && value > own) own = value, column = i;
            });
        }
    }
    other = sum_of_warp(other), dot = sum_of_warp(dot);
    if (!lane) others[warp] = other, dots[warp] = dot;
    __syncthreads();
    if (t < SIFTERS * p.count) {
        const float value = values[t];
        int place = 0;
#pragma unroll 1
        for (int u = 0; u < SIFTERS * p.count; u++)
            place += values[u] > value || (values[u] == value && (columns[u] < columns[t] || (columns[u] == columns[t] && u < t)));
        if (place < p.count) {
            const size_t to = ((size_t)r * MOST_CHILDREN + place) * SLICES + slice;
            p.value[to] = value, p.column[to] = columns[t];
        }
    }
    if (warp) return;
    const float top = lane < SIFTERS ? values[lane * p.count] : lowest;
    const int of = lane < SIFTERS ? columns[lane * p.count] : p.vocab;
    float most = top;
    int at = of;
    largest_of_warp(most, at);
    other = lane < SIFTERS ? others[lane] : 0.0f, dot = lane < SIFTERS ? dots[lane] : 0.0f;
    join_sums(top, of, other, dot, most, at, p.vocab);
    if (!lane) p.sums[(size_t)r * 2 * SLICES + slice] = other, p.sums[((size_t)r * 2 + 1) * SLICES + slice] = dot;
}

/* What a warp knows of a sifted row. */
struct Sifted {
    float value; /* lane k: the k-th largest logit */
    int column;  /* and its column */
    float top, others, dot; /* the largest, and of all others the sums of e^d and d e^d; NaN where there is no distribution */
};

/* Joins the slices of row r; `values` and `columns` are shared memory for a warp's [MOST_CHILDREN, SLICES]. */
__device__ __forceinline__ Sifted join_slices(const float *value, const int *column, const float *sums, int r, int count, int vocab, float *values,
                                              int *columns) {
    const int lane = threadIdx.x & 31;
    const size_t from = (size_t)r * MOST_CHILDREN * SLICES;
#pragma unroll 4
    for (int i = lane; i < MOST_CHILDREN * SLICES; i += 32)
        if (i < count * SLICES) values[i] = value[from + i], columns[i] = column[from + i];
    Sifted row = {};
    row.others = sums[(size_t)r * 2 * SLICES + lane], row.dot = sums[((size_t)r * 2 + 1) * SLICES + lane];
    __syncwarp();
    float own = values[lane];
    int at = columns[lane];
    const float first = own;
    const int of = at;
#pragma unroll 1
    for (int k = 0, next = 0; k < count; k++) {
        float most = own;
        int which = at;
        largest_of_warp(most, which);
        if (lane == k) row.value = most, row.column = which;
        if (!k) {
            row.top = most;
            join_sums(first, of, row.others, row.dot, most, which, vocab);
            if (!(fabsf(most) < 2.0e38f)) row.others = __int_as_float(0x7fffffff);
        }
        if (at == which && at < vocab) { /* what this slice has next */
            next++;
            own = next < count ? values[next * SLICES + lane] : -1.0f / 0.0f, at = next < count ? columns[next * SLICES + lane] : vocab;
        }
    }
    return row;
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

/* What the scorer reads of a row of logits. */
struct Confidence {
    float top, second, others, dot; /* the two largest; sums of e^d and d e^d of all but the largest, d being how far they are below it */
};

/* The scorer's weights times the normed hidden state, all lanes of a warp. */
__device__ __forceinline__ float hidden_part(const float *hidden, const float *weight, int hidden_size) {
    float squares = 0.0f, dot = 0.0f;
#pragma unroll 6
    for (int i = threadIdx.x & 31; i < hidden_size; i += 32) squares = fmaf(hidden[i], hidden[i], squares), dot = fmaf(hidden[i], weight[i], dot);
    squares = sum_of_warp(squares);
    return sum_of_warp(dot) * rsqrtf(__fdividef(squares, (float)hidden_size) + 1.0e-6f);
}

/* The scorer's r of a row: see `score` of ssv.plugins.reference. `weight` and `bias` are those of its confidence. */
__device__ __forceinline__ float risk_of(const Confidence &row, float of_hidden, const float *weight, float bias) {
    const float total = 1.0f + row.others;
    const float rest = __logf(fmaxf(__fdividef(row.others, total), 1.0e-7f)), entropy = __logf(total) - __fdividef(row.dot, total);
    const float margin = fminf(row.top - row.second, FARTHEST);
    const float sum = of_hidden + bias + weight[0] * rest + weight[1] * entropy + weight[2] * margin;
    return sigmoid(sum);
}

struct Judge {
    const int *step;
    const float *value; /* see Sift */
    const int *column;
    const float *sums, *hidden, *weight, *bias; /* hidden: [rows, H] of those that were gathered; weight, bias: the scorer's */
    float *risk;        /* [rows] that the target rejects the first guess */
    int vocab, hidden_size, uses_hidden;
};

/* A warp a row. */
extern "C" __global__ void __launch_bounds__(32) judge(const Judge p) {
    __shared__ float values[MOST_CHILDREN * SLICES];
    __shared__ int columns[MOST_CHILDREN * SLICES];
    const int r = blockIdx.x;
    release_next();
    if (r >= p.step[NUM_GATHERED]) return;
    wait_for_previous();
    const Sifted row = join_slices(p.value, p.column, p.sums, r, 2, p.vocab, values, columns);
    const float of_hidden = p.uses_hidden ? hidden_part(p.hidden + (size_t)r * p.hidden_size, p.weight, p.hidden_size) : 0.0f;
    const float second = __shfl_sync(~0u, row.value, 1);
    const float *weight = p.weight + (p.uses_hidden ? p.hidden_size : 0);
    if (!threadIdx.x) p.risk[r] = risk_of({row.top, second, row.others, row.dot}, of_hidden, weight, *p.bias);
}

struct Grow {
    int *step;
    const float *value;  /* see Sift */
    const int *column;
    const float *sums;
    const long long *tokens; /* [V], of the columns; NULL: their numbers */
    const float *extra;      /* [rows] that the softmax has below its line besides; NULL: nothing */
    const float *weight, *bias; /* the scorer's; NULL: the risk of a guess is what its share leaves */
    const float *hidden; /* [rows, H] of those that were gathered */
    const u16 *table;    /* [V, H] embeddings; NULL: the draft has no features, and embeds its tokens itself */
    const float *embed_norm, *feature_norm;
    float *x;            /* [TOKENS, H] of the level that comes: see Join */
    u16 *joined;         /* [TOKENS, 2 * H] */
    const float *corrections; /* [2, MOST_CHILDREN, 2] offset and slope of log odds, by rank; of greedy rows, of others */
    const int *settings;      /* [rows of the cache, S_SIZE]; NULL: all rows are greedy */
    int *found;               /* [growing rows, most_found, 4]: token, parent, share, risk */
    float *survival;          /* [growing rows, MOST_CHILDREN] of the nodes that were run */
    int *candidate;           /* [growing rows, MOST_CHILDREN] which candidates they are */
    int *path;                /* [growing rows, MOST_CHILDREN, MOST_LEVELS] their slots */
    int vocab, hidden_size, uses_hidden, beam, children, most_found;
    float eps;
};

/* How many nodes of a level get children; of level 0 it is the root. */
__device__ __forceinline__ int opened(int level, int beam, int children) {
    int count = 1;
#pragma unroll 1
    for (int i = 0; i < level; i++) count = min(beam, count * children);
    return count;
}

/* Takes the guesses of a level as candidates and makes the step of the next: those that survive most probably, each behind its
 * ancestors. One block of 256 threads a growing row, whose g-th has row g of level 0 and `opened` rows of the others.
 *
 * A level waits for it, mostly while its code is fetched: short code is what is fast here. */
extern "C" __global__ void __launch_bounds__(256) grow(const Grow p) {
    __shared__ float survival[256], values[8][MOST_CHILDREN * SLICES], shares[MOST_CHILDREN][MOST_CHILDREN], of_hidden[MOST_CHILDREN];
    __shared__ int before[MOST_CHILDREN][MOST_LEVELS], columns[8][MOST_CHILDREN * SLICES], guesses[MOST_CHILDREN][MOST_CHILDREN];
    __shared__ int chosen_from[MOST_CHILDREN], chosen_token[MOST_CHILDREN];
    __shared__ Confidence confidences[MOST_CHILDREN];
    const int g = blockIdx.x, t = threadIdx.x, lane = t & 31;
    release_next();
    /* Left by the levels before, or by those who began the tree. */
    const int num_growing = p.step[NUM_GROWING];
    if (g >= num_growing) return;
    const int level = min(p.step[GROW_LEVEL + g], MOST_LEVELS - 1), end = p.step[GROW_END + g], found = p.step[GROW_FOUND + g];
    const int start = p.step[GROW_START + g], cache_row = p.step[GROW_ROW + g];
    const int open = opened(level, p.beam, p.children), next = min(p.beam, open * p.children), num = open * p.children;
    if (t < open * MOST_LEVELS) before[t / MOST_LEVELS][t % MOST_LEVELS] = p.path[g * MOST_CHILDREN * MOST_LEVELS + t];
    /* The scorer does not see the noise of a row that samples: there the draft's shares stand. */
    const bool samples = p.settings && p.settings[cache_row * S_SIZE + S_TEMPERATURE], scores = p.weight && !samples;
    const int from = t / p.children, rank = t % p.children;
    float above = 1.0f, offset = 0.0f, slope = 1.0f, weight[3] = {}, bias = 0.0f;
    int parent = -1;
    if (t < num) {
        if (level) above = p.survival[g * MOST_CHILDREN + from], parent = p.candidate[g * MOST_CHILDREN + from];
        const float *correction = p.corrections + 2 * (samples * MOST_CHILDREN + rank);
        offset = correction[0], slope = correction[1];
        if (scores) {
            bias = *p.bias;
            for (int i = 0; i < 3; i++) weight[i] = p.weight[(p.uses_hidden ? p.hidden_size : 0) + i];
        }
    }
    wait_for_previous();
    /* A warp reads a row's guesses, another one its hidden state. */
#pragma unroll 1
    for (int i = t >> 5; i < open * (1 + scores); i += 8) {
        if (i >= open) {
            const float part = p.uses_hidden ? hidden_part(p.hidden + (size_t)(g * open + i - open) * p.hidden_size, p.weight, p.hidden_size) : 0.0f;
            if (!lane) of_hidden[i - open] = part;
            continue;
        }
        const int r = g * open + i;
        const Sifted row = join_slices(p.value, p.column, p.sums, r, max(p.children, 2), p.vocab, values[t >> 5], columns[t >> 5]);
        const float total = 1.0f + row.others + (p.extra ? p.extra[r] * __expf(-row.top) : 0.0f);
        const float second = __shfl_sync(~0u, row.value, 1);
        if (lane < p.children) {
            const bool is_there = row.column < p.vocab;
            guesses[i][lane] = !is_there ? -1 : p.tokens ? (int)p.tokens[row.column] : row.column;
            shares[i][lane] = is_there ? __fdividef(__expf(row.value - row.top), total) : 0.0f;
        }
        if (!lane) confidences[i] = {row.top, second, row.others, row.dot};
        __syncwarp();
    }
    __syncthreads();
    int token = -1;
    float own = -1.0f;
    if (t < num) {
        token = guesses[from][rank];
        const float first = shares[from][0];
        const float risk = scores ? risk_of(confidences[from], of_hidden[from], weight, bias) : 1.0f - first;
        const float left = __fdividef(risk, fmaxf(1.0f - first, 1.0e-6f));
        const float said = fminf(fmaxf(rank ? shares[from][rank] * left : 1.0f - risk, 1.0e-4f), 1.0f - 1.0e-4f);
        const float corrected = sigmoid(fmaf(slope, __logf(__fdividef(said, 1.0f - said)), offset));
        own = token < 0 ? 0.0f : above * corrected;
        const float told = !rank && scores ? risk : 1.0f - corrected;
        ((int4 *)p.found)[(size_t)g * p.most_found + found + t] = make_int4(token, parent, __float_as_int(corrected), __float_as_int(told));
    }
    survival[t] = own;
    __syncthreads();
    int place = 0;
    if (t < num)
#pragma unroll 4
        for (int u = 0; u < 256; u++) { /* in whole pieces: no rest to be fetched */
            if (u % 4 == 0 && u >= num) break;
            place += survival[u] > own || (survival[u] == own && u < t);
        }
    if (t < num && place < next && level + 1 < MOST_LEVELS) {
        const int m = g * next + place, slot = end + place;
        chosen_from[place] = from, chosen_token[place] = max(token, 0);
        p.survival[g * MOST_CHILDREN + place] = own;
        p.candidate[g * MOST_CHILDREN + place] = found + t;
        p.step[ID + m] = max(token, 0);
        p.step[ROW + m] = cache_row;
        p.step[SLOT + m] = slot;
        p.step[SEEN + m] = start + level + 1;
        p.step[PREFIX + m] = start;
        p.step[GATHER + m] = p.step[GROUP_FIRST + m] = m;
        p.step[GROUP_COUNT + m] = 1;
        p.step[GROUP_NEW + m] = g * next;
        p.step[GROUP_NUM_NEW + m] = next;
        int *path = p.path + (g * MOST_CHILDREN + place) * MOST_LEVELS, *seen = p.step + PATH + m * DEPTH;
#pragma unroll 1
        for (int i = 0; i < level; i++) path[i] = seen[i] = before[from][i];
        path[level] = seen[level] = slot;
    }
    if (!t) {
        p.step[GROW_LEVEL + g] = level + 1;
        p.step[GROW_END + g] = end + next;
        p.step[GROW_FOUND + g] = found + num;
        /* The same by every row, and read by none of them. */
        p.step[NUM_TOKENS] = p.step[NUM_GATHERED] = p.step[NUM_GROUPS] = num_growing * next;
        p.step[HAS_PATHS] = 1;
    }
    __syncthreads();
    if (!p.table || level + 1 >= MOST_LEVELS) return;
#pragma unroll 1
    for (int i = t >> 5; i < next; i += 8) { /* a warp a node */
        const size_t m = g * next + i;
        join_token(p.table + (size_t)chosen_token[i] * p.hidden_size, p.hidden + (size_t)(g * open + chosen_from[i]) * p.hidden_size, p.embed_norm,
                   p.feature_norm, p.x + m * p.hidden_size, p.joined + 2 * m * p.hidden_size, p.hidden_size, p.eps);
    }
}

/* --- attention -------------------------------------------------------------------------------------------------------- */

/* Keys and values of a chunk as the other operands of products: of lane (g, q) the keys 8 t + g, and the values of keys
 * 16 u + 2 q, that and 1, 8 and 9 more. */
struct Chunk {
    uint4 key[CHUNK / 8][KEY_PIECES], value[CHUNK / 4][VALUE_PIECES];

    /* The first `num` of them, from where they lie. */
    __device__ __forceinline__ void load(const u16 *keys, const u16 *values, int num, int g, int q) {
        const uint4 none = {0, 0, 0, 0};
        keys += g * HEAD_DIM + 8 * q, values += 2 * q * HEAD_DIM + 8 * g;
#pragma unroll
        for (int t = 0; t < CHUNK / 8; t++)
#pragma unroll
            for (int i = 0; i < KEY_PIECES; i++)
                key[t][i] = 8 * t + g < num && has_key(i, q) ? load_weights((const uint4 *)(keys + 8 * t * HEAD_DIM + 32 * i)) : none;
#pragma unroll
        for (int v = 0; v < CHUNK / 4; v++)
#pragma unroll
            for (int i = 0; i < VALUE_PIECES; i++)
                value[v][i] = value_of(v) + 2 * q < num && has_value(i, g) ? load_weights((const uint4 *)(values + value_of(v) * HEAD_DIM + 64 * i)) : none;
    }

    /* Those from `num` to `end`: where they lie is asked for. */
    template <typename KeyAt, typename ValueAt>
    __device__ __forceinline__ void load_rest(int num, int end, int g, int q, KeyAt key_at, ValueAt value_at) {
#pragma unroll
        for (int t = 0; t < CHUNK / 8; t++) {
            const int j = 8 * t + g;
            if (j < num || j >= end) continue;
            const u16 *at = key_at(j) + 8 * q;
#pragma unroll
            for (int i = 0; i < KEY_PIECES; i++)
                if (has_key(i, q)) key[t][i] = *(const uint4 *)(at + 32 * i);
        }
#pragma unroll
        for (int v = 0; v < CHUNK / 4; v++) {
            const int j = value_of(v) + 2 * q;
            if (j < num || j >= end) continue;
            const u16 *at = value_at(j) + 8 * g;
#pragma unroll
            for (int i = 0; i < VALUE_PIECES; i++)
                if (has_value(i, g)) value[v][i] = *(const uint4 *)(at + 64 * i);
        }
    }
};

/* What up to 16 queries take of a chunk: the sums of its values by their weights, the largest score (times log2(e)) and the sum of
 * weights. `queries` is the first one's row, `seen` says how many of the chunk's keys rows g and g + 8 see: none of rows that are
 * none. */
__device__ __forceinline__ void weigh(const Chunk &chunk, const u16 *queries, const int (&seen)[2], int g, int q, float *mixed, float *largest,
                                      float *total) {
    float score[CHUNK / 8][4] = {};
#pragma unroll
    for (int i = 0; i < KEY_PIECES; i++) {
        uint4 one = {0, 0, 0, 0}, other = one;
        if (has_key(i, q)) {
            one = *(const uint4 *)(queries + g * STRIDE + 32 * i + 8 * q);
            other = *(const uint4 *)(queries + (g + 8) * STRIDE + 32 * i + 8 * q);
        }
#pragma unroll
        for (int t = 0; t < CHUNK / 8; t++) {
            multiply(score[t], make_uint4(one.x, other.x, one.y, other.y), chunk.key[t][i].x, chunk.key[t][i].y);
            multiply(score[t], make_uint4(one.z, other.z, one.w, other.w), chunk.key[t][i].z, chunk.key[t][i].w);
        }
    }
    float most[2], sum[2];
    u32 weight[CHUNK / 8][2];
    weigh_keys(score, seen, q, weight, most, sum);
    if (!q)
#pragma unroll
        for (int row = 0; row < 2; row++)
            if (seen[row]) largest[g + 8 * row] = most[row], total[g + 8 * row] = sum[row];
#pragma unroll
    for (int i = 0; i < VALUE_PIECES; i++) {
        float out[8][4] = {};
#pragma unroll
        for (int u = 0; u < CHUNK / 16; u++)
            add_values(out, weight, u, {chunk.value[4 * u][i], chunk.value[4 * u + 1][i], chunk.value[4 * u + 2][i], chunk.value[4 * u + 3][i]});
#pragma unroll
        for (int row = 0; row < 2; row++)
#pragma unroll
            for (int half = 0; half < 2; half++) { /* dims 16 q and on, and 8 more */
                const int d = 64 * i + 16 * q + 8 * half, c = 2 * row + half;
                if (!seen[row] || (HEAD_DIM % 64 && d >= HEAD_DIM)) continue;
                float4 *to = (float4 *)(mixed + (g + 8 * row) * MIXED + d);
                to[0] = make_float4(out[0][c], out[1][c], out[2][c], out[3][c]);
                to[1] = make_float4(out[4][c], out[5][c], out[6][c], out[7][c]);
            }
    }
}

#if HEAD_DIM <= 64
#define AT_A_TIME 2 /* blocks of a multiprocessor: more than 128 registers find no room beside the kernels before and behind */
#else
#define AT_A_TIME 1
#endif

/* A block attends for the queries of one group to KEYS keys of one key/value head, a warp to a chunk of them. Keys and values of the
 * text before are loaded before the wait. Behind it the tokens of a tree see different ones: there a warp weighs for one of them at a
 * time, and warps that have nothing else to do share the tokens.
 *
 * How long this takes for one token is how long a layer waits for it, and much of that is fetching its code: what one token needs is
 * kept short. */
extern "C" __global__ void __launch_bounds__(32 * WARPS, AT_A_TIME) attend(const Attention p) {
    extern __shared__ uint4 shared[];
    const int num_queries = p.group_tokens * GROUP;
    u16 *queries = (u16 *)shared;                                    /* [num_queries + 16][STRIDE]: tiles of 16 begin anywhere */
    float *mixed = (float *)(queries + (num_queries + 16) * STRIDE); /* [WARPS][num_queries][MIXED] */
    float *largest = mixed + WARPS * num_queries * MIXED;            /* [WARPS][num_queries] */
    float *total = largest + WARPS * num_queries;                    /* [WARPS][num_queries] */
    int *seen_by = (int *)(total + WARPS * num_queries);             /* [TOKENS] keys that the group's tokens see */
    int *paths = seen_by + TOKENS;                                   /* [group_tokens][DEPTH] */
    u16 *new_keys = (u16 *)(paths + p.group_tokens * DEPTH);         /* [num_new][STRIDE] */
    const int *step = p.step;
    const int block = blockIdx.x, kv = blockIdx.y, group = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    release_next();
    if (group >= step[NUM_GROUPS]) return;
    const int first = step[GROUP_FIRST + group], count = step[GROUP_COUNT + group];
    const int first_new = step[GROUP_NEW + group], num_new = step[GROUP_NUM_NEW + group];
    const bool has_paths = step[HAS_PATHS];
    int most_seen = 0;
#pragma unroll 1
    for (int i = 0; i < count; i++) most_seen = max(most_seen, step[SEEN + first + i]);
    const int first_key = block * KEYS;
    if (first_key >= most_seen) return;
    u16 *new_values = new_keys + num_new * STRIDE;
    const int first_slot = step[SLOT + first_new], prefix = step[PREFIX + first], before = min(prefix, first_slot);
    const size_t row = ((size_t)step[ROW + first] * p.kv_heads + kv) * p.slots * HEAD_DIM;
    const u16 *keys = p.keys + row, *values = p.values + row;

    /* Chunks of the text before, and others; of these, in a tree, each is the chunk of several warps if there are as many. */
    const int num_before = min(max(before - first_key, 0) / CHUNK, WARPS);
    const int num_others = min((most_seen - first_key + CHUNK - 1) / CHUNK, WARPS) - num_before;
    const bool is_before = warp < num_before, by_token = has_paths && !is_before;
    int c = warp, sharer = 0, sharers = 1;
    if (by_token && num_others) {
        sharers = (WARPS - num_before) / num_others, sharer = (warp - num_before) / num_others;
        c = num_before + (warp - num_before) % num_others;
    }
    const int from = first_key + c * CHUNK;
    const bool takes_part = c < num_before + num_others && sharer < sharers;
    Chunk chunk;
    if (takes_part) chunk.load(keys + (size_t)from * HEAD_DIM, values + (size_t)from * HEAD_DIM, before - from, g, q);
    if (has_paths)
#pragma unroll 1
        for (int i = threadIdx.x; i < count * DEPTH; i += 32 * WARPS) paths[i] = step[PATH + first * DEPTH + i];
    if (threadIdx.x < count) seen_by[threadIdx.x] = step[SEEN + first + threadIdx.x];

    /* A block that sees tokens of this step takes those that its own may see, and one block of a group stores the group's. */
    const int width = (p.heads + 2 * p.kv_heads) * HEAD_DIM, num_heads = count * GROUP;
    const bool sees_new = first_key + KEYS > before, stores = block == before / KEYS;
    const int num_shown = !sees_new ? 0 : has_paths ? num_new : first + count - first_new, num_vectors = num_heads + 2 * num_shown;
    /* Queries, keys and values, in this order. */
    const auto token_of = [&](int t) {
        return t < num_heads ? first + t / GROUP : first_new + t - num_heads - (t < num_heads + num_shown ? 0 : num_shown);
    };
    const auto load_rotation = [&](Head &head, int t) {
        if (t < num_vectors) head.load_rotation(p, t < num_heads + num_shown, step[SEEN + token_of(t)] - 1, lane);
    };
    const auto load = [&](Head &head, int t) {
        if (t >= num_vectors) return;
        const int channel = t < num_heads ? kv * GROUP + t % GROUP : p.heads + kv + (t < num_heads + num_shown ? 0 : p.kv_heads);
        head.load(p.qkv + token_of(t) * width + channel * HEAD_DIM, lane);
    };
    const auto store = [&](Head &head, int t) {
        if (t >= num_vectors) return;
        const bool is_query = t < num_heads, is_key = t < num_heads + num_shown;
        const int m = token_of(t), which = m - first_new;
        u16 *to = is_query ? queries + t * STRIDE : (is_key ? new_keys : new_values) + which * STRIDE, *also = nullptr;
        if (!is_query && stores && m >= first && m < first + count)
            also = (is_key ? p.keys : p.values) + row + (first_slot + which) * HEAD_DIM;
        head.store(p, is_query ? p.q_norm : is_key ? p.k_norm : nullptr, lane, to, also);
    };
    {
        Head head;
        load_rotation(head, warp);
        wait_for_previous();
        load(head, warp);
        store(head, warp);
    }
#pragma unroll 1
    for (int t = warp + WARPS; t < num_vectors; t += WARPS * ON_THE_WAY) {
        Head head[ON_THE_WAY];
#pragma unroll
        for (int u = 0; u < ON_THE_WAY; u++) load_rotation(head[u], t + u * WARPS), load(head[u], t + u * WARPS);
#pragma unroll
        for (int u = 0; u < ON_THE_WAY; u++) store(head[u], t + u * WARPS);
    }
    __syncthreads();

    if (takes_part) {
        /* All tokens at once, or one of each sharer's at a time. */
#pragma unroll 1
        for (int i = by_token ? sharer : 0; i < count; i += by_token ? sharers : count) {
            const int end = (by_token ? seen_by[i] : most_seen) - from;
            if (by_token) {
                const int *path = paths + i * DEPTH + from - prefix;
                const auto at = [&](const u16 *news, const u16 *olds, int j) {
                    const int slot = from + j < prefix ? from + j : path[j];
                    return slot >= first_slot ? news + (slot - first_slot) * STRIDE : olds + slot * HEAD_DIM;
                };
                chunk.load_rest(
                    before - from, end, g, q, [&](int j) { return at(new_keys, keys, j); }, [&](int j) { return at(new_values, values, j); });
            } else if (!is_before) {
                const int skipped = from - first_slot;
                chunk.load_rest(
                    before - from, end, g, q, [&](int j) { return new_keys + (skipped + j) * STRIDE; },
                    [&](int j) { return new_values + (skipped + j) * STRIDE; });
            }
            const int last_query = by_token ? (i + 1) * GROUP : num_heads;
#pragma unroll 1
            for (int n = i * GROUP; n < last_query; n += 16) {
                int seen[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = n + g + 8 * half;
                    seen[half] = at < last_query ? min(max(seen_by[at / GROUP] - from, 0), CHUNK) : 0;
                }
                const int to = c * num_queries + n;
                weigh(chunk, queries + n * STRIDE, seen, g, q, mixed + to * MIXED, largest + to, total + to);
            }
        }
    }
    __syncthreads();

#pragma unroll 1
    for (int at = threadIdx.x; at < num_heads * HEAD_DIM; at += 32 * WARPS) {
        const int n = at / HEAD_DIM, d = at % HEAD_DIM, m = first + n / GROUP, head = kv * GROUP + n % GROUP, seen = seen_by[n / GROUP];
        const int chunks = (seen - first_key + CHUNK - 1) / CHUNK;
        if (chunks <= 0) continue;
        /* All are read at once, also what nobody has written. */
        float scores[WARPS], totals[WARPS], sums[WARPS], most = -1.0e30f, sum = 0.0f, result = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const int of = w * num_queries + n;
            scores[w] = largest[of], totals[w] = total[of], sums[w] = mixed[of * MIXED + d];
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = w < chunks ? fmaxf(most, scores[w]) : most;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = power_of_two(scores[w] - most);
            sum = w < chunks ? fmaf(totals[w], factor, sum) : sum, result = w < chunks ? fmaf(sums[w], factor, result) : result;
        }
        if (seen <= KEYS) {
            p.out[(m * p.heads + head) * HEAD_DIM + d] = round_one(__fdividef(result, sum) * (p.factor ? p.factor[head * HEAD_DIM + d] : 1.0f));
        } else {
            float *partial = p.partial + ((size_t)(m * p.heads + head) * p.most_blocks + block) * PARTIAL;
            partial[d] = result;
            if (!d) partial[HEAD_DIM] = most, partial[HEAD_DIM + 1] = sum;
        }
    }
    if (most_seen <= KEYS) return;

    /* The last block of the group to come this far joins the shares of all, in their order. */
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (!threadIdx.x) {
        int *arrivals = p.arrivals + group * p.kv_heads + kv;
        is_last = atomicAdd(arrivals, 1) == (most_seen + KEYS - 1) / KEYS - 1;
        if (is_last) *arrivals = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
#pragma unroll 1
    for (int at = threadIdx.x; at < num_heads * HEAD_DIM; at += 32 * WARPS) {
        const int n = at / HEAD_DIM, d = at % HEAD_DIM, m = first + n / GROUP, head = kv * GROUP + n % GROUP, seen = seen_by[n / GROUP];
        if (seen > KEYS) join_shares_of<const volatile float *>(p, m, head, d, seen);
    }
}

#endif

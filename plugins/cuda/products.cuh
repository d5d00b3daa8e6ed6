/* What products of few tokens and of many share: their argument, formats of weights, and what becomes of their sums. */
#ifdef BITS
struct Linear {
    const int *step;
    const uint4 *weight;  /* [N / TILE, PIECES(pairs), 32] */
    const float *scale;   /* BITS 8: [N]; BITS 4: [N / TILE, groups, 8, 2], of channels g and g + 8 */
    const u16 *x;         /* rows of 32 * pairs */
    const float *squares; /* [TOKENS, num_squares]: x is divided by its root mean square; NULL: it is not */
    const float *bias;    /* [N] or NULL */
    float *out;           /* store: [rows, N]; add: [TOKENS, N] residuals */
    u16 *out_bf16;        /* gate: [TOKENS, N / 2]; add: out * next_norm */
    float *out_squares;   /* add: [TOKENS, N / TILE] */
    const float *next_norm; /* add: see out_bf16; gate: [N / 2], the same for what it gives, or NULL */
    u16 *tapped;       /* add: a copy of out for the features, rows of tapped_width; or NULL */
    const float *from; /* store: residuals of which the gathered rows are copied to `copied`; or NULL */
    float *copied;
    int tiles, together, pairs, share, groups, outputs, num_squares, tapped_width, gathered;
    float eps;
};

enum { STORE, ADD, GATE };

/* A pair is 32 of K: two fragments. AHEAD: pairs that a warp has on the way before it waits. */
#if BITS == 16
#define PIECES(pairs) (2 * (pairs)) /* of 16 bytes a lane */
#elif BITS == 8
#define PIECES(pairs) (pairs)
#else
#define PIECES(pairs) (((pairs) + 1) / 2)
#endif
#define PAIR_OF(piece) ((piece) * 8 / BITS)

__device__ __forceinline__ u32 scale_and_shift(u32 pair, u32 factor, u32 offset) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(pair), "r"(factor), "r"(offset));
    return r;
}

#if BITS == 8
/* E4M3 with its exponent and mantissa where bf16 has them is 2^120 too small, and bf16 has its subnormals. */
__device__ __forceinline__ u32 widen_bytes(u32 signs, u32 rest) {
    return scale_and_shift((signs & 0x80008000u) | (rest & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
}
#elif BITS == 4
/* Behind the mantissa of 128 an integer n of four bits is 128 + n; they are stored with 8 added. */
__device__ __forceinline__ u32 widen_nibbles(u32 word) {
    u32 r; /* (word & mask) | 128: left to the compiler, it is two instructions */
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "r"(0x000f000fu), "r"(0x43004300u));
    return scale_and_shift(r, 0x3f803f80u, 0xc308c308u);
}

/* What a group's products add to a lane's sums: its scales are those of channels g and g + 8. */
__device__ __forceinline__ void add_scaled(float (&c)[4], const float (&sum)[4], float2 by) {
    c[0] = fmaf(by.x, sum[0], c[0]), c[1] = fmaf(by.x, sum[1], c[1]);
    c[2] = fmaf(by.y, sum[2], c[2]), c[3] = fmaf(by.y, sum[3], c[3]);
}
#endif

/* The A fragment of product `s` of pair `i` of those in registers. */
__device__ __forceinline__ uint4 fragment(const uint4 *a, int i, int s) {
#if BITS == 16
    return a[2 * i + s];
#elif BITS == 8
    const u32 one = s ? a[i].z : a[i].x, other = s ? a[i].w : a[i].y;
    return make_uint4(widen_bytes(one << 8, one << 4), widen_bytes(one, one >> 4),
                      widen_bytes(other << 8, other << 4), widen_bytes(other, other >> 4));
#else
    const uint4 &piece = a[i / 2];
    const u32 word = i % 2 ? (s ? piece.w : piece.z) : (s ? piece.y : piece.x);
    return make_uint4(widen_nibbles(word), widen_nibbles(word >> 4), widen_nibbles(word >> 8), widen_nibbles(word >> 12));
#endif
}

/* The sum over x of one token: what lane g of eight has of the squares that the kernel before has left. */
__device__ __forceinline__ float some_squares(const Linear &p, int token, int g) {
    const float *from = p.squares + (size_t)token * p.num_squares;
    float sum = 0.0f;
    for (int k = g; k < p.num_squares; k += 64) {
        float some[8];
#pragma unroll
        for (int u = 0; u < 8; u++) some[u] = k + 8 * u < p.num_squares ? from[k + 8 * u] : 0.0f;
#pragma unroll
        for (int u = 0; u < 8; u++) sum += some[u];
    }
    return sum;
}

/* What a token's products are multiplied with, of the squares of eight lanes. */
__device__ __forceinline__ float factor_of(const Linear &p, float squares) {
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) squares += __shfl_xor_sync(~0u, squares, step);
    return rsqrtf(squares / (float)(p.num_squares * TILE) + p.eps);
}

/* What becomes of the sums of a tile of channels: those of lane (g, q) are of channels g and g + 8 and of tokens 2 q and 2 q + 1. */
template <int KIND>
struct Finish {
    float bias[2] = {}, next_norm[2], channel[2];

    __device__ __forceinline__ void load(const Linear &p, int tile, int g) {
        const int n = tile * TILE + g;
        if (p.bias) bias[0] = n < p.outputs ? p.bias[n] : 0.0f, bias[1] = n + 8 < p.outputs ? p.bias[n + 8] : 0.0f;
        if (KIND == ADD) next_norm[0] = p.next_norm[n], next_norm[1] = p.next_norm[n + 8];
        if (KIND == GATE) next_norm[0] = p.next_norm ? p.next_norm[tile * 8 + g] : 1.0f;
#if BITS == 8
        channel[0] = p.scale[n], channel[1] = p.scale[n + 8];
#endif
    }

    /* What token m's sums are added to. */
    static __device__ __forceinline__ float2 residual_of(const Linear &p, int tile, int g, int m) {
        const float *out = p.out + (size_t)m * p.outputs + tile * TILE + g;
        return KIND == ADD ? make_float2(out[0], out[8]) : make_float2(0.0f, 0.0f);
    }

    /* Of the i-th of its tokens, m, if it is one; by all lanes of a warp. */
    __device__ __forceinline__ void put(const Linear &p, int tile, int g, int m, bool is_token, int i, const float (&sum)[4], float2 residual,
                                        float factor) const {
        const int n = tile * TILE + g;
#if BITS == 8
        float one = fmaf(sum[i] * channel[0], factor, bias[0]), other = fmaf(sum[i + 2] * channel[1], factor, bias[1]);
#else
        float one = fmaf(sum[i], factor, bias[0]), other = fmaf(sum[i + 2], factor, bias[1]);
#endif
        if (KIND == STORE && is_token) {
            float *out = p.out + (size_t)m * p.outputs;
            if (n < p.outputs) out[n] = one;
            if (n + 8 < p.outputs) out[n + 8] = other;
        }
        if (KIND == GATE && is_token)
            p.out_bf16[(size_t)m * (p.outputs / 2) + tile * 8 + g] = round_one(one / (1.0f + __expf(-one)) * other * next_norm[0]);
        if (KIND == ADD) {
            one += residual.x, other += residual.y;
            if (is_token) {
                const size_t at = (size_t)m * p.outputs + n;
                p.out[at] = one, p.out[at + 8] = other;
                p.out_bf16[at] = round_one(one * next_norm[0]), p.out_bf16[at + 8] = round_one(other * next_norm[1]);
                if (p.tapped) {
                    u16 *tapped = p.tapped + (size_t)m * p.tapped_width + n;
                    tapped[0] = round_one(one), tapped[8] = round_one(other);
                }
            }
            float squares = fmaf(one, one, other * other);
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) squares += __shfl_xor_sync(~0u, squares, step);
            if (is_token && !g) p.out_squares[(size_t)m * (p.outputs / TILE) + tile] = squares;
        }
    }
};
#endif

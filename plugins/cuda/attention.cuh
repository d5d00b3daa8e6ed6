/* What attention of few tokens and of many share: how keys are weighed and values added up, a chunk of them at a time. */
#ifdef HEAD_DIM
#define WARPS 8
#define CHUNK 32              /* keys that are weighed together, in the order of their positions */
#define KEYS (CHUNK * WARPS)  /* of a block */
#define HALF (HEAD_DIM / 2)
#define LANE_PAIRS ((HALF + 31) / 32)           /* pairs of dims that a lane rotates */
#define KEY_PIECES ((HEAD_DIM + 31) / 32)       /* of 32 dims: two products each */
#define VALUE_PIECES ((HEAD_DIM + 63) / 64)     /* of 64 dims: eight products side by side */
#define STRIDE (HEAD_DIM + 8)                   /* of bf16 rows in shared memory: 16-byte pieces of rows in banks of their own */
#define MIXED (HEAD_DIM + 4)
#define PARTIAL (HEAD_DIM + 2) /* of a block's share: values, largest score, sum of weights */
#define ON_THE_WAY 4           /* heads that a warp loads at once */

struct Attention {
    const int *step;
    const float *qkv;    /* [TOKENS, (heads + 2 * kv_heads) * HEAD_DIM] */
    u16 *keys, *values;  /* [rows, kv_heads, slots, HEAD_DIM] of this layer */
    const float *cosine, *sine; /* [positions, HALF] */
    const float *q_norm, *k_norm; /* [HEAD_DIM], with QK_NORM */
    const float *factor; /* [heads * HEAD_DIM] that the output is multiplied with, or NULL */
    u16 *out;            /* [TOKENS, heads * HEAD_DIM] */
    float *partial;      /* [TOKENS, heads, most_blocks, PARTIAL] */
    int *arrivals;       /* attend: [TOKENS, kv_heads], 0 before and after */
    u16 *queries;        /* of many tokens: [TOKENS, heads * HEAD_DIM], rotated and rounded */
    int heads, kv_heads, slots, most_blocks, group_tokens;
    float eps;
};

__device__ __forceinline__ float power_of_two(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

/* A query, a key or a value of one token, as it comes from its product, with the rotation of its position. */
struct Head {
    float first[LANE_PAIRS], second[LANE_PAIRS], cosine[LANE_PAIRS], sine[LANE_PAIRS];

    __device__ __forceinline__ void load_rotation(const Attention &p, bool rotates, int position, int lane) {
#pragma unroll
        for (int i = 0; i < LANE_PAIRS; i++) {
            const int d = lane + 32 * i, at = position * HALF + d;
            rotates &= HALF % 32 == 0 || d < HALF;
            cosine[i] = rotates ? p.cosine[at] : 1.0f, sine[i] = rotates ? p.sine[at] : 0.0f;
        }
    }

    __device__ __forceinline__ void load(const float *head, int lane) {
#pragma unroll
        for (int i = 0; i < LANE_PAIRS; i++) {
            const int d = lane + 32 * i;
            const bool is_there = HALF % 32 == 0 || d < HALF;
            first[i] = is_there ? head[d] : 0.0f, second[i] = is_there ? head[d + HALF] : 0.0f;
        }
    }

    /* Normed if the model does so, rotated and rounded. */
    __device__ __forceinline__ void store(const Attention &p, const float *norm, int lane, u16 *to, u16 *also) {
        if (QK_NORM && norm) {
            float squares = 0.0f;
#pragma unroll
            for (int i = 0; i < LANE_PAIRS; i++) squares = fmaf(first[i], first[i], fmaf(second[i], second[i], squares));
            const float scale = rsqrtf(sum_of_warp(squares) / (float)HEAD_DIM + p.eps);
#pragma unroll
            for (int i = 0; i < LANE_PAIRS; i++) {
                const int d = lane + 32 * i;
                if (d < HALF) first[i] *= scale * norm[d], second[i] *= scale * norm[d + HALF];
            }
        }
#pragma unroll
        for (int i = 0; i < LANE_PAIRS; i++) {
            const int d = lane + 32 * i;
            if (HALF % 32 && d >= HALF) continue;
            const u16 one = round_one(fmaf(first[i], cosine[i], -(second[i] * sine[i])));
            const u16 other = round_one(fmaf(second[i], cosine[i], first[i] * sine[i]));
            to[d] = one, to[d + HALF] = other;
            if (also) also[d] = one, also[d + HALF] = other;
        }
    }
};

/* Of a chunk a lane (g, q) has 8 dims of a piece of the keys 8 t + g, and of the values 2 q + value_of(v). */
__device__ __forceinline__ constexpr int value_of(int v) { return v / 4 * 16 + (v & 1) + (v & 2) * 4; }
__device__ __forceinline__ bool has_key(int i, int q) { return HEAD_DIM % 32 == 0 || 32 * i + 8 * q < HEAD_DIM; }
__device__ __forceinline__ bool has_value(int i, int g) { return HEAD_DIM % 64 == 0 || 64 * i + 8 * g < HEAD_DIM; }

__device__ __forceinline__ u32 word_of(const uint4 &piece, int i) { return i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w; }

/* The weights of a chunk's keys for up to 16 queries, of two keys each, from their scores; the largest score (times log2(e)) of each
 * query and its sum of weights. `seen` says how many of the keys rows g and g + 8 see: none of rows that are none. */
__device__ __forceinline__ void weigh_keys(float (&score)[CHUNK / 8][4], const int (&seen)[2], int q, u32 (&weight)[CHUNK / 8][2], float (&most)[2],
                                           float (&sum)[2]) {
    const float scale = 1.44269504f * rsqrtf((float)HEAD_DIM);
    most[0] = most[1] = -1.0e30f, sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int t = 0; t < CHUNK / 8; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            score[t][i] = 8 * t + 2 * q + (i & 1) < seen[i / 2] ? score[t][i] * scale : -1.0e30f;
            most[i / 2] = fmaxf(most[i / 2], score[t][i]);
        }
#pragma unroll
    for (int row = 0; row < 2; row++) {
#pragma unroll
        for (int step = 1; step < 4; step <<= 1) most[row] = fmaxf(most[row], __shfl_xor_sync(~0u, most[row], step));
        most[row] = fmaxf(most[row], -0.9e30f); /* of a row without keys, whose weights are to be 0 */
    }
    /* What is multiplied is also what is added up. */
#pragma unroll
    for (int t = 0; t < CHUNK / 8; t++)
#pragma unroll
        for (int row = 0; row < 2; row++) {
            weight[t][row] = round_pair(power_of_two(score[t][2 * row] - most[row]), power_of_two(score[t][2 * row + 1] - most[row]));
            sum[row] += low(weight[t][row]) + high(weight[t][row]);
        }
#pragma unroll
    for (int row = 0; row < 2; row++)
#pragma unroll
        for (int step = 1; step < 4; step <<= 1) sum[row] += __shfl_xor_sync(~0u, sum[row], step);
}

/* Adds 16 values by their weights: of lane (g, q) those of keys 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, of eight dims. Of what comes out
 * `out[e][2 * row + half]` is dim 16 q + 8 half + e of row g + 8 row. */
__device__ __forceinline__ void add_values(float (&out)[8][4], const u32 (&weight)[CHUNK / 8][2], int u, const uint4 (&value)[4]) {
    const uint4 weights = make_uint4(weight[2 * u][0], weight[2 * u][1], weight[2 * u + 1][0], weight[2 * u + 1][1]);
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const u32 of = e % 2 ? 0x7632 : 0x5410;
        multiply(out[e], weights, __byte_perm(word_of(value[0], e / 2), word_of(value[1], e / 2), of),
                 __byte_perm(word_of(value[2], e / 2), word_of(value[3], e / 2), of));
    }
}

/* Joins dim d of the shares that blocks of a token's keys have left, in their order. Shares: const float *, volatile where blocks of the
 * same grid have left them. */
template <typename Shares>
__device__ __forceinline__ void join_shares_of(const Attention &p, int m, int head, int d, int seen) {
    const Shares partial = p.partial + (size_t)(m * p.heads + head) * p.most_blocks * PARTIAL;
    const int blocks = (seen + KEYS - 1) / KEYS;
    float most = -1.0e30f, sum = 0.0f, result = 0.0f;
#pragma unroll 4
    for (int b = 0; b < blocks; b++) most = fmaxf(most, partial[b * PARTIAL + HEAD_DIM]);
#pragma unroll 4
    for (int b = 0; b < blocks; b++) {
        const float factor = power_of_two(partial[b * PARTIAL + HEAD_DIM] - most);
        sum = fmaf(partial[b * PARTIAL + HEAD_DIM + 1], factor, sum), result = fmaf(partial[b * PARTIAL + d], factor, result);
    }
    p.out[(m * p.heads + head) * HEAD_DIM + d] = round_one(__fdividef(result, sum) * (p.factor ? p.factor[head * HEAD_DIM + d] : 1.0f));
}
#endif

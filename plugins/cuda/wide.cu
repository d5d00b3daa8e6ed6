/* A decoder's step for many tokens, as prompts have them: the same five stages a layer as in decoder.cu, and before attention one that
 * puts rotated queries, keys and values where it reads them.
 *
 * A token gets the very bits that it gets in a step of few tokens. A product adds up the same parts of its width in the same order, a
 * warp all of them where there each is a warp's; attention weighs the same chunks of keys, and joins them in the same order. What
 * differs is how often weights and keys are read: once for 64 tokens, by way of shared memory, where it has the next ones while these
 * are multiplied. There are no trees among many tokens: each sees all of its row before it.
 *
 * Compiled in parts: with BITS the products for one format of weights (and GROUP_PAIRS of INT4), with CHANNELS tiles of channels of a
 * warp and STAGES in shared memory at once, of STAGE_PAIRS pairs each (whole pieces of INT4); without it attention, for one model's shape (HEAD_DIM, GROUP, QK_NORM), with STAGED keys at a time. TOKENS is what the step has
 * room for.
 */

/* --- copies that nobody waits for -------------------------------------------------------------------------------------- */

/* 16 bytes to shared memory; zeros if they are not there. */
__device__ __forceinline__ void copy_ahead(void *to, const void *from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(is_there ? 16 : 0)
                 : "memory");
}
/* Has a line of memory brought near. */
__device__ __forceinline__ void prefetch_line(const void *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory"); }
/* Ends a group of copies. */
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until all groups of this thread but the last `left` are there. */
template <int left>
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"); }

#ifdef BITS
/* --- products --------------------------------------------------------------------------------------------------------- */

#define SIDES 2          /* warps beside one another have other channels, and behind one another other tokens */
#define BLOCK_TILES (SIDES * CHANNELS)
#define WARP_TOKENS 2    /* tiles of eight */
#define BLOCK_TOKENS 64
#define PRODUCT_THREADS (32 * SIDES * BLOCK_TOKENS / (8 * WARP_TOKENS))
#define TILE_PIECES PIECES(STAGE_PAIRS)
#define TILE_STAGE (TILE_PIECES * 32) /* of 16 bytes, of a tile's stage */
#define WEIGHT_COPIES ((BLOCK_TILES * TILE_STAGE + PRODUCT_THREADS - 1) / PRODUCT_THREADS)
#define TOKEN_COPIES (BLOCK_TOKENS * STAGE_PAIRS * 4 / PRODUCT_THREADS)
#define PLANE (BLOCK_TOKENS * 4 + 4) /* 16-byte pieces of a pair's tokens: the next pair's begin in other banks */

/* One block computes BLOCK_TILES tiles of channels of BLOCK_TOKENS tokens. */
template <int KIND>
__device__ __forceinline__ void linear(const Linear &p) {
    extern __shared__ uint4 shared[];
    uint4 *weights = shared;                                        /* [STAGES][BLOCK_TILES][TILE_PIECES][32] */
    uint4 *tokens = weights + STAGES * BLOCK_TILES * TILE_STAGE;       /* [STAGES][STAGE_PAIRS][PLANE] */
    float *factors = (float *)(tokens + STAGES * STAGE_PAIRS * PLANE); /* [BLOCK_TOKENS] */
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    release_next();
    const int num = p.step[NUM_TOKENS], begin = blockIdx.x * BLOCK_TOKENS;
    if (begin >= num) return;
    const int block_tile = blockIdx.y * BLOCK_TILES, num_stages = (p.pairs + STAGE_PAIRS - 1) / STAGE_PAIRS;
    /* What a thread copies of each stage, from where and to where: a scheduler has few warps, and these would wait for every address
     * that had to be computed. */
    const uint4 *weight_from[WEIGHT_COPIES], *token_from[TOKEN_COPIES];
    const int weight_at = threadIdx.x % TILE_STAGE, last_weight = PIECES(p.pairs) * 32;
    const int token_pair = threadIdx.x % (4 * STAGE_PAIRS) / 4;
    const int token_at = token_pair * PLANE + threadIdx.x / (4 * STAGE_PAIRS) * 4 + threadIdx.x % 4;
    bool has_tile[WEIGHT_COPIES];
#pragma unroll
    for (int k = 0; k < WEIGHT_COPIES; k++) {
        const int tile = block_tile + (threadIdx.x + k * PRODUCT_THREADS) / TILE_STAGE;
        has_tile[k] = tile < p.tiles;
        weight_from[k] = p.weight + (size_t)(has_tile[k] ? tile : 0) * last_weight + weight_at;
    }
#pragma unroll
    for (int k = 0; k < TOKEN_COPIES; k++) {
        const int m = begin + (threadIdx.x + k * PRODUCT_THREADS) / (4 * STAGE_PAIRS);
        /* Behind the last the first, whose columns nobody reads. */
        token_from[k] = (const uint4 *)p.x + (size_t)(m < num ? m : begin) * 4 * p.pairs + threadIdx.x % (4 * STAGE_PAIRS);
    }
    const auto fetch_weights = [&](int stage, int slot) {
        uint4 *to = weights + slot * (BLOCK_TILES * TILE_STAGE) + threadIdx.x;
        const bool is_there = weight_at + stage * TILE_STAGE < last_weight;
#pragma unroll
        for (int k = 0; k < WEIGHT_COPIES; k++)
            if ((k + 1) * PRODUCT_THREADS <= BLOCK_TILES * TILE_STAGE || threadIdx.x + k * PRODUCT_THREADS < BLOCK_TILES * TILE_STAGE)
                copy_ahead(to + k * PRODUCT_THREADS, weight_from[k], is_there && has_tile[k]), weight_from[k] += TILE_STAGE;
    };
    const auto fetch_tokens = [&](int stage, int slot) {
        uint4 *to = tokens + slot * (STAGE_PAIRS * PLANE) + token_at;
        const bool is_there = stage * STAGE_PAIRS + token_pair < p.pairs;
#pragma unroll
        for (int k = 0; k < TOKEN_COPIES; k++)
            copy_ahead(to + k * (PRODUCT_THREADS / STAGE_PAIRS), token_from[k], is_there), token_from[k] += 4 * STAGE_PAIRS;
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++)
        if (stage < num_stages) fetch_weights(stage, stage);
    for (int j = 0; j < BLOCK_TILES && block_tile + j < p.tiles; j++) /* the others come from memory meanwhile, 128 bytes at a time */
        for (int i = (STAGES - 1) * TILE_STAGE + 8 * threadIdx.x; i < last_weight; i += 8 * PRODUCT_THREADS)
            prefetch_line(p.weight + (size_t)(block_tile + j) * last_weight + i);
    const int first_tile = block_tile + warp % SIDES * CHANNELS, first_token = warp / SIDES * 8 * WARP_TOKENS;
    Finish<KIND> its[CHANNELS];
    float2 residual[CHANNELS][WARP_TOKENS][2] = {};
#pragma unroll
    for (int j = 0; j < CHANNELS; j++)
        if (first_tile + j < p.tiles) its[j].load(p, first_tile + j, g);
    wait_for_previous();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < num_stages) fetch_tokens(stage, stage);
        end_copies(); /* the first group has all weights so far */
    }
    for (int t = warp; t < BLOCK_TOKENS / 8; t += PRODUCT_THREADS / 32)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = 8 * t + 2 * q + i;
            float factor = 1.0f;
            if (p.squares) factor = factor_of(p, begin + token < num ? some_squares(p, begin + token, g) : 0.0f);
            if (!g) factors[token] = factor;
        }

#pragma unroll
    for (int j = 0; j < CHANNELS; j++)
        if (first_tile + j < p.tiles)
#pragma unroll
            for (int t = 0; t < WARP_TOKENS; t++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int m = begin + first_token + 8 * t + 2 * q + i;
                    if (m < num) residual[j][t][i] = its[j].residual_of(p, first_tile + j, g, m);
                }
    float total[CHANNELS][WARP_TOKENS][4] = {}, c[CHANNELS][WARP_TOKENS][4] = {};
    int left = p.share; /* pairs of this part of the width */
#pragma unroll 1
    for (int stage = 0, slot = 0, free_slot = STAGES - 1; stage < num_stages; stage++) {
        await_copies<STAGES - 2>();
        __syncthreads();
        if (stage + STAGES - 1 < num_stages) fetch_weights(stage + STAGES - 1, free_slot), fetch_tokens(stage + STAGES - 1, free_slot);
        end_copies();
        const uint4 *a_from = weights + (slot * BLOCK_TILES + warp % SIDES * CHANNELS) * TILE_STAGE + lane;
        const uint4 *b_from = tokens + slot * (STAGE_PAIRS * PLANE) + (first_token + g) * 4 + q;
        free_slot = slot, slot = slot + 1 == STAGES ? 0 : slot + 1;
        uint4 a[CHANNELS][TILE_PIECES];
#pragma unroll
        for (int j = 0; j < CHANNELS; j++)
#pragma unroll
            for (int i = 0; i < TILE_PIECES; i++) a[j][i] = a_from[(j * TILE_PIECES + i) * 32];
        uint4 b[STAGE_PAIRS][WARP_TOKENS];
#pragma unroll
        for (int pair = 0; pair < STAGE_PAIRS; pair++)
#pragma unroll
            for (int t = 0; t < WARP_TOKENS; t++) b[pair][t] = b_from[pair * PLANE + t * 32];
#pragma unroll
        for (int pair = 0; pair < STAGE_PAIRS; pair++) {
            const int at = stage * STAGE_PAIRS + pair;
            if (at >= p.pairs) break;
            /* Products that wait for one another have others between them. */
#if BITS == 4
            float sum[CHANNELS][WARP_TOKENS][4] = {};
#else
            float(&sum)[CHANNELS][WARP_TOKENS][4] = c;
#endif
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < CHANNELS; j++) {
                    const uint4 piece = fragment(a[j], pair, half);
#pragma unroll
                    for (int t = 0; t < WARP_TOKENS; t++) {
                        const uint4 &token = b[pair][t];
                        multiply(sum[j][t], piece, half ? token.z : token.x, half ? token.w : token.y);
                    }
                }
#if BITS == 4
#pragma unroll
            for (int j = 0; j < CHANNELS; j++) {
                const float2 by = first_tile + j < p.tiles
                    ? ((const float2 *)p.scale)[((size_t)(first_tile + j) * p.groups + at / GROUP_PAIRS) * 8 + g] : make_float2(0.0f, 0.0f);
#pragma unroll
                for (int t = 0; t < WARP_TOKENS; t++) add_scaled(c[j][t], sum[j][t], by);
            }
#endif
            if (--left && at + 1 < p.pairs) continue;
            left = p.share;
#pragma unroll
            for (int j = 0; j < CHANNELS; j++)
#pragma unroll
                for (int t = 0; t < WARP_TOKENS; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++) total[j][t][i] += c[j][t][i], c[j][t][i] = 0.0f;
        }
    }
    await_copies<0>(); /* empty groups: none may be open when a block ends */

#pragma unroll
    for (int j = 0; j < CHANNELS; j++) {
        if (first_tile + j >= p.tiles) break;
#pragma unroll
        for (int t = 0; t < WARP_TOKENS; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = first_token + 8 * t + 2 * q + i, m = begin + token;
                its[j].put(p, first_tile + j, g, m, m < num, i, total[j][t], residual[j][t][i], factors[token]);
            }
    }
}

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS) store(const Linear p) { linear<STORE>(p); }
extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS) add(const Linear p) { linear<ADD>(p); }
extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS) gate(const Linear p) { linear<GATE>(p); }

#else
/* --- attention -------------------------------------------------------------------------------------------------------- */

#define TURN_WARPS 8

/* Puts queries, keys and values of a token, rotated and rounded, where attention reads them: a warp each. */
extern "C" __global__ void __launch_bounds__(32 * TURN_WARPS) turn(const Attention p) {
    const int m = blockIdx.x, v = blockIdx.y * TURN_WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    release_next();
    if (m >= p.step[NUM_TOKENS] || v >= p.heads + 2 * p.kv_heads) return;
    const bool is_query = v < p.heads, is_key = v < p.heads + p.kv_heads;
    const int kv = v - p.heads - (is_key ? 0 : p.kv_heads), width = (p.heads + 2 * p.kv_heads) * HEAD_DIM;
    Head head;
    head.load_rotation(p, is_key, p.step[SEEN + m] - 1, lane);
    u16 *to = p.queries + ((size_t)m * p.heads + v) * HEAD_DIM;
    if (!is_query) to = (is_key ? p.keys : p.values) + (((size_t)p.step[ROW + m] * p.kv_heads + kv) * p.slots + p.step[SLOT + m]) * HEAD_DIM;
    wait_for_previous();
    head.load(p.qkv + (size_t)m * width + v * HEAD_DIM, lane);
    head.store(p, is_query ? p.q_norm : is_key ? p.k_norm : nullptr, lane, to, nullptr);
}

#define MANY_WARPS 4                  /* of 16 queries each */
#define CHUNKS (KEYS / CHUNK)
#define PARTS (KEYS / STAGED)         /* of a block's keys, and of its values: two are in shared memory, by turns */
#define PART_CHUNKS (STAGED / CHUNK)

/* A block attends for the queries of one group to KEYS keys of one key/value head, a warp for 16 queries: first their weights of all
 * chunks, then the values by these. */
extern "C" __global__ void __launch_bounds__(32 * MANY_WARPS) attend_many(const Attention p) {
    extern __shared__ uint4 shared[];
    u16 *const staged = (u16 *)shared; /* [2][STAGED][STRIDE] */
    const int *step = p.step;
    const int block = blockIdx.x, kv = blockIdx.y, group = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    release_next();
    if (group >= step[NUM_GROUPS]) return;
    const int first = step[GROUP_FIRST + group], count = step[GROUP_COUNT + group], first_key = block * KEYS;
    const int most_seen = step[SEEN + first + count - 1] - first_key; /* of this block's keys, by the last token */
    if (most_seen <= 0) return;
    const size_t row = ((size_t)step[ROW + first] * p.kv_heads + kv) * p.slots + first_key;
    const int num_rows = count * GROUP, first_row = 16 * warp;
    int token[2], head[2], seen[2]; /* of its queries g and g + 8 */
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int n = first_row + g + 8 * half, at = min(n, num_rows - 1);
        token[half] = first + at / GROUP, head[half] = kv * GROUP + at % GROUP;
        seen[half] = n < num_rows ? step[SEEN + token[half]] - first_key : 0;
    }
    /* Of its queries the last one sees most. */
    const int last = first + min(first_row + 15, num_rows - 1) / GROUP;
    const int seen_here = first_row < num_rows ? step[SEEN + last] - first_key : 0;
    /* Keys of parts 0 to PARTS - 1, then their values. */
    const auto fetch = [&](int part) {
        const u16 *from = (part < PARTS ? p.keys : p.values) + (row + part % PARTS * STAGED) * HEAD_DIM;
        u16 *to = staged + part % 2 * (STAGED * STRIDE);
        const int there = min(most_seen - part % PARTS * STAGED, STAGED);
#pragma unroll 4
        for (int k = 0; k < (STAGED * (HEAD_DIM / 8) + 32 * MANY_WARPS - 1) / (32 * MANY_WARPS); k++) {
            const int i = threadIdx.x + k * 32 * MANY_WARPS, key = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
            if ((k + 1) * 32 * MANY_WARPS > STAGED * (HEAD_DIM / 8) && key >= STAGED) break;
            copy_ahead(to + key * STRIDE + d, key < there ? from + key * HEAD_DIM + d : p.keys, key < there);
        }
        end_copies();
    };
    wait_for_previous();
    fetch(0);
    fetch(1);
    uint4 query[2][KEY_PIECES];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < KEY_PIECES; i++)
            query[half][i] = has_key(i, q)
                ? *(const uint4 *)(p.queries + ((size_t)token[half] * p.heads + head[half]) * HEAD_DIM + 32 * i + 8 * q) : make_uint4(0, 0, 0, 0);

    float most[CHUNKS][2], sum[CHUNKS][2];
    u32 weight[CHUNKS][CHUNK / 8][2];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        await_copies<1>();
        __syncthreads();
#pragma unroll
        for (int of_part = 0; of_part < PART_CHUNKS; of_part++) {
            const int c = part * PART_CHUNKS + of_part;
            if (seen_here <= c * CHUNK) break;
            const u16 *keys = staged + part % 2 * (STAGED * STRIDE) + (of_part * CHUNK + g) * STRIDE + 8 * q;
            float score[CHUNK / 8][4] = {};
#pragma unroll
            for (int i = 0; i < KEY_PIECES; i++) {
                uint4 key[CHUNK / 8];
#pragma unroll
                for (int t = 0; t < CHUNK / 8; t++)
                    key[t] = has_key(i, q) ? *(const uint4 *)(keys + 8 * t * STRIDE + 32 * i) : make_uint4(0, 0, 0, 0);
                const uint4 &one = query[0][i], &other = query[1][i];
#pragma unroll
                for (int t = 0; t < CHUNK / 8; t++) multiply(score[t], make_uint4(one.x, other.x, one.y, other.y), key[t].x, key[t].y);
#pragma unroll
                for (int t = 0; t < CHUNK / 8; t++) multiply(score[t], make_uint4(one.z, other.z, one.w, other.w), key[t].z, key[t].w);
            }
            const int its[2] = {min(max(seen[0] - c * CHUNK, 0), CHUNK), min(max(seen[1] - c * CHUNK, 0), CHUNK)};
            weigh_keys(score, its, q, weight[c], most[c], sum[c]);
        }
        if (part + 2 < 2 * PARTS) {
            __syncthreads();
            fetch(part + 2);
        }
    }

    /* Chunks that a query sees are joined in their order. */
    float top[2] = {-1.0e30f, -1.0e30f}, all[2] = {}, factor[CHUNKS][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if (seen[half] > c * CHUNK) top[half] = fmaxf(top[half], most[c][half]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if (seen[half] > c * CHUNK) factor[c][half] = power_of_two(most[c][half] - top[half]), all[half] = fmaf(sum[c][half], factor[c][half], all[half]);
    }
    float result[VALUE_PIECES][8][4] = {};
#pragma unroll
    for (int part = PARTS; part < 2 * PARTS; part++) {
        if (part + 1 < 2 * PARTS) await_copies<1>();
        else await_copies<0>();
        __syncthreads();
#pragma unroll
        for (int of_part = 0; of_part < PART_CHUNKS; of_part++) {
            const int c = (part - PARTS) * PART_CHUNKS + of_part;
            if (seen_here <= c * CHUNK) break;
            const u16 *values = staged + part % 2 * (STAGED * STRIDE) + (of_part * CHUNK + 2 * q) * STRIDE + 8 * g;
#pragma unroll
            for (int i = 0; i < VALUE_PIECES; i++) {
                float out[8][4] = {};
#pragma unroll
                for (int u = 0; u < CHUNK / 16; u++) {
                    uint4 value[4];
#pragma unroll
                    for (int v = 0; v < 4; v++)
                        value[v] = has_value(i, g) ? *(const uint4 *)(values + value_of(4 * u + v) * STRIDE + 64 * i) : make_uint4(0, 0, 0, 0);
                    add_values(out, weight[c], u, value);
                }
#pragma unroll
                for (int e = 0; e < 8; e++)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        if (seen[k / 2] > c * CHUNK) result[i][e][k] = fmaf(out[e][k], factor[c][k / 2], result[i][e][k]);
            }
        }
        if (part + 2 < 2 * PARTS) {
            __syncthreads();
            fetch(part + 2);
        }
    }

#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int half = k / 2;
        if (seen[half] <= 0) continue;
        const bool is_whole = seen[half] + first_key <= KEYS;
        float *partial = p.partial + ((size_t)(token[half] * p.heads + head[half]) * p.most_blocks + block) * PARTIAL;
        if (!is_whole && k % 2 == 0 && !q) partial[HEAD_DIM] = top[half], partial[HEAD_DIM + 1] = all[half];
#pragma unroll
        for (int i = 0; i < VALUE_PIECES; i++) {
            const int d = 64 * i + 16 * q + 8 * (k % 2);
            if (HEAD_DIM % 64 && d >= HEAD_DIM) continue;
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const float one = result[i][e][k], other = result[i][e + 1][k];
                if (is_whole) {
                    const float *by = p.factor ? p.factor + head[half] * HEAD_DIM + d + e : nullptr;
                    *(u32 *)(p.out + ((size_t)token[half] * p.heads + head[half]) * HEAD_DIM + d + e) =
                        round_pair(__fdividef(one, all[half]) * (by ? by[0] : 1.0f), __fdividef(other, all[half]) * (by ? by[1] : 1.0f));
                } else {
                    *(float2 *)(partial + d + e) = make_float2(one, other);
                }
            }
        }
    }
}

#define JOINED_HEADS 4 /* of a block */

/* Joins the shares that blocks of a token's keys have left, in their order. */
extern "C" __global__ void __launch_bounds__(HEAD_DIM * JOINED_HEADS) join_shares(const Attention p) {
    const int m = blockIdx.x, head = blockIdx.y * JOINED_HEADS + threadIdx.x / HEAD_DIM, d = threadIdx.x % HEAD_DIM;
    release_next();
    if (m >= p.step[NUM_TOKENS]) return;
    const int seen = p.step[SEEN + m];
    if (seen <= KEYS || head >= p.heads) return;
    wait_for_previous();
    join_shares_of<const float *>(p, m, head, d, seen);
}

#endif

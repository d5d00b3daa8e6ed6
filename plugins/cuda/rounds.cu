/* Rounds of speculative decoding that run without the host: what stands between the draft's levels (`grow` of decoder.cu), the
 * target's pass and the next round's draft.
 *
 *   plant    chooses the nodes of each row's tree among the candidates that grew
 *   lay      writes the numbers of the pass: roots and nodes of all rows
 *   settle   walks from each root along the target's own choices, moves the row's text on, writes the numbers of the draft's next
 *            step and tells the host
 *   compact  moves the entries of the kept paths together in the target's cache, and hands the draft the features of their tokens
 *
 * What they decide is defined by `ssv.runtime.decode.verify` and `growth`; `ssv.runtime.engines.cuda.rounds` drives them.
 */
#define LEVELS 16 /* most tokens of a path */
#define NODES 64  /* room of a tree */
#define ENDS 8    /* most tokens that end an output */
#define FOUND 1024 /* most candidates of a row */
#define SIZES 6    /* of trees that a row is told the worth of: 1, 3, 7, 15, 31 and 63 nodes */

/* Of the header. */
enum { NUM_ROWS, ROUND };

/* What a round knows of a row. */
enum {
    R_ROW,          /* of the caches */
    R_LENGTH,       /* tokens that the target has seen: the slot of the root */
    R_ROOT,         /* the token behind them */
    R_REST,         /* tokens that a draft may add to the output */
    R_LIMIT,        /* most nodes of its tree */
    R_DRAFT_LENGTH, /* entries of the draft's cache */
    R_PENDING,      /* tokens of its text that follow them */
    R_ACCEPT_BELOW, R_VERIFY_ABOVE, R_RISK_BUDGET, /* floats, see Policy */
    R_ENDS = 12,    /* -1: none */
    R_SIZE = R_ENDS + ENDS
};

/* A row's tree, and what became of it. */
enum {
    T_COUNT,
    T_FIRST, /* which token of the pass its root is */
    T_START, /* the slot of its first node */
    T_KEPT,  /* nodes of the path */
    T_DEST,  /* where the features of its tokens go, from the root's on; -1: nowhere */
    T_PATH = 8,
    T_TOKEN = T_PATH + LEVELS,
    T_PARENT = T_TOKEN + NODES, /* -1: the root */
    T_DEPTH = T_PARENT + NODES,
    T_RISK = T_DEPTH + NODES,
    T_GAINS = T_RISK + NODES, /* [LEVELS, SIZES] the sum of the survivals of the best so many candidates no deeper than that */
    T_SIZE = T_GAINS + LEVELS * SIZES
};

/* What the host is told of a row. */
enum {
    O_NODES, O_KEPT,
    O_JUDGED_ROWS, /* rows of the pass that were judged */
    O_JUDGED,      /* kept nodes that were */
    O_TOKENS,      /* the kept nodes', and the one behind them; -1 where the logits are no distribution */
    O_GAINS = O_TOKENS + LEVELS + 1, /* see T_GAINS */
    O_SIZE = O_GAINS + LEVELS * SIZES
};

#define UNTRUSTED 2.0f /* the risk of a node beside the first path */
#define AT_ONCE 8 /* entries of a cache that are moved side by side */
#define WHOLE (1 << 30) /* the prefix of a token of a chain */

__device__ __forceinline__ bool is_end(const int *row, int token) {
    bool found = false;
    for (int i = 0; i < ENDS; i++) found |= row[R_ENDS + i] == token;
    return found;
}

struct Plant {
    const int *header, *rows, *found; /* found: [rows, FOUND, 4] of Grow */
    int *trees;
    int levels, beam, children, nodes;
};

__device__ __forceinline__ int size_of(int i) { return i ? (2 << i) - 1 : 1; }

/* One block of 256 threads a row. */
extern "C" __global__ void __launch_bounds__(256) plant(const Plant p) {
    __shared__ int4 found[FOUND]; /* token, parent, share, risk */
    __shared__ float survival[FOUND];
    __shared__ short number[FOUND];
    __shared__ unsigned char level_of[FOUND], best_level[NODES];
    __shared__ float best[NODES];
    __shared__ int path[LEVELS + 1];
    const int g = blockIdx.x, t = threadIdx.x;
    release_next();
    wait_for_previous();
    if (g >= p.header[NUM_ROWS]) return;
    const int *row = p.rows + g * R_SIZE;
    int *tree = p.trees + g * T_SIZE;
    int num = 0;
    for (int level = 0, open = 1; level < p.levels; level++, open = min(p.beam, open * p.children)) num += open * p.children;
    for (int c = t; c < num; c += 256) found[c] = ((const int4 *)p.found)[(size_t)g * FOUND + c];
    const int rest = row[R_REST], most = min(p.nodes, rest > 0 ? row[R_LIMIT] : 0);
    __syncthreads();
    if (p.children == 1) {
        if (t) return;
        const float accept_below = __int_as_float(row[R_ACCEPT_BELOW]), verify_above = __int_as_float(row[R_VERIFY_ABOVE]);
        const double budget = __int_as_float(row[R_RISK_BUDGET]);
        double all_right = 1.0; /* in double, as the host has it: texts of lossy tiers must not depend on who drafts */
        int count = 0;
        while (count < min(min(p.levels, most), rest)) {
            const int4 it = found[count];
            if (it.x < 0) break;
            const float risk = __int_as_float(it.w);
            tree[T_TOKEN + count] = it.x, tree[T_PARENT + count] = count - 1, tree[T_DEPTH + count] = count + 1;
            tree[T_RISK + count] = it.w;
            count++;
            const bool is_judged = !(risk < accept_below);
            if (is_judged) all_right = __dmul_rn(all_right, __dsub_rn(1.0, (double)risk));
            if ((is_judged && risk > verify_above) || __dsub_rn(1.0, all_right) > budget || is_end(row, it.x)) break;
        }
        tree[T_COUNT] = count;
        return;
    }
    /* The candidates of the first path, that of the likeliest tokens: a trusted one of them is as good as chosen. */
    const float accept_below = __int_as_float(row[R_ACCEPT_BELOW]);
    if (t <= LEVELS) path[t] = t ? -2 : -1;
    __syncthreads();
    int first = 0, last = 0;
    for (int level = 0, open = 1; level < p.levels; level++, open = min(p.beam, open * p.children)) {
        first = last, last = first + open * p.children;
        for (int c = first + t; c < last; c += 256) {
            const int4 it = found[c];
            float above = 1.0f;
            float share = __int_as_float(it.z);
            if (it.y == path[level]) {
                const int rank = (c - first) % p.children;
                if (!rank) path[level + 1] = c;
                if (__int_as_float(found[c - rank].w) < accept_below) share = rank ? 0.0f : 1.0f;
            }
            if (it.y >= 0) above = is_end(row, found[it.y].x) ? 0.0f : survival[it.y];
            survival[c] = it.x < 0 || level >= rest ? 0.0f : above * share;
            level_of[c] = level;
        }
        __syncthreads();
    }
    if (t < NODES) best[t] = 0.0f, best_level[t] = LEVELS;
    __syncthreads();
    for (int c = t; c < last; c += 256) {
        int place = 0;
#pragma unroll 8
        for (int u = 0; u < last; u++) place += survival[u] > survival[c] || (survival[u] == survival[c] && u < c);
        number[c] = place < most && survival[c] > 0.0f;
        if (place < NODES) best[place] = survival[c], best_level[place] = level_of[c];
    }
    __syncthreads();
    if (t < LEVELS * SIZES) {
        const int depth = t / SIZES, size = size_of(t % SIZES);
        float sum = 0.0f;
        for (int i = 0, taken = 0; i < NODES && taken < size; i++)
            if (best_level[i] <= depth) sum += best[i], taken++;
        tree[T_GAINS + t] = __float_as_int(sum);
    }
    int own[FOUND / 256];
    for (int i = 0; i < FOUND / 256; i++) {
        const int c = t + 256 * i;
        own[i] = -1;
        if (c >= last || !number[c]) continue;
        own[i] = 0;
#pragma unroll 8
        for (int u = 0; u < c; u++) own[i] += number[u];
    }
    int total = 0;
    for (int c = 0; c < last; c += 256) total += __syncthreads_count(c + t < last && number[c + t]);
    if (!t) tree[T_COUNT] = total;
    for (int i = 0; i < FOUND / 256; i++)
        if (t + 256 * i < last) number[t + 256 * i] = own[i];
    __syncthreads();
    for (int i = 0; i < FOUND / 256; i++) {
        const int c = t + 256 * i, node = own[i];
        if (node < 0) continue;
        int depth = 1;
        for (int up = found[c].y; up >= 0; up = found[up].y) depth++;
        const int4 it = found[c];
        tree[T_TOKEN + node] = it.x, tree[T_PARENT + node] = it.y < 0 ? -1 : number[it.y], tree[T_DEPTH + node] = depth;
        tree[T_RISK + node] = path[level_of[c] + 1] == c ? it.w : __float_as_int(UNTRUSTED);
    }
}

struct Lay {
    const int *header, *rows;
    int *trees, *step;
    int has_paths, group_tokens, plain; /* plain: no trees */
};

/* One block of 1,024 threads, a warp a row. */
extern "C" __global__ void __launch_bounds__(1024) lay(const Lay p) {
    __shared__ int count[TOKENS], first[TOKENS], groups[TOKENS], parents[32][NODES];
    const int num = p.header[NUM_ROWS], t = threadIdx.x, lane = t & 31;
    release_next();
    wait_for_previous();
    if (!num) return;
    if (t < num) count[t] = 1 + (p.plain ? 0 : p.trees[t * T_SIZE + T_COUNT]);
    __syncthreads();
    if (!t) {
        int tokens = 0, all_groups = 0;
        for (int g = 0; g < num; g++) {
            first[g] = tokens, groups[g] = all_groups;
            tokens += count[g], all_groups += (count[g] + p.group_tokens - 1) / p.group_tokens;
        }
        p.step[NUM_TOKENS] = p.step[NUM_GATHERED] = tokens;
        p.step[NUM_GROUPS] = all_groups, p.step[HAS_PATHS] = p.has_paths, p.step[NUM_GROWING] = 0;
    }
    __syncthreads();
    for (int g = t >> 5; g < num; g += 32) {
        const int *row = p.rows + g * R_SIZE, length = row[R_LENGTH];
        int *tree = p.trees + g * T_SIZE;
        int *parent = parents[t >> 5];
        if (p.has_paths)
            for (int i = lane; i < count[g] - 1; i += 32) parent[i] = tree[T_PARENT + i];
        __syncwarp();
        if (!lane) tree[T_FIRST] = first[g], tree[T_START] = length + 1, tree[T_COUNT] = count[g] - 1;
        for (int i = lane; i < count[g]; i += 32) {
            const int m = first[g] + i, depth = i ? tree[T_DEPTH + i - 1] : 0;
            p.step[ID + m] = i ? tree[T_TOKEN + i - 1] : max(row[R_ROOT], 0);
            p.step[ROW + m] = row[R_ROW];
            p.step[SLOT + m] = length + i;
            p.step[SEEN + m] = length + 1 + depth;
            p.step[PREFIX + m] = p.has_paths ? length : WHOLE;
            p.step[GATHER + m] = m;
            if (p.has_paths) {
                int *path = p.step + PATH + m * DEPTH;
                for (int at = depth, node = i - 1; node >= 0; node = parent[node]) path[at--] = length + 1 + node;
                path[0] = length;
            }
        }
        for (int i = lane; i * p.group_tokens < count[g]; i += 32) {
            const int n = groups[g] + i, from = i * p.group_tokens;
            p.step[GROUP_FIRST + n] = first[g] + from;
            p.step[GROUP_COUNT + n] = min(p.group_tokens, count[g] - from);
            p.step[GROUP_NEW + n] = first[g];
            p.step[GROUP_NUM_NEW + n] = count[g];
        }
    }
}

struct Settle {
    int *header, *rows, *trees;
    const long long *chosen; /* by the target behind each token of the pass */
    int *step;               /* of the draft, where it takes part in every round; NULL: features are held */
    int *results;            /* [ring, TOKENS, O_SIZE], the host's memory */
    int is_chain, group_tokens, held, ring;
};

/* One block of 1,024 threads, a warp a row. */
extern "C" __global__ void __launch_bounds__(1024) settle(const Settle p) {
    __shared__ int gained[TOKENS], first[TOKENS], groups[TOKENS], path_token[32][LEVELS + 1];
    const int num = p.header[NUM_ROWS], t = threadIdx.x, warp = t >> 5, lane = t & 31;
    release_next();
    wait_for_previous();
    if (!num) return;
    int *results = p.results + (size_t)(p.header[ROUND] % p.ring) * TOKENS * O_SIZE;
    for (int base = 0; base < num; base += 32) {
        const int g = base + warp;
        if (g < num) {
            int *row = p.rows + g * R_SIZE, *tree = p.trees + g * T_SIZE, *out = results + g * O_SIZE;
            const int count = tree[T_COUNT];
            const float accept_below = __int_as_float(row[R_ACCEPT_BELOW]);
            /* Everything that the walk asks for is there before it begins. */
            const int root_choice = (int)p.chosen[tree[T_FIRST]];
            int parent[2], token[2], choices[2];
            bool is_trusted[2];
            int num_trusted = 0;
            for (int i = 0; i < 2; i++) {
                const int n = lane + 32 * i;
                const bool is_there = n < count;
                parent[i] = is_there ? tree[T_PARENT + n] : -2, token[i] = is_there ? tree[T_TOKEN + n] : -2;
                choices[i] = is_there ? (int)p.chosen[tree[T_FIRST] + n + 1] : -1;
                is_trusted[i] = is_there && __int_as_float(tree[T_RISK + n]) < accept_below;
                num_trusted += __popc(__ballot_sync(~0u, is_trusted[i]));
            }
            int node = -1, kept = 0, judged = 0, choice;
            for (;;) {
                choice = __shfl_sync(~0u, node < 32 ? choices[0] : choices[1], node & 31);
                if (node < 0) choice = root_choice;
                int child = -1;
                bool trusted = false;
                for (int i = 1; i >= 0; i--) { /* the first child that is it */
                    const u32 trusts = __ballot_sync(~0u, is_trusted[i] && parent[i] == node);
                    const u32 is_it = __ballot_sync(~0u, parent[i] == node && token[i] == choice);
                    if (trusts | is_it) child = 32 * i + __ffs(trusts ? trusts : is_it) - 1, trusted = trusts;
                }
                if (child < 0 || kept == LEVELS) break;
                judged += !trusted;
                const int its = __shfl_sync(~0u, child < 32 ? token[0] : token[1], child & 31);
                if (!lane) tree[T_PATH + kept] = child, path_token[warp][kept] = its;
                kept++, node = child;
            }
            if (!lane) path_token[warp][kept] = choice;
            __syncwarp();
            if (!p.is_chain)
                for (int i = lane; i < LEVELS * SIZES; i += 32) out[O_GAINS + i] = tree[T_GAINS + i];
            if (lane <= kept) out[O_TOKENS + lane] = path_token[warp][lane];
            if (!lane) {
                out[O_NODES] = count, out[O_KEPT] = kept, out[O_JUDGED_ROWS] = 1 + count - num_trusted, out[O_JUDGED] = judged;
                gained[g] = kept + 1;
                tree[T_KEPT] = kept;
                /* Where features are held, as long as there is room: a row that has waited longer will not draft again. */
                tree[T_DEST] = row[R_PENDING] + kept < p.held ? g * p.held + row[R_PENDING] : -1;
                row[R_LENGTH] += kept + 1, row[R_ROOT] = choice, row[R_REST] -= kept + 1;
                if (p.step) row[R_DRAFT_LENGTH] += row[R_PENDING], row[R_PENDING] = kept + 1;
                else row[R_PENDING] = min(row[R_PENDING] + kept + 1, p.held);
            }
        }
        __syncthreads(); /* rows of all warps are settled */
        /* The draft's next step: each row's new tokens. The offset of a row is what those before it have gained. */
        if (g < num && p.step) {
            int from = 0, from_group = 0;
            for (int i = 0; i < g; i++) from += gained[i], from_group += (gained[i] + p.group_tokens - 1) / p.group_tokens;
            if (!lane) first[g] = from, groups[g] = from_group;
            __syncwarp();
            const int *row = p.rows + g * R_SIZE, count = gained[g], length = row[R_DRAFT_LENGTH];
            if (lane < count) {
                const int m = from + lane;
                p.step[ID + m] = max(path_token[warp][lane], 0);
                p.step[ROW + m] = row[R_ROW];
                p.step[SLOT + m] = length + lane;
                p.step[SEEN + m] = length + lane + 1;
                p.step[PREFIX + m] = WHOLE;
            }
            for (int i = lane; i * p.group_tokens < count; i += 32) {
                const int n = from_group + i, at = i * p.group_tokens;
                p.step[GROUP_FIRST + n] = from + at;
                p.step[GROUP_COUNT + n] = min(p.group_tokens, count - at);
                p.step[GROUP_NEW + n] = from;
                p.step[GROUP_NUM_NEW + n] = count;
            }
            if (!lane) {
                p.trees[g * T_SIZE + T_DEST] = from;
                p.step[GATHER + g] = from + count - 1;
                p.step[GROW_ROW + g] = row[R_ROW];
                p.step[GROW_START + g] = p.step[GROW_END + g] = length + count;
                p.step[GROW_LEVEL + g] = p.step[GROW_FOUND + g] = 0;
            }
        }
        __syncthreads();
    }
    if (t) return;
    p.header[ROUND]++;
    if (p.step) {
        p.step[NUM_TOKENS] = first[num - 1] + gained[num - 1];
        p.step[NUM_GATHERED] = p.step[NUM_GROWING] = num;
        p.step[NUM_GROUPS] = groups[num - 1] + (gained[num - 1] + p.group_tokens - 1) / p.group_tokens;
        p.step[HAS_PATHS] = 0;
    }
}

struct Compact {
    const int *header, *rows, *trees;
    u16 *keys, *values;         /* [layers, batch, kv_heads, slots, dim] of the target */
    const float *features;      /* [TOKENS, hidden] of the pass; NULL: none are wanted */
    float *dest;
    int layers, batch, kv_heads, slots, dim, hidden;
};

/* Of each row a block a layer, and one for its features; without layers that alone. */
extern "C" __global__ void __launch_bounds__(128) compact(const Compact p) {
    __shared__ int path[LEVELS];
    const int g = blockIdx.y, layer = blockIdx.x, t = threadIdx.x;
    release_next();
    wait_for_previous();
    if (g >= p.header[NUM_ROWS]) return;
    const int *tree = p.trees + g * T_SIZE, kept = tree[T_KEPT], start = tree[T_START];
    if (layer < p.layers) {
        const int pieces = p.dim / 8; /* of 16 bytes */
        const size_t row = ((size_t)layer * p.batch + p.rows[g * R_SIZE + R_ROW]) * p.kv_heads;
        if (t < LEVELS) path[t] = tree[T_PATH + t];
        __syncthreads();
        if (!kept || path[kept - 1] == kept - 1) return; /* nodes ascend along a path: all of them are in their places */
        for (int at = t; at < 2 * p.kv_heads * pieces; at += 128) {
            const int piece = at % pieces, head = at / pieces % p.kv_heads;
            uint4 *cache = (uint4 *)((at < p.kv_heads * pieces ? p.keys : p.values) + ((row + head) * p.slots + start) * p.dim) + piece;
            for (int first = 0; first < kept; first += AT_ONCE) { /* none is overwritten before it has moved */
                uint4 moved[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if (first + i < kept) moved[i] = cache[(size_t)path[first + i] * pieces];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if (first + i < kept) cache[(size_t)(first + i) * pieces] = moved[i];
            }
        }
        return;
    }
    if (!p.features) return;
    const int from = tree[T_FIRST], to = tree[T_DEST];
    if (to < 0) return;
    for (int i = t >> 5; i <= kept; i += 4) { /* a warp a token: its loads are under way side by side */
        const float4 *source = (const float4 *)(p.features + (size_t)(from + (i ? tree[T_PATH + i - 1] + 1 : 0)) * p.hidden);
        float4 *dest = (float4 *)(p.dest + (size_t)(to + i) * p.hidden);
#pragma unroll 8
        for (int h = t & 31; h < p.hidden / 4; h += 32) dest[h] = source[h];
    }
}

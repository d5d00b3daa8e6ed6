/* Tokens that are chosen by chance: temperature, top-k and top-p, then the noise of a request's seed and a token's place.
 *
 *   draw     the token that each row of logits chooses
 *   perturb  makes logits of a draft what the target chooses the largest of, if they are like the target's
 *
 * Both are defined by `choose` and `ranked` of `ssv.runtime.decode.sampling`, the noise by `choose` of `ssv.plugins.reference`. What
 * a row gives depends on its own logits and settings alone. Rows of temperature 0 choose their largest logit.
 */
#define THREADS 1024
#define LISTED 1024   /* most values that are put in order */
#define AT_FIRST 128  /* of them where top-p says how many are kept: as a rule enough */
#define MOST_LISTED_K 512
#define LOWEST (-1.0f / 0.0f)

struct Shared {
    double sums[32];
    float values[32];
    int columns[32];
    float listed[LISTED];
    int num, kept;
};

/* Bits whose order is that of the numbers; both zeros have the same. */
__device__ __forceinline__ u32 key_of(float value) {
    const u32 bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/* All threads of the block learn it; added in an order that is always the same. */
__device__ __forceinline__ double sum_of_block(double x, Shared &s) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    __syncthreads();
    if (!lane) s.sums[warp] = x;
    __syncthreads();
    x = s.sums[lane];
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* Calls f(value, column) for this thread's columns, in their order. Unrolled where f is short: what does not fit the cache of
 * instructions is slower than what waits for its loads. */
template <int UNROLL, typename F>
__device__ __forceinline__ void each(const float *row, int vocab, F f) {
    if (vocab % 4 == 0) {
#pragma unroll UNROLL
        for (int i = threadIdx.x; i < vocab / 4; i += THREADS) {
            const float4 four = ((const float4 *)row)[i];
            f(four.x, 4 * i), f(four.y, 4 * i + 1), f(four.z, 4 * i + 2), f(four.w, 4 * i + 3);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < vocab; i += THREADS) f(row[i], i);
    }
}

struct Top {
    float value, own; /* of the row, and of this thread's columns */
    int column;       /* the first that has it */
    bool is_number;   /* no NaN among them, and the largest is finite */
};

__device__ __forceinline__ Top top_of(const float *row, int vocab, Shared &s) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float most = LOWEST;
    int column = vocab;
    bool is_number = true;
    each<4>(row, vocab, [&](float value, int at) {
        is_number &= value == value;
        if (value > most) most = value, column = at;
    });
    Top found;
    found.own = most;
    is_number = __syncthreads_and(is_number);
    largest_of_warp(most, column);
    if (!lane) s.values[warp] = most, s.columns[warp] = column;
    __syncthreads();
    most = s.values[lane], column = s.columns[lane];
    largest_of_warp(most, column);
    found.value = most, found.column = column;
    found.is_number = is_number && column < vocab && most <= 3.0e38f;
    return found;
}

/* --- what top-k and top-p leave ----------------------------------------------------------------------------------------- */

/* Kept are larger values, and the first `equals` columns of that value; of them not all if it is `cut`. */
struct Edge {
    float value;
    int equals;
    bool cut;
};

__device__ __noinline__ bool keeps(const Edge &edge, const float *row, float value, int column) {
    if (value != edge.value) return value > edge.value;
    if (!edge.cut) return true;
    int before = 0;
    for (int i = 0; i < column; i++) before += row[i] == value;
    return before < edge.equals;
}

/* A row as top-k and top-p see it: weights are e to `(value - top) * rate`. */
struct Row {
    const float *values;
    int vocab;
    float top, rate;
};

/* How many values are above one, and the sum of their weights. */
struct Sum {
    double count, mass;
};

__device__ __noinline__ Sum above(const Row &row, float bound, Shared &s) {
    int own = 0;
    double sum = 0.0;
    each<2>(row.values, row.vocab, [&](float value, int) {
        if (value > bound) own++, sum += (double)__expf((value - row.top) * row.rate);
    });
    return {sum_of_block((double)own, s), sum_of_block(sum, s)};
}

/* Lists the values from above `low`, or from it on, up to `high`; how many there are, which may be more than are listed. */
__device__ __noinline__ int list(const Row &row, float low, bool with_low, float high, Shared &s) {
    __syncthreads();
    if (!threadIdx.x) s.num = 0;
    __syncthreads();
    each<2>(row.values, row.vocab, [&](float value, int) {
        if (value > high || value < low || (value == low && !with_low)) return;
        const int at = atomicAdd(&s.num, 1);
        if (at < LISTED) s.listed[at] = value;
    });
    __syncthreads();
    return s.num;
}

/* Puts what is listed in order. The first of it are kept: those with fewer than `most` and less weight than `limit` before them, what is
 * above the list included. */
__device__ __noinline__ Edge edge_of_list(const Row &row, int num, double most, double limit, Sum before, int &kept, double &mass, Shared &s) {
    const int t = threadIdx.x, lane = t & 31;
    const float own = t < num ? s.listed[t] : 0.0f;
    int place = 0;
    if (t < num)
        for (int u = 0; u < num; u++) place += s.listed[u] > own || (s.listed[u] == own && u < t);
    __syncthreads();
    if (t < num) s.listed[place] = own;
    __syncthreads();
    if (t < 32) { /* one warp, 32 at a time */
        double sum = before.mass;
        kept = num;
        for (int base = 0; base < num; base += 32) {
            const int i = base + lane;
            const double weight = i < num ? exp((double)((s.listed[i] - row.top) * row.rate)) : 0.0;
            double up_to = weight;
            for (int step = 1; step < 32; step <<= 1) {
                const double other = __shfl_up_sync(~0u, up_to, step);
                if (lane >= step) up_to += other;
            }
            const bool is_kept = i < num && (!i || (before.count + i < most && sum + (up_to - weight) < limit));
            if (const u32 lost = ~__ballot_sync(~0u, is_kept)) {
                const int here = __ffs(lost) - 1;
                kept = base + here;
                if (here) sum += __shfl_sync(~0u, up_to, here - 1);
                break;
            }
            sum += __shfl_sync(~0u, up_to, 31);
        }
        if (!lane) s.kept = kept, s.sums[0] = sum;
    }
    __syncthreads();
    kept = s.kept, mass = s.sums[0];
    Edge edge;
    edge.value = s.listed[kept - 1];
    edge.equals = __syncthreads_count(t < kept && s.listed[t] == edge.value);
    edge.cut = edge.equals < __syncthreads_count(t < num && s.listed[t] == edge.value);
    return edge;
}

/* The same of a whole row, where `high` is known to be kept: halves what lies below it until that can be listed. */
__device__ __noinline__ Edge edge_below(const Row &row, float high, double most, double limit, double &mass, Shared &s) {
    float low = -LOWEST;
    each<2>(row.values, row.vocab, [&](float value, int) {
        if (value > LOWEST) low = fminf(low, value);
    });
    for (int step = 16; step; step >>= 1) low = fminf(low, __shfl_xor_sync(~0u, low, step));
    __syncthreads();
    if (!(threadIdx.x & 31)) s.values[threadIdx.x >> 5] = low;
    __syncthreads();
    low = s.values[threadIdx.x & 31];
    for (int step = 16; step; step >>= 1) low = fminf(low, __shfl_xor_sync(~0u, low, step));
    Sum above_low = above(row, low, s), above_high = above(row, high, s);
    if (above_low.count < most && above_low.mass < limit) return {low, 0, false};
    for (;;) {
        const float middle = low + 0.5f * (high - low);
        if (above_low.count - above_high.count <= (double)LISTED || middle <= low || middle >= high) break;
        const Sum sum = above(row, middle, s);
        if (sum.count < most && sum.mass < limit) high = middle, above_high = sum;
        else low = middle, above_low = sum;
    }
    const double num = above_low.count - above_high.count;
    int kept;
    if (num <= (double)LISTED) return edge_of_list(row, list(row, low, false, high, s), most, limit, above_high, kept, mass, s);
    /* There is no number between the two: all these are the same. */
    const double weight = exp((double)((high - row.top) * row.rate));
    const double wanted = fmin(fmin(num, most - above_high.count), fmax(ceil((limit - above_high.mass) / weight), 1.0));
    mass = above_high.mass + wanted * weight;
    return {high, (int)wanted, wanted < num};
}

/* All threads of the block learn it. */
__device__ __noinline__ Edge edge_of(const float *values, int vocab, const Top &top, float temperature, int top_k, float top_p, Shared &s) {
    const bool few = top_k > 0 && top_k < vocab, some = top_p < 1.0f;
    if (!few && !some) return {LOWEST, 0, false};
    const double none = 1.0 / 0.0, most = few ? top_k : vocab;
    const Row row = {values, vocab, top.value, 1.0f / temperature};
    double limit = none, mass = 0.0;
    if (some && !few) limit = (double)top_p * above(row, LOWEST, s).mass;
    float high = top.value;
    const int wanted = few ? top_k : AT_FIRST;
    if (wanted <= MOST_LISTED_K) {
        /* The wanted-th largest of the threads' own largest values: at least so many are not below it, and few more. */
        u32 key = 0;
        for (int bit = 31; bit >= 0; bit--)
            if (__syncthreads_count(key_of(top.own) >= (key | 1u << bit)) >= wanted) key |= 1u << bit;
        const float bound = value_of(key);
        const int num = list(row, bound, true, high, s);
        if (num <= LISTED) {
            int kept;
            Edge edge = edge_of_list(row, num, most, limit, {0.0, 0.0}, kept, mass, s);
            if (few && some) edge = edge_of_list(row, num, most, (double)top_p * mass, {0.0, 0.0}, kept, mass, s);
            if (few || kept < num || num == vocab) return edge;
            high = bound;
        }
    }
    if (few && some) {
        edge_below(row, high, most, none, mass, s);
        limit = (double)top_p * mass;
    }
    return edge_below(row, high, most, limit, mass, s);
}

/* --- noise ------------------------------------------------------------------------------------------------------------ */

/* Philox4x32-10 (Salmon et al. 2011): the words of tokens 4 * group and following. */
__device__ __forceinline__ uint4 words_of(u32 group, u32 position, u32 low, u32 high) {
    uint4 c = {group, position, 0, 0};
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u32 a = __umulhi(0xD2511F53u, c.x), b = __umulhi(0xCD9E8D57u, c.z);
        c = make_uint4(b ^ c.y ^ low, 0xCD9E8D57u * c.z, a ^ c.w ^ high, 0xD2511F53u * c.x);
        low += 0x9E3779B9u, high += 0xBB67AE85u;
    }
    return c;
}
__device__ __forceinline__ u32 word_of(const uint4 &words, int which) {
    return which & 2 ? (which & 1 ? words.w : words.z) : (which & 1 ? words.y : words.x);
}

__device__ __forceinline__ float scaled(float value, float top, float temperature) { return (value - top) / temperature; }

__device__ __noinline__ double noise_of(u32 word) { return -log(-log(((double)word + 0.5) * 0x1p-32)); }

/* The same to some six digits: of a draft's guesses the likeliest few are wanted, and what is nearly equal may change places. */
__device__ __forceinline__ float rough_noise_of(u32 word) {
    const float t = ((float)~word + 0.5f) * 0x1p-32f; /* 1 - u */
    const float series = t * (1.0f + t * (0.5f + t * (1.0f / 3.0f + t * (0.25f + t * 0.2f))));
    return -__logf(t < 0.0625f ? series : -__logf(((float)word + 0.5f) * 0x1p-32f));
}

/* Calls f(value, column, word) for this thread's columns, in their order, with the random word of each column's token. Four at a
 * time, whose words belong together, and none of them where the largest does not matter. */
template <typename G, typename F>
__device__ __forceinline__ void each_with_word(const float *row, int vocab, const long long *tokens, u32 position, u32 low, u32 high, G matters, F f) {
#pragma unroll 1
    for (int base = 4 * threadIdx.x; base < vocab; base += 4 * THREADS) {
        float4 four = {LOWEST, LOWEST, LOWEST, LOWEST};
        if (vocab % 4 == 0) four = *(const float4 *)(row + base);
        else {
            four.x = row[base];
            if (base + 1 < vocab) four.y = row[base + 1];
            if (base + 2 < vocab) four.z = row[base + 2];
            if (base + 3 < vocab) four.w = row[base + 3];
        }
        if (!matters(fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)))) continue;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (!tokens) words = words_of((u32)base >> 2, position, low, high);
#pragma unroll 1
        for (int j = 0; j < 4 && base + j < vocab; j++) {
            if (tokens && matters(four.x)) {
                const u32 token = (u32)tokens[base + j];
                words.x = word_of(words_of(token >> 2, position, low, high), token);
            }
            f(four.x, base + j, words.x);
            four = make_float4(four.y, four.z, four.w, LOWEST), words = make_uint4(words.y, words.z, words.w, 0);
        }
    }
}

struct Draw {
    const int *step;
    const float *logits;     /* [rows, V] */
    const long long *tokens; /* [V], of the columns; NULL: their numbers */
    const int *settings;     /* [rows of the cache, S_SIZE] */
    long long *token;        /* [rows]; -1 where the logits are no distribution */
    int vocab, gives_columns; /* instead of tokens */
};

/* One block a row. */
extern "C" __global__ void __launch_bounds__(THREADS) draw(const Draw p) {
    __shared__ Shared s;
    __shared__ double first_score, scores[32];
    const int r = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    release_next();
    wait_for_previous();
    if (r >= p.step[NUM_GATHERED]) return;
    const float *row = p.logits + (size_t)r * p.vocab;
    const int m = p.step[GATHER + r], *mine = p.settings + p.step[ROW + m] * S_SIZE;
    const float temperature = __int_as_float(mine[S_TEMPERATURE]);
    const Top top = top_of(row, p.vocab, s);
    const bool is_mapped = p.tokens && !p.gives_columns;
    if (!top.is_number || temperature == 0.0f) {
        if (!threadIdx.x) p.token[r] = !top.is_number ? -1 : is_mapped ? p.tokens[top.column] : top.column;
        return;
    }
    const Edge edge = edge_of(row, p.vocab, top, temperature, mine[S_TOP_K], __int_as_float(mine[S_TOP_P]), s);
    const u32 position = (u32)(p.step[SEEN + m] + mine[S_AHEAD]), low = (u32)mine[S_SEED_LOW], high = (u32)mine[S_SEED_HIGH];
    if (!threadIdx.x) {
        const int token = p.tokens ? (int)p.tokens[top.column] : top.column;
        first_score = noise_of(word_of(words_of((u32)token >> 2, position, low, high), token));
    }
    __syncthreads();
    /* What is surely below the best so far is left out without a logarithm: with t = 1 - u the noise is at most -log(t). */
    double best = first_score;
    int column = top.column;
    const auto matters = [&](float value) { /* it is kept, and its noise may be large enough */
        return value >= edge.value && (float)best - scaled(value, top.value, temperature) <= 24.0f;
    };
    each_with_word(row, p.vocab, p.tokens, position, low, high, matters, [&](float value, int at, u32 word) {
        if (!matters(value)) return;
        const float x = scaled(value, top.value, temperature);
        if (((float)~word + 0.5f) * 0x1p-32f > 1.001f * __expf(x - (float)best)) return;
        const double score = (double)x + noise_of(word);
        if ((score > best || (score == best && at < column)) && keeps(edge, row, value, at)) best = score, column = at;
    });
    largest_of_warp(best, column);
    if (!lane) scores[warp] = best, s.columns[warp] = column;
    __syncthreads();
    best = scores[lane], column = s.columns[lane];
    largest_of_warp(best, column);
    if (!threadIdx.x) p.token[r] = is_mapped ? p.tokens[column] : column;
}

struct Perturb {
    const int *step;
    float *logits;           /* [rows, V], of those that sample l + temperature * noise; -inf for what they may not choose */
    const long long *tokens; /* see Draw */
    const int *settings;
    float *extra; /* [rows]: the weight of what they may not choose, as another model may */
    int vocab;
};

/* One block a row. */
extern "C" __global__ void __launch_bounds__(THREADS) perturb(const Perturb p) {
    __shared__ Shared s;
    const int r = blockIdx.x;
    release_next();
    wait_for_previous();
    if (r >= p.step[NUM_GATHERED]) return;
    float *row = p.logits + (size_t)r * p.vocab;
    const int m = p.step[GATHER + r], *mine = p.settings + p.step[ROW + m] * S_SIZE;
    const float temperature = __int_as_float(mine[S_TEMPERATURE]);
    if (temperature == 0.0f) {
        if (!threadIdx.x) p.extra[r] = 0.0f;
        return;
    }
    const Top top = top_of(row, p.vocab, s);
    const Edge edge = edge_of(row, p.vocab, top, temperature, mine[S_TOP_K], __int_as_float(mine[S_TOP_P]), s);
    const u32 position = (u32)(p.step[SEEN + m] + mine[S_AHEAD]), low = (u32)mine[S_SEED_LOW], high = (u32)mine[S_SEED_HIGH];
    double lost = 0.0;
    if (edge.value > LOWEST)
        each<2>(row, p.vocab, [&](float value, int at) {
            if (value < edge.value) row[at] = LOWEST, lost += (double)__expf(value - top.value);
        });
    const auto matters = [&](float value) { return value >= edge.value; };
    u32 ties[2] = {0, 0}; /* whether a value at the edge is kept has to be known before any of them is overwritten */
    int number = 0;
    const auto is_tie = [&](float value) { return edge.cut && value == edge.value && number < 64; };
    each_with_word(row, edge.cut ? p.vocab : 0, nullptr, 0, 0, 0, matters, [&](float value, int at, u32) {
        if (is_tie(value)) ties[number >> 5] |= (u32)keeps(edge, row, value, at) << (number & 31), number++;
    });
    __syncthreads();
    number = 0;
    each_with_word(row, p.vocab, p.tokens, position, low, high, matters, [&](float value, int at, u32 word) {
        const float below = value - top.value;
        bool kept = value > edge.value || (value == edge.value && !edge.cut);
        if (is_tie(value)) kept = ties[number >> 5] >> (number & 31) & 1, number++;
        row[at] = kept ? below + temperature * rough_noise_of(word) : LOWEST;
        if (!kept && value >= edge.value) lost += (double)__expf(below);
    });
    lost = sum_of_block(lost, s);
    if (!threadIdx.x) p.extra[r] = (float)lost;
}

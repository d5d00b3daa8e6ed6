/* What all kernels share: where the numbers of a step lie, how kernels follow one another, and which lane of a warp has most. It
 * stands before each source that is compiled.
 */
typedef unsigned int u32;
typedef unsigned short u16;

#ifndef TOKENS
#define TOKENS 64 /* most tokens of a step */
#endif

/* Where the numbers of a step lie; `ssv.runtime.engines.cuda.places` writes them. */
enum {
    NUM_TOKENS, NUM_GATHERED, NUM_GROUPS, HAS_PATHS, NUM_GROWING,
    ID = 8,
    ROW = ID + TOKENS,
    SLOT = ROW + TOKENS,
    SEEN = SLOT + TOKENS,     /* keys that a token sees, its own among them */
    PREFIX = SEEN + TOKENS,   /* of them, those that lie in the slots of their positions */
    GATHER = PREFIX + TOKENS, /* tokens that get logits */
    GROUP_FIRST = GATHER + TOKENS, /* groups: some tokens of one row */
    GROUP_COUNT = GROUP_FIRST + TOKENS,
    GROUP_NEW = GROUP_COUNT + TOKENS, /* first of the row's tokens in this step, and how many they are */
    GROUP_NUM_NEW = GROUP_NEW + TOKENS,
    /* Of rows whose trees grow, and rewritten with every level of them. */
    GROW_ROW = GROUP_NUM_NEW + TOKENS,
    GROW_START = GROW_ROW + TOKENS,  /* slots of the row's text */
    GROW_LEVEL = GROW_START + TOKENS,
    GROW_END = GROW_LEVEL + TOKENS,  /* the first slot that is free */
    GROW_FOUND = GROW_END + TOKENS,  /* candidates so far */
    PATH = GROW_FOUND + TOKENS, /* [TOKENS][DEPTH] slots behind the prefix */
    DEPTH = 80
};

/* How a row chooses, by its place in the caches: floats are bits. */
enum {
    S_TEMPERATURE, /* 0: greedily, and the others do not count */
    S_TOP_K,       /* 0: all */
    S_TOP_P,
    S_SEED_LOW, S_SEED_HIGH,
    S_AHEAD, /* by how much the place of the token behind one is more than the number of keys that the one sees */
    S_SIZE = 8
};

/* Before compute capability 9.0 a kernel begins when the one before it has ended. */
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Of the lanes of a warp, all of them learn the largest value, and the first column that has it. Columns are not negative; what is
 * not a number must not be among the values. */
template <typename V>
__device__ __forceinline__ void largest_of_warp(V &most, int &column) {
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        const V other = __shfl_xor_sync(~0u, most, step);
        const int its = __shfl_xor_sync(~0u, column, step);
        if (other > most || (other == most && its < column)) most = other, column = its;
    }
}
template <>
__device__ __forceinline__ void largest_of_warp(float &most, int &column) {
    const int bits = __float_as_int(most + 0.0f); /* 0 and -0 are equal */
    const u32 key = bits ^ (bits >> 31 | 0x80000000u), largest = __reduce_max_sync(~0u, key); /* in the order of the numbers */
    column = __reduce_min_sync(~0u, key == largest ? (u32)column : ~0u);
    most = __uint_as_float(largest ^ (largest >> 31 ? 0x80000000u : ~0u));
}

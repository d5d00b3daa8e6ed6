/* CUDA C++ kernels as C++ for the CPU: every thread of a block is a fiber, which stops where it has to wait for others. Blocks run
 * one after the other; shared memory is NaN until it is written. For tests of what kernels compute, where there is no GPU; it says
 * nothing about races.
 */
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>
using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct int4 { int x, y, z, w; };
struct float4 { float x, y, z, w; };
struct float2 { float x, y; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

/* --- threads ---------------------------------------------------------------------------------------------------------- */

struct Index { int x, y, z; };
static Index blockIdx, gridDim, blockDim;
static unsigned char *dynamic_shared;

struct Fiber { ucontext_t context; bool is_done; };
struct Warp { int arrived, generation, live; unsigned char given[2][32][32]; };
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static ucontext_t scheduler;
static int current, live, arrived, generation, given[2];
static void (*entry)();

struct Thread { int x; };
static inline Thread this_thread() { return {current}; }
#define threadIdx this_thread()

static void wait_a_turn() { swapcontext(&fibers[current].context, &scheduler); }

/* What all lanes of the warp give, once they have. */
typedef unsigned char (*Given)[32];
static inline Given from_all_lanes(const void *mine, int size) {
    Warp &warp = warps[current / 32];
    const int mine_is = warp.generation;
    std::memcpy(warp.given[mine_is & 1][current % 32], mine, size);
    if (++warp.arrived == warp.live) warp.arrived = 0, warp.generation++;
    else
        while (warp.generation == mine_is) wait_a_turn();
    return warp.given[mine_is & 1];
}
template <typename T> static inline T of_lane(Given all, int lane) {
    T value;
    std::memcpy(&value, all[lane & 31], sizeof value);
    return value;
}
template <typename T> static inline T __shfl_xor_sync(unsigned, T x, int step) { return of_lane<T>(from_all_lanes(&x, sizeof x), current ^ step); }
template <typename T> static inline T __shfl_sync(unsigned, T x, int lane) { return of_lane<T>(from_all_lanes(&x, sizeof x), lane); }
static inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    const Given all = from_all_lanes(&x, sizeof x);
    for (int lane = 0; lane < 32; lane++) x = max(x, of_lane<unsigned>(all, lane));
    return x;
}
static inline unsigned __reduce_min_sync(unsigned, unsigned x) {
    const Given all = from_all_lanes(&x, sizeof x);
    for (int lane = 0; lane < 32; lane++) x = min(x, of_lane<unsigned>(all, lane));
    return x;
}
static inline unsigned __ballot_sync(unsigned, bool x) {
    const Given all = from_all_lanes(&x, sizeof x);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= (unsigned)of_lane<bool>(all, lane) << lane;
    return bits;
}
static inline void __syncwarp() { __ballot_sync(~0u, false); }
static inline int __syncthreads_count(bool x) {
    const int mine_is = generation;
    if (!arrived) given[mine_is & 1] = 0;
    given[mine_is & 1] += x;
    if (++arrived == live) arrived = 0, generation++;
    else
        while (generation == mine_is) wait_a_turn();
    return given[mine_is & 1];
}
static inline void __syncthreads() { __syncthreads_count(false); }
static inline bool __syncthreads_and(bool x) { return !__syncthreads_count(!x); }
static inline void __threadfence() {}
static inline int atomicAdd(int *to, int value) { return (*to += value) - value; }

static void run_thread() {
    entry();
    Warp &warp = warps[current / 32];
    fibers[current].is_done = true, live--, warp.live--;
    if (warp.live && warp.arrived == warp.live) warp.arrived = 0, warp.generation++;
    if (live && arrived == live) arrived = 0, generation++;
    wait_a_turn();
}

template <typename Call> static void run_grid(Call call, int x, int y, int z, int threads, int shared) {
    static Call *now;
    static std::vector<std::vector<char>> stacks;
    now = &call, entry = [] { (*now)(); };
    gridDim = {x, y, z}, blockDim = {threads, 1, 1};
    std::vector<unsigned char> memory(shared + 16);
    dynamic_shared = (unsigned char *)((uintptr_t)(memory.data() + 15) & ~(uintptr_t)15);
    if ((int)stacks.size() < threads) stacks.resize(threads, std::vector<char>(1 << 16));
    for (int block = 0; block < x * y * z; block++) {
        blockIdx = {block % x, block / x % y, block / (x * y)};
        std::memset(dynamic_shared, 0xff, shared);
        fibers.assign(threads, Fiber{}), warps.assign((threads + 31) / 32, Warp{});
        for (Warp &warp : warps) warp.live = 32;
        live = threads, arrived = generation = 0;
        for (int t = 0; t < threads; t++) {
            ucontext_t &context = fibers[t].context;
            getcontext(&context);
            context.uc_stack.ss_sp = stacks[t].data(), context.uc_stack.ss_size = stacks[t].size(), context.uc_link = &scheduler;
            makecontext(&context, run_thread, 0);
        }
        while (live)
            for (int t = 0; t < threads; t++)
                if (!fibers[t].is_done) current = t, swapcontext(&scheduler, &fibers[t].context);
    }
}

/* --- numbers ---------------------------------------------------------------------------------------------------------- */

template <typename To, typename From> static inline To bits_of(From x) {
    To r;
    std::memcpy(&r, &x, sizeof r);
    return r;
}
static inline float __uint_as_float(unsigned x) { return bits_of<float>(x); }
static inline float __int_as_float(int x) { return bits_of<float>(x); }
static inline int __float_as_int(float x) { return bits_of<int>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline float __expf(float x) { return std::exp(x); }
static inline float __logf(float x) { return std::log(x); }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return r;
}
static inline unsigned to_bf16(float x) {
    const unsigned bits = bits_of<unsigned>(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
static inline float from_bf16(unsigned x) { return __uint_as_float(x << 16); }

/* mma.m16n8k16 of bf16: a lane (g, q) has A's rows g and g + 8 and B's column g, of channels 2 q and 8 more. */
static inline void tensor_core(float *c, const uint4 &a, unsigned b0, unsigned b1) {
    const unsigned mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
    const Given all = from_all_lanes(mine, sizeof mine);
    const auto of = [&](int row, int k, int word) {
        const unsigned pair = ((const unsigned *)all[row * 4 + k % 8 / 2])[word];
        return (double)from_bf16(k & 1 ? pair >> 16 : pair & 0xffffu);
    };
    const int g = current % 32 >> 2, q = current & 3;
    for (int i = 0; i < 4; i++) {
        double sum = c[i];
        for (int k = 0; k < 16; k++) sum += of(g, k, i / 2 + k / 8 * 2) * of(2 * q + i % 2, k, 4 + k / 8);
        c[i] = (float)sum;
    }
}

/* One stage for several processors: compiled for each generation of x86-64, chosen when the module is loaded. */
#ifndef SSV_PROCESSORS_H
#define SSV_PROCESSORS_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif

/* A helper that the compiler leaves on its own would not be cloned with its caller, and have the oldest processor's instructions. */
#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#endif

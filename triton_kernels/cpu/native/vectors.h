/* Sixteen floats at a time, in the compiler's own vector types: wide registers where the CPU has them. */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }

/* The sum of the lanes, halved again and again: the same order with every register width. */
static inline float sum_lanes(vec v)
{
    eight low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (const char *)&v + sizeof low, sizeof high);
    low += high;
    four a, b;
    memcpy(&a, &low, sizeof a);
    memcpy(&b, (const char *)&low + sizeof a, sizeof b);
    a += b;
    return (a[0] + a[2]) + (a[1] + a[3]);
}

/* <a, b> over n numbers. */
static inline float dot(const float *restrict a, const float *restrict b, int64_t n)
{
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        s0 += load(a + i) * load(b + i);
        s1 += load(a + i + LANES) * load(b + i + LANES);
        s2 += load(a + i + 2 * LANES) * load(b + i + 2 * LANES);
        s3 += load(a + i + 3 * LANES) * load(b + i + 3 * LANES);
    }
    for (; i + LANES <= n; i += LANES) s0 += load(a + i) * load(b + i);
    float s = sum_lanes((s0 + s1) + (s2 + s3));
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

/* out += v x over n numbers. */
static inline void add_scaled(float *restrict out, float v, const float *restrict x, int64_t n)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, load(out + i) + v * load(x + i));
    for (; i < n; i++) out[i] += v * x[i];
}

/* out = v x over n numbers, past the caches where the CPU can: what nobody reads soon need not be fetched to be written. */
static inline void stream_scaled(float *restrict out, float v, const float *restrict x, int64_t n)
{
    int64_t i = 0;
#ifdef __SSE__
    if (((uintptr_t)out & 15) == 0)
        for (; i + 4 <= n; i += 4) _mm_stream_ps(out + i, _mm_mul_ps(_mm_set1_ps(v), _mm_loadu_ps(x + i)));
#endif
    for (; i < n; i++) out[i] = v * x[i];
}

/* Sixteen floats at a time, in as many registers as that takes on this CPU. A vector type wider than the registers would
   live in memory. */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

#define LANES 16
#if defined __AVX512F__
#define REGISTERS 1
#elif defined __AVX__
#define REGISTERS 2
#else
#define REGISTERS 4
#endif
typedef float reg __attribute__((vector_size(4 * LANES / REGISTERS), aligned(4)));
typedef float four __attribute__((vector_size(16)));
typedef struct {
    reg part[REGISTERS];
} vec;

static inline vec load(const float *p)
{
    vec v;
    for (int i = 0; i < REGISTERS; i++) v.part[i] = *(const reg *)(p + i * LANES / REGISTERS);
    return v;
}

static inline void store(float *p, vec v)
{
    for (int i = 0; i < REGISTERS; i++) *(reg *)(p + i * LANES / REGISTERS) = v.part[i];
}

static inline vec plus(vec a, vec b)
{
    for (int i = 0; i < REGISTERS; i++) a.part[i] += b.part[i];
    return a;
}

static inline vec minus(vec a, vec b)
{
    for (int i = 0; i < REGISTERS; i++) a.part[i] -= b.part[i];
    return a;
}

/* s + a b. */
static inline vec plus_product(vec s, vec a, vec b)
{
    for (int i = 0; i < REGISTERS; i++) s.part[i] += a.part[i] * b.part[i];
    return s;
}

/* s + v b. */
static inline vec plus_scaled(vec s, float v, vec b)
{
    for (int i = 0; i < REGISTERS; i++) s.part[i] += v * b.part[i];
    return s;
}

/* The sum of the lanes, halved again and again: the same order with every register width. */
static inline float sum_lanes(vec v)
{
    float lanes[LANES];
    store(lanes, v);
    four quarter[4];
    memcpy(quarter, lanes, sizeof lanes);
    const four a = quarter[0] + quarter[2], b = quarter[1] + quarter[3], c = a + b;
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* <a, b> over n numbers. */
static inline float dot(const float *restrict a, const float *restrict b, int64_t n)
{
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        s0 = plus_product(s0, load(a + i), load(b + i));
        s1 = plus_product(s1, load(a + i + LANES), load(b + i + LANES));
        s2 = plus_product(s2, load(a + i + 2 * LANES), load(b + i + 2 * LANES));
        s3 = plus_product(s3, load(a + i + 3 * LANES), load(b + i + 3 * LANES));
    }
    for (; i + LANES <= n; i += LANES) s0 = plus_product(s0, load(a + i), load(b + i));
    float s = sum_lanes(plus(plus(s0, s1), plus(s2, s3)));
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

/* out += v x over n numbers. */
static inline void add_scaled(float *restrict out, float v, const float *restrict x, int64_t n)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, plus_scaled(load(out + i), v, load(x + i)));
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

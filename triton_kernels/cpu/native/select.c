/* The choice of the few largest; equal scores go to the lowest place, and NaN is larger than any number. */
#include "vectors.h"

/* The k-th largest of n keys: its bits from the highest to the lowest, each by counting, which wide registers do without
   a branch. */
#define KTH_LARGEST(name, type, utype)                                       \
    static type name(const type *keys, int64_t n, int64_t k)                 \
    {                                                                        \
        const utype top = (utype)1 << (8 * sizeof(type) - 1);                \
        utype found = 0; /* of the key with its sign bit turned over */      \
        for (utype bit = top; bit; bit >>= 1) {                              \
            const type least = (type)((found | bit) ^ top);                  \
            type count = 0;                                                  \
            for (int64_t i = 0; i < n; i++) count += keys[i] >= least;       \
            if (count >= k) found |= bit;                                    \
        }                                                                    \
        return (type)(found ^ top);                                          \
    }
KTH_LARGEST(kth_key, int16_t, uint16_t)
KTH_LARGEST(kth_wide, int32_t, uint32_t)

/* best[i] = the largest of the columns i, i + n_groups, i + 2 n_groups, ... */
#define GROUP_MAXIMA(name, type)                                                            \
    static void name(type *restrict best, int64_t n_groups, const type *row, int64_t n)     \
    {                                                                                       \
        memcpy(best, row, n_groups * sizeof *best);                                         \
        for (int64_t start = n_groups; start < n; start += n_groups) {                      \
            const int64_t size = n - start < n_groups ? n - start : n_groups;               \
            for (int64_t i = 0; i < size; i++)                                              \
                best[i] = best[i] > row[start + i] ? best[i] : row[start + i];              \
        }                                                                                   \
    }
GROUP_MAXIMA(maxima_of_keys, int16_t)
GROUP_MAXIMA(maxima_of_wide, int32_t)

/* A key that at least k of each row's keys reach: the k-th largest of its groups' maxima, k <= n_groups <= n. */
void reached_keys(int64_t n_rows, int64_t n, int64_t n_groups, int64_t k, const int16_t *keys, int16_t *out)
{
#pragma omp parallel
    {
        int16_t *best = malloc(n_groups * sizeof *best);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) {
            maxima_of_keys(best, n_groups, keys + r * n, n);
            out[r] = kth_key(best, n_groups, k);
        }
        free(best);
    }
}

/* Which of 64 keys are not below the bound, a bit each. */
static inline uint64_t not_below(const int16_t *keys, int16_t bound)
{
#ifdef __AVX512BW__
    const __m512i least = _mm512_set1_epi16(bound);
    const uint64_t low = _mm512_cmpge_epi16_mask(_mm512_loadu_si512(keys), least);
    return low | (uint64_t)_mm512_cmpge_epi16_mask(_mm512_loadu_si512(keys + 32), least) << 32;
#else
    uint64_t mask = 0;
    for (int i = 0; i < 64; i++) mask |= (uint64_t)(keys[i] >= bound) << i;
    return mask;
#endif
}

/* How many of each row's keys are not below its bound. */
void count_not_below(int64_t n_rows, int64_t n, const int16_t *keys, const int16_t *bounds, int64_t *counts)
{
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        const int16_t *row = keys + r * n;
        int64_t count = 0, i = 0;
        for (; i + 64 <= n; i += 64) count += __builtin_popcountll(not_below(row + i, bounds[r]));
        for (; i < n; i++) count += row[i] >= bounds[r];
        counts[r] = count;
    }
}

/* Their columns, ascending, from offsets[r] on. */
void list_not_below(int64_t n_rows, int64_t n, const int16_t *keys, const int16_t *bounds, const int64_t *offsets,
                    int32_t *columns)
{
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        const int16_t *row = keys + r * n;
        int64_t at = offsets[r], i = 0;
        for (; i + 64 <= n; i += 64)
            for (uint64_t mask = not_below(row + i, bounds[r]); mask; mask &= mask - 1)
                columns[at++] = (int32_t)(i + __builtin_ctzll(mask));
        for (; i < n; i++)
            if (row[i] >= bounds[r]) columns[at++] = (int32_t)i;
    }
}

/* Whole numbers in the order of the scores: -0 is 0, NaN comes last. */
static void to_keys(const float *restrict scores, int64_t n, int32_t *restrict keys)
{
    for (int64_t i = 0; i < n; i++) {
        const float x = scores[i] + 0.0f;
        int32_t bits;
        memcpy(&bits, &x, sizeof bits);
        bits = bits < 0 ? bits ^ INT32_MAX : bits;
        keys[i] = x == x ? bits : INT32_MAX;
    }
}

/* Places, ascending, of the k largest of `count` keys. */
static void largest(const int32_t *keys, int64_t count, int64_t k, int64_t *out)
{
    const int32_t cut = kth_wide(keys, count, k);
    int64_t equal = k, at = 0;
    for (int64_t i = 0; i < count; i++) equal -= keys[i] > cut;
    for (int64_t i = 0; at < k; i++)
        if (keys[i] > cut || (keys[i] == cut && equal-- > 0)) out[at++] = i;
}

/* Places, counted over all rows, of the k largest scores of each row r, which owns [offsets[r], offsets[r + 1]) and has
   at least k. */
void top_k_of_lists(int64_t n_rows, int64_t k, const int64_t *offsets, const float *scores, int64_t *kept)
{
    int64_t room = 1;
    for (int64_t r = 0; r < n_rows; r++) room = offsets[r + 1] - offsets[r] > room ? offsets[r + 1] - offsets[r] : room;
#pragma omp parallel
    {
        int32_t *keys = malloc(room * sizeof *keys);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) {
            const int64_t begin = offsets[r], count = offsets[r + 1] - begin;
            to_keys(scores + begin, count, keys);
            largest(keys, count, k, kept + r * k);
            for (int64_t i = r * k; i < (r + 1) * k; i++) kept[i] += begin;
        }
        free(keys);
    }
}

/* Columns of the k largest scores of each row, k < n. With n_groups >= k only what reaches the k-th largest of the
   groups' maxima is looked at; with n_groups = 0 all of it. */
void top_k_of_rows(int64_t n_rows, int64_t n, int64_t n_groups, int64_t k, const float *scores, int64_t *columns)
{
#pragma omp parallel
    {
        int32_t *keys = malloc(4 * n * sizeof *keys), *best = keys + n, *found = best + n, *places = found + n;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) {
            int64_t *out = columns + r * k, count = 0;
            to_keys(scores + r * n, n, keys);
            if (!n_groups) {
                largest(keys, n, k, out);
                continue;
            }
            maxima_of_wide(best, n_groups, keys, n);
            const int32_t bound = kth_wide(best, n_groups, k);
            for (int64_t i = 0; i < n; i++) {
                found[count] = keys[i];
                places[count] = (int32_t)i;
                count += keys[i] >= bound;
            }
            largest(found, count, k, out);
            for (int64_t i = 0; i < k; i++) out[i] = places[out[i]];
        }
        free(keys);
    }
}

/* The choice of the k largest of fp32 scores; equal scores go to the lowest place, and NaN is larger than any number. */
#include "largest.h"

#define AS_IT_IS(key) (key)
KTH_LARGEST(kth_wide, int32_t, uint32_t)
GROUP_MAXIMA(maxima_of_wide, int32_t, AS_IT_IS)

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

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

/* A bound that lets a little more than `wanted` of n scores through, from every so many-th of them; never below 0. */
static float bound_of_sample(const float *scores, int64_t n, int64_t wanted)
{
    const int64_t most = n / 16 > 4096 ? (n / 16 < 32768 ? n / 16 : 32768) : 4096, stride = (n / most) | 1;
    const int64_t size = (n + stride - 1) / stride, keep = (int64_t)(1.5 * wanted / n * size) + 16;
    if (keep >= size) return 0;
    float *sample = malloc(2 * size * sizeof *sample);
    int32_t *keys = (int32_t *)(sample + size);
    for (int64_t i = 0; i < size; i++) sample[i] = scores[i * stride];
    to_keys(sample, size, keys);
    const int32_t key = kth_wide(keys, size, keep);
    float bound = 0;
    if (key > 0) memcpy(&bound, &key, sizeof bound);
    free(sample);
    return key == INT32_MAX ? 0 : bound;
}

/* The `wanted` largest positive scores of [n_rows, n], or all where there are fewer, equal ones by lowest (row, column):
   their scores and columns row by row, how many each row has, and the smallest of them, 0 where there is none. */
void batch_top_k(int64_t n_rows, int64_t n, int64_t wanted, const float *scores, int64_t *counts, float *kept,
                 int32_t *columns, float *cut)
{
    float bound = bound_of_sample(scores, n_rows * n, wanted);
    int64_t *starts = malloc((n_rows + 1) * sizeof *starts), total;
    for (;;) {
#pragma omp parallel for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) {
            int32_t count = 0;
            for (int64_t i = 0; i < n; i++) count += scores[r * n + i] > bound;
            starts[r + 1] = count;
        }
        starts[0] = 0;
        for (int64_t r = 0; r < n_rows; r++) starts[r + 1] += starts[r];
        total = starts[n_rows];
        if (total >= wanted || bound == 0) break;
        bound = 0;
    }
    float *found = malloc((total + 1) * (sizeof *found + 2 * sizeof(int32_t)));
    int32_t *places = (int32_t *)(found + total + 1), *keys = places + total + 1;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        int64_t at = starts[r];
        for (int64_t i = 0; at < starts[r + 1]; i++) {
            found[at] = scores[r * n + i]; /* written over by the next one unless it counts */
            places[at] = (int32_t)i;
            at += scores[r * n + i] > bound;
        }
    }
    to_keys(found, total, keys);
    const int32_t least = total > wanted ? kth_wide(keys, total, wanted) : 0;
    int64_t equal = wanted, at = 0;
    for (int64_t p = 0; p < total; p++) equal -= keys[p] > least;
    *cut = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        const int64_t before = at;
        for (int64_t p = starts[r]; p < starts[r + 1]; p++) {
            if (keys[p] < least || (keys[p] == least && equal-- <= 0)) continue;
            *cut = at && *cut < found[p] ? *cut : found[p];
            kept[at] = found[p];
            columns[at++] = places[p];
        }
        counts[r] = at - before;
    }
    free(found);
    free(starts);
}

/* The pairs of dictionaries as one code, set after set of n_inputs of them: row b of dictionary g of a set becomes the
   set's row b * n_inputs + g, its columns features of all. Dictionary g's pairs lie from begins[g] on, row by row,
   counts[g, b] of them. */
void join_codes(int64_t n_rows, int64_t n_groups, int64_t n_inputs, int64_t n_features, const int64_t *counts,
                const int64_t *begins, const float *values, const int32_t *columns, int64_t *offsets, float *out,
                int32_t *features)
{
    int64_t *next = malloc(n_groups * sizeof *next), at = 0;
    memcpy(next, begins, n_groups * sizeof *next);
    *offsets++ = 0;
    for (int64_t first = 0; first < n_groups; first += n_inputs)
        for (int64_t b = 0; b < n_rows; b++)
            for (int64_t g = first; g < first + n_inputs; g++) {
                for (int64_t i = 0; i < counts[g * n_rows + b]; i++, at++, next[g]++) {
                    out[at] = values[next[g]];
                    features[at] = columns[next[g]] + (int32_t)(g * n_features);
                }
                *offsets++ = at;
            }
    free(next);
}

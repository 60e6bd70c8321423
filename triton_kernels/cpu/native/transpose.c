/* Codes by feature instead of by row, and whether they can be. */
#include "vectors.h"

/* The least and largest feature, and whether offsets ascend from 0 to n_pairs: [least, largest, 1 or 0]. */
void look_at_code(int64_t n_rows, int64_t n_pairs, const int32_t *features, const int64_t *offsets, int64_t *found)
{
    int32_t least = INT32_MAX, most = -1;
    int64_t falls = 0;
    for (int64_t p = 0; p < n_pairs; p++) {
        least = features[p] < least ? features[p] : least;
        most = features[p] > most ? features[p] : most;
    }
    for (int64_t r = 0; r < n_rows; r++) falls += offsets[r + 1] < offsets[r];
    found[0] = least;
    found[1] = most;
    found[2] = !falls && offsets[0] == 0 && offsets[n_rows] == n_pairs;
}

/* Pairs by feature, ties in row order: feature f owns [starts[f], starts[f + 1]), each with its row and its place in
   the code. A stable counting sort. */
void feature_major(int64_t n_rows, int64_t n_features, const int32_t *features, const int64_t *offsets, int32_t *starts,
                   int32_t *rows, int64_t *order)
{
    memset(starts, 0, (n_features + 1) * sizeof *starts);
    for (int64_t p = 0; p < offsets[n_rows]; p++) starts[features[p] + 1]++;
    for (int64_t f = 0; f < n_features; f++) starts[f + 1] += starts[f];
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t p = offsets[r]; p < offsets[r + 1]; p++) {
            const int32_t at = starts[features[p]]++;
            rows[at] = (int32_t)r;
            order[at] = p;
        }
    memmove(starts + 1, starts, n_features * sizeof *starts);
    starts[0] = 0;
}

/* Codes by feature instead of by row. */
#include "vectors.h"

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

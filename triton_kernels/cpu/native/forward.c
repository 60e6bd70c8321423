/* Sums of table rows, row by row of the code. One thread owns a row and adds in the order of its pairs. */
#include "vectors.h"

/* Rows of the table that are read between two turns over the code, so that they come from the cache. */
#define BLOCK_BYTES (12 << 20)

/* out += sum of values[p] * table[features[p]] for p in [begin, end), four table rows in one pass over out. */
static void add_rows(float *restrict out, const float *values, const int32_t *features, int64_t begin, int64_t end,
                     const float *table, int64_t n)
{
    int64_t p = begin;
    for (; p + 4 <= end; p += 4) {
        const float *a = table + features[p] * n, *b = table + features[p + 1] * n;
        const float *c = table + features[p + 2] * n, *d = table + features[p + 3] * n;
        const float va = values[p], vb = values[p + 1], vc = values[p + 2], vd = values[p + 3];
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            vec sum = plus_scaled(plus_scaled(load(out + i), va, load(a + i)), vb, load(b + i));
            store(out + i, plus_scaled(plus_scaled(sum, vc, load(c + i)), vd, load(d + i)));
        }
        for (; i < n; i++) out[i] = out[i] + va * a[i] + vb * b[i] + vc * c[i] + vd * d[i];
    }
    for (; p < end; p++) add_scaled(out, values[p], table + features[p] * n, n);
}

/* out[r] = sum of values[p] * table[features[p]] over the row's pairs. */
void gather_sum(int64_t n_rows, int64_t n, const float *values, const int32_t *features, const int64_t *offsets,
                const float *table, float *out)
{
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        memset(out + r * n, 0, n * sizeof *out);
        add_rows(out + r * n, values, features, offsets[r], offsets[r + 1], table, n);
    }
}

/* error[r] = sum of values[p] * table[features[p]] + bias - x of r, and the squares of its parts, [R, n_parts]. Rows are
   n_sets times those of x, which has n_inputs rows a token, one for each dictionary of a set.
   A row's features are taken block by block of the table; they need not be sorted, but then more is read twice. */
void decode_loss(int64_t n_rows, int64_t n_sets, int64_t n_inputs, int64_t n_features, int64_t n, int64_t n_parts,
                 const float *values, const int32_t *features, const int64_t *offsets, const float *table,
                 const float *bias, const float *x, float *error, double *squares, int64_t *next)
{
    const int64_t width = n / n_parts, wanted = BLOCK_BYTES / (4 * n);
    const int64_t block = wanted < 1 ? 1 : wanted, n_own = n_rows / n_sets;
    memcpy(next, offsets, n_rows * sizeof *next);
#pragma omp parallel
    for (int64_t first = 0; first < n_features; first += block) {
        const int is_last = first + block >= n_features;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) {
            float *restrict e = error + r * n;
            if (first == 0) memset(e, 0, n * sizeof *e);
            int64_t end = next[r];
            while (end < offsets[r + 1] && (is_last || features[end] < first + block)) end++;
            add_rows(e, values, features, next[r], end, table, n);
            next[r] = end;
            if (!is_last) continue;
            const float *c = bias + (r / n_own * n_inputs + r % n_inputs) * n, *given = x + r % n_own * n;
            for (int64_t i = 0; i < n; i++) e[i] = e[i] + c[i] - given[i];
            for (int64_t l = 0; l < n_parts; l++)
                squares[r * n_parts + l] = dot(e + l * width, e + l * width, width);
        }
    }
}

/* Products that have one row a feature, feature by feature: the table is read in order and once, and one thread owns a
   feature and adds in the order of its rows. `starts`, `rows` and `order` are those of `feature_major`. */
#include "vectors.h"

/* How many features a thread takes in a turn: of few features few, so that no thread waits for another's last turn. */
static inline int64_t turn_of(int64_t n_features) { return n_features < 1024 ? n_features / 16 + 1 : 64; }

/* out[order[p]] = <x[rows[p]], table[f]> for the pairs of each feature f. */
void gather_dot(int64_t n_features, int64_t n, const int32_t *starts, const int32_t *rows, const int64_t *order,
                const float *x, const float *table, float *out)
{
#pragma omp parallel for schedule(dynamic, turn_of(n_features))
    for (int64_t f = 0; f < n_features; f++)
        for (int64_t p = starts[f]; p < starts[f + 1]; p++) out[order[p]] = dot(x + rows[p] * n, table + f * n, n);
}

/* acc += sum of v[j] (x[j] - c) over n numbers, for four x; c may be NULL. */
static inline void add_four(float *restrict acc, const float *v, const float *const *x, const float *c, int64_t n)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vec less = c ? load(c + i) : (vec){0};
        vec sum = load(acc + i);
        for (int j = 0; j < 4; j++) sum = plus_scaled(sum, v[j], minus(load(x[j] + i), less));
        store(acc + i, sum);
    }
    for (; i < n; i++)
        for (int j = 0; j < 4; j++) acc[i] += v[j] * (x[j][i] - (c ? c[i] : 0));
}

/* out[f] = sum over the feature's pairs of values * (x[row] - center), sums[f] that of the values, and squares[f] the
   square of the row's norm. Row r reads row r % n_own of x; `center` and `sums` may be NULL. */
void scatter_outer(int64_t n_features, int64_t n_groups, int64_t n_own, int64_t n, const int32_t *starts,
                   const int32_t *rows, const int64_t *order, const float *values, const float *x, const float *center,
                   float *out, float *sums, float *squares)
{
    const int64_t per_group = n_features / n_groups;
#pragma omp parallel
    {
        float *acc = malloc(n * sizeof *acc);
#pragma omp for schedule(dynamic, turn_of(n_features))
        for (int64_t f = 0; f < n_features; f++) {
            const float *c = center ? center + f / per_group * n : NULL;
            double sum = 0;
            memset(acc, 0, n * sizeof *acc);
            for (int64_t p = starts[f]; p < starts[f + 1]; p += 4) {
                const int64_t last = starts[f + 1] - 1;
                const float *four[4];
                float v[4];
                for (int64_t j = 0; j < 4; j++) {
                    const int64_t r = rows[p + j < last ? p + j : last];
                    four[j] = x + (r < n_own ? r : r % n_own) * n;
                    v[j] = p + j <= last ? values[order[p + j]] : 0;
                    sum += v[j];
                }
                add_four(acc, v, four, c, n);
            }
            stream_scaled(out + f * n, 1, acc, n);
            squares[f] = dot(acc, acc, n);
            if (sums) sums[f] = (float)sum;
        }
        free(acc);
    }
}

/* <e, w> over n numbers, and acc += v e in the same reading of e. */
static inline float dot_and_add(const float *restrict e, const float *restrict w, float v, float *restrict acc, int64_t n)
{
    vec s0 = {0}, s1 = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        const vec a = load(e + i), b = load(e + i + LANES);
        s0 = plus_product(s0, a, load(w + i));
        s1 = plus_product(s1, b, load(w + i + LANES));
        store(acc + i, plus_scaled(load(acc + i), v, a));
        store(acc + i + LANES, plus_scaled(load(acc + i + LANES), v, b));
    }
    float s = sum_lanes(plus(s0, s1));
    for (; i < n; i++) {
        s += e[i] * w[i];
        acc[i] += v * e[i];
    }
    return s;
}

/* Both gradients of the decoder in one reading of the error, with w = 2 weight, one number for each part of a row:
   d_values[order[p]] = <error[row], w table[f]> and d_table[f] = w sum of values * error[row], and squares[f] the square
   of that row's norm. */
void backward_decoder(int64_t n_features, int64_t n_groups, int64_t n, int64_t n_parts, const int32_t *starts,
                      const int32_t *rows, const int64_t *order, const float *values, const float *error,
                      const float *weight, const float *table, float *d_values, float *d_table, float *squares)
{
    const int64_t width = n / n_parts, per_group = n_features / n_groups;
#pragma omp parallel
    {
        float *scaled = malloc(2 * n * sizeof *scaled), *acc = scaled + n;
#pragma omp for schedule(dynamic, turn_of(n_features))
        for (int64_t f = 0; f < n_features; f++) {
            const float *w = weight + f / per_group * n_parts;
            memset(acc, 0, n * sizeof *acc);
            if (starts[f] < starts[f + 1])
                for (int64_t l = 0; l < n_parts; l++)
                    for (int64_t i = l * width; i < (l + 1) * width; i++) scaled[i] = 2 * w[l] * table[f * n + i];
            for (int64_t p = starts[f]; p < starts[f + 1]; p++)
                d_values[order[p]] = dot_and_add(error + rows[p] * n, scaled, values[order[p]], acc, n);
            float square = 0;
            for (int64_t l = 0; l < n_parts; l++) {
                stream_scaled(d_table + f * n + l * width, 2 * w[l], acc + l * width, width);
                square += 4 * w[l] * w[l] * dot(acc + l * width, acc + l * width, width);
            }
            squares[f] = square;
        }
        free(scaled);
    }
}

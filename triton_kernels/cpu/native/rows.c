/* What is done to a table row by row: Adam, norms, rounding to bf16. */
#include <float.h>
#include <math.h>
#include "bf16.h"
#include "vectors.h"

/* See `reference.adam_rows`. `new1` is 1 - beta1, `new2` 1 - beta2, from more digits than fp32 has; `rate` and `root` are
   those of this step: over 1 - beta1^t, and the root of 1 - beta2^t; `decay` is what the parameter keeps; `scale` [G]
   may be NULL. */
void adam_rows(int64_t n_rows, int64_t n_groups, int64_t n, float *parameter, const float *gradient, float *first,
               float *second, float rate, float new1, float beta2, float new2, float eps, float root, float decay,
               const float *scale, int64_t unit)
{
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        float *restrict p = parameter + r * n, *restrict m = first + r * n, *restrict v = second + r * n;
        const float *restrict g = gradient + r * n;
        const float clip = scale ? scale[r / (n_rows / n_groups)] : 1;
        const float along = unit ? dot(g, p, n) : 0;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float d = clip * (g[i] - along * p[i]);
            m[i] += new1 * (d - m[i]);
            v[i] = beta2 * v[i] + new2 * d * d;
            p[i] = p[i] * decay - rate * m[i] / (sqrtf(v[i]) / root + eps);
        }
        if (unit) {
            const float norm = sqrtf(dot(p, p, n)), by = norm > 1e-12f ? norm : 1e-12f;
            for (int64_t i = 0; i < n; i++) p[i] /= by;
        }
    }
}

/* out[r] = |gradient[r]|^2, without the gradient's part along unit[r] where that is not NULL. */
void row_squares(int64_t n_rows, int64_t n, const float *gradient, const float *unit, float *out)
{
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        const float *restrict g = gradient + r * n;
        if (!unit) {
            out[r] = dot(g, g, n);
            continue;
        }
        const float *restrict u = unit + r * n;
        const float along = dot(g, u, n);
        float square = 0; /* of what is left: a difference of squares would cancel */
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < n; i++) square += (g[i] - along * u[i]) * (g[i] - along * u[i]);
        out[r] = square;
    }
}

/* out = x - center, and whether all of it is finite (1 or 0); rows of x begin `stride` numbers apart, at number `first`. */
void centre_rows(int64_t n_rows, int64_t n, int64_t stride, int64_t first, const float *x, const float *center,
                 float *out, int64_t *is_finite)
{
    int bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad)
    for (int64_t r = 0; r < n_rows; r++) {
        const float *restrict row = x + first + r * stride;
        float *restrict to = out + r * n;
#pragma omp simd reduction(| : bad)
        for (int64_t i = 0; i < n; i++) {
            to[i] = row[i] - center[i];
            bad |= !(fabsf(to[i]) <= FLT_MAX);
        }
    }
    *is_finite = !bad;
}

/* low = scale * row in bf16, with the squares of each scaled row and of what rounding took from it. Rows begin `stride`
   numbers apart; `scale` may be NULL. */
void round_rows(int64_t n_rows, int64_t n, int64_t stride, const float *table, const float *scale, uint16_t *low,
                float *squares, float *errors)
{
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        const float *restrict row = table + r * stride;
        uint16_t *restrict out = low + r * n;
        const float by = scale ? scale[r] : 1;
        float square = 0, error = 0;
#pragma omp simd reduction(+ : square, error)
        for (int64_t i = 0; i < n; i++) {
            const float x = by * row[i];
            const uint16_t b = to_bf16(x);
            const float lost = x - from_bf16(b);
            out[i] = b;
            square += x * x;
            error += lost * lost;
        }
        squares[r] = square;
        errors[r] = error;
    }
}

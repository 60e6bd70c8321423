/* Scores in fp32 above a bound, as lists: score = z * scale, or z alone where there is no scale. A pair is listed if its
   score is above its column's bound and its z above `least`. */
#include "vectors.h"

static inline int is_above(float z, float scale, float bound, float least) { return z * scale > bound && z > least; }

/* Which of `count` <= 16 columns of a row are listed, a bit each. */
static inline uint32_t listed_of(int64_t count, const float *z, const float *scale, const float *bounds, float least)
{
    uint32_t mask = 0;
    for (int64_t i = 0; i < count; i++) mask |= (uint32_t)is_above(z[i], scale ? scale[i] : 1, bounds[i], least) << i;
    return mask;
}

/* The same of the next 16 columns from `i` on, or of what is left of the row's n. */
static inline uint32_t listed_from(int64_t i, int64_t n, const float *row, const float *scale, const float *bounds,
                                   float least)
{
    scale = scale ? scale + i : scale;
    if (n - i < LANES) return listed_of(n - i, row + i, scale, bounds + i, least);
#ifdef __AVX512F__
    const __m512 value = _mm512_loadu_ps(row + i), score = scale ? _mm512_mul_ps(value, _mm512_loadu_ps(scale)) : value;
    const __mmask16 some = _mm512_cmp_ps_mask(score, _mm512_loadu_ps(bounds + i), _CMP_GT_OQ);
    return _mm512_mask_cmp_ps_mask(some, value, _mm512_set1_ps(least), _CMP_GT_OQ);
#else
    return listed_of(LANES, row + i, scale, bounds + i, least);
#endif
}

/* Writes what the mask names of the 16 columns from `first` on, without a branch where the CPU can. */
static inline void take(uint32_t mask, int64_t first, const float *row, const float *scale, float *values,
                        float *scores, int32_t *columns)
{
#ifdef __AVX512F__
    const __mmask16 listed = (__mmask16)mask, front = (__mmask16)((1u << __builtin_popcount(mask)) - 1);
    const __m512 z = _mm512_maskz_loadu_ps(listed, row + first); /* no column past the row is listed, or read */
    const __m512 score = scale ? _mm512_mul_ps(z, _mm512_maskz_loadu_ps(listed, scale + first)) : z;
    const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i column = _mm512_add_epi32(place, _mm512_set1_epi32((int)first));
    _mm512_mask_storeu_ps(values, front, _mm512_maskz_compress_ps(listed, z));
    _mm512_mask_storeu_ps(scores, front, _mm512_maskz_compress_ps(listed, score));
    _mm512_mask_storeu_epi32(columns, front, _mm512_maskz_compress_epi32(listed, column));
#else
    for (int64_t at = 0; mask; mask &= mask - 1, at++) {
        const int64_t column = first + __builtin_ctz(mask);
        values[at] = row[column];
        scores[at] = scale ? row[column] * scale[column] : row[column];
        columns[at] = (int32_t)column;
    }
#endif
}

/* How many pairs each row lists; where there are `offsets`, also their z, scores and columns, ascending, from offsets[r]
   on. */
void list_above(int64_t n_rows, int64_t n, const float *z, const float *scale, const float *bounds, float least,
                const int64_t *offsets, int64_t *counts, float *values, float *scores, int32_t *columns)
{
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        int64_t count = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const uint32_t mask = listed_from(i, n, z + r * n, scale, bounds, least);
            const int64_t at = offsets ? offsets[r] + count : 0;
            if (offsets) take(mask, i, z + r * n, scale, values + at, scores + at, columns + at);
            count += __builtin_popcount(mask);
        }
        counts[r] = count;
    }
}

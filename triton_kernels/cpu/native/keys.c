/* Candidates from scores in bf16: columns whose scores reach a bound, as lists. A key is a score's 16 bits as a whole
   number in the order of the scores. Lists come chunk by chunk of the columns: offsets[c * n_rows + r] is where that of
   chunk c and row r begins. */
#include "bf16.h"
#include "largest.h"

#define ORDERED(bits) ((int16_t)((bits) ^ ((bits) >> 15 & INT16_MAX)))
KTH_LARGEST(kth_key, int16_t, uint16_t)
GROUP_MAXIMA(maxima_of_keys, int16_t, ORDERED)

/* Which of the next 64 scores from `i` on, or of what is left of the row's n, are not below the bound, a bit each. */
static inline uint64_t not_below(int64_t i, int64_t n, const int16_t *row, int16_t bound)
{
    uint64_t mask = 0;
#ifdef __AVX512BW__
    if (n - i >= 64) {
        const __m512i least = _mm512_set1_epi16(bound), rest = _mm512_set1_epi16(INT16_MAX);
        for (int half = 0; half < 2; half++) {
            const __m512i bits = _mm512_loadu_si512(row + i + 32 * half);
            const __m512i keys = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi16(bits, 15), rest));
            mask |= (uint64_t)_mm512_cmpge_epi16_mask(keys, least) << 32 * half;
        }
        return mask;
    }
#endif
    const int64_t count = n - i < 64 ? n - i : 64;
    for (int64_t j = 0; j < count; j++) mask |= (uint64_t)(ORDERED(row[i + j]) >= bound) << j;
    return mask;
}

static int64_t count_not_below(const int16_t *row, int64_t n, int16_t bound)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 64) count += __builtin_popcountll(not_below(i, n, row, bound));
    return count;
}

/* See `lists.proven`, `lists.within_reach` and `lists.keys_reaching`. */
static inline float proven(float score, float margin, float slack)
{
    return score * (score >= 0 ? 1 - slack : 1 + slack) - margin;
}

static inline float within_reach(float exact, float margin, float slack)
{
    const float score = exact - margin;
    return score / (score >= 0 ? 1 + slack : 1 - slack);
}

static inline int16_t key_reaching(float bound)
{
    const uint16_t bits = to_bf16(bound);
    const float low = from_bf16(bits);
    if (low == 0) return -1; /* of -0, the last before 0 */
    const int16_t key = ORDERED((int16_t)bits);
    return low > bound ? key - 1 : key;
}

/* For each row, from the k-th largest of its groups' maxima, k <= n_groups <= n: what the k-th best exact score is at
   least (`least`, which only grows), the key that a candidate must reach, and how many scores do. */
void sieve_rows(int64_t n_rows, int64_t n, int64_t n_groups, int64_t k, float slack, const int16_t *scores,
                const float *margins, float *least, int16_t *bounds, int64_t *counts)
{
#pragma omp parallel
    {
        int16_t *best = malloc(n_groups * sizeof *best);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) {
            maxima_of_keys(best, n_groups, scores + r * n, n);
            const float reached = from_bf16((uint16_t)ORDERED(kth_key(best, n_groups, k)));
            const float found = proven(reached, margins[r], slack);
            least[r] = found > least[r] ? found : least[r];
            bounds[r] = key_reaching(within_reach(least[r], margins[r], slack));
            counts[r] = count_not_below(scores + r * n, n, bounds[r]);
        }
        free(best);
    }
}

/* Columns, ascending, and keys of the scores that are not below their row's bound, from offsets[r] on; without `offsets`
   only how many a row has. */
void list_rows(int64_t n_rows, int64_t n, const int16_t *scores, const int16_t *bounds, const int64_t *offsets,
               int64_t *counts, int32_t *columns, int16_t *keys)
{
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        const int16_t *row = scores + r * n;
        if (!offsets) {
            counts[r] = count_not_below(row, n, bounds[r]);
            continue;
        }
        int64_t at = offsets[r];
        for (int64_t i = 0; i < n; i += 64)
            for (uint64_t mask = not_below(i, n, row, bounds[r]); mask; mask &= mask - 1) {
                const int64_t column = i + __builtin_ctzll(mask);
                keys[at] = ORDERED(row[column]);
                columns[at++] = (int32_t)column;
            }
    }
}

/* The k-th largest key of each row's lists together; the smallest of all keys where there are fewer. */
void kth_of_lists(int64_t n_chunks, int64_t n_rows, int64_t k, const int64_t *offsets, const int16_t *keys,
                  int16_t *out)
{
#pragma omp parallel
    {
        int16_t *all = NULL;
        int64_t room = 0;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) {
            int64_t count = 0;
            for (int64_t c = 0; c < n_chunks; c++) {
                const int64_t begin = offsets[c * n_rows + r], size = offsets[c * n_rows + r + 1] - begin;
                if (count + size > room) all = realloc(all, (room = 2 * (count + size)) * sizeof *all);
                if (size) memcpy(all + count, keys + begin, size * sizeof *all);
                count += size;
            }
            out[r] = kth_key(all, count, k);
        }
        free(all);
    }
}

/* Features, ascending, of the keys in each row's lists that are not below its bound, from starts[r] on; without `starts`
   only how many a row has. Chunk c's column i is feature i * n_chunks + c. */
void merge_lists(int64_t n_chunks, int64_t n_rows, int64_t n_features, const int64_t *offsets, const int32_t *columns,
                 const int16_t *keys, const int16_t *bounds, const int64_t *starts, int64_t *counts, int32_t *features)
{
    const int64_t n_words = (n_features + 63) / 64;
#pragma omp parallel
    {
        uint64_t *is_in = calloc(n_words, sizeof *is_in);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) {
            int64_t count = 0;
            for (int64_t c = 0; c < n_chunks; c++)
                for (int64_t i = offsets[c * n_rows + r]; i < offsets[c * n_rows + r + 1]; i++) {
                    const int64_t f = columns[i] * n_chunks + c;
                    count += keys[i] >= bounds[r];
                    if (starts) is_in[f / 64] |= (uint64_t)(keys[i] >= bounds[r]) << f % 64;
                }
            if (!starts) {
                counts[r] = count;
                continue;
            }
            int64_t at = starts[r];
            for (int64_t w = 0; w < n_words; is_in[w++] = 0)
                for (uint64_t word = is_in[w]; word; word &= word - 1)
                    features[at++] = (int32_t)(64 * w + __builtin_ctzll(word));
        }
        free(is_in);
    }
}

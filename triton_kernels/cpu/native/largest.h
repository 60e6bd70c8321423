/* The k-th largest of many keys, without sorting: written once for keys of 16 and of 32 bits. */
#pragma once
#include "vectors.h"

/* The largest key that at least k of n keys reach: its bits from the highest to the lowest, each by counting, which wide
   registers do without a branch. */
#define KTH_LARGEST(name, type, utype)                                                              \
    static type name(const type *keys, int64_t n, int64_t k)                                        \
    {                                                                                               \
        const utype top = (utype)1 << (8 * sizeof(type) - 1);                                       \
        utype found = 0; /* of the key with its sign bit turned over */                             \
        for (utype bit = top; bit; bit >>= 1) {                                                     \
            const type least = (type)((found | bit) ^ top);                                         \
            int64_t count = 0;                                                                      \
            for (int64_t start = 0; start < n; start += INT16_MAX) {                                \
                const int64_t end = n - start < INT16_MAX ? n : start + INT16_MAX;                  \
                type some = 0;                                                                      \
                for (int64_t i = start; i < end; i++) some += keys[i] >= least;                     \
                count += some;                                                                      \
            }                                                                                       \
            if (count >= k) found |= bit;                                                           \
        }                                                                                           \
        return (type)(found ^ top);                                                                 \
    }

/* best[i] = the largest of the columns i, i + n_groups, i + 2 n_groups, ..., each as `key` gives it. */
#define GROUP_MAXIMA(name, type, key)                                                               \
    static void name(type *restrict best, int64_t n_groups, const type *row, int64_t n)             \
    {                                                                                               \
        for (int64_t i = 0; i < n_groups; i++) best[i] = key(row[i]);                               \
        for (int64_t start = n_groups; start < n; start += n_groups) {                              \
            const int64_t size = n - start < n_groups ? n - start : n_groups;                       \
            for (int64_t i = 0; i < size; i++)                                                      \
                best[i] = best[i] > key(row[start + i]) ? best[i] : key(row[start + i]);            \
        }                                                                                           \
    }

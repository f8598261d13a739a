// Attention of one query over the cells that its token sees.
//
// The cells are taken in the order of their positions: the prefix, then the token's own group. They
// are dealt with in blocks of BLOCK, counted from the first, with a running maximum (Milakov and
// Gimelshein 2018, arXiv 1805.02867); spans of SPAN cells are summed apart and joined in order. So
// the order of every sum follows from how many cells a token sees, and from nothing else.
#pragma once

#include <limits>

#include "simd.h"

namespace TRIMODE_ISA {

constexpr int BLOCK = 64;
constexpr int SPAN = 512;
constexpr int MOST_HEAD_DIM = 512;

INLINE F load_cell(const float* p) { return load(p); }
INLINE F load_cell(const float* p, int n) { return load(p, n); }
INLINE F load_cell(const bf16* p) { return load_bf16(p); }
INLINE F load_cell(const bf16* p, int n) { return load_bf16(p, n); }

// What a token sees: cells 0 .. prefix-1, then start .. start+count-prefix-1.
struct Sight {
    int prefix, start, count;
    long cell(int i) const { return i < prefix ? i : start + (i - prefix); }
};

// Softmax over a span so far: its maximum, its sum, and the weighted sum of values.
struct Partial {
    float top, total;
    float* values;  // [D]
};

// DV vectors make up a head; the last has `tail` lanes.
template <int DV, class T>
void attend(const float* query, const T* keys, const T* values, int D, Sight sight, int first,
            int last, Partial& result) {
    const int tail = D - (DV - 1) * W;
    F q[DV], sum_v[DV];
    for (int d = 0; d < DV; d++) {
        q[d] = d < DV - 1 ? load(query + d * W) : load(query + d * W, tail);
        sum_v[d] = zero();
    }
    const bool is_even = tail == W;
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int block = first; block < last; block += BLOCK) {
        const int n = last - block < BLOCK ? last - block : BLOCK;
        float scores[BLOCK];
        for (int j0 = 0; j0 < n; j0 += W) {
            F parts[W];
            for (int j = 0; j < W; j++) {
                if (j0 + j >= n) {
                    parts[j] = zero();
                    continue;
                }
                const T* key = keys + sight.cell(block + j0 + j) * D;
                F sum = q[0] * (DV > 1 || is_even ? load_cell(key) : load_cell(key, tail));
                for (int d = 1; d < DV; d++) {
                    F k = d < DV - 1 || is_even ? load_cell(key + d * W)
                                                : load_cell(key + d * W, tail);
                    sum = fma(q[d], k, sum);
                }
                parts[j] = sum;
            }
            store(scores + j0, sums(parts));
        }
        float best = scores[0];
        for (int j = 1; j < n; j++) best = scores[j] > best ? scores[j] : best;
        const float new_top = best > top ? best : top;
        float kept[W];
        store(kept, exp(set1(top - new_top)));
        F sum_p = zero();
        for (int j0 = 0; j0 < n; j0 += W) {
            store(scores + j0, exp(load(scores + j0) - set1(new_top)));
            sum_p = sum_p + load(scores + j0, n - j0);
        }
        total = total * kept[0] + sum(sum_p);
        for (int d = 0; d < DV; d++) sum_v[d] = sum_v[d] * set1(kept[0]);
        for (int j = 0; j < n; j++) {
            const T* value = values + sight.cell(block + j) * D;
            F p = set1(scores[j]);
            for (int d = 0; d < DV; d++) {
                F v = d < DV - 1 || is_even ? load_cell(value + d * W)
                                            : load_cell(value + d * W, tail);
                sum_v[d] = fma(p, v, sum_v[d]);
            }
        }
        top = new_top;
    }
    result.top = top;
    result.total = total;
    for (int d = 0; d < DV; d++) {
        if (d < DV - 1)
            store(result.values + d * W, sum_v[d]);
        else
            store(result.values + d * W, sum_v[d], tail);
    }
}

template <class T>
void attend(const float* query, const T* keys, const T* values, int D, Sight sight, int first,
            int last, Partial& result) {
#define CASE(n)                                                                  \
    case n:                                                                      \
        attend<n, T>(query, keys, values, D, sight, first, last, result); \
        break;
    switch ((D + W - 1) / W) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        CASE(10) CASE(12) CASE(14) CASE(16) CASE(24) CASE(32)
    }
#undef CASE
}

// Whether there is code for heads of this size.
inline bool has_head_dim(int D) {
    const int n = (D + W - 1) / W;
    return n <= 8 || n == 10 || n == 12 || n == 14 || n == 16 || n == 24 || n == 32;
}

// Join spans in their order and divide: out[D].
inline void join(const Partial* parts, int num_parts, int D, float* out) {
    float top = parts[0].top;
    for (int i = 1; i < num_parts; i++) top = parts[i].top > top ? parts[i].top : top;
    float total = 0;
    for (int d = 0; d < D; d++) out[d] = 0;
    for (int i = 0; i < num_parts; i++) {
        float kept[W];
        store(kept, exp(set1(parts[i].top - top)));
        total = total + parts[i].total * kept[0];
        for (int d = 0; d < D; d++) out[d] = out[d] + parts[i].values[d] * kept[0];
    }
    for (int d = 0; d < D; d++) out[d] = out[d] / total;
}

}  // namespace TRIMODE_ISA

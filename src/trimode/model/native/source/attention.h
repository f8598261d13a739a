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

// N vectors of a head, of which the last has `tail` lanes if not IS_EVEN. No array, so that GCC keeps
// them in registers.
template <int N, bool IS_EVEN>
struct Head {
    F x;
    Head<N - 1, IS_EVEN> rest;
    template <class T>
    INLINE static F part(const T* p, int tail) {
        return N > 1 || IS_EVEN ? load_cell(p) : load_cell(p, tail);
    }
    INLINE void clear() {
        x = zero();
        rest.clear();
    }
    INLINE void read(const float* p, int tail) {
        x = part(p, tail);
        rest.read(p + W, tail);
    }
    INLINE void write(float* p, int tail) const {
        if (N > 1 || IS_EVEN)
            store(p, x);
        else
            store(p, x, tail);
        rest.write(p + W, tail);
    }
    // sum + <this, p>, the products of a lane one after the other.
    template <class T>
    INLINE F dot(const T* p, int tail, F sum) const {
        return rest.dot(p + W, tail, fma(x, part(p, tail), sum));
    }
    template <class T>
    INLINE void add(F weight, const T* p, int tail) {
        x = fma(weight, part(p, tail), x);
        rest.add(weight, p + W, tail);
    }
    INLINE void scale(F by) {
        x = x * by;
        rest.scale(by);
    }
};

template <bool IS_EVEN>
struct Head<0, IS_EVEN> {
    INLINE void clear() {}
    INLINE void read(const float*, int) {}
    INLINE void write(float*, int) const {}
    template <class T>
    INLINE F dot(const T*, int, F sum) const {
        return sum;
    }
    template <class T>
    INLINE void add(F, const T*, int) {}
    INLINE void scale(F) {}
};

template <int N, bool IS_EVEN, class T>
void attend(const float* query, const T* keys, const T* values, int D, Sight sight, int first,
            int last, Partial& result) {
    const int tail = D - (N - 1) * W;
    Head<N, IS_EVEN> q, sum_v;
    q.read(query, tail);
    sum_v.clear();
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int block = first; block < last; block += BLOCK) {
        const int n = last - block < BLOCK ? last - block : BLOCK;
        float scores[BLOCK];
        for (int j0 = 0; j0 < n; j0 += W) {
            F parts[W];
            const int num = n - j0 < W ? n - j0 : W;
            for (int j = 0; j < num; j++)
                parts[j] = q.dot(keys + sight.cell(block + j0 + j) * D, tail, zero());
            for (int j = num; j < W; j++) parts[j] = zero();
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
        sum_v.scale(set1(kept[0]));
        for (int j = 0; j < n; j++)
            sum_v.add(set1(scores[j]), values + sight.cell(block + j) * D, tail);
        top = new_top;
    }
    result.top = top;
    result.total = total;
    sum_v.write(result.values, tail);
}

template <class T>
void attend(const float* query, const T* keys, const T* values, int D, Sight sight, int first,
            int last, Partial& result) {
#define CASE(n)                                                                  \
    case n:                                                                      \
        if (D % W == 0)                                                          \
            attend<n, true, T>(query, keys, values, D, sight, first, last, result);  \
        else                                                                     \
            attend<n, false, T>(query, keys, values, D, sight, first, last, result); \
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

// Join spans in their order and divide: out[D]. They lie `stride` apart.
inline void join(const Partial* parts, int num_parts, int stride, int D, float* out) {
    float top = parts[0].top;
    for (int i = 1; i < num_parts; i++) {
        const float one = parts[long(i) * stride].top;
        top = one > top ? one : top;
    }
    float total = 0;
    for (int d = 0; d < D; d++) out[d] = 0;
    for (int i = 0; i < num_parts; i++) {
        const Partial& part = parts[long(i) * stride];
        float kept[W];
        store(kept, exp(set1(part.top - top)));
        total = total + part.total * kept[0];
        for (int d = 0; d < D; d++) out[d] = out[d] + part.values[d] * kept[0];
    }
    for (int d = 0; d < D; d++) out[d] = out[d] / total;
}

}  // namespace TRIMODE_ISA

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

// N vectors of a head, of which the last has `tail` lanes if not IS_EVEN. No array, so that GCC
// keeps them in registers.
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

// Heads that read the same keys and values side by side: a sum of products waits for the one
// before, so a few vectors alone would leave the CPU idle.
constexpr int MOST_PAIRED = 4;  // vectors of a head
inline int heads_at_once(int D) { return D <= MOST_PAIRED * W ? 2 : 1; }

// One head's scores of a block -> its weights, and what is kept of the sums before.
INLINE float soften(float* scores, int n, Partial& so_far) {
    F most = load(scores);
    for (int j = W; j < n; j += W) most = max(most, load(scores + j));
    const float best = largest(most);
    const float top = best > so_far.top ? best : so_far.top;
    float kept[W];
    store(kept, exp(set1(so_far.top - top)));
    F total = zero();
    for (int j = 0; j < n; j += W) {
        store(scores + j, exp(load(scores + j) - set1(top)));
        total = total + load(scores + j, n - j);
    }
    so_far.top = top;
    so_far.total = so_far.total * kept[0] + sum(total);
    return kept[0];
}

// queries: [H][D]. results: [H], of which `values` says where to write.
template <int H, int N, bool IS_EVEN, class T>
void attend(const float* queries, const T* keys, const T* values, int D, Sight sight, int first,
            int last, Partial* results) {
    static_assert(H == 1 || H == 2);
    constexpr int B = H - 1;  // the second head, or the first again
    const int tail = D - (N - 1) * W;
    constexpr float LEAST = -std::numeric_limits<float>::infinity();
    Head<N, IS_EVEN> q_a, q_b, sum_a, sum_b;
    q_a.read(queries, tail);
    if (H == 2) q_b.read(queries + D, tail);
    sum_a.clear();
    sum_b.clear();
    for (int h = 0; h < H; h++) results[h].top = LEAST, results[h].total = 0;
    for (int block = first; block < last; block += BLOCK) {
        const int n = last - block < BLOCK ? last - block : BLOCK;
        float scores[H][BLOCK];
        for (int j0 = 0; j0 < n; j0 += W) {
            F parts[H][W];
            const int num = n - j0 < W ? n - j0 : W;
            for (int j = 0; j < num; j++) {
                const T* key = keys + sight.cell(block + j0 + j) * D;
                F a = q_a.dot(key, tail, zero());
                if (H == 2) parts[B][j] = q_b.dot(key, tail, zero());
                parts[0][j] = a;
            }
            for (int h = 0; h < H; h++) {
                for (int j = num; j < W; j++) parts[h][j] = zero();
                store(scores[h] + j0, sums(parts[h]));
                for (int j = num; j < W; j++) scores[h][j0 + j] = LEAST;
            }
        }
        sum_a.scale(set1(soften(scores[0], n, results[0])));
        if (H == 2) sum_b.scale(set1(soften(scores[B], n, results[B])));
        for (int j = 0; j < n; j++) {
            const T* value = values + sight.cell(block + j) * D;
            sum_a.add(set1(scores[0][j]), value, tail);
            if (H == 2) sum_b.add(set1(scores[B][j]), value, tail);
        }
    }
    sum_a.write(results[0].values, tail);
    if (H == 2) sum_b.write(results[B].values, tail);
}

template <int N, class T>
void attend(const float* queries, int num_heads, const T* keys, const T* values, int D, Sight sight,
            int first, int last, Partial* results) {
    if constexpr (N <= MOST_PAIRED)
        if (num_heads == 2) {
            if (D % W == 0)
                attend<2, N, true, T>(queries, keys, values, D, sight, first, last, results);
            else
                attend<2, N, false, T>(queries, keys, values, D, sight, first, last, results);
            return;
        }
    if (D % W == 0)
        attend<1, N, true, T>(queries, keys, values, D, sight, first, last, results);
    else
        attend<1, N, false, T>(queries, keys, values, D, sight, first, last, results);
}

// Of `heads_at_once(D)` heads at most.
template <class T>
void attend(const float* queries, int num_heads, const T* keys, const T* values, int D, Sight sight,
            int first, int last, Partial* results) {
#define CASE(n)                                                                                \
    case n:                                                                                    \
        attend<n, T>(queries, num_heads, keys, values, D, sight, first, last, results);        \
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

// Products with packed weights: `y = x W^T`, for a tile of rows and one panel of outputs.
//
// A panel holds PANEL outputs, all their inputs one after the other, so that it is read from the
// memory once, in order, for all rows of a band. Every output of every row has one accumulator that
// adds up the inputs in their order: what a row gets does not depend on the tile it is in.
//
//   float32   [panel][K][PANEL]
//   bfloat16  [panel][K / 2][PANEL][2]     products of pairs where the CPU has them, else widened
//   int8      [panel][K / 4][PANEL][4]     with scales by group of inputs, see int8.h
#pragma once

#include "simd.h"

namespace TRIMODE_ISA {

constexpr int PANEL = 2 * W;

#if TRIMODE_AVX512
constexpr int MOST_ROWS = 12;  // 24 of 32 registers
#elif TRIMODE_AVX2
constexpr int MOST_ROWS = 6;  // 12 of 16
#else
constexpr int MOST_ROWS = 4;
#endif

// Rows that share what is read of the weights. More than a tile takes go through a panel piece by
// piece, tile after tile: all but the first find the piece in the nearest cache, and the memory is
// at work throughout.
constexpr int BAND_ROWS = 4 * MOST_ROWS;
constexpr int PIECE_BYTES = 8192;

// Bytes that are fetched before a tile of R rows needs them. The CPU does that by itself where
// there is little else to do.
constexpr int AHEAD = 4096;
template <int R>
INLINE void prefetch(const void* weights) {
    if (R <= 2) return;
    __builtin_prefetch((const char*)weights + AHEAD, 0, 3);
    if (W == 16) __builtin_prefetch((const char*)weights + AHEAD + 64, 0, 3);
}

// Sums of R rows, two vectors each. A structure for each row and no array: only so does GCC keep
// them in registers.
template <int R>
struct Sums {
    F a, b;
    Sums<R - 1> rest;
    // From the start, or where the piece before ended.
    INLINE void begin(const float* y, bool goes_on) {
        a = goes_on ? load(y) : zero();
        b = goes_on ? load(y + W) : zero();
        rest.begin(y + PANEL, goes_on);
    }
    INLINE void add(const float* x, long stride, F w0, F w1) {
        F c = set1(*x);
        a = fma(c, w0, a);
        b = fma(c, w1, b);
        rest.add(x + stride, stride, w0, w1);
    }
    INLINE void put(float* y) const {
        store(y, a);
        store(y + W, b);
        rest.put(y + PANEL);
    }
#if TRIMODE_AVX512 && defined(__AVX512BF16__)
    INLINE void add_pairs(const bf16* x, long stride, __m512bh w0, __m512bh w1) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        __m512bh c = (__m512bh)_mm512_set1_epi32(pair);
        a.v = _mm512_dpbf16_ps(a.v, c, w0);
        b.v = _mm512_dpbf16_ps(b.v, c, w1);
        rest.add_pairs(x + stride, stride, w0, w1);
    }
#endif
};

template <>
struct Sums<0> {
    INLINE void begin(const float*, bool) {}
    INLINE void add(const float*, long, F, F) {}
    INLINE void put(float*) const {}
#if TRIMODE_AVX512 && defined(__AVX512BF16__)
    INLINE void add_pairs(const bf16*, long, __m512bh, __m512bh) {}
#endif
};

// x: rows of K floats, `stride` floats apart. y: [R][PANEL], what the inputs before these sum to.
template <int R>
void tile_float32(const float* x, long stride, int K, const float* panel, float* y,
                  bool goes_on) {
    Sums<R> sums;
    sums.begin(y, goes_on);
    for (int k = 0; k < K; k++, panel += PANEL) {
        prefetch<R>(panel);
        sums.add(x + k, stride, load(panel), load(panel + W));
    }
    sums.put(y);
}

#if TRIMODE_AVX512 && defined(__AVX512BF16__)

constexpr bool HAS_PAIRS = true;
using Bf16Input = bf16;  // inputs are rounded, products and sums are in float32

template <int R>
void tile_bfloat16(const bf16* x, long stride, int K, const bf16* panel, float* y,
                   bool goes_on) {
    Sums<R> sums;
    sums.begin(y, goes_on);
    for (int k = 0; k < K; k += 2, panel += 2 * PANEL) {
        prefetch<R>(panel);
        sums.add_pairs(x + k, stride, (__m512bh)_mm512_loadu_si512(panel),
                       (__m512bh)_mm512_loadu_si512(panel + PANEL));
    }
    sums.put(y);
}

#else

constexpr bool HAS_PAIRS = false;
using Bf16Input = float;

// A vector of W pairs: the first of each pair, the second of each.
#if TRIMODE_AVX512
INLINE void split_pairs(const bf16* p, F& first, F& second) {
    __m512i x = _mm512_loadu_si512(p);
    first.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    second.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))));
}
#elif TRIMODE_AVX2
INLINE void split_pairs(const bf16* p, F& first, F& second) {
    __m256i x = _mm256_loadu_si256((const __m256i*)p);
    first.v = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    second.v = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000))));
}
#else
INLINE void split_pairs(const bf16* p, F& first, F& second) {
    for (int i = 0; i < W; i++) {
        first[i] = widen(p[2 * i]);
        second[i] = widen(p[2 * i + 1]);
    }
}
#endif

// The inputs stay in float32.
template <int R>
void tile_bfloat16(const float* x, long stride, int K, const bf16* panel, float* y,
                   bool goes_on) {
    Sums<R> sums;
    sums.begin(y, goes_on);
    for (int k = 0; k < K; k += 2, panel += 2 * PANEL) {
        prefetch<R>(panel);
        F even0, odd0, even1, odd1;
        split_pairs(panel, even0, odd0);
        split_pairs(panel + PANEL, even1, odd1);
        sums.add(x + k, stride, even0, even1);
        sums.add(x + k + 1, stride, odd0, odd1);
    }
    sums.put(y);
}

#endif

// `kernel<R>` for a number of rows known when it runs: TILE(tile_float32, R, arguments).
#define FIRST_3(kernel, ...)               \
    case 1: kernel<1>(__VA_ARGS__); break; \
    case 2: kernel<2>(__VA_ARGS__); break; \
    case 3: kernel<3>(__VA_ARGS__); break;

#define FIRST_5(kernel, ...)               \
    FIRST_3(kernel, __VA_ARGS__)           \
    case 4: kernel<4>(__VA_ARGS__); break; \
    case 5: kernel<5>(__VA_ARGS__); break;

#define UP_TO_4(kernel, rows, ...)              \
    switch (rows) {                             \
        FIRST_3(kernel, __VA_ARGS__)            \
        default: kernel<4>(__VA_ARGS__); break; \
    }

#define UP_TO_6(kernel, rows, ...)              \
    switch (rows) {                             \
        FIRST_5(kernel, __VA_ARGS__)            \
        default: kernel<6>(__VA_ARGS__); break; \
    }

#define UP_TO_12(kernel, rows, ...)              \
    switch (rows) {                              \
        FIRST_5(kernel, __VA_ARGS__)             \
        case 6: kernel<6>(__VA_ARGS__); break;   \
        case 7: kernel<7>(__VA_ARGS__); break;   \
        case 8: kernel<8>(__VA_ARGS__); break;   \
        case 9: kernel<9>(__VA_ARGS__); break;   \
        case 10: kernel<10>(__VA_ARGS__); break; \
        case 11: kernel<11>(__VA_ARGS__); break; \
        default: kernel<12>(__VA_ARGS__); break; \
    }

#if TRIMODE_AVX512
#define TILE UP_TO_12
#elif TRIMODE_AVX2
#define TILE UP_TO_6
#else
#define TILE UP_TO_4
#endif

#if TRIMODE_AVX512
#define TILE_INT8 UP_TO_6
#else
#define TILE_INT8 UP_TO_4
#endif

}  // namespace TRIMODE_ISA

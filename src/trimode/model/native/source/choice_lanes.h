// Vector operations of the choice: masks, sums in double, and the random words of the noise.
#pragma once

#include <limits>

#include "simd.h"

namespace TRIMODE_ISA {

using Mask = uint32_t;  // one bit a lane

constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15, MIX_1 = 0xBF58476D1CE4E5B9,
                   MIX_2 = 0x94D049BB133111EB;

// SplitMix64's output for a state.
INLINE uint64_t mix(uint64_t word) {
    word = (word ^ (word >> 30)) * MIX_1;
    word = (word ^ (word >> 27)) * MIX_2;
    return word ^ (word >> 31);
}

#if TRIMODE_AVX512

// False where either is a NaN, but for `unordered`.
INLINE Mask at_most(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
INLINE Mask above(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
INLINE Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
INLINE Mask unordered(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }

// Towards zero.
INLINE void store_whole(int32_t* p, F x) { _mm512_storeu_si512(p, _mm512_cvttps_epi32(x.v)); }

struct Doubles {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
};
INLINE void add(Doubles& sum, F x) {
    sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
}
INLINE void store(double* p, const Doubles& x) {
    _mm512_storeu_pd(p, x.low);
    _mm512_storeu_pd(p + 8, x.high);
}

INLINE __m256i tops_of_8(__m512i word) {
    word = _mm512_xor_si512(word, _mm512_srli_epi64(word, 30));
    word = _mm512_mullo_epi64(word, _mm512_set1_epi64(int64_t(MIX_1)));
    word = _mm512_xor_si512(word, _mm512_srli_epi64(word, 27));
    word = _mm512_mullo_epi64(word, _mm512_set1_epi64(int64_t(MIX_2)));
    word = _mm512_xor_si512(word, _mm512_srli_epi64(word, 31));
    word = _mm512_andnot_si512(word, _mm512_set1_epi64(-1));
    return _mm512_cvtepi64_epi32(_mm512_srli_epi64(word, 33));
}
INLINE F complements(uint64_t state) {
    __m512i steps = _mm512_setr_epi64(0, int64_t(GAMMA), int64_t(2 * GAMMA), int64_t(3 * GAMMA),
                                      int64_t(4 * GAMMA), int64_t(5 * GAMMA), int64_t(6 * GAMMA),
                                      int64_t(7 * GAMMA));
    __m512i low = _mm512_add_epi64(_mm512_set1_epi64(int64_t(state)), steps);
    __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(int64_t(8 * GAMMA)));
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(tops_of_8(low)), tops_of_8(high), 1);
    return {_mm512_cvtepi32_ps(both)};
}

#elif TRIMODE_AVX2

INLINE Mask at_most(F a, F b) {
    return Mask(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)));
}
INLINE Mask above(F a, F b) {
    return Mask(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
INLINE Mask equal(F a, F b) {
    return Mask(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
INLINE Mask unordered(F a, F b) {
    return Mask(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)));
}
INLINE void store_whole(int32_t* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm256_cvttps_epi32(x.v));
}

struct Doubles {
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
};
INLINE void add(Doubles& sum, F x) {
    sum.low = _mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)));
    sum.high = _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
}
INLINE void store(double* p, const Doubles& x) {
    _mm256_storeu_pd(p, x.low);
    _mm256_storeu_pd(p + 4, x.high);
}

INLINE __m256i times(__m256i a, uint64_t constant) {
    __m256i b = _mm256_set1_epi64x(int64_t(constant));
    __m256i b_high = _mm256_set1_epi64x(int64_t(constant >> 32));
    __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), b),
                                     _mm256_mul_epu32(a, b_high));
    return _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64(cross, 32));
}
// In the even 32-bit lanes.
INLINE __m256i tops_of_4(__m256i word) {
    word = times(_mm256_xor_si256(word, _mm256_srli_epi64(word, 30)), MIX_1);
    word = times(_mm256_xor_si256(word, _mm256_srli_epi64(word, 27)), MIX_2);
    word = _mm256_xor_si256(word, _mm256_srli_epi64(word, 31));
    word = _mm256_andnot_si256(word, _mm256_set1_epi64x(-1));
    return _mm256_srli_epi64(word, 33);
}
INLINE F complements(uint64_t state) {
    __m256i steps =
        _mm256_setr_epi64x(0, int64_t(GAMMA), int64_t(2 * GAMMA), int64_t(3 * GAMMA));
    __m256i low = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(state)), steps);
    __m256i high = _mm256_add_epi64(low, _mm256_set1_epi64x(int64_t(4 * GAMMA)));
    __m256i evens = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    __m256i a = _mm256_permutevar8x32_epi32(tops_of_4(low), evens);
    __m256i b = _mm256_permutevar8x32_epi32(tops_of_4(high), evens);
    return {_mm256_cvtepi32_ps(_mm256_blend_epi32(a, b, 0xf0))};
}

#else

#define BITS(condition)                                                  \
    Mask bits = 0;                                                       \
    for (int i = 0; i < W; i++) bits |= Mask(bool(condition)) << i;      \
    return bits

INLINE Mask at_most(F a, F b) { BITS(a[i] <= b[i]); }
INLINE Mask above(F a, F b) { BITS(a[i] > b[i]); }
INLINE Mask equal(F a, F b) { BITS(a[i] == b[i]); }
INLINE Mask unordered(F a, F b) { BITS(a[i] != a[i] || b[i] != b[i]); }
#undef BITS
INLINE void store_whole(int32_t* p, F x) {
    for (int i = 0; i < W; i++) p[i] = int32_t(x[i]);
}

struct Doubles {
    double v[W] = {};
};
INLINE void add(Doubles& sum, F x) {
    for (int i = 0; i < W; i++) sum.v[i] += double(x[i]);
}
INLINE void store(double* p, const Doubles& x) {
    for (int i = 0; i < W; i++) p[i] = x.v[i];
}

INLINE F complements(uint64_t state) {
    F y;
    for (int i = 0; i < W; i++) y[i] = float(int32_t(~mix(state + uint64_t(i) * GAMMA) >> 33));
    return y;
}

#endif

// complements(state): for W states, GAMMA apart, 2^31 (1 - u) of the uniform u drawn from each,
// rounded down before it is rounded to a float.

// The lanes added in one fixed tree.
INLINE double sum(const Doubles& x) {
    double s[W];
    store(s, x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) s[i] = s[i] + s[i + half];
    return s[0];
}

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// The next W logits, of which there are n: -inf behind the last.
INLINE F tokens(const float* p, int n) {
    if (n >= W) return load(p);
    float some[W];
    for (int i = 0; i < W; i++) some[i] = i < n ? p[i] : -INFINITE;
    return load(some);
}

}  // namespace TRIMODE_ISA

// One vector of floats, whatever the instruction set. Included by kernels.cpp, which is compiled
// once for each; every file compiled with it is in the namespace TRIMODE_ISA.
//
// Sums must come out the same for a token whatever else is computed, so no operation here depends
// on how many lanes are used: a tail is the same code with lanes switched off. Compiled with
// -ffp-contract=off; a fused multiply-add is written out as `fma`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC takes the lanes that its own header leaves undefined for a mistake of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if defined(__AVX512F__)
#define TRIMODE_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define TRIMODE_AVX2 1
#endif

#define INLINE inline __attribute__((always_inline))

namespace TRIMODE_ISA {

using bf16 = uint16_t;

INLINE float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// To the nearest, ties to even; a NaN stays one.
INLINE bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if TRIMODE_AVX512

constexpr int W = 16;  // lanes

struct F {
    __m512 v;
};

INLINE __mmask16 lanes(int n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }
INLINE F zero() { return {_mm512_setzero_ps()}; }
INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE F load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, lanes(n), x.v); }
INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F round_even(F a) { return {_mm512_roundscale_ps(a.v, 8)}; }
INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
// 2^n for whole n within -126 .. 127.
INLINE F exp2_whole(F n) {
    __m512i bits = _mm512_slli_epi32(
        _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_castsi512_ps(bits)};
}
INLINE F load_bf16(const bf16* p) {
    __m256i x = _mm256_loadu_si256((const __m256i*)p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
INLINE F load_bf16(const bf16* p, int n) {
    __m256i x = _mm256_maskz_loadu_epi16(lanes(n), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
INLINE void store_bf16(bf16* p, F x, int n = 16) {
    __m512i bits = _mm512_castps_si512(x.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i high = _mm512_srli_epi32(up, 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    high = _mm512_mask_or_epi32(high, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtepi32_epi16(high));
}

// Lane j: the sum of the lanes of x[j], in one fixed tree.
INLINE F sums(const F x[16]) {
    __m512 a[8], b[4];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v),
                             _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
    for (int i = 0; i < 4; i++) {
        __m512d p = _mm512_castps_pd(a[2 * i]), q = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    }
    auto join = [](__m512 p, __m512 q) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
    };
    return {join(join(b[0], b[1]), join(b[2], b[3]))};
}

#elif TRIMODE_AVX2

constexpr int W = 8;

struct F {
    __m256 v;
};

INLINE __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE F zero() { return {_mm256_setzero_ps()}; }
INLINE F set1(float x) { return {_mm256_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
INLINE F load(const float* p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.v); }
INLINE void store(float* p, F x, int n) { _mm256_maskstore_ps(p, lanes(n), x.v); }
INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
INLINE F round_even(F a) { return {_mm256_round_ps(a.v, 8)}; }
INLINE F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
INLINE F sqrt(F a) { return {_mm256_sqrt_ps(a.v)}; }
INLINE F exp2_whole(F n) {
    __m256i bits = _mm256_slli_epi32(
        _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_castsi256_ps(bits)};
}
INLINE F load_bf16(const bf16* p) {
    __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
INLINE F load_bf16(const bf16* p, int n) {
    if (n >= 8) return load_bf16(p);
    bf16 some[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < n; i++) some[i] = p[i];
    return load_bf16(some);
}
INLINE void store_bf16(bf16* p, F x, int n = 8) {
    float some[8];
    store(some, x);
    for (int i = 0; i < (n < 8 ? n : 8); i++) p[i] = narrow(some[i]);
}

INLINE F sums(const F x[8]) {
    __m256 a[4], b[2];
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_add_ps(_mm256_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v),
                             _mm256_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
    for (int i = 0; i < 2; i++) {
        __m256d p = _mm256_castps_pd(a[2 * i]), q = _mm256_castps_pd(a[2 * i + 1]);
        b[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)),
                             _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
    }
    return {_mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20),
                          _mm256_permute2f128_ps(b[0], b[1], 0x31))};
}

#else

// A vector of GCC and Clang: arithmetic by lane is theirs, in the registers that there are. All
// is inlined, so none is passed from one function to another.
constexpr int W = 8;

typedef float F __attribute__((vector_size(W * 4)));

#define EACH(expression)                             \
    F y;                                             \
    for (int i = 0; i < W; i++) y[i] = (expression); \
    return y

INLINE F zero() { return F{}; }
INLINE F set1(float x) { return F{} + x; }
INLINE F load(const float* p) {
    F y;
    std::memcpy(&y, p, sizeof y);
    return y;
}
INLINE F load(const float* p, int n) {
    F y{};
    std::memcpy(&y, p, n < W ? n * 4ul : sizeof y);
    return y;
}
INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
INLINE void store(float* p, F x, int n) { std::memcpy(p, &x, n < W ? n * 4ul : sizeof x); }
INLINE F fma(F a, F b, F c) { return a * b + c; }  // two roundings, here only
INLINE F max(F a, F b) { return a > b ? a : b; }
INLINE F min(F a, F b) { return a < b ? a : b; }
INLINE F round_even(F a) { EACH(std::nearbyint(a[i])); }
INLINE F abs(F a) { return a < 0.0f ? -a : a; }
INLINE F sqrt(F a) { EACH(std::sqrt(a[i])); }
INLINE float power_of_2(float n) {
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
INLINE F exp2_whole(F n) { EACH(power_of_2(n[i])); }
INLINE F load_bf16(const bf16* p) { EACH(widen(p[i])); }
INLINE F load_bf16(const bf16* p, int n) { EACH(i < n ? widen(p[i]) : 0.0f); }
INLINE void store_bf16(bf16* p, F x, int n = W) {
    for (int i = 0; i < W && i < n; i++) p[i] = narrow(x[i]);
}
#undef EACH

#endif

// The lanes added in one fixed tree: halves, quarters and so on.
INLINE float sum(F x) {
#if TRIMODE_AVX512
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
#else
    float s[W];
    store(s, x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) s[i] = s[i] + s[i + half];
    return s[0];
#endif
}

#if !TRIMODE_AVX512 && !TRIMODE_AVX2
INLINE F sums(const F x[W]) {
    F y;
    for (int j = 0; j < W; j++) y[j] = sum(x[j]);
    return y;
}
#endif

INLINE float largest(F x) {
#if TRIMODE_AVX512
    return _mm512_reduce_max_ps(x.v);
#else
    float s[W];
    store(s, x);
    float m = s[0];
    for (int i = 1; i < W; i++) m = s[i] > m ? s[i] : m;
    return m;
#endif
}

// e^x, error below 2 ulp; at least 1.2e-38, and NaN of NaN. Polynomial of Cephes (expf).
INLINE F exp(F x) {
    F low = set1(-87.33654f), high = set1(88.37626f);
    F y = min(high, max(low, x));  // the second where one is NaN
    F n = round_even(y * set1(1.44269504088896341f));
    F r = fma(n, set1(-0.693359375f), y);
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r + set1(1.0f));
    return p * exp2_whole(n);
}

}  // namespace TRIMODE_ISA

// Products of weights and inputs in 8 bits, with a scale for every GROUP of inputs in both.
//
// A panel holds its groups one after the other: PANEL scales in bfloat16, then
// [GROUP / 4][PANEL][4] weights as w + 128 in uint8, which is what the CPU's dot products take
// beside a signed input. The 128 is taken off again with the sum of the row's inputs. Sums within a
// group are of integers, at most 32 * 255 * 127; groups are added up in float32 in their order.
#pragma once

#include "products.h"

namespace TRIMODE_ISA {

constexpr int GROUP = 32;

#if TRIMODE_AVX512 && defined(__AVX512VNNI__)
constexpr int MOST_ROWS_INT8 = 6;  // 12 sums of integers, 12 of floats
#else
constexpr int MOST_ROWS_INT8 = 4;
#endif

inline int num_groups(int K) { return (K + GROUP - 1) / GROUP; }

// Bytes of a row: inputs, then the scale of every group, then -128 times its sum.
inline long quantized_bytes(int K) { return (long(num_groups(K)) * (GROUP + 8) + 63) / 64 * 64; }

constexpr long GROUP_BYTES = PANEL * 2 + PANEL * GROUP;

// x: [K] -> a row. A group with what is not finite gets a scale that is no number.
inline void quantize(const float* x, int K, char* row) {
    const int groups = num_groups(K);
    auto* scales = (float*)(row + long(groups) * GROUP);
    auto* offsets = (int32_t*)(scales + groups);
    for (int g = 0; g < groups; g++) {
        const int n = K - g * GROUP < GROUP ? K - g * GROUP : GROUP;
        F most = zero(), odd = zero();
        for (int i = 0; i < n; i += W) {
            F v = load(x + g * GROUP + i, n - i);
            most = max(most, abs(v));
            odd = odd + (v - v);  // 0, but of what is not finite
        }
        const float top = largest(most) + sum(odd);
        const float inverse = 127.0f / top;
        const F by = set1(std::isfinite(inverse) ? inverse : 0.0f);
        float rounded[GROUP];
        for (int i = 0; i < GROUP; i += W)
            store(rounded + i, i < n ? round_even(load(x + g * GROUP + i, n - i) * by) : zero());
        auto* out = (int8_t*)row + g * GROUP;
        int32_t total = 0;
        for (int i = 0; i < GROUP; i++) {
            const int32_t one = std::isfinite(top) ? int32_t(rounded[i]) : 0;
            out[i] = int8_t(one);
            total += one;
        }
        scales[g] = top / 127.0f;
        offsets[g] = -128 * total;
    }
}

#if TRIMODE_AVX512 && defined(__AVX512VNNI__)

template <int R>
struct Sums8 {
    __m512i i0, i1;
    F f0, f1;
    Sums8<R - 1> rest;
    INLINE void begin(const float* y, bool goes_on) {
        f0 = goes_on ? load(y) : zero();
        f1 = goes_on ? load(y + W) : zero();
        rest.begin(y + PANEL, goes_on);
    }
    INLINE void start(const char* offset, long stride) {
        int32_t value;
        std::memcpy(&value, offset, 4);
        i0 = i1 = _mm512_set1_epi32(value);
        rest.start(offset + stride, stride);
    }
    INLINE void add(const char* x, long stride, __m512i w0, __m512i w1) {
        int32_t four;
        std::memcpy(&four, x, 4);
        __m512i a = _mm512_set1_epi32(four);
        i0 = _mm512_dpbusd_epi32(i0, w0, a);
        i1 = _mm512_dpbusd_epi32(i1, w1, a);
        rest.add(x + stride, stride, w0, w1);
    }
    INLINE void finish(const char* scale, long stride, F s0, F s1) {
        float value;
        std::memcpy(&value, scale, 4);
        F by = set1(value);
        f0 = fma(F{_mm512_cvtepi32_ps(i0)} * by, s0, f0);
        f1 = fma(F{_mm512_cvtepi32_ps(i1)} * by, s1, f1);
        rest.finish(scale + stride, stride, s0, s1);
    }
    INLINE void put(float* y) const {
        store(y, f0);
        store(y + W, f1);
        rest.put(y + PANEL);
    }
};

template <>
struct Sums8<0> {
    INLINE void begin(const float*, bool) {}
    INLINE void start(const char*, long) {}
    INLINE void add(const char*, long, __m512i, __m512i) {}
    INLINE void finish(const char*, long, F, F) {}
    INLINE void put(float*) const {}
};

// Groups first .. last-1 of rows that have `groups`. x: the rows, `stride` bytes apart.
template <int R>
void tile_int8(const char* x, long stride, int groups, int first, int last, const char* panel,
               float* y) {
    const long scales = long(groups) * GROUP, offsets = scales + long(groups) * 4;
    Sums8<R> sums;
    sums.begin(y, first > 0);
    for (int g = first; g < last; g++, panel += GROUP_BYTES) {
        sums.start(x + offsets + g * 4, stride);
        const char* weights = panel + PANEL * 2;
        for (int k = 0; k < GROUP; k += 4, weights += PANEL * 4) {
            prefetch<R>(weights);
            sums.add(x + g * GROUP + k, stride, _mm512_loadu_si512(weights),
                     _mm512_loadu_si512(weights + W * 4));
        }
        sums.finish(x + scales + g * 4, stride, load_bf16((const bf16*)panel),
                    load_bf16((const bf16*)panel + W));
    }
    sums.put(y);
}

#else

template <int R>
void tile_int8(const char* x, long stride, int groups, int first, int last, const char* panel,
               float* y) {
    const long scales = long(groups) * GROUP, offsets = scales + long(groups) * 4;
    if (first == 0) std::memset(y, 0, R * PANEL * sizeof(float));
    for (int g = first; g < last; g++, panel += GROUP_BYTES) {
        const auto* weights = (const uint8_t*)panel + PANEL * 2;
        for (int r = 0; r < R; r++) {
            const auto* row = (const int8_t*)x + r * stride + g * GROUP;
            int32_t sums[PANEL], offset;
            float scale;
            std::memcpy(&offset, x + r * stride + offsets + g * 4, 4);
            std::memcpy(&scale, x + r * stride + scales + g * 4, 4);
            for (int j = 0; j < PANEL; j++) sums[j] = offset;
            for (int k = 0; k < GROUP; k += 4)
                for (int j = 0; j < PANEL; j++) {
                    const uint8_t* w = weights + (k / 4 * PANEL + j) * 4;
                    sums[j] += w[0] * row[k] + w[1] * row[k + 1] + w[2] * row[k + 2] +
                               w[3] * row[k + 3];
                }
            float whole[PANEL];
            for (int j = 0; j < PANEL; j++) whole[j] = float(sums[j]);
            for (int j = 0; j < PANEL; j += W) {
                F s = load_bf16((const bf16*)panel + j), sum = load(y + r * PANEL + j);
                store(y + r * PANEL + j, fma(load(whole + j) * set1(scale), s, sum));
            }
        }
    }
}

#endif

// Fill one panel from `at(j, k)`, weight of output j and input k; num outputs are there.
template <class At>
void quantize_panel(char* panel, int num, int K, At at) {
    for (int g = 0; g < num_groups(K); g++, panel += GROUP_BYTES) {
        const int n = K - g * GROUP < GROUP ? K - g * GROUP : GROUP;
        std::memset(panel, 0, PANEL * 2);
        std::memset(panel + PANEL * 2, 128, PANEL * GROUP);
        for (int j = 0; j < num; j++) {
            float top = 0;
            bool is_finite = true;
            for (int k = 0; k < n; k++) {
                const float one = std::fabs(at(j, g * GROUP + k));
                is_finite &= std::isfinite(one);
                top = one > top ? one : top;
            }
            if (!is_finite) {  // must not come out as a number
                ((bf16*)panel)[j] = 0x7fc0;
                continue;
            }
            bf16 scale = narrow(top / 127.0f);
            if (widen(scale) * 127.0f < top) scale++;  // so that no weight is cut off
            ((bf16*)panel)[j] = scale;
            const float inverse = 1.0f / widen(scale);
            const float by = std::isfinite(inverse) ? inverse : 0.0f;
            for (int k = 0; k < n; k++) {
                const float q = std::nearbyint(at(j, g * GROUP + k) * by);
                panel[PANEL * 2 + (k / 4 * PANEL + j) * 4 + k % 4] = char(uint8_t(int(q) + 128));
            }
        }
    }
}

inline float quantized_at(const char* panel, int j, int k) {
    panel += k / GROUP * GROUP_BYTES;
    const auto q = uint8_t(panel[PANEL * 2 + (k % GROUP / 4 * PANEL + j) * 4 + k % 4]);
    return float(int(q) - 128) * widen(((const bf16*)panel)[j]);
}

}  // namespace TRIMODE_ISA

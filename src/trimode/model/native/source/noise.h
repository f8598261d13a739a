// Gumbel noise with the bits of `decoding/noise.py`, and the token that wins with it.
#pragma once

#include <atomic>

#include "choice_lanes.h"

namespace TRIMODE_ISA {

constexpr double LN2 = 0x1.62e42fefa39efp-1;

INLINE uint64_t noise_key(uint64_t seed, int64_t position) {
    uint64_t stream = mix(seed + GAMMA);
    return mix(stream ^ mix((uint64_t(position) + 1) * GAMMA));
}

// Natural logarithm of a positive normal number, by a table [3][4096].
INLINE double table_log(double x, const double* table) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    double exponent = double(int64_t(bits >> 52) - 1023);
    uint64_t one = (bits & ((uint64_t(1) << 52) - 1)) | (uint64_t(1023) << 52);
    double mantissa;
    std::memcpy(&mantissa, &one, 8);
    int index = int((bits >> 40) & 4095);
    double r = (mantissa - table[index]) * table[4096 + index];
    return (table[2 * 4096 + index] + exponent * LN2) + (r - r * r * 0.5);
}

INLINE double gumbel(uint64_t word, const double* table) {
    double odd = double(int64_t(((word >> 12) << 1) | 1));
    double exponential = -(table_log(odd, table) - 53 * LN2);
    exponential = exponential < 0x1p-53 ? 0x1p-53 : exponential;
    return -table_log(exponential, table);
}

// What filters keep: all above `score`, and of those that are equal to it the ids up to `id`.
struct Edge {
    float score = -INFINITE;
    int32_t id = std::numeric_limits<int32_t>::max();
    bool keeps(float s, int v) const { return s > score || (s == score && v <= id); }
};

constexpr float NOTHING = -3e38f;  // below every score

// The two best, the lower id before an equal one.
struct Best {
    float score = NOTHING, second_score = NOTHING;
    int32_t id = -1, second_id = -1;

    // Ids must come in ascending order.
    void add(float s, int32_t v) {
        if (s > score) {
            second_score = score, second_id = id;
            score = s, id = v;
        } else if (s > second_score) {
            second_score = s, second_id = v;
        }
    }
};

struct Noise {
    const float* logits;  // [V], under the law
    float temperature;
    uint64_t key;
    Edge edge;
    const double* table;
    bool wants_second;
    std::atomic<float> bound{NOTHING};  // some score that the worst wanted one reaches at least

    float score(int v) const { return logits[v] / temperature; }
    float noisy(int v) const {
        return score(v) + float(gumbel(mix(key + (uint64_t(v) + 1) * GAMMA), table));
    }

    // The best of the tokens from `first` on. A token can reach a bound only if its noise g does:
    // g >= bound - score, so 1 - u <= exp(score - bound), which needs no logarithm. Noise is
    // computed for the few that pass. The slack covers the roundings of scores, exponential and
    // complement; an extreme u, whose logarithm is rough, always passes.
    Best best(int first, int stop) {
        constexpr float RANGE = 38.0f;   // noise is below 36.8
        constexpr float EXTREME = 16.0f; // of 2^31: noise above 18.7
        Best found;
        float limit = bound.load(std::memory_order_relaxed);
        auto lowered = [&] { return limit - (1e-4f + 1e-6f * std::fabs(limit)); };
        F low = set1(lowered());
        F least = max(set1(edge.score), set1(lowered() - RANGE));
        F divisor = set1(temperature), extreme = set1(EXTREME), scale = set1(0x1p31f);
        for (int v = first; v < stop; v += W) {
            F s = tokens(logits + v, stop - v) / divisor;
            Mask may = at_most(least, s);
            if (!may) continue;
            F chance = max(exp(s - low) * scale, extreme);
            may &= at_most(complements(key + (uint64_t(v) + 1) * GAMMA), chance);
            for (; may; may &= may - 1) {
                int i = v + __builtin_ctz(may);
                if (i >= stop || !edge.keeps(score(i), i)) continue;
                found.add(noisy(i), i);
                float reached = wants_second ? found.second_score : found.score;
                if (reached > limit) {
                    limit = reached;
                    low = set1(lowered());
                    least = max(set1(edge.score), set1(lowered() - RANGE));
                }
            }
        }
        float seen = bound.load(std::memory_order_relaxed);
        while (limit > seen && !bound.compare_exchange_weak(seen, limit)) {
        }
        return found;
    }
};

}  // namespace TRIMODE_ISA

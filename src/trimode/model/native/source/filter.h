// The likeliest tokens of a row: min-p, top-k and top-p. Of equally likely ones the lower ids come
// first.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "noise.h"

namespace TRIMODE_ISA {

// Larger for what comes first. Minus zero counts as zero.
INLINE uint64_t rank_key(float score, int32_t id) {
    score = score + 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t(bits) << 32) | uint32_t(~id);
}
INLINE int32_t id_of(uint64_t key) { return int32_t(~uint32_t(key)); }
INLINE float score_of(uint64_t key) {
    uint32_t bits = uint32_t(key >> 32);
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float score;
    std::memcpy(&score, &bits, 4);
    return score;
}
INLINE Edge edge_at(uint64_t key) { return {score_of(key), id_of(key)}; }

// The k first ones in no order; fewer if fewer are above -inf.
inline void find_top(const float* logits, int num_tokens, float temperature, int k,
                     std::vector<uint64_t>& keys) {
    keys.clear();
    if (k <= 0) return;
    size_t most = size_t(k) + std::max(k, 64);
    F divisor = set1(temperature), floor = set1(-INFINITE);
    auto prune = [&] {
        std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
        keys.resize(size_t(k));
    };
    for (int v = 0; v < num_tokens; v += W) {
        F s = tokens(logits + v, num_tokens - v) / divisor;
        Mask may = above(s, floor);  // a later id must be above, or it loses the tie
        if (!may) continue;
        float scores[W];
        store(scores, s);
        for (; may; may &= may - 1) {
            int lane = __builtin_ctz(may);
            keys.push_back(rank_key(scores[lane], v + lane));
        }
        if (keys.size() >= most) {
            prune();
            floor = set1(score_of(keys[size_t(k) - 1]));
        }
    }
    if (keys.size() > size_t(k)) prune();
}

// Scratch of one thread.
struct FilterScratch {
    std::vector<uint64_t> keys;
    std::vector<double> masses;
};

// The last token that the first ones need to reach a share of their mass.
inline Edge edge_of_sorted(const std::vector<uint64_t>& keys, float best, double before,
                           double target) {
    float exps[W];
    for (size_t i = 0; i < keys.size(); i++) {
        if (i % W == 0) {
            float some[W];
            for (size_t j = 0; j < W; j++)
                some[j] = i + j < keys.size() ? score_of(keys[i + j]) - best : 0.0f;
            store(exps, exp(load(some)));
        }
        before += double(exps[i % W]);
        if (before >= target) return edge_at(keys[i]);
    }
    return edge_at(keys.back());
}

// Top-p over all tokens of scores from `floor` on. They are dealt out to buckets by how far they
// are below the best; the bucket in which the mass is reached is sorted. What is DEPTH below has no
// mass to speak of.
inline Edge top_p_edge(const float* logits, int num_tokens, float temperature, float floor,
                       double top_p, float best, FilterScratch& scratch) {
    constexpr int DEPTH = 32, BUCKETS = 1024;
    F divisor = set1(temperature), top = set1(best);
    F least = set1(std::max(best - DEPTH, floor));
    F scale = set1(float(BUCKETS / DEPTH)), last = set1(float(BUCKETS - 1));
    // Two of each bucket, or one addition would wait for the one before it.
    scratch.masses.assign(2 * BUCKETS, 0.0);
    double* masses = scratch.masses.data();
    float exps[W];
    int32_t buckets[W];
    for (int v = 0; v < num_tokens; v += W) {
        F s = tokens(logits + v, num_tokens - v) / divisor;
        Mask is_in = at_most(least, s);
        if (!is_in) continue;
        store(exps, exp(s - top));
        store_whole(buckets, min((top - s) * scale, last));
        for (; is_in; is_in &= is_in - 1) {
            int lane = __builtin_ctz(is_in);
            masses[2 * buckets[lane] + (lane & 1)] += double(exps[lane]);
        }
    }
    double total = 0, before = 0;
    for (int b = 0; b < BUCKETS; b++) total += masses[2 * b] + masses[2 * b + 1];
    double target = top_p * total;
    int bucket = 0;
    for (; bucket < BUCKETS - 1; bucket++) {
        double mass = masses[2 * bucket] + masses[2 * bucket + 1];
        if (before + mass >= target) break;
        before += mass;
    }
    scratch.keys.clear();
    F nearest = set1(best - (bucket - 1) * (1.0f / (BUCKETS / DEPTH)));  // a bucket to spare
    F farthest = set1(best - (bucket + 2) * (1.0f / (BUCKETS / DEPTH)));
    for (int v = 0; v < num_tokens; v += W) {
        F s = tokens(logits + v, num_tokens - v) / divisor;
        Mask may = at_most(farthest, s) & at_most(s, nearest) & at_most(least, s);
        if (!may) continue;
        float scores[W];
        store(scores, s);
        store_whole(buckets, min((top - s) * scale, last));
        for (; may; may &= may - 1) {
            int lane = __builtin_ctz(may);
            if (buckets[lane] == bucket) scratch.keys.push_back(rank_key(scores[lane], v + lane));
        }
    }
    std::sort(scratch.keys.begin(), scratch.keys.end(), std::greater<>());
    return edge_of_sorted(scratch.keys, best, before, target);
}

// What scores from `floor` on, then top-k, then top-p, each within what is left, keep of a row
// whose best score is finite.
inline Edge filter_edge(const float* logits, int num_tokens, float temperature, float floor,
                        int top_k, double top_p, float best, FilterScratch& scratch) {
    bool has_k = top_k > 0 && top_k < num_tokens, has_p = top_p < 1;
    Edge of_floor;
    of_floor.score = floor;
    if (!has_k) {
        if (!has_p) return of_floor;
        return top_p_edge(logits, num_tokens, temperature, floor, top_p, best, scratch);
    }
    auto& keys = scratch.keys;
    find_top(logits, num_tokens, temperature, top_k, keys);
    size_t num_found = keys.size();
    auto is_low = [floor](uint64_t key) { return score_of(key) < floor; };
    keys.erase(std::remove_if(keys.begin(), keys.end(), is_low), keys.end());
    if (!has_p && keys.size() < num_found) return of_floor;
    if (!has_p) return edge_at(*std::min_element(keys.begin(), keys.end()));
    std::sort(keys.begin(), keys.end(), std::greater<>());
    double total = 0;
    for (size_t i = 0; i < keys.size(); i += W) {
        float some[W], exps[W];
        size_t n = std::min(keys.size() - i, size_t(W));
        for (size_t j = 0; j < W; j++) some[j] = j < n ? score_of(keys[i + j]) - best : 0.0f;
        store(exps, exp(load(some)));
        for (size_t j = 0; j < n; j++) total += double(exps[j]);
    }
    return edge_of_sorted(keys, best, 0.0, top_p * total);
}

}  // namespace TRIMODE_ISA

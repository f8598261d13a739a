// A row's law beyond temperature and filters: mask, then bias, then penalties.
#pragma once

#include <vector>

#include "choice_batch.h"
#include "choice_lanes.h"

namespace TRIMODE_ISA {

INLINE bool has_law(const trimode::ChoiceRow& row) {
    return row.allowed || row.num_bias || row.seen || row.counts;
}

// Scratch of one thread.
struct LawScratch {
    std::vector<float> under;
    std::vector<uint32_t> seen;
    std::vector<int32_t> counts;
};

// Divides, or multiplies, the scores of what was seen.
inline void penalise_seen(const trimode::ChoiceRow& row, int num_tokens, float* out,
                          std::vector<uint32_t>& seen) {
    int num_words = (num_tokens + 31) / 32;
    seen.assign(row.seen, row.seen + num_words);
    for (int i = 0; i < row.num_fed; i++) seen[row.fed[i] / 32] |= 1u << (row.fed[i] % 32);
    for (int word = 0; word < num_words; word++)
        for (uint32_t bits = seen[word]; bits; bits &= bits - 1) {
            int v = 32 * word + __builtin_ctz(bits);
            if (v >= num_tokens) break;
            out[v] = out[v] > 0 ? out[v] / row.penalty : out[v] * row.penalty;
        }
}

// Lowers the scores of what occurs, by its number.
inline void penalise_counted(const trimode::ChoiceRow& row, int num_tokens, float* out,
                             std::vector<int32_t>& counts) {
    counts.assign(row.counts, row.counts + num_tokens);
    for (int i = 0; i < row.num_counted; i++) counts[row.counted[i]]++;
    for (int v = 0; v < num_tokens; v++)
        if (counts[v]) out[v] -= float(counts[v]) * row.frequency + row.presence;
}

// Makes `scratch.under`, [V], a copy of the logits under the law.
inline void apply_law(const trimode::ChoiceRow& row, const float* logits, int num_tokens,
                      LawScratch& scratch) {
    scratch.under.resize(size_t(num_tokens));
    float* out = scratch.under.data();
    int num_words = (num_tokens + 31) / 32;
    if (row.allowed) {
        for (int word = 0; word < num_words; word++) {
            uint32_t bits = row.allowed[word];
            int first = 32 * word, n = num_tokens - first < 32 ? num_tokens - first : 32;
            for (int i = 0; i < n; i++)
                out[first + i] = bits >> i & 1 ? logits[first + i] : -INFINITE;
        }
    } else {
        std::memcpy(out, logits, size_t(num_tokens) * sizeof(float));
    }
    for (int i = 0; i < row.num_bias; i++) out[row.bias_ids[i]] += row.bias[i];
    if (row.seen) penalise_seen(row, num_tokens, out, scratch.seen);
    if (row.counts) penalise_counted(row, num_tokens, out, scratch.counts);
}

}  // namespace TRIMODE_ISA

// The corrector of an adapter: what the token before a place adds to the place's candidates.
#pragma once

#include <vector>

#include "choice_batch.h"
#include "filter.h"

namespace TRIMODE_ISA {

INLINE float dot(const float* a, const float* b, int n) {
    F total = zero();
    for (int i = 0; i < n; i += W) total = fma(load(a + i, n - i), load(b + i, n - i), total);
    return sum(total);
}

struct CorrectorScratch {
    std::vector<uint64_t> keys;
    std::vector<float> embedding, direction;  // [H]
};

// Add `<(A e_before) * (1 + C h), B e_candidate>` to the logits of the likeliest tokens. B is
// applied to the left side, so that a candidate costs one product of vectors.
inline void correct(const trimode::CorrectorView& corrector, const float* state, int32_t before_id,
                    float* logits, int num_tokens, CorrectorScratch& scratch) {
    int hidden = corrector.hidden_size;
    const trimode::EmbeddingView& embedding = *corrector.embedding;
    scratch.embedding.resize(size_t(hidden));
    scratch.direction.assign(size_t(hidden), 0.0f);
    float* e = scratch.embedding.data();
    float* direction = scratch.direction.data();
    embedding.row(embedding.self, before_id, e);
    for (int r = 0; r < corrector.rank; r++) {
        int64_t at = int64_t(r) * hidden;
        float gate = 1.0f + dot(corrector.state + at, state, hidden);
        F weight = set1(dot(corrector.before + at, e, hidden) * gate);
        for (int i = 0; i < hidden; i += W) {
            F sum = fma(weight, load(corrector.candidate + at + i, hidden - i),
                        load(direction + i, hidden - i));
            store(direction + i, sum, hidden - i);
        }
    }
    find_top(logits, num_tokens, 1.0f, std::min(corrector.num_candidates, num_tokens),
             scratch.keys);
    for (uint64_t key : scratch.keys) {
        int32_t id = id_of(key);
        embedding.row(embedding.self, id, e);
        logits[id] += dot(direction, e, hidden);
    }
}

}  // namespace TRIMODE_ISA

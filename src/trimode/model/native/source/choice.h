// The choice of a token over the vocabulary.
#pragma once

#include "choice_batch.h"
#include "simd.h"
#include "threads.h"

namespace TRIMODE_ISA {

inline void choose(trimode::Threads& threads, const trimode::ChoiceBatch& batch) {
    threads.each(batch.num_rows, [&](int row) {
        const float* logits = batch.logits + long(row) * batch.num_tokens;
        int best = 0;
        for (int v = 1; v < batch.num_tokens; v++)
            if (logits[v] > logits[best]) best = v;
        batch.token_ids[row] = best;
    });
}

}  // namespace TRIMODE_ISA

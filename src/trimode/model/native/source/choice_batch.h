// What a choice over the vocabulary is given and gives. Data only.
#pragma once

#include <cstdint>

namespace trimode {

struct ChoiceBatch {
    int32_t num_rows, num_tokens;  // W, V
    float* logits;                 // [W, V]
    int32_t* token_ids;            // [W]
};

}  // namespace trimode

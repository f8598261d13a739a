// What a choice over the vocabulary is given and gives. Data only; `native/choice.py` mirrors it.
#pragma once

#include <cstdint>

namespace trimode {

// Rows of an input embedding, however they are stored.
struct EmbeddingView {
    const void* self;
    void (*row)(const void* self, int32_t token_id, float* out);  // out: [H]
};

// The corrector of an adapter, see `model/corrector.py`. Matrices are [rank, H].
struct CorrectorView {
    const float *before, *state, *candidate;
    const EmbeddingView* embedding;
    int32_t rank, hidden_size, num_candidates;
};

// What one row is subject to.
struct ChoiceRow {
    uint64_t seed;
    int64_t position;
    double top_p;             // 1 and more keep all
    const uint32_t* allowed;  // packed bits [V], or null for all
    const uint32_t* seen;     // packed bits [V] of what the penalty is for, or null for no penalty
    const int32_t* fed;       // [num_fed], what the penalty is for beside `seen`
    const int32_t* bias_ids;  // [num_bias], each at most once
    const float* bias;        // [num_bias]
    const int32_t* counts;    // [V] occurrences in the new text, or null for no penalty by number
    const int32_t* counted;   // [num_counted], what occurs beside `counts`, once for each time
    int32_t num_fed, num_bias, num_counted;
    float penalty;
    float frequency;       // is taken from a score for each occurrence
    float presence;        // is taken from the score of what occurs
    float temperature;     // 0 is greedy
    float min_p_depth;     // logarithm of min-p; -inf keeps all
    int32_t top_k;         // 0 keeps all
    int32_t target;        // token whose log-probability is asked for, or -1
    int32_t num_logprobs;  // how many of the likeliest are asked for, or -1
    int32_t before_id;     // corrected: the token before it, or -1
    int32_t before_row;    // corrected: the earlier row that chooses the token before it, or -1
    int32_t unused;
};

// W rows of one forward. All arrays are Python's own; null where something is not wanted.
struct ChoiceBatch {
    float* logits;          // [W, V], written to
    int64_t stride;         // floats from one row to the next
    const ChoiceRow* rows;  // [W]
    const int64_t* banned;  // [num_banned]
    const double* log_table;         // [3][4096]: centres, inverses, logarithms (`noise.py`)
    const CorrectorView* corrector;  // or null
    const float* states;             // [W, H], for the corrector
    int32_t num_rows, num_tokens, num_banned;
    int32_t none_id;  // what a row chooses that has nothing to choose; -1: such a row is not finite
    int32_t most_logprobs;

    int32_t* token_ids;             // [W]
    uint8_t* is_finite;             // [W]
    double* confidences;            // [W]
    int32_t* runner_ups;            // [W]
    double* runner_up_confidences;  // [W], not null if `runner_ups` is not
    double* entropies;              // [W]
    double* log_probs;              // [W] of the targets
    double* own_logprobs;           // [W] of the chosen tokens, where `num_logprobs` is given
    int32_t* top_ids;               // [W, most_logprobs]
    double* top_logprobs;           // [W, most_logprobs]
};

}  // namespace trimode

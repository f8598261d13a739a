// A network with packed weights, and what one forward of it is given. Data only.
#pragma once

#include <cstdint>
#include <vector>

#include "choice_batch.h"
#include "threads.h"

namespace trimode {

enum Form : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// A matrix [out, in] as Python has it: float32 or bfloat16, contiguous.
struct Source {
    const void* data;
    int32_t form;
    int32_t out, in;
    const float* bias;  // [out] or null
};

// The same, packed (products.h). Outputs beyond `out` are zeros.
struct Weight {
    int32_t form = FLOAT32;
    int32_t out = 0, in = 0;
    int32_t num_panels = 0;
    int64_t panel_bytes = 0;
    char* data = nullptr;
    std::vector<float> bias;
};

enum Target : int32_t { Q, K, V, O, GATE, UP, DOWN, NUM_TARGETS };

// What is read by products of a layer: each target has one of these inputs.
constexpr int NUM_INPUTS = 4;
constexpr int INPUT_OF[NUM_TARGETS] = {0, 0, 0, 1, 2, 2, 3};

// Low-rank updates `scale * up (down x)`: the first halves of all that read one input, one after
// the other.
struct Reduction {
    Weight down;                // [sum of ranks, in]
    std::vector<float> scales;  // of each of its outputs
};

// The second half of an update of one matrix. It reads `rank` outputs of the first halves.
struct Pair {
    Weight up;  // [out, rank]
    int32_t rank = 0, first = 0;
};

struct Layer {
    Weight weights[NUM_TARGETS];
    std::vector<float> attn_norm, mlp_norm, q_norm, k_norm;  // the last two may be empty
};

struct Adapter {
    std::vector<Reduction> reductions;     // [layers * NUM_INPUTS]
    std::vector<Pair> pairs;               // [layers * NUM_TARGETS], rank 0 where there is none
    std::vector<float> mask_embeddings;    // [places, H]
    int32_t num_places = 0;
    char* arena = nullptr;
    int64_t arena_bytes = 0;
};

struct Shape {
    int32_t vocab_size, hidden_size, intermediate_size, num_layers;
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t form;
    float eps;
};

struct Kernels;

struct Model {
    Shape shape;
    const Kernels* kernels = nullptr;
    Threads* threads = nullptr;
    std::vector<Layer> layers;
    Weight head;
    const void* embedding = nullptr;  // [V, H] in `embedding_form`, Python's own; null if tied
    int32_t embedding_form = FLOAT32;
    std::vector<float> norm;
    const float* cos = nullptr;  // [positions, D / 2], Python's own
    const float* sin = nullptr;
    const float* query_scale = nullptr;  // [positions] or null
    EmbeddingView embedding_view{};  // of a tied head
    std::vector<char> workspace;
    char* arena = nullptr;  // all packed weights, one after the other in the order of reading
    int64_t arena_bytes = 0;
};

// One forward: P fed tokens, W of them wanted. All arrays are Python's own.
struct Forward {
    int32_t num_tokens, num_wanted;
    const int32_t* ids;        // [P]
    const int32_t* positions;  // [P]
    const int32_t* rows;       // [P] K/V row of each
    const int32_t* cells;      // [P] cell that its K/V is written to
    const int32_t* prefixes;   // [P] cells from 0 on that it sees
    const int32_t* starts;     // [P] first cell of its own group that it sees
    const int32_t* stops;      // [P] the one behind the last; equal where it sees none
    const int32_t* places;     // [P] place of a masked token, else 0; null if none is masked
    const uint8_t* is_on;      // [P] whether the adapter is on
    const int32_t* wanted;     // [W] which tokens
    Adapter* adapter;          // or null
    void* keys;                // [layers][rows][G][cells][D]
    void* values;
    int32_t cache_form;  // FLOAT32 or BFLOAT16
    int32_t num_rows, num_cells;
    float* hidden;  // [W, H]
    float* logits;  // [W, V], or null
};

}  // namespace trimode

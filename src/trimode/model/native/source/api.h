// What one instruction set offers, and the C interface that Python calls (api.cpp).
#pragma once

#include <cstdint>

#include "model.h"
#include "threads.h"

namespace trimode {

struct ChoiceBatch;  // choice_batch.h

// kernels.cpp, compiled once for each instruction set.
struct Kernels {
    const char* name;
    int panel;       // outputs of a panel
    bool (*has_head_dim)(int size);
    int64_t (*plan)(Weight& weight, int32_t form, int32_t out, int32_t in);
    void (*pack)(const Source& source, Weight& weight, int panel);
    void (*unpack_row)(const Weight& weight, int row, float* out);
    void (*forward)(Model& model, const Forward& forward);
    void (*head)(Model& model, const float* states, int num, float* logits);
    void (*choose)(Threads& threads, const ChoiceBatch& batch);
};

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace trimode

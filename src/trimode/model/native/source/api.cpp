// The C interface. Every function is called from Python by ctypes with pointers to its own arrays.
#include "api.h"

#include <cstring>

#include "choice_batch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

using namespace trimode;

namespace {

// The best that both this build and this CPU have; kernels_* by name for tests.
const Kernels* find(const char* name) {
    const Kernels* all[] = {
#if defined(__x86_64__)
        &kernels_avx512_bf16, &kernels_avx512, &kernels_avx2,
#endif
        &kernels_generic,
    };
    for (const Kernels* kernels : all) {
        bool is_there = true;
#if defined(__x86_64__)
        __builtin_cpu_init();
        bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
        bool bf16 = avx512 && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512bf16");
        if (kernels == &kernels_avx2) is_there = avx2;
        if (kernels == &kernels_avx512) is_there = avx512;
        if (kernels == &kernels_avx512_bf16) is_there = bf16;
#endif
        if (is_there && (name == nullptr || !std::strcmp(name, kernels->name))) return kernels;
    }
    return nullptr;
}

struct PlainEmbedding {
    EmbeddingView view;
    const void* data;
    int32_t form, hidden_size;
};

void plain_row(const void* self, int32_t token_id, float* out) {
    const auto& plain = *static_cast<const PlainEmbedding*>(self);
    int64_t at = int64_t(token_id) * plain.hidden_size;
    if (plain.form == FLOAT32) {
        std::memcpy(out, static_cast<const float*>(plain.data) + at, plain.hidden_size * 4ul);
        return;
    }
    const auto* row = static_cast<const uint16_t*>(plain.data) + at;
    for (int i = 0; i < plain.hidden_size; i++) {
        uint32_t bits = uint32_t(row[i]) << 16;
        std::memcpy(out + i, &bits, 4);
    }
}

}  // namespace

extern "C" {

// The kernels for this CPU, or those of a name; null if the CPU lacks what they need.
const Kernels* trimode_kernels(const char* name) { return find(name); }
const char* trimode_kernels_name(const Kernels* kernels) { return kernels->name; }
int trimode_kernels_has_pairs(const Kernels* kernels) { return kernels->has_pairs; }

Threads* trimode_threads_new(int num_threads) { return new Threads(num_threads); }
void trimode_threads_free(Threads* threads) { delete threads; }
void trimode_threads_resize(Threads* threads, int num_threads) { threads->resize(num_threads); }
int trimode_threads_size(Threads* threads) { return threads->size(); }

void trimode_choose(const Kernels* kernels, Threads* threads, const ChoiceBatch* batch) {
    kernels->choose(*threads, *batch);
}

// Sizes of the three structures that Python mirrors.
void trimode_choice_sizes(int64_t* sizes) {
    sizes[0] = sizeof(ChoiceRow), sizes[1] = sizeof(ChoiceBatch), sizes[2] = sizeof(CorrectorView);
}

// A view of a contiguous embedding [V, H] that is Python's own.
EmbeddingView* trimode_embedding_new(const void* data, int32_t form, int32_t hidden_size) {
    auto* plain = new PlainEmbedding{{}, data, form, hidden_size};
    plain->view = {plain, plain_row};
    return &plain->view;
}
void trimode_embedding_free(EmbeddingView* view) {
    delete static_cast<const PlainEmbedding*>(view->self);
}

}  // extern "C"

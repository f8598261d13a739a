// The C interface. Every function is called from Python by ctypes with pointers to its own arrays.
#include "api.h"

#include <cstring>

#include "choice_batch.h"
#include "cpu.h"

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
        static const Cpu cpu;
        if (kernels == &kernels_avx2) is_there = cpu.has_avx2;
        if (kernels == &kernels_avx512) is_there = cpu.has_avx512;
        if (kernels == &kernels_avx512_bf16) is_there = cpu.has_avx512_bf16;
#endif
        if (is_there && (name == nullptr || !std::strcmp(name, kernels->name))) return kernels;
    }
    return nullptr;
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// The kernels for this CPU, or those of a name; null if the CPU lacks what they need.
const Kernels* trimode_kernels(const char* name) { return find(name); }
const char* trimode_kernels_name(const Kernels* kernels) { return kernels->name; }
int trimode_kernels_has_pairs(const Kernels* kernels) { return kernels->has_pairs; }

Threads* trimode_threads_new(int num_threads) { return new Threads(num_threads); }
void trimode_threads_free(Threads* threads) { delete threads; }
void trimode_threads_resize(Threads* threads, int num_threads) { threads->resize(num_threads); }
int trimode_threads_size(Threads* threads) { return threads->size(); }
void trimode_threads_run(Threads* threads, int count, void* chunk, void* context) {
    threads->run(count, reinterpret_cast<Threads::Chunk>(chunk), context);
}

void trimode_choose(const Kernels* kernels, Threads* threads, const ChoiceBatch* batch) {
    kernels->choose(*threads, *batch);
}

#pragma GCC visibility pop
}  // extern "C"

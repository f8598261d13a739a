// The C interface. Every function is called from Python by ctypes with pointers to its own arrays.
#include "api.h"

#include <sys/mman.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstring>
#include <exception>
#include <memory>
#include <new>

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

// Zeroed pages, huge ones where there are any: a weight is read from end to end.
char* map(int64_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
    madvise(found, bytes, MADV_HUGEPAGE);
#endif
    return (char*)found;
}

void fill(const Kernels& kernels, Threads& threads, const Source& source, Weight& weight) {
    threads.each(weight.num_panels, [&](int panel) { kernels.pack(source, weight, panel); });
    if (source.bias != nullptr) {
        weight.bias.assign(long(weight.num_panels) * kernels.panel, 0.0f);
        std::memcpy(weight.bias.data(), source.bias, weight.out * 4);
    }
}

Weight& weight_of(Model& model, int layer, int target) {
    return layer < 0 ? model.head : model.layers[layer].weights[target];
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

// No exception may leave C: whether the work was done, which takes memory that may not be there.
template <class Work>
bool is_done(Work work) {
    FloatMode mode;
    try {
        work();
    } catch (const std::exception&) {
        return false;
    }
    return true;
}

// What was made, or null where memory does not suffice.
template <class T, class Make>
T* made(Make make) {
    std::unique_ptr<T> found;
    return is_done([&] { make(found); }) ? found.release() : nullptr;
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// The kernels for this CPU, or those of a name; null if the CPU lacks what they need.
const Kernels* trimode_kernels(const char* name) { return find(name); }
const char* trimode_kernels_name(const Kernels* kernels) { return kernels->name; }

Threads* trimode_threads_new(int num_threads) {
    return made<Threads>([&](auto& found) { found.reset(new Threads(num_threads)); });
}
void trimode_threads_free(Threads* threads) { delete threads; }
void trimode_threads_resize(Threads* threads, int num_threads) { threads->resize(num_threads); }
int trimode_threads_size(Threads* threads) { return threads->size(); }
void trimode_threads_run(Threads* threads, int count, void* chunk, void* context) {
    threads->run(count, reinterpret_cast<Threads::Chunk>(chunk), context);
}

bool trimode_has_head_dim(const Kernels* kernels, int size) { return kernels->has_head_dim(size); }

// A network without weights yet. Null where the memory does not suffice.
Model* trimode_model_new(const Kernels* kernels, Threads* threads, const Shape* shape) {
    return made<Model>([&](auto& model) {
        model.reset(new Model);
        model->kernels = kernels;
        model->threads = threads;
        model->shape = *shape;
        model->layers.resize(shape->num_layers);
        const int H = shape->hidden_size, I = shape->intermediate_size, D = shape->head_dim;
        const int outs[] = {shape->num_heads * D, shape->num_kv_heads * D, shape->num_kv_heads * D,
                            H, I, I, H};
        const int ins[] = {H, H, H, shape->num_heads * D, H, H, I};
        int64_t bytes = 0;
        for (Layer& layer : model->layers)
            for (int t = 0; t < NUM_TARGETS; t++)
                bytes += kernels->plan(layer.weights[t], shape->form, outs[t], ins[t]);
        bytes += kernels->plan(model->head, shape->form, shape->vocab_size, H);
        model->arena = map(bytes);
        model->arena_bytes = bytes;
        if (model->arena == nullptr) throw std::bad_alloc();
        char* at = model->arena;
        auto give = [&](Weight& weight) {
            weight.data = at;
            at += weight.num_panels * weight.panel_bytes;
        };
        for (Layer& layer : model->layers)
            for (Weight& weight : layer.weights) give(weight);
        give(model->head);
    });
}

void trimode_model_free(Model* model) {
    munmap(model->arena, model->arena_bytes);
    delete model;
}

// Give the system back what was freed: glibc keeps the plain weights, to be used again.
void trimode_model_is_packed() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// In a forked child, whose parent may have been in a forward: forget its memory, half made.
void trimode_model_is_forked(Model* model) { new (&model->workspace) std::vector<char>; }

int64_t trimode_model_bytes(const Model* model) { return model->arena_bytes; }

// layer -1 is the head. This and all that return bool: false where memory does not suffice.
bool trimode_model_set(Model* model, int layer, int target, const Source* source) {
    return is_done([&] {
        fill(*model->kernels, *model->threads, *source, weight_of(*model, layer, target));
    });
}

// [out, in] float32.
void trimode_model_get(Model* model, int layer, int target, float* out) {
    const Weight& weight = weight_of(*model, layer, target);
    model->threads->each((weight.out + 63) / 64, [&](int part) {
        for (int i = part * 64; i < weight.out && i < part * 64 + 64; i++)
            model->kernels->unpack_row(weight, i, out + long(i) * weight.in);
    });
}

// which: 0 attention, 1 MLP, 2 queries, 3 keys; layer -1 is the last norm.
bool trimode_model_set_norm(Model* model, int layer, int which, const float* weight, int size) {
    return is_done([&] {
        std::vector<float> norm(weight, weight + size);
        if (layer < 0) {
            model->norm = norm;
            return;
        }
        Layer& one = model->layers[layer];
        (which == 0   ? one.attn_norm
         : which == 1 ? one.mlp_norm
         : which == 2 ? one.q_norm
                      : one.k_norm) = norm;
    });
}

void trimode_model_set_embedding(Model* model, const void* embedding, int form) {
    model->embedding = embedding;
    model->embedding_form = form;
}

void trimode_model_set_positions(Model* model, const float* cos, const float* sin,
                                 const float* query_scale) {
    model->cos = cos;
    model->sin = sin;
    model->query_scale = query_scale;
}

// ranks: [layers * targets], 0 where there is no pair; a multiple of 16 else.
Adapter* trimode_adapter_new(const Model* model, const int32_t* ranks) {
    return made<Adapter>([&](auto& adapter) {
        adapter.reset(new Adapter);
        adapter->pairs.resize(model->layers.size() * NUM_TARGETS);
        adapter->reductions.resize(model->layers.size() * NUM_INPUTS);
        const int form = model->shape.form == FLOAT32 ? FLOAT32 : BFLOAT16;
        std::vector<int32_t> sums(adapter->reductions.size()), sizes(sums.size());
        int64_t bytes = 0;
        for (size_t i = 0; i < adapter->pairs.size(); i++) {
            if (ranks[i] == 0) continue;
            Pair& pair = adapter->pairs[i];
            const size_t input = i / NUM_TARGETS * NUM_INPUTS + INPUT_OF[i % NUM_TARGETS];
            const Weight& base = model->layers[i / NUM_TARGETS].weights[i % NUM_TARGETS];
            pair.rank = ranks[i];
            pair.first = sums[input];
            sums[input] += ranks[i];
            sizes[input] = base.in;
            bytes += model->kernels->plan(pair.up, form, base.out, pair.rank);
        }
        for (size_t i = 0; i < sums.size(); i++)
            if (sums[i] > 0)
                bytes += model->kernels->plan(adapter->reductions[i].down, form, sums[i], sizes[i]);
        adapter->arena_bytes = bytes;
        if (bytes > 0 && (adapter->arena = map(bytes)) == nullptr) throw std::bad_alloc();
        char* at = adapter->arena;
        const auto place = [&](Weight& weight) {
            if (weight.num_panels == 0) return;
            weight.data = at;
            at += weight.num_panels * weight.panel_bytes;
        };
        for (size_t layer = 0; layer < model->layers.size(); layer++)  // in the order of reading
            for (int input = 0; input < NUM_INPUTS; input++) {
                place(adapter->reductions[layer * NUM_INPUTS + input].down);
                for (int target = 0; target < NUM_TARGETS; target++)
                    if (INPUT_OF[target] == input)
                        place(adapter->pairs[layer * NUM_TARGETS + target].up);
            }
    });
}

void trimode_adapter_free(Adapter* adapter) {
    if (adapter->arena != nullptr) munmap(adapter->arena, adapter->arena_bytes);
    delete adapter;
}

// The first halves of the updates of all targets that read an input, in the order of the targets.
// scales: of each of their outputs.
bool trimode_adapter_set_down(Model* model, Adapter* adapter, int layer, int input,
                              const Source* down, const float* scales) {
    return is_done([&] {
        Reduction& reduction = adapter->reductions[layer * NUM_INPUTS + input];
        fill(*model->kernels, *model->threads, *down, reduction.down);
        reduction.scales.assign(long(reduction.down.num_panels) * model->kernels->panel, 0.0f);
        std::memcpy(reduction.scales.data(), scales, reduction.down.out * 4);
    });
}

bool trimode_adapter_set_up(Model* model, Adapter* adapter, int layer, int target,
                            const Source* up) {
    return is_done([&] {
        fill(*model->kernels, *model->threads, *up,
             adapter->pairs[layer * NUM_TARGETS + target].up);
    });
}

bool trimode_adapter_set_masks(Adapter* adapter, const float* embeddings, int places, int size) {
    return is_done([&] {
        adapter->mask_embeddings.assign(embeddings, embeddings + long(places) * size);
        adapter->num_places = places;
    });
}

// Rows of the head as input embeddings, for as long as the model lives.
const EmbeddingView* trimode_model_embedding(Model* model) {
    model->embedding_view = {model, [](const void* self, int32_t id, float* out) {
                                 const auto& model = *static_cast<const Model*>(self);
                                 model.kernels->unpack_row(model.head, id, out);
                             }};
    return &model->embedding_view;
}

// Rows of the head: [num, in] float32.
void trimode_model_rows(Model* model, const int32_t* ids, int num, float* out) {
    for (int i = 0; i < num; i++)
        model->kernels->unpack_row(model->head, ids[i], out + long(i) * model->head.in);
}

// states: [num, H]; logits: [num, V].
bool trimode_head(Model* model, const float* states, int num, float* logits) {
    return is_done([&] { model->kernels->head(*model, states, num, logits); });
}

bool trimode_forward(Model* model, const Forward* forward) {
    return is_done([&] { model->kernels->forward(*model, *forward); });
}

bool trimode_choose(const Kernels* kernels, Threads* threads, const ChoiceBatch* batch) {
    return is_done([&] { kernels->choose(*threads, *batch); });
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

#pragma GCC visibility pop
}  // extern "C"

// One forward: from ids to hidden states and logits, K/V written to the cells.
//
// The steps of a layer are the paper's, one after the other; each deals its work out over the
// threads. Nothing is allocated in a layer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "attention.h"
#include "model.h"
#include "pack.h"
#include "products.h"

namespace TRIMODE_ISA {

using namespace trimode;

constexpr int ROWS_AT_ONCE = 8;  // a thread's share of what is done row by row

// What a product reads: rows of floats, or of bfloat16 where the CPU multiplies these in pairs. For
// weights in 8 bits the floats are written first, then rounded (`Pass::round`).
struct Input {
    char* data;
    long stride;             // in elements
    char* rounded = nullptr;  // rows in 8 bits
    long rounded_stride = 0;  // in bytes
};

inline bool is_rounded(int form) { return form == BFLOAT16 && HAS_PAIRS; }
inline long element_bytes(int form) { return is_rounded(form) ? 2 : 4; }

INLINE void put(const Input& input, int form, int row, int at, F x, int n) {
    if (is_rounded(form))
        store_bf16((bf16*)input.data + row * input.stride + at, x, n);
    else
        store((float*)input.data + row * input.stride + at, x, n);
}

// Sums of inputs k .. k+num-1 for a tile of rows, added to y [rows][PANEL] if it goes on. In 8 bits
// it does where k is not 0.
inline void piece_of(const Weight& weight, const char* data, const Input& x, int first, int rows,
                     int k, int num, bool goes_on, float* y) {
    if (weight.form == FLOAT32) {
        const float* from = (const float*)x.data + first * x.stride + k;
        TILE(tile_float32, rows, from, x.stride, num, (const float*)data, y, goes_on);
    } else if (weight.form == INT8) {
        const char* from = x.rounded + first * x.rounded_stride;
        const int start = k / GROUP, stop = num_groups(k + num), groups = num_groups(weight.in);
        TILE_INT8(tile_int8, rows, from, x.rounded_stride, groups, start, stop, data, y);
    } else {
        const Bf16Input* from = (const Bf16Input*)x.data + first * x.stride + k;
        TILE(tile_bfloat16, rows, from, x.stride, num, (const bf16*)data, y, goes_on);
    }
}

// Inputs that a panel's sums are taken over: all, or whole groups from a multiple of GROUP on.
struct Span {
    int start, stop;
};

// A panel's sums for a band of rows: y [rows][PANEL], added to what is there if they go on from it.
inline void band(const Weight& weight, int panel, const Input& x, int first, int rows, float* y,
                 Span span, bool goes_on) {
    const int most = weight.form == INT8 ? MOST_ROWS_INT8 : MOST_ROWS;
    const int num_tiles = (rows + most - 1) / most;
    const int piece = num_tiles == 1 ? weight.in : piece_inputs(weight.form);
    const long bytes = panel_bytes(weight.form, piece);
    const char* data = weight.data + panel * weight.panel_bytes;
    if (span.start > 0) data += panel_bytes(weight.form, span.start);
    for (int k = span.start; k < span.stop; k += piece, data += bytes)
        for (int i = 0; i < num_tiles; i++) {
            const int r = rows * i / num_tiles, num_rows = rows * (i + 1) / num_tiles - r;
            piece_of(weight, data, x, first + r, num_rows, k, std::min(piece, span.stop - k),
                     goes_on || k > span.start, y + r * PANEL);
        }
}

inline void band(const Weight& weight, int panel, const Input& x, int first, int rows, float* y) {
    band(weight, panel, x, first, rows, y, {0, weight.in}, false);
}

// Have a panel fetched, if it is a small one.
INLINE void fetch(const Weight& weight, int panel) {
    const char* data = weight.data + panel * weight.panel_bytes;
    const long bytes = std::min<long>(weight.panel_bytes, AHEAD);
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch(data + at, 0, 3);
}

// Parts that the inputs of an adapter's first half are shared out in, so that no thread waits long
// for another; their sums are added in order.
constexpr int NUM_PARTS = 2;
constexpr int SPINS = 4096;  // before a thread that waits for them gives up its core

// y[at] = x[at] / rms(x) * weight[at]
template <class Put>
INLINE void rms_norm(const float* x, const float* weight, int size, float eps, Put put) {
    F squares = zero();
    for (int i = 0; i < size; i += W) {
        F v = load(x + i, size - i);
        squares = fma(v, v, squares);
    }
    const float mean = sum(squares) / float(size);
    F scale = set1(1.0f) / sqrt(set1(mean + eps));
    for (int i = 0; i < size; i += W) {
        const int n = size - i < W ? size - i : W;
        put(i, load(x + i, n) * scale * load(weight + i, n), n);
    }
}

// Memory of a forward, cut from one piece.
class Workspace {
  public:
    explicit Workspace(std::vector<char>& memory) : memory_(memory) {}
    template <class T>
    T* take(int64_t count) {
        const int64_t at = used_;
        used_ += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
        return (T*)(base_ == nullptr ? nullptr : base_ + at);
    }
    // What was taken is counted; take it all again for the real thing.
    void commit() {
        if (int64_t(memory_.size()) < used_ + 64) {
            std::vector<char>().swap(memory_);  // old and new are not held together
            memory_.resize(used_ + used_ / 4 + 64);
        }
        base_ = (char*)((uintptr_t(memory_.data()) + 63) / 64 * 64);
        used_ = 0;
    }

    // A rare large forward does not keep its memory.
    ~Workspace() {
        if (int64_t(memory_.size()) > MOST_KEPT) std::vector<char>().swap(memory_);
    }

  private:
    static constexpr int64_t MOST_KEPT = 256 << 20;
    std::vector<char>& memory_;
    char* base_ = nullptr;
    int64_t used_ = 0;
};

class Pass {
  public:
    Pass(Model& model, const Forward& forward)
        : model_(model), shape_(model.shape), f_(forward), threads_(*model.threads),
          form_(model.shape.form), lora_form_(form_ == FLOAT32 ? FLOAT32 : BFLOAT16),
          num_rows_(forward.num_tokens) {}

    void run() {
        Workspace workspace(model_.workspace);
        take(workspace);
        workspace.commit();
        take(workspace);
        prepare();
        embed();
        for (int i = 0; i < shape_.num_layers; i++) layer(i);
        finish();
    }

    void head_of(const float* states, float* logits) {
        Workspace workspace(model_.workspace);
        take(workspace);
        workspace.commit();
        take(workspace);
        const int H = shape_.hidden_size;
        rows(f_.num_wanted, [&](int i) {
            for (int at = 0; at < H; at += W)
                put(head_in_, form_, i, at, load(states + long(i) * H + at, H - at),
                    std::min(W, H - at));
        });
        head(head_in_, f_.num_wanted, logits);
    }

  private:
    Model& model_;
    const Shape& shape_;
    const Forward& f_;
    Threads& threads_;
    const int form_;
    const int lora_form_;  // of the adapter
    const int num_rows_;

    float *x_, *q_, *k_, *v_;
    Input in_, attended_, inner_, gathered_, reduced_, head_in_;
    int* on_rows_;      // [num_on] rows that the adapter is on for
    int num_on_ = 0;
    float* part_sums_;  // [panels of a reduction][NUM_PARTS][num_on][PANEL]
    std::atomic<int> num_parts_done_{0};
    std::atomic<bool> is_reduced_{false};
    int* items_;      // first span of each token, and their number at the end
    int num_spans_ = 0;  // at most, of tokens that attend together
    int first_span_ = 0;  // of the tokens that attend now
    float* partial_values_;
    Partial* partials_;

    int q_size() const { return shape_.num_heads * shape_.head_dim; }
    int kv_size() const { return shape_.num_kv_heads * shape_.head_dim; }
    int num_spans(int t) const { return (seen(t) + SPAN - 1) / SPAN; }
    // Of tokens that attend together, if one alone has not more: their scratch stays small.
    int most_spans() const {
        const long bytes = long(shape_.num_heads) * (shape_.head_dim + W) * 4;
        return int(std::max(1L, (16L << 20) / bytes));
    }
    int seen(int t) const { return f_.prefixes[t] + f_.stops[t] - f_.starts[t]; }

    Input input(Workspace& w, int rows, int size, int form) {
        const long stride = (size + 15) / 16 * 16;
        Input found{w.take<char>(rows * stride * element_bytes(form)), stride};
        if (form == INT8) {
            found.rounded_stride = quantized_bytes(size);
            found.rounded = w.take<char>(rows * found.rounded_stride);
        }
        return found;
    }

    // Have the rows of an input in 8 bits too, if the weights are.
    void round(const Input& x, int size, int count) {
        if (form_ != INT8) return;
        rows(count, [&](int t) {
            quantize((const float*)x.data + t * x.stride, size, x.rounded + t * x.rounded_stride);
        });
    }

    void take(Workspace& w) {
        const int P = num_rows_, H = shape_.hidden_size, I = shape_.intermediate_size;
        x_ = w.take<float>(long(P) * H);
        q_ = w.take<float>(long(P) * q_size());
        k_ = w.take<float>(long(P) * kv_size());
        v_ = w.take<float>(long(P) * kv_size());
        in_ = input(w, P, H, form_);
        attended_ = input(w, P, q_size(), form_);
        inner_ = input(w, P, I, form_);
        head_in_ = input(w, f_.num_wanted, H, form_);
        items_ = w.take<int>(P + 1);
        on_rows_ = w.take<int>(P);
        num_spans_ = num_on_ = 0;
        int piece = 0;
        for (int t = 0; t < P; t++) {
            const int spans = num_spans(t);
            piece = piece + spans > most_spans() ? spans : piece + spans;
            num_spans_ = std::max(num_spans_, piece);
            num_on_ += f_.adapter != nullptr && f_.is_on[t];
        }
        const long num_partials = long(num_spans_) * shape_.num_heads;
        partials_ = w.take<Partial>(num_partials);
        partial_values_ = w.take<float>(num_partials * (shape_.head_dim + W));
        if (num_on_ > 0) {
            int num_panels = 0;
            for (const Reduction& one : f_.adapter->reductions)
                num_panels = std::max(num_panels, one.down.num_panels);
            const int widest = std::max(std::max(H, I), q_size());
            gathered_ = input(w, num_on_, widest, lora_form_);
            reduced_ = input(w, P, num_panels * PANEL, lora_form_);
            part_sums_ = w.take<float>(long(num_panels) * NUM_PARTS * num_on_ * PANEL);
        }
    }

    void prepare() {
        int on = 0, span = 0;
        for (int t = 0; t < num_rows_; t++) {
            if (num_on_ > 0 && f_.is_on[t]) on_rows_[on++] = t;
            items_[t] = span;
            span += num_spans(t);
        }
        items_[num_rows_] = span;
        for (long i = 0; i < long(num_spans_) * shape_.num_heads; i++)
            partials_[i].values = partial_values_ + i * (shape_.head_dim + W);
    }

    // For each of many rows, in this thread if they are few.
    template <class Each>
    void rows(int count, Each each) {
        if (count <= 4 * ROWS_AT_ONCE) {
            for (int t = 0; t < count; t++) each(t);
            return;
        }
        threads_.each((count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, [&](int part) {
            const int stop = std::min(count, (part + 1) * ROWS_AT_ONCE);
            for (int t = part * ROWS_AT_ONCE; t < stop; t++) each(t);
        });
    }

    void embed() {
        const int H = shape_.hidden_size;
        const Adapter* adapter = f_.adapter;
        rows(num_rows_, [&](int t) {
            float* x = x_ + long(t) * H;
            const int place = f_.places == nullptr || adapter == nullptr ? 0 : f_.places[t];
            if (place > 0 && adapter->num_places > 0) {
                const int row = std::min(place, adapter->num_places) - 1;
                std::memcpy(x, adapter->mask_embeddings.data() + long(row) * H, H * 4);
            } else if (model_.embedding == nullptr) {
                unpack_row(model_.head, f_.ids[t], x);
            } else if (model_.embedding_form == FLOAT32) {
                std::memcpy(x, (const float*)model_.embedding + long(f_.ids[t]) * H, H * 4);
            } else {
                const bf16* row = (const bf16*)model_.embedding + long(f_.ids[t]) * H;
                for (int i = 0; i < H; i++) x[i] = widen(row[i]);
            }
        });
    }

    // Panels of several weights that read the same input, dealt out over the threads. `store` is
    // called with weight, first output, its number of outputs, first row, rows and their sums.
    template <class Store>
    void product(const Weight* const* weights, int num, const Pair* const* pairs,
                 const Reduction* reduction, const Input& x, int num_rows, Store store) {
        int total = 0;
        for (int i = 0; i < num; i++) total += weights[i]->num_panels;
        deal(total, reduction, x, [&](int panel) {
            int i = 0;
            while (panel >= weights[i]->num_panels) panel -= weights[i++]->num_panels;
            float y[BAND_ROWS * PANEL];
            each_band(num_rows, [&](int first, int rows) {
                sums(*weights[i], pairs == nullptr ? nullptr : pairs[i], panel, x, first, rows, y);
                store(i, panel, first, rows, y);
            });
        });
    }

    // A few panels at a time: a chunk for each would cost more than it brings. Before them come the
    // parts of a reduction of the same input, if there is one: whoever needs it has read a panel
    // of the weights by then, and hardly ever waits.
    template <class Each>
    void deal(int num_panels, const Reduction* reduction, const Input& x, Each each) {
        const int num_chunks = std::min(num_panels, threads_.size() == 1 ? 1 : 8 * threads_.size());
        const int num_parts = reduction == nullptr ? 0 : reduction->down.num_panels * NUM_PARTS;
        const Input from = num_parts == 0 ? x : of_on_rows(x, reduction->down.in);
        num_parts_done_.store(0, std::memory_order_relaxed);
        is_reduced_.store(num_parts == 0, std::memory_order_relaxed);
        threads_.each(num_parts + num_chunks, [&](int chunk) {
            if (chunk < num_parts) {
                reduce(*reduction, from, chunk, num_parts);
                return;
            }
            chunk -= num_parts;
            const int stop = int(long(num_panels) * (chunk + 1) / num_chunks);
            for (int p = int(long(num_panels) * chunk / num_chunks); p < stop; p++) each(p);
        });
    }

    template <class Each>
    INLINE void each_band(int num_rows, Each each) {
        const int num_bands = (num_rows + BAND_ROWS - 1) / BAND_ROWS;
        for (int i = 0; i < num_bands; i++) {
            const int first = int(long(num_rows) * i / num_bands);
            each(first, int(long(num_rows) * (i + 1) / num_bands) - first);
        }
    }

    // A band's sums with bias, and with the adapter's share where it is on.
    INLINE void sums(const Weight& weight, const Pair* pair, int panel, const Input& x, int first,
                     int rows, float* y) {
        const bool is_adapted = pair != nullptr && pair->rank > 0;
        if (is_adapted) fetch(pair->up, panel);  // which is there when the weights have been read
        band(weight, panel, x, first, rows, y);
        if (!weight.bias.empty()) {
            const float* bias = weight.bias.data() + panel * PANEL;
            for (int r = 0; r < rows; r++)
                for (int j = 0; j < PANEL; j += W)
                    store(y + r * PANEL + j, load(y + r * PANEL + j) + load(bias + j));
        }
        if (!is_adapted) return;
        for (int i = 0; !is_reduced_.load(std::memory_order_acquire); i++) {
            if (i < SPINS)
                pause();
            else  // whoever has a part may need this core
                std::this_thread::yield();
        }
        Input reduced = reduced_;
        reduced.data += pair->first * element_bytes(lora_form_);
        for (int r = 0; r < rows; r++) {
            if (!f_.is_on[first + r]) continue;
            int stop = r + 1;
            while (stop < rows && f_.is_on[first + stop]) stop++;
            band(pair->up, panel, reduced, first + r, stop - r, y + r * PANEL, {0, pair->rank},
                 true);
            r = stop;
        }
    }

    // Rows of an input that the adapter is on for, one after the other, in the adapter's form.
    Input of_on_rows(const Input& x, int size) {
        const long bytes = element_bytes(form_);
        if (form_ != INT8 && on_rows_[num_on_ - 1] - on_rows_[0] + 1 == num_on_)
            return Input{x.data + on_rows_[0] * x.stride * bytes, x.stride};
        for (int i = 0; i < num_on_; i++) {
            const char* from = x.data + on_rows_[i] * x.stride * bytes;
            if (form_ != INT8) {
                std::memcpy(gathered_.data + i * gathered_.stride * bytes, from, size * bytes);
                continue;
            }
            for (int at = 0; at < size; at += W)
                put(gathered_, lora_form_, i, at, load((const float*)from + at, size - at),
                    std::min(W, size - at));
        }
        return gathered_;
    }

    // One part of the adapter's first halves, `scale * down x`. Whoever ends the last one adds them
    // up. Nothing here throws, so those who wait for it wait for no more than this.
    void reduce(const Reduction& reduction, const Input& x, int chunk, int num_chunks) {
        const Weight& down = reduction.down;
        const int panel = chunk / NUM_PARTS, part = chunk % NUM_PARTS;
        const int num_groups = (down.in + GROUP - 1) / GROUP;
        const auto edge = [&](int i) {
            return std::min(down.in, num_groups * i / NUM_PARTS * GROUP);
        };
        const Span span{edge(part), edge(part + 1)};
        each_band(num_on_, [&](int first, int rows) {
            float* y = part_sums_ + (long(chunk) * num_on_ + first) * PANEL;
            if (span.start == span.stop) std::fill(y, y + rows * PANEL, 0.0f);
            band(down, panel, x, first, rows, y, span, false);
        });
        if (num_parts_done_.fetch_add(1, std::memory_order_acq_rel) + 1 < num_chunks) return;
        for (int p = 0; p < down.num_panels; p++)
            for (int i = 0; i < num_on_; i++)
                for (int j = 0; j < PANEL; j += W) {
                    F sum = zero();
                    for (int k = 0; k < NUM_PARTS; k++) {
                        const long at = (long(p) * NUM_PARTS + k) * num_on_ + i;
                        sum = sum + load(part_sums_ + at * PANEL + j);
                    }
                    put(reduced_, lora_form_, on_rows_[i], p * PANEL + j,
                        sum * load(reduction.scales.data() + p * PANEL + j), W);
                }
        is_reduced_.store(true, std::memory_order_release);
    }

    const Pair* pair(int index, Target target) const {
        return num_on_ == 0 ? nullptr : &f_.adapter->pairs[index * NUM_TARGETS + target];
    }

    // What the adapter does first to an input of a layer; null for nothing.
    const Reduction* reduction(int index, Target target) const {
        if (num_on_ == 0) return nullptr;
        const Reduction& found =
            f_.adapter->reductions[index * NUM_INPUTS + INPUT_OF[target]];
        return found.down.num_panels == 0 ? nullptr : &found;
    }

    void layer(int index) {
        const Layer& layer = model_.layers[index];
        const Weight* w = layer.weights;
        const int H = shape_.hidden_size, P = num_rows_;
        norm(layer.attn_norm.data());
        round(in_, H, P);

        const Pair* qkv_pairs[] = {pair(index, Q), pair(index, K), pair(index, V)};
        const Weight* qkv[] = {&w[Q], &w[K], &w[V]};
        float* outputs[] = {q_, k_, v_};
        product(qkv, 3, qkv_pairs, reduction(index, Q), in_, P,
                [&](int i, int panel, int first, int rows, float* y) {
                    const int size = qkv[i]->out, at = panel * PANEL;
                    for (int r = 0; r < rows; r++)
                        copy_out(outputs[i] + long(first + r) * size + at, y + r * PANEL,
                                 size - at);
                });
        rows(P, [&](int t) { place_heads(layer, index, t); });
        attend_all(index);
        round(attended_, q_size(), P);

        const Pair* o_pair[] = {pair(index, O)};
        const Weight* o[] = {&w[O]};
        const auto add = [&](int, int panel, int first, int rows, float* y) {
            add_to_x(panel, first, rows, y);
        };
        product(o, 1, o_pair, reduction(index, O), attended_, P, add);
        norm(layer.mlp_norm.data());
        round(in_, H, P);

        const Pair* gate_up_pairs[] = {pair(index, GATE), pair(index, UP)};
        deal(w[GATE].num_panels, reduction(index, GATE), in_, [&](int panel) {
            float gate[BAND_ROWS * PANEL], up[BAND_ROWS * PANEL];
            each_band(P, [&](int first, int rows) {
                sums(w[GATE], gate_up_pairs[0], panel, in_, first, rows, gate);
                sums(w[UP], gate_up_pairs[1], panel, in_, first, rows, up);
                for (int r = 0; r < rows; r++)
                    for (int j = 0; j < PANEL; j += W) {
                        const int at = panel * PANEL + j;
                        if (at >= shape_.intermediate_size) break;
                        F g = load(gate + r * PANEL + j), u = load(up + r * PANEL + j);
                        F silu = g / (set1(1.0f) + exp(zero() - g));
                        put(inner_, form_, first + r, at, silu * u,
                            std::min(W, shape_.intermediate_size - at));
                    }
            });
        });

        round(inner_, shape_.intermediate_size, P);
        const Pair* down_pair[] = {pair(index, DOWN)};
        const Weight* down[] = {&w[DOWN]};
        product(down, 1, down_pair, reduction(index, DOWN), inner_, P, add);
    }

    void norm(const float* weight) {
        const int H = shape_.hidden_size;
        rows(num_rows_, [&](int t) {
            rms_norm(x_ + long(t) * H, weight, H, shape_.eps,
                     [&](int at, F y, int n) { put(in_, form_, t, at, y, n); });
        });
    }

    INLINE void copy_out(float* out, const float* y, int left) {
        for (int j = 0; j < PANEL && j < left; j += W)
            store(out + j, load(y + j), std::min(W, left - j));
    }

    INLINE void add_to_x(int panel, int first, int rows, const float* y) {
        const int H = shape_.hidden_size;
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < PANEL; j += W) {
                const int at = panel * PANEL + j, n = std::min(W, H - at);
                if (n <= 0) break;
                float* x = x_ + long(first + r) * H + at;
                store(x, load(x, n) + load(y + r * PANEL + j), n);
            }
    }

    // QK-norm and rotation of a token's heads, in place; keys and values into their cells.
    void place_heads(const Layer& layer, int index, int t) {
        const int D = shape_.head_dim, N = shape_.num_heads, G = shape_.num_kv_heads;
        const long position = f_.positions[t];
        const float* cos = model_.cos + position * (D / 2);
        const float* sin = model_.sin + position * (D / 2);
        const float scale = model_.query_scale == nullptr ? 1.0f : model_.query_scale[position];
        const float root = 1.0f / std::sqrt(float(D));
        for (int h = 0; h < N + G; h++) {
            float* head = h < N ? q_ + long(t) * N * D + h * D
                                : k_ + long(t) * G * D + (h - N) * D;
            const std::vector<float>& weight = h < N ? layer.q_norm : layer.k_norm;
            if (!weight.empty())
                rms_norm(head, weight.data(), D, shape_.eps,
                         [&](int at, F y, int n) { store(head + at, y, n); });
            for (int i = 0; i < D / 2; i += W) {
                const int n = std::min(W, D / 2 - i);
                F a = load(head + i, n), b = load(head + D / 2 + i, n);
                F c = load(cos + i, n), s = load(sin + i, n);
                F first = a * c - b * s, second = b * c + a * s;
                if (h < N) {
                    first = first * set1(scale) * set1(root);
                    second = second * set1(scale) * set1(root);
                }
                store(head + i, first, n);
                store(head + D / 2 + i, second, n);
            }
        }
        for (int g = 0; g < G; g++) {
            const long at = cell(index, f_.rows[t], g, f_.cells[t]);
            const float* key = k_ + long(t) * G * D + g * D;
            const float* value = v_ + long(t) * G * D + g * D;
            for (int i = 0; i < D; i += W) {
                const int n = std::min(W, D - i);
                if (f_.cache_form == FLOAT32) {
                    store((float*)f_.keys + at + i, load(key + i, n), n);
                    store((float*)f_.values + at + i, load(value + i, n), n);
                } else {
                    store_bf16((bf16*)f_.keys + at + i, load(key + i, n), n);
                    store_bf16((bf16*)f_.values + at + i, load(value + i, n), n);
                }
            }
        }
    }

    long cell(int layer, int row, int g, int cell) const {
        return (((long(layer) * f_.num_rows + row) * shape_.num_kv_heads + g) * f_.num_cells +
                cell) * shape_.head_dim;
    }

    void attend_all(int index) {
        for (int first = 0, stop; first < num_rows_; first = stop) {
            stop = first + 1;
            while (stop < num_rows_ && items_[stop + 1] - items_[first] <= most_spans()) stop++;
            attend_some(index, first, stop);
        }
    }

    void attend_some(int index, int first, int last) {
        const int G = shape_.num_kv_heads, num_items = (items_[last] - items_[first]) * G;
        first_span_ = items_[first];
        // One item: a token, a head of keys, a span. Tokens that see more come later; whoever is
        // free takes the next.
        const int at_once = std::max(1, num_items / (threads_.size() * 32));
        threads_.each((num_items + at_once - 1) / at_once, [&](int chunk) {
            int item = chunk * at_once, stop = std::min(num_items, item + at_once);
            int span = first_span_ + item / G;
            int t = int(std::upper_bound(items_ + first, items_ + last + 1, span) - items_) - 1;
            for (; item < stop; item++) {
                span = first_span_ + item / G;
                while (span >= items_[t + 1]) t++;
                attend_span(index, t, item % G, span);
            }
        });
        bool is_long = false;
        for (int t = first; t < last; t++) is_long |= items_[t + 1] - items_[t] > 1;
        if (!is_long) return;
        rows(last - first, [&](int i) {
            const int t = first + i, num = items_[t + 1] - items_[t];
            if (num == 1) return;
            for (int h = 0; h < shape_.num_heads; h++) finish_head(t, h, num);
        });
    }

    Partial* partials(int span, int head) {  // spans of one head lie side by side
        return partials_ + long(span - first_span_) * shape_.num_heads + head;
    }

    void attend_span(int index, int t, int g, int span) {
        const int D = shape_.head_dim, per_group = shape_.num_heads / shape_.num_kv_heads;
        const Sight sight{f_.prefixes[t], f_.starts[t], seen(t)};
        const int first = (span - items_[t]) * SPAN, last = std::min(sight.count, first + SPAN);
        const long base = cell(index, f_.rows[t], g, 0);
        const bool is_whole = items_[t + 1] - items_[t] == 1;
        for (int h = g * per_group, num; h < (g + 1) * per_group; h += num) {
            num = std::min(heads_at_once(D), (g + 1) * per_group - h);
            const float* queries = q_ + long(t) * q_size() + h * D;
            Partial* found = partials(span, h);
            if (f_.cache_form == FLOAT32)
                attend(queries, num, (const float*)f_.keys + base, (const float*)f_.values + base,
                       D, sight, first, last, found);
            else
                attend(queries, num, (const bf16*)f_.keys + base, (const bf16*)f_.values + base, D,
                       sight, first, last, found);
            for (int i = 0; is_whole && i < num; i++) finish_head(t, h + i, 1);
        }
    }

    void finish_head(int t, int head, int num) {
        const int D = shape_.head_dim;
        float out[MOST_HEAD_DIM];
        join(partials(items_[t], head), num, shape_.num_heads, D, out);
        for (int i = 0; i < D; i += W) {
            const int n = std::min(W, D - i);
            put(attended_, form_, t, head * D + i, load(out + i, n), n);
        }
    }

    void finish() {
        const int H = shape_.hidden_size, num = f_.num_wanted;
        rows(num, [&](int i) {
            float* out = f_.hidden + long(i) * H;
            rms_norm(x_ + long(f_.wanted[i]) * H, model_.norm.data(), H, shape_.eps,
                     [&](int at, F y, int n) {
                         store(out + at, y, n);
                         put(head_in_, form_, i, at, y, n);
                     });
        });
        if (f_.logits != nullptr) head(head_in_, num, f_.logits);
    }

    void head(const Input& x, int num_rows, float* logits) {
        round(x, shape_.hidden_size, num_rows);
        const Weight* weights[] = {&model_.head};
        const int V = model_.head.out;
        const auto keep = [&](int, int panel, int first, int rows, float* y) {
            for (int r = 0; r < rows; r++)
                copy_out(logits + long(first + r) * V + panel * PANEL, y + r * PANEL,
                         V - panel * PANEL);
        };
        product(weights, 1, nullptr, nullptr, x, num_rows, keep);
    }
};

// The head alone.
inline void head(Model& model, const float* states, int num, float* logits) {
    Forward none{};
    none.num_wanted = num;
    Pass(model, none).head_of(states, logits);
}

inline void forward(Model& model, const Forward& forward) { Pass(model, forward).run(); }

}  // namespace TRIMODE_ISA

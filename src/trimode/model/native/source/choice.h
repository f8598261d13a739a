// The choice of a token over the vocabulary, for all rows of a forward.
//
// A row is worked through in chunks of fixed size, whose results are joined in order. Rows are
// dealt out to the threads, or, where there are few, the chunks of each. So what a row gets depends
// on nothing but the row.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "choice_batch.h"
#include "corrector.h"
#include "filter.h"
#include "law.h"
#include "noise.h"
#include "threads.h"

namespace TRIMODE_ISA {

constexpr int CHUNK = 4096;

// Does numbered chunks: by all threads, or one after the other where these are null.
struct Each {
    trimode::Threads* threads;
    template <class Callable>
    void operator()(int count, Callable&& callable) const {
        if (threads)
            threads->each(count, std::forward<Callable>(callable));
        else
            for (int i = 0; i < count; i++) callable(i);
    }
};

// One row as it is worked on.
struct RowChoice {
    const trimode::ChoiceBatch& batch;
    const trimode::ChoiceRow& row;
    int number;  // of the row
    Each each;

    int num_tokens() const { return batch.num_tokens; }
    int num_chunks() const { return (num_tokens() + CHUNK - 1) / CHUNK; }
    int stop(int chunk) const {
        return (chunk + 1) * CHUNK < num_tokens() ? (chunk + 1) * CHUNK : num_tokens();
    }
    template <class T>
    std::vector<T> for_chunks() const {
        return std::vector<T>(size_t((num_tokens() + CHUNK - 1) / CHUNK));
    }
    float* plain() const { return batch.logits + number * batch.stride; }
    const double* table() const { return batch.log_table; }

    struct Highest {
        float value;
        int32_t id;
        bool has_nan;
        bool is_finite() const { return !has_nan && std::isfinite(value); }
    };

    // The highest logit and the lowest id that has it.
    Highest highest(const float* logits) const {
        auto found = for_chunks<Highest>();
        each(num_chunks(), [&](int chunk) {
            F most = set1(-INFINITE);
            Mask nan = 0;
            for (int v = chunk * CHUNK; v < stop(chunk); v += W) {
                F x = tokens(logits + v, stop(chunk) - v);
                nan |= unordered(x, x);
                most = max(most, x);
            }
            found[chunk] = {largest(most), 0, nan != 0};
        });
        Highest all = found[0];
        int at = 0;
        for (int chunk = 1; chunk < num_chunks(); chunk++) {
            all.has_nan |= found[chunk].has_nan;
            if (found[chunk].value > all.value) {
                all.value = found[chunk].value;
                at = chunk;
            }
        }
        if (!all.is_finite()) return all;
        F value = set1(all.value);
        for (int v = at * CHUNK; v < stop(at); v += W) {
            Mask same = equal(tokens(logits + v, stop(at) - v), value);
            if (same) {
                all.id = v + __builtin_ctz(same);
                break;
            }
        }
        return all;
    }

    // Of the noisy scores under the filters.
    Best noisy_best(const float* logits, float highest_logit, int highest_id) const {
        static thread_local FilterScratch scratch;
        Noise noise;
        noise.logits = logits;
        noise.temperature = row.temperature;
        noise.key = noise_key(row.seed, row.position);
        noise.table = table();
        noise.wants_second = batch.runner_ups != nullptr;
        float best = highest_logit / row.temperature;
        if (!std::isfinite(best)) return {best, NOTHING, highest_id, -1};
        float floor = best + row.min_p_depth;
        noise.edge = filter_edge(logits, num_tokens(), row.temperature, floor, row.top_k, row.top_p,
                                 best, scratch);
        if (!noise.wants_second) noise.bound = noise.noisy(highest_id);
        auto found = for_chunks<Best>();
        each(num_chunks(), [&](int chunk) {
            found[chunk] = noise.best(chunk * CHUNK, stop(chunk));
        });
        Best all;
        for (const Best& one : found) {
            all.add(one.score, one.id);
            all.add(one.second_score, one.second_id);
        }
        return all;
    }

    struct Sums {
        double mass = 0;  // of exp(x - highest)
        double tilt = 0;  // of that times (x - highest)
    };

    Sums sums(float highest_logit) const {
        auto found = for_chunks<Sums>();
        F top = set1(highest_logit), least = set1(-87.0f);
        bool wants_tilt = batch.entropies != nullptr;
        const float* logits = plain();
        each(num_chunks(), [&](int chunk) {
            Doubles mass, tilt;
            for (int v = chunk * CHUNK; v < stop(chunk); v += W) {
                F below = max(tokens(logits + v, stop(chunk) - v) - top, least);
                F e = exp(below);
                TRIMODE_ISA::add(mass, e);
                if (wants_tilt) TRIMODE_ISA::add(tilt, e * below);
            }
            found[chunk] = {sum(mass), sum(tilt)};
        });
        Sums all;
        for (const Sums& one : found) all.mass += one.mass, all.tilt += one.tilt;
        return all;
    }

    void choose() const {
        static thread_local LawScratch scratch;
        static thread_local std::vector<uint64_t> keys;
        float* logits = plain();
        Highest top = highest(logits), best = top;
        const float* ruled = logits;
        if (has_law(row)) {
            apply_law(row, logits, num_tokens(), scratch);
            ruled = scratch.under.data();
            best = highest(ruled);
        }
        bool is_finite = top.is_finite() && (best.is_finite() || batch.none_id >= 0);
        bool is_chosen = top.is_finite() && best.is_finite();
        int32_t id = batch.none_id >= 0 ? batch.none_id : 0, second = 0;
        bool has_second = false;
        if (is_chosen && row.temperature > 0) {
            Best found = noisy_best(ruled, best.value, best.id);
            id = found.id;
            has_second = found.second_id >= 0;
            if (has_second) second = found.second_id;
        } else if (is_chosen) {
            id = best.id;
            if (batch.runner_ups) {
                float* given = const_cast<float*>(ruled);
                float own = given[id];
                given[id] = -INFINITE;
                Highest next = highest(ruled);
                given[id] = own;
                has_second = next.is_finite();
                second = next.id;
            }
        }
        batch.token_ids[number] = id;
        batch.is_finite[number] = is_finite;
        if (batch.runner_ups) batch.runner_ups[number] = has_second ? second : 0;
        read(top, id, has_second ? second : -1, keys);
    }

    // What was asked for of the plain law: after the ban, at temperature 1.
    void read(const Highest& top, int32_t id, int32_t second, std::vector<uint64_t>& keys) const {
        bool has_target = batch.log_probs && row.target >= 0;
        bool has_top = batch.own_logprobs && row.num_logprobs >= 0;
        if (!batch.confidences && !batch.runner_ups && !batch.entropies && !has_target && !has_top)
            return;
        const float* logits = plain();
        double nan = std::numeric_limits<double>::quiet_NaN();
        bool is_there = top.is_finite();
        Sums found;
        if (is_there) found = sums(top.value);
        double log_mass = is_there ? table_log(found.mass, table()) : nan;
        auto probability = [&](int32_t v) {
            if (!is_there) return nan;
            float below = logits[v] - top.value, e[W];
            if (below < -87.0f) return 0.0;
            store(e, exp(set1(below)));
            return double(e[0]) / found.mass;
        };
        auto log_prob = [&](int32_t v) { return double(logits[v] - top.value) - log_mass; };
        if (batch.confidences) batch.confidences[number] = probability(id);
        if (batch.runner_ups)
            batch.runner_up_confidences[number] = second >= 0 ? probability(second) : 0.0;
        if (batch.entropies) batch.entropies[number] = log_mass - found.tilt / found.mass;
        if (has_target) batch.log_probs[number] = log_prob(row.target);
        if (!has_top) return;
        batch.own_logprobs[number] = log_prob(id);
        int32_t* ids = batch.top_ids + int64_t(number) * batch.most_logprobs;
        double* values = batch.top_logprobs + int64_t(number) * batch.most_logprobs;
        find_top(logits, num_tokens(), 1.0f, row.num_logprobs, keys);
        std::sort(keys.begin(), keys.end(), std::greater<>());
        int num_found = 0;
        for (uint64_t key : keys) ids[num_found++] = id_of(key);
        for (int v = 0; v < num_tokens() && num_found < row.num_logprobs; v++)
            if (!(logits[v] > -INFINITE)) ids[num_found++] = v;
        for (int i = 0; i < num_found; i++) values[i] = log_prob(ids[i]);
    }
};

inline void choose(trimode::Threads& threads, const trimode::ChoiceBatch& batch) {
    // Rows that wait for as many others, in order of their numbers.
    std::vector<int> depths(size_t(batch.num_rows), 0);
    int num_waves = batch.num_rows > 0 ? 1 : 0;
    for (int w = 0; w < batch.num_rows; w++) {
        int before = batch.corrector ? batch.rows[w].before_row : -1;
        if (before >= 0) depths[size_t(w)] = depths[size_t(before)] + 1;
        num_waves = std::max(num_waves, depths[size_t(w)] + 1);
    }
    std::vector<int> wave;
    for (int depth = 0; depth < num_waves; depth++) {
        wave.clear();
        for (int w = 0; w < batch.num_rows; w++)
            if (depths[size_t(w)] == depth) wave.push_back(w);
        auto one = [&](int w, trimode::Threads* of_a_row) {
            static thread_local CorrectorScratch scratch;
            const trimode::ChoiceRow& row = batch.rows[w];
            float* logits = batch.logits + w * batch.stride;
            for (int i = 0; i < batch.num_banned; i++) logits[batch.banned[i]] = -INFINITE;
            if (batch.corrector && (row.before_id >= 0 || row.before_row >= 0)) {
                int32_t before = row.before_id >= 0 ? row.before_id
                                                    : batch.token_ids[row.before_row];
                const float* state = batch.states + int64_t(w) * batch.corrector->hidden_size;
                correct(*batch.corrector, state, before, logits, batch.num_tokens, scratch);
            }
            RowChoice{batch, row, w, Each{of_a_row}}.choose();
        };
        bool is_by_row = int(wave.size()) >= threads.size();
        if (is_by_row)
            threads.each(int(wave.size()), [&](int i) { one(wave[size_t(i)], nullptr); });
        else
            for (int w : wave) one(w, threads.size() > 1 ? &threads : nullptr);
    }
}

}  // namespace TRIMODE_ISA

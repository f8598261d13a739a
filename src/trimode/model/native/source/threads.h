// A few threads that work through numbered chunks together. Nothing here knows what a chunk is.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace trimode {

// What a thread does while it spins.
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// IEEE arithmetic while it lives: to nearest, denormals kept. The caller's mode, which torch may
// have set to flush denormals, comes back at the end. Workers always compute in this mode.
class FloatMode {
  public:
    FloatMode();
    ~FloatMode();
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;

  private:
    uint64_t before_;
};

// A call of `run` deals out chunks 0 .. count-1 one by one to whoever asks, the caller included,
// and returns when all are done. A thread that the system has taken off its core holds up nobody
// unless it holds a chunk. Which thread does which chunk never matters to a result.
//
// Any thread may call `run` at any time. If the pool is busy, with another thread's chunks or with
// the chunk that calls, the caller does all its chunks itself: nobody waits for a lock, so nothing
// can deadlock. Workers spin for some tens of microseconds, then sleep. A forked child has no
// workers; the first `run` starts new ones.
//
// If a chunk throws, those not yet begun are left out, and `run` throws the first exception.
class Threads {
  public:
    explicit Threads(int num_threads);
    ~Threads();  // no `run` may be under way
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

    using Chunk = void (*)(void* context, int index);
    void run(int count, Chunk chunk, void* context);

    // The same for a callable: `each(n, [&](int i) { ... })`.
    template <class Callable>
    void each(int count, Callable&& callable) {
        using Plain = std::remove_reference_t<Callable>;
        auto call = [](void* context, int index) { (*static_cast<Plain*>(context))(index); };
        run(count, call, const_cast<void*>(static_cast<const void*>(&callable)));
    }

    int size() const { return num_threads_.load(std::memory_order_relaxed); }
    void resize(int num_threads);  // waits for a `run` under way

  private:
    struct Crew;
    struct Pools;
    void start();
    void stop();

    std::atomic<int> num_threads_;
    std::atomic<bool> is_busy_{false};  // whoever sets it owns `crew_`
    Crew* crew_ = nullptr;              // workers and what they share; made by the first `run`
    Threads* previous_ = nullptr;       // all pools of the process (Pools)
    Threads* next_ = nullptr;
};

}  // namespace trimode

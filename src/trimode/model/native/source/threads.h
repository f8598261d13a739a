// A few threads that work through numbered chunks together. Nothing here knows what a chunk is.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace trimode {

// A call of `run` deals out chunks 0 .. count-1 one by one to whoever asks, the caller included, and
// returns when all are done. A thread that the system has taken off its core holds up nobody unless
// it holds a chunk. Which thread does which chunk never matters to a result.
//
// One thread calls `run` at a time. Workers spin for a few microseconds between chunks, then sleep.
// After a fork the child has no workers; they are started again at its first `run`.
class Threads {
  public:
    explicit Threads(int num_threads);
    ~Threads();

    using Chunk = void (*)(void* context, int index);
    void run(int count, Chunk chunk, void* context);

    // The same for a callable: `each(n, [&](int i) { ... })`.
    template <class Callable>
    void each(int count, Callable&& callable) {
        auto call = [](void* context, int index) { (*static_cast<Callable*>(context))(index); };
        run(count, call, &callable);
    }

    int size() const { return num_threads_; }
    void resize(int num_threads);

  private:
    struct Shared;
    void start();
    void stop();
    static void work(std::shared_ptr<Shared> shared);

    int num_threads_;
    int pid_ = 0;
    std::shared_ptr<Shared> shared_;
    std::vector<std::thread> workers_;
};

}  // namespace trimode

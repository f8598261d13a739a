#include "threads.h"

#include <unistd.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace trimode {

namespace {

constexpr int SPINS = 4000;  // some tens of microseconds: longer than a gap between two products

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// All that changes when a chunk is claimed, in one word: number of the run, its chunks, the next.
constexpr uint64_t NEXT = 1;
constexpr int COUNT_SHIFT = 20, RUN_SHIFT = 40;
constexpr uint64_t FIELD = (1u << 20) - 1;

inline uint32_t next_of(uint64_t ticket) { return ticket & FIELD; }
inline uint32_t count_of(uint64_t ticket) { return (ticket >> COUNT_SHIFT) & FIELD; }

}  // namespace

struct Threads::Shared {
    alignas(64) std::atomic<uint64_t> ticket{0};
    alignas(64) std::atomic<uint32_t> num_done{0};
    alignas(64) std::atomic<int> num_asleep{0};
    std::atomic<bool> is_over{false};
    Chunk chunk = nullptr;  // of the run that the ticket names; read only by who holds a chunk of it
    void* context = nullptr;
    std::mutex mutex;
    std::condition_variable wake;

    // Claim and do one chunk, if there is one.
    bool step() {
        uint64_t seen = ticket.load(std::memory_order_acquire);
        do {
            if (next_of(seen) >= count_of(seen)) return false;
        } while (!ticket.compare_exchange_weak(
            seen, seen + NEXT, std::memory_order_acq_rel, std::memory_order_acquire));
        chunk(context, int(next_of(seen)));
        num_done.fetch_add(1, std::memory_order_release);
        return true;
    }
};

Threads::Threads(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {}

Threads::~Threads() { stop(); }

void Threads::resize(int num_threads) {
    stop();
    num_threads_ = num_threads < 1 ? 1 : num_threads;
}

void Threads::start() {
    pid_ = int(getpid());
    shared_ = std::make_shared<Shared>();
    for (int i = 1; i < num_threads_; i++) workers_.emplace_back(work, shared_);
}

void Threads::stop() {
    if (!shared_) return;
    if (pid_ != int(getpid())) {  // a forked child: these threads are the parent's
        for (auto& worker : workers_) worker.detach();
        workers_.clear();
        new std::shared_ptr<Shared>(shared_);  // its mutex may be held for ever: never destroyed
        shared_.reset();
        return;
    }
    {
        std::lock_guard<std::mutex> lock(shared_->mutex);
        shared_->is_over.store(true);
    }
    shared_->wake.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    shared_.reset();
}

void Threads::work(std::shared_ptr<Shared> shared) {
    int spins = 0;
    while (!shared->is_over.load(std::memory_order_relaxed)) {
        if (shared->step()) {
            spins = 0;
        } else if (++spins < SPINS) {
            pause();
        } else {
            std::unique_lock<std::mutex> lock(shared->mutex);
            shared->num_asleep.fetch_add(1);
            shared->wake.wait(lock, [&] {
                uint64_t seen = shared->ticket.load();
                return shared->is_over.load() || next_of(seen) < count_of(seen);
            });
            shared->num_asleep.fetch_sub(1);
            spins = 0;
        }
    }
}

void Threads::run(int count, Chunk chunk, void* context) {
    if (count <= 0) return;
    if (num_threads_ == 1 || count == 1) {
        for (int i = 0; i < count; i++) chunk(context, i);
        return;
    }
    if (!shared_ || pid_ != int(getpid())) {
        stop();
        start();
    }
    Shared& shared = *shared_;
    for (int first = 0; first < count; first += int(FIELD)) {
        uint32_t some = uint32_t(count - first < int(FIELD) ? count - first : int(FIELD));
        struct Part {
            Chunk chunk;
            void* context;
            int first;
        } part{chunk, context, first};
        shared.chunk = [](void* opaque, int index) {
            auto* part = static_cast<Part*>(opaque);
            part->chunk(part->context, part->first + index);
        };
        shared.context = &part;
        shared.num_done.store(0, std::memory_order_relaxed);
        uint64_t run_number = (shared.ticket.load(std::memory_order_relaxed) >> RUN_SHIFT) + 1;
        shared.ticket.store((run_number << RUN_SHIFT) | (uint64_t(some) << COUNT_SHIFT));
        if (shared.num_asleep.load() > 0) {
            std::lock_guard<std::mutex> lock(shared.mutex);
            shared.wake.notify_all();
        }
        while (shared.step()) {
        }
        for (int spins = 0; shared.num_done.load(std::memory_order_acquire) < some; spins++) {
            if (spins < SPINS)
                pause();
            else
                std::this_thread::yield();  // whoever holds the last chunk may need this core
        }
    }
}

}  // namespace trimode

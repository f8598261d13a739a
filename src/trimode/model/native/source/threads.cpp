#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trimode {

namespace {

// Longer than what lies between two products of a forward, shorter than what lies between forwards.
constexpr auto PATIENCE = std::chrono::microseconds(50);
constexpr int PAUSES = 32;  // between looks at the clock

// Says when a thread that spins has spun for long enough.
class Patience {
  public:
    bool is_over() {
        pause();
        if (++num_pauses_ % PAUSES != 0) return false;
        auto now = std::chrono::steady_clock::now();
        if (num_pauses_ == PAUSES) start_ = now;
        return now - start_ > PATIENCE;
    }

  private:
    uint32_t num_pauses_ = 0;
    std::chrono::steady_clock::time_point start_;
};

// The control word of the floating-point unit, and its bits that are no sticky flags.
#if defined(__x86_64__)
constexpr uint64_t IEEE = 0x1f80, CONTROL = 0xffc0;
uint64_t float_mode() { return _mm_getcsr(); }
void set_float_mode(uint64_t mode) { _mm_setcsr(uint32_t(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t IEEE = 0, CONTROL = ~uint64_t(0);
uint64_t float_mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
constexpr uint64_t IEEE = 0, CONTROL = 0;
uint64_t float_mode() { return 0; }
void set_float_mode(uint64_t) {}
#endif

// What there is to do, in one word, so that claiming a chunk is one exchange: how many chunks the
// run has, and the next one. A claim made late, for a run that has begun since, is a good claim.
inline uint64_t ticket_of(uint32_t count, uint32_t next) { return (uint64_t(count) << 32) | next; }
inline uint32_t count_of(uint64_t ticket) { return uint32_t(ticket >> 32); }
inline uint32_t next_of(uint64_t ticket) { return uint32_t(ticket); }
inline bool has_chunks(uint64_t ticket) { return next_of(ticket) < count_of(ticket); }

}  // namespace

FloatMode::FloatMode() : before_(float_mode()) {
    if ((before_ & CONTROL) != IEEE) set_float_mode(IEEE);
}

FloatMode::~FloatMode() {
    if ((before_ & CONTROL) != IEEE) set_float_mode(before_);
}

struct Threads::Crew {
    alignas(64) std::atomic<uint64_t> ticket{0};
    alignas(64) std::atomic<uint32_t> num_done{0};
    // Of the run that the ticket names. Written while no chunk is left, read by who holds one.
    alignas(64) Chunk chunk = nullptr;
    void* context = nullptr;
    std::atomic<bool> has_failed{false};
    std::exception_ptr failure;  // written by who sets `has_failed`

    alignas(64) std::atomic<int> num_asleep{0};
    std::atomic<bool> is_over{false};
    std::mutex mutex;
    std::condition_variable wake;

    std::atomic<bool> is_waiting{false};  // the caller, for the last chunks of others
    std::mutex done_mutex;
    std::condition_variable done;

    std::vector<std::thread> workers;

    // Claim and do one chunk, if there is one.
    bool step() {
        uint64_t seen = ticket.load(std::memory_order_acquire);
        do {
            if (!has_chunks(seen)) return false;
        } while (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire));
        if (!has_failed.load(std::memory_order_relaxed)) {
            try {
                chunk(context, int(next_of(seen)));
            } catch (...) {
                if (!has_failed.exchange(true)) failure = std::current_exception();
            }
        }
        // The caller says that it waits, then looks at the count; we count, then look whether it
        // waits. In the one order of all four, one of us sees the other.
        if (num_done.fetch_add(1) + 1 == count_of(seen) && is_waiting.load()) {
            std::lock_guard<std::mutex> lock(done_mutex);
            done.notify_one();
        }
        return true;
    }

    void publish(uint32_t count, Chunk new_chunk, void* new_context) {
        chunk = new_chunk;
        context = new_context;
        has_failed.store(false, std::memory_order_relaxed);
        num_done.store(0, std::memory_order_relaxed);
        ticket.store(ticket_of(count, 0));
        int asleep = num_asleep.load();
        if (asleep == 0) return;
        // Whoever holds the mutex may be off its core, so it is not waited for. At worst, and very
        // rarely, some worker sleeps through this run.
        std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
        for (int tries = 0; !lock.owns_lock() && tries < PAUSES; tries++) {
            pause();
            lock.try_lock();
        }
        if (!lock.owns_lock()) return;
        if (int(count) > asleep) {
            wake.notify_all();
        } else {
            for (uint32_t i = 1; i < count; i++) wake.notify_one();
        }
    }

    void wait(uint32_t count) {
        for (Patience patience; num_done.load(std::memory_order_acquire) < count;) {
            if (!patience.is_over()) continue;
            is_waiting.store(true);  // whoever holds a chunk may need this core
            std::unique_lock<std::mutex> lock(done_mutex);
            done.wait(lock, [&] { return num_done.load() >= count; });
            is_waiting.store(false);
        }
    }

    void sleep() {
        std::unique_lock<std::mutex> lock(mutex);
        num_asleep.fetch_add(1);
        wake.wait(lock, [&] { return is_over.load() || has_chunks(ticket.load()); });
        num_asleep.fetch_sub(1);
    }

    void work() {
        FloatMode mode;
        while (!is_over.load(std::memory_order_acquire)) {
            for (Patience patience; !step();) {
                if (is_over.load(std::memory_order_relaxed)) break;
                if (patience.is_over()) {
                    sleep();
                    break;
                }
            }
        }
    }
};

// All pools of the process. A forked child has the memory of the parent's workers, and perhaps
// locks that they hold, but not the threads: each pool forgets its crew, on purpose without freeing
// it, before `fork` returns in the child.
struct Threads::Pools {
    static inline std::mutex mutex;
    static inline Threads* first = nullptr;

    static void add(Threads* pool) {
        static const int registered = pthread_atfork(lock, unlock, forget);
        (void)registered;
        std::lock_guard<std::mutex> guard(mutex);
        pool->next_ = first;
        if (first != nullptr) first->previous_ = pool;
        first = pool;
    }

    static void remove(Threads* pool) {
        std::lock_guard<std::mutex> guard(mutex);
        if (pool->previous_ != nullptr) pool->previous_->next_ = pool->next_;
        if (pool->next_ != nullptr) pool->next_->previous_ = pool->previous_;
        if (first == pool) first = pool->next_;
    }

    static void lock() { mutex.lock(); }
    static void unlock() { mutex.unlock(); }
    static void forget() {
        for (Threads* pool = first; pool != nullptr; pool = pool->next_) {
            pool->crew_ = nullptr;
            pool->is_busy_.store(false);
        }
        mutex.unlock();
    }
};

Threads::Threads(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
    Pools::add(this);
}

Threads::~Threads() {
    Pools::remove(this);
    stop();
}

void Threads::resize(int num_threads) {
    while (is_busy_.exchange(true, std::memory_order_acquire)) std::this_thread::yield();
    stop();
    num_threads_.store(num_threads < 1 ? 1 : num_threads);
    is_busy_.store(false, std::memory_order_release);
}

void Threads::start() {
    crew_ = new Crew;
    crew_->workers.reserve(size_t(size()));
    // Signals are for the program's own threads: Ctrl-C must interrupt what its main thread waits
    // for. Faults stay where they happen.
    sigset_t all, before;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        for (int i = 1; i < size(); i++) crew_->workers.emplace_back(&Crew::work, crew_);
    } catch (const std::exception&) {
        // The system has no more threads for us; those that started, and the caller, do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Threads::stop() {
    if (crew_ == nullptr) return;
    {
        std::lock_guard<std::mutex> lock(crew_->mutex);
        crew_->is_over.store(true);
    }
    crew_->wake.notify_all();
    for (auto& worker : crew_->workers) worker.join();
    delete crew_;
    crew_ = nullptr;
}

void Threads::run(int count, Chunk chunk, void* context) {
    if (count <= 0) return;
    FloatMode mode;
    if (count == 1 || size() == 1 || is_busy_.exchange(true, std::memory_order_acquire)) {
        for (int i = 0; i < count; i++) chunk(context, i);
        return;
    }
    struct Free {
        std::atomic<bool>& is_busy;
        ~Free() { is_busy.store(false, std::memory_order_release); }
    } free{is_busy_};
    if (crew_ == nullptr) start();
    Crew& crew = *crew_;
    crew.publish(uint32_t(count), chunk, context);
    while (crew.step()) {
    }
    crew.wait(uint32_t(count));
    if (crew.failure) {
        std::exception_ptr failure;
        std::swap(failure, crew.failure);
        std::rethrow_exception(failure);
    }
}

}  // namespace trimode

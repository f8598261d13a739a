// Sums of a large array on some threads, as fast as memory can be read: what weights could be read
// at.
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" double read_once(const uint64_t* data, int64_t count, int num_threads) {
    typedef uint64_t Lanes __attribute__((vector_size(64), aligned(64)));
    std::vector<uint64_t> sums(num_threads * 16);
    auto started = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; i++)
        threads.emplace_back([&, i] {
            const Lanes* at = (const Lanes*)data + count / 8 * i / num_threads;
            const Lanes* stop = (const Lanes*)data + count / 8 * (i + 1) / num_threads;
            Lanes a{}, b{}, c{}, d{};
            for (; at + 4 <= stop; at += 4) a ^= at[0], b ^= at[1], c ^= at[2], d ^= at[3];
            sums[i * 16] = (a ^ b ^ c ^ d)[0];
        });
    for (auto& thread : threads) thread.join();
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
    volatile uint64_t kept = sums[0];
    (void)kept;
    return seconds.count();
}

// Checks of source/threads.cpp from C++, where a race detector sees every access.
//   threads_check work     chunks done once, by one pool or two, nested, failing, resized
//   threads_check fork     a child that forks amid the runs of another thread, and ends
//   threads_check time N   seconds of a run in turn with one thread and with a pool of N
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "threads.h"

using trimode::Threads;

namespace {

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::_Exit(1);
}

// Plain memory, written by whoever does the chunk and read by the caller: a race would be seen.
void check_once(Threads& threads, int count) {
    std::vector<int> done(size_t(count), 0);
    threads.each(count, [&](int i) { done[size_t(i)]++; });
    for (int times : done)
        if (times != 1) fail("a chunk was not done exactly once");
}

void check_counts(Threads& threads) {
    for (int round = 0; round < 300; round++)
        for (int count : {0, 1, 2, 3, threads.size(), threads.size() + 1, 100})
            check_once(threads, count);
    check_once(threads, (1 << 20) + 3);
    for (int round = 0; round < 30; round++) {  // the workers have gone to sleep before each
        std::this_thread::sleep_for(std::chrono::microseconds(200));
        check_once(threads, 7);
    }
}

void check_two_callers(Threads& one, Threads& two) {
    auto call = [&](Threads* pool) {
        for (int round = 0; round < 500; round++) check_once(*pool, 1 + round % 50);
    };
    std::vector<std::thread> callers;
    for (Threads* pool : {&one, &one, &two, &two}) callers.emplace_back(call, pool);
    for (auto& caller : callers) caller.join();
}

void check_nested(Threads& one, Threads& two) {
    for (int round = 0; round < 50; round++) {
        std::vector<int> sums(20, 0);
        one.each(20, [&](int i) {
            std::vector<int> inner(10, 0);
            two.each(10, [&](int j) { inner[size_t(j)] = j; });
            one.each(10, [&](int j) { inner[size_t(j)] += i; });
            for (int value : inner) sums[size_t(i)] += value;
        });
        for (int i = 0; i < 20; i++)
            if (sums[size_t(i)] != 45 + 10 * i) fail("a nested run gave something else");
    }
}

void check_exceptions(Threads& threads) {
    for (int round = 0; round < 100; round++) {
        bool is_caught = false;
        try {
            threads.each(50, [&](int i) {
                if (i % 10 == round % 10) throw std::runtime_error("on purpose");
            });
        } catch (const std::runtime_error&) {
            is_caught = true;
        }
        if (!is_caught) fail("an exception was lost");
        check_once(threads, 50);
    }
}

void check_resize(Threads& threads) {
    std::thread caller([&] {
        for (int round = 0; round < 2000; round++) check_once(threads, 20);
    });
    for (int size : {1, 3, 2, 0, 5, 4}) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        threads.resize(size);
        if (threads.size() != std::max(size, 1)) fail("a pool has another size than it was given");
    }
    caller.join();
}

#if defined(__x86_64__)
#include <immintrin.h>
void check_float_mode(Threads& threads) {
    const unsigned flushing = 0x1f80 | 0x8040 | 0x6000;  // denormals to zero, rounding to zero
    const unsigned before = _mm_getcsr();
    _mm_setcsr(flushing);
    for (int count : {1, 64}) {
        volatile float tiny = 1e-38f;
        std::vector<int> faults(size_t(count), 0);
        threads.each(count, [&](int i) {
            volatile float third = 1.0f;
            third = third / 3.0f;  // rounded up; down if rounding were to zero
            volatile float smaller = tiny / 8.0f;
            faults[size_t(i)] = smaller == 0.0f || double(third) < 1.0 / 3.0;
            std::this_thread::yield();
        });
        if ((_mm_getcsr() & 0xffc0) != (flushing & 0xffc0))
            fail("the caller's mode did not come back");
        for (int fault : faults)
            if (fault) fail("a chunk ran in the caller's floating-point mode");
    }
    _mm_setcsr(before);
}
#else
void check_float_mode(Threads&) {}
#endif

void check_work() {
    for (int size : {1, 2, 3, 9}) {
        Threads one(size), two(2);
        check_counts(one);
        check_two_callers(one, two);
        check_nested(one, two);
        check_exceptions(one);
        check_float_mode(one);
        check_resize(one);
    }
    for (int i = 0; i < 200; i++) {
        Threads brief(3);
        check_once(brief, i % 4);
    }
}

void check_fork() {
    static Threads pool(3), other(2);  // destroyed at exit, in the child too
    std::atomic<bool> is_over{false};
    std::thread busy([&] {
        while (!is_over.load()) check_once(pool, 30);
    });
    for (int round = 0; round < 50; round++) {
        check_once(other, 5);
        std::fflush(nullptr);
        pid_t child = fork();
        if (child == 0) {
            alarm(20);  // ends a child that hangs
            check_once(pool, 30);
            check_once(other, 30);
            pool.resize(4);
            Threads own(2);
            check_once(own, 30);
            if (round % 2 == 0) std::_Exit(0);
            pid_t grandchild = fork();
            check_once(pool, 30);
            if (grandchild == 0) std::exit(0);
            int status = 1;
            waitpid(grandchild, &status, 0);
            std::exit(status == 0 ? 0 : 1);
        }
        int status = 1;
        if (waitpid(child, &status, 0) != child || status != 0)
            fail("a forked child did not end well");
    }
    is_over.store(true);
    busy.join();
}

// 24 chunks of some 20 microseconds: the products of one layer.
double run_seconds(Threads& threads, std::vector<float>& sink) {
    auto before = std::chrono::steady_clock::now();
    threads.each(24, [&](int i) {
        float x = float(i);
        for (int k = 0; k < 5000; k++) x = x * 0.999f + 1.0f;
        sink[size_t(i) * 16] = x;
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
}

void time_runs(int num_threads) {
    Threads one(1), many(num_threads);
    std::vector<float> sink(24 * 16, 0.0f);
    double total[2] = {0, 0}, most[2] = {0, 0};
    for (int round = 0; round < 1000; round++)
        for (int which : {0, 1}) {
            double seconds = run_seconds(which == 0 ? one : many, sink);
            total[which] += seconds;
            most[which] = std::max(most[which], seconds);
        }
    std::printf("%.6f %.6f %.6f %.6f\n", total[0], total[1], most[0], most[1]);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && !std::strcmp(argv[1], "work")) check_work();
    else if (argc > 1 && !std::strcmp(argv[1], "fork")) check_fork();
    else if (argc > 2 && !std::strcmp(argv[1], "time")) time_runs(std::atoi(argv[2]));
    else return 2;
    std::puts("done");
    return 0;
}

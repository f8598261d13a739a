// What this CPU and its system can run. Asked of the CPU itself: zig's __builtin_cpu_supports says
// no to everything.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace trimode {

struct Cpu {
    bool has_avx2 = false;         // with FMA and F16C
    bool has_avx512 = false;       // F, BW, DQ and VL
    bool has_avx512_bf16 = false;  // with VNNI

#if defined(__x86_64__)
    Cpu() {
        uint32_t a, b, c, d;
        auto bit = [](uint32_t word, int i) { return (word >> i & 1) != 0; };
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        if (!bit(c, 27) || !bit(c, 28)) return;  // OSXSAVE, AVX
        const bool has_fma = bit(c, 12) && bit(c, 29);
        uint32_t saved, high;  // registers that the system saves when it changes threads
        asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        has_avx2 = has_fma && bit(b, 5);
        has_avx512 = has_avx2 && (saved & 0xe0) == 0xe0 && bit(b, 16) && bit(b, 17) && bit(b, 30) &&
                     bit(b, 31);
        const bool has_vnni = bit(c, 11), has_more = a >= 1;
        if (!has_avx512 || !has_vnni || !has_more) return;
        if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
        has_avx512_bf16 = bit(a, 5);
    }
#endif
};

}  // namespace trimode

// What this build is.

extern "C" {
#pragma GCC visibility push(default)

// The compiler that made this library, as it calls itself.
const char* trimode_compiler() { return TRIMODE_COMPILER; }
#pragma GCC visibility pop
}  // extern "C"

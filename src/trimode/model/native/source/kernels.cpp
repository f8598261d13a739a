// All code that is compiled once for each instruction set; TRIMODE_ISA names it.
#include "api.h"
#include "choice.h"
#include "forward.h"
#include "pack.h"

#define JOINED(a, b) a##b
#define NAMED(isa) JOINED(kernels_, isa)
#define TEXT(x) #x
#define QUOTED(x) TEXT(x)

namespace trimode {

const Kernels NAMED(TRIMODE_ISA) = {
    QUOTED(TRIMODE_ISA),
    TRIMODE_ISA::PANEL,
    TRIMODE_ISA::has_head_dim,
    TRIMODE_ISA::plan,
    TRIMODE_ISA::pack,
    TRIMODE_ISA::unpack_row,
    TRIMODE_ISA::forward,
    TRIMODE_ISA::head,
    TRIMODE_ISA::choose,
};

}  // namespace trimode

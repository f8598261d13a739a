#pragma once
#include "model.h"
#include "products.h"
namespace TRIMODE_ISA {
inline void pack(const trimode::Source&, trimode::Weight&) {}
inline void unpack(const trimode::Weight&, float*) {}
}

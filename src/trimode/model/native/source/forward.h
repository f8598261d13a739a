#pragma once
#include "model.h"
#include "products.h"
namespace TRIMODE_ISA {
inline void forward(trimode::Model&, const trimode::Forward&) {}
}

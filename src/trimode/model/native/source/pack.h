// Weights into the order in which products read them, and back.
#pragma once

#include "int8.h"
#include "model.h"
#include "products.h"

namespace TRIMODE_ISA {

using trimode::Source;
using trimode::Weight;

INLINE float source_at(const Source& source, long i) {
    return source.form == trimode::FLOAT32 ? ((const float*)source.data)[i]
                                           : widen(((const bf16*)source.data)[i]);
}

inline int64_t panel_bytes(int32_t form, int32_t in) {
    if (form == trimode::INT8) return num_groups(in) * GROUP_BYTES;
    int64_t bytes = form == trimode::FLOAT32 ? int64_t(in) * PANEL * 4
                                             : int64_t((in + 1) / 2) * PANEL * 4;
    return (bytes + 63) / 64 * 64;
}

// Of a piece that many tiles read: whole groups.
inline int piece_inputs(int32_t form) {
    return int(PIECE_BYTES / panel_bytes(form, GROUP)) * GROUP;
}

// Say how many bytes `pack` will write.
inline int64_t plan(Weight& weight, int32_t form, int32_t out, int32_t in) {
    weight.form = form;
    weight.out = out;
    weight.in = in;
    weight.num_panels = (out + PANEL - 1) / PANEL;
    weight.panel_bytes = panel_bytes(form, in);
    return weight.num_panels * weight.panel_bytes;
}

// Fill one panel of a planned weight whose memory is zeros.
inline void pack(const Source& source, Weight& weight, int panel) {
    const int first = panel * PANEL;
    const int num = weight.out - first < PANEL ? weight.out - first : PANEL;
    char* target = weight.data + panel * weight.panel_bytes;
    if (weight.form == trimode::INT8) {
        quantize_panel(target, num, weight.in, [&](int j, int k) {
            return source_at(source, long(first + j) * weight.in + k);
        });
        return;
    }
    constexpr int STRIP = 64;  // inputs at a time, so that reads and writes stay in the cache
    for (int k0 = 0; k0 < weight.in; k0 += STRIP) {
        const int k1 = k0 + STRIP < weight.in ? k0 + STRIP : weight.in;
        for (int j = 0; j < num; j++) {
            const long at = long(first + j) * weight.in;
            if (weight.form == trimode::FLOAT32) {
                float* y = (float*)target;
                for (int k = k0; k < k1; k++) y[long(k) * PANEL + j] = source_at(source, at + k);
            } else {
                bf16* y = (bf16*)target;
                for (int k = k0; k < k1; k++)
                    y[(long(k / 2) * PANEL + j) * 2 + k % 2] =
                        source.form == trimode::BFLOAT16 ? ((const bf16*)source.data)[at + k]
                                                         : narrow(source_at(source, at + k));
            }
        }
    }
}

// One row [in] in float32: of the original, or as rounded to 8 bits.
inline void unpack_row(const Weight& weight, int row, float* out) {
    const char* panel = weight.data + (row / PANEL) * weight.panel_bytes;
    const int j = row % PANEL;
    if (weight.form == trimode::FLOAT32) {
        for (int k = 0; k < weight.in; k++) out[k] = ((const float*)panel)[long(k) * PANEL + j];
    } else if (weight.form == trimode::INT8) {
        for (int k = 0; k < weight.in; k++) out[k] = quantized_at(panel, j, k);
    } else {
        for (int k = 0; k < weight.in; k++)
            out[k] = widen(((const bf16*)panel)[(long(k / 2) * PANEL + j) * 2 + k % 2]);
    }
}

}  // namespace TRIMODE_ISA

// Warp-wide matrix operations with the fragment layouts of the PTX manual, "Matrix Fragments for mma.m16n8k8",
// "... mma.m16n8k16" and "ldmatrix". With g = lane / 4 and t = lane % 4, two 16-bit values in each 32-bit register:
//   A (16 x K)  register i: row g + 8 (i % 2), columns 2t, 2t + 1, plus 8 (i / 2)
//   B (K x 8)   register i: rows 2t, 2t + 1, plus 8 i, column g
//   D (16 x 8)  value i: row g + 8 (i / 2), column 2t + i % 2
// Products and sums are float32 in ascending k; a real tensor core rounds in its own way, within a few units of 2^-24.
#pragma once

#include <cstdint>

#include "shared_memory.h"

namespace cramfast::emulator {

// d += a b. K is 8 or 16; bfloat16 or float16 values. At an ignored site (machine.h) two registers of b, or of a where
// b has but one, stand in each other's place.
template <int K, bool bfloat>
void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, Site site);

// Lane l of each group of eight gives the address of a row of eight 16-bit values; matrix m comes from lanes 8m..8m+7.
// Without trans lane l gets values 2 (l % 4) and + 1 of row l / 4; with trans, of column l / 4.
template <int matrices, bool trans>
void ldmatrix(std::uint32_t* registers, Region region, std::int64_t offset, Site site);

float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(float value);  // to nearest, ties to even

}  // namespace cramfast::emulator

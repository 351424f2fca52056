// 16-bit matrices in shared memory as a warp reads and multiplies them on tensor cores: what attention and
// layernorm_glu share.
//
// Operands of mma_m16n8k16, with g = lane / 4 and t = lane % 4 (emulator/tensor_core.h):
//   a (16 x 16)              register i: row g + 8 (i % 2), columns 2t, 2t + 1, plus 8 (i / 2)
//   b (16 x 8), two abreast  register i: rows 2t, 2t + 1, plus 8 (i % 2), column g + 8 (i / 2)
//   accumulators acc[n][i]   row g + 8 (i / 2), column 8n + 2t + i % 2
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "device_code.h"

namespace cramfast {

DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }
DEVICE int warp_id() { return static_cast<int>(threadIdx.x / 32); }

using Chunk = Pack<std::uint32_t, 4>;  // eight values; words, as halves would be unpacked on their way

template <class T>
DEVICE Chunk load_chunk(const T* from) {
  return load<4>(reinterpret_cast<const std::uint32_t*>(from));
}

// (rows, width), the 16-byte chunks of a row permuted so that those of one column in eight neighbouring rows lie in
// different banks.
template <class T, int width>
struct Matrix {
  static_assert(sizeof(T) == 2 && (width == 32 || width % 64 == 0));
  Shared<T> data;

  // Index of eight values, from a column that is a multiple of 8 on.
  static DEVICE constexpr int chunk(int row, int column) {
    const int turn = width == 32 ? row >> 1 & 3 : row & 7;  // two rows of 64 bytes fill the banks once
    return row * width + ((column >> 3 ^ turn) << 3);
  }

  // What this lane points ldmatrix to for the 16 x 16 values from (row, column) on, both multiples of 16: the second of
  // their 8 x 8 blocks is the one below or the one beside. The address of another block is this one's moved: the
  // permutation is an exclusive or, so 16 columns from 0 on are one instruction and 16 rows are none.
  static DEVICE int down(int row, int column = 0) {
    return chunk(row + lane_id() % 16, column + lane_id() / 16 * 8);
  }
  static DEVICE int across(int row, int column = 0) {
    return chunk(row + lane_id() % 8 + lane_id() / 16 * 8, column + lane_id() / 8 % 2 * 8);
  }
  DEVICE Shared<T> moved(int place, int rows, int columns) const { return data + ((place ^ columns) + rows * width); }

  // Operands from such a place, moved by `rows` and `columns`: the values themselves (a, b) or their transpose.
  DEVICE void a(std::uint32_t* r, int down, int rows, int columns) const { ldmatrix<4>(r, moved(down, rows, columns)); }
  DEVICE void a_transposed(std::uint32_t* r, int across, int rows, int columns) const {
    ldmatrix<4, true>(r, moved(across, rows, columns));
  }
  DEVICE void b(std::uint32_t* r, int down, int rows, int columns) const {
    ldmatrix<4, true>(r, moved(down, rows, columns));
  }
  DEVICE void b_transposed(std::uint32_t* r, int across, int rows, int columns) const {
    ldmatrix<4>(r, moved(across, rows, columns));
  }
};

// Whether the eight rows that ldmatrix reads at once, 16 bytes of each, lie in different banks at every column.
template <int width>
DEVICE constexpr bool no_bank_meets_twice() {
  for (int column = 0; column < width; column += 8) {
    unsigned banks = 0;  // in groups of four, 16 bytes
    for (int row = 0; row < 8; ++row) banks |= 1u << Matrix<f16, width>::chunk(row, column) / 8 % 8;
    if (banks != 0xffu) return false;
  }
  return true;
}
static_assert(no_bank_meets_twice<32>() && no_bank_meets_twice<64>() && no_bank_meets_twice<128>());

// f(null pointer of the stored type) for the types of the tensor cores. Throws std::invalid_argument for float32.
template <class F>
void with_half_type(const char* op, DType dtype, const F& f) {
  switch (dtype) {
    case DType::bfloat16: return f(static_cast<bf16*>(nullptr));
    case DType::float16: return f(static_cast<f16*>(nullptr));
    default: throw std::invalid_argument(std::string(op) + ": the tensor cores take float16 and bfloat16");
  }
}

// bfloat16 needs the tensor cores of sm_80; a kernel for an older card has no body, and its launcher refuses.
template <class T>
constexpr bool has_tensor_cores = has_sm80 || !std::is_same_v<T, bf16>;

// Whether a kernel takes the path of sm_80. Throws std::invalid_argument when it has none for the dtype.
template <class Kernel>
bool takes_sm80_path(const char* op, Kernel kernel, DType dtype) {
  const bool sm80 = code_path(kernel) >= 800;
  if (dtype == DType::bfloat16 && !sm80) {
    throw std::invalid_argument(std::string(op) + ": bfloat16 needs sm_80 or later; this device takes float16");
  }
  return sm80;
}

}  // namespace cramfast

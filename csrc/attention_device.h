// Device code that both forms of attention share. A warp works on tiles of 16 rows (the m16 of mma): it loads them from
// global into swizzled shared memory, turning queries and keys by their rotary positions on the way; reads operands
// with ldmatrix; and stores accumulators in accesses of 16 bytes, turning gradients back.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "attention.h"
#include "warp_matrix.h"

namespace cramfast {

constexpr int tile_rows = 16;
constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

// ---- rows of one head in global memory

// 16 rows of one head, from `position` of a sequence on.
struct Place {
  int head, first_token, length;  // first token and length of the sequence
  int position;
};

// First token and length of a sequence; false when it does not exist or is empty. The offsets were checked by a kernel
// before this one (attention_cuda.cu).
template <class Args>
DEVICE bool find_sequence(const Args& args, std::int64_t sequence, Place& place) {
  if (sequence >= args.sequences) return false;
  place.first_token = args.cu_seqlens[sequence];
  place.length = args.cu_seqlens[sequence + 1] - place.first_token;
  return place.length > 0;
}

// What lies there in one tensor, `stride` values from row to row.
template <class T>
struct Rows {
  T* data;
  std::int64_t stride;
  int position, count;  // count: rows left in the sequence, 16 or more when none is missing
};

// Of q (0), k (1) or v (2), or of a gradient in the same layout.
template <class T, class Args>
DEVICE Rows<T> projection_rows(const Args& args, T* qkv, int which, const Place& at) {
  const std::int64_t stride = 3 * args.heads * args.head_width, token = std::int64_t{at.first_token} + at.position;
  return {qkv + token * stride + (which * args.heads + at.head) * args.head_width, stride, at.position,
          at.length - at.position};
}

// Of the output or its gradient.
template <class T, class Args>
DEVICE Rows<T> output_rows(const Args& args, T* out, const Place& at) {
  const std::int64_t stride = args.heads * args.head_width, token = std::int64_t{at.first_token} + at.position;
  return {out + token * stride + at.head * args.head_width, stride, at.position, at.length - at.position};
}

// 1 / sqrt(width).
template <int width>
constexpr float score_scale = width == 32 ? 0.176776695f : width == 64 ? 0.125f : 0.0883883476f;

// Keys [first, last) that the query at `row` attends.
struct Span {
  int first, last;
};
DEVICE Span attended(int row, int length, std::int64_t window) {
  if (window < 0 || window >= length) return {0, length};
  const int reach = static_cast<int>(window);
  return {row > reach ? row - reach : 0, row + reach < length ? row + reach + 1 : length};
}

// Zeroes rows [first, last) of (rows, width); width is a multiple of 8. The blocks of the grid share them out.
template <class T>
DEVICE void clear_rows(T* data, std::int64_t width, std::int64_t first, std::int64_t last) {
  constexpr int vec = 16 / sizeof(T);
  const std::int64_t block = blockIdx.x + gridDim.x * std::int64_t{blockIdx.y + gridDim.y * blockIdx.z};
  const std::int64_t blocks = static_cast<std::int64_t>(gridDim.x) * gridDim.y * gridDim.z;
  for (std::int64_t row = first + block; row < last; row += blocks) {
    for (std::int64_t i = threadIdx.x * vec; i < width; i += blockDim.x * vec) {
      store<vec>(data + row * width + i, Pack<T, vec>{});
    }
  }
}

// What each form does with rows that belong to no sequence, in one kernel of its forward pass and one of its backward.
template <class T>
DEVICE void clear_tail(const AttentionForward& args) {
  const std::int64_t used = args.cu_seqlens[args.sequences];
  clear_rows(static_cast<T*>(args.out), args.heads * args.head_width, used, args.tokens);
  for (std::int64_t row = used + threadIdx.x; row < args.tokens; row += blockDim.x) {
    for (std::int64_t h = blockIdx.x; h < args.heads; h += gridDim.x) args.lse[h * args.tokens + row] = 0.0f;
  }
}
template <class T>
DEVICE void clear_tail(const AttentionBackward& args) {
  clear_rows(static_cast<T*>(args.dqkv), 3 * args.heads * args.head_width, args.cu_seqlens[args.sequences],
             args.tokens);
}

// f(integral constant of the head width): instantiates kernels. Throws std::invalid_argument for another width.
template <class F>
void with_head_width(std::int64_t head_width, const F& f) {
  switch (head_width) {
    case 32: return f(std::integral_constant<int, 32>{});
    case 64: return f(std::integral_constant<int, 64>{});
    case 128: return f(std::integral_constant<int, 128>{});
    default: throw std::invalid_argument("attention: head width must be 32, 64 or 128");
  }
}

// ---- from global to shared memory

// Angles of rotary positions, (positions, width / 2) each; cos is null for none.
struct Rotary {
  const float* cos;
  const float* sin;
};

// The pair (a, b) turned by an angle.
DEVICE void turn(float& a, float& b, float cos, float sin) {
  const float first = a;
  a = first * cos - b * sin;
  b = b * cos + first * sin;
}
template <class T>
DEVICE void turn(std::uint32_t& a, std::uint32_t& b, float2 cos, float2 sin) {
  float2 low = unpack2<T>(a), high = unpack2<T>(b);
  turn(low.x, high.x, cos.x, sin.x);
  turn(low.y, high.y, cos.y, sin.y);
  a = pack2<T>(low.x, low.y);
  b = pack2<T>(high.x, high.y);
}

// One warp copies 16 rows, asynchronously from sm_80 on; missing rows become zeros.
template <class T, int width>
DEVICE void load_tile(const Matrix<T, width>& to, int to_row, const Rows<const T>& from) {
  constexpr int chunks = width / 8;
#pragma unroll
  for (int i = 0; i < tile_rows * chunks / 32; ++i) {
    const int row = (lane_id() + 32 * i) / chunks, column = lane_id() % chunks * 8;
    const bool valid = row < from.count;
    const T* at = valid ? from.data + row * from.stride + column : from.data;
    cp_async16(to.data + to.chunk(to_row + row, column), at, valid);
  }
}

// One warp copies 16 rows of `count` matrices at the same positions, turned; each angle is read once.
template <int count, class T, int width>
DEVICE void load_turned_tiles(const Matrix<T, width> (&to)[count], int to_row, const Rows<const T> (&from)[count],
                              const Rotary& rotary) {
  if (!rotary.cos) {
#pragma unroll
    for (int m = 0; m < count; ++m) load_tile(to[m], to_row, from[m]);
    return;
  }
  constexpr int half = width / 2, chunks = half / 8, pieces = tile_rows * chunks / 32;
  const int row = lane_id() / chunks, column = lane_id() % chunks * 8;
  Chunk low[pieces][count] = {}, high[pieces][count] = {};
#pragma unroll
  for (int i = 0; i < pieces; ++i) {  // all on their way before the first is waited for
    const int r = row + 32 / chunks * i;
#pragma unroll
    for (int m = 0; m < count; ++m) {
      if (r >= from[m].count) continue;
      low[i][m] = load_chunk(from[m].data + r * from[m].stride + column);
      high[i][m] = load_chunk(from[m].data + r * from[m].stride + column + half);
    }
  }
#pragma unroll
  for (int i = 0; i < pieces; ++i) {
    const int r = row + 32 / chunks * i;
    if (r < from[0].count) {
      const std::int64_t angle = (from[0].position + r) * half + column;
      const Pack<float, 8> cos = load_floats<8>(rotary.cos + angle), sin = load_floats<8>(rotary.sin + angle);
#pragma unroll
      for (int m = 0; m < count; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          turn<T>(low[i][m].value[j], high[i][m].value[j], make_float2(cos.value[2 * j], cos.value[2 * j + 1]),
                  make_float2(sin.value[2 * j], sin.value[2 * j + 1]));
        }
      }
    }
#pragma unroll
    for (int m = 0; m < count; ++m) {
      shared_cast<Chunk>(to[m].data + to[m].chunk(to_row + r, column))[0] = low[i][m];
      shared_cast<Chunk>(to[m].data + to[m].chunk(to_row + r, column + half))[0] = high[i][m];
    }
  }
}

// ---- operands and accumulators in registers

// Over the four lanes that hold a row of accumulators.
DEVICE float quad_sum(float value) {
  value += __shfl_xor_sync(whole_warp, value, 1);
  return value + __shfl_xor_sync(whole_warp, value, 2);
}
DEVICE float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(whole_warp, value, 1));
  return fmaxf(value, __shfl_xor_sync(whole_warp, value, 2));
}

// Four registers of each of the lanes 4g .. 4g + 3, transposed as a 4 x 4 matrix: between eight values of a row in one
// lane, which is an access of 16 bytes, and pairs spread over four lanes, which is what mma takes and gives.
DEVICE void transpose_quad(std::uint32_t (&r)[4]) {
  const bool odd = lane_id() & 1, upper = lane_id() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t other = __shfl_xor_sync(whole_warp, odd ? r[i] : r[i + 1], 1);
    r[i] = odd ? other : r[i];
    r[i + 1] = odd ? r[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t other = __shfl_xor_sync(whole_warp, upper ? r[i] : r[i + 2], 2);
    r[i] = upper ? other : r[i];
    r[i + 2] = upper ? r[i + 2] : other;
  }
}

// One warp reads 16 rows of `16 blocks` columns straight into registers; missing rows become zeros. They are operands
// a[block] only after arrange_operands, so that other loads can start before these are waited for.
template <class T, int blocks>
DEVICE void load_operands(std::uint32_t (&a)[blocks][4], const Rows<const T>& from) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane_id() / 4 + 8 * i;
#pragma unroll
    for (int c = 0; c < blocks; c += 2) {
      Chunk piece = {};
      if (row < from.count) piece = load_chunk(from.data + row * from.stride + 16 * c + lane_id() % 4 * 8);
#pragma unroll
      for (int m = 0; m < 4; ++m) a[c + m / 2][i + 2 * (m % 2)] = piece.value[m];
    }
  }
}

// Operands from shared memory: 16 rows of `16 blocks` columns, from `columns` on.
template <class T, int width, int blocks>
DEVICE void read_operands(std::uint32_t (&a)[blocks][4], const Matrix<T, width>& from, int down, int columns = 0) {
#pragma unroll
  for (int c = 0; c < blocks; ++c) from.a(a[c], down, 0, columns + 16 * c);
}

template <int blocks>
DEVICE void arrange_operands(std::uint32_t (&a)[blocks][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int c = 0; c < blocks; c += 2) {
      std::uint32_t r[4] = {a[c][i], a[c][i + 2], a[c + 1][i], a[c + 1][i + 2]};
      transpose_quad(r);
#pragma unroll
      for (int m = 0; m < 4; ++m) a[c + m / 2][i + 2 * (m % 2)] = r[m];
    }
  }
}

// Turns operands by the positions of their rows.
template <class T, int blocks>
DEVICE void turn_operands(std::uint32_t (&a)[blocks][4], const Rows<const T>& rows, const Rotary& rotary) {
  if (!rotary.cos) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane_id() / 4 + 8 * (i % 2), column = 8 * (i / 2) + lane_id() % 4 * 2;
    if (row >= rows.count) continue;
#pragma unroll
    for (int c = 0; c < blocks / 2; ++c) {
      const std::int64_t angle = (rows.position + row) * (8 * blocks) + 16 * c + column;
      const Pack<float, 2> cos = load<2>(rotary.cos + angle), sin = load<2>(rotary.sin + angle);
      turn<T>(a[c][i], a[c + blocks / 2][i], make_float2(cos.value[0], cos.value[1]),
              make_float2(sin.value[0], sin.value[1]));
    }
  }
}

// Accumulators of a 16 x 16 block, rounded to an operand of the next product.
template <class T>
DEVICE void round_to_operand(std::uint32_t (&a)[4], const float (&acc)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack2<T>(acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]);
}

// acc (16 x 16) += a (16 x 16 blocks) times the transpose of 16 rows, from `columns` on. across, rows: where they are.
template <class T, int width, int blocks>
DEVICE void multiply_transposed(float (&acc)[2][4], const std::uint32_t (&a)[blocks][4], const Matrix<T, width>& matrix,
                                int across, int rows, int columns = 0) {
#pragma unroll
  for (int c = 0; c < blocks; ++c) {
    std::uint32_t b[4];
    matrix.b_transposed(b, across, rows, columns + 16 * c);
    mma_m16n8k16<T>(acc[0], a[c], b);
    mma_m16n8k16<T>(acc[1], a[c], b + 2);
  }
}

// acc (16 x width) += a (16 x 16) times 16 rows. down, rows: where they are.
template <class T, int width>
DEVICE void multiply(float (&acc)[width / 8][4], const std::uint32_t (&a)[4], const Matrix<T, width>& matrix, int down,
                     int rows) {
#pragma unroll
  for (int c = 0; c < width / 16; ++c) {
    std::uint32_t b[4];
    matrix.b(b, down, rows, 16 * c);
    mma_m16n8k16<T>(acc[2 * c], a, b);
    mma_m16n8k16<T>(acc[2 * c + 1], a, b + 2);
  }
}

// Turns accumulators of 16 rows of `8 blocks` columns back: the gradients of turned rows.
template <class T, int blocks>
DEVICE void turn_back(float (&acc)[blocks][4], const Rows<T>& rows, const Rotary& rotary) {
  if (!rotary.cos) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane_id() / 4 + 8 * i;
    if (row >= rows.count) continue;
#pragma unroll
    for (int n = 0; n < blocks / 2; ++n) {
      const std::int64_t angle = (rows.position + row) * (4 * blocks) + 8 * n + lane_id() % 4 * 2;
      const Pack<float, 2> cos = load<2>(rotary.cos + angle), sin = load<2>(rotary.sin + angle);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        turn(acc[n][2 * i + j], acc[n + blocks / 2][2 * i + j], cos.value[j], -sin.value[j]);
      }
    }
  }
}

// Accumulators of row g (0) or g + 8 (1) times a factor.
template <int blocks>
DEVICE void scale_row(float (&acc)[blocks][4], int half, float factor) {
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
    acc[n][2 * half] *= factor;
    acc[n][2 * half + 1] *= factor;
  }
}

// One warp writes accumulators of 16 rows, rounded.
template <class T, int blocks>
DEVICE void store_tile(const Rows<T>& to, const float (&acc)[blocks][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane_id() / 4 + 8 * i;
#pragma unroll
    for (int n = 0; n < blocks; n += 4) {
      Chunk piece;
#pragma unroll
      for (int m = 0; m < 4; ++m) piece.value[m] = pack2<T>(acc[n + m][2 * i], acc[n + m][2 * i + 1]);
      transpose_quad(piece.value);
      if (row < to.count) {
        store<4>(reinterpret_cast<std::uint32_t*>(to.data + row * to.stride + 8 * (n + lane_id() % 4)), piece);
      }
    }
  }
}

}  // namespace cramfast

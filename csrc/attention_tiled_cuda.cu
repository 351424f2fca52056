#include <cmath>
#include <type_traits>

#include "attention_forms.h"
#include "attention_tiled.h"

// A block owns 16 rows for each of its warps, in registers, and walks over the columns that some of them see: tiles of
// rows of the other side, which all warps read from shared memory while the next tile is on its way.
//
//   kernel   rows: x, y        columns: x, y     what a warp computes, 16 rows against a tile
//   fwd      queries: q        keys: k, v        z = q k^T, online softmax, out += P v
//   dq       queries: q, dout  keys: k, v        z = q k^T, dP = dout v^T, dz = P (dP - delta); dq += dz k
//   dkv      keys: k, v        queries: q, dout  z^T = k q^T, dP^T = v dout^T, dz^T; dk += dz^T q, dv += P^T dout
//
// So each x is turned by its rotary position and each y is not, and the backward kernels are one with two faces. Scores
// are computed twice: seven products instead of five, for sums in a fixed order and no atomics. dq runs first and
// leaves delta_i = sum_k dout_ik out_ik to dkv. Source: Dao, arXiv:2307.08691, and the formulas in attention.h.

namespace cramfast {
namespace {

// ---- forward

// Columns whose scores a warp has in registers at a time.
template <int width>
constexpr int softmax_columns = width == 32 ? 64 : 32;

// Of the lane's rows g and g + 8: the largest score so far, the lane's share of the sum of exp2(scale (z - largest)),
// and the output before it is divided by that sum.
template <int width>
struct Accumulator {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  float out[width / 8][4] = {};

  // z -> exp2(scale (z - largest)) in place; what is there already is scaled to the new largest score.
  template <int blocks>
  DEVICE void take(float (&z)[blocks][2][4]) {
    constexpr float scale = log2_e * score_scale<width>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = largest[half];
#pragma unroll
      for (int i = 0; i < 4 * blocks; ++i) largest[half] = fmaxf(largest[half], z[i / 4][i / 2 % 2][2 * half + i % 2]);
      largest[half] = quad_max(largest[half]);
      const float base = largest[half] == -INFINITY ? 0.0f : largest[half] * scale;  // -inf: no column seen yet
      const float shrink = exp2_approx(before * scale - base);
      sum[half] *= shrink;
#pragma unroll
      for (int i = 0; i < 4 * blocks; ++i) {
        float& score = z[i / 4][i / 2 % 2][2 * half + i % 2];
        score = exp2_approx(score * scale - base);
        sum[half] += score;
      }
      scale_row(out, half, shrink);
    }
  }
};

// 16 rows against softmax_columns columns, which are `column` and on in the sequence and `row` and on in their tiles.
template <class T, int width>
DEVICE void attend(Accumulator<width>& acc, const std::uint32_t (&q)[width / 16][4], const Matrix<T, width>& k,
                   const Matrix<T, width>& v, int row, const Task& task, int column) {
  constexpr int count = softmax_columns<width>, blocks = count / 16;
  int across = k.across(0), down = v.down(0);
  compute_again(across);  // and the blocks' addresses from it, which would fill the registers
  compute_again(down);
  float z[blocks][2][4] = {};
#pragma unroll
  for (int n = 0; n < blocks; ++n) multiply_transposed(z[n], q, k, across, row + 16 * n);
  if (!task.sees_all(column, count)) {
#pragma unroll
    for (int i = 0; i < 8 * blocks; ++i) {
      const int key = column + i / 4 * 8 + lane_id() % 4 * 2 + i % 2;
      if (!task.sees(i / 2 % 2, key)) z[i / 8][i / 4 % 2][i % 4] = -INFINITY;
    }
  }
  acc.take(z);
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
    std::uint32_t p[4];
    round_to_operand<T>(p, z[n]);
    multiply(acc.out, p, v, down, row + 16 * n);
  }
}

template <class T, int width>
__global__ void __launch_bounds__(ShapeOf<width, false>::threads, ShapeOf<width, false>::blocks)
    attention_tiled_fwd_kernel(AttentionForward args, unsigned tiles) {
  using S = ShapeOf<width, false>;
  if constexpr (has_tensor_cores<T>) {
    clear_tail<T>(args);
    Task task;
    if (!find_task<S>(args, tiles, task)) return;
    const auto rows = [&](int which, const Place& at) {
      return projection_rows(args, static_cast<const T*>(args.qkv), which, at);
    };
    const Rotary rotary{args.cos, args.sin};
    Columns<T, width, S> columns(rows(1, task.start()), rows(2, task.start()), rotary);
    columns.begin(0, task.begin);
    std::uint32_t q[width / 16][4];
    load_operands(q, rows(0, task));
    arrange_operands(q);
    turn_operands(q, rows(0, task), rotary);

    Accumulator<width> acc;
    const auto attend_tile = [&](int buffer, int column) {
#pragma unroll 1
      for (int row = 0; row < S::columns; row += softmax_columns<width>) {
        if (!task.sees_any(column + row, softmax_columns<width>)) continue;
        attend(acc, q, columns.x_tile(buffer), columns.y_tile(buffer), row, task, column + row);
      }
    };
    each_tile<S>(task, attend_tile, columns);
    compute_again(task);  // or the addresses of what follows would live in registers from the start

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = task.position + lane_id() / 4 + 8 * half;
      const float sum = quad_sum(acc.sum[half]);
      scale_row(acc.out, half, 1.0f / sum);
      if (lane_id() % 4 == 0 && row < task.length) {
        args.lse[task.head * args.tokens + task.first_token + row] =
            acc.largest[half] * score_scale<width> + logf(sum);
      }
    }
    store_tile(output_rows(args, static_cast<T*>(args.out), task), acc.out);
  }
}

// ---- backward

// lse, for exp2, and delta of the queries where those are the rows, g and g + 8 of each lane. delta is made here, from
// dout in operands that are not arranged yet.
template <class T, int width, class S>
class RowStatistics {
 public:
  DEVICE RowStatistics(const AttentionBackward& args, const Task& task, const std::uint32_t (&dout)[width / 16][4]) {
    std::uint32_t out[width / 16][4];
    load_operands(out, output_rows(args, static_cast<const T*>(args.out), task));
    const std::int64_t first = task.head * args.tokens + task.first_token;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < width / 8; ++i) {
        const float2 a = unpack2<T>(dout[i / 2][half + i % 2 * 2]), b = unpack2<T>(out[i / 2][half + i % 2 * 2]);
        sum += a.x * b.x + a.y * b.y;
      }
      delta[half] = quad_sum(sum);
      const int row = task.position + lane_id() / 4 + 8 * half;
      if (row >= task.length) continue;
      lse[half] = log2_e * args.lse[first + row];
      if (lane_id() % 4 == 0) args.delta[first + row] = delta[half];
    }
  }

  DEVICE void begin(int, int) {}
  DEVICE void finish(int, int) {}
  DEVICE float2 of(int, int half, int) const { return make_float2(lse[half], delta[half]); }

 private:
  float lse[2] = {}, delta[2];
};

// The same where the queries are the columns: each thread brings one value of a tile to shared memory.
template <class T, int width, class S>
class ColumnStatistics {
  static_assert(2 * S::columns <= S::threads);

 public:
  DEVICE ColumnStatistics(const AttentionBackward& args, const Task& task, const std::uint32_t (&)[width / 16][4])
      : length(task.length) {
    const std::int64_t first = task.head * args.tokens + task.first_token;
    lse = args.lse + first;
    delta = args.delta + first;
  }

  DEVICE void begin(int, int column) {
    const int position = column + static_cast<int>(threadIdx.x) % S::columns;
    waiting = 0.0f;
    if (position < length && threadIdx.x < S::columns) waiting = log2_e * lse[position];
    if (position < length && threadIdx.x >= S::columns) waiting = delta[position];
  }
  DEVICE void finish(int buffer, int) {
    if (threadIdx.x < 2 * S::columns) tile(buffer)[threadIdx.x] = waiting;
  }
  DEVICE float2 of(int buffer, int, int row) const {
    const Shared<float> here = tile(buffer);
    return make_float2(here[row], here[S::columns + row]);
  }

 private:
  const float *lse, *delta;  // from the start of the sequence on
  const int length;
  float waiting = 0.0f;

  DEVICE static Shared<float> tile(int buffer) {
    return dynamic_shared<float>() + (statistics_offset<width, S> / 4 + buffer * 2 * S::columns);
  }
};

// x and y of a warp's 16 rows; y is in shared memory where registers do not suffice.
template <class T, int width>
struct RowOperands {
  std::uint32_t x[width / 16][4], y[width / 16][4];
  Matrix<T, width> y_rows;

  template <bool y_in_registers>
  DEVICE void multiply_y(float (&dp)[2][4], const Matrix<T, width>& columns, int across, int row) const {
    if constexpr (y_in_registers) {
      multiply_transposed(dp, y, columns, across, row);
    } else {
#pragma unroll 4  // more at a time spill on sm_75
      for (int c = 0; c < width; c += 16) {
        std::uint32_t some[1][4];
        y_rows.a(some[0], y_rows.down(0), warp_id() * tile_rows, c);
        multiply_transposed(dp, some, columns, across, row, c);
      }
    }
  }
};

template <int width>
struct Gradients {
  float dx[width / 8][4] = {}, dy[width / 8][4] = {};  // dy: of keys only, where it is dv
};

// 16 rows against 16 columns, which are `column` and on in the sequence and `row` and on in the tiles of buffer.
template <bool keys, class T, int width, class S, class Statistics>
DEVICE void differentiate(Gradients<width>& gradients, const RowOperands<T, width>& rows,
                          const Columns<T, width, S>& columns, const Statistics& statistics, int buffer, int row,
                          const Task& task, int column) {
  const Matrix<T, width> x = columns.x_tile(buffer), y = columns.y_tile(buffer);
  const auto offset = [](int i) { return i / 4 * 8 + lane_id() % 4 * 2 + i % 2; };  // of the column of score i
  int across = x.across(0), down = x.down(0);
  compute_again(across);
  compute_again(down);
  float z[2][4] = {}, dp[2][4] = {};
  multiply_transposed(z, rows.x, x, across, row);
  rows.template multiply_y<S::y_in_registers>(dp, y, across, row);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 query = statistics.of(buffer, i / 2 % 2, row + offset(i));  // lse, delta
    float& p = z[i / 4][i % 4];
    p = exp2_approx(p * (log2_e * score_scale<width>) - query.x);
    dp[i / 4][i % 4] -= query.y;
  }
  if (!task.sees_all(column, tile_rows)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!task.sees(i / 2 % 2, column + offset(i))) z[i / 4][i % 4] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) dp[i / 4][i % 4] *= z[i / 4][i % 4];  // dz
  std::uint32_t operand[4];
  if constexpr (keys) {
    round_to_operand<T>(operand, z);
    multiply(gradients.dy, operand, y, down, row);
  }
  round_to_operand<T>(operand, dp);
  multiply(gradients.dx, operand, x, down, row);
}

template <class T, int width, bool keys>
__global__ void __launch_bounds__(ShapeOf<width, keys>::threads, ShapeOf<width, keys>::blocks)
    attention_tiled_bwd_kernel(AttentionBackward args, unsigned tiles) {
  using S = ShapeOf<width, keys>;
  using Statistics = std::conditional_t<keys, ColumnStatistics<T, width, S>, RowStatistics<T, width, S>>;
  if constexpr (has_tensor_cores<T>) {
    if (!keys) clear_tail<T>(args);
    Task task;
    if (!find_task<S>(args, tiles, task)) return;
    const T* qkv = static_cast<const T*>(args.qkv);
    const auto x = [&](bool of_keys, const Place& at) { return projection_rows(args, qkv, of_keys ? 1 : 0, at); };
    const auto y = [&](bool of_keys, const Place& at) {
      return of_keys ? projection_rows(args, qkv, 2, at) : output_rows(args, static_cast<const T*>(args.dout), at);
    };
    const Rotary rotary{args.cos, args.sin};
    RowOperands<T, width> rows;
    rows.y_rows = {dynamic_shared<T>() + y_offset<width, S> / 2};
    if (!S::y_in_registers) load_tile(rows.y_rows, warp_id() * tile_rows, y(keys, task));  // there with the first tile
    Columns<T, width, S> columns(x(!keys, task.start()), y(!keys, task.start()), rotary);
    columns.begin(0, task.begin);
    load_operands(rows.x, x(keys, task));
    if (S::y_in_registers) load_operands(rows.y, y(keys, task));
    Statistics statistics(args, task, rows.y);
    statistics.begin(0, task.begin);
    arrange_operands(rows.x);
    if (S::y_in_registers) arrange_operands(rows.y);
    turn_operands(rows.x, x(keys, task), rotary);

    Gradients<width> gradients;
    const auto differentiate_tile = [&](int buffer, int column) {
#pragma unroll 1
      for (int row = 0; row < S::columns; row += tile_rows) {
        if (!task.sees_any(column + row, tile_rows)) continue;
        differentiate<keys>(gradients, rows, columns, statistics, buffer, row, task, column + row);
      }
    };
    each_tile<S>(task, differentiate_tile, columns, statistics);
    compute_again(task);  // or the addresses of what follows would live in registers from the start

    T* dqkv = static_cast<T*>(args.dqkv);
    const Rows<T> dx = projection_rows(args, dqkv, keys ? 1 : 0, task);
    for (int half = 0; half < 2; ++half) scale_row(gradients.dx, half, score_scale<width>);
    turn_back(gradients.dx, dx, rotary);
    store_tile(dx, gradients.dx);
    if (keys) store_tile(projection_rows(args, dqkv, 2, task), gradients.dy);
  }
}

// ---- launch

template <int width, bool keys, bool sm80, class Kernel, class Args>
void launch_shape(const char* name, Kernel kernel, Cuda device, const Args& args) {
  using S = ShapeOf<width, keys, sm80>;
  constexpr int available = sm80 ? 100 << 10 : 64 << 10, reserved = sm80 ? 1 << 10 : 0;  // of sm_86 and sm_75
  static_assert(S::blocks * (shared_bytes<width, S> + reserved) <= available, "as many as registers allow");
  const std::int64_t tiles = ceil_div(args.max_seqlen, S::rows);
  const std::int64_t blocks = tiles * (args.sequences > 0 ? args.sequences : 1);  // one at least, for the tail
  launch(name, kernel, device, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(args.heads)), S::threads,
         shared_bytes<width, S>, args, static_cast<unsigned>(tiles));
}

template <int width, bool keys, class Kernel, class Args>
void launch_rows(const char* name, Kernel kernel, Cuda device, const Args& args) {
  const bool sm80 = takes_sm80_path("attention", kernel, args.dtype);
  if (sm80) return launch_shape<width, keys, true>(name, kernel, device, args);
  launch_shape<width, keys, false>(name, kernel, device, args);
}

}  // namespace

void attention_tiled_fwd(Cuda device, const AttentionForward& args) {
  with_half_type("attention", args.dtype, [&](auto* stored) {
    with_head_width(args.head_width, [&](auto head_width) {
      using T = std::remove_pointer_t<decltype(stored)>;
      constexpr int width = decltype(head_width)::value;
      launch_rows<width, false>("attention_tiled_fwd", attention_tiled_fwd_kernel<T, width>, device, args);
    });
  });
}

void attention_tiled_bwd(Cuda device, const AttentionBackward& args) {
  with_half_type("attention", args.dtype, [&](auto* stored) {
    with_head_width(args.head_width, [&](auto head_width) {
      using T = std::remove_pointer_t<decltype(stored)>;
      constexpr int width = decltype(head_width)::value;
      launch_rows<width, false>("attention_tiled_dq", attention_tiled_bwd_kernel<T, width, false>, device, args);
      launch_rows<width, true>("attention_tiled_dkv", attention_tiled_bwd_kernel<T, width, true>, device, args);
    });
  });
}

}  // namespace cramfast

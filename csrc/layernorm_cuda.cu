#include "layernorm.h"

#include "device_code.h"

// A row lives in the registers of one warp (width <= 1024) or of a block of eight (up to layernorm_max_width), in
// pieces of `vec` neighbouring values: piece p of thread t is number p * threads + t. vec is one 16-byte access, or a
// single value for a width or address that 16 bytes do not divide.

namespace cramfast {
namespace {

constexpr int forward_warps = 4;    // rows at a time in a block, when a warp takes a row
constexpr int backward_warps = 8;   // more warps share one partial sum of dw and db
constexpr int sum_columns = 32, sum_slices = 8;

// The threads that share a row: one warp, or the whole block.
template <int row_warps>
struct Team {
  static constexpr int threads = 32 * row_warps;
  int rank, first_row, rows_at_a_time;

  DEVICE Team() {
    const int block_rows = blockDim.x / threads;
    rank = threadIdx.x % threads;
    first_row = blockIdx.x * block_rows + threadIdx.x / threads;
    rows_at_a_time = gridDim.x * block_rows;
  }

  // Sum over the team; `scratch` holds one float for each warp and is free again when all threads have returned.
  DEVICE float sum(float value, Shared<float> scratch) const {
    value = warp_sum(value);
    if constexpr (row_warps > 1) {
      __syncthreads();  // the last sum may still be being read
      if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
      __syncthreads();
      value = 0.0f;
#pragma unroll
      for (int warp = 0; warp < row_warps; ++warp) value += scratch[warp];
    }
    return value;
  }
};

template <class T, int vec, int pieces, int row_warps>
__global__ void __launch_bounds__(row_warps == 1 ? 32 * forward_warps : 32 * row_warps)
    layernorm_fwd_kernel(LayerNormForward args) {
  SHARED(float, scratch, row_warps);
  const Team<row_warps> team;
  const int D = static_cast<int>(args.width);
  const std::int64_t row = team.first_row;
  if (row >= args.rows) return;  // the same for all threads of a team
  const std::int64_t offset = row * D;
  const T* x = static_cast<const T*>(args.x) + offset;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + offset : nullptr;
  T* stream = static_cast<T*>(args.stream) + offset;

  float s[pieces][vec], sum = 0.0f;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    const int d = (p * team.threads + team.rank) * vec;
    Pack<T, vec> in{}, add{};
    if (d < D) {
      in = load<vec>(x + d);
      if (residual) add = load<vec>(residual + d);
    }
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      // Without a residual `add` is zero; the sum must be rounded as it is stored before the statistics see it.
      if (residual) in.value[i] = narrow<T>(widen(in.value[i]) + widen(add.value[i]));
      s[p][i] = widen(in.value[i]);
      sum += s[p][i];  // zero beyond the row
    }
    if (residual && d < D) store<vec>(stream + d, in);
  }
  const float mean = team.sum(sum, scratch) / static_cast<float>(D);
  float square = 0.0f;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    if ((p * team.threads + team.rank) * vec >= D) continue;
#pragma unroll
    for (int i = 0; i < vec; ++i) square += (s[p][i] - mean) * (s[p][i] - mean);
  }
  const float rstd = 1.0f / sqrtf(team.sum(square, scratch) / static_cast<float>(D) + args.eps);
  if (team.rank == 0) {
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
  if (!args.y) return;
  T* y = static_cast<T*>(args.y) + offset;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    const int d = (p * team.threads + team.rank) * vec;
    if (d >= D) continue;
    const Pack<float, vec> weight = load_floats<vec>(args.weight + d);
    Pack<float, vec> bias{};
    if (args.bias) bias = load_floats<vec>(args.bias + d);
    Pack<T, vec> out;
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      out.value[i] = narrow<T>((s[p][i] - mean) * rstd * weight.value[i] + bias.value[i]);
    }
    store<vec>(y + d, out);
  }
}

// One row of the backward pass: writes dx, and adds this thread's columns to dw and db.
template <class T, int vec, int pieces, int row_warps>
DEVICE void backward_row(const LayerNormBackward& args, const Team<row_warps>& team, std::int64_t row,
                         Shared<float> scratch, float (&dweight)[pieces][vec], float (&dbias)[pieces][vec]) {
  const int D = static_cast<int>(args.width);
  const std::int64_t offset = row * D;
  const T* dy = static_cast<const T*>(args.dy) + offset;
  const T* stream = static_cast<const T*>(args.stream) + offset;
  const T* dstream = args.dstream ? static_cast<const T*>(args.dstream) + offset : nullptr;
  T* dx = static_cast<T*>(args.dx) + offset;
  const float mean = args.mean[row], rstd = args.rstd[row];

  // The row stays as it is stored and is widened twice: half the registers, which decides how many warps run.
  Pack<T, vec> up[pieces], in[pieces];
  float c1 = 0.0f, c2 = 0.0f;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    const int d = (p * team.threads + team.rank) * vec;
    if (d >= D) continue;
    up[p] = load<vec>(dy + d);
    in[p] = load<vec>(stream + d);
    const Pack<float, vec> weight = load_floats<vec>(args.weight + d);
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      const float upstream = widen(up[p].value[i]), xhat = (widen(in[p].value[i]) - mean) * rstd;
      dweight[p][i] += upstream * xhat;
      dbias[p][i] += upstream;
      c1 += upstream * weight.value[i] * xhat;
      c2 += upstream * weight.value[i];
    }
  }
  c1 = team.sum(c1, scratch) / static_cast<float>(D);
  c2 = team.sum(c2, scratch) / static_cast<float>(D);
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    const int d = (p * team.threads + team.rank) * vec;
    if (d >= D) continue;
    compute_again(in[p]);
    compute_again(up[p]);
    const Pack<float, vec> weight = load_floats<vec>(args.weight + d);
    Pack<T, vec> add{}, out;
    if (dstream) add = load<vec>(dstream + d);
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      const float xhat = (widen(in[p].value[i]) - mean) * rstd;
      const float inner = rstd * (widen(up[p].value[i]) * weight.value[i] - c2 - xhat * c1);
      out.value[i] = narrow<T>(dstream ? inner + widen(add.value[i]) : inner);
    }
    store<vec>(dx + d, out);
  }
}

// Adds up the columns that the teams of a block hold, team after team, into one row of `partial`.
template <int vec, int pieces, int row_warps>
DEVICE void write_partial(const Team<row_warps>& team, float (&sums)[pieces][vec], float* partial, int D) {
  constexpr int width = pieces * vec * 32 * row_warps;
  if constexpr (row_warps > 1) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      const int d = (p * team.threads + team.rank) * vec;
      if (d < D) store_floats<vec>(partial + d, sums[p]);
    }
  } else {
    // One row of shared memory that each warp adds to in its turn: an eighth of what a row for each warp would take.
    SHARED(float, total, width);
    for (unsigned turn = 0; turn < backward_warps; ++turn) {
      if (threadIdx.x / 32 == turn) {
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
#pragma unroll
          for (int i = 0; i < vec; ++i) {
            // Lanes take neighbouring words here, so that no two of them meet in one bank.
            const int slot = (p * vec + i) * 32 + team.rank;
            const float before = turn == 0 ? 0.0f : static_cast<float>(total[slot]);
            total[slot] = before + sums[p][i];
          }
        }
      }
      __syncthreads();
    }
    for (int slot = threadIdx.x; slot < width; slot += 32 * backward_warps) {
      const int p = slot / (32 * vec), i = slot / 32 % vec, lane = slot % 32;
      const int d = (p * 32 + lane) * vec + i;
      if (d < D) partial[d] = total[slot];
    }
    __syncthreads();  // `total` is used once more, for db
  }
}

template <class T, int vec, int pieces, int row_warps>
__global__ void __launch_bounds__(32 * backward_warps, row_warps == 1 && pieces * vec <= 24 ? 2 : 1)
    layernorm_bwd_kernel(LayerNormBackward args) {
  SHARED(float, scratch, row_warps);
  const Team<row_warps> team;
  float dweight[pieces][vec] = {}, dbias[pieces][vec] = {};
  for (std::int64_t row = team.first_row; row < args.rows; row += team.rows_at_a_time) {
    backward_row<T>(args, team, row, scratch, dweight, dbias);
  }
  const int D = static_cast<int>(args.width);
  float* partial = args.partial + static_cast<std::int64_t>(blockIdx.x) * 2 * D;
  write_partial<vec, pieces>(team, dweight, partial, D);
  write_partial<vec, pieces>(team, dbias, partial + D, D);
}

// dw and db: the partial rows of 32 columns in eight slices, each added up in order, then the slices in order.
__global__ void __launch_bounds__(sum_columns* sum_slices)
    layernorm_sum_kernel(const float* partial, std::int64_t partials, int D, float* dweight, float* dbias) {
  SHARED(float, sums, sum_slices * sum_columns);
  const int lane = threadIdx.x % sum_columns, slice = threadIdx.x / sum_columns;
  const int column = blockIdx.x * sum_columns + lane;
  float sum = 0.0f;
  if (column < 2 * D) {
    for (std::int64_t row = slice; row < partials; row += sum_slices) sum += partial[row * 2 * D + column];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || column >= 2 * D) return;
  for (int other = 1; other < sum_slices; ++other) sum += sums[other * sum_columns + lane];
  if (column < D) {
    dweight[column] = sum;
  } else {
    dbias[column - D] = sum;
  }
}

template <class T, int vec, int pieces, int row_warps>
void launch_forward(Cuda device, const LayerNormForward& args) {
  constexpr int rows = row_warps == 1 ? forward_warps : 1, threads = 32 * row_warps * rows;
  launch("layernorm_fwd", layernorm_fwd_kernel<T, vec, pieces, row_warps>, device,
         static_cast<unsigned>(ceil_div(args.rows, rows)), threads, 0, args);
}

template <class T, int vec, int pieces, int row_warps>
void launch_backward(Cuda device, const LayerNormBackward& args) {
  const std::int64_t partials = layernorm_partials(device, args.rows);
  launch("layernorm_bwd", layernorm_bwd_kernel<T, vec, pieces, row_warps>, device, static_cast<unsigned>(partials),
         32 * backward_warps, 0, args);
  const int D = static_cast<int>(args.width);
  launch("layernorm_sum", layernorm_sum_kernel, device, static_cast<unsigned>(ceil_div(2 * D, sum_columns)),
         sum_columns * sum_slices, 0, static_cast<const float*>(args.partial), partials, D, args.dweight, args.dbias);
}

template <class T, int vec, int pieces, int row_warps>
void launch_kernel(Cuda device, const LayerNormForward& args) {
  launch_forward<T, vec, pieces, row_warps>(device, args);
}

template <class T, int vec, int pieces, int row_warps>
void launch_kernel(Cuda device, const LayerNormBackward& args) {
  launch_backward<T, vec, pieces, row_warps>(device, args);
}

// Picks how many values a thread holds: 8, 16, 24 or 32 of a warp's row, 32 of a block's.
template <class T, class Args>
void launch_for_width(Cuda device, const Args& args) {
  constexpr int vec = 16 / sizeof(T), piece = 8 / vec;
  if (args.width % vec != 0) return launch_kernel<T, 1, 32, 8>(device, args);
  if (args.width <= 256) return launch_kernel<T, vec, 1 * piece, 1>(device, args);
  if (args.width <= 512) return launch_kernel<T, vec, 2 * piece, 1>(device, args);
  if (args.width <= 768) return launch_kernel<T, vec, 3 * piece, 1>(device, args);
  if (args.width <= 1024) return launch_kernel<T, vec, 4 * piece, 1>(device, args);
  launch_kernel<T, vec, 4 * piece, 8>(device, args);
}

}  // namespace

std::int64_t layernorm_partials(Cuda, std::int64_t rows) {
  const std::int64_t most = ceil_div(rows, backward_warps), blocks = 2 * multiprocessors();
  return most < blocks ? most : blocks;
}

void layernorm_fwd(Cuda device, const LayerNormForward& args) {
  with_stored_type(args.dtype, [&](auto* stored) {
    launch_for_width<std::remove_pointer_t<decltype(stored)>>(device, args);
  });
}

void layernorm_bwd(Cuda device, const LayerNormBackward& args) {
  with_stored_type(args.dtype, [&](auto* stored) {
    launch_for_width<std::remove_pointer_t<decltype(stored)>>(device, args);
  });
}

}  // namespace cramfast

#include "layernorm.h"

#include <algorithm>

#include "simd.h"
#include "tile_matmul.h"

namespace cramfast::CRAMFAST_ISA {
namespace {

// Partial sums over a row: in the forward pass several vectors at a time, in the backward pass one, because more would
// not stay in registers beside the rest.
constexpr int forward_lanes = 64, backward_lanes = lanes < 8 ? 8 : lanes;
constexpr std::int64_t forward_block_rows = 16;  // enough rows to hide the cost of handing out a piece of work

template <class T>
void forward_row(const LayerNormForward& args, std::int64_t row) {
  const std::int64_t D = args.width, offset = row * D;
  alignas(64) float s[layernorm_max_width];
  const T* x = static_cast<const T*>(args.x) + offset;
  load_row(x, s, D);
  if (args.residual) {
    const T* residual = static_cast<const T*>(args.residual) + offset;
    T* stream = static_cast<T*>(args.stream) + offset;
#pragma omp simd
    for (std::int64_t d = 0; d < D; ++d) {
      stream[d] = narrow<T>(s[d] + widen(residual[d]));
      s[d] = widen(stream[d]);
    }
  }
  LaneSum<forward_lanes> sum, square;
  for_lanes<forward_lanes>(D, [&](std::int64_t d, int lane) { sum.of[lane] += s[d]; });
  const float mean = sum.total() / static_cast<float>(D);
  for_lanes<forward_lanes>(D, [&](std::int64_t d, int lane) { square.of[lane] += (s[d] - mean) * (s[d] - mean); });
  const float rstd = 1.0f / std::sqrt(square.total() / static_cast<float>(D) + args.eps);
  args.mean[row] = mean;
  args.rstd[row] = rstd;
  T* y = static_cast<T*>(args.y) + offset;
  const float* weight = args.weight;
  const float* bias = args.bias;
  if (bias) {
#pragma omp simd
    for (std::int64_t d = 0; d < D; ++d) y[d] = narrow<T>((s[d] - mean) * rstd * weight[d] + bias[d]);
  } else {
#pragma omp simd
    for (std::int64_t d = 0; d < D; ++d) y[d] = narrow<T>((s[d] - mean) * rstd * weight[d]);
  }
}

template <class T>
void backward_row(const LayerNormBackward& args, std::int64_t row, float* __restrict dweight, float* __restrict dbias) {
  const std::int64_t D = args.width, offset = row * D;
  alignas(64) float dy[layernorm_max_width], xhat[layernorm_max_width];
  load_row(static_cast<const T*>(args.dy) + offset, dy, D);
  load_row(static_cast<const T*>(args.stream) + offset, xhat, D);
  const float mean = args.mean[row], rstd = args.rstd[row];
  const float* weight = args.weight;
  LaneSum<backward_lanes> along_xhat, along_one;
  for_lanes<backward_lanes>(D, [&](std::int64_t d, int lane) {
    xhat[d] = (xhat[d] - mean) * rstd;
    dweight[d] += dy[d] * xhat[d];
    dbias[d] += dy[d];
    dy[d] *= weight[d];
    along_xhat.of[lane] += dy[d] * xhat[d];
    along_one.of[lane] += dy[d];
  });
  const float c1 = along_xhat.total() / static_cast<float>(D), c2 = along_one.total() / static_cast<float>(D);
  T* dx = static_cast<T*>(args.dx) + offset;
  if (args.dstream) {
    const T* dstream = static_cast<const T*>(args.dstream) + offset;
#pragma omp simd
    for (std::int64_t d = 0; d < D; ++d) {
      dx[d] = narrow<T>(rstd * (dy[d] - c2 - xhat[d] * c1) + widen(dstream[d]));
    }
  } else {
#pragma omp simd
    for (std::int64_t d = 0; d < D; ++d) dx[d] = narrow<T>(rstd * (dy[d] - c2 - xhat[d] * c1));
  }
}

void sum_partials(Cpu device, const LayerNormBackward& args, std::int64_t blocks) {
  const std::int64_t D = args.width;
  parallel_for(device, 2, [&](std::int64_t which) {
    float* out = which == 0 ? args.dweight : args.dbias;
    std::fill_n(out, D, 0.0f);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const float* partial = args.partial + (2 * block + which) * D;
#pragma omp simd
      for (std::int64_t d = 0; d < D; ++d) out[d] += partial[d];
    }
  });
}

}  // namespace

void layernorm_fwd(Cpu device, const LayerNormForward& args) {
  with_dtype(args.dtype, [&](auto* stored) {
    using T = std::remove_pointer_t<decltype(stored)>;
    parallel_for(device, ceil_div(args.rows, forward_block_rows), [&](std::int64_t block) {
      const std::int64_t end = std::min(args.rows, (block + 1) * forward_block_rows);
      for (std::int64_t row = block * forward_block_rows; row < end; ++row) forward_row<T>(args, row);
    });
  });
}

void layernorm_bwd(Cpu device, const LayerNormBackward& args) {
  const std::int64_t blocks = ceil_div(args.rows, layernorm_block_rows);
  with_dtype(args.dtype, [&](auto* stored) {
    using T = std::remove_pointer_t<decltype(stored)>;
    parallel_for(device, blocks, [&](std::int64_t block) {
      float* dweight = args.partial + 2 * block * args.width;
      float* dbias = dweight + args.width;
      std::fill_n(dweight, 2 * args.width, 0.0f);
      const std::int64_t end = std::min(args.rows, (block + 1) * layernorm_block_rows);
      for (std::int64_t row = block * layernorm_block_rows; row < end; ++row) {
        backward_row<T>(args, row, dweight, dbias);
      }
    });
  });
  sum_partials(device, args, blocks);
}

}  // namespace cramfast::CRAMFAST_ISA

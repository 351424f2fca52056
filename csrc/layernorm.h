// (Residual add +) LayerNorm.
//
//   s = round(x + r)            written as the new residual stream; the statistics see the rounded value
//   mean = sum_d s / D,  rstd = 1 / sqrt(sum_d (s - mean)^2 / D + eps)          two passes over a row in cache
//   y = (s - mean) rstd w + b
//   ds = rstd (dy w - c2 - xhat c1) + dstream,   xhat = (s - mean) rstd,
//        c1 = sum_d dy w xhat / D,  c2 = sum_d dy w / D
//   dw = sum_n dy xhat,  db = sum_n dy          two stages: blocks of rows, then blocks in order; no atomics
//
// Accumulation in float32. Bound by memory: 8 bytes a value forward and backward in half precision (x, r -> s, y).
// Source: Ba et al., arXiv:1607.06450; two-pass statistics after Chan, Golub, LeVeque (1983).
#pragma once

#include "device.h"

namespace cramfast {

constexpr std::int64_t layernorm_block_rows = 128;  // rows summed in one partial of dw and db
constexpr std::int64_t layernorm_max_width = 8192;  // a row's float buffer lives on the stack

struct LayerNormForward {
  const void* x;         // (rows, width)
  const void* residual;  // (rows, width) or null
  const float* weight;   // (width,)
  const float* bias;     // (width,) or null
  void* y;               // (rows, width); on a GPU null too: stream and statistics alone
  void* stream;          // (rows, width), or null when residual is null: then x is the stream
  float* mean;           // (rows,)
  float* rstd;           // (rows,)
  std::int64_t rows, width;
  float eps;
  DType dtype;
};

struct LayerNormBackward {
  const void* dy;        // (rows, width)
  const void* dstream;   // (rows, width) or null
  const void* stream;    // (rows, width)
  const float* mean;     // (rows,)
  const float* rstd;     // (rows,)
  const float* weight;   // (width,)
  void* dx;              // (rows, width); the gradient of the residual too
  float* partial;        // (layernorm_partials(...), 2, width) scratch
  float* dweight;        // (width,)
  float* dbias;          // (width,)
  std::int64_t rows, width;
  DType dtype;
};

// Rows of `partial`. On a GPU as many as there are blocks that walk over the rows: two for each multiprocessor.
inline std::int64_t layernorm_partials(Cpu, std::int64_t rows) {
  return (rows + layernorm_block_rows - 1) / layernorm_block_rows;
}
std::int64_t layernorm_partials(Cuda device, std::int64_t rows);

void layernorm_fwd(Cpu device, const LayerNormForward& args);
void layernorm_fwd(Cuda device, const LayerNormForward& args);
void layernorm_bwd(Cpu device, const LayerNormBackward& args);
void layernorm_bwd(Cuda device, const LayerNormBackward& args);

}  // namespace cramfast

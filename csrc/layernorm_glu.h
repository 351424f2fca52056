// (Residual add +) LayerNorm, matmul and gate in one: h = act(a) g of [a | g] = LayerNorm(s) W^T, forward only.
//
//   s, mean, rstd as in layernorm.h
//   W'_jd = round(W_jd gamma_d),  u_j = sum_d W'_jd,  c_j = sum_d W_jd beta_d
//   p_nj = round(rstd_n (sum_d s_nd W'_jd - mean_n u_j) + c_j)    the pre-activations, as the backward pass reads them
//   h_nf = act(p_nf) p_n,F+f
//
// The matmul runs on the raw rows: normalising is linear in the row but for two numbers, which the epilogue puts right.
// u sums the rounded W', so that what the mean contributed cancels exactly, up to float32 sums. Three launches: the
// statistics (layernorm_fwd without y), the folded weight, and the matmul on tensor cores with float32 sums. Bound by
// the tensor cores; next to a matmul and two passes it spares 2 bytes a value of s and 4 bytes a value of h (half
// precision). docs/decisions/0012 has the reasons and what is expected of it. Never run on a GPU.
#pragma once

#include "device.h"
#include "glu.h"

namespace cramfast {

struct LayerNormGluForward {
  const void* x;             // (rows, width)
  const void* residual;      // (rows, width) or null
  const float* norm_weight;  // (width,)
  const float* norm_bias;    // (width,) or null
  const void* weight;        // (2 features, width)
  void* h;                   // (rows, features)
  void* stream;              // (rows, width), or null when residual is null: then x is the stream
  float* mean;               // (rows,)
  float* rstd;               // (rows,)
  void* gates;               // (rows, 2 features)
  void* folded;              // (layernorm_glu_folded(...), width) scratch: W' in the order of the kernel
  float* correction;         // (2, 2 features) scratch: u, c
  std::int64_t rows, width, features;  // width and features are multiples of 8
  Activation activation;
  float eps;
  DType dtype;  // float16, or bfloat16 from sm_80 on
};

// Rows of `folded`: both halves of the weight, each filled up with zero rows to a multiple of 32.
std::int64_t layernorm_glu_folded(Cuda device, std::int64_t features);

// Throws std::invalid_argument for a dtype that the card's tensor cores do not multiply.
void layernorm_glu_fwd(Cuda device, const LayerNormGluForward& args);

}  // namespace cramfast

// Softmax cross-entropy over a chunk of rows of logits; the matmuls around it stay with torch
// (kernels/cross_entropy.py), which hands over one chunk of rows at a time so that all logits never exist together.
//
//   lse = log sum_v exp(z_v),  loss = lse - z_t + z_loss lse^2              0 for a row whose target t is negative
//   dz_v = (exp(z_v - lse) (1 + 2 z_loss lse) - [v = t]) gain               written over z; all zero without a target
//
// Sums in float32 over one row in cache. Bound by memory: one read and one write of the chunk. The penalty on lse, the
// logarithm of the softmax's normaliser Z, costs nothing, as lse is there. Source: Chowdhery et al., arXiv:2204.02311.
#pragma once

#include "device.h"

namespace cramfast {

struct CrossEntropy {
  void* logits;                // (rows, vocabulary); becomes the gradient when write_gradient is set
  const std::int64_t* target;  // (rows,), negative: row ignored; vocabulary or more ends the launch on a GPU
  float* loss;                 // (rows,)
  std::int64_t rows, vocabulary;
  float z_loss;  // weight of lse^2; 0 for none
  float gain;    // factor of the gradient as stored; 1 / rows would make float16 ones subnormal (cross_entropy.py)
  bool write_gradient;
  DType dtype;
};

void cross_entropy(Cpu device, const CrossEntropy& args);
void cross_entropy(Cuda device, const CrossEntropy& args);

}  // namespace cramfast

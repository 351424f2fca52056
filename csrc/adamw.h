// Clip by global norm, remove the loss scale, AdamW, and refresh the half-precision weights, over one flat buffer.
//
//   norm = inverse_scale ||grad||                                     first pass, two stages, no atomics
//   g = grad inverse_scale min(1, max_norm / (norm + 1e-6))           max_norm = 0: no clipping
//   m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2          step += 1 before the bias corrections
//   p = p (1 - rate decay) - rate / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps),  rate = lr segment_lr
//   half = round(p)
//
// A non-finite norm changes nothing but scalars[3] and scalars[4]. Bound by memory: 34 bytes a parameter (4 for the
// norm, 28 for p, g, m, v, 2 for the copy). Source: Loshchilov and Hutter, arXiv:1711.05101.
#pragma once

#include "device.h"

namespace cramfast {

constexpr std::int64_t adamw_chunk = 16384;  // elements: 256 KiB of p, g, m, v, which fits the L2 of any target

struct AdamW {
  float* master;                    // (size,)
  const float* grad;                // (size,)
  float* exp_avg;                   // (size,)
  float* exp_avg_sq;                // (size,)
  void* half;                       // (half_size,), or null
  const std::int64_t* segment_end;  // (segments,), ascending, the last one is size
  const float* segment_decay;       // (segments,), weight decay
  const float* segment_lr;          // (segments,), factor on lr
  float* scalars;                   // (5,): lr, step, inverse_scale; out: step, grad norm, 1 if not finite
  double* partial;                  // (adamw_partials(...),) scratch
  std::int64_t size, half_size, segments;
  double beta1, beta2, eps, max_norm;  // double: 1 - beta would lose half its digits in float32
  DType half_dtype;                    // bfloat16; float16 too on a GPU
};

inline std::int64_t adamw_partials(Cpu, std::int64_t size) { return (size + adamw_chunk - 1) / adamw_chunk; }
std::int64_t adamw_partials(Cuda device, std::int64_t size);

void adamw(Cpu device, const AdamW& args);
void adamw(Cuda device, const AdamW& args);

}  // namespace cramfast

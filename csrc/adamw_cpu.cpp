#include "adamw.h"

#include <algorithm>

#include "simd.h"

namespace cramfast::CRAMFAST_ISA {
namespace {

// The same numbers for every element of a segment.
struct Step {
  float grad_factor, keep, one_minus_beta1, beta2, one_minus_beta2, rate, inverse_root, eps;
};

double gradient_norm(Cpu device, const AdamW& args) {
  const std::int64_t chunks = ceil_div(args.size, adamw_chunk);
  parallel_for(device, chunks, [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * adamw_chunk, n = std::min(adamw_chunk, args.size - begin);
    const float* grad = args.grad + begin;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(grad[i]) * static_cast<double>(grad[i]);
    args.partial[chunk] = sum;
  });
  double sum = 0.0;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) sum += args.partial[chunk];
  return std::sqrt(sum) * static_cast<double>(args.scalars[2]);
}

void update(const AdamW& args, std::int64_t begin, std::int64_t end, const Step& step) {
  float* __restrict master = args.master;
  float* __restrict exp_avg = args.exp_avg;
  float* __restrict exp_avg_sq = args.exp_avg_sq;
  const float* __restrict grad = args.grad;
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    const float g = grad[i] * step.grad_factor;
    const float m = exp_avg[i] + step.one_minus_beta1 * (g - exp_avg[i]);
    const float v = step.beta2 * exp_avg_sq[i] + step.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    master[i] = master[i] * step.keep - step.rate * m / (std::sqrt(v) * step.inverse_root + step.eps);
  }
}

}  // namespace

void adamw(Cpu device, const AdamW& args) {
  const double norm = gradient_norm(device, args);
  args.scalars[3] = static_cast<float>(norm);
  const bool finite = std::isfinite(norm);
  args.scalars[4] = finite ? 0.0f : 1.0f;
  if (!finite) return;

  const double lr = args.scalars[0], count = static_cast<double>(args.scalars[1]) + 1.0;
  args.scalars[1] = static_cast<float>(count);
  const double clip = args.max_norm > 0.0 ? std::min(1.0, args.max_norm / (norm + 1e-6)) : 1.0;
  Step common{};
  common.grad_factor = static_cast<float>(clip * static_cast<double>(args.scalars[2]));
  common.one_minus_beta1 = static_cast<float>(1.0 - args.beta1);
  common.beta2 = static_cast<float>(args.beta2);
  common.one_minus_beta2 = static_cast<float>(1.0 - args.beta2);
  common.inverse_root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(args.beta2, count)));
  common.eps = static_cast<float>(args.eps);
  const double correction1 = 1.0 - std::pow(args.beta1, count);

  parallel_for(device, ceil_div(args.size, adamw_chunk), [&](std::int64_t chunk) {
    std::int64_t begin = chunk * adamw_chunk;
    const std::int64_t end = std::min(args.size, begin + adamw_chunk);
    const std::int64_t* segment = std::upper_bound(args.segment_end, args.segment_end + args.segments, begin);
    for (std::int64_t i = begin; i < end; ++segment) {
      const std::int64_t stop = std::min(end, *segment);
      Step step = common;
      const std::int64_t index = segment - args.segment_end;
      const double rate = lr * static_cast<double>(args.segment_lr[index]);
      step.keep = static_cast<float>(1.0 - rate * static_cast<double>(args.segment_decay[index]));
      step.rate = static_cast<float>(rate / correction1);
      update(args, i, stop, step);
      i = stop;
    }
    if (args.half && begin < args.half_size) {
      const std::int64_t n = std::min(end, args.half_size) - begin;
      store_row(args.master + begin, static_cast<bf16*>(args.half) + begin, n);
    }
  });
}

}  // namespace cramfast::CRAMFAST_ISA

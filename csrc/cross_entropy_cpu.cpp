#include "cross_entropy.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace cramfast::CRAMFAST_ISA {
namespace {

constexpr int lanes = 64;  // independent partial sums: keeps float32 sums over 32,768 terms accurate

template <class T>
float row_log_sum_exp(const T* __restrict z, std::int64_t V) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (std::int64_t v = 0; v < V; ++v) {
    const float value = widen(z[v]);
    largest = value > largest ? value : largest;
  }
  LaneSum<lanes> sum;
  for_lanes<lanes>(V, [&](std::int64_t v, int lane) { sum.of[lane] += exp_(widen(z[v]) - largest); });
  return largest + std::log(sum.total());
}

template <class T>
void one_row(const CrossEntropy& args, std::int64_t row) {
  const std::int64_t V = args.vocabulary, target = args.target[row];
  T* __restrict z = static_cast<T*>(args.logits) + row * V;
  if (target < 0) {
    args.loss[row] = 0.0f;
    if (args.write_gradient) std::memset(z, 0, V * sizeof(T));
    return;
  }
  const float lse = row_log_sum_exp(z, V), at_target = widen(z[target]);
  args.loss[row] = lse - at_target + args.z_loss * lse * lse;
  if (!args.write_gradient) return;
  const float slope = 1.0f + 2.0f * args.z_loss * lse, factor = slope * args.gain;
#pragma omp simd
  for (std::int64_t v = 0; v < V; ++v) z[v] = narrow<T>(exp_(widen(z[v]) - lse) * factor);
  z[target] = narrow<T>((exp_(at_target - lse) * slope - 1.0f) * args.gain);
}

}  // namespace

void cross_entropy(Cpu device, const CrossEntropy& args) {
  with_dtype(args.dtype, [&](auto* stored) {
    using T = std::remove_pointer_t<decltype(stored)>;
    parallel_for(device, args.rows, [&](std::int64_t row) { one_row<T>(args, row); });
  });
}

}  // namespace cramfast::CRAMFAST_ISA

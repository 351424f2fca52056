// CPU only: this file and every *_cpu.cpp are compiled once for each instruction set, in a namespace named after it
// (CRAMFAST_ISA), so that no function of one set can be linked into another. Loops are plain and left to the
// compiler's vectoriser; rows of half-precision values are widened into a float buffer that stays in L1.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"

namespace cramfast::CRAMFAST_ISA {

inline float widen(float value) { return value; }

inline float widen(bf16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Round to nearest, ties to even; NaN stays NaN because its payload is made quiet instead of being rounded to infinity.
template <class T>
inline T narrow(float value);

template <>
inline float narrow<float>(float value) {
  return value;
}

template <>
inline bf16 narrow<bf16>(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  return bf16{static_cast<std::uint16_t>(value == value ? rounded : quiet)};
}

template <class T>
inline void load_row(const T* __restrict from, float* __restrict to, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class T>
inline void store_row(const float* __restrict from, T* __restrict to, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = narrow<T>(from[i]);
}

// f(i, lane) for i in [0, n), with lane = i modulo lanes: each lane adds to sums of its own, which do not depend on what
// the compiler vectorises. A single running sum of n terms would lose log2(n) bits where it does not.
template <int lanes, class F>
inline void for_lanes(std::int64_t n, const F& f) {
  std::int64_t begin = 0;
  for (; begin + lanes <= n; begin += lanes) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) f(begin + lane, lane);
  }
  const int left = static_cast<int>(n - begin);
#pragma omp simd
  for (int lane = 0; lane < left; ++lane) f(begin + lane, lane);
}

// A sum that for_lanes fills.
template <int lanes>
struct LaneSum {
  static_assert((lanes & (lanes - 1)) == 0, "halved until one is left");
  alignas(64) float of[lanes] = {};

  float total() {
    for (int half = lanes / 2; half > 0; half /= 2) {
#pragma omp simd
      for (int lane = 0; lane < half; ++lane) of[lane] += of[lane + half];
    }
    return of[0];
  }
};

// exp(x) by x = k ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of degree 6 for exp(r), whose remainder is at
// most r^7 / 7! = 1.2e-7. Gives 0 below -87.3 and exp(88) above 88; NaN propagates.
inline float exp_(float x) {
  constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, magic = 12582912.0f;
  const float bounded = x > 88.0f ? 88.0f : x;
  const float shifted = bounded * log2e + magic;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  const float k = shifted - magic;
  const float r = (bounded - k * ln2_high) - k * ln2_low;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const std::uint32_t scale_bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  return x < -87.3f ? 0.0f : p * scale;
}

// The standard normal distribution function. For u >= 0, ln Phi(-u) is a smooth function: its degree-9 minimax
// polynomial on [0, 6.5], weighted for the absolute error of u Phi(-u), is off by at most 2.3e-9 there
// (fit: weighted Chebyshev least squares against scipy.special.log_ndtr). Beyond 6.5, Phi(-u) < 5e-11 counts as 0.
inline float normal_cdf(float x) {
  const float u = std::fabs(x);
  float q = 3.057017245e-07f;
  q = q * u - 5.933346196e-06f;
  q = q * u + 4.805288991e-05f;
  q = q * u - 1.855108194e-04f;
  q = q * u - 8.985198636e-06f;
  q = q * u + 4.822722901e-03f;
  q = q * u - 3.635455088e-02f;
  q = q * u - 3.183056455e-01f;
  q = q * u - 7.978849118e-01f;
  q = q * u - 6.931471760e-01f;
  const float tail = u > 6.5f ? 0.0f : exp_(q);
  return x < 0.0f ? tail : 1.0f - tail;
}

inline float normal_pdf(float x) { return 0.398942280f * exp_(-0.5f * x * x); }

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// f(i) for i in [0, n), split evenly and in order, so that a result never depends on timing.
template <class F>
inline void parallel_for(Cpu device, std::int64_t n, const F& f) {
#pragma omp parallel for num_threads(device.threads) schedule(static) if (n > 1)
  for (std::int64_t i = 0; i < n; ++i) f(i);
}

// Calls f with a null pointer of the stored type, so that a lambda can be instantiated for it.
template <class F>
inline void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::float32) {
    f(static_cast<float*>(nullptr));
  } else {
    f(static_cast<bf16*>(nullptr));
  }
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace cramfast::CRAMFAST_ISA

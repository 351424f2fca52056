// The part of the CUDA language that the kernels use, for a host compiler. CRAMFAST_EMULATED is the architecture whose
// code path is taken: 750, 860 or 900.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "machine.h"
#include "shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (::cramfast::emulator::running->index)
#define blockIdx (::cramfast::emulator::current.block_index)
#define blockDim (::cramfast::emulator::current.block)
#define gridDim (::cramfast::emulator::current.grid)

using dim3 = cramfast::emulator::Index3;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

namespace cramfast::emulator {

// in[] and out[] of an exchange hold a value of up to 8 bytes, then the argument of the shuffle.
template <class T, class Source>
void move_values(Exchange& e, Source source) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(e.mask >> lane & 1u)) continue;
    const int from = source(lane, static_cast<int>(e.in[lane][2]), static_cast<int>(e.in[lane][3]));
    if (!(e.mask >> from & 1u)) fault("a shuffle reads lane " + std::to_string(from) + ", which the mask leaves out");
    std::memcpy(e.out[lane], e.in[from], sizeof(T));
  }
}

template <class T>
T shuffle(std::uint32_t mask, T value, int argument, int width, Operation operation, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  std::uint32_t in[4] = {0, 0, static_cast<std::uint32_t>(argument), static_cast<std::uint32_t>(width)}, out[2];
  std::memcpy(in, &value, sizeof value);
  exchange(mask, operation, in, 4, out, 2, site);
  std::memcpy(&value, out, sizeof value);
  return value;
}

inline std::uint32_t vote(std::uint32_t mask, bool predicate, Site site) {
  const std::uint32_t in = predicate;
  std::uint32_t out;
  exchange(
      mask,
      [](Exchange& e) {
        std::uint32_t ballot = 0;
        for (int lane = 0; lane < 32; ++lane) ballot |= (e.mask >> lane & 1u & e.in[lane][0]) << lane;
        for (int lane = 0; lane < 32; ++lane) e.out[lane][0] = ballot;
      },
      &in, 1, &out, 1, site);
  return out;
}

}  // namespace cramfast::emulator

using CramfastSite = cramfast::emulator::Site;

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, CramfastSite site = CramfastSite::here()) {
  using namespace cramfast::emulator;
  return shuffle(
      mask, value, other, width,
      [](Exchange& e) {
        move_values<T>(e, [](int lane, int x, int w) { return (lane ^ x) <= (lane | (w - 1)) ? lane ^ x : lane; });
      },
      site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CramfastSite site = CramfastSite::here()) {
  using namespace cramfast::emulator;
  return shuffle(
      mask, value, static_cast<int>(by), width,
      [](Exchange& e) { move_values<T>(e, [](int lane, int d, int w) { return lane % w + d < w ? lane + d : lane; }); },
      site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CramfastSite site = CramfastSite::here()) {
  using namespace cramfast::emulator;
  return shuffle(
      mask, value, static_cast<int>(by), width,
      [](Exchange& e) { move_values<T>(e, [](int lane, int d, int w) { return lane % w >= d ? lane - d : lane; }); },
      site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CramfastSite site = CramfastSite::here()) {
  using namespace cramfast::emulator;
  return shuffle(
      mask, value, from, width,
      [](Exchange& e) { move_values<T>(e, [](int lane, int s, int w) { return lane / w * w + s % w; }); }, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CramfastSite site = CramfastSite::here()) {
  return cramfast::emulator::vote(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, CramfastSite site = CramfastSite::here()) {
  return cramfast::emulator::vote(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CramfastSite site = CramfastSite::here()) {
  return cramfast::emulator::vote(mask, predicate != 0, site) == mask;
}

inline void __syncthreads(CramfastSite site = CramfastSite::here()) { cramfast::emulator::barrier(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CramfastSite site = CramfastSite::here()) {
  using namespace cramfast::emulator;
  if (ignored("syncwarp", site)) return;
  std::uint32_t none = 0, out;
  exchange(
      mask, [](Exchange&) { warp_of(*running).clock = tick(); }, &none, 1, &out, 1, site);
}

inline void __threadfence() {}

// One fiber runs at a time, so plain arithmetic is atomic. The order is not fixed: float sums differ between seeds.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicAdd(cramfast::emulator::Element<T> element, T value) = delete;  // not needed yet, so not recorded either

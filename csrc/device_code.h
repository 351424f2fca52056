// What every *_cuda.cu includes: the instructions (ptx.h), accesses of 16 bytes, sums over a warp, the launch.
// The same file compiles with nvcc and, with CRAMFAST_EMULATED set, with a host compiler for emulator/.
#pragma once

#include <stdexcept>
#include <string>

#include "ptx.h"

namespace cramfast {

// `count` neighbouring values that move in one access; with count = 16 / sizeof(T) a 16-byte one.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T value[count];
};

template <int count, class T>
DEVICE Pack<T, count> load(const T* from) {
#ifdef CRAMFAST_EMULATED
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(Pack<T, count>)) emulator::fault("misaligned load");
  Pack<T, count> pack;
  std::memcpy(&pack, from, sizeof pack);
  return pack;
#else
  return *reinterpret_cast<const Pack<T, count>*>(from);
#endif
}

template <int count, class T>
DEVICE void store(T* to, const Pack<T, count>& pack) {
#ifdef CRAMFAST_EMULATED
  if (reinterpret_cast<std::uintptr_t>(to) % sizeof pack) emulator::fault("misaligned store");
  std::memcpy(to, &pack, sizeof pack);
#else
  *reinterpret_cast<Pack<T, count>*>(to) = pack;
#endif
}

// float32 parameters beside packs of a narrower type: 16 bytes at a time.
template <int count>
DEVICE Pack<float, count> load_floats(const float* from) {
  constexpr int step = count < 4 ? count : 4;
  Pack<float, count> all;
#pragma unroll
  for (int i = 0; i < count; i += step) {
    const Pack<float, step> part = load<step>(from + i);
#pragma unroll
    for (int j = 0; j < step; ++j) all.value[i + j] = part.value[j];
  }
  return all;
}

template <int count>
DEVICE void store_floats(float* to, const float (&from)[count]) {
  constexpr int step = count < 4 ? count : 4;
#pragma unroll
  for (int i = 0; i < count; i += step) {
    Pack<float, step> part;
#pragma unroll
    for (int j = 0; j < step; ++j) part.value[j] = from[i + j];
    store<step>(to + i, part);
  }
}

// f(null pointer of the stored type): instantiates a generic lambda for the type that a dtype names.
template <class F>
void with_stored_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::bfloat16: return f(static_cast<bf16*>(nullptr));
    case DType::float16: return f(static_cast<f16*>(nullptr));
  }
}

template <class T>
DEVICE T warp_sum(T value) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(whole_warp, value, other);
  return value;
}

DEVICE float warp_max(float value) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value = fmaxf(value, __shfl_xor_sync(whole_warp, value, other));
  return value;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

#ifndef CRAMFAST_EMULATED
// Throws std::runtime_error with the runtime's own text; the error is then not found again by the next launch.
inline void check_cuda(const std::string& what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}
#endif

// Blocks that fill the device once, for kernels whose blocks walk over many rows.
inline int multiprocessors() {
#ifdef CRAMFAST_EMULATED
  return 2;
#else
  int device = 0, count = 1;
  check_cuda("number of multiprocessors", cudaGetDevice(&device));
  check_cuda("number of multiprocessors",
             cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
#endif
}

// The architecture whose code path a kernel runs on this device: 750 for PTX of compute_75 that the driver compiled for
// a newer card. Decides launch parameters that must agree with `has_sm80` inside the kernel.
template <class... Parameters>
int code_path(void (*kernel)(Parameters...)) {
#ifdef CRAMFAST_EMULATED
  (void)kernel;
  return CRAMFAST_EMULATED;
#else
  cudaFuncAttributes attributes{};
  check_cuda("compiled code for this device",
             cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes.ptxVersion * 10;
#endif
}

// kernel<<<grid, threads, shared_bytes, device.stream>>>(arguments...), in a form that both compilers take. Does
// nothing for an empty grid. Throws std::runtime_error with the kernel's name and the runtime's text when refused.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Cuda device, dim3 grid, unsigned threads,
            std::size_t shared_bytes, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef CRAMFAST_EMULATED
  (void)device;
  emulator::launch(name, grid, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  if (shared_bytes > 48 * 1024) {  // more than the default limit needs a wish, which a graph capture allows too
    check_cuda(std::string(name) + ", " + std::to_string(shared_bytes) + " bytes of shared memory",
               cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(device.stream)>>>(arguments...);
  check_cuda(name, cudaGetLastError());
#endif
}

}  // namespace cramfast

// Small kernels that pin down what the emulator (and, built with nvcc, a GPU) does: fragment layouts, shuffles,
// cp.async and each fault that must be seen. `fault` plants an error where it is not 0. One warp or a few; a, b, out are floats.
#include <cstring>

#include "device_code.h"
#ifdef CRAMFAST_EMULATED
#include "emulator/global_memory.h"
#endif

namespace cramfast {
namespace {

template <class T>
DEVICE std::uint32_t pair(const float* at, std::int64_t stride) {
  return pack2<T>(at[0], at[stride]);
}

// out (16 x 8) = a (16 x K) b (K x 8), fragments straight from the tables of the PTX manual.
template <class T, int K>
__global__ void mma_probe(const float* a, const float* b, float* out, int fault) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  std::uint32_t fa[K / 4], fb[K / 8];
  for (int i = 0; i < K / 4; ++i) fa[i] = pair<T>(a + (g + 8 * (i % 2)) * K + 2 * t + 8 * (i / 2), 1);
  for (int i = 0; i < K / 8; ++i) fb[i] = pair<T>(b + (2 * t + 8 * i) * 8 + g, 8);
  if (fault) {  // two fragment registers in each other's place
    const std::uint32_t first = fa[0];
    fa[0] = fa[1];
    fa[1] = first;
  }
  float d[4] = {};
  if constexpr (K == 8) {
    mma_m16n8k8(d, fa, fb);
  } else {
    mma_m16n8k16<T>(d, fa, fb);
  }
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

// The same product from shared memory: a by ldmatrix x4, b (16 x 8, row-major) by x2.trans; b' (8 x 16) by x2.
__global__ void ldmatrix_probe(const float* a, const float* b, float* out, int fault) {
  SHARED(f16, tile_a, 16 * 16);
  SHARED(f16, tile_b, 16 * 8);
  SHARED(f16, tile_bt, 8 * 16);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) tile_a[i] = narrow<f16>(a[i]);
  for (int i = lane; i < 128; i += 32) {
    tile_b[i] = narrow<f16>(b[i]);
    tile_bt[i % 8 * 16 + i / 8] = narrow<f16>(b[i]);
  }
  if (fault != 1) __syncwarp();
  std::uint32_t fa[4], fb[2], again[2], one[1];
  ldmatrix<4>(fa, tile_a + (lane % 16) * 16 + lane / 16 * 8);
  if (fault == 2) {
    ldmatrix<2>(fb, tile_b + (lane % 16) * 8);  // forgets that b must be transposed
  } else {
    ldmatrix<2, true>(fb, tile_b + (lane % 16) * 8);
  }
  ldmatrix<2>(again, tile_bt + (lane % 8) * 16 + lane / 8 % 2 * 8);
  ldmatrix<1, true>(one, tile_b + (lane % 8) * 8);
  float d[4] = {};
  mma_m16n8k16<f16>(d, fa, fb);
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
  const bool same = fb[0] == again[0] && fb[1] == again[1] && fb[0] == one[0];
  std::uint32_t four[4];
  ldmatrix<4, true>(four, tile_a + (lane % 16) * 16 + lane / 16 * 8);
  // Matrix m of a transposed: lane (g, t) holds rows 2t, 2t + 1 of column g.
  for (int m = 0; m < 4; ++m) {
    for (int j = 0; j < 2; ++j) {
      const int row = 2 * t + j + m % 2 * 8, column = g + m / 2 * 8;
      out[129 + row * 16 + column] = widen(f16{static_cast<std::uint16_t>(four[m] >> 16 * j)});
    }
  }
  const bool all = __all_sync(whole_warp, same);
  if (lane == 0) out[128] = all ? 1.0f : 0.0f;
}

// Two stages through shared memory: out[i] = a[i] with the halves of each stage exchanged between two warps.
__global__ void copy_probe(const float* a, const float*, float* out, int fault) {
  SHARED(float, tile, 2 * 256);
  const int i = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    cp_async16(tile + stage * 256 + i * 4, a + stage * 256 + i * 4);
    cp_async_commit();
  }
  for (int stage = 0; stage < 2; ++stage) {
    if (fault != 1) {
      if (stage == 0 && fault != 3) cp_async_wait<1>();
      if (stage == 1) cp_async_wait<0>();
    }
    if (fault != 2) __syncthreads();
    const int from = (i + 32) % 64;
    for (int j = 0; j < 4; ++j) out[stage * 256 + i * 4 + j] = tile[stage * 256 + from * 4 + j];
  }
}

__global__ void shuffle_probe(const float* a, const float*, float* out, int) {
  const int lane = threadIdx.x;
  const float v = a[lane];
  out[lane] = __shfl_xor_sync(whole_warp, v, 5);
  out[32 + lane] = __shfl_down_sync(whole_warp, v, 3);
  out[64 + lane] = __shfl_up_sync(whole_warp, v, 3);
  out[96 + lane] = __shfl_sync(whole_warp, v, 7);
  out[128 + lane] = __shfl_xor_sync(whole_warp, v, 4, 8);
  out[160 + lane] = __shfl_down_sync(whole_warp, v, 3, 8);
  out[192 + lane] = __shfl_sync(whole_warp, v, 9, 8);
  out[224 + lane] = static_cast<float>(__ballot_sync(whole_warp, v > 0.0f) & 0xffffu);
  out[256 + lane] = static_cast<float>(__any_sync(whole_warp, lane == 3) * 2 + __all_sync(whole_warp, lane == 3));
  if (lane < 16) {  // one half of the warp alone
    out[288 + lane] = __shfl_xor_sync(0xffffu, v, 1);
  } else {
    out[288 + lane] = __shfl_xor_sync(0xffff0000u, v, 2);
  }
}

// Block sum by way of shared memory in 64 threads, with one planted fault at a time.
__global__ void fault_probe(const float* a, const float*, float* out, int fault) {
  SHARED(float, partial, 64);
  Shared<float> more = dynamic_shared<float>();
  const int i = threadIdx.x;
  if (fault == 1 && i == 63) partial[64] = 0.0f;                // past a static array
  if (fault == 2 && i == 5) out[0] = a[64];                     // reads past the tensor
  if (fault == 3 && i == 5) out[64] = 1.0f;                     // writes past the tensor
  if (fault == 4 && i == 0) __syncthreads();                    // a barrier that one thread passes
  if (fault == 5 && i != 7) __shfl_xor_sync(whole_warp, i, 1);  // a lane that does not come
  if (fault == 6) out[i] = partial[i];                          // nobody wrote it
  partial[i] = a[i];
  if (fault != 7) __syncthreads();  // 7: a race between warps
  float sum = 0.0f;
  for (int k = 0; k < 64; ++k) sum += partial[k];
  if (fault != 8) __syncthreads();  // 8: overwritten while others still read
  partial[i] = sum;
  more[i] = sum;
  if (fault != 9) __syncwarp();  // 9: lanes of one warp take turns without asking
  const float left = more[i / 32 * 32 + (i + 1) % 32];
  if (fault == 10) {
    const uint4 misaligned = shared_cast<uint4>(more + 1)[0];
    out[0] = __uint_as_float(misaligned.x);
  }
  if (fault == 11) more[16384] = 1.0f;  // past the dynamic memory
  if (fault == 12) out[i] = load<4>(a + 1).value[0];
  if (fault == 13 && i == 0) out[-(1ll << 44)] = 1.0f;  // where no process has memory
  if (fault == 14 && i == 0) out[-1] = 1.0f;  // just before the tensor
  out[i] = left;
}

__global__ void convert_probe(const float* a, const float*, float* out, int) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[2 * i] = widen(narrow<f16>(a[i]));
  out[2 * i + 1] = widen(narrow<bf16>(a[i]));
}

__global__ void count_probe(const float*, const float*, float* out, int) { atomicAdd(out, 1.0f); }

void run(const std::string& name, int fault, const float* a, const float* b, float* out, Cuda device) {
  if (name == "mma_k8") launch("mma_probe", mma_probe<f16, 8>, device, 1, 32, 0, a, b, out, fault);
  if (name == "mma_k16") launch("mma_probe", mma_probe<f16, 16>, device, 1, 32, 0, a, b, out, fault);
#if !defined(CRAMFAST_EMULATED) || CRAMFAST_EMULATED >= 800
  if (name == "mma_bf16") launch("mma_probe", mma_probe<bf16, 16>, device, 1, 32, 0, a, b, out, fault);
#endif
  if (name == "ldmatrix") launch("ldmatrix_probe", ldmatrix_probe, device, 1, 32, 0, a, b, out, fault);
  if (name == "copy") launch("copy_probe", copy_probe, device, 1, 64, 0, a, b, out, fault);
  if (name == "shuffle") launch("shuffle_probe", shuffle_probe, device, 1, 32, 0, a, b, out, fault);
  if (name == "fault") launch("fault_probe", fault_probe, device, 1, 64, 256, a, b, out, fault);
  if (name == "convert") launch("convert_probe", convert_probe, device, 4, 256, 0, a, b, out, fault);
  if (name == "count") launch("count_probe", count_probe, device, dim3(3, 2), 64, 0, a, b, out, fault);
}

}  // namespace
}  // namespace cramfast

// Returns "" or the message of the fault. Sizes in bytes; addresses on the device that the build is for.
extern "C" __attribute__((visibility("default"))) const char* run_probe(const char* name, int fault, unsigned seed,
                                                                         float* a, std::size_t a_bytes, float* b,
                                                                         std::size_t b_bytes, float* out,
                                                                         std::size_t out_bytes) {
  static std::string message;
  message.clear();
  try {
#ifdef CRAMFAST_EMULATED
    using namespace cramfast::emulator;
    set_seed(seed);
    const GuardedCall call;
    const auto guard = [](float* p, std::size_t bytes) {
      register_tensor(reinterpret_cast<std::uintptr_t>(p), bytes);
      return reinterpret_cast<float*>(guarded(reinterpret_cast<std::uintptr_t>(p)));
    };
    cramfast::run(name, fault, guard(a, a_bytes), guard(b, b_bytes), guard(out, out_bytes), cramfast::Cuda{nullptr});
#else
    (void)seed, (void)a_bytes, (void)b_bytes, (void)out_bytes;
    cramfast::run(name, fault, a, b, out, cramfast::Cuda{nullptr});
    if (cudaDeviceSynchronize() != cudaSuccess) message = cudaGetErrorString(cudaGetLastError());
#endif
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

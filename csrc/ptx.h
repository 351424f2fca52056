// Every machine instruction that CUDA C++ has no plain spelling for, once as PTX and once for the emulator; nothing
// else in the kernels knows which of the two it runs on. Source of layouts: PTX ISA manual, "Warp-level matrix
// instructions" and "cp.async".
//
// CRAMFAST_ARCH is the architecture whose code is being compiled (750, 860, 900), 0 in nvcc's pass for the host.
// EMULATED_SITE is an extra defaulted argument in the emulated build only: the place of the call, for its messages.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "device.h"

#ifdef CRAMFAST_EMULATED
#include "emulator/cuda.h"
#include "emulator/tensor_core.h"
#define CRAMFAST_ARCH CRAMFAST_EMULATED
#define EMULATED_SITE CramfastSite site = CramfastSite::here()
#define AND_EMULATED_SITE , EMULATED_SITE
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifdef __CUDA_ARCH__
#define CRAMFAST_ARCH __CUDA_ARCH__
#else
#define CRAMFAST_ARCH 0
#endif
#define EMULATED_SITE
#define AND_EMULATED_SITE
#endif

#define DEVICE __device__ __forceinline__

namespace cramfast {

constexpr bool has_sm80 = CRAMFAST_ARCH >= 800;  // cp.async, m16n8k16, bfloat16 mma
constexpr unsigned whole_warp = 0xffffffffu;

// A pointer into shared memory: T* under nvcc; in the emulator an object that checks each access. Declare arrays with
// SHARED(type, name, count) or take dynamic_shared<T>(); name the type when reading (float v = tile[i], not auto);
// shared_cast<uint4>(tile)[i] is one 16-byte access.
#ifdef CRAMFAST_EMULATED
using emulator::Shared;
using emulator::shared_cast;
#define SHARED(type, name, count)                                                         \
  static const char name##_declaration = 0;                                               \
  const ::cramfast::Shared<type> name(                                                    \
      ::cramfast::emulator::static_region(&name##_declaration, #name, sizeof(type) * (count)))
template <class T>
Shared<T> dynamic_shared() {
  return Shared<T>(emulator::dynamic_region());
}
#else
template <class T>
using Shared = T*;
template <class U, class T>
DEVICE U* shared_cast(T* pointer) {
  return reinterpret_cast<U*>(pointer);
}
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
template <class T>
DEVICE T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}
template <class T>
DEVICE std::uint32_t shared_address(const T* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// ---- conversions, to nearest with ties to even

DEVICE float widen(float value) { return value; }

DEVICE float widen(bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

DEVICE float widen(f16 value) {
#ifdef CRAMFAST_EMULATED
  return emulator::half_to_float(value.bits);
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}

template <class T>
DEVICE T narrow(float value);

template <>
DEVICE float narrow<float>(float value) {
  return value;
}

template <>
DEVICE bf16 narrow<bf16>(float value) {
#ifdef CRAMFAST_EMULATED
  const unsigned bits = __float_as_uint(value);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16{static_cast<std::uint16_t>(value == value ? rounded : 0x7fffu)};
#else
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
}

template <>
DEVICE f16 narrow<f16>(float value) {
#ifdef CRAMFAST_EMULATED
  return f16{emulator::float_to_half(value)};
#else
  return f16{__half_as_ushort(__float2half_rn(value))};
#endif
}

// Two values in one register, the first in the low half: an element pair of an mma fragment.
template <class T>
DEVICE std::uint32_t pack2(float low, float high) {
#ifdef CRAMFAST_EMULATED
  return narrow<T>(low).bits | static_cast<std::uint32_t>(narrow<T>(high).bits) << 16;
#else
  std::uint32_t packed;
  if constexpr (sizeof(T) == 2 && !has_sm80) {
    packed = narrow<T>(low).bits | static_cast<std::uint32_t>(narrow<T>(high).bits) << 16;
  } else if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#endif
}

// The two values of a register.
template <class T>
DEVICE float2 unpack2(std::uint32_t packed) {
  return make_float2(widen(T{static_cast<std::uint16_t>(packed)}), widen(T{static_cast<std::uint16_t>(packed >> 16)}));
}

// 2^x, off by at most 2 units in the last place (ex2.approx); subnormal results are 0.
DEVICE float exp2_approx(float x) {
#ifdef CRAMFAST_EMULATED
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Ends the launch with an error: for what the host could only check by waiting for the device. `why` is a format of
// printf with a line's end; on a GPU the line goes to standard output before the trap, whose error says nothing.
template <class... Values>
DEVICE void stop(const char* why, Values... values) {
#ifdef CRAMFAST_EMULATED
  char line[240];
  std::snprintf(line, sizeof line, why, values...);
  line[std::strcspn(line, "\n")] = 0;
  emulator::fault(line);
#else
  printf(why, values...);
  __trap();
#endif
}

// Hides from the compiler that these registers hold what they held before, so that it computes again what it would
// otherwise keep: for a row of packed halves, twice to four times the registers.
template <class P>
DEVICE void compute_again(P& pack) {
#ifdef CRAMFAST_EMULATED
  (void)pack;
#else
  constexpr int count = sizeof(P) / 4;
  if constexpr (count > 0) {
    std::uint32_t words[count];
    memcpy(words, &pack, sizeof words);
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+r"(words[i]));
    memcpy(&pack, words, sizeof words);
  }
#endif
}

// ---- tensor cores: fragment layouts in emulator/tensor_core.h

// matrices (1, 2 or 4) of 8 x 8 16-bit values; lanes 8m..8m+7 give the addresses of the rows of matrix m, each aligned
// to 16 bytes. trans hands out the transposed matrices.
template <int matrices, bool trans = false, class T>
DEVICE void ldmatrix(std::uint32_t* r, Shared<T> row AND_EMULATED_SITE) {
  static_assert(sizeof(T) == 2 && (matrices == 1 || matrices == 2 || matrices == 4));
#ifdef CRAMFAST_EMULATED
  emulator::ldmatrix<matrices, trans>(r, row.region(), row.offset(), site);
#else
  const std::uint32_t address = shared_address(row);
  if constexpr (matrices == 1 && !trans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (matrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (matrices == 2 && !trans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  } else if constexpr (matrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  } else if constexpr (!trans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  }
#endif
}

// d (16 x 8, float32) += a (16 x 8, float16) b (8 x 8): two registers of a, one of b.
DEVICE void mma_m16n8k8(float* d, const std::uint32_t* a, const std::uint32_t* b AND_EMULATED_SITE) {
#ifdef CRAMFAST_EMULATED
  emulator::mma<8, false>(d, a, b, site);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

// d (16 x 8, float32) += a (16 x 16) b (16 x 8): four registers of a, two of b. float16 on every architecture (two
// m16n8k8 before sm_80: the same fragments), bfloat16 from sm_80 on.
template <class T>
DEVICE void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b AND_EMULATED_SITE) {
  constexpr bool bfloat = std::is_same_v<T, bf16>;
#ifdef CRAMFAST_EMULATED
  static_assert(has_sm80 || !bfloat, "no bfloat16 tensor cores before sm_80");
  if constexpr (has_sm80) {
    emulator::mma<16, bfloat>(d, a, b, site);
  } else {
    mma_m16n8k8(d, a, b, site);
    mma_m16n8k8(d, a + 2, b + 1, site);
  }
#elif CRAMFAST_ARCH >= 800
  if constexpr (bfloat) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  if constexpr (bfloat) {
    __trap();  // launchers refuse bfloat16 attention on such a card
  } else {
    mma_m16n8k8(d, a, b);
    mma_m16n8k8(d, a + 2, b + 1);
  }
#endif
}

// ---- asynchronous copies; plain copies before sm_80

// 16 bytes from global to shared memory, both aligned to 16; zeros and no access when not valid. The bytes are there
// for this thread after cp_async_wait, for others after a barrier behind it.
template <class T>
DEVICE void cp_async16(Shared<T> to, const T* from, bool valid = true) {
#if defined(CRAMFAST_EMULATED)
  if (reinterpret_cast<std::uintptr_t>(from) % 16 && valid) emulator::fault("cp.async: source not on 16 bytes");
  uint4 value = make_uint4(0, 0, 0, 0);
  if (valid) std::memcpy(&value, from, sizeof value);
  if constexpr (has_sm80) {
    emulator::issue_copy(to.region(), to.offset(), &value, sizeof value);
  } else {
    shared_cast<uint4>(to)[0] = value;
  }
#elif CRAMFAST_ARCH >= 800
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
#else
  *reinterpret_cast<uint4*>(to) = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

DEVICE void cp_async_commit() {
#if defined(CRAMFAST_EMULATED)
  if constexpr (has_sm80) emulator::commit_copies();
#elif CRAMFAST_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups_left` of the committed groups of this thread are still on their way.
template <int groups_left>
DEVICE void cp_async_wait(EMULATED_SITE) {
#if defined(CRAMFAST_EMULATED)
  if constexpr (has_sm80) emulator::wait_for_copies(groups_left, site);
#elif CRAMFAST_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" :: "n"(groups_left) : "memory");
#endif
}

}  // namespace cramfast

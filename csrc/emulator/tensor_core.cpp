#include "tensor_core.h"

#include <cmath>
#include <cstring>
#include <utility>

namespace cramfast::emulator {
namespace {

float widen(std::uint16_t bits, bool bfloat) {
  if (!bfloat) return half_to_float(bits);
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

template <int K, bool bfloat>
void multiply(Exchange& e) {
  constexpr int a_registers = K / 4, b_registers = K / 8;
  float A[16][K], B[K][8], D[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const std::uint32_t* in = e.in[lane];
    for (int i = 0; i < a_registers; ++i) {
      for (int j = 0; j < 2; ++j) {
        A[g + 8 * (i % 2)][2 * t + j + 8 * (i / 2)] = widen(static_cast<std::uint16_t>(in[i] >> 16 * j), bfloat);
      }
    }
    in += a_registers;
    for (int i = 0; i < b_registers; ++i) {
      for (int j = 0; j < 2; ++j) {
        B[2 * t + j + 8 * i][g] = widen(static_cast<std::uint16_t>(in[i] >> 16 * j), bfloat);
      }
    }
    in += b_registers;
    for (int i = 0; i < 4; ++i) std::memcpy(&D[g + 8 * (i / 2)][2 * t + i % 2], &in[i], sizeof(float));
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) D[row][column] += A[row][k] * B[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&e.out[lane][i], &D[g + 8 * (i / 2)][2 * t + i % 2], sizeof(float));
  }
}

template <int matrices, bool trans>
void distribute(Exchange& e) {
  for (int m = 0; m < matrices; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      std::uint16_t value[2];
      for (int j = 0; j < 2; ++j) {
        const int row = 8 * m + (trans ? 2 * t + j : g), column = trans ? g : 2 * t + j;
        // Words 0..3 of a lane's input are the row it read.
        std::memcpy(&value[j], reinterpret_cast<const unsigned char*>(e.in[row]) + 2 * column, sizeof value[j]);
      }
      std::memcpy(&e.out[lane][m], value, sizeof value);
    }
  }
}

}  // namespace

template <int K, bool bfloat>
void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, Site site) {
  constexpr int a_registers = K / 4, b_registers = K / 8;
  std::uint32_t in[a_registers + b_registers + 4];
  std::memcpy(in, a, a_registers * sizeof *a);
  std::memcpy(in + a_registers, b, b_registers * sizeof *b);
  std::memcpy(in + a_registers + b_registers, d, 4 * sizeof *d);
  if (ignored("mma", site)) std::swap(in[b_registers > 1 ? a_registers : 0], in[b_registers > 1 ? a_registers + 1 : 1]);
  exchange(0xffffffffu, multiply<K, bfloat>, in, a_registers + b_registers + 4, reinterpret_cast<std::uint32_t*>(d), 4,
           site);
}

template <int matrices, bool trans>
void ldmatrix(std::uint32_t* registers, Region region, std::int64_t offset, Site site) {
  // Every lane reads the row whose address it gives, which charges the read to a lane of the right warp; the record
  // cannot tell lanes apart here, and need not: what matters is which warp reads, and after which barrier.
  std::uint32_t row[4] = {};
  if (running->lane < 8 * matrices) read_shared(region, offset, row, sizeof row, sizeof row);
  exchange(0xffffffffu, distribute<matrices, trans>, row, 4, registers, matrices, site);
}

template void mma<8, false>(float*, const std::uint32_t*, const std::uint32_t*, Site);
template void mma<16, false>(float*, const std::uint32_t*, const std::uint32_t*, Site);
template void mma<16, true>(float*, const std::uint32_t*, const std::uint32_t*, Site);
template void ldmatrix<1, false>(std::uint32_t*, Region, std::int64_t, Site);
template void ldmatrix<2, false>(std::uint32_t*, Region, std::int64_t, Site);
template void ldmatrix<4, false>(std::uint32_t*, Region, std::int64_t, Site);
template void ldmatrix<1, true>(std::uint32_t*, Region, std::int64_t, Site);
template void ldmatrix<2, true>(std::uint32_t*, Region, std::int64_t, Site);
template void ldmatrix<4, true>(std::uint32_t*, Region, std::int64_t, Site);

float half_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    const std::uint32_t wide =
        static_cast<std::uint32_t>(exponent + 112) << 23 | static_cast<std::uint32_t>(fraction) << 13;
    std::memcpy(&value, &wide, sizeof value);
  }
  return bits >> 15 ? -value : value;
}

std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24; nearbyint rounds ties to even
    return sign | static_cast<std::uint16_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return sign | static_cast<std::uint16_t>((rounded - 0x38000000u) >> 13);
}

}  // namespace cramfast::emulator

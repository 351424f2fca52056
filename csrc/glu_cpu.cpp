#include "glu.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace cramfast::CRAMFAST_ISA {
namespace {

constexpr std::int64_t block_rows = 16;

struct Gelu {
  static float value(float a) { return a * normal_cdf(a); }
  static float derivative(float a) { return normal_cdf(a) + a * normal_pdf(a); }
};

struct Silu {
  static float value(float a) { return a * sigmoid(a); }
  static float derivative(float a) {
    const float s = sigmoid(a);
    return s * (1.0f + a * (1.0f - s));
  }
};

template <class F>
void with_activation(Activation activation, const F& f) {
  if (activation == Activation::gelu) {
    f(Gelu{});
  } else {
    f(Silu{});
  }
}

// f<T, Act>(row) over all rows, for the stored type and activation of args.
template <class Args, class F>
void over_rows(Cpu device, const Args& args, const F& f) {
  with_dtype(args.dtype, [&](auto* stored) {
    with_activation(args.activation, [&](auto activation) {
      parallel_for(device, ceil_div(args.rows, block_rows), [&](std::int64_t block) {
        const std::int64_t end = std::min(args.rows, (block + 1) * block_rows);
        for (std::int64_t row = block * block_rows; row < end; ++row) f(stored, activation, row);
      });
    });
  });
}

}  // namespace

void glu_fwd(Cpu device, const GluForward& args) {
  over_rows(device, args, [&](auto* stored, auto activation, std::int64_t row) {
    using T = std::remove_pointer_t<decltype(stored)>;
    const std::int64_t F = args.features;
    const T* __restrict a = static_cast<const T*>(args.x) + row * 2 * F;
    const T* __restrict g = a + F;
    T* __restrict h = static_cast<T*>(args.h) + row * F;
#pragma omp simd
    for (std::int64_t f = 0; f < F; ++f) h[f] = narrow<T>(activation.value(widen(a[f])) * widen(g[f]));
  });
}

void glu_bwd(Cpu device, const GluBackward& args) {
  over_rows(device, args, [&](auto* stored, auto activation, std::int64_t row) {
    using T = std::remove_pointer_t<decltype(stored)>;
    const std::int64_t F = args.features;
    const T* __restrict a = static_cast<const T*>(args.x) + row * 2 * F;
    const T* __restrict g = a + F;
    const T* __restrict dh = static_cast<const T*>(args.dh) + row * F;
    T* __restrict da = static_cast<T*>(args.dx) + row * 2 * F;
    T* __restrict dg = da + F;
#pragma omp simd
    for (std::int64_t f = 0; f < F; ++f) {
      const float gate = widen(a[f]), upstream = widen(dh[f]);
      da[f] = narrow<T>(upstream * widen(g[f]) * activation.derivative(gate));
      dg[f] = narrow<T>(upstream * activation.value(gate));
    }
  });
}

}  // namespace cramfast::CRAMFAST_ISA

#include "accumulate.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace cramfast::CRAMFAST_ISA {
namespace {

constexpr std::int64_t chunk = 16384;  // values
constexpr std::int64_t columns = 64;   // of a table, to a thread: whole cache lines, and every row in order

template <class T>
void add(float* __restrict sum, const T* __restrict values, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) sum[i] += widen(values[i]);
}

}  // namespace

void accumulate(Cpu device, const Accumulate& args) {
  with_dtype(args.dtype, [&](auto* stored) {
    const auto* values = static_cast<const std::remove_pointer_t<decltype(stored)>*>(args.values);
    parallel_for(device, ceil_div(args.size, chunk), [&](std::int64_t index) {
      const std::int64_t begin = index * chunk;
      add(args.sum + begin, values + begin, std::min(chunk, args.size - begin));
    });
  });
}

void accumulate_rows(Cpu device, const AccumulateRows& args) {
  with_dtype(args.dtype, [&](auto* stored) {
    const auto* values = static_cast<const std::remove_pointer_t<decltype(stored)>*>(args.values);
    parallel_for(device, ceil_div(args.width, columns), [&](std::int64_t index) {
      const std::int64_t begin = index * columns, n = std::min(columns, args.width - begin);
      for (std::int64_t row = 0; row < args.rows; ++row) {
        add(args.sum + args.ids[row] * args.width + begin, values + row * args.width + begin, n);
      }
    });
  });
}

}  // namespace cramfast::CRAMFAST_ISA

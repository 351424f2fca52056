// What every operator header shares: where to run, how values are stored, and the parallel loop of the CPU builds.
#pragma once

#include <cstdint>

namespace cramfast {

// An operator takes one of these tags first; overloads make a missing implementation a link error, not a wrong path.
struct Cpu {
  int threads;  // follows torch.get_num_threads(): its OpenMP runtime is ours too (see kernels/extension.py)
};
struct Cuda {
  void* stream;  // the current stream of the caller, fetched at every call and never defaulted
};

// Values as stored in memory; arithmetic is float32 throughout.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

}  // namespace cramfast

// Gradients into the flat float32 buffer, on a CPU alone, where torch first widens a bfloat16 operand into a copy and
// sums the rows of an embedding table in a whole table of its own. A GPU's `add_` does neither.
//
//   accumulate:       sum[i] += values[i]
//   accumulate_rows:  sum[ids[n], d] += rows[n, d],  n ascending, so that repeated ids give the same bits every time
//
// Bound by memory: 10 bytes a value in bfloat16, 12 in float32.
#pragma once

#include "device.h"

namespace cramfast {

struct Accumulate {
  float* sum;          // (size,)
  const void* values;  // (size,)
  std::int64_t size;
  DType dtype;
};

struct AccumulateRows {
  float* sum;               // (..., width)
  const std::int32_t* ids;  // (rows,), each a row of sum
  const void* values;       // (rows, width)
  std::int64_t rows, width;
  DType dtype;
};

void accumulate(Cpu device, const Accumulate& args);
void accumulate_rows(Cpu device, const AccumulateRows& args);

}  // namespace cramfast

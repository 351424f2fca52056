// A kernel that does nothing, waited for: whether this build, driver and card work together at all.
#pragma once

#include "device.h"

namespace cramfast {

// Throws std::runtime_error with the CUDA runtime's own text.
void empty_launch(Cuda device);

}  // namespace cramfast

// What the current device makes of this module: asked once by kernels/extension.py, before anything is launched there.
#pragma once

namespace cramfast {

// The architecture whose source a kernel runs on the current device, 860 for sm_86: of the machine code that fits it,
// or of the PTX that the driver compiled for it. Throws std::runtime_error with the runtime's own text where the device
// can run neither, or the driver is older than the toolkit.
int cuda_code_path();

// CUDA versions as 13000 for 13.0: what the driver takes (0 without a driver), and of the runtime in this module.
struct CudaVersions {
  int driver, runtime;
};
CudaVersions cuda_versions();

}  // namespace cramfast

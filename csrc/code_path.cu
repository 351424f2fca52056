#include "code_path.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cramfast {

namespace {

__global__ void empty_kernel() {}

void check(const char* call, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

}  // namespace

int cuda_code_path() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(empty_kernel));
  cudaGetLastError();  // so that the next launch does not report it again
  check("cudaFuncGetAttributes", status);
  return attributes.ptxVersion * 10;
}

CudaVersions cuda_versions() {
  CudaVersions versions{};
  check("cudaDriverGetVersion", cudaDriverGetVersion(&versions.driver));
  check("cudaRuntimeGetVersion", cudaRuntimeGetVersion(&versions.runtime));
  return versions;
}

}  // namespace cramfast

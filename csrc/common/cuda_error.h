// What to say when a launch fails.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

namespace fastreg {

inline std::string launch_error(const char* op, cudaError_t error) {
  const std::string name = std::string(op) + ": ";
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return name +
             "fastreg was not built for this GPU; see `fastreg doctor`, and rebuild it with "
             "FASTREG_CUDA_ARCHS naming the " +
             "GPU's architecture";
    case cudaErrorInsufficientDriver:
      return name +
             "the NVIDIA driver is older than the CUDA that fastreg was built with; update the driver, or "
             "rebuild " +
             "fastreg with an older CUDA";
    default:
      return name + cudaGetErrorString(error);
  }
}

}  // namespace fastreg

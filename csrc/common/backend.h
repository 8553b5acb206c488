// Each *_op.cpp is compiled once per back end, so that the CPU and CUDA check alike; what differs between the
// two stands here. FASTREG_CUDA is defined for CUDA. With FASTREG_CUDAHOST beside it the tensors lie on the
// CPU: the CUDA kernels, compiled by the host's compiler, are then tested on a machine without a GPU.
#pragma once
#if defined(FASTREG_CUDA) && !defined(FASTREG_CUDAHOST)
#define USE_CUDA 1
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda_error.h"
#endif

#include <stdexcept>
#include <string>

#include "check.h"
#include "philox.h"

#ifndef FASTREG_CUDA
#define FR_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m)
#elif defined(FASTREG_CUDAHOST)
#define FR_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastreg_cudahost, CPU, m)
#else
#define FR_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastreg, CUDA, m)
#endif

namespace fastreg {

// The one int64 of a seed tensor. One on a GPU is left for the kernel to read, since reading it here would
// wait for the GPU; one on the CPU is read now.
inline Seed seed_of(const char* op, const Tensor& seed, const Tensor& input) {
  check(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op, ": seed must be one int64, got ",
        seed.scalar_type(), " of shape ", shape_text(seed),
        "; draw it with torch.randint(-2**63, 2**63 - 1, (1,))");
  const auto* at = static_cast<const uint64_t*>(seed.const_data_ptr());
  if (seed.is_cpu()) return {*at, nullptr};
  check_device(op, "seed", seed, "input", input);
  return {0, at};
}

#ifdef FASTREG_CUDA
// Calls launch(stream), which gives a cudaError_t, with the device of a tensor made current and its current
// stream.
template <class F>
void on_stream(const char* op, const Tensor& like, F launch) {
#ifdef FASTREG_CUDAHOST
  (void)op, (void)like, launch(nullptr);
#else
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const auto error = static_cast<cudaError_t>(launch(stream));
  if (error != cudaSuccess) throw std::runtime_error(launch_error(op, error));
#endif
}
#endif

}  // namespace fastreg

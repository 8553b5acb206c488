// The kernels on which tests/test_cudacheck.py shows what is seen of a kernel without a GPU, right and with
// one mistake each: TAIL_TOO_LONG, NO_BARRIER, LATE_READ.
#include <cuda_runtime.h>
#include <stdint.h>

// y = a x + y: four elements at a time, then the tail one by one.
__global__ void sample_add(const float* __restrict__ x, float* __restrict__ y, float a, int64_t n) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x, fours = n / 4;
  for (int64_t i = thread; i < fours; i += threads) {
    const float4 from = reinterpret_cast<const float4*>(x)[i];
    float4 to = reinterpret_cast<float4*>(y)[i];
    to.x += a * from.x, to.y += a * from.y, to.z += a * from.z, to.w += a * from.w;
    reinterpret_cast<float4*>(y)[i] = to;
  }
#ifdef TAIL_TOO_LONG
  n = n + 1;
#endif
  for (int64_t i = 4 * fours + thread; i < n; i += threads) y[i] += a * x[i];
}

// Each block of 128 threads reverses its 128 elements through shared memory.
__global__ void sample_reverse(const float* x, float* y) {
  __shared__ float room[128];
  room[threadIdx.x] = x[blockIdx.x * 128 + threadIdx.x];
#ifndef NO_BARRIER
  __syncthreads();
#endif
  y[blockIdx.x * 128 + threadIdx.x] = room[127 - threadIdx.x];
}

// y[i] = x[i], and then y[i] = y[i + 1] - 1 where LATE_READ asks for it: the neighbour may not have written
// yet.
__global__ void sample_copy(const float* x, float* y) {
  const unsigned i = blockIdx.x * 128 + threadIdx.x;
  y[i] = x[i];
#ifdef LATE_READ
  if (threadIdx.x < 127) y[i] = y[i + 1] - 1;
#endif
}

#ifndef CUDAHOST
extern "C" int sample_copy_launch(const float* x, float* y, int64_t blocks, void* stream) {
  sample_copy<<<unsigned(blocks), 128, 0, static_cast<cudaStream_t>(stream)>>>(x, y);
  return int(cudaGetLastError());
}

extern "C" int sample_add_launch(const float* x, float* y, int64_t n, void* stream) {
  const int64_t fours = (n + 3) / 4, blocks = (fours + 127) / 128;
  sample_add<<<unsigned(blocks), 128, 0, static_cast<cudaStream_t>(stream)>>>(x, y, 0.5f, n);
  return int(cudaGetLastError());
}

extern "C" int sample_reverse_launch(const float* x, float* y, int64_t blocks, void* stream) {
  sample_reverse<<<unsigned(blocks), 128, 0, static_cast<cudaStream_t>(stream)>>>(x, y);
  return int(cudaGetLastError());
}
#else
int main() {
  constexpr int n = 256 + 3;
  float *x = new float[n], *y = new float[n];  // AddressSanitizer knows where they end
  for (int i = 0; i < n; ++i) x[i] = float(i), y[i] = 1;
  cudahost::launch(sample_add, dim3(2), dim3(128), static_cast<const float*>(x), y, 0.5f, int64_t(n));
  for (int i = 0; i < n; ++i)
    if (y[i] != 1 + 0.5f * float(i)) return 1;
  cudahost::launch(sample_reverse, dim3(2), dim3(128), static_cast<const float*>(x), y);
  for (int i = 0; i < 256; ++i)
    if (y[i] != x[i / 128 * 128 + 127 - i % 128]) return 2;
  delete[] x;
  delete[] y;
  return 0;
}
#endif

// What the *_cuda.cu files share: launching, 16-byte words, conversions by the hardware, offsets in strided
// tensors. There is no torch header here, so that kernels and launches can be executed without a GPU: their
// PTX by an interpreter, their source by the host's compiler (FASTREG_CUDAHOST).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device.h"
#include "flush.h"

namespace fastreg {

constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

// The grid for `work` items of which a block does `per_block` at a time. It has at most 2^20 blocks; with
// more work each block does several turns.
inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block, most = int64_t(1) << 20;
  return unsigned(blocks < most ? blocks : most);
}

// Dynamic shared memory, and the bytes of it that a block may have.
#ifdef FASTREG_CUDAHOST
inline thread_local uint4 dynamic_shared[(227 << 10) / 16];
inline size_t most_shared() { return sizeof dynamic_shared; }
#else
extern __shared__ uint4 dynamic_shared[];
inline size_t most_shared() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return 48 << 10;
  return size_t(bytes);
}
#endif

// Launches and gives a cudaError_t. No blocks, no launch.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared, void* stream,
           Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
#ifdef FASTREG_CUDAHOST
  (void)shared, (void)stream;
  cudahost::launch(kernel, dim3(blocks), dim3(threads), Parameters(arguments)...);
#else
  if (shared > 48 << 10) {  // what not every GPU has must be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error) return int(error);
  }
  // clang-format off
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  // clang-format on
#endif
  return int(cudaGetLastError());
}

// Sets memory to zero.
template <class T>
int zero(T* p, int64_t count, void* stream) {
#ifdef FASTREG_CUDAHOST
  (void)stream;
  memset(p, 0, size_t(count) * sizeof(T));
  return 0;
#else
  return int(cudaMemsetAsync(p, 0, size_t(count) * sizeof(T), static_cast<cudaStream_t>(stream)));
#endif
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
// The same, flushed as by flush.h, which takes three instructions more where it is not a mode of this one.
__device__ __forceinline__ float flushed_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) && !defined(FASTREG_CUDAHOST)
  float result;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
#else
  return flush(fmaf(a, b, c));
#endif
}
__device__ __forceinline__ double flushed_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// ---- storage types, converted in one instruction

__device__ __forceinline__ float load_float(uint8_t x) { return to_float(x); }
__device__ __forceinline__ float load_float(float x) { return x; }
__device__ __forceinline__ double load_float(double x) { return x; }
__device__ __forceinline__ float load_float(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float load_float(Half x) {
  __half h;
  memcpy(&h, &x, 2);
  return __half2float(h);
}
__device__ __forceinline__ void store_float(float x, uint8_t* out) { from_float(x, out); }
__device__ __forceinline__ void store_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void store_float(double x, double* out) { *out = x; }
__device__ __forceinline__ void store_float(float x, BFloat16* out) {
  const __nv_bfloat16 b = __float2bfloat16_rn(x);
  uint16_t bits;  // a copy to *out would be made byte by byte
  memcpy(&bits, &b, 2);
  out->bits = bits;
}
__device__ __forceinline__ void store_float(float x, Half* out) {
  const __half h = __float2half_rn(x);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  out->bits = bits;
}

// ---- words

// 16 bytes: what a lane reads or writes at once. Neighbouring lanes take neighbouring words.
template <class T>
struct Word {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// A word is put together by hand and stored by an intrinsic: in some kernels the compiler split a plain
// assignment into four stores.
template <class T>
__device__ __forceinline__ Word<T> unpack_word(uint4 four) {
  const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
  Word<T> word;
#pragma unroll
  for (int i = 0; i < Word<T>::kSize; ++i) {
    if constexpr (sizeof(T) == 2) {
      word.value[i].bits = uint16_t(bits[i / 2] >> (16 * (i % 2)));
    } else if constexpr (sizeof(T) == 4) {
      word.value[i] = bits_float(bits[i]);
    } else {
      const uint64_t both = uint64_t(bits[2 * i + 1]) << 32 | bits[2 * i];
      memcpy(&word.value[i], &both, 8);
    }
  }
  return word;
}
template <class T>
__device__ __forceinline__ Word<T> load_word(const T* p) {
  return unpack_word<T>(*reinterpret_cast<const uint4*>(p));
}
template <class T>
__device__ __forceinline__ void store_word(T* p, const Word<T>& word) {
  uint32_t bits[4] = {};
#pragma unroll
  for (int i = 0; i < Word<T>::kSize; ++i) {
    if constexpr (sizeof(T) == 2) {
      bits[i / 2] |= uint32_t(word.value[i].bits) << (16 * (i % 2));
    } else if constexpr (sizeof(T) == 4) {
      bits[i] = float_bits(word.value[i]);
    } else {
      uint64_t both;
      memcpy(&both, &word.value[i], 8);
      bits[2 * i] = uint32_t(both);
      bits[2 * i + 1] = uint32_t(both >> 32);
    }
  }
  __stcg(reinterpret_cast<uint4*>(p), uint4{bits[0], bits[1], bits[2], bits[3]});
}

// Whether words can be read and written there; every address a multiple of 16.
template <class... Pointers>
bool word_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// ---- where elements lie

// n / d for 0 <= n < 2^63 by a multiplication (Granlund and Montgomery 1994): the GPU divides 64-bit integers
// in some 70 instructions.
struct Divider {
  uint64_t divisor = 1, factor = 0;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(uint64_t(d)) {
    while (shift < 63 && (uint64_t(1) << shift) < divisor) ++shift;
    factor = uint64_t((static_cast<unsigned __int128>((uint64_t(1) << shift) - divisor) << 64) / divisor) + 1;
  }
  __device__ __forceinline__ int64_t divide(int64_t n) const {
    const uint64_t high = __umul64hi(uint64_t(n), factor);
    return int64_t((high + uint64_t(n)) >> shift);
  }
};

// The memory offset, in elements, of a logical element.
struct Offsets {
  int dims = 0;  // 0: contiguous
  Divider size[kMaxDims];
  int64_t stride[kMaxDims];

  Offsets() = default;
  explicit Offsets(const Layout& layout) : dims(layout.contiguous ? 0 : layout.dims) {
    for (int d = 0; d < dims; ++d) {
      size[d] = Divider(layout.size[d]);
      stride[d] = layout.stride[d];
    }
  }
  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    if (dims == 0) return i;
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      const int64_t rest = size[d].divide(i);
      offset += (i - rest * int64_t(size[d].divisor)) * stride[d];
      i = rest;
    }
    return offset + i * stride[0];
  }
};

}  // namespace fastreg

// cudahost.h - compile unchanged CUDA kernels with g++/clang++ and run them on the CPU (x86-64 Linux).
//
// Every CUDA thread is a fiber; a block's fibers run on one OS thread and switch at __syncthreads,
// __syncwarp and the warp collectives, so blocks, warps, shuffles, ballots and barriers keep their
// meaning (warp size 32, sub-masks, divergent collectives).  CUDAHOST_ORDER=forward|reverse|random[:seed]
// picks which runnable thread goes next: results that change with the order show a missing barrier.
// Works under -fsanitize=address,undefined, which then checks bounds, alignment and overflow by source line.
//
//   g++ -x c++ -std=c++17 -O2 -I<dir>/shim test.cpp     // test.cpp: #include "kernels.cu"
//   cudahost::launch(kernel, grid, block, args...);      // instead of kernel<<<grid, block>>>(args...)
//
// `extern __shared__ T name[];` needs one line in the test:  alignas(16) thread_local T name[N];
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CUDAHOST_ASAN 1
#endif

#define __CUDACC__ 1
#define __CUDA_ARCH__ 800
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ thread_local  // one OS thread, one block at a time
#define __align__(n) alignas(n)

// ---- vector types -----------------------------------------------------------------------------
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define CUDAHOST_VEC(T, N, A2, A4)                             \
  struct alignas(A2) N##2 { T x, y; };                         \
  struct N##3 { T x, y, z; };                                  \
  struct alignas(A4) N##4 { T x, y, z, w; };                   \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; }         \
  inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; } \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDAHOST_VEC(float, float, 8, 16)
CUDAHOST_VEC(int, int, 8, 16)
CUDAHOST_VEC(double, double, 16, 16)
CUDAHOST_VEC(short, short, 4, 8)
CUDAHOST_VEC(unsigned short, ushort, 4, 8)
CUDAHOST_VEC(unsigned char, uchar, 2, 4)
CUDAHOST_VEC(signed char, char, 2, 4)
CUDAHOST_VEC(long long, longlong, 16, 16)
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- fibers -----------------------------------------------------------------------------------
namespace cudahost {
enum State { RUN, BLOCK_BARRIER, WARP_BARRIER, DONE };
struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  State st = DONE;
  unsigned mask = 0;
  uint3 tid{};
  int lin = 0;
  void* fake = nullptr;
  int pred = 0;
  const void* site = nullptr;
};
struct Warp {
  unsigned arrived = 0, alive = 0;
  alignas(16) unsigned char slot[32][16];
  bool pred[32];
};
inline constexpr size_t STACK = 64 << 10;
struct Block {
  std::vector<Fiber> f;
  std::vector<Warp> w;
  int n = 0, cur = 0, waiting = 0, done = 0, red = 0, redout = 0;
  void* main_sp = nullptr;
  const std::function<void()>* body = nullptr;
  dim3 grid, block;
  uint3 cta{};
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* main_fake = nullptr;
};
inline Block B;

extern "C" void cudahost_switch(void** save, void* load);
asm(R"(
.pushsection .text
.weak cudahost_switch
.type cudahost_switch,@function
cudahost_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.popsection
)");

inline void to_main() {
  Fiber& f = B.f[B.cur];
#ifdef CUDAHOST_ASAN
  __sanitizer_start_switch_fiber(f.st == DONE ? nullptr : &f.fake, B.stack_bottom, B.stack_size);
#endif
  cudahost_switch(&f.sp, B.main_sp);
#ifdef CUDAHOST_ASAN
  __sanitizer_finish_switch_fiber(B.f[B.cur].fake, &B.stack_bottom, &B.stack_size);
#endif
}

// What switches between threads is not what is tested, and runs more often than all that is.
#define CUDAHOST_OWN __attribute__((optimize("O2"), no_sanitize("address", "undefined")))

CUDAHOST_OWN inline void release_block() {  // all threads have arrived or left
  B.redout = B.red;
  B.red = 0;
  B.waiting = 0;
  Fiber* const f = B.f.data();
  for (int i = 0; i < B.n; ++i)
    if (f[i].st == BLOCK_BARRIER) f[i].st = RUN;
}
CUDAHOST_OWN inline void release_warp(int w) {  // any group whose whole mask has arrived
  Warp& W = B.w[w];
  if (!W.arrived) return;
  Fiber* const f = B.f.data() + w * 32;
  const int lanes = B.n - w * 32 < 32 ? B.n - w * 32 : 32;
  for (int l = 0; l < lanes; ++l) {
    if (f[l].st != WARP_BARRIER) continue;
    const unsigned need = f[l].mask & W.alive;
    if ((W.arrived & need) == need) {
      for (int k = 0; k < lanes; ++k)
        if (f[k].st == WARP_BARRIER && (need >> k & 1)) f[k].st = RUN, W.arrived &= ~(1u << k);
    }
  }
}
extern "C" inline void cudahost_entry() {
#ifdef CUDAHOST_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &B.stack_bottom, &B.stack_size);
#endif
  (*B.body)();
  Fiber& f = B.f[B.cur];
  f.st = DONE;
  ++B.done;
  B.w[f.lin / 32].alive &= ~(1u << (f.lin & 31));
  release_warp(f.lin / 32);
  if (B.waiting && B.waiting + B.done == B.n) release_block();
  to_main();
  abort();
}
CUDAHOST_OWN inline void barrier() {
  Fiber& f = B.f[B.cur];
  f.st = BLOCK_BARRIER;
  if (++B.waiting + B.done == B.n) release_block();
  if (f.st != RUN) to_main();
}
CUDAHOST_OWN inline void warp_barrier(unsigned mask) {
  Fiber& f = B.f[B.cur];
  Warp& W = B.w[f.lin / 32];
  if (!(mask >> (f.lin & 31) & 1)) {
    fprintf(stderr, "cudahost: lane %d is not in its own mask %08x\n", f.lin & 31, mask);
    abort();
  }
  f.st = WARP_BARRIER;
  f.mask = mask;
  W.arrived |= 1u << (f.lin & 31);
  release_warp(f.lin / 32);
  if (f.st != RUN) to_main();
}

CUDAHOST_OWN inline void run_block(const char* order, std::mt19937& rng) {
  B.waiting = B.done = B.red = 0;
  B.w.assign((B.n + 31) / 32, Warp());
  Fiber* const fibers = B.f.data();
  for (int i = 0; i < B.n; ++i) {
    Fiber& f = fibers[i];
    f.lin = i;
    f.st = RUN;
    f.tid = {i % B.block.x, i / B.block.x % B.block.y, i / (B.block.x * B.block.y)};
    B.w[i / 32].alive |= 1u << (i & 31);
    void** top = (void**)(f.stack + STACK - 64);
    *--top = nullptr;
    *--top = (void*)cudahost_entry;                // return address of the first switch
    for (int k = 0; k < 6; ++k) *--top = nullptr;  // callee-saved registers
    f.sp = top;
  }
  const bool rev = order[0] == 'r' && order[1] == 'e', rnd = order[0] == 'r' && order[1] == 'a';
  std::vector<int> seq(B.n);
  for (int i = 0; i < B.n; ++i) seq[i] = rev ? B.n - 1 - i : i;
  while (B.done < B.n) {
    bool moved = false;
    if (rnd) std::shuffle(seq.begin(), seq.end(), rng);
    for (int i : seq) {
      if (fibers[i].st != RUN) continue;
      moved = true;
      B.cur = i;
#ifdef CUDAHOST_ASAN
      __sanitizer_start_switch_fiber(&B.main_fake, fibers[i].stack, STACK);
#endif
      cudahost_switch(&B.main_sp, fibers[i].sp);
#ifdef CUDAHOST_ASAN
      __sanitizer_finish_switch_fiber(B.main_fake, nullptr, nullptr);
#endif
    }
    if (!moved) {
      fprintf(stderr, "cudahost: deadlock in block (%u,%u,%u):", B.cta.x, B.cta.y, B.cta.z);
      for (int i = 0, k = 0; i < B.n && k < 8; ++i)
        if (fibers[i].st != DONE) {
          ++k;
          fprintf(stderr, " thread %d at %s", i,
                  fibers[i].st == BLOCK_BARRIER ? "__syncthreads" : "warp collective");
        }
      fprintf(stderr, "\n");
      abort();
    }
  }
}

template <class K, class... A>
void launch(K kernel, dim3 grid, dim3 block, A... args) {
  const std::function<void()> body = [&] { kernel(args...); };
  const char* order = getenv("CUDAHOST_ORDER");
  if (!order) order = "forward";
  const char* colon = strchr(order, ':');
  std::mt19937 rng(colon ? atoi(colon + 1) : 1);
  B.body = &body;
  B.grid = grid;
  B.block = block;
  B.n = block.x * block.y * block.z;
  if (B.n < 1 || B.n > 1024 || !grid.x || grid.y > 65535 || grid.z > 65535) {
    fprintf(stderr, "cudahost: bad launch configuration\n");
    abort();
  }
  if ((int)B.f.size() < B.n) B.f.resize(B.n);
  for (int i = 0; i < B.n; ++i)
    if (!B.f[i].stack)
      B.f[i].stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        B.cta = {x, y, z};
        run_block(order, rng);
      }
}
}  // namespace cudahost

#define threadIdx (cudahost::B.f[cudahost::B.cur].tid)
#define blockIdx (cudahost::B.cta)
#define blockDim (cudahost::B.block)
#define gridDim (cudahost::B.grid)
inline constexpr int warpSize = 32;

// ---- synchronisation and warp collectives --------------------------------------------------------
inline void __syncthreads() { cudahost::barrier(); }
inline int __syncthreads_count(int p) {
  cudahost::B.red += p != 0;
  cudahost::barrier();
  int r = cudahost::B.redout;
  return r;
}
inline int __syncthreads_or(int p) { return __syncthreads_count(p) != 0; }
inline int __syncthreads_and(int p) { return __syncthreads_count(p == 0) == 0; }
inline void __syncwarp(unsigned m = ~0u) { cudahost::warp_barrier(m); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
namespace cudahost {
inline int lane() { return B.f[B.cur].lin & 31; }
inline Warp& warp() { return B.w[B.f[B.cur].lin / 32]; }
template <class T>
T exchange(unsigned m, T v, int src) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  Warp& W = warp();
  const int me = lane();
  memcpy(W.slot[me], &v, sizeof v);
  warp_barrier(m);
  if (!(m & W.alive & (1u << src)))
    fprintf(stderr, "cudahost: lane %d reads lane %d, which does not take part\n", me, src);
  memcpy(&v, W.slot[src], sizeof v);
  warp_barrier(m);
  return v;
}
inline unsigned ballot(unsigned m, bool p) {
  Warp& W = warp();
  W.pred[lane()] = p;
  warp_barrier(m);
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (unsigned)(W.pred[i] && (m & W.alive) >> i & 1) << i;
  warp_barrier(m);
  return r;
}
}  // namespace cudahost
template <class T>
T __shfl_sync(unsigned m, T v, int s, int w = 32) {
  int l = cudahost::lane();
  return cudahost::exchange(m, v, (l & ~(w - 1)) | (s & (w - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int o, int w = 32) {
  int l = cudahost::lane(), j = l ^ o;
  if (j > (l | (w - 1))) j = l;
  return cudahost::exchange(m, v, j);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = cudahost::lane(), j = l + d;
  if (j > (l | (w - 1))) j = l;
  return cudahost::exchange(m, v, j);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = cudahost::lane(), j = l - (int)d;
  if (j < (l & ~(w - 1))) j = l;
  return cudahost::exchange(m, v, j);
}
inline unsigned __ballot_sync(unsigned m, int p) { return cudahost::ballot(m, p); }
inline int __any_sync(unsigned m, int p) { return cudahost::ballot(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return cudahost::ballot(m, !p) == 0; }
inline unsigned __activemask() { return cudahost::warp().alive; }
template <class T, class F>
T cudahost_reduce(unsigned m, T v, F f) {
  T r = v;
  bool first = true;
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) {
      T x = cudahost::exchange(m, v, i);
      r = first ? x : f(r, x);
      first = false;
    }
  return r;
}
inline unsigned __reduce_add_sync(unsigned m, unsigned v) {
  return cudahost_reduce(m, v, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_or_sync(unsigned m, unsigned v) {
  return cudahost_reduce(m, v, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_max_sync(unsigned m, unsigned v) {
  return cudahost_reduce(m, v, [](unsigned a, unsigned b) { return a > b ? a : b; });
}

// ---- atomics (one OS thread: plain read-modify-write) ---------------------------------------------
template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  T o = *p;
  *p = o + v;
  return o;
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> v) {
  T o = *p;
  if (o < v) *p = v;
  return o;
}
template <class T>
T atomicMin(T* p, std::common_type_t<T> v) {
  T o = *p;
  if (v < o) *p = v;
  return o;
}
template <class T>
T atomicOr(T* p, std::common_type_t<T> v) {
  T o = *p;
  *p = o | v;
  return o;
}
template <class T>
T atomicAnd(T* p, std::common_type_t<T> v) {
  T o = *p;
  *p = o & v;
  return o;
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> v) {
  T o = *p;
  *p = v;
  return o;
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> c, std::common_type_t<T> v) {
  T o = *p;
  if (o == c) *p = v;
  return o;
}
inline unsigned atomicInc(unsigned* p, unsigned v) {
  unsigned o = *p;
  *p = o >= v ? 0 : o + 1;
  return o;
}

// ---- maths and bit intrinsics ----------------------------------------------------------------------
template <class T>
T cudahost_bits(const void* p) {
  T r;
  memcpy(&r, p, sizeof r);
  return r;
}
inline float __int_as_float(int v) { return cudahost_bits<float>(&v); }
inline int __float_as_int(float v) { return cudahost_bits<int>(&v); }
inline float __uint_as_float(unsigned v) { return cudahost_bits<float>(&v); }
inline unsigned __float_as_uint(float v) { return cudahost_bits<unsigned>(&v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }
inline int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  unsigned long long v = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= (unsigned)(v >> (8 * (s >> 4 * i & 7)) & 255) << 8 * i;
  return r;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline void __sincosf(float x, float* s, float* c) {
  *s = sinf(x);
  *c = cosf(x);
}
template <class A, class Bt>
std::common_type_t<A, Bt> min(A a, Bt b) {
  std::common_type_t<A, Bt> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class Bt>
std::common_type_t<A, Bt> max(A a, Bt b) {
  std::common_type_t<A, Bt> x = a, y = b;
  return x < y ? y : x;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldca(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::common_type_t<T> v) {
  *p = v;
}
template <class T>
void __stcg(T* p, std::common_type_t<T> v) {
  *p = v;
}

// ---- half and bfloat16: storage types with float arithmetic rounded after every operation ---------------
#define CUDAHOST_F16(NAME, TO, FROM)                                          \
  struct alignas(2) NAME {                                                    \
    unsigned short x;                                                         \
    NAME() = default;                                                         \
    NAME(float f) : x(FROM(f)) {}                                             \
    NAME(double f) : x(FROM((float)f)) {}                                     \
    NAME(int f) : x(FROM((float)f)) {}                                        \
    operator float() const { return TO(x); }                                  \
  };                                                                          \
  struct alignas(4) NAME##2 { NAME x, y; };                                   \
  inline NAME operator+(NAME a, NAME b) { return NAME((float)a + (float)b); } \
  inline NAME operator-(NAME a, NAME b) { return NAME((float)a - (float)b); } \
  inline NAME operator*(NAME a, NAME b) { return NAME((float)a * (float)b); } \
  inline NAME operator/(NAME a, NAME b) { return NAME((float)a / (float)b); } \
  inline NAME operator-(NAME a) {                                             \
    a.x ^= 0x8000;                                                            \
    return a;                                                                 \
  }                                                                           \
  inline bool operator<(NAME a, NAME b) { return (float)a < (float)b; }       \
  inline bool operator>(NAME a, NAME b) { return (float)a > (float)b; }       \
  inline bool operator==(NAME a, NAME b) { return (float)a == (float)b; }     \
  inline bool operator!=(NAME a, NAME b) { return (float)a != (float)b; }
inline float cudahost_bf(unsigned short h) { return __uint_as_float((unsigned)h << 16); }
inline unsigned short cudahost_tobf(float f) {
  unsigned u = __float_as_uint(f);
  if (f != f) return 0x7FFF;
  return (unsigned short)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
inline float cudahost_h(unsigned short h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return (float)v;
}
inline unsigned short cudahost_toh(float f) {
  _Float16 v = (_Float16)f;
  unsigned short h;
  memcpy(&h, &v, 2);
  return h;
}
CUDAHOST_F16(__nv_bfloat16, cudahost_bf, cudahost_tobf)
CUDAHOST_F16(__half, cudahost_h, cudahost_toh)
typedef __nv_bfloat162 nv_bfloat162;
typedef __nv_bfloat16 nv_bfloat16;
typedef __half half;
typedef __half2 half2;
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __float2bfloat16(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
inline float __half2float(__half v) { return v; }
inline __half __float2half(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return 0; }

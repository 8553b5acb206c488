// The SGD step on the CPU, formula in sgd_math.h.
// Bytes per float32 element: reads w, g, v, writes w, v: 20, the floor; 12 without momentum.
#include <type_traits>

#include "../common/simd.h"
#include "sgd_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// bfloat16 keeps the upper half of a float32: adding 16 random bits to the lower half and cutting it off
// rounds up with the probability of the remainder, so that the expected value is exact (Gupta et al. 2015).
// Element i of tensor t of the call takes value i % 8 of group i / 8, draw t; a NaN or infinity passes
// unchanged.
void store_stochastic(BFloat16* out, const Vec<float>& v, int lanes, const uint16_t* random) {
  float lane[16];
  store(lane, v);
  for (int j = 0; j < lanes; ++j) {
    const uint32_t u = float_bits(lane[j]);
    if ((u & 0x7f800000u) == 0x7f800000u)
      from_float(lane[j], out + j);
    else
      out[j].bits = uint16_t((u + random[j]) >> 16);
  }
}

// The same for pairs.
FR_INLINE Pairs pack_stochastic(const Vec<float>& even, const Vec<float>& odd, const uint16_t* random) {
  Pairs pairs;
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    U32Part r;
    memcpy(&r, random + i * FR_VECTOR_BYTES / 2, sizeof r);
    const U32Part e = (U32Part)even.part[i], o = (U32Part)odd.part[i], exponent = 0x7f800000u - U32Part{};
    const U32Part low = (e + ((e & exponent) == exponent ? U32Part{} : r & 0xffffu)) >> 16;
    const U32Part high = o + ((o & exponent) == exponent ? U32Part{} : r >> 16);
    pairs.part[i] = low | (high & 0xffff0000u);
  }
  return pairs;
}

// 32 elements.
template <SgdMomentum kMomentum, SgdPenalty kPenalty, class V>
FR_INLINE void step_pairs(BFloat16* param, const BFloat16* grad, BFloat16* momentum, const uint16_t* random,
                          const SgdNumbers<V>& n) {
  V w_even, w_odd, g_even, g_odd, v_even(0), v_odd(0);
  load_pairs(param, w_even, w_odd);
  load_pairs(grad, g_even, g_odd);
  if (kMomentum != SgdMomentum::kNone) load_pairs(momentum, v_even, v_odd);
  sgd_element(kMomentum, kPenalty, w_even, g_even, v_even, n);
  sgd_element(kMomentum, kPenalty, w_odd, g_odd, v_odd, n);
  if (kMomentum != SgdMomentum::kNone) store_pairs(momentum, pack_pairs(v_even, v_odd));
  store_pairs(param, random ? pack_stochastic(w_even, w_odd, random) : pack_pairs(w_even, w_odd));
}

// The arithmetic on contiguous memory. It is a function of its own so that the code for strided tensors is
// not compiled for each of its nine forms.
template <class T, SgdMomentum kMomentum, SgdPenalty kPenalty, class V>
__attribute__((noinline)) void step_vectors(T* param, const T* grad, T* momentum, int64_t count,
                                            const uint16_t* random, const SgdNumbers<V>& numbers) {
  constexpr bool has_momentum = kMomentum != SgdMomentum::kNone;
  const SgdNumbers<V> n =
      numbers;  // a copy, since the compiler must assume that a store changes the original
  int64_t done = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; done + 32 <= count; done += 32)
      step_pairs<kMomentum, kPenalty>(param + done, grad + done, momentum + done,
                                      random ? random + done : nullptr, n);
  }
  for_each_vector<typename V::Scalar>(count - done, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const int64_t i = done + j;
    V w = load(param + i, lanes), v(0);
    if (has_momentum) v = load(momentum + i, lanes);
    sgd_element(kMomentum, kPenalty, w, load(grad + i, lanes), v, n);
    if (has_momentum) store(momentum + i, v, lanes);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (random) return store_stochastic(param + i, w, lanes, random + i);
    }
    store(param + i, w, lanes);
  });
}

template <class T, class V, SgdMomentum kMomentum>
auto choose_penalty(SgdPenalty penalty) {
  return penalty == SgdPenalty::kNone         ? step_vectors<T, kMomentum, SgdPenalty::kNone, V>
         : penalty == SgdPenalty::kInGradient ? step_vectors<T, kMomentum, SgdPenalty::kInGradient, V>
                                              : step_vectors<T, kMomentum, SgdPenalty::kDecoupled, V>;
}

template <class T>
void step_blocks(const SgdArgs& a, const SgdTensor& t, uint32_t tensor_index, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  const SgdNumbers<V> numbers = sgd_numbers<V>(SgdConstants<A>(a), t.started && *t.started == 0);
  const SgdPenalty penalty = sgd_penalty(a);
  const auto step_vectors = !t.momentum  ? choose_penalty<T, V, SgdMomentum::kNone>(penalty)
                            : a.nesterov ? choose_penalty<T, V, SgdMomentum::kNesterov>(penalty)
                                         : choose_penalty<T, V, SgdMomentum::kHeavyBall>(penalty);
  const bool stochastic = std::is_same_v<T, BFloat16> && a.stochastic_rounding;
  T param_buffer[kBlock], grad_buffer[kBlock], momentum_buffer[kBlock];
  uint16_t random[kBlock + 64];
  const bool in_place =
      t.param_layout.contiguous && t.grad_layout.contiguous && (!t.momentum || t.momentum_layout.contiguous);
  const int64_t block_size = in_place && !stochastic ? end - begin : kBlock;  // without buffers, one block
  for (int64_t block = begin; block < end; block += block_size) {
    const int64_t next = end - block < block_size ? end : block + block_size;
    T* param =
        const_cast<T*>(read_block(t.param_layout, static_cast<const T*>(t.param), block, next, param_buffer));
    const T* grad = read_block(t.grad_layout, static_cast<const T*>(t.grad), block, next, grad_buffer);
    T* momentum = nullptr;
    if (t.momentum)
      momentum = const_cast<T*>(
          read_block(t.momentum_layout, static_cast<const T*>(t.momentum), block, next, momentum_buffer));
    if (stochastic)
      philox_bulk(a.seed.get(), uint64_t(block) / 8, (next - block + 7) / 8, tensor_index,
                  Purpose::kStochasticRounding, random);
    step_vectors(param, grad, momentum, next - block, stochastic ? random : nullptr, numbers);
    write_block(t.param_layout, static_cast<T*>(t.param), block, next, param);
    if (t.momentum) write_block(t.momentum_layout, static_cast<T*>(t.momentum), block, next, momentum);
  }
}

void step(const SgdArgs& a, const SgdTensor& t, uint32_t tensor_index, int64_t begin, int64_t end) {
  with_dtype(t.dtype, [&](auto* type) {
    step_blocks<std::remove_pointer_t<decltype(type)>>(a, t, tensor_index, begin, end);
  });
}

}  // namespace

extern const SgdKernels sgd_kernels;
const SgdKernels sgd_kernels = {step};

}  // namespace fastreg::FASTREG_ISA

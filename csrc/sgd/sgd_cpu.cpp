// The SGD step on the CPU, formula in sgd_math.h.
// Bytes per float32 element: reads w, g, v, writes w, v: 20, the floor; 12 without momentum.
#include <type_traits>

#include "../common/simd.h"
#include "sgd_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// bfloat16 keeps the upper half of a float32: adding 16 random bits to the lower half and cutting it off rounds up with the
// probability of the remainder, so that the expected value is exact (Gupta et al. 2015). Draw 0 of tensor t is element group
// (t, i / 8); a NaN or infinity passes unchanged.
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

template <class T, bool kMomentum>
void step_tiles(const SgdArgs& a, const SgdTensor& t, uint32_t tensor_index, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  const SgdNumbers<V> c{V(A(a.lr)),           V(A(a.momentum)), V(A(1 - a.dampening)),
                        V(A(a.weight_decay)), V(A(a.l1)),       V(A((a.maximize ? -1 : 1) / a.grad_scale))};
  const bool stochastic = std::is_same_v<T, BFloat16> && a.stochastic_rounding;
  T param_buffer[kTile], grad_buffer[kTile], momentum_buffer[kTile];
  uint16_t random[kTile + 64];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t n = end - tile < kTile ? end - tile : kTile;
    T* param = const_cast<T*>(read_tile(t.param_layout, static_cast<const T*>(t.param), tile, tile + n, param_buffer));
    const T* grad = read_tile(t.grad_layout, static_cast<const T*>(t.grad), tile, tile + n, grad_buffer);
    T* momentum = nullptr;
    if (kMomentum)
      momentum = const_cast<T*>(read_tile(t.momentum_layout, static_cast<const T*>(t.momentum), tile, tile + n, momentum_buffer));
    if (stochastic) philox_bulk(a.seed, uint64_t(tile) / 8, (n + 7) / 8, tensor_index, Purpose::kStochasticRounding, random);
    for_each_vector<A>(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      V w = load(param + i, lanes), v(0);
      if (kMomentum) v = load(momentum + i, lanes);
      sgd_element(w, load(grad + i, lanes), kMomentum ? &v : nullptr, c, a, t.first_step);
      if (kMomentum) store(momentum + i, v, lanes);
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (stochastic) return store_stochastic(param + i, w, lanes, random + i);
      }
      store(param + i, w, lanes);
    });
    write_tile(t.param_layout, static_cast<T*>(t.param), tile, tile + n, param);
    if (kMomentum) write_tile(t.momentum_layout, static_cast<T*>(t.momentum), tile, tile + n, momentum);
  }
}

void step(const SgdArgs& a, const SgdTensor& t, uint32_t tensor_index, int64_t begin, int64_t end) {
  with_dtype(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    t.momentum ? step_tiles<T, true>(a, t, tensor_index, begin, end) : step_tiles<T, false>(a, t, tensor_index, begin, end);
  });
}

}  // namespace

extern const SgdKernels sgd_kernels;
const SgdKernels sgd_kernels = {step};

}  // namespace fastreg::FASTREG_ISA

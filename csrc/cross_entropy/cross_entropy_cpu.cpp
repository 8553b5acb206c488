// Smoothed cross-entropy on the CPU with its gradient written in the same sweep; formula in
// cross_entropy_math.h. How the rows lie in memory decides what is done:
//   contiguous    cross_entropy_rows.h: 8 bytes per float32 logit, 4 read and 4 written, the floor; 4 without
//                 a gradient
//   side by side  cross_entropy_columns.h: the same bytes
//   otherwise     kTileRows rows are gathered into a buffer, computed as contiguous ones and scattered: the
//                 same bytes of memory, and the buffer's 8 in the cache
#include <type_traits>
#include <vector>

#include "../common/flush_mode.h"
#include "cross_entropy_columns.h"
#include "cross_entropy_math.h"
#include "cross_entropy_rows.h"

namespace fastreg::FASTREG_ISA {
namespace {

// What a thread needs beside its rows.
template <class T, class G, class A>
struct Buffers {
  bool direct, keeps_exps;  // rows are where they can be worked on; exponentials need room of their own
  std::vector<A> exps, soft;
  std::vector<T> logits;
  std::vector<G> grads;
  std::vector<Segment<A>> segments;

  explicit Buffers(const CrossEntropyArgs& a)
      : direct(a.logits_stride.cls == 1 && (!a.grad || a.grad_stride.cls == 1)),
        keeps_exps(a.grad && !(direct && std::is_same_v<A, G> && a.grad != a.logits)),
        exps(keeps_exps ? size_t(a.classes) : 0),
        soft(a.soft_target ? size_t(a.classes) : 0),
        logits(direct ? 0 : size_t(a.classes * kTileRows)),
        grads(direct || !a.grad ? 0 : size_t(a.classes * kTileRows)) {}
};

// Row `inner` of batch element n, whose logits and gradient are contiguous at x and g.
template <class T, class G, class A>
void one_row(const CrossEntropyArgs& a, int64_t n, int64_t inner, const T* x, G* g,
             Buffers<T, G, A>& buffers) {
  const int64_t index = n * a.inner + inner, target = a.target ? a.target[index] : 0;
  double* const loss = a.row_loss + index;
  A unwanted, *const lse = a.row_lse ? static_cast<A*>(a.row_lse) + index : &unwanted;
  if (a.target && target == a.ignore_index) {
    *loss = 0;
    *lse = 0;
    if (g) memset(static_cast<void*>(g), 0, size_t(a.classes) * sizeof(G));
    return;
  }
  A* exps = buffers.exps.data();
  if constexpr (std::is_same_v<A, G>) {
    if (!buffers.keeps_exps) exps = g;
  }
  if (a.soft_target) gather_soft_target(a, n, inner, buffers.soft.data());
  const A* soft = a.soft_target ? buffers.soft.data() : nullptr;
  const double factor = a.row_factor ? static_cast<const A*>(a.row_factor)[index] : a.grad_factor;
  if (soft || a.weight)
    finish_row(Row<true, T, G, A>{a, x, soft, target, exps, g, buffers.segments}, factor, loss, lse);
  else
    finish_row(Row<false, T, G, A>{a, x, soft, target, exps, g, buffers.segments}, factor, loss, lse);
}

// Rows of tiles [begin, end), those of up to `together` tiles at once: visit(batch element, first row, row
// after the last).
template <class Visit>
void for_each_tile(const CrossEntropyArgs& a, int64_t begin, int64_t end, int64_t together,
                   const Visit& visit) {
  const int64_t per_outer = (a.inner + kTileRows - 1) / kTileRows;
  for (int64_t tile = begin; tile < end;) {
    const int64_t number = tile % per_outer,
                  rest = per_outer - number < end - tile ? per_outer - number : end - tile;
    const int64_t count = rest < together ? rest : together, last = (number + count) * kTileRows;
    visit(tile / per_outer, number * kTileRows, last < a.inner ? last : a.inner);
    tile += count;
  }
}

template <class T, class G>
void forward_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  const int64_t k = a.classes;
  const auto &xs = a.logits_stride, &gs = a.grad_stride;
  Buffers<T, G, typename Accumulate<T>::type> buffers(a);
  for_each_tile(a, begin, end, 1, [&](int64_t n, int64_t first, int64_t last) {
    const int64_t rows = last - first;
    const T* x = static_cast<const T*>(a.logits) + n * xs.outer + first * xs.inner;
    G* g = a.grad ? static_cast<G*>(a.grad) + n * gs.outer + first * gs.inner : nullptr;
    // A tile is gathered once per cache line, not once per row: neighbours in memory are neighbouring rows.
    if (!buffers.direct) {
      for (int64_t c = 0; c < k; ++c)
        for (int64_t r = 0; r < rows; ++r) buffers.logits[size_t(r * k + c)] = x[c * xs.cls + r * xs.inner];
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* row_x = buffers.direct ? x + r * xs.inner : buffers.logits.data() + r * k;
      G* row_g = !g ? nullptr : buffers.direct ? g + r * gs.inner : buffers.grads.data() + r * k;
      one_row(a, n, first + r, row_x, row_g, buffers);
    }
    if (!buffers.direct && g) {
      for (int64_t c = 0; c < k; ++c)
        for (int64_t r = 0; r < rows; ++r) g[c * gs.cls + r * gs.inner] = buffers.grads[size_t(r * k + c)];
    }
  });
}

template <class T, class G>
void forward_typed(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const FlushMode<A> mode(!a.weight && !a.soft_target);
  if (!goes_in_columns<A>(a)) return forward_rows<T, G>(a, begin, end);
  ColumnBuffers<A> buffers(a.classes);
  for_each_tile(a, begin, end, buffers.rows / kTileRows, [&](int64_t n, int64_t first, int64_t last) {
    column_tile<T, G>(a, n, first, last, buffers);
  });
}

void forward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A float16 gradient is kept in float32: its small values would vanish before a loss scale could lift
    // them.
    using G = std::conditional_t<std::is_same_v<T, Half>, float, T>;
    a.grad == a.logits ? forward_typed<T, T>(a, begin, end) : forward_typed<T, G>(a, begin, end);
  });
}

void scale(const CrossEntropyScale& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    using V = Vec<A>;
    A number{};
    with_dtype(a.factor_dtype, [&](auto* other) {
      number = A(to_float(*static_cast<const std::remove_pointer_t<decltype(other)>*>(a.factor)));
    });
    if (number == A(1)) return;
    T* const values = static_cast<T*>(a.values) + begin;
    const FlushMode<A> mode;
    const V factor(number);
    for_each_vector<A>(end - begin, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store(values + i, scaled_gradient(load(values + i, lanes), factor), lanes);
    });
  });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels;
const CrossEntropyKernels cross_entropy_kernels = {forward, scale};

}  // namespace fastreg::FASTREG_ISA

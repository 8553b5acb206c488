// What the operators of the optimisers share: checks of their lists and numbers, and threads over all
// tensors. This is for *_op.cpp only, since it sees torch.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "backend.h"
#include "optimizer_math.h"

namespace fastreg {

// What an operator takes beside its lists and numbers; each may be missing.
struct Given {
  std::optional<Tensor> lr, grad_scale, found_inf, clip, ema, seed;
};

inline void check_scalar(const char* op, const char* name, const Tensor& t, const Tensor* param) {
  check(t.numel() == 1, op, ": ", name, " must be one number, got shape ", shape_text(t));
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op, ": ", name,
        " must be float32 or float64, got ", t.scalar_type(), "; convert it with .float()");
  if (param) check_device(op, name, t, "the parameters", *param);
}

inline double value_of(const Tensor& t) {
  return number_at(t.const_data_ptr(), t.scalar_type() == ScalarType::Double, 0);
}

// A number of the step: read now where it lies on the CPU, or left for the kernel to read.
inline void take_number(const std::optional<Tensor>& t, double* value, const void** at, bool* wide) {
  if (!t) return;
#ifdef FASTREG_CUDA
  (void)value;
  *at = t->const_data_ptr();
  *wide = t->scalar_type() == ScalarType::Double;
#else
  (void)at, (void)wide;
  *value = value_of(*t);
#endif
}
// The same for a number that a kernel takes only as float32.
inline void take_number(const char* op, const char* name, const std::optional<Tensor>& t, double* value,
                        const float** at) {
  const void* where = nullptr;
  bool wide = false;
  take_number(t, value, &where, &wide);
  if (wide) fail(op, ": ", name, " must be float32, got ", t->scalar_type(), "; convert it with .float()");
  *at = static_cast<const float*>(where);
}

// The arguments that all optimisers have, checked.
inline StepArgs step_args(const char* op, const Given& given, const Tensor* first, double lr,
                          double weight_decay, double l1, double ema, bool proximal, bool maximize) {
  StepArgs a{};
  a.lr = lr;
  a.weight_decay = weight_decay;
  a.l1 = l1;
  a.ema = ema;
  a.clip = 1;
  a.proximal = proximal;
  a.maximize = maximize;
  for (const auto& [name, number] : {std::pair("lr", &given.lr), std::pair("grad_scale", &given.grad_scale),
                                     std::pair("found_inf", &given.found_inf), std::pair("clip", &given.clip),
                                     std::pair("ema", &given.ema)})
    if (*number) check_scalar(op, name, **number, first);
  double overflow = 0, grad_scale = 1;
  take_number(given.lr, &a.lr, &a.lr_at, &a.lr_wide);
  take_number(given.ema, &a.ema, &a.ema_at, &a.ema_wide);
  take_number(op, "grad_scale", given.grad_scale, &grad_scale, &a.grad_scale_at);
  a.grad_factor = (maximize ? -1 : 1) / grad_scale;
  take_number(op, "found_inf", given.found_inf, &overflow, &a.found_inf_at);
  take_number(op, "clip", given.clip, &a.clip, &a.clip_at);
  for (const double number : {a.lr, a.weight_decay, a.l1})
    check(std::isfinite(number) && number >= 0, op,
          ": lr, weight_decay and l1 must be finite and at least 0, got ", number);
  check(a.ema >= 0 && a.ema <= 1, op, ": ema must be in [0, 1], got ", a.ema);
  a.stochastic_rounding = given.seed.has_value();
  if (given.seed) a.seed = seed_of(op, *given.seed, first ? *first : *given.seed);
  return a;
}

// Whether the host knows that nothing is to be done.
inline bool skips(const Given& given) {
#ifdef FASTREG_CUDA
  (void)given;
  return false;
#else
  return given.found_inf && value_of(*given.found_inf) != 0;
#endif
}

// Puts a tensor into its slot. The parameter comes first.
inline void fill_slot(const char* op, StepTensor* t, int slot, const char* name, const Tensor& tensor,
                      const Tensor& param) {
  if (slot != kParam) check_same(op, name, tensor, "its parameter", param);
  t->layout[slot] = layout_of(op, tensor);
  if (slot != kGrad && overlaps_itself(t->layout[slot]))
    fail(op, ": ", name, "'s elements must not share memory; use .clone()");
  t->data[slot] = slot == kGrad ? const_cast<void*>(tensor.const_data_ptr()) : tensor.mutable_data_ptr();
}

// places has (draw, first, columns, row) of each tensor, in their order, or nothing: then a tensor's number
// is its place in the list, and it is a whole.
inline void check_places(const char* op, const std::vector<int64_t>& places, size_t count) {
  check(places.empty() || places.size() == 4 * count, op, ": places must have four numbers for each of ",
        count, " parameters or none, got ", places.size());
  for (size_t i = 0; i < places.size(); ++i)
    check(places[i] >= (i % 4 == 2), op, ": places must be at least 0, and columns at least 1, got ",
          places[i]);
}

inline void fill_first(const char* op, StepTensor* t, size_t index, const std::vector<int64_t>& places,
                       const Tensor& param, const Tensor& grad) {
  t->dtype = dtype_of(op, "a parameter", param);
  for (void*& data : t->data) data = nullptr;
  t->counter = t->n_averaged = nullptr;
  t->step = 0;
  const int64_t whole[] = {int64_t(index), 0, std::max<int64_t>(1, param.numel()), 0};
  const int64_t* const place = places.empty() ? whole : &places[4 * index];
  t->draw = uint32_t(place[0]);
  t->first = place[1];
  t->columns = place[2];
  t->row = place[3];
  fill_slot(op, t, kParam, "a parameter", param, param);
  fill_slot(op, t, kGrad, "a gradient", grad, param);
}

// One float32 beside a parameter.
inline float* counter_of(const char* op, const char* name, const Tensor& t, const Tensor& param) {
  check(t.scalar_type() == ScalarType::Float && t.numel() == 1, op, ": ", name,
        " must be one float32; convert it with .float()");
  check_device(op, name, t, "its parameter", param);
  return static_cast<float*>(t.mutable_data_ptr());
}

inline void fill_average(const char* op, StepTensor* t, const Tensor& average, const Tensor& n_averaged,
                         const Tensor& param) {
  fill_slot(op, t, kAverage, "an average", average, param);
  t->n_averaged = counter_of(op, "n_averaged", n_averaged, param);
}

// Tensors that fill their memory in the same order can be walked as flat memory. Stochastic rounding draws by
// the logical index, so that there only a contiguous parameter can.
inline void find_flat(StepTensor* t, bool stochastic_rounding) {
  bool flat = !(stochastic_rounding && !t->layout[kParam].contiguous);
  for (int s = kGrad; s < kSlots; ++s)
    flat = flat && (!t->data[s] || same_dense_order(t->layout[kParam], t->layout[s]));
  if (!flat) return;
  for (int s = 0; s < kSlots; ++s)
    if (t->data[s]) t->layout[s].contiguous = true;
}

#ifndef FASTREG_CUDA
constexpr int64_t kGrain = 1 << 15;  // elements per piece of work

// Calls work(tensor, begin, end) for spans of all tensors, over torch's threads; numel(i) are the elements of
// tensor i. A span begins at a multiple of kGrain.
template <class Numel, class Work>
void for_each_span(size_t count, Numel numel, Work work) {
  std::vector<int64_t> first_piece(count + 1, 0);
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) {
    elements += numel(i);
    first_piece[i + 1] = first_piece[i] + (numel(i) + kGrain - 1) / kGrain;
  }
  const auto pieces_of_all = [&](int64_t begin, int64_t end) {  // in one numbering
    size_t i =
        size_t(std::upper_bound(first_piece.begin(), first_piece.end(), begin) - first_piece.begin()) - 1;
    for (int64_t piece = begin; piece < end; ++i) {
      const int64_t stop = std::min(end, first_piece[i + 1]);
      if (stop > piece)
        work(i, (piece - first_piece[i]) * kGrain, std::min(numel(i), (stop - first_piece[i]) * kGrain));
      piece = std::max(piece, stop);
    }
  };
  const int64_t pieces = first_piece[count];
  if (elements <= kGrain) {
    if (pieces > 0) pieces_of_all(0, pieces);
  } else {
    torch::stable::parallel_for(0, pieces, std::max<int64_t>(1, pieces * kGrain / elements), pieces_of_all);
  }
}

// Prefetches the first kAhead bytes of each slot of a tensor.
inline void fetch_beginning(const StepTensor& t) {
  const int64_t size = with_dtype(t.dtype, [](auto* type) { return int64_t(sizeof *type); });
  const int64_t bytes = std::min(kAhead, t.layout[kParam].numel * size);
  for (const void* data : t.data) {
    if (!data) continue;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i);
  }
}

// A step of all tensors, and what is counted after it; nothing is checked.
template <class Kernels, class Args>
void step_all(const Kernels& kernels, const Args& a, const StepTensor* tensors, size_t count,
              bool counts_steps) {
  for_each_span(
      count, [&](size_t i) { return tensors[i].layout[kParam].numel; },
      [&](size_t i, int64_t begin, int64_t end) {
        if (i + 1 < count) fetch_beginning(tensors[i + 1]);
        kernels.step(a, tensors[i], begin, end);
      });
  for (size_t i = 0; i < count; ++i) {
    if (float* counter = tensors[i].counter) *counter = counts_steps ? *counter + 1 : 1;
    if (float* n_averaged = tensors[i].n_averaged) *n_averaged += 1;
  }
}
inline int64_t elements_of(const StepTensor* tensors, size_t count) {
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) elements += tensors[i].layout[kParam].numel;
  return elements;
}
#endif

}  // namespace fastreg

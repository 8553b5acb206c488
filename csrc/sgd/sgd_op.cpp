// torch.ops.fastreg.sgd_: checks, threads over the tiles of all tensors or launches. The schema stands in
// fastreg/optim.py.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../common/backend.h"
#include "sgd_math.h"

namespace fastreg {
namespace {

void check_scalar(const char* name, const Tensor& t, const Tensor* param) {
  check(t.numel() == 1, "SGD: ", name, " must be one number, got shape ", shape_text(t));
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, "SGD: ", name,
        " must be float32 or float64, got ", t.scalar_type(), "; convert it with .float()");
  if (param) check_device("SGD", name, t, "the parameters", *param);
}

#ifdef FASTREG_CUDA
// A float32 number for the kernel, or null.
const float* number_at(const char* name, const std::optional<Tensor>& t) {
  if (!t) return nullptr;
  check(t->scalar_type() == ScalarType::Float, "SGD: ", name, " must be float32, got ", t->scalar_type(),
        "; convert it with .float()");
  return static_cast<const float*>(t->const_data_ptr());
}
#else
double value_of(const Tensor& t) {
  const void* p = t.const_data_ptr();
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(p)
                                               : double(*static_cast<const float*>(p));
}
#endif

void sgd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
         std::vector<Tensor> momentum_started, double lr, double momentum, double dampening,
         double weight_decay, double l1, bool nesterov, bool proximal, bool decoupled, bool maximize,
         std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
         std::optional<Tensor> seed) {
  const char* op = "SGD";
  const size_t count = params.size();
  check(grads.size() == count &&
            (momentum == 0 ? momentum_buffers.empty() : momentum_buffers.size() == count) &&
            (momentum_started.empty() || momentum_started.size() == count),
        "SGD: expected one gradient and, with momentum, one buffer for each of ", count, " parameters, got ",
        grads.size(), " and ", momentum_buffers.size());
  const Tensor* first = count ? &params[0] : nullptr;
  if (lr_tensor) check_scalar("lr", *lr_tensor, first);
  if (grad_scale) check_scalar("grad_scale", *grad_scale, first);
  if (found_inf) check_scalar("found_inf", *found_inf, first);
  SgdArgs a{};
  a.lr = lr;
  a.grad_scale = 1;
#ifdef FASTREG_CUDA
  a.lr_at = lr_tensor ? lr_tensor->const_data_ptr() : nullptr;
  a.lr_wide = lr_tensor && lr_tensor->scalar_type() == ScalarType::Double;
  a.grad_scale_at = number_at("grad_scale", grad_scale);
  a.found_inf_at = number_at("found_inf", found_inf);
#else
  if (lr_tensor) a.lr = value_of(*lr_tensor);
  if (grad_scale) a.grad_scale = value_of(*grad_scale);
#endif
  for (const double number : {a.lr, momentum, weight_decay, l1})
    check(std::isfinite(number) && number >= 0,
          "SGD: lr, momentum, weight_decay and l1 must be finite and at least 0, got ", number);
  check(std::isfinite(dampening), "SGD: dampening must be finite, got ", dampening);
  a.momentum = momentum;
  a.dampening = dampening;
  a.weight_decay = weight_decay;
  a.l1 = l1;
  a.nesterov = nesterov;
  a.proximal = proximal;
  a.decoupled = decoupled;
  a.maximize = maximize;
  a.stochastic_rounding = seed.has_value();
  if (seed) a.seed = seed_of(op, *seed, first ? *first : *seed);

  const auto tensors =
      std::make_unique_for_overwrite<SgdTensor[]>(count);  // not zeroed: most of it are layouts nobody reads
  for (size_t i = 0; i < count; ++i) {
    SgdTensor& t = tensors[i];
    t.dtype = dtype_of(op, "a parameter", params[i]);
    check_same(op, "a gradient", grads[i], "its parameter", params[i]);
    t.param_layout = layout_of(op, params[i]);
    t.grad_layout = layout_of(op, grads[i]);
    check(!overlaps_itself(t.param_layout),
          "SGD: a parameter's elements must not share memory; use .clone()");
    bool flat = same_dense_order(t.param_layout, t.grad_layout) && !(seed && !t.param_layout.contiguous);
    t.param = params[i].mutable_data_ptr();
    t.grad = grads[i].const_data_ptr();
    t.momentum = nullptr;
    t.started = nullptr;
    if (momentum != 0) {
      check_same(op, "a momentum buffer", momentum_buffers[i], "its parameter", params[i]);
      t.momentum_layout = layout_of(op, momentum_buffers[i]);
      check(!overlaps_itself(t.momentum_layout),
            "SGD: a momentum buffer's elements must not share memory; use .clone()");
      flat = flat && same_dense_order(t.param_layout, t.momentum_layout);
      t.momentum = momentum_buffers[i].mutable_data_ptr();
      if (!momentum_started.empty()) {
        const Tensor& flag = momentum_started[i];
        check(flag.scalar_type() == ScalarType::Float && flag.numel() == 1,
              "SGD: momentum_started must be one float32; convert it with .float()");
        check_device(op, "momentum_started", flag, "its parameter", params[i]);
        t.started = static_cast<float*>(flag.mutable_data_ptr());
      }
    }
    if (flat) t.param_layout.contiguous = t.grad_layout.contiguous = t.momentum_layout.contiguous = true;
  }
#ifdef FASTREG_CUDA
  if (count)
    on_stream(op, params[0], [&](void* stream) { return sgd_step_cuda(a, tensors.get(), count, stream); });
#else
  if (found_inf && value_of(*found_inf) != 0)
    return;  // the step is skipped: nothing changes, momentum included
  sgd_step(a, tensors.get(), count);
  for (size_t i = 0; i < count; ++i)
    if (tensors[i].started) *tensors[i].started = 1;
#endif
}

}  // namespace

#ifndef FASTREG_CUDA
constexpr int64_t kGrain = 1 << 15;  // elements per piece of work; a multiple of the tile

void sgd_step(const SgdArgs& a, const SgdTensor* tensors, size_t count) {
  std::vector<int64_t> first_piece(count + 1, 0);
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = tensors[i].param_layout.numel;
    elements += numel;
    first_piece[i + 1] = first_piece[i] + (numel + kGrain - 1) / kGrain;
  }
  const SgdKernels& kernels = FR_KERNELS(sgd_kernels, elements);
  const auto work = [&](int64_t begin, int64_t end) {  // pieces of all tensors, in one numbering
    size_t i =
        size_t(std::upper_bound(first_piece.begin(), first_piece.end(), begin) - first_piece.begin()) - 1;
    for (int64_t piece = begin; piece < end; ++i) {
      const int64_t stop = std::min(end, first_piece[i + 1]), numel = tensors[i].param_layout.numel;
      kernels.step(a, tensors[i], uint32_t(i), (piece - first_piece[i]) * kGrain,
                   std::min(numel, (stop - first_piece[i]) * kGrain));
      piece = stop;
    }
  };
  const int64_t pieces = first_piece[count];
  if (elements <= kGrain) {
    if (pieces > 0) work(0, pieces);
  } else {
    torch::stable::parallel_for(0, pieces, std::max<int64_t>(1, pieces * kGrain / elements), work);
  }
}
#endif

}  // namespace fastreg

FR_LIBRARY_IMPL(m) { m.impl("sgd_", TORCH_BOX(&fastreg::sgd)); }

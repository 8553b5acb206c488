// torch.ops.fastreg.sgd_: checks, threads over all tensors or launches. The schema stands in fastreg/_sgd.py.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../common/backend.h"
#include "../common/capsule.h"
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

// What the operator takes beside its lists and numbers; each may be missing.
struct Given {
  std::optional<Tensor> lr, grad_scale, found_inf, seed;
};

// The numbers of `a`, checked, with those that are tensors read or left for the kernel to read.
void check_numbers(SgdArgs* a, const Given& given, const Tensor* first) {
  if (given.lr) check_scalar("lr", *given.lr, first);
  if (given.grad_scale) check_scalar("grad_scale", *given.grad_scale, first);
  if (given.found_inf) check_scalar("found_inf", *given.found_inf, first);
  a->grad_scale = 1;
#ifdef FASTREG_CUDA
  a->lr_at = given.lr ? given.lr->const_data_ptr() : nullptr;
  a->lr_wide = given.lr && given.lr->scalar_type() == ScalarType::Double;
  a->grad_scale_at = number_at("grad_scale", given.grad_scale);
  a->found_inf_at = number_at("found_inf", given.found_inf);
#else
  if (given.lr) a->lr = value_of(*given.lr);
  if (given.grad_scale) a->grad_scale = value_of(*given.grad_scale);
#endif
  for (const double number : {a->lr, a->momentum, a->weight_decay, a->l1})
    check(std::isfinite(number) && number >= 0,
          "SGD: lr, momentum, weight_decay and l1 must be finite and at least 0, got ", number);
  check(std::isfinite(a->dampening), "SGD: dampening must be finite, got ", a->dampening);
  a->stochastic_rounding = given.seed.has_value();
  if (given.seed) a->seed = seed_of("SGD", *given.seed, first ? *first : *given.seed);
}

// One parameter with its gradient and, with momentum, its buffer and flag; either may be null. Stochastic
// rounding draws by the logical index, so that only a contiguous parameter can be walked as flat memory then.
void fill_tensor(SgdTensor* t, const Tensor& param, const Tensor& grad, const Tensor* buffer,
                 const Tensor* flag, bool stochastic_rounding) {
  const char* op = "SGD";
  t->dtype = dtype_of(op, "a parameter", param);
  check_same(op, "a gradient", grad, "its parameter", param);
  t->param_layout = layout_of(op, param);
  t->grad_layout = layout_of(op, grad);
  check(!overlaps_itself(t->param_layout), "SGD: a parameter's elements must not share memory; use .clone()");
  bool flat = same_dense_order(t->param_layout, t->grad_layout) &&
              !(stochastic_rounding && !t->param_layout.contiguous);
  t->param = param.mutable_data_ptr();
  t->grad = grad.const_data_ptr();
  t->momentum = nullptr;
  t->started = nullptr;
  if (buffer) {
    check_same(op, "a momentum buffer", *buffer, "its parameter", param);
    t->momentum_layout = layout_of(op, *buffer);
    check(!overlaps_itself(t->momentum_layout),
          "SGD: a momentum buffer's elements must not share memory; use .clone()");
    flat = flat && same_dense_order(t->param_layout, t->momentum_layout);
    t->momentum = buffer->mutable_data_ptr();
  }
  if (flag) {
    check(flag->scalar_type() == ScalarType::Float && flag->numel() == 1,
          "SGD: momentum_started must be one float32; convert it with .float()");
    check_device(op, "momentum_started", *flag, "its parameter", param);
    t->started = static_cast<float*>(flag->mutable_data_ptr());
  }
  if (flat) t->param_layout.contiguous = t->grad_layout.contiguous = t->momentum_layout.contiguous = true;
}

void sgd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
         std::vector<Tensor> momentum_started, std::vector<Tensor> averages, std::vector<Tensor> n_averaged,
         double lr, double momentum, double dampening, double weight_decay, double l1, double ema,
         bool nesterov, bool proximal, bool decoupled, bool maximize, std::optional<Tensor> lr_tensor,
         std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip,
         std::optional<Tensor> ema_tensor, std::optional<Tensor> seed) {
  check(averages.empty() && n_averaged.empty() && !clip && !ema_tensor && ema == 0,
        "SGD: averages and clipping are not there yet");
  const size_t count = params.size();
  check(grads.size() == count &&
            (momentum == 0 ? momentum_buffers.empty() : momentum_buffers.size() == count) &&
            (momentum_started.empty() || momentum_started.size() == count),
        "SGD: expected one gradient and, with momentum, one buffer for each of ", count, " parameters, got ",
        grads.size(), " and ", momentum_buffers.size());
  const Given given{lr_tensor, grad_scale, found_inf, seed};
  SgdArgs a{};
  a.lr = lr;
  a.momentum = momentum;
  a.dampening = dampening;
  a.weight_decay = weight_decay;
  a.l1 = l1;
  a.nesterov = nesterov;
  a.proximal = proximal;
  a.decoupled = decoupled;
  a.maximize = maximize;
  check_numbers(&a, given, count ? &params[0] : nullptr);

  // Not zeroed: most of it are layouts that nobody reads.
  const auto tensors = std::make_unique_for_overwrite<SgdTensor[]>(count);
  for (size_t i = 0; i < count; ++i)
    fill_tensor(&tensors[i], params[i], grads[i], momentum != 0 ? &momentum_buffers[i] : nullptr,
                momentum != 0 && !momentum_started.empty() ? &momentum_started[i] : nullptr,
                seed.has_value());
#ifdef FASTREG_CUDA
  if (count)
    on_stream("SGD", params[0], [&](void* stream) { return sgd_step_cuda(a, tensors.get(), count, stream); });
#else
  if (found_inf && value_of(*found_inf) != 0) return;  // a skipped step changes nothing, momentum included
  sgd_step(a, tensors.get(), count);
  for (size_t i = 0; i < count; ++i)
    if (tensors[i].started) *tensors[i].started = 1;
#endif
}

}  // namespace

#ifndef FASTREG_CUDA
constexpr int64_t kGrain = 1 << 15;  // elements per piece of work; a multiple of 8, as a span begins

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
// For sgd_autograd.h, which has checked the tensors itself.
const Capsule step_capsule("fastreg._C.sgd_step", reinterpret_cast<const void*>(&sgd_step));
#endif

}  // namespace fastreg

FR_LIBRARY_IMPL(m) { m.impl("sgd_", TORCH_BOX(&fastreg::sgd)); }

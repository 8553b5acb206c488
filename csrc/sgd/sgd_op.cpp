// torch.ops.fastreg.sgd_ on the CPU: checks, threads over the tiles of all tensors. The schema stands in fastreg/optim.py.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../common/check.h"
#include "sgd_math.h"

namespace fastreg {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements per piece of work; a multiple of the tile

double scalar_of(const char* name, const Tensor& t) {
  check(t.numel() == 1 && t.is_cpu(), "SGD: ", name, " must be one number on the device of the parameters, got shape ",
        shape_text(t));
  const void* p = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return *static_cast<const float*>(p);
    case ScalarType::Double:
      return *static_cast<const double*>(p);
    default:
      fail("SGD: ", name, " must be float32 or float64");
  }
}

void sgd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
         std::vector<Tensor> momentum_started, double lr, double momentum, double dampening, double weight_decay, double l1,
         bool nesterov, bool proximal, bool decoupled, bool maximize, std::optional<Tensor> lr_tensor,
         std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> seed) {
  const char* op = "SGD";
  const size_t count = params.size();
  check(grads.size() == count && (momentum == 0 ? momentum_buffers.empty() : momentum_buffers.size() == count) &&
            (momentum_started.empty() || momentum_started.size() == count),
        "SGD: expected one gradient and, with momentum, one buffer for each of ", count, " parameters, got ", grads.size(),
        " and ", momentum_buffers.size());
  SgdArgs a{};
  a.lr = lr_tensor ? scalar_of("lr", *lr_tensor) : lr;
  a.grad_scale = grad_scale ? scalar_of("grad_scale", *grad_scale) : 1;
  for (const double number : {a.lr, momentum, weight_decay, l1})
    check(std::isfinite(number) && number >= 0, "SGD: lr, momentum, weight_decay and l1 must be finite and at least 0, got ",
          number);
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
  if (seed) a.seed = seed_of(op, *seed);

  const auto tensors = std::make_unique_for_overwrite<SgdTensor[]>(count);  // not zeroed: most of it are layouts nobody reads
  for (size_t i = 0; i < count; ++i) {
    SgdTensor& t = tensors[i];
    t.dtype = dtype_of(op, "a parameter", params[i]);
    check_same(op, "a gradient", grads[i], "its parameter", params[i]);
    t.param_layout = layout_of(op, params[i]);
    t.grad_layout = layout_of(op, grads[i]);
    check(!overlaps_itself(t.param_layout), "SGD: a parameter's elements must not share memory; use .clone()");
    bool flat = same_dense_order(t.param_layout, t.grad_layout) && !(seed && !t.param_layout.contiguous);
    t.param = params[i].mutable_data_ptr();
    t.grad = grads[i].const_data_ptr();
    t.momentum = nullptr;
    t.first_step = false;
    if (momentum != 0) {
      check_same(op, "a momentum buffer", momentum_buffers[i], "its parameter", params[i]);
      t.momentum_layout = layout_of(op, momentum_buffers[i]);
      check(!overlaps_itself(t.momentum_layout), "SGD: a momentum buffer's elements must not share memory; use .clone()");
      flat = flat && same_dense_order(t.param_layout, t.momentum_layout);
      t.momentum = momentum_buffers[i].mutable_data_ptr();
      if (!momentum_started.empty()) {
        const Tensor& flag = momentum_started[i];
        check(flag.scalar_type() == ScalarType::Float && flag.numel() == 1 && flag.is_cpu(),
              "SGD: momentum_started must be one float32 on the device of the parameters; convert it with .float()");
        t.first_step = *static_cast<const float*>(flag.const_data_ptr()) == 0;
      }
    }
    if (flat) t.param_layout.contiguous = t.grad_layout.contiguous = t.momentum_layout.contiguous = true;
  }
  if (found_inf && scalar_of("found_inf", *found_inf) != 0) return;  // the step is skipped: nothing changes, momentum included

  for (const Tensor& flag : momentum_started) *static_cast<float*>(flag.mutable_data_ptr()) = 1;

  sgd_step(a, tensors.get(), count);
}

}  // namespace

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
    size_t i = size_t(std::upper_bound(first_piece.begin(), first_piece.end(), begin) - first_piece.begin()) - 1;
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

}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) { m.impl("sgd_", TORCH_BOX(&fastreg::sgd)); }

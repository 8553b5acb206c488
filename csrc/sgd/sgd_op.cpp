// torch.ops.fastreg.sgd_: checks, threads over all tensors or launches. The schema stands in fastreg/_sgd.py.
#include "../common/capsule.h"
#include "../common/optimizer_op.h"
#include "sgd_math.h"

namespace fastreg {
namespace {

void sgd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
         std::vector<Tensor> momentum_started, std::vector<Tensor> averages, std::vector<Tensor> n_averaged,
         double lr, double momentum, double dampening, double weight_decay, double l1, double ema,
         bool nesterov, bool proximal, bool decoupled, bool maximize, std::optional<Tensor> lr_tensor,
         std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip,
         std::optional<Tensor> ema_tensor, std::optional<Tensor> seed, std::vector<int64_t> places) {
  const char* op = "SGD";
  const size_t count = params.size();
  check(grads.size() == count &&
            (momentum == 0 ? momentum_buffers.empty() : momentum_buffers.size() == count) &&
            (momentum_started.empty() || momentum_started.size() == count),
        "SGD: expected one gradient and, with momentum, one buffer for each of ", count, " parameters, got ",
        grads.size(), " and ", momentum_buffers.size());
  check((averages.empty() || averages.size() == count) && n_averaged.size() == averages.size(),
        "SGD: expected an average and its count for each of ", count, " parameters or for none, got ",
        averages.size(), " and ", n_averaged.size());
  const Given given{lr_tensor, grad_scale, found_inf, clip, ema_tensor, seed};
  const SgdArgs a{
      step_args(op, given, count ? &params[0] : nullptr, lr, weight_decay, l1, ema, proximal, maximize),
      momentum, dampening, nesterov, decoupled};
  check(std::isfinite(momentum) && momentum >= 0, "SGD: momentum must be finite and at least 0, got ",
        momentum);
  check(std::isfinite(dampening), "SGD: dampening must be finite, got ", dampening);

  check_places(op, places, count);

  // It is not zeroed, because most of it is layouts that nobody reads.
  const auto tensors = std::make_unique_for_overwrite<StepTensor[]>(count);
  for (size_t i = 0; i < count; ++i) {
    StepTensor* t = &tensors[i];
    fill_first(op, t, i, places, params[i], grads[i]);
    if (momentum != 0) fill_slot(op, t, kMomentum, "a momentum buffer", momentum_buffers[i], params[i]);
    if (!momentum_started.empty())
      t->counter = counter_of(op, "momentum_started", momentum_started[i], params[i]);
    if (!averages.empty()) fill_average(op, t, averages[i], n_averaged[i], params[i]);
    find_flat(t, seed.has_value());
  }
#ifdef FASTREG_CUDA
  if (count)
    on_stream(op, params[0], [&](void* stream) { return sgd_step_cuda(a, tensors.get(), count, stream); });
#else
  if (!skips(given)) sgd_step(a, tensors.get(), count);
#endif
}

}  // namespace

#ifndef FASTREG_CUDA
void sgd_step(const SgdArgs& a, const StepTensor* tensors, size_t count) {
  step_all(FR_KERNELS(sgd_kernels, elements_of(tensors, count)), a, tensors, count, sgd_counts(a));
}
// For sgd_autograd.h, which has checked the tensors itself.
const Capsule step_capsule("fastreg._C.sgd_step", reinterpret_cast<const void*>(&sgd_step));
#endif

}  // namespace fastreg

FR_LIBRARY_IMPL(m) { m.impl("sgd_", TORCH_BOX(&fastreg::sgd)); }

// torch.ops.fastreg.adamw_: checks, threads over all tensors or launches. The schema stands in
// fastreg/_adamw.py.
#include "../common/capsule.h"
#include "../common/optimizer_op.h"
#include "adamw_math.h"

namespace fastreg {
namespace {

// The count of steps, which torch keeps on the CPU unless a step may be captured in a graph.
void fill_step(StepTensor* t, const Tensor& step, const Tensor& param, bool may_skip) {
  if (step.is_cpu() && !param.is_cpu()) {
    check(!may_skip, "AdamW: steps must lie on the device of the parameters where found_inf may skip a step");
    check(step.scalar_type() == ScalarType::Float && step.numel() == 1,
          "AdamW: a step must be one float32; convert it with .float()");
    t->step = *static_cast<const float*>(step.const_data_ptr());
  } else {
    t->counter = counter_of("AdamW", "a step", step, param);
  }
}

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> steps,
           std::vector<Tensor> averages, std::vector<Tensor> n_averaged, double lr, double beta1,
           double beta2, double eps, double weight_decay, double l1, double ema, bool proximal, bool cautious,
           bool maximize, std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_scale,
           std::optional<Tensor> found_inf, std::optional<Tensor> clip, std::optional<Tensor> ema_tensor,
           std::optional<Tensor> seed, std::vector<int64_t> places) {
  const char* op = "AdamW";
  const size_t count = params.size();
  check(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
            steps.size() == count && (max_exp_avg_sqs.empty() || max_exp_avg_sqs.size() == count),
        "AdamW: expected one gradient, two moments and one step for each of ", count, " parameters, got ",
        grads.size(), ", ", exp_avgs.size(), ", ", exp_avg_sqs.size(), " and ", steps.size());
  check((averages.empty() || averages.size() == count) && n_averaged.size() == averages.size(),
        "AdamW: expected an average and its count for each of ", count, " parameters or for none, got ",
        averages.size(), " and ", n_averaged.size());
  const Given given{lr_tensor, grad_scale, found_inf, clip, ema_tensor, seed};
  const AdamwArgs a{
      step_args(op, given, count ? &params[0] : nullptr, lr, weight_decay, l1, ema, proximal, maximize),
      beta1, beta2, eps, cautious};
  for (const double beta : {beta1, beta2})
    check(beta >= 0 && beta < 1, "AdamW: beta1 and beta2 must be in [0, 1), got ", beta);
  check(std::isfinite(eps) && eps >= 0, "AdamW: eps must be finite and at least 0, got ", eps);

  check_places(op, places, count);

  // It is not zeroed, because most of it is layouts that nobody reads.
  const auto tensors = std::make_unique_for_overwrite<StepTensor[]>(count);
  for (size_t i = 0; i < count; ++i) {
    StepTensor* t = &tensors[i];
    fill_first(op, t, i, places, params[i], grads[i]);
    fill_slot(op, t, kExpAvg, "exp_avg", exp_avgs[i], params[i]);
    fill_slot(op, t, kExpAvgSq, "exp_avg_sq", exp_avg_sqs[i], params[i]);
    if (!max_exp_avg_sqs.empty())
      fill_slot(op, t, kMaxExpAvgSq, "max_exp_avg_sq", max_exp_avg_sqs[i], params[i]);
    fill_step(t, steps[i], params[i], found_inf.has_value());
    if (!averages.empty()) fill_average(op, t, averages[i], n_averaged[i], params[i]);
    find_flat(t, seed.has_value());
  }
#ifdef FASTREG_CUDA
  if (count)
    on_stream(op, params[0], [&](void* stream) { return adamw_step_cuda(a, tensors.get(), count, stream); });
  for (size_t i = 0; i < count; ++i)
    if (!tensors[i].counter) *static_cast<float*>(steps[i].mutable_data_ptr()) += 1;
#else
  if (!skips(given)) adamw_step(a, tensors.get(), count);
#endif
}

}  // namespace

#ifndef FASTREG_CUDA
void adamw_step(const AdamwArgs& a, const StepTensor* tensors, size_t count) {
  step_all(FR_KERNELS(adamw_kernels, elements_of(tensors, count)), a, tensors, count, true);
}
// For adamw_autograd.h, which has checked the tensors itself.
const Capsule adamw_step_capsule("fastreg._C.adamw_step", reinterpret_cast<const void*>(&adamw_step));
#endif

}  // namespace fastreg

FR_LIBRARY_IMPL(m) { m.impl("adamw_", TORCH_BOX(&fastreg::adamw)); }

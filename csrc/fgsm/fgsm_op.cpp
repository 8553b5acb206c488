// torch.ops.fastreg.fgsm_step and pgd_step: checks, allocation, threads or launch. Schemas stand in
// fastreg/_fgsm.py.
#include "../common/backend.h"
#include "fgsm_math.h"

namespace fastreg {
namespace {

// The parameter that is one number, or a tensor that broadcasts to x. The tensor's dimensions larger than 1
// must follow one another in x. The Python side has made it contiguous and of the type of accumulation.
FgsmParameter parameter(const char* op, const char* name, const Tensor& x, double value,
                        const std::optional<Tensor>& values) {
  FgsmParameter result{value, nullptr, 1, 1};
  if (!values) return result;
  const Tensor& t = *values;
  const ScalarType expected = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_device(op, name, t, "x", x);
  check(t.scalar_type() == expected && t.is_contiguous() && t.dim() <= x.dim(), op, ": ", name,
        " must be a contiguous tensor of the type of accumulation that broadcasts to x, got shape ",
        shape_text(t));
  int64_t d = 0;
  const int64_t lead = x.dim() - t.dim();
  while (d < t.dim() && t.size(d) == 1) ++d;
  for (; d < t.dim() && t.size(d) == x.size(d + lead); ++d) result.count *= t.size(d);
  for (; d < t.dim() || d + lead < x.dim(); ++d) {
    check(d >= t.dim() || t.size(d) == 1, op, ": ", name, " of shape ", shape_text(t),
          " does not broadcast to x of shape ", shape_text(x),
          " over neighbouring dimensions; expand it to the shape of x");
    result.inner *= x.size(d + lead);
  }
  // All elements share the one value: `inner` is larger than numel, so that no run ends.
  if (result.count == 1) result.inner = x.numel() + 1;
  result.values = t.const_data_ptr();
  return result;
}

Tensor step(const char* op, const Tensor& x, const Tensor& grad, const Tensor* origin,
            const FgsmParameter& step, const FgsmParameter& radius, const FgsmParameter& lower,
            const FgsmParameter& upper) {
  FgsmArgs a{};
  a.dtype = dtype_of(op, "x", x);
  check_same(op, "grad", grad, "x", x);
  if (origin) check_same(op, "origin", *origin, "x", x);
  Tensor output = torch::stable::empty_like(x);
  a.x = x.const_data_ptr();
  a.grad = grad.const_data_ptr();
  a.origin = origin ? origin->const_data_ptr() : nullptr;
  a.output = output.mutable_data_ptr();
  a.x_layout = layout_of(op, x);
  a.grad_layout = layout_of(op, grad);
  a.output_layout = layout_of(op, output);
  if (origin) a.origin_layout = layout_of(op, *origin);
  a.step = step;
  a.radius = radius;
  a.lower = lower;
  a.upper = upper;
  const bool one_value = !step.values && !radius.values && !lower.values && !upper.values;
  // All tensors fill their memory in one order and no parameter depends on the index: memory order will do.
  if (one_value && same_dense_order(a.x_layout, a.grad_layout) &&
      same_dense_order(a.x_layout, a.output_layout) &&
      (!origin || same_dense_order(a.x_layout, a.origin_layout)))
    a.x_layout.contiguous = a.grad_layout.contiguous = a.origin_layout.contiguous =
        a.output_layout.contiguous = true;
#ifdef FASTREG_CUDA
  on_stream(op, x, [&](void* stream) { return fgsm_step_cuda(a, stream); });
#else
  constexpr int64_t kGrain = 1 << 15;  // elements per thread at least
  parallel(x.numel(), kGrain,
           [&](int64_t begin, int64_t end) { FR_KERNELS(fgsm_kernels, x.numel()).step(a, begin, end); });
#endif
  return output;
}

Tensor fgsm_step(Tensor x, Tensor grad, double eps, double lower, double upper,
                 std::optional<Tensor> eps_values, std::optional<Tensor> lower_values,
                 std::optional<Tensor> upper_values) {
  const char* op = "fgsm_step";
  return step(op, x, grad, nullptr, parameter(op, "eps", x, eps, eps_values), {},
              parameter(op, "lower", x, lower, lower_values), parameter(op, "upper", x, upper, upper_values));
}

Tensor pgd_step(Tensor x, Tensor grad, Tensor origin, double alpha, double eps, double lower, double upper,
                std::optional<Tensor> alpha_values, std::optional<Tensor> eps_values,
                std::optional<Tensor> lower_values, std::optional<Tensor> upper_values) {
  const char* op = "pgd_step";
  return step(op, x, grad, &origin, parameter(op, "alpha", x, alpha, alpha_values),
              parameter(op, "eps", x, eps, eps_values), parameter(op, "lower", x, lower, lower_values),
              parameter(op, "upper", x, upper, upper_values));
}

}  // namespace
}  // namespace fastreg

FR_LIBRARY_IMPL(m) {
  m.impl("fgsm_step", TORCH_BOX(&fastreg::fgsm_step));
  m.impl("pgd_step", TORCH_BOX(&fastreg::pgd_step));
}

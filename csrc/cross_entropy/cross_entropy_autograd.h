// The usual case of cross-entropy in C++. The formulas are those of the torch.autograd.Function in
// fastreg/_cross_entropy.py.
#pragma once
#include "../common/autograd.h"

namespace fastreg::autograd {

struct LossOptions {
  int64_t reduction, ignore_index;
  double label_smoothing;
  bool others;
  double z_loss;
  bool all_ignored_zero;
  std::optional<ScalarType> loss_dtype;
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_op(const Tensor& input, const Tensor& target,
                                                    const std::optional<Tensor>& weight, const LossOptions& o,
                                                    bool with_grad) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t, int64_t, double, bool, double,
      bool, std::optional<ScalarType>, bool)>("fastreg::cross_entropy");
  return call(op, input, target, weight, o.reduction, o.ignore_index, o.label_smoothing, o.others, o.z_loss,
              o.all_ignored_zero, o.loss_dtype, with_grad);
}

inline void cross_entropy_scale_op(const Tensor& values, const Tensor& factor) {
  static const auto op = find<void(const Tensor&, const Tensor&)>("fastreg::cross_entropy_scale_");
  call(op, values, factor);
}

// d (<v, G> + <u, lse>) / d input, wanted too rarely to be written twice: the function of that name in
// Python.
inline Tensor second_order(const Tensor& v, const Tensor& u, const variable_list& saved,
                           AutogradContext* ctx) {
  const pybind11::gil_scoped_acquire gil;
  pybind11::list arguments;
  for (const Tensor& t : {v, u, saved[0], saved[1], saved[2], saved[3]})
    arguments.append(pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t)));
  const auto whole = ctx->saved_data["whole"].toIntVector();
  const auto real = ctx->saved_data["real"].toDoubleVector();
  const auto function = pybind11::module_::import("fastreg._cross_entropy").attr("_second_order");
  const pybind11::object result = function(*arguments, whole[1], whole[2], real[0], whole[3] != 0, real[1],
                                           whole[4] != 0, pybind11::none());
  return THPVariable_Unpack(result.ptr());
}

// (loss, G, lse): why G and lse are outputs of the node is told in fastreg/_cross_entropy.py.
struct CrossEntropy : Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, const LossOptions& o) {
    auto [loss, grad, lse] = cross_entropy_op(input, target, weight, o, true);
    ctx->save_for_backward({grad, lse, target, weight.value_or(Tensor())});
    ctx->saved_data["whole"] = std::vector<int64_t>{int64_t(input.scalar_type()), o.reduction, o.ignore_index,
                                                    o.others, o.all_ignored_zero};
    ctx->saved_data["real"] = std::vector<double>{o.label_smoothing, o.z_loss};
    ctx->set_materialize_grads(false);
    return {loss, grad, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& grad = saved[0];
    Tensor g = grads[0], result;
    if (g.defined()) {
      // Where nobody else will read the gradient, the usual loss.backward(), with a g of 1, costs no pass
      // over it. A GPU's g is looked at by the kernel: to look at it here would be to wait.
      const bool ours = !at::GradMode::is_enabled() &&
                        !torch::autograd::get_current_graph_task_keep_graph() && is_plain(g) &&
                        g.numel() == 1;
      if (ours && g.is_cuda()) {
        result = grad.detach();
        cross_entropy_scale_op(result, g);
      } else if (ours && g.item().toDouble() == 1) {
        result = grad.detach();
      } else {
        result = grad * (g.dim() ? g.unsqueeze(1) : g).to(grad.scalar_type());
      }
    }
    if (grads[1].defined() || grads[2].defined()) {
      const Tensor second = second_order(grads[1], grads[2], saved, ctx);
      result = result.defined() ? result + second : second;
    }
    if (result.defined()) result = result.to(ScalarType(ctx->saved_data["whole"].toIntList().get(0)));
    return {result, {}, {}, {}};
  }
};

// (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, smoothing, z_loss,
// all_ignored, loss_dtype) -> loss or None
inline PyObject* cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t) {
  const Tensor *input = plain(args[0]), *target = plain(args[1]), *weight = nullptr;
  if (!input || !target || args[3] != Py_None || args[5] != Py_None || !PyLong_CheckExact(args[4]))
    Py_RETURN_NONE;
  LossOptions o{};
  int overflow = 0;
  o.ignore_index = PyLong_AsLongLongAndOverflow(args[4], &overflow);
  o.reduction = choice(args[6], {"none", "mean", "sum"});
  const int others = choice(args[8], {"uniform", "others"}), zero = choice(args[10], {"nan", "zero"});
  if (overflow || o.reduction < 0 || others < 0 || zero < 0 || !number(args[7], 0, 1, &o.label_smoothing) ||
      !number(args[9], 0, std::numeric_limits<double>::max(), &o.z_loss) || is_transformed())
    Py_RETURN_NONE;
  o.others = others == 1;
  o.all_ignored_zero = zero == 1;

  const ScalarType dtype = input->scalar_type(), target_dtype = target->scalar_type();
  const int64_t dims = input->dim();
  // The positions after the classes must merge into one dimension.
  if (!has_kernel(dtype) || dims < 2 || (dims > 3 && !input->is_contiguous())) Py_RETURN_NONE;
  const int64_t classes = input->size(1);
  if (classes == 0 || (o.others && classes == 1)) Py_RETURN_NONE;
  if (has_kernel(target_dtype)) {
    if (target->sizes() != input->sizes() || o.ignore_index >= 0 || wants_grad(*target) ||
        (dims > 3 && !target->is_contiguous()))
      Py_RETURN_NONE;
  } else {
    if (target_dtype != ScalarType::Long || target->dim() != dims - 1 || !target->is_contiguous() ||
        target->size(0) != input->size(0) || target->sizes().slice(1) != input->sizes().slice(2))
      Py_RETURN_NONE;
  }
  if (args[2] != Py_None) {
    weight = plain(args[2]);
    if (!weight || weight->requires_grad() || weight->dim() != 1 || weight->size(0) != classes ||
        !weight->is_contiguous() ||
        weight->scalar_type() != (dtype == ScalarType::Double ? dtype : ScalarType::Float))
      Py_RETURN_NONE;
  }
  if (args[11] != Py_None) {
    if (!THPDtype_Check(args[11])) Py_RETURN_NONE;
    o.loss_dtype = reinterpret_cast<THPDtype*>(args[11])->scalar_type;
    if (*o.loss_dtype != dtype && *o.loss_dtype != ScalarType::Float && *o.loss_dtype != ScalarType::Double)
      Py_RETURN_NONE;
  } else if (at::isReducedFloatingType(dtype) && at::autocast::is_autocast_enabled(input->device().type())) {
    o.loss_dtype = ScalarType::Float;
  }
  return without_lock([&] {
    const std::optional<Tensor> w = weight ? std::optional<Tensor>(*weight) : std::nullopt;
    return wants_grad(*input) ? CrossEntropy::apply(*input, *target, w, o)[0]
                              : std::get<0>(cross_entropy_op(*input, *target, w, o, false));
  });
}

inline const Method<cross_entropy, 12> register_cross_entropy("cross_entropy");

}  // namespace fastreg::autograd

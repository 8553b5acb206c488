// The usual case of cross-entropy in C++. The formulas are those of the torch.autograd.Function in
// fastreg/_cross_entropy.py.
#pragma once
#include "../common/autograd.h"
#include "cross_entropy_math.h"

namespace fastreg::autograd {

struct LossOptions {
  CrossEntropyOptions row;
  CrossEntropyReduction reduction;
  std::optional<ScalarType> loss_dtype;

  // In the order of the operator's schema, except for loss_dtype, which no derivative needs.
  auto all() const {
    return std::tuple_cat(std::tuple(int64_t(reduction.kind)), row.all(),
                          std::tuple(reduction.all_ignored_zero));
  }
};
using LossOptionValues = decltype(LossOptions{}.all());

template <class... Values>
auto find_cross_entropy(std::tuple<Values...>*) {
  return find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                                 Values..., std::optional<ScalarType>, bool)>(
      "fastreg::cross_entropy");
}

inline std::tuple<Tensor, Tensor, Tensor> cross_entropy_op(const Tensor& input, const Tensor& target,
                                                           const std::optional<Tensor>& weight,
                                                           const LossOptions& o, bool with_grad) {
  static const auto op = find_cross_entropy(static_cast<LossOptionValues*>(nullptr));
  return std::apply(
      [&](auto... values) { return call(op, input, target, weight, values..., o.loss_dtype, with_grad); },
      o.all());
}

// As in Python: what a factor pushes below float32's normal numbers is 0.
inline double largest_subnormal(ScalarType dtype) {
  return dtype == at::kBFloat16 ? 0x1p-126 - 0x1p-133 : 0x1p-126 - 0x1p-149;
}

inline void cross_entropy_scale_op(const Tensor& values, const Tensor& factor) {
  static const auto op = find<void(const Tensor&, const Tensor&)>("fastreg::cross_entropy_scale_");
  call(op, values, factor);
}

// d (<v, G> + <u, lse>) / d input. It is wanted too rarely to be written twice: this calls the function of
// that name in Python.
inline Tensor second_order(const Tensor& v, const Tensor& u, const variable_list& saved,
                           AutogradContext* ctx) {
  const pybind11::gil_scoped_acquire gil;
  pybind11::list arguments;
  for (const Tensor& t : {v, u, saved[0], saved[1], saved[2], saved[3]})
    arguments.append(pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t)));
  pybind11::list options;
  for (const c10::IValue& value : ctx->saved_data["options"].toTupleRef().elements()) {
    if (value.isBool())
      options.append(value.toBool());
    else if (value.isInt())
      options.append(value.toInt());
    else
      options.append(value.toDouble());
  }
  arguments.append(options);
  const auto function = pybind11::module_::import("fastreg._cross_entropy").attr("_second_order");
  const pybind11::object result = function(*arguments);
  return THPVariable_Unpack(result.ptr());
}

// The function of that name in Python, which says why.
inline Tensor scaled(const Tensor& gradient, Tensor g, const Tensor& target, AutogradContext* ctx) {
  const ScalarType dtype = gradient.scalar_type();
  if (!at::GradMode::is_enabled() && !torch::autograd::get_current_graph_task_keep_graph() && is_plain(g) &&
      g.numel() == 1 && !is_recorded()) {
    const Tensor first = gradient.detach();
    // One on a GPU is left for the kernel to read, since reading it here would wait for the GPU.
    const double factor = g.is_cpu() ? g.item().toDouble() : 0;
    if (std::isfinite(factor)) {
      if (factor != 1) cross_entropy_scale_op(first, g);
      return first;
    }
  }
  if (g.dim()) g = g.unsqueeze(1);
  if (target.scalar_type() == ScalarType::Long) {
    const int64_t ignored = ctx->saved_data["options"].toTupleRef().elements()[1].toInt();
    g = at::where(target.ne(ignored).unsqueeze(1), g, at::zeros({}, g.options()));
  }
  const Tensor product = gradient * g;
  return dtype == at::kDouble ? product : at::hardshrink(product, largest_subnormal(dtype));
}

// (loss, G, lse): fastreg/_cross_entropy.py says why G and lse are outputs of the node.
struct CrossEntropy : Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, const LossOptions& o) {
    auto [loss, grad, lse] = cross_entropy_op(input, target, weight, o, true);
    ctx->save_for_backward({grad, lse, target, weight.value_or(Tensor())});
    ctx->saved_data["options"] = o.all();
    ctx->saved_data["dtype"] = int64_t(input.scalar_type());
    ctx->set_materialize_grads(false);
    return {loss, grad, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& grad = saved[0];
    Tensor g = grads[0], result;
    // The second derivative comes first: it reads G, which the kernel below may overwrite.
    if (grads[1].defined() || grads[2].defined()) result = second_order(grads[1], grads[2], saved, ctx);
    if (g.defined()) {
      const Tensor first = scaled(grad, g, saved[2], ctx);
      result = result.defined() ? first + result : first;
    }
    if (result.defined()) result = result.to(ScalarType(ctx->saved_data["dtype"].toInt()));
    return {result, {}, {}, {}};
  }
};

// Reads the arguments of fastreg.cross_entropy that are options; false where they are for Python to look at.
inline bool read_options(PyObject* const* args, LossOptions* o) {
  if (args[3] != Py_None || args[5] != Py_None || !PyLong_CheckExact(args[4])) return false;
  int overflow = 0;
  o->row.ignore_index = PyLong_AsLongLongAndOverflow(args[4], &overflow);
  const int kind = choice(args[6], {"none", "mean", "sum"});
  const int others = choice(args[8], {"uniform", "others"}), zero = choice(args[10], {"nan", "zero"});
  if (overflow || kind < 0 || others < 0 || zero < 0) return false;
  o->reduction = {kind, zero == 1};
  o->row.others = others == 1;
  if (!number(args[7], &o->row.label_smoothing) || !number(args[9], &o->row.z_loss)) return false;
  const auto bounds = o->row.bounds();
  return std::all_of(bounds.begin(), bounds.end(), [](const auto& bound) { return bound.holds(); });
}

// Whether logits, targets and class weights are as the kernel takes them.
inline bool fit(const Tensor& input, const Tensor& target, const Tensor* weight, const LossOptions& o) {
  const ScalarType dtype = input.scalar_type(), target_dtype = target.scalar_type();
  const int64_t dims = input.dim();
  // The dimensions after the classes must merge into one dimension.
  if (!has_kernel(dtype) || dims < 2 || (dims > 3 && !input.is_contiguous())) return false;
  const int64_t classes = input.size(1);
  if (classes == 0 || (o.row.others && classes == 1)) return false;
  if (has_kernel(target_dtype)) {
    if (target.sizes() != input.sizes() || o.row.ignore_index >= 0 || wants_grad(target) ||
        (dims > 3 && !target.is_contiguous()))
      return false;
  } else {
    if (target_dtype != ScalarType::Long || target.dim() != dims - 1 || !target.is_contiguous() ||
        target.size(0) != input.size(0) || target.sizes().slice(1) != input.sizes().slice(2))
      return false;
  }
  return !weight || (!weight->requires_grad() && weight->dim() == 1 && weight->size(0) == classes &&
                     weight->is_contiguous() &&
                     weight->scalar_type() == (dtype == ScalarType::Double ? dtype : ScalarType::Float));
}

// The dtype that the loss is asked to have, or takes under autocast and beside probabilities of another
// dtype; false where it has no such loss.
inline bool read_loss_dtype(PyObject* argument, const Tensor& input, const Tensor& target,
                            const Tensor* weight, LossOptions* o) {
  const ScalarType dtype = input.scalar_type();
  if (argument == Py_None) {
    const bool widens =
        at::isReducedFloatingType(dtype) && at::autocast::is_autocast_enabled(input.device().type());
    ScalarType result = widens ? ScalarType::Float : dtype;
    if (has_kernel(target.scalar_type())) {
      result = c10::promoteTypes(result, target.scalar_type());
      if (weight) result = c10::promoteTypes(result, weight->scalar_type());
    }
    if (result != dtype) o->loss_dtype = result;
    return true;
  }
  if (!THPDtype_Check(argument)) return false;
  o->loss_dtype = reinterpret_cast<THPDtype*>(argument)->scalar_type;
  return *o->loss_dtype == dtype || *o->loss_dtype == ScalarType::Float ||
         *o->loss_dtype == ScalarType::Double;
}

// (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, smoothing, z_loss,
// all_ignored, loss_dtype) -> loss or None
inline PyObject* cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t) {
  const Tensor *input = plain(args[0]), *target = plain(args[1]), *weight = nullptr;
  LossOptions o{};
  if (!input || !target || !read_options(args, &o) || is_transformed()) Py_RETURN_NONE;
  if (args[2] != Py_None && !(weight = plain(args[2]))) Py_RETURN_NONE;
  if (!fit(*input, *target, weight, o) || !read_loss_dtype(args[11], *input, *target, weight, &o))
    Py_RETURN_NONE;
  return without_lock([&] {
    const std::optional<Tensor> w = weight ? std::optional<Tensor>(*weight) : std::nullopt;
    return wants_grad(*input) ? CrossEntropy::apply(*input, *target, w, o)[0]
                              : std::get<0>(cross_entropy_op(*input, *target, w, o, false));
  });
}

inline const Method<cross_entropy, 12> register_cross_entropy("cross_entropy");

}  // namespace fastreg::autograd

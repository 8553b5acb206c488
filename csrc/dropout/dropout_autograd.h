// The usual case of dropout and dropout_add in C++. The formulas are those of the torch.autograd.Functions in
// fastreg/_dropout.py and fastreg/_dropout_add.py, whose comments say why.
#pragma once
#include "../common/autograd.h"
#include "dropout_math.h"

namespace fastreg::autograd {

// `inner` neighbouring elements share a decision; kept ones become scale * x + shift, the others `dropped`.
struct Form {
  int64_t inner = 1;
  double scale = 1, shift = 0, dropped = 0;
};

std::tuple<Tensor, Tensor> dropout_op(const Tensor& input, double p, const Tensor& seed, const Form& f) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, double, const Tensor&, c10::SymInt, c10::SymInt, double,
                                      double, double)>("fastreg::dropout");
  return call(op, input, p, seed, c10::SymInt(0), c10::SymInt(f.inner), f.scale, f.shift, f.dropped);
}

inline void dropout_inplace_op(const Tensor& input, double p, const Tensor& seed, const Form& f) {
  static const auto op =
      find<Tensor(const Tensor&, double, const Tensor&, c10::SymInt, c10::SymInt, double, double, double)>(
          "fastreg::dropout_");
  call(op, input, p, seed, c10::SymInt(0), c10::SymInt(f.inner), f.scale, f.shift, f.dropped);
}

inline Tensor dropout_apply_op(const Tensor& input, const Tensor& mask, int64_t inner, double scale) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, c10::SymInt, double, double, double)>(
      "fastreg::dropout_apply");
  return call(op, input, mask, c10::SymInt(inner), scale, 0., 0.);
}

std::tuple<Tensor, Tensor> dropout_add_op(const Tensor& input, const Tensor& residual,
                                          const std::optional<Tensor>& bias, double p, const Tensor& seed,
                                          double scale) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&, double,
                                      const Tensor&, double)>("fastreg::dropout_add");
  return call(op, input, residual, bias, p, seed, scale);
}

inline Tensor apply_mask(const Tensor& grad, const Tensor& mask, int64_t inner, double scale);

// Saves what backward needs. The numbers are a list, because compiled autograd makes variables of lone
// numbers.
inline void keep(AutogradContext* ctx, const Tensor& mask, int64_t inner, double scale) {
  ctx->save_for_backward({mask});
  ctx->saved_data["form"] = std::vector<double>{double(inner), scale};
}

inline Tensor backward_of(AutogradContext* ctx, const Tensor& grad) {
  const Tensor mask = ctx->get_saved_variables()[0];
  const auto form = ctx->saved_data["form"].toDoubleList();
  return apply_mask(grad, mask, int64_t(form.get(0)), form.get(1));
}

// scale * x where kept, by a given mask. Its derivative is a function of the same kind.
struct Masked : Function<Masked> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& mask, int64_t inner,
                        double scale) {
    keep(ctx, mask, inner, scale);
    return dropout_apply_op(input, mask, inner, scale);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {backward_of(ctx, grads[0]), {}, {}, {}};
  }
};

inline Tensor apply_mask(const Tensor& grad, const Tensor& mask, int64_t inner, double scale) {
  return at::GradMode::is_enabled() ? Masked::apply(grad, mask, inner, scale)
                                    : dropout_apply_op(grad, mask, inner, scale);
}

struct Dropout : Function<Dropout> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, double p, const Tensor& seed,
                        const Form& f) {
    auto [output, mask] = dropout_op(input, p, seed, f);
    keep(ctx, mask, f.inner, f.scale);
    return output;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {backward_of(ctx, grads[0]), {}, {}, {}};
  }
};

// Nothing is saved where all is kept.
struct DropoutAdd : Function<DropoutAdd> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& residual,
                        const std::optional<Tensor>& bias, double p, const Tensor& seed, double scale) {
    auto [output, mask] = dropout_add_op(input, residual, bias, p, seed, scale);
    ctx->saved_data["has_bias"] = bias.has_value();
    if (p != 0) keep(ctx, mask, 1, scale);
    return output;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool wants_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
    Tensor grad_input, grad_bias;
    if (ctx->needs_input_grad(0) || wants_bias)
      grad_input = ctx->saved_data.count("form") ? backward_of(ctx, grads[0]) : grads[0];
    if (wants_bias) grad_bias = grad_input.sum_to_size(grads[0].sizes().slice(size_t(grads[0].dim() - 1)));
    return {ctx->needs_input_grad(0) ? grad_input : Tensor(), grads[0], grad_bias, {}, {}, {}};
  }
};

// The inverse of the probability that is drawn with, a multiple of 2^-32.
inline double inverted_scale(double p) {
  const uint64_t threshold = dropout_threshold(p);
  return threshold ? 0x1p32 / double(threshold) : 0;
}

// (input, p, training, inplace), or further (seed or None, inner, scale, shift, dropped) -> output or None
inline PyObject* dropout(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Tensor* input = plain(args[0]);
  double p = 0;
  Form form;
  if (!input || !number(args[1], 0, 1, &p) || !is_bool(args[2]) || !is_bool(args[3]) || is_transformed())
    Py_RETURN_NONE;
  if (args[2] == Py_False || p == 0 || input->numel() == 0) return Py_NewRef(args[0]);
  const bool inplace = args[3] == Py_True, derive = wants_grad(*input);
  if (!has_kernel(input->scalar_type()) || (inplace && (derive || input->is_inference()))) Py_RETURN_NONE;
  // What the operator would refuse is refused by Python, before a seed is drawn.
  if (input->dim() > 16 || (inplace && at::has_internal_overlap(*input) == at::MemOverlap::Yes))
    Py_RETURN_NONE;
  Tensor seed;
  if (count == 4) {
    form.scale = inverted_scale(p);
  } else {
    if (args[4] != Py_None) {
      const Tensor* given = plain(args[4]);
      if (!given) Py_RETURN_NONE;
      seed = *given;
    }
    form = {PyLong_AsLongLong(args[5]), PyFloat_AsDouble(args[6]), PyFloat_AsDouble(args[7]),
            PyFloat_AsDouble(args[8])};
    if (PyErr_Occurred()) return nullptr;
  }
  if (!seed.defined() && input->is_cuda() && !counts_seed(*input)) Py_RETURN_NONE;
  return without_lock([&] {
    if (!seed.defined()) seed = draw_seed(*input);
    if (inplace) {
      dropout_inplace_op(*input, p, seed, form);
      input->unsafeGetTensorImpl()->bump_version();  // a function that saved it must notice
      return *input;
    }
    return derive ? Dropout::apply(*input, p, seed, form) : std::get<0>(dropout_op(*input, p, seed, form));
  });
}

// (input, residual, p, bias or None, training) -> output or None
inline PyObject* dropout_add(PyObject*, PyObject* const* args, Py_ssize_t) {
  const Tensor *input = plain(args[0]), *residual = plain(args[1]),
               *given = args[3] == Py_None ? nullptr : plain(args[3]);
  double p = 0;
  if (!input || !residual || !number(args[2], 0, 1, &p) || (args[3] != Py_None && !given) ||
      !is_bool(args[4]) || is_transformed())
    Py_RETURN_NONE;
  // What the operator would refuse is refused by Python, before a seed is drawn.
  const ScalarType dtype = input->scalar_type();
  if (!has_kernel(dtype) || input->dim() > 16 || residual->scalar_type() != dtype ||
      residual->sizes() != input->sizes())
    Py_RETURN_NONE;
  if (given && (given->scalar_type() != dtype || given->dim() != 1 || input->dim() == 0 ||
                given->size(0) != input->size(-1) || !given->is_contiguous()))
    Py_RETURN_NONE;
  if (args[4] == Py_False || input->numel() == 0) p = 0;
  if (p != 0 && input->is_cuda() && !counts_seed(*input)) Py_RETURN_NONE;
  return without_lock([&] {
    if (p == 0 && !given) return at::add(*input, *residual);
    const std::optional<Tensor> bias = given ? std::optional<Tensor>(*given) : std::nullopt;
    const Tensor seed = p == 0 ? at::zeros({1}, ScalarType::Long) : draw_seed(*input);
    const double scale = inverted_scale(p);
    if (wants_grad(*input) || wants_grad(*residual) || (given && wants_grad(*given)))
      return DropoutAdd::apply(*input, *residual, bias, p, seed, scale);
    return std::get<0>(dropout_add_op(*input, *residual, bias, p, seed, scale));
  });
}

// p -> the scale of what is kept, for tests
inline PyObject* dropout_scale(PyObject*, PyObject* const* args, Py_ssize_t) {
  const double p = PyFloat_AsDouble(args[0]);
  return PyErr_Occurred() ? nullptr : PyFloat_FromDouble(inverted_scale(p));
}

inline const Method<dropout_scale, 1> register_dropout_scale("dropout_scale");
inline const Method<dropout, 4, 9> register_dropout("dropout");
inline const Method<dropout_add, 5> register_dropout_add("dropout_add");

}  // namespace fastreg::autograd

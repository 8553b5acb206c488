// The usual case of attention over few weights in C++, where all of them are held: two products that torch
// differentiates, and dropout(softmax(scores)) between them, which is the torch.autograd.Function of
// fastreg/_attention.py.
#pragma once
#include "../common/autograd.h"

namespace fastreg::autograd {

// All scores as the one block that the operators are given, and how they drop.
struct AllScores {
  const Tensor& scores;
  double p;
  const Tensor& seed;
  bool is_causal;
  int64_t keys() const { return scores.size(-1); }
  int64_t query() const { return is_causal ? 0 : -1; }
  Tensor flat(const Tensor& t) const { return t.view({-1, scores.size(-2), t.size(-1)}); }
};

inline void attention_weights_op(const AllScores& a, const Tensor& dropped, const Tensor& largest,
                                 const Tensor& total) {
  static const auto op =
      find<void(const Tensor&, const Tensor&, const std::optional<Tensor>&, double, const Tensor&, int64_t,
                int64_t, int64_t, bool, const Tensor&, const Tensor&)>("fastreg::attention_weights_");
  call(op, a.flat(a.scores), a.flat(dropped), std::nullopt, a.p, a.seed, 0, a.keys(), a.query(), true,
       a.flat(largest), a.flat(total));
}

inline void attention_gradient_op(const AllScores& a, const Tensor& gradients, const Tensor& d_scores,
                                  const Tensor& largest, const Tensor& total) {
  static const auto op =
      find<void(const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                const std::optional<Tensor>&, const std::optional<Tensor>&, double, const Tensor&, int64_t,
                int64_t, int64_t, bool, const Tensor&, const Tensor&)>("fastreg::attention_gradient_");
  call(op, a.flat(a.scores), std::nullopt, a.flat(gradients), a.flat(d_scores), std::nullopt, a.p, a.seed, 0,
       a.keys(), a.query(), true, a.flat(largest), a.flat(total));
}

struct DroppedSoftmax : Function<DroppedSoftmax> {
  // The dropped weights, and the largest score and the sum of each row.
  static std::array<Tensor, 3> compute(const AllScores& a) {
    auto sizes = a.scores.sizes().vec();
    sizes.back() = 1;
    const Tensor dropped = at::empty_like(a.scores), largest = at::empty(sizes, a.scores.options()),
                 total = at::empty_like(largest);
    attention_weights_op(a, dropped, largest, total);
    return {dropped, largest, total};
  }
  static Tensor forward(AutogradContext* ctx, const Tensor& scores, double p, bool is_causal,
                        const Tensor& seed) {
    const auto [dropped, largest, total] = compute({scores, p, seed, is_causal});
    ctx->save_for_backward({scores, largest, total, seed});
    ctx->saved_data["options"] = std::vector<double>{p, double(is_causal)};
    return dropped;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto options = ctx->saved_data["options"].toDoubleList();
    const AllScores a{saved[0], options.get(0), saved[3], options.get(1) != 0};
    if (at::GradMode::is_enabled() || !is_plain(grads[0])) return {by_definition(a, grads[0]), {}, {}, {}};
    const Tensor d_scores = at::empty_like(a.scores);
    attention_gradient_op(a, grads[0].contiguous(), d_scores, saved[1], saved[2]);
    return {d_scores, {}, {}, {}};
  }

 private:
  // In operations that have derivatives, which stand in Python.
  static Tensor by_definition(const AllScores& a, const Tensor& grad) {
    const pybind11::gil_scoped_acquire gil;
    const auto function =
        pybind11::module_::import("fastreg._attention").attr("_differentiable_gradient_of_softmax");
    const pybind11::object result = function(grad, a.scores, a.p, a.is_causal, a.seed);
    return THPVariable_Unpack(result.ptr());
  }
};

// The tensors of a call.
struct AttentionInputs {
  const Tensor *query, *key, *value, *mask;  // mask may be null
};

// Whether a mask of as many dimensions broadcasts to the weights.
inline bool fits(const Tensor& mask, const Tensor& query, const Tensor& key) {
  for (int64_t d = 0; d < mask.dim(); ++d) {
    const int64_t want = d < mask.dim() - 1 ? query.size(d) : key.size(d - 1);
    if (mask.size(d) != 1 && mask.size(d) != want) return false;
  }
  return true;
}

// Whether the weights are few enough to be held, and the tensors pass every check of the function in Python.
inline bool are_usual(const AttentionInputs& t, bool is_causal, int64_t few) {
  const ScalarType dtype = t.query->scalar_type();
  const int64_t dims = t.query->dim();
  if (!has_kernel(dtype) || dims < 2 || (t.mask && is_causal) || t.query->numel() == 0) return false;
  for (const Tensor* other : {t.key, t.value})
    if (!other->is_cpu() || other->scalar_type() != dtype || other->dim() != dims || other->numel() == 0 ||
        other->sizes().slice(0, size_t(dims - 2)) != t.query->sizes().slice(0, size_t(dims - 2)))
      return false;
  if (t.key->size(-1) != t.query->size(-1) || t.value->size(-2) != t.key->size(-2)) return false;
  if (t.mask && (!(t.mask->scalar_type() == ScalarType::Bool || t.mask->scalar_type() == dtype) ||
                 t.mask->dim() != dims || !t.mask->is_cpu()))
    return false;
  if (t.mask && !fits(*t.mask, *t.query, *t.key)) return false;
  const double weights = double(t.query->numel()) / double(t.query->size(-1)) * double(t.key->size(-2));
  return t.query->is_cpu() && weights <= double(few) && !at::autocast::is_autocast_enabled(c10::kCPU);
}

inline Tensor attend(const AttentionInputs& t, double p, bool is_causal, double scale) {
  const ScalarType dtype = t.query->scalar_type(),
                   wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const auto widened = [&](const Tensor* x) { return x->scalar_type() == wide ? *x : x->to(wide); };
  const Tensor seed = draw_seed(*t.query);
  Tensor scores = at::matmul(widened(t.query) * scale, widened(t.key).transpose(-2, -1));
  if (t.mask && t.mask->scalar_type() == ScalarType::Bool) {  // -inf is added where a key may not be seen
    const Tensor more = at::zeros_like(*t.mask, scores.options());
    scores = scores + more.masked_fill_(t.mask->logical_not(), -std::numeric_limits<double>::infinity());
  } else if (t.mask) {
    scores = scores + widened(t.mask);
  }
  scores = scores.contiguous();
  const Tensor dropped = wants_grad(scores) ? DroppedSoftmax::apply(scores, p, is_causal, seed)
                                            : DroppedSoftmax::compute({scores, p, seed, is_causal})[0];
  const Tensor output = at::matmul(dropped, widened(t.value));
  return dtype == wide ? output : output.to(dtype);
}

// (query, key, value, attn_mask or None, p, is_causal, scale or None, the most weights that are few) ->
// output or None
inline PyObject* attention(PyObject*, PyObject* const* args, Py_ssize_t) {
  const AttentionInputs t{plain(args[0]), plain(args[1]), plain(args[2]),
                          args[3] == Py_None ? nullptr : plain(args[3])};
  double p = 0, scale = 0;
  if (!t.query || !t.key || !t.value || (args[3] != Py_None && !t.mask) || !number(args[4], 0, 1, &p) ||
      p == 0 || !is_bool(args[5]) || is_transformed())
    Py_RETURN_NONE;
  const bool is_causal = args[5] == Py_True;
  if (!are_usual(t, is_causal, PyLong_AsLongLong(args[7]))) Py_RETURN_NONE;
  constexpr double most = std::numeric_limits<double>::max();
  if (args[6] == Py_None)
    scale = std::pow(double(t.query->size(-1)), -0.5);  // as Python computes it
  else if (!number(args[6], -most, most, &scale))
    Py_RETURN_NONE;
  return without_lock([&] { return attend(t, p, is_causal, scale); });
}
inline const Method<attention, 8> register_attention("attention");

}  // namespace fastreg::autograd

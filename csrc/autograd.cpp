// The fast path of autograd: of a small tensor's time most is spent between Python and the kernel, and this is that part in C++.
// An optimiser's step over many small tensors is such a time too.
//
// The formulas are those of the torch.autograd.Functions in fastreg/dropout.py, dropout_add.py and cross_entropy.py, over the
// same raw operators, and give the same bits. A function here takes the usual case, plain tensors on one device and arguments
// that pass every check, or gives None before it has done anything; the Python code is then the one that knows transforms,
// subclasses and errors.
//
// The one file that sees torch's C++ headers, which change with each minor version: so is it built and named,
// fastreg._autograd_<major>_<minor>, and fastreg works without.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/DistributionsHelper.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "dropout/dropout_math.h"
#include "sgd/sgd_math.h"

namespace fastreg {
namespace {

using at::ScalarType;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// ---- the raw operators

// Straight to the kernel: autograd is what stands in this file. A kernel's std::invalid_argument becomes torch's ValueError,
// which the backward engine passes on as one.
template <class Signature, class... Args>
auto call(const c10::TypedOperatorHandle<Signature>& op, Args&&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  try {
    return op.call(std::forward<Args>(args)...);
  } catch (const std::invalid_argument& error) {
    C10_THROW_ERROR(ValueError, error.what());
  }
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// `inner` neighbouring elements share a decision; kept ones become scale * x + shift, the others `dropped`.
struct Form {
  int64_t inner = 1;
  double scale = 1, shift = 0, dropped = 0;
};

std::tuple<Tensor, Tensor> dropout_op(const Tensor& input, double p, const Tensor& seed, const Form& f) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, double, const Tensor&, int64_t, c10::SymInt, double, double, double)>(
          "fastreg::dropout");
  return call(op, input, p, seed, int64_t(0), c10::SymInt(f.inner), f.scale, f.shift, f.dropped);
}

void dropout_inplace_op(const Tensor& input, double p, const Tensor& seed, const Form& f) {
  static const auto op =
      find<Tensor(const Tensor&, double, const Tensor&, int64_t, c10::SymInt, double, double, double)>("fastreg::dropout_");
  call(op, input, p, seed, int64_t(0), c10::SymInt(f.inner), f.scale, f.shift, f.dropped);
}

Tensor dropout_apply_op(const Tensor& input, const Tensor& mask, int64_t inner, double scale) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, c10::SymInt, double, double, double)>("fastreg::dropout_apply");
  return call(op, input, mask, c10::SymInt(inner), scale, 0., 0.);
}

std::tuple<Tensor, Tensor> dropout_add_op(const Tensor& input, const Tensor& residual, const std::optional<Tensor>& bias,
                                          double p, const Tensor& seed, double scale) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&, double, const Tensor&, double)>(
          "fastreg::dropout_add");
  return call(op, input, residual, bias, p, seed, scale);
}

struct LossOptions {
  int64_t reduction, ignore_index;
  double label_smoothing;
  bool others;
  double z_loss;
  bool all_ignored_zero;
  std::optional<ScalarType> loss_dtype;
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_op(const Tensor& input, const Tensor& target,
                                                    const std::optional<Tensor>& weight, const LossOptions& o, bool with_grad) {
  static const auto op =
      find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t, int64_t,
                                              double, bool, double, bool, std::optional<ScalarType>, bool)>(
          "fastreg::cross_entropy");
  return call(op, input, target, weight, o.reduction, o.ignore_index, o.label_smoothing, o.others, o.z_loss, o.all_ignored_zero,
              o.loss_dtype, with_grad);
}

void cross_entropy_scale_op(const Tensor& values, const Tensor& factor) {
  static const auto op = find<void(const Tensor&, const Tensor&)>("fastreg::cross_entropy_scale_");
  call(op, values, factor);
}

// ---- dropout

Tensor apply_mask(const Tensor& grad, const Tensor& mask, int64_t inner, double scale);

// What backward needs of a mask beside it; a list, because compiled autograd makes variables of lone numbers.
void keep(AutogradContext* ctx, const Tensor& mask, int64_t inner, double scale) {
  ctx->save_for_backward({mask});
  ctx->saved_data["form"] = std::vector<double>{double(inner), scale};
}

Tensor backward_of(AutogradContext* ctx, const Tensor& grad) {
  const Tensor mask = ctx->get_saved_variables()[0];
  const auto form = ctx->saved_data["form"].toDoubleList();
  return apply_mask(grad, mask, int64_t(form.get(0)), form.get(1));
}

// scale * x where kept, of a given mask; its derivative is a function of the same kind.
struct Masked : Function<Masked> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& mask, int64_t inner, double scale) {
    keep(ctx, mask, inner, scale);
    return dropout_apply_op(input, mask, inner, scale);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {backward_of(ctx, grads[0]), {}, {}, {}};
  }
};

Tensor apply_mask(const Tensor& grad, const Tensor& mask, int64_t inner, double scale) {
  return at::GradMode::is_enabled() ? Masked::apply(grad, mask, inner, scale) : dropout_apply_op(grad, mask, inner, scale);
}

struct Dropout : Function<Dropout> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, double p, const Tensor& seed, const Form& f) {
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
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& residual, const std::optional<Tensor>& bias,
                        double p, const Tensor& seed, double scale) {
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

// splitmix64, as mix_seed in fastreg/_library.py
uint64_t mix_seed(uint64_t seed, uint64_t offset) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * (offset + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// From the default generator of the input's device, into the CPU's memory: what draw_seed in fastreg/_library.py gives. On a CPU
// that is what torch.randint(-(2**63), 2**63 - 1, (1,)) gives, by the same function of torch.
Tensor draw_seed(const Tensor& input) {
  Tensor seed = at::detail::empty_cpu({1}, ScalarType::Long);
  if (input.is_cuda()) {
    at::Generator gpu = at::globalContext().defaultGenerator(input.device());
    const std::lock_guard<std::mutex> lock(gpu.mutex());
    const uint64_t offset = gpu.get_offset();
    gpu.set_offset(offset + 4);
    *seed.mutable_data_ptr<int64_t>() = int64_t(mix_seed(gpu.current_seed(), offset));
    return seed;
  }
  static const auto generator = at::detail::getDefaultCPUGenerator();
  auto* const cpu = at::check_generator<at::CPUGeneratorImpl>(generator);
  const at::uniform_int_from_to_distribution<int64_t> draw(std::numeric_limits<uint64_t>::max(),
                                                           std::numeric_limits<int64_t>::min());
  const std::lock_guard<std::mutex> lock(cpu->mutex_);
  *seed.mutable_data_ptr<int64_t>() = draw(cpu);
  return seed;
}

// ---- cross-entropy

bool is_plain(const Tensor& t);

// d (<v, G> + <u, lse>) / d input, wanted too rarely to be written twice: the function of that name in Python.
Tensor second_order(const Tensor& v, const Tensor& u, const variable_list& saved, AutogradContext* ctx) {
  const pybind11::gil_scoped_acquire gil;
  pybind11::list arguments;
  for (const Tensor& t : {v, u, saved[0], saved[1], saved[2], saved[3]})
    arguments.append(pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t)));
  const auto whole = ctx->saved_data["whole"].toIntVector();
  const auto real = ctx->saved_data["real"].toDoubleVector();
  const auto function = pybind11::module_::import("fastreg.cross_entropy").attr("_second_order");
  const pybind11::object result =
      function(*arguments, whole[1], whole[2], real[0], whole[3] != 0, real[1], whole[4] != 0, pybind11::none());
  return THPVariable_Unpack(result.ptr());
}

// (loss, G, lse): why G and lse are outputs of the node is told in fastreg/cross_entropy.py.
struct CrossEntropy : Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, const LossOptions& o) {
    auto [loss, grad, lse] = cross_entropy_op(input, target, weight, o, true);
    ctx->save_for_backward({grad, lse, target, weight.value_or(Tensor())});
    ctx->saved_data["whole"] =
        std::vector<int64_t>{int64_t(input.scalar_type()), o.reduction, o.ignore_index, o.others, o.all_ignored_zero};
    ctx->saved_data["real"] = std::vector<double>{o.label_smoothing, o.z_loss};
    ctx->set_materialize_grads(false);
    return {loss, grad, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& grad = saved[0];
    Tensor g = grads[0], result;
    if (g.defined()) {
      // Where nobody else will read the gradient, the usual loss.backward(), with a g of 1, costs no pass over it. A GPU's g is
      // looked at by the kernel: to look at it here would be to wait.
      const bool ours =
          !at::GradMode::is_enabled() && !torch::autograd::get_current_graph_task_keep_graph() && is_plain(g) && g.numel() == 1;
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

// ---- the usual case

// Whether this build has CUDA kernels; they are registered before the first call.
bool has_cuda() {
  static const bool has =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastreg::dropout", "").hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return has;
}

// Dense memory and nothing more: no subclass, no wrapper of a transform, no negative or conjugate view.
bool is_plain(const Tensor& t) {
  constexpr c10::DispatchKeySet cpu(
      {c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  constexpr c10::DispatchKeySet cuda({c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCUDA,
                                      c10::DispatchKey::AutocastCUDA});
  return t.defined() && (cpu.has_all(t.key_set()) || (cuda.has_all(t.key_set()) && has_cuda()));
}

// A GPU's seed is its generator's count unless a CUDA graph is being captured, which must draw one when it is replayed.
bool counts_seed(const Tensor& input) {
  if (c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getDevice() != input.device()) return false;
  static PyObject* const capturing = PyObject_GetAttrString(PyImport_AddModule("torch._C"), "_cuda_isCurrentStreamCapturing");
  PyObject* const answer = capturing ? PyObject_CallNoArgs(capturing) : nullptr;
  PyErr_Clear();
  Py_XDECREF(answer);
  return answer == Py_False;
}

const Tensor* plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return is_plain(t) ? &t : nullptr;
}

bool has_kernel(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// Something listens to or changes what operators do: a mode, a transform of torch.func, a tangent, a trace.
bool is_transformed() {
  return !c10::default_included_set.has_all(c10::impl::tls_local_dispatch_key_set().included_) ||
         at::impl::torch_function_mode_enabled() || torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool wants_grad(const Tensor& t) { return t.requires_grad() && at::GradMode::is_enabled(); }

bool is_bool(PyObject* object) { return object == Py_True || object == Py_False; }

// A float or int in [low, high]; bool and NumPy's scalars are for Python.
bool number(PyObject* object, double low, double high, double* value) {
  if (PyFloat_CheckExact(object)) {
    *value = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_CheckExact(object)) {
    int overflow = 0;
    *value = double(PyLong_AsLongLongAndOverflow(object, &overflow));
    if (overflow) return false;
  } else {
    return false;
  }
  return low <= *value && *value <= high;
}

// The index of a string in `choices`, -1 if it is none of them.
template <size_t n>
int choice(PyObject* object, const char* const (&choices)[n]) {
  if (PyUnicode_CheckExact(object))
    for (size_t i = 0; i < n; ++i)
      if (PyUnicode_CompareWithASCIIString(object, choices[i]) == 0) return int(i);
  return -1;
}

// Runs `work` without Python's lock; its errors become Python's.
template <class Work>
PyObject* run(Work work) {
  try {
    Tensor result;
    {
      const pybind11::gil_scoped_release no_gil;
      result = work();
    }
    return THPVariable_Wrap(std::move(result));
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// ---- what Python calls

double inverted_scale(double p) {
  const uint64_t threshold = dropout_threshold(p);
  return threshold ? 0x1p32 / double(threshold) : 0;
}

// (input, p, training, inplace), or further (seed or None, inner, scale, shift, dropped) -> output or None
PyObject* dropout(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Tensor* input = plain(args[0]);
  double p = 0;
  Form form;
  if (!input || !number(args[1], 0, 1, &p) || !is_bool(args[2]) || !is_bool(args[3]) || is_transformed()) Py_RETURN_NONE;
  if (args[2] == Py_False || p == 0 || input->numel() == 0) return Py_NewRef(args[0]);
  const bool inplace = args[3] == Py_True, derive = wants_grad(*input);
  if (!has_kernel(input->scalar_type()) || (inplace && (derive || input->is_inference()))) Py_RETURN_NONE;
  Tensor seed;
  if (count == 4) {
    form.scale = inverted_scale(p);
  } else {
    if (args[4] != Py_None) {
      const Tensor* given = plain(args[4]);
      if (!given) Py_RETURN_NONE;
      seed = *given;
    }
    form = {PyLong_AsLongLong(args[5]), PyFloat_AsDouble(args[6]), PyFloat_AsDouble(args[7]), PyFloat_AsDouble(args[8])};
    if (PyErr_Occurred()) return nullptr;
  }
  if (!seed.defined() && input->is_cuda() && !counts_seed(*input)) Py_RETURN_NONE;
  return run([&] {
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
PyObject* dropout_add(PyObject*, PyObject* const* args, Py_ssize_t) {
  const Tensor *input = plain(args[0]), *residual = plain(args[1]), *given = args[3] == Py_None ? nullptr : plain(args[3]);
  double p = 0;
  if (!input || !residual || !number(args[2], 0, 1, &p) || (args[3] != Py_None && !given) || !is_bool(args[4]) ||
      is_transformed())
    Py_RETURN_NONE;
  const ScalarType dtype = input->scalar_type();
  if (!has_kernel(dtype) || residual->scalar_type() != dtype || residual->sizes() != input->sizes()) Py_RETURN_NONE;
  if (given && (given->scalar_type() != dtype || given->dim() != 1 || input->dim() == 0 || given->size(0) != input->size(-1) ||
                !given->is_contiguous()))
    Py_RETURN_NONE;
  if (args[4] == Py_False || input->numel() == 0) p = 0;
  if (p != 0 && input->is_cuda() && !counts_seed(*input)) Py_RETURN_NONE;
  return run([&] {
    if (p == 0 && !given) return at::add(*input, *residual);
    const std::optional<Tensor> bias = given ? std::optional<Tensor>(*given) : std::nullopt;
    const Tensor seed = p == 0 ? at::zeros({1}, ScalarType::Long) : draw_seed(*input);
    const double scale = inverted_scale(p);
    if (wants_grad(*input) || wants_grad(*residual) || (given && wants_grad(*given)))
      return DropoutAdd::apply(*input, *residual, bias, p, seed, scale);
    return std::get<0>(dropout_add_op(*input, *residual, bias, p, seed, scale));
  });
}

// (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, smoothing, z_loss, all_ignored,
// loss_dtype) -> loss or None
PyObject* cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t) {
  const Tensor *input = plain(args[0]), *target = plain(args[1]), *weight = nullptr;
  if (!input || !target || args[3] != Py_None || args[5] != Py_None || !PyLong_CheckExact(args[4])) Py_RETURN_NONE;
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
    if (target->sizes() != input->sizes() || o.ignore_index >= 0 || wants_grad(*target) || (dims > 3 && !target->is_contiguous()))
      Py_RETURN_NONE;
  } else {
    if (target_dtype != ScalarType::Long || target->dim() != dims - 1 || !target->is_contiguous() ||
        target->size(0) != input->size(0) || target->sizes().slice(1) != input->sizes().slice(2))
      Py_RETURN_NONE;
  }
  if (args[2] != Py_None) {
    weight = plain(args[2]);
    if (!weight || weight->requires_grad() || weight->dim() != 1 || weight->size(0) != classes || !weight->is_contiguous() ||
        weight->scalar_type() != (dtype == ScalarType::Double ? dtype : ScalarType::Float))
      Py_RETURN_NONE;
  }
  if (args[11] != Py_None) {
    if (!THPDtype_Check(args[11])) Py_RETURN_NONE;
    o.loss_dtype = reinterpret_cast<THPDtype*>(args[11])->scalar_type;
    if (*o.loss_dtype != dtype && *o.loss_dtype != ScalarType::Float && *o.loss_dtype != ScalarType::Double) Py_RETURN_NONE;
  } else if (at::isReducedFloatingType(dtype) && at::autocast::is_autocast_enabled(input->device().type())) {
    o.loss_dtype = ScalarType::Float;
  }
  return run([&] {
    const std::optional<Tensor> w = weight ? std::optional<Tensor>(*weight) : std::nullopt;
    return wants_grad(*input) ? CrossEntropy::apply(*input, *target, w, o)[0]
                              : std::get<0>(cross_entropy_op(*input, *target, w, o, false));
  });
}

// A tensor on the CPU that fills its memory without gaps, so that elementwise work may take it for flat.
const Tensor* flat(PyObject* object) {
  const Tensor* t = plain(object);
  return t && t->is_cpu() && has_kernel(t->scalar_type()) && t->is_non_overlapping_and_dense() ? t : nullptr;
}

bool same_form(const Tensor& a, const Tensor& b) {
  return is_plain(b) && a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

// What a step needs of a group of parameters.
struct SgdGroup {
  SgdArgs args{};
  std::unique_ptr<SgdTensor[]> tensors;
  std::vector<Tensor> params;  // those with a gradient
};

// False for a group that is not the usual case. That its numbers are in range, Python has checked.
bool collect(PyObject* group, PyObject* state, SgdGroup* result) {
  SgdArgs& a = result->args;
  const auto item = [&](const char* name) { return PyDict_GetItemString(group, name); };
  const auto read = [&](const char* name, double* value) {
    return item(name) && number(item(name), 0, std::numeric_limits<double>::max(), value);
  };
  for (const char* name : {"nesterov", "decoupled", "maximize"})
    if (!item(name) || !is_bool(item(name))) return false;
  PyObject *list = item("params"), *mode = item("l1_mode");
  if (!list || !PyList_CheckExact(list) || !mode || item("stochastic_rounding") != Py_False || !read("lr", &a.lr) ||
      !read("momentum", &a.momentum) || !read("dampening", &a.dampening) || a.dampening != 0 ||
      !read("weight_decay", &a.weight_decay) || !read("l1", &a.l1))
    return false;
  a.grad_scale = 1;
  a.nesterov = item("nesterov") == Py_True;
  a.decoupled = item("decoupled") == Py_True;
  a.maximize = item("maximize") == Py_True;
  a.proximal = choice(mode, {"subgradient", "proximal"}) == 1;
  const Py_ssize_t count = PyList_GET_SIZE(list);
  result->tensors = std::make_unique_for_overwrite<SgdTensor[]>(size_t(count));  // not zeroed: mostly layouts nobody reads
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(list, i);
    const Tensor* param = flat(object);
    if (!param) return false;
    const Tensor& grad = param->grad();
    if (!grad.defined()) continue;
    const Tensor* buffer = nullptr;
    if (a.momentum != 0) {
      PyObject* own = PyDict_GetItemWithError(state, object);
      PyObject* kept = own && PyDict_CheckExact(own) ? PyDict_GetItemString(own, "momentum_buffer") : nullptr;
      buffer = kept ? flat(kept) : nullptr;
    }
    if (!same_form(*param, grad) || (a.momentum != 0 && !(buffer && same_form(*param, *buffer)))) return false;
    SgdTensor& t = result->tensors[result->params.size()];
    t.dtype = param->scalar_type() == ScalarType::Float    ? DType::kFloat32
              : param->scalar_type() == ScalarType::Double ? DType::kFloat64
              : param->scalar_type() == ScalarType::Half   ? DType::kFloat16
                                                           : DType::kBFloat16;
    t.param = param->mutable_data_ptr();
    t.grad = grad.const_data_ptr();
    t.momentum = buffer ? buffer->mutable_data_ptr() : nullptr;
    t.param_layout.numel = param->numel();
    t.started = nullptr;
    result->params.push_back(*param);
  }
  return true;
}

// (param_groups, state) -> True if all of them have been stepped, None if none has
PyObject* sgd(PyObject*, PyObject* const* args, Py_ssize_t) {
  static const auto step = reinterpret_cast<decltype(&sgd_step)>(PyCapsule_Import("fastreg._C.sgd_step", 0));
  if (!step) return nullptr;
  if (!PyList_CheckExact(args[0]) || !PyDict_Check(args[1]) || is_transformed()) Py_RETURN_NONE;
  std::vector<SgdGroup> groups(size_t(PyList_GET_SIZE(args[0])));
  for (size_t i = 0; i < groups.size(); ++i) {
    PyObject* group = PyList_GET_ITEM(args[0], Py_ssize_t(i));
    if (!PyDict_CheckExact(group) || !collect(group, args[1], &groups[i])) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
  }
  {
    const pybind11::gil_scoped_release no_gil;
    for (const SgdGroup& group : groups) {
      step(group.args, group.tensors.get(), group.params.size());
      for (const Tensor& param : group.params) param.unsafeGetTensorImpl()->bump_version();  // a graph that saved it must notice
    }
  }
  Py_RETURN_TRUE;
}

// (seed, offset) -> the seed that they stand for
PyObject* mix(PyObject*, PyObject* const* args, Py_ssize_t) {
  const uint64_t seed = PyLong_AsUnsignedLongLong(args[0]), offset = PyLong_AsUnsignedLongLong(args[1]);
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(int64_t(mix_seed(seed, offset)));
}

// Counts are checked here once, so that the functions may read their arguments.
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), Py_ssize_t... counts>
PyObject* entry(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (((count == counts) || ...)) return function(self, args, count);
  return PyErr_Format(PyExc_TypeError, "fastreg's autograd module: got %zd arguments; rebuild fastreg", count);
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), Py_ssize_t... counts>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<function, counts...>)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<dropout, 4, 9>("dropout"),
                         method<dropout_add, 5>("dropout_add"),
                         method<cross_entropy, 12>("cross_entropy"),
                         method<sgd, 2>("sgd"),
                         method<mix, 2>("mix_seed"),
                         {}};

}  // namespace
}  // namespace fastreg

PYBIND11_MODULE(FASTREG_AUTOGRAD_MODULE, m) {
  m.attr("torch") = FASTREG_BUILT_WITH_TORCH;
  if (PyModule_AddFunctions(m.ptr(), fastreg::methods)) throw pybind11::error_already_set();
}

// A step of an optimiser over many small tensors. In Python, collecting them would take longer than the step.
// The rules are those of the classes in fastreg/optim. This is for csrc/autograd.cpp only, as autograd.h.
#pragma once
#include "../sum_of_squares/sum_of_squares_math.h"
#include "autograd.h"
#include "optimizer_math.h"

namespace fastreg::autograd {

// A tensor on the CPU that fills its memory without gaps, so that elementwise work can walk it as flat
// memory.
inline const Tensor* flat(PyObject* object) {
  const Tensor* t = plain(object);
  return t && t->is_cpu() && has_kernel(t->scalar_type()) && t->is_non_overlapping_and_dense() ? t : nullptr;
}

inline bool same_form(const Tensor& a, const Tensor& b) {
  return is_plain(b) && a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         a.strides() == b.strides();
}

inline DType dtype_of(ScalarType type) {  // one that has kernels
  return type == ScalarType::Float    ? DType::kFloat32
         : type == ScalarType::Double ? DType::kFloat64
         : type == ScalarType::Half   ? DType::kFloat16
                                      : DType::kBFloat16;
}

// A parameter group, its options by name.
struct GroupOptions {
  PyObject* group;

  PyObject* at(const char* name) const { return PyDict_GetItemString(group, name); }
  bool read(const char* name, double* value) const {
    return at(name) && number(at(name), 0, std::numeric_limits<double>::max(), value);
  }
  bool read(const char* name, bool* value) const {
    if (!at(name) || !is_bool(at(name))) return false;
    *value = at(name) == Py_True;
    return true;
  }
  bool is_off(const char* name) const { return !at(name) || at(name) == Py_False || at(name) == Py_None; }
};

// What a step needs of a parameter group.
template <class Args>
struct StepGroup {
  Args args{};
  std::unique_ptr<StepTensor[]> tensors;
  std::vector<Tensor> params;  // those with a gradient
  // Gradients and state: while no lock of Python is held, another thread may drop them.
  std::vector<Tensor> held;
};

// The options that all optimisers have. False for what is not the usual case. Python has checked that the
// numbers are in range.
inline bool read_options(const GroupOptions& options, StepArgs* a) {
  PyObject* const mode = options.at("l1_mode");
  if (!mode || !options.read("stochastic_rounding", &a->stochastic_rounding) || !options.read("lr", &a->lr) ||
      !options.read("weight_decay", &a->weight_decay) || !options.read("l1", &a->l1) ||
      !options.read("maximize", &a->maximize) || !(options.is_off("ema") || options.read("ema", &a->ema)))
    return false;
  if (a->stochastic_rounding) {
    PyObject* const given = options.at("rounding_seed");
    if (!given || !PyLong_CheckExact(given)) return false;
    a->seed = {uint64_t(PyLong_AsLongLong(given)), nullptr};
    if (PyErr_Occurred()) return false;
  }
  a->proximal = choice(mode, {"subgradient", "proximal"}) == 1;
  a->grad_factor = a->maximize ? -1 : 1;
  a->clip = 1;
  return true;
}

// While it lives no other thread changes these two objects of Python, whose items are borrowed here. With a
// GIL nobody does anyway.
struct Unchanged {
#ifdef Py_GIL_DISABLED
  Unchanged(PyObject* a, PyObject* b) { PyCriticalSection2_Begin(&section, a, b); }
  ~Unchanged() { PyCriticalSection2_End(&section); }
  PyCriticalSection2 section;
#else
  Unchanged(PyObject*, PyObject*) {}
  ~Unchanged() {}
#endif
  Unchanged(const Unchanged&) = delete;
};

// A name as Python has it, made once: to make one for every parameter would take as long as all else.
inline PyObject* name_of(const char* text) { return PyUnicode_InternFromString(text); }

// The state of a parameter under a name, of its form; null where there is none, or another.
inline const Tensor* state_of(PyObject* own, PyObject* name, const Tensor& param) {
  PyObject* const kept = own ? PyDict_GetItemWithError(own, name) : nullptr;
  const Tensor* const t = kept ? flat(kept) : nullptr;
  return t && same_form(param, *t) ? t : nullptr;
}
inline float* count_of(PyObject* own, PyObject* name, std::vector<Tensor>* held) {
  PyObject* const kept = own ? PyDict_GetItemWithError(own, name) : nullptr;
  const Tensor* const t = kept ? flat(kept) : nullptr;
  if (!t || t->scalar_type() != ScalarType::Float || t->numel() != 1) return nullptr;
  held->push_back(*t);
  return t->mutable_data_ptr<float>();
}

// The decay of the average in its warm-up, as warmed_up in fastreg/optim/_average.py: torch's power has bits
// of its own.
inline bool warm_up(const GroupOptions& options, const StepTensor* tensors, size_t count, double* ema) {
  double power = 2. / 3;
  if (options.is_off("ema_warmup") || count == 0) return true;
  if (options.at("ema_warmup") != Py_True && !options.read("ema_warmup", &power)) return false;
  if (power == 0) return true;
  float most = 0;
  for (size_t i = 0; i < count; ++i) most = std::max(most, *tensors[i].n_averaged);
  const Tensor n = at::scalar_tensor(1 + double(most), at::TensorOptions().dtype(ScalarType::Double));
  *ema = std::min(1 - at::pow(n, -power).item<double>(), *ema);
  return true;
}

// Asks for tensors and their storage. What nobody has touched since the last step has left the caches, and
// each object lies behind a pointer in another one. Level by level many are waited for at once; tensor by
// tensor the wait for 256 small parameters would be longer than their step.
inline void fetch(const void* at, int lines) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(at) + 64 * i);
}
inline void fetch_tensors(const std::vector<const Tensor*>& tensors) {
  for (const Tensor* t : tensors) fetch(t->unsafeGetTensorImpl(), 4);
  for (const Tensor* t : tensors)
    if (t->has_storage()) fetch(t->storage().unsafeGetStorageImpl(), 2);
}
inline void fetch_group(PyObject* params, PyObject* state, const std::vector<PyObject*>& names) {
  std::vector<const Tensor*> tensors;
  std::vector<PyObject*> owns, kept;
  const Py_ssize_t count = PyList_GET_SIZE(params);
  const auto unpack = [&](PyObject* object) {
    if (THPVariable_CheckExact(object)) tensors.push_back(&THPVariable_Unpack(object));
  };
  for (Py_ssize_t i = 0; i < count; ++i) fetch(PyList_GET_ITEM(params, i), 1);
  for (Py_ssize_t i = 0; i < count; ++i) unpack(PyList_GET_ITEM(params, i));
  fetch_tensors(tensors);
  for (const Tensor* t : tensors)
    if (const auto* meta = t->unsafeGetTensorImpl()->autograd_meta()) fetch(meta, 2);
  std::vector<const Tensor*> grads;
  for (const Tensor* t : tensors)
    if (t->grad().defined()) grads.push_back(&t->grad());
  fetch_tensors(grads);
  if (names.empty()) return;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (PyObject* const own = PyDict_GetItem(state, PyList_GET_ITEM(params, i));
        own && PyDict_CheckExact(own))
      owns.push_back(own), fetch(own, 1);
  for (PyObject* const own : owns) fetch(reinterpret_cast<PyDictObject*>(own)->ma_keys, 3);
  for (PyObject* const own : owns)
    for (PyObject* const name : names)
      if (PyObject* const value = PyDict_GetItem(own, name)) kept.push_back(value), fetch(value, 1);
  tensors.clear();
  for (PyObject* const object : kept) unpack(object);
  fetch_tensors(tensors);
}

// The parameters of a group that have a gradient, with the state of those names, and with the count of steps
// and the average where they are asked for. `first` is the number of the group's first parameter. False where
// one of them is not the usual case.
template <class Args>
bool collect_tensors(const GroupOptions& options, PyObject* state, std::initializer_list<PyObject*> names,
                     PyObject* counter, size_t first, StepGroup<Args>* result) {
  static PyObject *const ema = name_of("ema"), *const n_averaged = name_of("n_averaged");
  PyObject* const list = options.at("params");
  if (!list || !PyList_CheckExact(list)) return false;
  const bool average = !options.is_off("ema"), rounds = result->args.step.stochastic_rounding;
  std::vector<PyObject*> all(names);
  if (counter) all.push_back(counter);
  if (average) all.insert(all.end(), {ema, n_averaged});
  fetch_group(list, state, all);
  const Py_ssize_t count = PyList_GET_SIZE(list);
  // It is not zeroed, because most of it is layouts that nobody reads.
  result->tensors = std::make_unique_for_overwrite<StepTensor[]>(size_t(count));
  result->params.reserve(size_t(count));
  result->held.reserve(size_t(count) * (names.size() + 4));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const object = PyList_GET_ITEM(list, i);
    const Tensor* const param = flat(object);
    if (!param) return false;
    const Tensor& grad = param->grad();
    if (!grad.defined()) {
      // Averaged without a step: what may get a gradient, and what has been frozen since it had one.
      PyObject* const before = average ? PyDict_GetItemWithError(state, object) : nullptr;
      if (average &&
          (param->requires_grad() || (before && PyDict_CheckExact(before) && PyDict_GetItem(before, ema))))
        return false;
      continue;
    }
    if (!same_form(*param, grad)) return false;
    if (rounds && (param->scalar_type() == ScalarType::Half || !param->is_contiguous())) return false;
    PyObject* own = nullptr;
    if (names.size() || counter || average) own = PyDict_GetItemWithError(state, object);
    if (own && !PyDict_CheckExact(own)) return false;
    StepTensor& t = result->tensors[result->params.size()];
    t.dtype = dtype_of(param->scalar_type());
    t.layout[kParam].numel = param->numel();
    t.counter = t.n_averaged = nullptr;
    t.draw = uint32_t(first + size_t(i));
    t.first = t.row = 0;
    t.columns = std::max<int64_t>(1, param->numel());
    for (void*& data : t.data) data = nullptr;
    t.data[kParam] = param->mutable_data_ptr();
    t.data[kGrad] = const_cast<void*>(grad.const_data_ptr());
    int slot = kState;
    const auto take = [&](int to, PyObject* name) {
      const Tensor* const kept = state_of(own, name, *param);
      if (!kept) return false;
      t.data[to] = kept->mutable_data_ptr();
      result->held.push_back(*kept);
      return true;
    };
    for (PyObject* const name : names)
      if (!take(slot++, name)) return false;
    if (counter && !(t.counter = count_of(own, counter, &result->held))) return false;
    if (average && !(take(kAverage, ema) && (t.n_averaged = count_of(own, n_averaged, &result->held))))
      return false;
    result->params.push_back(*param);
    result->held.push_back(grad);
  }
  return !average || warm_up(options, result->tensors.get(), result->params.size(), &result->args.step.ema);
}

// The gradients of all groups.
template <class Args>
std::vector<SquaresTensor> gradients_of(const std::vector<StepGroup<Args>>& groups) {
  std::vector<SquaresTensor> result;
  for (const StepGroup<Args>& group : groups)
    for (size_t i = 0; i < group.params.size(); ++i) {
      const StepTensor& t = group.tensors[i];
      SquaresTensor& grad = result.emplace_back();
      grad.dtype = t.dtype;
      grad.data = t.data[kGrad];
      grad.layout.numel = t.layout[kParam].numel;
      grad.layout.contiguous = true;  // the sum of a permutation
    }
  return result;
}

// The norm that belongs to a sum of squares, and the factor that clips it, in the bits of
// fastreg/optim/_clip.py.
template <class Scalar>
Scalar clip(double squares, double max_norm, double* factor) {
  const Scalar norm = Scalar(std::sqrt(double(Scalar(squares))));
  *factor = std::min(double(Scalar(1) / (norm + Scalar(1e-6)) * Scalar(max_norm)), 1.);
  return norm;
}

// (param_groups, state[, max_norm]) -> True, or the norm of the gradients, if all groups have been stepped;
// None if none has, because something is not the usual case or the norm is not finite.
// collect(group, state, first, result) is false for a group that is not the usual case.
template <class Args, class Step, class Collect>
PyObject* step_groups(PyObject* const* args, Py_ssize_t given, Step step, Collect collect) {
  static const auto sum_of =
      reinterpret_cast<decltype(&sum_of_squares_cpu)>(PyCapsule_Import("fastreg._C.sum_of_squares", 0));
  if (!step || !sum_of) return nullptr;
  PyObject *const list = args[0], *const state = args[1];
  if (!PyList_CheckExact(list) || !PyDict_Check(state) || is_transformed()) Py_RETURN_NONE;
  const bool clips = given == 3;
  double max_norm = 0;
  if (clips && !number(args[2], 0, std::numeric_limits<double>::infinity(), &max_norm)) Py_RETURN_NONE;
  // Everything is collected before anything is stepped.
  std::vector<StepGroup<Args>> groups(size_t(PyList_GET_SIZE(list)));
  size_t first = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    PyObject* const group = PyList_GET_ITEM(list, Py_ssize_t(i));
    const Unchanged until_collected(group, state);
    if (!PyDict_CheckExact(group) || !collect(GroupOptions{group}, state, first, &groups[i])) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
    first += size_t(PyList_GET_SIZE(PyDict_GetItemString(group, "params")));
  }
  std::vector<SquaresTensor> grads;
  if (clips) grads = gradients_of(groups);
  if (clips && grads.empty()) Py_RETURN_NONE;
  const bool wide = std::any_of(grads.begin(), grads.end(),
                                [](const SquaresTensor& t) { return t.dtype == DType::kFloat64; });
  double norm = 0, factor = 1;
  {
    const pybind11::gil_scoped_release no_gil;
    if (clips) {
      const double squares = sum_of(grads.data(), grads.size());
      norm =
          wide ? clip<double>(squares, max_norm, &factor) : double(clip<float>(squares, max_norm, &factor));
    }
    if (std::isfinite(norm))
      for (StepGroup<Args>& group : groups) {
        group.args.step.clip = factor;
        step(group.args, group.tensors.get(), group.params.size());
        for (const Tensor& param : group.params)
          param.unsafeGetTensorImpl()->bump_version();  // a graph that saved it must notice
      }
  }
  if (!std::isfinite(norm)) Py_RETURN_NONE;
  if (!clips) Py_RETURN_TRUE;
  return THPVariable_Wrap(at::scalar_tensor(norm, wide ? at::kDouble : at::kFloat));
}

}  // namespace fastreg::autograd

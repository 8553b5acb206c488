// What the fast paths of autograd in csrc/<op>/<op>_autograd.h share: calls of the raw operators, the test of
// what is usual, readers of Python's arguments, the seed, the methods of the module. This is for
// csrc/autograd.cpp only, since it sees torch's C++ headers, which change with each minor version.
//
// What stands in Python as well is held together by tests/test_twins.py.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/DistributionsHelper.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/hardshrink.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
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

#include "mix_seed.h"

// As <ATen/autocast_mode.h> declares it in torch 2.10 to 2.15. That header brings all operators of torch.
namespace at::autocast {
TORCH_API bool is_autocast_enabled(at::DeviceType device_type);
}

namespace fastreg::autograd {

using at::ScalarType;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// ---- the raw operators

// Goes straight to the kernel, below torch's autograd. A kernel's std::invalid_argument becomes torch's
// ValueError, which the backward engine passes on as one.
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

// ---- the usual case

// Whether this build has CUDA kernels of any op. They are registered before the first call.
inline bool has_cuda() {
  static const bool has = [] {
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
      const auto op = name.getNamespace() == "fastreg" ? dispatcher.findSchema(name) : std::nullopt;
      if (op && op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) return true;
    }
    return false;
  }();
  return has;
}

// Dense memory and nothing more: no subclass, no wrapper of a transform, no negative or conjugate view.
inline bool is_plain(const Tensor& t) {
  constexpr c10::DispatchKeySet cpu({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                     c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  constexpr c10::DispatchKeySet cuda({c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA});
  return t.defined() && (cpu.has_all(t.key_set()) || (cuda.has_all(t.key_set()) && has_cuda()));
}

// Whether a seed can be made of the count of a GPU's generator: not while a CUDA graph is captured, which
// must draw its seed when it is replayed, and only on the current GPU.
inline bool counts_seed(const Tensor& input) {
  if (c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getDevice() != input.device()) return false;
  static PyObject* const capturing =
      PyObject_GetAttrString(PyImport_AddModule("torch._C"), "_cuda_isCurrentStreamCapturing");
  PyObject* const answer = capturing ? PyObject_CallNoArgs(capturing) : nullptr;
  PyErr_Clear();
  Py_XDECREF(answer);
  return answer == Py_False;
}

inline const Tensor* plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return is_plain(t) ? &t : nullptr;
}

inline bool has_kernel(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half ||
         t == ScalarType::BFloat16;
}

// Whether something listens to or changes what operators do: a mode, a transform of torch.func, a tangent, a
// trace.
inline bool is_transformed() {
  return !c10::default_included_set.has_all(c10::impl::tls_local_dispatch_key_set().included_) ||
         at::impl::torch_function_mode_enabled() || torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// Whether make_fx records what operators do: a number that is read would stand in the graph for good.
inline bool is_recorded() {
  return c10::impl::TorchDispatchModeTLS::get_mode(c10::impl::TorchDispatchModeKey::PROXY).has_value();
}

inline bool wants_grad(const Tensor& t) { return t.requires_grad() && at::GradMode::is_enabled(); }

inline bool is_bool(PyObject* object) { return object == Py_True || object == Py_False; }

// Reads a float or an int. A bool or a scalar of NumPy is left to Python.
inline bool number(PyObject* object, double* value) {
  if (PyFloat_CheckExact(object)) {
    *value = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_CheckExact(object)) {
    int overflow = 0;
    *value = double(PyLong_AsLongLongAndOverflow(object, &overflow));
    if (overflow) return false;
  } else {
    return false;
  }
  return true;
}

// The same for a number in [low, high].
inline bool number(PyObject* object, double low, double high, double* value) {
  return number(object, value) && low <= *value && *value <= high;
}

// The index of a string in `choices`, -1 if it is none of them.
template <size_t n>
int choice(PyObject* object, const char* const (&choices)[n]) {
  if (PyUnicode_CheckExact(object))
    for (size_t i = 0; i < n; ++i)
      if (PyUnicode_CompareWithASCIIString(object, choices[i]) == 0) return int(i);
  return -1;
}

// What `work` gives, which runs without Python's lock; its errors become Python's.
template <class Work>
PyObject* without_lock(Work work) {
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

// ---- the seed

// From the default generator of the input's device, into the CPU's memory: what draw_seed in
// fastreg/_seeds.py gives. On a CPU that is what torch.randint(-(2**63), 2**63 - 1, (1,)) gives, by the same
// function of torch.
inline Tensor draw_seed(const Tensor& input) {
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
  at::uniform_int_from_to_distribution<int64_t> draw(std::numeric_limits<uint64_t>::max(),
                                                     std::numeric_limits<int64_t>::min());
  const std::lock_guard<std::mutex> lock(cpu->mutex_);
  *seed.mutable_data_ptr<int64_t>() = draw(cpu);
  return seed;
}

// ---- methods of the module

// Counts of arguments are checked here once, so that the functions may read them.
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), Py_ssize_t... counts>
PyObject* entry(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (((count == counts) || ...)) return function(self, args, count);
  return PyErr_Format(PyExc_TypeError, "fastreg's autograd module: got %zd arguments; rebuild fastreg",
                      count);
}

// The methods of the module. Each <op>_autograd.h registers its own, with the counts of arguments it takes:
//   inline const Method<dropout, 4, 9> register_dropout("dropout");
inline std::vector<PyMethodDef>& methods() {
  static std::vector<PyMethodDef> all;
  return all;
}
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), Py_ssize_t... counts>
struct Method {
  explicit Method(const char* name) {
    const auto call = reinterpret_cast<void (*)()>(&entry<function, counts...>);
    methods().push_back({name, reinterpret_cast<PyCFunction>(call), METH_FASTCALL, nullptr});
  }
};

// (seed, offset) -> the seed that they stand for
inline PyObject* mix_seed_method(PyObject*, PyObject* const* args, Py_ssize_t) {
  const uint64_t seed = PyLong_AsUnsignedLongLong(args[0]), offset = PyLong_AsUnsignedLongLong(args[1]);
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(int64_t(mix_seed(seed, offset)));
}
inline const Method<mix_seed_method, 2> register_mix_seed("mix_seed");

}  // namespace fastreg::autograd
